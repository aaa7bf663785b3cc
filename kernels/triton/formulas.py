"""The Triton kernels of formulas: each carries out any `Program`, whose operations are constants of its compilation.

A program comes as three tuples: the ``NAMES`` of the operations; their ``ARGUMENTS``, three numbers each (of a leaf that of
an input, else of operations; 0 where there are fewer); and the ``OUTPUTS``. Loops over them are unrolled.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from collections import Counter
from typing import Any

import triton
import triton.language as tl

from mergekit_cl.formula import Program
from mergekit_cl.kernels.triton.blocks import (
    _count,
    _divide,
    _folded,
    _infinity,
    _load,
    _locate,
    _magnitude,
    _narrow,
    _parted,
    _pointers,
    _widen,
)
from mergekit_cl.kernels.triton.task_vectors import _hash

MOST_OPERATIONS = 500
"""A kernel of more operations takes more than ten seconds to compile."""


def fits(program: Program | None) -> bool:
    """Tell whether the kernels carry out a program. Of ``exp`` and the like Triton has approximations only."""
    return not (program is None or program.by_row or program.transcendental or len(program.operations) > MOST_OPERATIONS)


def unrolled(program: Program) -> dict[str, Any]:
    """Return a program as constant arguments of a kernel."""
    return {
        "NAMES": tuple(name for name, _ in program.operations),
        "ARGUMENTS": tuple(argument for _, given in program.operations for argument in (*given, 0, 0)[:3]),
        "OUTPUTS": program.outputs,
    }


def most_held(program: Program) -> int:
    """Count the values of an entry that are held at a time, at most."""
    ends = Counter(program.last_uses)
    held = most = 1
    for number in range(len(program.operations)):
        most = max(most, held)
        held += 1 - ends[number]
    return most


@triton.jit
def _bits(x):
    """Return the bits of ``x``, int32 or int64."""
    return x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def _operation(NAME: tl.constexpr, a, b, c):
    """Carry out an operation that is no leaf."""
    if NAME == "add":
        value = a + b
    elif NAME == "sub":
        value = a - b
    elif NAME == "mul":
        value = a * b
    elif NAME == "div":
        value = _divide(a, b)
    elif NAME == "neg":
        value = a * -1.0  # Triton 3.6 has 0 - a for -a, which is +0 for zeros of both signs
    elif NAME == "abs":
        value = tl.abs(a)
    elif NAME == "sqrt":
        value = tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)
    elif NAME == "sign":
        value = tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, tl.where(a == 0, 0.0, a)))
    elif NAME == "copysign":
        value = (_magnitude(a) | (_bits(b) ^ _magnitude(b))).to(a.dtype, bitcast=True)
    elif NAME == "max":
        value = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "min":
        value = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "lt":
        value = a < b
    elif NAME == "le":
        value = a <= b
    elif NAME == "gt":
        value = a > b
    elif NAME == "ge":
        value = a >= b
    elif NAME == "eq":
        value = a == b
    elif NAME == "ne":
        value = a != b
    elif NAME == "and":
        value = a & b
    elif NAME == "or":
        value = a | b
    elif NAME == "xor":
        value = a ^ b
    elif NAME == "not":
        value = a == 0
    else:
        tl.static_assert(NAME == "where")
        value = tl.where(a, b, c)
    return value


@triton.jit
def _values(
    spans_ptr, constants_ptr, keys_ptr, start, stop, NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, COUNT: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Read a block of ``COUNT`` inputs; return the largest of their magnitudes, as bits, and the value of each operation."""
    COMPUTE: tl.constexpr = constants_ptr.dtype.element_ty
    largest = _magnitude(tl.zeros([BLOCK], COMPUTE))
    inputs = ()
    for k in tl.static_range(COUNT):
        x = _load(tl.load(spans_ptr + k), start, stop, DTYPES[k], BLOCK, FULL).to(COMPUTE)
        largest = tl.maximum(largest, _magnitude(x))
        inputs = inputs + (x,)  # noqa: RUF005 - Triton has no starred expression
    values = ()
    for n in tl.static_range(len(NAMES)):
        if NAMES[n] == "input":
            value = inputs[ARGUMENTS[3 * n]]
        elif NAMES[n] == "constant":
            value = tl.broadcast_to(tl.load(constants_ptr + ARGUMENTS[3 * n]), [BLOCK])
        elif NAMES[n] == "uniform":
            hashes = _hash(start, tl.load(keys_ptr + ARGUMENTS[3 * n]), BLOCK)
            value = (hashes >> 8).to(tl.int32).to(COMPUTE) * 2.0**-24
        elif NAMES[n] == "float":
            value = tl.where(values[ARGUMENTS[3 * n]], 1.0, 0.0).to(COMPUTE)
        else:
            value = _operation(
                tl.constexpr(NAMES[n]), values[ARGUMENTS[3 * n]], values[ARGUMENTS[3 * n + 1]], values[ARGUMENTS[3 * n + 2]]
            )
        values = values + (value,)  # noqa: RUF005
    return largest, values


