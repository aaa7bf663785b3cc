"""The metrics of continual learning, against numbers computed by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mergekit_cl import MergeError
from mergekit_cl.continual import average_accuracy, backward_transfer, forgetting, forward_transfer, learning_accuracy

Metric = Callable[[Any], float]

FORGETS = np.array([[8, 1, 3], [6, 9, 2], [4, 8, 7]]) / 16
GAINS = np.array([[4, 1, 0], [5, 6, 1], [8, 7, 9]]) / 16


def forward_transfer_from_nothing(matrix: Any) -> float:
    return forward_transfer(matrix, np.zeros(len(matrix)))


METRICS: list[Metric] = [average_accuracy, learning_accuracy, backward_transfer, forgetting, forward_transfer_from_nothing]


@pytest.mark.parametrize(
    ("metric", "on_forgets", "on_gains"),
    [
        (average_accuracy, 19 / 48, 24 / 48),
        (learning_accuracy, 24 / 48, 19 / 48),
        (backward_transfer, -5 / 32, 5 / 32),
        (forgetting, 5 / 32, -4 / 32),
    ],
)
def test_hand_computed(metric: Metric, on_forgets: float, on_gains: float) -> None:
    """Transfer: ((4 - 8) + (8 - 9)) / 2 and ((8 - 4) + (7 - 6)) / 2; forgetting of GAINS: ((5 - 8) + (6 - 7)) / 2."""
    assert metric(FORGETS) == pytest.approx(on_forgets, abs=1e-15)
    assert metric(GAINS) == pytest.approx(on_gains, abs=1e-15)


def test_forgetting_counts_from_the_best_row() -> None:
    """Task 0 is best after task 1, so forgetting is (10 - 4) / 16 where backward transfer is (4 - 8) / 16."""
    late_peak = np.array([[8, 0, 0], [10, 4, 0], [4, 4, 9]]) / 16
    assert forgetting(late_peak) == 6 / 32
    assert backward_transfer(late_peak) == -4 / 32


def test_forgetting_counts_rows_before_the_task() -> None:
    """Task 1 was best before it was trained on (5/16); the maximum of the paper takes every row but the last."""
    assert forgetting(np.array([[8, 5, 0], [8, 4, 0], [8, 3, 9]]) / 16) == 2 / 32


def test_rows_are_times_and_columns_are_tasks() -> None:
    assert average_accuracy([[0.25, 0.5], [0.75, 1.0]]) == 0.875
    assert average_accuracy(np.transpose([[0.25, 0.5], [0.75, 1.0]])) == 0.75


def test_percent_stay_percent() -> None:
    assert backward_transfer([[80, 0], [60, 90]]) == -20


def test_what_was_not_measured_may_be_nan_where_it_is_not_needed() -> None:
    lower = np.where(np.tri(3), FORGETS, np.nan)
    assert backward_transfer(lower) == backward_transfer(FORGETS)
    assert average_accuracy(lower) == average_accuracy(FORGETS)
    assert math.isnan(forgetting(lower))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("matrix", [[], [0.5], [[0.5, 0.5]], [[0.5], [0.5, 0.5]], [["good"]], np.ones((2, 2, 2))])
def test_refuses_what_is_not_a_square_of_numbers(metric: Metric, matrix: Any) -> None:
    with pytest.raises(MergeError, match="accuracy matrix"):
        metric(matrix)


def test_one_task_has_an_average_but_no_transfer() -> None:
    assert average_accuracy([[0.5]]) == learning_accuracy([[0.5]]) == 0.5
    for metric in (backward_transfer, forgetting, forward_transfer_from_nothing):
        with pytest.raises(MergeError, match="needs at least 2"):
            metric([[0.5]])


def test_forward_transfer_counts_from_the_start() -> None:
    """((1 - 2) + (2 - 1)) / 2 and ((1 - 2) + (1 - 4)) / 2 sixteenths: what stands above the diagonal, less the start."""
    assert forward_transfer(FORGETS, np.array([15, 2, 1]) / 16) == 0
    assert forward_transfer(GAINS, np.array([15, 2, 4]) / 16) == -2 / 16


def test_forward_transfer_needs_no_more_than_one_row_before_each_task() -> None:
    measured = [[None, 0.5, None], [None, None, 0.75], [None, None, None]]
    assert forward_transfer(measured, [None, 0.25, 0.25]) == 0.375


@pytest.mark.parametrize("start", [0.5, [0.5], [0.5, 0.5, 0.5, 0.5], [[0.5, 0.5, 0.5]], ["a", "b", "c"]])
def test_forward_transfer_wants_a_start_for_each_task(start: Any) -> None:
    with pytest.raises(MergeError, match="accuracies at the start"):
        forward_transfer(FORGETS, start)
