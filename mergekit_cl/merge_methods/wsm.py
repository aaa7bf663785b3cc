"""Warmup-Stable and Merge: averages that stand in for a learning-rate decay (Tian et al., 2025)."""

from math import pi, sin, sqrt
from typing import Literal, TypeAlias

from mergekit_cl.registry import Fraction, method
from mergekit_cl.steps import Scope, Sum

Decay: TypeAlias = Literal["linear", "cosine", "1-sqrt"]


@method(paper="https://arxiv.org/abs/2507.17634")
def wsm(scope: Scope, *, decay: Decay = "1-sqrt", final_ratio: Fraction = 0.0) -> Sum:
    """Average checkpoints of a constant learning rate, oldest first, as if the rate had decayed (Warmup-Stable and Merge).

    Formula:
        s(t) = 1 - t                   (linear)
        s(t) = (1 + cos(pi * t)) / 2   (cosine)
        s(t) = 1 - sqrt(t)             (1-sqrt)
        w_j = final_ratio + (1 - final_ratio) * s(j / n)   for j = 1 .. n - 1;   w_0 = 1, w_n = 0
        out = sum_{k = 0 .. n-1}((w_k - w_{k+1}) * x_k)

    Written with the update ``g_j = x_j - x_{j-1}`` before checkpoint j, the result is ``x_0 + sum_j(w_j * g_j)``: every update
    is scaled as a decaying learning rate would have scaled it, if the gradients had been the same (theorem 3.1). The paper
    leaves open at which points of the schedule the updates lie. Here n checkpoints make n steps of it, of which the last, to
    ``s(1) = 0``, has no update: so the linear decay to zero is the uniform average, the paper's "mean" merging, and
    every checkpoint takes part. The paper's EMA merging is `ema`.

    "1-sqrt" falls fast at first, so that the oldest checkpoint weighs most, ``1 / sqrt(n)``; "cosine" weighs those in the
    middle most. ``final_ratio=1``, no decay at all, is the newest checkpoint, bit for bit.

    When to use:
        At the end of the constant phase of a warmup-stable training, instead of the decay, or to see during the training what
        a decay would give. Pass the checkpoints since the point at which the decay would have started: how long that window
        is matters more than how many checkpoints lie in it. In the paper "1-sqrt" was slightly better than "linear", and both
        were better than EMA merging; merging after a real decay gained nothing.

    Args:
        decay: The shape of the decay that is stood in for.
        final_ratio: The learning rate at which the decay would end, as a part of the constant one.

    >>> from mergekit_cl import merge
    >>> checkpoints = [np.float32([0, 0]), np.float32([4, 0]), np.float32([4, 4]), np.float32([4, 8])]
    >>> merge(checkpoints, method="wsm", decay="linear")  # the updates count 3/4, 1/2 and 1/4
    array([3., 3.], dtype=float32)
    >>> merge(checkpoints, method="wsm", decay="linear", final_ratio=0.5)  # 7/8, 3/4 and 5/8
    array([3.5, 5.5], dtype=float32)
    """
    n = scope.models
    weights = [(1 - final_ratio) * _fall(decay, k, n) for k in range(n)]
    weights[-1] += final_ratio
    return Sum(weights)


def _fall(decay: Decay, k: int, n: int) -> float:
    """How much the schedule falls from ``k / n`` to ``(k + 1) / n``, without cancellation.

    >>> [round(_fall("1-sqrt", k, 4), 6) for k in (0, 3)]  # 1 - 1/2, and 1 - sqrt(3/4)
    [0.5, 0.133975]
    """
    if decay == "linear":
        return 1 / n
    if decay == "cosine":
        return sin(pi * (k + 0.5) / n) * sin(pi / (2 * n))
    return 1 / ((sqrt(k + 1) + sqrt(k)) * sqrt(n))
