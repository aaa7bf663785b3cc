"""Formulas on the numpy and numba backends: both against NumPy applied to whole arrays, and against each other, bit for bit."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_cl.dtypes import type_of
from mergekit_cl.formula import Program, ranks, trace
from mergekit_cl.kernels import BLOCK, Formula, Slices, Table
from mergekit_cl.kernels import numba as backend
from mergekit_cl.kernels.numba import formulas, programs
from mergekit_cl.kernels.numpy import formulas as oracle
from mergekit_cl.windows import Window

Array = npt.NDArray[Any]
DTYPES = list(type_of)
SIZES = st.integers(0, 40) | st.sampled_from([63, 64, 65, 1023, 1024, 1025, 3000, BLOCK + 77])
LENGTHS = st.integers(1, 40) | st.sampled_from([255, 256, 1000, 1030, 2048])
SPECIALS = [0.0, -0.0, np.inf, -np.inf, np.nan]


@pytest.fixture(autouse=True, scope="module")
def _compile_everything() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formulas, "LEAST", 0)
        yield


def bits(array: Array) -> bytes:
    """Return the bytes of an array, all NaN alike."""
    array = np.array(array)
    array[np.isnan(array)] = np.nan
    return array.tobytes()


def maximum(one: Any, other: Any) -> Any:
    """Return the larger, NaN if there is one, 0 rather than -0."""
    both_zero = (one == 0) & (other == 0)
    zero = np.where(np.signbit(one) & np.signbit(other), -0.0, 0.0)
    return np.where(both_zero, zero, np.maximum(one, other)).astype(np.result_type(one, other))


def column(random: np.random.Generator, size: int, dtype: str, specials: bool) -> Array:
    """Return numbers of which many are equal, at any offset in memory, that are exact in every dtype."""
    offset = int(random.integers(0, 9))
    values = np.round(random.standard_normal(size) * 4) / 16 * random.choice([1, 1, 64], size)
    if specials:
        at = random.integers(0, max(size, 1), size // 30)
        values[at] = random.choice(SPECIALS, len(at))
    span = np.empty(size + offset, type_of[dtype])[offset:]
    span[:] = values
    return span


def extremes(random: np.random.Generator, span: Array) -> None:
    """Put the smallest and the largest numbers of its dtype into a column."""
    limits: Any = ml_dtypes.finfo(span.dtype)
    kinds = [limits.smallest_subnormal, limits.tiny, limits.max, 1 + limits.eps, -limits.max, -limits.smallest_subnormal]
    at = random.integers(0, max(len(span), 1), len(span) // 20)
    span[at] = random.choice(np.array(kinds, span.dtype), len(at))


def bound(program: Program, constants: Any, table: Table, compute: Any, uniforms: int = 0, numbers: Any = None) -> Formula:
    random = np.random.default_rng(5)
    rows = len(table.spans)
    keys = random.integers(0, 2**32, (rows, uniforms, 2)).astype(np.uint32)
    numbers = np.zeros((0, 0), compute) if numbers is None else numbers
    return Formula(program, np.tile(np.array(constants, compute), (rows, 1)), keys, numbers)


def both(function: str, table: Table, *rest: Any) -> Array:
    """Compute with both backends, compare, and return what they write."""
    kept = table.spans[0][0].copy(), [row[-1].copy() for row in table.spans]
    want = getattr(oracle, function)(table, *rest)
    written = [row[-1].copy() for row in table.spans]
    for row, before in zip(table.spans, kept[1], strict=True):
        row[-1][:] = before
    got = getattr(backend, function)(table, *rest)
    assert got.tolist() == want.tolist()
    for row, expected in zip(table.spans, written, strict=True):
        assert bits(row[-1]) == bits(expected)
    return np.asarray(want)


# Ranks --------------------------------------------------------------------------------------------------------------------


def definition(values: Array) -> Array:
    """Rank by comparing all pairs; NaN is greater than all and equal to NaN."""
    nan = np.isnan(values)
    less = (values[None] < values[:, None]) | (~nan[None] & nan[:, None])
    equal = (values[None] == values[:, None]) | (nan[None] & nan[:, None])
    if len(values) == 1:
        return np.full(1, 0.5, values.dtype)
    doubled = 2 * less.sum(1) + equal.sum(1) - 1
    shares: Array = (doubled / (2.0 * (len(values) - 1))).astype(values.dtype)
    return shares


VALUES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda r, n: r.standard_normal(n),
    "magnitudes": lambda r, n: np.abs(r.standard_normal(n)),
    "heavy tails": lambda r, n: r.standard_cauchy(n),
    "ties": lambda r, n: np.round(r.standard_normal(n) * 4),
    "ties and others": lambda r, n: np.where(r.random(n) < 0.9, np.round(r.standard_normal(n) * 4), r.standard_normal(n)),
    "crowded": lambda r, n: 1 + r.standard_normal(n) * 1e-5,
    "differ in the last bits": lambda r, n: 1 + np.round(r.standard_normal(n) * 40) * 2.0**-50,
    "far apart": lambda r, n: np.exp(r.standard_normal(n) * 15),
    "alike": lambda r, n: np.zeros(n) * r.choice([-1, 1], n),
    "specials": lambda r, n: np.where(r.random(n) < 0.3, r.choice(SPECIALS, n), r.standard_normal(n)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("compute", [np.float32, np.float64])
def test_ranks(name: str, compute: Any) -> None:
    random = np.random.default_rng(1)
    program = Program((("input", (0,)), ("ranks", (0,))), (1,))
    for length in [1, 2, 3, 24, 25, 26, 33, 500, 1023, 4100]:
        values = VALUES[name](random, 2 * length).astype(compute)
        table = Table([[values, np.empty_like(values)]])
        slices = Slices(np.array([length]), False)
        both("per_row", table, bound(program, (), table, np.dtype(compute)), slices, np.array([[0, 0, 2]]))
        if length < 600:
            for number in range(2):
                part = slice(number * length, (number + 1) * length)
                assert table.spans[0][1][part].tolist() == definition(values[part]).tolist()


@pytest.mark.parametrize("name", ["magnitudes", "ties", "crowded"])
@pytest.mark.parametrize("length", [32_767, 32_768, 200_001])
def test_ranks_of_long_rows(name: str, length: int) -> None:
    values = VALUES[name](np.random.default_rng(2), length).astype(np.float32)
    table = Table([[values, np.empty_like(values)]])
    program = Program((("input", (0,)), ("ranks", (0,))), (1,))
    slices = Slices(np.array([length]), False)
    both("per_row", table, bound(program, (), table, np.dtype(np.float32)), slices, np.array([[0, 0, 1]]))


def test_ranks_that_depend_on_ranks_and_sums() -> None:
    """Three stages, and operands of ranks that are the same for a whole slice."""

    def formula(x: Any, y: Any) -> Any:
        first = ranks(np.abs(x))
        second = ranks(first * y - np.max(first * y, axis=-1, keepdims=True))
        return second + np.mean(y, axis=-1, keepdims=True) * np.sum(second, axis=-1, keepdims=True)

    random = np.random.default_rng(3)
    x, y = (np.round(random.standard_normal(6 * 300) * 16).astype(np.float32) / 16 for _ in range(2))
    table = Table([[x, y, np.empty_like(x)]])
    traced = trace(formula, [0, 1])
    assert traced is not None
    how = bound(traced.program, traced.constants, table, np.dtype(np.float32))
    both("per_row", table, how, Slices(np.array([300]), False), np.array([[0, 0, 2], [0, 2, 6]]))
    expected = formula(x.reshape(6, 300), y.reshape(6, 300))
    np.testing.assert_allclose(table.spans[0][2].reshape(6, 300), expected, rtol=1e-6)


# Formulas drawn at random ------------------------------------------------------------------------------------------------

BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
          "copysign": np.copysign}  # fmt: skip
UNARY = {"neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "sign": np.sign, "square": np.square}
COMPARE = [np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal]
LOGIC = [np.logical_and, np.logical_or, np.logical_xor]
ALONG = {"max": np.max, "min": np.min}


@st.composite
def expressions(draw: st.DrawFn, leaves: int, along: bool) -> Callable[..., Any]:
    """Draw a formula of up to twelve steps, each of which takes values from those before it."""
    steps: list[tuple[Any, ...]] = []
    numbers, truths = leaves, 0
    kinds = ["binary", "unary", "constant", "compare", "logic", "where", "truth where", *(["along", "ranks"] * along)]
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(kinds))
        number, truth = st.integers(0, numbers - 1), st.integers(0, max(truths - 1, 0))
        if kind in ("logic", "where", "truth where") and not truths:
            kind = "compare"
        if kind == "binary":
            steps.append((kind, draw(st.sampled_from(sorted(BINARY))), draw(number), draw(number)))
        elif kind == "unary":
            steps.append((kind, draw(st.sampled_from(sorted(UNARY))), draw(number)))
        elif kind == "constant":
            steps.append((kind, draw(st.sampled_from([0.0, -0.0, 1.0, 0.1, -3.0, 1e-30, np.inf]))))
        elif kind == "compare":
            steps.append((kind, draw(st.sampled_from(COMPARE)), draw(number), draw(number)))
        elif kind == "logic":
            steps.append((kind, draw(st.sampled_from([*LOGIC, np.logical_not])), draw(truth), draw(truth)))
        elif kind in ("where", "truth where"):
            one = number if kind == "where" else truth
            steps.append((kind, draw(truth), draw(one), draw(one)))
        elif kind == "along":
            steps.append((kind, draw(st.sampled_from(sorted(ALONG))), draw(number)))
        else:
            steps.append((kind, draw(number)))
        truths += kind in ("compare", "logic", "truth where")
        numbers += kind not in ("compare", "logic", "truth where")

    def formula(*given: Any, larger: Any = np.maximum, compute: Any = float, like: Any = lambda x: x) -> Any:
        values, flags = list(given), []
        for kind, *how in steps:
            if kind == "binary":
                one, other = values[how[1]], values[how[2]]
                if how[0] == "max":
                    values.append(larger(one, other))
                elif how[0] == "min" and larger is maximum:
                    values.append(-larger(-one, -other))
                else:
                    values.append(BINARY[how[0]](one, other))
            elif kind == "unary":
                values.append(UNARY[how[0]](values[how[1]]))
            elif kind == "constant":
                values.append(np.where(values[0] == values[0], compute(how[0]), compute(how[0])))
            elif kind == "compare":
                flags.append(how[0](values[how[1]], values[how[2]]))
            elif kind == "logic":
                flags.append(how[0](*[flags[each] for each in how[1:]][: how[0].nin]))
            elif kind == "where":
                values.append(np.where(flags[how[0]], values[how[1]], values[how[2]]))
            elif kind == "truth where":
                flags.append(np.where(flags[how[0]], flags[how[1]], flags[how[2]]))
            elif kind == "along":
                values.append(ALONG[how[0]](like(values[how[1]]), axis=-1, keepdims=True) + 0 * values[0])
            else:
                values.append(ranks(like(values[how[0]])))
        return values[-1] if not flags else np.where(flags[-1], values[-1], values[0])

    return formula


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.booleans())
def test_random_formulas(data: st.DataObject, seed: int, streamed: bool) -> None:
    """Oracle, numba and NumPy itself agree on trees of all operations, mixed dtypes, any offset and size, in place too."""
    random = np.random.default_rng(seed)
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4))
    compute = np.dtype(np.float64 if "float64" in dtypes[:-1] or data.draw(st.booleans()) else np.float32)
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    formula = data.draw(expressions(len(dtypes) - 1, along=False))
    spans = [[column(random, size, dtype, True) for dtype in dtypes] for size in sizes]
    for span in spans[-1][:-1]:
        extremes(random, span)
    if dtypes[0] == dtypes[-1] and data.draw(st.booleans()):
        spans = [[*row[:-1], row[0]] for row in spans]
    table = Table(spans)
    traced = trace(partial(formula, compute=compute.type), list(range(len(dtypes) - 1)))
    assert traced is not None
    inputs = [[span.astype(compute) for span in row[:-1]] for row in table.spans]
    with np.errstate(all="ignore"):
        expected = [formula(*row, larger=maximum, compute=compute.type) for row in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formulas, "STREAMED", 0 if streamed else 1 << 40)
        flags = both("elementwise", table, bound(traced.program, traced.constants, table, compute), table.whole)
    for row, want, flag, given_ in zip(table.spans, expected, flags, inputs, strict=True):
        with np.errstate(all="ignore"):
            if dtypes[-1] == compute.name:
                assert bits(row[-1]) == bits(np.asarray(want, compute))
            finite = np.isfinite(row[-1].astype(np.float64)).all() and all(np.isfinite(each).all() for each in given_)
        assert flag == (not finite)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.booleans())
def test_random_formulas_of_rows(data: st.DataObject, seed: int, streamed: bool) -> None:
    random = np.random.default_rng(seed)
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4))
    compute = np.dtype(np.float64 if "float64" in dtypes[:-1] else np.float32)
    lengths = np.array(data.draw(st.lists(LENGTHS, min_size=1, max_size=3)), np.int64)
    counts = [data.draw(st.integers(1, 5)) for _ in lengths]
    drawn = data.draw(expressions(len(dtypes), along=True))

    def formula(*inputs: Any, rows: Any, **options: Any) -> Any:
        total = np.sum(inputs[-1], axis=-1, keepdims=True)
        return drawn(*inputs, rows[0] * inputs[0] + total, **options)

    spans = [[column(random, n * length, dtype, True) for dtype in dtypes] for n, length in zip(counts, lengths, strict=True)]
    table = Table(spans)
    numbers = (np.round(random.standard_normal((sum(counts), 1)) * 8) / 8).astype(compute)
    traced = trace(partial(formula, compute=compute.type), list(range(len(dtypes) - 1)), {"rows": 1})
    assert traced is not None
    first = np.cumsum([0, *counts])
    shapes = list(zip(counts, lengths.tolist(), strict=True))
    inputs = [[span.astype(compute).reshape(shape) for span in row[:-1]] for row, shape in zip(spans, shapes, strict=True)]
    with np.errstate(all="ignore"):
        expected = [
            formula(
                *row, rows=[numbers[at : at + n]], larger=maximum, compute=compute.type,
                like=partial(np.broadcast_to, shape=(n, length)),
            )
            for row, at, (n, length) in zip(inputs, first, shapes, strict=False)
        ]  # fmt: skip
    pieces = np.array([(row, start, start + 1) for row, n in enumerate(counts) for start in range(n)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formulas, "STREAMED", 0 if streamed else 1 << 40)
        bound_ = bound(traced.program, traced.constants, table, compute, numbers=numbers)
        both("per_row", table, bound_, Slices(lengths, False), pieces)
    for row, want, shape in zip(table.spans, expected, shapes, strict=True):
        if dtypes[-1] == compute.name:
            np.testing.assert_array_equal(row[-1].reshape(shape), np.broadcast_to(np.asarray(want, compute), shape))


# Random numbers -------------------------------------------------------------------------------------------------------------


def philox(index: int, key: list[int]) -> int:
    """Philox-4x32-10, with Python's integers."""
    words, (one, two) = [index // 4 % 2**32, index // 2**34, 0, 0], key
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [(b >> 32) ^ words[1] ^ one, b % 2**32, (a >> 32) ^ words[3] ^ two, a % 2**32]
        one, two = (one + 0x9E3779B9) % 2**32, (two + 0xBB67AE85) % 2**32
    return words[index % 4]


@pytest.mark.parametrize("compute", [np.float32, np.float64])
@pytest.mark.parametrize("length", [None, 7, 1201])
def test_uniform_numbers(compute: Any, length: int | None) -> None:
    """They depend on the key and an entry's index alone, wherever a piece or a slice begins."""
    size = 7 * 1201 * 2
    traced = trace(lambda x, uniform: uniform[1] + 0 * x, [0], {"uniform": 2})
    assert traced is not None
    table = Table([[np.zeros(size, compute), np.zeros(size, compute)]])
    how = bound(traced.program, traced.constants, table, np.dtype(compute), uniforms=2)
    if length is None:
        both("elementwise", table, how, np.array([[0, 0, 1024], [0, 1024, size]]))
    else:
        both("per_row", table, how, Slices(np.array([length]), False), np.array([[0, 0, 3], [0, 3, size // length]]))
    out = table.spans[0][1]
    for index in [0, 1, 2, 3, 4, 1023, 1024, 1025, 7000, size - 1]:
        assert out[index] == (philox(index, how.keys[0, 1].tolist()) >> 8) * 2.0**-24


# Surveys ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float64", "float16")])
@pytest.mark.parametrize("length", [None, 1, 37, 5000])
def test_sums(dtypes: tuple[str, ...], length: int | None) -> None:
    """Sums of two outputs over blocks and slices, near float64 and the same however the work is cut."""
    compute = np.dtype(dtypes[0])
    random = np.random.default_rng(4)
    size = 2 * BLOCK + 5000 if length is None else 5000 * 37
    spans = [[random.standard_normal(each).astype(type_of[d]) for d in dtypes] for each in (size, 37 * 5000)]
    table = Table(spans)
    traced = trace(lambda x, y: [x * y, np.where(x > y, 1.0, 0.0)], [0, 1])
    assert traced is not None
    how = bound(traced.program, traced.constants, table, compute)
    if length is None:
        slices, unit = None, BLOCK
        cut = np.array([[1, 0, 37 * 5000], [0, 0, BLOCK], [0, BLOCK, size]])
    else:
        slices, unit = Slices(np.array([length, length]), False), length
        counts = slices.counts(table)
        cut = np.array([[1, 0, counts[1]], [0, 0, 1], [0, 1, counts[0]]])
    sums = backend.sum_of(table, how, slices, cut)
    products = [[x.astype(compute) * y.astype(compute), x.astype(compute) > y.astype(compute)] for x, y in spans]
    expected = [
        [part[start : start + unit].sum(dtype=np.float64) for part in products[row]]
        for row in (1, 0)
        for start in range(0, len(spans[row][0]), unit)
    ]
    scale = np.sqrt(unit)
    np.testing.assert_allclose(sums, expected, rtol=1e-13, atol=1e-13 * scale)
    np.testing.assert_allclose(oracle.sum_of(table, how, slices, cut), expected, rtol=1e-13, atol=1e-13 * scale)
    assert (sums[:, 1] == np.array(expected)[:, 1]).all()
    one_by_one = [backend.sum_of(table, how, slices, piece[None]) for piece in cut]
    assert np.concatenate(one_by_one).tobytes() == sums.tobytes()


def test_sums_after_ranks() -> None:
    table = Table([[np.arange(12, dtype=np.float32)]])
    traced = trace(lambda x: [ranks(x), x - np.mean(x, axis=-1, keepdims=True), 0 * x + 2], [0])
    assert traced is not None
    how = bound(traced.program, traced.constants, table, np.dtype(np.float32))
    sums = backend.sum_of(table, how, Slices(np.array([3]), False), np.array([[0, 0, 4]]))
    assert sums.tolist() == [[1.5, 0, 6]] * 4


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_histograms(wide: bool, by_row: bool, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dtypes = data.draw(st.sampled_from([("float32", "bfloat16"), ("float16", "float64"), ("bfloat16", "bfloat16")]))
    compute = np.dtype(np.float64 if "float64" in dtypes else np.float32)
    bits_ = 63 if wide or compute == np.float64 else 31
    length = 77
    spans = [[column(random, size * length, dtype, True) for dtype in dtypes] for size in (1, 40, 13)]
    extremes(random, spans[1][0])
    table = Table(spans)
    extra = (lambda x: np.max(x, axis=-1, keepdims=True)) if by_row else (lambda x: 0.25)
    traced = trace(lambda x, y: (x - y) * extra(x), [0, 1])
    assert traced is not None
    how = bound(traced.program, traced.constants, table, compute)
    windows = data.draw(st.sampled_from([1, 3, 8]))
    bins = data.draw(st.sampled_from([1, 1000, 4096, 65536]))
    one = {31: 0x3F800000, 63: 0x3FF0000000000000}[bits_]
    starts = [0, one // 2, one, one + one // 16, 2**bits_ - 1]
    low = np.array([[data.draw(st.sampled_from(starts)) for _ in range(windows)] for _ in spans], np.int64)
    shift = np.array([[data.draw(st.integers(0, bits_)) for _ in range(windows)] for _ in spans], np.int64)
    slices = Slices(np.full(3, length), False) if by_row else None
    pieces = np.array([[2, 0, 13], [0, 0, 1], [1, 0, 40]]) * (1 if by_row else np.array([1, length, length]))
    groups = np.array([1, 0, 1])
    got = backend.histogram_of(table, how, slices, low, shift, bins, wide, groups, pieces)
    want = oracle.histogram_of(table, how, slices, low, shift, bins, wide, groups, pieces)
    assert (got == want).all()


def test_a_histogram_by_hand() -> None:
    table = Table([[np.array([0, 1, -1, 1.5, 2, np.inf, np.nan, 3.9], np.float32)]])
    program = Program((("input", (0,)), ("neg", (0,))), (1,))
    how = bound(program, (), table, np.dtype(np.float32))
    low, shift = np.array([[0x3F800000]]), np.array([[22]])  # half octaves from 1 on
    counts = backend.histogram_of(table, how, None, low, shift, 4, False, np.array([0]), table.whole)
    assert counts.tolist() == [[[2, 1, 1, 1, 2, 2]]]


# Everything else ------------------------------------------------------------------------------------------------------------


def test_small_tables_and_logarithms_are_left_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the same bits; code that is there is used for small tables too."""
    monkeypatch.setattr(formulas, "LEAST", 100)
    compiled: list[Program] = []
    code = programs.compiled

    def counted(program: Program, *rest: Any) -> programs.Code:
        compiled.append(program)
        return code(program, *rest)

    monkeypatch.setattr(programs, "compiled", counted)

    def run(formula: Any, size: int) -> Array:
        table = Table([[np.arange(size, dtype=np.float32), np.zeros(size, np.float32)]])
        traced = trace(formula, [0])
        assert traced is not None
        how = bound(traced.program, traced.constants, table, np.dtype(np.float32))
        assert backend.elementwise(table, how, table.whole).tolist() == [False]
        return np.asarray(table.spans[0][1])

    assert run(lambda x: np.log(x + 1), 200).tolist() == np.log(np.arange(1, 201, dtype=np.float32)).tolist()
    assert run(lambda x: np.negative(x) / 7, 99)[7] == -1
    assert not compiled
    assert run(lambda x: np.negative(x) / 7, 100)[7] == -1
    assert len(compiled) == 1


def test_functions_that_have_no_program() -> None:
    table = Table([[np.array([3, 1, 2], np.float32), np.zeros(3, np.float32)]])
    how = Formula(
        None, np.zeros((1, 0), np.float32), np.zeros((1, 0, 2), np.uint32), np.zeros((0, 0), np.float32),
        [lambda inputs, uniform, numbers: [np.sort(inputs[0])]],
    )  # fmt: skip
    assert backend.elementwise(table, how, table.whole).tolist() == [False]
    assert table.spans[0][1].tolist() == [1, 2, 3]


def test_threads_compute_the_same() -> None:
    """Many threads that need a new formula's code at the same time, each for a piece."""
    random = np.random.default_rng(6)
    spans = [random.standard_normal(40 * 512).astype(np.float32) for _ in range(3)]
    traced = trace(lambda x, y: np.multiply(np.where(ranks(x) > 0.3, x, y), 0.7) - np.min(y, axis=-1, keepdims=True), [0, 1])
    assert traced is not None
    table = Table([spans])
    how = bound(traced.program, traced.constants, table, np.dtype(np.float32))
    slices = Slices(np.array([512]), False)
    oracle.per_row(table, how, slices, np.array([[0, 0, 40]]))
    want = spans[2].copy()
    spans[2][:] = 0
    with ThreadPoolExecutor(8) as pool:
        pieces = [np.array([[0, start, start + 2]]) for start in range(0, 40, 2)]
        assert not any(flags.any() for flags in pool.map(partial(backend.per_row, table, how, slices), pieces))
    assert spans[2].tobytes() == want.tobytes()


@pytest.mark.parametrize("compute", [np.float32, np.float64])
def test_extremes_by_hand(compute: Any) -> None:
    """NaN wins, and 0 is larger than -0, whichever comes first; along a row too."""
    x = np.array([0.0, -0.0, 0.0, -0.0, np.nan, 1, 2, -np.inf] * 9, compute)
    y = np.array([0.0, -0.0, -0.0, 0.0, 1, np.nan, -3, -0.0] * 9, compute)
    for function, expected in (
        (np.maximum, [0.0, -0.0, 0.0, 0.0, np.nan, np.nan, 2, -0.0]),
        (np.minimum, [0.0, -0.0, -0.0, -0.0, np.nan, np.nan, -3, -np.inf]),
    ):
        table = Table([[x, y, np.empty_like(x)]])
        traced = trace(function, [0, 1])
        assert traced is not None
        how = bound(traced.program, traced.constants, table, np.dtype(compute))
        both("elementwise", table, how, table.whole)
        assert bits(table.spans[0][2]) == bits(np.array(expected * 9, compute))
    for zeros, signs in (([0.0, -0.0] * 40, [1, -1]), ([-0.0] * 80, [-1, -1]), ([0.0] * 80, [1, 1])):
        table = Table([[np.array(zeros, compute), np.empty(80, compute)]])
        for along, sign in zip((np.max, np.min), signs, strict=True):
            traced = trace(lambda x, along=along: np.copysign(1.0, along(x, axis=-1, keepdims=True)), [0])
            assert traced is not None
            how = bound(traced.program, traced.constants, table, np.dtype(compute))
            both("per_row", table, how, Slices(np.array([40]), False), np.array([[0, 0, 2]]))
            assert (table.spans[0][1] == sign).all()


def test_results_are_rounded_once() -> None:
    """Also from float64: slightly above the middle of two neighbours is up, not to even by way of float32."""
    for dtype, step in (("bfloat16", 2.0**-7), ("float16", 2.0**-10)):
        x = np.array([1 + step / 2 + 2.0**-40, 1 + step / 2, 1 + step / 2 - 2.0**-40, -1 - 3 * step / 2 + 2.0**-40] * 5)
        table = Table([[x, np.zeros(20, type_of[dtype])]])
        program = Program((("input", (0,)), ("neg", (0,)), ("neg", (1,))), (2,))
        backend.elementwise(table, bound(program, (), table, np.dtype(np.float64)), table.whole)
        assert table.spans[0][1].astype(np.float64).tolist() == [1 + step, 1, 1, -1 - step] * 5


def test_windows_of_files() -> None:
    """A table of which only the pieces at hand are in memory."""
    first, last = 2 * BLOCK, 2 * BLOCK + 100
    parts = [np.arange(100, dtype=np.float32), np.zeros(100, np.float32)]
    windows = [Window(part, first, 3 * BLOCK) for part in parts]
    rows: list[Any] = [(), windows]
    table = Table(rows)
    lengths, addresses = np.array([7, 3 * BLOCK]), np.array([[0, 0], [window.data_ptr() for window in windows]])
    table.__dict__.update(dtypes=("float32", "float32"), lengths=lengths, addresses=addresses)
    program = Program((("input", (0,)), ("mul", (0, 0)), ("uniform", (0,)), ("add", (1, 2))), (3,))
    how = bound(program, (), table, np.dtype(np.float32), uniforms=1)
    pieces = np.array([[1, first, last]])
    assert backend.elementwise(table, how, pieces).tolist() == [False, False]
    written = parts[1].copy()
    assert written[3] == np.float32(9) + np.float32((philox(first + 3, how.keys[1, 0].tolist()) >> 8) * 2.0**-24)
    oracle.elementwise(table, how, pieces)
    assert parts[1].tobytes() == written.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_noticed(dtype: str) -> None:
    """In an input that the result does not show, in a result, and not in a neighbouring tensor."""
    ones = np.ones(100, type_of[dtype])
    bad = ones.copy()
    bad[99] = np.nan
    most = np.full_like(ones, ml_dtypes.finfo(type_of[dtype]).max)
    table = Table(
        [
            [ones, ones, ones.copy()],
            [bad, ones, ones.copy()],
            [ones, bad, ones.copy()],
            [most, ones, ones.copy()],
        ]
    )
    compute = np.dtype(np.float64 if dtype == "float64" else np.float32)
    first = trace(lambda x, y: np.where(x > 0, 2.0, 2.0), [0, 1])
    second = trace(lambda x, y: x + x, [0, 1])
    assert first is not None
    assert second is not None
    assert both("elementwise", table, bound(first.program, first.constants, table, compute), table.whole).tolist() == [
        False, True, True, False,
    ]  # fmt: skip
    assert both("elementwise", table, bound(second.program, (), table, compute), table.whole).tolist() == [
        False, True, True, True,
    ]  # fmt: skip
