"""The compiled loops. Helpers and kernels share this file because numba's disk cache sees changes of one file only.

Each kernel walks through its pieces in tiles: a tile of every input is widened into a buffer that stays in the first-level
cache, so that one compiled function serves any number of inputs of any mixture of dtypes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

F = TypeVar("F", bound=Callable[..., Any])

TILE = 2048
"""Elements per tile: three float32 buffers of this size are half of a first-level cache."""

AHEAD = 512
"""Elements of a block that is read while the next one is fetched."""

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = range(4)

u16, u32 = np.uint16, np.uint32


def compiled(function: F) -> F:
    """Compile without the GIL and with IEEE arithmetic; keep the machine code on disk where that is possible."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the source's folder nor the user's cache can be written
        return njit(**options)(function)  # type: ignore[no-any-return]


def _cast(name: str, result: types.Type, argument: types.Type, instruction: Callable[[Any, Any], Any]) -> Any:
    """Make a compiled function of one argument from one LLVM instruction."""

    def typed(typingctx: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return instruction(builder, arguments[0])

        return result(argument), emit

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


_pointer = _cast("_pointer", types.voidptr, types.intp, lambda b, x: b.inttoptr(x, ir.IntType(8).as_pointer()))
_float_of_bits = _cast("_float_of_bits", types.float32, types.uint32, lambda b, x: b.bitcast(x, ir.FloatType()))
_bits_of_float = _cast("_bits_of_float", types.uint32, types.float32, lambda b, x: b.bitcast(x, ir.IntType(32)))
_float_of_half = _cast(
    "_float_of_half", types.float32, types.uint16, lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), ir.FloatType())
)
_half_of_float = _cast(
    "_half_of_float", types.uint16, types.float32, lambda b, x: b.bitcast(b.fptrunc(x, ir.HalfType()), ir.IntType(16))
)


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the line at an address; it need not exist."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(i32, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.none(types.intp), emit


def _to_float32(value: Any) -> Any:
    """Return a value as a float32 that rounds to bfloat16 and float16 as the value itself does."""
    raise NotImplementedError("compiled code only")


@overload(_to_float32)
def _overload_to_float32(value):  # type: ignore[no-untyped-def]
    if value == types.float32:
        return lambda value: value

    def to_odd(value):  # type: ignore[no-untyped-def]  # numba compares its signature with that of the stub
        # Round float64 *to odd* (Boldo and Melquiond, 2008): what is inexact gets an odd last bit
        near = np.float32(value)
        back = np.float64(near)
        bits = _bits_of_float(near)
        if abs(back) > abs(value):
            bits = u32(bits - u32(1))
        if back != value and value == value:
            bits = u32(bits | u32(1))
        return _float_of_bits(bits)

    return to_odd


@njit(inline="always")
def _bfloat16_bits(value: Any) -> Any:
    """Round a float32 to bfloat16, to nearest even."""
    bits = _bits_of_float(value)
    rounded = u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
    if u32(bits & u32(0x7FFFFFFF)) > u32(0x7F800000):  # NaN: keep it one
        rounded = u32(bits | u32(0x400000))
    return u16(u32(rounded >> u32(16)))


@compiled
def _load(address: Any, code: Any, count: Any, out: Any) -> None:
    """Widen ``count`` elements at ``address`` into ``out``."""
    if code == BFLOAT16:
        bits = carray(_pointer(address), count, np.uint16)
        for i in range(count):
            out[i] = _float_of_bits(u32(u32(bits[i]) << u32(16)))
    elif code == FLOAT16:
        halves = carray(_pointer(address), count, np.uint16)
        for i in range(count):
            out[i] = _float_of_half(halves[i])
    elif code == FLOAT32:
        singles = carray(_pointer(address), count, np.float32)
        for i in range(count):
            out[i] = singles[i]
    else:
        doubles = carray(_pointer(address), count, np.float64)
        for i in range(count):
            out[i] = doubles[i]


@compiled
def _store(values: Any, address: Any, code: Any, count: Any) -> bool:
    """Round ``values`` once, to nearest even, and write them to ``address``; return whether one is not finite."""
    top = u32(0)
    if code == BFLOAT16:
        bits = carray(_pointer(address), count, np.uint16)
        for i in range(count):
            rounded = _bfloat16_bits(_to_float32(values[i]))
            bits[i] = rounded
            top = max(top, u32(u32(rounded) & u32(0x7FFF)))
        return bool(top >= u32(0x7F80))
    if code == FLOAT16:
        halves = carray(_pointer(address), count, np.uint16)
        for i in range(count):
            half = _half_of_float(_to_float32(values[i]))
            halves[i] = half
            top = max(top, u32(u32(half) & u32(0x7FFF)))
        return bool(top >= u32(0x7C00))
    if code == FLOAT32:
        singles = carray(_pointer(address), count, np.float32)
        for i in range(count):
            single = np.float32(values[i])
            singles[i] = single
            top = max(top, u32(_bits_of_float(single) & u32(0x7FFFFFFF)))
        return bool(top >= u32(0x7F800000))
    doubles = carray(_pointer(address), count, np.float64)
    bad = 0
    for i in range(count):
        double = np.float64(values[i])
        doubles[i] = double
        bad += not abs(double) < np.inf
    return bad > 0


