"""What surveys need of the engine, and what they share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum
from typing import Any, Protocol

import numpy as np

from mergekit_cl.kernels import Array, Backend, Slices, Span, Table
from mergekit_cl.plan import Item, Plan
from mergekit_cl.steps import Statistics


class Sweeps(Protocol):
    """What a survey needs of the executor."""

    plan: Plan
    backend: Backend
    spans: Mapping[str, tuple[Span, ...]]

    def sweep(
        self,
        call: Callable[[Table, Array], Any],
        table: Table,
        slices: Slices | None = None,
        *,
        few: bool = False,
    ) -> Iterable[tuple[Array, Any]]:
        """Call a kernel for all pieces of a table, in threads; yield each share of pieces with its result."""

    def refuse_nonfinite(self, spoiled: Iterable[tuple[Item, tuple[Span, ...]]]) -> None:
        """Raise an error that explains what is not finite in these inputs, if there are any, and if it is not allowed."""


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
