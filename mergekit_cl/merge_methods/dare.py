"""DARE: drop and rescale (Yu et al., 2023), alone and with the election of signs of TIES."""

from typing import Annotated, TypeAlias

from mergekit_cl.merge_methods._trim import Combining, Electing, Rescale, factors
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Advice, Fraction, PerModel, each, method
from mergekit_cl.steps import AtRandom, Consensus, Scope, Steps

Density: TypeAlias = Annotated[PerModel[Fraction], Advice("the paper keeps between 0.1 and 0.5")]


@method(paper="https://arxiv.org/abs/2311.03099", base="required")
def dare_linear(
    scope: Scope,
    *,
    density: Density,
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = "inverse_density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Steps:
    """Drop entries of each task vector at random, rescale the others, add up: ``base + lambda_ * sum(weight * task vector)``.

    An entry stays with the probability ``density``. Which ones stay depends on ``merge(seed=...)``, the name of the tensor and
    the number of the model alone. ``rescale="inverse_density"`` multiplies them by 1 / density, so that the expected result is
    task arithmetic (the paper, PEFT); "l1" by what restores the L1 norm of the task vector (mergekit); ``None`` leaves them.
    normalize divides the weights by their sum.

    >>> from mergekit_cl import merge
    >>> model, base = np.full(8, 3, np.float32), np.ones(8, np.float32)
    >>> merge([model], method="dare_linear", base=base, density=0.5, seed=1).tolist()  # 1 where dropped, else 1 + 2 / 0.5
    [1.0, 5.0, 5.0, 5.0, 1.0, 5.0, 5.0, 5.0]
    """
    parts = normalized(weight) if normalize else weight
    keep = AtRandom(density, scope.seed)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(parts, keep, rescaled, scale=lambda_)


@method(paper="https://arxiv.org/abs/2311.03099", base="required")
def dare_ties(
    scope: Scope,
    *,
    density: Density,
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = "inverse_density",
    elect: Electing = "weighted",
    combine: Combining = "sum",
    lambda_: float = 1.0,
) -> Steps:
    """Drop entries of each task vector at random, rescale the others, and combine those that have the elected sign.

    As `dare_linear`, with the election and the modes of `ties`. The default ``combine="sum"`` is mergekit's.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([3, 0]), np.float32([2, 5])], np.ones(2, np.float32)
    >>> merge(models, method="dare_ties", base=base, density=1)  # task vectors [2, -1] and [1, 4]
    array([4., 5.], dtype=float32)
    """
    keep = AtRandom(density, scope.seed)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(weight, keep, rescaled, elect, combine, lambda_)
