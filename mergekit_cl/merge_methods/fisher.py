"""Fisher-weighted averaging (Matena and Raffel, 2022)."""

from functools import partial
from typing import Annotated

import numpy as np

from mergekit_cl.formula import difference, moved
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Between, Models, PerModel, Values, each, method
from mergekit_cl.steps import Elementwise, Scope, Sum


@method(paper="https://arxiv.org/abs/2111.09832")
def fisher(
    scope: Scope,
    *,
    fisher: Models,
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    floor: Annotated[float, Between(0)] = 1e-6,
) -> Elementwise | Sum:
    """Average the models entry by entry, each weighed by the Fisher information that its training data have of the entry.

    Formula:
        f_k = weight_k * max(F_k, floor)
        out = sum_k(f_k * x_k) / sum_k(f_k)

    ``F_k`` is the diagonal of the Fisher information matrix of model k: the mean over examples of the squared gradient of the
    log likelihood, an array for each tensor (a model of the same names and shapes). It is computed in training code, before the
    merge. The result is the mode of the product of the models' posteriors, each taken as a Gaussian. Where the floor is above
    all of the ``F_k``, it is the weighted average. It is computed about the model of the largest ``f_k``, and entries in which
    the models agree keep their bits. A model of weight 0 is not read, nor is its Fisher information.

    A recipe cannot hold models as parameters, so there is none beside a result; the command line has ``-p fisher=F0,F1``.

    When to use:
        To merge models of one architecture for which you have data, or gradients: it knows which entries a task depends on,
        where `linear` treats all alike. Scale matters: a task with larger gradients counts more, so use weight, or normalise
        the ``F_k``.

    Args:
        fisher: The diagonal Fisher information of each model, as a list of models in the same order.
        weight: How much each model counts, a factor of its Fisher information.
        floor: The least Fisher information that an entry has (that of the authors' code). It has to be well below what you
            estimated; with 0, an entry of which no model has any becomes NaN.

    Raises:
        MergeError: All weights are zero.

    >>> from mergekit_cl import merge
    >>> models, information = [np.float32([1, 5]), np.float32([3, 7])], [np.float32([3, 0]), np.float32([1, 0])]
    >>> merge(models, method="fisher", fisher=information)  # (3 * 1 + 1 * 3) / 4, and the average
    array([1.5, 6. ], dtype=float32)
    """
    shares = normalized(weight, flag=None)
    read = [k for k, share in enumerate(shares) if share]
    if len(read) == 1:
        return Sum(shares)
    return Elementwise(partial(_averaged, weight=tuple(shares[k] for k in read), floor=floor), read=read)


def _averaged(models: list[Values], fisher: list[Values], weight: tuple[float, ...], floor: float) -> Values:
    shares = [w * np.maximum(information, floor) for w, information in zip(weight, fisher, strict=True)]
    reference, largest = models[0], shares[0]
    for model, share in zip(models[1:], shares[1:], strict=True):
        larger = share > largest
        reference, largest = np.where(larger, model, reference), np.where(larger, share, largest)
    pull = sum(share * difference(model, reference) for model, share in zip(models, shares, strict=True))
    return moved(reference, pull / sum(shares))
