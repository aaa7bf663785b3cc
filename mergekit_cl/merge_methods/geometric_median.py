"""The geometric median of models (Weiszfeld, 1937; Vardi and Zhang, 2000)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.registry import Between, PerModel, each, method
from mergekit_cl.steps import Gram, Scope, Statistics, Steps, Sum

_EQUAL = 1e-12  # a squared distance below this part of the squared norms is rounding: models equal to 1e-6, as in `agree`
_PARTS = (1, 0.5, 0.25, 0.125)  # how much of Newton's step is tried


@method(paper="https://doi.org/10.1073/pnas.97.4.1423")
def geometric_median(
    scope: Scope,
    *,
    weight: PerModel[Annotated[float, Between(0)]] = each(1.0),
    max_iter: Annotated[int, Between(1)] = 100,
    tol: Annotated[float, Between(0)] = 1e-7,
) -> Steps:
    """Take the point with the least sum of distances to the models, ``sum(weight_k * |m - x_k|)``: robust to outliers.

    Formula:
        out = argmin_m sum_k(weight_k * |m - x_k|)
            = sum_k(weight_k / |out - x_k| * x_k) / sum_k(weight_k / |out - x_k|)

    Whole tensors (or models, with ``scope="model"``) are the points, so a model that is far off moves the result no further
    than one that is near: each pulls with its weight, whatever the distance. The entry by entry median is `median`.

    A model is the result, bit for bit, where the pull of the others is no more than its weight (Vardi and Zhang, 2000): always
    if it has more than half of all the weight. Models that coincide count as one with all their weight. Where more than one
    point is a median, the result is the average, by weight, of the models that are: with two models of equal weight their
    mean, with an even number of models on a line the mean of the middle two. Models that agree are returned bit for bit.

    The iterations run on coefficients, with distances from the Gram matrix. Each takes the better of Weiszfeld's step, which
    always gets nearer but is slow where the median is close to a model, and Newton's, or a part of it. From the Gram matrix
    models that differ by less than 1e-6 of their norm can't be told from equal ones: they are averaged by weight. So are all
    models where a distance is not finite.

    When to use:
        For many models of which some may be bad: federated clients (arXiv:1912.13445), seeds or checkpoints that diverged.
        Where all models are good, `linear` is better and reads them once instead of twice.

    Args:
        weight: At least zero; divided by the sum.
        max_iter: The most iterations; mostly about five are enough.
        tol: The iterations end when a step is at most this part of the (harmonic) mean distance to the models. A model is the
            median also where the others' pull is more than its weight by this part of it.

    Raises:
        MergeError: A weight is negative, or all are zero.

    >>> from mergekit_cl import merge
    >>> models = [np.float32([0, 1]), np.float32([3, 1]), np.float32([900, 1])]
    >>> merge(models, method="geometric_median")  # on a line: the one in the middle
    array([3., 1.], dtype=float32)
    >>> merge(models, method="geometric_median", weight=[3, 1, 1])  # one has more than half of the weight
    array([0., 1.], dtype=float32)
    """
    part = _parts(weight)
    taking_part = np.flatnonzero(part)
    if len(taking_part) > 1:
        gram = yield Gram()
        part[taking_part] = _weights(gram[np.ix_(taking_part, taking_part)], part[taking_part], max_iter, tol)
    return Sum(part.tolist())


def _weights(gram: Statistics, weight: Statistics, max_iter: int, tol: float) -> Statistics:
    largest = gram.max()
    if not np.isfinite(gram).all() or largest == 0:
        return weight
    gram = gram / largest
    norms = np.diagonal(gram)
    squared = norms[:, None] + norms - 2 * gram
    same = squared <= _EQUAL * np.maximum(norms[:, None], norms)
    if same.all():
        return weight
    squared[same] = 0
    distances = np.sqrt(squared)
    held = same @ weight
    pulls = np.divide(weight, distances, where=~same, out=np.zeros_like(squared))
    moves = pulls - np.diag(pulls.sum(axis=1))  # at each model the sum of all pulls, as coefficients
    best = int((distances @ weight).argmin())
    space = _Space(gram - gram[best] - gram[:, [best]] + gram[best, best], weight, 1e-9 * distances[~same].min())
    pull = np.array([space.length(move) for move in moves])
    medians = pull <= held * (1 + tol)
    if medians.any():
        return _parts(np.where(same[medians].any(axis=0), weight, 0))
    # a step away from the best of the models: its cost is below that of all models, so no iterate ever meets one
    away = (1 - held[best] / pull[best]) / pulls[best].sum() * moves[best]
    away[best] += 1
    return _descend(space.nearest(weight, away), space, max_iter, tol)


@dataclass(frozen=True)
class _Space:
    """Points given by the coefficients of the models; ``centred`` is the Gram matrix of their differences from one of them."""

    centred: Statistics
    weight: Statistics
    least: float
    """What smaller distances count as."""

    def length(self, move: Statistics) -> float:
        return float(np.sqrt(np.maximum(move @ self.centred @ move, 0)))

    def seen(self, point: Statistics) -> tuple[Statistics, Statistics]:
        """Return the distances of a point from the models, and the cosines between the directions to them."""
        away = point - np.eye(len(point))
        products = away @ self.centred @ away.T
        distances = np.maximum(np.sqrt(np.maximum(np.diagonal(products), 0)), self.least)
        return distances, np.clip(products / distances[:, None] / distances, -1, 1)

    def nearest(self, *points: Statistics) -> Statistics:
        """Return the point with the least sum of distances: the first of those that are equal but for rounding."""
        costs = np.array([self.weight @ self.seen(point)[0] for point in points])
        return points[int((costs <= costs.min() * (1 + 1e-14)).argmax())]


def _descend(point: Statistics, space: _Space, max_iter: int, tol: float) -> Statistics:
    """Minimise the sum of distances, starting from ``point``; return the coefficients of Weiszfeld's form."""
    weight = space.weight
    for _ in range(max_iter):
        distances, cosines = space.seen(point)
        total = (weight / distances).sum()
        weiszfeld = weight / distances / total
        # With U the unit vectors from the models to the point, the gradient is U w and the Hessian
        # total * (I - U diag(weiszfeld) U^T), inverted by Woodbury's formula; a line has no inverse.
        root = np.sqrt(weiszfeld)
        inverse = np.linalg.pinv(np.eye(len(root)) - root[:, None] * cosines * root, hermitian=True)
        newton = (weight + root * (inverse @ (root * (cosines @ weight)))) / distances / total
        newton -= newton.sum() * point
        following = space.nearest(*(point + part * newton for part in _PARTS), weiszfeld)
        step = space.length(following - point)
        point = following
        if step * total <= tol:
            break
    return _parts(weight / space.seen(point)[0])


def _parts(weight: Sequence[float] | Statistics) -> Statistics:
    return np.array(normalized([float(w) for w in weight], flag=None))
