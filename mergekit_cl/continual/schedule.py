"""When to merge while training on a task."""

from dataclasses import dataclass

from mergekit_cl.errors import MergeError


@dataclass(frozen=True)
class MergeSchedule:
    """Merge after steps k, 2k, ... and after the last step T of the task, once each. Steps are counted from 1.

    ``every`` is k. ``total_steps`` is T, or None for a task of unknown length.
    """

    every: int
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("total_steps", self.total_steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise MergeError(f"{name}={value!r}: must be a whole number of steps, at least 1")

    @classmethod
    def from_fraction(cls, p: float, total_steps: int) -> "MergeSchedule":
        """Merge every p*T steps, as the SFA paper writes it: k = max(1, round(p * T)).

        >>> MergeSchedule.from_fraction(0.25, 10)
        MergeSchedule(every=2, total_steps=10)
        """
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 < p <= 1:
            raise MergeError(f"p={p!r}: must be a fraction of the task, above 0 and at most 1")
        cls(1, total_steps)
        return cls(max(1, round(p * total_steps)), total_steps)

    def due(self, step: int) -> bool:
        """Whether to merge after this step.

        >>> [step for step in range(1, 12) if MergeSchedule(4, 10).due(step)]
        [4, 8, 10]
        """
        if self.total_steps is not None and step >= self.total_steps:
            return step == self.total_steps
        return step % self.every == 0
