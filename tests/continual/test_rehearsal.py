"""Buffers for rehearsal: what they keep, with which probability, and how they go on after a resume."""

import copy
import doctest
import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_cl import MergeError
from mergekit_cl.continual import rehearsal
from mergekit_cl.continual.rehearsal import Balanced, Reservoir


class Watched(Sequence[int]):
    """0, 1, 2, ...; notes which were read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return index


def chi_square(counts: Sequence[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def limit(freedom: int) -> float:
    """Return a bound that chi-square exceeds with a probability of about 1e-4 (Wilson and Hilferty, 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_docstring_examples() -> None:
    results = doctest.testmod(rehearsal)
    assert results.attempted >= 10
    assert not results.failed


def test_algorithm_r_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([3, 0, 4, 1])  # of 0..3, 0..4, 0..5, 0..6
    limits = []

    def below(_: Any, limit: int) -> int:
        limits.append(limit)
        return next(draws)

    monkeypatch.setattr(rehearsal._Draws, "below", below)
    reservoir = Reservoir(3)
    reservoir.extend("abcdefg")
    assert limits == [4, 5, 6, 7]
    assert list(reservoir) == ["e", "g", "c"]  # d and f were left out, e took the place of a, g that of b


def test_every_example_is_kept_with_the_same_probability() -> None:
    kept = Counter[int]()
    for seed in range(4000):
        reservoir = Reservoir(5, seed)
        reservoir.extend(range(20))
        kept.update(reservoir)
    assert sum(kept.values()) == 20_000
    assert chi_square([kept[i] for i in range(20)], 1000) < limit(19)


def test_every_set_is_kept_with_the_same_probability() -> None:
    kept = Counter[tuple[int, ...]]()
    for seed in range(4000):
        reservoir = Reservoir(2, seed)
        reservoir.extend(range(5))
        kept[tuple(sorted(reservoir))] += 1
    assert chi_square([kept[pair] for pair in combinations(range(5), 2)], 400) < limit(9)


def test_a_share_that_shrank_is_a_uniform_sample_too() -> None:
    kept = Counter[tuple[int, int]]()
    for seed in range(3000):
        balanced = Balanced(10, seed)
        for group in range(4):
            balanced.extend([(group, i) for i in range(10)], [group] * 10)
        balanced.extend([(0, i) for i in range(10, 20)], [0] * 10)  # the first one comes again
        shares = balanced.shares
        assert sorted(shares.values()) == [2, 2, 3, 3]
        kept.update(balanced)
    for group, seen in enumerate((20, 10, 10, 10)):
        assert chi_square([kept[group, i] for i in range(seen)], 3000 * shares[group] / seen) < limit(seen - 1)


def test_samples_are_uniform_and_without_repetition() -> None:
    reservoir = Reservoir(5)
    reservoir.extend(range(5))
    pairs = Counter(tuple(sorted(reservoir.sample(2))) for _ in range(4000))
    assert set(pairs) == set(combinations(range(5), 2))
    assert chi_square(list(pairs.values()), 400) < limit(9)
    assert sorted(reservoir.sample(9)) == [0, 1, 2, 3, 4]
    assert reservoir.sample(0) == Reservoir(3).sample(2) == []


def test_shares_by_hand() -> None:
    balanced = Balanced(10)
    balanced.extend(range(4), "aaaa")
    assert balanced.shares == {"a": 4}
    balanced.extend(range(20), "b" * 20)
    assert balanced.shares == {"a": 4, "b": 6}  # nothing of a is lost before b has more than half
    balanced.extend(range(20), "a" * 20)
    assert balanced.shares == {"a": 5, "b": 5}
    balanced.extend(range(20), "c" * 20)
    assert sorted(balanced.shares.values()) == [3, 3, 4]


@given(st.integers(1, 30), st.lists(st.integers(0, 4), max_size=80), st.integers(0, 2**70))
def test_shares_are_equal_but_for_groups_that_keep_all(capacity: int, groups: list[int], seed: int) -> None:
    balanced = Balanced(capacity, seed)
    for step, group in enumerate(groups):
        if capacity < 5 and len({*groups[: step + 1]}) > capacity:
            with pytest.raises(MergeError, match="larger capacity"):
                balanced.add((group, step), group)
            return
        balanced.add((group, step), group)
    shares, seen = balanced.shares, Counter[Any](groups)
    assert len(balanced) == sum(shares.values()) == min(capacity, len(groups))
    assert Counter(group for group, _ in balanced) == {group: share for group, share in shares.items() if share}
    assert len(set(balanced)) == len(balanced)
    largest = max(shares.values(), default=0)
    assert all(share in (largest, largest - 1) or share == seen[group] for group, share in shares.items())


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=9), st.integers(0, 100))
def test_one_by_one_or_in_lists(calls: list[list[int]], seed: int) -> None:
    together, alone, reservoir, drop = Balanced(7, seed), Balanced(7, seed), Reservoir(7, seed), Reservoir(7, seed)
    step = 0
    for groups in calls:
        together.sample(2)  # what is kept doesn't depend on what was sampled
        together.extend(range(step, step + len(groups)), groups)
        reservoir.extend(range(step, step + len(groups)))
        for group in groups:
            alone.add(step, group)
            drop.add(step)
            step += 1
    assert list(together) == list(alone)
    assert list(reservoir) == list(drop)


