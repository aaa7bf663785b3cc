"""Runs a plan: surveys, reduces and applies over spans of memory. The one place that owns threads.

The methods of all scopes run in lockstep. The surveys that they yield are carried out in one sweep, the sums are sent back
in, and at the end every tensor's apply step joins a table of its kind, one kernel call for each. Work is cut into pieces at
multiples of `mergekit_cl.kernels.BLOCK` elements; no result depends on the cut or on the number of threads.
"""

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import fsum
from typing import Any, Literal, TypeAlias

import numpy as np

from mergekit_cl import kernels
from mergekit_cl.dtypes import largest_finite
from mergekit_cl.errors import MergeError, MismatchError, NonFiniteError, listing
from mergekit_cl.kernels import BLOCK, Array, Span, Table
from mergekit_cl.models import Leaf, library_of, tensor
from mergekit_cl.plan import Item, Plan
from mergekit_cl.steps import Apply, Gram, Statistics, Sum, Survey, Terms

CHUNK = 64 * BLOCK
"""Elements that a thread takes at a time, at most: large enough to stream, small enough to share out evenly."""

Nonfinite: TypeAlias = Literal["error", "allow"]
Advance: TypeAlias = Callable[[int], None]
"""Called with the number of elements that have been merged since the last call."""


@dataclass(frozen=True, eq=False)
class _Row:
    """One tensor of an apply step: the memory that it is read from, and the memory that it is written to.

    ``direct`` says that this is the result's own memory, so that it need not be copied there.
    """

    item: Item
    terms: Terms
    inputs: tuple[Span, ...]
    out: Span
    direct: bool = False


