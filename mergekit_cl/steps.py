"""What a merge method yields and returns: surveys and apply steps, as data. Methods make them, kernels carry them out.

A **survey** asks for statistics that add up over spans of memory. A method yields it and is sent the result::

    gram = yield Gram()

An **apply step** says how every element of the result is computed. A method returns exactly one. The types here are all
the vocabulary that a method has; none of them holds data of a model.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Statistics: TypeAlias = npt.NDArray[np.float64]

_ONE = 2.0**-48  # how far from one a sum of weights may be, relative to the sum of their magnitudes
_SCALE = 2.0**-64  # keeps a sum of huge weights from overflowing


@dataclass(frozen=True)
class Sum:
    """Apply step: ``base_weight * base + sum(weights[k] * models[k])``, element by element.

    ``weights`` has one float per model, in order. Where all weights add up to one (an average, an interpolation, a task
    vector added to its base) the sum is computed about its heaviest participant, ``ref - sum(w_k * (ref - x_k))``: entries
    in which the models agree keep their bits, and models that are close lose nothing to rounding.
    """

    weights: Sequence[float]
    base_weight: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))

    def terms(self, compute: np.dtype[Any]) -> "Terms":
        """Decide which inputs take part, and how, when computing in ``compute`` (float32 or float64).

        Inputs are numbered as the models are, the base as -1. Weights are rounded to ``compute`` here, once; an input
        whose weight rounds to zero takes no part.
        """
        weights = [(-1, self.base_weight), *enumerate(self.weights)]
        with np.errstate(over="ignore", under="ignore"):
            rounded = {source: float(compute.type(weight)) for source, weight in weights}
        taking_part = [(source, weight) for source, weight in weights if rounded[source] != 0]
        reference = None
        if len(taking_part) > 1 and all(isfinite(weight) for _, weight in taking_part):
            scaled = [weight * _SCALE for _, weight in taking_part]
            if abs(fsum([*scaled, -_SCALE])) <= _ONE * fsum(map(abs, scaled)):
                reference = max(taking_part, key=lambda term: abs(term[1]))[0]
        others = [(source, weight) for source, weight in taking_part if source != reference]
        return Terms(tuple(s for s, _ in others), tuple(rounded[s] for s, _ in others), reference)


@dataclass(frozen=True)
class Terms:
    """A `Sum` made definite: ``ref - sum(w * (ref - x))`` over the sources, or ``sum(w * x)`` without a reference."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]
    reference: int | None

    @property
    def copied(self) -> int | None:
        """The input that is the result, where one input of weight 1 is all there is."""
        return self.sources[0] if self.reference is None and self.weights == (1.0,) else None

    @property
    def inputs(self) -> tuple[int, ...]:
        """All inputs that are read, the reference first."""
        return self.sources if self.reference is None else (self.reference, *self.sources)


@dataclass(frozen=True)
class Gram:
    """Survey: all dot products of the models, a float64 matrix of shape [n, n].

    Its rows are the base (where the method has one) and then the models, n = models + 1; with ``task_vectors`` they are
    the differences of the models from the base, n = models. Accumulated in float64 over blocks of 65,536 elements counted
    from the start of each tensor; the blocks are added without error (`math.fsum`), so no chunking or number of threads
    shows in the result.
    """

    task_vectors: bool = False


Survey: TypeAlias = Gram
Apply: TypeAlias = Sum
Steps: TypeAlias = Generator[Survey, Statistics, Apply]
"""What a method that surveys returns: a generator that yields surveys and returns the apply step."""


@dataclass(frozen=True)
class Scope:
    """What one run of a method is about: a tensor, or (``scope="model"``) a whole model.

    ``names`` are the tensors of the scope, ``models`` is the number of models, without the base; ``has_base`` tells
    whether there is a base. ``seed`` is for random masks.
    """

    names: tuple[str, ...]
    models: int
    has_base: bool
    seed: int = 0
