"""What other tests of formulas would not notice: bounds, buffers, rows, memory, and what the registry refuses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from mergekit_cl import (
    Elementwise,
    KthOf,
    MergeError,
    NonFiniteError,
    PerMatrix,
    PerModel,
    PerRow,
    Scope,
    Steps,
    Sum,
    SumOf,
    Values,
    merge,
    method,
    methods,
    pages,
    ranks,
)
from mergekit_cl.api import prepare, prepare_files
from mergekit_cl.filters import Parameters
from mergekit_cl.formula import bound, trace
from mergekit_cl.kernels import Formula as Bound
from mergekit_cl.kernels import Slices, Table
from mergekit_cl.kernels.numpy import formulas
from mergekit_cl.merge_methods._consensus import consensus
from mergekit_cl.merge_methods.della import _dropped
from mergekit_cl.registry import Models, find

Array = npt.NDArray[Any]

TILE = formulas.TILE


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def register(name: str, function: Callable[..., Any], **options: Any) -> None:
    """Register a function under a name, until the end of the test."""
    function.__name__ = name
    function.__doc__ = "Test."
    method(paper="", **options)(function)


def formula(name: str, compute: Callable[..., Any]) -> None:
    """Register a formula of the models."""

    def of_models(models: list[Values]) -> Values:
        return compute(models)

    register(name, of_models)


def applied(name: str, step: Any, **options: Any) -> None:
    """Register a method that returns a step."""

    def apply(scope: Scope) -> Any:
        return step(scope) if callable(step) else step

    register(name, apply, **options)


# Bounds: x is in [-2, 2], y in [-3, 3]


def bounded(compute: Callable[..., Any], *largest: float, rows: tuple[tuple[float, float], ...] = ()) -> float:
    traced = trace(compute, list(range(len(largest))), {"rows": len(rows)} if rows else None)
    assert traced is not None
    limits, constants = np.array([largest], np.float64), np.array([traced.constants], np.float64)
    numbers = tuple(np.array([[pair[k] for pair in rows]], np.float64) for k in (0, 1))
    found = bound(traced.program, (-limits, limits), (constants, constants), (numbers[0], numbers[1]))
    assert found.shape == (1,)
    return float(found[0])


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda x, y: x + y, 5),
        (lambda x, y: x - y, 5),
        (lambda x, y: np.abs(x) - np.abs(y), 3),  # from -3 to 2
        (lambda x, y: np.abs(x) - -np.abs(y), 5),
        (lambda x, y: x * y, 6),
        (lambda x, y: np.abs(x) * (y - 10), 26),  # 2 * -13
        (lambda x, y: (y - 10) * (y - 11), 182),
        (lambda x, y: x / (np.abs(y) + 0.125), 16),
        (lambda x, y: x / (np.abs(y) - 5), 5),  # the divisor is from -5 to -2
        (lambda x, y: 1 / np.abs(x), np.inf),
        (lambda x, y: x / y, np.inf),
        (lambda x, y: 1 / (1 - np.abs(x)), np.inf),
        (lambda x, y: 1 / (np.abs(np.abs(x) - 5) - 2), 5),  # the divisor is from 1 to 3
        (lambda x, y: 1 / (-np.abs(x) - 1), 3),
        (lambda x, y: (x / y) * 0, np.inf),
        (lambda x, y: 1 / (np.copysign(np.abs(x) + 1, y) + 1), np.inf),
        (lambda x, y: np.copysign(np.abs(x) + 1, y), 3),
        (lambda x, y: np.where(x > 0, x, 10.0), 10),
        (lambda x, y: np.where(x > 0, 10.0, y), 10),
        (lambda x, y: np.where(x > 0, -11.0, y), 11),
        (lambda x, y: np.maximum(x, 5.0), 5),
        (lambda x, y: np.minimum(x, -5.0), 5),
        (lambda x, y: 7 * np.minimum(np.abs(y), 1.0), 7),
        (lambda x, y: 7 * np.maximum(-np.abs(y), -1.0), 7),
        (lambda x, y: 9 * np.sqrt(np.abs(x) * 2), 18),
        (lambda x, y: 1 / np.sqrt(np.abs(x)), np.inf),
        (lambda x, y: 9 * np.sign(x), 9),
        (lambda x, y: 9 * np.sin(x) + np.cos(y) - 2 * np.tanh(x), 12),
        (lambda x, y: 9 * (x > y) + 2, 11),
        (lambda x, y: 9 * ((x > y) & ~(x == 0)) + 2, 11),
        (lambda x, y: 9 * ranks(x) + 2, 11),
        (lambda x, y: 9 * np.max(y, axis=-1, keepdims=True), 27),
        (lambda x, y: 9 * np.min(y, axis=-1, keepdims=True), 27),
        (lambda x, y: np.sum(x, axis=-1, keepdims=True), np.inf),  # of how many entries is not known
        (lambda x, y: np.exp(x), np.inf),
        (lambda x, y: np.log(np.abs(x) + 1), np.inf),
        (lambda x, y: x * np.float32(1e30) * 1e30, 2e60),
        (lambda x, y: x * np.inf, np.inf),
        (lambda x, y: x * np.nan, np.inf),
        (lambda x, y: np.where(x < np.inf, x, y), 3),  # what a number is compared with may be infinite
        (lambda x, y: np.minimum(x + y, np.inf), 5),
    ],
)
def test_bounds(compute: Callable[..., Any], expected: float) -> None:
    assert bounded(compute, 2, 3) == pytest.approx(expected, rel=1e-6)


def test_bounds_of_what_is_within_takes_the_largest_step() -> None:
    """A value on the way that overflows would show in the result."""
    assert bounded(lambda x: (x * 100) / 1000, 2) == 200


def test_bounds_of_numbers_of_rows() -> None:
    assert bounded(lambda x, rows: x * rows[0] + rows[1], 2, rows=((-3, 1), (5, 7))) == 13
    assert bounded(lambda x, rows: 1 / rows[0], 2, rows=((0.25, 8),)) == 4
    assert bounded(lambda x, rows: 1 / rows[0], 2, rows=((-1, 8),)) == np.inf


@pytest.mark.parametrize(
    ("compute", "entries"),
    [
        (lambda x: x * 40, [2000]),
        (lambda x: x - -np.abs(x) * 40, [2000]),
        (lambda x: np.abs(x) * 40, [-2000]),
        (lambda x: -(x * 40), [2000]),
        (lambda x: 1 / np.abs(x - 1), [1]),
        (lambda x: 1 / np.copysign(x - 1, -1.0), [1]),
        (lambda x: np.where(x > 0, 1.0, 70000.0), [0]),
        (lambda x: np.where(x > 0, 70000.0, 1.0), [1]),
        (lambda x: np.maximum(x, 70000.0), [1]),
        (lambda x: np.minimum(x, -70000.0), [1]),
        (lambda x: np.exp(x), [20]),
        (lambda x: np.log(x), [0]),
        (lambda x: np.sort([x, x * 40], axis=0)[1], [2000]),
        (lambda x: x * 1e39, [1]),  # infinite in float32
        (lambda x: x + np.nan, [1]),
    ],
)
@pytest.mark.parametrize("step", [Elementwise, PerRow])
def test_what_overflows_is_found_before_anything_is_written(
    compute: Callable[..., Any], entries: list[float], step: Any
) -> None:
    applied("overflows", step(lambda models: compute(models[0])))
    model = {"first": np.float16([0.5, 0.25]), "w": np.float16([*entries, 3])}
    before = {name: tensor.tobytes() for name, tensor in model.items()}
    with pytest.raises(NonFiniteError, match='tensor "w": finite inputs overflow float16'):
        merge([model], "overflows", out=model, backend="numpy")
    assert {name: tensor.tobytes() for name, tensor in model.items()} == before


def test_sums_that_overflow_are_found_before_anything_is_written() -> None:
    applied("total", PerRow(lambda models: models[0] * 0 + np.sum(models[0], axis=-1, keepdims=True)))
    model = np.float16([[1, 2, 3], [30000, 30000, 30000]])
    before = model.tobytes()
    with pytest.raises(NonFiniteError, match="finite inputs overflow float16"):
        merge([model], "total", out=model)
    assert model.tobytes() == before


@pytest.mark.parametrize("numbers", [[1, 1e5], [1, -1e5], [1e5, 1], [-1e5, 1], [1, np.inf], [1, np.nan]])
def test_numbers_of_rows_that_overflow_are_found_before_anything_is_written(numbers: list[float]) -> None:
    applied("scaled", Elementwise(lambda models, rows: models[0] * rows[0], rows=[np.array(numbers)]))
    model = np.array([[1], [1]], np.float16)
    with pytest.raises(NonFiniteError, match="finite inputs overflow float16"):
        merge([model], "scaled", out=model)
    assert model.tolist() == [[1], [1]]


def test_a_matrix_that_overflows_is_found_before_anything_is_written() -> None:
    applied("squared", PerMatrix(lambda models: models[0] @ models[0], Sum([1.0])))
    model = {"v": np.float16([300, 300]), "w": np.float16([[300, 0], [0, 300]])}
    before = {name: tensor.tobytes() for name, tensor in model.items()}
    with pytest.raises(NonFiniteError, match='tensor "w": finite inputs overflow float16'):
        merge([model], "squared", out=model)
    assert {name: tensor.tobytes() for name, tensor in model.items()} == before


def test_what_may_overflow_and_does_not_is_written() -> None:
    formula("inverse", lambda models: 1 / models[0])
    model = f32(2, 4)
    assert merge([model], "inverse", out=model) is model
    assert model.tolist() == [0.5, 0.25]


# Tracing


def evaluated(compute: Callable[..., Any], *arrays: Array) -> list[list[Any]]:
    """Trace a formula, carry it out on arrays, and return its outputs."""
    traced = trace(compute, list(range(len(arrays))))
    assert traced is not None
    constants = np.array(traced.constants, arrays[0].dtype)
    shape = arrays[0].shape
    outputs = formulas.Evaluator(traced.program, arrays[0].dtype)(shape, arrays, constants, [], [])
    return [np.broadcast_to(output, shape).tolist() for output in outputs]


def test_what_has_one_value_for_a_row_is_its_own_sum_mean_and_extreme() -> None:
    """As in NumPy, where it is an array [rows, 1]."""
    along: dict[str, Any] = {"axis": -1, "keepdims": True}
    x = np.float32([[1, 5, 3], [-1, -2, -6]])
    for function in (np.sum, np.mean, np.max, np.min):
        assert evaluated(lambda x, function=function: function(np.max(x, **along), **along), x) == [[[5] * 3, [-1] * 3]]
    assert evaluated(lambda x: ranks(np.max(x, **along)), x) == [[[0.5] * 3] * 2]
    # a sum of what is true is a number, and numbers add up
    assert evaluated(
        lambda x: np.sum(np.max(x, **along) > 0, **along) + np.sum(np.max(x, **along) > -5, **along), x
    ) == [[[2] * 3, [1] * 3]]  # fmt: skip


def test_sums_of_rows_are_added_up_in_float64() -> None:
    x = np.float32([[2**24, 1, 1, 0]])
    assert evaluated(lambda x: np.sum(x, axis=-1, keepdims=True), x) == [[[2**24 + 2] * 4]]
    assert evaluated(lambda x: np.mean(x, axis=-1, keepdims=True), x) == [[[2**22 + 0.5] * 4]]


def test_powers() -> None:
    formula("zeroth", lambda models: models[0] ** 0)
    assert merge([f32(0, 3)], "zeroth").tolist() == [1, 1]
    for exponent in range(1, 9):
        assert evaluated(lambda x, e=exponent: x**e, f32(-2, 3)) == [[(-2) ** exponent, 3**exponent]]
    assert evaluated(lambda x: (x > 0) ** 2 + (x > 1) ** 2, f32(0, 1, 2)) == [[0, 1, 2]]  # not: true and true


def test_an_output_that_is_worked_on_further_is_kept() -> None:
    """Its memory must not be taken for what is computed after it."""

    def compute(x: Any, y: Any) -> list[Any]:
        total = x + y
        twice = total * 2
        thrice = twice + total
        return [total, thrice, total, thrice - y, x, 3 * twice + thrice, y / 2 - x]

    x, y = f32(1, 2), f32(10, 20)
    assert evaluated(compute, x, y) == [[11, 22], [33, 66], [11, 22], [23, 46], [1, 2], [99, 198], [4, 8]]

    def survey(scope: Scope) -> Steps:
        answers.append((yield SumOf(lambda models: compute(*models))).tolist())
        return Sum([1.0, 0.0])

    answers: list[Any] = []
    register("sums", survey)
    for backend in ("numpy", "numba", "triton"):
        merge([x, y], "sums", backend=backend)
    assert answers == [[33, 99, 33, 69, 3, 297, 12]] * 3


# Tiles


def test_what_is_not_finite_in_the_first_tile_of_several_is_noticed() -> None:
    formula("careful", lambda models: np.where(np.isnan(models[0]), 1.0, models[0]))
    model = np.ones(3 * TILE, np.float32)
    model[7] = np.nan
    with pytest.raises(NonFiniteError, match="model 0, the array: 1 NaN"):
        merge([model], "careful", backend="numpy", threads=1)
    assert merge([model], "careful", backend="numpy", threads=1, nonfinite="allow").tolist() == [1] * len(model)


def test_what_is_not_finite_beside_an_entry_that_rounds_to_the_largest_number_is_noticed() -> None:
    """65519 becomes 65504 in float16, which is finite."""
    formula("careful", lambda models: np.where(np.isnan(models[0]), 1.0, models[0]))
    assert merge([f32(65519, 1)], "careful", out_dtype="float16", backend="numpy").tolist() == [65504, 1]
    with pytest.raises(NonFiniteError, match="model 0, the array: 1 NaN"):
        merge([f32(65519, np.nan)], "careful", out_dtype="float16", backend="numpy")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_beyond_the_least_number_are_noticed(dtype: str) -> None:
    formula("more", lambda models: models[0] * 4)
    low = np.array([1, np.finfo(dtype).min], dtype)
    with pytest.raises(NonFiniteError, match=f"finite inputs overflow {dtype}"):
        merge([low], "more", backend="numpy")
    assert merge([low], "more", backend="numpy", nonfinite="allow").tolist() == [4, -np.inf]


def kernel_formula(compute: Callable[..., Any], numbers: Array, rows: int) -> Bound:
    traced = trace(compute, [0], {"rows": 1})
    assert traced is not None
    constants = np.array([traced.constants] * rows, np.float32)
    return Bound(traced.program, constants, np.zeros((rows, 0, 2), np.uint32), numbers, ())


def test_the_numbers_of_a_tensor_are_those_of_its_own_rows() -> None:
    """Of the second tensor of a table, and from a row in its middle on."""
    table = Table(
        [[np.ones(2 * 3, np.float32), np.zeros(6, np.float32)], [np.ones(4 * 2, np.float32), np.zeros(8, np.float32)]]
    )
    numbers = np.arange(6, dtype=np.float32)[:, None]
    how = kernel_formula(lambda x, rows: x * rows[0], numbers, 2)
    formulas.per_row(table, how, Slices(np.array([3, 2]), False), np.array([[1, 2, 4], [0, 0, 2]]))
    assert table.spans[0][1].tolist() == [0, 0, 0, 1, 1, 1]
    assert table.spans[1][1].tolist() == [0, 0, 0, 0, 4, 4, 5, 5]


def test_matrices_that_are_not_finite_are_not_worked_on() -> None:
    """Nor written into; where the formula would hide what is not finite it is noticed all the same."""
    seen: list[list[list[float]]] = []

    def own(base: Array, models: list[Array]) -> Array:
        seen.append(models[0].tolist())
        return base + 0

    applied("own", PerMatrix(own, Sum([1.0])), base="required")
    bad, good = np.array([[1, np.nan]], np.float32), np.array([[1, 2]], np.float32)
    with pytest.raises(NonFiniteError, match=r'model 0, tensor "w": 1 NaN'):
        merge([{"w": bad}], "own", base={"w": good}, backend="numpy")
    assert np.isnan(merge([bad], "own", base=good, nonfinite="allow", backend="numpy")).all()
    assert not seen
    assert merge([good], "own", base=good, backend="numpy").tolist() == [[1, 2]]
    assert seen == [[[1, 2]]]
    applied("careless", PerMatrix(lambda models: models[0].__iadd__(1), Sum([1.0])))
    with pytest.raises(MergeError, match=r"careless, the array: its formula failed with ValueError: .*read-only"):
        merge([good], "careless", backend="numpy")
    assert good.tolist() == [[1, 2]]


def test_one_matrix_is_decomposed_at_a_time() -> None:
    """As a decomposition takes all processors by itself."""
    at_work, most = [0], [0]

    def own(models: list[Array]) -> Array:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        sleep(0.01)
        at_work[0] -= 1
        return models[0]

    applied("own", PerMatrix(own, Sum([1.0])))
    models = {str(k): np.ones((300, 300), np.float32) for k in range(4)}
    merge([models], "own", threads=4, backend="numpy")
    assert most == [1]


@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_a_selection_from_what_is_not_finite_is_refused(backend: str) -> None:
    """Even if nothing else reads it."""

    def selected(scope: Scope) -> Steps:
        yield KthOf(lambda models: models[1], [1])
        return Sum([1.0, 0.0])

    register("selected", selected)
    with pytest.raises(NonFiniteError, match="model 1, the array: 1 Inf"):
        merge([f32(1, 2), f32(1, np.inf)], "selected", backend=backend)
    assert merge([f32(1, 2), f32(1, np.inf)], "selected", backend=backend, nonfinite="allow").tolist() == [1, 2]


# Tensors of different kinds


def test_all_tensors_of_a_scope_are_computed_in_one_type() -> None:
    """As wide as that of the widest, whichever comes first."""

    def difference(scope: Scope) -> Steps:
        yield SumOf(lambda base, models: models[0])
        return Elementwise(lambda base, models: (base - models[0]) * 2.0**30 - 2.0**30)

    register("difference", difference, base="required")
    model: dict[str, Array] = {"single": f32(2.0**-30), "double": np.array([0.5])}
    base: dict[str, Array] = {"single": f32(1), "double": np.array([0.75])}
    assert merge([model], "difference", base=base, scope="model")["single"].tolist() == [-1]
    assert merge([model], "difference", base=base)["single"].tolist() == [0]


def test_cuts_of_tensors_of_two_types() -> None:
    """Each is exact in its own."""
    cuts: dict[str, Any] = {}

    def cut(scope: Scope) -> Steps:
        cuts[scope.names[0]] = yield KthOf(lambda models: models[0] / 3, [2])
        return Sum([1.0])

    register("cut", cut)
    for backend in ("numpy", "numba", "triton"):
        merge([{"single": f32(1, 2, 5), "double": np.array([1.0, 2, 5])}], "cut", backend=backend)
        assert cuts["single"][0].magnitude == float(np.float32(2) / np.float32(3))
        assert cuts["double"][0].magnitude == 2 / 3


def test_narrow_tensors_of_growing_size() -> None:
    """What one was widened into is too small for the next."""
    formula("doubled", lambda models: models[0] * 2)
    model = {str(size): np.arange(size, dtype=np.float16) for size in (3, 300, 30)}
    merged = merge([model], "doubled", backend="numpy")
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {
        str(n): list(range(0, 2 * n, 2)) for n in (3, 300, 30)
    }


def _added(models: list[Values], factor: float) -> Values:
    return factor * sum(models)


def test_steps_that_differ_from_tensor_to_tensor() -> None:
    """The same formula with other models, with other numbers of rows, and over entries or rows; traced or called."""

    def shares(scope: Scope) -> Elementwise:
        return Elementwise(partial(_added, factor=2.0), read=[0] if scope.names == ("a",) else None)

    register("shares", shares)
    models = [{"a": f32(1), "b": f32(2)}, {"a": f32(10), "b": f32(20)}]
    assert {name: t.tolist() for name, t in merge(models, "shares").items()} == {"a": [2], "b": [44]}

    def numbered(scope: Scope) -> Elementwise:
        rows = [np.ones(1)] * (1 if scope.names == ("a",) else 2)
        return Elementwise(lambda models, rows: np.sort(models, axis=0)[0] + len(rows) * rows[0], rows=rows)

    register("numbered", numbered)
    assert {name: t.tolist() for name, t in merge(models, "numbered").items()} == {"a": [2], "b": [4]}

    def mixed(scope: Scope) -> Elementwise:
        return PerRow(_sorted) if scope.names == ("b",) else Elementwise(lambda models: np.sort(models, axis=0)[-1])

    register("mixed", mixed)
    entries = np.float32([[3, 1, 2], [0, 9, 4]])
    for names in ("ab", "ba"):
        merged = merge([{name: entries.copy() for name in names} for _ in range(2)], "mixed")
        assert merged["a"].tolist() == [[3, 1, 2], [0, 9, 4]]
        assert merged["b"].tolist() == [[1, 2, 3], [0, 4, 9]]


def _sorted(models: list[Values]) -> Values:
    return np.sort(models[0], axis=-1)


# Steps that are wrong


def test_a_formula_may_be_undefined_for_the_numbers_that_it_is_tried_with() -> None:
    formula("root", lambda models: np.sort([np.sqrt(each - 4) for each in models], axis=0)[-1])
    assert merge([f32(5, 8), f32(4, 20)], "root").tolist() == [1, 4]


@pytest.mark.parametrize("read", [[-1], [0, 2], [0.0], ["a"]])
def test_models_that_there_are_not_cannot_be_read(read: list[Any]) -> None:
    """-1, the base in other places, is not one."""
    applied("reads", Elementwise(lambda base, models: models[0], read=read), base="required")
    with pytest.raises(MergeError, match=r"reads: Elementwise reads models \[.*\]: their numbers are 0 to 1"):
        merge([f32(1), f32(2)], "reads", base=f32(0))


@pytest.mark.parametrize("which", ["uniform", "rows"])
def test_random_numbers_and_numbers_of_rows_are_not_written_into(which: str) -> None:
    def careless(models: list[Array], uniform: list[Array], rows: list[Array]) -> Any:
        given = (uniform if which == "uniform" else rows)[0]
        given += 1
        return np.sort(models, axis=0)[0] + given

    numbers = np.ones(1)
    applied("careless", Elementwise(careless, seed=0, rows=[numbers]))
    with pytest.raises(
        MergeError, match=r"careless: its formula failed with ValueError: .*read-only; what it is given must not"
    ):
        merge([f32(1, 2)], "careless")
    assert numbers.tolist() == [1]


def test_a_selection_with_numbers_of_rows_is_one_of_a_tensor() -> None:
    def selected(scope: Scope) -> Steps:
        yield KthOf(lambda models, rows: models[0] * rows[0], [1], rows=[np.ones(1)])
        return Sum([1.0])

    register("selected", selected)
    model = {"a": f32(1, 2), "b": f32(3, 4)}
    assert merge([model], "selected")["b"].tolist() == [3, 4]
    with pytest.raises(MergeError, match=r"selected.*KthOf"):
        merge([model], "selected", scope="model")


# Memory


def big(tmp_path: Path, shape: tuple[int, ...], dtype: Any = np.float32, count: int = 3) -> list[Path]:
    """Write models of one tensor of zeros."""
    paths = [tmp_path / f"{k}.safetensors" for k in range(count)]
    for path in paths:
        save_file({"w": np.zeros(shape, dtype)}, path)
    return paths


def refusal(paths: list[Path], name: str, memory: str, **how: Any) -> str:
    """Merge in little memory; return the error, if there is one."""
    *models, base = paths
    try:
        merge(models, name, out=paths[0].parent / "out.safetensors", memory=memory, threads=1, overwrite=True, **how, **(
            {"base": base} if find(name).base == "required" else {}))  # fmt: skip
    except MergeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["applied", "summed"])
def test_rows_that_do_not_fit_into_memory(how: str, tmp_path: Path) -> None:
    def survey(scope: Scope) -> Steps:
        yield SumOf(lambda models: np.max(models[0], axis=-1, keepdims=True), along="rows")
        return Sum([1.0] + [0.0] * (scope.models - 1))

    if how == "summed":
        register("looks", survey)
    else:
        applied("looks", PerRow(lambda models: models[0] - np.max(models[0], axis=-1, keepdims=True)))
    paths = big(tmp_path, (1, 8_000_000), count=2)
    assert 'tensor "w": looks looks at whole rows' in refusal(paths, "looks", "110MB")
    assert refusal(paths, "looks", "400MB") == ""


@pytest.mark.parametrize("name", ["tsv_m", "opcm", "own"])
def test_matrices_that_do_not_fit_into_memory(name: str, tmp_path: Path) -> None:
    """Also where a method surveys first, or is not annotated as one of matrices; vectors need no more than others do."""

    def own(scope: Scope) -> Any:
        return PerMatrix(lambda base, models: models[0], Sum([1.0] * scope.models))

    register("own", own, base="required")
    paths = big(tmp_path, (600, 500))  # 120 bytes for each entry, 12 for three inputs, and 16 for what is read and written
    message = refusal(paths, name, "130MB")
    assert f'tensor "w": {name} looks at whole matrices, 45 MB at once' in message
    for path in paths:
        save_file({"w": np.ones(300_000, np.float32)}, path)
    assert refusal(paths, name, "130MB") == ""
    assert load_file(tmp_path / "out.safetensors")["w"].shape == (300_000,)


def test_wide_matrices_need_more_memory(tmp_path: Path) -> None:
    paths = big(tmp_path, (600, 500), np.float64)
    assert "looks at whole matrices, 53 MB at once" in refusal(paths, "tsv_m", "130MB")


def test_methods_that_end_without_a_survey(tmp_path: Path) -> None:
    """What they return then is what counts; they are merged all the same."""

    def early(scope: Scope) -> Steps:
        if scope.models > 5:
            yield KthOf(lambda models: models[0], [1])
        return PerRow(lambda models: models[0] - np.max(models[0], axis=-1, keepdims=True))

    register("early", early)
    paths = big(tmp_path, (1, 8_000_000), count=2)
    assert 'tensor "w": early looks at whole rows' in refusal(paths, "early", "110MB")
    assert refusal(paths, "early", "400MB") == ""


# The registry


def test_parameters_that_are_models_are_not_for_surveys() -> None:
    def surveying(scope: Scope, *, beside: Models, others: Models) -> Steps:
        """Doc."""
        yield SumOf(lambda models: models[0])
        return Sum([1.0])

    with pytest.raises(TypeError, match="parameters that are models, beside, others, are for formulas"):
        method(paper="")(surveying)
    assert "surveying" not in methods()


def test_models_are_one_argument() -> None:
    def starred(*models: Values) -> Values:
        """Doc."""

    def starred_after_base(base: Values, *models: Values) -> Values:
        """Doc."""

    def with_more(models: list[Values], **more: float) -> Values:
        """Doc."""

    def scope_and_more(scope: Scope, **more: float) -> Sum:
        """Doc."""

    def scopes(*scope: Scope) -> Sum:
        """Doc."""

    for function, base in [
        (starred, "unused"),
        (starred_after_base, "required"),
        (with_more, "unused"),
        (scope_and_more, "unused"),
        (scopes, "unused"),
    ]:
        with pytest.raises(TypeError, match=r"its first parameter must be the scope|a formula takes"):
            method(paper="", base=base)(function)  # type: ignore[type-var]


def test_a_scope_may_have_any_name() -> None:
    @method(paper="")
    def named(models: Scope, *, share: float = 0.5) -> Sum:
        """Doc."""
        return Sum([share, 1 - share])

    assert not find("named").is_formula
    assert merge([f32(1), f32(3)], "named", share=0.25).tolist() == [2.5]


@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_several_parameters_that_are_models(backend: str) -> None:
    """Each is a list of its own, in the order of the signature, beside a base and without one."""

    @method(paper="")
    def two(models: list[Values], *, second: Models, scale: float = 1.0, third: Models) -> Values:
        """Doc."""
        return sum(scale * a * b - c for a, b, c in zip(models, second, third, strict=True))

    @method(paper="", base="required")
    def based(base: Values, models: list[Values], *, second: Models, third: Models) -> Values:
        """Doc."""
        return base + sum(a * b - c for a, b, c in zip(models, second, third, strict=True))

    models, second, third = [f32(1, 5), f32(3, 7)], [f32(1, 2), f32(3, 4)], [f32(10, 20), f32(30, 50)]
    expected = [1 * 1 - 10 + 3 * 3 - 30, 5 * 2 - 20 + 7 * 4 - 50]
    assert merge(models, "two", second=second, third=third, backend=backend).tolist() == expected
    assert merge(models, "two", third=third, second=second, scale=2, backend=backend).tolist() == [-20, 6]
    base = f32(100, 1000)
    assert merge(models, "based", base=base, second=second, third=third, backend=backend).tolist() == [70, 968]
    with pytest.raises(NonFiniteError, match="third 1, the array: 1 NaN"):
        merge(models, "based", base=base, second=second, third=[third[0], f32(1, np.nan)], backend=backend)
    with pytest.raises(NonFiniteError, match="base, the array: 1 NaN"):
        merge(models, "based", base=f32(1, np.nan), second=second, third=third, backend=backend)
    with pytest.raises(MergeError, match="two needs third: pass third="):
        merge(models, "two", second=second)


def test_a_formula_works_on_tensors_as_they_lie_in_memory() -> None:
    """The result of a transposed tensor is written into it; the order of its entries is nobody's business."""
    formula("doubled", lambda models: models[0] * 2)
    applied("doubled_rows", PerRow(lambda models: models[0] * 2))
    model = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert merge([model], "doubled", out=model) is model
    assert model.tolist() == [[0, 6], [2, 8], [4, 10]]
    for name, in_place in [("doubled", True), ("doubled_rows", False)]:
        executor, _ = prepare(find(name), [model], None, model, backend="numpy", parameters={})
        assert executor.reads_in_place is in_place


