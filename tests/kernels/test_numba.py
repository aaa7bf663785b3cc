"""The numba backend against the contract's formulas, written out for whole arrays: the same bits, however the work is cut."""

from itertools import pairwise
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_cl.dtypes import type_of
from mergekit_cl.kernels import BLOCK, Keep, Slices, Table, TaskVectors
from mergekit_cl.kernels import numba as backend

Array = npt.NDArray[Any]
DTYPES = list(type_of)
SIZES = st.integers(0, 40) | st.sampled_from([1023, 1024, 1025, 3000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
INFINITY = {4: 0x7F800000, 8: 0x7FF0000000000000}


def specials(dtype: str) -> Array:
    limits: Any = ml_dtypes.finfo(type_of[dtype])
    small, tiny, largest = limits.smallest_subnormal, limits.tiny, limits.max
    positive = np.array([0, small, small * 3, tiny, 1, 1 + limits.eps, largest, np.inf], type_of[dtype])
    return np.concatenate([positive, -positive, np.array([np.nan], positive.dtype)])


def spans(seed: int, size: int, dtypes: list[str], special: float = 0.02, ties: bool = True) -> list[Array]:
    """Columns that are close to each other, or equal, or special; ``ties`` makes many differences have equal magnitudes."""
    random = np.random.default_rng(seed)
    base = random.standard_normal(size)
    base = np.round(base * 64) / 64 if ties else base
    columns = []
    for dtype in dtypes:
        step = np.round(random.standard_normal(size) * 4) / 64 if ties else random.standard_normal(size) * 0.01
        offset = int(random.integers(0, 4))
        column = np.empty(size + offset, type_of[dtype])[offset:]
        column[:] = base + step * (random.random(size) < 0.8)
        at = random.integers(0, max(size, 1), int(size * special))
        column[at] = random.choice(specials(dtype), len(at))
        columns.append(column)
    return columns


def cut(rows: list[int], draw: st.DataObject, unit: int = BLOCK) -> Array:
    """Cut all rows at random multiples of ``unit``, in order."""
    pieces = []
    for row, size in enumerate(rows):
        inner = draw.draw(st.sets(st.integers(1, max(1, size // unit)), max_size=3))
        at = sorted({0, size, *(unit * each for each in inner if unit * each < size)})
        pieces += [(row, start, stop) for start, stop in pairwise(at)]
    return np.array(pieces, np.int64).reshape(-1, 3)


def bits(array: Array) -> bytes:
    """Return the bytes of an array, all NaN alike."""
    array = array.copy()
    array[np.isnan(array)] = np.nan
    return array.tobytes()


# The contract's formulas -----------------------------------------------------------------------------------------------


def philox(index: Array, key: Array) -> Array:
    """Return the hashes of entries."""
    counter = index.astype(np.uint64) // 4
    a, b = counter & 0xFFFFFFFF, counter >> np.uint64(32)
    zero = np.zeros_like(a)
    hashed: Array = philox_words([a, b, zero, zero], [int(word) for word in key])[index % 4, np.arange(len(index))]
    return hashed


def philox_words(words: list[Array], key: list[int]) -> Array:
    mask = np.uint64(0xFFFFFFFF)
    a, b, c, d = words
    for _ in range(10):
        one, two = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (two >> np.uint64(32)) ^ b ^ np.uint64(key[0]), two & mask
        c, d = (one >> np.uint64(32)) ^ d ^ np.uint64(key[1]), one & mask
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack([a, b, c, d])


def difference(base: Array, x: Array, compute: Any) -> Array:
    base, x = base.astype(compute), x.astype(compute)
    return np.where(x == base, compute.type(0), x - base)


def pattern(values: Array) -> Array:
    width = values.dtype.itemsize
    found: Array = np.minimum(np.abs(values).view(f"u{width}"), INFINITY[width]).astype(np.int64)
    return found


def kept(values: Array, keep: Keep, row: int, k: int) -> Array:
    if keep.kind == "all":
        return values
    h = philox(np.arange(len(values)), keep.keys[row, k]).astype(np.int64)
    (one, two), (least, most) = keep.cuts[row, k], keep.thresholds[row, k]
    a = pattern(values)
    inside = ((a > one) | ((a == one) & (h < least))) & ((a < two) | ((a == two) & (h >= most)))
    return np.where(h < least if keep.kind == "random" else inside, values, values.dtype.type(0))


def rounded(values: Array, dtype: Any) -> Array:
    """Round once, also from float64 to bfloat16."""
    if dtype.name not in ("bfloat16", "float16") or values.dtype != np.float64:
        return values.astype(dtype)
    near = values.astype(np.float32)
    below = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    odd: Array = below.view(np.uint32) | (below != values) & np.isfinite(values)
    return odd.view(np.float32).astype(dtype)


def merged(base: Array, models: list[Array], out: Any, how: TaskVectors, row: int) -> tuple[Array, bool]:
    compute = how.scales.dtype
    differences = [difference(base, x, compute) for x in models]
    d = [kept(each, how.keep, row, k) for k, each in enumerate(differences)]
    v = [how.scales[row, k] * each for k, each in enumerate(d)]
    u = [how.votes[row, k] * each for k, each in enumerate(d)] if how.elect == "unweighted" else v
    zero = np.zeros(len(base), compute)
    positive = sum(u, zero) >= 0
    agree = [np.where(positive, ~(each <= 0), ~(each >= 0)) if how.elect else v[k] != 0 for k, each in enumerate(u)]
    total = zero
    if how.combine == "max":
        for value, yes in zip(v, agree, strict=True):
            larger = (np.abs(value) > np.abs(total)) | (np.isnan(value) & ~np.isnan(total))
            total = np.where(yes & larger, value, total)
    else:
        total = sum((np.where(yes, value, zero) for value, yes in zip(v, agree, strict=True)), zero)
    if how.combine in ("weight_mean", "count_mean"):
        shares = how.shares[row] if how.combine == "weight_mean" else np.ones_like(how.shares[row])
        share = sum((np.where(yes, part, zero) for part, yes in zip(shares, agree, strict=True)), zero)
        total = total / np.where(share == 0, compute.type(1), share)
    change = how.factors[row] * total
    wide = base.astype(compute)
    result = rounded(np.where(change == 0, wide, wide + change), out)
    return result, not (np.isfinite(result).all() and all(np.isfinite(each).all() for each in differences))


def slice_of(span: Array, length: int, number: int, strided: bool) -> Array:
    return span[number :: len(span) // length] if strided else span[number * length : (number + 1) * length]


# Drawn tables ------------------------------------------------------------------------------------------------------------


@st.composite
def keeps(draw: st.DrawFn, rows: int, models: int, compute: Any, kind: Any = None) -> Keep:
    """Cuts at patterns that occur, thresholds at both ends and between."""
    kind = kind or draw(st.sampled_from(["all", "random", "magnitude"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    occurring = [
        -1,
        0,
        *pattern(np.arange(8, dtype=compute) / 64),
        INFINITY[compute.itemsize],
        2 ** (8 * compute.itemsize - 1) - 1,
    ]
    cuts = np.sort(random.choice(np.array(occurring, np.int64), (rows, models, 2)), axis=2)
    if draw(st.integers(0, 9)) == 0:
        cuts = cuts[..., ::-1].copy()
    thresholds = random.choice(np.array([0, 1, 2**31, 3 << 30, 2**32 - 1, 2**32]), (rows, models, 2))
    return Keep(kind, random.integers(0, 2**32, (rows, models, 2), dtype=np.uint32), thresholds, cuts)


def compute_of(dtypes: list[str]) -> Any:
    return np.dtype(np.float64 if "float64" in dtypes else np.float32)


# Tests ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
])  # fmt: skip
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = [np.array([word], np.uint64) for word in counter]
    assert philox_words(words, list(key))[:, 0].tolist() == list(expected)


def hashes(first: int, key: tuple[int, int], count: int) -> Array:
    out = np.empty((count + 3) // 4 * 2, np.uint64)
    backend.compiled._hash(first, np.array(key, np.uint32), count, out)
    return out.view(np.uint32)[:count]


def test_compiled_philox() -> None:
    assert hashes(0, (0, 0), 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for first in (0, 1024, 4 * (2**32 - 64), 2**34, 2**40 + 4096):
        expected = philox(np.arange(first, first + 255), np.array([0xFFFFFFFF, 12345], np.uint32))
        assert hashes(first, (0xFFFFFFFF, 12345), 255).tolist() == expected.tolist()


@given(st.data())
@settings(max_examples=80)
def test_task_vector_merge(data: st.DataObject) -> None:
    models = data.draw(st.integers(1, 4))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=models + 1, max_size=models + 1))
    out, in_place = data.draw(st.sampled_from(DTYPES)), data.draw(st.none() | st.integers(0, models))
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=2))
    compute, seed = compute_of(dtypes), data.draw(st.integers(0, 2**32))
    special, ties = data.draw(st.sampled_from([0, 0.02, 0.5])), data.draw(st.booleans())
    rows = [spans(seed + row, size, dtypes, special, ties) for row, size in enumerate(sizes)]
    weights = st.sampled_from([0.0, 1, -1, 0.3, 7.25, 1e-30])

    def drawn(*shape: int) -> Array:
        count = int(np.prod(shape))
        return np.array(data.draw(st.lists(weights, min_size=count, max_size=count)), compute).reshape(shape)

    how = TaskVectors(
        data.draw(keeps(len(rows), models, compute)),
        data.draw(st.sampled_from(["weighted", "unweighted", None])),
        data.draw(st.sampled_from(["sum", "weight_mean", "count_mean", "max"])),
        drawn(len(rows), models),
        drawn(len(rows), models),
        drawn(len(rows), models),
        drawn(len(rows)),
    )
    kind = type_of[dtypes[in_place] if in_place is not None else out]
    with np.errstate(all="ignore"):
        expected = [merged(row[0], row[1:], kind, how, number) for number, row in enumerate(rows)]
    results = [row[in_place] if in_place is not None else np.empty(len(row[0]) + 1, kind)[1:] for row in rows]
    table = Table([[*row, result] for row, result in zip(rows, results, strict=True)])
    pieces = cut(sizes, data)
    flags = np.zeros(len(rows), bool)
    for piece in (pieces[::2], pieces[1::2]):
        flags |= backend.task_vector_merge(table, how, piece)
    assert [bits(result) for result in results] == [bits(each) for each, _ in expected]
    assert flags.tolist() == [flag for _, flag in expected]


def consensus(base: list[float], models: list[list[float]], **how: Any) -> list[float]:
    """Merge lists of numbers; not given is: keep all, no election, sum, weights of one."""
    shape = (1, len(models))
    ones = np.ones(shape, np.float32)
    none = np.zeros((*shape, 2), np.int64)
    values = {
        "keep": Keep("all", none.astype(np.uint32), none, none), "elect": None, "combine": "sum", "scales": ones, "votes": ones,
        "shares": ones, "factors": np.ones(1, np.float32),
    }  # fmt: skip
    values |= {name: np.array(value, np.float32) if isinstance(value, list) else value for name, value in how.items()}
    out = np.empty(len(base), np.float32)
    table = Table([[np.array(each, np.float32) for each in (base, *models)] + [out]])
    assert backend.task_vector_merge(table, TaskVectors(**values), table.whole).tolist() == [not np.isfinite(out).all()]
    return out.tolist()


def test_consensus_by_hand() -> None:
    base, models = [1.0, 1, 1, -0.0], [[2.0, 5, 1, -0.0], [0, -1, 1, 0.0], [4, 1, 1, -0.0]]  # differences 1 -1 3, 4 -2 0, zeros
    assert consensus(base, models) == [4, 3, 1, 0]
    assert np.signbit(consensus(base, models)[3])
    assert consensus(base, models, elect="weighted") == [5, 5, 1, 0]
    assert consensus(base, models, elect="weighted", combine="count_mean", factors=[2.0]) == [5, 9, 1, 0]
    weights = [[0.5, 4, 0.5]]  # 0.5 -4 1.5, 2 -8
    assert consensus(base, models, elect="weighted", scales=weights) == [-3, -7, 1, 0]
    assert consensus(base, models, elect="unweighted", scales=weights) == [3, 3, 1, 0]
    assert consensus(base, models, elect="unweighted", scales=weights, shares=weights, combine="weight_mean") == [3, 5, 1, 0]
    assert consensus(base, models, combine="max") == [4, 5, 1, 0]
    assert consensus([0.0] * 2, [[-2.0, 1], [2, np.nan], [2, 5]], combine="max")[0] == -2
    assert np.isnan(consensus([0.0] * 2, [[-2.0, 1], [2, np.nan], [2, 5]], combine="max")[1])
    assert consensus([1.0], [[2.0], [4]], combine="weight_mean", shares=[[-1.0, 1]]) == [5]  # shares that cancel count as one


@given(st.data())
@settings(max_examples=40)
def test_kept_magnitude(data: st.DataObject) -> None:
    models = data.draw(st.integers(1, 3))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=models + 1, max_size=models + 1))
    size, seed = data.draw(SIZES), data.draw(st.integers(0, 2**32))
    compute = compute_of(dtypes)
    row = spans(seed, size, dtypes, data.draw(st.sampled_from([0, 0.001])))
    keep = data.draw(keeps(1, models, compute))
    pieces = cut([size], data)
    found = backend.kept_magnitude(Table([row]), keep, pieces)
    apart = [backend.kept_magnitude(Table([row]), keep, np.array([piece])) for piece in pieces.tolist()]
    assert np.concatenate([found[:0], *apart]).tobytes() == found.tobytes()
    with np.errstate(all="ignore"):
        for k, x in enumerate(row[1:]):
            d = difference(row[0], x, compute)
            for number, values in enumerate([d, kept(d, keep, 0, k)]):
                blocks = [np.abs(values[at : at + BLOCK].astype(float)).sum() for at in range(0, size, BLOCK)]
                np.testing.assert_allclose(found[:, k, number], blocks, rtol=1e-12)


@given(st.data())
@settings(max_examples=60)
def test_magnitude_histogram(data: st.DataObject) -> None:
    models = data.draw(st.integers(1, 3))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=models + 1, max_size=models + 1))
    sizes = data.draw(st.lists(SIZES, min_size=1, max_size=2))
    compute, seed = compute_of(dtypes), data.draw(st.integers(0, 2**32))
    rows = [spans(seed + row, size, dtypes, ties=data.draw(st.booleans())) for row, size in enumerate(sizes)]
    wide = data.draw(st.booleans()) and compute == np.float32
    width = 63 if wide or compute == np.float64 else 31
    bins = data.draw(st.sampled_from([1, 7, 2048, 4096, 4097, 100_000]))
    occurring = pattern(np.arange(9, dtype=np.dtype(f"f{(width + 1) // 8}")) / 64)
    shape = (len(rows), models)
    random = np.random.default_rng(seed)
    shift = random.integers(0, width + 1, shape) if data.draw(st.booleans()) else random.integers(0, width - 20, shape)
    low = random.choice([0, 1, 2**width - 1, *occurring, *(occurring + 1)], shape)
    pieces = cut(sizes, data, unit=data.draw(st.sampled_from([5, BLOCK])))
    # a row without elements has no piece, and so no group
    groups = np.arange(len(pieces)) if data.draw(st.booleans()) else np.unique(pieces[:, 0], return_inverse=True)[1]
    found = backend.magnitude_histogram(Table(rows), low, shift, bins, wide, groups, pieces)
    assert (found.shape, str(found.dtype)) == ((len(set(groups.tolist())), models, bins + 2), "int64")
    expected = np.zeros_like(found)
    for group, (row, start, stop) in zip(groups.tolist(), pieces.tolist(), strict=True):
        for k in range(models):
            with np.errstate(all="ignore"):
                d = difference(rows[row][0][start:stop], rows[row][k + 1][start:stop], compute)
            p = pattern(np.abs(d).astype(np.float64) if wide else d) - low[row, k]
            at = p[p >= 0] >> shift[row, k]
            expected[group, k] += [*np.bincount(at[at < bins], minlength=bins), (at >= bins).sum(), (~np.isfinite(d)).sum()]
    np.testing.assert_array_equal(found, expected)


def test_a_histogram_by_hand() -> None:
    base, x = np.zeros(6, np.float32), np.array([1, -1, 2, 3, np.inf, 0.5], np.float32)
    table = Table([[base, x, base]])
    low, shift = np.array([[0x3F800000, 0]]), np.array([[23, 31]])
    assert backend.magnitude_histogram(table, low, shift, 2, False, np.zeros(1, np.intp), table.whole).tolist() == [
        [[2, 2, 1, 1], [6, 0, 0, 0]]
    ]
    halves, together = np.array([[0, 0, 3], [0, 3, 6]]), np.zeros(2, np.intp)
    assert backend.magnitude_histogram(table, low, shift, 2, False, together, halves).tolist() == [[[2, 2, 1, 1], [6, 0, 0, 0]]]


@st.composite
def sliced(draw: st.DrawFn, columns: int) -> tuple[list[list[Array]], Slices, list[int]]:
    """Rows of columns, their slices, and the number of those."""
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=columns, max_size=columns))
    shapes = [(1, 1), (1, 5000), (5000, 1), (3, 4), (40, 33), (33, 700), (1100, 2), (2, 1100), (600, 5), (5, 600), (0, 4)]
    shapes = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=2))
    seed, special = draw(st.integers(0, 2**32)), draw(st.sampled_from([0, 0.01]))
    rows = [spans(seed + row, a * b, dtypes, special) for row, (a, b) in enumerate(shapes)]
    return rows, Slices(np.array([b for _, b in shapes]), draw(st.booleans())), [a for a, _ in shapes]


