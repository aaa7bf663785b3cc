"""Formulas on the Triton backend, compiled or interpreted, and in torch: the same bits as NumPy's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from mergekit_cl.dtypes import compute_dtype, type_of
from mergekit_cl.formula import Program, ranks, trace
from mergekit_cl.kernels import BLOCK, Array, Formula, MatrixFormula, Slices, Table, interpreted
from mergekit_cl.kernels import numpy as oracle
from mergekit_cl.kernels import triton as backend
from mergekit_cl.kernels.triton import formulas, tiles

DTYPES = tuple(type_of)
B, H, S, D = "bfloat16", "float16", "float32", "float64"
GUARD = 9
"""Elements in front of and behind each span that nothing may touch."""

pytestmark = pytest.mark.gpu


def examples(count: int) -> settings:
    """Draw so many examples where the profile has 50, and more or fewer where it has."""
    default = settings.default
    assert default is not None
    return settings(max_examples=count * default.max_examples // 50, deadline=None)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": lambda x, y: np.maximum(x, y) + 0.0,  # of two zeros it may be either
    "min": lambda x, y: np.minimum(x, y) + 0.0,
    "copysign": lambda x, y: np.copysign(x, np.where(y == y, y, 1.0)),  # a NaN's sign is a processor's own
    "lt": lambda x, y: np.where(x < y, x, 0.5),
    "le": lambda x, y: (x <= y) * 2.0,
    "gt": lambda x, y: np.where((x > y) | (x == 1), y, 0.5),
    "ge": lambda x, y: np.where(~(x >= y) & (y != 0), x, 2.5),
    "eq": lambda x, y: np.where((x == y) ^ (x > 0), 3.0, x),
    "ne": lambda x, y: np.where(np.where(x > 0, x != y, x <= y), x, -y),
    "where": lambda x, y: np.where(x, y, x),
}
UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "sign": np.sign,
    "half": lambda x: 0.3 * x,
    "inverse": lambda x: 1 / x,
}
ROWS: dict[str, Callable[[Any], Any]] = {
    "row_max": lambda x: np.max(x, axis=-1, keepdims=True),
    "row_min": lambda x: np.min(x, axis=-1, keepdims=True),
    "ranks": ranks,
    "count": lambda x: np.sum(np.where(x > 0, 1.0, 0.0), axis=-1, keepdims=True),  # sums of integers are exact
    "mean": lambda x: np.mean(np.where(x > 0, 1.0, 0.0), axis=-1, keepdims=True),
}


@dataclass(frozen=True)
class Steps:
    """A formula: each step takes values by their numbers, modulo how many there are, and adds one."""

    steps: tuple[tuple[str, int, int], ...]
    outputs: int

    def __call__(self, models: Sequence[Any], *, uniform: Sequence[Any] = (), rows: Sequence[Any] = ()) -> list[Any]:
        values = [*models, *uniform, *rows]
        for name, first, second in self.steps:
            x, y = values[first % len(values)], values[second % len(values)]
            kind, _, of = name.partition(" ")
            values.append(BINARY[of](x, y) if kind == "binary" else {**UNARY, **ROWS}[of](x))
        return values[-self.outputs :]


def bound(
    formula: Callable[..., Any], rows: int, inputs: int, compute: Any, seed: int = 0, uniform: int = 0, numbers: Any = None,
    traced: bool = True,
) -> Formula:  # fmt: skip
    """Bind a formula of the models to rows, whose constants differ by factors 1, 2, ..."""
    keywords = {**({"uniform": uniform} if uniform else {}), **({"rows": numbers.shape[1]} if numbers is not None else {})}
    program = trace(formula, [list(range(inputs))], keywords)
    assert program is not None
    constants = np.array([[row * each for each in program.constants] for row in range(1, rows + 1)], compute)
    keys = np.random.default_rng(seed).integers(0, 1 << 32, (rows, uniform, 2), np.uint32)

    def call(arrays: Any, uniform: Any, numbers: Any) -> Any:
        given = {**({"uniform": uniform} if len(uniform) else {}), **({"rows": numbers} if len(numbers) else {})}
        result = formula(arrays, **given)
        return result if isinstance(result, list) else [result]

    numbers = np.zeros((0, 0), compute) if numbers is None else numbers
    return Formula(program.program if traced else None, constants.reshape(rows, -1), keys, numbers, [call] * rows)


def specials(dtype: str) -> Array:
    limits: Any = ml_dtypes.finfo(type_of[dtype])
    small, tiny, largest = limits.smallest_subnormal, limits.tiny, limits.max
    positive = [0, small, small * 3, tiny - small, tiny, limits.eps, 0.3, 1, 1 + limits.eps, 3.140625, largest, np.inf]
    values = np.array(positive, type_of[dtype])
    return np.concatenate([values, -values, np.array([np.nan], values.dtype)])


@dataclass
class Case:
    """A table over guarded buffers, pieces of it, and a formula."""

    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    out_is: int | None
    pieces: Array
    steps: Steps
    uniform: int
    seed: int

    @property
    def inputs(self) -> int:
        return len(self.dtypes) - 1

    @property
    def compute(self) -> Any:
        return compute_dtype(self.dtypes[:-1])

    def open(self) -> tuple[list[list[Array]], Table]:
        """Make the buffers, the same at each call, and the table over them. All else is NaN."""
        random = np.random.default_rng(self.seed)
        buffers, rows = [], []
        for size, offsets in zip(self.sizes, self.offsets, strict=True):
            columns, starts = [], [GUARD + offset for offset in offsets]
            for dtype in self.dtypes:
                values = random.integers(-8, 9, 2 * GUARD + 16 + size) / 4
                at = random.random(len(values)) < 0.7
                values[at] = random.standard_normal(at.sum())
                column = values.astype(type_of[dtype])
                if random.integers(0, 2):  # else no row would ever be finite
                    at = random.random(len(values)) < 0.02
                    column[at] = random.choice(specials(dtype), at.sum())
                columns.append(column)
            if self.out_is is not None:
                columns[-1], starts[-1] = columns[self.out_is], starts[self.out_is]
            else:
                columns[-1][:] = np.nan
            buffers.append(columns)
            rows.append([column[start : start + size] for column, start in zip(columns, starts, strict=True)])
            for column, start in zip(columns, starts, strict=True):
                column[:start] = column[start + size :] = np.nan
        return buffers, Table(rows)

    def formula(self, numbers: Any = None, traced: bool = True) -> Formula:
        return bound(self.steps, len(self.sizes), self.inputs, self.compute, self.seed, self.uniform, numbers, traced)


NAMES = [*(f"binary {name}" for name in BINARY), *(f"unary {name}" for name in UNARY)]


@st.composite
def cases(draw: st.DrawFn, size: st.SearchStrategy[int], names: Sequence[str] = NAMES, outputs: int = 1) -> Case:
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4).map(tuple))
    sizes = draw(st.lists(size, min_size=1, max_size=3).map(tuple))
    offset = draw(st.sampled_from([st.just(7), st.integers(0, 15)]))  # 16 + 7 elements are aligned in every dtype
    number = st.integers(0, 20)
    steps = draw(st.lists(st.tuples(st.sampled_from(names), number, number), min_size=1, max_size=8).map(tuple))
    same = [column for column in range(len(dtypes) - 1) if dtypes[column] == dtypes[-1]]
    pieces = [(row, 0, size_) for row, size_ in enumerate(sizes) if draw(st.integers(0, 5))]
    return Case(
        dtypes, sizes,
        tuple(draw(st.tuples(*[offset] * len(dtypes))) for _ in sizes),
        draw(st.none() | st.sampled_from(same)) if same else None,
        np.array(draw(st.permutations(pieces)), np.int64).reshape(-1, 3),
        Steps(steps, outputs), draw(st.integers(0, 2)), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def assert_same_bits(found: Array, expected: Array) -> None:
    """Assert equality bit for bit, but for the payloads of NaN."""
    assert found.dtype == expected.dtype
    with np.errstate(invalid="ignore"):
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), nan)
    assert found[~nan].tobytes() == expected[~nan].tobytes()


def assert_same_buffers(found: list[list[Array]], expected: list[list[Array]]) -> None:
    for row, expected_row in zip(found, expected, strict=True):
        for column, expected_column in zip(row, expected_row, strict=True):
            assert_same_bits(column, expected_column)  # the guards, the inputs and what is in no piece too


def without(table: Table) -> Table:
    """Return a table without its output."""
    return Table([row[:-1] for row in table.spans])


SIZES = st.one_of(st.integers(0, 40), st.sampled_from([511, 512, 1024, 2048, 2049]), st.integers(0, 5000))


@examples(60)
@given(case=cases(SIZES))
def test_elementwise(kernels: Any, case: Case) -> None:
    expected, table = case.open()
    flags = oracle.elementwise(table, case.formula(), case.pieces)
    found, table = case.open()
    assert formulas.fits(case.formula().program)
    np.testing.assert_array_equal(kernels.elementwise(table, case.formula(), case.pieces), flags)
    assert_same_buffers(found, expected)


@pytest.mark.parametrize("compute", [S, D])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_on_every_pair_of_special_values(kernels: Any, in_torch: Any, name: str, compute: str) -> None:
    left, right = (side.ravel() for side in np.meshgrid(specials(compute), specials(compute)))
    results = []
    formula = bound(Steps(((name, 0, 1),), 1), 1, 2, compute)
    for module in (oracle, kernels, in_torch):
        row = [left, right, np.full_like(left, 77)]
        flags = module.elementwise(Table([row]), formula, Table([row]).whole)
        results.append((row[-1], flags))
    for found, flags in results[1:]:
        assert_same_bits(found, results[0][0])
        assert flags == results[0][1]


@pytest.fixture(params=["kernels", "in_torch"])
def module(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def moved(models: Sequence[Any]) -> Any:
    base, *others = models
    change = sum((0.25 * (other - base) for other in others), 0.0 * base)
    return np.where(np.abs(change) > 1, base - change, base + change / 3)


def test_numbers_by_hand(module: Any) -> None:
    spans = [np.array(each, np.float32) for each in ([1, 2, -3], [5, 2, 0], [2, 2, 0], [0, 0, 0])]
    table = Table([spans])
    assert module.elementwise(table, bound(moved, 1, 3, np.float32), table.whole).tolist() == [False]
    # changes (4 + 1) / 4, which is subtracted; 0; (3 + 3) / 4, which is too
    np.testing.assert_array_equal(spans[-1], np.float32([-0.25, 2, -4.5]))
    spans[1][:] = [4, 2, 0]
    module.elementwise(table, bound(moved, 1, 3, np.float32), table.whole)  # the first change is 1
    np.testing.assert_array_equal(spans[-1], [1 + np.float32(1) / 3, 2, -4.5])


@pytest.mark.parametrize(("dtype", "unit"), [(B, 2.0**-7), (H, 2.0**-10)])
def test_float64_is_rounded_once(module: Any, dtype: str, unit: float) -> None:
    values = 1 + unit * np.array([0.5, 0.5 + 2e-9, 1.5, 1.5 - 2e-9])  # float32 would make all of them ties
    spans = [values, np.zeros(4, type_of[dtype])]
    table = Table([spans])
    module.elementwise(table, bound(lambda models: -models[0], 1, 1, np.float64), table.whole)
    assert spans[1].astype(float).tolist() == [-1, -1 - unit, -1 - 2 * unit, -1 - unit]


def test_flags(module: Any) -> None:
    size = 2100
    ones = np.ones((7, size), np.float32)
    ones[1, -1] = ones[2, 3] = np.inf
    ones[3, 5] = np.nan
    ones[4, 7] = 0
    ones[5, 7] = 1e-5
    rows: list[list[Array]] = [[row, np.ones(size, np.float32), np.zeros(size, np.float16)] for row in ones]
    rows[6][1][0] = np.inf  # is not used, but read
    table = Table(rows)
    pieces = table.whole
    pieces[2] = 2, 0, 3  # ends in front of what is not finite; a program's last entries would be 1 / 0
    flags = module.elementwise(table, bound(lambda models: 1 / models[0], 7, 2, np.float32), pieces)
    assert flags.tolist() == [False, True, False, True, True, True, True]


def test_what_is_overwritten_was_checked_first(module: Any) -> None:
    span = np.array([1, np.inf], np.float32)
    table = Table([[span, span]])
    assert module.elementwise(table, bound(lambda models: 1 / models[0], 1, 1, np.float32), table.whole).tolist() == [True]
    assert span.tolist() == [1, 0]


def counted(models: Sequence[Any], uniform: Sequence[Any]) -> list[Any]:
    return [models[0] * models[-1], np.where(uniform[1] < 0.25, 2.0, 0.0), 1 + 0 * models[0]]


@pytest.mark.parametrize("dtypes", [(B, B, B), (S, H), (D, B)])
def test_sum_of(kernels: Any, in_torch: Any, dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (backend, oracle.formulas, tiles):  # a block of 65,536 takes the interpreter seconds
        monkeypatch.setattr(each, "BLOCK", 4096)
    random = np.random.default_rng(3)
    sizes = [4096 + 3001, 700]
    pieces = np.array([[1, 0, 700], [0, 4096, 4096 + 3001], [0, 0, 4096]], np.int64)
    table = Table([[random.integers(-8, 9, size).astype(type_of[dtype]) for dtype in dtypes] for size in sizes])
    formula = bound(counted, 2, len(dtypes), table.compute, uniform=2)
    expected = oracle.sum_of(table, formula, None, pieces)  # exact, in whatever order
    np.testing.assert_array_equal(kernels.sum_of(table, formula, None, pieces), expected)
    np.testing.assert_array_equal(in_torch.sum_of(table, formula, None, pieces), expected)
    assert expected[:, 2].tolist() == [2 * 700, 3001, 4096]  # the constants of the second row are doubled
    assert abs(expected[2, 1] / 4096 - 0.5) < 0.05
    table.spans[0][0][5] = np.nan
    for found in (kernels.sum_of(table, formula, None, pieces), in_torch.sum_of(table, formula, None, pieces)):
        expected[2, [0, 2]] = np.nan
        np.testing.assert_array_equal(found, expected)


def patterns(case: Case, wide: bool) -> tuple[Array, Array]:
    """Draw windows that begin at magnitudes that occur, or at 0."""
    random = np.random.default_rng(case.seed)
    kind = np.float64 if wide else case.compute
    bits = 63 if kind == np.float64 else 31
    values = np.append(np.abs(random.standard_normal(5)), 0).astype(kind).view(f"i{np.dtype(kind).itemsize}")
    shape = len(case.sizes), random.integers(1, 3)
    return random.choice(values, shape).astype(np.int64), random.integers(0, bits - 8, shape)


@examples(25)
@given(case=cases(SIZES), wide=st.booleans(), bins=st.sampled_from([1, 16, 300]), share=st.integers(1, 2))
def test_histogram_of(kernels: Any, in_torch: Any, case: Case, wide: bool, bins: int, share: int) -> None:
    _, table = case.open()
    table, groups = without(table), np.arange(len(case.pieces)) // share
    low, shift = patterns(case, wide)
    expected = oracle.histogram_of(table, case.formula(), None, low, shift, bins, wide, groups, case.pieces)
    for module in (kernels, in_torch):
        found = module.histogram_of(table, case.formula(), None, low, shift, bins, wide, groups, case.pieces)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


def test_histogram_by_hand(kernels: Any) -> None:
    one = 0x3F800000
    values = np.zeros(4101, np.float32)
    values[[0, 2050, -1]] = 0.5, -0.5, 0.75  # doubled: in the window [1, 2), in two bins
    values[[1, 2, 3, 4]] = 1, np.inf, np.nan, 0.375
    formula = bound(lambda models: 2 * models[0], 1, 1, np.float32)
    low, shift, group = np.full((1, 1), one), np.full((1, 1), 22), np.zeros(1, np.intp)
    table = Table([[values]])
    found = kernels.histogram_of(table, formula, None, low, shift, 2, False, group, table.whole)
    assert found.tolist() == [[[2, 1, 3, 2]]]
    beyond = bound(lambda models: 1 / models[0], 1, 1, np.float32)  # 1 / 0 behind the end is not counted
    found = kernels.histogram_of(Table([[values[:2]]]), beyond, None, low, shift, 2, False, group, np.array([[0, 0, 2]]))
    assert found.tolist() == [[[1, 0, 1, 0]]]


@st.composite
def sliced_cases(draw: st.DrawFn, outputs: int = 1) -> tuple[Case, Slices, Array | None, bool]:
    """Draw a case over rows of matrices, numbers for each of these, and whether the formula is traced."""
    names = [*NAMES, *(f"rows {name}" for name in ROWS for _ in range(4))]
    case = draw(cases(st.integers(0, 12), names, outputs))
    lengths = np.array([draw(st.integers(1, 50) | st.just(1)) for _ in case.sizes])
    case.sizes = tuple((np.array(case.sizes) * lengths).tolist())
    case.pieces[:, 1] = [draw(st.integers(0, int(stop))) for stop in case.pieces[:, 2]]
    count = draw(st.integers(0, 2))
    slices = Slices(lengths, False)
    random = np.random.default_rng(case.seed)
    numbers = random.integers(-4, 5, (int(slices.counts(case.open()[1]).sum()), count)).astype(case.compute) if count else None
    return case, slices, numbers, draw(st.booleans())


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", BLOCK)


@examples(100)
@given(sliced=sliced_cases(), tile=st.sampled_from([7, 64, 1000]))
def test_rows_in_torch(in_torch: Any, sliced: tuple[Case, Slices, Array | None, bool], tile: int) -> None:
    case, slices, numbers, traced = sliced
    formula = case.formula(numbers, traced)
    expected, table = case.open()
    flags = oracle.per_row(table, formula, slices, case.pieces)
    found, table = case.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", tile)
        np.testing.assert_array_equal(in_torch.per_row(table, formula, slices, case.pieces), flags)
    assert_same_buffers(found, expected)


@examples(30)
@given(sliced=sliced_cases(outputs=2))
def test_sums_and_histograms_of_rows_in_torch(
    kernels: Any, in_torch: Any, sliced: tuple[Case, Slices, Array | None, bool]
) -> None:
    case, slices, numbers, traced = sliced
    _, table = case.open()
    table = without(table)
    steps = case.steps
    of_integers = Steps((*steps.steps, ("binary le", -1, -2), ("unary sign", -3, 0)), 2)
    case.steps = of_integers
    formula = case.formula(numbers, traced)
    expected = oracle.sum_of(table, formula, slices, case.pieces)
    np.testing.assert_array_equal(in_torch.sum_of(table, formula, slices, case.pieces), expected)
    case.steps = Steps(steps.steps, 1)
    formula, (low, shift), groups = case.formula(numbers, traced), patterns(case, False), np.arange(len(case.pieces))
    arguments = formula, slices, low, shift, 16, False, groups, case.pieces
    expected_counts = oracle.histogram_of(table, *arguments)
    np.testing.assert_array_equal(in_torch.histogram_of(table, *arguments), expected_counts)
    # the backend has NumPy do it in the interpreter
    np.testing.assert_array_equal(kernels.sum_of(table, case.formula(numbers), slices, case.pieces)[:, :0], expected[:, :0])


@examples(20)
@given(case=cases(SIZES), out=st.sampled_from(DTYPES))
def test_functions_that_have_to_be_called(kernels: Any, in_torch: Any, case: Case, out: str) -> None:
    case.dtypes, case.out_is = (*case.dtypes[:-1], out), None
    formula = case.formula(traced=False)
    expected, table = case.open()
    flags = oracle.elementwise(table, formula, case.pieces)
    found, table = case.open()
    np.testing.assert_array_equal(in_torch.elementwise(table, formula, case.pieces), flags)
    assert_same_buffers(found, expected)
    found, table = case.open()
    np.testing.assert_array_equal(kernels.elementwise(table, formula, case.pieces), flags)
    assert_same_buffers(found, expected)


def test_functions_may_not_write_into_what_they_are_given() -> None:
    spans = [torch.ones(3), torch.ones(3)]

    def call(inputs: Any, uniform: Any, numbers: Any) -> Any:
        inputs[0][:] = 2
        return inputs

    formula = Formula(None, np.zeros((1, 0), np.float32), np.zeros((1, 0, 2), np.uint32), np.zeros((0, 0), np.float32), [call])
    table = Table([spans])
    with pytest.raises(ValueError, match="read-only"):
        tiles.elementwise(table, formula, table.whole)
    assert spans[0].tolist() == [1, 1, 1]


def test_tensors_of_inference_mode_in_torch() -> None:
    with torch.inference_mode():
        spans = [torch.tensor([1.0, torch.inf]), torch.zeros(2)]
    table = Table([spans])
    assert tiles.elementwise(table, bound(lambda models: 1 / models[0], 1, 1, np.float32), table.whole).tolist() == [True]
    assert spans[1].tolist() == [1, 0]
    formula = MatrixFormula(lambda models: models[0] + 1, False, np.dtype(np.float32), (1, 2), "mine")
    assert tiles.per_matrix(table, [formula], np.array([[0, 0, 1]])).tolist() == [True]
    assert np.isnan(spans[1].numpy()).all()


def test_what_has_a_value_for_a_slice_is_its_own_sum(in_torch: Any) -> None:
    def summed(models: Any, rows: Any) -> Any:
        own = [operation(rows[0], axis=-1, keepdims=True) for operation in (np.sum, np.mean, np.max, np.min)]
        return models[0] + sum(own) + np.sum(rows[0] > 1, axis=-1, keepdims=True) + np.sum(rows[0] > 1, axis=-1, keepdims=True)

    numbers, slices = np.array([[1], [2]], np.float32), Slices(np.array([3]), False)
    pieces = np.array([[0, 0, 2]])
    for traced in (True, False):
        formula = bound(summed, 1, 1, np.float32, numbers=numbers, traced=traced)
        for module in (oracle, in_torch):
            table = Table([[np.zeros(6, np.float32), np.zeros(6, np.float32)]])
            module.per_row(table, formula, slices, pieces)
            assert table.spans[0][1].tolist() == [4, 4, 4, 10, 10, 10]


def scaled(scale: float, models: Any) -> Any:
    return scale * models[0]


def test_zeros_of_two_signs_are_two_constants() -> None:
    found = [trace(partial(scaled, scale), [[0]]) for scale in (0.0, -0.0, 1.0, True)]
    assert [str(each and each.constants) for each in found] == ["(0.0,)", "(-0.0,)", "(1.0,)", "(1.0,)"]


TRANSCENDENTAL: list[Any] = [np.exp, np.log, np.exp2, np.log2, np.expm1, np.log1p, np.tanh, np.sin, np.cos, np.arctan]


@pytest.mark.parametrize("function", TRANSCENDENTAL)
def test_exp_and_the_like(kernels: Any, in_torch: Any, function: Any) -> None:
    values = np.concatenate([np.linspace(-3, 3, 1001), [np.inf, -np.inf, np.nan]]).astype(np.float32)
    table = Table([[values, np.zeros_like(values)]])
    formula = bound(lambda models: function(models[0]), 1, 1, np.float32)
    assert not formulas.fits(formula.program)
    in_torch.elementwise(table, formula, table.whole)
    with np.errstate(all="ignore"):
        expected = function(values.astype(np.float64))
    np.testing.assert_allclose(table.spans[0][1], expected, rtol=5e-7, atol=1e-7)
    if interpreted():  # it is NumPy then that computes it
        again = Table([[values, np.zeros_like(values)]])
        kernels.elementwise(again, formula, table.whole)
        oracle.elementwise(table, formula, table.whole)
        assert_same_bits(again.spans[0][1], table.spans[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices(kernels: Any, in_torch: Any, dtype: str) -> None:
    random = np.random.default_rng(2)
    rows = [[random.integers(-9, 9, 12).astype(type_of[dtype]) for _ in range(3)] for _ in range(3)]
    rows[2][0][3] = np.inf

    def product(base: Any, models: Any) -> Any:
        models[0] *= 2.0  # a copy
        return base @ models[0].T @ base / 8

    def call(base: Any, models: Any) -> Any:
        return product(base, [model.copy() for model in models])

    compute = compute_dtype([dtype])
    expected = Table([[*row[:-1], row[-1].copy()] for row in rows])
    pieces = np.array([[0, 0, 1], [2, 0, 1]])
    flags = oracle.per_matrix(expected, [MatrixFormula(call, True, compute, (3, 4), "mine")] * 3, pieces)
    formula = MatrixFormula(product, True, compute, (3, 4), "mine")
    found = Table(rows)
    assert in_torch.per_matrix(found, [formula] * 3, pieces).tolist() == flags.tolist() == [False, False, True]
    for row, expected_row in zip(found.spans, expected.spans, strict=True):
        for column, expected_column in zip(row, expected_row, strict=True):
            assert_same_bits(column, expected_column)
    if interpreted():
        again = Table([[*row[:-1], np.zeros_like(row[-1])] for row in rows])
        kernels.per_matrix(again, [MatrixFormula(call, True, compute, (3, 4), "mine")] * 3, pieces)
        assert_same_bits(again.spans[0][-1], expected.spans[0][-1])


def test_what_the_kernels_carry_out(kernels: Any) -> None:
    def program(formula: Any) -> Program:
        traced = trace(formula, [[0, 1]])
        assert traced is not None
        return traced.program

    assert formulas.fits(program(moved))
    assert not formulas.fits(None)
    assert not formulas.fits(program(lambda models: models[0] - np.max(models[1], axis=-1, keepdims=True)))
    long = program(lambda models: sum((k * models[0] for k in range(formulas.MOST_OPERATIONS)), models[1]))
    assert not formulas.fits(long)
    assert formulas.most_held(program(lambda models: models[0])) == 2  # both are read
    assert formulas.most_held(program(lambda models: models[0] * 2 + models[1])) == 4  # 2 too, and the product
    table = Table([[np.full(5, 2, np.float32), np.ones(5, np.float32), np.zeros(5, np.float32)]])
    added = bound(lambda models: sum((k * models[0] for k in range(200)), models[1]), 1, 2, np.float32)
    assert not formulas.fits(added.program)
    kernels.elementwise(table, added, table.whole)
    assert table.spans[0][-1].tolist() == [1 + 199 * 200] * 5


@pytest.mark.parametrize("pieces", [np.zeros((0, 3), np.int64), np.array([[0, 0, 0], [1, 0, 0]])])
def test_nothing_to_do(kernels: Any, in_torch: Any, pieces: Array) -> None:
    table = Table([[np.ones(3, np.float32)] * 2, [np.ones(0, np.float32)] * 2])
    formula, groups, zero = (
        bound(lambda models: models[0], 2, 2, np.float32),
        np.arange(len(pieces)),
        np.zeros((2, 1), np.int64),
    )
    slices = Slices(np.array([3, 1]), False)
    copied = bound(lambda models: models[0], 2, 1, np.float32)
    for each in (kernels, in_torch):
        assert each.elementwise(table, copied, pieces).tolist() == [False, False]
        assert each.per_row(table, copied, slices, pieces).tolist() == [
            False,
            False,
        ]
        assert each.sum_of(table, formula, None, pieces).shape == (0, 1)
        assert each.sum_of(table, formula, slices, pieces).shape == (0, 1)
        assert each.histogram_of(table, formula, None, zero, zero, 4, False, groups, pieces).shape == (len(pieces), 1, 6)
