"""The error of every method in bfloat16, ours and mergekit's, against the same merge in float64."""

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mergekit_cl import merge, methods

Array: TypeAlias = npt.NDArray[Any]

ELEMENTS = 200_000

# name: (models, whether there is a base, our parameters, mergekit's or None)
CASES: dict[str, tuple[int, bool, dict[str, Any], dict[str, Any] | None]] = {
    "linear": (3, False, {"weight": [0.5, 0.3, 0.2]}, {"weight": [0.5, 0.3, 0.2]}),
    "sfa": (2, False, {"beta": 0.3}, None),
    "wise_ft": (1, True, {"alpha": 0.3}, None),
    "task_arithmetic": (3, True, {"weight": 0.3}, {"weight": 0.3}),
    "ties": (3, True, {"density": 0.2, "weight": [1.0, 0.3, 0.7]}, {"density": 0.2, "weight": [1.0, 0.3, 0.7]}),
    "magnitude_prune": (3, True, {"density": 0.2, "weight": 0.3}, None),
    # nothing is dropped, because mergekit draws other masks
    "dare_linear": (3, True, {"density": 1.0, "weight": 0.3}, {"density": 1.0, "weight": 0.3}),
    "dare_ties": (3, True, {"density": 1.0, "weight": [1.0, 0.5, 0.25]}, {"density": 1.0, "weight": [1.0, 0.5, 0.25]}),
    "breadcrumbs": (3, True, {"density": 0.3, "weight": 0.3}, {"density": 0.3, "weight": 0.3}),
    "breadcrumbs_ties": (3, True, {"density": 0.3, "weight": 0.3}, {"density": 0.3, "weight": 0.3}),
    "slerp": (1, True, {"t": 0.3}, {"t": 0.3}),
    "nuslerp": (2, True, {"weight": [1.0, 2.0]}, {"weight": [1.0, 2.0]}),
    "multislerp": (3, False, {}, {"weight": 1.0}),
    "karcher": (3, False, {}, {}),
    "model_stock": (3, True, {}, {}),
    "geometric_median": (3, False, {}, None),
    "ema": (3, False, {}, None),
    "lawa": (3, False, {"window": 2}, None),
    "wsm": (3, False, {}, None),
    "passthrough": (1, False, {"scale": 0.3}, {"scale": 0.3}),
    "della": (3, True, {"density": 1.0, "weight": [1.0, 0.5, 0.25]}, {"density": 1.0, "weight": [1.0, 0.5, 0.25]}),
    "della_linear": (3, True, {"density": 1.0, "weight": 0.3}, {"density": 1.0, "weight": 0.3}),
    "sce": (3, True, {}, {}),
    "arcee_fusion": (1, True, {}, {}),
    "nearswap": (1, True, {"t": 0.1}, {"t": 0.1}),
    "ram": (3, True, {}, {}),
    "ramplus_tl": (3, True, {}, None),  # mergekit returns float32 for bfloat16
    "magmax": (3, True, {"lambda_": 0.5}, None),
    "median": (3, False, {}, None),
    "fisher": (3, False, {}, None),
    # of vectors these average the task vectors
    "tsv_m": (3, True, {}, None),
    "iso_c": (3, True, {}, None),
    "iso_cts": (3, True, {}, None),
    "opcm": (3, True, {}, None),
}


@pytest.fixture(scope="module")
def models() -> list[Array]:
    """A base, and three fine-tunes of it."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(ELEMENTS).astype(ml_dtypes.bfloat16)
    return [base, *((base + 0.2 * rng.standard_normal(ELEMENTS)).astype(ml_dtypes.bfloat16) for _ in range(3))]


@pytest.mark.parametrize("name", methods())  # a method that CASES lacks fails
def test_error(benchmark: BenchmarkFixture, models: list[Array], name: str) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    count, based, parameters, theirs = CASES[name]
    base, tuned = models[0] if based else None, models[1 : 1 + count]
    wide = [model.astype(np.float64) for model in tuned]
    beside: dict[str, Any] = dict.fromkeys(methods()[name].companions, models[:count])
    wide_beside: dict[str, Any] = {p: [model.astype(np.float64) for model in given] for p, given in beside.items()}
    wide_base = None if base is None else base.astype(np.float64)
    exact = merge(wide, name, base=wide_base, backend="numpy", **parameters, **wide_beside)
    ours = benchmark.pedantic(lambda: merge(tuned, name, base=base, **parameters, **beside))  # type: ignore[no-untyped-call]
    # DESIGN's bound: half a unit in the last place of the result, and 2**-22 of all that is added up
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-20))) - 7)
    bound = unit / 2 + 2.0**-22 * sum(np.abs(w) for w in [*wide, *(() if base is None else (base.astype(np.float64),))])
    error = np.abs(ours.astype(np.float64) - exact)
    # where the sum of the votes is zero in exact arithmetic, rounding elects: those entries are counted, and left out
    elected = "elect" in methods()[name].parameters or name in ("sce", "arcee_fusion")
    doubtful = (error > bound) if elected else np.zeros(ELEMENTS, bool)
    assert doubtful.mean() < 1e-4
    assert (error <= bound)[~doubtful].all()
    error[doubtful] = 0
    row: dict[str, Any] = {
        "largest error, of the bound": float((error / bound).max()),
        "mean error, ulp": float((error / unit).mean()),
        "left out": float(doubtful.sum()),
    }
    if theirs is not None:
        tensors = [torch.tensor(model.astype(np.float32)).bfloat16() for model in ([] if base is None else [base]) + tuned]
        result = mergekit.merge_tensors(
            tensors, name, base_index=None if base is None else 0,
            parameters={k: dict(enumerate(v, based)) if isinstance(v, list) else v for k, v in theirs.items()},
        )  # fmt: skip
        other = np.abs(result.double().numpy() - exact)
        same = other <= np.maximum(2.0**-5 * np.abs(exact), 2 * unit)  # of equal magnitudes mergekit keeps others than we do
        row |= {
            "kept alike": float(same.mean()),
            "there: mean error, ulp": float((error / unit)[same].mean()),
            "there: mergekit's, ulp": float((other / unit)[same].mean()),
        }
        assert row["there: mean error, ulp"] <= row["there: mergekit's, ulp"]  # equal for linear: mergekit sums it in float32
    benchmark.extra_info.update(table="accuracy", case={"method": name}, errors=row)
