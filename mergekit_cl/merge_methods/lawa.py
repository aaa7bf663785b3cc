"""Latest weight averaging (Kaddour, 2022; Sanyal et al., 2023)."""

from typing import Annotated

from mergekit_cl.registry import Advice, Between, method
from mergekit_cl.steps import Scope, Sum


@method(paper="https://arxiv.org/abs/2209.14981")
def lawa(
    scope: Scope,
    *,
    window: Annotated[int, Between(1), Advice("how many of the latest checkpoints are averaged")],
    every: Annotated[int, Between(1)] = 1,
) -> Sum:
    """Average the latest checkpoints of a training, oldest first, with equal weights (LAWA).

    Formula:
        latest = {n - 1, n - 1 - every, n - 1 - 2 * every, ...}, the first `window` of these that are >= 0
        out = sum_{k in latest}(x_k) / |latest|

    Where there are fewer checkpoints than the window asks for, as early in a training, the average is of those that there
    are. The others are not read. A window of one is the newest checkpoint, bit for bit; a window over all of them is `linear`
    with equal weights.

    When to use:
        For a training that has not converged, at a high learning rate: the average reaches a loss that the training
        itself reaches much later. Checkpoints that are many steps apart gain more (arXiv:2306.03241): thin out a dense list
        with `every`. To weigh checkpoints by a schedule use `wsm`, by age `ema`.

    Args:
        window: The most checkpoints that are averaged.
        every: The distance between them: each `every`-th is taken, counted back from the newest, which always takes part.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([9, 9]), np.float32([1, 2]), np.float32([3, 2])], method="lawa", window=2)
    array([2., 2.], dtype=float32)
    >>> merge([np.float32([9, 9]), np.float32([1, 2]), np.float32([3, 2])], method="lawa", window=2, every=2)
    array([6. , 5.5], dtype=float32)
    """
    latest = range(scope.models - 1, -1, -every)[:window]
    return Sum([1 / len(latest) if k in latest else 0.0 for k in range(scope.models)])
