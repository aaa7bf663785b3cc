"""The Triton backend, compiled where there is a GPU and interpreted elsewhere: the same bits as the NumPy backend."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch
import triton
import triton.language as tl

from mergekit_cl.dtypes import compute_dtype, type_of
from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import BLOCK, Array, Keep, Slices, Table, TaskVectors, interpreted
from mergekit_cl.kernels import numpy as oracle
from mergekit_cl.kernels import triton as backend
from mergekit_cl.kernels.triton import task_vectors
from mergekit_cl.windows import Window

TILE = 2048
DTYPES = tuple(type_of)
GUARD = 9
"""Elements in front of and behind each span that nothing may touch."""

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = pytest.mark.gpu


def examples(count: int) -> settings:
    """Draw so many examples where the profile has 50, and more or fewer where it has."""
    default = settings.default
    assert default is not None
    return settings(max_examples=count * default.max_examples // 50, deadline=None)


def specials(dtype: str) -> Array:
    """Signed zeros, subnormals, the limits, and a few ordinary values of a dtype."""
    limits: Any = ml_dtypes.finfo(type_of[dtype])
    small, tiny, largest = limits.smallest_subnormal, limits.tiny, limits.max
    positive = [0, small, small * 3, tiny - small, tiny, limits.eps, 1, 1 + limits.eps, 3.140625, largest, np.inf]
    values = np.array(positive, type_of[dtype])
    return np.concatenate([values, -values, np.array([np.nan], values.dtype)])


@dataclass
class Case:
    """A table over guarded buffers, its weights and pieces."""

    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    about: bool
    out_is: int | None
    pieces: Array
    seed: int

    def open(self) -> tuple[list[list[Array]], Table, Array]:
        """Make the buffers, anew and the same at each call, the table over them, and its weights. All else is NaN."""
        random = np.random.default_rng(self.seed)
        buffers, rows = [], []
        for size, offsets in zip(self.sizes, self.offsets, strict=True):
            base = random.standard_normal(GUARD * 2 + 16 + size)
            columns = [self._column(random, base, dtype) for dtype in self.dtypes]
            starts = [GUARD + offset for offset in offsets]
            if self.out_is is not None:
                columns[-1], starts[-1] = columns[self.out_is], starts[self.out_is]
            else:
                columns[-1][:] = np.nan
            buffers.append(columns)
            rows.append([column[start : start + size] for column, start in zip(columns, starts, strict=True)])
            for column, start in zip(columns, starts, strict=True):
                column[:start] = column[start + size :] = np.nan
        table = Table(rows)
        weights = random.choice([1, -1, 0.5, -0.3, 1e-3, 1 / 3, 7.25], (len(rows), len(self.dtypes) - 1 - self.about))
        return buffers, table, weights.astype(table.compute)

    @staticmethod
    def _column(random: np.random.Generator, base: Array, dtype: str) -> Array:
        # Models that are merged are close: half of the entries agree where the dtype does
        values = np.where(random.random(len(base)) < 0.5, base, base + 1e-2 * random.standard_normal(len(base)))
        column = values.astype(type_of[dtype])
        at = random.integers(0, len(base), len(base) // 50)
        column[at] = random.choice(specials(dtype), len(at))
        return column

    @property
    def compute(self) -> np.dtype[Any]:
        """The type that inputs in front of an output are computed in."""
        return compute_dtype(self.dtypes[:-1])


@st.composite
def cases(draw: st.DrawFn, writes: bool = True, based: bool = False) -> Case:
    """Draw what to work on; ``based`` on a base, in pieces that start at multiples of `BLOCK`, which few rows reach."""
    about = based or draw(st.booleans())
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1 + about + writes, max_size=4).map(tuple))
    size = st.one_of(st.integers(0, 40), st.sampled_from([TILE - 1, TILE, TILE + 1]), st.integers(0, 3 * TILE))
    sizes = draw(st.lists(size, min_size=1, max_size=3).map(tuple))
    if based and not draw(st.integers(0, 9)):
        sizes = (draw(st.integers(BLOCK - 9, BLOCK + 9)), *sizes[1:])
    offset = draw(st.sampled_from([st.just(7), st.integers(0, 15)]))  # 16 + 7 elements are aligned in every dtype
    offsets = tuple(draw(st.tuples(*[offset] * len(dtypes))) for _ in sizes)
    same = [column for column in range(len(dtypes) - 1) if dtypes[column] == dtypes[-1]]
    pieces = []
    for row, size_ in enumerate(sizes):
        cuts = sorted(draw(st.lists(st.integers(0, size_), max_size=3)))
        if based:
            cuts = [BLOCK] if size_ > BLOCK and draw(st.booleans()) else []
        bounds = [0, *cuts, size_]
        pieces += [(row, *piece) for piece in pairwise(bounds) if draw(st.integers(0, 4))]
    return Case(
        dtypes, sizes, offsets, about,
        draw(st.none() | st.sampled_from(same)) if writes and same else None,
        np.array(draw(st.permutations(pieces)), np.int64).reshape(-1, 3),
        draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def assert_same_bits(found: Array, expected: Array) -> None:
    """Assert equality bit for bit, but for the payloads of NaN."""
    assert found.dtype == expected.dtype
    with np.errstate(invalid="ignore"):  # of signalling NaN in ml_dtypes
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), nan)
    assert found[~nan].tobytes() == expected[~nan].tobytes()


def nonfinite(table: Table, pieces: Array) -> npt.NDArray[np.bool_]:
    """Tell in which rows a result is not finite."""
    flags = np.zeros(len(table.spans), bool)
    for row, start, stop in pieces:
        flags[row] |= not np.isfinite(table.spans[row][-1][start:stop]).all()
    return flags


def merged(module: Any, rows: list[list[Array]], weights: Any, about: bool) -> tuple[list[Array], list[bool]]:
    """Return the outputs of whole rows, the last column of each, and the flags."""
    table = Table([[*row[:-1], np.full_like(row[-1], 77)] for row in rows])
    nonfinite = module.weighted_sum(table, np.array(weights, table.compute), about, table.whole)
    return [row[-1] for row in table.spans], nonfinite.tolist()


@examples(100)
@given(case=cases())
def test_weighted_sum(kernels: Any, case: Case) -> None:
    expected, table, weights = case.open()
    flags = oracle.weighted_sum(table, weights, case.about, case.pieces)
    found, table, weights = case.open()
    np.testing.assert_array_equal(kernels.weighted_sum(table, weights, case.about, case.pieces), flags)
    for row, expected_row in zip(found, expected, strict=True):
        for column, expected_column in zip(row, expected_row, strict=True):
            assert_same_bits(column, expected_column)  # the guards, the inputs and what is in no piece too


@examples(30)
@given(case=cases(writes=False))
def test_largest_magnitude(kernels: Any, case: Case) -> None:
    _, table, _ = case.open()
    found = kernels.largest_magnitude(table, case.pieces)
    assert_same_bits(found, oracle.largest_magnitude(table, case.pieces))


@pytest.mark.parametrize("about", [True, False])
@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_special_values(kernels: Any, dtype: str, output: str, about: bool) -> None:
    left, right = (side.ravel() for side in np.meshgrid(specials(dtype), specials(dtype)))
    weights = [[1.0], [-1.0], [0.3], [-1e-30]] if about else [[1, 1], [1, -1], [0.3, 0.7], [-1e-30, 1e-30]]
    rows = [[left, right, np.zeros(len(left), type_of[output])] for _ in weights]
    found, flags = merged(kernels, rows, weights, about)
    expected, expected_flags = merged(oracle, rows, weights, about)
    assert flags == expected_flags
    for row, expected_row in zip(found, expected, strict=True):
        assert_same_bits(row, expected_row)


@pytest.mark.parametrize("about", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_value_comes_back(kernels: Any, dtype: str, about: bool) -> None:
    values = np.arange(1 << 16).astype(np.uint16).view(type_of[dtype])
    row = [values] * (3 if about else 2)
    (found,), flags = merged(kernels, [row], [[-0.5 if about else 1.0]], about)
    assert_same_bits(found, values)
    assert flags == [True]
    (found,), flags = merged(kernels, [[column[:100] for column in row]], [[-0.5 if about else 1.0]], about)
    assert_same_bits(found, values[:100])
    assert flags == [False]


@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_once_to_nearest_even(kernels: Any, dtype: str, wide: str) -> None:
    values = np.arange((1 << 16) - 1).astype(np.uint16)
    with np.errstate(all="ignore"):
        low, high = (part.view(type_of[dtype]).astype(np.float64) for part in (values, values + np.uint16(1)))
        middle = ((low + high) / 2).astype(wide)
        near = np.concatenate([np.nextafter(middle, middle.dtype.type(side)) for side in (-np.inf, np.inf)])
    near, middle = near[np.isfinite(near)], middle[np.isfinite(middle)]
    column = np.concatenate([middle, near])
    (found,), _ = merged(kernels, [[column, np.zeros(len(column), type_of[dtype])]], [[1.0]], about=False)
    (expected,), _ = merged(oracle, [[column, np.zeros(len(column), type_of[dtype])]], [[1.0]], about=False)
    assert_same_bits(found, expected)
    ties = found[: len(middle)].view(np.uint16)
    exact = found[: len(middle)].astype(np.float64) == middle
    assert not (ties[~exact] & 1).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_of_any_payload_stays_nan(kernels: Any, dtype: str) -> None:
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000], np.uint32).view(np.float32)  # a GPU makes the first
    (found,), flags = merged(kernels, [[values, np.zeros(4, type_of[dtype])]], [[1.0]], about=False)
    assert np.isnan(found).all()
    assert flags == [True]


def test_numbers_by_hand(kernels: Any) -> None:
    earlier, now = np.array([[1, 2, -0.0], [3, 2, -0.0]], np.float32)
    (out,), flags = merged(kernels, [[now, earlier, now]], [[0.25]], about=True)
    assert_same_bits(out, np.array([2.5, 2, -0.0], np.float32))
    (out,), _ = merged(kernels, [[now, earlier, now]], [[2.0, -1.0]], about=False)
    assert_same_bits(out, np.array([5, 2, 0], np.float32))
    assert flags == [False]


def test_overflow_of_the_output_is_flagged_in_its_row(kernels: Any) -> None:
    inputs = np.repeat(np.array([[65519], [65520], [1]], np.float32), 3 * TILE, axis=1)
    inputs[2, -1] = np.nan
    rows: list[list[Array]] = [[span, np.zeros(3 * TILE, np.float16)] for span in inputs]
    out, flags = merged(kernels, rows, [[1.0]] * 3, about=False)
    assert flags == [False, True, True]
    assert (out[0] == 65504).all()


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 3, ("float32", "float16"), ("float64", "bfloat16", "float32")])
@pytest.mark.parametrize("about", [True, False])
def test_gram(kernels: Any, dtypes: tuple[str, ...], about: bool) -> None:
    random = np.random.default_rng(3)
    sizes = [BLOCK + 3000, 700]
    pieces = np.array([[1, 0, 700], [0, 0, BLOCK + 3000]], np.int64)
    whole = Table([[random.integers(-8, 9, size).astype(type_of[dtype]) for dtype in dtypes] for size in sizes])
    # Sums of small integers are exact, in whatever order
    found = kernels.gram(whole, about, pieces)
    assert len(found) == 3
    np.testing.assert_array_equal(found, oracle.gram(whole, about, pieces))
    lengths = [9000, 10]
    reals = Table([[random.standard_normal(size).astype(type_of[dtype])[1:] for dtype in dtypes] for size in lengths])
    found, expected = (module.gram(reals, about, reals.whole) for module in (kernels, oracle))
    scale = np.sqrt(expected.diagonal(axis1=1, axis2=2))
    assert (np.abs(found - expected) <= 1e-13 * scale[:, :, None] * scale[:, None, :]).all()
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


@pytest.mark.parametrize("about", [True, False])
@pytest.mark.parametrize("columns", [9, 17])
def test_gram_of_more_columns_than_a_thread_has_sums_for(kernels: Any, columns: int, about: bool) -> None:
    random = np.random.default_rng(columns)
    table = Table([[random.integers(-8, 9, size).astype(type_of["bfloat16"]) for _ in range(columns)] for size in (300, 0, 9)])
    np.testing.assert_array_equal(kernels.gram(table, about, table.whole), oracle.gram(table, about, table.whole))


def far(random: np.random.Generator, dtypes: Sequence[str], first: int, count: int) -> tuple[Table, Table]:
    """Make rows of windows, the same twice, whose tensors would begin so many elements earlier: for NumPy, and the kernels."""
    arrays = [random.standard_normal(count).astype(type_of[dtype]) for dtype in dtypes]
    spans: list[list[Any]] = [[Window(array.copy(), first, first + count) for array in arrays] for _ in range(2)]
    if not interpreted():
        on_device = [
            torch.from_numpy(array.view(np.uint8)).to(DEVICE).view(getattr(torch, array.dtype.name)) for array in arrays
        ]
        spans[1] = [Window(tensor, first, first + count) for tensor in on_device]
    return Table([spans[0]]), Table([spans[1]])


def of_window(span: Window) -> Array:
    array: Any = span.array
    if not interpreted():
        array = array.view(torch.uint8).cpu().numpy().view(type_of[str(array.dtype).partition(".")[2]])
    return cast(Array, array)


@pytest.mark.parametrize("first", [(1 << 31) - BLOCK, 1 << 34, 5 << 40])
def test_offsets_have_64_bits(first: int) -> None:
    # What lies so far behind the beginning of a tensor is there, and has the hashes of its place
    random, pieces = np.random.default_rng(1), np.array([[0, first, first + 100]])
    expected, found = far(random, ("bfloat16", "float32", "float32"), first, 100)
    for module, table in ((oracle, expected), (backend, found)):
        module.weighted_sum(table, np.array([[0.3]], np.float32), True, pieces)
    assert_same_bits(of_window(found.spans[0][-1]), expected.spans[0][-1].array)
    np.testing.assert_array_equal(backend.largest_magnitude(found, pieces), oracle.largest_magnitude(expected, pieces))
    expected, found = far(random, ("float32", "bfloat16", "float64", "float32"), first, 100)
    one = np.ones((1, 2))
    half = Keep("random", np.full((1, 2, 2), 7, np.uint32), np.full((1, 2, 2), 1 << 31), np.zeros((1, 2, 2), np.int64))
    for module, table in ((oracle, expected), (backend, found)):
        module.task_vector_merge(table, TaskVectors(half, None, "sum", one, one, one, one[0]), pieces)
    assert_same_bits(of_window(found.spans[0][-1]), expected.spans[0][-1].array)
    changed = expected.spans[0][-1].array != expected.spans[0][0].array
    assert 0.3 < changed.mean() < 0.7


@pytest.mark.skipif(interpreted(), reason="needs a GPU with 16 GiB of memory that is free")
def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    count = (1 << 31) + 5
    x, y = (torch.empty(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    numbers = torch.arange(251, dtype=torch.bfloat16, device=DEVICE)  # exact, and two more of them too
    for start in range(0, count, 251 << 20):
        part = slice(start, min(start + (251 << 20), count))
        x[part] = numbers.repeat(1 << 20)[: part.stop - start]
        y[part] = x[part] + 2
    table = Table([[x, y, y]])
    assert backend.weighted_sum(table, np.array([[0.5]], np.float32), True, table.whole).tolist() == [False]
    for start in range(0, count, 1 << 28):
        assert torch.equal(y[start : start + (1 << 28)], x[start : start + (1 << 28)] + 1)
    last = float(x[-1])
    assert backend.largest_magnitude(table, np.array([[0, count - 1, count]])).tolist() == [[last, last + 1, last + 1]]


@pytest.mark.parametrize("pieces", [np.zeros((0, 3), np.int64), np.array([[0, 2, 2], [1, 0, 0]])])
def test_nothing_to_do(kernels: Any, pieces: Array) -> None:
    table = Table([[np.ones(3, np.float32)] * 2, [np.ones(0, np.float32)] * 2])
    assert kernels.weighted_sum(table, np.ones((2, 1), np.float32), False, pieces).tolist() == [False, False]
    assert kernels.largest_magnitude(table, pieces).tolist() == [[0, 0], [0, 0]]
    assert kernels.gram(table, False, pieces).shape == (0, 2, 2)


@pytest.fixture
def _restless_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.skipif(not interpreted(), reason="about Triton's interpreter, which has one state for all threads")
@pytest.mark.usefixtures("_restless_threads")
def test_threads_may_share_a_table() -> None:
    random = np.random.default_rng(1)
    rows = [[random.standard_normal(4 * TILE).astype(np.float32) for _ in range(3)] for _ in range(8)]
    expected, _ = merged(oracle, rows, [[0.5]] * 8, about=True)
    table, weights = Table(rows), np.full((8, 1), 0.5, np.float32)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(backend.weighted_sum, table, weights, True, piece[None]) for piece in table.whole]
    assert not any(future.result().any() for future in done)
    for row, expected_row in zip(rows, expected, strict=True):
        assert_same_bits(row[-1], expected_row)


def test_refuses_tensors_that_the_kernels_cannot_reach() -> None:
    here, there = ("the CPU", "cuda:0") if interpreted() else ("a GPU", "cpu")
    table = Table([[SimpleNamespace(device=there, dtype="float32")]])
    with pytest.raises(BackendError, match=f"loaded to work on {here}, but the tensors are on {there}"):
        backend.largest_magnitude(table, np.zeros((0, 3), np.int64))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _philox_kernel(found_ptr: Any, counter_ptr: Any, key: Any) -> None:
    c0, c1, c2, c3 = tl.load(counter_ptr), tl.load(counter_ptr + 1), tl.load(counter_ptr + 2), tl.load(counter_ptr + 3)
    a, b, c, d = tl.philox(key, c0, c1, c2, c3)
    tl.store(found_ptr, a)
    tl.store(found_ptr + 1, b)
    tl.store(found_ptr + 2, c)
    tl.store(found_ptr + 3, d)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _hash_kernel(found_ptr: Any, start_ptr: Any, key_ptr: Any, BLOCK: tl.constexpr) -> None:  # noqa: N803
    hashes = task_vectors._hash(tl.load(start_ptr), tl.load(key_ptr), BLOCK)
    tl.store(found_ptr + tl.arange(0, BLOCK), hashes)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_known_answers(counter: str, key: str, words: str) -> None:
    counter_, low_high, expected = (np.array([int(word, 16) for word in text.split()]) for text in (counter, key, words))
    found = torch.zeros(4, dtype=torch.uint32, device=DEVICE)
    given_ = torch.tensor(counter_.astype(np.uint32), device=DEVICE)
    with np.errstate(all="ignore"):
        _philox_kernel[(1,)](found, given_, low_high.astype(np.uint32).view(np.int64).item())
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("start", [0, 1 << 11, 0xFFFFF << 14, 1 << 34, 5 << 40])
def test_hashes(start: int) -> None:
    key = np.array([0x9E3779B9, 0xFEDCBA98], np.uint32)
    found = torch.zeros(TILE, dtype=torch.uint32, device=DEVICE)
    with np.errstate(all="ignore"):
        _hash_kernel[(1,)](
            found, torch.tensor([start], device=DEVICE), torch.tensor(key.view(np.int64), device=DEVICE), BLOCK=TILE
        )
    counters = np.arange(start // 4, (start + TILE) // 4, dtype=np.uint64)
    words = oracle.philox(counters, *key.astype(np.uint64))
    np.testing.assert_array_equal(found.cpu().numpy(), np.stack(words, axis=1).ravel())


def patterns(table: Table, models: int, wide: bool = False) -> list[Array]:
    """Return the patterns of the task vectors of each row, int64 [K, elements]: an implementation for these tests."""
    compute = compute_dtype(table.dtypes[: models + 1])
    found = []
    for row in table.spans:
        base, *others = (span.astype(compute) for span in row[: models + 1])
        with np.errstate(all="ignore"):
            magnitudes = np.abs([np.where(other == base, 0, other - base) for other in others])
        magnitudes = np.where(np.isnan(magnitudes), np.inf, magnitudes).astype("float64" if wide else compute)
        found.append(magnitudes.view(f"i{magnitudes.itemsize}").astype(np.int64))
    return found


def drawn_keep(kind: Any, table: Table, models: int, seed: int) -> Keep:
    """Draw what to keep: cuts that entries are equal to, and thresholds of all kinds."""
    random = np.random.default_rng(seed)
    highest = 2 ** (63 if "float64" in table.dtypes[: models + 1] else 31) - 1
    cuts = np.array([
        [random.choice(np.append(of_model, [-1, 0, 0, highest]), 2) for of_model in of_row]
        for of_row in patterns(table, models)
    ])  # fmt: skip
    if random.integers(0, 3):
        cuts.sort(axis=2)  # else most windows would be empty
    shape = (len(table.spans), models, 2)
    thresholds = random.choice([0, 1, 1 << 30, 3 << 30, (1 << 32) - 1, 1 << 32], shape)
    return Keep(kind, random.integers(0, 1 << 32, shape).astype(np.uint32), thresholds, cuts)


EVERYTHING = Keep("all", np.zeros((2, 3, 2), np.uint32), np.zeros((2, 3, 2), np.int64), np.zeros((2, 3, 2), np.int64))
KEEPS = ("all", "random", "magnitude")
ELECTS = (None, "weighted", "unweighted")
COMBINES = ("sum", "weight_mean", "count_mean", "max")


def drawn_task_vectors(kinds: tuple[Any, Any, Any], table: Table, compute: np.dtype[Any], seed: int) -> TaskVectors:
    random = np.random.default_rng(seed)
    keep, elect, combine = kinds
    rows, models = len(table.spans), len(table.dtypes) - 2
    scales, votes, shares = random.choice([1, -1, 0.5, -0.3, 0, 1 / 3, 7.25], (3, rows, models)).astype(compute)
    factors = random.choice([1, 0.3, -2, 0], rows, p=[0.4, 0.3, 0.2, 0.1]).astype(compute)
    return TaskVectors(drawn_keep(keep, table, models, seed), elect, combine, scales, votes, shares, factors)


@examples(100)
@given(
    case=cases(based=True).filter(lambda case: len(case.dtypes) > 2),
    kinds=st.tuples(*map(st.sampled_from, (KEEPS, ELECTS, COMBINES))),
)
def test_task_vector_merge(kernels: Any, case: Case, kinds: tuple[Any, Any, Any]) -> None:
    expected, table, _ = case.open()
    how = drawn_task_vectors(kinds, table, case.compute, case.seed)
    infinity = np.array(np.inf, case.compute).view(f"i{case.compute.itemsize}")
    overflows = [(each == infinity).any(axis=0) for each in patterns(table, len(case.dtypes) - 2)]
    oracle.task_vector_merge(table, how, case.pieces)
    flags = nonfinite(table, case.pieces)
    for row, start, stop in case.pieces:
        flags[row] |= overflows[row][start:stop].any()
    found, table, _ = case.open()
    np.testing.assert_array_equal(kernels.task_vector_merge(table, how, case.pieces), flags)
    for row, expected_row in zip(found, expected, strict=True):
        for column, expected_column in zip(row, expected_row, strict=True):
            assert_same_bits(column, expected_column)


@pytest.mark.parametrize("kind", ["random", "magnitude"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_kept(kernels: Any, dtype: str, kind: Any) -> None:
    keys = np.array([7, 0x80000000], np.uint32)
    index = np.arange(8, dtype=np.uint64)
    hashes = np.stack(oracle.philox(index, *keys.astype(np.uint64)), axis=1).ravel().astype(np.int64)
    model = np.array([0, 1, -1, 2, np.inf, -np.inf, np.nan, -0.0] * 4, dtype)
    (pattern,) = patterns(Table([[np.zeros_like(model), model]]), 1)
    one, two, infinity = pattern[0, [1, 3, 4]].tolist()
    pairs = [(-1, infinity), (one, two), (one, infinity), (0, one), (one, one), (two, infinity - 1), (infinity, infinity + 1)]
    # An entry of each magnitude is at its threshold, and then above it
    edges = [0, 1 << 32, *(int(hashes[at]) + more for at in (1, 3, 6, 16) for more in (0, 1))]
    both = [*zip(edges, reversed(edges), strict=True), *zip(edges, edges[3:] + edges[:3], strict=True)]
    chosen = product(pairs if kind == "magnitude" else pairs[:1], both)
    cuts, thresholds = (np.array(each)[:, None] for each in zip(*chosen, strict=True))
    keep = Keep(kind, np.broadcast_to(keys, cuts.shape), thresholds, cuts)
    ones = np.ones((len(cuts), 1), dtype)
    table = Table([[np.zeros_like(model), model, np.zeros_like(model)] for _ in cuts])
    how = TaskVectors(keep, None, "sum", ones, ones, ones, ones[:, 0])
    assert kernels.task_vector_merge(table, how, table.whole).all()
    (t0, t1), (low, high) = (np.moveaxis(each, 2, 0) for each in (thresholds, cuts))
    if kind == "random":
        kept = hashes < t0
    else:
        above = (pattern > low) | ((pattern == low) & (hashes < t0))
        kept = above & ((pattern < high) | ((pattern == high) & (hashes >= t1)))
    found = np.array([row[-1] for row in table.spans])
    np.testing.assert_array_equal(found, np.where(kept, model, 0))


@pytest.mark.parametrize(("elect", "combine"), [*product(ELECTS, COMBINES)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_special_values_as_task_vectors(kernels: Any, dtype: str, elect: Any, combine: Any) -> None:
    left, right = (side.ravel() for side in np.meshgrid(specials(dtype), specials(dtype)))
    inputs = [np.zeros_like(left), left, right], [left, right, left[::-1].copy()]
    compute = compute_dtype([dtype])
    pairs = np.array([[1, 1], [-0.3, 1e-30]], compute)
    how = TaskVectors(
        EVERYTHING, elect, combine, pairs, pairs[::-1], np.abs(pairs),
        np.array([1, 0.5], compute),
    )  # fmt: skip
    results = []
    for module in (kernels, oracle):
        table = Table([[*row, np.full_like(left, 77)] for row in inputs])
        results.append((module.task_vector_merge(table, how, table.whole), [row[-1] for row in table.spans]))
    (flags, found), (expected_flags, expected) = results
    assert flags.tolist() == expected_flags.tolist()
    for row, expected_row in zip(found, expected, strict=True):
        assert_same_bits(row, expected_row)


@pytest.mark.parametrize(
    ("elect", "combine", "changes"),
    [
        (None, "sum", [2 - 1 + 3, -4, 5]),
        (None, "weight_mean", [4 / 1.75, -4 / 0.5, 5 / 0.25]),
        (None, "count_mean", [4 / 3, -4, 5]),
        (None, "max", [3, -4, 5]),
        ("weighted", "sum", [2 + 3, -4, 5]),
        ("weighted", "weight_mean", [5 / 1.25, -4 / 0.5, 5 / 0.25]),
        ("weighted", "count_mean", [5 / 2, -4, 5]),
        ("unweighted", "sum", [-1, -4, 5]),  # the votes are 2, -8 and 3
        ("unweighted", "max", [-1, -4, 5]),
    ],
)
def test_task_vectors_by_hand(kernels: Any, elect: Any, combine: Any, changes: list[float]) -> None:
    base = np.array([1, 2, -3], np.float32)
    vectors = np.array([[2, 0, 0], [-1, -4, 0], [3, 0, 5]], np.float32)
    row = [base, *(base + vectors), np.zeros(3, np.float32)]
    how = TaskVectors(
        EVERYTHING, elect, combine, np.ones((1, 3), np.float32),
        np.array([[1, 8, 1]], np.float32), np.array([[1, 0.5, 0.25]], np.float32), np.array([0.5], np.float32),
    )  # fmt: skip
    table = Table([row])
    assert kernels.task_vector_merge(table, how, table.whole).tolist() == [False]
    np.testing.assert_array_equal(row[-1], base + np.float32(0.5) * np.array(changes, np.float32))


def test_a_difference_that_is_dropped_is_still_checked(kernels: Any) -> None:
    base = np.array([1, np.inf, 1], np.float32)
    for model, flag in (([1, np.inf, 2], False), ([1, np.inf, np.inf], True), ([np.nan, np.inf, 1], True)):
        out = np.zeros(3, np.float32)
        one = np.ones((1, 1), np.float32)
        keep = Keep("random", np.zeros((1, 1, 2), np.uint32), np.zeros((1, 1, 2), np.int64), np.zeros((1, 1, 2), np.int64))
        how = TaskVectors(keep, None, "sum", one, one, one, one[0])
        # the base is infinite itself, which shows in the result: look at the two others
        for at, expected in ((slice(0, 1), flag and bool(np.isnan(model[0]))), (slice(2, 3), flag and model[2] == np.inf)):
            table = Table([[base[at], np.array(model, np.float32)[at], out[at]]])
            assert kernels.task_vector_merge(table, how, table.whole).tolist() == [expected]
        assert out.tolist() == [1, 0, 1]


@examples(40)
@given(case=cases(writes=False, based=True).filter(lambda case: len(case.dtypes) > 1), wide=st.booleans(), data=st.data())
def test_magnitude_histogram(kernels: Any, case: Case, wide: bool, data: st.DataObject) -> None:
    _, table, _ = case.open()
    bits = 63 if wide or table.compute == np.float64 else 31
    shape, bins = (len(table.spans), len(table.dtypes) - 1), data.draw(st.sampled_from([1, 16, 300]))
    random = np.random.default_rng(case.seed)
    found = patterns(table, shape[1], wide)
    low = np.array([[random.choice(np.append(each, 0)) for each in row] for row in found]) * random.integers(0, 2, shape)
    shift = random.integers(0, bits - 8, shape)
    groups = np.arange(len(case.pieces)) // data.draw(st.integers(1, 2))
    counts = kernels.magnitude_histogram(table, low, shift, bins, wide, groups, case.pieces)
    expected = oracle.magnitude_histogram(table, low, shift, bins, wide, groups, case.pieces)
    assert counts.dtype == expected.dtype
    np.testing.assert_array_equal(counts, expected)
    totals = np.zeros_like(counts[:, :, 0])  # of all entries that are not below the window
    for group, (row, start, stop) in zip(groups, case.pieces, strict=True):
        totals[group] += (found[row][:, start:stop] >= low[row][:, None]).sum(axis=1)
    np.testing.assert_array_equal(counts[:, :, :-1].sum(axis=2), totals)


def test_histogram_by_hand(kernels: Any) -> None:
    one = 0x3F800000
    base = np.zeros(3 * TILE + 5, np.float32)
    model = base.copy()
    model[[0, TILE, -1]] = 1, -1, 1.5  # in the window [1, 2), in two bins
    model[[1, 2, 3, 4]] = 2, np.inf, np.nan, 0.75
    table = Table([[base, model]])
    low, shift = np.full((1, 1), one), np.full((1, 1), 22)
    found = kernels.magnitude_histogram(table, low, shift, 2, False, np.zeros(1, np.intp), table.whole)
    assert found.tolist() == [[[2, 1, 3, 2]]]


@pytest.mark.parametrize(
    ("dtypes", "kind"),
    [
        (("float32", "bfloat16"), "all"),
        (("float32", "float16"), "random"),
        (("bfloat16", "bfloat16", "bfloat16"), "magnitude"),
        (("float64", "bfloat16", "float32"), "magnitude"),
    ],
)
def test_kept_magnitude(kernels: Any, dtypes: tuple[str, ...], kind: Any) -> None:
    random = np.random.default_rng(4)
    sizes = [BLOCK + 3000, 700]
    pieces = np.array([[1, 0, 700], [0, BLOCK, BLOCK + 3000], [0, 0, BLOCK]], np.int64)
    table = Table([[random.integers(-8, 9, size).astype(type_of[dtype]) for dtype in dtypes] for size in sizes])
    keep = drawn_keep(kind, table, len(dtypes) - 1, 5)
    found = kernels.kept_magnitude(table, keep, pieces)
    assert found.shape == (3, len(dtypes) - 1, 2)
    np.testing.assert_array_equal(found, oracle.kept_magnitude(table, keep, pieces))  # sums of small integers are exact
    assert ((found[:, :, 1] < found[:, :, 0]) == (kind != "all")).any()


@st.composite
def sliced_cases(draw: st.DrawFn, writes: bool) -> tuple[Case, Slices]:
    """Draw matrices, cut into their rows or columns, and pieces of those."""
    case = draw(cases(writes))
    few, many, some = st.integers(0, 3), st.integers(1, TILE + 99), st.integers(1, 90) | st.sampled_from([8, 32, 64, 72])
    shape = st.one_of(st.tuples(few, many), st.tuples(many, few), st.tuples(some, some))
    shapes = [draw(shape) for _ in case.sizes]
    counts, lengths = (np.array(sides) for sides in zip(*shapes, strict=True))
    lengths = np.maximum(lengths, 1)
    pieces = []
    for row, count in enumerate(counts.tolist()):
        cuts = sorted(draw(st.lists(st.integers(0, count), max_size=2)))
        pieces += [(row, *piece) for piece in pairwise([0, *cuts, count]) if draw(st.integers(0, 4))]
    ordered = np.array(draw(st.permutations(pieces)), np.int64).reshape(-1, 3)
    return replace(case, sizes=tuple((counts * lengths).tolist()), pieces=ordered), Slices(lengths, draw(st.booleans()))


@examples(60)
@given(sliced=sliced_cases(writes=True))
def test_weighted_sum_of_slices(kernels: Any, sliced: tuple[Case, Slices]) -> None:
    case, slices = sliced
    expected, table, _ = case.open()
    random = np.random.default_rng(case.seed)
    count, models = int(slices.counts(table).sum()), len(case.dtypes) - 1
    weights = random.choice([1, -1, 0.5, -0.3, 0, 1 / 3, 7.25], (count, models)).astype(case.compute)
    references = random.integers(-1, models, count)
    if random.integers(0, 3) == 0:
        references[:] = -1
    oracle.weighted_sum_of_slices(table, weights, references, slices, case.pieces)
    if slices.strided:
        matrices = [row[-1].reshape(length, -1) for row, length in zip(table.spans, slices.lengths, strict=True)]
        table = Table([[matrix.T.ravel()] for matrix in matrices])
    rows, bounds = case.pieces[:, :1], case.pieces[:, 1:]
    flags = nonfinite(table, np.hstack([rows, bounds * slices.lengths[rows]]))
    found, table, _ = case.open()
    weights[references >= 0, references[references >= 0]] = np.nan  # does not matter
    np.testing.assert_array_equal(kernels.weighted_sum_of_slices(table, weights, references, slices, case.pieces), flags)
    for row, expected_row in zip(found, expected, strict=True):
        for column, expected_column in zip(row, expected_row, strict=True):
            assert_same_bits(column, expected_column)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_special_values_in_slices(kernels: Any, dtype: str) -> None:
    left, right = (side.ravel() for side in np.meshgrid(specials(dtype), specials(dtype)))
    weights = np.array([[0.3, 1], [0, -1], [-0.5, 0], [9, -0.3], [1e-30, 9], [0, 9]], compute_dtype([dtype]))
    references = np.array([-1, -1, -1, 0, 1, 1])
    slices = Slices(np.full(6, len(left)), False)
    results = []
    for module in (kernels, oracle):
        table = Table([[left, right, np.full_like(left, 77)] for _ in weights])
        pieces = np.array([[row, 0, 1] for row in range(6)])
        flags = module.weighted_sum_of_slices(table, weights, references, slices, pieces)
        results.append((flags.tolist(), [row[-1] for row in table.spans]))
    (found_flags, found), (expected_flags, expected) = results
    assert found_flags == expected_flags
    for row, expected_row in zip(found, expected, strict=True):
        assert_same_bits(row, expected_row)


@pytest.mark.parametrize("strided", [False, True])
def test_slices_by_hand(kernels: Any, strided: bool) -> None:
    # Three slices of two: a plain sum; one about the second input, which all share in the last entry; one input alone
    x = np.array([[1, 2], [3, -0.0], [5, 6]], np.float32)
    y = np.array([[10, 20], [1, -0.0], [np.nan, np.inf]], np.float32)
    weights, references = np.array([[1, 0.5], [0.25, 9], [2, 0]], np.float32), np.array([-1, 1, -1])
    expected = np.array([[6, 12], [1.5, -0.0], [10, 12]], np.float32)
    order: Any = "F" if strided else "C"
    table = Table([[x.ravel(order), y.ravel(order), np.zeros(6, np.float32)]])
    slices, pieces = Slices(np.array([2]), strided), np.array([[0, 0, 1], [0, 1, 3]])
    flags = kernels.weighted_sum_of_slices(table, weights, references, slices, pieces)
    assert_same_bits(table.spans[0][-1], expected.ravel(order))
    assert flags.tolist() == [False]
    gram = kernels.gram_of_slices(Table([table.spans[0][:2]]), False, slices, pieces[:1])
    assert gram.tolist() == [[[5, 50], [50, 500]]]
    about = kernels.gram_of_slices(Table([table.spans[0][:2]]), True, slices, pieces)
    np.testing.assert_array_equal(about.ravel(), [81 + 324, 4, np.nan])
    flags = kernels.weighted_sum_of_slices(table, weights, np.array([0, 0, 1]), slices, pieces[1:])
    assert flags.tolist() == [True]


@examples(25)
@given(sliced=sliced_cases(writes=False))
def test_gram_of_slices(kernels: Any, sliced: tuple[Case, Slices]) -> None:
    case, slices = sliced
    about = case.about and len(case.dtypes) > 1
    _, table, _ = case.open()
    random = np.random.default_rng(case.seed)
    for row in table.spans:
        for span in row:
            span[:] = random.integers(-8, 9, len(span))  # sums are exact, in whatever order
    np.testing.assert_array_equal(
        kernels.gram_of_slices(table, about, slices, case.pieces), oracle.gram_of_slices(table, about, slices, case.pieces)
    )
    for row in table.spans:
        for span in row:
            span[:] = random.standard_normal(len(span))
    whole = np.stack([np.arange(len(table.spans)), np.zeros(len(table.spans), int), slices.counts(table)], axis=1)
    found, expected = (module.gram_of_slices(table, about, slices, whole) for module in (kernels, oracle))
    scale = np.sqrt(expected.diagonal(axis1=1, axis2=2))
    assert (np.abs(found - expected) <= 1e-13 * scale[:, :, None] * scale[:, None, :]).all()
    # A slice's sum is the same bits in whatever piece it is
    first = slices.first(table)
    parts = [found[first[row] + start : first[row] + stop] for row, start, stop in case.pieces]
    again = kernels.gram_of_slices(table, about, slices, case.pieces)
    assert again.tobytes() == b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize(
    ("strided", "width", "offset", "expected"),
    [
        (True, 64, 0, [1, 0, 0, 1]),  # columns 0, 1, 4 and 8 begin at so many times two bytes
        (True, 64, 1, [0, 0, 0, 0]),
        (True, 60, 0, [0, 0, 0, 0]),
        (False, 64, 0, [1, 1, 1, 1]),
        (False, 64, 1, [0, 0, 0, 0]),
        (False, 60, 0, [0, 0, 0, 0]),
    ],
)
def test_alignment_of_slices(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, strided: bool, width: int, offset: int, expected: list[int]
) -> None:
    told: list[Any] = []  # the interpreter would not mind a false promise
    kernel: Any = defaultdict(lambda: lambda *arguments, **_: told.extend(arguments[0][:, 3].tolist()))
    monkeypatch.setattr(backend.slicing, "_gram_of_slices_kernel", kernel)
    buffer = np.zeros(64 * width + 16, type_of["bfloat16"])
    begin = -buffer.__array_interface__["data"][0] % 16 // 2 + offset
    span = buffer[begin : begin + 64 * width]
    pieces = np.array([[0, first, first + 1] for first in (0, 1, 4, 8)])
    kernels.gram_of_slices(Table([[span, span]]), False, Slices(np.array([64 if strided else width]), strided), pieces)
    assert told == expected


def test_lengths_share_no_launch_that_does_not_fit_them(kernels: Any) -> None:
    table = Table([[np.ones(size, np.float32), np.full(size, 2, np.float32)] for size in (3, 5000, 40)])
    for strided, lengths in ((False, [1, 5000, 20]), (True, [3, 1, 8])):
        slices = Slices(np.array(lengths), strided)
        pieces = np.array([[row, 0, count] for row, count in enumerate(slices.counts(table))])
        found = kernels.gram_of_slices(table, False, slices, pieces)
        np.testing.assert_array_equal(found[:, 0, 1], 2 * np.repeat(lengths, slices.counts(table)))


@pytest.mark.parametrize("pieces", [np.zeros((0, 3), np.int64), np.array([[0, 1, 1], [1, 0, 0]])])
def test_nothing_to_do_for_task_vectors_and_slices(kernels: Any, pieces: Array) -> None:
    table = Table([[np.ones(3, np.float32)] * 3, [np.ones(0, np.float32)] * 3])
    one, zero = np.ones((2, 1), np.float32), np.zeros((2, 2), np.int64)
    keep = Keep("random", np.zeros((2, 2, 2), np.uint32), np.zeros((2, 2, 2), np.int64), np.zeros((2, 2, 2), np.int64))
    alone = Keep("random", *(each[:, :1] for each in (keep.keys, keep.thresholds, keep.cuts)))
    slices = Slices(np.array([3, 1]), False)
    how = TaskVectors(alone, "weighted", "sum", one, one, one, one[:, 0])
    assert kernels.task_vector_merge(table, how, pieces).tolist() == [False, False]
    groups = np.arange(len(pieces))
    assert not kernels.magnitude_histogram(table, zero, zero, 4, False, groups, pieces).any()
    assert kernels.magnitude_histogram(table, zero, zero, 4, False, groups, pieces).shape == (len(pieces), 2, 6)
    assert kernels.kept_magnitude(table, keep, pieces).shape == (0, 2, 2)
    assert kernels.gram_of_slices(table, True, slices, pieces).shape == (0, 2, 2)
    weights, references = np.ones((1, 2), np.float32), np.zeros(1, np.int64)
    assert kernels.weighted_sum_of_slices(table, weights, references, slices, pieces).tolist() == [False, False]
