"""Merges whose result is written to disk: tensors are read, computed and written a window at a time, within a budget of memory.

What a method surveys is looked at more than once. Tensors of which all inputs fit into the budget are read once and kept
while that lasts, many small ones together; larger ones are read again for every sweep. Neither shows in the result.

On a GPU the budget of what is kept is the GPU's memory: tensors that fit are brought there once, with room for their results,
and merged as tensors are that lie there anyway. All others go there and back a window at a time (see `mergekit_cl.staging`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any, Protocol

import numpy as np

from mergekit_cl.checkpoint.stored import DataFile, Stored, allow_open_files, is_source, numpy_dtype
from mergekit_cl.dtypes import dtype_name
from mergekit_cl.errors import MergeError, listing
from mergekit_cl.execute import WINDOW, Advance, Executor, Nonfinite, processors
from mergekit_cl.kernels import BLOCK, Array, Span
from mergekit_cl.models import library_of, tensor
from mergekit_cl.plan import Item, Plan
from mergekit_cl.staging import Held, Staged, Task, staged_for
from mergekit_cl.steps import Gram, PerMatrix, PerRow, SumOf, SumOfSlices
from mergekit_cl.windows import Incoming, Outgoing, Windows

_SMALL = 4 << 20  # elements of a job that NumPy has merged before numba is imported
_LOADED = 4 << 20  # bytes of a tensor that a thread loads at a time
_DECOMPOSITION = 120  # bytes for each entry of a matrix that is decomposed, measured
_FIXED = 96 << 20  # bytes for what is not the data of tensors: counters, scratch, names, code that is compiled
_STAGED = 64 << 20  # bytes of a window on its way to a GPU: what Python does for it is little beside a millisecond on the bus
_THREADS = 32  # at most, by default, where a GPU computes: they only read and write


class Sink(Protocol):
    """What takes the tensors: see `mergekit_cl.checkpoint.writer.Writer`."""

    done: frozenset[str]

    def write(self, name: str, first: int, data: Array) -> None:
        """Take elements of a tensor, from number ``first`` on; from any thread."""


@dataclass(frozen=True)
class Job:
    """What is merged, and what is copied byte for byte; together these are all tensors of the result.

    The plans' arrays may be tensors of checkpoints or in memory (on the CPU). Each plan has tensors of its own.
    """

    plans: tuple[Plan, ...]
    copies: Mapping[str, Stored]

    @property
    def is_small(self) -> bool:
        """Whether starting a compiler would take longer than the merge."""
        return sum(_elements(plan.items) for plan in self.plans) <= _SMALL

    @cached_property
    def files(self) -> list[DataFile]:
        """All files that are read, each once."""
        leaves = [leaf for plan in self.plans for item in plan.items for leaf in item.leaves]
        sources = [leaf for leaf in (*leaves, *self.copies.values()) if is_source(leaf)]
        return list({id(file): file for source in sources for file in source.files}.values())


@dataclass(frozen=True)
class Budget:
    """How a number of bytes of memory is divided.

    ``window`` bytes are the share of each thread that reads, computes and writes; ``kept`` bytes are for inputs that are
    kept for several sweeps. On a GPU these are bytes of its memory, and each window takes as much there as on the host.
    """

    window: int
    kept: int

    @classmethod
    def of(cls, memory: int, threads: int, held: int = 0) -> "Budget":
        """Divide ``memory`` bytes, of which the process has ``held`` already.

        Raises:
            MergeError: That is too little to work with.

        """
        room = _room(memory, threads, held)
        window = min(WINDOW, room // (2 * threads))
        return cls(window, room - threads * window)

    @classmethod
    def on_device(cls, memory: int, threads: int, held: int, free: int) -> "Budget":
        """As `of`, where windows are pinned (in sizes that are powers of two), and ``free`` bytes of a GPU may be taken.

        Raises:
            MergeError: One of the two is too little to work with.

        """
        room = min(_room(memory, threads, held), free // 2)
        window = min(_STAGED, 1 << (room // threads).bit_length() - 1) if room >= threads else 0
        if window < 1 << 20:
            raise MergeError(
                f"the GPU has {free / 1e6:.0f} MB to spare, too little for {threads} threads; stop what else uses it, or allow "
                "fewer threads"
            )
        return cls(window, free - threads * window)


def _room(memory: int, threads: int, held: int) -> int:
    """Return how many of ``memory`` bytes are for tensors, where the process has ``held`` already."""
    room, least = memory - held, _FIXED + threads * (1 << 20) * 2
    if room < least:
        program = f", where the program itself takes {held / 1e6:.0f} MB" if held else ""
        raise MergeError(
            f"memory: {memory / 1e6:.0f} MB are too little for {threads} threads{program}; "
            f"give {_megabytes(held + least)} MB or more"
        )
    return room - _FIXED


def run(
    job: Job,
    sink: Sink,
    *,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    nonfinite: Nonfinite = "error",
    memory: int = 512 * 10**6,
    held: int = 0,
    advance: Advance = lambda _: None,
) -> None:
    """Merge and copy what the sink does not have yet.

    Args:
        job: What to do.
        sink: Where the tensors go.
        backend: "auto", "numpy", "numba" or "triton".
        device: Where to compute: see `mergekit_cl.staging.find_device`.
        threads: How many threads read, compute and write; ``None`` for all processors that the process may use, and two more
            where a GPU computes.
        nonfinite: Whether NaN and infinities in the inputs are errors.
        memory: Bytes that may be allocated.
        held: Bytes of these that the process has already.
        advance: Called with numbers of elements that have been written (or need not be any more).

    Raises:
        MergeError: As `mergekit_cl.merge`, and for files that are damaged, or changed while they are read.

    """
    staged = staged_for(backend, device)
    if staged is not None:
        backend = "triton"
    elif backend == "auto" and job.is_small and not any(plan.method.surveys for plan in job.plans):
        backend = "numpy"  # the same bits
    threads = threads or _threads(staged)
    budget = _budget(memory, threads, held, staged)
    check_memory(job, memory, threads, held, staged)
    allow_open_files(len(job.files))
    how = _How(sink, backend, threads, nonfinite, budget, advance)
    with nullcontext() if staged is None else staged.lanes.in_use():
        for plan in job.plans:
            left = _without(plan, sink.done)
            advance(_elements(plan.items) - _elements(left.items))
            if staged is None:
                _merge_on_cpu(left, how)
            else:
                _merge_on_device(left, how, staged)
    _copy({name: source for name, source in job.copies.items() if name not in sink.done}, sink, threads, advance)
    advance(sum(prod(source.shape) for name, source in job.copies.items() if name in sink.done))
    for file in job.files:
        file.check_unchanged()


@dataclass(frozen=True)
class _How:
    """What is the same for all parts of a run; see `run`."""

    sink: Sink
    backend: str
    threads: int
    nonfinite: Nonfinite
    budget: Budget
    advance: Advance

    def outgoing(self, item: Item) -> Outgoing:
        """Make the span that a tensor is written to."""
        write = _drop if item.name in self.sink.done else partial(self.sink.write, item.name)
        return Outgoing(item.dtype, prod(item.shape), write)

    def carry_out(self, tasks: Sequence[Task]) -> None:
        """Move parts of tensors, in threads."""
        for task in _in_threads(lambda task: task(), tasks, self.threads):
            self.advance(task.written)


def _threads(staged: Staged | None) -> int:
    """Choose how many threads there are. Where a GPU computes, some wait for it while the others have the processors."""
    return processors() if staged is None else min(processors() + 2, _THREADS)


def _budget(memory: int, threads: int, held: int, staged: Staged | None) -> Budget:
    if staged is None:
        return Budget.of(memory, threads, held)
    return Budget.on_device(memory, threads, held, staged.free())


def check_memory(job: Job, memory: int, threads: int | None, held: int = 0, staged: Staged | None = None) -> None:
    """Refuse a budget that some tensor of the job does not fit into, before anything is read.

    Raises:
        MergeError: One message lists all tensors, with what they need.

    """
    threads = threads or _threads(staged)
    budget = _budget(memory, threads, held, staged)
    problems = []
    for plan in job.plans:
        along = _along(plan)
        if along and staged is not None:
            problems += _problems_on_device(plan, along, budget)
            continue
        for item in (item for _, items in plan.scopes for item in items) if along else ():
            if along == "columns":
                need, room = prod(item.shape) * _width(item), budget.kept
                share = 1 if budget.window == WINDOW else 2
            elif along == "matrices":
                need, room, share = _working_on(item), budget.kept, 1
                if len(item.shape) != 2:
                    continue
            else:
                row = item.shape[-1] if item.shape else 1
                need, room, share = row * _width(item), budget.window + budget.kept // threads, threads
            if need > room:
                problems.append(
                    f"{tensor(item.name)}: {plan.method.name} looks at whole {along}, {_megabytes(need)} MB at once, but "
                    f"memory leaves room for {room // 10**6} MB; give it {_megabytes(memory + (need - room) * share)} MB"
                )
    if problems:
        raise MergeError(listing(problems))


def _problems_on_device(plan: Plan, along: str, budget: Budget) -> list[str]:
    """List what does not fit into a GPU's memory as a whole. Rows of what is not kept there have to fit into a window."""
    problems = []
    for _, items in plan.scopes:
        kept = _needed_on_device(items) <= budget.kept
        for item in items:
            need, room, where = _needed_on_device([item]), budget.kept, "the GPU"
            if along == "matrices" and len(item.shape) == 2:
                need, room = _working_on(item), budget.kept // 2
            elif along == "rows" and not kept:
                need, room, where = (item.shape[-1] if item.shape else 1) * _width(item), budget.window, "a window"
            if need > room:
                problems.append(
                    f"{tensor(item.name)}: {plan.method.name} looks at whole {along}, {_megabytes(need)} MB at once, but "
                    f"{where} has room for {room // 10**6} MB; merge on the CPU (leave device away), or give more memory"
                )
    return problems


