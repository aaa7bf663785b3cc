"""The NumPy backend: always there, and the oracle that the others are tested against. Works in tiles that stay in cache."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import numpy.typing as npt

from mergekit_cl.dtypes import largest_finite
from mergekit_cl.kernels import BLOCK, Array, Table

TILE = 131_072
"""Elements worked on at a time: three float32 buffers of this size are 1.5 MiB, and calls are long enough to share the GIL."""


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum`."""
    nonfinite = np.zeros(len(table.spans), bool)
    buffers = np.empty((3, TILE), weights.dtype)
    limit = largest_finite(table.dtypes[-1])
    with np.errstate(all="ignore"):
        for row, tile in _tiles(pieces, TILE):
            *inputs, out = (span[tile] for span in table.spans[row])
            values = _sum(inputs, weights[row], about, buffers)
            if values.max() <= limit and values.min() >= -limit:
                _round(values, out)
            else:
                nonfinite[row] |= _round_any(_sum(inputs, weights[row], about, buffers, infinite=True), out)
    return nonfinite


def _sum(inputs: list[Array], weights: Array, about: bool, buffers: Array, infinite: bool = False) -> Array:
    """Sum a tile in the compute type; ``infinite`` says that infinities may be among the inputs."""
    acc, x, r = buffers[:, : len(inputs[0])]
    ref = _widen(inputs[0], r) if about else None
    for number, (weight, span) in enumerate(zip(weights, inputs[int(about) :], strict=True)):
        value = _widen(span, x)
        if ref is not None:
            agree = value == ref if infinite else None
            value = np.subtract(ref, value, out=x)
            if agree is not None:
                value[agree] = 0  # inf - inf is NaN, but models that agree keep what they have
        if number == 0:
            np.multiply(value, weight, out=acc)
        else:
            acc += np.multiply(value, weight, out=x)
    if ref is not None:
        acc += 0  # -0 becomes +0, and then -0 - (+0) is -0: a reference keeps the sign of its zeros
        np.subtract(ref, acc, out=acc)
    return cast(Array, acc)


def largest_magnitude(table: Table, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.largest_magnitude`."""
    largest = np.zeros((len(table.spans), len(table.dtypes)))
    scratch = np.empty(TILE, table.compute)
    for row, tile in _tiles(pieces, TILE):
        for column, span in enumerate(table.spans[row]):
            values = _widen(span[tile], scratch)
            largest[row, column] = np.maximum(largest[row, column], np.abs(values, out=scratch[: len(values)]).max())
    return largest


def gram(table: Table, about: bool, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram`."""
    blocks = []
    for row, block in _tiles(pieces, BLOCK):
        columns = [span[block].astype(table.compute) for span in table.spans[row]]
        with np.errstate(all="ignore"):
            if about:
                ref, *columns = columns
                columns = [column - ref for column in columns]
            stacked = np.stack([column.astype(np.float64) for column in columns])
            blocks.append(stacked @ stacked.T)
    count = len(table.dtypes) - about
    return np.array(blocks).reshape(-1, count, count)


def _tiles(pieces: Array, size: int) -> Iterator[tuple[int, slice]]:
    """Walk through the pieces in tiles of at most ``size`` elements."""
    for row, start, stop in pieces.tolist():
        for begin in range(start, stop, size):
            yield row, slice(begin, min(begin + size, stop))


def _widen(span: Array, buffer: Array) -> Array:
    """Return the values of a tile in the buffer's dtype: the tile itself where it has that dtype, else in ``buffer``."""
    if span.dtype == buffer.dtype:
        return span
    wide = buffer[: len(span)]
    if span.dtype.name == "bfloat16" and wide.dtype == np.float32:
        bits = wide.view(np.uint32)
        np.copyto(bits, span.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(wide, span)
    return wide


def _round(values: Array, out: Array) -> None:
    """Round ``values``, none of them NaN, to the dtype of ``out``, once and to nearest even. ``values`` is used up."""
    if out.dtype.name != "bfloat16":
        np.copyto(out, values, casting="unsafe")
        return
    bits = (values if values.dtype == np.float32 else _odd_float32(values)).view(np.uint32)
    half = bits >> 16
    half &= 1
    half += 0x7FFF
    bits += half
    bits >>= 16
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def _round_any(values: Array, out: Array) -> bool:
    """As `_round`, for values of any kind; return whether a result is not finite."""
    nan = np.isnan(values)
    values[nan] = 0
    _round(values, out)
    out[nan] = np.nan
    return not np.isfinite(out).all()


def _odd_float32(values: Array) -> Array:
    """Round float64 to float32 *to odd*: what is inexact gets an odd last bit, so that rounding once more is still right.

    See Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)
    bits |= (back != values) & ~np.isnan(values)
    return near
