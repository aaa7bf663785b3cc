"""Exact selection by counting, against sorting; every round is one histogram, as a kernel would return it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_cl.select import Selection, guess_ranks, shift_for

Array = npt.NDArray[Any]


def histogram(patterns: Array, low: int, shift: int, bins: int) -> Array:
    """Count as `Backend.magnitude_histogram` does, without its last column."""
    places = [(p - low) >> shift if p >= low else -1 for p in patterns.tolist()]
    counts = np.zeros(bins + 1, np.int64)
    for place in places:
        if place >= 0:
            counts[min(place, bins)] += 1
    return counts


def select(
    patterns: Array, ranks: list[int], bins: int, bits: int, guess: tuple[int, int] | None = None
) -> tuple[Selection, int]:
    selection = Selection(np.array(ranks, np.int64), bits)
    low, high = selection.low.copy(), selection.high.copy()
    if guess is not None:
        low[:], high[:] = guess
    rounds = 0
    while selection.open.any():
        which = np.flatnonzero(selection.open)
        shift = shift_for(low[which], high[which], bins)
        counts = [histogram(patterns, int(a), int(s), bins) for a, s in zip(low[which], shift, strict=True)]
        selection.narrow(which, low[which], shift, np.array(counts))
        low, high = selection.low, selection.high
        rounds += 1
        assert rounds < 140
    return selection, rounds


@given(st.data())
@pytest.mark.parametrize("bits", [31, 63])
def test_selection_agrees_with_sorting(bits: int, data: st.DataObject) -> None:
    top = 2**bits - 1
    values = st.integers(0, top) | st.sampled_from([0, 1, 7, top // 3, top - 1, top])
    patterns = np.array(data.draw(st.lists(values, min_size=1, max_size=60)), np.int64)
    ranks = data.draw(st.lists(st.integers(1, len(patterns)), min_size=1, max_size=4))
    edges = st.tuples(values, values).map(lambda pair: (min(pair), max(pair)))
    chosen, _ = select(patterns, ranks, 2 ** data.draw(st.integers(1, 8)), bits, data.draw(st.none() | edges))
    falling = np.sort(patterns)[::-1]
    for rank, pattern, share in zip(ranks, chosen.low, chosen.shares, strict=True):
        assert pattern == falling[rank - 1]
        larger, equal = (patterns > pattern).sum(), (patterns == pattern).sum()
        assert share == (rank - larger) / equal


def test_a_good_guess_takes_one_round_and_a_bad_one_more() -> None:
    patterns = np.arange(0, 100_000, 7)  # the 100th largest of 14,286 is 7 * (14,285 - 99) = 99,302
    assert select(patterns, [100], 1024, 31, (99_000, 100_000))[1] == 1
    for guess, expected in (((0, 500), 5), ((99_900, 100_000), 3)):
        chosen, rounds = select(patterns, [100], 1024, 31, guess)
        assert (chosen.low[0], rounds) == (99_302, expected)  # 31 bits, or the 17 below the guess, in steps of 10


def test_shift() -> None:
    low, high = np.array([0, 0, 5, 0]), np.array([1023, 1024, 5, 2**63 - 1])
    assert shift_for(low, high, 1024).tolist() == [0, 1, 0, 53]


@given(st.integers(0, 2**32), st.floats(0.001, 0.999))
def test_the_guessed_ranks_enclose_the_rank(seed: int, part: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(50_000)
    sample = np.sort(rng.choice(values, 4096, replace=False))[::-1]
    rank = max(1, int(part * values.size))
    exact = np.sort(values)[::-1][rank - 1]
    first, last = (int(r[0]) for r in guess_ranks(np.array([rank]), np.array([values.size]), np.array([4096])))
    assert first < 1 or sample[first - 1] >= exact
    assert last > 4096 or sample[last - 1] <= exact
    assert last - first < 8 * 32 + 5  # four standard deviations to each side, of at most sqrt(4096) / 2
