"""MagMax (Marczak et al., 2024)."""

import numpy as np

from mergekit_cl.formula import difference, moved
from mergekit_cl.registry import Values, method


@method(paper="https://arxiv.org/abs/2407.06322", base="required")
def magmax(base: Values, models: list[Values], *, lambda_: float = 1.0) -> Values:
    """Take, entry by entry, the change of largest magnitude that any of the models has made.

    Formula:
        d_k = x_k - base
        out = base + lambda_ * (the d_k of largest magnitude; of equal ones that of the first model)

    In the paper the models are fine-tuned one after the other, each from the one before, and all changes are those from the
    pretrained model.

    When to use:
        After sequential fine-tuning, to keep of every task what it changed most. It needs no parameters but ``lambda_``, which
        the paper chooses on validation data. With models that were fine-tuned apart from each other,
        compare with `ties`.

    Args:
        lambda_: Multiplies what is added to the base.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([3, 1, 0]), np.float32([2, -4, 1])], np.ones(3, np.float32)
    >>> merge(models, method="magmax", base=base, lambda_=0.5)  # changes [2, 0, -1] and [1, -5, 0]
    array([ 2. , -1.5,  0.5], dtype=float32)
    """
    largest, *changes = (difference(model, base) for model in models)
    for change in changes:
        largest = np.where(np.abs(change) > np.abs(largest), change, largest)
    return moved(base, lambda_ * largest)
