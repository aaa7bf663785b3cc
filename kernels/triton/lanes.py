"""Lanes between the host and a GPU: what one thread needs to bring parts of tensors to the device, and results back.

Copies from pinned memory run beside the kernels and copies of other streams. So while one lane is on the bus, others are read
into, computed on, and written from; none of them waits for another. In Triton's interpreter the device is the CPU: its memory
is other memory of the host, and there are no streams.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from threading import Lock
from typing import Any

import numpy.typing as npt
import torch

from mergekit_cl.dtypes import type_of
from mergekit_cl.errors import BackendError, MergeError
from mergekit_cl.kernels import Array, Span, interpreted
from mergekit_cl.kernels.triton import launch


class Lane:
    """Pinned memory of the host, as much memory of the device, and a stream, for one thread at a time.

    ``host`` is the pinned memory, uint8 [size]. What is sent from it, or fetched into it, is on its way until `wait` returns.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.size = size
        self._device = device
        on_gpu = device.type == "cuda"
        try:
            self._pinned = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
        except RuntimeError as error:
            raise MergeError(
                f"{size / 1e6:.0f} MB of pinned memory cannot be had ({_first_line(error)}); allow less memory or fewer threads"
            ) from error
        self.host: npt.NDArray[Any] = self._pinned.numpy()
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self._done = torch.cuda.Event(blocking=True) if on_gpu else None

    @cached_property
    def there(self) -> torch.Tensor:
        """Memory of the device, uint8 [size]."""
        return torch.empty(self.size, dtype=torch.uint8, device=self._device)

    def send(self, start: int, stop: int, to: torch.Tensor, at: int) -> None:
        """Copy bytes from ``start`` to ``stop`` of the host's memory to the device, from byte ``at`` on; do not wait."""
        to[at : at + stop - start].copy_(self._pinned[start:stop], non_blocking=True)

    def fetch(self, start: int, stop: int, source: torch.Tensor, at: int) -> None:
        """Copy bytes of the device, from byte ``at`` on, to those from ``start`` to ``stop`` of the host; do not wait."""
        self._pinned[start:stop].copy_(source[at : at + stop - start], non_blocking=True)

    def wait(self) -> None:
        """Wait for this lane's copies and kernels, and for no other's. The processor is free for other threads meanwhile."""
        if self._done is not None:
            self._done.record(self.stream)
            self._done.synchronize()


class Lanes:
    """Lanes to one device, which threads use in turn; there are as many as were used at a time.

    Args:
        device: "cuda:0" and so on; "cpu" in the interpreter.

    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._idle: list[Lane] = []
        self._mutex = Lock()

    @contextmanager
    def lane(self, size: int) -> Iterator[Lane]:
        """Take a lane with at least ``size`` bytes; its stream is the current one meanwhile, and done with all at the end."""
        with self._mutex:
            lane = self._idle.pop() if self._idle else None
        if lane is None or lane.size < size:
            lane = None  # its memory can be had again
            lane = Lane(self.device, rounded(size))
        current: AbstractContextManager[Any] = nullcontext() if lane.stream is None else torch.cuda.stream(lane.stream)
        try:
            with current:
                yield lane
        finally:
            lane.wait()  # after an error too: nothing may be under way to memory that the next one uses
            with self._mutex:
                self._idle.append(lane)

    def allocate(self, size: int) -> torch.Tensor:
        """Make memory of the device, uint8 [size], which nothing that was launched before still uses."""
        self.settle()
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def settle(self) -> None:
        """Wait for what was launched on the current stream: the lanes' streams do not."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def view(self, memory: torch.Tensor, at: int, length: int, dtype: str) -> Span:
        """View ``length`` elements from byte ``at`` on as a span: a tensor; in the interpreter a NumPy array."""
        part = memory[at : at + length * type_of[dtype].itemsize]
        if self.device.type == "cuda":
            return part.view(getattr(torch, dtype))
        array: Array = part.numpy().view(type_of[dtype])
        return array

    def free(self) -> int:
        """Count the bytes of the device that can be allocated."""
        if self.device.type != "cuda":
            return _INTERPRETED
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give all memory back at the end. If the device has none left meanwhile, say what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MergeError(
                f"{self.device}: out of memory ({_first_line(error)}); stop what else uses this GPU, allow fewer threads or "
                "less memory (their windows are on the GPU too), or merge on the CPU"
            ) from error
        finally:
            self._idle.clear()
            launch.forget()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                _unpin()


def _unpin() -> None:
    """Give pinned memory back that nobody uses, where this PyTorch can."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


_INTERPRETED = 4 << 30  # bytes of the CPU's memory that stand for those of a device


def rounded(size: int) -> int:
    """Return how many bytes PyTorch pins for a lane of ``size`` bytes: a power of two.

    >>> rounded(1 << 20), rounded((1 << 20) + 1)
    (1048576, 2097152)
    """
    return 1 << max(size - 1, 0).bit_length()


def find_gpu(device: str) -> str:
    """Name a GPU with its number: "cuda" is the current one.

    Raises:
        BackendError: There is no such GPU.

    """
    if interpreted():
        raise BackendError(
            f'device="{device}": TRITON_INTERPRET is set, and the Triton kernels run on the CPU; unset it before Python starts'
        )
    if not torch.cuda.is_available():
        why = "" if torch.backends.cuda.is_built() else f": {torch.__version__} is a build for the CPU"
        raise BackendError(
            f'device="{device}": PyTorch finds no GPU{why}; leave device (--device) away to merge on the CPU, or install the '
            "driver and a PyTorch for this GPU"
        )
    index = torch.device(device).index
    number, count = torch.cuda.current_device() if index is None else index, torch.cuda.device_count()
    if number >= count:
        known = "cuda:0 is the only GPU" if count == 1 else f"the GPUs are cuda:0 to cuda:{count - 1}"
        raise BackendError(f'device="{device}": {known}')
    torch.cuda.mem_get_info(number)  # from here on the process has what the driver takes, and can tell
    return f"cuda:{number}"


def has_gpu() -> bool:
    """Whether there is a GPU that the compiled kernels can use."""
    return torch.cuda.is_available() and not interpreted()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
