"""What the methods that trim or drop entries of task vectors share."""

from collections.abc import Generator, Sequence
from math import isfinite
from typing import Annotated, Any, Literal, TypeAlias

from mergekit_cl.errors import MergeError
from mergekit_cl.registry import Advice
from mergekit_cl.steps import AtLeast, Combine, Cut, Elect, Keep, KeptMagnitude, KthMagnitude, Scope, Survey

Rescale: TypeAlias = Annotated[
    Literal["inverse_density", "l1", None], Advice('mergekit\'s rescale=True is "l1", its False None')
]
Combining: TypeAlias = Annotated[Combine, Advice('mergekit\'s normalize=True is "weight_mean", its False "sum"')]
Electing: TypeAlias = Annotated[Elect, Advice('PEFT\'s majority_sign_method="total" is "unweighted"')]


def kept(density: float, elements: int) -> int:
    """Count the entries that trimming to a density leaves: ``int(density * n)``, but one at least unless it is zero."""
    return max(1, int(density * elements)) if density > 0 and elements else 0


def largest(scope: Scope, density: Sequence[float], weight: Sequence[float]) -> Generator[Survey, Any, AtLeast]:
    """Find the largest entries of the task vectors that have a weight."""
    ranks = [kept(d, scope.elements) if w else None for d, w in zip(density, weight, strict=True)]
    cuts: list[Cut]
    (cuts,) = yield KthMagnitude([ranks])
    return AtLeast(cuts)


def factors(
    rescale: str | None, density: Sequence[float], weight: Sequence[float], keep: Keep
) -> Generator[Survey, Any, Sequence[float] | None]:
    """Find what the entries that stay are multiplied with, so that a task vector keeps its size."""
    if rescale is None:
        return None
    if rescale == "inverse_density":
        if any(d and not isfinite(1 / d) for d in density):
            raise MergeError(f"density={list(density)}: too small to multiply by 1 / density; use 0, or rescale=None")
        return [1 / d if d else 1.0 for d in density]
    norms = yield KeptMagnitude(keep, [w != 0 for w in weight])
    return [everything / rest if rest else 1.0 for everything, rest in norms.tolist()]
