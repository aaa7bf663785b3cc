"""Exact selection among the magnitudes of task vectors, all of it on the device: nothing comes back to the host in between.

1. A *sample* of each selection is gathered, and two of its ranks are found exactly: between their patterns, the *bracket*, lies
   what is looked for, almost surely (see `mergekit_cl.select.guess_ranks`).
2. One *sweep* over all inputs counts the patterns above the bracket and at its two ends, and collects those strictly between
   them. So a magnitude that many entries share, as in fine-tunes in bfloat16, is an end of the bracket and takes no memory.
3. The pattern is found among the few that were collected, in three rounds of 11 bits: histograms, and scans of them.

Patterns that are looked for in a *list* of patterns are a *search*, a record of `FIELDS` integers. A selection collects into
several lists, so that programs that run together seldom add to one counter. Neither the order of a list nor what is in which
of them shows in the result.

Small scopes are not sampled: all of their patterns are collected. In lists there are then 4 bytes for each entry of a task
vector, up to 1 byte for one of a scope with 2**15 elements or more, and 0.1 for one of the largest scopes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton has no starred expression
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from mergekit_cl.kernels import MISSED, SPOILED, Keep, Selected, Table, interpreted
from mergekit_cl.kernels.triton import launch
from mergekit_cl.kernels.triton.blocks import _difference, _infinity, _load, _locate, _magnitude, _parted, _widen
from mergekit_cl.kernels.triton.compiled import _dealt
from mergekit_cl.kernels.triton.tuning import shape_of
from mergekit_cl.select import RUN, SAMPLED, Integers, guess_ranks, sample_step

ROUNDS = 3
"""Rounds of 11 bits that find one of 2**31 patterns."""

MOST = 4
"""Models that one launch of the sweep takes: a thread has counters for each."""

LISTS = 256
"""Lists that a selection collects into, at most."""

ROOM = 2.0
"""How many times the expected number of patterns a list has room for."""

_BITS = 11
_COPIES = 8  # of a histogram: a GPU adds to one address one after another
_GATHERED = 1024  # entries of a sample that a program gathers
_COUNTED = 1 << 14  # entries of a sample that a program counts
_SWEPT = 1 << 14  # elements that a program sweeps over
_NONE = 2**31 - 4  # above all patterns; less two, what is below all of them, it is an int32

TALLIES = tl.constexpr(8)
"""Integers for each list: what has been counted; a sector of the memory, because these are what many programs add to."""

FIELDS = tl.constexpr(8)
LOW = tl.constexpr(0)
"""The search: the interval that holds the pattern, both ends included,"""
HIGH = tl.constexpr(1)
SHIFT = tl.constexpr(2)
"""the binary logarithm of the width of a bin,"""
RANK = tl.constexpr(3)
"""the rank of the pattern in the interval,"""
EQUAL = tl.constexpr(4)
"""how many equal the pattern, once it is found; 0 before that, -1 if the search cannot succeed."""


@triton.jit
def _pattern(x, base):
    """Return the patterns (see `Keep`) of a task vector, int32."""
    d = _difference(x, base)
    return tl.minimum(_magnitude(d), _infinity(d))


@triton.jit
def _gather(address, elements, within, DTYPE: tl.constexpr):
    """Read some elements of a span, as float32."""
    x_ptr = address.to(tl.pointer_type(DTYPE)) + elements
    return _widen(tl.load(x_ptr, mask=within, other=0), DTYPE)


@triton.jit
def _sample_kernel(
    pieces_ptr, piece_of_ptr, values_ptr, runs_ptr, places_ptr, DTYPES: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Gather runs of neighbours; ``runs``: the first one, and the distance, of each row; ``places`` [rows, models] for them."""
    spans_ptr, row, start, stop, _ = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    index = start + tl.arange(0, BLOCK)
    within = index < stop
    elements = tl.load(runs_ptr + 2 * row) + index // RUN * tl.load(runs_ptr + 2 * row + 1) + index % RUN
    base = _gather(tl.load(spans_ptr), elements, within, DTYPES[0])
    for k in tl.static_range(len(DTYPES) - 1):
        x = _gather(tl.load(spans_ptr + 1 + k), elements, within, DTYPES[1 + k])
        place = tl.load(places_ptr + row * (len(DTYPES) - 1) + k)
        tl.store(values_ptr + place + index, _pattern(x, base), mask=within)


