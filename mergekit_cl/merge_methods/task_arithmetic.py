"""Task arithmetic (Ilharco et al., 2022)."""

from math import fsum

from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import PerModel, each, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2212.04089", base="required")
def task_arithmetic(
    scope: Scope,
    *,
    weight: PerModel[float] = each(1.0),
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Sum:
    """Add up task vectors: ``base + lambda_ * sum(weight_k * (x_k - base))``; normalize divides by ``sum(weight_k)``.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([3, 2]), np.float32([1, 4])]
    >>> merge(models, method="task_arithmetic", base=np.float32([1, 2]), weight=[0.5, 1])
    array([2., 4.], dtype=float32)
    """
    weights = [lambda_ * w for w in (normalized(weight) if normalize else weight)]
    return Sum(weights, base_weight=1 - fsum(weights))
