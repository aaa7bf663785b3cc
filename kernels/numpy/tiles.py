"""What the NumPy kernels share: tiles of spans, widened and rounded exactly, and the hashes of entries."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_cl.kernels import Array


def hashes_at(keys: npt.NDArray[np.uint32], start: int, places: list[tuple[int, Array]]) -> list[Array]:
    """Compute the hashes of some entries, which are given as (model, indices from ``start`` on)."""
    index = np.concatenate([at for _, at in places]).astype(np.uint64) + np.uint64(start)
    key = np.repeat(keys[[k for k, _ in places]].astype(np.uint64), [len(at) for _, at in places], axis=0)
    words = philox(index >> np.uint64(2), key[:, 0], key[:, 1])
    hashes = np.choose((index & np.uint64(3)).astype(np.intp), words)
    return np.split(hashes, np.cumsum([len(at) for _, at in places])[:-1])


def hashes_from(key: npt.NDArray[np.uint32], start: int, count: int) -> Array:
    """Compute the hashes (see `mergekit_cl.kernels.Keep`) of ``count`` entries from ``start`` on, a multiple of 4."""
    counters = np.arange(start // 4, -(-(start + count) // 4), dtype=np.uint64)
    hashes = np.empty((len(counters), 4), np.uint32)
    for lane, words in enumerate(philox(counters, *key.astype(np.uint64))):
        hashes[:, lane] = words
    return hashes.reshape(-1)[:count]


def philox(counter: Array, key0: Any, key1: Any) -> tuple[Array, Array, Array, Array]:
    """Philox-4x32-10 (Salmon et al., 2011) of counters below 2**64 and a key, or keys, of two words; all uint64."""
    c0, c1, c2, c3 = counter & _WORD, counter >> _HALF, np.zeros_like(counter), np.zeros_like(counter)
    first, second = np.empty_like(counter), np.empty_like(counter)
    for _ in range(10):
        np.multiply(c0, _PHILOX[0], out=first)
        np.multiply(c2, _PHILOX[1], out=second)
        for product, key, word, low in ((second, key0, c0, c1), (first, key1, c2, c3)):
            np.right_shift(product, _HALF, out=word)
            word ^= low
            word ^= key
            np.bitwise_and(product, _WORD, out=low)
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_PHILOX = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
INFINITY: dict[int, Any] = {4: np.int32(0x7F800000), 8: np.int64(0x7FF0000000000000)}


def walk(pieces: Array, size: int) -> Iterator[tuple[int, slice]]:
    """Walk through the pieces in tiles of at most ``size`` elements."""
    for row, start, stop in pieces.tolist():
        for begin in range(start, stop, size):
            yield row, slice(begin, min(begin + size, stop))


def widen(span: Array, buffer: Array) -> Array:
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


def round_(values: Array, out: Array) -> None:
    """Round ``values``, none of them NaN, to the dtype of ``out``, once and to nearest even. ``values`` is used up."""
    if out.dtype.name != "bfloat16":
        np.copyto(out, values, casting="unsafe")
        return
    bits = (values if values.dtype == np.float32 else odd_float32(values)).view(np.uint32)
    half = bits >> 16
    half &= 1
    half += 0x7FFF
    bits += half
    bits >>= 16
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def round_any(values: Array, out: Array) -> bool:
    """As `round_`, for values of any kind; return whether a result is not finite."""
    nan = np.isnan(values)
    values[nan] = 0
    round_(values, out)
    out[nan] = np.nan
    return not np.isfinite(out).all()


def odd_float32(values: Array) -> Array:
    """Round float64 to float32 *to odd*: what is inexact gets an odd last bit, so that rounding once more is still right.

    See Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    bits -= np.abs(back) > np.abs(values)
    bits |= (back != values) & ~np.isnan(values)
    return near