@triton.jit
def _list(place_ptr):
    """Return the list of a selection that this program adds to."""
    return tl.load(place_ptr + 1) + tl.program_id(0) % tl.load(place_ptr + 2)


@triton.jit
def _reserve(number, lists_ptr, tallies_ptr, COUNT: tl.constexpr):
    """Return the first of so many places of a list that are this program's. They are not its own where the list overflows."""
    first = tl.atomic_add(tallies_ptr + TALLIES * number, COUNT, sem="relaxed")
    first = tl.where(first + COUNT <= tl.load(lists_ptr + 3 * number + 1), first, 0)  # it will not be looked at
    return tl.load(lists_ptr + 3 * number) + first


@triton.jit
def _negative(x, FOLD: tl.constexpr):
    """Count the negative ones of every ``FOLD`` neighbours. By their signs: predicates would have to be packed and unpacked."""
    return -tl.sum(tl.reshape(x >> 31, [x.shape[0] // FOLD, FOLD]), axis=1)


@triton.jit
def _patterns(columns, COUNT: tl.constexpr, FOLD: tl.constexpr):
    """Return the patterns of all task vectors, and 1 if there is one that is not finite, else 0."""
    quick = ()
    largest = tl.zeros([columns[0].shape[0] // FOLD], tl.int32)
    for k in tl.static_range(COUNT):
        pattern = _magnitude(columns[1 + k] - columns[0])
        largest = tl.maximum(largest, tl.max(tl.reshape(pattern, [pattern.shape[0] // FOLD, FOLD]), axis=1))
        quick = quick + (pattern,)
    infinite = (tl.max(largest, axis=0) >= _infinity(columns[0])).to(tl.int32)
    if infinite > 0:  # seldom; of all finite ones these are the patterns
        exact = ()
        infinite = tl.full([], 0, tl.int32)
        for k in tl.static_range(COUNT):
            pattern = _pattern(columns[1 + k], columns[0])
            infinite = tl.maximum(infinite, (tl.max(pattern, axis=0) >= _infinity(columns[0])).to(tl.int32))
            exact = exact + (pattern,)
        quick = exact
    return quick, infinite


@triton.jit
def _sweep_tile(
    counts, cursors, infinite, ends, spans_ptr, places_ptr, lists_ptr, values_ptr, tallies_ptr, start, stop,
    DTYPES: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Count, and collect, the patterns of a tile.

    Returns what each thread has counted; the next place of this program in each list, and the number of those that are left;
    and 1 if there has been a pattern that is not finite, else 0.
    """
    COUNT: tl.constexpr = len(DTYPES) - 1
    columns = ()
    for k in tl.static_range(COUNT + 1):  # all of them first: a store keeps later reads waiting
        columns = columns + (_load(tl.load(spans_ptr + k), start, stop, DTYPES[k], TILE, FULL),)
    patterns, infinite_here = _patterns(columns, COUNT, FOLD)
    added = ()
    moved = ()
    for k in tl.static_range(COUNT):
        high, low, place, left = ends[2 * k], ends[2 * k + 1], cursors[2 * k], cursors[2 * k + 1]
        pattern = patterns[k]
        if not FULL:
            pattern = tl.where(tl.arange(0, TILE) < stop - start, pattern, -2)  # below all
        to_high, to_low = _negative(high - 1 - pattern, FOLD), _negative(low - pattern, FOLD)
        added = added + (
            counts[4 * k] + _negative(high - pattern, FOLD),
            counts[4 * k + 1] + to_high,
            counts[4 * k + 2] + to_low,
            counts[4 * k + 3] + _negative(low - 1 - pattern, FOLD),
        )
        inside = to_low - to_high
        found = tl.sum(inside, axis=0)
        if found > 0:
            if found > left:
                place = _reserve(_list(places_ptr + 3 * k), lists_ptr, tallies_ptr, TILE)
                left = tl.full([], TILE, tl.int32)
            list_ptr = values_ptr + place
            ahead = tl.cumsum(inside, axis=0) - inside
            dealt = _dealt(pattern, FOLD)  # so that each thread stores what it has
            for n in tl.static_range(FOLD):
                collect = (dealt[n] > low) & (dealt[n] < high)
                tl.store(list_ptr + ahead, dealt[n], mask=collect)
                ahead += collect.to(tl.int32)
            place += found
            left -= found
        moved = moved + (place, left)
    return added, moved, tl.maximum(infinite, infinite_here)


@triton.jit
def _sweep_kernel(
    pieces_ptr, piece_of_ptr, values_ptr, tallies_ptr, nonfinite_ptr, brackets_ptr, lists_ptr, places_ptr,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Count the patterns above and at the ends of each bracket, and collect what lies between.

    Searches 2s and 2s + 1 of ``brackets`` have found the upper and the lower end for selection s. ``places`` [rows, models, 3]:
    the selection, its first list, and how many it has; ``lists`` [lists, 3]: where each begins, its room, what it is for;
    ``tallies`` [lists, 8]: how much of it is taken; how many patterns are above the upper end, not below it, above the lower
    end, and not below it.
    """
    spans_ptr, row, start, stop, aligned = _locate(pieces_ptr, piece_of_ptr, len(DTYPES), BLOCK)
    middle, end = _parted(start, stop, aligned, BLOCK, TILE)
    COUNT: tl.constexpr = len(DTYPES) - 1
    row_ptr = places_ptr + row * (3 * COUNT)
    none = tl.zeros([TILE // FOLD], tl.int32)
    ends = ()
    counts = ()
    cursors = ()
    for k in tl.static_range(COUNT):
        search_ptr = brackets_ptr + 2 * tl.load(row_ptr + 3 * k) * FIELDS
        ends = ends + (tl.load(search_ptr + LOW).to(tl.int32), tl.load(search_ptr + FIELDS + LOW).to(tl.int32))
        counts = counts + (none, none, none, none)
        cursors = cursors + (tl.full([], 0, tl.int64), tl.full([], 0, tl.int32))
    infinite = tl.full([], 0, tl.int32)
    for tile in range(start, middle, TILE):
        counts, cursors, infinite = _sweep_tile(
            counts, cursors, infinite, ends, spans_ptr, row_ptr, lists_ptr, values_ptr, tallies_ptr, tile, end,
            DTYPES, TILE, FOLD, True,
        )  # fmt: skip
    for tile in range(middle, end, TILE):
        counts, cursors, infinite = _sweep_tile(
            counts, cursors, infinite, ends, spans_ptr, row_ptr, lists_ptr, values_ptr, tallies_ptr, tile, end,
            DTYPES, TILE, FOLD, False,
        )  # fmt: skip
    for k in tl.static_range(COUNT):
        tally_ptr = tallies_ptr + TALLIES * _list(row_ptr + 3 * k)
        for n in tl.static_range(4):
            count = tl.sum(counts[4 * k + n], axis=0)
            if count > 0:
                tl.atomic_add(tally_ptr + 1 + n, count.to(tl.int64), sem="relaxed")
        if infinite > 0:
            tl.store(nonfinite_ptr + tl.load(row_ptr + 3 * k), 1)


@triton.jit
def _shift(width, BITS: tl.constexpr):
    """Return the least shift that leaves ``width`` no more than so many bits."""
    return tl.sum(((width >> (BITS + tl.arange(0, 32))) > 0).to(tl.int32), axis=0)


@triton.jit
def _start_kernel(
    searches_ptr, brackets_ptr, selections_ptr, lists_ptr, tallies_ptr, LISTS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Begin a search of each selection, from what the sweep has counted.

    ``selections`` [selections, 3]: rank, first list, lists. A search may be over: where the pattern is an end of the bracket,
    and where it is not inside, or a list has overflowed.
    """
    number = tl.program_id(0).to(tl.int64)
    rank = tl.load(selections_ptr + 3 * number)
    lists = tl.load(selections_ptr + 3 * number + 1) + tl.arange(0, LISTS)
    there = tl.arange(0, LISTS) < tl.load(selections_ptr + 3 * number + 2)
    tally_ptr = tallies_ptr + TALLIES * lists
    taken, room = tl.load(tally_ptr, mask=there, other=0), tl.load(lists_ptr + 3 * lists + 1, mask=there, other=0)
    overflows = tl.sum((taken > room).to(tl.int32), axis=0)
    above = tl.sum(tl.load(tally_ptr + 1, mask=there, other=0), axis=0)
    to_high = tl.sum(tl.load(tally_ptr + 2, mask=there, other=0), axis=0)
    to_low = tl.sum(tl.load(tally_ptr + 3, mask=there, other=0), axis=0)
    all_of = tl.sum(tl.load(tally_ptr + 4, mask=there, other=0), axis=0)
    high = tl.load(brackets_ptr + 2 * number * FIELDS + LOW)
    low = tl.load(brackets_ptr + (2 * number + 1) * FIELDS + LOW)
    at_high = (rank > above) & (rank <= to_high)
    collected = (rank > to_high) & (rank <= to_low) & (overflows == 0)
    at_low = (rank > to_low) & (rank <= all_of) & (low < high)
    before = tl.where(at_high, above, tl.where(collected, to_high, to_low))
    first, last = tl.where(at_high, high, tl.where(collected, low + 1, low)), tl.where(at_high, high, low)
    last = tl.where(collected, high - 1, last)
    search_ptr = searches_ptr + number * FIELDS
    tl.store(search_ptr + LOW, first)
    tl.store(search_ptr + HIGH, last)
    tl.store(search_ptr + SHIFT, _shift(last - first, BITS).to(tl.int64))
    tl.store(search_ptr + RANK, rank - before)
    equal = tl.where(at_high, to_high - above, tl.where(at_low, all_of - to_low, -1))
    tl.store(search_ptr + EQUAL, tl.where(collected, 0, equal))


@triton.jit
def _count_kernel(
    searches_ptr, bins_ptr, values_ptr, lists_ptr, tallies_ptr,
    COLLECTED: tl.constexpr, COPIES: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Add a list to the histogram of its search. Lists are full, or ``COLLECTED``: as long as ``tallies`` says."""
    number = tl.program_id(0).to(tl.int64)
    list_ptr = lists_ptr + 3 * number
    search = tl.load(list_ptr + 2)
    search_ptr = searches_ptr + search * FIELDS
    if tl.load(search_ptr + EQUAL) == 0:
        length = tl.load(list_ptr + 1)
        if COLLECTED:
            length = tl.minimum(length, tl.load(tallies_ptr + TALLIES * number))
        first_ptr = values_ptr + tl.load(list_ptr)
        low, high = tl.load(search_ptr + LOW).to(tl.int32), tl.load(search_ptr + HIGH).to(tl.int32)
        shift = tl.load(search_ptr + SHIFT).to(tl.int32)
        histogram_ptr = bins_ptr + (search * COPIES + number % COPIES) * (1 << BITS)
        for offset in range(0, length, TILE):
            places = offset + tl.arange(0, TILE)
            pattern = tl.load(first_ptr + places, mask=places < length, other=-1)
            counts = (pattern >= low) & (pattern <= high)
            tl.atomic_add(histogram_ptr + ((pattern - low) >> shift), 1, mask=counts, sem="relaxed")


@triton.jit
def _narrow_kernel(searches_ptr, bins_ptr, COPIES: tl.constexpr, BITS: tl.constexpr):
    """Find the bin of each search, which is its interval from now on; leave the histograms empty."""
    number = tl.program_id(0).to(tl.int64)
    search_ptr = searches_ptr + number * FIELDS
    if tl.load(search_ptr + EQUAL) == 0:
        # Read first, write last: in between all threads meet
        rank, shift = tl.load(search_ptr + RANK), tl.load(search_ptr + SHIFT)
        low, high = tl.load(search_ptr + LOW), tl.load(search_ptr + HIGH)
        bins = tl.arange(0, 1 << BITS)
        histogram_ptr = bins_ptr + number * (COPIES << BITS) + bins
        counts = tl.zeros([1 << BITS], tl.int32)
        for copy in range(COPIES):
            counts += tl.load(histogram_ptr + (copy << BITS))
        at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts  # in a bin or above it
        found = tl.sum((at_least >= rank).to(tl.int32), axis=0) - 1
        above = tl.sum(tl.where(bins > found, counts, 0), axis=0)
        equal = tl.sum(tl.where(bins == found, counts, 0), axis=0)
        low += found.to(tl.int64) << shift
        high = tl.minimum(high, low + (1 << shift) - 1)
        narrower = _shift(high - low, BITS)
        for copy in range(COPIES):
            tl.store(histogram_ptr + (copy << BITS), 0)
        tl.store(search_ptr + LOW, low)
        tl.store(search_ptr + HIGH, high)
        tl.store(search_ptr + SHIFT, narrower.to(tl.int64))
        tl.store(search_ptr + RANK, rank - above)
        tl.store(search_ptr + EQUAL, tl.where(low == high, equal, 0).to(tl.int64))


def select(tables: Sequence[Table], numbers: Sequence[npt.NDArray[np.intp]], ranks: Integers) -> Selected:
    """See `mergekit_cl.kernels.SelectingBackend.select_magnitudes`."""
    parts = [part for table, owners in zip(tables, numbers, strict=True) for part in _parts(table, owners)]
    sample = _Sample(parts, ranks)
    segments, room = _room(parts, sample, len(ranks))
    first, owners = np.cumsum(segments) - segments, np.repeat(np.arange(len(ranks)), segments)
    rooms = room[owners]
    table = parts[0].table
    brackets, lists, selections, sample_lists = launch.on_device(
        table, sample.searches, np.stack([np.cumsum(rooms) - rooms, rooms, owners], axis=1),
        np.stack([ranks, first, segments], axis=1), sample.lists,
    )  # fmt: skip
    places = [
        launch.on_device(table, np.stack([part.numbers, first[part.numbers], segments[part.numbers]], axis=2)) for part in parts
    ]
    gathered = [launch.on_device(table, *each) for each in zip(sample.runs, sample.places, strict=True)]
    device, selected = brackets.device, len(ranks)
    brackets = brackets.clone()
    if sample.lists.size:
        values = torch.empty(int(sample.sizes.sum()), dtype=torch.int32, device=device)
        for part, pieces, told in zip(parts, sample.pieces, gathered, strict=True):
            launch.run(_sample_kernel, _GATHERED, part.table, pieces, values, *told, RUN=RUN)
        _search(brackets, values, sample_lists, None)
    values = torch.full((int(rooms.sum()),), -1, dtype=torch.int32, device=device)  # in places that stay free
    tallies = torch.zeros((len(owners), TALLIES.value), dtype=torch.int64, device=device)
    nonfinite = torch.zeros(selected, dtype=torch.int64, device=device)
    for part, (told,) in zip(parts, places, strict=True):
        launch.prepare(
            _sweep_kernel, _SWEPT, part.table, part.table.whole, anywhere=True, warps=1, TILE=part.tile, FOLD=part.fold
        )(values, tallies, nonfinite, brackets, lists, told)  # fmt: skip
    searches = torch.empty((selected, FIELDS.value), dtype=torch.int64, device=device)
    _launch(
        _start_kernel, selected, searches, brackets, selections, lists, tallies,
        LISTS=triton.next_power_of_2(LISTS),
    )  # fmt: skip
    _search(searches, values, lists, tallies)
    return Selected(_placed(searches, nonfinite))


def take(keep: Keep, packed: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put cuts that were selected into a rule, on the device.

    Args:
        keep: The rule.
        packed: What the kernels are told of it, int64 [rows, models, 5]: key, thresholds and cuts.
        places: `Keep.places`.

    Returns:
        The same with these cuts; and what is known of each row by them, int32 [rows]: `SPOILED`, `MISSED`, both or neither.

    """
    assert keep.selected is not None
    found, there = keep.selected.found[places.clamp(min=0)], places >= 0
    cuts, thresholds = (torch.where(there, found[..., n], packed[..., m : m + 2]) for n, m in ((0, 3), (1, 1)))
    flags = torch.where(there, found[..., 2], 0).flatten(1)
    both = sum((flags & flag).amax(dim=1) for flag in (SPOILED, MISSED))
    return torch.cat([packed[..., :1], thresholds, cuts], dim=2), both.to(torch.int32)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some columns of a table that one launch takes, and the selections [rows, models] that they belong to."""

    table: Table
    numbers: npt.NDArray[np.intp]

    @property
    def fold(self) -> int:
        """Neighbours that a thread reads together: those of the narrowest column in 16 bytes."""
        return launch.WIDE // min(int(launch.DTYPES[dtype].primitive_bitwidth) // 8 for dtype in self.table.dtypes)

    @property
    def tile(self) -> int:
        """Elements that a program, of one warp, holds at a time: of each column what its threads read together."""
        return self.fold * _lanes()

    @property
    def taken(self) -> Integers:
        """Places of lists that each row takes at most, for each model: those of all its tiles, some of which are short."""
        return (self.table.lengths // self.tile + 3) * self.tile


def _lanes() -> int:
    """Return the threads of a warp; in the interpreter, to which it is all the same, many."""
    return 1024 if interpreted() else int(triton.runtime.driver.active.get_current_target().warp_size)


def _parts(table: Table, numbers: npt.NDArray[np.intp]) -> Iterator[_Part]:
    """Cut a table with many columns into several."""
    count = numbers.shape[1]
    for models in np.array_split(np.arange(count), -(-count // MOST)):
        spans = [(row[0], *(row[1 + k] for k in models)) for row in table.spans]
        yield _Part(table if len(models) == count else Table(spans), numbers[:, models])


class _Sample:
    """Where the sample of each selection lies, and which of its ranks bracket the wanted ones.

    Runs of neighbours at equal distances are counted over all rows of a scope, so that small tensors are seen too.
    """

    def __init__(self, parts: Sequence[_Part], ranks: Integers) -> None:
        lengths = np.concatenate([part.table.lengths for part in parts])
        scopes = np.concatenate([part.numbers[:, 0] for part in parts])
        edges = np.cumsum([len(part.numbers) for part in parts])[:-1]
        self.elements = _sums(parts, lengths, len(ranks))
        distances = np.where(self.elements >= SAMPLED, sample_step(self.elements), 0)[scopes]
        firsts = np.where(distances > 0, -_preceding(lengths, scopes) % np.maximum(distances, 1), lengths)
        runs = np.where(firsts < lengths, (lengths - firsts - 1) // np.maximum(distances, 1) + 1, 0)
        last = np.minimum(RUN, lengths - firsts - (runs - 1) * distances)
        sampled = np.where(runs > 0, (runs - 1) * RUN + last, 0)
        self.sizes = _sums(parts, sampled, len(ranks))
        """Entries in the sample of each selection, int64 [selections]."""
        starts = np.cumsum(self.sizes) - self.sizes
        ahead = np.split(_preceding(sampled, scopes), edges)
        self.runs = np.split(np.stack([firsts, distances], axis=1), edges)
        self.places = [starts[part.numbers] + each[:, None] for part, each in zip(parts, ahead, strict=True)]
        self.pieces = [
            np.stack([np.arange(len(each)), np.zeros_like(each), each], axis=1)[each > 0] for each in np.split(sampled, edges)
        ]
        self.upper, self.lower = guess_ranks(ranks, self.elements, self.sizes)
        self.searches = self._searches()
        self.lists = self._lists(starts)

    def _searches(self) -> Integers:
        """Make searches for both ends of each bracket; one that has no end is as if found, below or above all patterns."""
        searches = np.zeros((len(self.sizes), 2, FIELDS.value), np.int64)
        for side, (rank, beyond) in enumerate(((self.upper, _NONE), (self.lower, -1))):
            inside = (rank >= 1) & (rank <= self.sizes)
            searches[:, side, LOW.value] = np.where(inside, 0, beyond)
            searches[:, side, HIGH.value] = np.where(inside, _NONE, beyond)
            searches[:, side, SHIFT.value] = np.where(inside, 31 - _BITS, 0)
            searches[:, side, RANK.value] = rank
            searches[:, side, EQUAL.value] = ~inside
        return searches.reshape(-1, FIELDS.value)

    def _lists(self, starts: Integers) -> Integers:
        """Cut samples into lists for both searches: where each begins, its length, the search."""
        counts = -(-self.sizes // _COUNTED)
        owners = np.repeat(np.arange(len(counts)), counts)
        ahead = (np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]) * _COUNTED
        lists = np.stack([starts[owners] + ahead, np.minimum(_COUNTED, self.sizes[owners] - ahead), 2 * owners], axis=1)
        return np.concatenate([lists, lists + np.array([0, 0, 1])])


def _room(parts: Sequence[_Part], sample: _Sample, selections: int) -> tuple[Integers, Integers]:
    """Return into how many lists each selection collects, and the room in each, int64 [selections]."""
    blocks = _sums(parts, np.concatenate([-(-part.table.lengths // _SWEPT) + 1 for part in parts]), selections)
    taken = _sums(parts, np.concatenate([part.taken for part in parts]), selections)
    lists = np.where(sample.sizes > 0, np.clip(blocks // 8, 1, LISTS), 1)
    between = np.minimum(sample.lower, sample.sizes) - np.maximum(sample.upper, 0)
    expected = np.ceil(ROOM * sample.elements * between / np.maximum(sample.sizes, 1)).astype(np.int64)
    tile = max(part.tile for part in parts)  # of which every program leaves a part free, in the end
    room = -(-expected // lists) + (-(-blocks // lists) + 1) * tile
    return lists, np.where(sample.sizes > 0, np.minimum(room, taken), taken)


def _sums(parts: Sequence[_Part], values: Integers, selections: int) -> Integers:
    """Add up what each row has, [rows of all parts], for every selection."""
    sums = np.zeros(selections, np.int64)
    edges = np.cumsum([len(part.numbers) for part in parts])[:-1]
    for part, each in zip(parts, np.split(values, edges), strict=True):
        np.add.at(sums, part.numbers, each[:, None])
    return sums


def _preceding(values: Integers, groups: npt.NDArray[np.intp]) -> Integers:
    """Add up, for each value, those of its group that come before it."""
    order = np.argsort(groups, kind="stable")
    ahead = np.cumsum(values[order]) - values[order]
    begins = np.searchsorted(groups[order], groups[order])
    sums = np.empty_like(values)
    sums[order] = ahead - ahead[begins]
    return sums


def _search(searches: torch.Tensor, values: torch.Tensor, lists: torch.Tensor, tallies: torch.Tensor | None) -> None:
    """Carry out searches [searches, fields]; with ``tallies`` these say how long the lists are."""
    copies = _COPIES if len(lists) >= _COPIES * len(searches) else 1
    bins = torch.zeros((len(searches), copies, 1 << _BITS), dtype=torch.int32, device=searches.device)
    tile = shape_of("selection", searches.device).tile
    for _ in range(ROUNDS):
        _launch(
            _count_kernel, len(lists), searches, bins, values, lists, lists if tallies is None else tallies,
            COLLECTED=tallies is not None, COPIES=copies, TILE=tile,
        )  # fmt: skip
        _launch(_narrow_kernel, len(searches), searches, bins, COPIES=copies)


def _launch(kernel: Any, programs: int, *tensors: torch.Tensor, **constants: Any) -> None:
    """Launch a kernel that works on no table."""
    options = {"num_warps": 4, "enable_fp_fusion": False}
    launch.Launch(kernel, programs, (), tensors[0].device, {"BITS": _BITS, **constants, **options})(*tensors)


def _placed(searches: torch.Tensor, nonfinite: torch.Tensor) -> torch.Tensor:
    """Turn what was found into cuts (see `mergekit_cl.kernels.Selected`)."""
    pattern, rank, equal = (searches[:, field.value] for field in (LOW, RANK, EQUAL))
    missed = (equal < 1).to(torch.int64)
    threshold = torch.round(rank.double() / equal.clamp(min=1).double() * 2.0**32).to(torch.int64)
    whole = (threshold >= 1 << 32).to(torch.int64)
    return torch.stack([pattern - whole, threshold * (1 - whole), nonfinite + 2 * missed, pattern, rank, equal], dim=1)
