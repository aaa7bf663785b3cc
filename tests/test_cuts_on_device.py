"""Merges whose cuts stay on the device until the end, against NumPy; compiled where there is a GPU, else interpreted."""

import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from mergekit_cl import AtLeast, Consensus, KeptMagnitude, KthMagnitude, NonFiniteError, Scope, Steps, merge, method, select
from mergekit_cl.kernels import Selected, interpreted
from mergekit_cl.kernels.triton import selection
from mergekit_cl.steps import Cut, PendingCut

Array = npt.NDArray[Any]
pytestmark = pytest.mark.gpu
Model = dict[str, Array]

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": 0.3}),
    ("ties", {"density": [0.2, 1.0, 0.001], "weight": [1.0, -0.5, 2.0], "combine": "max"}),
    ("magnitude_prune", {"density": [0.9, 0.5, 0.0]}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": [0.4, 0.9, 0.2], "gamma": [0.1, 0.0, 0.5], "elect": "unweighted"}),
]


def put(model: Model) -> dict[str, Any]:
    """Put a model where the kernels run."""
    if interpreted():
        return {name: array.copy() for name, array in model.items()}
    return {
        name: torch.from_numpy(array.view(np.uint8).copy()).cuda().view(getattr(torch, array.dtype.name)).reshape(array.shape)
        for name, array in model.items()
    }


def got(model: dict[str, Any]) -> dict[str, bytes]:
    return {
        name: tensor.tobytes() if isinstance(tensor, np.ndarray) else tensor.cpu().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.items()
    }


def equal(models: list[Model], name: str, *, in_place: bool = False, **parameters: Any) -> None:
    """Merge with both backends, and compare the bits; the first model is the base."""
    base, *others = models
    expected = merge(others, name, base=base, backend="numpy", **parameters)
    placed, *rest = [put(model) for model in models]
    target = rest[-1] if in_place else None
    merged = merge(rest, name, base=placed, out=target, backend="triton", **parameters)
    assert got(merged) == {tensor: array.tobytes() for tensor, array in expected.items()}


def model(rng: np.random.Generator, sizes: dict[str, int], dtype: Any) -> Model:
    """Make tensors in which many magnitudes are equal."""
    return {
        name: np.round(rng.standard_normal(size), 1 + number % 3).astype(dtype)
        for number, (name, size) in enumerate(sizes.items())
    }


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the functions of the kernels that have waited for the device, in their order."""
    calls: list[str] = []

    def spied(name: str) -> Any:
        own = getattr(torch.Tensor, name)

        def spy(self: Any, *given: Any, **named: Any) -> Any:
            frame = sys._getframe(1)
            if "mergekit_cl" in frame.f_globals["__name__"]:
                calls.append(frame.f_code.co_name)
            return own(self, *given, **named)

        return spy

    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, spied(name))
    return calls


@given(
    seed=st.integers(0, 2**32), size=st.integers(1, 4000), dtypes=st.sampled_from([(0, 0), (1, 1), (2, 2), (1, 0)]),
    scope=st.sampled_from(["tensor", "model"]), in_place=st.booleans(),
)  # fmt: skip
@settings(max_examples=3)
@pytest.mark.parametrize(("name", "how"), METHODS, ids=str)
def test_the_same_bits_as_numpy(
    name: str, how: dict[str, Any], seed: int, size: int, dtypes: tuple[int, int], scope: str, in_place: bool
) -> None:
    rng = np.random.default_rng(seed)
    kinds = [(np.float32, ml_dtypes.bfloat16, np.float16)[number] for number in dtypes]
    sizes = {"a": size, "b": 50, "none": 0}
    models = [model(rng, sizes, kinds[k > 0]) for k in range(4)]
    equal(models, name, scope=scope, in_place=in_place, nonfinite="allow", **how)


@pytest.fixture
def _misled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample tensors from 500 elements on, some of them badly."""
    monkeypatch.setattr(selection, "SAMPLED", 500)
    monkeypatch.setattr(select, "_SAMPLE", (128, 1 << 18))


def misleading(size: int) -> Array:
    """Make a tensor in which the runs of 32 that are sampled are smaller than all else."""
    step = int(select.sample_step(np.array(size)))
    values = np.random.default_rng(1).uniform(1, 2, size).astype(np.float32)
    values[np.arange(size) % step < 32] *= np.float32(2.0**-20)
    return values


@pytest.mark.usefixtures("_misled")
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_one_merge_waits_for_the_device_once(scope: str, fetched: list[str]) -> None:
    rng = np.random.default_rng(0)
    models = [model(rng, {"large": 2500, "small": 300, "smaller": 3}, ml_dtypes.bfloat16) for _ in range(3)]
    base, *others = (put(each) for each in models)
    merge(others, "ties", base=base, backend="triton", scope=scope, density=0.2)
    assert fetched == ["task_vector_merge"]
    how = {"density": 0.4, "gamma": 0.1, "nonfinite": "allow"}
    merge(others, "breadcrumbs", base=base, out=others[0], backend="triton", scope=scope, **how)
    assert fetched == ["task_vector_merge"] * 2


