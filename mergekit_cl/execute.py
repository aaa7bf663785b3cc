"""Runs a plan: surveys, reduces and applies over spans of memory. The one place that owns threads.

The methods of all scopes run in lockstep. The surveys that they yield are carried out together, the sums are sent back
in, and at the end every tensor's apply step joins a table of its kind, one kernel call for each. Work is cut into pieces at
multiples of `mergekit_cl.kernels.BLOCK` elements; no result depends on the cut or on the number of threads.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mergekit_cl import kernels
from mergekit_cl.batches import Batch, Binder, Row, SumBatch, draws, looks_along
from mergekit_cl.dtypes import largest_finite
from mergekit_cl.errors import MergeError, MismatchError, NonFiniteError, listing
from mergekit_cl.formula_rows import bind
from mergekit_cl.kernels import BLOCK, Array, Slices, Span, Table
from mergekit_cl.models import Leaf, library_of, tensor
from mergekit_cl.plan import Item, Plan
from mergekit_cl.registry import Method
from mergekit_cl.shares import Shares
from mergekit_cl.steps import Apply, Elementwise, Survey
from mergekit_cl.survey import carry_out, check
from mergekit_cl.windows import Windows, bounds, call_aligned, portions

if TYPE_CHECKING:
    from mergekit_cl.kernels.triton.guarded import GuardedSums

CHUNK = 64 * BLOCK
"""Elements that a thread takes at a time, at most: large enough to stream, small enough to share out evenly."""

WINDOW = 8 << 20
"""Bytes that a thread reads from files, and writes to them, at a time: they stay in a processor's cache."""

_ROUNDED = 1.001  # bounds are computed as if nothing was rounded

Nonfinite: TypeAlias = Literal["error", "allow"]
Advance: TypeAlias = Callable[[int], None]
"""Called with the number of elements that have been merged since the last call."""


