"""When to merge while training on a task."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mergekit_cl.errors import MergeError


@dataclass(frozen=True)
class MergeSchedule:
    """Merge after steps k, 2k, ... and after the last step T of the task, once each. Steps are counted from 1.

    ``every`` is k. ``total_steps`` is T, or None for a task of unknown length.
    """

    every: int
    total_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", _steps("every", self.every))
        if self.total_steps is not None:
            object.__setattr__(self, "total_steps", _steps("total_steps", self.total_steps))

    @classmethod
    def from_fraction(cls, p: float, total_steps: int) -> "MergeSchedule":
        """Merge every p*T steps, as the SFA paper writes it: k = max(1, round(p * T)).

        >>> MergeSchedule.from_fraction(0.25, 10)
        MergeSchedule(every=2, total_steps=10)
        """
        if not _is_fraction(p):
            raise MergeError(f"p={p!r}: must be a fraction of the task, above 0 and at most 1")
        steps = _steps("total_steps", total_steps)
        return cls(max(1, round(float(p) * steps)), steps)

    def due(self, step: int) -> bool:
        """Whether to merge after this step.

        >>> [step for step in range(1, 12) if MergeSchedule(4, 10).due(step)]
        [4, 8, 10]
        """
        if self.total_steps is not None and step >= self.total_steps:
            return step == self.total_steps
        return step % self.every == 0

    def merges(self, step: int) -> int:
        """How many merges are done after this step.

        >>> [MergeSchedule(4, 10).merges(step) for step in (3, 4, 9, 10, 11)]
        [0, 1, 2, 3, 3]
        """
        if self.total_steps is None or step < self.total_steps:
            return step // self.every
        return (self.total_steps - 1) // self.every + 1

    def last(self, step: int) -> int:
        """Return the step of the last merge that is done after this step; 0 if there is none.

        >>> [MergeSchedule(4, 10).last(step) for step in (3, 4, 9, 10, 11)]
        [0, 4, 8, 10, 10]
        """
        if self.total_steps is None or step < self.total_steps:
            return step // self.every * self.every
        return self.total_steps


def _steps(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise MergeError(f"{name}={value!r}: must be a whole number of steps, at least 1")
    return int(value)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and 0 < float(value) <= 1
