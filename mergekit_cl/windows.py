"""Spans that are not in memory as a whole: read from a checkpoint, and written to one, a window at a time.

Kernels take them as any other span: a table of windows says where the elements of whole tensors would begin in memory, and
only the pieces that a call is given are there. So an entry has the same index, and the same result, in every window.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import local
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mergekit_cl.checkpoint.stored import Source, Stored, numpy_dtype
from mergekit_cl.kernels import Array, Slices, Span, Table, address

Pieces: TypeAlias = npt.NDArray[np.int64]

_ALIGNED = 64  # bytes: a line of the cache
_HASHED = 4  # entries whose hashes are made together


class Incoming:
    """A tensor of a checkpoint as a span; nothing of it is in memory until a window is read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.dtype = numpy_dtype(source.dtype)
        self._length = prod(source.shape)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read elements from ``start`` to ``stop`` into a 1-D array."""
        self.source.read(start, stop, out)

    def announce(self, start: int, stop: int) -> None:
        """Tell the system that these elements will be read soon, if they lie in a file as they are."""
        if isinstance(self.source, Stored):
            self.source.file.advise(self.source.offset + start * self.source.itemsize, (stop - start) * self.source.itemsize)


class Outgoing:
    """A tensor that is written as windows of it are computed; ``write`` gets its first element's number, and the elements."""

    def __init__(self, dtype: str, length: int, write: Callable[[int, Array], None]) -> None:
        self.dtype = numpy_dtype(dtype)
        self.write = write
        self._length = length

    def __len__(self) -> int:
        return self._length