@given(st.data())
@settings(max_examples=60)
def test_gram_of_slices(data: st.DataObject) -> None:
    models, about = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    rows, slices, counts = data.draw(sliced(models + about))
    table, pieces = Table(rows), cut(counts, data, unit=data.draw(st.sampled_from([1, 7, 512])))
    found = backend.gram_of_slices(table, about, slices, pieces)
    apart = [backend.gram_of_slices(table, about, slices, np.array([piece])) for piece in pieces.tolist()]
    assert np.concatenate([found[:0], *apart]).tobytes() == found.tobytes()
    assert len(found) == sum(counts)
    done = 0
    with np.errstate(all="ignore"):
        for row, count, length in zip(rows, counts, slices.lengths, strict=True):
            values = [each.astype(table.compute) for each in row]
            values = [difference(values[0], x, table.compute) for x in values[1:]] if about else values
            for number in range(count):
                each = np.stack([slice_of(x, length, number, slices.strided) for x in values]).astype(float)
                expected = (each[:, None] * each[None]).sum(axis=2)
                np.testing.assert_allclose(
                    found[done], expected, rtol=1e-9, atol=1e-9 * np.nanmax(np.abs(expected[np.isfinite(expected)]), initial=0)
                )
                done += 1


@given(st.data())
@settings(max_examples=60)
def test_weighted_sum_of_slices(data: st.DataObject) -> None:
    models = data.draw(st.integers(1, 4))
    rows, slices, counts = data.draw(sliced(models))
    inputs = Table(rows)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = random.choice(np.array([0, 0, 1, -1, 0.5, -0.3, 1 / 3], inputs.compute), (sum(counts), models))
    which = data.draw(st.sampled_from([[-1], [models - 1], list(range(-1, models))]))
    references = random.choice(np.array(which), sum(counts))
    chosen = references >= 0
    weights[np.nonzero(chosen)[0], references[chosen]] = random.choice(np.array([np.nan, 7], inputs.compute), chosen.sum())
    in_place = data.draw(st.none() | st.integers(0, models - 1))
    kind = type_of[inputs.dtypes[in_place] if in_place is not None else data.draw(st.sampled_from(DTYPES))]
    expected, at = [], 0
    with np.errstate(all="ignore"):
        for row, count, length in zip(rows, counts, slices.lengths, strict=True):
            result = np.empty(len(row[0]), kind)
            for number in range(count):
                xs = [slice_of(x, length, number, slices.strided).astype(inputs.compute) for x in row]
                ref = xs[references[at]] if references[at] >= 0 else None
                acc = np.full(length, -0.0 if ref is None else 0.0, inputs.compute)
                for k, x in enumerate(xs):
                    if weights[at, k] == 0 or k == references[at]:
                        continue
                    acc += weights[at, k] * x if ref is None else np.where(ref == x, 0, weights[at, k] * (ref - x))
                slice_of(result, length, number, slices.strided)[:] = rounded(acc if ref is None else ref - acc, kind)
                at += 1
            expected.append(result)
    results = [row[in_place] if in_place is not None else np.empty(len(row[0]) + 1, kind)[1:] for row in rows]
    table = Table([[*row, result] for row, result in zip(rows, results, strict=True)])
    pieces = cut(counts, data, unit=data.draw(st.sampled_from([1, 7, 512])))
    flags = np.zeros(len(rows), bool)
    for piece in (pieces[::2], pieces[1::2]):
        flags |= backend.weighted_sum_of_slices(table, weights, references, slices, piece)
    assert [bits(result) for result in results] == [bits(each) for each in expected]
    assert flags.tolist() == [not np.isfinite(each).all() for each in expected]


