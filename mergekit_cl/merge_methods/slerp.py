"""Spherical linear interpolation (Shoemake, 1985)."""

import numpy as np

from mergekit_cl.errors import MergeError
from mergekit_cl.merge_methods._directions import agree, great_circle, norms
from mergekit_cl.registry import method
from mergekit_cl.steps import Gram, Scope, Steps, Sum


@method(paper="https://dl.acm.org/doi/10.1145/325165.325242", base="optional", models=(1, 2))
def slerp(scope: Scope, *, t: float) -> Steps:
    """Interpolate along a great circle: ``(sin((1 - t) * angle) * base + sin(t * angle) * model) / sin(angle)``.

    Formula:
        angle = arccos(<a, b> / (|a| * |b|))             a the base, b the model; or two models
        out   = (sin((1 - t) * angle) * a + sin(t * angle) * b) / sin(angle)
        out   = (1 - t) * a + t * b                      if |cos(angle)| > 0.9995

    The angle is that between two tensors (with ``scope="model"``, two models), each taken as one vector. The vectors are not
    normalised. The ends are the base and a model, or, without ``base=``, the first and the second of two models.

    As in mergekit, vectors with ``|cos(angle)| > 0.9995`` are interpolated linearly, opposite ones too, and a norm of at
    most 1e-8 counts as 1: a tensor of zeros is at a right angle to all others. Unlike in mergekit, vectors that are equal
    are never scaled, however short they are; equal models are returned bit for bit.

    When to use:
        To blend two models where an average would shrink what lies between them: at an angle, points on the great circle keep
        the norm. Models fine-tuned from one base may well be closer than the 0.9995, and then they are averaged linearly;
        `nuslerp` with a base works with their differences from it, which are at larger angles. For more than two models,
        `karcher` or `multislerp`.

    Args:
        t: How far to go: 0 is the base (or the first model), 1 the model (or the second one); beyond these it goes on.
            It has no default, as in mergekit.

    Raises:
        MergeError: Neither a base and one model nor two models.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([0, 2])], method="slerp", base=np.float32([2, 0]), t=1 / 3)  # sin(60°), sin(30°)
    array([1.7320508, 1.       ], dtype=float32)
    """
    if scope.models + scope.has_base != 2:
        raise MergeError(
            f"slerp interpolates between two models, but got {scope.models + scope.has_base}: "
            "pass a base= and one model, or two models and no base"
        )
    gram = yield Gram()
    start, end = (norm if norm > 1e-8 else 1.0 for norm in norms(gram))
    cosine = gram[0, 1] / start / end
    weights = great_circle(t, cosine, (np.abs(cosine) > 0.9995) | agree(gram)).tolist()
    return Sum(weights[1:], base_weight=weights[0]) if scope.has_base else Sum(weights)
