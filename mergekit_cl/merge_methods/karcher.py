"""The Karcher mean of directions (Karcher, 1977)."""

from typing import Annotated

import numpy as np

from mergekit_cl.merge_methods._directions import CANCELLED, agree, norms
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Between, PerModel, each, method
from mergekit_cl.steps import Gram, Scope, Statistics, Steps, Sum


@method(paper="https://doi.org/10.1002/cpa.3160300502")
def karcher(
    scope: Scope,
    *,
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    max_iter: Annotated[int, Between(0)] = 10,
    tol: Annotated[float, Between(0)] = 1e-5,
) -> Steps:
    """Average on the sphere: the direction with the least ``sum(weight_k * angle_k**2)`` to all models, and their mean norm.

    Formula:
        u_k   = x_k / |x_k|,  w_k = weight_k / sum(weight)
        m     = sum_k(w_k * u_k), normalised; then at most max_iter times, until |v| <= tol:
        v     = sum_k(w_k * angle_k / sin(angle_k) * (u_k - cos(angle_k) * m)),  cos(angle_k) = <u_k, m>
        m     = cos(|v|) * m + sin(|v|) * v / |v|
        out   = sum_k(w_k * |x_k|) * m

    The vectors stay where they are: all iterations are on the coefficients of m, and cost nothing beside the two reads.

    Models of a norm of at most ``tol`` have no direction and take part with their norm alone. Where no model has one, or where
    the directions cancel (the length of their mean is no more than ``tol`` or 1e-6) so that no direction is the mean, the
    result is the weighted average of the models; mergekit returns zeros, or starts from the first model. A direction
    opposite to m pulls nowhere. Models that agree are returned bit for bit.

    When to use:
        For the mean of any number of models as `slerp` would have it for two: of two models it is the middle of their great
        circle. `multislerp` takes the normalised mean of the directions and stops there; the two differ little where the angles
        are small, and so does `linear`. To compare the models' differences from a base, `multislerp` has one.

    Args:
        weight: How much each model counts; divided by the sum. mergekit has equal weights only.
        max_iter: The most iterations; mergekit's default. With 0 the result is that of `multislerp`.
        tol: The iterations end when ``|v|`` is at most this; mergekit's default.

    Raises:
        MergeError: A weight is negative, or all are zero.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([6, 0]), np.float32([0, 3])]
    >>> merge(models, method="karcher", weight=[1, 2])  # norm 4, two thirds of the way: cos(60°), sin(60°)
    array([2.       , 3.4641016], dtype=float32)
    """
    part = np.array(normalized(weight, flag=None))
    gram = yield Gram()
    return Sum(_weights(gram, part, max_iter, tol).tolist())


def _weights(gram: Statistics, weight: Statistics, max_iter: int, tol: float) -> Statistics:
    part = weight != 0
    lengths = norms(gram)
    directed = part & (lengths > tol)
    if agree(gram[part][:, part]) or not directed.any():
        return weight
    inverse = np.divide(1.0, lengths, where=directed, out=np.zeros(len(lengths)))
    cosines = gram * inverse[:, None] * inverse
    pulls = np.where(directed, weight, 0) / weight[directed].sum()
    length = _norm(pulls, cosines)
    if length <= max(tol, CANCELLED):
        return weight
    mean = pulls / length
    opposite = 1 - max(tol, CANCELLED) / np.pi
    for _ in range(max_iter):
        cosine = np.clip(cosines @ mean, -1, 1)
        turns = np.arccos(cosine) / np.pi
        tangent = np.where(turns < opposite, pulls / np.sinc(turns), 0)
        tangent -= tangent @ cosine * mean
        step = _norm(tangent, cosines)
        if step <= tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean /= _norm(mean, cosines)
    return np.asarray(weight @ lengths * mean * inverse)


def _norm(coefficients: Statistics, cosines: Statistics) -> float:
    """Return the norm of a combination of unit vectors."""
    return float(np.sqrt(np.maximum(coefficients @ cosines @ coefficients, 0)))