# Methods of the package


def test_the_median_of_large_numbers_does_not_overflow() -> None:
    assert merge([f32(3e38), f32(2e38)], "median").tolist() == f32(2.5e38).tolist()


@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_sce_chooses_among_entries_of_equal_variance_by_hash(backend: str) -> None:
    """A quarter of them, and not all."""
    size = 1000 if backend == "triton" else 10_000
    models = [np.full(size, value, np.float32) for value in (1, 3)]
    merged = merge(models, "sce", base=np.zeros(size, np.float32), select_topk=0.25, backend=backend)
    expected = np.float32((0.1 * 1 + 0.9 * 3) / 1)  # mean squares 1 to 9
    np.testing.assert_allclose(merged[merged != 0], expected, rtol=1e-6)
    assert 0.2 * size < np.count_nonzero(merged) < 0.3 * size


def test_sce_does_not_let_a_model_of_next_to_no_weight_count_alone() -> None:
    """A sum of weights below a millionth counts as that: 1 / (1e8 + 1) / 1e-6 of a change of 1."""
    merged = merge([f32(1e4, 0), f32(0, 1)], "sce", base=f32(0, 0))
    np.testing.assert_allclose(merged, [1e4, 0.01], rtol=1e-5)


@pytest.mark.parametrize("rescale", ["inverse_density", "l1", None])
def test_della_does_not_read_models_of_weight_zero(rescale: str | None) -> None:
    base, good = np.zeros((2, 50), np.float32), np.ones((2, 50), np.float32)
    bad = np.full_like(base, np.nan)
    merged = merge([good, bad], "della", base=base, density=0.5, weight=[1, 0], rescale=rescale)
    alone = merge([good], "della", base=base, density=0.5, rescale=rescale)
    assert merged.tolist() == alone.tolist()