@pytest.mark.parametrize("interrupted", range(0, 31, 3))
def test_a_resumed_buffer_goes_on_alike(interrupted: int) -> None:
    for make in (lambda seed: Reservoir(6, seed), lambda seed: Balanced(6, seed)):
        buffer, resumed = make(1), make(2)

        def train(buffer: Any, steps: range) -> list[Any]:
            drawn = []
            for step in steps:
                buffer.extend([step], [step % 7 // 3]) if isinstance(buffer, Balanced) else buffer.add(step)
                drawn += buffer.sample(2)
            return drawn

        train(buffer, range(interrupted))
        state = buffer.state_dict()
        before = copy.deepcopy(state)
        resumed.load_state_dict(json.loads(json.dumps(state)))  # plain numbers
        assert train(resumed, range(interrupted, 30)) == train(buffer, range(interrupted, 30))
        assert list(resumed) == list(buffer)
        assert state == before  # not changed by going on
        assert resumed.state_dict() == buffer.state_dict()


def test_what_is_not_kept_is_not_read() -> None:
    examples = Watched(1000)
    reservoir = Reservoir(10)
    reservoir.extend(examples)
    assert set(reservoir) <= set(examples.read)
    assert len(examples.read) < 100  # 10 * (1 + ln 100) = 56 are expected


def test_seeds_differ() -> None:
    kept = []
    for seed in (0, 1, 2**70):
        reservoir = Reservoir(10, seed)
        reservoir.extend(range(1000))
        kept.append(set(reservoir))
    assert len({frozenset(each) for each in kept}) == 3


@pytest.mark.parametrize("arguments", [(0,), (-1,), (2.5,), (True,), (3, -1), (3, 0.5)])
def test_bad_numbers(arguments: tuple[Any, ...]) -> None:
    for kind in (Reservoir, Balanced):
        with pytest.raises(MergeError, match="must be a whole number"):
            kind(*arguments)
    with pytest.raises(MergeError, match="count=-1"):
        Reservoir(3).sample(-1)


@pytest.mark.parametrize("group", [np.arange(2), ("task", np.arange(2)), [1], {1: 2}])
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(MergeError, match=r"Balanced: .* is no group; pass a number, a string, or a tuple"):
        Balanced(3).add(0, group)


def test_more_groups_than_examples() -> None:
    balanced = Balanced(2)
    balanced.extend([1, 2, 3], ["a", "a", "b"])
    with pytest.raises(MergeError, match=r"no room for the group 'c'.*choose a larger capacity"):
        balanced.add(4, "c")
    assert balanced.seen == 3
    with pytest.raises(MergeError, match="2 examples, but 1 groups"):
        balanced.extend([1, 2], ["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "Reservoir"}, "one of Reservoir"),
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 3}, "damaged"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"drawn": -1}, "drawn=-1"),
        ({"examples": [1, 2, 3]}, "do not hold each of its 3 examples"),
        ({"places": [[0, 1], [1, 3]]}, "do not hold each"),
        ({"places": [[0, 1, 2, 3]]}, "do not hold each"),
        ({"groups": ["a", "a"]}, "do not hold each"),
        ({"seen": [5, 1]}, "holds more examples than it has seen"),
        ({"seen": None}, "lacks"),
    ],
)
def test_damaged_states(change: dict[str, Any], message: str) -> None:
    balanced = Balanced(4)
    balanced.extend(range(10), "aaaaabbbbb")
    state = balanced.state_dict()
    damaged = {name: value for name, value in {**state, **change}.items() if value is not None}
    with pytest.raises(MergeError, match=message):
        balanced.load_state_dict(damaged)
    assert balanced.state_dict() == state


def test_what_is_kept_and_drawn_stays_the_same_from_version_to_version() -> None:
    reservoir = Reservoir(6, seed=1)
    reservoir.extend(range(100))
    assert list(reservoir) == [47, 17, 21, 44, 66, 5]
    assert reservoir.sample(3) == [17, 44, 5]
