"""The Triton kernels of slices. A row of a table is a matrix here; its slices are the rows, or (``STRIDED``) the columns.

A program works on tiles of it that are as wide as what lies together in memory. What a slice's sum is does not depend on
where in a tile it comes to lie: the order of a sum is that of a layout, which is the same for all slices of a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment
import triton
import triton.language as tl

from mergekit_cl.kernels.triton.blocks import _difference, _infinity, _magnitude, _narrow, _widen


@triton.jit
def _locate(pieces_ptr, piece_of_ptr, COLUMNS: tl.constexpr):
    """Return the addresses of the spans, the program's number in its piece, and what `launch.run_slices` tells of the piece."""
    program = tl.program_id(0).to(tl.int64)
    piece_ptr = pieces_ptr + (9 + COLUMNS) * tl.load(piece_of_ptr + program).to(tl.int64)
    return (
        piece_ptr + 9, program - tl.load(piece_ptr + 1),
        tl.load(piece_ptr), tl.load(piece_ptr + 2), tl.load(piece_ptr + 3) != 0,
        tl.load(piece_ptr + 4), tl.load(piece_ptr + 5), tl.load(piece_ptr + 6), tl.load(piece_ptr + 7), tl.load(piece_ptr + 8),
    )  # fmt: skip


@triton.jit
def _pointers(
    address, row, column, width, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Point at a tile. ``FULL`` promises that each row of the matrix is aligned, for 16-byte accesses."""
    first_ptr = (address + (row * width + column) * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if FULL:
        first_ptr = tl.multiple_of(first_ptr, 16)
        width = width // 8 * 8  # as it is, but now the compiler sees it: a hint on an argument is lost
    return first_ptr + tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _inside(row, column, last_row, last_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tell what of a tile is in the piece."""
    return (tl.arange(0, ROWS)[:, None] < last_row - row) & (tl.arange(0, COLUMNS)[None, :] < last_column - column)


@triton.jit
def _load(
    address, row, column, last_row, last_column, width,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Read a tile, bfloat16 and float16 as float32, without a mask if ``FULL``: it would cost the wide accesses."""
    x_ptr = _pointers(address, row, column, width, DTYPE, ROWS, COLUMNS, FULL)
    inside = _inside(row, column, last_row, last_column, ROWS, COLUMNS)
    x = tl.load(x_ptr) if FULL else tl.load(x_ptr, mask=inside, other=0)
    return _widen(x, DTYPE)


@triton.jit
def _load_any(
    address, row, column, last_row, last_column, width, full, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Read a tile that may be full. What follows is compiled once, and so sums both kinds in the same order."""
    if full:
        x = _load(address, row, column, last_row, last_column, width, DTYPE, ROWS, COLUMNS, True)
    else:
        x = _load(address, row, column, last_row, last_column, width, DTYPE, ROWS, COLUMNS, False)
    return x


@triton.jit
def _weighted_sum_of_slices_tile(
    spans_ptr, weights_ptr, references_ptr, nonfinite_ptr, row, column, last_row, last_column, width, STRIDED: tl.constexpr,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(DTYPES) - 1
    COMPUTE: tl.constexpr = weights_ptr.dtype.element_ty
    AXIS: tl.constexpr = 0 if STRIDED else 1
    if STRIDED:
        slices = tl.arange(0, COLUMNS)
        present = slices < last_column - column
        slices += column
    else:
        slices = tl.arange(0, ROWS)
        present = slices < last_row - row
        slices += row
    reference = tl.expand_dims(tl.load(references_ptr + slices, mask=present, other=-1), AXIS)
    ref = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for k in tl.static_range(COUNT):
        x = _load(
            tl.load(spans_ptr + k), row, column, last_row, last_column, width, DTYPES[k], ROWS, COLUMNS, FULL
        ).to(COMPUTE)  # fmt: skip
        ref = tl.where(reference == k, x, ref)
    about = reference >= 0
    # From +0 about a reference, which keeps the sign of its zeros; else from -0, to which anything adds itself
    total = tl.zeros([ROWS, COLUMNS], COMPUTE) * tl.where(about, 1.0, -1.0).to(COMPUTE)
    for k in tl.static_range(COUNT):
        x = _load(  # written as a second read, but the compiler merges the two
            tl.load(spans_ptr + k), row, column, last_row, last_column, width, DTYPES[k], ROWS, COLUMNS, FULL
        ).to(COMPUTE)  # fmt: skip
        weight = tl.expand_dims(tl.load(weights_ptr + slices * COUNT + k, mask=present, other=0), AXIS)
        term = tl.where(about, tl.where(ref == x, 0.0, ref - x), x) * weight
        total = tl.where((weight != 0) & (reference != k), total + term, total)
    total = tl.where(about, ref - total, total)
    out = _narrow(total, DTYPES[COUNT])
    out_ptr = _pointers(tl.load(spans_ptr + COUNT), row, column, width, DTYPES[COUNT], ROWS, COLUMNS, FULL)
    if FULL:
        tl.store(out_ptr, out)
    else:
        tl.store(out_ptr, out, mask=_inside(row, column, last_row, last_column, ROWS, COLUMNS))
    wide = _widen(out, DTYPES[COUNT])
    if tl.max(tl.max(_magnitude(wide), axis=1), axis=0) >= _infinity(wide):
        tl.store(nonfinite_ptr, 1)


@triton.jit
def _weighted_sum_of_slices_kernel(
    pieces_ptr, piece_of_ptr, nonfinite_ptr, weights_ptr, references_ptr, STRIDED: tl.constexpr,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    spans_ptr, number, table_row, first, aligned, row, last_row, column, last_column, width = _locate(
        pieces_ptr, piece_of_ptr, len(DTYPES)
    )
    across = tl.cdiv(last_column - column, COLUMNS)
    row += number // across * ROWS
    column += number % across * COLUMNS
    piece_weights_ptr = weights_ptr + first * (len(DTYPES) - 1)
    if aligned & (row + ROWS <= last_row) & (column + COLUMNS <= last_column):
        _weighted_sum_of_slices_tile(
            spans_ptr, piece_weights_ptr, references_ptr + first, nonfinite_ptr + table_row,
            row, column, last_row, last_column, width, STRIDED, DTYPES, ROWS, COLUMNS, True,
        )  # fmt: skip
    else:
        _weighted_sum_of_slices_tile(
            spans_ptr, piece_weights_ptr, references_ptr + first, nonfinite_ptr + table_row,
            row, column, last_row, last_column, width, STRIDED, DTYPES, ROWS, COLUMNS, False,
        )  # fmt: skip


@triton.jit
def _gram_of_slices_kernel(
    pieces_ptr, piece_of_ptr, sums_ptr, COMPUTE: tl.constexpr, ABOUT: tl.constexpr, STRIDED: tl.constexpr,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Sum the pairs (0, 0), (1, 0), (1, 1), (2, 0), ... of columns, walking along the slices that fit a tile."""
    spans_ptr, number, _, first, aligned, row, last_row, column, last_column, width = _locate(
        pieces_ptr, piece_of_ptr, len(DTYPES)
    )
    FIRST: tl.constexpr = 1 if ABOUT else 0
    COUNT: tl.constexpr = len(DTYPES) - FIRST
    SLICES: tl.constexpr = COLUMNS if STRIDED else ROWS
    TOTAL: tl.constexpr = COUNT * (COUNT + 1) // 2
    pair = tl.arange(0, PAIRS)[None, :]
    sums = tl.zeros([SLICES, PAIRS], tl.float64)
    if STRIDED:
        column += number * SLICES
        slices = column + tl.arange(0, SLICES)
        stop = last_column
        length = last_row
    else:
        row += number * SLICES
        slices = row + tl.arange(0, SLICES)
        stop = last_row
        length = last_column
    for at in range(0, length, ROWS if STRIDED else COLUMNS):
        r = at if STRIDED else row
        c = column if STRIDED else at
        full = aligned & (r + ROWS <= last_row) & (c + COLUMNS <= last_column)
        if ABOUT:
            ref = _load_any(
                tl.load(spans_ptr), r, c, last_row, last_column, width, full, DTYPES[0], ROWS, COLUMNS
            ).to(COMPUTE)  # fmt: skip
        columns = ()
        for p in tl.static_range(COUNT):
            x = _load_any(
                tl.load(spans_ptr + FIRST + p), r, c, last_row, last_column, width, full, DTYPES[FIRST + p], ROWS, COLUMNS
            ).to(COMPUTE)  # fmt: skip
            if ABOUT:
                x = _difference(x, ref)
            columns = columns + (x.to(tl.float64),)  # noqa: RUF005 - Triton has no starred expression
            for q in tl.static_range(p + 1):
                product = tl.sum(columns[p] * columns[q], axis=0 if STRIDED else 1)
                sums += tl.where(pair == p * (p + 1) // 2 + q, product[:, None], 0.0)
    sums_ptrs = sums_ptr + (first + slices)[:, None] * TOTAL + pair
    tl.store(sums_ptrs, sums, mask=(slices < stop)[:, None] & (pair < TOTAL))
