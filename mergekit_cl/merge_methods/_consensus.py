"""The election and combination of `mergekit_cl.Consensus` as a formula, for methods that trim in ways of their own."""

from collections.abc import Sequence

import numpy as np

from mergekit_cl.registry import Values
from mergekit_cl.steps import Combine, Elect


def consensus(changes: Sequence[Values], weight: Sequence[float], elect: Elect | None, combine: Combine) -> Values:
    """Combine trimmed task vectors as `mergekit_cl.kernels.TaskVectors` says."""
    values = [w * change for w, change in zip(weight, changes, strict=True)]
    if elect is None:
        agree = [value != 0 for value in values]
    else:
        votes = values if elect == "weighted" else list(changes)
        positive = sum(votes) >= 0
        agree = [np.where(positive, vote > 0, vote < 0) for vote in votes]
    agreeing = [np.where(one, value, 0) for one, value in zip(agree, values, strict=True)]
    if combine == "max":
        largest = agreeing[0]
        for value in agreeing[1:]:
            largest = np.where(np.abs(value) > np.abs(largest), value, largest)
        return largest
    total = sum(agreeing)
    if combine == "sum":
        return total
    divisor = sum(np.where(one, w if combine == "weight_mean" else 1, 0) for one, w in zip(agree, weight, strict=True))
    return total / np.where(divisor == 0, 1, divisor)