def _without(plan: Plan, done: frozenset[str]) -> Plan:
    """Leave out what is there already. A scope that lacks one of its tensors has to look at all of them again."""
    scopes = tuple((scope, items) for scope, items in plan.scopes if any(item.name not in done for item in items))
    return replace(plan, scopes=scopes, exact=tuple(item for item in plan.exact if item.name not in done))


def _parts(plan: Plan, room: int, on_device: bool = False) -> Iterator[tuple[Plan, bool]]:
    """Cut a plan into parts that are merged one after another; tell of each whether its inputs are kept in memory.

    ``on_device`` means that of a GPU, where what looks along rows, columns or matrices is kept too, and results have room.
    """
    along = _along(plan)
    keeps = plan.method.surveys or (on_device and along is not None)
    if not keeps and not on_device:
        yield plan, False
        return
    if plan.exact:
        yield replace(plan, scopes=()), False
    if not keeps:
        yield replace(plan, exact=()), False
        return
    columns = along == "columns"
    group: list[Any] = []
    size = 0
    for scope, items in plan.scopes:
        need = _needed_on_device(items) if on_device else sum(prod(item.shape) * _width(item, result=columns) for item in items)
        if group and size + need > room // 2:  # half of it: what is kept for one part is given back late
            yield replace(plan, scopes=tuple(group), exact=()), True
            group, size = [], 0
        if need > room and not columns:
            yield replace(plan, scopes=((scope, items),), exact=()), False
        else:
            group.append((scope, items))
            size += need
    if group:
        yield replace(plan, scopes=tuple(group), exact=()), True