class _Batch:
    """Rows that one kernel call takes: the same inputs in the same dtypes, all or none of them about a reference."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows = rows
        self.sources = rows[0].terms.inputs
        self.about = rows[0].terms.reference is not None
        self.inputs = Table([row.inputs for row in rows])
        self.table = Table([(*row.inputs, row.out) for row in rows])
        self.weights = np.array([row.terms.weights for row in rows], self.inputs.compute)
        self.copied = rows[0].terms.copied is not None and self.table.dtypes[0] == self.table.dtypes[1]


class Executor:
    """A plan bound to a backend. In place it can run again and again over the same memory, as a training loop does.

    Args:
        plan: What to do.
        backend: "auto", "numpy", "numba" or "triton".
        threads: How many threads to use; ``None`` for all processors that the process may use.
        nonfinite: Whether NaN and infinities in the inputs are errors.
        constant: Inputs, by number, whose memory does not change between runs (an anchor): checked in the first run only.

    """

    def __init__(
        self,
        plan: Plan,
        *,
        backend: str = "auto",
        threads: int | None = None,
        nonfinite: Nonfinite = "error",
        constant: frozenset[int] = frozenset(),
    ) -> None:
        self.plan = plan
        self.backend_name, self.backend = kernels.load(backend, plan.device)
        self.threads = _processors() if threads is None else threads
        self.nonfinite = nonfinite
        self.constant = constant
        self.spans = {item.name: tuple(map(_span, item.leaves)) for item in plan.items}
        self.elements = sum(len(spans[0]) for spans in self.spans.values())
        self._pool: ThreadPoolExecutor | None = None
        self._batches: list[_Batch] | None = None
        self._known: dict[tuple[str, int], float] = {}

    @property
    def reads_in_place(self) -> bool:
        """Whether all inputs are read where they lie, and not from copies that were made when this was built."""
        return all(
            len(span) == 0 or kernels.address(span) == library_of(leaf).memory(leaf)[0]  # type: ignore[union-attr]
            for item in self.plan.items
            for span, leaf in zip(self.spans[item.name], item.leaves, strict=True)
        )

    def run(self, advance: Advance = lambda _: None) -> dict[str, Leaf]:
        """Run once; return the merged tensors by name (in place: the tensors that were written).

        Raises:
            NonFiniteError: See the class. Where the plan says so, before anything is written.
            MismatchError: Integers differ between models.
            MergeError: The method returned something that is no apply step for these inputs.

        """
        wide = self.threads > 1 and self.plan.device == "cpu" and self.elements > BLOCK
        with ThreadPoolExecutor(self.threads) if wide else nullcontext() as self._pool:
            self._check_exact()
            batches = self._batches or self._batch(self._steps())
            if self.plan.check_first and self.nonfinite == "error":
                self._check_before_writing(batches)
            if self.plan.in_place and not self.plan.method.surveys:
                self._batches = batches  # neither the memory nor the weights will change
            # after a check backwards, because what has been read last is still in the cache
            order = reversed(batches) if self.plan.check_first else batches
            spoiled = [row for batch in order for row in self._apply(batch, advance)]
            if spoiled and self.nonfinite == "error":
                raise self._explain(spoiled)
        rows = [row for batch in batches for row in batch.rows]
        return {name: leaf for row in rows for name, leaf in self._finish(row).items()}

    # Survey and reduce

    def _steps(self) -> list[tuple[Item, Apply]]:
        """Run the methods of all scopes to their end, in lockstep; return each tensor's apply step."""
        plan = self.plan
        try:
            outcomes = [plan.method(scope, **plan.parameters) for scope, _ in plan.scopes]
            if plan.method.surveys:
                outcomes = self._lockstep(outcomes)
        except MergeError:
            raise
        except (ArithmeticError, TypeError, ValueError) as error:
            raise MergeError(f"{plan.method.name} failed with {type(error).__name__}: {error}; check its parameters") from error
        return [(item, step) for (_, group), step in zip(plan.scopes, outcomes, strict=True) for item in group]

    def _lockstep(self, runs: Sequence[Generator[Survey, Statistics, Apply]]) -> list[Apply]:
        steps: dict[int, Apply] = {}
        replies: dict[int, Statistics | None] = dict.fromkeys(range(len(runs)))
        while replies:
            asked: dict[int, Survey] = {}
            for number, reply in replies.items():
                try:
                    asked[number] = runs[number].send(reply)  # type: ignore[arg-type]  # None starts a generator
                except StopIteration as end:
                    steps[number] = end.value
            replies = dict(self._survey(asked))
        return [steps[number] for number in range(len(runs))]

    def _survey(self, asked: dict[int, Survey]) -> dict[int, Statistics]:
        """Carry out the surveys of many scopes; one sweep over each group of tensors that a kernel can take together."""
        groups: dict[tuple[Survey, tuple[str, ...]], list[tuple[int, tuple[Span, ...]]]] = {}
        for number, survey in asked.items():
            if not isinstance(survey, Gram):
                raise MergeError(f"{self.plan.method.name}: yielded {type(survey).__name__}, which is not a survey")
            for item in self.plan.scopes[number][1]:
                columns = self._columns(item, survey)
                groups.setdefault((survey, Table([columns]).dtypes), []).append((number, columns))
        sums: dict[int, list[Statistics]] = {number: [] for number in asked}
        for (survey, _), members in groups.items():
            table = Table([columns for _, columns in members])
            for pieces, blocks in self._map(partial(self.backend.gram, table, survey.task_vectors), table):
                owners = np.repeat(pieces[:, 0], -(-(pieces[:, 2] - pieces[:, 1]) // BLOCK))
                for row in np.unique(owners):
                    sums[members[row][0]].append(blocks[owners == row])
        results = {number: add_exactly(sums[number], self._order(asked[number])) for number in asked}
        if self.nonfinite == "error":
            spoiled = [number for number, result in results.items() if not np.isfinite(result).all()]
            rows = [(item, self._columns(item, asked[n])) for n in spoiled for item in self.plan.scopes[n][1]]
            if rows:
                raise self._explain([_Row(item, _FIRST, columns, None) for item, columns in rows])
        return results

    def _columns(self, item: Item, survey: Survey) -> tuple[Span, ...]:
        """A tensor's spans in the order of a survey: the base, where there is one, comes first."""
        spans = self.spans[item.name]
        if survey.task_vectors and not self.plan.has_base:
            raise MergeError(f'{self.plan.method.name}: task vectors need a base; declare base="required" in @method')
        return (spans[-1], *spans[:-1]) if self.plan.has_base else spans

    def _order(self, survey: Survey) -> int:
        """Rows of the Gram matrix."""
        return self.plan.models + (self.plan.has_base and not survey.task_vectors)

    # Apply

    def _batch(self, steps: Iterable[tuple[Item, Apply]]) -> list[_Batch]:
        """Put every tensor into a batch with its like."""
        batches: dict[Any, list[_Row]] = {}
        for item in self.plan.exact:
            batches.setdefault(item.dtype, []).append(_Row(item, _FIRST, self.spans[item.name][:1], *self._output(item)))
        for item, step in steps:
            spans = self.spans[item.name]
            terms = self._terms(step, spans)
            row = _Row(item, terms, tuple(spans[source] for source in terms.inputs), *self._output(item))
            dtypes = Table([(*row.inputs, row.out)]).dtypes
            batches.setdefault((terms.inputs, terms.reference, terms.copied, dtypes), []).append(row)
        return [_Batch(rows) for rows in batches.values()]

    def _terms(self, step: Apply, spans: Sequence[Span]) -> Terms:
        name = self.plan.method.name
        if not isinstance(step, Sum):
            raise MergeError(f"{name}: returned {type(step).__name__}, which is not an apply step")
        if len(step.weights) != self.plan.models or (step.base_weight and not self.plan.has_base):
            raise MergeError(f"{name}: returned {step} for {self.plan.models} models and {int(self.plan.has_base)} base")
        taking_part = step.terms(np.dtype(np.float64)).inputs
        terms = step.terms(Table([[spans[source] for source in taking_part]]).compute)
        if self.nonfinite == "error" and not np.isfinite(terms.weights).all():
            raise MergeError(f"{name}: its weights {step} are not finite in {spans[0].dtype}; check the parameters")
        return terms

    def _output(self, item: Item) -> tuple[Span, bool]:
        """Memory to write a result to, and whether it is that of the target."""
        span = item.library.writable(item.like) if self.plan.in_place else None
        return (item.library.empty(item.like, item.dtype), False) if span is None else (span, True)

    def _finish(self, row: _Row) -> dict[str, Leaf]:
        """Hand a merged tensor back under each of its names."""
        item = row.item
        if not self.plan.in_place:
            try:
                return dict.fromkeys(item.names, item.library.build(row.out, item.like))
            except MergeError as error:
                raise MergeError(f"{tensor(item.name)}: {error}") from None
        item.library.written(item.like, None if row.direct else row.out)
        return dict.fromkeys(item.names, item.like)

    def _apply(self, batch: _Batch, advance: Advance) -> list[_Row]:
        """Compute a batch; return the rows in which a result is not finite."""
        spoiled = np.zeros(len(batch.rows), bool)
        call: Callable[[Array], Any]
        if batch.copied or not batch.sources:
            call = partial(_copy, batch.table)
            if self.nonfinite == "error" and batch.copied and not self.plan.check_first:
                spoiled |= ~np.isfinite(self._largest(batch.inputs)).all(axis=1)
        else:
            call = partial(self.backend.weighted_sum, batch.table, batch.weights, batch.about)
        for pieces, flags in self._map(call, batch.table, backwards=self.plan.check_first):
            spoiled |= flags
            advance(int((pieces[:, 2] - pieces[:, 1]).sum()))
        return [row for row, bad in zip(batch.rows, spoiled, strict=True) if bad]

    def _map(self, call: Callable[[Array], Any], table: Table, backwards: bool = False) -> Iterable[tuple[Array, Any]]:
        """Call a kernel for all pieces of a table, in threads on a CPU; yield each share of pieces with its result."""
        shares = deal(table.lengths, self.threads, CHUNK) if self.plan.device == "cpu" else [table.whole]
        if backwards:
            shares.reverse()
        return zip(shares, (self._pool.map if self._pool else map)(call, shares), strict=True)

    # Checks

    def _check_exact(self) -> None:
        """Refuse integer tensors that differ between models."""
        problems = []
        for item in self.plan.exact:
            first, *others = (_on_host(span) for span in self.spans[item.name][: self.plan.models])
            problems += [
                f"{label}, {tensor(item.name)}: its {item.dtype} values differ from those of {self.plan.labels[0]}; integers "
                "and booleans are copied, never averaged: make them equal, or leave the tensor out"
                for label, other in zip(self.plan.labels[1:], others, strict=False)
                if not np.array_equal(first, other)
            ]
        if problems:
            raise MismatchError(listing(problems))

    def _largest(self, table: Table) -> Array:
        """Find the largest magnitude of each span of a table, float64 [rows, columns]; integers count as zero."""
        largest = np.zeros((len(table.spans), len(table.dtypes)))
        if table.dtypes and table.dtypes[0] in kernels.FLOATING:
            for _, part in self._map(partial(self.backend.largest_magnitude, table), table):
                np.maximum(largest, part, out=largest)
        return largest

    def _largest_inputs(self, batch: _Batch) -> Array:
        """As `_largest`, but inputs that never change are read only once."""
        largest = np.zeros((len(batch.rows), len(batch.sources)))
        for column, source in enumerate(batch.sources):
            keys = [(row.item.name, source) for row in batch.rows]
            if keys[0] in self._known:
                largest[:, column] = [self._known[key] for key in keys]
                continue
            largest[:, column] = self._largest(Table([row.inputs[column : column + 1] for row in batch.rows]))[:, 0]
            if source in self.constant:
                self._known.update(zip(keys, largest[:, column].tolist(), strict=True))
        return largest

    def _check_before_writing(self, batches: Sequence[_Batch]) -> None:
        """Refuse non-finite inputs, and results that would overflow, while nothing has been written yet."""
        spoiled: list[_Row] = []
        for batch in batches:
            if not batch.sources or batch.table.dtypes[-1] not in kernels.FLOATING:
                continue
            largest, weights = self._largest_inputs(batch), np.abs(batch.weights.astype(np.float64))
            spread: Array = largest[:, batch.about :] + (largest[:, :1] if batch.about else 0.0)
            bound: Array = np.maximum((weights * spread).sum(axis=1) + largest.max(axis=1), spread.max(axis=1))
            limit = min(largest_finite(batch.table.dtypes[-1]), largest_finite(batch.weights.dtype.name))
            infinite = np.logical_not(np.isfinite(largest).all(axis=1, keepdims=False))
            spoiled += [row for row, bad in zip(batch.rows, infinite, strict=True) if bad]
            # rare: an overflow cannot be ruled out, so compute into memory of its own, and see
            doubtful = np.logical_and(~infinite, 1.001 * bound >= limit)
            trial = [
                _Row(row.item, row.terms, row.inputs, row.item.library.empty(row.item.like, row.item.dtype))
                for row, doubt in zip(batch.rows, doubtful, strict=True)
                if doubt
            ]
            spoiled += self._apply(_Batch(trial), lambda _: None) if trial else []
        if spoiled:
            raise self._explain(spoiled)

    def _explain(self, rows: Sequence[_Row]) -> MergeError:
        """Say which tensors of which models hold what, or which results overflow."""
        problems = []
        for row in rows:
            name = tensor(row.item.name)
            faults = [
                f"{label}, {name}: {counts}"
                for span, label in zip(self.spans[row.item.name], self.plan.labels, strict=True)
                if any(span is read for read in row.inputs) and (counts := _count_nonfinite(span))
            ]
            overflow = f"{name}: finite inputs overflow {row.item.dtype} when merged; choose a wider dtype or smaller weights"
            problems += faults or ([] if row.out is None else [overflow])
        if not problems:
            problems = [f"{tensor(rows[0].item.name)}: the dot products that {self.plan.method.name} asks for overflow"]
        return NonFiniteError(listing(problems))


_FIRST = Terms((0,), (1.0,), None)


def _span(leaf: Leaf) -> Span:
    library = library_of(leaf)
    assert library is not None
    return library.span(leaf)


def _on_host(span: Span) -> Any:
    """Bring a span to the CPU, in a dtype that NumPy knows."""
    if isinstance(span, np.ndarray):
        return span
    return (span.double() if span.is_floating_point() else span).cpu().numpy()


def _count_nonfinite(span: Span) -> str:
    """Count NaN and infinities: "2 NaN and 1 Inf"; empty where there are none."""
    values = _on_host(span)
    counts = {"NaN": int(np.isnan(values).sum()), "Inf": int(np.isinf(values).sum())}
    return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _copy(table: Table, pieces: Array) -> bool:
    """Copy the first column to the last, byte for byte; without an input, write zeros."""
    for row, start, stop in pieces.tolist():
        *inputs, out = table.spans[row]
        out[start:stop] = inputs[0][start:stop] if inputs else 0
    return False


def add_exactly(blocks: Sequence[Statistics], order: int) -> Statistics:
    """Add up partial sums without rounding in between, so that their order does not show."""
    if not blocks:
        return np.zeros((order, order))
    stacked = np.concatenate(blocks).reshape(-1, order * order)
    if not np.isfinite(stacked).all():
        return np.full((order, order), np.nan)
    return np.array([fsum(column) for column in stacked.T]).reshape(order, order)


def deal(lengths: Array, threads: int, chunk: int) -> list[Array]:
    """Cut the rows of a table into pieces, and deal them out in shares of at most ``chunk`` elements.

    Args:
        lengths: Elements in each row, int64 [rows].
        threads: How many threads there are to share between.
        chunk: A multiple of `BLOCK`.

    Returns:
        Arrays of pieces, int64 [pieces, 3]: (row, start, stop). Every element is in exactly one piece, and every piece
        starts at a multiple of `BLOCK`.

    """
    size = min(chunk, -(-int(lengths.sum()) // (threads * BLOCK)) * BLOCK)
    shares: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, length in enumerate(lengths.tolist()):
        start = 0
        while start < length:
            if room < min(BLOCK, length - start):
                shares.append([])
                room = size
            stop = length if length - start <= room else start + room // BLOCK * BLOCK
            shares[-1].append((row, start, stop))
            room -= stop - start
            start = stop
    return [np.array(share, np.int64) for share in shares]


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
