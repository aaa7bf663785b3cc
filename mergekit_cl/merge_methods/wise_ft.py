"""WiSE-FT, weight-space ensembles for fine-tuning (Wortsman et al., 2021)."""

from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2109.01903", base="required", models=(1, 1))
def wise_ft(scope: Scope, *, alpha: Fraction = 0.5) -> Sum:
    """Interpolate from the base to a fine-tuned model: ``base + alpha * (model - base)``.

    Formula:
        out = base + alpha * (x - base)

    When to use:
        For a fine-tuned model that has lost some of what its base could do: the paper found that models in between are more
        robust under shifts of the distribution and keep the accuracy on the new data. alpha costs no training; choose it on
        held-out data of both kinds, or take 0.5, as the paper does without. For several models at once, `task_arithmetic`; to
        go along a great circle, `slerp`.

    Args:
        alpha: How far to go: 0 is the base, 1 the fine-tuned model.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([3, 2])], method="wise_ft", base=np.float32([1, 2]), alpha=0.75)
    array([2.5, 2. ], dtype=float32)
    """
    return Sum([alpha], base_weight=1 - alpha)
