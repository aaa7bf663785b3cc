"""Continual learning in a few numbers, computed from the accuracy matrix.

The accuracy matrix ``R`` is square: ``R[i, j]`` is the accuracy on task j after training on tasks 0 to i in order, of T
tasks in all. Any unit will do (a fraction, percent); the metrics have the same. An entry that was not measured may be
NaN; a metric that needs it is then NaN too. The sources count tasks from 1, these formulas from 0. Other libraries use
other denominators, or another maximum in `forgetting`: compare numbers only where the formulas agree.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_cl.errors import MergeError


def average_accuracy(matrix: ArrayLike) -> float:
    """Return the mean accuracy over all tasks after the last one: ``sum_j R[T-1, j] / T``.

    Source: ACC of Lopez-Paz & Ranzato (2017), https://arxiv.org/abs/1706.08840, section 2.

    Raises:
        MergeError: The matrix is empty, not square, or not of numbers.

    >>> average_accuracy([[0.75, 0.0], [0.5, 1.0]])  # (0.5 + 1) / 2
    0.75
    """
    return float(_square(matrix)[-1].mean())


def learning_accuracy(matrix: ArrayLike) -> float:
    """Return the mean accuracy on each task just after training on it: ``sum_j R[j, j] / T``.

    It tells how well new tasks are learned, whatever is forgotten later.
    Source: LA of Riemer et al. (2019), https://arxiv.org/abs/1810.11910.

    Raises:
        MergeError: The matrix is empty, not square, or not of numbers.

    >>> learning_accuracy([[0.75, 0.0], [0.5, 1.0]])  # (0.75 + 1) / 2
    0.875
    """
    return float(_square(matrix).diagonal().mean())


def backward_transfer(matrix: ArrayLike) -> float:
    """Return how earlier tasks changed since they were learned: ``sum_{j<T-1} (R[T-1, j] - R[j, j]) / (T-1)``.

    Negative where learning new tasks cost accuracy on old ones. The last task takes no part: nothing came after it.
    Source: BWT of Lopez-Paz & Ranzato (2017), https://arxiv.org/abs/1706.08840, section 2.

    Raises:
        MergeError: The matrix has fewer than two tasks, is not square, or not of numbers.

    >>> backward_transfer([[0.75, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]])  # ((0.25 - 0.75) + (0.5 - 1)) / 2
    -0.5
    """
    accuracy = _square(matrix, least=2)
    return float((accuracy[-1] - accuracy.diagonal())[:-1].mean())


def forward_transfer(matrix: ArrayLike, start: ArrayLike) -> float:
    """Return how earlier tasks help later ones before these are learned: ``sum_{j>0} (R[j-1, j] - start[j]) / (T-1)``.

    ``start`` [task] is the accuracy before the first task, with the first weights of the run. Negative where learning the
    tasks before made a task worse than that. The first task takes no part: nothing came before it.
    Source: FWT of Lopez-Paz & Ranzato (2017), https://arxiv.org/abs/1706.08840, section 2.

    Raises:
        MergeError: The matrix has fewer than two tasks, is not square, or not of numbers; ``start`` has not as many numbers.

    >>> forward_transfer([[0.75, 0.5, 0.0], [0.5, 1.0, 0.5], [0.25, 0.5, 1.0]], [0.25, 0.25, 0.25])  # (0.25 + 0.25) / 2
    0.25
    """
    accuracy = _square(matrix, least=2)
    first = _numbers(start, "accuracies at the start", "a number for each task")
    if first.shape != (len(accuracy),):
        raise MergeError(f"accuracies at the start: have the shape {first.shape}, but the matrix has {len(accuracy)} tasks")
    return float((accuracy.diagonal(1) - first[1:]).mean())


def forgetting(matrix: ArrayLike) -> float:
    """Return the mean loss since each task's best: ``sum_{j<T-1} (max_{i<T-1} R[i, j] - R[T-1, j]) / (T-1)``.

    The maximum runs over every row but the last, those before task j included. Where each task was at its best just
    after training on it, this is minus `backward_transfer`. Negative where tasks were best at the very end.
    Source: the forgetting measure F of Chaudhry et al. (2018), https://arxiv.org/abs/1801.10112.

    Raises:
        MergeError: The matrix has fewer than two tasks, is not square, or not of numbers.

    >>> forgetting([[0.5, 0.0, 0.0], [0.75, 1.0, 0.0], [0.25, 0.5, 1.0]])  # ((0.75 - 0.25) + (1 - 0.5)) / 2
    0.5
    """
    accuracy = _square(matrix, least=2)
    return float((accuracy[:-1].max(axis=0) - accuracy[-1])[:-1].mean())


def _square(matrix: ArrayLike, least: int = 1) -> NDArray[np.float64]:
    """Return the matrix in float64; refuse one that is not square, or has fewer than ``least`` tasks."""
    accuracy = _numbers(matrix, "accuracy matrix", "a row and a column for each task")
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1]:
        raise MergeError(f"accuracy matrix: has the shape {accuracy.shape}, but needs a row and a column for each task")
    if len(accuracy) < least:
        raise MergeError(f"accuracy matrix: has {len(accuracy)} tasks, but this metric needs at least {least}")
    return accuracy


def _numbers(values: ArrayLike, name: str, wanted: str) -> NDArray[np.float64]:
    try:
        numbers: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MergeError(f"{name}: {error}; pass numbers, {wanted}") from error
    return numbers
