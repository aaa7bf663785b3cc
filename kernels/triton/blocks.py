"""What the Triton kernels share: where a program works, and how a block of a span is read, rounded and checked.

Values are the oracle's bit for bit, in Triton's interpreter and compiled, for which two things are written out:

- a bfloat16 is read and written as its bits (``tl.uint16`` stands for it in ``DTYPES``) and converted by integer
  shifts: the interpreter's own casts truncate, and widen subnormals wrongly (3.9). All other casts are IEEE in both;
- magnitudes are compared as the integers that their bits are, where NaN is the largest: the interpreter's `tl.max`
  skips NaN.

Float32 is divided by `tl.div_rn`: a plain ``/`` is approximate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl


@triton.jit
def _locate(pieces_ptr, piece_of_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return where this program works: its spans' addresses, row, first element, end of its piece, whether all are aligned."""
    program = tl.program_id(0).to(tl.int64)
    piece_ptr = pieces_ptr + (4 + COLUMNS) * tl.load(piece_of_ptr + program).to(tl.int64)
    start = tl.load(piece_ptr + 1) + program * BLOCK
    return piece_ptr + 4, tl.load(piece_ptr), start, tl.load(piece_ptr + 2), tl.load(piece_ptr + 3) != 0


@triton.jit
def _parted(start, stop, aligned, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Return where the whole tiles of a program's block end that are read without a mask, and where the rest does."""
    end = tl.minimum(start + BLOCK, stop)
    whole = tl.where(aligned, (end - start) // TILE * TILE, 0)
    return start + whole, end


@triton.jit
def _pointers(address, start, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Point at the block ``start`` elements behind ``address``. ``FULL`` promises alignment, for 16-byte accesses."""
    first_ptr = (address + start * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if FULL:
        first_ptr = tl.multiple_of(first_ptr, 16)
    return first_ptr + tl.arange(0, BLOCK)


@triton.jit
def _load(address, start, stop, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Read a block, bfloat16 and float16 as float32, without a mask if ``FULL``: it would cost the wide accesses."""
    x_ptr = _pointers(address, start, DTYPE, BLOCK, FULL)
    x = tl.load(x_ptr) if FULL else tl.load(x_ptr, mask=tl.arange(0, BLOCK) < stop - start, other=0)
    return _widen(x, DTYPE)


@triton.jit
def _widen(x, DTYPE: tl.constexpr):
    """Make bfloat16 and float16, as they were read, float32."""
    if tl.uint16 == DTYPE:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif tl.float16 == DTYPE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _difference(x, ref):
    """Subtract a reference. An entry that equals it has the difference zero, also where both are infinite."""
    return tl.where(x == ref, 0.0, x - ref)


@triton.jit
def _odd_float32(x):
    """Round float64 to float32 *to odd* (Boldo and Melquiond, 2008): rounded once more it is as if rounded once."""
    near = x.to(tl.float32)
    back = near.to(tl.float64)
    bits = near.to(tl.uint32, bitcast=True)
    bits = bits - (tl.abs(back) > tl.abs(x)).to(tl.uint32)
    bits = bits | ((back != x) & (x == x)).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """Round to nearest even, once."""
    if x.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        x = _odd_float32(x)
    if tl.uint16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        even = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, even)
        narrow = (even >> 16).to(tl.uint16)
    else:
        narrow = x.to(DTYPE)
    return narrow


@triton.jit
def _magnitude(x):
    """Return the bits of ``|x|``, int32 or int64: in the order of the magnitudes, and those of NaN above infinity's."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def _infinity(x):
    """Return the bits of infinity in the type of ``x``, float32 or float64."""
    return 0x7FF0000000000000 if x.dtype == tl.float64 else 0x7F800000


@triton.jit
def _divide(x, y):
    """Divide, rounded to nearest even."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _largest(x):
    """Return the largest magnitude as bits, int32 or int64: larger than those of infinity if there is a NaN."""
    if x.dtype == tl.float64:
        top = tl.max(x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, axis=0)
    elif x.dtype == tl.float32:
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    else:
        top = tl.max(x.to(tl.uint16, bitcast=True).to(tl.int32) & 0x7FFF, axis=0)
    return top


@triton.jit
def _folded(x, FOLD: tl.constexpr):
    """Add up every ``FOLD`` neighbours, which one thread has read together: no barrier is needed for that."""
    return tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD]), axis=1)


@triton.jit
def _any_nonfinite(x):
    """Tell whether there is a NaN or an infinity in a block as it is written."""
    if x.dtype == tl.float64:
        infinity = 0x7FF0000000000000
    elif x.dtype == tl.float32:
        infinity = 0x7F800000
    elif x.dtype == tl.float16:
        infinity = 0x7C00
    else:
        infinity = 0x7F80
    return _largest(x) >= infinity


@triton.jit
def _count(pattern, nonfinite, inside, window_ptr, counts_ptr, BINS: tl.constexpr):
    """Add a block's patterns to a histogram: BINS bins, what is above them, and what is not finite."""
    bins = (pattern.to(tl.int64) - tl.load(window_ptr)) >> tl.load(window_ptr + 1)
    above = tl.sum((inside & (bins >= BINS)).to(tl.int32), axis=0)
    tl.atomic_add(counts_ptr + bins, 1, mask=inside & (bins >= 0) & (bins < BINS), sem="relaxed")
    if above > 0:
        tl.atomic_add(counts_ptr + BINS, above.to(tl.int64), sem="relaxed")
    if nonfinite > 0:
        tl.atomic_add(counts_ptr + BINS + 1, nonfinite.to(tl.int64), sem="relaxed")
