"""The weighted average of models (Model soups, Wortsman et al., 2022)."""

from collections.abc import Sequence
from math import fsum

from mergekit_cl.errors import MergeError
from mergekit_cl.registry import PerModel, each, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2203.05482")
def linear(scope: Scope, *, weight: PerModel[float] = each(1.0), normalize: bool = True) -> Sum:
    """Average the models: ``sum(weight_k * x_k) / sum(weight_k)``; without normalize the plain weighted sum.

    Formula:
        out = sum_k(weight_k * x_k) / sum_k(weight_k)
        out = sum_k(weight_k * x_k)                          normalize=False

    A model of weight zero takes no part and is not read. An average is computed about its heaviest model, so that entries in
    which all models agree keep their bits.

    When to use:
        For models fine-tuned from the same start on the same or related data, such as runs with other seeds or hyperparameters
        (a model soup). It is the baseline for everything else, and the cheapest. For models of different tasks use
        `task_arithmetic` or `ties`, for checkpoints of tasks that were learned in turn `sfa`.

    Args:
        weight: How much each model counts. Weights may be negative, but their sum must not be zero if they are normalised.
        normalize: Whether the weights are divided by their sum. Without it, weights that do not add up to one change the scale
            of the result.

    Raises:
        MergeError: The weights sum to zero and were to be normalised.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([1, 2]), np.float32([3, 2])], method="linear", weight=[3, 1])
    array([1.5, 2. ], dtype=float32)
    >>> merge([np.float32([1, 2]), np.float32([3, 2])], method="linear", weight=[3, 1], normalize=False)
    array([6., 8.], dtype=float32)
    """
    return Sum(normalized(weight) if normalize else weight)


def normalized(weights: Sequence[float], flag: str | None = "normalize") -> list[float]:
    """Scale weights so that they add up to one; ``flag`` is the parameter that asks for it, for the error."""
    largest = max(map(abs, weights)) or 1.0
    scaled = [weight / largest for weight in weights]  # the sum of huge weights would overflow
    total = fsum(scaled)
    if abs(total) <= 1e-12 * len(weights):
        advice = f"change them, or pass {flag}=False" if flag else "change them"
        raise MergeError(f"weight={list(weights)}: the weights sum to zero and cannot be normalised; {advice}")
    return [weight / total for weight in scaled]
