"""Ranks of the entries of a slice; see `mergekit_cl.formula.ranks`.

Entries are sorted as integers of 64 bits: a key that is ordered as the values are, and the place of the entry below it. They
are thrown into twice as many buckets as there are entries by a function of the value that has most buckets where most
magnitudes are; of the few that share a bucket, vector instructions put neighbours in order, and an insertion sort the rest.
Where values crowd into few buckets, and in very long slices, a radix sort does it instead.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mergekit_cl.kernels import Array
from mergekit_cl.kernels.numba import compiled
from mergekit_cl.kernels.numba.compiled import F, _bits_of_float, _borrowed, _wide, u16, u32, u64

FEW = 24
"""Entries that an insertion sort is best for."""

SOME = 128
"""Entries up to which it is better than a radix sort."""

MOST = 32_767
"""Entries up to which twice as many buckets have numbers of 16 bits."""

SWEEPS = 2
"""How often neighbours are put in order."""

DIGITS = 11
"""Bits of a digit of the radix sort."""

_PAD = 64


def with_digest(function: F) -> F:
    """Compile a function whose copy on disk is forgotten when a file changes that it takes helpers from."""
    function.__qualname__ += f"_{_digest}"
    return compiled.compiled(function)


_digest = hashlib.blake2b(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))), digest_size=8
).hexdigest()


class Room(NamedTuple):
    """Buffers for slices of up to so many entries."""

    packed: Array
    other: Array
    keys: Array
    buckets: Array
    counts: Array
    words: Array
    """The same memory as ``counts``, four in each"""
    digits: Array
    last: Array
    marks: Array
    shares: Array
    """The rank for twice a mean place, of slices of the length that `shared` holds"""
    shared: Array


def room(entries: int, compute: np.dtype[Any]) -> Room:
    """Make the buffers."""
    few = min(entries, MOST)
    counts = np.zeros((2 * few + _PAD) & ~7, np.uint16)
    return Room(
        packed=np.zeros(entries + _PAD, np.uint64),
        other=np.zeros(entries + _PAD, np.uint64),
        keys=np.zeros(entries + _PAD, np.uint32),
        buckets=np.zeros(few + _PAD, np.uint32),
        counts=counts,
        words=counts.view(np.uint64),
        digits=np.zeros(3 << DIGITS, np.int64),
        last=np.zeros(2 * few + _PAD, np.uint32),
        marks=np.zeros(2 * few + _PAD, np.uint8),
        shares=np.zeros(2 * few + _PAD, compute),
        shared=np.zeros(1, np.int64),
    )


@intrinsic
def _order_neighbours(typingctx: Any, array: Any, start: Any, stop: Any) -> Any:
    """Put the pairs (start, start + 1), (start + 2, start + 3), ... in order; up to seven entries from ``stop`` on as well."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64, i32 = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(i64, 8)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        before, body, after = builder.block, builder.append_basic_block("order"), builder.append_basic_block("ordered")
        builder.cbranch(builder.icmp_signed("<", arguments[1], arguments[2]), body, after)
        builder.position_at_end(body)
        at = builder.phi(i64)
        at.add_incoming(arguments[1], before)
        where = builder.bitcast(builder.gep(data, [at]), vector.as_pointer())
        values = builder.load(where, align=8)
        turned = builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(i32, 8), [1, 0, 3, 2, 5, 4, 7, 6]))
        ordered = builder.icmp_unsigned("<", values, turned)
        least, most = builder.select(ordered, values, turned), builder.select(ordered, turned, values)
        both = builder.shuffle_vector(least, most, ir.Constant(ir.VectorType(i32, 8), [0, 9, 2, 11, 4, 13, 6, 15]))
        builder.store(both, where, align=8)
        following = builder.add(at, ir.Constant(i64, 8))
        at.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, arguments[2]), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), emit


@intrinsic
def _bits_of_double(typingctx: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), emit


@njit(inline="always")
def _key(value: Any) -> Any:
    """Return an integer that is ordered as float32 values are; NaN is above all."""
    bits = _bits_of_float(np.float32(value + np.float32(0)))  # -0 becomes 0
    sign = u32(u32(0) - u32(bits >> u32(31)))
    key = u32(bits ^ u32(sign | u32(0x80000000)))
    return key if value == value else u32(0xFFFFFFFF)


@njit(inline="always")
def _long_key(value: Any) -> Any:
    """Return an integer that is ordered as float64 values are; NaN is above all."""
    bits = _bits_of_double(np.float64(value + 0.0))
    sign = u64(u64(0) - u64(bits >> u64(63)))
    key = u64(bits ^ u64(sign | u64(0x8000000000000000)))
    return key if value == value else u64(0xFFFFFFFFFFFFFFFF)


