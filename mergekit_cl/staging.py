"""Files that are merged on a GPU: windows that are brought there and back, and tensors that are kept there for several sweeps.

A thread reads a window into pinned memory, has it copied to the device, launches the kernels on it, has the result copied back,
and writes it; each thread has a stream of its own. So the bus is used both ways while others read, compute and write.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from mergekit_cl import kernels
from mergekit_cl.dtypes import dtype_name
from mergekit_cl.errors import BackendError, MergeError
from mergekit_cl.kernels import BLOCK, Array, Slices, Span, Table
from mergekit_cl.windows import Incoming, Outgoing, Pieces, Place, Window, Windows, announce, lay_out, part_of, ranges_of

if TYPE_CHECKING:
    from mergekit_cl.kernels.triton.lanes import Lane, Lanes

PORTION = 8 << 20
"""Bytes that are read before their copy to the device begins: the bus works while a thread reads on."""

SHARE = 0.75
"""How much of a GPU's free memory windows and kept tensors take together; the rest is for what kernels count and sort in."""

_ALIGNED = 64  # bytes: more than any access is wide
_NEEDS = ("torch", "triton")


class Staged(Windows):
    """Windows that kernels get on another device than that of the spans. Every span is taken, whether on disk or in memory.

    At any time a thread has one window: as many bytes of pinned memory, and of the device's, as its inputs and outputs have
    together, rounded up to a power of two.
    """

    def __init__(self, lanes: "Lanes") -> None:
        super().__init__()
        self.lanes = lanes
        self.device = str(lanes.device)

    def takes(self, span: Span) -> bool:  # noqa: ARG002
        """See `Windows.takes`."""
        return True

    def call(
        self,
        kernel: Callable[[Table, Array], Any],
        table: Table,
        slices: Slices | None,
        pieces: Pieces,
        later: Pieces | None = None,
    ) -> Any:
        """See `Windows.call`."""
        announce(table, slices, later)
        ranges = ranges_of(slices, pieces)
        places, read, size = lay_out(table, ranges, self.takes, as_whole=True)
        with self.lanes.lane(size) as lane:
            nothing = [Window(self.lanes.view(lane.there, 0, 0, dtype), 0, 0) for dtype in table.dtypes]
            rows: list[list[Span]] = [nothing] * len(table.spans)
            for row in ranges:
                rows[row] = list(nothing)
            for row, columns, place in places:
                span = self.lanes.view(lane.there, place.at, place.stop - place.start, dtype_name(place.span.dtype))
                for column in columns:
                    rows[row][column] = Window(span, place.start, len(place.span))
            _send([place for *_, place in places if not isinstance(place.span, Outgoing)], lane, lane.there, 0)
            lane.wait()  # or the kernel's flags would be waited for with a busy processor
            result = kernel(part_of(table, rows, ranges), pieces)
            lane.fetch(read, size, lane.there, read)
            lane.wait()
            for *_, place in places:
                if isinstance(place.span, Outgoing):
                    place.span.write(place.start, place.of(lane.host))
        return result

    def free(self) -> int:
        """Bytes of the device that may be taken now."""
        return int(SHARE * self.lanes.free())


@dataclass(frozen=True)
class Task:
    """Moves parts of spans that lie side by side in the memory of a device. ``written`` counts the elements of results."""

    move: Callable[[Sequence[Place]], None]
    places: Sequence[Place]
    written: int = 0

    def __call__(self) -> None:
        """Move them."""
        self.move(self.places)