def _announce(plan: Plan) -> None:
    """Tell the system what will be read when the present part is merged."""
    for item in plan.items:
        for span in map(span_of, item.leaves):
            if isinstance(span, Incoming):
                span.announce(0, len(span))


def _merge_on_cpu(plan: Plan, how: _How) -> None:
    """Merge a plan; tell the system of each part what the next one will read."""
    parts = list(_parts(plan, how.budget.kept))
    for number, (part, kept) in enumerate(parts):
        for following, soon in parts[number + 1 : number + 2]:
            if soon:
                _announce(following)
        _merge(part, how, kept=kept)


def _merge(plan: Plan, how: _How, *, kept: bool = False, staged: Staged | None = None) -> None:
    """Merge a part of a plan: on the CPU, or a window at a time on a GPU."""
    whole: dict[str, Array] = {}
    columns = staged is None and _along(plan) == "columns"

    def output(item: Item) -> Span:
        if columns:  # every piece of it is in all windows
            return whole.setdefault(item.name, np.empty(prod(item.shape), numpy_dtype(item.dtype)))
        return how.outgoing(item)

    spans = {item.name: tuple(map(span_of, item.leaves)) for item in plan.items}
    if kept:
        spans = _load(spans, how.threads)
    executor = Executor(
        plan, backend=how.backend, threads=how.threads, nonfinite=how.nonfinite, spans=spans, outputs=output,
        # What is pinned is a power of two, and spans lie at multiples of some bytes in it
        window=how.budget.window if staged is None else how.budget.window // 16 * 15, windows=staged or Windows(),
    )  # fmt: skip
    executor.run(how.advance)
    for name, values in whole.items():
        if name not in how.sink.done:
            how.sink.write(name, 0, values)