@with_digest
def rank(values: Any, count: Any, room: Any) -> None:
    """Replace the first ``count`` values by their ranks."""
    if count <= 1:
        for i in range(count):
            values[i] = values.dtype.type(0.5)
        return
    packed, other, keys, buckets = (
        _borrowed(room.packed),
        _borrowed(room.other),
        _borrowed(room.keys),
        _borrowed(room.buckets),
    )
    counts, digits, shares, shared = (
        _borrowed(room.counts),
        _borrowed(room.digits),
        _borrowed(room.shares),
        _borrowed(room.shared),
    )
    double = values.itemsize == 8
    if count <= MOST:
        _share(count, shares, shared)
    if double:
        for i in range(count):
            keys[i] = u32(_long_key(values[i]) >> u64(32))
    else:
        _make_keys(values, count, keys)
    done = False
    if FEW < count <= MOST:
        some = 2 * count & ~7
        crowd = _into_buckets(values, count, buckets, some, counts, _borrowed(room.words))
        if (
            crowd > 2 * count
            and not double
            and _rank_alike(
                values,
                count,
                keys,
                buckets,
                some,
                counts,
                packed,
                other,
                digits,
                shares,
                _borrowed(room.last),
                _borrowed(room.marks),
            )
        ):
            return
        done = crowd >= 0 and _order_buckets(count, keys, buckets, counts, packed)
    if count <= FEW or (count <= SOME and not done):
        for i in range(count):
            packed[i] = u64(u64(u64(keys[i]) << u64(32)) | u64(i))
        _insert(packed, count, count * count)
    elif not done:
        _by_digits(keys, count, packed, other, digits)
    if double:
        _order_low(values, count, packed, other, digits)
    _assign(values, count, packed, keys, shares)


@with_digest
def _make_keys(values: Any, count: Any, keys: Any) -> None:
    _wide()
    for i in range(count):
        keys[i] = _key(values[i])


@with_digest
def _insert(packed: Any, count: Any, most: Any) -> bool:
    """Sort by insertion; return whether that took at most ``most`` moves, else it is given up."""
    moves = 0
    for i in range(1, count):
        value = packed[u64(i)]
        if value < packed[u64(i - 1)]:
            j = i
            while j > 0 and packed[u64(j - 1)] > value:
                packed[u64(j)] = packed[u64(j - 1)]
                j -= 1
            packed[u64(j)] = value
            moves += i - j
            if moves > most:
                return False
    return True


@with_digest
def _scale(values: Any, count: Any, sums: Any) -> Any:
    """Return a typical magnitude (NaN or infinite if a value is), and whether a value is negative."""
    _wide()
    lanes = len(sums)
    sums[:] = values.dtype.type(0)
    negative = False
    for begin in range(0, count - lanes + 1, lanes):
        part = values[begin : begin + lanes]
        for lane in range(lanes):
            sums[lane] += abs(part[lane])
            negative |= part[lane] < 0
    for i in range(count - count % lanes, count):
        sums[0] += abs(values[i])
        negative |= values[i] < 0
    total = values.dtype.type(0)
    for lane in range(lanes):
        total += sums[lane]
    return total / values.dtype.type(count), negative


