"""Carries out surveys of formulas: sums, and exact selection of the k-th largest."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from mergekit_cl.formula_rows import bind, compute_of, formula_of
from mergekit_cl.kernels import Array, Backend, Formula, Slices, Table
from mergekit_cl.plan import Item
from mergekit_cl.select import Integers, Selection, shift_for
from mergekit_cl.shares import Counts, Member
from mergekit_cl.steps import FIRST, Cut, KthOf, Statistics, SumOf
from mergekit_cl.sweeps import Bound, Group, Sweeps, add_exactly, partial_sums, refuse

_BINS = (1 << 12, 1 << 16)  # for small and large scopes: the latter resolve float32 in two rounds
_LARGE = 1 << 20
_COUNTERS = 1 << 22  # in the histograms that there are at a time


def sums_of(engine: Sweeps, asked: Mapping[int, SumOf]) -> dict[int, Statistics]:
    """Add up the outputs of formulas, for each scope or for each row of its tensor."""
    groups = [
        Group(members, partial(_sum, engine.backend), bool(members[0].detail.slice_length))
        for members in _grouped(engine, asked).values()
    ]
    sums = partial_sums(engine, groups)
    outputs = {member.owner[0]: member.detail.outputs for group in groups for member in group.members}
    answers = {}
    for number, survey in asked.items():
        parts = [np.zeros((0, outputs[number]))]
        parts += [block for item in engine.plan.scopes[number][1] for block in sums[number, item.name]]
        answers[number] = np.concatenate(parts) if survey.along else add_exactly(parts)
    refuse(engine, {number: not np.isfinite(answer).all() for number, answer in answers.items()})
    return answers


def _sum(backend: Backend, members: Sequence[Member]) -> Bound:
    """Return the kernel call for some tensors, and how they are cut."""
    formula, slices = formula_of([member.detail for member in members])
    return lambda table, pieces: backend.sum_of(table, formula, slices, pieces), slices


def kths_of(engine: Sweeps, asked: Mapping[int, KthOf]) -> dict[int, list[Cut]]:
    """Find cuts through the entries of scopes in the order of a formula's magnitude."""
    answers: dict[int, list[Cut]] = {}
    wanted: dict[int, list[int]] = {}  # of each scope the cuts that have to be searched for
    for number, survey in asked.items():
        answers[number] = [FIRST] * len(survey.ranks)
        if found := [place for place, rank in enumerate(survey.ranks) if rank]:
            wanted[number] = found
    numbers = {}  # of each scope those of its selections
    ranks: list[int] = []
    for number, found in wanted.items():
        numbers[number] = np.arange(len(ranks), len(ranks) + len(found))
        ranks += [asked[number].ranks[place] for place in found]
    if ranks:
        groups = _grouped(engine, {number: asked[number] for number in wanted})
        wide = any(member.detail.compute == np.float64 for members in groups.values() for member in members)
        chosen = _select(engine, groups, numbers, np.array(ranks, np.int64), wide)
        magnitudes = chosen.low.view(np.float64) if wide else chosen.low.astype(np.int32).view(np.float32)
        for number, found in wanted.items():
            for place, selection in zip(found, numbers[number].tolist(), strict=True):
                answers[number][place] = Cut(float(magnitudes[selection]), float(chosen.shares[selection]))
    return answers


