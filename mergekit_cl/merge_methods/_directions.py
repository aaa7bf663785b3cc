"""What methods that work with directions compute from Gram matrices, [..., n, n]: leading axes, such as slices, are kept."""

import numpy as np
import numpy.typing as npt

from mergekit_cl.steps import Along, Apply, Statistics, Sum, SumOfSlices

CANCELLED = 1e-6
"""A mean of unit vectors that is no longer than this has no direction: the rounding of float32 models is some 1e-7 of it."""


def norms(gram: Statistics) -> Statistics:
    """Return the norm of each vector, [..., n]."""
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))


@np.errstate(over="ignore", invalid="ignore")
def agree(gram: Statistics) -> npt.NDArray[np.bool_]:
    """Tell whether all vectors are equal, [...], as far as a Gram matrix can tell: to 1e-6 of their norm."""
    first = gram[..., :1, :1]
    return np.asarray((np.abs(gram - first) <= 1e-12 * first).all(axis=(-2, -1)))


def great_circle(t: float, cosine: Statistics, straight: npt.NDArray[np.bool_]) -> Statistics:
    """Weigh two vectors, [..., 2]: ``sin((1 - t) * angle) / sin(angle)`` and ``sin(t * angle) / sin(angle)``.

    Where ``straight``, their limit for an angle of zero: 1 - t and t.
    """
    shares = np.array([1 - t, t])
    turns = np.where(straight, 0.0, np.arccos(np.clip(cosine, -1, 1)))[..., None] / np.pi
    return np.asarray(shares * np.sinc(shares * turns) / np.sinc(turns))


def weighted(weights: Statistics, base_weights: Statistics, along: Along | None) -> Apply:
    """Return the apply step for weights of models, [..., models], and of the base, [...]."""
    if along is None:
        return Sum(weights.tolist(), float(base_weights))
    return SumOfSlices(weights, base_weights, along)
