"""Launches of kernels over tables. What a kernel is told of its table lies on the device, and stays there for the next launch.

A table is told as a *record* for each piece, int64: the row, where program 0 would start, where the piece ends, whether its
spans are 16-byte aligned, and the address of each span. A program finds its record by its number. So it reads its place in
two steps, whatever the number of tensors, and one launch covers all of a model.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import Array, Slices, Table
from mergekit_cl.kernels.triton import compiled
from mergekit_cl.kernels.triton.tuning import Shape

DTYPES: Final = {"bfloat16": tl.uint16, "float16": tl.float16, "float32": tl.float32, "float64": tl.float64}
"""What the kernels call the dtypes of spans."""

WIDE: Final = 16
"""Bytes of the widest access: the address of a span that is read so is a multiple of it."""

_SMALL = 1 << 20  # bytes of an array up to which its copy on the device is kept
_MOST = 256  # tensors that are kept, at most
_kept: OrderedDict[Hashable, tuple[torch.Tensor, torch.cuda.Event]] = OrderedDict()  # with what another stream has to wait for
_of_graphs: list[tuple[torch.Tensor, ...]] = []  # what CUDA graphs read that were captured, whose lives nobody knows
_RESERVED = 1 << 22  # bytes of pinned memory that are there for the captures of graphs
_reserve: list[torch.Tensor] = []  # what is left of them
_KEEPING = threading.Lock()
_LAUNCH = threading.Lock()  # the interpreter keeps its state, such as the program's index, in global variables


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel bound to a table, which can be launched again and again.

    That copies nothing, allocates nothing and waits for nothing, so a CUDA graph can hold it. The tables live as long as this.
    """

    kernel: Any
    programs: int
    tables: tuple[torch.Tensor, ...]
    device: torch.device
    constants: dict[str, Any]

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch the kernel on the current stream; ``tensors`` are its arguments after the tables."""
        if not self.programs:
            return
        on_device: AbstractContextManager[Any] = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with _LAUNCH, on_device, np.errstate(all="ignore"):
            self.kernel[(self.programs,)](*self.tables, *tensors, **self.constants)


def run(kernel: Any, block: int, table: Table, pieces: Array, *tensors: torch.Tensor, **constants: Any) -> None:
    """Launch a kernel over the pieces of a table; see `prepare`."""
    prepare(kernel, block, table, pieces, **constants)(*tensors)


def prepare(
    kernel: Any, block: int, table: Table, pieces: Array, *, anywhere: bool = False, warps: int = 4, fuse: bool = False,
    **constants: Any,
) -> Launch:  # fmt: skip
    """Bind a kernel to the pieces of a table, a program for each ``block`` elements. The table keeps what is returned.

    Args:
        kernel: ``kernel(pieces_ptr, piece_of_ptr, *tensors, DTYPES, BLOCK, **constants)``; see `blocks._locate`.
        block: Elements for each program.
        table: Where the spans lie.
        pieces: What to work on, int64 [pieces, 3]: (row, start, stop).
        anywhere: Whether the kernel may start anywhere in a row. Then the elements in front of the first at which all spans are
            16-byte aligned, up to 15, get a program of their own, and the rest is read and written 16 bytes at a time.
        warps: Of each program.
        fuse: Whether products and sums may be contracted: only where that does not show, as in float64 sums of products of
            float32, which are exact.
        constants: Constant arguments of the kernel.

    """
    device = device_of(table)
    key = (id(kernel), block, anywhere, warps, fuse, _stream(device), pieces.tobytes(), *constants.items())
    known: Launch | None = table.kept.get(key)
    if known is not None:
        return known
    if anywhere:
        pieces = _peeled(table, pieces)
    rows, starts, stops = pieces.T
    programs = -(-(stops - starts) // block)
    # Program i, counted over all pieces, starts at element origin + i * block of its row
    origins = starts - (np.cumsum(programs) - programs) * block
    located = [rows, origins, stops, _aligned(table, rows, starts)]
    launch = _prepare(kernel, table, rows, programs, located, warps=warps, fuse=fuse, BLOCK=block, **constants)
    if not _capturing(device):  # what a graph makes is there at a replay only
        table.kept[key] = launch
    return launch


def run_slices(
    kernel: Any, held: int, table: Table, slices: Slices, pieces: Array, origins: Array, *tensors: torch.Tensor, shape: Shape,
    fuse: bool = False, **constants: Any,
) -> None:  # fmt: skip
    """Launch a kernel over pieces of slices, a program for each tile of a matrix (see `slicing`).

    Args:
        kernel: What to run; if it is given ``PAIRS``, a program walks along its slices and sums so many numbers of each.
        held: Columns of a tile that a program holds.
        table: What to work on.
        slices: How its rows are cut.
        pieces: (row, first slice, slice after the last).
        origins: What is given, or found, for slice s of a piece lies at ``origin + s``; int64 [pieces].
        tensors: Arguments of the kernel.
        shape: Elements of a tile, at most, and warps.
        fuse: See `prepare`.
        constants: Constant arguments of the kernel.

    """
    rows, first, stop = pieces.T
    counts, lengths = slices.counts(table)[rows], slices.lengths[rows]
    width = counts if slices.strided else lengths
    along = np.zeros_like(lengths), lengths
    top, bottom, left, right = (*along, first, stop) if slices.strided else (first, stop, *along)
    aligned = _aligned(table, rows, top * width + left) & (width % 8 == 0)
    # As for `gram`. Sums are held too; and the tiles of columns are high, so that a weight serves many elements
    size = max(128, min(shape.tile, 8192 // triton.next_power_of_2(held)))
    most = max(1, shape.tile // 2 // constants.get("PAIRS", 1))
    widest = min(64, most) if slices.strided else size
    tile_widths = np.array([triton.next_power_of_2(int(each)) for each in np.clip(width, 1, widest)], np.int64)
    for tile_width in np.unique(tile_widths).tolist():
        height = size // tile_width if slices.strided else min(size // tile_width, most)
        down, across = -(-(bottom - top) // height), -(-(right - left) // tile_width)
        programs = down * across if "PAIRS" not in constants else across if slices.strided else down
        programs = np.where(tile_widths == tile_width, programs, 0)
        located = [rows, np.cumsum(programs) - programs, origins, aligned, top, bottom, left, right, width]
        _prepare(
            kernel, table, rows, programs, located, warps=shape.warps, fuse=fuse,
            STRIDED=slices.strided, ROWS=height, COLUMNS=tile_width, **constants,
        )(*tensors)  # fmt: skip


def on_device(table: Table, *arrays: Array) -> list[torch.Tensor]:
    """Copy arrays to where a table lies. Small ones are kept there, by their bytes; what is returned must not be written to."""
    return [_copied(device_of(table), np.ascontiguousarray(array)) for array in arrays]


def device_of(table: Table) -> torch.device:
    """Return where the spans lie; refuse spans that the kernels, interpreted or compiled, cannot reach."""
    device = getattr(next((row[0] for row in table.spans if len(row)), None), "device", "cpu")
    interpreted = not isinstance(compiled._gram_kernel, triton.JITFunction)
    if interpreted != (str(device) == "cpu"):
        works, advice = ("the CPU", "unset") if interpreted else ("a GPU", "set")
        raise BackendError(
            f"the Triton kernels were loaded to work on {works}, but the tensors are on {device}; move "
            f"them, or {advice} TRITON_INTERPRET before the start of Python"
        )
    return torch.device(device)


def programs_of(pieces: Array, block: int) -> Array:
    """Count the programs that each piece needs, int64 [pieces]."""
    return -(-(pieces[:, 2] - pieces[:, 1]) // block)


def forget() -> None:
    """Give the tables back that are kept on devices for later launches."""
    with _KEEPING:
        _kept.clear()


def _prepare(
    kernel: Any, table: Table, rows: Array, programs: Array, located: Sequence[Array], *, warps: int, fuse: bool,
    **constants: Any,
) -> Launch:  # fmt: skip
    """Bind a kernel to pieces in these rows, each with its number of programs and its record but for the addresses."""
    device, total = device_of(table), int(programs.sum())
    tables: tuple[torch.Tensor, ...] = ()
    if total:
        records = np.column_stack([*located, table.addresses[rows]]).astype(np.int64)
        tables = _copied(device, records), _piece_of(device, programs.astype(np.int64), total)
    dtypes = tuple(DTYPES[dtype] for dtype in table.dtypes)
    # Products and sums are rounded one by one, whatever the default of this Triton is
    options = {"num_warps": warps, "enable_fp_fusion": fuse}
    return Launch(kernel, total, tables, device, {"DTYPES": dtypes, **constants, **options})


def _sizes(table: Table) -> npt.NDArray[np.int64]:
    """Bytes of an element of each column."""
    return np.array([DTYPES[dtype].primitive_bitwidth // 8 for dtype in table.dtypes], np.int64)


def _aligned(table: Table, rows: Array, starts: Array) -> npt.NDArray[np.bool_]:
    """Tell at which elements of which rows all spans are 16-byte aligned."""
    aligned = (table.addresses[rows] + starts[..., None] * _sizes(table)) % WIDE == 0
    return cast(npt.NDArray[np.bool_], aligned.all(axis=-1))


def _peeled(table: Table, pieces: Array) -> Array:
    """Cut the elements off pieces that lie in front of the first at which all spans are aligned, if there is one."""
    rows, starts, stops = pieces.T
    if _aligned(table, rows, starts).all():
        return pieces
    ahead = np.arange(WIDE)  # an alignment that elements of two bytes have comes again after eight
    aligned = np.stack([_aligned(table, rows, starts + each) for each in ahead], axis=1)
    heads = np.where(aligned.any(axis=1), aligned.argmax(axis=1), 0)
    cut = (heads > 0) & (starts + heads < stops)
    if not cut.any():
        return pieces
    middles = starts + heads
    first = np.stack([rows, starts, np.where(cut, middles, stops)], axis=1)
    rest = np.stack([rows, middles, stops], axis=1)[cut]
    return np.concatenate([first, rest])


def _stream(device: torch.device) -> int:
    """Name the stream that is launched on: what is made on one is not safe on another without waiting."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


