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

SMALL = 1024
"""Elements per tile where a buffer is kept for every model: a tile of four models and their base is 20 KiB."""

COLUMNS = 512
"""Strided slices that are summed side by side: their sums stay in the first-level cache too."""

MANY_TIES = 8
"""A tile is hashed as a whole if more than one in so many of its entries need a hash."""

WAYS, FEW_BINS = 4, 4096
"""Copies of a histogram of few bins. Its entries often fall in one bin, and an increment waits for the one before."""

WORD = 64
"""Entries that are marked by the bits of one integer."""

LANES = 32
"""Independent sums of a dot product."""

AHEAD = 512
"""Elements of a block that is read while the next one is fetched."""

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = range(4)

KEEP_ALL, KEEP_RANDOM, KEEP_MAGNITUDE = range(3)

SUM, MEAN, MAX = range(3)

u16, u32, u64 = np.uint16, np.uint32, np.uint64


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
def _pattern(typingctx: Any, value: Any, like: Any) -> Any:
    """Return the bits of a float's magnitude as an unsigned integer of the width of ``like``; NaN counts as infinity."""
    bits, infinity = (32, 0x7F800000) if like == types.uint32 else (64, 0x7FF0000000000000)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.IntType(bits)
        top = ir.Constant(kind, infinity)
        wide = builder.fpext(arguments[0], ir.DoubleType()) if bits == 64 and value == types.float32 else arguments[0]
        magnitude = builder.and_(builder.bitcast(wide, kind), ir.Constant(kind, 2 ** (bits - 1) - 1))
        return builder.select(builder.icmp_unsigned("<", magnitude, top), magnitude, top)

    return like(value, like), emit


_trailing_zeros = _cast("_trailing_zeros", types.uint64, types.uint64, lambda b, x: b.cttz(x, ir.Constant(ir.IntType(1), 0)))
_ones = _cast("_ones", types.uint64, types.uint64, lambda b, x: b.ctpop(x))


@intrinsic
def _wide(typingctx: Any) -> Any:
    """Let this function use all of a vector register: LLVM keeps to half of it on processors with AVX-512."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add() knows no such attribute
        return context.get_dummy_value()

    return types.none(), emit


@intrinsic
def _borrowed(typingctx: Any, array: Any) -> Any:
    """Return an array without its reference count: counting the views of every tile would take a third of the time."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(array)(context, builder, arguments[0])
        view.meminfo = ir.Constant(view.meminfo.type, None)
        return view._getvalue()

    return array(array), emit


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the line at an address; it need not exist."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_prefetch(builder, builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.none(types.intp), emit


def _emit_prefetch(builder: Any, where: Any) -> None:
    i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(i32, value) for value in (0, 3, 1))
    builder.call(function, [builder.bitcast(where, pointer), read, keep, data])


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
    _wide()
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
    _wide()
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
def _ask(addresses: Any, codes: Any, row: Any, column: Any, begin: Any, count: Any, following: Any) -> Any:
    """Return the address of element ``begin`` of a column, and ask for ``count`` elements from ``following`` on."""
    size = _SIZES[codes[column]]
    address = addresses[row, column]
    for line in range(following * size, (following + count) * size, 64):
        _prefetch(address + line)
    return address + begin * size


@compiled
def _read(addresses: Any, codes: Any, row: Any, column: Any, begin: Any, count: Any, following: Any, out: Any) -> None:
    """Widen ``count`` elements of a column from ``begin`` on into ``out``, and ask for those from ``following`` on."""
    _load(_ask(addresses, codes, row, column, begin, count, following), codes[column], count, out)


@compiled
def _words(count: Any) -> Any:
    return (count + WORD - 1) // WORD


@compiled
def _read_words(addresses: Any, codes: Any, row: Any, column: Any, begin: Any, count: Any, out: Any) -> None:
    """Read a tile, and fill the rest of its last word with zeros."""
    _read(addresses, codes, row, column, begin, count, begin + count, out)
    out[count : _words(count) * WORD] = 0.0


