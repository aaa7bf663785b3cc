"""The engine: surveys in lockstep, over tensors and over whole models; how work is cut."""

import copy
from collections.abc import Generator
from math import sqrt
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_cl import Gram, MergeError, NonFiniteError, Scope, Steps, Sum, execute, merge, method
from mergekit_cl.execute import deal
from mergekit_cl.kernels import BLOCK
from mergekit_cl.sweeps import add_exactly

BACKENDS = ["numpy", "numba", "triton"]


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


@pytest.fixture
def clipped_average() -> None:
    """Register a method that surveys: task vectors are clipped to a norm, then averaged."""

    @method(paper="", base="required")
    def clipped_average(scope: Scope, *, limit: float) -> Steps:
        """Average task vectors after clipping each to a norm."""
        gram = yield Gram(task_vectors=True)
        weights = [min(1, limit / sqrt(gram[k, k])) / scope.models if gram[k, k] else 0.0 for k in range(scope.models)]
        return Sum(weights, base_weight=1 - sum(weights))


BASE = {"a": f32([1, 1]), "b": f32([0])}
MODELS = [{"a": f32([4, 5]), "b": f32([0])}, {"a": f32([1, 1]), "b": f32([12])}]


@pytest.mark.usefixtures("clipped_average")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_survey_per_tensor(backend: str) -> None:
    # tensor a: task vectors (3, 4) of norm 5, and 0: 1 + 0.5 * (3, 4) / 5 * 2.5; tensor b: 0, and 12 clipped to 2.5
    merged = merge(MODELS, "clipped_average", base=BASE, limit=2.5, backend=backend)
    np.testing.assert_allclose(merged["a"], [1.75, 2.0], rtol=1e-6)
    np.testing.assert_allclose(merged["b"], [1.25], rtol=1e-6)


@pytest.mark.usefixtures("clipped_average")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_survey_over_the_whole_model(backend: str) -> None:
    # the second model's task vector has the norm 12 in tensor b alone, the first one's 5 in a: the same as per tensor
    # for a limit of 2.5; but with (5, 0) and (0, 12) in one model, the norm is 13
    both = {"a": MODELS[0]["a"], "b": MODELS[1]["b"]}
    merged = merge([both], "clipped_average", base=BASE, limit=6.5, scope="model", backend=backend)
    np.testing.assert_allclose(merged["a"], [2.5, 3.0], rtol=1e-6)
    np.testing.assert_allclose(merged["b"], [6.0], rtol=1e-6)
    per_tensor = merge([both], "clipped_average", base=BASE, limit=6.5, backend=backend)
    np.testing.assert_allclose(per_tensor["b"], [6.5], rtol=1e-6)


@pytest.mark.usefixtures("clipped_average")
def test_bad_scope_and_missing_base() -> None:
    with pytest.raises(MergeError, match="scope='layer': must be one of 'tensor', 'model'"):
        merge(MODELS, "clipped_average", base=BASE, limit=1, scope="layer")

    @method(paper="")
    def baseless(scope: Scope) -> Steps:
        """Ask for task vectors without a base."""
        yield Gram(task_vectors=True)
        return Sum([1.0])

    with pytest.raises(MergeError, match="task vectors need a base"):
        merge([f32([1])], "baseless")


@pytest.mark.usefixtures("clipped_average")
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_are_found_by_the_survey(backend: str) -> None:
    spoiled = {"a": f32([1, np.inf]), "b": f32([0])}
    with pytest.raises(NonFiniteError, match='base, tensor "a": 1 Inf'):  # the task vector is zero, the base is not finite
        merge([spoiled], "clipped_average", base=spoiled, limit=1, backend=backend)
    with pytest.raises(NonFiniteError, match='model 1, tensor "a": 1 Inf'):
        merge([MODELS[0], spoiled], "clipped_average", base=BASE, limit=1, backend=backend)


@pytest.mark.usefixtures("clipped_average")
def test_an_overflow_in_a_survey_is_explained() -> None:
    with pytest.raises(NonFiniteError, match="what clipped_average asks for, of finite inputs, overflows"):
        merge([np.array([1e200])], "clipped_average", base=np.array([0.0]), limit=1)


def test_methods_may_survey_a_different_number_of_times() -> None:
    sweeps = []

    @method(paper="")
    def patient(scope: Scope) -> Generator[Gram, Any, Sum]:
        """Survey as often as the tensor's name is long."""
        for _ in scope.names[0]:
            gram = yield Gram()
            sweeps.append((scope.names[0], gram.tolist()))
        return Sum([1.0])

    assert merge([{"a": f32([2]), "bb": f32([3]), "ccc": f32([4])}], "patient")["ccc"].tolist() == [4]
    assert sweeps == [("a", [[4]]), ("bb", [[9]]), ("ccc", [[16]]), ("bb", [[9]]), ("ccc", [[16]]), ("ccc", [[16]])]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_surveys_do_not_depend_on_threads_or_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @method(paper="")
    def looking(scope: Scope) -> Steps:
        """Keep the Gram matrix."""
        gram = yield Gram()
        seen.append(gram.tobytes())
        return Sum([1.0, 0.0])

    rng = np.random.default_rng(0)
    models = [{"a": rng.standard_normal(5 * BLOCK + 17), "b": rng.standard_normal(300)} for _ in range(2)]
    for scope in ("tensor", "model"):
        seen.clear()
        for threads, blocks in ((1, 64), (2, 1), (3, 2)):
            monkeypatch.setattr(execute, "CHUNK", blocks * BLOCK)
            merge(models, "looking", backend=backend, threads=threads, scope=scope)
        per_run = len(seen) // 3
        assert seen[:per_run] == seen[per_run : 2 * per_run] == seen[2 * per_run :]


