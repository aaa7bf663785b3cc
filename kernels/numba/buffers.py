"""What the compiled loops are called with: buffers for tiles, and the windows of histograms."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_cl.kernels import Array
from mergekit_cl.kernels.numba import compiled

_PAD = 160
"""Elements between the buffers of a tile: processors confuse a store with a load from an address 4096 bytes on."""


def tiles(count: int, dtype: npt.DTypeLike, length: int = compiled.SMALL) -> Array:
    """Make buffers that begin at a line of the cache, with room behind for the end of a vector."""
    size = -(-(length + _PAD) * np.dtype(dtype).itemsize // 64) * 64
    memory = np.zeros(count * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * size].view(dtype).reshape(count, size // np.dtype(dtype).itemsize)


def patterns(compute: np.dtype[Any]) -> tuple[np.dtype[Any], int]:
    """Return the unsigned type of patterns, and a number that is above all of them."""
    return (np.dtype(np.uint32), 2**31 - 1) if compute == np.float32 else (np.dtype(np.uint64), 2**63 - 1)


def windows(low: Array, shift: Array, bins: int, compute: np.dtype[Any]) -> tuple[Array, Array, Array, int]:
    """Return where windows of patterns start, how wide they are, and their shifts, unsigned; and how many copies they have."""
    kind, top = patterns(compute)
    shift = np.minimum(shift, 8 * kind.itemsize - 1).astype(kind)
    span = np.minimum(kind.type(min(bins, top + 1)), kind.type(top + 1) >> shift) << shift
    return np.minimum(low, top).astype(kind), span, shift, compiled.WAYS if bins <= compiled.FEW_BINS else 1
