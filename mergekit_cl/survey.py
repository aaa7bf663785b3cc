"""Carries out surveys: sweeps over the tensors of many scopes together, and the sums of what comes back."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, groupby
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mergekit_cl.batches import keep_for, keep_of_rows, kind_of, lists, slices_of
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import MISSED, SPOILED, Array, Backend, SelectingBackend, Slices, Span, Table
from mergekit_cl.plan import Item, Plan
from mergekit_cl.select import RUN, SAMPLED, Integers, Selection, guess_ranks, sample_step, shift_for
from mergekit_cl.shares import Counts, Member
from mergekit_cl.steps import FIRST, LAST, Cut, Gram, KeptMagnitude, KthMagnitude, KthOf, PendingCut, Statistics, SumOf, Survey
from mergekit_cl.survey_formulas import fits_scope, kths_of, sums_of
from mergekit_cl.sweeps import Bound, Group, Sweeps, add_exactly, partial_sums, refuse
from mergekit_cl.windows import on_disk, sampled

if TYPE_CHECKING:
    from mergekit_cl.models.sharded import Processes

Asked: TypeAlias = Mapping[int, Any]
"""Surveys by the number of the scope that asks."""

_BINS = (1 << 9, 1 << 12)  # for small and large scopes: they stay in cache, and two rounds of them resolve a sampled window
_COUNTERS = 1 << 21  # in the histograms that there are at a time: 16 MiB, or those of one scope


def carry_out(engine: Sweeps, asked: Mapping[int, Survey]) -> dict[int, Any]:
    """Carry out the surveys of many scopes; return the answers by the scopes' numbers.

    Raises:
        NonFiniteError: What was read, or a result, is not finite, and that is not allowed.
        MergeError: A survey that does not fit the plan, or is none.

    """
    kinds: defaultdict[Any, dict[int, Any]] = defaultdict(dict)
    for number, survey in asked.items():
        check(engine.plan, number, survey)
        kinds[type(survey)][number] = survey
    carriers: dict[Any, Callable[[Sweeps, Asked], dict[int, Any]]] = {
        Gram: _grams, KthMagnitude: _cuts, KeptMagnitude: _kept_magnitudes, SumOf: sums_of, KthOf: kths_of
    }  # fmt: skip
    answers: dict[int, Any] = {}
    for kind, part in kinds.items():
        answers |= carriers[kind](engine, part)
    return answers


def check(plan: Plan, number: int, survey: Survey) -> None:
    """Check that a survey can be carried out for a scope.

    Raises:
        MergeError: It cannot, or it is no survey.

    """
    name, (scope, items) = plan.method.name, plan.scopes[number]
    if not isinstance(survey, Gram | KthMagnitude | KeptMagnitude | SumOf | KthOf):
        raise MergeError(f"{name}: yielded {type(survey).__name__}, which is not a survey")
    if isinstance(survey, SumOf | KthOf):
        if not fits_scope(survey, len(items), scope.elements):
            raise MergeError(f"{name}: yielded {survey} for {len(items)} tensors with {scope.elements} elements; rows need "
                             'scope="tensor", and ranks are in [0, elements]')  # fmt: skip
        return
    if (not isinstance(survey, Gram) or survey.task_vectors) and not plan.has_base:
        raise MergeError(f'{name}: task vectors need a base; declare base="required" in @method')
    if isinstance(survey, Gram):
        if survey.along and len(items) > 1:
            raise MergeError(f'{name}: slices of a tensor need scope="tensor"')
        return
    if isinstance(survey, KthMagnitude):
        fits = all(len(ranks) == plan.models for ranks in survey.ranks)
        fits &= all(rank is None or 0 <= rank <= scope.elements for ranks in survey.ranks for rank in ranks)
    else:
        fits = all(len(values) == plan.models for values in (survey.read, *lists(survey.keep)))
    if not fits:
        raise MergeError(f"{name}: yielded {survey} for {plan.models} models and {scope.elements} elements")


# Dot products


def _grams(engine: Sweeps, asked: Asked) -> dict[int, Statistics]:
    plan = engine.plan
    sources = (*((-1,) if plan.has_base else ()), *range(plan.models))
    members: defaultdict[Any, list[Member]] = defaultdict(list)
    for number, survey in asked.items():
        for item in plan.scopes[number][1]:
            member = Member(number, item, sources, tuple(engine.spans[item.name][source] for source in sources))
            members[survey, Table([member.spans]).dtypes].append(member)
    groups = [Group(group, partial(_gram, engine, survey), bool(survey.along)) for (survey, _), group in members.items()]
    sums = partial_sums(engine, groups)
    answers = {}
    for number, survey in asked.items():
        order = plan.models + (plan.has_base and not survey.task_vectors)
        parts = [np.zeros((0, order, order)), *sums[number]]
        answers[number] = np.concatenate(parts) if survey.along else add_exactly(parts)
    refuse(engine, {number: not np.isfinite(gram).all() for number, gram in answers.items()})
    return answers


def _gram(
    engine: Sweeps, survey: Gram, members: Sequence[Member]
) -> tuple[Callable[[Table, Array], Statistics], Slices | None]:
    """Return the kernel call for some tensors, and how they are cut."""
    backend, about = engine.backend, survey.task_vectors
    if not survey.along:
        return lambda table, pieces: backend.gram(table, about, pieces), None
    lengths = [slices_of(member.item, survey.along)[1] for member in members]
    slices = Slices(np.array(lengths, np.int64), survey.along == "columns")
    return lambda table, pieces: backend.gram_of_slices(table, about, slices, pieces), slices


# Cuts


@dataclass(eq=False)
class _Search:
    """Selections among the task vectors of a scope.

    ``numbers`` are theirs. ``rows`` have a column for each, after the base, and ``processes`` share them; ``sharing`` are those
    of all tensors of the scope, whether or not they have a row here. ``elements`` counts those of all processes.
    """

    items: Sequence[Item]
    rows: list[tuple[Span, ...]]
    processes: list["Processes | None"]
    sharing: tuple["Processes | None", ...]
    numbers: npt.NDArray[np.intp]
    elements: int
    bins: int = 0

    @cached_property
    def dtypes(self) -> list[tuple[str, ...]]:
        return [Table([row]).dtypes for row in self.rows]

    def sample(self) -> "_Search":
        """Copy runs of neighbours at equal distances, with every column twice."""
        step = int(sample_step(np.array(self.elements)))
        sample = _Search((), [], [], self.sharing, self.numbers, 0)
        for row, processes in zip(self.rows, self.processes, strict=True):
            if length := len(row[0]) // step * step:
                base, *models = (sampled(span, length, step, RUN) for span in row)
                sample.rows.append((base, *models, *models))
                sample.processes.append(processes)
        return sample


def _cuts(engine: Sweeps, asked: Asked) -> dict[int, list[list[Cut]]]:
    """Find cuts through task vectors."""
    plan = engine.plan
    answers: dict[int, list[list[Cut]]] = {}
    wanted: list[tuple[list[Cut], int, int]] = []  # where the answer goes, and the rank
    searches = []
    for number, survey in asked.items():
        scope, items = plan.scopes[number]
        columns = []
        answers[number] = []
        for ranks in survey.ranks:
            answers[number].append([LAST if rank is None or rank == scope.elements else FIRST for rank in ranks])
            found = [k for k, rank in enumerate(ranks) if rank is not None and 0 < rank < scope.elements]
            wanted += [(answers[number][-1], k, ranks[k]) for k in found]
            columns += found
        if columns:
            rows = [(spans[-1], *(spans[k] for k in columns)) for spans in (engine.spans[item.name] for item in items)]
            processes = [engine.shares.processes_of(item.name) for item in items]
            numbers = np.arange(len(wanted) - len(columns), len(wanted))
            sharing = tuple(dict.fromkeys(processes))
            searches.append(_Search(items, rows, processes, sharing, numbers, scope.elements))
    if searches:
        wide = any("float64" in dtypes for search in searches for dtypes in search.dtypes)
        ranks = np.array([rank for *_, rank in wanted], np.int64)
        if not wide and _stay(engine, searches):
            pending = _PendingCuts(engine, searches, ranks)
            for number, (answer, k, _) in enumerate(wanted):
                answer[k] = PendingCut(pending, number)
            if engine.plan.check_first and engine.nonfinite == "error":  # refuse before anything is written
                pending.settle()
            return answers
        chosen = _select(engine, searches, Selection(ranks, 63 if wide else 31), _guess(engine, searches, ranks, wide), wide)
        magnitudes = chosen.low.view(np.float64) if wide else chosen.low.astype(np.int32).view(np.float32)
        for (answer, k, _), magnitude, share in zip(wanted, magnitudes.tolist(), chosen.shares.tolist(), strict=True):
            answer[k] = Cut(magnitude, share)
    return answers


def _stay(engine: Sweeps, searches: Sequence[_Search]) -> bool:
    """Tell whether the cuts can be found on a device, and stay there: of float32, of whole tensors that lie in its memory."""
    if engine.stages or engine.shares or not hasattr(engine.backend, "select_magnitudes"):
        return False
    return not any(on_disk(span) for search in searches for row in search.rows for span in row)


class _PendingCuts:
    """Cuts that a backend looks for on its device (see `mergekit_cl.steps.Pending`). Where it misses one, it is counted for."""

    def __init__(self, engine: Sweeps, searches: Sequence[_Search], ranks: Integers) -> None:
        self._engine, self._searches, self._ranks = engine, searches, ranks
        self._cuts: list[Cut] = []
        self._lock = Lock()
        tables: defaultdict[tuple[str, ...], list[tuple[tuple[Span, ...], npt.NDArray[np.intp]]]] = defaultdict(list)
        for search in searches:
            for row, dtypes in zip(search.rows, search.dtypes, strict=True):
                tables[dtypes].append((row, search.numbers))
        backend = cast(SelectingBackend, engine.backend)
        self.selected = backend.select_magnitudes(
            [Table([row for row, _ in rows]) for rows in tables.values()],
            [np.array([numbers for _, numbers in rows]) for rows in tables.values()],
            ranks,
        )

    def settle(self) -> Sequence[Cut]:
        """Wait for the cuts, and return them.

        Raises:
            NonFiniteError: What was read is not finite, and that is not allowed.

        """
        with self._lock:
            if not self._cuts:
                _, _, flags, patterns, ranks, equal = self.selected.fetch().T
                spoiled = [search for search in self._searches if (flags[search.numbers] & SPOILED).any()]
                self._engine.refuse_nonfinite(pair for each in spoiled for pair in zip(each.items, each.rows, strict=True))
                missed = np.flatnonzero(flags & MISSED)
                shares = ranks / np.maximum(equal, 1)
                if len(missed):
                    chosen = self._count(missed)
                    patterns[missed], shares[missed] = chosen.low, chosen.shares
                magnitudes = patterns.astype(np.int32).view(np.float32)
                self._cuts = [Cut(*pair) for pair in zip(magnitudes.tolist(), shares.tolist(), strict=True)]
        return self._cuts

    def _count(self, missed: Integers) -> Selection:
        """Make some of the selections by histograms of all patterns, in one thread, because each may come here."""
        searches = []
        for search in self._searches:
            found = [column for column, number in enumerate(search.numbers) if number in missed]
            if found:
                rows = [(row[0], *(row[1 + column] for column in found)) for row in search.rows]
                numbers = np.searchsorted(missed, search.numbers[found])
                searches.append(replace(search, rows=rows, numbers=numbers))
        return _select(self._engine, searches, Selection(self._ranks[missed], 31), None, False, alone=True)


def _guess(engine: Sweeps, searches: Sequence[_Search], ranks: Integers, wide: bool) -> tuple[Integers, Integers]:
    """Look at a sample of the large scopes; return between which patterns the selections probably lie."""
    low, high = np.zeros_like(ranks), np.full_like(ranks, 2**63 - 1 if wide else 2**31 - 1)
    large = [search for search in searches if search.elements >= SAMPLED]
    samples: list[_Search] = []
    sample_ranks, limits = [np.zeros(0, np.int64)], []
    for search, sample in zip(large, _samples(engine, large), strict=True):
        if not sample.elements:
            continue
        selections = len(search.numbers)
        sample.numbers = (samples[-1].numbers[-1] + 1 if samples else 0) + np.arange(2 * selections)
        sizes = (np.full(selections, size) for size in (search.elements, sample.elements))
        upper, lower = guess_ranks(ranks[search.numbers], *sizes)
        sample_ranks += [np.clip(upper, 1, None), np.clip(lower, None, sample.elements)]
        limits.append((search.numbers, sample.numbers, upper >= 1, lower <= sample.elements))
        samples.append(sample)
    if samples:
        # two rounds leave 2**13 patterns, a thousandth of a magnitude: next to nothing beside what a sample leaves open
        chosen = _select(engine, samples, Selection(np.concatenate(sample_ranks), 63 if wide else 31), None, wide, rounds=2)
        for numbers, places, has_upper, has_lower in limits:
            upper, lower = np.split(places, 2)
            high[numbers[has_upper]], low[numbers[has_lower]] = chosen.high[upper[has_upper]], chosen.low[lower[has_lower]]
    return low, high


def _samples(engine: Sweeps, searches: Sequence[_Search]) -> list[_Search]:
    """Take a sample of each search; count what all processes have of it."""
    samples = [search.sample() for search in searches]
    counts = []
    for search, sample in zip(searches, samples, strict=True):
        sizes = {processes: np.zeros(1, np.int64) for processes in search.sharing}
        for row, processes in zip(sample.rows, sample.processes, strict=True):
            sizes[processes] += len(row[0])
        counts.append(sizes)
    for sample, size in zip(samples, engine.shares.add_up(counts), strict=True):
        sample.elements = int(size[0])
    return samples


def _select(
    engine: Sweeps, searches: Sequence[_Search], selection: Selection, guess: tuple[Integers, Integers] | None, wide: bool,
    rounds: int | None = None, alone: bool = False,
) -> Selection:  # fmt: skip
    """Count, round by round, until all selections are made; ``alone``: with one thread."""
    low, high = guess or (selection.low, selection.high)
    for number in count():
        if not searches or number == rounds:
            break
        for search, width in zip(searches, _largest(searches, high - low), strict=True):
            search.bins = min(1 << width.bit_length(), _BINS[search.elements >= 2 * _BINS[1]])
        parts = _parts(searches)
        for together in [list(parts)] if engine.shares else ([part] for part in parts):
            shift = np.zeros_like(low)
            counted = []
            for part in together:
                numbers = np.concatenate([search.numbers for search in part])
                shift[numbers] = shift_for(low[numbers], high[numbers], part[0].bins)
                counted += _count(engine, part, low, shift, wide, alone)
            totals = iter(engine.shares.add_up(counted))
            for part in together:
                numbers = np.concatenate([search.numbers for search in part])
                found = [next(totals) for _ in part]
                spoiled = [search for search, counts in zip(part, found, strict=True) if counts[:, -1].any() and search.items]
                engine.refuse_nonfinite(pair for search in spoiled for pair in zip(search.items, search.rows, strict=True))
                selection.narrow(numbers, low[numbers], shift[numbers], np.concatenate(found)[:, :-1])
        unfinished = _largest(searches, selection.open)
        searches = [search for search, is_open in zip(searches, unfinished, strict=True) if is_open]
        low, high = selection.low, selection.high
    return selection


def _largest(searches: Sequence[_Search], values: Array) -> list[int]:
    """Return the largest of the values of each search."""
    starts = np.cumsum([0, *(len(search.numbers) for search in searches)])[:-1]
    largest: list[int] = np.maximum.reduceat(values[np.concatenate([search.numbers for search in searches])], starts).tolist()
    return largest


def _parts(searches: Sequence[_Search]) -> Iterable[list[_Search]]:
    """Cut a list of searches into parts with as many bins each, and histograms that do not take too much memory together."""
    for _, alike in groupby(sorted(searches, key=lambda search: search.bins), key=lambda search: search.bins):
        part: list[_Search] = []
        counters = 0
        for search in alike:
            counters += search.bins * len(search.numbers)
            if part and counters > _COUNTERS:
                yield part
                part, counters = [], search.bins * len(search.numbers)
            part.append(search)
        yield part


def _count(engine: Sweeps, part: Sequence[_Search], low: Integers, shift: Integers, wide: bool, alone: bool) -> list[Counts]:
    """Make the histograms of some searches, int64 [selections, bins + 2] each: of what each group of processes shares."""
    bins = part[0].bins
    groups: defaultdict[Any, list[tuple[int, tuple[Span, ...]]]] = defaultdict(list)
    for index, search in enumerate(part):
        for row, dtypes, processes in zip(search.rows, search.dtypes, search.processes, strict=True):
            groups[processes, dtypes].append((index, row))
    counts = [
        {processes: np.zeros((len(search.numbers), bins + 2), np.int64) for processes in search.sharing} for search in part
    ]
    for (processes, _), members in groups.items():
        table = Table([row for _, row in members])
        owners = np.array([index for index, _ in members])
        numbers = np.array([part[index].numbers for index, _ in members])
        call = partial(_histograms, engine.backend, low[numbers], shift[numbers], bins, wide, owners)
        for _, (touched, found) in engine.sweep(call, table, few=True, alone=alone):
            for index, histogram in zip(touched.tolist(), found, strict=True):
                counts[index][processes] += histogram
    return counts


def _histograms(
    backend: Backend, low: Array, shift: Array, bins: int, wide: bool, owners: Array, table: Table, pieces: Array
) -> tuple[Array, Integers]:
    """Make a histogram for each of the owners of these pieces."""
    touched, groups = np.unique(owners[pieces[:, 0]], return_inverse=True)
    return touched, backend.magnitude_histogram(table, low, shift, bins, wide, groups, pieces)


# Norms of what is kept


def _kept_magnitudes(engine: Sweeps, asked: Asked) -> dict[int, Statistics]:
    plan = engine.plan
    members: defaultdict[Any, list[Member]] = defaultdict(list)
    read = {number: [k for k, wanted in enumerate(survey.read) if wanted] for number, survey in asked.items()}
    for number, survey in asked.items():
        for item in plan.scopes[number][1] if read[number] else ():
            sources = (-1, *read[number])
            columns = tuple(engine.spans[item.name][source] for source in sources)
            table = Table([columns])
            rule = keep_for(survey.keep, item, read[number], table.compute)
            members[kind_of(survey.keep), table.dtypes].append(Member(number, item, sources, columns, rule))
    sums = partial_sums(engine, [Group(group, partial(_kept, engine, kind)) for (kind, _), group in members.items()])
    answers = {}
    for number, models in read.items():
        answers[number] = np.zeros((plan.models, 2))
        if models:
            answers[number][models] = add_exactly([np.zeros((0, len(models), 2)), *sums[number]])
    refuse(engine, {number: not np.isfinite(norms).all() for number, norms in answers.items()})
    return answers


def _kept(engine: Sweeps, kind: Literal["all", "random", "magnitude"], members: Sequence[Member]) -> Bound:
    """Return the kernel call for some tensors."""
    keep = keep_of_rows(kind, [member.detail for member in members])
    return lambda table, pieces: engine.backend.kept_magnitude(table, keep, pieces), None
