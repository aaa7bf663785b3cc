"""The Triton kernels of task vectors: the differences of models from a base. None of them stores one."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment
import triton
import triton.language as tl

from mergekit_cl.kernels.triton.blocks import (
    _count,
    _difference,
    _divide,
    _infinity,
    _load,
    _locate,
    _magnitude,
    _narrow,
    _pointers,
    _widen,
)


@triton.jit
def _task_vector(address, base, start, stop, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Read a block of a model, and subtract the base."""
    return _difference(_load(address, start, stop, DTYPE, BLOCK, FULL).to(base.dtype), base)


@triton.jit
def _hash(start, key, BLOCK: tl.constexpr):
    """Return the hashes (see `Keep`) of a block, uint32 [BLOCK]. ``start`` is a multiple of ``BLOCK``, and that of four."""
    counter = start // 4
    low = counter.to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)  # no carry: BLOCK / 4 is a power of two
    a, b, c, d = tl.philox(key, low, (counter >> 32).to(tl.uint32), 0, 0)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _below(hashes, threshold):
    """Tell which hashes are less than an int64 in [0, 2**32], in 32 bits."""
    return (threshold > 0) & (hashes <= (threshold - 1).to(tl.uint32))


@triton.jit
def _trim(d, keep_ptr, start, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Make the entries of a task vector that are not kept zero. ``keep_ptr``: key, two thresholds, two cuts, all int64."""
    if KEEP == "random":
        d = tl.where(_below(_hash(start, tl.load(keep_ptr), BLOCK), tl.load(keep_ptr + 1)), d, 0.0)
    elif KEEP == "magnitude":
        a = tl.minimum(_magnitude(d), _infinity(d))
        lower, upper = tl.load(keep_ptr + 1), tl.load(keep_ptr + 2)
        from_, to = tl.load(keep_ptr + 3).to(a.dtype), tl.load(keep_ptr + 4).to(a.dtype)
        ties = ((a == from_) & (lower > 0)) | ((a == to) & (upper > 0))
        if tl.max(ties.to(tl.int32), axis=0) > 0:  # most blocks have none: a hash costs more than all else
            hashes = _hash(start, tl.load(keep_ptr), BLOCK)
        else:
            hashes = tl.zeros([BLOCK], tl.uint32)
        above = (a > from_) | ((a == from_) & _below(hashes, lower))
        # A hash that is below the upper threshold drops, one that is not keeps
        d = tl.where(above & ((a < to) | ((a == to) & (_below(hashes, upper) == 0))), d, 0.0)
    return d


@triton.jit
def _task_vector_merge_block(
    spans_ptr, keep_ptr, scales_ptr, votes_ptr, shares_ptr, factor_ptr, nonfinite_ptr, start, stop,
    KEEP: tl.constexpr, ELECT: tl.constexpr, COMBINE: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(DTYPES) - 2
    COMPUTE: tl.constexpr = scales_ptr.dtype.element_ty
    base = _load(tl.load(spans_ptr), start, stop, DTYPES[0], BLOCK, FULL).to(COMPUTE)
    elected = tl.zeros([BLOCK], COMPUTE)
    largest = _magnitude(elected)
    kept = ()
    for k in tl.static_range(COUNT):
        d = _task_vector(tl.load(spans_ptr + 1 + k), base, start, stop, DTYPES[1 + k], BLOCK, FULL)
        largest = tl.maximum(largest, _magnitude(d))
        d = _trim(d, keep_ptr + 5 * k, start, KEEP, BLOCK)
        kept = kept + (d,)  # noqa: RUF005 - Triton has no starred expression
        if ELECT == "weighted":
            elected += tl.load(scales_ptr + k) * d
        elif ELECT == "unweighted":
            elected += tl.load(votes_ptr + k) * d
    total = tl.zeros([BLOCK], COMPUTE)
    divisor = tl.zeros([BLOCK], COMPUTE)
    best = _magnitude(total)
    for k in tl.static_range(COUNT):
        v = tl.load(scales_ptr + k) * kept[k]
        if ELECT is None:
            disagrees = v == 0
        else:
            u = tl.load(votes_ptr + k) * kept[k] if ELECT == "unweighted" else v
            disagrees = tl.where(elected >= 0, u <= 0, u >= 0)
        if COMBINE == "max":  # from +0: one that agrees, but is zero, changes as little
            v = tl.where(disagrees, 0.0, v)
            total = tl.where(_magnitude(v) > best, v, total)
            best = tl.maximum(_magnitude(v), best)
        else:
            total += tl.where(disagrees, 0.0, v)
            if COMBINE == "weight_mean":
                divisor += tl.where(disagrees, 0.0, tl.load(shares_ptr + k))
            elif COMBINE == "count_mean":
                divisor += tl.where(disagrees, 0.0, 1.0)
    if COMBINE == "weight_mean" or COMBINE == "count_mean":
        total = _divide(total, tl.where(divisor == 0, 1.0, divisor))
    change = tl.load(factor_ptr) * total
    merged = tl.where(change == 0, base, base + change)
    out = _narrow(merged, DTYPES[COUNT + 1])
    out_ptr = _pointers(tl.load(spans_ptr + COUNT + 1), start, DTYPES[COUNT + 1], BLOCK, FULL)
    if FULL:
        tl.store(out_ptr, out)
    else:
        tl.store(out_ptr, out, mask=tl.arange(0, BLOCK) < stop - start)
    wide = _widen(out, DTYPES[COUNT + 1]).to(COMPUTE)
    # of a block of which nothing is written, this says nothing: the flag of a row that was missed has to stay
    if (tl.max(tl.maximum(largest, _magnitude(wide)), axis=0) >= _infinity(base)) & (start < stop):
        tl.store(nonfinite_ptr, 1)


@triton.jit
def _task_vector_merge_kernel(
    pieces_ptr, piece_of_ptr, nonfinite_ptr, keep_ptr, scales_ptr, votes_ptr, shares_ptr, factors_ptr,
    KEEP: tl.constexpr, ELECT: tl.constexpr, COMBINE: tl.constexpr, DTYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    first = row * (len(DTYPES) - 2)
    if KEEP == "magnitude":  # nothing is written where a cut has not been found (`MISSED`)
        stop = tl.where((tl.load(nonfinite_ptr + row) & 2) != 0, start, stop)
    if aligned & (start + BLOCK <= stop):
        _task_vector_merge_block(
            spans_ptr, keep_ptr + 5 * first, scales_ptr + first, votes_ptr + first,
            shares_ptr + first, factors_ptr + row, nonfinite_ptr + row, start, stop,
            KEEP, ELECT, COMBINE, DTYPES, BLOCK, True,
        )  # fmt: skip
    else:
        _task_vector_merge_block(
            spans_ptr, keep_ptr + 5 * first, scales_ptr + first, votes_ptr + first,
            shares_ptr + first, factors_ptr + row, nonfinite_ptr + row, start, stop,
            KEEP, ELECT, COMBINE, DTYPES, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _magnitude_histogram_block(
    spans_ptr, windows_ptr, counts_ptr, start, stop, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BINS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, BLOCK) < stop - start
    base = _load(tl.load(spans_ptr), start, stop, DTYPES[0], BLOCK, FULL).to(COMPUTE)
    for k in tl.static_range(len(DTYPES) - 1):
        d = _task_vector(tl.load(spans_ptr + 1 + k), base, start, stop, DTYPES[1 + k], BLOCK, FULL)
        if WIDE:
            d = d.to(tl.float64)
        pattern = tl.minimum(_magnitude(d), _infinity(d))
        nonfinite = tl.sum((pattern == _infinity(d)).to(tl.int32), axis=0)
        _count(pattern, nonfinite, inside, windows_ptr + 2 * k, counts_ptr + k * (BINS + 2), BINS)


@triton.jit
def _magnitude_histogram_kernel(
    pieces_ptr, piece_of_ptr, counts_ptr, groups_ptr, windows_ptr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    COPIES: tl.constexpr, BINS: tl.constexpr, DTYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    COUNT: tl.constexpr = len(DTYPES) - 1
    row_ptr = windows_ptr + row * (2 * COUNT)
    group_ptr = groups_ptr + tl.load(piece_of_ptr + tl.program_id(0))
    copy = tl.load(group_ptr) * COPIES + tl.program_id(0) % COPIES
    histogram_ptr = counts_ptr + copy * (COUNT * (BINS + 2))
    if aligned & (start + BLOCK <= stop):
        _magnitude_histogram_block(
            spans_ptr, row_ptr, histogram_ptr, start, stop, COMPUTE, WIDE, BINS, DTYPES, BLOCK, True
        )  # fmt: skip
    else:
        _magnitude_histogram_block(
            spans_ptr, row_ptr, histogram_ptr, start, stop, COMPUTE, WIDE, BINS, DTYPES, BLOCK, False
        )  # fmt: skip


@triton.jit
def _kept_magnitude_block(
    spans_ptr, keep_ptr, sums_ptr, start, stop, COMPUTE: tl.constexpr, KEEP: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Sum, for each model, all magnitudes and those that are kept over a block, tile by tile."""
    COUNT: tl.constexpr = len(DTYPES) - 1
    place = tl.arange(0, SUMS)
    sums = tl.zeros([SUMS], tl.float64)
    for offset in range(0, BLOCK, TILE):
        tile = start + offset
        if tile < stop:
            base = _load(tl.load(spans_ptr), tile, stop, DTYPES[0], TILE, FULL).to(COMPUTE)
            for k in tl.static_range(COUNT):
                d = _task_vector(tl.load(spans_ptr + 1 + k), base, tile, stop, DTYPES[1 + k], TILE, FULL)
                kept = _trim(d, keep_ptr + 5 * k, tile, KEEP, TILE)
                sums += tl.where(place == 2 * k, tl.sum(tl.abs(d).to(tl.float64), axis=0), 0.0)
                sums += tl.where(place == 2 * k + 1, tl.sum(tl.abs(kept).to(tl.float64), axis=0), 0.0)
    tl.store(sums_ptr + place, sums, mask=place < 2 * COUNT)


@triton.jit
def _kept_magnitude_kernel(
    pieces_ptr, piece_of_ptr, sums_ptr, keep_ptr, COMPUTE: tl.constexpr, KEEP: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    COUNT: tl.constexpr = len(DTYPES) - 1
    row_ptr = keep_ptr + row * (5 * COUNT)
    block_ptr = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * COUNT)
    if aligned & (start + BLOCK <= stop):
        _kept_magnitude_block(spans_ptr, row_ptr, block_ptr, start, stop, COMPUTE, KEEP, DTYPES, BLOCK, TILE, SUMS, True)
    else:
        _kept_magnitude_block(spans_ptr, row_ptr, block_ptr, start, stop, COMPUTE, KEEP, DTYPES, BLOCK, TILE, SUMS, False)
