"""The numba backend: compiled for the machine, released from the GIL, the default on a CPU."""

import numpy as np
import numpy.typing as npt

from mergekit_cl.kernels import BLOCK, Array, Table
from mergekit_cl.kernels.numba import compiled, streaming

_CODES = {
    "bfloat16": compiled.BFLOAT16,
    "float16": compiled.FLOAT16,
    "float32": compiled.FLOAT32,
    "float64": compiled.FLOAT64,
}


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum`."""
    nonfinite = np.zeros(len(table.spans), np.bool_)
    if pieces.size and table.lengths.sum() >= streaming.LEAST and len(table.dtypes) <= streaming.MOST_COLUMNS:
        streaming.weighted_sum(table, weights, about, pieces, nonfinite)
        return nonfinite
    scratch = np.empty((3, compiled.TILE), weights.dtype)
    compiled.weighted_sum(table.addresses, _codes(table), weights, about, pieces, scratch, nonfinite)
    return nonfinite


def largest_magnitude(table: Table, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.largest_magnitude`."""
    largest = np.zeros((len(table.spans), len(table.dtypes)))
    compiled.largest_magnitude(table.addresses, _codes(table), pieces, largest)
    return largest


def gram(table: Table, about: bool, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram`."""
    count = len(table.dtypes) - about
    blocks = int(sum(-(-(stop - start) // BLOCK) for _, start, stop in pieces.tolist()))
    sums = np.zeros((blocks, count, count))
    scratch = np.empty((len(table.dtypes), compiled.TILE), table.compute)
    compiled.gram(table.addresses, _codes(table), about, pieces, BLOCK, scratch, sums)
    return sums


def _codes(table: Table) -> npt.NDArray[np.int64]:
    return np.array([_CODES[dtype] for dtype in table.dtypes], np.int64)
