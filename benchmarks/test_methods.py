"""Every method on three bfloat16 models and a base of 64 Mi elements: beside mergekit's merge_state_dicts, and the floor.

The models are 16 matrices of 2048 x 2048, which is the least that language models are made of; and, for what is done per
tensor, 300 tensors of a small transformer.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from mergekit_cl import PerMatrix, merge, methods

StateDict: TypeAlias = dict[str, torch.Tensor]

ELEMENTS = 64 << 20
DENSITY = 0.2

# name: (models, whether there is a base, how often the inputs have to be read, parameters, mergekit's or None)
METHODS: dict[str, tuple[int, bool, int, dict[str, Any], dict[str, Any] | None]] = {
    "linear": (3, False, 1, {}, {"weight": 1.0}),
    "sfa": (2, False, 1, {"beta": 0.3}, None),
    "wise_ft": (1, True, 1, {"alpha": 0.3}, None),
    "task_arithmetic": (3, True, 1, {"weight": 0.3}, {"weight": 0.3}),
    "ties": (3, True, 2, {"density": DENSITY}, {"density": DENSITY, "weight": 1.0}),
    "magnitude_prune": (3, True, 2, {"density": DENSITY}, None),
    "dare_linear": (3, True, 1, {"density": DENSITY}, {"density": DENSITY, "weight": 1.0}),
    "dare_ties": (3, True, 1, {"density": DENSITY}, {"density": DENSITY, "weight": 1.0}),
    "breadcrumbs": (3, True, 2, {"density": DENSITY}, {"density": DENSITY, "weight": 1.0}),
    "breadcrumbs_ties": (3, True, 2, {"density": DENSITY}, {"density": DENSITY, "weight": 1.0}),
    "slerp": (1, True, 2, {"t": 0.3}, {"t": 0.3}),
    "nuslerp": (2, True, 2, {"weight": [1, 2]}, {"weight": {1: 1.0, 2: 2.0}}),
    "multislerp": (3, False, 2, {}, {"weight": 1.0}),
    "karcher": (3, False, 2, {}, {}),
    "model_stock": (3, True, 2, {}, {}),
    "geometric_median": (3, False, 2, {}, None),
    "ema": (3, False, 1, {}, None),
    "lawa": (3, False, 1, {"window": 3}, None),
    "wsm": (3, False, 1, {}, None),
    "passthrough": (1, False, 1, {"scale": 0.5}, {"scale": 0.5}),
    "della": (3, True, 1, {"density": DENSITY, "epsilon": 0.1}, {"density": DENSITY, "epsilon": 0.1, "weight": 1.0}),
    "della_linear": (3, True, 1, {"density": DENSITY, "epsilon": 0.1}, {"density": DENSITY, "epsilon": 0.1, "weight": 1.0}),
    "sce": (3, True, 3, {"select_topk": 0.1}, {"select_topk": 0.1}),
    "arcee_fusion": (1, True, 3, {}, {}),
    "nearswap": (1, True, 1, {"t": 0.01}, {"t": 0.01}),
    "ram": (3, True, 1, {}, {}),
    "ramplus_tl": (3, True, 2, {}, {}),
    "magmax": (3, True, 1, {}, None),
    "median": (3, False, 1, {}, None),
    "fisher": (3, False, 1, {}, None),
    "tsv_m": (3, True, 1, {}, None),
    "iso_c": (3, True, 1, {}, None),
    "iso_cts": (3, True, 1, {}, None),
    "opcm": (3, True, 1, {}, None),
}
BY_MATRIX = {name for name, method in methods().items() if method.ends_in(PerMatrix)}
ROW_WISE = {
    "nuslerp": ({"nuslerp_flatten": False}, "rows"),
    "model_stock": ({"filter_wise": True}, "rows"),
}
SMALL = "300 tensors"
MATRICES = "4 matrices of 512 x 512"
CASES: list[tuple[str, dict[str, Any], str]] = [
    *((name, {}, MATRICES if name in BY_MATRIX else "") for name in methods()),  # a method that METHODS lacks fails
    *((name, *case) for name, case in ROW_WISE.items()),
    *((name, {}, SMALL) for name in ("ties", "dare_ties", "slerp")),
]


@pytest.fixture(scope="module")
def models(scaled: Callable[[int], int]) -> list[StateDict]:
    """A base, and three fine-tunes of it: 16 matrices each."""
    width = isqrt(scaled(ELEMENTS) // 16)
    generator = torch.Generator().manual_seed(0)
    return fine_tuned({f"layers.{n}.gate": torch.rand((width, width), generator=generator).bfloat16() for n in range(16)})


@pytest.fixture(scope="module")
def small(scaled: Callable[[int], int], transformer: Callable[..., StateDict]) -> list[StateDict]:
    """A base, and three fine-tunes of it: 300 tensors each."""
    return fine_tuned(transformer(scaled(ELEMENTS), torch.bfloat16, 0))


@pytest.fixture(scope="module")
def matrices(scaled: Callable[[int], int]) -> list[StateDict]:
    """A base, and three fine-tunes of it: 4 matrices each, for what decomposes them."""
    width = isqrt(scaled(1 << 20) // 4)
    generator = torch.Generator().manual_seed(0)
    return fine_tuned({f"layers.{n}.gate": torch.rand((width, width), generator=generator).bfloat16() for n in range(4)})


def fine_tuned(base: StateDict) -> list[StateDict]:
    generator = torch.Generator().manual_seed(1)
    return [
        base,
        *(
            {n: (t.float() + 0.02 * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
            for _ in range(3)
        ),
    ]


@pytest.mark.parametrize(("name", "extra", "mode"), CASES, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_method(
    request: pytest.FixtureRequest,
    name: str,
    extra: dict[str, Any],
    mode: str,
    threads: int,
    race: Callable[..., None],
    copy: Callable[..., None],
) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    count, based, reads, parameters, theirs = METHODS[name]
    models: list[StateDict] = request.getfixturevalue({SMALL: "small", MATRICES: "matrices"}.get(mode, "models"))
    base = models[0] if based else None
    tuned = models[1 : 1 + count]
    parameters = parameters | dict.fromkeys(methods()[name].companions, models[:count])

    def ours(backend: str) -> StateDict:
        return merge(tuned, name, base=base, backend=backend, threads=threads, **parameters, **extra)  # type: ignore[no-any-return]

    def mergekit_merge() -> StateDict:
        return mergekit.merge_state_dicts(  # type: ignore[no-any-return]
            [base, *tuned] if based else tuned, name, base=0 if based else None, parameters={**(theirs or {}), **extra}
        )

    result = ours("numba")  # compiles, too
    check_against_float64(result, ours("numpy"), name, base, tuned, {**parameters, **extra})
    contenders: dict[str, Callable[[], object]] = {"merge()": lambda: ours("numba"), "NumPy": lambda: ours("numpy")}
    if theirs is not None:
        contenders["mergekit"] = mergekit_merge
    elements = sum(tensor.numel() for tensor in result.values())
    source, target = (np.ones(elements, np.uint16) for _ in range(2))
    contenders["copy"] = lambda: copy(source, target)
    contenders["copy in one thread"] = lambda: copy(source, target, 1)
    race(
        contenders,
        rounds=3,
        table="methods",
        case={"method": f"{name} ({mode})" if mode else name, "models": count, "base": "yes" if based else "", "reads": reads},
        bytes=((count * (1 + len(methods()[name].companions)) + based) * reads + 1) * source.nbytes,
        copied=2 * source.nbytes,
    )


def check_against_float64(
    result: StateDict, other: StateDict, name: str, base: StateDict | None, tuned: list[StateDict], parameters: dict[str, Any]
) -> None:
    """Check a tensor against the same merge in float64, and the backends against each other."""
    tensor = "layers.3.gate"
    beside = methods()[name].companions
    parameters = {p: [{tensor: m[tensor].double().numpy()} for m in v] if p in beside else v for p, v in parameters.items()}
    wide = [m[tensor].double().numpy() for m in [*tuned, *([base] if base else [])]]
    inputs = {tensor: wide[-1]} if base else None
    exact = merge([{tensor: w} for w in wide[: len(tuned)]], name, base=inputs, backend="numpy", **parameters)[tensor]
    scale = np.max([np.abs(w) for w in wide], axis=0)
    # half a unit in the last place of bfloat16, and float32 arithmetic on the way
    bound = 2.0**-8 * np.abs(exact) + 2.0**-18 * scale
    for merged in (result, other):
        error = np.abs(merged[tensor].double().numpy() - exact)
        # of equal entries, and of sums that cancel, another one may be chosen in float64
        assert (error > bound).mean() < 1e-3, name
    same = [torch.equal(result[n], other[n]) for n in result]
    assert all(same) or methods()[name].parameters.keys() & {"density"} == set()