class Window:
    """The elements of a span from number ``first`` on, as many as ``array`` holds; sliced by the span's own numbers."""

    __slots__ = ("_length", "array", "dtype", "first")

    def __init__(self, array: Array, first: int, length: int) -> None:
        self.array, self.first, self.dtype, self._length = array, first, array.dtype, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Array:
        return self.array[part.start - self.first : part.stop - self.first]

    def __setitem__(self, part: slice, values: Any) -> None:
        self.array[part.start - self.first : part.stop - self.first] = values

    @property
    def device(self) -> Any:
        """Where the elements are."""
        return self.array.device

    def data_ptr(self) -> int:
        """Address at which the span's first element would be."""
        return address(self.array) - self.first * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where elements of a span, from number ``start`` to ``stop``, lie in some memory: from byte ``at`` on."""

    span: Span
    start: int
    stop: int
    at: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.at + (self.stop - self.start) * int(self.span.dtype.itemsize)

    def moved(self, by: int) -> "Place":
        """Return the place that is so many bytes further on."""
        return Place(self.span, self.start, self.stop, self.at + by)

    def of(self, memory: Array) -> Array:
        """View the elements in the memory, uint8."""
        return memory[self.at : self.end].view(self.span.dtype)


def on_disk(span: Span) -> bool:
    """Whether a span has to be read or written a window at a time."""
    return isinstance(span, Incoming | Outgoing)


def bounds(table: Table) -> tuple[Pieces, Pieces]:
    """Return which elements of each row are there: the numbers of the first, and of the one after the last."""
    if not table.spans or not isinstance(table.spans[0][0], Window):
        return np.zeros_like(table.lengths), table.lengths
    first = np.array([row[0].first for row in table.spans], np.int64)
    return first, first + np.array([len(row[0].array) for row in table.spans], np.int64)


def call_aligned(kernel: Callable[[Table, Array], Any], table: Table, pieces: Pieces) -> Any:
    """Call a kernel that returns flags for pieces of windows, which may begin anywhere.

    Kernels make the hashes of four entries at once, and take pieces that begin at a multiple of four. Up to three entries
    before it are computed in memory of their own, behind copies of the first of them.
    """
    heads = pieces[pieces[:, 1] % _HASHED != 0]
    if not len(heads):
        return kernel(table, pieces)
    rest = pieces.copy()
    rest[:, 1] = -(-rest[:, 1] // _HASHED) * _HASHED
    rest = rest[rest[:, 1] < rest[:, 2]]
    flags = kernel(table, rest) if len(rest) else False
    firsts, lasts = heads[:, 1] // _HASHED * _HASHED, np.minimum(-(-heads[:, 1] // _HASHED) * _HASHED, heads[:, 2])
    spans: list[Sequence[Span]] = list(table.spans)
    for (row, start, _), first, last in zip(heads.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        numbers = [max(start, number) for number in range(first, last)]
        spans[row] = [Window(span.array[[n - span.first for n in numbers]], first, len(span)) for span in spans[row]]
    part = part_of(table, spans, heads[:, 0].tolist())
    flags = kernel(part, np.stack([heads[:, 0], firsts, lasts], axis=1)) | flags
    for (row, start, _), last in zip(heads.tolist(), lasts.tolist(), strict=True):
        table.spans[row][-1][start:last] = spans[row][-1][start:last]
    return flags


def sampled(span: Span, length: int, step: int, run: int) -> Span:
    """Copy the first ``run`` of every ``step`` elements, up to ``length``, a multiple of ``step``."""
    if not isinstance(span, Incoming):
        return span[:length].reshape(-1, step)[:, :run].reshape(-1)
    sample = np.empty(length // step * run, span.dtype)
    for number in range(length // step):
        span.read(number * step, number * step + run, sample[number * run : (number + 1) * run])
    return sample


def portions(span: Span, size: int) -> Iterator[Span]:
    """Yield the elements of a span, ``size`` at a time; what a portion holds may be gone when the next one comes."""
    lazy = isinstance(span, Incoming)
    buffer = np.empty(min(size, len(span)) if lazy else 0, span.dtype if lazy else np.uint8)
    for start in range(0, len(span), size):
        stop = min(start + size, len(span))
        if lazy:
            span.read(start, stop, buffer[: stop - start])
        yield buffer[: stop - start] if lazy else span[start:stop]


class Windows:
    """Calls kernels for windows of tables; every thread has a buffer that it uses again and again."""

    device: str | None = None
    """Where kernels get their windows, if it is another device than that of the spans."""

    def __init__(self) -> None:
        self._own = local()

    def takes(self, span: Span) -> bool:
        """Whether a span is brought to the kernels a window at a time."""
        return on_disk(span)

    def call(
        self,
        kernel: Callable[[Table, Array], Any],
        table: Table,
        slices: Slices | None,
        pieces: Pieces,
        later: Pieces | None = None,
    ) -> Any:
        """Read the pieces of the inputs that are on disk, call the kernel, and write the pieces of the outputs.

        ``later`` are pieces that will be needed soon: the system may fetch them meanwhile.
        """
        announce(table, slices, later)
        ranges = ranges_of(slices, pieces)
        places, _, size = lay_out(table, ranges, self.takes)
        memory = self._buffer(size)
        rows: list[Sequence[Span]] = [()] * len(table.spans)
        for row in ranges:
            rows[row] = list(table.spans[row])
        for row, columns, place in places:
            array = place.of(memory)
            if isinstance(place.span, Incoming):
                place.span.read(place.start, place.stop, array)
            for column in columns:
                rows[row][column] = Window(array, place.start, len(place.span))  # type: ignore[index]
        result = kernel(part_of(table, rows, ranges), pieces)
        for _, _, place in places:
            if isinstance(place.span, Outgoing):
                place.span.write(place.start, place.of(memory))
        return result

    def _buffer(self, size: int) -> Array:
        memory: Array | None = getattr(self._own, "memory", None)
        if memory is None or len(memory) < size:
            self._own.memory = None
            whole = np.empty(size + _ALIGNED, np.uint8)
            self._own.memory = memory = whole[-address(whole) % _ALIGNED :][:size]
        return memory


def lay_out(
    table: Table, ranges: Mapping[int, tuple[int, int]], takes: Callable[[Span], bool], *, as_whole: bool = False
) -> tuple[list[tuple[int, list[int], Place]], int, int]:
    """Lay parts of spans side by side, each in lines of the cache of its own: inputs first, then outputs.

    Args:
        table: The spans.
        ranges: Which elements of which rows: the first, and the one after the last.
        takes: Which spans are laid out; one that stands in several columns of a row only once.
        as_whole: Whether an element is as far from a line's begin as it is in a tensor that begins with one, so that what is
            aligned there is aligned here.

    Returns:
        For each part the row, the columns and its place; the bytes that the inputs take; the bytes that all take.

    """
    places: list[tuple[int, list[int], Place]] = []
    sizes = [0]
    for outgoing in (False, True):
        size = sizes[-1]
        for row, (start, stop) in ranges.items():
            columns: dict[int, list[int]] = {}
            for column, span in enumerate(table.spans[row]):
                if isinstance(span, Outgoing) == outgoing and takes(span):
                    columns.setdefault(id(span), []).append(column)
            for alike in columns.values():
                span = table.spans[row][alike[0]]
                place = Place(span, start, stop, size + as_whole * (start * span.dtype.itemsize % _ALIGNED))
                places.append((row, alike, place))
                size = -(-place.end // _ALIGNED) * _ALIGNED
        sizes.append(size)
    return places, sizes[1], sizes[2]


def announce(table: Table, slices: Slices | None, later: Pieces | None) -> None:
    """Tell the system which pieces will be needed soon."""
    for row, (start, stop) in ranges_of(slices, later).items() if later is not None else ():
        for span in table.spans[row]:
            if isinstance(span, Incoming):
                span.announce(start, stop)


def ranges_of(slices: Slices | None, pieces: Pieces) -> dict[int, tuple[int, int]]:
    """Return for each row that has pieces the elements from the first of them to the last."""
    ranges: dict[int, tuple[int, int]] = {}
    for row, start, stop in pieces.tolist():
        if slices is not None:
            length = int(slices.lengths[row])
            start, stop = start * length, stop * length
        known = ranges.get(row)
        ranges[row] = (start, stop) if known is None else (min(start, known[0]), max(stop, known[1]))
    return ranges


def part_of(table: Table, spans: Sequence[Sequence[Span]], rows: Iterable[int]) -> Table:
    """Make a table of windows: that of the whole tensors, but with memory in these rows only."""
    part = Table(spans)
    addresses = np.zeros((len(spans), len(table.dtypes)), np.int64)
    for row in rows:
        addresses[row] = [address(span) for span in spans[row]]
    part.__dict__.update(dtypes=table.dtypes, lengths=table.lengths, addresses=addresses)
    return part