@triton.jit
def _elementwise_block(
    spans_ptr, constants_ptr, keys_ptr, nonfinite_ptr, start, stop,
    NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(DTYPES) - 1
    largest, values = _values(
        spans_ptr, constants_ptr, keys_ptr, start, stop, NAMES, ARGUMENTS, COUNT, DTYPES, BLOCK, FULL
    )  # fmt: skip
    value = values[OUTPUTS[0]]
    out = _narrow(value, DTYPES[COUNT])
    out_ptr = _pointers(tl.load(spans_ptr + COUNT), start, DTYPES[COUNT], BLOCK, FULL)
    largest = tl.maximum(largest, _magnitude(_widen(out, DTYPES[COUNT]).to(value.dtype)))
    if FULL:
        tl.store(out_ptr, out)
    else:
        inside = tl.arange(0, BLOCK) < stop - start
        tl.store(out_ptr, out, mask=inside)
        largest = tl.where(inside, largest, 0)  # what is computed beyond may be infinite
    if tl.max(largest, axis=0) >= _infinity(value):
        tl.store(nonfinite_ptr, 1)


@triton.jit
def _elementwise_kernel(
    pieces_ptr, piece_of_ptr, nonfinite_ptr, constants_ptr, keys_ptr,
    CONSTANTS: tl.constexpr, KEYS: tl.constexpr, NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    row_ptr, row_keys_ptr = constants_ptr + row * CONSTANTS, keys_ptr + row * KEYS
    if aligned & (start + BLOCK <= stop):
        _elementwise_block(
            spans_ptr, row_ptr, row_keys_ptr, nonfinite_ptr + row, start, stop,
            NAMES, ARGUMENTS, OUTPUTS, DTYPES, BLOCK, True,
        )  # fmt: skip
    else:
        for part in range(0, BLOCK, BLOCK // 2):  # masks and narrow accesses take more registers
            if start + part < stop:
                _elementwise_block(
                    spans_ptr, row_ptr, row_keys_ptr, nonfinite_ptr + row, start + part, stop,
                    NAMES, ARGUMENTS, OUTPUTS, DTYPES, BLOCK // 2, False,
                )  # fmt: skip


@triton.jit
def _add_outputs(
    lanes, spans_ptr, constants_ptr, keys_ptr, tile, stop, NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPES: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Add the outputs of a tile, each thread to sums of its own."""
    _, values = _values(spans_ptr, constants_ptr, keys_ptr, tile, stop, NAMES, ARGUMENTS, len(DTYPES), DTYPES, TILE, FULL)
    added = ()
    for k in tl.static_range(len(OUTPUTS)):
        wide = values[OUTPUTS[k]].to(tl.float64)
        if not FULL:
            wide = tl.where(tl.arange(0, TILE) < stop - tile, wide, 0.0)
        added = added + (lanes[k] + _folded(wide, FOLD),)  # noqa: RUF005
    return added


@triton.jit
def _sum_of_kernel(
    pieces_ptr, piece_of_ptr, sums_ptr, constants_ptr, keys_ptr,
    CONSTANTS: tl.constexpr, KEYS: tl.constexpr, NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Sum the outputs over a block, tile by tile."""
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    middle, end = _parted(start, stop, aligned, BLOCK, TILE)
    row_ptr, row_keys_ptr = constants_ptr + row * CONSTANTS, keys_ptr + row * KEYS
    lanes = ()
    for k in tl.static_range(len(OUTPUTS)):  # noqa: B007
        lanes = lanes + (tl.zeros([TILE // FOLD], tl.float64),)  # noqa: RUF005
    for tile in range(start, middle, TILE):
        lanes = _add_outputs(
            lanes, spans_ptr, row_ptr, row_keys_ptr, tile, stop, NAMES, ARGUMENTS, OUTPUTS, DTYPES, TILE, FOLD, True
        )
    for tile in range(middle, end, TILE):
        lanes = _add_outputs(
            lanes, spans_ptr, row_ptr, row_keys_ptr, tile, stop, NAMES, ARGUMENTS, OUTPUTS, DTYPES, TILE, FOLD, False
        )
    place = tl.arange(0, SUMS)
    sums = tl.zeros([SUMS], tl.float64)
    for k in tl.static_range(len(OUTPUTS)):
        sums += tl.where(place == k, tl.sum(lanes[k], axis=0), 0.0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * len(OUTPUTS) + place, sums, mask=place < len(OUTPUTS))


@triton.jit
def _histogram_block(
    spans_ptr, constants_ptr, keys_ptr, windows_ptr, counts_ptr, start, stop,
    WIDE: tl.constexpr, WINDOWS: tl.constexpr, BINS: tl.constexpr,
    NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, BLOCK) < stop - start
    _, values = _values(
        spans_ptr, constants_ptr, keys_ptr, start, stop, NAMES, ARGUMENTS, len(DTYPES), DTYPES, BLOCK, FULL
    )  # fmt: skip
    value = values[OUTPUTS[0]]
    if WIDE:
        value = value.to(tl.float64)
    pattern = tl.minimum(_magnitude(value), _infinity(value))
    nonfinite = tl.sum((inside & (pattern == _infinity(value))).to(tl.int32), axis=0)
    for k in tl.static_range(WINDOWS):
        _count(pattern, nonfinite, inside, windows_ptr + 2 * k, counts_ptr + k * (BINS + 2), BINS)


@triton.jit
def _histogram_of_kernel(
    pieces_ptr, piece_of_ptr, counts_ptr, constants_ptr, keys_ptr, groups_ptr, windows_ptr,
    WIDE: tl.constexpr, COPIES: tl.constexpr, WINDOWS: tl.constexpr, BINS: tl.constexpr,
    CONSTANTS: tl.constexpr, KEYS: tl.constexpr, NAMES: tl.constexpr, ARGUMENTS: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    row_ptr, row_keys_ptr = constants_ptr + row * CONSTANTS, keys_ptr + row * KEYS
    row_windows_ptr = windows_ptr + row * (2 * WINDOWS)
    group_ptr = groups_ptr + tl.load(piece_of_ptr + tl.program_id(0))
    copy = tl.load(group_ptr) * COPIES + tl.program_id(0) % COPIES
    histogram_ptr = counts_ptr + copy * (WINDOWS * (BINS + 2))
    if aligned & (start + BLOCK <= stop):
        _histogram_block(
            spans_ptr, row_ptr, row_keys_ptr, row_windows_ptr, histogram_ptr, start, stop, WIDE, WINDOWS, BINS,
            NAMES, ARGUMENTS, OUTPUTS, DTYPES, BLOCK, True,
        )  # fmt: skip
    else:
        _histogram_block(
            spans_ptr, row_ptr, row_keys_ptr, row_windows_ptr, histogram_ptr, start, stop, WIDE, WINDOWS, BINS,
            NAMES, ARGUMENTS, OUTPUTS, DTYPES, BLOCK, False,
        )  # fmt: skip
