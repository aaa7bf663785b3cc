"""Formulas: `programs` makes loops over entries of them, and the functions here call these for slices, blocks and tiles."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mergekit_cl.dtypes import type_of
from mergekit_cl.formula import Program
from mergekit_cl.kernels import BLOCK, Array, Formula, Slices, Table
from mergekit_cl.kernels.numba import programs
from mergekit_cl.kernels.numba.buffers import tiles, windows
from mergekit_cl.kernels.numba.compiled import (
    SMALL,
    WORD,
    _borrowed,
    _count_all,
    _count_bits,
    _count_equal,
    _count_some,
    _find,
    _hash,
    _infinity,
    _place,
    _words,
)  # fmt: skip
from mergekit_cl.kernels.numba.ranks import rank, room, with_digest
from mergekit_cl.kernels.numba.streaming import _address, _fence
from mergekit_cl.kernels.numpy import formulas as oracle

LEAST = 1 << 14
"""Elements in a table from which on code is compiled for a new formula; NumPy has computed fewer in the time that takes."""

STREAMED = 1 << 22
"""Elements in a table from which on results are written past the caches."""


def elementwise(table: Table, formula: Formula, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.elementwise`."""
    code = _code(table.dtypes[:-1], table.dtypes[-1], table, formula)
    if code is None:
        return oracle.elementwise(table, formula, pieces)
    return _written(table, formula, None, code, pieces)


