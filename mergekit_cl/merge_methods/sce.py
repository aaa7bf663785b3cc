"""SCE: select, calculate, erase (FuseChat, Wan et al., 2024)."""

from functools import partial
from typing import Any

import numpy as np

from mergekit_cl.formula import difference, moved
from mergekit_cl.registry import Fraction, Values, method
from mergekit_cl.steps import Cut, Elementwise, KthOf, Scope, Steps, SumOf


@method(paper="https://arxiv.org/abs/2408.07990", base="required")
def sce(scope: Scope, *, select_topk: Fraction = 1.0) -> Steps:
    """Select the entries in which the models differ most, weigh the models by how far they moved, erase minority signs.

    Formula:
        d_k = x_k - base where the variance of the models is among the largest, else 0
        weight_k = mean(d_k**2) / sum_j(mean(d_j**2))
        agree_k = d_k has the sign of sum_j(d_j)
        out = base + sum_k(weight_k * agree_k * d_k) / max(sum_k(weight_k * agree_k), 1e-6)

    - Select: of the entries whose variance over the models (population variance) is not zero, the part ``select_topk`` with the
      largest one stays, ``int(select_topk * number)`` entries; of those that equal the smallest of these a hash keeps the part
      that makes the number right in expectation. With 1 nothing is dropped, also where the variance is zero.
    - Calculate: the weights are those of a tensor (with ``scope="model"``, of the whole model). Where the sum of the mean
      squares is below 1e-6 all models weigh the same, as in mergekit.
    - Erase: a sum of zero counts as positive. An entry without change has no sign.

    When to use:
        To join fine-tunes of one base without choosing weights by hand: models that changed a tensor more count more there.
        Try select_topk around 0.1 where models share much that is noise. With weights that are chosen, use `ties`.

    Args:
        select_topk: Of the entries in which the models differ the part that is merged.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([3, 0, 1]), np.float32([-1, 0, 2])]  # mean squares 10/3 and 5/3: weights 2/3 and 1/3
    >>> merge(models, method="sce", base=np.zeros(3, np.float32))  # 3 alone; none; 2/3 * 1 + 1/3 * 2
    array([3.       , 0.       , 1.3333334], dtype=float32)
    """
    cut, seed = None, None
    if select_topk < 1:
        differing = (yield SumOf(_differs)).item()
        rank = int(round(differing) * select_topk)
        (cut,) = yield KthOf(_variance, [rank])
        seed = None if cut.share in (0, 1) else 0
    squares = yield SumOf(partial(_squares, cut=cut), seed=seed)
    means = squares / max(scope.elements, 1)
    total = means.sum()
    weights = means / total if total >= 1e-6 else np.full(scope.models, 1 / scope.models)
    return Elementwise(partial(_merged, cut=cut, weights=tuple(weights.tolist())), seed=seed)


def _variance(base: Values, models: list[Values]) -> Values:
    del base
    first, *others = models  # differences from one of them are exactly zero where all agree
    apart = [difference(model, first) for model in others]
    mean = sum(apart) / len(models)
    return (mean * mean + sum((each - mean) * (each - mean) for each in apart)) / len(models)


def _differs(base: Values, models: list[Values]) -> Values:
    return _variance(base, models) != 0


def _selected(base: Values, models: list[Values], cut: Cut | None, uniform: Any) -> list[Values]:
    changes = [difference(model, base) for model in models]
    if cut is None:
        return changes
    variance = _variance(base, models)
    if uniform is not None:
        stays = (variance > cut.magnitude) | ((variance == cut.magnitude) & (uniform[0] < cut.share))
    else:
        stays = variance >= cut.magnitude
    return [np.where(stays, change, 0) for change in changes]


def _squares(base: Values, models: list[Values], cut: Cut | None, uniform: Any = None) -> list[Values]:
    return [change * change for change in _selected(base, models, cut, uniform)]


def _merged(base: Values, models: list[Values], cut: Cut | None, weights: tuple[float, ...], uniform: Any = None) -> Values:
    changes = _selected(base, models, cut, uniform)
    positive = sum(changes) >= 0
    agree = [np.where(positive, change > 0, change < 0) for change in changes]
    total = sum(np.where(one, weight * change, 0) for one, weight, change in zip(agree, weights, changes, strict=True))
    share = sum(np.where(one, weight, 0) for one, weight in zip(agree, weights, strict=True))
    return moved(base, total / np.maximum(share, 1e-6))