def _merge_on_device(plan: Plan, how: _How, staged: Staged) -> None:
    """Merge a plan on a GPU. What one part has as results is written while the inputs of the next are read."""
    stores: list[Task] = []
    waiting = 0  # bytes of the results that are not written yet
    for part, kept in _parts(plan, how.budget.kept, on_device=True):
        if _needed_on_device(part.items) + waiting > how.budget.kept:
            how.carry_out(stores)
            stores, waiting = [], 0
        if kept:
            results = _merge_held(part, stores, how, staged)
            stores, waiting = results.stores, results.nbytes
        elif part.scopes:
            _merge(part, how, staged=staged)
        else:
            _merge(part, replace(how, backend="numpy"))
    how.carry_out(stores)


def _merge_held(plan: Plan, stores: Sequence[Task], how: _How, staged: Staged) -> Held:
    """Bring all inputs of a part to a GPU, while others are written, and merge them there; return the results."""
    window = how.budget.window
    rows = {item.name: tuple(map(span_of, item.leaves)) for item in plan.items}
    inputs = Held(staged, [span for row in rows.values() for span in row], window)
    results = Held(staged, [how.outgoing(item) for item in plan.items], window)
    outputs = dict(zip(rows, results.spans, strict=True))
    how.carry_out(_interleaved(stores, inputs.loads))
    held = iter(inputs.spans)
    executor = Executor(
        replace(plan, device=str(staged.device)), backend=how.backend, threads=1, nonfinite=how.nonfinite,
        spans={name: tuple(next(held) for _ in row) for name, row in rows.items()}, outputs=lambda item: outputs[item.name],
    )  # fmt: skip
    executor.run()
    staged.lanes.settle()
    return results


def _interleaved(one: Sequence[Task], other: Sequence[Task]) -> list[Task]:
    """Put two lists into one, in which both come to their end together."""
    placed = [((number + 1) / len(tasks), task) for tasks in (one, other) for number, task in enumerate(tasks)]
    return [task for _, task in sorted(placed, key=lambda pair: pair[0])]


def _drop(first: int, data: Array) -> None:
    """Leave alone what an earlier run has written."""