@pytest.mark.usefixtures("_misled")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_what_the_sample_misses_is_found_all_the_same(scope: str, in_place: bool, fetched: list[str]) -> None:
    rng = np.random.default_rng(0)
    base, one, other = (model(rng, {"a": 3000, "b": 900}, np.float32) for _ in range(3))
    base["b"][:], one["b"][:] = 0, misleading(900)
    if scope == "model":
        base["a"][:], one["a"][:] = 0, misleading(3900)[:3000]
        one["b"][:] = misleading(3900)[3000:]
    equal([base, one, other], "ties", density=0.5, scope=scope, in_place=in_place, nonfinite="allow")
    assert fetched == ["task_vector_merge", "fetch", *["magnitude_histogram"] * 4, "task_vector_merge"]


@pytest.mark.parametrize("where", ["new", "in place"])
@pytest.mark.parametrize(("value", "scope"), [(np.nan, "tensor"), (np.inf, "model"), (3.0e38, "tensor")])
def test_what_is_not_finite_is_refused_as_ever(where: str, value: float, scope: str) -> None:
    def refused(backend: str) -> str:
        rng = np.random.default_rng(0)
        models = [model(rng, {"a": 300, "b": 20, "c": 5}, np.float32) for _ in range(3)]
        models[0]["b"][3], models[2]["b"][3] = -abs(value) if value == 3.0e38 else 1, value
        models[1]["c"][0] = value if value != 3.0e38 else 1  # its task vector overflows nothing
        base, *others = (put(each) if backend == "triton" else each for each in models)
        before = [got(each) for each in others] if backend == "triton" else []
        with pytest.raises(NonFiniteError) as error:
            merge(
                others,
                "ties",
                base=base,
                out=others[0] if where == "in place" else None,
                backend=backend,
                scope=scope,
                density=0.5,
            )
        assert not before or [got(each) for each in others] == before
        return str(error.value)

    assert refused("triton") == refused("numpy")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_only_surveyed_is_checked_too(in_place: bool) -> None:
    # its weight is zero in float32: it takes no part in the merge
    models = [{"a": np.float32([1, 2, 3, 4])}, {"a": np.float32([2, 2, 2, 2])}, {"a": np.float32([1, np.inf, 3, 4])}]
    base, *others = (put(each) for each in models)
    out = others[0] if in_place else None
    with pytest.raises(NonFiniteError, match='model 1, tensor "a": 1 Inf'):
        merge(others, "ties", base=base, out=out, backend="triton", density=0.5, weight=[1.0, 1e-60])
    assert got(others[0]) == got(models[1])  # nothing has been written


@pytest.fixture
def looking() -> list[list[Cut]]:
    """Register a method that looks at its cuts; return what it has seen."""
    seen: list[list[Cut]] = []

    @method(paper="", base="required")
    def looking(scope: Scope) -> Steps:
        """Look at cuts, and keep what two of them keep."""
        half, tenth = scope.elements // 2, max(1, scope.elements // 10)
        (cuts,) = yield KthMagnitude([[half] * scope.models])
        (less,) = yield KthMagnitude([[tenth] * scope.models])
        keep = AtLeast(cuts, less)
        norms = yield KeptMagnitude(keep, [True] * scope.models)
        seen.append([*cuts, *less])
        return Consensus([1.0 / (1 + norm) for norm in norms[:, 1].tolist()], keep)

    return seen


def test_cuts_that_are_looked_at(looking: list[list[Cut]], fetched: list[str]) -> None:
    rng = np.random.default_rng(0)
    models = [model(rng, {"a": 700, "b": 40}, np.float32) for _ in range(3)]
    equal(models, "looking")
    assert fetched.count("fetch") == 2  # one for each survey
    assert looking[:2] == looking[2:]
    assert not isinstance(looking[0][0], PendingCut)
    assert isinstance(looking[2][0], PendingCut)
    assert {hash(cut) for cut in looking[0]} == {hash(cut) for cut in looking[2]}
    assert looking[2][0] != looking[2][2]
    assert repr(looking[2][0]) == "PendingCut(0)"


def test_cuts_of_two_surveys_in_one_rule() -> None:
    @method(paper="", base="required")
    def twice(scope: Scope) -> Steps:
        """Ask for the larger cuts first."""
        (less,) = yield KthMagnitude([[max(1, scope.elements // 10)] * scope.models])
        (cuts,) = yield KthMagnitude([[scope.elements // 2] * scope.models])
        return Consensus([1.0] * scope.models, AtLeast(cuts, less))

    rng = np.random.default_rng(0)
    equal([model(rng, {"a": 700, "b": 40}, np.float32) for _ in range(3)], "twice")


def test_float64_is_selected_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Selected, "fetch", None)
    monkeypatch.setattr(selection, "select", None)
    rng = np.random.default_rng(0)
    equal([model(rng, {"a": 700}, np.float64), *(model(rng, {"a": 700}, np.float32) for _ in range(2))], "ties", density=0.3)


@pytest.mark.skipif(interpreted(), reason="needs a GPU: torch tells when a program waits for it")
def test_torch_sees_one_wait() -> None:
    rng = np.random.default_rng(0)
    base, *others = (put(model(rng, {"large": 400_000, "small": 700}, ml_dtypes.bfloat16)) for _ in range(3))
    merge(others, "ties", base=base, density=0.2)  # what the kernels are told is copied, and kept
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            merge(others, "ties", base=base, density=0.2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
