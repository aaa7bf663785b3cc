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

    Of n entries the ``int(gamma * n)`` of largest magnitude go, and of the others the smallest, so that ``int(density * n)``
    stay; fewer of the largest go where there would not be as many left. Density 1 keeps everything. Entries that equal a cut
    are kept by hash, as in `ties`; rescale too is as there. normalize divides the weights by their sum.

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

    As `breadcrumbs`, with the election and the modes of `ties`. The default ``combine="sum"`` is mergekit's.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([9, -3, 2, 1]), np.float32([-1, 2, -8, 4])], np.zeros(4, np.float32)
    >>> merge(models, method="breadcrumbs_ties", base=base, density=0.5, gamma=0.25)  # [0, -3, 2, 0] and [0, 2, 0, 4]
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
