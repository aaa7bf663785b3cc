"""Trimming of task vectors alone, the first step of TIES (Yadav et al., 2023)."""

from typing import Annotated

from mergekit_cl.merge_methods._trim import Rescale, factors, largest
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Advice, Fraction, PerModel, each, method
from mergekit_cl.steps import Consensus, Scope, Steps


@method(paper="https://arxiv.org/abs/2306.01708", base="required")
def magnitude_prune(
    scope: Scope,
    *,
    density: Annotated[PerModel[Fraction], Advice("the TIES paper uses 0.2")],
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = None,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Steps:
    """Trim each task vector to its largest entries, add up: ``base + lambda_ * sum(weight * task vector)``.

    Formula:
        d_k = x_k - base, of which the max(1, int(density_k * n)) entries of largest magnitude stay
        out = base + lambda_ * sum_k(weight_k * factor_k * d_k)          factor_k: 1, or see rescale
        with normalize=True the weights are divided by their sum

    Trimming is that of `ties`, entries that equal a cut included; there is no election.

    When to use:
        To make the task vector of a single model sparse, or to see what trimming alone does. For models of different tasks
        `ties` also settles their signs; `dare_linear` drops at random, and `breadcrumbs` drops the largest entries too.

    Args:
        density: The part of the entries of each task vector that stays.
        weight: How much of each task vector is added. A model of weight zero takes no part and is not read.
        rescale: What the entries that stay are multiplied with: "l1" restores the L1 norm that the task vector had (mergekit's
            rescale: true), "inverse_density" is 1 / density, ``None`` leaves them as they are.
        normalize: Whether the weights are divided by their sum.
        lambda_: The scale of what is added to the base.

    Raises:
        MergeError: The weights sum to zero and were to be normalised, or a density is too small for 1 / density.

    >>> from mergekit_cl import merge
    >>> model, base = np.float32([4, -1, 2, 0]), np.ones(4, np.float32)
    >>> merge([model], method="magnitude_prune", base=base, density=0.5)  # of 3, -2, 1, -1
    array([ 4., -1.,  1.,  1.], dtype=float32)
    """
    parts = normalized(weight) if normalize else weight
    keep = yield from largest(scope, density, weight)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(parts, keep, rescaled, scale=lambda_)