def test_slices_by_hand() -> None:
    matrix, out = np.arange(6, dtype=np.float32).reshape(2, 3), np.empty((2, 3), np.float32)
    table = Table([[matrix.ravel(), np.ones(6, np.float32)]])
    rows, columns = Slices(np.array([3]), strided=False), Slices(np.array([2]), strided=True)
    assert backend.gram_of_slices(table, False, rows, np.array([[0, 0, 2]]))[:, 0].tolist() == [[5, 3], [50, 12]]
    assert backend.gram_of_slices(table, False, columns, np.array([[0, 1, 3]]))[:, 0].tolist() == [[17, 5], [29, 7]]
    assert backend.gram_of_slices(table, True, columns, np.array([[0, 0, 1]])).tolist() == [[[5]]]
    table = Table([[matrix.ravel(), np.ones(6, np.float32), out.ravel()]])
    weights, references = np.array([[2, 1], [0, 0.5], [1, -1]], np.float32), np.array([-1, 0, -1])
    assert not backend.weighted_sum_of_slices(table, weights, references, columns, np.array([[0, 0, 3]])).any()
    assert out.tolist() == [[1, 1, 1], [7, 2.5, 4]]
    backend.weighted_sum_of_slices(table, weights[:2], references[:2], rows, np.array([[0, 1, 2]]))
    assert out.tolist() == [[1, 1, 1], [2, 2.5, 3]]


