"""The Triton backend in Triton's interpreter: the same bits as the NumPy backend."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are decorated

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

from mergekit_cl.dtypes import type_of
from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import BLOCK, Array, Table
from mergekit_cl.kernels import numpy as oracle
from mergekit_cl.kernels import triton as backend

TILE = backend.TILE
DTYPES = tuple(type_of)
GUARD = 9
"""Elements in front of and behind each span that nothing may touch."""


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
        """Make the buffers, anew and the same at each call, the table over them, and its weights."""
        random = np.random.default_rng(self.seed)
        buffers, rows = [], []
        for size, offsets in zip(self.sizes, self.offsets, strict=True):
            base = random.standard_normal(GUARD * 2 + 16 + size)
            columns = [self._column(random, base, dtype) for dtype in self.dtypes]
            starts = [GUARD + offset for offset in offsets]
            if self.out_is is not None:
                columns[-1], starts[-1] = columns[self.out_is], starts[self.out_is]
            buffers.append(columns)
            rows.append([column[start : start + size] for column, start in zip(columns, starts, strict=True)])
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


@st.composite
def cases(draw: st.DrawFn, writes: bool = True) -> Case:
    about = draw(st.booleans())
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1 + about + writes, max_size=4).map(tuple))
    size = st.one_of(st.integers(0, 40), st.sampled_from([TILE - 1, TILE, TILE + 1]), st.integers(0, 3 * TILE))
    sizes = draw(st.lists(size, min_size=1, max_size=3).map(tuple))
    offset = draw(st.sampled_from([st.just(7), st.integers(0, 15)]))  # 16 + 7 elements are aligned in every dtype
    offsets = tuple(draw(st.tuples(*[offset] * len(dtypes))) for _ in sizes)
    same = [column for column in range(len(dtypes) - 1) if dtypes[column] == dtypes[-1]]
    pieces = []
    for row, size_ in enumerate(sizes):
        cuts = sorted(draw(st.lists(st.integers(0, size_), max_size=3)))
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


def merged(module: Any, rows: list[list[Array]], weights: Any, about: bool) -> tuple[list[Array], list[bool]]:
    """Return the outputs of whole rows, the last column of each, and the flags."""
    table = Table([[*row[:-1], np.full_like(row[-1], 77)] for row in rows])
    nonfinite = module.weighted_sum(table, np.array(weights, table.compute), about, table.whole)
    return [row[-1] for row in table.spans], nonfinite.tolist()


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_weighted_sum(case: Case) -> None:
    expected, table, weights = case.open()
    flags = oracle.weighted_sum(table, weights, case.about, case.pieces)
    found, table, weights = case.open()
    np.testing.assert_array_equal(backend.weighted_sum(table, weights, case.about, case.pieces), flags)
    for row, expected_row in zip(found, expected, strict=True):
        for column, expected_column in zip(row, expected_row, strict=True):
            assert_same_bits(column, expected_column)  # the guards, the inputs and what is in no piece too


@settings(max_examples=30, deadline=None)
@given(case=cases(writes=False))
def test_largest_magnitude(case: Case) -> None:
    _, table, _ = case.open()
    found = backend.largest_magnitude(table, case.pieces)
    assert_same_bits(found, oracle.largest_magnitude(table, case.pieces))


@pytest.mark.parametrize("about", [True, False])
@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_special_values(dtype: str, output: str, about: bool) -> None:
    left, right = (side.ravel() for side in np.meshgrid(specials(dtype), specials(dtype)))
    weights = [[1.0], [-1.0], [0.3], [-1e-30]] if about else [[1, 1], [1, -1], [0.3, 0.7], [-1e-30, 1e-30]]
    rows = [[left, right, np.zeros(len(left), type_of[output])] for _ in weights]
    found, flags = merged(backend, rows, weights, about)
    expected, expected_flags = merged(oracle, rows, weights, about)
    assert flags == expected_flags
    for row, expected_row in zip(found, expected, strict=True):
        assert_same_bits(row, expected_row)


@pytest.mark.parametrize("about", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_value_comes_back(dtype: str, about: bool) -> None:
    values = np.arange(1 << 16).astype(np.uint16).view(type_of[dtype])
    row = [values] * (3 if about else 2)
    (found,), flags = merged(backend, [row], [[-0.5 if about else 1.0]], about)
    assert_same_bits(found, values)
    assert flags == [True]
    (found,), flags = merged(backend, [[column[:100] for column in row]], [[-0.5 if about else 1.0]], about)
    assert_same_bits(found, values[:100])
    assert flags == [False]


@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_once_to_nearest_even(dtype: str, wide: str) -> None:
    values = np.arange((1 << 16) - 1).astype(np.uint16)
    with np.errstate(all="ignore"):
        low, high = (part.view(type_of[dtype]).astype(np.float64) for part in (values, values + np.uint16(1)))
        middle = ((low + high) / 2).astype(wide)
        near = np.concatenate([np.nextafter(middle, middle.dtype.type(side)) for side in (-np.inf, np.inf)])
    near, middle = near[np.isfinite(near)], middle[np.isfinite(middle)]
    column = np.concatenate([middle, near])
    (found,), _ = merged(backend, [[column, np.zeros(len(column), type_of[dtype])]], [[1.0]], about=False)
    (expected,), _ = merged(oracle, [[column, np.zeros(len(column), type_of[dtype])]], [[1.0]], about=False)
    assert_same_bits(found, expected)
    ties = found[: len(middle)].view(np.uint16)
    exact = found[: len(middle)].astype(np.float64) == middle
    assert not (ties[~exact] & 1).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_of_any_payload_stays_nan(dtype: str) -> None:
    values = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000], np.uint32).view(np.float32)  # a GPU makes the first
    (found,), flags = merged(backend, [[values, np.zeros(4, type_of[dtype])]], [[1.0]], about=False)
    assert np.isnan(found).all()
    assert flags == [True]


def test_numbers_by_hand() -> None:
    earlier, now = np.array([[1, 2, -0.0], [3, 2, -0.0]], np.float32)
    (out,), flags = merged(backend, [[now, earlier, now]], [[0.25]], about=True)
    assert_same_bits(out, np.array([2.5, 2, -0.0], np.float32))
    (out,), _ = merged(backend, [[now, earlier, now]], [[2.0, -1.0]], about=False)
    assert_same_bits(out, np.array([5, 2, 0], np.float32))
    assert flags == [False]


def test_overflow_of_the_output_is_flagged_in_its_row() -> None:
    inputs = np.repeat(np.array([[65519], [65520], [1]], np.float32), 3 * TILE, axis=1)
    inputs[2, -1] = np.nan
    rows: list[list[Array]] = [[span, np.zeros(3 * TILE, np.float16)] for span in inputs]
    out, flags = merged(backend, rows, [[1.0]] * 3, about=False)
    assert flags == [False, True, True]
    assert (out[0] == 65504).all()


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 3, ("float32", "float16"), ("float64", "bfloat16", "float32")])
@pytest.mark.parametrize("about", [True, False])
def test_gram(dtypes: tuple[str, ...], about: bool) -> None:
    random = np.random.default_rng(3)
    sizes = [BLOCK + 3000, 700]
    pieces = np.array([[1, 0, 700], [0, 0, BLOCK + 3000]], np.int64)
    whole = Table([[random.integers(-8, 9, size).astype(type_of[dtype]) for dtype in dtypes] for size in sizes])
    # Sums of small integers are exact, in whatever order
    found = backend.gram(whole, about, pieces)
    assert len(found) == 3
    np.testing.assert_array_equal(found, oracle.gram(whole, about, pieces))
    lengths = [9000, 10]
    reals = Table([[random.standard_normal(size).astype(type_of[dtype])[1:] for dtype in dtypes] for size in lengths])
    found, expected = (module.gram(reals, about, reals.whole) for module in (backend, oracle))
    scale = np.sqrt(expected.diagonal(axis1=1, axis2=2))
    assert (np.abs(found - expected) <= 1e-13 * scale[:, :, None] * scale[:, None, :]).all()
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


@pytest.mark.parametrize("pieces", [np.zeros((0, 3), np.int64), np.array([[0, 2, 2], [1, 0, 0]])])
def test_nothing_to_do(pieces: Array) -> None:
    table = Table([[np.ones(3, np.float32)] * 2, [np.ones(0, np.float32)] * 2])
    assert backend.weighted_sum(table, np.ones((2, 1), np.float32), False, pieces).tolist() == [False, False]
    assert backend.largest_magnitude(table, pieces).tolist() == [[0, 0], [0, 0]]
    assert backend.gram(table, False, pieces).shape == (0, 2, 2)


@pytest.fixture
def _restless_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


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


def test_refuses_tensors_that_the_interpreter_cannot_reach() -> None:
    table = Table([[SimpleNamespace(device="cuda:0", dtype="float32")]])
    with pytest.raises(BackendError, match="loaded to work on the CPU, but the tensors are on cuda:0"):
        backend.largest_magnitude(table, np.zeros((0, 3), np.int64))
