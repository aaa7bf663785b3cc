"""Spherical interpolation by weights, of models or of task vectors (mergekit)."""

import numpy as np

from mergekit_cl.merge_methods._directions import agree, great_circle, norms, weighted
from mergekit_cl.registry import PerModel, each, method
from mergekit_cl.steps import Along, Gram, Scope, Statistics, Steps

_OPPOSITE = -1 + 2.0**-25


@method(paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md", base="optional", models=(2, 2))
def nuslerp(
    scope: Scope,
    *,
    weight: PerModel[float] = each(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Steps:
    """Interpolate two models (with a base: their task vectors) along a great circle, ``t = weight_1 / (weight_0 + weight_1)``.

    Formula:
        t     = weight_1 / (weight_0 + weight_1)
        d_k   = x_k, or x_k - base where there is a base
        angle = arccos(<d_0, d_1> / (|d_0| * |d_1|))
        out   = (sin((1 - t) * angle) * d_0 + sin(t * angle) * d_1) / sin(angle)       plus the base

    The vectors are not normalised, as in `slerp`; small angles are no special case, unlike in `slerp`.

    As in mergekit, norms below 1e-7 count as 1e-7: a vector of zeros (a model equal to the base) is at a right angle to all
    others. Vectors that are opposite to within the rounding of float32 (``1 - cos(angle)**2 <= 2**-24``) have no one great
    circle, and are interpolated linearly; mergekit's own limit of 1e-16 is below what float32 can tell. Vectors that are
    equal are interpolated linearly too, however short: models that agree are returned bit for bit.

    When to use:
        As `slerp`, given as weights, and with a base between task vectors, where the direction that models share with their
        base does not drown the differences. Each row may have an angle of its own. For more than two models, `multislerp`.

    Args:
        weight: How near the result is to each model. May be negative, to go beyond the models. Where the weights add up to less
            than 1e-6, t is 0.5. Defaults to equal weights; mergekit has no default.
        nuslerp_flatten: True takes a tensor for one vector. False takes each of its rows (the last dimension) for a vector
            with an angle of its own. A tensor of one dimension is one vector.
        nuslerp_row_wise: Without flatten, vectors run along the first dimension instead of the last. (The name is
            mergekit's.) With flatten it has no effect.

    Raises:
        MergeError: With ``scope="model"`` and without flatten.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([2, 0]), np.float32([0, 2])]
    >>> merge(models, method="nuslerp", weight=[2, 1])  # sin(60°), sin(30°)
    array([1.7320508, 1.       ], dtype=float32)
    >>> merge([model + 1 for model in models], method="nuslerp", weight=[2, 1], base=np.float32([1, 1]))
    array([2.732051, 2.      ], dtype=float32)
    """
    along: Along | None = None if nuslerp_flatten else "columns" if nuslerp_row_wise else "rows"
    gram = yield Gram(task_vectors=scope.has_base, along=along)
    first, second = weight[0] / 2, weight[1] / 2  # the sum of huge weights would overflow
    t = second / (first + second) if abs(first + second) >= 0.5e-6 else 0.5
    weights = _weights(gram, t)
    return weighted(weights, 1 - weights.sum(axis=-1) if scope.has_base else np.zeros(weights.shape[:-1]), along)


@np.errstate(invalid="ignore")
def _weights(gram: Statistics, t: float) -> Statistics:
    lengths = np.maximum(norms(gram), 1e-7)
    cosine = gram[..., 0, 1] / lengths[..., 0] / lengths[..., 1]
    return great_circle(t, cosine, (cosine <= _OPPOSITE) | agree(gram))
