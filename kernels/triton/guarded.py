"""Weighted sums in place, of which all are written or none: whether they may be is found, and decided, on the device.

A check reads the inputs, and sets a flag where one is NaN, infinite, or so large that a sum might not be finite. The sums,
launched right behind it, look at the flag first. So nobody waits between the two; and the launches are the same each time, over
the same memory, so that a CUDA graph can hold them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergekit_cl.errors import BackendError
from mergekit_cl.kernels import Array, Table
from mergekit_cl.kernels.triton import launch
from mergekit_cl.kernels.triton.blocks import _locate, _parted
from mergekit_cl.kernels.triton.compiled import _top, _weighted_sum_kernel
from mergekit_cl.kernels.triton.tuning import shape_of

RECORDABLE = frozenset({"cuda"})
"""Kinds of devices whose launches a graph can hold."""

_Launched: TypeAlias = Callable[[], None]


@triton.jit
def _check_kernel(
    pieces_ptr, piece_of_ptr, refused_ptr, limits_ptr, DTYPES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Set the flag if a magnitude in any column of a block is above the row's limit; that of NaN always is."""
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    middle, end = _parted(start, stop, aligned, BLOCK, TILE)
    limit = tl.load(limits_ptr + row)
    for k in tl.static_range(len(DTYPES)):
        top = _top(tl.load(spans_ptr + k), start, middle, end, stop, DTYPES[k], TILE)
        if top > limit:
            tl.store(refused_ptr, 1)


@triton.jit
def _guarded_weighted_sum_kernel(
    pieces_ptr, piece_of_ptr, refused_ptr, nonfinite_ptr, weights_ptr,
    DTYPES: tl.constexpr, ABOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(refused_ptr) == 0:
        _weighted_sum_kernel(pieces_ptr, piece_of_ptr, nonfinite_ptr, weights_ptr, DTYPES, ABOUT, BLOCK)


class GuardedSums:
    """Weighted sums over several tables, which are computed together or not at all, again and again.

    Args:
        table: One of the tables; all are on its device.

    """

    def __init__(self, table: Table) -> None:
        self.device = launch.device_of(table)
        self._refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._first: list[_Launched] = []
        self._always: list[_Launched] = []
        self._sums: list[_Launched] = []
        self._known = False  # whether the constant inputs have been found fit
        self._graph: torch.cuda.CUDAGraph | None = None

    def add(
        self, table: Table, weights: Array, about: bool, reach: npt.NDArray[np.float64] | None, constant: Collection[int] = ()
    ) -> None:
        """Add the sums of a table.

        Args:
            table: As for `mergekit_cl.kernels.Backend.weighted_sum`.
            weights: Likewise.
            about: Likewise.
            reach: The largest magnitude that the inputs of each row may have, float64 [rows]; all sums of such numbers are
                finite. ``None`` lets everything through.
            constant: The columns whose memory does not change between runs. They are checked until they have been found fit.

        """
        if reach is not None:
            changing = [column for column in range(len(table.dtypes) - 1) if column not in constant]
            for columns, checks in ((sorted(constant), self._first), (changing, self._always)):
                if columns:
                    checks.append(self._check(table.only(columns), reach))
        shape = shape_of("sum", self.device)
        # Backwards, as in `_launch`: what a check has read last is still in the cache
        ready = launch.prepare(
            _guarded_weighted_sum_kernel, shape.tile, table, table.whole[::-1], anywhere=True, warps=shape.warps,
            ABOUT=bool(about),
        )  # fmt: skip
        # Flags of results that are not finite: where they may be, nobody asks
        nonfinite = torch.zeros(len(table.spans), dtype=torch.int32, device=self.device)
        self._sums.append(partial(ready, self._refused, nonfinite, *launch.on_device(table, weights)))

    def _check(self, table: Table, reach: npt.NDArray[np.float64]) -> _Launched:
        shape = shape_of("maximum", self.device)
        ready = launch.prepare(
            _check_kernel, 8 * shape.tile, table, table.whole, anywhere=True, warps=shape.warps, TILE=shape.tile
        )
        return partial(ready, self._refused, *launch.on_device(table, reach.view(np.int64)))

    def launch(self) -> None:
        """Check and compute, and wait for nothing."""
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    def done(self) -> bool:
        """Return whether that was done. If not, nothing was written. It waits, unless there was nothing to check."""
        if not (self._always or (self._first and not self._known)):
            return True
        done = not self._refused.item()
        self._known |= done
        return done

    def _launch(self) -> None:
        self._refused.zero_()
        for each in (*(() if self._known else self._first), *self._always, *reversed(self._sums)):
            each()

    @property
    def is_recorded(self) -> bool:
        """Whether `launch` replays a CUDA graph."""
        return self._graph is not None

    def record(self) -> None:
        """Record all launches as a CUDA graph, which `launch` replays from then on. Nothing is computed.

        Raises:
            BackendError: The tensors are not on a GPU.

        """
        if self.device.type not in RECORDABLE:
            raise BackendError(f"a CUDA graph holds work of a GPU, but the tensors are on {self.device}; move them to a GPU")
        # Kernels are compiled and loaded by their first launch, which a graph cannot hold. With the flag set they write nothing
        self._refused.fill_(1)
        for each in (*self._first, *self._always, *self._sums):
            each()
        self._refused.zero_()
        for each in self._first:
            each()
        self._known = not self._refused.item()
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, as those that pin memory for a loader, is no part of it
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device), capture_error_mode="thread_local"),
        ):
            self._launch()
        self._graph = graph