def _select(
    engine: Sweeps, groups: Mapping[Any, Sequence[Member]], numbers: Mapping[int, Array], ranks: Integers, wide: bool
) -> Selection:
    """Count, round by round, until all selections are made."""
    selection = Selection(ranks, 63 if wide else 31)
    scopes = engine.plan.scopes
    for first in count():
        left = {number for number, selections in numbers.items() if selection.open[selections].any()}
        if not left:
            return selection
        bins = {number: _BINS[scopes[number][0].elements >= _LARGE] for number in left}
        shift = np.zeros_like(selection.low)
        for number in left:
            which = numbers[number]
            shift[which] = shift_for(selection.low[which], selection.high[which], bins[number])
        counted: dict[int, Counts] = {number: {} for number in left}
        for members in groups.values():
            some = [member for member in members if member.owner[0] in left]
            whole = bool(some) and bool(some[0].detail.slice_length or some[0].detail.keys.size)
            for loaded, processes in engine.shares.in_memory(some, whole=whole):
                for member in loaded:
                    number = member.owner[0]
                    counted[number].setdefault(processes, np.zeros((len(numbers[number]), bins[number] + 2), np.int64))
                for part in _parts(loaded, numbers, bins):
                    counts = {number: counted[number][processes] for number, _ in (member.owner for member in part)}
                    _count(engine, part, numbers, selection.low, shift, bins[part[0].owner[0]], wide, counts)
        counts = dict(zip(counted, engine.shares.add_up(list(counted.values())), strict=True))
        if first == 0:
            refuse(engine, {number: counts[number][:, -1].any() for number in left})
        for number in left:
            selection.narrow(numbers[number], selection.low[numbers[number]], shift[numbers[number]], counts[number][:, :-1])
    raise AssertionError


def _parts(members: Sequence[Member], numbers: Mapping[int, Array], bins: Mapping[int, int]) -> list[list[Member]]:
    """Cut into parts with as many bins and windows each, and histograms that do not take too much memory together."""
    parts: defaultdict[tuple[int, int], list[list[Member]]] = defaultdict(list)
    for member in members:
        number = member.owner[0]
        windows = len(numbers[number])
        alike = parts[bins[number], windows]
        most = max(1, _COUNTERS // (windows * bins[number]))
        if not alike or len({each.owner[0] for each in alike[-1]} | {number}) > most:
            alike.append([])
        alike[-1].append(member)
    return [part for alike in parts.values() for part in alike]


def _count(
    engine: Sweeps, part: Sequence[Member], numbers: Mapping[int, Array], low: Integers, shift: Integers, bins: int, wide: bool,
    counts: Mapping[int, Integers],
) -> None:  # fmt: skip
    """Add the histograms of some tensors to the counts of their scopes."""
    table = Table([member.spans for member in part])
    formula, slices = formula_of([member.detail for member in part])
    owners = np.array([member.owner[0] for member in part])
    selections = np.array([numbers[member.owner[0]] for member in part])
    call = partial(_histograms, engine.backend, formula, slices, low[selections], shift[selections], bins, wide, owners)
    for _, (touched, found) in engine.sweep(call, table, slices, few=True):
        for number, histogram in zip(touched.tolist(), found, strict=True):
            counts[number][...] += histogram


def _histograms(
    backend: Backend, formula: Formula, slices: Slices | None, low: Array, shift: Array, bins: int, wide: bool, owners: Array,
    table: Table, pieces: Array,
) -> tuple[Array, Integers]:  # fmt: skip
    """Make a histogram for each of the scopes of these pieces."""
    touched, groups = np.unique(owners[pieces[:, 0]], return_inverse=True)
    return touched, backend.histogram_of(table, formula, slices, low, shift, bins, wide, groups, pieces)


def _grouped(engine: Sweeps, asked: Mapping[int, SumOf | KthOf]) -> dict[Any, list[Member]]:
    """Bind the formulas of all tensors of the scopes (the owners are number and tensor); group what one kernel call takes."""
    groups: defaultdict[Any, list[Member]] = defaultdict(list)
    for number, survey in asked.items():
        items: Sequence[Item] = engine.plan.scopes[number][1]
        compute = compute_of([engine.spans[item.name] for item in items])
        if isinstance(survey, SumOf) and survey.wide:
            compute = np.dtype(np.float64)
        for item in items:
            row = bind(engine.plan, item, survey, compute)
            spans = tuple(engine.spans[item.name][source] for source in row.sources)
            groups[row.kind, Table([spans]).dtypes].append(Member((number, item.name), item, row.sources, spans, row))
    return dict(groups)


def fits_scope(survey: SumOf | KthOf, tensors: int, elements: int) -> bool:
    """Tell whether a survey fits a scope of so many tensors and elements."""
    if isinstance(survey, SumOf):
        return True
    return all(0 <= rank <= elements for rank in survey.ranks) and (not len(survey.rows) or tensors == 1)