def test_della_never_keeps_what_has_the_probability_zero() -> None:
    """Not even with the random number zero: the entry would be divided by zero."""
    zero = np.zeros((1, 3), np.float32)
    with np.errstate(divide="ignore"):
        before, after = _dropped(zero, np.float32([[1, 2, 3]]), zero, (0.5, 0.5), own=True)
    assert before.tolist() == [[1, 2, 3]]
    assert after.tolist() == [[0, 4, 3]]


def test_of_equal_magnitudes_the_first_is_the_largest() -> None:
    """And votes that cancel elect plus, as in `Consensus`."""
    changes = [f32(1, -2), f32(1, -2)]
    assert consensus(changes, [1.0, -1.0], "unweighted", "max").tolist() == [1, -2]
    assert consensus(changes, [-1.0, 1.0], "unweighted", "max").tolist() == [-1, 2]
    assert consensus([f32(1, -3), f32(-1, 3)], [1.0, 1.0], "weighted", "sum").tolist() == [1, 3]
    assert consensus([f32(1, -3), f32(-1, 3)], [2.0, 2.0], "unweighted", "weight_mean").tolist() == [1, 3]


def test_what_no_model_changes_keeps_its_sign() -> None:
    """Of a zero; with `magmax`, `ram` and `nearswap` as with all others."""
    base, model = f32(-0.0, 0, 1), f32(-0.0, -0.0, 2)
    for name, how in [("magmax", {}), ("ram", {}), ("ramplus_tl", {}), ("nearswap", {"t": 0.5}), ("sce", {})]:
        merged = merge([model], name, base=base, **how)
        assert np.signbit(merged[0]), name
        assert (merged[:2] == 0).all(), name


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_rows_are_those_of_a_tensor_however_it_lies_in_memory(backend: str) -> None:
    """In place too, where formulas of entries alone take a transposed tensor as it lies."""
    applied("centred", PerRow(lambda models: models[0] - np.max(models[0], axis=-1, keepdims=True)))
    applied("halved", PerMatrix(lambda models: models[0] - models[0][:, :1], Sum([1.0])))
    entries = np.float32([[1, 5], [2, 4], [0, -3]])
    for name, expected in [("centred", [[-4, 0], [-2, 0], [0, -3]]), ("halved", [[0, 4], [0, 2], [0, -3]])]:
        model = np.asfortranarray(entries)
        assert merge([model], name, backend=backend).tolist() == expected
        assert merge([model], name, out=model, backend=backend) is model
        assert model.tolist() == expected