def per_row(table: Table, formula: Formula, slices: Slices, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_row`."""
    code = _code(table.dtypes[:-1], table.dtypes[-1], table, formula)
    if code is None:
        return oracle.per_row(table, formula, slices, pieces)
    return _written(table, formula, slices, code, pieces)


def _written(table: Table, formula: Formula, slices: Slices | None, code: programs.Code, pieces: Array) -> Array:
    addresses = table.addresses
    in_place = bool((addresses[:, :-1] == addresses[:, -1:]).any())  # and windows of files: those that are absent are at 0
    streamed = not in_place and table.lengths.sum() >= STREAMED
    if slices is None:
        step = SMALL if formula.keys.shape[1] else 1 << 62
    else:
        step = int(slices.lengths.max(initial=0))
        streamed = streamed and int(slices.lengths.min(initial=0)) >= SMALL
    nonfinite = np.zeros(len(table.spans), np.bool_)
    work = _work(table, formula, slices, len(table.dtypes) - 1, code, step)
    _apply[len(code.ranked) > 0](work, step, streamed, code.width, pieces, nonfinite)
    return nonfinite


def sum_of(table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.sum_of`."""
    code = _code(table.dtypes, None, table, formula)
    if code is None:
        return oracle.sum_of(table, formula, slices, pieces)
    sizes = pieces[:, 2] - pieces[:, 1]
    count = sizes.sum() if slices is not None else (-(-sizes // BLOCK)).sum()
    sums = np.zeros((int(count), len(cast(Program, formula.program).outputs)))
    step = BLOCK if slices is None else int(slices.lengths.max(initial=0))
    _sum[len(code.ranked) > 0](_work(table, formula, slices, len(table.dtypes), code, step), step, pieces, sums)
    return sums


def histogram_of(
    table: Table, formula: Formula, slices: Slices | None, low: Array, shift: Array, bins: int, wide: bool,
    groups: npt.NDArray[np.intp], pieces: Array,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """See `mergekit_cl.kernels.Backend.histogram_of`."""
    code = _code(table.dtypes, formula.compute.name, table, formula)
    if code is None:
        return oracle.histogram_of(table, formula, slices, low, shift, bins, wide, groups, pieces)
    low, span, shift, ways = windows(low, shift, bins, np.dtype(np.float64) if wide else formula.compute)
    counts = np.zeros((int(groups.max(initial=-1)) + 1, low.shape[1], ways, bins + 2), np.int64)
    step = SMALL if slices is None else int(slices.lengths.max(initial=0))
    _count[len(code.ranked) > 0](
        _work(table, formula, slices, len(table.dtypes), code, step), step, low, span, shift,
        groups, pieces, tiles(2, formula.compute, SMALL), np.empty(SMALL, low.dtype), _bits(), _bits(),
        np.empty(SMALL + 4, np.uint32), counts,
    )  # fmt: skip
    return counts.sum(axis=2) if ways > 1 else counts[:, :, 0]


class Work(NamedTuple):
    """What the loops need: numbers, and buffers that they write into."""

    addresses: Array
    sizes: Array
    """Bytes of an element of each column"""
    constants: Array
    numbers: Array
    keys: Array
    first: Array
    """Where the numbers of each row's slices begin"""
    lengths: Array
    """Of the slices of each row; empty where there are none"""
    stages: Array
    ranked: Array
    hashes: Array
    """[uniforms, entries worked on at once // 2], two in each"""
    ranks: Array
    """[ranks, entries of a slice]"""
    sorting: Any
    """Buffers of `mergekit_cl.kernels.numba.ranks.rank`"""
    streams: Array
    scalars: Array
    inputs: int


def _code(inputs: tuple[str, ...], output: str | None, table: Table, formula: Formula) -> programs.Code | None:
    """Return the machine code of a formula, unless NumPy has to compute it, or is faster."""
    program, compute = formula.program, formula.compute.name
    if program is None or program.transcendental or not inputs:
        return None
    if table.lengths.sum() < LEAST and not programs.known(program, compute, inputs, output):
        return None
    return programs.compiled(program, compute, inputs, output)


def _work(table: Table, formula: Formula, slices: Slices | None, inputs: int, code: programs.Code, step: int) -> Work:
    program, compute = cast(Program, formula.program), formula.compute
    uniforms, ranks = program.count("uniform"), len(code.ranked)
    none = np.zeros(0, np.int64)
    return Work(
        addresses=table.addresses,
        sizes=np.array([type_of[dtype].itemsize for dtype in table.dtypes], np.int64),
        constants=_plain(formula.constants[:, : program.count("constant")], compute),
        numbers=_plain(formula.numbers[:, : program.count("number")], compute),
        keys=_plain(formula.keys[:, :uniforms], np.uint32),
        first=slices.first(table) if slices is not None else none,
        lengths=_plain(slices.lengths, np.int64) if slices is not None else none,
        stages=code.stages,
        ranked=code.ranked,
        hashes=tiles(uniforms, np.uint64, step // 2 if uniforms else 0),
        ranks=tiles(ranks, compute, step if ranks else 0),
        sorting=room(step if ranks else 0, compute),
        streams=np.zeros(inputs + uniforms + ranks + len(program.outputs), np.int64),
        scalars=np.zeros(code.scalars, compute),
        inputs=inputs,
    )


def _plain(array: Array, dtype: npt.DTypeLike) -> Array:
    """Return an array of the one kind that the loops are compiled for."""
    return np.require(array, dtype, ["C", "W"])


def _bits() -> Array:
    return np.empty(SMALL // WORD, np.uint64)


@intrinsic
def _call(typingctx: Any, code: Any, streams: Any, scalars: Any, count: Any) -> Any:
    """Call the code of a stage."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64 = ir.IntType(64)
        given = [
            builder.ptrtoint(context.make_array(kind)(context, builder, value).data, i64)
            for kind, value in zip(signature.args[1:3], arguments[1:3], strict=True)
        ]
        function = builder.inttoptr(arguments[0], ir.FunctionType(i64, [i64] * 3).as_pointer())
        return builder.call(function, [*given, arguments[3]])

    return types.intp(types.intp, streams, scalars, types.intp), emit


@njit(inline="always")
def _borrow(work: Any) -> Any:
    """Borrow all arrays."""
    return Work(
        _borrowed(work.addresses), _borrowed(work.sizes), _borrowed(work.constants), _borrowed(work.numbers),
        _borrowed(work.keys), _borrowed(work.first), _borrowed(work.lengths), _borrowed(work.stages), _borrowed(work.ranked),
        _borrowed(work.hashes), _borrowed(work.ranks), work.sorting, _borrowed(work.streams), _borrowed(work.scalars),
        work.inputs,
    )  # fmt: skip


@njit
def _no_rank(values: Any, count: Any, room: Any) -> None:
    """Stand in for `rank` in programs without ranks."""


def _versions(function: Callable[..., None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Compile a loop for programs without ranks, which need not wait until a sort is compiled, and for those with ranks."""
    versions = []
    for name, ranking in (("plain", _no_rank), ("ranking", rank)):
        version = FunctionType(function.__code__, {**function.__globals__, "rank": ranking}, function.__name__)
        version.__qualname__ = f"{function.__name__}_{name}"
        versions.append(with_digest(version))
    return versions[0], versions[1]


@njit(inline="always")
def _outputs(work: Any) -> Any:
    """Return the number of the stream of the first output."""
    return work.inputs + len(work.hashes) + len(work.ranks)


@njit(inline="always")
def _bounds(work: Any, row: Any, stop: Any, step: Any, number: Any) -> Any:
    """Return where the part of a piece lies that is worked on at once: a slice, or up to ``step`` entries."""
    if len(work.lengths):
        return number * work.lengths[row], (number + 1) * work.lengths[row]
    return number, min(stop, number + min(step, stop - number))


@njit(inline="always")
def _stage(work: Any, stage: Any, row: Any, start: Any, at: Any, count: Any) -> Any:
    """Carry out a stage for ``count`` entries from ``at`` on, of those that begin at ``start``."""
    for column in range(work.inputs):
        work.streams[column] = work.addresses[row, column] + at * work.sizes[column]
    for k in range(len(work.hashes)):
        work.streams[work.inputs + k] = _address(work.hashes[k]) + 4 * (at - start + start % 4)
    for k in range(len(work.ranks)):
        work.streams[work.inputs + len(work.hashes) + k] = _address(work.ranks[k]) + (at - start) * work.ranks.itemsize
    return _call(work.stages[stage], work.streams, work.scalars, count)


@njit(inline="always")
def _ready(work: Any, row: Any, number: Any, start: Any, stop: Any, rank: Any) -> None:
    """Do all but the last stage for the entries from ``start`` to ``stop``: slice ``number`` of a row, or what is no slice."""
    constants, numbers = work.constants.shape[1], work.numbers.shape[1]
    for k in range(constants):
        work.scalars[k] = work.constants[row, k]
    for k in range(numbers):
        work.scalars[constants + k] = work.numbers[work.first[row] + number, k]
    work.scalars[constants + numbers] = stop - start
    for k in range(len(work.hashes)):
        lead = start % 4
        _hash(start - lead, work.keys[row, k], stop - start + lead, work.hashes[k])
    for stage in range(len(work.stages) - 2):
        _stage(work, stage, row, start, start, stop - start)
        for k in range(len(work.ranked)):
            if work.ranked[k] == stage:
                rank(work.ranks[k], stop - start, work.sorting)


@with_digest
def _count_tile(
    values: Any, zeros: Any, low: Any, span: Any, shift: Any, count: Any, words: Any, offsets: Any, reached: Any, inside: Any,
    found: Any, totals: Any,
) -> None:  # fmt: skip
    """Count a tile in a window; see `mergekit_cl.kernels.numba.compiled.magnitude_histogram`."""
    padding = words * WORD - count
    top = _place(values, zeros, low, span, words, offsets, reached, inside)
    counted = _count_bits(inside, words)
    if counted == words * WORD:
        _count_all(offsets, counted, shift, totals)
    elif counted:
        _find(inside, words, found)
        _count_some(offsets, found, counted, shift, totals)
    totals[0, -2] += _count_bits(reached, words) - counted
    if low == 0:
        totals[0, 0] -= padding
    if top == _infinity(low):
        totals[0, -1] += _count_equal(offsets, offsets.dtype.type(top - low), count)


@_versions
def _apply(work: Any, step: Any, streamed: Any, width: Any, pieces: Any, nonfinite: Any) -> None:
    """Write a formula's result into the last column."""
    work = _borrow(work)
    out, last = work.inputs, len(work.stages) - 2
    size = work.sizes[out]
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        bad = 0
        for number in range(start, stop, 1 if len(work.lengths) else max(1, min(step, stop - start))):
            begin, end = _bounds(work, row, stop, step, number)
            _ready(work, row, number, begin, end, rank)
            target = work.addresses[row, out] + begin * size
            first, second = begin, begin
            if streamed and target % size == 0:  # the part between these is whole aligned vectors
                first = min(end, begin + (-target % programs.LINE) // size)
                second = first + (end - first) // width * width
            for part in range(3):
                at = begin if part == 0 else first if part == 1 else second
                count = (first if part == 0 else second if part == 1 else end) - at
                if count > 0:
                    work.streams[_outputs(work)] = work.addresses[row, out] + at * size
                    bad |= _stage(work, last + (part == 1), row, begin, at, count)
        if bad:
            nonfinite[row] = True
    if streamed:
        _fence()


@_versions
def _sum(work: Any, step: Any, pieces: Any, sums: Any) -> None:
    """Add up a formula's outputs, over slices or blocks."""
    work, sums = _borrow(work), _borrowed(sums)
    last, done = len(work.stages) - 2, 0
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        for number in range(start, stop, 1 if len(work.lengths) else step):
            begin, end = _bounds(work, row, stop, step, number)
            _ready(work, row, number, begin, end, rank)
            for k in range(sums.shape[1]):
                work.streams[_outputs(work) + k] = _address(sums[done]) + 8 * k
            _stage(work, last, row, begin, begin, end - begin)
            done += 1


@_versions
def _count(
    work: Any, step: Any, low: Any, span: Any, shift: Any, groups: Any, pieces: Any, tiles: Any, offsets: Any, reached: Any,
    inside: Any, found: Any, counts: Any,
) -> None:  # fmt: skip
    """Count the magnitudes of a formula's output; ``counts`` is int64 [groups, windows, ways, bins + 2]."""
    work, tiles, offsets, reached, inside, found, counts = (
        _borrow(work),
        _borrowed(tiles),
        _borrowed(offsets),
        _borrowed(reached),
        _borrowed(inside),
        _borrowed(found),
        _borrowed(counts),
    )
    values, zeros = tiles[0], tiles[1]
    last = len(work.stages) - 2
    work.streams[_outputs(work)] = _address(values)
    for piece in range(len(pieces)):
        row, start, stop = pieces[piece]
        for number in range(start, stop, 1 if len(work.lengths) else step):
            begin, end = _bounds(work, row, stop, step, number)
            _ready(work, row, number, begin, end, rank)
            for at in range(begin, end, SMALL):
                count = min(SMALL, end - at)
                _stage(work, last, row, begin, at, count)
                words = _words(count)
                values[count : words * WORD] = 0.0
                for k in range(low.shape[1]):
                    _count_tile(
                        values, zeros, low[row, k], span[row, k], shift[row, k], count, words, offsets, reached, inside, found,
                        counts[groups[piece], k],
                    )  # fmt: skip