@compiled
def weighted_sum(addresses: Any, codes: Any, weights: Any, about: Any, pieces: Any, scratch: Any, nonfinite: Any) -> None:
    """Compute the pieces of a table; ``scratch`` is [3, TILE] in the compute type. Sets ``nonfinite[row]``."""
    ref, acc, x = scratch[0], scratch[1], scratch[2]
    terms, first = weights.shape[1], 1 if about else 0
    for piece in range(len(pieces)):
        row, begin, stop = pieces[piece]
        while begin < stop:
            count = min(TILE, stop - begin)
            if about:
                _load(addresses[row, 0] + begin * _SIZES[codes[0]], codes[0], count, ref)
                acc[:count] = 0.0
            else:
                acc[:count] = -0.0  # -0 + x is x, also for x = -0
            for k in range(terms):
                column = first + k
                weight = weights[row, k]
                _load(addresses[row, column] + begin * _SIZES[codes[column]], codes[column], count, x)
                if about:
                    for i in range(count):
                        difference = ref[i] - x[i]
                        acc[i] += weight * (difference if ref[i] != x[i] else x.dtype.type(0))
                else:
                    for i in range(count):
                        acc[i] += weight * x[i]
            if about:
                for i in range(count):
                    acc[i] = ref[i] - acc[i]
            out = first + terms
            if _store(acc, addresses[row, out] + begin * _SIZES[codes[out]], codes[out], count):
                nonfinite[row] = True
            begin += count


@compiled
def _top(bits: Any, address: Any, mask: Any) -> Any:
    """Find the largest of integers after masking: of floats without their sign it is that of the largest magnitude."""
    top = bits.dtype.type(0)
    size, at = bits.itemsize, 0
    while at + AHEAD <= len(bits):
        for line in range(AHEAD * size, 2 * AHEAD * size, 64):
            _prefetch(address + at * size + line)
        for i in range(at, at + AHEAD):
            top = max(top, bits.dtype.type(mask & bits[i]))  # numba would widen to 64 bits
        at += AHEAD
    for i in range(at, len(bits)):
        top = max(top, bits.dtype.type(mask & bits[i]))
    return top


@compiled
def largest_magnitude(addresses: Any, codes: Any, pieces: Any, largest: Any) -> None:
    """Find the largest magnitude in each column of the pieces; the bits of NaN are above those of every number."""
    one = np.empty(1, np.float64)
    for piece in range(len(pieces)):
        row, begin, stop = pieces[piece]
        count = stop - begin
        for column in range(len(codes)):
            code = codes[column]
            address = addresses[row, column] + begin * _SIZES[code]
            if code == BFLOAT16:
                one[0] = _float_of_bits(
                    u32(u32(_top(carray(_pointer(address), count, np.uint16), address, u16(0x7FFF))) << u32(16))
                )
            elif code == FLOAT16:
                one[0] = _float_of_half(_top(carray(_pointer(address), count, np.uint16), address, u16(0x7FFF)))
            elif code == FLOAT32:
                one[0] = _float_of_bits(_top(carray(_pointer(address), count, np.uint32), address, u32(0x7FFFFFFF)))
            else:
                one.view(np.uint64)[0] = _top(
                    carray(_pointer(address), count, np.uint64), address, np.uint64(0x7FFFFFFFFFFFFFFF)
                )
            if not largest[row, column] >= one[0]:
                largest[row, column] = one[0]


@compiled
def gram(addresses: Any, codes: Any, about: Any, pieces: Any, block: Any, scratch: Any, sums: Any) -> None:
    """Sum the products of all pairs of columns over each block, in float64."""
    done = 0
    first = 1 if about else 0
    count = sums.shape[1]
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        for base in range(start, stop, block):
            begin = base
            while begin < min(base + block, stop):
                size = min(TILE, min(base + block, stop) - begin)
                for column in range(len(codes)):
                    _load(addresses[row, column] + begin * _SIZES[codes[column]], codes[column], size, scratch[column])
                if about:
                    for k in range(count):
                        for i in range(size):
                            scratch[k + 1, i] -= scratch[0, i]
                for p in range(count):
                    for q in range(p + 1):
                        dot = 0.0
                        for i in range(size):
                            dot += np.float64(scratch[first + p, i]) * np.float64(scratch[first + q, i])
                        sums[done, p, q] += dot
                begin += size
            for p in range(count):
                for q in range(p):
                    sums[done, q, p] = sums[done, p, q]
            done += 1


_SIZES = np.array([2, 2, 4, 8])
