"""Formulas: traced or called, with random numbers and numbers of rows, summed up and selected from, and wrong ones."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from mergekit_cl import (
    Cut,
    Elementwise,
    KthOf,
    MergeError,
    NonFiniteError,
    PerModel,
    PerRow,
    Scope,
    Steps,
    Sum,
    SumOf,
    Values,
    each,
    execute,
    kernels,
    merge,
    method,
    methods,
    out_of_core,
    ranks,
)
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.formula import trace
from mergekit_cl.kernels import BLOCK
from mergekit_cl.kernels.numpy.formulas import Evaluator

Array = npt.NDArray[Any]

BACKENDS = ["numpy", "numba", "triton"]


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def register(name: str, function: Callable[..., Any], **options: Any) -> None:
    """Register a function under a name, until the end of the test."""
    function.__name__ = name
    function.__doc__ = "Test."
    method(paper="", **options)(function)


def formula(name: str, compute: Callable[..., Any], base: bool = False) -> None:
    """Register a formula of the models, or of the base and the models."""
    if base:

        def with_base(base: Values, models: list[Values]) -> Values:
            return compute(base, models)

        register(name, with_base, base="required")
    else:

        def without(models: list[Values]) -> Values:
            return compute(models)

        register(name, without)


def applied(name: str, step: Callable[[Scope], Any], **options: Any) -> None:
    """Register a method that returns a step."""

    def apply(scope: Scope) -> Any:
        return step(scope)

    register(name, apply, **options)


def surveyed(name: str, *surveys: Any, **options: Any) -> dict[tuple[str, ...], list[Any]]:
    """Register a method that yields surveys; return where it puts what it is sent, by the tensors of a scope."""
    answers: dict[tuple[str, ...], list[Any]] = {}

    def survey(scope: Scope) -> Steps:
        answers[scope.names] = []
        for each_one in surveys:
            answers[scope.names].append((yield each_one(scope) if callable(each_one) else each_one))
        return Sum([1.0] + [0.0] * (scope.models - 1))

    register(name, survey, **options)
    return answers


def evaluate(compute: Callable[..., Any], *arrays: Array) -> Any:
    """Trace a formula of a list, and carry it out."""
    traced = trace(compute, [list(range(len(arrays)))])
    assert traced is not None
    constants = np.array(traced.constants, arrays[0].dtype)
    return Evaluator(traced.program, arrays[0].dtype)(arrays[0].shape, arrays, constants, [], [])[0]


def operations(compute: Callable[..., Any], inputs: int = 2) -> list[str]:
    traced = trace(compute, [list(range(inputs))])
    assert traced is not None
    return [name for name, _ in traced.program.operations if name not in ("input", "constant")]


# Tracing


def in_place(x: list[Any]) -> Any:
    total = x[0] - x[1]
    same = total
    total *= 2.0
    total -= x[0]
    return same + total


def on_a_copy(x: list[Any]) -> Any:
    total = x[0] - x[1]
    other = +total
    total *= 2.0
    return other + total


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x[0] + x[1] * 2.0 - x[1] / 3.0,
        lambda x: 2.0 - x[0] + 1.0 / x[1],
        lambda x: -x[0] + abs(x[1]) + np.abs(x[0]) + np.fabs(x[1]),
        lambda x: np.sqrt(np.abs(x[0])) + np.sign(x[1]) + np.copysign(x[0], x[1]),
        lambda x: np.maximum(x[0], x[1]) - np.minimum(x[0], 0.25),
        lambda x: np.where(x[0] > x[1], x[0], x[1]),
        lambda x: np.where(x[0], x[1], -x[1]),
        lambda x: np.where((x[0] > 0) & (x[1] <= 0) | ~(x[0] < 0.5) ^ (x[1] != 0), np.float32(1), x[1]),
        lambda x: np.where(np.where(x[0] > 0, x[1] > 0, x[1] < 0), x[0], 0.0),
        lambda x: np.where(np.logical_not(np.logical_and(x[0] > 0, x[1] == 0)), x[0], 2.0),
        lambda x: (x[0] > 0) * (x[1] > 0) * x[0],
        lambda x: ((x[0] > 0) + (x[1] > 0)) * x[0],  # true + true is true
        lambda x: sum([each_one * (each_one > 0) for each_one in x]),
        lambda x: np.clip(x[0], -0.5, 0.5) + x[1].clip(0.0),
        lambda x: np.clip(x[0], x[1], np.float32(0.5)),
        lambda x: x[0] ** 2 + np.square(x[1]) + x[0] ** 2.0,
        lambda x: np.abs(x[0]) ** 0.5 + np.reciprocal(x[1]),
        lambda x: np.where(np.isnan(x[0] / (x[0] - x[0])), 1.0, x[1]),
        lambda x: np.zeros_like(x[0]) + np.ones_like(x[1]) * x[0],
        lambda x: x[0] * np.float32(0.1) + x[1] * np.array(0.25),
        in_place,
        on_a_copy,
    ],
)
def test_what_is_traced_is_what_numpy_computes(compute: Callable[..., Any]) -> None:
    arrays = [normal(500), np.where(normal(500, seed=1) > 0.7, 0, normal(500, seed=2)).astype(np.float32)]
    with np.errstate(all="ignore"):
        expected = compute(arrays)
        assert evaluate(compute, *arrays).tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x[0] ** 3 + x[0] ** 4,
        lambda x: np.exp(x[0]) + np.log(np.abs(x[1])) + np.tanh(x[0]),
        lambda x: np.sin(x[0]) + np.cos(x[1]) + np.arctan(x[0]) + np.expm1(x[1]) + np.log1p(np.abs(x[0])),
        lambda x: sum([each_one > 0 for each_one in x]) / 3,  # whole numbers, which NumPy divides in float64
        lambda x: np.where(x[0] > 0, 1, 0) / 3 + x[1],
    ],
)
def test_what_is_traced_is_nearly_what_numpy_computes(compute: Callable[..., Any]) -> None:
    arrays = [normal(500), normal(500, seed=1)]
    np.testing.assert_allclose(evaluate(compute, *arrays), compute(arrays), rtol=1e-6, atol=1e-6)


def test_the_same_is_computed_once() -> None:
    assert operations(lambda x: (x[0] - x[1]) * (x[0] - x[1]) + np.abs(x[0] - x[1])) == ["sub", "mul", "abs", "add"]
    assert operations(lambda x: x[0]) == []
    assert operations(lambda x: x[0] ** 2) == ["mul"]
    assert operations(lambda x: x[0] ** 1) == []
    assert operations(lambda x: x[0] > x[1]) == ["gt", "float"]
    assert operations(lambda x: np.where((x[0] > 0) & (x[1] > 0), x[0], 1.0)) == ["gt", "gt", "and", "where"]


def test_formulas_that_differ_in_their_numbers_are_one_program() -> None:
    traced = [trace(partial(lambda x, w: w * x[0] + 1.0, w=w), [[0]]) for w in (0.5, 7, np.float32(2))]
    assert len({each_one.program for each_one in traced if each_one is not None}) == 1
    assert [each_one.constants for each_one in traced if each_one is not None] == [(0.5, 1), (7, 1), (2, 1)]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: np.median(x, axis=0),
        lambda x: np.sort(x, axis=0)[0],
        lambda x: np.stack(x).mean(axis=0),
        lambda x: np.mean(x),  # not the mean of the models, but of everything
        lambda x: np.sum(x, axis=0),
        lambda x: np.array(x).sum(),
        lambda x: np.dot([0.5, 0.5], x),
        lambda x: x[0] if (x[0] > 0).all() else x[1],
        lambda x: x[0] if x[0] > 0 else x[1],
        lambda x: x[0] if 0 < x[0] < 1 else x[1],
        lambda x: max(x[0], x[1]),
        lambda x: float(x[0]),
        lambda x: x[0][::-1],
        lambda x: x[0] + np.arange(8),
        lambda x: x[0] ** x[1],
        lambda x: 2 ** x[0],
        lambda x: x[0] ** -1,
        lambda x: x[0] % 2,
        lambda x: np.cumsum(x[0]),
        lambda x: np.add.reduce(x[0]),
        lambda x: np.add(x[0], x[1], where=x[0] > 0),
        lambda x: np.sum(x[0]),
        lambda x: np.sum(x[0], axis=-1),
        lambda x: x[0].mean(),
        lambda x: x[0].mean(axis=0, keepdims=True),
        lambda x: np.logical_and(x[0], x[1]),
        lambda x: x[0] + 1j,
        lambda x: x[0] + "a",
        lambda x: None,
        lambda x: x[0].astype(np.float64),
        lambda x: x[2],
        lambda x: sum((x[0] + k for k in range(5000)), x[1]),
    ],
)
def test_what_cannot_be_traced(compute: Callable[..., Any]) -> None:
    assert trace(compute, [[0, 1]]) is None


def test_what_was_given_is_not_written_into() -> None:
    def add(x: list[Any]) -> Any:
        x[0] += x[1]
        return x[0]

    def negate(x: list[Any]) -> Any:
        positive = x[0] > 0
        positive *= 0.5
        return positive

    assert trace(add, [[0, 1]]) is None
    assert trace(negate, [[0]]) is None  # nor does NumPy put numbers in place of true and false


def test_operations_along_rows_are_traced() -> None:
    x = normal(5, 7)
    for compute, expected in [
        (lambda x: np.sum(x[0], axis=-1, keepdims=True), x.sum(axis=-1, keepdims=True)),
        (lambda x: np.mean(x[0], axis=-1, keepdims=True), x.mean(axis=-1, keepdims=True)),
        (lambda x: np.max(x[0], axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)),
        (lambda x: x[0].min(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)),
        (lambda x: x[0] - x[0].max(axis=-1, keepdims=True), x - x.max(axis=-1, keepdims=True)),
        (lambda x: ranks(x[0]), np.argsort(np.argsort(x, axis=-1), axis=-1) / 6),
    ]:
        np.testing.assert_allclose(evaluate(compute, x), expected, rtol=1e-6)


def test_ranks_of_arrays() -> None:
    assert ranks(f32(3, 1, 2)).tolist() == [1, 0, 0.5]
    assert ranks(np.array([[5.0, 5, 5], [1, 2, 1]])).tolist() == [[0.5, 0.5, 0.5], [0.25, 1, 0.25]]
    assert ranks(f32(7)).tolist() == [0.5]
    assert ranks(f32(np.nan, 1, np.nan)).tolist() == [0.75, 0, 0.75]
    assert ranks(f32(np.inf, 1, np.nan)).tolist() == [0.5, 0, 1]
    assert ranks(f32(0.0, -0.0, 1)).tolist() == [0.25, 0.25, 1]
    assert ranks(np.zeros((2, 0), np.float32)).shape == (2, 0)


# Formulas as methods


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_formula_as_a_decorated_function(backend: str) -> None:
    @method(paper="https://example.org", base="required")
    def towards(base: Values, models: list[Values], *, most: float = 1.0, weight: PerModel[float] = each(1.0)) -> Values:
        """Move no entry by more than ``most``."""
        change = sum(w * (model - base) for w, model in zip(weight, models, strict=True))
        return base + np.clip(change, -most, most)

    @method(paper="https://example.org")
    def middle(models: list[Values]) -> Values:
        """Take the middle of the range."""
        return (np.minimum(models[0], models[1]) + np.maximum(models[0], models[1])) / 2

    base, models = f32(1, 1, 1), [f32(2, 1, -3), f32(1, 1.5, 1)]
    assert merge(models, "towards", base=base, backend=backend).tolist() == [2, 1.5, 0]
    assert merge(models, "towards", base=base, most=0.25, backend=backend).tolist() == [1.25, 1.25, 0.75]
    assert merge(models, "towards", base=base, weight=[0.5, 2], backend=backend).tolist() == [1.5, 2, 0]
    assert merge(models, "middle", backend=backend).tolist() == [1.5, 1.25, -1]
    assert methods()["towards"].is_formula
    assert methods()["towards"].summary == "Move no entry by more than ``most``."
    with pytest.raises(MergeError, match="towards needs the model that"):
        merge(models, "towards")
    with pytest.raises(MergeError, match="3 values for 2 models"):
        merge(models, "towards", base=base, weight=[1, 2, 3])


COMPUTED: list[Callable[..., Any]] = [
    lambda base, models: base + 0.3 * (models[0] - base) + 0.7 * (models[1] - base),
    lambda base, models: np.where(np.abs(models[0] - base) > np.abs(models[1] - base), models[0], models[1]),
    lambda base, models: np.clip((models[0] + models[1]) / 2.0, base - 0.5, base + 0.5),
    lambda base, models: np.sqrt(np.abs(models[0] * models[1])) * np.sign(base),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("compute", COMPUTED)
def test_traced_or_called_the_numbers_are_the_same(backend: str, dtype: str, compute: Callable[..., Any]) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    size = 777 if backend == "triton" else BLOCK + 77
    base, *models = (normal(size, seed=seed).astype(kind) for seed in range(3))
    formula("traced", compute, base=True)
    formula("called", lambda base, models: compute(np.asarray(base), [np.asarray(model) for model in models]), base=True)
    results = [merge(models, name, base=base, backend=backend) for name in ("traced", "called")]
    assert results[0].dtype == results[1].dtype == kind
    assert results[0].tobytes() == results[1].tobytes()
    wide = [x.astype(np.float64 if dtype == "float64" else np.float32) for x in (base, *models)]
    assert results[0].tobytes() == compute(wide[0], wide[1:]).astype(kind).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_formulas_that_are_called(backend: str) -> None:
    models = [normal(30, 50, seed=seed) for seed in range(5)]
    formula("middle", lambda models: np.median(models, axis=0))
    formula("second", lambda models: np.sort(np.stack(models), axis=0)[1])
    formula("branching", lambda models: models[0] if np.array_equal(models[0], models[1]) else models[2])
    assert np.array_equal(merge(models, "middle", backend=backend), np.median(models, axis=0))
    assert np.array_equal(merge(models, "second", backend=backend), np.sort(models, axis=0)[1])
    assert np.array_equal(merge(models, "branching", backend=backend), models[2])
    assert np.array_equal(merge([models[3]] * 2 + models, "branching", backend=backend), models[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_that_are_constant_or_an_input(backend: str) -> None:
    formula("ones", lambda models: 1.0)
    formula("whether", lambda models: models[0] > 0)
    formula("copied", lambda models: models[1])
    formula("listed", lambda models: [models[0] + 1])
    models = [f32(2, -1), f32(5, -0.0)]
    for name, expected in [("ones", [1, 1]), ("whether", [1, 0]), ("copied", [5, 0]), ("listed", [3, 0])]:
        merged = merge(models, name, backend=backend)
        assert merged.dtype == np.float32
        assert merged.tolist() == expected
    assert np.signbit(merge(models, "copied", backend=backend)).tolist() == [False, True]


def test_a_formula_sees_what_changes_between_merges() -> None:
    scale = 2.0
    formula("scaled", lambda models: scale * models[0])
    assert merge([f32(3)], "scaled").tolist() == [6]
    scale = 5.0
    assert merge([f32(3)], "scaled").tolist() == [15]


def test_zeros_of_either_sign_are_not_the_same() -> None:
    def times(models: list[Values], scale: float) -> Values:
        return scale * models[0]

    scales = {"a": 0.0, "b": -0.0, "c": 2.0}
    applied("scaled", lambda scope: Elementwise(partial(times, scale=scales[scope.names[0]])))
    merged = merge([{"a": f32(1), "b": f32(1), "c": f32(1)}], "scaled")
    assert {name: (tensor[0], np.signbit(tensor[0])) for name, tensor in merged.items()} == {
        "a": (0, False), "b": (0, True), "c": (2, False),
    }  # fmt: skip


def test_numbers_of_each_tensor_are_one_program_and_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    @method(paper="")
    def scaled(models: list[Values], *, scale: float) -> Values:
        """Multiply."""
        return scale * models[0]

    calls = []
    backend = kernels.load("numpy", "cpu")[1]
    elementwise = backend.elementwise

    def counted(table: Any, compute: Any, pieces: Array) -> Any:
        calls.append(compute)
        return elementwise(table, compute, pieces)

    monkeypatch.setattr(backend, "elementwise", counted)
    values = [{"filter": f"layer{k}", "value": k / 4} for k in range(5)]
    merged = merge([{f"layer{k}": f32(8) for k in range(5)}], "scaled", scale=values, backend="numpy")
    assert [tensor.tolist() for tensor in merged.values()] == [[2 * k] for k in range(5)]
    assert len(calls) == 1
    assert calls[0].constants.tolist() == [[k / 4] for k in range(5)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_formula_over_many_kinds_of_tensors(backend: str) -> None:
    formula("half", lambda base, models: base + 0.5 * (models[0] - base), base=True)
    base: dict[str, Any] = {"a": normal(5, 3), "b": normal(4).astype(np.float64), "c": np.float32(3),
            "d": np.zeros((0, 2), np.float32),
            "e": np.zeros(3, np.float16), "n": np.arange(3)}  # fmt: skip
    model = {name: np.asarray(tensor + 1, np.asarray(tensor).dtype) for name, tensor in base.items() if name != "n"}
    merged = merge([{**model, "n": np.arange(3)}], "half", base=base, backend=backend)
    for name in "abcde":
        assert merged[name].dtype == np.asarray(base[name]).dtype
        assert merged[name].shape == np.shape(base[name])
        np.testing.assert_allclose(merged[name], np.asarray(base[name]) + 0.5, rtol=1e-6)
    assert merged["n"].tolist() == [0, 1, 2]
    assert merge([{"w": f32(1)}], "half", base={"w": f32(2)}, out_dtype="float64")["w"].dtype == np.float64


def test_inputs_are_left_alone() -> None:
    formula("called", lambda models: np.sort(models, axis=0)[0])
    models = [normal(100, seed=seed) for seed in range(3)]
    before = [model.tobytes() for model in models]
    merge(models, "called")
    assert [model.tobytes() for model in models] == before


# Random numbers, numbers of rows, models that are read


def uniform_method(name: str = "random", **options: Any) -> None:
    applied(name, lambda scope: Elementwise(lambda models, uniform: uniform[0] + 0 * models[0], seed=scope.seed, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_numbers(backend: str) -> None:
    uniform_method()
    model = {"w": np.zeros((30 if backend == "triton" else 300, 401), np.float32)}
    drawn = merge([model], "random", seed=3, backend=backend)["w"]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
    assert np.abs(counts - drawn.size / 50).max() < 5 * np.sqrt(drawn.size / 50)
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    assert np.array_equal(merge([model], "random", seed=3, backend=backend, threads=1)["w"], drawn)
    others = [merge([model], "random", seed=4, backend=backend)["w"],
              merge([{"v": model["w"]}], "random", seed=3, backend=backend)["v"]]  # fmt: skip
    for other in (*others, np.roll(drawn, 1), np.roll(drawn, 401)):
        assert abs(np.corrcoef(drawn.reshape(-1), other.reshape(-1))[0, 1]) < 5 / np.sqrt(drawn.size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_numbers_belong_to_a_model_and_an_index(backend: str) -> None:
    uniform_method()
    uniform_method("of_second", read=[1])
    applied("differences", lambda scope: Elementwise(lambda models, uniform: uniform[1] - uniform[0], seed=scope.seed))
    applied("by_row", lambda scope: PerRow(lambda models, uniform: uniform[0] - np.sum(0 * models[0], axis=-1, keepdims=True),
                                           seed=scope.seed))  # fmt: skip
    short, long = np.zeros((3, 7), np.float32), np.zeros((9, 7), np.float32)
    first = merge([short, short], "random", backend=backend)
    second = merge([short, short], "of_second", backend=backend)
    assert np.array_equal(merge([short, short], "differences", backend=backend), second - first)
    assert np.array_equal(merge([long, long], "random", backend=backend)[:3], first)
    assert np.array_equal(merge([short], "by_row", backend=backend), first)
    assert np.array_equal(merge([short.astype(np.float64)], "random", backend=backend), first)
    assert (first != second).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [Elementwise, PerRow])
def test_numbers_for_each_row(backend: str, step: Any) -> None:
    factors = {"m": [1, 10, 100], "d": [1, 2, 3, 4], "v": [7], "s": [5], "z": []}
    applied(
        "rowwise",
        lambda scope: step(
            lambda base, models, rows: base + rows[0] * (models[0] - base) - rows[1],
            rows=[np.array(factors[scope.names[0]], float), np.zeros(len(factors[scope.names[0]]))],
        ),
        base="required",
    )
    base: dict[str, Any] = {"m": np.zeros((3, 4), np.float32), "d": np.zeros((2, 2, 3), np.float32),
            "v": np.zeros(5, np.float32), "s": np.float32(0), "z": np.zeros((0, 3), np.float32)}  # fmt: skip
    merged = merge([{name: tensor + np.float32(2) for name, tensor in base.items()}], "rowwise", base=base, backend=backend)
    assert merged["m"][:, 1].tolist() == [2, 20, 200]
    assert merged["d"][..., 2].tolist() == [[2, 4], [6, 8]]
    assert merged["v"].tolist() == [14] * 5
    assert merged["s"] == 10
    assert merged["z"].shape == (0, 3)


def test_rows_that_a_called_formula_gets() -> None:
    seen = []

    def compute(models: list[Array], rows: list[Array]) -> Array:
        seen.append((models[0].shape, [each_one.shape for each_one in rows]))
        return np.asarray(np.sort(models[0], axis=-1) * rows[0])

    applied("sorted", lambda scope: PerRow(compute, rows=[np.array([1.0, 2, 4])]))
    assert merge([f32(3, 1, 2, 1, 9, 4).reshape(3, 2)], "sorted", backend="numpy").tolist() == [[1, 3], [2, 4], [16, 36]]
    assert all(shape[1:] == (2,) or shape[1:] == (4,) for shape, _ in seen)
    assert all(numbers == [(shape[0], 1)] for shape, numbers in seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_that_are_read(backend: str) -> None:
    applied("second_and_first", lambda scope: Elementwise(lambda models: models[0] - models[1], read=[2, 0]))
    applied("base_alone", lambda scope: Elementwise(lambda base, models: base * 2 + len(models), read=[]), base="required")
    models = [f32(1, 2), f32(np.nan, np.inf), f32(10, 20)]
    assert merge(models, "second_and_first", backend=backend).tolist() == [9, 18]  # what is not read may hold anything
    assert merge(models, "base_alone", base=f32(3, 4), backend=backend).tolist() == [6, 8]
    applied(
        "seeded", lambda scope: Elementwise(lambda base, models, uniform: base + len(uniform), read=[], seed=1), base="required"
    )
    assert merge(models, "seeded", base=f32(3, 4), backend=backend).tolist() == [3, 4]
    applied("missing", lambda scope: Elementwise(lambda models: models[0], read=[0, 3]))
    with pytest.raises(MergeError, match=r"missing: Elementwise reads models \[0, 3\]: their numbers are 0 to 2"):
        merge(models, "missing")
    applied("none", lambda scope: Elementwise(lambda models: 1.0, read=[]))
    with pytest.raises(MergeError, match="none: Elementwise reads no model, and there is no base"):
        merge(models, "none")


# Rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("called", [False, True])
def test_sums_and_extremes_of_rows(backend: str, called: bool) -> None:
    def compute(models: list[Values]) -> Values:
        x = np.asarray(models[0]) if called else models[0]
        low, high = np.min(x, axis=-1, keepdims=True), np.max(x, axis=-1, keepdims=True)
        centred = x - np.mean(x, axis=-1, keepdims=True)
        return centred / np.sqrt(np.sum(centred * centred, axis=-1, keepdims=True)) + (x - low) / (high - low)

    applied("rows", lambda scope: PerRow(compute))
    for shape in ((20, 300), (3, 4, 50), (1000,), (2, 70_001))[: 3 if backend == "triton" else 4]:
        x = normal(*shape)
        wide = x.astype(np.float64)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        low, high = wide.min(axis=-1, keepdims=True), wide.max(axis=-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).sum(axis=-1, keepdims=True)) + (wide - low) / (high - low)
        np.testing.assert_allclose(merge([x], "rows", backend=backend), expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_of_rows(backend: str) -> None:
    applied("ranked", lambda scope: PerRow(lambda models: ranks(models[0])))
    assert merge([np.float32([[3, 1, 2], [5, 5, 1]])], "ranked", backend=backend).tolist() == [[1, 0, 0.5], [0.75, 0.75, 0]]
    x = np.random.default_rng(0).permuted(np.tile(np.arange(5001, dtype=np.float32), (3, 1)), axis=1)
    expected = (np.argsort(np.argsort(x, axis=1), axis=1) / 5000).astype(np.float32)
    assert np.array_equal(merge([x], "ranked", backend=backend), expected)
    assert merge([normal(4, 1)], "ranked", backend=backend).tolist() == [[0.5]] * 4


# Sums


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_several_outputs(backend: str) -> None:
    def outputs(base: Values, models: list[Values]) -> list[Values]:
        return [models[0] - base, (models[0] - base) * (models[1] - base), models[1] > base]

    answers = surveyed("sums", SumOf(outputs), SumOf(lambda base, models: np.abs(base)), base="required")
    base, *models = (
        {"a": normal(30 if backend == "triton" else 300, 271, seed=k), "b": normal(5, seed=k + 9), "c": normal(0, 3)}
        for k in range(3)
    )
    for scope, groups in (("tensor", [["a"], ["b"], ["c"]]), ("model", [["a", "b", "c"]])):
        merge(models, "sums", base=base, scope=scope, backend=backend)
        for names in groups:
            several, one = answers[tuple(names)]
            flat = [np.concatenate([m[name].reshape(-1) for name in names]).astype(np.float64) for m in (base, *models)]
            x, y = flat[1] - flat[0], flat[2] - flat[0]
            np.testing.assert_allclose(several, [x.sum(), (x * y).sum(), (y > 0).sum()], rtol=1e-6, atol=1e-3)
            np.testing.assert_allclose(one, [np.abs(flat[0]).sum()], rtol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_along_rows(backend: str) -> None:
    answers = surveyed("sums", SumOf(lambda models: [models[0], models[0] - np.max(models[0], axis=-1, keepdims=True)], "rows"))
    model = {"m": normal(40, 3000), "v": normal(70_000), "s": normal(), "d": normal(2, 3, 4), "z": normal(0, 5)}
    if backend == "triton":
        model["m"] = model["m"][:4]
    merge([model], "sums", backend=backend)
    merge([model], "sums", scope="model", backend=backend)
    rows = []
    for name, tensor in model.items():
        wide = tensor.astype(np.float64).reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
        expected = np.stack([wide.sum(axis=1), (wide - wide.max(axis=1, keepdims=True, initial=-9)).sum(axis=1)], axis=1)
        assert answers[name,][0].shape == expected.shape
        np.testing.assert_allclose(answers[name,][0], expected, rtol=1e-5, atol=1e-4)
        rows.append(expected)
    np.testing.assert_allclose(answers[tuple(model)][0], np.concatenate(rows), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_sums_are_computed_in_float64(backend: str) -> None:
    def excess(models: list[Values]) -> Values:
        return models[0] * models[0] - (1 + 2.0**-11)

    answers = surveyed("sums", SumOf(excess), SumOf(excess, wide=True), SumOf(excess, wide=True, along="rows"))
    merge([np.full((3, 4), 1 + 2.0**-12, np.float32)], "sums", backend=backend)
    narrow, wide, rows = answers["",] if ("",) in answers else next(iter(answers.values()))
    assert narrow.tolist() == [0]
    assert wide.tolist() == [12 * 2.0**-24]
    assert rows.tolist() == [[4 * 2.0**-24]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_random_numbers_and_of_what_is_called(backend: str) -> None:
    uniform_method()
    answers = surveyed(
        "sums",
        SumOf(lambda models, uniform: uniform[0] * 1.0, seed=5),
        SumOf(lambda models: np.sort(models, axis=0)[0]),
        SumOf(lambda models: [np.sort(models[0], axis=-1), models[0]], along="rows"),
        SumOf(lambda models: 1.0),
    )
    models = [{"w": normal(50, 60, seed=k)} for k in range(2)]
    merge(models, "sums", backend=backend)
    drawn = merge(models, "random", seed=5, backend=backend)["w"]
    random, called, along, constant = answers["w",]
    np.testing.assert_allclose(random, [drawn.sum(dtype=np.float64)], rtol=1e-9)
    np.testing.assert_allclose(called, [np.minimum(models[0]["w"], models[1]["w"]).sum(dtype=np.float64)], rtol=1e-9)
    np.testing.assert_allclose(along, np.stack([models[0]["w"].sum(axis=1, dtype=np.float64)] * 2, axis=1), atol=1e-4)
    assert constant.tolist() == [3000]


# Selection


def cut_of(values: Array, rank: int) -> Cut:
    """What `KthOf` finds, by sorting."""
    ordered = np.sort(np.abs(values), axis=None)[::-1]
    if not rank:
        return Cut(np.inf)
    magnitude = ordered[rank - 1]
    above, equal = np.count_nonzero(ordered > magnitude), np.count_nonzero(ordered == magnitude)
    return Cut(float(magnitude), (rank - above) / equal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1, 1000, 150_001])
def test_the_kth_largest(backend: str, dtype: str, size: int) -> None:
    size = min(size, 3000) if backend == "triton" else size  # its interpreter is slow
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    wanted = sorted({0, 1, size // 3, size - 1, size})
    answers = surveyed("kth", KthOf(lambda base, models: models[0] - base, wanted), base="required")
    base, model = ({"w": normal(size, seed=seed).astype(kind)} for seed in range(2))
    model["w"][: size // 4] = base["w"][: size // 4] + kind.type(1) if dtype != "bfloat16" else base["w"][: size // 4]
    merge([model], "kth", base=base, backend=backend)
    compute = np.float64 if dtype == "float64" else np.float32
    values = model["w"].astype(compute) - base["w"].astype(compute)
    assert answers["w",][0] == [cut_of(values, rank) for rank in wanted]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kth_largest_of_equal_ones_and_of_zeros(backend: str) -> None:
    answers = surveyed("kth", KthOf(lambda models: models[0], [1, 3, 4, 6, 8]), KthOf(lambda models: 0 * models[0], [5]))
    merge([{"w": f32(2, -2, 2, 2, -5, 0, -0.0, 1)}], "kth", backend=backend)
    assert answers["w",] == [[Cut(5, 1), Cut(2, 0.5), Cut(2, 0.75), Cut(1, 1), Cut(0, 1)], [Cut(0, 0.625)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kth_largest_of_a_whole_model_of_mixed_dtypes(backend: str) -> None:
    answers = surveyed("kth", KthOf(lambda models: models[0] * models[0], [1, 700, 1500]))
    model = {
        "a": normal(800),
        "b": normal(700, seed=1).astype(np.float64) / 3,
        "c": normal(0),
        "d": normal(9).astype(np.float16),
    }
    merge([model], "kth", scope="model", backend=backend)
    values = np.concatenate([tensor.astype(np.float64).reshape(-1) ** 2 for tensor in model.values()])
    assert answers[tuple(model)][0] == [cut_of(values, rank) for rank in (1, 700, 1500)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_with_rows_random_numbers_and_what_is_called(backend: str) -> None:
    uniform_method()
    answers = surveyed(
        "kth",
        lambda scope: KthOf(lambda models, rows: models[0] * rows[0], [100], rows=[np.arange(20.0)]),
        KthOf(lambda models, uniform: uniform[0] * 1.0, [7], seed=2),
        KthOf(lambda models: np.sort(models, axis=0)[-1], [33, 0]),
    )
    model = {"w": normal(20, 30)}
    merge([model], "kth", backend=backend)
    drawn = merge([model], "random", seed=2, backend=backend)["w"]
    weighted = model["w"] * np.arange(20, dtype=np.float32)[:, None]
    assert answers["w",] == [[cut_of(weighted, 100)], [cut_of(drawn, 7)], [cut_of(model["w"], 33), Cut(np.inf)]]


def test_ranks_that_do_not_fit() -> None:
    surveyed("kth", KthOf(lambda models: models[0], [4]))
    with pytest.raises(MergeError, match="kth"):
        merge([f32(1, 2, 3)], "kth")
    with pytest.raises(MergeError, match=r"KthOf: ranks=\[0.5\]: must be integers"):
        KthOf(lambda models: models[0], [0.5])  # type: ignore[list-item]
    with pytest.raises(MergeError, match="SumOf: along='columns'"):
        SumOf(lambda models: models[0], "columns")
    surveyed("two", KthOf(lambda models: [models[0], models[0]], [1]))
    with pytest.raises(MergeError, match="two: a formula of KthOf returned 2 arrays; it returns one"):
        merge([f32(1, 2, 3)], "two")


# What is not finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("step", [Elementwise, PerRow])
def test_inputs_that_are_not_finite_are_named(backend: str, called: bool, step: Any) -> None:
    def compute(base: Values, models: list[Values]) -> Values:
        x = np.asarray(models[1]) if called else models[1]
        return np.where(np.isnan(x), base, x)

    applied("careful", lambda scope: step(compute), base="required")
    tensors = {"v": np.ones(4, np.float32), "w": np.ones((3, 2), np.float32)}
    spoiled = {**tensors, "w": np.float32([[1, 2], [np.nan, 4], [5, np.inf]])}
    with pytest.raises(NonFiniteError, match='model 1, tensor "w": 1 NaN and 1 Inf'):
        merge([tensors, spoiled], "careful", base=tensors, backend=backend)
    with pytest.raises(NonFiniteError, match='base, tensor "w": 1 NaN'):
        merge([tensors, tensors], "careful", base=spoiled, backend=backend)
    merged = merge([tensors, spoiled], "careful", base=tensors, backend=backend, nonfinite="allow")
    assert merged["w"].tolist() == [[1, 2], [1, 4], [5, np.inf]]
    formula("careless", lambda base, models: base / (models[0] - 1), base=True)
    with pytest.raises(NonFiniteError, match='tensor "v": finite inputs overflow float32'):
        merge([tensors], "careless", base=tensors, backend=backend)
    assert np.isinf(merge([tensors], "careless", base=tensors, backend=backend, nonfinite="allow")["v"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_surveys_of_what_is_not_finite(backend: str) -> None:
    spoiled = {"v": f32(1, 2), "w": f32(1, np.nan)}
    for name, survey in [
        ("sums", SumOf(lambda models: models[0])), ("rows", SumOf(lambda models: models[0], "rows")),
        ("kth", KthOf(lambda models: models[0], [1])),
    ]:  # fmt: skip
        answers = surveyed(name, survey)
        with pytest.raises(NonFiniteError, match='model 0, tensor "w": 1 NaN'):
            merge([spoiled], name, backend=backend)
        merge([spoiled], name, backend=backend, nonfinite="allow")
        assert set(answers) == {("v",), ("w",)}
    surveyed("overflow", SumOf(lambda models: 1 / (models[0] - 1)))
    with pytest.raises(NonFiniteError, match="what overflow asks for, of finite inputs, overflows"):
        merge([f32(1, 2)], "overflow", backend=backend)


# Formulas that are wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda models: models[5], r"wrong: its formula failed with IndexError: list index out of range"),
        (lambda models: 1 / 0, "wrong: its formula failed with ZeroDivisionError: division by zero"),
        (lambda models: models[0].nothing, "wrong: its formula failed with AttributeError"),
        (lambda models: undefined(models), "wrong: its formula failed with NameError"),  # type: ignore[name-defined] # noqa: F821
        (lambda models: np.sort(models[0])[:3], r"wrong: its formula returned an array of shape \(3,\) for arrays of shape"),
        (lambda models: np.stack(models), r"wrong: its formula returned an array of shape \(2, "),
        (lambda models: [models[0], models[1]], "wrong: a formula of Elementwise returned 2 arrays; it returns one"),
        (lambda models: (np.sort(models, axis=0)[0], models[1]), "wrong: a formula of Elementwise returned 2 arrays"),
        (lambda models: [], "wrong: a formula of Elementwise returned 0 arrays; it returns one"),
        (lambda models: None, "wrong: its formula returned object for float32: it has to return real numbers"),
        (lambda models: "text", "wrong: its formula returned <U4"),
        (lambda models: np.asarray(models[0]) + 1j, "wrong: its formula returned complex64"),
        (lambda models: np.mean(models), "wrong: an entry that its formula computes depends on others.*PerRow"),
        (lambda models: np.sort(np.asarray(models[0])), "depends on others"),
        (lambda models: np.asarray(models[0])[::-1], "depends on others"),
        (lambda models: np.roll(models[0], 1), "depends on others"),
        (lambda models: models[0] / np.sum(models[0], axis=-1, keepdims=True),
         "wrong: a formula of Elementwise looks along rows, but is called with parts; use PerRow"),
        (lambda models: ranks(models[0]), "looks along rows, but is called with parts; use PerRow"),
        (lambda models: models[0].__iadd__(1), "ValueError: .*read-only; what it is given must not be written into"),
        (lambda models: np.asarray(models[0]).sort(), "read-only; what it is given must not be written into"),
    ],
)  # fmt: skip
def test_formulas_that_are_wrong(backend: str, compute: Callable[..., Any], message: str) -> None:
    formula("wrong", compute)
    before = [f32(4, 3, 2, 1), f32(1, 2, 3, 4)]
    models = [model.copy() for model in before]
    with pytest.raises(MergeError, match=message):
        merge(models, "wrong", backend=backend)
    assert [model.tolist() for model in models] == [model.tolist() for model in before]


def test_errors_of_ones_own() -> None:
    def compute(models: list[Values]) -> Values:
        raise MergeError("not on Sundays")

    formula("closed", compute)
    with pytest.raises(MergeError, match=r"^not on Sundays$"):
        merge([f32(1)], "closed")
    surveyed("broken", SumOf(lambda models: models[7]))
    with pytest.raises(MergeError, match="broken: its formula failed with IndexError"):
        merge([f32(1)], "broken")


def test_steps_that_do_not_fit() -> None:
    applied("short", lambda scope: Elementwise(lambda models, rows: models[0] * rows[0], rows=[np.ones(2)]))
    with pytest.raises(MergeError, match=r"short: Elementwise has rows of shape \(2,\).*expected \[slices\] = \(3,\)"):
        merge([normal(3, 4)], "short")
    applied("words", lambda scope: Elementwise(lambda models, rows: models[0] * rows[0], rows=["many"]))  # type: ignore[list-item]
    with pytest.raises(MergeError, match="words: the rows of Elementwise are no numbers"):
        merge([normal(3, 4)], "words")
    applied("unasked", lambda scope: Elementwise(lambda models: models[0], seed=0))
    with pytest.raises(MergeError, match=r"unasked: its formula failed with TypeError.*uniform"):
        merge([f32(1)], "unasked")
    applied("far", lambda scope: PerRow(lambda models: models[0] - np.mean(models[0])))
    with pytest.raises(MergeError, match=r"far: an entry.*depends on others.*along rows, and no further"):
        merge([normal(3, 4)], "far")
    surveyed("parts", SumOf(lambda models: np.max(models[0], axis=-1, keepdims=True)))
    with pytest.raises(MergeError, match=r'parts: a formula of SumOf looks along rows.*along="rows"'):
        merge([normal(3, 4)], "parts")
    applied("nothing", lambda scope: Elementwise(None))
    with pytest.raises(MergeError, match="nothing: its formula failed with TypeError"):
        merge([f32(1)], "nothing")


def test_formulas_that_are_no_methods() -> None:
    def swapped(models: list[Values], base: Values) -> Values:
        """Doc."""

    def baseless(models: list[Values]) -> Values:
        """Doc."""

    def based(base: Values, models: list[Values]) -> Values:
        """Doc."""

    def positional(models: list[Values], scale: float) -> Values:
        """Doc."""

    def unannotated(models: list[Values], *, scale=1) -> Values:  # type: ignore[no-untyped-def]
        """Doc."""

    def undocumented(models: list[Values]) -> Values: ...

    def reserved(models: list[Values], *, seed: int) -> Values:
        """Doc."""

    for function, base, message in [
        (swapped, "required", "a formula takes"),
        (swapped, "unused", "a formula takes"),
        (baseless, "required", "a formula takes"),
        (based, "unused", "a formula takes"),
        (positional, "unused", "a formula takes"),
        (baseless, "optional", 'the base of a formula is "required" or "unused"'),
        (unannotated, "unused", "needs an annotation"),
        (undocumented, "unused", "needs a docstring"),
        (reserved, "unused", "the name belongs to merge"),
    ]:
        with pytest.raises(TypeError, match=message):
            method(paper="", base=base)(function)  # type: ignore[type-var]


# Threads, memory, places


def everything(scope: Scope) -> Steps:
    """A method of all kinds of formulas, called and traced."""
    ((total, _),) = (yield SumOf(lambda base, models: [np.abs(m - base) for m in models])).reshape(1, -1)
    (cut,) = yield KthOf(lambda base, models: np.sort(models, axis=0)[-1] - base, [scope.elements // 3])
    formula = partial(_mixed, cut=cut.magnitude, scale=1 / (1 + total))
    return PerRow(formula, seed=scope.seed)


def _mixed(base: Values, models: list[Values], uniform: list[Values], cut: float, scale: float) -> Values:
    change = models[0] - np.mean(models[1], axis=-1, keepdims=True)
    return np.where((np.abs(change) > cut) | (uniform[1] < 0.5), base + scale * change, models[1] * ranks(models[0]))


@pytest.fixture
def _everything() -> None:
    def whole(scope: Scope) -> Steps:
        return (yield from everything(scope))

    register("everything", whole, base="required")
    formula("called", lambda base, models: np.sort([base, *models], axis=0)[1], base=True)


SHAPES: dict[str, tuple[int, ...]] = {"a": (4, 40_000), "b": (BLOCK + 3,), "c": (300, 40), "d": (), "e": (0, 3), "f": (2, 3, 5)}


def three_models() -> list[dict[str, Array]]:
    return [{name: np.asarray(normal(*shape, seed=k)) for name, shape in SHAPES.items()} for k in range(3)]


@pytest.mark.usefixtures("_everything")
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("name", ["everything", "called"])
def test_threads_and_chunks_do_not_show(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = three_models()
    for scope in ("tensor", "model") if name == "everything" else (None,):
        how = {"scope": scope} if scope else {}
        expected = merge(models, name, base=base, threads=1, backend=backend, **how)
        for threads, blocks in ((2, 1), (3, 2), (1, 1)):
            monkeypatch.setattr(execute, "CHUNK", blocks * BLOCK)
            merged = merge(models, name, base=base, threads=threads, backend=backend, **how)
            assert {t: v.tobytes() for t, v in merged.items()} == {t: v.tobytes() for t, v in expected.items()}


@pytest.mark.usefixtures("_everything")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["everything", "called"])
def test_in_place(backend: str, name: str) -> None:
    names = "cdf" if backend == "triton" else "abcdf"
    base, *models = ({t: v for t, v in model.items() if t in names} for model in three_models())
    before = [{t: v.copy() for t, v in model.items()} for model in models]
    expected = merge(models, name, base=base, backend=backend)
    target = merge(models, name, base=base, backend=backend, out=models[0])
    assert target is models[0]
    assert {t: v.tobytes() for t, v in target.items()} == {t: v.tobytes() for t, v in expected.items()}
    before[1]["c"][5, 5] = np.nan
    bits = {t: v.tobytes() for t, v in before[0].items()}
    with pytest.raises(NonFiniteError, match='model 1, tensor "c": 1 NaN'):
        merge(before, name, base=base, backend=backend, out=before[0])
    assert {t: v.tobytes() for t, v in before[0].items()} == bits


def test_an_overflow_in_place_leaves_the_model_as_it_was() -> None:
    formula("product", lambda base, models: np.where(base > 0, models[0] * models[0], 0.0), base=True)
    model = {"w": f32(1e30, 2), "v": f32(3)}
    with pytest.raises(NonFiniteError, match='tensor "w": finite inputs overflow float32'):
        merge([model], "product", base={"w": f32(1, 1), "v": f32(1)}, out=model)
    assert {name: tensor.tolist() for name, tensor in model.items()} == {"w": f32(1e30, 2).tolist(), "v": [3]}
    merge([model], "product", base={"w": f32(-1, 1), "v": f32(1)}, out=model)  # what is not chosen may overflow
    assert {name: tensor.tolist() for name, tensor in model.items()} == {"w": [0, 4], "v": [9]}


@pytest.mark.usefixtures("_everything")
@pytest.mark.parametrize("name", ["everything", "called"])
def test_checkpoints_in_windows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are larger than a window would be, and are read whole all the same."""
    base, *models = three_models()
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, tensors in zip(paths, (base, *models), strict=True):
        save_file(tensors, path)
    for scope in ("tensor", "model") if name == "everything" else (None,):
        how = {"scope": scope} if scope else {}
        expected = merge(models, name, base=base, backend="numpy", **how)
        for window, kept, threads in ((1, 0, 2), (3 << 20, 1 << 20, 1)):
            least = 1 if name == "called" else 4 * 4 * BLOCK * 2
            monkeypatch.setattr(
                out_of_core.Budget, "of", classmethod(lambda cls, *given, w=window, k=kept, n=least: cls(max(w, n), k))
            )
            out = tmp_path / f"{scope}-{window}.safetensors"
            merge(paths[1:], name, base=paths[0], out=out, threads=threads, backend="numpy", memory="1GB", **how)
            merged = load_file(out)
            assert {t: v.tobytes() for t, v in merged.items()} == {t: v.tobytes() for t, v in expected.items()}


