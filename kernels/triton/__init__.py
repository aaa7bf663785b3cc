"""The Triton backend: the default on a GPU. One launch covers all rows of a table, through a table of their addresses.

Under ``TRITON_INTERPRET=1``, set before this is imported, the kernels run in Triton's interpreter, on NumPy arrays.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import triton

from mergekit_cl.kernels import BLOCK, Array, Backend, Formula, Keep, MatrixFormula, Selected, Slices, Table, TaskVectors
from mergekit_cl.kernels import numpy as arrays
from mergekit_cl.kernels.triton import compiled, formulas, launch, selection, slicing, task_vectors, tiles
from mergekit_cl.kernels.triton.launch import DTYPES
from mergekit_cl.kernels.triton.tuning import shape_of

_FEW = 8
"""Columns of which a thread's registers hold sums of all pairs."""

COUNTERS = 1 << 24
"""Counters, of 8 bytes, that histograms may be spread over."""


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum`."""
    shape, nonfinite = shape_of("sum", launch.device_of(table)), _flags(table)
    launch.prepare(
        compiled._weighted_sum_kernel, shape.tile, table, pieces, anywhere=True, warps=shape.warps, ABOUT=bool(about)
    )(nonfinite, *launch.on_device(table, weights))  # fmt: skip
    return np.asarray(nonfinite.cpu(), np.bool_)


def largest_magnitude(table: Table, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.largest_magnitude`."""
    shape = shape_of("maximum", launch.device_of(table))
    bits = torch.zeros((len(table.spans), len(table.dtypes)), dtype=torch.int64, device=launch.device_of(table))
    launch.prepare(
        compiled._largest_magnitude_kernel, 8 * shape.tile, table, pieces, anywhere=True, warps=shape.warps, TILE=shape.tile
    )(bits)  # fmt: skip
    return np.asarray(bits.cpu(), np.int64).view(np.float64)


def gram(table: Table, about: bool, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram`."""
    count = len(table.dtypes) - about
    blocks = int(launch.programs_of(pieces, BLOCK).sum())
    sums = np.empty((blocks, count, count))
    if count > _FEW:  # some at a time: every pair is among them once
        groups = [range(first, min(first + _FEW // 2, count)) for first in range(0, count, _FEW // 2)]
        for chosen in ([*one, *other] for one, other in combinations(groups, 2)):
            part = table.only([*range(about), *(about + column for column in chosen)])
            sums[np.ix_(range(blocks), chosen, chosen)] = gram(part, about, pieces)
        return sums
    p, q = np.tril_indices(count)
    pairs = torch.zeros((blocks, len(p)), dtype=torch.float64, device=launch.device_of(table))
    # Each thread adds up what it reads at a time: 16 bytes of the widest column, and of few columns two or four of these
    fold, warps = _fold_of(table), shape_of("gram", pairs.device).warps
    tile = 32 * warps * fold * max(1, 4 // triton.next_power_of_2(count))
    # A product of two float32 is exact in float64, and so the same whether it is contracted with a sum or not
    launch.run(
        compiled._gram_kernel, BLOCK, table, pieces, pairs, warps=warps, fuse=True,
        COMPUTE=DTYPES[table.compute.name], ABOUT=bool(about), PAIRS=triton.next_power_of_2(len(p)), TILE=tile, FOLD=fold,
    )  # fmt: skip
    sums[:, p, q] = sums[:, q, p] = pairs.cpu().numpy()
    return sums


def gram_of_slices(table: Table, about: bool, slices: Slices, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram_of_slices`."""
    count = len(table.dtypes) - about
    p, q = np.tril_indices(count)
    counts = pieces[:, 2] - pieces[:, 1]
    pairs = torch.zeros((int(counts.sum()), len(p)), dtype=torch.float64, device=launch.device_of(table))
    origins = np.cumsum(counts) - counts - pieces[:, 1]
    launch.run_slices(
        slicing._gram_of_slices_kernel, len(table.dtypes), table, slices, pieces, origins, pairs,
        shape=shape_of("slices", pairs.device), fuse=True,
        COMPUTE=DTYPES[table.compute.name], ABOUT=bool(about), PAIRS=triton.next_power_of_2(len(p)),
    )  # fmt: skip
    sums = np.empty((len(pairs), count, count))
    sums[:, p, q] = sums[:, q, p] = pairs.cpu().numpy()
    return sums


def weighted_sum_of_slices(
    table: Table, weights: Array, references: npt.NDArray[np.int64], slices: Slices, pieces: Array
) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum_of_slices`."""
    nonfinite = _flags(table)
    origins = slices.first(table)[pieces[:, 0]]
    launch.run_slices(
        slicing._weighted_sum_of_slices_kernel, len(table.dtypes) - 1, table, slices, pieces, origins, nonfinite,
        *launch.on_device(table, weights, references), shape=shape_of("slices", nonfinite.device),
    )  # fmt: skip
    return np.asarray(nonfinite.cpu(), np.bool_)


def magnitude_histogram(
    table: Table, low: Array, shift: Array, bins: int, wide: bool, groups: npt.NDArray[np.intp], pieces: Array
) -> npt.NDArray[np.int64]:
    """See `mergekit_cl.kernels.Backend.magnitude_histogram`."""
    counts = _counters(table, groups, len(table.dtypes) - 1, bins)
    shape = shape_of("histogram", counts.device)
    launch.run(
        task_vectors._magnitude_histogram_kernel, shape.tile, table, pieces, counts,
        *launch.on_device(table, groups.astype(np.int64), np.stack([low, shift], axis=-1)),
        warps=shape.warps, COMPUTE=DTYPES[table.compute.name], WIDE=bool(wide), COPIES=counts.shape[1], BINS=int(bins),
    )  # fmt: skip
    return np.asarray(counts.sum(dim=1).cpu(), np.int64)


def kept_magnitude(table: Table, keep: Keep, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.kept_magnitude`."""
    count = len(table.dtypes) - 1
    blocks = int(launch.programs_of(pieces, BLOCK).sum())
    sums = torch.zeros((blocks, count, 2), dtype=torch.float64, device=launch.device_of(table))
    shape = shape_of("kept", sums.device)
    launch.run(
        task_vectors._kept_magnitude_kernel, BLOCK, table, pieces, sums, *launch.on_device(table, _packed(keep, table, count)),
        warps=shape.warps, COMPUTE=DTYPES[table.compute.name], KEEP=keep.kind, TILE=shape.tile,
        SUMS=triton.next_power_of_2(2 * count),
    )  # fmt: skip
    return np.asarray(sums.cpu(), np.float64)


def task_vector_merge(table: Table, how: TaskVectors, pieces: Array) -> npt.NDArray[np.bool_ | np.int32]:
    """See `mergekit_cl.kernels.Backend.task_vector_merge`."""
    count, flags = len(table.dtypes) - 2, _flags(table)
    (keep,) = launch.on_device(table, _packed(how.keep, table, count))
    if how.keep.places is not None:
        keep, flags = selection.take(how.keep, keep, *launch.on_device(table, how.keep.places))
    # All task vectors of a tile are held: in up to 64 registers of each of 128 threads
    fitting = 32768 // (triton.next_power_of_2(count) * how.scales.dtype.itemsize)
    shape = shape_of("task_vectors", flags.device)
    launch.run(
        task_vectors._task_vector_merge_kernel, max(512, min(shape.tile, fitting)), table, pieces, flags, keep,
        *launch.on_device(table, how.scales, how.votes, how.shares, how.factors),
        warps=shape.warps, KEEP=how.keep.kind, ELECT=how.elect, COMBINE=how.combine,
    )  # fmt: skip
    return np.asarray(flags.cpu(), np.bool_ if how.keep.places is None else np.int32)


def select_magnitudes(
    tables: Sequence[Table], numbers: Sequence[npt.NDArray[np.intp]], ranks: npt.NDArray[np.int64]
) -> Selected:
    """See `mergekit_cl.kernels.SelectingBackend.select_magnitudes`."""
    return selection.select(tables, numbers, ranks)


def elementwise(table: Table, formula: Formula, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.elementwise`."""
    if not formulas.fits(formula.program):
        return _tile_by_tile(table).elementwise(table, formula, pieces)
    return np.asarray(enqueue_elementwise(table, formula, pieces).cpu(), np.bool_)


def enqueue_elementwise(table: Table, formula: Formula, pieces: Array) -> torch.Tensor:
    """As `elementwise`, without waiting; return its flags, int32 [rows], not 0 where something is not finite.

    Only for programs that `formulas.fits`.
    """
    nonfinite = _flags(table)
    anywhere = formula.keys.shape[1] == 0  # random numbers are made four at a time
    _launch_formula(
        formulas._elementwise_kernel, _tile_of(table, formula), table, formula, pieces, nonfinite, anywhere=anywhere
    )  # fmt: skip
    return nonfinite


def per_row(table: Table, formula: Formula, slices: Slices, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_row`."""
    return _tile_by_tile(table).per_row(table, formula, slices, pieces)


def per_matrix(table: Table, formulas: Sequence[MatrixFormula], pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_matrix`."""
    return _tile_by_tile(table).per_matrix(table, formulas, pieces)


def sum_of(table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.sum_of`."""
    if formula.program is None or slices is not None or not formulas.fits(formula.program):
        return _tile_by_tile(table).sum_of(table, formula, slices, pieces)
    count = len(formula.program.outputs)
    blocks = int(launch.programs_of(pieces, BLOCK).sum())
    sums = torch.zeros((blocks, count), dtype=torch.float64, device=launch.device_of(table))
    _launch_formula(
        formulas._sum_of_kernel, BLOCK, table, formula, pieces, sums,
        TILE=_tile_of(table, formula), FOLD=_fold_of(table), SUMS=triton.next_power_of_2(count),
    )  # fmt: skip
    return np.asarray(sums.cpu(), np.float64)


def histogram_of(
    table: Table, formula: Formula, slices: Slices | None, low: Array, shift: Array, bins: int, wide: bool,
    groups: npt.NDArray[np.intp], pieces: Array,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """See `mergekit_cl.kernels.Backend.histogram_of`."""
    if slices is not None or not formulas.fits(formula.program):
        return _tile_by_tile(table).histogram_of(table, formula, slices, low, shift, bins, wide, groups, pieces)
    windows = low.shape[1]
    counts = _counters(table, groups, windows, bins)
    _launch_formula(
        formulas._histogram_of_kernel, _tile_of(table, formula), table, formula, pieces, counts,
        *launch.on_device(table, groups.astype(np.int64), np.stack([low, shift], axis=-1)),
        WIDE=bool(wide), COPIES=counts.shape[1], WINDOWS=windows, BINS=int(bins),
    )  # fmt: skip
    return np.asarray(counts.sum(dim=1).cpu(), np.int64)


def _tile_by_tile(table: Table) -> Backend:
    """Return what carries out formulas operation by operation: on a GPU torch, in the interpreter NumPy."""
    return cast(Backend, arrays if str(launch.device_of(table)) == "cpu" else tiles)


def _tile_of(table: Table, formula: Formula) -> int:
    """Return how many entries a program works on at a time: its values fill up to 64 registers of each of 128 threads."""
    assert formula.program is not None
    held = formulas.most_held(formula.program) * formula.compute.itemsize
    return max(256, min(shape_of("formula", launch.device_of(table)).tile, 32768 // int(triton.next_power_of_2(held))))


def _fold_of(table: Table) -> int:
    """Return how many neighbours a thread reads at a time, in 16 bytes of the widest column."""
    return launch.WIDE // max(int(DTYPES[dtype].primitive_bitwidth) // 8 for dtype in table.dtypes)


def _launch_formula(
    kernel: Any, block: int, table: Table, formula: Formula, pieces: Array, *tensors: torch.Tensor, **constants: Any
) -> None:
    """Run a kernel of formulas over the pieces of a table; its results are the first of ``tensors``."""
    assert formula.program is not None
    keys = np.ascontiguousarray(formula.keys, np.uint32).view(np.int64)
    launch.prepare(
        kernel, block, table, pieces, warps=shape_of("formula", tensors[0].device).warps,
        CONSTANTS=formula.constants.shape[1], KEYS=keys.shape[1], **formulas.unrolled(formula.program), **constants,
    )(tensors[0], *launch.on_device(table, formula.constants, keys), *tensors[1:])  # fmt: skip


def _counters(table: Table, groups: npt.NDArray[np.intp], count: int, bins: int) -> torch.Tensor:
    """Make histograms, int64 [groups, copies, count, bins + 2].

    Most magnitudes share a few bins, and a GPU adds to one address one after another: so a histogram has some copies.
    """
    histograms = int(groups.max(initial=-1)) + 1
    fitting = COUNTERS // max(1, histograms * count * (bins + 2))
    copies = min(64, 1 << max(0, fitting.bit_length() - 1))
    return torch.zeros((histograms, copies, count, bins + 2), dtype=torch.int64, device=launch.device_of(table))


def _flags(table: Table) -> torch.Tensor:
    """Make a flag for each row, int32 [rows]."""
    return torch.zeros(len(table.spans), dtype=torch.int32, device=launch.device_of(table))


def _packed(keep: Keep, table: Table, count: int) -> npt.NDArray[np.int64]:
    """Put what says which entries are kept side by side: key, thresholds and cuts, int64 [rows, count, 5]."""
    if keep.kind == "all":
        return np.zeros((len(table.spans), count, 5), np.int64)
    keys = np.ascontiguousarray(keep.keys, np.uint32).view(np.int64)
    return np.concatenate([keys, keep.thresholds, keep.cuts], axis=2)
