"""What the methods that decompose matrices share: singular values and their directions, of NumPy arrays or PyTorch tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from mergekit_cl.errors import MergeError
from mergekit_cl.steps import PerMatrix, Sum

Matrix: TypeAlias = Any
"""A matrix of floats: a NumPy array, or a PyTorch tensor."""

Parts: TypeAlias = tuple[Matrix, Matrix, Matrix]
"""u [m, r], s [r] and v [r, n] of a matrix ``u * s @ v``."""

NEGLIGIBLE = 32
"""How many rounding errors of the models' dtype, relative to the largest, a singular value may be and still count as zero."""


def library(matrix: Matrix) -> Any:
    """Return numpy, or torch, which whoever made the matrix has imported."""
    if isinstance(matrix, np.ndarray):
        return np
    import torch

    return torch


@dataclass(frozen=True)
class TaskMatrices:
    """The task matrices [m, n], ``model - base`` in float64, made one at a time.

    ``zero`` is what counts as zero beside one, from the rounding of the models.
    """

    base: Matrix
    models: Sequence[Matrix]
    zero: float

    def __len__(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[Matrix]:
        convert = partial(library(self.base).asarray, dtype=self.base.dtype)
        return (convert(model) - self.base for model in self.models)

    @property
    def directions(self) -> int:
        """How many singular values a matrix has, min(m, n)."""
        return int(min(self.base.shape))


Change: TypeAlias = Callable[[TaskMatrices], Matrix]
"""From the task matrices to what is added to the base."""


def per_matrix(change: Change, models: int, lambda_: float) -> PerMatrix:
    """Add ``lambda_ * change`` to matrices, and ``lambda_`` times the mean of the task vectors to all other tensors."""
    return PerMatrix(partial(changed, change=change, lambda_=lambda_), Sum([lambda_ / models] * models, 1 - lambda_))


@np.errstate(all="ignore")
def changed(base: Matrix, models: Sequence[Matrix], change: Change, lambda_: float = 1.0) -> Matrix:
    """Return ``base + lambda_ * change`` for matrices [m, n], computed in float64, in the dtype of the base.

    Where the change is zero, the base keeps its bits. Task matrices that are not finite have no singular values: the result is
    NaN in all entries.
    """
    given = library(base)
    zero = NEGLIGIBLE * float(given.finfo(base.dtype).eps)
    tasks = TaskMatrices(given.asarray(base, dtype=given.float64), models, zero)
    if not all(bool(given.isfinite(task).all()) for task in tasks):
        return given.full_like(base, np.nan)
    added = lambda_ * change(tasks)
    return given.where(added == 0, base, given.asarray(tasks.base + added, dtype=base.dtype))


def singular(matrix: Matrix, zero: float, size: float = 0.0) -> Parts:
    """Decompose a matrix of rank r into directions u [m, r] and v [r, n] and singular values s [r], the largest first.

    Singular values of at most ``zero`` times the largest of them, or times ``size``, don't count: rounding made them of zero,
    and their directions are arbitrary.

    Raises:
        MergeError: The decomposition did not converge.

    """
    if not bool(matrix.any()):
        return matrix[:, :0], matrix.diagonal()[:0], matrix[:0]
    given = library(matrix)
    try:
        u, s, v = given.linalg.svd(matrix, full_matrices=False)
    except given.linalg.LinAlgError as error:
        raise MergeError(
            f"the singular values of a matrix of shape {tuple(matrix.shape)} were not found ({error}); "
            "leave the tensor out of the merge with exclude=..."
        ) from error
    rank = int((s > zero * max(size, float(s[0]))).sum())
    return u[:, :rank], s[:rank], v[:rank]


def first(count: int, parts: Parts) -> Parts:
    """Keep the largest singular values and their directions, in memory of their own, so that the rest is freed."""
    u, s, v = parts
    copy = partial(library(u).asarray, copy=True)
    return copy(u[:, :count]), copy(s[:count]), copy(v[:count])


def decorrelated(parts: Sequence[Parts], zero: float) -> Parts:
    """Join the directions and singular values of several matrices, and make the directions orthogonal to each other.

    The nearest orthogonal directions (Procrustes): the orthogonal polar factors of all u and of all v. Directions that
    several matrices have in common share one.
    """
    us, ss, vs = zip(*parts, strict=True)
    given = library(us[0])
    u, v = (singular(given.concat(part, axis=axis), zero) for axis, part in ((1, us), (0, vs)))
    return u[0] @ u[2], given.concat(ss, axis=0), v[0] @ v[2]
