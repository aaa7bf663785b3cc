"""TIES-Merging: trim, elect sign, merge (Yadav et al., 2023)."""

from typing import Annotated

from mergekit_cl.merge_methods._trim import Combining, Electing, Rescale, factors, largest
from mergekit_cl.registry import Advice, Fraction, PerModel, each, method
from mergekit_cl.steps import Consensus, Scope, Steps


@method(paper="https://arxiv.org/abs/2306.01708", base="required")
def ties(
    scope: Scope,
    *,
    density: Annotated[PerModel[Fraction], Advice("the paper uses 0.2")],
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = None,
    elect: Electing = "weighted",
    combine: Combining = "weight_mean",
    lambda_: float = 1.0,
) -> Steps:
    """Trim each task vector to its largest entries, elect a sign for every entry, average the entries that agree with it.

    A task vector is ``model - base``. Of its n entries the ``max(1, int(density * n))`` of largest magnitude stay; of entries
    that equal the smallest of these, a hash keeps as many as make that number in expectation. The sign of an entry is that of
    the sum of what is left (plus, if that is zero), and ``base + lambda_ * (average of the entries of that sign)`` the result.

    Peers differ in the details, so these have names:

    - ``scope``: "tensor" trims each tensor on its own, as mergekit and PEFT do; "model" the whole model, as the paper does.
    - ``elect``: "weighted" sums ``weight * entry`` (mergekit); "unweighted" the entries themselves (the paper, PEFT).
    - ``combine``: "weight_mean" divides ``sum(weight * entry)`` by the weights of the entries that agree (mergekit, normalize:
      true), "count_mean" by their number (the paper, PEFT), "sum" does not (normalize: false), "max" takes the largest.
    - ``rescale``: "l1" scales each trimmed task vector to the L1 norm that it had (mergekit, rescale: true),
      "inverse_density" by 1 / density; ``None`` leaves it.

    A model of weight zero takes no part. One that equals the base in an entry counts there neither in the sum nor in a divisor.

    >>> from mergekit_cl import merge
    >>> base, models = np.zeros(4, np.float32), [np.float32([4, -1, 0.5, 3]), np.float32([2, 3, 0.1, -5])]
    >>> merge(models, method="ties", base=base, density=0.5)  # left: [4, 0, 0, 3] and [0, 3, 0, -5]; elected: + + + -
    array([ 4.,  3.,  0., -5.], dtype=float32)
    """
    keep = yield from largest(scope, density, weight)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(weight, keep, rescaled, elect, combine, lambda_)
