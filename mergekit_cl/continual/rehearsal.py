"""Which examples of earlier tasks to keep for rehearsal: buffers of a fixed size, filled in one pass.

A buffer holds anything: indices into a data set, tensors, whole dictionaries. Which examples it keeps follows from its seed and
from the order of the examples alone; it is the same whether they come one by one or in lists, and after a resume. Random
numbers are the raw 64-bit output of PCG64, which stays the same from one version of NumPy to the next; they are counted, so
that a state needs to hold no more of them than how many were drawn.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mergekit_cl.errors import MergeError

_KEEPING, _SAMPLING = 0, 1  # streams of random numbers: what is kept must not depend on what was sampled


class _Draws:
    """Random whole numbers, of which the next depends only on the seed, the stream, and how many were drawn before."""

    def __init__(self, seed: int, stream: int, count: int = 0) -> None:
        self._bits = np.random.PCG64([stream, seed]).advance(count)
        self.count = count

    def below(self, limit: int) -> int:
        """Draw from 0, ..., limit - 1; none is likelier than another by more than 2^-64."""
        self.count += 1
        return int(self._bits.random_raw()) * limit >> 64


class _Buffer:
    """Examples in groups that share a capacity; see `Balanced`."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = _whole("capacity", capacity, least=1)
        self.seed = _whole("seed", seed, least=0)
        self._keeping, self._sampling = _Draws(self.seed, _KEEPING), _Draws(self.seed, _SAMPLING)
        self._examples: list[Any] = []
        self._seen: dict[Hashable, int] = {}
        self._places: dict[Hashable, list[int]] = {}  # of each group's examples in the list of all

    @property
    def seen(self) -> int:
        """How many examples were offered so far."""
        return sum(self._seen.values())

    def sample(self, count: int) -> list[Any]:
        """Draw examples at random, each of them once at most, every set of them equally likely; all where there are no more.

        Source: Floyd's algorithm (Bentley & Floyd, 1987, https://doi.org/10.1145/30401.315746).
        """
        count, total = min(_whole("count", count, least=0), len(self)), len(self)
        drawn: dict[int, None] = {}
        for last in range(total - count, total):
            place = self._sampling.below(last + 1)
            drawn[last if place in drawn else place] = None
        return [self._examples[place] for place in drawn]

    def state_dict(self) -> dict[str, Any]:
        """Return the examples, as they are, and the numbers and groups that say how to go on."""
        return {
            "kind": type(self).__name__,
            "capacity": self.capacity,
            "seed": self.seed,
            "drawn": self._keeping.count,
            "sampled": self._sampling.count,
            "groups": list(self._seen),
            "seen": list(self._seen.values()),
            "places": [list(places) for places in self._places.values()],
            "examples": list(self._examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; capacity and seed are taken over too.

        Raises:
            MergeError: The state is not one of such a buffer, or damaged; nothing was loaded.

        """
        kind = type(self).__name__
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise MergeError(f'{kind}: the state lacks "{missing[0]}"; pass what {kind}.state_dict() returned')
        if state["kind"] != kind:
            raise MergeError(f"{kind}: the state is one of {state['kind']}; load it into a buffer of that kind")
        new = type(self)(state["capacity"], state["seed"])
        drawn, sampled = (_whole(name, state[name], least=0) for name in ("drawn", "sampled"))
        seen = [_whole("seen", count, least=0) for count in state["seen"]]
        places = [[_whole("places", place, least=0) for place in group] for group in state["places"]]
        _check_places(kind, new.capacity, len(state["examples"]), state["groups"], seen, places)
        self.capacity, self.seed = new.capacity, new.seed
        self._keeping, self._sampling = _Draws(self.seed, _KEEPING, drawn), _Draws(self.seed, _SAMPLING, sampled)
        self._examples = list(state["examples"])
        self._seen = dict(zip(state["groups"], seen, strict=True))
        self._places = dict(zip(state["groups"], places, strict=True))

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {self.capacity} examples, {self.seen} seen, seed={self.seed})"

    def _extend(self, examples: Sequence[Any], groups: Sequence[Hashable]) -> None:
        for index, group in enumerate(groups):
            place = self._place(group)
            if place == len(self._examples):
                self._examples.append(examples[index])
            elif place is not None:
                self._examples[place] = examples[index]

    def _place(self, group: Hashable) -> int | None:
        """Decide where the next example of a group goes, which may be the place of another; None to leave it out."""
        places = self._places.get(group, [])
        if len(self) == self.capacity:
            largest = max(self._places.values(), key=len)
            if not places and len(largest) == 1:
                raise MergeError(
                    f"{type(self).__name__}: no room for the group {group!r}: each of the {self.capacity} examples that fit "
                    "is the last one of its group; choose a larger capacity"
                )
        self._seen[group] = seen = self._seen.get(group, 0) + 1
        self._places[group] = places
        if len(self) < self.capacity:
            places.append(len(self))
            return len(self)
        if len(largest) > len(places) + 1:  # this group has less than its share: one of the largest group makes room
            drawn = self._keeping.below(len(largest))
            largest[drawn], largest[-1] = largest[-1], largest[drawn]
            places.append(largest.pop())
            return places[-1]
        drawn = self._keeping.below(seen)
        return places[drawn] if drawn < len(places) else None


class Reservoir(_Buffer):
    """A uniform sample of all examples so far: each of the n seen is among the ``capacity`` kept with the same probability.

    Source: algorithm R of Vitter (1985), https://doi.org/10.1145/3147.3165.

    Args:
        capacity: How many examples are kept, at most.
        seed: Decides which; a whole number, 0 or more.

    Raises:
        MergeError: A number out of range.

    >>> reservoir = Reservoir(3)
    >>> reservoir.extend(range(2))
    >>> list(reservoir)
    [0, 1]
    >>> reservoir.extend(range(2, 100))
    >>> len(reservoir), reservoir.seen
    (3, 100)

    """

    def add(self, example: Any) -> None:
        """Offer one example."""
        self._extend([example], [None])

    def extend(self, examples: Sequence[Any]) -> None:
        """Offer examples, in their order; those that are not kept are never read from the sequence."""
        self._extend(examples, [None] * len(examples))


class Balanced(_Buffer):
    """A sample in which every group, a task or a class, has the same share, and within each a uniform sample of the group.

    As long as there is room everything is kept. Then whatever a group with less than its share gains, the largest group loses,
    so shares shrink as groups come. A group that had fewer examples than its share keeps all of them, and the others divide the
    rest; shares of the others differ by one example at most. Within a group every example seen has the same probability to be
    kept, also after its share has shrunk. (The shares are those of the greedy balancing sampler of Prabhu et al., 2020,
    https://doi.org/10.1007/978-3-030-58536-5_31, which does not sample the later examples of a group.)

    Args:
        capacity: How many examples are kept, at most, of all groups together.
        seed: Decides which; a whole number, 0 or more.

    Raises:
        MergeError: A number out of range.

    >>> balanced = Balanced(6)
    >>> balanced.extend(range(100), ["first"] * 100)
    >>> balanced.shares
    {'first': 6}
    >>> balanced.extend(range(100), ["second"] * 100)
    >>> balanced.shares
    {'first': 3, 'second': 3}

    """

    @property
    def shares(self) -> dict[Hashable, int]:
        """How many examples of each group are kept."""
        return {group: len(places) for group, places in self._places.items()}

    def add(self, example: Any, group: Hashable) -> None:
        """Offer one example of a group.

        Raises:
            MergeError: There is no room for another group.

        """
        self.extend([example], [group])

    def extend(self, examples: Sequence[Any], groups: Sequence[Hashable]) -> None:
        """Offer examples, in their order; those that are not kept are never read from the sequence.

        Args:
            examples: The examples.
            groups: The group of each: a number, a string, or a tuple of these. Numbers of NumPy and PyTorch count as their
                values.

        Raises:
            MergeError: There are not as many groups as examples, or one of them is a whole array; or there is no room for
                another group (the examples before it were taken).

        """
        if len(examples) != len(groups):
            raise MergeError(f"Balanced: {len(examples)} examples, but {len(groups)} groups; pass the group of each example")
        self._extend(examples, [_plain(group) for group in groups])


def _plain(group: Any) -> Hashable:
    """Return a group as numbers and strings of Python: tensors of one value would be told apart by their identity."""
    if isinstance(group, tuple):
        return tuple(map(_plain, group))
    try:
        value: Hashable = group.item() if hasattr(group, "item") else group
        hash(value)
    except (TypeError, ValueError, RuntimeError):
        raise MergeError(f"Balanced: {group!r} is no group; pass a number, a string, or a tuple of these") from None
    return value


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise MergeError(f"{name}={value!r}: must be a whole number, {least} or more")
    return int(value)


def _check_places(
    kind: str, capacity: int, examples: int, groups: Sequence[Hashable], seen: Sequence[int], places: Sequence[Sequence[int]]
) -> None:
    """Refuse a state in which the groups do not hold each example once, or more than they have seen."""
    whole = sorted(place for group in places for place in group) == list(range(examples)) and examples <= capacity
    if not whole or not len(set(groups)) == len(groups) == len(seen) == len(places):
        raise MergeError(f"{kind}: the state is damaged: its groups do not hold each of its {examples} examples once")
    if any(len(group) > count for group, count in zip(places, seen, strict=True)):
        raise MergeError(f"{kind}: the state is damaged: a group holds more examples than it has seen")
