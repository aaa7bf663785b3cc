"""The Triton backend: the default on a GPU. One launch covers all rows of a table, through a table of their addresses.

Under ``TRITON_INTERPRET=1``, set before this is imported, the kernels run in Triton's interpreter, on NumPy arrays.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import BLOCK, Array, Table
from mergekit_cl.kernels.triton import compiled

TILE = 2048
"""Elements that a program works on at a time: 16 for each thread, which of bfloat16 are two 16-byte accesses."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""How each kernel is compiled: with products and sums rounded one by one, whatever the default of this Triton is."""

_DTYPES = {"bfloat16": tl.uint16, "float16": tl.float16, "float32": tl.float32, "float64": tl.float64}
_LAUNCH = threading.Lock()  # the interpreter keeps its state, such as the program's index, in global variables


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum`."""
    device = _device(table)
    nonfinite = torch.zeros(len(table.spans), dtype=torch.int32, device=device)
    on_device = torch.tensor(np.ascontiguousarray(weights), device=device)
    _launch(compiled._weighted_sum_kernel, TILE, table, pieces, nonfinite, on_device, ABOUT=bool(about))
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


def _launch(kernel: Any, block: int, table: Table, pieces: Array, *results: torch.Tensor, **constants: Any) -> None:
    """Run a kernel over the pieces of a table, one program for each ``block`` elements, where its results lie."""
    programs = _programs(pieces, block)
    total = int(programs.sum())
    if not total:
        return
    dtypes = tuple(_DTYPES[dtype] for dtype in table.dtypes)
    rows, starts, stops = pieces.T
    sizes = [dtype.primitive_bitwidth // 8 for dtype in dtypes]
    aligned = ((table.addresses[rows] + starts[:, None] * sizes) % 16 == 0).all(axis=1)
    # Program i, counted over all pieces, starts at element origin + i * block of its row
    origins = starts - (np.cumsum(programs) - programs) * block
    device = results[0].device
    addresses = torch.tensor(table.addresses, device=device)
    located = torch.tensor(np.stack([rows, origins, stops, aligned], axis=1), device=device)
    piece_of = torch.repeat_interleave(torch.tensor(programs, device=device), output_size=total)
    on_device: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with _LAUNCH, on_device, np.errstate(all="ignore"):
        kernel[(total,)](addresses, located, piece_of, *results, DTYPES=dtypes, BLOCK=block, **constants, **OPTIONS)