def test_gram_against_float64() -> None:
    rng = np.random.default_rng(1)
    base, *models = (rng.standard_normal(70_001).astype(np.float32) for _ in range(4))
    grams: list[np.ndarray] = []

    @method(paper="", base="optional")
    def looking(scope: Scope) -> Steps:
        """Keep both Gram matrices."""
        grams.append((yield Gram()))
        grams.append((yield Gram(task_vectors=True)))
        return Sum([1.0, 0.0, 0.0])

    stacked = np.stack([base, *models]).astype(np.float64)
    vectors = stacked[1:] - stacked[0]
    for backend in BACKENDS:
        grams.clear()
        merge(models, "looking", base=base, backend=backend)
        np.testing.assert_allclose(grams[0], stacked @ stacked.T, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(grams[1], vectors @ vectors.T, rtol=1e-6)


def test_partial_sums_are_added_without_error() -> None:
    blocks = [np.full((1, 1), value) for value in (1e16, 1.0, -1e16)]
    assert add_exactly(blocks) == add_exactly(blocks[::-1]) == 1


def in_place(backend: str, spoil: tuple[str, int, float] | None = None, **parameters: Any) -> tuple[dict[str, Any], str]:
    """Merge three models of several dtypes over the second; return it, and the error."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[type, int]] = {"a": (np.float32, 5001), "b": (ml_dtypes.bfloat16, 300), "c": (np.float16, 40)}
    models: list[dict[str, Any]] = [
        {name: rng.standard_normal(n).astype(dtype) for name, (dtype, n) in shapes.items()} for _ in range(3)
    ]
    strided = np.zeros(80, np.float16)[::2]  # which is copied before, and written afterwards
    models[1]["c"] = strided
    if spoil is not None:
        name, model, value = spoil
        models[model][name][-1] = value
    before = copy.deepcopy(models[1])
    try:
        merge(models[:2], base=models[2], out=models[1], backend=backend, **parameters)
    except NonFiniteError as error:
        assert all(models[1][name].tobytes() == values.tobytes() for name, values in before.items())
        return models[1], str(error)
    assert not np.array_equal(models[1]["a"], before["a"])
    return models[1], ""


@pytest.mark.parametrize(
    ("parameters", "spoil", "error"),
    [
        ({}, None, ""),
        ({"weight": [1.0, 0.0]}, None, ""),  # a copy
        ({"weight": [{"filter": "b", "value": [1.0, 0.0]}, {"value": [0.5, 0.25]}]}, None, ""),  # a copy of one tensor
        ({}, ("a", 0, np.nan), 'model 0, tensor "a": 1 NaN'),
        ({}, ("b", 1, -np.inf), 'model 1, tensor "b": 1 Inf'),
        ({}, ("c", 2, np.nan), 'base, tensor "c": 1 NaN'),
        ({}, ("c", 0, 65504.0), 'tensor "c": finite inputs overflow float16 when merged'),
        ({"lambda_": 0.25}, ("c", 0, 65504.0), ""),  # which cannot be ruled out beforehand
        ({"nonfinite": "allow"}, ("a", 0, np.nan), ""),
        ({"nonfinite": "allow"}, ("c", 0, 65504.0), ""),
    ],
)
def test_the_device_decides_as_the_host_does(parameters: dict[str, Any], spoil: Any, error: str) -> None:
    """In place all tensors are written, or none."""
    given_ = {"method": "task_arithmetic", "weight": 1.5, **parameters}
    (one, found), (other, expected) = (in_place(backend, spoil, **given_) for backend in ("triton", "numpy"))
    assert found == expected
    assert error in found
    assert bool(found) == bool(error)
    for name, values in other.items():
        np.testing.assert_array_equal(one[name], values)


@given(st.lists(st.integers(0, 10 * BLOCK), max_size=6), st.integers(1, 5), st.integers(1, 4))
def test_deal_covers_every_element_once(lengths: list[int], threads: int, blocks: int) -> None:
    shares = deal(np.array(lengths, np.int64), threads, blocks * BLOCK)
    covered: dict[int, list[tuple[int, int]]] = {row: [] for row in range(len(lengths))}
    for share in shares:
        assert 0 < (share[:, 2] - share[:, 1]).sum() <= blocks * BLOCK
        for row, start, stop in share.tolist():
            assert start % BLOCK == 0
            covered[row].append((start, stop))
    for row, length in enumerate(lengths):
        edges = [edge for piece in covered[row] for edge in piece]
        assert edges == sorted(edges)
        assert edges[:1] + edges[-1:] == ([0, length] if length else [])
        assert edges[1:-1:2] == edges[2::2]


def test_progress_counts_every_element(capsys: pytest.CaptureFixture[str]) -> None:
    models = [{"a": np.zeros(100_000, np.float32), "n": np.arange(7)} for _ in range(2)]
    merged = merge(models, progress=True)
    assert merged["a"].shape == (100_000,)
    assert "100%" in capsys.readouterr().out
