"""Carries out surveys: sweeps over the tensors of many scopes together, and the sums of what comes back."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mergekit_cl.batches import keep_for, keep_of_rows, kind_of, lists, slices_of
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import BLOCK, Array, Backend, Keep, Slices, Span, Table
from mergekit_cl.plan import Item, Plan
from mergekit_cl.select import Integers, Selection, guess_ranks, shift_for
from mergekit_cl.steps import FIRST, LAST, Cut, Gram, KeptMagnitude, KthMagnitude, KthOf, Statistics, SumOf, Survey
from mergekit_cl.survey_formulas import fits_scope, kths_of, sums_of
from mergekit_cl.sweeps import Sweeps, add_exactly, refuse
from mergekit_cl.windows import sampled

Asked: TypeAlias = Mapping[int, Any]
"""Surveys by the number of the scope that asks."""

SAMPLED = 1 << 15
"""Elements of a scope from which on a sample tells where to look for a cut."""

_RUN = 32  # neighbours that are sampled together: they lie in one or two lines of the cache
_SAMPLE = (1 << 12, 1 << 18)
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
    groups: defaultdict[Any, list[tuple[int, Item, tuple[Span, ...]]]] = defaultdict(list)
    for number, survey in asked.items():
        for item in engine.plan.scopes[number][1]:
            spans = engine.spans[item.name]
            columns = (spans[-1], *spans[:-1]) if engine.plan.has_base else spans
            groups[survey, Table([columns]).dtypes].append((number, item, columns))
    sums: defaultdict[int, list[Statistics]] = defaultdict(list)
    for (survey, _), members in groups.items():
        table = Table([columns for *_, columns in members])
        about = survey.task_vectors
        slices = None
        if survey.along:
            lengths = [slices_of(item, survey.along)[1] for _, item, _ in members]
            slices = Slices(np.array(lengths, np.int64), survey.along == "columns")
        call = partial(_gram, engine.backend, about, slices)
        for pieces, blocks in engine.sweep(call, table, slices):
            each = pieces[:, 2] - pieces[:, 1] if survey.along else _blocks(pieces)
            owners = np.repeat(pieces[:, 0], each)
            for row in np.unique(owners):
                sums[members[row][0]].append(blocks[owners == row])
    answers = {}
    for number, survey in asked.items():
        order = engine.plan.models + (engine.plan.has_base and not survey.task_vectors)
        empty = np.zeros((0, order, order))
        answers[number] = np.concatenate([empty, *sums[number]]) if survey.along else add_exactly([empty, *sums[number]])
    refuse(engine, {number: not np.isfinite(gram).all() for number, gram in answers.items()})
    return answers


def _gram(backend: Backend, about: bool, slices: Slices | None, table: Table, pieces: Array) -> Statistics:
    if slices is None:
        return backend.gram(table, about, pieces)
    return backend.gram_of_slices(table, about, slices, pieces)


# Cuts


@dataclass(eq=False)
class _Search:
    """Selections among the task vectors of a scope: ``numbers`` are theirs, ``rows`` have a column for each, after the base."""

    items: Sequence[Item]
    rows: list[tuple[Span, ...]]
    numbers: npt.NDArray[np.intp]
    bins: int = 0

    @cached_property
    def elements(self) -> int:
        return sum(len(row[0]) for row in self.rows)

    @cached_property
    def dtypes(self) -> list[tuple[str, ...]]:
        return [Table([row]).dtypes for row in self.rows]

    def sample(self, numbers: npt.NDArray[np.intp]) -> "_Search":
        """Copy runs of neighbours at equal distances, with every column twice."""
        step = _RUN * max(1, self.elements // min(_SAMPLE[1], max(_SAMPLE[0], self.elements // 256)))
        rows = []
        for row in self.rows:
            if length := len(row[0]) // step * step:
                base, *models = (sampled(span, length, step, _RUN) for span in row)
                rows.append((base, *models, *models))
        return _Search((), rows, numbers)


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
            searches.append(_Search(items, rows, np.arange(len(wanted) - len(columns), len(wanted))))
    if searches:
        wide = any("float64" in dtypes for search in searches for dtypes in search.dtypes)
        ranks = np.array([rank for *_, rank in wanted], np.int64)
        chosen = _select(engine, searches, Selection(ranks, 63 if wide else 31), _guess(engine, searches, ranks, wide), wide)
        magnitudes = chosen.low.view(np.float64) if wide else chosen.low.astype(np.int32).view(np.float32)
        for (answer, k, _), magnitude, share in zip(wanted, magnitudes.tolist(), chosen.shares.tolist(), strict=True):
            answer[k] = Cut(magnitude, share)
    return answers


def _guess(engine: Sweeps, searches: Sequence[_Search], ranks: Integers, wide: bool) -> tuple[Integers, Integers]:
    """Look at a sample of the large scopes; return between which patterns the selections probably lie."""
    low, high = np.zeros_like(ranks), np.full_like(ranks, 2**63 - 1 if wide else 2**31 - 1)
    large = [search for search in searches if search.elements >= SAMPLED]
    samples: list[_Search] = []
    sample_ranks, limits = [np.zeros(0, np.int64)], []
    for search in large:
        selections = len(search.numbers)
        sample = search.sample((samples[-1].numbers[-1] + 1 if samples else 0) + np.arange(2 * selections))
        if not sample.rows:
            continue
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


def _select(
    engine: Sweeps, searches: Sequence[_Search], selection: Selection, guess: tuple[Integers, Integers] | None, wide: bool,
    rounds: int | None = None,
) -> Selection:  # fmt: skip
    """Count, round by round, until all selections are made."""
    low, high = guess or (selection.low, selection.high)
    for number in count():
        if not searches or number == rounds:
            break
        for search, width in zip(searches, _largest(searches, high - low), strict=True):
            search.bins = min(1 << width.bit_length(), _BINS[search.elements >= 2 * _BINS[1]])
        for part in _parts(searches):
            numbers = np.concatenate([search.numbers for search in part])
            shift = np.zeros_like(low)
            shift[numbers] = shift_for(low[numbers], high[numbers], part[0].bins)
            found = _count(engine, part, low, shift, wide)
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


def _count(engine: Sweeps, part: Sequence[_Search], low: Integers, shift: Integers, wide: bool) -> list[Integers]:
    """Make the histograms of some searches, int64 [selections, bins + 2] each."""
    bins = part[0].bins
    groups: defaultdict[tuple[str, ...], list[tuple[int, tuple[Span, ...]]]] = defaultdict(list)
    for index, search in enumerate(part):
        for row, dtypes in zip(search.rows, search.dtypes, strict=True):
            groups[dtypes].append((index, row))
    counts = [np.zeros((len(search.numbers), bins + 2), np.int64) for search in part]
    for members in groups.values():
        table = Table([row for _, row in members])
        owners = np.array([index for index, _ in members])
        numbers = np.array([part[index].numbers for index, _ in members])
        call = partial(_histograms, engine.backend, low[numbers], shift[numbers], bins, wide, owners)
        for _, (touched, found) in engine.sweep(call, table, few=True):
            for index, histogram in zip(touched.tolist(), found, strict=True):
                counts[index] += histogram
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
    groups: defaultdict[Any, list[tuple[int, Any, tuple[Span, ...]]]] = defaultdict(list)
    read = {number: [k for k, wanted in enumerate(survey.read) if wanted] for number, survey in asked.items()}
    for number, survey in asked.items():
        for item in plan.scopes[number][1] if read[number] else ():
            spans = engine.spans[item.name]
            columns = (spans[-1], *(spans[k] for k in read[number]))
            table = Table([columns])
            rule = keep_for(survey.keep, item, read[number], table.compute)
            groups[kind_of(survey.keep), table.dtypes].append((number, rule, columns))
    sums: defaultdict[int, list[Statistics]] = defaultdict(list)
    for (kind, _), members in groups.items():
        table = Table([columns for *_, columns in members])
        keep = keep_of_rows(kind, [rule for _, rule, _ in members])
        for pieces, blocks in engine.sweep(partial(_kept, engine.backend, keep), table):
            owners = np.repeat(pieces[:, 0], _blocks(pieces))
            for row in np.unique(owners):
                sums[members[row][0]].append(blocks[owners == row])
    answers = {}
    for number, models in read.items():
        answers[number] = np.zeros((plan.models, 2))
        if models:
            answers[number][models] = add_exactly([np.zeros((0, len(models), 2)), *sums[number]])
    refuse(engine, {number: not np.isfinite(norms).all() for number, norms in answers.items()})
    return answers


def _kept(backend: Backend, keep: Keep, table: Table, pieces: Array) -> Statistics:
    return backend.kept_magnitude(table, keep, pieces)


# What they share


def _blocks(pieces: Array) -> Any:
    """Count the blocks of each piece."""
    return -(-(pieces[:, 2] - pieces[:, 1]) // BLOCK)
