"""DELLA: drop by rank of magnitude, elect, fuse (Deep et al., 2024)."""

from collections.abc import Sequence
from functools import partial
from math import fsum
from typing import Any

import numpy as np

from mergekit_cl.errors import Faults, MergeError
from mergekit_cl.formula import difference, moved, ranks
from mergekit_cl.merge_methods._consensus import consensus
from mergekit_cl.merge_methods._trim import Combining, Electing, Rescale
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Fraction, PerModel, Values, each, method
from mergekit_cl.steps import Combine, Consensus, Elect, PerRow, Scope, Steps, SumOf


@method(paper="https://arxiv.org/abs/2406.11617", base="required")
def della(
    scope: Scope,
    *,
    density: PerModel[Fraction],
    epsilon: PerModel[Fraction] = each(0.15),
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = "inverse_density",
    elect: Electing = "weighted",
    combine: Combining = "weight_mean",
    lambda_: float = 1.0,
) -> Steps:
    """Drop entries of each task vector at random, small ones more often, rescale the others, elect signs and average.

    Formula:
        rank = place of |x_k - base| in its row, from 0 (smallest) to 1 (largest)
        p = density - epsilon + 2 * epsilon * rank
        d_k = (x_k - base) / p with the probability p, else 0
        out = base + lambda_ * average of the weight_k * d_k that have the elected sign

    The paper calls the dropping MAGPRUNE. Ranks are those within a row (the last dimension; a tensor of one dimension is one
    row). Entries of equal magnitude share the mean of their ranks; an entry that is alone in its row has the rank 1/2. Ranks
    are exact in every dtype. Which entries stay depends on ``merge(seed=...)``, the name of the tensor, the number of the model
    and the index of the entry alone, as in `dare_ties`. A model of density 1 is not trimmed, one of density 0 takes no part.

    Modes are those of `ties`. ``rescale="inverse_density"`` divides each entry by its own p, so that its expected value is what
    it was (the paper); "l1" restores the L1 norm of each task vector (mergekit; for ``scope="model"`` of the whole model);
    ``None`` leaves them.

    When to use:
        As `dare_ties`, for task vectors that can spare many of their entries: what is dropped is rather what is
        small. With epsilon 0 and ``combine="sum"`` it is `dare_ties`. Where the result must not depend on chance, use `ties`.

    Args:
        density: The part of the entries that stays, on average over a row.
        epsilon: How much likelier than on average the largest entry of a row is to stay, and the smallest to be dropped;
            density - epsilon and density + epsilon have to be in [0, 1].
        weight: The factor of each model; a model of weight 0 takes no part.
        rescale: What the entries that stay are multiplied with.
        elect: How the sign of an entry is elected, as in `ties`.
        combine: How the entries of that sign are combined, as in `ties`.
        lambda_: Multiplies what is added to the base.

    Raises:
        MergeError: density - epsilon or density + epsilon is not in [0, 1].

    >>> from mergekit_cl import merge
    >>> model, base = np.float32([[1, 2, 3]]), np.zeros((1, 3), np.float32)
    >>> merge([model], method="della", base=base, density=0.5, epsilon=0.25, seed=5)  # p 1/4, 1/2, 3/4: the last stays
    array([[0., 0., 4.]], dtype=float32)
    """
    return (yield from _della(scope, density, epsilon, weight, rescale, elect, combine, lambda_))


