"""OPCM: orthogonal projection-based continual merging (Tang et al., 2025)."""

from collections.abc import Generator
from functools import partial, reduce
from typing import Annotated, TypeAlias

import numpy as np

from mergekit_cl.merge_methods._directions import CANCELLED, norms
from mergekit_cl.merge_methods._matrices import Matrix, TaskMatrices, changed, library, singular
from mergekit_cl.registry import Between, Fraction, method
from mergekit_cl.steps import Gram, PerMatrix, Scope, Statistics, Sum

MatrixSteps: TypeAlias = Generator[Gram, Statistics, PerMatrix | Sum]


@method(paper="https://arxiv.org/abs/2501.09522", base="required", whole_model=False)
def opcm(scope: Scope, *, alpha: Fraction = 0.5, merged: Annotated[int, Between(1)] = 1) -> MatrixSteps:
    """Take models one after another, and add of each task matrix what is orthogonal to the directions of those before it.

    Formula:
        S_1 = sqrt(merged) * (x_1 - base)
        S_k = S_(k-1) + P(x_k - base),  k = 2 ... K
        out = base + S_K / lambda,  lambda = |S_K| / mean(|x_k - base|)
        P(D) = D - sum of (u_i^T D v_j) u_i v_j^T over i = j, and over i, j <= r
        u_i, v_i = singular vectors of S_(k-1);  r: how many of the first singular values make up at most alpha of the sum

    The order of the models matters: what they have in common is taken from the first. To rescale after each model, as the
    paper does, gives the same result: no projection depends on the length of S. ``P`` is that of the authors' code, where
    alpha=1 leaves out nothing but i = j, and here all that is within the space of the sum. The norms are those of a tensor,
    each of which has a lambda of its own; in that code one lambda, from the norms of whole models, serves all tensors.

    Tensors that are not matrices, those of four dimensions too, are summed without a projection and scaled in the same way;
    where their task vectors cancel, the result is the base. The authors' code projects the matrices of linear layers only, here
    embeddings are projected as well. Singular values that are zero, to rounding (4e-6 of the largest for float32), have no
    directions; the authors' code leaves out arbitrary ones. All is computed in float64.

    To go on with a result when the next model arrives, pass it as the first model, and in ``merged`` how many it holds. That
    repeats merging all of them where the task vectors are orthogonal and equally long, and approximates it otherwise: the
    length of the result is the mean of theirs, but the lambda that it was divided by is not in the weights; the square root of
    their number, which the paper finds it to be close to, stands in for it.

    When to use:
        When models arrive one after another and those before are no longer at hand: a merge needs the base, the last result,
        and the new model. Where all models are there at once, `tsv_m` and `iso_cts` treat them alike.

    Args:
        alpha: The share of the sum of the singular values whose directions are kept free of the next model: the more, the less
            of it is added. The authors use 0.5.
        merged: How many models the first one already holds.

    Raises:
        MergeError: The singular values of a matrix were not found.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([[3, 0], [0, 0]]), np.float32([[4, 0], [3, 0]])]  # of the second, 4 is in the first's direction
    >>> merge(models, method="opcm", base=np.zeros((2, 2), np.float32))  # the sum is sqrt(18) long, they 3 and 5: times 4
    array([[2.828427, 0.      ],
           [2.828427, 0.      ]], dtype=float32)
    """
    if scope.models == 1:
        return Sum([1.0])
    counts = np.array([merged] + [1] * (scope.models - 1), np.float64)
    gram = yield Gram(task_vectors=True)
    weights = np.sqrt(counts)
    scale = _scale(norms(gram), counts, float(np.sqrt(max(0.0, float(weights @ gram @ weights)))))
    otherwise = Sum((scale * weights).tolist(), 1 - scale * float(weights.sum()))
    return PerMatrix(partial(changed, change=partial(_projected, alpha=alpha, counts=counts)), otherwise)


def _projected(tasks: TaskMatrices, alpha: float, counts: Statistics) -> Matrix:
    """Merge task matrices in their order."""
    norm = library(tasks.base).linalg.norm
    lengths = np.array([float(norm(task)) for task in tasks])
    following = iter(tasks)
    total = reduce(partial(_next, alpha=alpha, zero=tasks.zero), following, float(np.sqrt(counts[0])) * next(following))
    return _scale(lengths, counts, float(norm(total))) * total


def _next(total: Matrix, task: Matrix, alpha: float, zero: float) -> Matrix:
    """Add a task matrix without what it has in common with the sum so far."""
    if not bool(task.any()):
        return total
    given = library(total)
    u, s, v = singular(total, zero)
    share = given.cumsum(s, axis=0)
    leading = int((share <= alpha * share[-1:]).sum())
    overlap = u.T @ task @ v.T
    common = given.diag(given.diagonal(overlap))
    common[:leading, :leading] = overlap[:leading, :leading]
    return total + task - u @ common @ v


def _scale(lengths: Statistics, counts: Statistics, length: float) -> float:
    """Return what gives the sum of task vectors their mean length; zero where they cancel."""
    mean = float(lengths @ counts) / float(counts.sum())
    return mean / length if length > CANCELLED * mean else 0.0