def _load(spans: Mapping[str, tuple[Span, ...]], threads: int) -> dict[str, tuple[Span, ...]]:
    """Read all tensors into memory, side by side."""
    loaded: dict[str, tuple[Span, ...]] = {}
    tasks: list[list[tuple[Incoming, int, int, Array]]] = []
    room = 0
    for name, row in spans.items():
        arrays: list[Span] = []
        for span in row:
            array = span
            if isinstance(span, Incoming):
                array = np.empty(len(span), span.dtype)
                step = max(BLOCK, _LOADED // span.dtype.itemsize // BLOCK * BLOCK)
                for start in range(0, len(span), step):
                    part = array[start : start + step]
                    if room < part.nbytes:
                        tasks.append([])
                        room = _LOADED
                    tasks[-1].append((span, start, start + len(part), part))
                    room -= part.nbytes
            arrays.append(array)
        loaded[name] = tuple(arrays)
    for _ in _in_threads(_read, tasks, threads):
        pass
    return loaded


def _read(tasks: Iterable[tuple[Incoming, int, int, Array]]) -> None:
    for span, start, stop, out in tasks:
        span.read(start, stop, out)


def _copy(copies: Mapping[str, Stored], sink: Sink, threads: int, advance: Advance) -> None:
    """Copy tensors byte for byte, whatever their dtype is."""
    tasks = []
    for name, source in copies.items():
        bits = replace(source, stored_dtype=f"uint{8 * source.itemsize}")
        step = max(BLOCK, _LOADED // bits.itemsize // BLOCK * BLOCK)
        length = prod(source.shape)
        tasks += [(name, bits, at, min(at + step, length)) for at in range(0, length, step)]

    def copy(task: tuple[str, Stored, int, int]) -> None:
        name, bits, start, stop = task
        elements = np.empty(stop - start, bits.dtype)
        bits.read(start, stop, elements)
        sink.write(name, start, elements.view(np.uint8))

    for task in _in_threads(copy, tasks, threads):
        advance(task[3] - task[2])


def _in_threads(work: Callable[[Any], object], tasks: Sequence[Any], threads: int) -> Iterator[Any]:
    """Do some tasks in threads; yield each when it is done."""
    with ThreadPoolExecutor(threads) as pool:
        for task, _ in zip(tasks, pool.map(work, tasks), strict=True):
            yield task


def _along(plan: Plan) -> str | None:
    """Return what a plan's method looks at as a whole first, if anything: "rows", "columns" or "matrices"."""
    if not plan.scopes:
        return None
    if plan.method.ends_in(PerMatrix):
        return "matrices"
    scope = plan.scopes[0][0]
    step = run = plan.method(scope, **plan.parameters_of(scope))
    if plan.method.surveys:
        try:
            step = next(run)
        except StopIteration as end:  # it has no use for a survey
            step = end.value
        run.close()
    if isinstance(step, Gram | SumOf | SumOfSlices):
        return step.along
    return "matrices" if isinstance(step, PerMatrix) else "rows" if isinstance(step, PerRow) else None


def span_of(leaf: Any) -> Span:
    """Make a span of what lies in a file, of which nothing is read yet; of an array its memory."""
    if is_source(leaf):
        return Incoming(leaf)
    library = library_of(leaf)
    assert library is not None
    return library.span(leaf)


def _width(item: Item, result: bool = True) -> int:
    """Bytes that one element takes in all inputs, and in the result."""
    inputs = sum(numpy_dtype(leaf.dtype).itemsize for leaf in item.leaves if is_source(leaf))
    return inputs + result * numpy_dtype(item.dtype).itemsize


def _needed_on_device(items: Iterable[Item]) -> int:
    """Bytes that tensors take on a GPU, with their results."""
    return sum(
        prod(item.shape) * numpy_dtype(dtype_name(dtype)).itemsize
        for item in items
        for dtype in (*(leaf.dtype for leaf in item.leaves), item.dtype)
    )


def _working_on(item: Item) -> int:
    """Bytes that a matrix takes while it is decomposed, with all inputs and the result."""
    work = _DECOMPOSITION + len(item.leaves) * (8 if _is_wide(item) else 4)
    return prod(item.shape) * (_width(item) + work)


def _is_wide(item: Item) -> bool:
    return any(str(leaf.dtype).endswith("float64") for leaf in item.leaves)


def _megabytes(size: int) -> int:
    return -(-size // 10**6)


def _elements(items: Iterable[Item]) -> int:
    return sum(prod(item.shape) for item in items)
