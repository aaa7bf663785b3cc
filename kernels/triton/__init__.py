"""The Triton backend: the default on a GPU. One launch covers all rows of a table, through a table of their addresses.

Under ``TRITON_INTERPRET=1``, set before this is imported, the kernels run in Triton's interpreter, on NumPy arrays.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import BLOCK, Array, Backend, Formula, Keep, MatrixFormula, Slices, Table, TaskVectors
from mergekit_cl.kernels import numpy as arrays
from mergekit_cl.kernels.triton import compiled, formulas, slicing, task_vectors, tiles

TILE = 2048
"""Elements that a program works on at a time: 16 for each thread, which of bfloat16 are two 16-byte accesses."""

COUNTERS = 1 << 24
"""Counters, of 8 bytes, that histograms may be spread over."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""How each kernel is compiled: with products and sums rounded one by one, whatever the default of this Triton is."""

_DTYPES = {"bfloat16": tl.uint16, "float16": tl.float16, "float32": tl.float32, "float64": tl.float64}
_LAUNCH = threading.Lock()  # the interpreter keeps its state, such as the program's index, in global variables


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum`."""
    nonfinite = torch.zeros(len(table.spans), dtype=torch.int32, device=_device(table))
    _launch(
        compiled._weighted_sum_kernel, TILE, table, pieces, nonfinite, *_on_device(table, weights), ABOUT=bool(about)
    )  # fmt: skip
    return np.asarray(nonfinite.cpu(), np.bool_)


def largest_magnitude(table: Table, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.largest_magnitude`."""
    bits = torch.zeros((len(table.spans), len(table.dtypes)), dtype=torch.int64, device=_device(table))
    _launch(compiled._largest_magnitude_kernel, TILE, table, pieces, bits)
    return np.asarray(bits.cpu(), np.int64).view(np.float64)


def gram(table: Table, about: bool, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram`."""
    count = len(table.dtypes) - about
    p, q = np.tril_indices(count)
    blocks = int(_programs(pieces, BLOCK).sum())
    pairs = torch.zeros((blocks, len(p)), dtype=torch.float64, device=_device(table))
    _launch(
        compiled._gram_kernel, BLOCK, table, pieces, pairs,
        COMPUTE=_DTYPES[table.compute.name], ABOUT=bool(about), PAIRS=triton.next_power_of_2(len(p)),
        # A tile of every model is held in float64. 64 elements for each of 128 threads are what fits their registers
        TILE=max(128, min(TILE, 8192 // triton.next_power_of_2(count))),
    )  # fmt: skip
    sums = np.empty((blocks, count, count))
    sums[:, p, q] = sums[:, q, p] = pairs.cpu().numpy()
    return sums


def gram_of_slices(table: Table, about: bool, slices: Slices, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram_of_slices`."""
    count = len(table.dtypes) - about
    p, q = np.tril_indices(count)
    counts = pieces[:, 2] - pieces[:, 1]
    pairs = torch.zeros((int(counts.sum()), len(p)), dtype=torch.float64, device=_device(table))
    origins = np.cumsum(counts) - counts - pieces[:, 1]
    _launch_of_slices(
        slicing._gram_of_slices_kernel, len(table.dtypes), table, slices, pieces, origins, pairs,
        COMPUTE=_DTYPES[table.compute.name], ABOUT=bool(about), PAIRS=triton.next_power_of_2(len(p)),
    )  # fmt: skip
    sums = np.empty((len(pairs), count, count))
    sums[:, p, q] = sums[:, q, p] = pairs.cpu().numpy()
    return sums


def weighted_sum_of_slices(
    table: Table, weights: Array, references: npt.NDArray[np.int64], slices: Slices, pieces: Array
) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum_of_slices`."""
    nonfinite = torch.zeros(len(table.spans), dtype=torch.int32, device=_device(table))
    origins = slices.first(table)[pieces[:, 0]]
    _launch_of_slices(
        slicing._weighted_sum_of_slices_kernel, len(table.dtypes) - 1, table, slices, pieces, origins, nonfinite,
        *_on_device(table, weights, references),
    )  # fmt: skip
    return np.asarray(nonfinite.cpu(), np.bool_)


def magnitude_histogram(
    table: Table, low: Array, shift: Array, bins: int, wide: bool, groups: npt.NDArray[np.intp], pieces: Array
) -> npt.NDArray[np.int64]:
    """See `mergekit_cl.kernels.Backend.magnitude_histogram`."""
    counts = _counters(table, groups, len(table.dtypes) - 1, bins)
    _launch(
        task_vectors._magnitude_histogram_kernel, TILE, table, pieces, counts,
        *_on_device(table, groups.astype(np.int64), np.stack([low, shift], axis=-1)),
        COMPUTE=_DTYPES[table.compute.name], WIDE=bool(wide), COPIES=counts.shape[1], BINS=int(bins),
    )  # fmt: skip
    return np.asarray(counts.sum(dim=1).cpu(), np.int64)


def kept_magnitude(table: Table, keep: Keep, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.kept_magnitude`."""
    count = len(table.dtypes) - 1
    blocks = int(_programs(pieces, BLOCK).sum())
    sums = torch.zeros((blocks, count, 2), dtype=torch.float64, device=_device(table))
    _launch(
        task_vectors._kept_magnitude_kernel, BLOCK, table, pieces, sums, *_on_device(table, _packed(keep, table, count)),
        COMPUTE=_DTYPES[table.compute.name], KEEP=keep.kind, TILE=TILE, SUMS=triton.next_power_of_2(2 * count),
    )  # fmt: skip
    return np.asarray(sums.cpu(), np.float64)


def task_vector_merge(table: Table, how: TaskVectors, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.task_vector_merge`."""
    count = len(table.dtypes) - 2
    nonfinite = torch.zeros(len(table.spans), dtype=torch.int32, device=_device(table))
    # All task vectors of a tile are held: in up to 64 registers of each of 128 threads
    fitting = 32768 // (triton.next_power_of_2(count) * how.scales.dtype.itemsize)
    _launch(
        task_vectors._task_vector_merge_kernel, max(512, min(TILE, fitting)), table, pieces, nonfinite,
        *_on_device(table, _packed(how.keep, table, count), how.scales, how.votes, how.shares, how.factors),
        KEEP=how.keep.kind, ELECT=how.elect, COMBINE=how.combine,
    )  # fmt: skip
    return np.asarray(nonfinite.cpu(), np.bool_)


def elementwise(table: Table, formula: Formula, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.elementwise`."""
    if not formulas.fits(formula.program):
        return _tile_by_tile(table).elementwise(table, formula, pieces)
    nonfinite = torch.zeros(len(table.spans), dtype=torch.int32, device=_device(table))
    _launch_formula(formulas._elementwise_kernel, _tile_of(formula), table, formula, pieces, nonfinite)
    return np.asarray(nonfinite.cpu(), np.bool_)


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
    blocks = int(_programs(pieces, BLOCK).sum())
    sums = torch.zeros((blocks, count), dtype=torch.float64, device=_device(table))
    _launch_formula(
        formulas._sum_of_kernel, BLOCK, table, formula, pieces, sums,
        TILE=_tile_of(formula), SUMS=triton.next_power_of_2(count),
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
        formulas._histogram_of_kernel, _tile_of(formula), table, formula, pieces, counts,
        *_on_device(table, groups.astype(np.int64), np.stack([low, shift], axis=-1)),
        WIDE=bool(wide), COPIES=counts.shape[1], WINDOWS=windows, BINS=int(bins),
    )  # fmt: skip
    return np.asarray(counts.sum(dim=1).cpu(), np.int64)


def _tile_by_tile(table: Table) -> Backend:
    """Return what carries out formulas operation by operation: on a GPU torch, in the interpreter NumPy."""
    return cast(Backend, arrays if str(_device(table)) == "cpu" else tiles)


def _tile_of(formula: Formula) -> int:
    """Return how many entries a program works on at a time: its values fill up to 64 registers of each of 128 threads."""
    assert formula.program is not None
    held = formulas.most_held(formula.program) * formula.compute.itemsize
    return max(256, min(TILE, 32768 // int(triton.next_power_of_2(held))))


def _launch_formula(
    kernel: Any, block: int, table: Table, formula: Formula, pieces: Array, *tensors: torch.Tensor, **constants: Any
) -> None:
    """Run a kernel of formulas over the pieces of a table; its results are the first of ``tensors``."""
    assert formula.program is not None
    keys = np.ascontiguousarray(formula.keys, np.uint32).view(np.int64)
    _launch(
        kernel, block, table, pieces, tensors[0], *_on_device(table, formula.constants, keys), *tensors[1:],
        CONSTANTS=formula.constants.shape[1], KEYS=keys.shape[1], **formulas.unrolled(formula.program), **constants,
    )  # fmt: skip


def _counters(table: Table, groups: npt.NDArray[np.intp], count: int, bins: int) -> torch.Tensor:
    """Make histograms, int64 [groups, copies, count, bins + 2].

    Most magnitudes share a few bins, and a GPU adds to one address one after another: so a histogram has some copies.
    """
    histograms = int(groups.max(initial=-1)) + 1
    fitting = COUNTERS // max(1, histograms * count * (bins + 2))
    copies = min(64, 1 << max(0, fitting.bit_length() - 1))
    return torch.zeros((histograms, copies, count, bins + 2), dtype=torch.int64, device=_device(table))


def _packed(keep: Keep, table: Table, count: int) -> npt.NDArray[np.int64]:
    """Put what says which entries are kept side by side: key, thresholds and cuts, int64 [rows, count, 5]."""
    if keep.kind == "all":
        return np.zeros((len(table.spans), count, 5), np.int64)
    keys = np.ascontiguousarray(keep.keys, np.uint32).view(np.int64)
    return np.concatenate([keys, keep.thresholds, keep.cuts], axis=2)


def _on_device(table: Table, *arrays: Array) -> list[torch.Tensor]:
    """Copy arrays to where a table lies."""
    return [torch.tensor(np.ascontiguousarray(array), device=_device(table)) for array in arrays]


def _device(table: Table) -> torch.device:
    """Return where the spans lie; refuse spans that the kernels, interpreted or compiled, cannot reach."""
    device = getattr(table.spans[0][0], "device", "cpu") if len(table.spans) else "cpu"
    interpreted = not isinstance(compiled._gram_kernel, triton.JITFunction)
    if interpreted != (str(device) == "cpu"):
        works, advice = ("the CPU", "unset") if interpreted else ("a GPU", "set")
        raise BackendError(
            f"the Triton kernels were loaded to work on {works}, but the tensors are on {device}; move "
            f"them, or {advice} TRITON_INTERPRET before the start of Python"
        )
    return torch.device(device)


def _programs(pieces: Array, block: int) -> Array:
    """Count the programs that each piece needs."""
    return -(-(pieces[:, 2] - pieces[:, 1]) // block)


def _launch(kernel: Any, block: int, table: Table, pieces: Array, *tensors: torch.Tensor, **constants: Any) -> None:
    """Run a kernel over the pieces of a table, one program for each ``block`` elements."""
    programs = _programs(pieces, block)
    rows, starts, stops = pieces.T
    # Program i, counted over all pieces, starts at element origin + i * block of its row
    origins = starts - (np.cumsum(programs) - programs) * block
    located = np.stack([rows, origins, stops, _aligned(table, rows, starts)], axis=1)
    _run(kernel, table, programs, located, *tensors, BLOCK=block, **constants)


def _launch_of_slices(
    kernel: Any, held: int, table: Table, slices: Slices, pieces: Array, origins: Array, *tensors: torch.Tensor,
    **constants: Any,
) -> None:  # fmt: skip
    """Run a kernel over pieces of slices, a program for each tile of a matrix (see `slicing`).

    Args:
        kernel: What to run; if it is given ``PAIRS``, a program walks along its slices and sums so many numbers of each.
        held: Columns of a tile that a program holds.
        table: What to work on.
        slices: How its rows are cut.
        pieces: (row, first slice, slice after the last).
        origins: What is given, or found, for slice s of a piece lies at ``origin + s``; int64 [pieces].
        tensors: Arguments of the kernel.
        constants: Constant arguments of the kernel.

    """
    rows, first, stop = pieces.T
    counts, lengths = slices.counts(table)[rows], slices.lengths[rows]
    width = counts if slices.strided else lengths
    along = np.zeros_like(lengths), lengths
    top, bottom, left, right = (*along, first, stop) if slices.strided else (first, stop, *along)
    aligned = _aligned(table, rows, top * width + left) & (width % 8 == 0)
    # As for `gram`. Sums are held too; and the tiles of columns are high, so that a weight serves many elements
    size = max(128, min(TILE, 8192 // triton.next_power_of_2(held)))
    most = max(1, TILE // 2 // constants.get("PAIRS", 1))
    widest = min(64, most) if slices.strided else size
    tile_widths = np.array([triton.next_power_of_2(int(each)) for each in np.clip(width, 1, widest)], np.int64)
    for tile_width in np.unique(tile_widths).tolist():
        height = size // tile_width if slices.strided else min(size // tile_width, most)
        down, across = -(-(bottom - top) // height), -(-(right - left) // tile_width)
        programs = down * across if "PAIRS" not in constants else across if slices.strided else down
        programs = np.where(tile_widths == tile_width, programs, 0)
        located = [rows, np.cumsum(programs) - programs, origins, aligned, top, bottom, left, right, width]
        _run(
            kernel, table, programs, np.stack(located, axis=1), *tensors,
            STRIDED=slices.strided, ROWS=height, COLUMNS=tile_width, **constants,
        )  # fmt: skip


def _aligned(table: Table, rows: Array, starts: Array) -> npt.NDArray[np.bool_]:
    """Tell at which elements of which rows all spans are 16-byte aligned."""
    sizes = [_DTYPES[dtype].primitive_bitwidth // 8 for dtype in table.dtypes]
    aligned = (table.addresses[rows] + starts[:, None] * sizes) % 16 == 0
    return cast(npt.NDArray[np.bool_], aligned.all(axis=1))


def _run(kernel: Any, table: Table, programs: Array, located: Array, *tensors: torch.Tensor, **constants: Any) -> None:
    """Run a kernel over pieces, each with its number of programs, where its results, the first of ``tensors``, lie."""
    total = int(programs.sum())
    if not total:
        return
    dtypes = tuple(_DTYPES[dtype] for dtype in table.dtypes)
    device = tensors[0].device
    addresses, located_ = (torch.tensor(array, device=device) for array in (table.addresses, located))
    piece_of = torch.repeat_interleave(torch.tensor(programs, device=device), output_size=total)
    on_device: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with _LAUNCH, on_device, np.errstate(all="ignore"):
        kernel[(total,)](addresses, located_, piece_of, *tensors, DTYPES=dtypes, **constants, **OPTIONS)
