"""The Triton kernels. A program finds its row, and the addresses of its spans, in tables: one launch for all rows.

A block that is whole and 16-byte aligned is worked on without a mask, which makes every access 16 bytes wide. A mask,
or an unaligned span, would make the compiler read two bytes at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
import triton
import triton.language as tl

from mergekit_cl.kernels.triton.blocks import (
    _any_nonfinite,
    _difference,
    _load,
    _locate,
    _magnitude,
    _narrow,
    _parted,
    _pointers,
)


@triton.jit
def _weighted_sum_block(
    spans_ptr, weights_ptr, nonfinite_ptr, start, stop,
    DTYPES: tl.constexpr, ABOUT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = 1 if ABOUT else 0
    OUT: tl.constexpr = len(DTYPES) - 1
    COMPUTE: tl.constexpr = weights_ptr.dtype.element_ty
    if ABOUT:
        ref = _load(tl.load(spans_ptr), start, stop, DTYPES[0], BLOCK, FULL).to(COMPUTE)
        total = tl.zeros([BLOCK], COMPUTE)  # from +0: keeps the sign of a zero reference
    for k in tl.static_range(OUT - FIRST):
        x = _load(tl.load(spans_ptr + FIRST + k), start, stop, DTYPES[FIRST + k], BLOCK, FULL).to(COMPUTE)
        weight = tl.load(weights_ptr + k)
        if ABOUT:
            # inf - inf is NaN, but models that agree keep what they have
            total += tl.where(ref == x, 0.0, ref - x) * weight
        elif k == 0:
            total = x * weight  # what -0 + x * weight is; tl.full(..., -0.0) makes +0
        else:
            total += x * weight
    if ABOUT:
        total = ref - total
    out = _narrow(total, DTYPES[OUT])
    out_ptr = _pointers(tl.load(spans_ptr + OUT), start, DTYPES[OUT], BLOCK, FULL)
    if FULL:
        tl.store(out_ptr, out)
    else:
        tl.store(out_ptr, out, mask=tl.arange(0, BLOCK) < stop - start)
    if _any_nonfinite(out):
        tl.store(nonfinite_ptr, 1)


@triton.jit
def _weighted_sum_kernel(
    pieces_ptr, piece_of_ptr, nonfinite_ptr, weights_ptr,
    DTYPES: tl.constexpr, ABOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    row_weights_ptr = weights_ptr + row * (len(DTYPES) - (2 if ABOUT else 1))
    if aligned & (start + BLOCK <= stop):
        _weighted_sum_block(spans_ptr, row_weights_ptr, nonfinite_ptr + row, start, stop, DTYPES, ABOUT, BLOCK, True)
    else:
        for part in range(0, BLOCK, BLOCK // 2):  # masks and narrow accesses take more registers
            if start + part < stop:
                _weighted_sum_block(
                    spans_ptr, row_weights_ptr, nonfinite_ptr + row, start + part, stop, DTYPES, ABOUT, BLOCK // 2, False
                )


@triton.jit
def _top(address, start, middle, end, stop, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Return the largest magnitude of a span in a block, whose whole tiles end at ``middle``, as the bits of its float64."""
    most = tl.zeros([TILE], tl.int64 if DTYPE == tl.float64 else tl.int32)
    for tile in range(start, middle, TILE):
        most = tl.maximum(most, _magnitude(_load(address, tile, stop, DTYPE, TILE, True)))
    for tile in range(middle, end, TILE):
        most = tl.maximum(most, _magnitude(_load(address, tile, stop, DTYPE, TILE, False)))
    top = tl.max(most, axis=0)
    if top.dtype == tl.int32:
        top = top.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    return top


@triton.jit
def _largest_magnitude_kernel(
    pieces_ptr, piece_of_ptr, largest_ptr, DTYPES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Find the largest magnitude of each column over a block, tile by tile."""
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    middle, end = _parted(start, stop, aligned, BLOCK, TILE)
    row_largest_ptr = largest_ptr + row * len(DTYPES)
    for k in tl.static_range(len(DTYPES)):
        top = _top(tl.load(spans_ptr + k), start, middle, end, stop, DTYPES[k], TILE)
        # Thousands of programs share a row: look first (past the first-level cache), most have nothing to add
        if top > tl.load(row_largest_ptr + k, cache_modifier=".cg"):
            tl.atomic_max(row_largest_ptr + k, top, sem="relaxed")


@triton.jit
def _dealt(x, FOLD: tl.constexpr):
    """Deal every ``FOLD`` neighbours, which one thread has read together, out to as many tensors."""
    parts = (x,)
    for _ in tl.static_range(FOLD.bit_length() - 1):
        halves = ()
        for n in tl.static_range(len(parts)):
            halves = halves + tl.split(tl.reshape(parts[n], [parts[n].shape[0] // 2, 2]))
        parts = halves
    return parts


@triton.jit
def _add_products(
    lanes, spans_ptr, tile, stop, COMPUTE: tl.constexpr, DTYPES: tl.constexpr, ABOUT: tl.constexpr, TILE: tl.constexpr,
    FOLD: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Add the products of all pairs of columns of a tile, each thread to sums of its own."""
    FIRST: tl.constexpr = 1 if ABOUT else 0
    COUNT: tl.constexpr = len(DTYPES) - FIRST
    if ABOUT:
        ref = _load(tl.load(spans_ptr), tile, stop, DTYPES[0], TILE, FULL).to(COMPUTE)
    columns = ()
    added = ()
    for p in tl.static_range(COUNT):
        x = _load(tl.load(spans_ptr + FIRST + p), tile, stop, DTYPES[FIRST + p], TILE, FULL).to(COMPUTE)
        if ABOUT:
            x = _difference(x, ref)
        columns = columns + _dealt(x.to(tl.float64), FOLD)
        for q in tl.static_range(p + 1):
            total = lanes[p * (p + 1) // 2 + q]
            for n in tl.static_range(FOLD):
                total += columns[p * FOLD + n] * columns[q * FOLD + n]
            added = added + (total,)  # noqa: RUF005 - Triton has no starred expression
    return added


@triton.jit
def _gram_kernel(
    pieces_ptr, piece_of_ptr, sums_ptr, COMPUTE: tl.constexpr, DTYPES: tl.constexpr, ABOUT: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PAIRS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Sum the pairs (0, 0), (1, 0), (1, 1), (2, 0), ... of columns over a block, tile by tile."""
    spans_ptr, _, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    middle, end = _parted(start, stop, aligned, BLOCK, TILE)
    COUNT: tl.constexpr = len(DTYPES) - (1 if ABOUT else 0)
    TOTAL: tl.constexpr = COUNT * (COUNT + 1) // 2
    lanes = ()
    for n in tl.static_range(TOTAL):  # noqa: B007
        lanes = lanes + (tl.zeros([TILE // FOLD], tl.float64),)  # noqa: RUF005
    for tile in range(start, middle, TILE):
        lanes = _add_products(lanes, spans_ptr, tile, stop, COMPUTE, DTYPES, ABOUT, TILE, FOLD, True)
    for tile in range(middle, end, TILE):
        lanes = _add_products(lanes, spans_ptr, tile, stop, COMPUTE, DTYPES, ABOUT, TILE, FOLD, False)
    pair = tl.arange(0, PAIRS)
    sums = tl.zeros([PAIRS], tl.float64)
    for n in tl.static_range(TOTAL):
        sums += tl.where(pair == n, tl.sum(lanes[n], axis=0), 0.0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * TOTAL + pair, sums, mask=pair < TOTAL)