class _Lanes:
    """Code for vectors of the patterns of task vectors, in loops over words of WORD entries."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, kind: types.Integer) -> None:
        self.context, self.builder = context, builder
        self.types, self.arguments = signature.args, arguments
        self.width = 512 // kind.bitwidth
        self.pattern = ir.VectorType(ir.IntType(kind.bitwidth), self.width)
        self.double = kind.bitwidth == 64

    def constant(self, value: int) -> Any:
        return ir.Constant(self.pattern, [value] * self.width)

    def spread(self, number: int) -> Any:
        """Put an argument in every lane."""
        one = self.builder.insert_element(ir.Constant(self.pattern, ir.Undefined), self.arguments[number], _lane(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.width), [0] * self.width)
        return self.builder.shuffle_vector(one, one, lanes)

    def at(self, number: int, index: Any, element: Any, count: int) -> Any:
        """Point to a vector in an array that is an argument."""
        data = self.context.make_array(self.types[number])(self.context, self.builder, self.arguments[number]).data
        start = self.builder.bitcast(data, element.as_pointer())
        vector = ir.VectorType(element, count) if count > 1 else element
        return self.builder.bitcast(self.builder.gep(start, [index]), vector.as_pointer())

    def floats(self, number: int, index: Any) -> Any:
        """Read a vector of floats, also from the bits of bfloat16."""
        kind, builder = self.types[number].dtype, self.builder
        if kind == types.uint16:
            half = builder.load(self.at(number, index, ir.IntType(16), self.width), align=2)
            i32 = ir.VectorType(ir.IntType(32), self.width)
            shifted = builder.shl(builder.zext(half, i32), ir.Constant(i32, [16] * self.width))
            return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), self.width))
        element = ir.FloatType() if kind == types.float32 else ir.DoubleType()
        return builder.load(self.at(number, index, element, self.width), align=kind.bitwidth // 8)

    def difference(self, index: Any) -> tuple[Any, Any]:
        """Subtract argument 1 from argument 0; return the difference, and the pattern of its magnitude."""
        builder = self.builder
        x, ref = self.floats(0, index), self.floats(1, index)
        x = builder.fpext(x, ref.type) if x.type != ref.type else x
        zero = ir.Constant(x.type, [0.0] * self.width)
        difference = builder.select(builder.fcmp_unordered("!=", x, ref), builder.fsub(x, ref), zero)
        wide = difference
        if self.double and x.type.element == ir.FloatType():
            wide = builder.fpext(difference, ir.VectorType(ir.DoubleType(), self.width))
        bits = 64 if self.double else 32
        top = self.constant(0x7FF0000000000000 if self.double else 0x7F800000)
        magnitude = builder.and_(builder.bitcast(wide, self.pattern), self.constant(2 ** (bits - 1) - 1))
        return difference, builder.select(builder.icmp_unsigned("<", magnitude, top), magnitude, top)

    def mark(self, number: int, index: Any, condition: Any) -> None:
        """Write a bit for each lane."""
        bits = ir.IntType(self.width)
        where = self.at(number, self.builder.udiv(index, ir.Constant(index.type, self.width)), bits, 1)
        self.builder.store(self.builder.bitcast(condition, bits), where, align=self.width // 8)

    def loop(self, words: Any, body: Callable[[Any], Any]) -> Any:
        """Emit a loop over words of entries (at least one) whose ``body`` returns patterns; return the largest.

        It asks for the following tile of argument 0, line by line: all lines together would have to wait for each other.
        """
        builder, i64 = self.builder, ir.IntType(64)
        before, inner, after = builder.block, builder.append_basic_block("lanes"), builder.append_basic_block("done")
        end = builder.mul(words, ir.Constant(i64, WORD))
        builder.branch(inner)
        builder.position_at_end(inner)
        index, largest = builder.phi(i64), builder.phi(self.pattern)
        index.add_incoming(ir.Constant(i64, 0), before)
        largest.add_incoming(self.constant(0), before)
        top = largest
        entry = ir.IntType(self.types[0].dtype.bitwidth)
        for line in range(0, WORD, 512 // entry.width):
            _emit_prefetch(builder, self.at(0, builder.add(index, ir.Constant(i64, SMALL + line)), entry, 1))
        for part in range(WORD // self.width):
            pattern = body(builder.add(index, ir.Constant(i64, part * self.width)))
            top = builder.select(builder.icmp_unsigned(">", pattern, top), pattern, top)
        following = builder.add(index, ir.Constant(i64, WORD))
        index.add_incoming(following, inner)
        largest.add_incoming(top, inner)
        builder.cbranch(builder.icmp_signed("<", following, end), inner, after)
        builder.position_at_end(after)
        name = f"llvm.vector.reduce.umax.v{self.width}i{self.pattern.element.width}"
        kind = ir.FunctionType(self.pattern.element, [self.pattern])
        return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [top])


def _lane(number: int) -> Any:
    return ir.Constant(ir.IntType(32), number)


@intrinsic
def _place_lanes(
    typingctx: Any, x: Any, ref: Any, low: Any, span: Any, words: Any, offsets: Any, reached: Any, inside: Any
) -> Any:
    """Do the work of `_place`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _Lanes(context, builder, signature, arguments, low)
        lowest, size = lanes.spread(2), lanes.spread(3)

        def body(index: Any) -> Any:
            pattern = lanes.difference(index)[1]
            offset = builder.sub(pattern, lowest)
            builder.store(offset, lanes.at(5, index, lanes.pattern.element, lanes.width), align=low.bitwidth // 8)
            reaches = builder.icmp_unsigned(">=", pattern, lowest)
            lanes.mark(6, index, reaches)
            lanes.mark(7, index, builder.and_(reaches, builder.icmp_unsigned("<", offset, size)))
            return pattern

        return lanes.loop(arguments[4], body)

    return low(x, ref, low, low, types.intp, offsets, reached, inside), emit


@intrinsic
def _trim_lanes(
    typingctx: Any, x: Any, ref: Any, low: Any, span: Any, one: Any, two: Any, words: Any, vector: Any, marks: Any
) -> Any:
    """Do the work of `_trim`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _Lanes(context, builder, signature, arguments, low)
        lowest, size, first, second = (lanes.spread(number) for number in range(2, 6))

        def body(index: Any) -> Any:
            difference, pattern = lanes.difference(index)
            kept = builder.icmp_unsigned("<=", builder.sub(pattern, lowest), size)
            out = builder.select(kept, difference, ir.Constant(difference.type, [0.0] * lanes.width))
            where = lanes.at(7, index, difference.type.element, lanes.width)
            builder.store(out, where, align=low.bitwidth // 8)
            tie = builder.or_(builder.icmp_unsigned("==", pattern, first), builder.icmp_unsigned("==", pattern, second))
            lanes.mark(8, index, tie)
            return pattern

        return lanes.loop(arguments[6], body)

    return low(x, ref, low, low, low, low, types.intp, vector, marks), emit


@intrinsic
def _infinity(typingctx: Any, like: Any) -> Any:
    """Return the pattern of infinity."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(like.bitwidth), 0x7F800000 if like == types.uint32 else 0x7FF0000000000000)

    return like(like), emit


@intrinsic
def _dot_lanes(typingctx: Any, x: Any, y: Any, count: Any) -> Any:
    """Sum the products of the first ``count`` (a multiple of LANES, not 0) elements of two float64 arrays.

    Four vectors of sums, because the next addition to a vector waits for the one before; numba would keep them in memory.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64, double, width = ir.IntType(64), ir.DoubleType(), LANES // 4
        vector = ir.VectorType(double, width)
        left, right = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        )
        before, body, after = builder.block, builder.append_basic_block("dot"), builder.append_basic_block("dotted")
        builder.branch(body)
        builder.position_at_end(body)
        at = builder.phi(i64)
        sums = [builder.phi(vector) for _ in range(4)]
        at.add_incoming(ir.Constant(i64, 0), before)
        added = []
        for number, each in enumerate(sums):
            each.add_incoming(ir.Constant(vector, [0.0] * width), before)
            where = builder.add(at, ir.Constant(i64, number * width))
            a, b = (
                builder.load(builder.bitcast(builder.gep(data, [where]), vector.as_pointer()), align=8)
                for data in (left, right)
            )
            added.append(builder.fadd(each, builder.fmul(a, b)))
            each.add_incoming(added[-1], body)
        following = builder.add(at, ir.Constant(i64, LANES))
        at.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, arguments[2]), body, after)
        builder.position_at_end(after)
        four = builder.fadd(builder.fadd(added[0], added[1]), builder.fadd(added[2], added[3]))
        total = builder.extract_element(four, ir.Constant(ir.IntType(32), 0))
        for lane in range(1, width):
            total = builder.fadd(total, builder.extract_element(four, ir.Constant(ir.IntType(32), lane)))
        return total

    return types.float64(x, y, types.intp), emit


@compiled
def _dot(x: Any, y: Any, count: Any) -> float:
    """Sum the products of two float64 tiles in an order that depends on their length alone."""
    _wide()
    whole = count - count % LANES
    total = _dot_lanes(x, y, whole) if whole else 0.0
    for i in range(whole, count):
        total += x[i] * y[i]
    return total


@compiled
def _widen(x: Any, count: Any, out: Any) -> None:
    _wide()
    for i in range(count):
        out[i] = x[i]


@compiled
def _widen_difference(x: Any, ref: Any, count: Any, out: Any) -> None:
    _wide()
    for i in range(count):
        difference = x[i] - ref[i]
        out[i] = difference if x[i] != ref[i] else x.dtype.type(0)


@compiled
def _read_vectors(
    addresses: Any, codes: Any, row: Any, begin: Any, count: Any, following: Any, about: Any, scratch: Any, vectors: Any
) -> None:
    """Read ``count`` elements of every column, about a reference or not, into ``vectors``, float64 [K, SMALL]."""
    ref, x = scratch[0], scratch[1]
    if about:
        _read(addresses, codes, row, 0, begin, count, following, ref)
    for k in range(len(vectors)):
        _read(addresses, codes, row, k + (1 if about else 0), begin, count, following, x)
        if about:
            _widen_difference(x, ref, count, vectors[k])
        else:
            _widen(x, count, vectors[k])


@compiled
def _gram_of_span(
    addresses: Any, codes: Any, row: Any, start: Any, stop: Any, about: Any, scratch: Any, vectors: Any, sums: Any
) -> None:
    """Write the sums of a contiguous part of a row."""
    models = len(sums)
    sums[:] = 0.0
    for begin in range(start, stop, SMALL):
        count = min(SMALL, stop - begin)
        _read_vectors(addresses, codes, row, begin, count, begin + count, about, scratch, vectors)
        for p in range(models):
            for q in range(p + 1):
                sums[p, q] += _dot(vectors[p], vectors[q], count)
    for p in range(models):
        for q in range(p):
            sums[q, p] = sums[p, q]


@compiled
def gram(addresses: Any, codes: Any, about: Any, pieces: Any, block: Any, scratch: Any, vectors: Any, sums: Any) -> None:
    """Sum the products of all pairs of columns over each block, in float64."""
    addresses, codes, scratch, vectors, sums = (
        _borrowed(addresses),
        _borrowed(codes),
        _borrowed(scratch),
        _borrowed(vectors),
        _borrowed(sums),
    )
    done = 0
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        for begin in range(start, stop, block):
            end = min(begin + block, stop)
            _gram_of_span(addresses, codes, row, begin, end, about, scratch, vectors, sums[done])
            done += 1


@compiled
def gram_of_slices(
    addresses: Any, codes: Any, about: Any, lengths: Any, counts: Any, strided: Any, pieces: Any, scratch: Any, vectors: Any,
    columns: Any, sums: Any,
) -> None:  # fmt: skip
    """Sum the products of all pairs of columns over each slice; ``columns`` is float64 [K * (K + 1) // 2, COLUMNS]."""
    addresses, codes, scratch, vectors, columns, sums = (
        _borrowed(addresses),
        _borrowed(codes),
        _borrowed(scratch),
        _borrowed(vectors),
        _borrowed(columns),
        _borrowed(sums),
    )
    done = 0
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        length, count = lengths[row], counts[row]
        if _across(length, count, strided):
            for first in range(start, stop, COLUMNS):
                last = min(first + COLUMNS, stop)
                _gram_of_columns(
                    addresses, codes, row, first, last, length, count, about, scratch, vectors, columns, sums[done:]
                )
                done += last - first
        else:
            for number in range(start, stop):
                begin = number * length
                _gram_of_span(addresses, codes, row, begin, begin + length, about, scratch, vectors, sums[done])
                done += 1


@compiled
def _across(length: Any, count: Any, strided: Any) -> bool:
    """Whether to sum many slices side by side. Where that makes no difference to what is read, the longer loop is inside."""
    return bool(length == 1 or (strided and count > 1))


@compiled
def _gram_of_columns(
    addresses: Any, codes: Any, row: Any, start: Any, stop: Any, length: Any, count: Any, about: Any, scratch: Any,
    vectors: Any, columns: Any, sums: Any,
) -> None:  # fmt: skip
    """Write the sums of at most COLUMNS neighbouring strided slices."""
    models, width = len(vectors), stop - start
    columns[:] = 0.0
    together = SMALL // width if width == count else 1  # few slices: several elements of each are one tile
    for at in range(0, length, together):
        size = min(together, length - at) * width
        begin = at * count + start
        _read_vectors(addresses, codes, row, begin, size, begin + together * count, about, scratch, vectors)
        pair = 0
        for p in range(models):
            for q in range(p + 1):
                for one in range(0, size, width):
                    _add_products(vectors[p], vectors[q], one, width, columns[pair])
                pair += 1
    pair = 0
    for p in range(models):
        for q in range(p + 1):
            for number in range(width):
                sums[number, p, q] = columns[pair, number]
                sums[number, q, p] = columns[pair, number]
            pair += 1


@compiled
def _add_products(x: Any, y: Any, begin: Any, count: Any, sums: Any) -> None:
    _wide()
    x, y = x[begin : begin + count], y[begin : begin + count]  # numba looks for negative indices in begin + i
    for i in range(count):
        sums[i] += x[i] * y[i]


@compiled
def weighted_sum_of_slices(
    addresses: Any, codes: Any, weights: Any, references: Any, first: Any, lengths: Any, counts: Any, strided: Any, pieces: Any,
    scratch: Any, spread: Any, about: Any, nonfinite: Any,
) -> None:  # fmt: skip
    """Compute slices; ``scratch`` is [K + 3, SMALL] and ``spread`` [K, SMALL] in the compute type, ``about`` int64 [SMALL]."""
    addresses, codes, scratch, spread, about = (
        _borrowed(addresses),
        _borrowed(codes),
        _borrowed(scratch),
        _borrowed(spread),
        _borrowed(about),
    )
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        length, count = lengths[row], counts[row]
        bad = False
        if _across(length, count, strided):
            for one in range(start, stop, COLUMNS):
                width = min(COLUMNS, stop - one)
                together = min(length, SMALL // width) if width == count else 1
                for begin in range(0, together * width, width):
                    for i in range(width):
                        number = first[row] + one + i
                        about[begin + i] = references[number]
                        for k in range(len(spread)):
                            spread[k, begin + i] = weights[number, k]
                kind = _kind(about, together * width)
                for at in range(0, length, together):
                    size = min(together, length - at) * width
                    begin = at * count + one
                    following = begin + together * count
                    bad |= _sum_tile(addresses, codes, row, begin, size, following, kind, about, spread, scratch)
        else:
            together = max(1, SMALL // length)
            for one in range(start, stop, together):
                some = min(together, stop - one)
                for i in range(some):
                    number = first[row] + one + i
                    begin, end = i * length, min((i + 1) * length, SMALL)
                    about[begin:end] = references[number]
                    for k in range(len(spread)):
                        spread[k, begin:end] = weights[number, k]
                kind = _kind(about, min(some * length, SMALL))
                for begin in range(one * length, (one + some) * length, SMALL):
                    size = min(SMALL, (one + some) * length - begin)
                    bad |= _sum_tile(addresses, codes, row, begin, size, begin + size, kind, about, spread, scratch)
        if bad:
            nonfinite[row] = True


@compiled
def _kind(about: Any, count: Any) -> int:
    """Return the reference of a tile, or -1 where it has none, or -2 where they differ."""
    _wide()
    differ = 0
    for i in range(count):
        differ |= about[i] ^ about[0]
    return int(-2 if differ else about[0])


@compiled
def _sum_tile(
    addresses: Any,
    codes: Any,
    row: Any,
    begin: Any,
    count: Any,
    following: Any,
    kind: Any,
    about: Any,
    spread: Any,
    scratch: Any,
) -> bool:
    """Compute and write a tile; return whether a result is not finite."""
    terms = len(spread)
    ref, acc, plain = scratch[terms], scratch[terms + 1], scratch[terms + 2]
    for k in range(terms):
        _read(addresses, codes, row, k, begin, count, following, scratch[k])
    if kind >= 0:
        _sum_about(scratch, scratch[kind], spread, count, acc)
    elif kind == -1:
        _sum_plain(scratch, spread, count, acc)
    else:
        for k in range(terms):
            _where(about, k, scratch[k], count, ref)
        _sum_about(scratch, ref, spread, count, acc)
        _sum_plain(scratch, spread, count, plain)
        _where(about, -1, plain, count, acc)
    return bool(_store(acc[:count], addresses[row, terms] + begin * _SIZES[codes[terms]], codes[terms], count))


@compiled
def _where(about: Any, reference: Any, values: Any, count: Any, out: Any) -> None:
    """Take ``values`` where the reference is this one."""
    _wide()
    for i in range(count):
        out[i] = values[i] if about[i] == reference else out[i]


@compiled
def _sum_about(inputs: Any, ref: Any, weights: Any, count: Any, acc: Any) -> None:
    acc[:count] = 0.0
    for k in range(len(weights)):
        _add_about(inputs[k], ref, weights[k], count, acc)
    for i in range(count):
        acc[i] = ref[i] - acc[i]


@compiled
def _add_about(x: Any, ref: Any, weight: Any, count: Any, acc: Any) -> None:
    _wide()
    zero = acc.dtype.type(0)
    for i in range(count):
        term = weight[i] * (ref[i] - x[i])
        term = term if ref[i] != x[i] else zero
        acc[i] += term if weight[i] != zero else zero


@compiled
def _sum_plain(inputs: Any, weights: Any, count: Any, acc: Any) -> None:
    acc[:count] = -0.0  # -0 + x is x, also for x = -0
    for k in range(len(weights)):
        _add_plain(inputs[k], weights[k], count, acc)


@compiled
def _add_plain(x: Any, weight: Any, count: Any, acc: Any) -> None:
    _wide()
    nothing = acc.dtype.type(-0.0)
    for i in range(count):
        term = weight[i] * x[i]
        acc[i] += term if weight[i] != nothing else nothing


@njit(inline="always")
def _philox(low: Any, high: Any, key: Any) -> Any:
    """Return the words of Philox-4x32-10 for a counter of two words, as two pairs, each a uint64."""
    mask = u64(0xFFFFFFFF)
    a, b, c, d = low, high, u64(0), u64(0)
    key0, key1 = u64(key[0]), u64(key[1])
    for _ in range(10):
        one, two = u64(u64(0xD2511F53) * a), u64(u64(0xCD9E8D57) * c)
        a, b = u64(u64(u64(two >> u64(32)) ^ b) ^ key0), u64(two & mask)
        c, d = u64(u64(u64(one >> u64(32)) ^ d) ^ key1), u64(one & mask)
        key0, key1 = u64(u64(key0 + u64(0x9E3779B9)) & mask), u64(u64(key1 + u64(0xBB67AE85)) & mask)
    return u64(a | u64(b << u64(32))), u64(c | u64(d << u64(32)))


@compiled
def _hash(first: Any, key: Any, count: Any, out: Any) -> None:
    """Write the hashes of elements from ``first``, a multiple of 4, on, two in each uint64."""
    _wide()
    low, high = u64(u64(first // 4) & u64(0xFFFFFFFF)), u64(u64(first // 4) >> u64(32))
    for i in range((count + 3) // 4):
        out[2 * i], out[2 * i + 1] = _philox(u64(low + u64(i)), high, key)


@compiled
def _task_vector(
    addresses: Any, codes: Any, row: Any, column: Any, begin: Any, count: Any, ref: Any, kind: Any, edges: Any, limits: Any,
    key: Any, hashes: Any, marks: Any, found: Any, vector: Any,
) -> Any:  # fmt: skip
    """Make a tile of a task vector, what is not kept zero; return the largest pattern, also of what is not kept.

    ``edges`` and ``limits`` are explained in the package.
    """
    low, span, one, two = edges[0], edges[1], edges[2], edges[3]
    words = _words(count)
    if codes[column] == BFLOAT16 and count == words * WORD:
        raw = carray(_pointer(addresses[row, column] + 2 * begin), count, np.uint16)
        top = _trim(raw, ref, low, span, one, two, words, vector, marks)
    else:
        _read_words(addresses, codes, row, column, begin, count, vector)
        top = _trim(vector, ref, low, span, one, two, words, vector, marks)
    if kind == KEEP_RANDOM:
        if limits[0]:
            _hash(begin, key, count, hashes)
            _drop_at_random(vector, limits[0], hashes.view(np.uint32), count)
    elif kind == KEEP_MAGNITUDE:
        ties = _count_bits(marks, words)
        if ties > count // MANY_TIES:
            _hash(begin, key, count, hashes)
            _break_ties(vector, edges, limits, hashes.view(np.uint32), count)
        elif ties:
            _find(marks, words, found)
            _hash_some(begin, key, found, ties, hashes.view(np.uint32))
            _break_few_ties(vector, edges, limits, hashes.view(np.uint32), found, ties)
    return top


@compiled
def _trim(x: Any, ref: Any, low: Any, span: Any, one: Any, two: Any, words: Any, vector: Any, marks: Any) -> Any:
    """Subtract, set patterns outside the window to zero, mark those that the hash decides about; return the largest."""
    _wide()
    return _trim_lanes(x, ref, low, span, one, two, words, vector, marks)


@njit(inline="always")
def _dropped(pattern: Any, hashed: Any, edges: Any, limits: Any) -> Any:
    """Whether a tie is dropped: at the lower edge the larger hashes are, and at the upper edge the smaller ones."""
    return ((pattern == edges[2]) & (hashed >= limits[0])) | ((pattern == edges[3]) & (hashed < limits[1]))


@compiled
def _break_ties(vector: Any, edges: Any, limits: Any, hashes: Any, count: Any) -> None:
    _wide()
    for i in range(count):
        dropped = _dropped(_pattern(vector[i], edges[0]), hashes[i], edges, limits)
        vector[i] = vector.dtype.type(0) if dropped else vector[i]


@compiled
def _find(marks: Any, words: Any, found: Any) -> Any:
    """List the entries whose bit is set, and return how many there are; four at a time, which takes no branch for each."""
    number = u64(0)
    for word in range(words):
        left, at = marks[word], u64(word * WORD)
        end = u64(number + _ones(left))
        while number < end:
            for i in range(4):
                found[u64(number + u64(i))] = u32(at + _trailing_zeros(left))
                left = u64(left & u64(left - u64(1)))
            number = u64(number + u64(4))
        number = end
    return np.int64(number)


@compiled
def _hash_some(first: Any, key: Any, found: Any, count: Any, out: Any) -> None:
    """Write the hashes of a few elements of a tile, those that were found."""
    _wide()
    low, high = u64(u64(first // 4) & u64(0xFFFFFFFF)), u64(u64(first // 4) >> u64(32))
    for i in range(count):
        at = u64(found[i])
        one, two = _philox(u64(low + u64(at >> u64(2))), high, key)
        pair = two if at & u64(2) else one
        out[i] = u32(pair >> u64(32)) if at & u64(1) else u32(pair & u64(0xFFFFFFFF))


@compiled
def _break_few_ties(vector: Any, edges: Any, limits: Any, hashes: Any, found: Any, count: Any) -> None:
    for i in range(count):
        at = found[i]
        dropped = _dropped(_pattern(vector[at], edges[0]), hashes[i], edges, limits)
        vector[at] = vector.dtype.type(0) if dropped else vector[at]


@compiled
def _drop_at_random(vector: Any, limit: Any, hashes: Any, count: Any) -> None:
    _wide()
    for i in range(count):
        vector[i] = vector[i] if hashes[i] < limit else vector.dtype.type(0)


@compiled
def kept_magnitude(
    addresses: Any, codes: Any, kind: Any, edges: Any, limits: Any, keys: Any, pieces: Any, block: Any, scratch: Any,
    vectors: Any, hashes: Any, marks: Any, found: Any, sums: Any,
) -> None:  # fmt: skip
    """Sum magnitudes of task vectors over each block, in float64: all, and those that are kept."""
    addresses, codes, edges, limits, keys, scratch, vectors, hashes, marks, found = (
        _borrowed(addresses),
        _borrowed(codes),
        _borrowed(edges),
        _borrowed(limits),
        _borrowed(keys),
        _borrowed(scratch),
        _borrowed(vectors),
        _borrowed(hashes),
        _borrowed(marks),
        _borrowed(found),
    )
    done = 0
    ref, x, magnitudes, ones = scratch[0], scratch[1], vectors[0], vectors[1]
    ones[:] = 1.0
    everything = np.full(4, ~edges.dtype.type(0), edges.dtype)
    everything[0] = 0
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        for begin in range(start, stop, SMALL):
            if begin > start and begin % block == 0:
                done += 1
            count = min(SMALL, stop - begin)
            _read_words(addresses, codes, row, 0, begin, count, ref)
            for k in range(len(codes) - 1):
                for kept in range(2):
                    _task_vector(
                        addresses, codes, row, k + 1, begin, count, ref, kind if kept else KEEP_ALL,
                        edges[row, k] if kept else everything, limits[row, k], keys[row, k], hashes, marks, found, x,
                    )  # fmt: skip
                    _widen_magnitudes(x, count, magnitudes)
                    sums[done, k, kept] += _dot(magnitudes, ones, count)
        if stop > start:
            done += 1


@compiled
def _widen_magnitudes(x: Any, count: Any, out: Any) -> None:
    _wide()
    for i in range(count):
        out[i] = abs(x[i])


@compiled
def task_vector_merge(
    addresses: Any, codes: Any, kind: Any, edges: Any, limits: Any, keys: Any, elect: Any, combine: Any, scales: Any,
    votes: Any, shares: Any, factors: Any, pieces: Any, scratch: Any, hashes: Any, marks: Any, found: Any, nonfinite: Any,
) -> None:  # fmt: skip
    """Merge the pieces of a table; ``scratch`` is [K + 4, SMALL] in the compute type."""
    addresses, codes, edges, limits, keys, scratch, hashes, marks, found = (
        _borrowed(addresses),
        _borrowed(codes),
        _borrowed(edges),
        _borrowed(limits),
        _borrowed(keys),
        _borrowed(scratch),
        _borrowed(hashes),
        _borrowed(marks),
        _borrowed(found),
    )
    models = scales.shape[1]
    ref, chosen, total, share = scratch[models], scratch[models + 1], scratch[models + 2], scratch[models + 3]
    out = models + 1
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        bad = False
        for begin in range(start, stop, SMALL):
            count = min(SMALL, stop - begin)
            _read_words(addresses, codes, row, 0, begin, count, ref)
            chosen[:count] = 0.0
            for k in range(models):
                top = _task_vector(
                    addresses, codes, row, k + 1, begin, count, ref, kind, edges[row, k], limits[row, k], keys[row, k], hashes,
                    marks, found, scratch[k],
                )  # fmt: skip
                bad |= top == _infinity(top)
                if elect:
                    _vote(scratch[k], votes[row, k], count, chosen)
            total[:count] = 0.0
            share[:count] = 0.0
            for k in range(models):
                scale, vote, part = scales[row, k], votes[row, k], shares[row, k]
                if combine == MAX:
                    _keep_largest(scratch[k], scale, vote, elect, chosen, count, total)
                else:
                    _add_agreeing(scratch[k], scale, vote, part, elect, chosen, count, total, share)
            _change(ref, total, share, combine == MEAN, factors[row], count)
            bad |= _store(total[:count], addresses[row, out] + begin * _SIZES[codes[out]], codes[out], count)
        if bad:
            nonfinite[row] = True


@compiled
def _vote(vector: Any, vote: Any, count: Any, chosen: Any) -> None:
    _wide()
    for i in range(count):
        chosen[i] += vote * vector[i]


@njit(inline="always")
def _agrees(vote: Any, chosen: Any, zero: Any) -> Any:
    """Whether a vote has the elected sign; a vote that is NaN has."""
    return not (vote if chosen >= zero else -vote) <= zero


@compiled
def _add_agreeing(
    vector: Any, scale: Any, vote: Any, part: Any, elect: Any, chosen: Any, count: Any, total: Any, share: Any
) -> None:
    """Add the entries that agree to ``total``, and the model's part to ``share``."""
    _wide()
    zero = total.dtype.type(0)
    if elect:
        for i in range(count):
            agrees = _agrees(vote * vector[i], chosen[i], zero)
            total[i] += scale * vector[i] if agrees else zero
            share[i] += part if agrees else zero
    else:
        for i in range(count):
            value = scale * vector[i]
            total[i] += value
            share[i] += part if value != zero else zero


@compiled
def _keep_largest(vector: Any, scale: Any, vote: Any, elect: Any, chosen: Any, count: Any, total: Any) -> None:
    """Put entries that agree and are larger than those of earlier models into ``total``."""
    _wide()
    zero = total.dtype.type(0)
    if elect:
        for i in range(count):
            value = scale * vector[i] if _agrees(vote * vector[i], chosen[i], zero) else zero
            total[i] = value if _larger(value, total[i]) else total[i]
    else:
        for i in range(count):
            value = scale * vector[i]
            total[i] = value if _larger(value, total[i]) else total[i]


@njit(inline="always")
def _larger(value: Any, than: Any) -> Any:
    """Compare magnitudes; NaN is larger than every number, and none is larger than NaN."""
    return (abs(value) > abs(than)) | ((value != value) & (than == than))


@compiled
def _change(ref: Any, total: Any, share: Any, mean: Any, factor: Any, count: Any) -> None:
    """Make the result of the totals, in place."""
    _wide()
    zero, one = total.dtype.type(0), total.dtype.type(1)
    if mean:
        for i in range(count):
            change = factor * (total[i] / (share[i] if share[i] != zero else one))
            total[i] = ref[i] + change if change != zero else ref[i]
    else:
        for i in range(count):
            change = factor * total[i]
            total[i] = ref[i] + change if change != zero else ref[i]


@compiled
def magnitude_histogram(
    addresses: Any, codes: Any, low: Any, span: Any, shift: Any, groups: Any, pieces: Any, scratch: Any, offsets: Any,
    reached: Any, inside: Any, found: Any, counts: Any,
) -> None:  # fmt: skip
    """Count the pieces; ``counts`` is int64 [groups, K, ways, bins + 2], to be summed over the ways."""
    addresses, codes, scratch, offsets, reached, inside, found, counts = (
        _borrowed(addresses),
        _borrowed(codes),
        _borrowed(scratch),
        _borrowed(offsets),
        _borrowed(reached),
        _borrowed(inside),
        _borrowed(found),
        _borrowed(counts),
    )
    ref, x = scratch[0], scratch[1]
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        for begin in range(start, stop, SMALL):
            count = min(SMALL, stop - begin)
            words = _words(count)
            padding = words * WORD - count
            _read_words(addresses, codes, row, 0, begin, count, ref)
            for k in range(len(codes) - 1):
                lowest, size = low[row, k], span[row, k]
                totals = counts[groups[piece], k]
                if codes[k + 1] == BFLOAT16 and padding == 0:
                    raw = carray(_pointer(addresses[row, k + 1] + 2 * begin), count, np.uint16)
                    top = _place(raw, ref, lowest, size, words, offsets, reached, inside)
                else:
                    _read_words(addresses, codes, row, k + 1, begin, count, x)
                    top = _place(x, ref, lowest, size, words, offsets, reached, inside)
                counted = _count_bits(inside, words)
                if counted == words * WORD:
                    _count_all(offsets, counted, shift[row, k], totals)
                elif counted:
                    _find(inside, words, found)
                    _count_some(offsets, found, counted, shift[row, k], totals)
                above = _count_bits(reached, words) - counted
                totals[0, -2] += above
                if lowest == 0:
                    totals[0, 0] -= padding
                if top == _infinity(lowest):
                    totals[0, -1] += _count_equal(offsets, low.dtype.type(top - lowest), count)


@compiled
def _place(x: Any, ref: Any, low: Any, span: Any, words: Any, offsets: Any, reached: Any, inside: Any) -> Any:
    """Find each entry's offset in the window, whether it reaches it, and is inside; return the largest pattern."""
    _wide()
    return _place_lanes(x, ref, low, span, words, offsets, reached, inside)


@compiled
def _count_bits(bits: Any, words: Any) -> Any:
    number = u64(0)
    for word in range(words):
        number = u64(number + _ones(bits[word]))
    return np.int64(number)


@compiled
def _count_equal(offsets: Any, value: Any, count: Any) -> Any:
    number = 0
    for i in range(count):
        number += offsets[i] == value
    return number


@compiled
def _count_some(offsets: Any, found: Any, number: Any, shift: Any, totals: Any) -> None:
    """Count entries that were found; consecutive ones in different ways."""
    ways = len(totals) - 1
    for i in range(number):
        totals[u64(i & ways), offsets[found[i]] >> shift] += 1


@compiled
def _count_all(offsets: Any, number: Any, shift: Any, totals: Any) -> None:
    ways = len(totals) - 1
    for i in range(number):
        totals[u64(i & ways), offsets[i] >> shift] += 1


_SIZES = np.array([2, 2, 4, 8])
