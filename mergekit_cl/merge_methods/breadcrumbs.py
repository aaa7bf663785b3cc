"""Model Breadcrumbs (Davari and Belilovsky, 2023), alone and with the election of signs of TIES."""

from collections.abc import Generator, Sequence
from typing import Annotated, Any, TypeAlias

from mergekit_cl.merge_methods._trim import Combining, Electing, Rescale, factors
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Advice, Fraction, PerModel, each, method
from mergekit_cl.steps import AtLeast, Consensus, KthMagnitude, Scope, Steps, Survey

Density: TypeAlias = Annotated[PerModel[Fraction], Advice("the paper keeps 0.14 with gamma 0.01, and 0.9 for small models")]


@method(paper="https://arxiv.org/abs/2312.06795", base="required")
def breadcrumbs(
    scope: Scope,
    *,
    density: Density,
    gamma: PerModel[Fraction] = each(0.01),
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = None,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Steps:
    """Drop the largest and the smallest entries of each task vector, add up: ``base + lambda_ * sum(weight * task vector)``.

    Formula:
        d_k = x_k - base without its int(gamma_k * n) entries of largest magnitude,
              and without as many of the smallest as leave int(density_k * n)
        out = base + lambda_ * sum_k(weight_k * factor_k * d_k)          factor_k: 1, or see rescale
        with normalize=True the weights are divided by their sum

    Where dropping ``int(gamma * n)`` of the largest would not leave as many as density asks for, fewer of them go. Density 1
    keeps everything. Of entries that equal a cut, a hash keeps as many as make their number right in expectation, as in `ties`.

    When to use:
        For many models of different tasks at once: besides the small changes it takes the largest ones, the outliers, out of
        each task vector, and the paper reports that the same density and gamma serve as tasks are added. With signs that
        disagree, `breadcrumbs_ties`. With gamma 0 it trims as `magnitude_prune` does, unless so little stays that it would be
        nothing.

    Args:
        density: The part of the entries of each task vector that stays.
        gamma: The part of the entries, those of largest magnitude, that is dropped.
        weight: How much of each task vector is added. A model of weight zero takes no part and is not read.
        rescale: What the entries that stay are multiplied with: "l1" restores the L1 norm that the task vector had (mergekit's
            rescale: true), "inverse_density" is 1 / density, ``None`` leaves them as they are.
        normalize: Whether the weights are divided by their sum.
        lambda_: The scale of what is added to the base.

    Raises:
        MergeError: The weights sum to zero and were to be normalised, or a density is too small for 1 / density.

    >>> from mergekit_cl import merge
    >>> model, base = np.float32([9, -3, 2, 1]), np.zeros(4, np.float32)
    >>> merge([model], method="breadcrumbs", base=base, density=0.5, gamma=0.25)
    array([ 0., -3.,  2.,  0.], dtype=float32)
    """
    parts = normalized(weight) if normalize else weight
    keep = yield from middle(scope, density, gamma, weight)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(parts, keep, rescaled, scale=lambda_)


@method(paper="https://arxiv.org/abs/2312.06795", base="required")
def breadcrumbs_ties(
    scope: Scope,
    *,
    density: Density,
    gamma: PerModel[Fraction] = each(0.01),
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = None,
    elect: Electing = "weighted",
    combine: Combining = "sum",
    lambda_: float = 1.0,
) -> Steps:
    """Drop the largest and the smallest entries of each task vector, and combine those that have the elected sign.

    Formula:
        d_k  = x_k - base without its int(gamma_k * n) entries of largest magnitude,
               and without as many of the smallest as leave int(density_k * n)
        v_k  = weight_k * factor_k * d_k                       factor_k: 1, or see rescale
        sign = + if sum_k(v_k) >= 0 else -                     unweighted: of sum_k(factor_k * d_k)
        A    = the models whose entry has that sign
        out  = base + lambda_ * sum_A(v_k)                     or see combine

    It drops as `breadcrumbs` does, and elects and combines as `ties` does. The default ``combine="sum"`` is mergekit's.

    When to use:
        As `ties`, where a few very large changes should not decide the outcome; as `breadcrumbs`, where signs disagree.

    Args:
        density: The part of the entries of each task vector that stays.
        gamma: The part of the entries, those of largest magnitude, that is dropped.
        weight: How much each model counts, in the vote and in the sum. A model of weight zero takes no part and is not read.
        rescale: What the entries that stay are multiplied with: "l1" restores the L1 norm that the task vector had (mergekit's
            rescale: true), "inverse_density" is 1 / density, ``None`` leaves them as they are.
        elect: Whose sign wins an entry: that of the sum of the task vectors times their weights ("weighted"), or of the task
            vectors themselves ("unweighted").
        combine: What becomes of the entries that agree: "sum" adds them up, "weight_mean" divides by their weights (mergekit's
            normalize: true), "count_mean" by their number, "max" takes the one of largest magnitude.
        lambda_: The scale of what is added to the base.

    Raises:
        MergeError: A density is too small for 1 / density, which rescale asks for.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([9, -3, 2, 1]), np.float32([-1, 2, -8, 4])], np.zeros(4, np.float32)
    >>> merge(models, method="breadcrumbs_ties", base=base, density=0.5, gamma=0.25)  # -3, 2 and 2, 4
    array([ 0., -3.,  2.,  4.], dtype=float32)
    """
    keep = yield from middle(scope, density, gamma, weight)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(weight, keep, rescaled, elect, combine, lambda_)


def middle(
    scope: Scope, density: Sequence[float], gamma: Sequence[float], weight: Sequence[float]
) -> Generator[Survey, Any, AtLeast]:
    """Find the entries between the largest and the smallest ones."""
    n = scope.elements
    upper: list[int | None] = []
    lower: list[int | None] = []
    for d, g, w in zip(density, gamma, weight, strict=True):
        left = int(d * n)
        dropped = min(int(g * n), n - left) if d < 1 else 0
        upper.append(dropped if w else None)
        lower.append(dropped + left if w else None)
    less, cuts = yield KthMagnitude([upper, lower])
    return AtLeast(cuts, less)
