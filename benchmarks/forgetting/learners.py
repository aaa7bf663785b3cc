"""The learners that are compared, what each of them may choose, and the cells that it takes."""

import random
from dataclasses import dataclass, field
from itertools import product
from math import lcm
from typing import Any, Literal, TypeAlias

from .protocol import Cell, Settings, Values, cell

Group: TypeAlias = Literal["fine-tuning", "SFA", "merging", "penalty", "rehearsal", "bound", "flax"]

BETAS = (0.5, 0.25, 0.75, 0.1)
SCALES = (0.5, 1.0, 0.3, 0.7)
ELECTED_SCALES = (1.0, 0.5, 1.5, 0.3, 2.0)
DENSITIES = (0.2, 0.5, 0.8)
STRENGTHS = (0.01, 0.001, 0.1, 0.3, 1.0)
FISHER_STRENGTHS = (1e3, 1e2, 1e4, 1e5)


WITHOUT_REVIEWS = ("rotated", "permuted", "split-shared", "split-separate", "characters")
"""On reviews a fifth of a task's examples is about as many as it is trained on."""


@dataclass(frozen=True)
class Learner:
    """A way to learn tasks in turn.

    Attributes:
        name: As on the command line.
        title: As in tables.
        group: What it is of.
        runs: Its name in cells. Several learners may run the same code, with other fixed values.
        fixed: Values that are not chosen.
        space: Values to choose from, by name, the usual one first; besides the learning rate.
        merges: What trains the models that it merges, if it does.
        like: The learner whose chosen values it takes over.
        only: The sequences that it runs on; None for all.

    """

    name: str
    title: str
    group: Group
    runs: str = ""
    fixed: Values = field(default_factory=dict)
    space: dict[str, tuple[float, ...]] = field(default_factory=dict)
    merges: Literal["sequential", "per-task"] | None = None
    like: str | None = None
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", self.runs or self.name)


def _rehearsal(percent: int, only: tuple[str, ...] | None = None) -> Learner:
    title, shares = f"rehearsal, {percent} % kept", (0.5, 0.25, 0.75)
    fixed = {"kept": percent / 100}
    return Learner(f"rehearsal-{percent}", title, "rehearsal", "rehearsal", fixed, {"share": shares}, only=only)


def _twin(name: str, title: str) -> Learner:
    return Learner(f"{name}-flax", f"{title}, in Flax", "flax", like=name, only=("rotated",))


def _merge(name: str, title: str, **space: tuple[float, ...]) -> Learner:
    return Learner(name, title, "merging", space=space, merges="sequential" if name == "wise_ft" else "per-task")


_ALL = (
    Learner("sequential", "sequential fine-tuning", "fine-tuning"),
    Learner("sfa", "SFA, p = 0.25", "SFA", "sfa", {"p": 0.25}, {"beta": BETAS}),
    Learner("sfa-end", "SFA, p = 1", "SFA", "sfa", {"p": 1.0}, {"beta": BETAS}),
    _merge("wise_ft", "WiSE-FT", alpha=(0.5, 0.75, 0.9, 0.25)),
    _merge("soup", "model soup"),
    _merge("task_arithmetic", "Task Arithmetic", lambda_=SCALES),
    _merge("ties", "TIES", lambda_=ELECTED_SCALES, density=DENSITIES),
    _merge("dare_ties", "DARE-TIES", lambda_=ELECTED_SCALES, density=DENSITIES),
    _merge("magmax", "MagMax", lambda_=SCALES),
    _merge("opcm", "OPCM", alpha=(0.5, 0.75, 0.25, 0.9)),
    Learner("l2", "L2", "penalty", space={"strength": STRENGTHS}),
    Learner("ewc", "EWC", "penalty", space={"strength": FISHER_STRENGTHS}),
    Learner("ewc-online", "EWC, online", "penalty", space={"strength": FISHER_STRENGTHS, "gamma": (0.9, 1.0)}),
    Learner("lwf", "LwF", "penalty", space={"strength": (1.0, 0.3, 3.0, 0.1)}),
    _rehearsal(1),
    _rehearsal(5),
    _rehearsal(20, WITHOUT_REVIEWS),
    Learner("joint", "all tasks at once", "bound"),
    _twin("sequential", "sequential fine-tuning"),
    _twin("sfa", "SFA, p = 0.25"),
    _twin("l2", "L2"),
)
LEARNERS = {learner.name: learner for learner in _ALL}


def learners_for(sequence: str) -> list[Learner]:
    """Return the learners that run on a sequence, in the order of tables."""
    base = sequence.partition("@")[0]
    return [learner for learner in _ALL if learner.only is None or base in learner.only]


def trials(learner: Learner, settings: Settings) -> list[Values]:
    """Return the values that a learner may try: as many for each learner, or all that it has if these are fewer.

    From one trial to the next every value changes to the next of its list, the usual one first, so that a few trials see all of
    them; when these come round again, others follow by chance, the same each time. A learner that has nothing to choose but the
    learning rate tries more rates.
    """
    rates = settings.rates if learner.space else (*settings.rates, *settings.more_rates)
    lists = {**learner.space, "lr": rates}
    sizes = [len(values) for values in lists.values()]
    spread = [tuple(i % size for size in sizes) for i in range(lcm(*sizes))]
    others = list(product(*map(range, sizes)))
    random.Random(learner.name).shuffle(others)
    order = list(dict.fromkeys([*spread, *others]))[: settings.trials]
    return [
        {**learner.fixed, **{name: values[i] for (name, values), i in zip(lists.items(), places, strict=True)}}
        for places in order
    ]


def cell_of(sequence: str, learner: Learner, values: Values, seed: int, purpose: Any = "final") -> Cell:
    """Return the cell of a learner with these values."""
    return cell(sequence, learner.runs, values, seed, purpose)


def needs(cell_: Cell) -> Cell | None:
    """Return the cell that trains the models which this one merges."""
    learner = LEARNERS.get(cell_.learner)
    if learner is None or learner.merges is None:
        return None
    return cell(cell_.sequence, learner.merges, {"lr": dict(cell_.values)["lr"]}, cell_.seed, "weights")