def _copied(device: torch.device, array: Array) -> torch.Tensor:
    """Copy an array to the device, without waiting for the copy."""

    def copy() -> torch.Tensor:
        host = torch.tensor(array)
        if device.type != "cuda":
            return host
        pinned = _reserved(host) if _capturing(device) else host.pin_memory()
        return pinned.to(device, non_blocking=True)

    return _found_or_made(device, (array.dtype.str, array.shape, array.tobytes()) if array.nbytes <= _SMALL else None, copy)


def _reserved(host: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to pinned memory that was reserved before a capture, where none can be had; a replay reads it again.

    Raises:
        BackendError: None is left.

    """
    size = -(-host.nbytes // WIDE) * WIDE
    if _reserve and _reserve[0].nbytes >= size:
        view = _reserve[0][: host.nbytes].view(host.dtype).view(host.shape)
        _reserve[:] = [_reserve[0][size:]]
        _of_graphs.append((view,))
        return view.copy_(host)
    raise BackendError(
        "a CUDA graph is being captured, and what it launches was never launched before; do one step before that"
    )


def _piece_of(device: torch.device, programs: Array, total: int) -> torch.Tensor:
    """Say to which piece each program belongs, int32 [programs]."""

    def spread() -> torch.Tensor:
        numbers = torch.arange(len(programs), dtype=torch.int32, device=device)
        return torch.repeat_interleave(numbers, counts, output_size=total)

    counts = _copied(device, programs)
    return _found_or_made(device, programs.tobytes() if 4 * total <= _SMALL else None, spread)


def _found_or_made(device: torch.device, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Find a tensor that was made before, or make it, behind what the current stream does; without a key it is not kept.

    A CUDA graph that is being captured takes what is kept, which was there before; what it makes itself is not kept.
    """
    if device.type != "cuda":
        return make()
    with torch.cuda.device(device), _KEEPING:
        tensor, ready = _kept.get((device, key), (None, None)) if key is not None else (None, None)
        if _capturing(device):
            tensor = make() if tensor is None else tensor
            _of_graphs.append((tensor,))
            return tensor
        stream = torch.cuda.current_stream()
        if tensor is not None:
            stream.wait_event(ready)
            tensor.record_stream(stream)
            _kept.move_to_end((device, key))
            return tensor
        tensor = make()
        if not _reserve or _reserve[0].nbytes < _RESERVED // 2:
            _reserve[:] = [torch.empty(_RESERVED, dtype=torch.uint8, pin_memory=True)]
        if key is not None:
            _kept[device, key] = tensor, stream.record_event()
            if len(_kept) > _MOST:
                _kept.popitem(last=False)
        return tensor
