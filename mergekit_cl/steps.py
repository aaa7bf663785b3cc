"""What a merge method yields and returns: surveys and apply steps, as data. Methods make them, kernels carry them out.

A **survey** asks for statistics that add up over spans of memory. A method yields it and is sent the result::

    gram = yield Gram()

An **apply step** says how every element of the result is computed. A method returns exactly one. The types here are all
the vocabulary that a method has; none of them holds data of a model.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import fsum, inf, isfinite, isnan
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from mergekit_cl.errors import MergeError

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
        return _terms(self.weights, self.base_weight, compute)


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


@lru_cache(1024)
def _terms(weights: tuple[float, ...], base_weight: float, compute: np.dtype[Any]) -> Terms:
    """See `Sum.terms`; many tensors have the same weights."""
    given = [(-1, base_weight), *enumerate(weights)]
    with np.errstate(over="ignore", under="ignore"):
        rounded = {source: float(compute.type(weight)) for source, weight in given}
    taking_part = [(source, weight) for source, weight in given if rounded[source] != 0]
    reference = None
    if len(taking_part) > 1 and all(isfinite(weight) for _, weight in taking_part):
        scaled = [weight * _SCALE for _, weight in taking_part]
        if abs(fsum([*scaled, -_SCALE])) <= _ONE * fsum(map(abs, scaled)):
            reference = max(taking_part, key=lambda term: abs(term[1]))[0]
    others = [(source, weight) for source, weight in taking_part if source != reference]
    return Terms(tuple(s for s, _ in others), tuple(rounded[s] for s, _ in others), reference)


@dataclass(frozen=True, eq=False)
class SumOfSlices:
    """Apply step: a `Sum` with weights of its own for each slice of a tensor.

    ``weights`` has shape [slices, models], ``base_weights`` [slices] (or one number for all), float64; ``along`` says what
    a slice is, as for `Gram`. A slice whose weights add up to one is computed about its heaviest participant.
    """

    weights: Statistics
    base_weights: Statistics | float = 0.0
    along: "Along" = "rows"

    def __post_init__(self) -> None:
        _check("SumOfSlices", "along", self.along, get_args(Along))

    def terms(self, compute: np.dtype[Any], has_base: bool) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Round the weights of the models and then the base, [slices, inputs], and choose each slice's reference (or -1)."""
        weights = np.asarray(self.weights, np.float64)
        if has_base:
            base = np.asarray(self.base_weights, np.float64)
            if base.shape not in ((), weights.shape[:1]):
                raise MergeError(f"SumOfSlices: base_weights of shape {base.shape} for {len(weights)} slices")
            base = np.broadcast_to(base, weights.shape[:1])
            weights = np.concatenate([weights, base[:, None]], axis=1)
        with np.errstate(all="ignore"):
            rounded = weights.astype(compute)
            scaled = np.where(rounded == 0, 0, weights) * _SCALE
            average = np.abs(scaled.sum(axis=1) - _SCALE) <= _ONE * np.abs(scaled).sum(axis=1)
            average &= np.isfinite(weights).all(axis=1) & ((rounded != 0).sum(axis=1) > 1)
        # of equal weights the base's comes first, as in `Sum`
        order = np.abs(np.roll(scaled, 1, axis=1) if has_base else scaled)
        heaviest = (order.argmax(axis=1) - has_base) % order.shape[1] if order.shape[1] else np.zeros(len(order), np.int64)
        return rounded, np.where(average, heaviest, -1)


