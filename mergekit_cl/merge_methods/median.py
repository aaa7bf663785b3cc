"""The median of the models, entry by entry."""

import numpy as np

from mergekit_cl.registry import Values, method


@method(paper="https://arxiv.org/abs/1803.01498")
def median(models: list[Values]) -> Values:
    """Take the median of the models, entry by entry; of an even number the mean of the two in the middle.

    Formula:
        out = median(x_1, ..., x_n)

    Models that agree keep their bits. Up to half of the models, less one, may hold anything in an entry, and the result stays
    between what the others hold there.

    When to use:
        To average many models of which some may be broken or trained on bad data (Yin et al. study it for training with faulty
        machines). `geometric_median` looks at whole tensors instead of entries; with models that can be trusted `linear` has
        the smaller error.

    >>> from mergekit_cl import merge
    >>> merge([np.float32([1, 8]), np.float32([2, 4]), np.float32([90, 6])], method="median")
    array([2., 6.], dtype=float32)
    """
    low, high = _middle(list(models))
    return np.where(low == high, low, 0.5 * low + 0.5 * high)


def _middle(values: list[Values]) -> tuple[Values, Values]:
    """Return the two entries in the middle (one and the same of an odd number), by dropping the least and the greatest."""
    while len(values) > 2:
        for k in range(len(values) - 1):  # the greatest comes last
            values[k], values[k + 1] = _in_order(values[k], values[k + 1])
        values.pop()
        for k in range(len(values) - 1, 0, -1):  # the least comes first
            values[k - 1], values[k] = _in_order(values[k - 1], values[k])
        values.pop(0)
    return values[0], values[-1]


def _in_order(one: Values, other: Values) -> tuple[Values, Values]:
    swapped = one > other
    return np.where(swapped, other, one), np.where(swapped, one, other)
