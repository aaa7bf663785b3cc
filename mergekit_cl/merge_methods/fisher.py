"""Fisher-weighted averaging (Matena and Raffel, 2022)."""

from typing import Annotated

import numpy as np

from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Between, Models, PerModel, Values, each, method


@method(paper="https://arxiv.org/abs/2111.09832")
def fisher(
    models: list[Values],
    *,
    fisher: Models,
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    floor: Annotated[float, Between(0)] = 1e-6,
) -> Values:
    """Average the models entry by entry, each weighed by the Fisher information that its training data have of the entry.

    Formula:
        f_k = weight_k * max(F_k, floor)
        out = sum_k(f_k * x_k) / sum_k(f_k)

    ``F_k`` is the diagonal of the Fisher information matrix of model k: the mean over examples of the squared gradient of the
    log likelihood, an array for each tensor (a model of the same names and shapes). It is computed in training code, before the
    merge. The result is the mode of the product of the models' posteriors, each taken as a Gaussian. Where the floor is above
    all of the ``F_k``, it is the weighted average. Entries in which the models agree keep their bits.

    When to use:
        To merge models of one architecture for which you have data, or gradients: it knows which entries a task depends on,
        where `linear` treats all alike. Scale matters: a task with larger gradients counts more, so use weight, or normalise
        the ``F_k``.

    Args:
        fisher: The diagonal Fisher information of each model, as a list of models in the same order.
        weight: How much each model counts, a factor of its Fisher information.
        floor: The least Fisher information that an entry has (that of the authors' code). It has to be well below what you
            estimated; with 0, an entry of which no model has any becomes NaN.

    >>> from mergekit_cl import merge
    >>> models, information = [np.float32([1, 5]), np.float32([3, 7])], [np.float32([3, 0]), np.float32([1, 0])]
    >>> merge(models, method="fisher", fisher=information)  # (3 * 1 + 1 * 3) / 4, and the average
    array([1.5, 6. ], dtype=float32)
    """
    normalized(weight, flag=None)  # refuses weights that are all zero
    shares = [w * np.maximum(information, floor) for w, information in zip(weight, fisher, strict=True)]
    first, *others = models
    pull = sum(share * np.where(model == first, 0, model - first) for share, model in zip(shares[1:], others, strict=True))
    change = pull / sum(shares)
    return np.where(change == 0, first, first + change) if others else first
