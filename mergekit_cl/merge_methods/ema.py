"""The exponential moving average of checkpoints (Morales-Brotons et al., 2024)."""

from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2411.18704")
def ema(scope: Scope, *, decay: Fraction = 0.9) -> Sum:
    """Average checkpoints, oldest first, by ``decay**age``: an exponential moving average with bias correction.

    Formula:
        weight_k = (1 - decay) * decay**age_k / (1 - decay**n),   age_k = n - 1 - k
        out = sum_k(weight_k * x_k)

    This is what ``m <- decay * m + (1 - decay) * x`` makes of n checkpoints when it starts at zero and is divided by
    ``1 - decay**n`` at the end, as Adam does with its moments (arXiv:1412.6980, section 3): the weights add up to one.
    ``decay=1``, where that is 0 / 0, is the limit, the uniform average; ``decay=0`` is the newest checkpoint, bit for bit. An
    average that starts at the first checkpoint instead, which then keeps the weight ``decay**(n - 1)``, is `sfa`.

    When to use:
        For checkpoints of one training at a learning rate that is constant or falls slowly, where the newest should count
        most. The decay is per checkpoint, not per step: ``decay_of_a_step**steps_between_checkpoints``. To stand in for a
        learning-rate decay, `wsm` and `lawa` were found to be better than this average.

    Args:
        decay: How much a checkpoint weighs relative to the next one. It remembers about ``1 / (1 - decay)`` checkpoints: 0.9
            the last ten.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([0, 3]), np.float32([3, 0])], method="ema", decay=0.5)  # weights 1/3 and 2/3
    array([2., 1.], dtype=float32)
    """
    return Sum(normalized([decay**age for age in range(scope.models - 1, -1, -1)], flag=None))
