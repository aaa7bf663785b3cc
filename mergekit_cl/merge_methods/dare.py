"""DARE: drop and rescale (Yu et al., 2023), alone and with the election of signs of TIES."""

from typing import Annotated, TypeAlias

from mergekit_cl.merge_methods._trim import Combining, Electing, Rescale, factors
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Advice, Fraction, PerModel, each, method
from mergekit_cl.steps import AtRandom, Consensus, Scope, Steps

Density: TypeAlias = Annotated[PerModel[Fraction], Advice("the paper keeps between 0.1 and 0.5")]


@method(paper="https://arxiv.org/abs/2311.03099", base="required")
def dare_linear(
    scope: Scope,
    *,
    density: Density,
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = "inverse_density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Steps:
    """Drop entries of each task vector at random, rescale the others, add up: ``base + lambda_ * sum(weight * task vector)``.

    Formula:
        d_k = x_k - base, where each entry stays with the probability density_k
        out = base + lambda_ * sum_k(weight_k * d_k / density_k)         or see rescale
        with normalize=True the weights are divided by their sum

    Which entries stay depends on ``merge(seed=...)``, the name of the tensor, the number of the model and the index of the
    entry, and on nothing else. With the default the expected result is that of `task_arithmetic`. That is the paper's and
    PEFT's way to rescale; mergekit's is "l1".

    When to use:
        For fine-tuned models whose changes are small and redundant: the paper drops 90 % and more of the changes of supervised
        fine-tuning of language models without much loss, and finds that it fails where the changes are large, as after
        continued pre-training. Signs that disagree are not settled; that is `dare_ties`. To keep the largest entries in place
        of random ones, `magnitude_prune`.

    Args:
        density: The probability with which an entry of a task vector stays.
        weight: How much of each task vector is added. A model of weight zero takes no part and is not read.
        rescale: What the entries that stay are multiplied with: "inverse_density" is 1 / density, "l1" restores the L1 norm
            that the task vector had (mergekit's rescale: true), ``None`` leaves them as they are.
        normalize: Whether the weights are divided by their sum.
        lambda_: The scale of what is added to the base.

    Raises:
        MergeError: The weights sum to zero and were to be normalised, or a density is too small for 1 / density.

    >>> from mergekit_cl import merge
    >>> model, base = np.full(8, 3, np.float32), np.ones(8, np.float32)
    >>> merge([model], method="dare_linear", base=base, density=0.5, seed=1).tolist()  # or 1 + 2 / 0.5
    [1.0, 5.0, 5.0, 5.0, 1.0, 5.0, 5.0, 5.0]
    """
    parts = normalized(weight) if normalize else weight
    keep = AtRandom(density, scope.seed)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(parts, keep, rescaled, scale=lambda_)


@method(paper="https://arxiv.org/abs/2311.03099", base="required")
def dare_ties(
    scope: Scope,
    *,
    density: Density,
    weight: PerModel[float] = each(1.0),
    rescale: Rescale = "inverse_density",
    elect: Electing = "weighted",
    combine: Combining = "sum",
    lambda_: float = 1.0,
) -> Steps:
    """Drop entries of each task vector at random, rescale the others, and combine those that have the elected sign.

    Formula:
        d_k  = x_k - base, where each entry stays with the probability density_k
        v_k  = weight_k * d_k / density_k                      or see rescale
        sign = + if sum_k(v_k) >= 0 else -                     unweighted: of sum_k(d_k / density_k)
        A    = the models whose entry has that sign
        out  = base + lambda_ * sum_A(v_k)                     or see combine

    It drops as `dare_linear` does, and elects and combines as `ties` does. The default ``combine="sum"`` is mergekit's.

    When to use:
        As `dare_linear`, for models of different tasks whose signs disagree. `ties` keeps the largest entries in place of
        random ones, and needs no seed.

    Args:
        density: The probability with which an entry of a task vector stays.
        weight: How much each model counts, in the vote and in the sum. A model of weight zero takes no part and is not read.
        rescale: What the entries that stay are multiplied with: "inverse_density" is 1 / density, "l1" restores the L1 norm
            that the task vector had (mergekit's rescale: true), ``None`` leaves them as they are.
        elect: Whose sign wins an entry: that of the sum of the task vectors times their weights ("weighted"), or of the task
            vectors themselves ("unweighted").
        combine: What becomes of the entries that agree: "sum" adds them up, "weight_mean" divides by their weights (mergekit's
            normalize: true), "count_mean" by their number, "max" takes the one of largest magnitude.
        lambda_: The scale of what is added to the base.

    Raises:
        MergeError: A density is too small for 1 / density, which rescale asks for.

    >>> from mergekit_cl import merge
    >>> models, base = [np.float32([3, 0]), np.float32([2, 5])], np.ones(2, np.float32)
    >>> merge(models, method="dare_ties", base=base, density=1)  # task vectors [2, -1] and [1, 4]
    array([4., 5.], dtype=float32)
    """
    keep = AtRandom(density, scope.seed)
    rescaled = yield from factors(rescale, density, weight, keep)
    return Consensus(weight, keep, rescaled, elect, combine, lambda_)
