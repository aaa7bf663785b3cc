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

    Formula:
        out = base + lambda_ * sum_k(weight_k * (x_k - base))
        out = base + lambda_ * sum_k(weight_k * (x_k - base)) / sum_k(weight_k)     normalize=True

    A task vector is the difference of a model from the base. It is computed as one weighted sum of the models and the base,
    whose weight is 1 minus those of the models.

    When to use:
        To give one model the abilities of several that were fine-tuned from the same base on different tasks, or, with a
        negative weight, to take one away. The scale matters: lambda_ is meant to be chosen on held-out data, and is usually
        smaller the more models there are. Where task vectors get in each other's way, `ties` and `breadcrumbs_ties` are made
        for it.

    Args:
        weight: How much of each task vector is added; a negative weight subtracts it.
        normalize: Whether the weights are divided by their sum, so that the task vectors are averaged.
        lambda_: The scale of the sum.

    Raises:
        MergeError: The weights sum to zero and were to be normalised.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([3, 2]), np.float32([1, 4])]  # task vectors [2, 0] and [0, 2]
    >>> merge(models, method="task_arithmetic", base=np.float32([1, 2]), weight=[0.5, 1])
    array([2., 4.], dtype=float32)
    >>> merge(models, method="task_arithmetic", base=np.float32([1, 2]), normalize=True, lambda_=3)
    array([4., 5.], dtype=float32)
    """
    weights = [lambda_ * w for w in (normalized(weight) if normalize else weight)]
    return Sum(weights, base_weight=1 - fsum(weights))
