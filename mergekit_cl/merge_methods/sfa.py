"""Sequential Fine-tuning with Averaging (Kleiman et al., 2025)."""

from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2501.05559", models=(2, None))
def sfa(scope: Scope, *, beta: Fraction = 0.5) -> Sum:
    """Average a model with its earlier self: ``theta <- beta * theta_o + (1 - beta) * theta``, oldest model first.

    Formula:
        out = beta * x_0 + (1 - beta) * x_1                                   two models, oldest first
        out = beta * (beta * x_0 + (1 - beta) * x_1) + (1 - beta) * x_2       three, and so on

    Of two models the older one, ``theta_o``, has the weight beta. Of more (checkpoints of one training, oldest first) the
    rule is applied from one to the next: model 0 is averaged with model 1, the result with model 2, and so on. The same
    rule, inside a training loop, is `mergekit_cl.adapters.torch.SFA`.

    When to use:
        For a model that learns one task after the other and forgets: averaging with the checkpoint from before the task keeps
        more of the old tasks, at the price of some of the new one. Inside the training loop, every p steps, is how the paper
        does it. Of many tasks in turn the first ones end with the weight ``beta**age``; use `linear` to weigh all alike.

    Args:
        beta: The weight of the older model: 0 keeps the newest model, 1 the oldest.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([1, 2]), np.float32([3, 2])], method="sfa", beta=0.25)  # 0.25 * 1 + 0.75 * 3
    array([2.5, 2. ], dtype=float32)
    >>> merge([np.float32([0]), np.float32([4]), np.float32([8])], method="sfa")  # weights 1/4, 1/4, 1/2
    array([5.], dtype=float32)
    """
    return Sum(sequential_weights(beta, scope.models))


def sequential_weights(beta: float, models: int) -> list[float]:
    """Weigh each model, oldest first, when ``m <- beta * m + (1 - beta) * x`` runs through them.

    >>> sequential_weights(0.5, 3)
    [0.25, 0.25, 0.5]
    """
    ages = range(models - 1, -1, -1)
    return [beta**age if age == models - 1 else beta**age * (1 - beta) for age in ages]
