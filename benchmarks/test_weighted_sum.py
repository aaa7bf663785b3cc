"""`weighted_sum` of large arrays against the speed of a copy, and against the NumPy expression that it replaces."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import merge
from mergekit_cl.api import prepare
from mergekit_cl.dtypes import type_of
from mergekit_cl.registry import find

Array: TypeAlias = npt.NDArray[Any]

WEIGHTS = {2: [0.3, 0.7], 3: [0.2, 0.3, 0.5], 4: [0.1, 0.2, 0.3, 0.4]}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def arrays(request: pytest.FixtureRequest, scaled: Callable[[int], int]) -> list[Array]:
    """Four models of 64 Mi elements each."""
    random = np.random.default_rng(0)
    size = scaled(64 << 20)
    return [random.standard_normal(size, np.float32).astype(type_of[request.param], copy=False) for _ in range(4)]


@pytest.mark.parametrize("inputs", [2, 3, 4])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_weighted_sum(
    arrays: list[Array],
    inputs: int,
    backend: str,
    threads: int,
    race: Callable[..., None],
    copy: Callable[..., None],
    check: Callable[..., None],
) -> None:
    models, weights = arrays[:inputs], WEIGHTS[inputs]
    out = np.zeros_like(models[0])
    executor, _ = prepare(
        find("linear"), models, None, out,
        backend=backend, nonfinite="allow", threads=threads, parameters={"weight": weights},
    )  # fmt: skip

    def merged(into: Array | None) -> Any:
        return merge(models, method="linear", weight=weights, out=into, backend=backend, threads=threads)

    executor.run()
    check(out, models, weights)
    for result in (merged(out), merged(None)):
        assert result.tobytes() == out.tobytes()
    check(expression(models, weights), models, weights)
    race(
        {
            "kernel": executor.run,
            "merge(out=)": lambda: merged(out),
            "merge()": lambda: merged(None),
            "expression": lambda: expression(models, weights),
            "copy": lambda: copy(models[0], out),
            "copy in one thread": lambda: copy(models[0], out, 1),
        },
        rounds=15,
        table="weighted_sum",
        case={"backend": backend, "dtype": out.dtype.name, "inputs": inputs},
        bytes=(inputs + 1) * out.nbytes,
        copied=2 * out.nbytes,
    )


def expression(models: list[Array], weights: list[float]) -> Array:
    """What a user would write: ``w0 * a + w1 * b``, by way of float32."""
    wide = [model.astype(np.float32, copy=False) for model in models]
    return np.asarray(sum(weight * model for weight, model in zip(weights, wide, strict=True))).astype(
        models[0].dtype, copy=False
    )
