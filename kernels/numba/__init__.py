"""The numba backend: compiled for the machine, released from the GIL, the default on a CPU."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_cl.kernels import BLOCK, Array, Keep, Slices, Table, TaskVectors
from mergekit_cl.kernels.numba import compiled, streaming
from mergekit_cl.kernels.numba.buffers import patterns, tiles, windows
from mergekit_cl.kernels.numba.formulas import elementwise, histogram_of, per_row, sum_of
from mergekit_cl.kernels.numpy.formulas import per_matrix

__all__ = [
    "elementwise", "gram", "gram_of_slices", "histogram_of", "kept_magnitude", "largest_magnitude", "magnitude_histogram",
    "per_matrix", "per_row", "sum_of", "task_vector_merge", "weighted_sum", "weighted_sum_of_slices",
]  # fmt: skip

_CODES = {
    "bfloat16": compiled.BFLOAT16,
    "float16": compiled.FLOAT16,
    "float32": compiled.FLOAT32,
    "float64": compiled.FLOAT64,
}
_KINDS = {"all": compiled.KEEP_ALL, "random": compiled.KEEP_RANDOM, "magnitude": compiled.KEEP_MAGNITUDE}
_COMBINE = {"sum": compiled.SUM, "weight_mean": compiled.MEAN, "count_mean": compiled.MEAN, "max": compiled.MAX}


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
    sums = np.zeros((_blocks(pieces), count, count))
    scratch, vectors = tiles(2, table.compute), tiles(count, np.float64)
    compiled.gram(table.addresses, _codes(table), about, pieces, BLOCK, scratch, vectors, sums)
    return sums


def gram_of_slices(table: Table, about: bool, slices: Slices, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram_of_slices`."""
    count = len(table.dtypes) - about
    sums = np.zeros((int((pieces[:, 2] - pieces[:, 1]).sum()), count, count))
    scratch, vectors = tiles(2, table.compute), tiles(count, np.float64)
    columns = tiles(count * (count + 1) // 2, np.float64, compiled.COLUMNS)
    compiled.gram_of_slices(
        table.addresses, _codes(table), about, *_lengths(table, slices), slices.strided, pieces, scratch, vectors, columns, sums
    )
    return sums


def weighted_sum_of_slices(
    table: Table, weights: Array, references: npt.NDArray[np.int64], slices: Slices, pieces: Array
) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum_of_slices`."""
    nonfinite = np.zeros(len(table.spans), np.bool_)
    count = weights.shape[1]
    scratch, spread = tiles(count + 3, weights.dtype), tiles(count, weights.dtype)
    compiled.weighted_sum_of_slices(
        table.addresses, _codes(table), weights, references, slices.first(table), *_lengths(table, slices), slices.strided,
        pieces, scratch, spread, np.empty(compiled.SMALL, np.int64), nonfinite,
    )  # fmt: skip
    return nonfinite


def magnitude_histogram(
    table: Table, low: Array, shift: Array, bins: int, wide: bool, groups: npt.NDArray[np.intp], pieces: Array
) -> npt.NDArray[np.int64]:
    """See `mergekit_cl.kernels.Backend.magnitude_histogram`."""
    low, span, shift, ways = windows(low, shift, bins, np.dtype(np.float64) if wide else table.compute)
    counts = np.zeros((int(groups.max(initial=-1)) + 1, len(table.dtypes) - 1, ways, bins + 2), np.int64)
    compiled.magnitude_histogram(
        table.addresses, _codes(table), low, span, shift, groups, pieces,
        tiles(2, table.compute), np.empty(compiled.SMALL, low.dtype), _marks()[0], *_marks(), counts,
    )  # fmt: skip
    return counts.sum(axis=2) if ways > 1 else counts[:, :, 0]


def kept_magnitude(table: Table, keep: Keep, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.kept_magnitude`."""
    models = len(table.dtypes) - 1
    sums = np.zeros((_blocks(pieces), models, 2))
    compiled.kept_magnitude(
        table.addresses, _codes(table), *_kept(keep, table.compute), pieces, BLOCK, tiles(2, table.compute),
        tiles(2, np.float64), *_hashes(), sums,
    )  # fmt: skip
    return sums


def task_vector_merge(table: Table, how: TaskVectors, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.task_vector_merge`."""
    nonfinite = np.zeros(len(table.spans), np.bool_)
    models, compute = how.scales.shape[1], how.scales.dtype
    votes = how.votes if how.elect == "unweighted" else how.scales
    shares = np.ones_like(how.scales) if how.combine == "count_mean" else how.shares
    compiled.task_vector_merge(
        table.addresses, _codes(table), *_kept(how.keep, compute), how.elect is not None, _COMBINE[how.combine], how.scales,
        votes, shares, how.factors, pieces, tiles(models + 4, compute), *_hashes(), nonfinite,
    )  # fmt: skip
    return nonfinite


def _codes(table: Table) -> npt.NDArray[np.int64]:
    return np.array([_CODES[dtype] for dtype in table.dtypes], np.int64)


def _blocks(pieces: Array) -> int:
    return int(sum(-(-(stop - start) // BLOCK) for _, start, stop in pieces.tolist()))


def _lengths(table: Table, slices: Slices) -> tuple[Array, Array]:
    return slices.lengths, slices.counts(table)


def _hashes() -> tuple[Array, Array, Array]:
    """Make buffers for the hashes of a tile, two in each, and `_marks`."""
    return np.empty(compiled.SMALL // 2, np.uint64), *_marks()


def _marks() -> tuple[Array, Array]:
    """Make buffers for a bit for each entry of a tile, and for a list of entries, with room for the unused end of a batch."""
    return np.empty(compiled.SMALL // compiled.WORD, np.uint64), np.empty(compiled.SMALL + 4, np.uint32)


def _kept(keep: Keep, compute: np.dtype[Any]) -> tuple[int, Array, Array, Array]:
    """Return how to carry out a `Keep`: its kind, edges, limits, keys.

    ``edges`` [rows, K, 4] are the lowest pattern that may be kept, how far the highest is above it, and the two about which
    the hash decides, compared with ``limits`` uint32 [rows, K, 2]; for "random" the first limit is
    0 if the hash does not matter.
    """
    kind, top = patterns(compute)
    never = kind.type(2 * top + 1)
    edges = np.full((*keep.keys.shape[:2], 4), never)
    edges[..., 0] = 0
    limits = (keep.thresholds & 0xFFFFFFFF).astype(np.uint32)
    if keep.kind == "random":
        edges[..., 1] *= keep.thresholds[..., 0] > 0
    elif keep.kind == "magnitude":
        some = (keep.thresholds > 0) & (keep.thresholds < 2**32) & (keep.cuts > 0)  # whether a zero is kept does not matter
        edges[..., 2:] = np.where(some, keep.cuts.astype(kind), never)
        # patterns that are equal to a cut belong to the window if the hash may keep them
        one, two = keep.cuts[..., 0], keep.cuts[..., 1] - (keep.thresholds[..., 1] == 2**32)
        low = np.where(one < 0, 0, one.astype(kind) + (keep.thresholds[..., 0] == 0)).astype(kind)
        empty = (two < 0) | (low > two.astype(kind))
        edges[..., 0] = np.where(empty, never, low)
        edges[..., 1] = np.where(empty, 0, two.astype(kind) - low)
    return _KINDS[keep.kind], edges, limits, np.array(keep.keys, np.uint32)
