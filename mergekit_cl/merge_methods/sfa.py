"""Sequential Fine-tuning with Averaging (Kleiman et al., 2025)."""

from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2501.05559", models=(2, None))
def sfa(scope: Scope, *, beta: Fraction = 0.5) -> Sum:
    """Average a model with its earlier self: ``theta <- beta * theta_o + (1 - beta) * theta``, oldest model first.

    Of two models the older one, ``theta_o``, has the weight beta. Of more (checkpoints of one training, oldest first) the
    rule is applied from one to the next: model 0 is averaged with model 1, the result with model 2, and so on. The same
    rule, inside a training loop, is `mergekit_cl.adapters.torch.SFA`.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([1, 2]), np.float32([3, 2])], method="sfa", beta=0.25)
    array([2.5, 2. ], dtype=float32)
    """
    return Sum(sequential_weights(beta, scope.models))


def sequential_weights(beta: float, models: int) -> list[float]:
    """Weigh each model, oldest first, when ``m <- beta * m + (1 - beta) * x`` runs through them.

    >>> sequential_weights(0.5, 3)
    [0.25, 0.25, 0.5]
    """
    ages = range(models - 1, -1, -1)
    return [beta**age if age == models - 1 else beta**age * (1 - beta) for age in ages]
