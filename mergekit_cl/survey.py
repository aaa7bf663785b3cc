"""Carries out surveys: one sweep over the tensors of many scopes, and the sums of what comes back."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from math import fsum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mergekit_cl.batches import keep_for, slices_of
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import BLOCK, Array, Backend, Keep, Slices, Span, Table
from mergekit_cl.plan import Item, Plan
from mergekit_cl.select import Integers, Selection, guess_ranks, shift_for
from mergekit_cl.steps import FIRST, LAST, AtRandom, Cut, Gram, KeptMagnitude, KthMagnitude, Statistics, Survey

Asked: TypeAlias = Mapping[int, Any]
"""Surveys by the number of the scope that asks."""

SAMPLED = 1 << 15
"""Elements of a scope from which on a sample tells where to look for a cut."""

_RUN = 32  # neighbours that are sampled together: they lie in one or two lines of the cache
_SAMPLE = (1 << 12, 1 << 18)
_BINS = (1 << 9, 1 << 19)
_COUNTERS = 1 << 23  # in a batch of histograms: 64 MiB


class Sweeps(Protocol):
    """What a survey needs of the executor."""

    plan: Plan
    backend: Backend
    spans: dict[str, tuple[Span, ...]]

    def sweep(
        self,
        call: Callable[[Array], Any],
        table: Table,
        slices: Slices | None = None,
        *,
        few: bool = False,
        backwards: bool = False,
    ) -> Iterable[tuple[Array, Any]]:
        """Call a kernel for all pieces of a table, in threads; yield each share of pieces with its result."""

    def refuse_nonfinite(self, spoiled: Iterable[tuple[Item, tuple[Span, ...]]]) -> None:
        """Raise an error that explains what is not finite in these inputs, if there are any, and if it is not allowed."""


def carry_out(engine: Sweeps, asked: Mapping[int, Survey]) -> dict[int, Any]:
    """Carry out the surveys of many scopes; return the answers by the scopes' numbers.

    Raises:
        NonFiniteError: What was read, or a result, is not finite, and that is not allowed.
        MergeError: A survey that does not fit the plan, or is none.

    """
    kinds: defaultdict[Any, dict[int, Any]] = defaultdict(dict)
    for number, survey in asked.items():
        kinds[type(survey)][number] = survey
    known: dict[Any, Callable[[Sweeps, Asked], dict[int, Any]]] = {
        Gram: _grams, KthMagnitude: _cuts, KeptMagnitude: _kept_magnitudes
    }  # fmt: skip
    answers: dict[int, Any] = {}
    for kind, part in kinds.items():
        if kind not in known:
            raise MergeError(f"{engine.plan.method.name}: yielded {kind.__name__}, which is not a survey")
        answers |= known[kind](engine, part)
    return answers


# Dot products


def _grams(engine: Sweeps, asked: Asked) -> dict[int, Statistics]:
    groups: defaultdict[Any, list[tuple[int, Item, tuple[Span, ...]]]] = defaultdict(list)
    for number, survey in asked.items():
        if survey.task_vectors:
            _need_base(engine.plan)
        if survey.along and len(engine.plan.scopes[number][1]) > 1:
            raise MergeError(f'{engine.plan.method.name}: slices of a tensor need scope="tensor"')
        for item in engine.plan.scopes[number][1]:
            spans = engine.spans[item.name]
            columns = (spans[-1], *spans[:-1]) if engine.plan.has_base else spans
            groups[survey, Table([columns]).dtypes].append((number, item, columns))
    sums: defaultdict[int, list[Statistics]] = defaultdict(list)
    for (survey, _), members in groups.items():
        table = Table([columns for *_, columns in members])
        about = survey.task_vectors
        slices = None
        call: Callable[[Array], Any] = partial(engine.backend.gram, table, about)
        if survey.along:
            lengths = [slices_of(item, survey.along)[1] for _, item, _ in members]
            slices = Slices(np.array(lengths, np.int64), survey.along == "columns")
            call = partial(engine.backend.gram_of_slices, table, about, slices)
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
    _refuse(engine, {number: not np.isfinite(gram).all() for number, gram in answers.items()})
    return answers


def add_exactly(blocks: Sequence[Statistics]) -> Statistics:
    """Add up partial sums, [blocks, ...] each, without rounding in between, so that their order does not show."""
    stacked = np.concatenate(blocks)
    flat = stacked.reshape(len(stacked), stacked[0].size if len(stacked) else int(np.prod(stacked.shape[1:])))
    sums = np.array([fsum(column) if np.isfinite(column).all() else np.nan for column in flat.T])
    return sums.reshape(stacked.shape[1:])


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
                base, *models = (span[:length].reshape(-1, step)[:, :_RUN].reshape(-1) for span in row)
                rows.append((base, *models, *models))
        return _Search((), rows, numbers)


def _cuts(engine: Sweeps, asked: Asked) -> dict[int, list[list[Cut]]]:
    """Find cuts through task vectors."""
    plan = engine.plan
    _need_base(plan)
    answers: dict[int, list[list[Cut]]] = {}
    wanted: list[tuple[list[Cut], int, int]] = []  # where the answer goes, and the rank
    searches = []
    for number, survey in asked.items():
        scope, items = plan.scopes[number]
        columns = []
        answers[number] = []
        for ranks in survey.ranks:
            if len(ranks) != plan.models or not all(rank is None or 0 <= rank <= scope.elements for rank in ranks):
                raise MergeError(f"{plan.method.name}: ranks {ranks} for {plan.models} models and {scope.elements} elements")
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
    samples, sample_ranks, limits = [], [np.zeros(0, np.int64)], []
    for search in large:
        selections = len(search.numbers)
        sample = search.sample(sum(map(len, sample_ranks)) + np.arange(2 * selections))
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
        for search, width in zip(searches, _widths(searches, high - low), strict=True):
            most = min(_BINS[1], max(_BINS[0], 1 << (search.elements // 64).bit_length()))
            search.bins = min(1 << width.bit_length(), most)
        groups: defaultdict[Any, list[tuple[_Search, tuple[Span, ...]]]] = defaultdict(list)
        for search in searches:
            for row, dtypes in zip(search.rows, search.dtypes, strict=True):
                groups[search.bins, dtypes].append((search, row))
        counts: dict[_Search, Integers] = {}
        for (bins, _), members in groups.items():
            for part in _batches(members, bins):
                _count(engine, part, low, high, bins, wide, counts)
        for bins in {search.bins for search in searches}:
            alike = [search for search in searches if search.bins == bins]
            found = np.concatenate([counts[search] for search in alike])
            numbers = np.concatenate([search.numbers for search in alike])
            selection.narrow(numbers, low[numbers], shift_for(low[numbers], high[numbers], bins), found[:, :-1])
        for search in searches:
            if counts[search][:, -1].any():
                engine.refuse_nonfinite(zip(search.items, search.rows, strict=bool(search.items)))
        unfinished = _widths(searches, selection.open)
        searches = [search for search, is_open in zip(searches, unfinished, strict=True) if is_open]
        low, high = selection.low, selection.high
    return selection


def _widths(searches: Sequence[_Search], values: Array) -> list[int]:
    """Return the largest of the values of each search."""
    starts = np.cumsum([0, *(len(search.numbers) for search in searches)])[:-1]
    largest: list[int] = np.maximum.reduceat(values[np.concatenate([search.numbers for search in searches])], starts).tolist()
    return largest


def _batches(members: Sequence[tuple[_Search, Any]], bins: int) -> Iterable[list[tuple[_Search, Any]]]:
    """Cut a list of tensors where the histograms of so many scopes would take too much memory."""
    part: list[tuple[_Search, Any]] = []
    counters = 0
    for search, row in members:
        if not part or search is not part[-1][0]:
            size = bins * len(search.numbers)
            if part and counters + size > _COUNTERS:
                yield part
                part, counters = [], 0
            counters += size
        part.append((search, row))
    yield part


def _count(
    engine: Sweeps, part: Sequence[tuple[_Search, tuple[Span, ...]]], low: Integers, high: Integers, bins: int, wide: bool,
    counts: dict[_Search, Integers],
) -> None:  # fmt: skip
    """Add up the histograms of some tensors, of all that belong to one scope."""
    table = Table([row for _, row in part])
    searches = list(dict.fromkeys(search for search, _ in part))
    owner_of = {search: index for index, search in enumerate(searches)}
    owners = np.array([owner_of[search] for search, _ in part])
    numbers = np.array([search.numbers for search, _ in part])
    lows, shift = low[numbers], shift_for(low[numbers], high[numbers], bins)

    def call(pieces: Array) -> tuple[Array, Integers]:
        touched, groups = np.unique(owners[pieces[:, 0]], return_inverse=True)
        return touched, engine.backend.magnitude_histogram(table, lows, shift, bins, wide, groups, pieces)

    for _, (touched, found) in engine.sweep(call, table, few=True):
        for owner, histogram in zip(touched.tolist(), found, strict=True):
            search = searches[owner]
            counts[search] = counts[search] + histogram if search in counts else histogram


# Norms of what is kept


def _kept_magnitudes(engine: Sweeps, asked: Asked) -> dict[int, Statistics]:
    plan = engine.plan
    _need_base(plan)
    groups: defaultdict[Any, list[tuple[int, Any, tuple[Span, ...]]]] = defaultdict(list)
    read = {number: [k for k in range(plan.models) if survey.read[k]] for number, survey in asked.items()}
    for number, survey in asked.items():
        kind = "random" if isinstance(survey.keep, AtRandom) else "magnitude"
        for item in plan.scopes[number][1]:
            spans = engine.spans[item.name]
            columns = (spans[-1], *(spans[k] for k in read[number]))
            table = Table([columns])
            rule = keep_for(survey.keep, item, read[number], table.compute)
            groups[kind, table.dtypes].append((number, rule, columns))
    sums: defaultdict[int, list[Statistics]] = defaultdict(list)
    for (kind, _), members in groups.items():
        table = Table([columns for *_, columns in members])
        keys, thresholds, cuts = (np.array([rule[i] for _, rule, _ in members]) for i in range(3))
        keep = Keep(kind, keys, thresholds, cuts)
        for pieces, blocks in engine.sweep(partial(engine.backend.kept_magnitude, table, keep), table):
            owners = np.repeat(pieces[:, 0], _blocks(pieces))
            for row in np.unique(owners):
                sums[members[row][0]].append(blocks[owners == row])
    answers = {}
    for number, models in read.items():
        answers[number] = np.zeros((plan.models, 2))
        if models:
            answers[number][models] = add_exactly([np.zeros((0, len(models), 2)), *sums[number]])
    _refuse(engine, {number: not np.isfinite(norms).all() for number, norms in answers.items()})
    return answers


# What they share


def _need_base(plan: Plan) -> None:
    if not plan.has_base:
        raise MergeError(f'{plan.method.name}: task vectors need a base; declare base="required" in @method')


def _blocks(pieces: Array) -> Any:
    """Count the blocks of each piece."""
    return -(-(pieces[:, 2] - pieces[:, 1]) // BLOCK)


def _refuse(engine: Sweeps, spoiled: Mapping[int, Any]) -> None:
    items = [item for number, bad in spoiled.items() if bad for item in engine.plan.scopes[number][1]]
    engine.refuse_nonfinite((item, engine.spans[item.name]) for item in items)
