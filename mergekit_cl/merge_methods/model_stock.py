"""Model stock (Jang et al., 2024)."""

import numpy as np

from mergekit_cl.merge_methods._directions import agree, norms, weighted
from mergekit_cl.registry import method
from mergekit_cl.steps import Along, Gram, Scope, Statistics, Steps


@method(paper="https://arxiv.org/abs/2403.19522", base="required", models=(2, None))
def model_stock(scope: Scope, *, filter_wise: bool = False) -> Steps:
    """Go from the base towards the average of N models: ``t = N * cos / (1 + (N - 1) * cos)``, cos between task vectors.

    Formula:
        cos = mean over all pairs j < k of cos(angle between x_j - base and x_k - base)
        t   = N * cos / (1 + (N - 1) * cos)
        out = t * mean_k(x_k) + (1 - t) * base

    The more the models agree, the closer the result is to their average: for cos = 1 it is the average, for cos = 0 the base.
    With cos below zero, t is negative.

    As in mergekit, a product of two norms below 1e-6 counts as 1e-6, so that task vectors of zeros, or next to it, are at a
    right angle to all others; and where ``|1 + (N - 1) * cos| < 1e-6`` the result is the base. Unlike in mergekit, models
    that are equal are returned as they are, bit for bit, however close they are to the base.

    When to use:
        For two or three fine-tuned models of the *same* task, such as runs with other seeds: the paper approximates with two of
        them what an average of many does. It has nothing to tune. Models of different tasks are nearly at right angles, and the
        result stays near the base; use `task_arithmetic` or `ties` for these.

    Args:
        filter_wise: Whether each row of a tensor (the last dimension) has a t of its own; otherwise a tensor has one. A
            tensor of one dimension is one row. Off by default, as in mergekit; the paper has one for each layer.

    Raises:
        MergeError: With ``scope="model"`` and filter_wise.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([3, 3, 0]), np.float32([3, 0, 3])]
    >>> merge(models, method="model_stock", base=np.float32([0, 0, 0]))  # cos 1/2, t 2/3
    array([2., 1., 1.], dtype=float32)
    """
    along: Along | None = "rows" if filter_wise else None
    gram = yield Gram(task_vectors=True, along=along)
    t = _interpolation(gram)
    return weighted(np.repeat(t[..., None] / scope.models, scope.models, axis=-1), 1 - t, along)


@np.errstate(invalid="ignore")
def _interpolation(gram: Statistics) -> Statistics:
    lengths, count = norms(gram), gram.shape[-1]
    one, other = np.triu_indices(count, 1)
    products = np.maximum(lengths[..., one] * lengths[..., other], 1e-6)
    cosine = np.clip(gram[..., one, other] / products, -1, 1).mean(axis=-1)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return np.where(agree(gram), 1.0, t)