def test_a_checkpoint_that_is_wrong_is_not_written(tmp_path: Path) -> None:
    formula("wrong", lambda models: np.mean(models))
    formula("divided", lambda models: 1 / models[0])
    for number in range(2):
        save_file({"v": f32(1, 2), "w": f32(1, 0)}, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for name, message in [("wrong", "depends on others"), ("divided", 'tensor "w": finite inputs overflow float32')]:
        with pytest.raises(MergeError, match=message):
            merge(paths, name, out=tmp_path / "out.safetensors", backend="numpy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


# Training


def loop(sfa: SFA, model: nn.Module, steps: int) -> None:
    for step in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.linspace(0, 1, parameter.numel()).reshape(parameter.shape) * (step + 1)
        sfa.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_formula_in_a_training_loop(backend: str) -> None:
    @method(paper="", base="required")
    def towards(base: Values, models: list[Values], *, most: float) -> Values:
        """Move no entry by more than ``most``."""
        return base + np.clip(models[0] - base, -most, most)

    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    sfa = SFA(model, method="towards", most=0.75, every=2, backend=backend)
    loop(sfa, model, 5)
    assert sfa.merges == 2
    for name, parameter in model.named_parameters():
        ramp = torch.linspace(0, 1, parameter.numel()).reshape(parameter.shape)
        moved = torch.clamp(torch.clamp(3 * ramp, max=0.75) + 7 * ramp, max=0.75) + 5 * ramp
        torch.testing.assert_close(parameter.detach(), anchor[name] + moved)


def test_random_numbers_are_new_at_each_merge() -> None:
    applied("tossed", lambda scope: Elementwise(lambda base, models, uniform: np.where(uniform[0] < 0.5, models[0], base),
                                                seed=scope.seed), base="required")  # fmt: skip
    model = nn.Linear(100, 100, bias=False)
    nn.init.zeros_(model.weight)
    sfa = SFA(model, method="tossed", every=1, backend="numpy")
    masks = []
    for _ in range(3):
        with torch.no_grad():
            model.weight.fill_(1.0)
        sfa.step()
        masks.append(model.weight.detach().clone())
    assert all(4500 < mask.sum() < 5500 for mask in masks)
    assert 4500 < (masks[0] == masks[1]).sum() < 5500
    assert 4500 < (masks[1] == masks[2]).sum() < 5500


def test_a_method_of_the_package_in_a_training_loop() -> None:
    model = nn.Linear(50, 50)
    sfa = SFA(model, method="della", density=0.5, every=1, backend="numpy")
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    sfa.step()
    changed = (model.weight.detach() != before).float().mean()
    assert 0.4 < changed < 0.6
