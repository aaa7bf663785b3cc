"""What surveys need of the engine, and what they share."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from mergekit_cl.kernels import BLOCK, Array, Backend, Slices, Span, Table
from mergekit_cl.plan import Item, Plan
from mergekit_cl.shares import Member, Shares
from mergekit_cl.steps import Statistics


class Sweeps(Protocol):
    """What a survey needs of the executor."""

    plan: Plan
    backend: Backend
    spans: Mapping[str, tuple[Span, ...]]
    shares: Shares
    nonfinite: Literal["error", "allow"]

    @property
    def stages(self) -> bool:
        """Whether kernels get windows on a device, and not whole tables where they lie."""

    def sweep(
        self,
        call: Callable[[Table, Array], Any],
        table: Table,
        slices: Slices | None = None,
        *,
        few: bool = False,
        alone: bool = False,
    ) -> Iterable[tuple[Array, Any]]:
        """Call a kernel for all pieces of a table, in threads unless ``alone``; yield each share of pieces with its result."""

    def refuse_nonfinite(self, spoiled: Iterable[tuple[Item, tuple[Span, ...]]]) -> None:
        """Raise an error that explains what is not finite in these inputs, if there are any, and if it is not allowed."""


Bound: TypeAlias = tuple[Callable[[Table, Array], Statistics], Slices | None]
"""A kernel call, and how the tensors that it takes are cut into slices."""


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors that one kernel call takes; ``bind`` makes it for some of them. ``sliced``: whether they are cut into slices."""

    members: Sequence[Member]
    bind: Callable[[Sequence[Member]], Bound]
    sliced: bool = False


def partial_sums(engine: Sweeps, groups: Iterable[Group]) -> Mapping[Any, list[Statistics]]:
    """Sum over the blocks, or the slices, of tensors; return the sums of what each owner has."""
    sums: defaultdict[Any, list[Statistics]] = defaultdict(list)
    apart: dict[Any, defaultdict[Any, list[Statistics]]] = {None: sums}  # what this process has of the sums
    for group in groups:
        shares = engine.shares
        parts = shares.in_memory(group.members, whole=True) if group.sliced else shares.in_blocks(group.members)
        for members, processes in parts:
            found = apart.setdefault(processes, defaultdict(list))
            table = Table([member.spans for member in members])
            call, slices = group.bind(members)
            for pieces, blocks in engine.sweep(call, table, slices):
                sizes = pieces[:, 2] - pieces[:, 1]
                owners = np.repeat(pieces[:, 0], sizes if slices is not None else -(-sizes // BLOCK))
                for row in np.unique(owners):
                    found[members[row].owner].append(blocks[owners == row])
    for processes in engine.shares.processes:
        if processes in apart:
            for each in processes.collect(dict(apart[processes])):
                for owner, part in each.items():
                    sums[owner] += part
    return sums


def add_exactly(blocks: Sequence[Statistics]) -> Statistics:
    """Add up partial sums, [blocks, ...] each, without rounding in between, so that their order does not show."""
    stacked = np.concatenate(blocks)
    flat = stacked.reshape(len(stacked), stacked[0].size if len(stacked) else int(np.prod(stacked.shape[1:])))
    sums = np.array([fsum(column) if np.isfinite(column).all() else np.nan for column in flat.T])
    return sums.reshape(stacked.shape[1:])


def refuse(engine: Sweeps, spoiled: Mapping[int, Any]) -> None:
    """Explain what is not finite in the scopes that are spoiled, if there are any."""
    items = [item for number, bad in spoiled.items() if bad for item in engine.plan.scopes[number][1]]
    engine.refuse_nonfinite((item, engine.spans[item.name]) for item in items)
