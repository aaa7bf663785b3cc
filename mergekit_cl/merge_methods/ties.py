"""TIES-Merging: trim, elect sign, merge (Yadav et al., 2023)."""

from typing import Annotated

from mergekit_cl.merge_methods._trim import Combining, Electing, Rescale, factors, largest
from mergekit_cl.registry import Advice, Fraction, PerModel, each, method
from mergekit_cl.steps import Consensus, Scope, Steps


@method(paper="https://arxiv.org/abs/2306.01708", base="required")
def ties(
    scope: Scope,
    *,
    density: Annotated[PerModel[Fraction], Advice("the paper uses 0.2")],
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = None,
    elect: Electing = "weighted",
    combine: Combining = "weight_mean",
    lambda_: float = 1.0,
) -> Steps:
    """Trim each task vector to its largest entries, elect a sign for every entry, average the entries that agree with it.

    Formula:
        d_k  = x_k - base, of which the max(1, int(density_k * n)) entries of largest magnitude stay
        v_k  = weight_k * factor_k * d_k                       factor_k: 1, or see rescale
        sign = + if sum_k(v_k) >= 0 else -                     unweighted: of sum_k(factor_k * d_k)
        A    = the models whose entry has that sign
        out  = base + lambda_ * sum_A(v_k) / sum_A(weight_k)   or see combine

    Of entries that equal the smallest one that stays (bfloat16 fine-tunes are full of them) a hash keeps as many as make their
    number right in expectation. An entry that equals the base's counts neither in the sum nor in a divisor. Where all cancel,
    or nothing stays, the base's entry is returned bit for bit. Density 0 returns the base, density 1 trims nothing.

    Tools disagree on details, and each of these has a name here. The defaults are mergekit's; the paper's own are
    ``scope="model"``, ``elect="unweighted"`` and ``combine="count_mean"``. PEFT's are the latter two, for each tensor.

    When to use:
        For several models fine-tuned from the same base on different tasks, whose small changes and opposite signs get in each
        other's way when they are added up. The paper's recipe without held-out data is density 0.2 and lambda_ 1. With one
        model there is nothing to elect, and `magnitude_prune` is enough. `dare_ties` drops at random in place of trimming.

    Args:
        density: The part of the entries of each task vector that stays.
        weight: How much each model counts, in the vote and in the average. A model of weight zero takes no part and is not
            read.
        rescale: What the entries that stay are multiplied with: "l1" restores the L1 norm that the task vector had (mergekit's
            rescale: true), "inverse_density" is 1 / density, ``None`` leaves them as they are.
        elect: Whose sign wins an entry: that of the sum of the task vectors times their weights ("weighted", mergekit), or of
            the task vectors themselves ("unweighted", the paper and PEFT).
        combine: What becomes of the entries that agree: "weight_mean" divides their weighted sum by their weights (mergekit's
            normalize: true), "count_mean" by their number (the paper, PEFT), "sum" does not divide (normalize: false), "max"
            takes the one of largest magnitude.
        lambda_: The scale of what is added to the base.

    Raises:
        MergeError: A density is too small for 1 / density, which rescale asks for.

    >>> from mergekit_cl import merge
    >>> base = np.zeros(4, np.float32)
    >>> models = [np.float32([4, -1, 0.5, 3]), np.float32([2, 3, 0.1, -5])]
    >>> merge(models, method="ties", base=base, density=0.5)  # [4, 0, 0, 3] and [0, 3, 0, -5] stay
    array([ 4.,  3.,  0., -5.], dtype=float32)
    >>> merge(models, method="ties", base=base, density=1)  # elected: + + + -
    array([ 3. ,  3. ,  0.3, -5. ], dtype=float32)
    """
    keep = yield from largest(scope, density, weight)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(weight, keep, rescaled, elect, combine, lambda_)
