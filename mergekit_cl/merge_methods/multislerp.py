"""Interpolation of the directions of any number of models (mergekit)."""

from math import copysign, fsum
from typing import Annotated

import numpy as np

from mergekit_cl.merge_methods._directions import CANCELLED, agree, norms
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Between, PerModel, each, method
from mergekit_cl.steps import Gram, Scope, Statistics, Steps, Sum


@method(paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md", base="optional")
def multislerp(
    scope: Scope,
    *,
    weight: PerModel[float] = each(1.0),
    normalize_weights: bool = True,
    eps: Annotated[float, Between(0)] = 1e-8,
) -> Steps:
    """Average directions and norms apart: ``sum(weight_k * x_k / norm_k)`` scaled to the norm ``sum(weight_k * norm_k)``.

    Formula:
        d_k = x_k, or x_k - base where there is a base
        m   = sum_k(weight_k * d_k / |d_k|)
        out = sum_k(weight_k * |d_k|) * m / |m|                  plus the base
        with normalize_weights=True the weights are divided by their sum

    mergekit writes this as a projection to the tangent space at the mean direction and back; the weighted sum in that space is
    zero, so the mean direction is the result. The spherical mean, which minimises the angles, is `karcher`.

    Where the directions cancel, there is no mean direction, and the result is the weighted sum of the vectors, for any number
    of models. (They do where the weighted mean of the unit vectors is no longer than ``eps``, or than 1e-6 times the sum of
    the weights' magnitudes: less than the rounding of float32 could explain. mergekit knows ``eps`` alone, and fails for more
    than two models.) One model is returned as it is, whatever its weight, as by mergekit. A vector of zeros has no direction,
    but its norm counts. Models that agree are returned bit for bit where the weights add up to one.

    When to use:
        For three models and more where `slerp` would serve two, or for task vectors of very different lengths: here the lengths
        do not decide the direction, as they do in `linear` and `task_arithmetic`. It is close to `karcher` and needs no
        iterations.

    Args:
        weight: How much each model counts, of any sign. Defaults to equal weights; mergekit has no default.
        normalize_weights: Whether the weights are divided by their sum.
        eps: Added to each norm that is divided by; mergekit's default.

    Raises:
        MergeError: The weights sum to zero and were to be normalised.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([5, 0]), np.float32([0, 5])]
    >>> merge(models, method="multislerp", weight=[3, 4])  # norm 5, direction (3/7, 4/7)
    array([3., 4.], dtype=float32)
    >>> merge(models, method="multislerp", weight=[3, 4], normalize_weights=False)
    array([21., 28.], dtype=float32)
    """
    if scope.models == 1:
        return Sum([1.0])
    parts = np.array(normalized(weight, "normalize_weights") if normalize_weights else weight)
    gram = yield Gram(task_vectors=scope.has_base)
    weights = _weights(gram, parts, eps)
    return Sum(weights.tolist(), base_weight=1 - fsum(weights) if scope.has_base else 0.0)


@np.errstate(over="ignore", invalid="ignore")
def _weights(gram: Statistics, weight: Statistics, eps: float) -> Statistics:
    part = weight != 0
    if agree(gram[part][:, part]):
        return copysign(1, weight.sum()) * weight
    lengths = norms(gram)
    inverse = np.divide(1.0, lengths + eps, where=lengths > 0, out=np.zeros(len(lengths)))
    cosines = gram * inverse[:, None] * inverse
    length = np.sqrt(np.maximum(weight @ cosines @ weight, 0))
    if length <= max(eps, CANCELLED * np.abs(weight).sum()):
        return weight
    return np.asarray(weight @ lengths / length * inverse * weight)
