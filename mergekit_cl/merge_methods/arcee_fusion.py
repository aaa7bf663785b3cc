"""Arcee Fusion: take over only what matters most."""

from functools import partial
from typing import Any

import numpy as np

from mergekit_cl.registry import Values, method
from mergekit_cl.steps import Elementwise, KthOf, Scope, Steps, SumOf

_EPSILON = 1e-8


@method(
    paper="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    base="required",
    models=(1, 1),
    whole_model=False,
)
def arcee_fusion(scope: Scope) -> Steps:
    """Take over the entries of a model whose importance stands out, by how far they moved and how much their row did.

    Formula:
        p, q = softmax(model, last dimension) + 1e-8, softmax(base, last dimension) + 1e-8
        importance = |model - base| * sum over the row(p * log(p / q))
        threshold = median(importance) + 1.5 * (third quartile - first quartile)
        out = model where importance >= threshold, else base

    Quartiles are entries of the sorted importances of a tensor, the one of index ``floor(q * (n - 1))``, exact also for large
    tensors, of which mergekit looks at a random million. Sums over rows and the softmax are computed in float64. Where at least
    three quarters of the entries have the importance zero (the models agree there) the threshold is zero, and the result is the
    model, as in mergekit. A tensor of one dimension is one row.

    When to use:
        To update a model with a fine-tune of it, leaving out the many small changes. There is nothing to tune.
        To say how much stays, use `magnitude_prune` or `ties`.

    >>> from mergekit_cl import merge
    >>> base = np.zeros(5, np.float32)
    >>> merge([np.float32([1, 2, 3, 2, 9])], method="arcee_fusion", base=base)  # in units: 1 2 2 3 9, cut 2 + 1.5 * (3 - 2)
    array([0., 0., 0., 0., 9.], dtype=float32)
    """
    divergence = yield SumOf(_divergence, along="rows", wide=True)
    rows = [np.maximum(divergence[:, 0], 0)]
    last = scope.elements - 1
    if last < 0:
        return Elementwise(partial(_fused, threshold=0.0), rows=rows)
    ranks = [scope.elements - quarter * last // 4 for quarter in (1, 2, 3)]  # from the largest, as indices are from the least
    first, median, third = (cut.magnitude for cut in (yield KthOf(_importance, ranks, rows=rows)))
    return Elementwise(partial(_fused, threshold=median + 1.5 * (third - first)), rows=rows)


def _softmax(values: Values) -> Values:
    powers = np.exp(values - np.max(values, axis=-1, keepdims=True))
    return powers * (1 / np.sum(powers, axis=-1, keepdims=True))


def _divergence(base: Values, models: list[Values]) -> Values:
    p, q = _softmax(models[0]) + _EPSILON, _softmax(base) + _EPSILON
    return p * np.log(p / q)


def _importance(base: Values, models: list[Values], rows: list[Any]) -> Values:
    return np.abs(models[0] - base) * rows[0]


def _fused(base: Values, models: list[Values], rows: list[Any], threshold: float) -> Values:
    return np.where(_importance(base, models, rows) >= threshold, models[0], base)