# Plans, parameters and pages


def test_a_formula_that_is_wrong_is_refused_before_files_are_read(tmp_path: Path) -> None:
    """A plan is made, and nothing else."""
    formula("wrong", lambda models: np.mean(models))
    applied("steps", Elementwise(lambda models: models[5]))
    save_file({"w": f32(1, 2)}, tmp_path / "0.safetensors")
    messages = {"wrong": "wrong: an entry that its formula", "steps": "steps: its formula failed with IndexError"}
    for name, message in messages.items():
        with pytest.raises(MergeError, match=message):
            prepare_files([tmp_path / "0.safetensors"], name, out=tmp_path / "out.safetensors", parameters={})


def test_a_default_with_a_value_for_each_model_stays_so_beside_filters() -> None:
    @method(paper="", models=(2, 2))
    def own(scope: Scope, *, scale: float = 1.0, weight: PerModel[float] = (1.0, 2.0), last: float = 0.0) -> Sum:
        """Doc."""
        return Sum([scale * w + last for w in weight])

    models = [{"a": f32(1), "b": f32(1)}, {"a": f32(10), "b": f32(10)}]
    filters = [{"filter": "a", "value": [3, 4]}]
    assert {name: t.tolist() for name, t in merge(models, "own", weight=filters).items()} == {"a": [43], "b": [21]}
    mixed = [2, [{"filter": "a", "value": 5}]]
    assert {name: t.tolist() for name, t in merge(models, "own", weight=mixed).items()} == {"a": [52], "b": [22]}
    assert list(Parameters(find("own"), {"weight": filters, "last": 2}, 2, ["a", "b"]).given) == ["scale", "weight", "last"]