@method(paper="https://arxiv.org/abs/2406.11617", base="required")
def della_linear(
    scope: Scope,
    *,
    density: PerModel[Fraction],
    epsilon: PerModel[Fraction] = each(0.15),
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = "inverse_density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Steps:
    """Drop entries of each task vector at random, small ones more often, rescale the others, and add up.

    Formula:
        rank = place of |x_k - base| in its row, from 0 (smallest) to 1 (largest)
        p = density - epsilon + 2 * epsilon * rank
        d_k = (x_k - base) / p with the probability p, else 0
        out = base + lambda_ * sum_k(weight_k * d_k)

    As `della`, without the election of signs: the expected result is task arithmetic.

    When to use:
        As `dare_linear`, with more left of the largest entries.

    Args:
        density: The part of the entries that stays, on average over a row.
        epsilon: How much likelier than on average the largest entry of a row is to stay, and the smallest to be dropped.
        weight: The factor of each model; a model of weight 0 takes no part.
        rescale: What the entries that stay are multiplied with, as in `della`.
        normalize: Whether the weights are divided by their sum.
        lambda_: Multiplies what is added to the base.

    Raises:
        MergeError: density - epsilon or density + epsilon is not in [0, 1].

    >>> from mergekit_cl import merge
    >>> model, base = np.float32([[1, 2, 3]]), np.ones((1, 3), np.float32)
    >>> merge([model], method="della_linear", base=base, density=1, weight=0.5)  # nothing is dropped
    array([[1. , 1.5, 2. ]], dtype=float32)
    """
    parts = normalized(weight) if normalize else weight
    return (yield from _della(scope, density, epsilon, parts, rescale, None, "sum", lambda_))


def _della(
    scope: Scope, density: Sequence[float], epsilon: Sequence[float], weight: Sequence[float], rescale: str | None,
    elect: Elect | None, combine: Combine, lambda_: float,
) -> Steps:  # fmt: skip
    faults = Faults()
    for k, (d, e) in enumerate(zip(density, epsilon, strict=True)):
        if 0 < d < 1 and not (d - e >= 0 and d + e <= 1):
            with faults:
                raise MergeError(
                    f"model {k}: density={d:g} and epsilon={e:g}: density - epsilon and density + epsilon have to be in "
                    f"[0, 1]; choose an epsilon of at most {min(d, 1 - d):g}"
                )
    faults.report()
    read = [k for k in range(scope.models) if weight[k] and density[k]]
    if not read or all(density[k] == 1 for k in read):
        kept = [w if d else 0.0 for w, d in zip(weight, density, strict=True)]
        return Consensus(kept, elect=elect, combine=combine, scale=lambda_)
    chances = tuple((density[k], epsilon[k]) for k in read)
    factors = [1.0] * len(read)
    if rescale == "l1":
        norms = yield SumOf(partial(_norms, read=tuple(read), chances=chances), along="rows", seed=scope.seed)
        sums = np.array([fsum(column) for column in norms.T])  # the same in any order of the rows
        before, after = sums.reshape(2, -1).tolist()
        factors = [whole / rest if rest else 1.0 for whole, rest in zip(before, after, strict=True)]
    formula = partial(
        _merged, chances=chances, own=rescale == "inverse_density", factors=tuple(factors),
        weight=tuple(weight[k] for k in read), elect=elect, combine=combine, scale=lambda_,
    )  # fmt: skip
    return PerRow(formula, read=read, seed=scope.seed)


def _dropped(base: Values, model: Values, uniform: Values, chance: tuple[float, float], own: bool) -> tuple[Values, Values]:
    """Return a task vector before and after entries are dropped (and, with ``own``, divided by their probability)."""
    change = difference(model, base)
    density, epsilon = chance
    if density == 1:
        return change, change
    probability = (density - epsilon) + 2 * epsilon * ranks(np.abs(change))
    return change, np.where(uniform < probability, change / probability if own else change, 0)


def _norms(base: Values, models: list[Values], read: tuple[int, ...], chances: Any, uniform: list[Any]) -> list[Values]:
    pairs = [_dropped(base, models[k], uniform[k], chance, own=False) for k, chance in zip(read, chances, strict=True)]
    return [np.abs(pair[which]) for which in (0, 1) for pair in pairs]


def _merged(
    base: Values, models: list[Values], chances: Any, own: bool, factors: tuple[float, ...], weight: tuple[float, ...],
    elect: Elect | None, combine: Combine, scale: float, uniform: list[Any],
) -> Values:  # fmt: skip
    each_one = zip(models, uniform, chances, strict=True)
    kept = [_dropped(base, model, u, chance, own)[1] for model, u, chance in each_one]
    scaled = [factor * change if factor != 1 else change for factor, change in zip(factors, kept, strict=True)]
    return moved(base, scale * consensus(scaled, weight, elect, combine))