@with_digest
def _into_buckets(values: Any, count: Any, buckets: Any, some: Any, counts: Any, words: Any) -> int:
    """Choose the bucket of each value; make ``counts`` the places at which the buckets begin.

    Returns:
        How many pairs of entries share a bucket; -1 if a value is not finite, which has no bucket.

    """
    sums = np.empty(64, values.dtype)
    mean, negative = _scale(values, count, sums)
    if not mean < np.inf:
        return -1
    _choose(values, count, values.dtype.type(1.4) * mean, negative, some, buckets)
    for i in range(some):
        counts[i] = u16(0)
    crowd = _number(buckets, count, counts)
    _add_up(words, some // 4)
    counts[some] = count
    return int(crowd)


@with_digest
def _order_buckets(count: Any, keys: Any, buckets: Any, starts: Any, packed: Any) -> bool:
    """Sort what is in buckets; return whether it was done, or given up because values crowd together."""
    _throw(buckets, count, starts, keys, packed)
    for i in range(count, count + 9):
        packed[i] = ~u64(0)
    for _ in range(SWEEPS):
        _order_neighbours(packed, 0, count)
        _order_neighbours(packed, 1, count)
    return bool(_insert(packed, count, count))


@with_digest
def _rank_alike(
    values: Any, count: Any, keys: Any, buckets: Any, some: Any, starts: Any, packed: Any, other: Any, digits: Any, shares: Any,
    last: Any, marks: Any,
) -> bool:  # fmt: skip
    """Rank without sorting where nearly all entries of a bucket are equal; return whether they are."""
    low = u32(0xFFFF)
    for i in range(count):
        last[u32(buckets[i] & low)] = keys[i]
    if _differ(keys, buckets, last, count) > count // 16:
        return False
    mixed = 0
    for i in range(count):
        bucket = u32(buckets[i] & low)
        if keys[i] != last[bucket]:
            digits[mixed] = bucket
            mixed += 1
    found = 0
    if mixed:
        for k in range(some):
            marks[k] = 0
        for k in range(mixed):
            marks[digits[k]] = 1
        for i in range(count):
            packed[u64(found)] = u64(u64(u64(keys[i]) << u64(32)) | u64(i))
            found += int(marks[u32(buckets[i] & low)])
        if found > count // 4:
            return False
    _share_alike(values, count, buckets, starts, shares)
    if found:
        _rank_mixed(values, found, buckets, starts, packed, other, digits, shares)
    return True


@with_digest
def _differ(keys: Any, buckets: Any, last: Any, count: Any) -> int:
    """Count the entries that are not equal to the last of their bucket."""
    _wide()
    number = 0
    for i in range(count):
        number += keys[i] != last[u32(buckets[i] & u32(0xFFFF))]
    return int(number)


@with_digest
def _share_alike(values: Any, count: Any, buckets: Any, starts: Any, shares: Any) -> None:
    """Give all entries of a bucket their mean rank."""
    for i in range(count):
        bucket = u32(buckets[i] & u32(0xFFFF))
        first, behind = u32(starts[bucket]), u32(starts[u32(bucket + u32(1))])
        values[i] = shares[u32(u32(first + behind) - u32(1))]


@with_digest
def _rank_mixed(
    values: Any, found: Any, buckets: Any, starts: Any, packed: Any, other: Any, digits: Any, shares: Any
) -> None:  # fmt: skip
    """Rank the entries of the buckets whose entries are not all equal."""
    if not _insert(packed, found, 8 * found):
        _by_low(packed[:found], other, digits)
    low = u64(0xFFFFFFFF)
    start, begin, bucket = 0, 0, u32(0xFFFFFFFF)
    while start < found:
        stop = start + 1
        while stop < found and packed[u64(stop)] >> u64(32) == packed[u64(start)] >> u64(32):
            stop += 1
        own = u32(buckets[u64(packed[u64(start)] & low)] & u32(0xFFFF))
        if own != bucket:
            bucket, begin = own, start
        both = 2 * np.int64(starts[bucket]) + (start - begin) + (stop - 1 - begin)
        for i in range(start, stop):
            values[u64(packed[u64(i)] & low)] = shares[both]
        start = stop


@with_digest
def _choose(values: Any, count: Any, scale: Any, negative: Any, some: Any, buckets: Any) -> None:
    """Choose the bucket of each value; each step of this is monotonic, also when rounded."""
    _wide()
    kind = values.dtype.type
    last = np.int32(some - 1)
    if scale == 0:
        for i in range(count):
            buckets[i] = u32(0)
    elif negative:
        half = kind(some // 2)
        top = half * scale
        for i in range(count):
            away = half - top / (abs(values[i]) + scale)
            away = half - away if values[i] < kind(0) else half + away
            buckets[i] = u32(min(np.int32(away), last))
    else:
        whole = kind(some)
        top = whole * scale
        for i in range(count):
            buckets[i] = u32(min(np.int32(whole - top / (abs(values[i]) + scale)), last))


@with_digest
def _number(buckets: Any, count: Any, counts: Any) -> int:
    """Count each bucket's entries; put the number that an entry has in its bucket above that of the bucket."""
    pairs = 0
    for i in range(count):
        bucket = buckets[i]
        number = counts[bucket]
        buckets[i] = u32(bucket | u32(u32(number) << u32(16)))
        counts[bucket] = u16(number + u16(1))
        pairs += number
    return int(pairs)


@with_digest
def _add_up(words: Any, count: Any) -> None:
    """Replace each of four counts in a word by the sum of all before it."""
    before = u64(0)
    ones = u64(0x0001000100010001)
    for i in range(count):
        word = words[i]
        sums = u64(word * ones)
        words[i] = u64(u64(sums << u64(16)) + u64(before * ones))
        before = u64(before + u64(sums >> u64(48)))


@with_digest
def _throw(buckets: Any, count: Any, starts: Any, keys: Any, packed: Any) -> None:
    for i in range(count):
        both = buckets[i]
        where = u64(u64(starts[u32(both & u32(0xFFFF))]) + u64(both >> u32(16)))
        packed[where] = u64(u64(u64(keys[i]) << u64(32)) | u64(i))


@with_digest
def _by_digits(keys: Any, count: Any, packed: Any, other: Any, digits: Any) -> None:
    """Sort the keys by their digits, the lowest first."""
    size = 1 << DIGITS
    mask = u32(size - 1)
    for i in range(3 * size):
        digits[i] = 0
    for i in range(count):
        key = keys[i]
        packed[i] = u64(u64(u64(key) << u64(32)) | u64(i))
        digits[u64(key & mask)] += 1
        digits[u64(u64(size) + u64(u32(key >> u32(DIGITS)) & mask))] += 1
        digits[u64(u64(2 * size) + u64(key >> u32(2 * DIGITS)))] += 1
    moved = 0
    for digit in range(3):
        starts = digits[digit * size : (digit + 1) * size]
        before, most = 0, 0
        for i in range(size):
            number = starts[i]
            most = max(most, number)
            starts[i] = before
            before += number
        if most < count:  # else all have the same digit
            if moved % 2:
                _move(other, count, starts, digit, packed)
            else:
                _move(packed, count, starts, digit, other)
            moved += 1
    if moved % 2:
        for i in range(count):
            packed[i] = other[i]


@with_digest
def _move(values: Any, count: Any, starts: Any, digit: Any, out: Any) -> None:
    shift = u64(32 + DIGITS * digit)
    mask = u64((1 << DIGITS) - 1)
    for i in range(count):
        value = values[i]
        where = u64(u64(value >> shift) & mask)
        out[u64(starts[where])] = value
        starts[where] += 1


@with_digest
def _order_low(values: Any, count: Any, packed: Any, other: Any, digits: Any) -> None:
    """Put entries with the same upper halves of their keys in the order of the lower halves; number the distinct keys."""
    low = u64(0xFFFFFFFF)
    start, number = 0, u64(0)
    while start < count:
        high = packed[start] >> u64(32)
        stop = start + 1
        while stop < count and packed[stop] >> u64(32) == high:
            stop += 1
        part = packed[start:stop]
        for i in range(len(part)):
            place = u64(part[i] & low)
            part[i] = u64(u64(u64(_long_key(values[place]) & low) << u64(32)) | place)
        if not _insert(part, len(part), 4 * len(part) + 64):
            _by_low(part, other, digits)
        before = u64(0)
        for i in range(len(part)):
            key = u64(part[i] >> u64(32))
            number = u64(number + u64(i == 0 or key != before))
            part[i] = u64(u64(number << u64(32)) | u64(part[i] & low))
            before = key
        start = stop


@with_digest
def _by_low(part: Any, other: Any, digits: Any) -> None:
    """Sort packed entries by three digits of their keys."""
    size = 1 << DIGITS
    for digit in range(3):
        starts = digits[:size]
        for i in range(size):
            starts[i] = 0
        for i in range(len(part)):
            starts[u64(part[i] >> u64(32 + DIGITS * digit)) & u64(size - 1)] += 1
        before = 0
        for i in range(size):
            number = starts[i]
            starts[i] = before
            before += number
        _move(part, len(part), starts, digit, other)
        for i in range(len(part)):
            part[i] = other[i]


@with_digest
def _share(count: Any, shares: Any, shared: Any) -> None:
    """Make the table of ranks for slices of this length, unless it is there."""
    if shared[0] != count:
        ends = np.float64(2 * (count - 1))
        for i in range(2 * count - 1):
            shares[i] = shares.dtype.type(np.float64(i) / ends)
        shared[0] = count


@with_digest
def _assign(values: Any, count: Any, packed: Any, places: Any, shares: Any) -> None:
    """Write the ranks of sorted entries; ``places`` is overwritten."""
    kind, low = values.dtype.type, u64(0xFFFFFFFF)
    ends = np.float64(2 * (count - 1))
    tabled = count <= MOST
    if tabled and not _any_equal(packed, count):
        for i in range(count):
            values[u64(packed[i] & low)] = shares[2 * i]
        return
    place = u32(0)
    for i in range(count):
        place = place if i > 0 and packed[u64(i)] >> u64(32) == packed[u64(i - 1)] >> u64(32) else u32(i)
        places[i] = place
    place = u32(count - 1)
    for i in range(count - 1, -1, -1):
        same = i < count - 1 and packed[u64(i)] >> u64(32) == packed[u64(i + 1)] >> u64(32)
        place = place if same else u32(i)
        both = u64(u64(places[u64(i)]) + u64(place))
        values[u64(packed[u64(i)] & low)] = shares[both] if tabled else kind(np.float64(both) / ends)


@with_digest
def _any_equal(packed: Any, count: Any) -> bool:
    _wide()
    equal = u64(0)
    for i in range(1, count):
        equal |= u64(u64(u64(packed[i] ^ packed[i - 1]) >> u64(32)) == u64(0))
    return bool(equal)
