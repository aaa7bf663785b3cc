"""What the parts of the experiment tell each other: tasks, sequences of tasks, cells, and what comes out of a cell."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

Values: TypeAlias = dict[str, float]
"""Hyper-parameters by name; "lr" is the learning rate."""

Result: TypeAlias = dict[str, Any]
"""What came out of a cell, ready for JSON; see `training.carry_out`."""


@dataclass(frozen=True)
class Part:
    """Examples: ``inputs`` [example, ...], and ``targets`` [example] or [example, position], int64, numbers of outputs."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def first(self, count: int) -> "Part":
        return Part(self.inputs[:count], self.targets[:count])


@dataclass(frozen=True)
class Task:
    """A task, in three parts that share no example. They are shuffled, so that the first N of a part are a fair sample.

    ``outputs`` are the outputs of the network that the task uses, as a head of its own; None for all of them. Whoever
    trains or tests hides the others.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    outputs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Settings:
    """How much is trained, and how much is tried, the same for every learner.

    ``steps`` and ``batch`` are those of each task. ``rates`` are the learning rates to choose from, the usual one first;
    ``more_rates`` are for learners that have nothing else to choose.
    ``trials`` is how many sets of hyper-parameters each learner may try. ``betas`` and ``ps`` span the heat map of SFA, which
    has ``grid_seeds`` seeds. While the first seed trains, ``curve_points`` times in each task, the first ``curve_examples``
    test examples of each task are scored. ``evaluated`` limits the examples of a test or validation part that are scored.
    """

    steps: int
    batch: int
    rates: tuple[float, ...]
    trials: int
    more_rates: tuple[float, ...] = ()
    seeds: int = 5
    betas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    ps: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0)
    grid_seeds: int = 3
    curve_points: int = 12
    curve_examples: int = 250
    evaluated: int | None = None
    fisher_examples: int = 200

    def quick(self, steps: int) -> "Settings":
        """Make them small: too few steps to learn much, enough to see that everything works."""
        few = {"betas": self.betas[1:3], "ps": self.ps[-2:], "rates": self.rates[:1], "curve_points": 4, "curve_examples": 50}
        small = {"trials": 1, "seeds": 2, "grid_seeds": 1, "evaluated": 50, "fisher_examples": 16}
        return replace(self, steps=steps, **few, **small)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sequence:
    """Tasks in an order, the network that learns them, and how.

    Attributes:
        name: As in the names of cells: ``rotated``; with another order of its tasks ``rotated@3-2-1-0``.
        title: For readers: ``Rotated MNIST``.
        about: A sentence or two: where the data are from, how many there are, what the network is.
        kind: What changes from task to task. "domain": the inputs, while outputs mean the same; "class": there are new classes
            in one head; "task": each task has a head of its own, and says which; "language": the text to be continued.
        unit: What the numbers are: "accuracy", or "accuracy on the next character".
        tasks: The tasks, in the order in which they are learned.
        network: Makes the network with the first weights of a seed: inputs of a batch in, float32 logits out, [example, output]
            or [example, position, output]. Parameters that are not trained do not require gradients.
        settings: How much is trained and tried.
        pretrained: Whether the first weights are worth keeping. Then models of single tasks start there, and it is the base of
            merges; otherwise the weights after the first task are.

    """

    name: str
    title: str
    about: str
    kind: Literal["domain", "class", "task", "language"]
    unit: str
    tasks: tuple[Task, ...]
    network: Callable[[int], torch.nn.Module]
    settings: Settings
    pretrained: bool = False


@dataclass(frozen=True)
class Cell:
    """One training run (or merge), with its hyper-parameters and seed: the unit that is cached, and can be run by name.

    ``purpose`` is "tuning" (scored on the validation parts alone), "final" (on the test parts alone) or "weights" (not scored:
    the models that merges start from).
    """

    sequence: str
    learner: str
    values: tuple[tuple[str, float], ...]
    seed: int
    purpose: Literal["tuning", "final", "weights"] = "final"

    @property
    def name(self) -> str:
        """Return the name: ``rotated/sfa/beta=0.5,lr=0.001,p=0.25/seed-0``, before the seed ``tuning-`` or ``weights-``."""
        values = ",".join(f"{name}={value:g}" for name, value in self.values)
        purpose = "" if self.purpose == "final" else f"{self.purpose}-"
        return f"{self.sequence}/{self.learner}/{values}/{purpose}seed-{self.seed}"


def cell(sequence: str, learner: str, values: Values, seed: int, purpose: Any = "final") -> Cell:
    """Make a cell: values in the order of their names."""
    return Cell(sequence, learner, tuple(sorted(values.items())), seed, purpose)
