"""The numbers of a result file: means over seeds with confidence intervals, and differences between learners.

A metric is in percent or in points, so that 1 is one example in a hundred. Learners are compared seed by seed: with a seed all
of them begin with the same weights.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mergekit_cl.continual import average_accuracy, backward_transfer, forgetting, forward_transfer, learning_accuracy

from .protocol import Result

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its confidence interval; they are infinite where one value says nothing of others."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Metric:
    """A number for each run: how it is computed from what came out of a cell, whether more is better, and decimal places."""

    title: str
    unit: str
    more_is_better: bool
    of: Callable[[Result], float]
    places: int = 1


AVERAGE = Metric("average accuracy", "%", True, lambda final: 100 * average_accuracy(final["accuracy"]))
FORGETTING = Metric("forgetting", "points", False, lambda final: 100 * forgetting(final["accuracy"]))
BACKWARD = Metric("backward transfer", "points", True, lambda final: 100 * backward_transfer(final["accuracy"]))
FORWARD = Metric("forward transfer", "points", True, lambda final: 100 * forward_transfer(final["accuracy"], final["start"]))
LEARNING = Metric("learning accuracy", "%", True, lambda final: 100 * learning_accuracy(final["accuracy"]))
BITS = Metric("bits per character", "bits", False, lambda final: average_accuracy(final["loss"]) / math.log(2), places=2)


def metrics_of(result: Result) -> list[Metric]:
    """Return the metrics of a sequence; text has bits per character besides."""
    bits = [BITS] if result["sequence"]["kind"] == "language" else []
    return [AVERAGE, *bits, FORGETTING, BACKWARD, FORWARD, LEARNING]


def mean_interval(values: Iterable[float], level: float = LEVEL) -> Interval:
    """Return the mean of some values, and its confidence interval by Student's t distribution.

    The mean, plus and minus ``t * s / sqrt(n)``: s is the standard deviation with n - 1 below the line, t the quantile of
    ``(1 + level) / 2`` with n - 1 degrees of freedom. NaN stays NaN.
    """
    numbers = np.array([*values])
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stdtrit(len(numbers) - 1, (1 + level) / 2) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Interval(mean, mean - half, mean + half)


def summary(result: Result, learner: str, metric: Metric) -> Interval:
    """Return the mean of a metric over the seeds of a learner."""
    return mean_interval(map(metric.of, result["learners"][learner]["finals"]))


def difference(result: Result, learner: str, other: str, metric: Metric = AVERAGE) -> Interval | None:
    """Return by how much a learner is above another one, seed by seed; None if one of them did not run."""
    learners = result["learners"]
    if learner not in learners or other not in learners:
        return None
    pairs = zip(learners[learner]["finals"], learners[other]["finals"], strict=False)  # the seeds that both have
    return mean_interval(metric.of(one) - metric.of(two) for one, two in pairs)


def best(result: Result, group: str) -> str | None:
    """Return the learner of a group with the highest average accuracy; None if none of them ran."""
    members = [name for name, learner in result["learners"].items() if learner["group"] == group]
    return max(members, key=lambda name: summary(result, name, AVERAGE).mean, default=None)


def mean_matrix(result: Result, learner: str) -> Any:
    """Return the accuracy matrix in percent, averaged over seeds; NaN where it was not measured."""
    return 100 * np.mean([np.array(final["accuracy"], float) for final in result["learners"][learner]["finals"]], axis=0)


def parameter_bytes(result: Result) -> int:
    """Return what the trained parameters take, at 4 bytes each."""
    return 4 * int(result["sequence"]["parameters"])


def held(result: Result, learner: str) -> float:
    """Return the bytes that a learner keeps beside model and optimizer, the mean over seeds."""
    return float(np.mean([final["held"] for final in result["learners"][learner]["finals"]]))


def step_ratio(result: Result, learner: str) -> float | None:
    """Return how long a step takes, in steps of sequential fine-tuning; None if it was not measured."""
    costs = result["costs"]
    if learner not in costs or "sequential" not in costs:
        return None
    return float(costs[learner]["step"] / costs["sequential"]["step"])