def test_costs_of_models_beside_the_models_and_of_models_that_are_not_read() -> None:
    @method(paper="", base="required")
    def beside(base: Values, models: list[Values], *, second: Models) -> Values:
        """Doc."""
        return base + sum(a * b for a, b in zip(models, second, strict=True))

    applied("reads_two", Elementwise(lambda base, models: models[0] + models[1], read=[0, 2]), base="required")
    spent = pages.cost(find("fisher"))
    assert (spent.formula, spent.reads(3)) == ("2K", 6)
    spent = pages.cost(find("beside"))
    assert (spent.formula, spent.reads(3)) == ("2K + 1", 7)
    spent = pages.cost(find("reads_two"))
    assert (spent.passes[0].models, spent.reads(12)) == (2, 3)
    assert "`second` (a list of models, one for each model; required)" in pages.page(find("beside"))


# What a first version of the formulas got wrong


@pytest.mark.parametrize("compute", [np.sqrt, lambda x: x**0.5, lambda x: np.inf, lambda x: np.nan])
def test_what_is_not_finite_is_found_before_anything_is_written(compute: Callable[..., Any]) -> None:
    formula("spoils", lambda models: compute(models[0]))
    model = f32(4, -1)
    with pytest.raises(NonFiniteError, match="finite inputs overflow float32"):
        merge([model], "spoils", out=model)
    assert model.tolist() == [4, -1]