@dataclass(frozen=True)
class AtLeast:
    """Keep the largest entries of each task vector: those before its `Cut`, but for those before its cut in ``less``."""

    cuts: Sequence["Cut"]
    less: Sequence["Cut"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cuts", tuple(self.cuts))
        if self.less is not None:
            object.__setattr__(self, "less", tuple(self.less))


@dataclass(frozen=True)
class AtRandom:
    """Keep each entry with the probability ``density``, one for each model.

    Whether an entry stays depends on ``seed``, the name of the tensor in the result, the number of the model and the entry's
    index in the tensor, through Philox-4x32-10 and an integer threshold; on nothing else.
    """

    density: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", tuple(map(float, self.density)))
        if not all(0 <= density <= 1 for density in self.density):
            raise MergeError(f"AtRandom: density={self.density}: must be in [0, 1]")


Keep: TypeAlias = AtLeast | AtRandom
Elect: TypeAlias = Literal["weighted", "unweighted"]
Combine: TypeAlias = Literal["weight_mean", "count_mean", "sum", "max"]


@dataclass(frozen=True)
class Consensus:
    """Apply step: ``base + scale * combination of the task vectors``, entry by entry; a task vector is ``model - base``.

    Args:
        weight: One for each model. A model of weight zero takes no part, and is not read.
        keep: Which entries of a task vector stay; the others count as zero. ``None`` keeps all.
        rescale: Factors for the entries that stay, one for each model.
        elect: How the sign of an entry is elected: that of the sum of the task vectors, weighted or not; plus if it is zero.
            Only entries of that sign are combined. ``None``: no election.
        combine: "sum" adds up ``weight * rescale * entry``; "weight_mean" divides it by the weights, and "count_mean" by the
            number, of the entries that it is made of; "max" takes the one of largest magnitude.
        scale: Multiplies the combination.

    A result of which the combination is zero is the base's entry, bit for bit.
    """

    weight: Sequence[float]
    keep: Keep | None = None
    rescale: Sequence[float] | None = None
    elect: Elect | None = None
    combine: Combine = "sum"
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", tuple(map(float, self.weight)))
        if self.rescale is not None:
            object.__setattr__(self, "rescale", tuple(map(float, self.rescale)))
        _check("Consensus", "elect", self.elect, (None, *get_args(Elect)))
        _check("Consensus", "combine", self.combine, get_args(Combine))


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Apply step: a formula, entry by entry.

    Args:
        formula: A function of arrays that returns an array, written with NumPy. It is called with the base, where the method
            has one, and a list of the models; all in the compute type. Entry i of its result may depend on nothing but entry
            i of these, because it is called with parts of tensors. Where it does nothing but arithmetic, comparisons,
            ``np.where`` and functions such as ``np.abs`` and ``np.sqrt``, it is called once, with symbols, and compiled; else
            it is called again and again with arrays that must not be written into.
        read: Which models the list has, by their numbers; ``None`` for all. The others are not read.
        seed: With a number the formula is also given ``uniform=``: for each model in the list an array of random numbers in
            [0, 1), which depend on the seed, the name of the tensor in the result, the number of the model and the index of
            the entry, and on nothing else.
        rows: Numbers for each slice of the tensor, [slices] each, that the formula is given as ``rows=``, a list of arrays of
            the shape [slices, 1]. The others are then [slices, entries of a slice]. See `Gram` for what a slice is ("rows").
    """

    formula: Callable[..., Any]
    read: Sequence[int] | None = None
    seed: int | None = None
    rows: Sequence[Statistics] = ()


class PerRow(Elementwise):
    """Apply step: as `Elementwise`, but the formula is called with whole rows, and may look along them.

    All arrays have the shape [rows, entries of a row]; a tensor of one dimension is one row. ``np.sum``, ``np.max``, ``np.min``
    and ``np.mean`` with ``axis=-1, keepdims=True``, and `mergekit_cl.ranks`, are compiled as well.
    """


@dataclass(frozen=True, eq=False)
class PerMatrix:
    """Apply step: a function of whole matrices, for what needs them as such (a singular value decomposition).

    Args:
        formula: A function of the base [m, n], where the method has one, and a list of the models [m, n], all in the compute
            type, that returns an array [m, n]. What it is given must not be written into.
        otherwise: The apply step of tensors that do not have two dimensions.
    """

    formula: Callable[..., Any]
    otherwise: "Sum | Consensus | Elementwise"


Along: TypeAlias = Literal["rows", "columns"]
"""How a tensor is cut into slices: "rows" run along its last dimension, "columns" along its first. A vector is one slice."""


@dataclass(frozen=True)
class Gram:
    """Survey: all dot products of the models, a float64 matrix of shape [n, n].

    Its rows are the base (where the method has one) and then the models, n = models + 1; with ``task_vectors`` they are
    the differences of the models from the base, n = models. With ``along`` there is a matrix for each slice of the tensor,
    [slices, n, n]. Accumulated in float64 over blocks of 65,536 elements counted from the start of each tensor, or over each
    slice; the blocks are added without error (`math.fsum`), so no chunking or number of threads shows in the result.
    """

    task_vectors: bool = False
    along: Along | None = None

    def __post_init__(self) -> None:
        _check("Gram", "along", self.along, (None, *get_args(Along)))


@dataclass(frozen=True)
class Cut:
    """A place in the order of a task vector's entries, by falling magnitude and, where that is equal, by hash.

    Before it are the entries whose magnitude is larger than ``magnitude``, and the part ``share`` of those that equal it,
    in [0, 1]. `FIRST` is before all entries, `LAST` behind them.
    """

    magnitude: float
    share: float = 0.0

    def __post_init__(self) -> None:
        if isnan(self.magnitude) or not 0 <= self.share <= 1:
            raise MergeError(f"{self}: the magnitude must be a number, and the share in [0, 1]")

    @property
    def keeps_nothing(self) -> bool:
        """Whether no entry is before it."""
        return self.magnitude == inf and not self.share


FIRST, LAST = Cut(inf), Cut(-1.0)


class Pending(Protocol):
    """Cuts that are on a device, or will be when the work before them is done."""

    selected: Any
    """See `mergekit_cl.kernels.Selected`."""

    def settle(self) -> Sequence[Cut]:
        """Wait for all of them, and return them."""


class PendingCut(Cut):
    """One of the `Pending` cuts. It is waited for only when somebody looks at its numbers."""

    def __init__(self, pending: Pending, number: int) -> None:
        self.pending = pending
        self.number = number

    @property
    def magnitude(self) -> float:
        """See `Cut`."""
        return self.pending.settle()[self.number].magnitude

    @property
    def share(self) -> float:
        """See `Cut`."""
        return self.pending.settle()[self.number].share

    @property
    def keeps_nothing(self) -> bool:
        """See `Cut`: its rank is not 0."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and (self.magnitude, self.share) == (other.magnitude, other.share)

    def __hash__(self) -> int:
        return hash((self.magnitude, self.share))

    def __repr__(self) -> str:
        return f"PendingCut({self.number})"


@dataclass(frozen=True)
class KthMagnitude:
    """Survey: cuts through the entries of task vectors; for each of ``ranks`` a list of `Cut`, one for each model, comes back.

    One of ``ranks`` has an integer in [0, scope.elements] for each model: so many entries lie before the cut. Or ``None``, for
    a model that is not to be read. Exact, by radix selection on the bits of the magnitudes, without a sort: for large scopes
    mostly in two sweeps over all models. Of entries that equal the cut, the share makes the rank right in expectation.
    """

    ranks: Sequence[Sequence[int | None]]

    sweeps: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not all(rank is None or isinstance(rank, int | np.integer) for ranks in self.ranks for rank in ranks):
            raise MergeError(f"{self}: ranks are integers, or None")


@dataclass(frozen=True)
class KeptMagnitude:
    """Survey: the sums of ``|model - base|`` over all entries, and over those that are kept: float64 [models, 2].

    ``read`` says which models are read; the others' sums are 0.
    """

    keep: Keep
    read: Sequence[bool]


@dataclass(frozen=True, eq=False)
class SumOf:
    """Survey: the sum of a formula over all entries of a scope, float64 [outputs]; with ``along`` [slices, outputs].

    The slices are those of all tensors of the scope, one tensor after the other.

    Args:
        formula: As that of `Elementwise` (with ``along="rows"`` as that of `PerRow`); returns an array, or a list of arrays,
            which are added up apart from each other.
        along: "rows" for a sum over each row of a tensor.
        seed: As that of `Elementwise`.
        wide: Whether the formula is computed in float64.
    """

    formula: Callable[..., Any]
    along: Literal["rows", None] = None
    seed: int | None = None
    wide: bool = False

    def __post_init__(self) -> None:
        _check("SumOf", "along", self.along, ("rows", None))


@dataclass(frozen=True, eq=False)
class KthOf:
    """Survey: cuts through the entries of a scope in the order of the magnitude of a formula; a list of `Cut` comes back.

    Args:
        formula: As that of `Elementwise`; returns one array.
        ranks: An integer in [0, scope.elements] for each cut: so many entries lie before it, and its magnitude is that of the
            last of them. Exact, without a sort.
        rows: As those of `Elementwise`.
        seed: As that of `Elementwise`.
    """

    formula: Callable[..., Any]
    ranks: Sequence[int]
    rows: Sequence[Statistics] = ()
    seed: int | None = None

    sweeps: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not all(isinstance(rank, int | np.integer) for rank in self.ranks):
            raise MergeError(f"KthOf: ranks={list(self.ranks)}: must be integers")


def _check(step: str, name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise MergeError(f"{step}: {name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


Survey: TypeAlias = Gram | KthMagnitude | KeptMagnitude | SumOf | KthOf
Apply: TypeAlias = Sum | SumOfSlices | Consensus | Elementwise | PerMatrix
Steps: TypeAlias = Generator[Survey, Any, Apply]
"""What a method that surveys returns: a generator that yields surveys and returns the apply step."""


@dataclass(frozen=True)
class Scope:
    """What one run of a method is about: a tensor, or (``scope="model"``) a whole model.

    ``names`` are the tensors of the scope, ``elements`` the number of their entries; ``models`` is the number of models,
    without the base; ``has_base`` tells whether there is a base. ``seed`` is for random masks (`AtRandom`).
    """

    names: tuple[str, ...]
    models: int
    has_base: bool
    seed: int = 0
    elements: int = 0
