"""Reinforced Agent Merging (Yuan et al., 2026): entries that one model alone has changed are kept whole."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, TypeAlias

import numpy as np

from mergekit_cl.formula import difference, moved
from mergekit_cl.registry import Between, Values, method
from mergekit_cl.steps import Elementwise, Scope, Steps, SumOf

Epsilon: TypeAlias = Annotated[float, Between(0)]


@method(paper="https://arxiv.org/abs/2601.13572", base="required")
def ram(base: Values, models: list[Values], *, epsilon: Epsilon = 1e-5) -> Values:
    """Add what the models have changed: a change that one model alone has made as it is, changes of several averaged.

    Formula:
        active_k = |x_k - base| > epsilon
        out = base + sum_k(active_k * (x_k - base)) / max(1, number of active_k)

    Changes of at most ``epsilon`` do not count, and are lost.

    When to use:
        To join models that were trained by reinforcement learning, which changes few entries, and each model others: an average
        would make their changes small. Where models change the same entries (supervised fine-tunes), it is an average of task
        vectors. `ramplus_tl` also strengthens what a model has changed alone; `ties` settles contradictory signs.

    Args:
        epsilon: The largest difference from the base that counts as none.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([3, 1, 2]), np.float32([1, 1, 6])], np.ones(3, np.float32)
    >>> merge(models, method="ram", base=base)  # the first model's alone, none, the mean of 1 and 5
    array([3., 1., 4.], dtype=float32)
    """
    return _merged(base, models, epsilon, [1.0] * len(models))


@method(paper="https://arxiv.org/abs/2601.13572", base="required")
def ramplus_tl(
    scope: Scope, *, r: Annotated[float, Between(0)] = 0.1, alpha: Annotated[float, Between(0)] = 0.2, epsilon: Epsilon = 1e-5
) -> Steps:
    """As `ram`, and what a model alone has changed grows by a factor, the more of its changes it shares with others.

    Formula:
        active_k = |x_k - base| > epsilon
        shared_k, unique_k = number of active_k that other models have too, that no other has
        factor_k = 1 + r * min(shared_k / unique_k, alpha)
        out = base + (factor_k * (x_k - base) where x_k alone is active, else the mean of the active differences)

    The numbers are counted in each tensor (tensor-local, hence the name); with ``scope="model"`` in the whole model.
    Where ``unique_k`` is zero nothing is multiplied by ``factor_k``.

    When to use:
        As `ram`, where models share many changes: what is averaged loses strength, and the factor makes up for it elsewhere.

    Args:
        r: How much the factor grows with the overlap.
        alpha: The overlap from which on it grows no more.
        epsilon: The largest difference from the base that counts as none.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([3, 1, 2]), np.float32([1, 1, 6])], np.ones(3, np.float32)
    >>> merge(models, method="ramplus_tl", base=base, r=0.5, alpha=0.5)  # shares 1 of 2: 1 + 2 * (1 + 0.5 * 0.5); 1; mean
    array([3.5, 1. , 4. ], dtype=float32)
    """
    counts = yield SumOf(partial(_counts, epsilon=epsilon))
    shared, unique = counts.reshape(2, scope.models)
    factors = 1 + r * np.clip(shared / np.maximum(unique, 1), 0, alpha)
    return Elementwise(partial(_merged, epsilon=epsilon, factors=tuple(factors.tolist())))


def _active(base: Values, models: list[Values], epsilon: float) -> tuple[list[Values], list[Values], Values]:
    """Return the differences, which of them count, and how many do."""
    changes = [difference(model, base) for model in models]
    active = [np.abs(change) > epsilon for change in changes]
    return changes, active, sum(active)


def _merged(base: Values, models: list[Values], epsilon: float, factors: Sequence[float]) -> Values:
    changes, active, number = _active(base, models, epsilon)
    alone = number == 1
    total = sum(
        np.where(one, np.where(alone, factor * change, change), 0)
        for change, one, factor in zip(changes, active, factors, strict=True)
    )
    return moved(base, total / np.maximum(number, 1))


def _counts(base: Values, models: list[Values], epsilon: float) -> list[Values]:
    _, active, number = _active(base, models, epsilon)
    return [one & (number > 1) for one in active] + [one & (number == 1) for one in active]
