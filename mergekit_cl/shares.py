"""Tensors that processes share: which memory of them a sweep looks at, and what the processes tell each other.

Each process sweeps over its own part of a sharded tensor (`mergekit_cl.models.sharded`). Counts are added up over the
processes. Floating sums are those of the blocks of the whole tensor: a block that is cut between processes is put together
and summed by the one that holds its beginning, and the sums of all blocks are collected before they are added. So every
process comes to the same answers, which are those of the whole tensor.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import BLOCK, Array, Span
from mergekit_cl.models import share_of, tensor
from mergekit_cl.plan import Item, Plan
from mergekit_cl.windows import Window

if TYPE_CHECKING:
    from mergekit_cl.models.sharded import Processes, Share

Counts: TypeAlias = "dict[Processes | None, npt.NDArray[np.int64]]"
"""Counts by the processes that have counted a part each; ``None`` for what every process has counted as a whole."""

_TOGETHER = 64 << 20
"""Bytes of cut blocks that are put together at a time."""


@dataclass(frozen=True, eq=False)
class Member:
    """One tensor of a sweep: what its results belong to, the inputs that are read, and what else the kernel is told."""

    owner: Any
    item: Item
    sources: tuple[int, ...]
    spans: tuple[Span, ...]
    detail: Any = None


class Shares:
    """The tensors of a plan that processes share."""

    def __init__(self, plan: Plan) -> None:
        self._shares: dict[str, list[Share]] = {}
        for item in plan.items:
            shares = [share for leaf in item.leaves if (share := share_of(leaf)) is not None]
            if shares:
                self._shares[item.name] = shares
        self.processes = tuple(dict.fromkeys(shares[0].processes for shares in self._shares.values()))

    def __bool__(self) -> bool:
        return bool(self._shares)

    def __contains__(self, name: str) -> bool:
        return name in self._shares

    def processes_of(self, name: str) -> "Processes | None":
        """Return the processes that share a tensor; ``None`` for one that every process has."""
        return self._shares[name][0].processes if name in self._shares else None

    def first_of_part(self, name: str) -> int | None:
        """Return the number of the first element of a part; ``None`` where this process has the whole, or no range of it."""
        return self._shares[name][0].first if name in self._shares else None

    def is_scattered(self, name: str) -> bool:
        """Whether what this process has of a tensor is no range of its elements."""
        return name in self._shares and self._shares[name][0].first is None

    def whole(self, item: Item, sources: Sequence[int] | None = None) -> tuple[Span, ...]:
        """Gather a tensor from its processes: the inputs that are given, or all."""
        shares = self._shares[item.name]
        return tuple(shares[source].whole() for source in (range(len(shares)) if sources is None else sources))

    def empty(self, item: Item) -> Span:
        """Make memory for the whole of a tensor that is merged."""
        return self._shares[item.name][0].empty(item.dtype)

    def own(self, name: str, whole: Span) -> Span:
        """Copy the part of this process out of a tensor."""
        return self._shares[name][0].own(whole)

    def here(self, name: str) -> str:
        """Say whose part of a tensor is meant, where processes share it."""
        return f" (in the part of process {self._shares[name][0].processes.rank})" if name in self._shares else ""

    def add_up(self, counts: Sequence[Counts]) -> list[npt.NDArray[np.int64]]:
        """Add counts over the processes that made them, in one sum for all, and those of different processes."""
        for processes in self.processes:
            together = [count[processes] for count in counts if processes in count]
            if together:
                processes.add(together)
        return [np.sum(list(count.values()), axis=0) if len(count) > 1 else next(iter(count.values())) for count in counts]

    def agree(self, problems: Sequence[str]) -> list[str]:
        """Return the problems that any process has found, to all of them."""
        found = list(problems)
        for processes in self.processes:
            flag = np.array([bool(found)], np.int64)
            processes.add([flag])
            if flag[0]:
                found = list(dict.fromkeys(problem for each in processes.collect(found) for problem in each))
        return found

    def in_memory(self, members: Sequence[Member], *, whole: bool) -> Iterator[tuple[list[Member], "Processes | None"]]:
        """Yield members whose memory can be swept as it is, together with others of the same processes; or ``whole``."""
        apart: defaultdict[Processes | None, list[Member]] = defaultdict(list)
        for member in members:
            processes = self.processes_of(member.item.name)
            if whole and processes is not None:
                yield [replace(member, spans=self.whole(member.item, member.sources))], None
            else:
                apart[processes].append(member)
        yield from ((some, processes) for processes, some in apart.items())

    def in_blocks(self, members: Sequence[Member]) -> Iterator[tuple[list[Member], "Processes | None"]]:
        """Yield members in whole blocks of `mergekit_cl.kernels.BLOCK` elements; each block of a tensor is in one process."""
        scattered = [member for member in members if self.is_scattered(member.item.name)]
        yield from self.in_memory(scattered, whole=True)
        ranges = [member for member in members if not self.is_scattered(member.item.name)]
        for some, processes in self.in_memory(ranges, whole=False):
            if processes is None:
                yield some, None
            else:
                yield [self._inner(member) for member in some], processes
                yield from ((cut, processes) for cut in self._cut_blocks(some, processes) if cut)

    def _inner(self, member: Member) -> Member:
        """Look at the blocks that lie in this process as a whole."""
        first, stop, length = self._range(member)
        start, end = -(-first // BLOCK) * BLOCK, stop if stop == length else stop // BLOCK * BLOCK
        start, end = (start, end) if start < end else (first, first)
        return replace(member, spans=tuple(Window(span[start - first : end - first], start, length) for span in member.spans))

    def _cut_blocks(self, members: Sequence[Member], processes: "Processes") -> Iterator[list[Member]]:
        """Put the blocks together that several processes have a part of; yield those that begin here."""
        ranges = [self._range(member)[:2] for member in members]
        everywhere = np.array(processes.collect(ranges), np.int64).reshape(-1, len(members), 2)
        cut: list[tuple[Member, int, int, int]] = []  # a block, where it ends, and the number of its bytes
        size = 0
        for number, member in enumerate(members):
            length = prod(member.item.shape)
            self._check_cover(member.item, everywhere[:, number], length)
            for block in sorted({int(at) // BLOCK for at in everywhere[:, number].reshape(-1) if at % BLOCK and at < length}):
                start, stop = block * BLOCK, min((block + 1) * BLOCK, length)
                width = (stop - start) * sum(span.dtype.itemsize for span in member.spans)
                if cut and size + width > _TOGETHER:
                    yield self._assembled(cut, processes)
                    cut, size = [], 0
                cut.append((member, start, stop, width))
                size += width
        if cut:
            yield self._assembled(cut, processes)

    def _assembled(self, cut: Sequence[tuple[Member, int, int, int]], processes: "Processes") -> list[Member]:
        parts = []
        for member, start, stop, _ in cut:
            first, last, _ = self._range(member)
            begin, end = max(first, start), min(last, stop)
            at, part = (begin - start, slice(begin - first, end - first)) if begin < end else (0, slice(0))
            parts += [(stop - start, at, span[part]) for span in member.spans]
        spans = iter(processes.assemble(parts))
        found = []
        for member, start, _, _ in cut:
            first, last, length = self._range(member)
            block = tuple(Window(next(spans), start, length) for _ in member.spans)
            if first <= start < last:
                found.append(replace(member, spans=block))
        return found

    def _range(self, member: Member) -> tuple[int, int, int]:
        """Return the first element that this process has, the one after its last, and the number of all."""
        first = self.first_of_part(member.item.name)
        assert first is not None
        return first, first + len(member.spans[0]), prod(member.item.shape)

    def _check_cover(self, item: Item, ranges: Array, length: int) -> None:
        """Refuse parts that overlap or leave gaps."""
        sorted_ = ranges[ranges[:, 0] < ranges[:, 1]]
        sorted_ = sorted_[np.argsort(sorted_[:, 0])]
        ends = [0, *sorted_[:, 1].tolist()], [*sorted_[:, 0].tolist(), length]
        if ends[0] != ends[1]:
            raise MergeError(
                f"{tensor(item.name)}: the parts of its processes, {ranges.tolist()}, do not cover its {length} elements "
                "once each; pass each process its own part"
            )
