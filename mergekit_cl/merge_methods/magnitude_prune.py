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

    Trimming and rescale are those of `ties`; there is no election. normalize divides the weights by their sum.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([4, -1, 2, 0])], method="magnitude_prune", base=np.float32([1, 1, 1, 1]), density=0.5)
    array([ 4., -1.,  1.,  1.], dtype=float32)
    """
    parts = normalized(weight) if normalize else weight
    keep = yield from largest(scope, density, weight)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(parts, keep, rescaled, scale=lambda_)
