"""Isotropic merging in the common subspace, and in common and task-specific ones (Marczak et al., 2025)."""

from functools import partial, reduce
from operator import add

from mergekit_cl.merge_methods._matrices import (
    NEGLIGIBLE,
    Matrix,
    Parts,
    TaskMatrices,
    decorrelated,
    first,
    library,
    per_matrix,
    singular,
)
from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import PerMatrix, Scope


@method(paper="https://arxiv.org/abs/2502.04959", base="required")
def iso_c(scope: Scope, *, lambda_: float = 1.0) -> PerMatrix:
    """Add up the task matrices and make all singular values of the sum equal to their mean: ``base + lambda_ * mean * U V^T``.

    Formula:
        U, S, V = singular vectors and values of sum_k(x_k - base)
        out = base + lambda_ * mean(S) * U V^T

    A task matrix is ``model - base`` of a tensor of two dimensions, embeddings among them. Other tensors get ``lambda_`` times
    the mean of their task vectors, as in the authors' code; so does a matrix named ``text_projection`` there, but not here.

    Directions in which the sum is zero, to rounding (singular values of 4e-6 of the largest for float32), take no part, and the
    mean is over the others. The authors' code counts them, and gives the mean to arbitrary directions: for a sum of low rank
    its mean is smaller, by rank / min(m, n). All is computed in float64. The order of the models has no part in the result.

    When to use:
        To merge models that were fine-tuned for different tasks, without data: weak directions, those of tasks that others
        outweigh, become as strong as the rest. One decomposition for each matrix, however many models: the cheapest of the
        matrix methods. For many tasks `iso_cts` does better in the paper; `tsv_m` has nothing to tune.

    Args:
        lambda_: Multiplies what is added to the base; the authors' alpha, chosen with validation data from 0.1 to 3.

    Raises:
        MergeError: The singular values of a matrix were not found.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([[5, 0], [0, 1]]), np.float32([[1, 0], [0, 1]])]  # the sum: 6 and 2 on the diagonal
    >>> merge(models, method="iso_c", base=np.zeros((2, 2), np.float32), lambda_=0.5)
    array([[2., 0.],
           [0., 2.]], dtype=float32)
    """
    return per_matrix(_common, scope.models, lambda_)


@method(paper="https://arxiv.org/abs/2502.04959", base="required")
def iso_cts(scope: Scope, *, common_space_fraction: Fraction = 0.8, lambda_: float = 1.0) -> PerMatrix:
    """As ``iso_c``, with the weakest directions of the sum replaced by the strongest ones of each task that it lacks.

    Formula:
        q = min(m, n),  r = round((q - int(common_space_fraction * q)) / K),  c = q - K * r
        U_0, S_0, V_0 = the first c singular vectors and values of sum_k(x_k - base)
        U_k, S_k, V_k = the first r ones of (1 - U_0 U_0^T) (x_k - base)
        U, S, V = all of these, side by side
        out = base + lambda_ * mean(S) * orthogonal(U) orthogonal(V)^T,  orthogonal(A) = A (A^T A)^(-1/2)

    Of the q directions of a matrix, c are common, and each of the K models has r of its own. r is rounded half to even as
    in the authors' code, but to no more than q / K; where it is zero, the result is that of `iso_c`. Tensors that are not
    matrices, and directions of singular value zero, are treated as there. Directions that several models have in common
    share one. All is computed in float64. The order of the models has no part in the result.

    When to use:
        To merge many models that were fine-tuned for different tasks, without data, at the cost of a decomposition for each
        matrix of each model and three more. For few tasks `iso_c` comes close to it in the paper, and is much faster.

    Args:
        common_space_fraction: The share of the directions that is common; with 1 the result is that of `iso_c`. The
            authors use 0.8.
        lambda_: Multiplies what is added to the base; the authors' alpha, chosen with validation data from 0.1 to 3.

    Raises:
        MergeError: The singular values of a matrix were not found.

    >>> from mergekit_cl import merge
    >>> base, models = np.zeros((3, 3), np.float32), [np.diag(np.float32(d)) for d in ([6, 2, 0], [6, 0, 1])]
    >>> merge(models, method="iso_cts", base=base, common_space_fraction=0.34)  # 12 in common, 2 and 1 of their own: mean 5
    array([[5., 0., 0.],
           [0., 5., 0.],
           [0., 0., 5.]], dtype=float32)
    """
    change = partial(_common_and_own, fraction=common_space_fraction)
    return per_matrix(change, scope.models, lambda_)


def _common(tasks: TaskMatrices) -> Matrix:
    return _isotropic(_sum(tasks))


def _sum(tasks: TaskMatrices) -> Parts:
    """Decompose the sum of the task matrices. What rounding left where they cancel has no directions.

    The spectral norm of rounding errors in independent entries grows as the square root of the dimensions.
    """
    norm = library(tasks.base).linalg.norm
    rows, columns = tasks.base.shape
    rounding = float(norm(tasks.base)) * (max(rows, 1) ** -0.5 + max(columns, 1) ** -0.5) * len(tasks) ** 0.5 / NEGLIGIBLE
    return singular(reduce(add, tasks), tasks.zero, size=max(rounding, *(float(norm(task)) for task in tasks)))


def _common_and_own(tasks: TaskMatrices, fraction: float) -> Matrix:
    directions, models = tasks.directions, len(tasks)
    each = min(round((directions - int(directions * fraction)) / models), directions // models)
    if not each:
        return _common(tasks)
    common = first(directions - models * each, _sum(tasks))
    own = [first(each, _rest(task, common[0], tasks.zero)) for task in tasks]
    return _isotropic(decorrelated([common, *own], tasks.zero))


def _rest(task: Matrix, u: Matrix, zero: float) -> Parts:
    """Decompose what is left of a task matrix without the directions u."""
    return singular(task - u @ (u.T @ task), zero, size=float(library(task).linalg.norm(task)))


def _isotropic(parts: Parts) -> Matrix:
    """Give all directions the mean of the singular values."""
    u, s, v = parts
    return u @ v * (float(s.sum()) / max(1, len(s)))