def test_a_number_of_a_row_that_is_the_result_and_infinite() -> None:
    register(
        "row_is_infinite",
        lambda scope: Elementwise(lambda models, rows: rows[0], rows=[np.array([np.inf, 1])]),
    )
    model = np.array([[4], [-1]], np.float32)
    with pytest.raises(NonFiniteError, match="finite inputs overflow float32"):
        merge([model], "row_is_infinite", out=model)
    assert model.tolist() == [[4], [-1]]


def test_the_larger_of_truths_is_a_truth() -> None:
    formula("truths", lambda models: (np.maximum(models[0] > 0, models[0] > 1) + (models[0] > 2)) * models[0])
    assert merge([f32(3, 1)], "truths").tolist() == [3, 1]


@pytest.mark.parametrize("compute", [lambda models: np.full(models[0].shape, "a"), lambda models: models[0] + 1j])
def test_matrices_of_no_real_numbers(compute: Callable[..., Any]) -> None:
    register("unreal", lambda scope: PerMatrix(compute, Sum([1.0])))
    with pytest.raises(MergeError, match="it has to return real numbers"):
        merge([np.ones((2, 2), np.float32)], "unreal")


def test_entries_added_to_one_number_of_a_row() -> None:
    def compute(models: list[Values]) -> Values:
        most = np.max(models[0], axis=-1, keepdims=True)
        most += models[0]
        return most

    register("into_a_row", lambda scope: PerRow(compute))
    with pytest.raises(MergeError, match="broadcast"):
        merge([np.ones((2, 3), np.float32)], "into_a_row")


@pytest.mark.parametrize("name", ["only", "exclude", "memory", "overwrite", "verify", "shard_size"])
def test_names_of_parameters_that_merge_has_itself(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def taken(models: list, *, {name}: float = 1.0):\n    'Test.'", space)
    with pytest.raises(TypeError, match="belongs to merge"):
        method(paper="")(space["taken"])
