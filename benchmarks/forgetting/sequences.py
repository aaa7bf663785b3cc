"""The sequences of tasks, by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module

from mergekit_cl.errors import MergeError, unknown

from .protocol import Sequence

_MAKERS = {
    "rotated": ("digits", "rotated"),
    "permuted": ("digits", "permuted"),
    "split-shared": ("digits", "split_shared"),
    "split-separate": ("digits", "split_separate"),
    "characters": ("characters", "characters"),
    "reviews": ("reviews", "reviews"),
}
NAMES = tuple(_MAKERS)


@cache
def load(name: str, quick: bool = False) -> Sequence:
    """Load a sequence, once in a process.

    Args:
        name: One of `NAMES`; with the order of its tasks, counted from 0, behind an @: ``rotated@3-2-1-0``.
        quick: As much as shows that everything works.

    Raises:
        MergeError: There is no such sequence or order, or a package with its data is missing.

    """
    base, _, order = name.partition("@")
    if base not in _MAKERS:
        raise unknown("sequence", base, NAMES)
    module, function = _MAKERS[base]
    make: Callable[[bool], Sequence] = getattr(import_module(f".{module}", __package__), function)
    sequence = make(quick)
    return _reordered(sequence, order) if order else sequence


def _reordered(sequence: Sequence, order: str) -> Sequence:
    places = [int(place) if place.isdecimal() else -1 for place in order.split("-")]
    if sorted(places) != list(range(len(sequence.tasks))):
        names = ", ".join(f"{place}: {task.name}" for place, task in enumerate(sequence.tasks))
        raise MergeError(f"{sequence.name}: the order {order!r} does not name each task once; its tasks are {names}")
    title = f"{sequence.title}, in the order {order}"
    return replace(sequence, name=f"{sequence.name}@{order}", title=title, tasks=tuple(sequence.tasks[i] for i in places))