@given(st.data())
@settings(max_examples=40)
def test_gram(data: st.DataObject) -> None:
    models, about = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=models + about, max_size=models + about))
    size = data.draw(SIZES)
    row = spans(data.draw(st.integers(0, 2**32)), size, dtypes, 0, ties=False)
    table, pieces = Table([row]), cut([size], data)
    found = backend.gram(table, about, pieces)
    assert found.tobytes() == backend.gram(table, about, table.whole).tobytes()
    values = [x.astype(table.compute) for x in row]
    values = [difference(values[0], x, table.compute) for x in values[1:]] if about else values
    stacked = np.stack(values).astype(float)
    for block, sums in enumerate(found):
        each = stacked[:, block * BLOCK : (block + 1) * BLOCK]
        np.testing.assert_allclose(sums, each @ each.T, rtol=1e-10, atol=1e-10)
    assert len(found) == -(-size // BLOCK)


@pytest.mark.parametrize("about", [False, True])
def test_gram_of_infinities_that_agree(about: Literal[False, True]) -> None:
    table = Table([[np.array([np.inf, 1], np.float32), np.array([np.inf, 3], np.float32)]])
    assert backend.gram(table, about, table.whole)[0, 0, 0] == (4 if about else np.inf)


def test_nothing_to_do() -> None:
    table, none = Table([[np.zeros(0, np.float32)] * 3]), np.zeros((0, 3), np.int64)
    slices, some = Slices(np.array([4]), strided=False), np.zeros((1, 1, 2), np.int64)
    keep = Keep("magnitude", np.zeros((1, 2, 2), np.uint32), np.zeros((1, 2, 2), np.int64), np.zeros((1, 2, 2), np.int64))
    assert backend.gram(table, False, none).shape == (0, 3, 3)
    assert backend.gram_of_slices(table, True, slices, none).shape == (0, 2, 2)
    assert backend.kept_magnitude(table, keep, table.whole).shape == (0, 2, 2)
    assert backend.magnitude_histogram(table, some[..., 0], some[..., 0], 3, False, none[:, 0], none).shape == (0, 2, 5)