class Executor:
    """A plan bound to a backend. In place it can run again and again over the same memory, as a training loop does.

    Args:
        plan: What to do.
        backend: "auto", "numpy", "numba" or "triton".
        threads: How many threads to use; ``None`` for all processors that the process may use.
        nonfinite: Whether NaN and infinities in the inputs are errors.
        constant: Inputs, by number, whose memory does not change between runs (an anchor): checked in the first run only.
        spans: The inputs of each tensor, by its name, where they are not the memory of the plan's own arrays.
        outputs: Makes the span that a tensor is written to, where that is not memory that is handed back.
        window: Bytes that a thread reads from files, and writes to them, at a time.
        windows: What reads and writes a window at a time; without it, on the CPU.

    """

    def __init__(
        self,
        plan: Plan,
        *,
        backend: str = "auto",
        threads: int | None = None,
        nonfinite: Nonfinite = "error",
        constant: frozenset[int] = frozenset(),
        spans: Mapping[str, tuple[Span, ...]] | None = None,
        outputs: Callable[[Item], Span] | None = None,
        window: int = WINDOW,
        windows: Windows | None = None,
    ) -> None:
        self.plan = plan
        self._windows = windows or Windows()
        self.backend_name, self.backend = kernels.load(backend, self._windows.device or plan.device)
        self.threads = processors() if threads is None else threads
        self.nonfinite = nonfinite
        self.constant = constant
        self.spans = spans or {item.name: tuple(map(_span, item.leaves)) for item in plan.items}
        self.shares = Shares(plan)
        if self.shares and outputs is not None:
            raise MergeError(
                "sharded models cannot be merged into a file: leave out= away, and save the result as you save them"
            )
        self.outputs = outputs
        self.window = window
        self.elements = sum(len(spans[0]) for spans in self.spans.values())
        self._pool: ThreadPoolExecutor | None = None
        self._batches: list[Batch] | None = None
        self._guarded: GuardedSums | None = None
        self._direct = False
        self._known: dict[tuple[str, int], float] = {}

    @property
    def stages(self) -> bool:
        """Whether kernels get windows on a device, and not whole tables where they lie."""
        return self._windows.device is not None

    @property
    def reads_in_place(self) -> bool:
        """Whether all inputs are read where they lie, and not from copies that were made when this was built."""
        return all(
            len(span) == 0 or kernels.address(span) == library_of(leaf).memory(leaf)[0]  # type: ignore[union-attr]
            for item in self.plan.items
            for span, leaf in zip(self.spans[item.name], item.leaves, strict=True)
        )

    def run(self, advance: Advance = lambda _: None) -> dict[str, Leaf]:
        """Run once; return the merged tensors by name (in place: the tensors that were written; none with ``outputs``).

        Raises:
            NonFiniteError: See the class. Where the plan says so, before anything is written.
            MismatchError: Integers differ between models.
            MergeError: The method returned something that is no apply step for these inputs.

        Where processes share tensors, all of them raise the error of one.

        """
        wide = self.threads > 1 and self.plan.device == "cpu" and self.elements > BLOCK
        with ThreadPoolExecutor(self.threads) if wide else nullcontext() as self._pool:
            self._check_exact()
            batches, gathered = self._bound()
            advance(sum(len(row.out) for row, _ in gathered))
            problems = [problem for _, found in gathered for problem in found]
            rows = [row for batch in batches for row in batch.rows] + [row for row, _ in gathered]
            if self._guarded is not None:
                self._guarded.launch()
                merged = self._finished(rows) if self._direct else None  # while the device computes
                if self._guarded.done():
                    advance(self.elements)
                    return merged or self._finished(rows)
            self._compute(batches, problems, advance)
        return self._finished(rows) if self.outputs is None else {}

    @property
    def is_recorded(self) -> bool:
        """Whether `run` replays a CUDA graph."""
        return self._guarded is not None and self._guarded.is_recorded

    def record(self) -> None:
        """Record the merge as a CUDA graph, which `run` replays from then on. Nothing is computed.

        Raises:
            MergeError: A graph cannot hold this merge: it is one of something else than weighted sums, or not on a GPU, or
                tensors are copied for it.

        """
        self._bound()
        if self._guarded is None or not (self._direct and self.reads_in_place):
            raise MergeError(
                f"{self.plan.method.name}: a CUDA graph cannot hold this merge, but one of weighted sums, without a survey, of "
                "tensors that are whole, contiguous, and on a GPU"
            )
        self._guarded.record()

    # Survey and reduce

    def _steps(self) -> list[tuple[Item, Apply]]:
        """Run the methods of all scopes to their end, in lockstep; return each tensor's apply step."""
        plan = self.plan
        with _explained(plan.method):
            outcomes = [plan.method(scope, **plan.parameters_of(scope)) for scope, _ in plan.scopes]
            if plan.method.surveys:
                outcomes = self._lockstep(outcomes)
        return [(item, step) for (_, group), step in zip(plan.scopes, outcomes, strict=True) for item in group]

    def _lockstep(self, runs: Sequence[Generator[Survey, Any, Apply]]) -> list[Apply]:
        steps: dict[int, Apply] = {}
        replies: dict[int, Any] = dict.fromkeys(range(len(runs)))
        while replies:
            asked: dict[int, Survey] = {}
            for number, reply in replies.items():
                try:
                    asked[number] = runs[number].send(reply)
                except StopIteration as end:
                    steps[number] = end.value
            replies = carry_out(self, asked)
        return [steps[number] for number in range(len(runs))]

    def sweep(
        self,
        call: Callable[[Table, Array], Any],
        table: Table,
        slices: Slices | None = None,
        *,
        few: bool = False,
        backwards: bool = False,
        alone: bool = False,
    ) -> Iterable[tuple[Array, Any]]:
        """Call a kernel for all pieces of a table, in threads on a CPU; yield each share of pieces with its result.

        ``slices`` makes the pieces count slices; ``few`` asks for large shares, because each of them costs something; ``alone``
        for one call at a time.
        """
        cut = self.plan.device == "cpu"
        windowed = cut and any(map(self._windows.takes, chain.from_iterable(table.spans)))
        chunk = _fitting(table, self.window, self._windows.takes) if windowed else CHUNK
        if slices is not None:
            shares = deal_slices(table.lengths, slices, self.threads, chunk, cut)
        else:
            starts, stops = bounds(table)
            if few and not windowed:
                chunk = max(CHUNK, -(-int((stops - starts).sum()) // (2 * self.threads * BLOCK)) * BLOCK)
            whole = np.stack([np.arange(len(stops)), starts, stops], axis=1)
            shares = deal(stops, self.threads, chunk, starts) if cut else [whole]
        if backwards:
            shares.reverse()
        side_by_side = self._pool.map if self._pool and not alone else map
        if not windowed:
            return zip(shares, side_by_side(partial(call, table), shares), strict=True)
        later = [*shares[self.threads :], *[None] * self.threads]
        return zip(shares, side_by_side(partial(self._windows.call, call, table, slices), shares, later), strict=True)

    # Apply

    def _bound(self) -> tuple[list[Batch], list[tuple[Row, list[str]]]]:
        """Bind the apply steps to memory, as `_batch` does; once in place, if neither memory nor weights will change."""
        if self._batches:
            return self._batches, []
        batches, gathered = self._batch(self._steps())
        if self.plan.in_place and not self.plan.method.surveys and not gathered:
            self._batches, self._guarded = batches, self._guard(batches)
            self._direct = all(row.direct for batch in batches for row in batch.rows)
        return batches, gathered

    def _guard(self, batches: Sequence[Batch]) -> "GuardedSums | None":
        """Let the device decide whether to write, where all that is computed in place are weighted sums of its own memory."""
        plan = self.plan
        if self.backend_name != "triton" or not plan.check_first or plan.exact or self.shares:
            return None
        if any(map(self._windows.takes, chain.from_iterable(self.spans.values()))):
            return None
        sums = [_as_sum(batch) for batch in batches]
        if not sums or None in sums:
            return None
        from mergekit_cl.kernels.triton.guarded import GuardedSums

        guarded = GuardedSums(batches[0].table)
        for batch, (weights, about) in zip(batches, filter(None, sums), strict=True):
            constant = [column for column, source in enumerate(batch.sources) if source in self.constant]
            reach = _reach(batch) if self.nonfinite == "error" else None
            guarded.add(batch.table, weights, about, reach, constant)
        return guarded

    def _compute(self, batches: Sequence[Batch], problems: list[str], advance: Advance) -> None:
        """Compute all batches; before or afterwards refuse what is not finite in them, and the problems that are known."""
        strict, check_first = self.nonfinite == "error", self.plan.check_first
        if check_first and strict:
            self._refuse([*problems, *self._explain(self._check_before_writing(batches))])
        # after a check backwards, because what has been read last is still in the cache
        order = reversed(batches) if check_first else batches
        spoiled = [row for batch in order for row in self._apply(batch, advance)]
        if strict:
            self._refuse([*problems, *self._explain(spoiled)], agreed=check_first)

    def _batch(self, steps: Iterable[tuple[Item, Apply]]) -> tuple[list[Batch], list[tuple[Row, list[str]]]]:
        """Put every tensor into a batch with its like; compute what needs whole tensors of which this process has a part."""
        binder = Binder(
            self.plan, self.spans, finite=self.nonfinite == "error", outputs=self.outputs, first=self.shares.first_of_part
        )
        gathered = []
        for item in self.plan.exact:
            binder.add_copy(item)
        for item, step in steps:
            if item.name in self.shares and (looks_along(step, item) or (draws(step) and self.shares.is_scattered(item.name))):
                gathered.append(self._gathered(binder, item, step))
            else:
                binder.add(item, step)
        return binder.batches(), gathered

    def _gathered(self, binder: Binder, item: Item, step: Apply) -> tuple[Row, list[str]]:
        """Gather a tensor, compute all of it, and keep the part of this process; also list what is not finite."""
        spans, out = self.shares.whole(item), self.shares.empty(item)
        batches = binder.alone(item, step, spans, out)
        spoiled = [row for batch in batches for row in self._apply(batch, lambda _: None)]
        return Row(item, None, (), (), self.shares.own(item.name, out)), self._explain(spoiled, spans)

    def _finished(self, rows: Sequence[Row]) -> dict[str, Leaf]:
        """Hand all merged tensors back, by name."""
        return {name: leaf for row in rows for name, leaf in self._finish(row).items()}

    def _finish(self, row: Row) -> dict[str, Leaf]:
        """Hand a merged tensor back under each of its names."""
        item = row.item
        if not self.plan.in_place:
            try:
                return dict.fromkeys(item.names, item.library.build(row.out, item.like))
            except MergeError as error:
                raise MergeError(f"{tensor(item.name)}: {error}") from None
        item.library.written(item.like, None if row.direct else row.out)
        return dict.fromkeys(item.names, item.like)

    def _apply(self, batch: Batch, advance: Advance) -> list[Row]:
        """Compute a batch; return the rows in which a result is not finite."""
        spoiled = np.zeros(len(batch.rows), bool)
        if batch.copied and self.nonfinite == "error" and not self.plan.check_first:
            spoiled |= ~np.isfinite(self._largest(batch.inputs)).all(axis=1)
        call, backwards = batch.call(self.backend), self.plan.check_first
        if batch.windowed:
            call = partial(call_aligned, call)
        for pieces, flags in self.sweep(call, batch.table, batch.slices, backwards=backwards, alone=batch.alone):
            spoiled |= flags
            if self.outputs is not None and spoiled.any() and self.nonfinite == "error":
                break  # what has been written will be thrown away
            sizes = pieces[:, 2] - pieces[:, 1]
            advance(int((sizes if batch.slices is None else sizes * batch.slices.lengths[pieces[:, 0]]).sum()))
        return [row for row, bad in zip(batch.rows, spoiled, strict=True) if bad]

    # Checks

    def _check_exact(self) -> None:
        """Refuse integer tensors that differ between models."""
        problems = []
        for item in self.plan.exact:
            first, *others = self.spans[item.name][: self.plan.models]
            problems += [
                f"{label}, {tensor(item.name)}: its {item.dtype} values differ from those of {self.plan.labels[0]}; integers "
                "and booleans are copied, never averaged: make them equal, or leave the tensor out"
                for label, other in zip(self.plan.labels[1:], others, strict=False)
                if not _equal(first, other)
            ]
        if any(item.name in self.shares for item in self.plan.exact):
            problems = self.shares.agree(problems)
        if problems:
            raise MismatchError(listing(problems))

    def _largest(self, table: Table) -> Array:
        """Find the largest magnitude of each span of a table, float64 [rows, columns]; integers count as zero."""
        largest = np.zeros((len(table.spans), len(table.dtypes)))
        if table.dtypes and table.dtypes[0] in kernels.FLOATING:
            for _, part in self.sweep(self.backend.largest_magnitude, table):
                np.maximum(largest, part, out=largest)
        return largest

    def _largest_inputs(self, batch: Batch) -> Array:
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

    def _check_before_writing(self, batches: Sequence[Batch]) -> list[Row]:
        """Return the rows of non-finite inputs, or results that would overflow, while nothing has been written yet."""
        spoiled: list[Row] = []
        for batch in batches:
            if not batch.sources or batch.table.dtypes[-1] not in kernels.FLOATING:
                continue
            largest = self._largest_inputs(batch)
            with np.errstate(invalid="ignore", over="ignore"):
                bound = batch.bound(largest)
            infinite = np.logical_not(np.isfinite(largest).all(axis=1, keepdims=False))
            spoiled += [row for row, bad in zip(batch.rows, infinite, strict=True) if bad]
            # rare: an overflow cannot be ruled out, so compute into memory of its own, and see
            doubtful = np.logical_and(~infinite, _ROUNDED * bound >= _limit(batch))
            trial = [
                replace(row, out=row.item.library.empty(row.item.like, row.item.dtype), direct=False)
                for row, doubt in zip(batch.rows, doubtful, strict=True)
                if doubt
            ]
            spoiled += self._apply(batch.like(trial), lambda _: None) if trial else []
        return spoiled

    def _refuse(self, problems: Sequence[str], *, agreed: bool = False) -> None:
        """Refuse what is not finite, here or in another process; ``agreed``: it is known that there is nothing elsewhere."""
        if not agreed:
            problems = self.shares.agree(problems)
        if problems:
            raise NonFiniteError(listing(problems))

    def _explain(self, rows: Sequence[Row], spans: tuple[Span, ...] | None = None) -> list[str]:
        """Say which tensors of which models hold what, or which results overflow; ``spans`` are inputs that were gathered."""
        problems = []
        for row in rows:
            name = tensor(row.item.name)
            overflow = f"{name}: finite inputs overflow {row.item.dtype} when merged; choose a wider dtype or smaller weights"
            problems += self._faults(row.item, row.inputs, spans) or [overflow]
        return problems

    def refuse_nonfinite(self, spoiled: Iterable[tuple[Item, tuple[Span, ...]]]) -> None:
        """Raise an error that explains what is not finite in these inputs, if there are any, and if it is not allowed."""
        rows = list(spoiled)
        if rows and self.nonfinite == "error":
            problems = self.shares.agree([fault for item, inputs in rows for fault in self._faults(item, inputs)])
            method, name = self.plan.method.name, tensor(rows[0][0].name)
            where = name if len(rows) == 1 else f"{name}, or one of the {len(rows) - 1} others"
            overflow = f"{where}: what {method} asks for, of finite inputs, overflows; merge in a wider dtype"
            raise NonFiniteError(listing(problems or [overflow]))

    def _faults(self, item: Item, inputs: Sequence[Span], spans: tuple[Span, ...] | None = None) -> list[str]:
        """List what is not finite in the inputs of a tensor that are read."""
        here = self.shares.here(item.name) if spans is None else ""
        return [
            f"{_place(label, leaf)}, {tensor(item.name)}: {counts}{here}"
            for span, label, leaf in zip(spans or self.spans[item.name], self.plan.labels, item.leaves, strict=True)
            if any(span is read for read in inputs) and (counts := _count_nonfinite(span))
        ]


def rehearse(plan: Plan) -> None:
    """Run the methods up to their first surveys, and check these: what can be known before any data is read.

    Raises:
        MergeError: The parameters do not go together.

    """
    with _explained(plan.method):
        for number, (scope, _) in enumerate(plan.scopes):
            outcome = plan.method(scope, **plan.parameters_of(scope))
            if plan.method.surveys:
                for survey in islice(outcome, 1):
                    check(plan, number, survey)
                outcome.close()
            elif isinstance(outcome, Elementwise):
                for item in plan.scopes[number][1]:
                    bind(plan, item, outcome, np.dtype(np.float32))


@contextmanager
def _explained(method: Method) -> Iterator[None]:
    """Say which method failed, where it raises something else than a `MergeError`."""
    try:
        yield
    except MergeError:
        raise
    except (ArithmeticError, TypeError, ValueError) as error:
        raise MergeError(f"{method.name} failed with {type(error).__name__}: {error}; check its parameters") from error


def _span(leaf: Leaf) -> Span:
    library = library_of(leaf)
    assert library is not None
    return library.span(leaf)


def _fitting(table: Table, window: int, takes: Callable[[Span], bool]) -> int:
    """Count how many elements of a table can be read, computed and written together, a multiple of `BLOCK`."""
    width: int = sum(span.dtype.itemsize for span in table.spans[0] if takes(span))
    return max(1, window // (width * BLOCK)) * BLOCK


def _as_sum(batch: Batch) -> tuple[Array, bool] | None:
    """Return the weights of sums, and whether they are about a reference; ``None`` if a batch is something else."""
    if isinstance(batch, SumBatch):
        return batch.weights, batch.about
    return (np.ones((len(batch.rows), 1), batch.inputs.compute), False) if batch.copied and batch.sources else None


def _limit(batch: Batch) -> float:
    """Return the largest number that can be computed, and written."""
    return min(largest_finite(batch.table.dtypes[-1]), largest_finite(batch.inputs.compute.name))


def _reach(batch: Batch) -> npt.NDArray[np.float64]:
    """Return up to which magnitude of the inputs no sum can overflow, float64 [rows]."""
    return np.asarray(_limit(batch) / (_ROUNDED * batch.bound(np.ones((len(batch.rows), len(batch.sources))))))


def _equal(one: Span, other: Span) -> bool:
    """Whether two spans of integers, of the same length, are equal."""
    pairs = zip(portions(one, CHUNK), portions(other, CHUNK), strict=True)
    return all(np.array_equal(_on_host(a), _on_host(b)) for a, b in pairs)


def _on_host(span: Span) -> Any:
    """Bring a span to the CPU, in a dtype that NumPy knows."""
    if isinstance(span, np.ndarray):
        return span
    return (span.double() if span.is_floating_point() else span).cpu().numpy()


def _place(label: str, leaf: Leaf) -> str:
    """Say which input a tensor is from, and which files it lies in, if it does."""
    files = [str(file.path) for file in getattr(leaf, "files", ())]
    return f"{label} ({', '.join(files)})" if files and files != [label] else label


def _count_nonfinite(span: Span) -> str:
    """Count NaN and infinities: "2 NaN and 1 Inf"; empty where there are none."""
    counts = {"NaN": 0, "Inf": 0}
    for values in map(_on_host, portions(span, CHUNK)):
        counts["NaN"] += int(np.isnan(values).sum())
        counts["Inf"] += int(np.isinf(values).sum())
    return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def deal(stops: Array, threads: int, chunk: int, starts: Array | int = 0) -> list[Array]:
    """Cut the rows of a table into pieces, and deal them out in shares of at most ``chunk`` elements.

    Args:
        stops: Where each row ends, int64 [rows].
        threads: How many threads there are to share between.
        chunk: A multiple of `BLOCK`.
        starts: Where each row begins, int64 [rows].

    Returns:
        Arrays of pieces, int64 [pieces, 3]: (row, start, stop). Every element is in exactly one piece, and every piece
        starts where its row does, or at a multiple of `BLOCK`.

    """
    size = min(chunk, -(-int((stops - starts).sum()) // (threads * BLOCK)) * BLOCK)
    shares: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, (start, end) in enumerate(zip(np.broadcast_to(starts, stops.shape).tolist(), stops.tolist(), strict=True)):
        while start < end:
            if room < min(BLOCK, end - start):
                shares.append([])
                room = size
            stop = end if end - start <= room else (start + room) // BLOCK * BLOCK
            shares[-1].append((row, start, stop))
            room -= stop - start
            start = stop
    return [np.array(share, np.int64) for share in shares]


def deal_slices(lengths: Array, slices: Slices, threads: int, chunk: int, cut: bool = True) -> list[Array]:
    """As `deal`, for pieces that count slices, (row, first slice, slice after the last); without ``cut`` all in one share."""
    size = min(chunk, max(1, int(lengths.sum()) // threads))
    least = 64 if slices.strided else 1  # neighbouring columns are read together
    shares: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, (total, length) in enumerate(zip(lengths.tolist(), slices.lengths.tolist(), strict=True)):
        step = max(least, size // length)
        for first in range(0, total // length, step):
            stop = min(first + step, total // length)
            if (room < (stop - first) * length and cut) or not shares:
                shares.append([])
                room = size
            shares[-1].append((row, first, stop))
            room -= (stop - first) * length
    return [np.array(share, np.int64) for share in shares]


def processors() -> int:
    """Count how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