class Held:
    """Spans that are held on a device as a whole, side by side in one piece of memory.

    Args:
        windows: To the device.
        spans: On disk or in memory, or `Outgoing`; of any floating dtype.
        window: Bytes that a task moves, at most.

    """

    def __init__(self, windows: Staged, spans: Sequence[Span], window: int) -> None:
        self._lanes = lanes = windows.lanes
        places, end = [], 0
        for span in spans:
            places.append(Place(span, 0, len(span), end))
            end = -(-places[-1].end // _ALIGNED) * _ALIGNED
        self.nbytes = end
        self._memory = lanes.allocate(end)
        self._places = list(_cut(places, window))
        self.spans = [lanes.view(self._memory, place.at, place.stop, dtype_name(place.span.dtype)) for place in places]
        """The spans, as the device has them."""

    @property
    def loads(self) -> list[Task]:
        """What brings all elements to the device."""
        return [Task(self._load, places) for places in self._places]

    @property
    def stores(self) -> list[Task]:
        """What writes all elements to the spans, which are `Outgoing`."""
        return [Task(self._store, places, sum(place.stop - place.start for place in places)) for places in self._places]

    def _load(self, places: Sequence[Place]) -> None:
        at = places[0].at
        with self._lanes.lane(places[-1].end - at) as lane:
            _send([place.moved(-at) for place in places], lane, self._memory, at)

    def _store(self, places: Sequence[Place]) -> None:
        at, end = places[0].at, places[-1].end
        with self._lanes.lane(end - at) as lane:
            lane.fetch(0, end - at, self._memory, at)
            lane.wait()
            for place in places:
                place.span.write(place.start, place.moved(-at).of(lane.host))


def find_device(device: Any) -> str:
    """Name the device that a merge into files is computed on: "cpu", or a GPU with its number, "cuda:0".

    Args:
        device: "cpu" or ``None``; "cuda", "cuda:1" and so on (also of ROCm); "auto", a GPU if there is one that can be used.

    Raises:
        MergeError: There is no device of that name.
        BackendError: A package is missing, or there is no such GPU.

    """
    name = "cpu" if device is None else str(device)
    if re.fullmatch(r"cpu|auto|cuda(:(0|[1-9]\d{0,2}))?", name) is None:
        raise MergeError(f'device={name!r}: must be "cpu", "cuda", a GPU with its number such as "cuda:1", or "auto"')
    if name == "auto":
        return _lanes().find_gpu("cuda") if all(map(find_spec, _NEEDS)) and _lanes().has_gpu() else "cpu"
    if name == "cpu":
        return name
    for package in _NEEDS:
        if find_spec(package) is None:
            raise BackendError(f'device="{name}" needs the package {package}: pip install {package}')
    return cast(str, _lanes().find_gpu(name))


def default_memory(device: str) -> str:
    """Return how much memory a merge into files may take if nobody says: on a GPU every thread has a large window."""
    return "512MB" if device == "cpu" else "2GB"


def staged_for(backend: str, device: str) -> Staged | None:
    """Return what brings windows to a backend that does not work on the CPU's memory; ``None`` for one that does.

    Args:
        backend: "auto", "numpy", "numba" or "triton".
        device: See `find_device`.

    Raises:
        BackendError: The backend does not work on that device, or is not installed.

    """
    if backend in ("numpy", "numba"):
        if device not in ("cpu", "auto"):
            raise BackendError(f'backend="{backend}" works on the CPU; leave backend or device (--device) away')
        device = "cpu"
    device = find_device(device)
    if device == "cpu" and backend != "triton":
        if backend != "auto":  # which finds one, and need not import it for a small job
            kernels.load(backend, "cpu")
        return None
    if device == "cpu" and not kernels.interpreted():
        raise BackendError(
            'backend="triton" merges on a GPU; pass device="cuda" (--device cuda), or leave the backend away, or set '
            "TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    kernels.load("triton", device)
    return Staged(_lanes().Lanes(device))


def _send(places: Sequence[Place], lane: "Lane", memory: Any, at: int) -> None:
    """Read parts of spans to where they lie in a lane, and have them copied to ``at`` and on, portion by portion."""
    sent = 0
    for place in _portions(places):
        if isinstance(place.span, Incoming):
            place.span.read(place.start, place.stop, place.of(lane.host))
        else:
            place.of(lane.host)[:] = place.span[place.start : place.stop]
        if place.end - sent >= PORTION:
            lane.send(sent, place.end, memory, at + sent)
            sent = place.end
    if places:
        lane.send(sent, places[-1].end, memory, at + sent)


def _portions(places: Sequence[Place]) -> Iterator[Place]:
    """Cut parts that are larger than a portion."""
    for place in places:
        size = place.span.dtype.itemsize
        step = PORTION // size
        for start in range(place.start, place.stop, step):
            yield Place(place.span, start, min(start + step, place.stop), place.at + (start - place.start) * size)


def _cut(places: Sequence[Place], window: int) -> Iterator[list[Place]]:
    """Cut whole spans at multiples of `BLOCK`, and group what lies side by side into tasks of ``window`` bytes or less."""
    task: list[Place] = []
    for place in places:
        size = place.span.dtype.itemsize
        step = max(1, window // (size * BLOCK)) * BLOCK
        for start in range(0, place.stop, step):
            part = Place(place.span, start, min(start + step, place.stop), place.at + start * size)
            if task and part.end - task[0].at > window:
                yield task
                task = []
            task.append(part)
    if task:
        yield task


def _lanes() -> Any:
    """Import what knows the device."""
    return importlib.import_module("mergekit_cl.kernels.triton.lanes")
