"""Apply steps bound to memory: each tensor is a row, and the rows that one kernel call takes together are a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mergekit_cl.errors import MergeError
from mergekit_cl.formula import bound
from mergekit_cl.formula_rows import bind, compute_of, formula_of, hash_key
from mergekit_cl.kernels import MISSED, SPOILED, Array, Backend, Keep, MatrixFormula, Slices, Span, Table, TaskVectors
from mergekit_cl.models import tensor
from mergekit_cl.plan import Item, Plan
from mergekit_cl.steps import (
    Apply,
    AtLeast,
    AtRandom,
    Consensus,
    Cut,
    Elementwise,
    Pending,
    PendingCut,
    PerMatrix,
    PerRow,
    Sum,
    SumOfSlices,
)
from mergekit_cl.steps import Keep as KeepStep
from mergekit_cl.windows import Window

Call: TypeAlias = Callable[[Table, Array], npt.NDArray[np.bool_] | bool]
"""Computes pieces of a table (or of windows into it); returns for each of its rows whether a result is not finite."""

_HASHES = 2**32


@dataclass(frozen=True, eq=False)
class Row:
    """One tensor of an apply step: the memory that it is read from, and the memory that it is written to.

    ``inputs`` are the spans of ``sources``, which are numbered as the models are, the base as -1. ``direct`` says that
    ``out`` is the result's own memory, so that it need not be copied there. ``first`` is the number of the first element,
    where these are part of a tensor and it matters which.
    """

    item: Item
    detail: Any
    sources: tuple[int, ...]
    inputs: tuple[Span, ...]
    out: Span
    direct: bool = False
    first: int | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """What a kernel is given: the inputs, and last the output."""
        spans = (*self.inputs, self.out)
        if self.first is None:
            return spans
        return tuple(Window(span, self.first, prod(self.item.shape)) for span in spans)


class Batch:
    """Rows that one kernel call takes: the same kind of step, the same inputs in the same dtypes."""

    def __init__(self, rows: list[Row], step: Apply | None) -> None:
        self.rows = rows
        self.step = step
        self.sources = rows[0].sources
        self.inputs = Table([row.inputs for row in rows])
        self.table = Table([row.spans for row in rows])
        self.details = [row.detail for row in rows]

    slices: Slices | None = None
    """Where the pieces are numbers of slices."""

    copied = True
    """Whether the result is the first input, or zero without one."""

    @property
    def windowed(self) -> bool:
        """Whether the table is one of windows."""
        return self.rows[0].first is not None

    alone = False
    """Whether it takes all processors by itself, so that only one thread may call it."""

    def like(self, rows: list[Row]) -> "Batch":
        """Make a batch of this kind from some of its rows."""
        return type(self)(rows, self.step)

    def call(self, backend: Backend) -> Call:  # noqa: ARG002
        """Return the kernel call, but for the memory and the pieces."""
        return _copy

    def bound(self, largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Bound all numbers that are computed, float64 [rows], from the largest magnitudes of the inputs [rows, inputs]."""
        return np.asarray(largest.max(axis=1, initial=0))


class SumBatch(Batch):
    """Rows of `Sum`, all or none of them about a reference."""

    copied = False

    def __init__(self, rows: list[Row], step: Sum) -> None:
        super().__init__(rows, step)
        self.about = self.details[0].reference is not None
        self.weights = np.array([terms.weights for terms in self.details], self.inputs.compute)

    def call(self, backend: Backend) -> Call:
        """See `Batch.call`."""
        return lambda table, pieces: backend.weighted_sum(table, self.weights, self.about, pieces)

    def bound(self, largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """See `Batch.bound`."""
        spread = largest[:, self.about :] + (largest[:, :1] if self.about else 0.0)
        total = (np.abs(self.weights.astype(np.float64)) * spread).sum(axis=1)
        return np.asarray(np.maximum(total + largest.max(axis=1), spread.max(axis=1)))


class _SlicesBatch(Batch):
    """Rows of `SumOfSlices`; the details are (weights, references, length of a slice)."""

    copied = False

    slices: Slices

    def __init__(self, rows: list[Row], step: SumOfSlices) -> None:
        super().__init__(rows, step)
        weights, references, lengths = zip(*self.details, strict=True)
        self.weights, self.references = np.concatenate(weights), np.concatenate(references)
        self.slices = Slices(np.array(lengths, np.int64), step.along == "columns")
        self._largest_weights = [np.abs(w).max(axis=0, initial=0).astype(np.float64) for w in weights]

    def call(self, backend: Backend) -> Call:
        return lambda table, pieces: backend.weighted_sum_of_slices(table, self.weights, self.references, self.slices, pieces)

    def bound(self, largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        spread = largest + largest.max(axis=1, keepdims=True)
        total = (np.array(self._largest_weights) * spread).sum(axis=1)
        return np.asarray(np.maximum(total + largest.max(axis=1), spread.max(axis=1)))


class _TaskVectorBatch(Batch):
    """Rows of `Consensus`; the details are `_TaskVectorRow`."""

    copied = False

    def __init__(self, rows: list[Row], step: Consensus) -> None:
        super().__init__(rows, step)
        weights, rescale, scale = (
            np.array([getattr(detail, name) for detail in self.details], np.float64) for name in ("weights", "rescale", "scale")
        )
        self.pending = self.details[0].pending
        keep = keep_of_rows(self.details[0].kind, [detail.keep for detail in self.details], self.pending)
        compute = self.inputs.compute
        with np.errstate(over="ignore"):
            self.how = TaskVectors(
                keep, step.elect, step.combine,
                (weights * rescale).astype(compute), rescale.astype(compute), weights.astype(compute), scale.astype(compute),
            )  # fmt: skip

    def call(self, backend: Backend) -> Call:
        if self.pending is not None:
            return partial(self._call_pending, backend, self.pending)
        return lambda table, pieces: backend.task_vector_merge(table, self.how, pieces) != 0

    def _call_pending(self, backend: Backend, pending: Pending, table: Table, pieces: Array) -> npt.NDArray[np.bool_]:
        """Merge without waiting for the cuts, and once more, with those that the device has missed, what needs these."""
        flags = backend.task_vector_merge(table, self.how, pieces)
        spoiled = np.asarray(flags & SPOILED, np.bool_)
        if flags.any():
            settled = pending.settle()  # an error, if what is not finite is one
            again = pieces[(flags[pieces[:, 0]] & MISSED) != 0]
            if len(again):
                how = replace(self.how, keep=_on_host(self.how.keep, settled, self.inputs.compute))
                spoiled |= backend.task_vector_merge(table, how, again) != 0
        return spoiled

    def bound(self, largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        how = self.how
        spread = largest[:, :1] + largest[:, 1:]
        scales, votes, shares = (np.abs(a.astype(np.float64)) for a in (how.scales, how.votes, how.shares))
        total = (scales * spread).sum(axis=1)
        if how.combine == "weight_mean":
            mixed = (how.shares > 0).any(axis=1) & (how.shares < 0).any(axis=1)  # then a sum of shares may be next to zero
            total = np.where(mixed, np.inf, total / np.minimum(1.0, shares.min(axis=1)))
        change = total * np.maximum(1.0, np.abs(how.factors.astype(np.float64)))
        return np.asarray(np.maximum(change + largest[:, 0], np.maximum(spread, votes * spread).sum(axis=1)))


class _FormulaBatch(Batch):
    """Rows of `Elementwise` and `PerRow`; the details are `FormulaRow`."""

    copied = False

    def __init__(self, rows: list[Row], step: Elementwise) -> None:
        super().__init__(rows, step)
        self.formula, self.slices = formula_of(self.details)

    def call(self, backend: Backend) -> Call:
        formula, slices = self.formula, self.slices
        if slices is not None:
            return lambda table, pieces: backend.per_row(table, formula, slices, pieces)
        return lambda table, pieces: backend.elementwise(table, formula, pieces)

    def bound(self, largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        formula = self.formula
        if formula.program is None:
            return np.full(len(largest), np.inf)
        parts = [row.numbers for row in self.details]
        numbers = [np.array([pick(part, axis=0, initial=0) for part in parts]) for pick in (np.min, np.max)]
        constants = formula.constants.astype(np.float64)
        return np.asarray(bound(formula.program, (-largest, largest), (constants, constants), (numbers[0], numbers[1])))


class _MatrixBatch(Batch):
    """Rows of `PerMatrix`; the details are `mergekit_cl.kernels.MatrixFormula`."""

    copied = False
    alone = True

    slices: Slices

    def __init__(self, rows: list[Row], step: PerMatrix) -> None:
        super().__init__(rows, step)
        self.slices = Slices(np.array([max(1, len(row.out)) for row in rows], np.int64), strided=False)

    def call(self, backend: Backend) -> Call:
        return lambda table, pieces: backend.per_matrix(table, self.details, pieces)

    def bound(self, largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.full(len(largest), np.inf)


class Binder:
    """Binds the apply steps of a plan's tensors to memory.

    Args:
        plan: The plan.
        spans: The inputs of each tensor, by its name: the models in their order, then the base.
        finite: Whether coefficients that are not finite are errors.
        outputs: Makes the span that a tensor is written to; without it that is the target's memory, or new memory.
        first: Returns the number of a tensor's first element that the spans have, where they may have only a part.

    """

    def __init__(
        self,
        plan: Plan,
        spans: Mapping[str, tuple[Span, ...]],
        finite: bool,
        outputs: Callable[[Item], Span] | None = None,
        first: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self.outputs = outputs
        self.plan = plan
        self.spans = spans
        self.finite = finite
        self.first = first
        self._groups: dict[Any, tuple[Apply | None, list[Row]]] = {}

    def batches(self) -> list[Batch]:
        """Return the batches of all tensors that were added."""
        return [kind(rows, step) for (kind, *_), (step, rows) in self._groups.items()]

    def add_copy(self, item: Item) -> None:
        """Add a tensor that is the same in all models."""
        self._add(item, None, None, (0,), Batch)

    def add(self, item: Item, step: Apply) -> None:
        """Add a tensor with its apply step.

        Raises:
            MergeError: The step does not fit the plan, or a coefficient is not finite.

        """
        if isinstance(step, PerMatrix) and len(item.shape) != 2:
            step = step.otherwise
        if isinstance(step, Elementwise):
            self._add_formula(item, step)
        elif isinstance(step, PerMatrix):
            self._add_matrix(item, step)
        elif isinstance(step, Consensus):
            self._add_consensus(item, step)
        elif isinstance(step, SumOfSlices):
            self._add_slices(item, step)
        elif isinstance(step, Sum):
            self._add_sum(item, step)
        else:
            raise MergeError(f"{self.plan.method.name}: returned {type(step).__name__}, which is not an apply step")

    def alone(self, item: Item, step: Apply, spans: tuple[Span, ...], out: Span) -> list[Batch]:
        """Bind the step of one tensor to other memory."""
        binder = Binder(self.plan, {item.name: spans}, self.finite, lambda _: out)
        binder._compute = self._compute
        binder.add(item, step)
        return binder.batches()

    def _add(
        self, item: Item, step: Apply | None, detail: Any, sources: tuple[int, ...], kind: type[Batch], *key: object
    ) -> None:
        """Add a row to the batch of its like: of one kind, key, inputs and dtypes."""
        inputs = tuple(self.spans[item.name][source] for source in sources)
        first = self.first(item.name) if step is not None and draws(step) else None
        row = Row(item, detail, sources, inputs, *self._output(item), first)
        dtypes = Table([(*row.inputs, row.out)]).dtypes
        self._groups.setdefault((kind, key, sources, dtypes, first is None), (step, []))[1].append(row)

    def _add_sum(self, item: Item, step: Sum) -> None:
        plan, spans = self.plan, self.spans[item.name]
        if len(step.weights) != plan.models or (step.base_weight and not plan.has_base):
            self._does_not_fit(step)
        taking_part = step.terms(np.dtype(np.float64)).inputs
        terms = step.terms(Table([[spans[source] for source in taking_part]]).compute)
        self._check(terms.weights, step, item)
        plain_copy = terms.copied is not None and Table([[spans[terms.copied]]]).dtypes == (item.dtype,)
        kind = Batch if plain_copy or not terms.inputs else SumBatch
        self._add(item, step, terms, terms.inputs, kind, terms.reference)

    def _add_slices(self, item: Item, step: SumOfSlices) -> None:
        plan, spans = self.plan, self.spans[item.name]
        sources = (*range(plan.models), *((-1,) if plan.has_base else ()))
        counts, length = slices_of(item, step.along)
        if np.shape(step.weights) != (counts, plan.models):
            raise MergeError(
                f"{plan.method.name}: returned SumOfSlices with weights of shape {np.shape(step.weights)} for "
                f"{tensor(item.name)}; expected [slices, models] = {(counts, plan.models)}"
            )
        weights, references = step.terms(Table([spans]).compute, plan.has_base)
        self._check(weights, step, item)
        self._add(item, step, (weights, references, length), sources, _SlicesBatch, step.along)

    def _add_consensus(self, item: Item, step: Consensus) -> None:
        plan, spans = self.plan, self.spans[item.name]
        given = [step.weight, *([] if step.rescale is None else [step.rescale]), *lists(step.keep)]
        if not plan.has_base or any(len(values) != plan.models for values in given):
            self._does_not_fit(step)
        kept = tuple(k for k in range(plan.models) if not _keeps_nothing(step.keep, k))
        compute = Table([[spans[-1], *(spans[k] for k in kept if step.weight[k])]]).compute
        taking_part, finite = _taking_part(step.weight, step.rescale, step.scale, kept, compute)
        if not finite:
            self._check(np.nan, step, item)
        if not taking_part:
            self._add_sum(item, Sum([0.0] * plan.models, base_weight=1.0))
            return
        kind, pending = kind_of(step.keep), _pending(step.keep, taking_part, compute)
        if isinstance(step.keep, AtRandom) and all(step.keep.density[k] == 1 for k in taking_part):
            kind = "all"
        detail = _TaskVectorRow(
            kind,
            [step.weight[k] for k in taking_part],
            [1.0 if step.rescale is None else step.rescale[k] for k in taking_part],
            step.scale,
            keep_for(step.keep, item, taking_part, compute, pending),
            pending,
        )
        self._add(item, step, detail, (-1, *taking_part), _TaskVectorBatch, kind, step.elect, step.combine, pending)

    def _add_formula(self, item: Item, step: Elementwise) -> None:
        row = bind(self.plan, item, step, self._compute[item.name])
        self._add(item, step, row, row.sources, _FormulaBatch, row.kind)

    def _add_matrix(self, item: Item, step: PerMatrix) -> None:
        sources = (*((-1,) if self.plan.has_base else ()), *range(self.plan.models))
        label = f"{self.plan.method.name}, {tensor(item.name)}"
        detail = MatrixFormula(step.formula, self.plan.has_base, self._compute[item.name], item.shape, label)
        self._add(item, step, detail, sources, _MatrixBatch)

    @cached_property
    def _compute(self) -> dict[str, np.dtype[Any]]:
        """The type that formulas are computed in, by the names of tensors."""
        types = {}
        for _, items in self.plan.scopes:
            types.update(dict.fromkeys((item.name for item in items), compute_of([self.spans[item.name] for item in items])))
        return types

    def _does_not_fit(self, step: Apply) -> None:
        name, plan = self.plan.method.name, self.plan
        raise MergeError(f"{name}: returned {step} for {plan.models} models and {int(plan.has_base)} base")

    def _check(self, coefficients: Any, step: Apply, item: Item) -> None:
        if self.finite and not np.isfinite(coefficients).all():
            name, dtype = self.plan.method.name, self.spans[item.name][0].dtype
            raise MergeError(f"{name}: its weights {step} are not finite in {dtype}; check the parameters")

    def _output(self, item: Item) -> tuple[Span, bool]:
        """Memory to write a result to, and whether it is that of the target."""
        if self.outputs is not None:
            return self.outputs(item), True
        span = item.library.writable(item.like) if self.plan.in_place else None
        return (item.library.empty(item.like, item.dtype), False) if span is None else (span, True)


@dataclass(frozen=True, eq=False)
class _TaskVectorRow:
    """What a row of `Consensus` has of its own: of the models that take part weights, factors, and what `keep_for` returns.

    Cuts that are ``pending`` stay where they are.
    """

    kind: Literal["all", "random", "magnitude"]
    weights: list[float]
    rescale: list[float]
    scale: float
    keep: "KeepRow"
    pending: Pending | None


@lru_cache(1024)
def _taking_part(
    weight: tuple[float, ...], rescale: tuple[float, ...] | None, scale: float, kept: tuple[int, ...], compute: np.dtype[Any]
) -> tuple[tuple[int, ...], bool]:
    """Return which models a `Consensus` reads, and whether all of its coefficients are finite in the compute type."""
    factor = np.ones(len(weight)) if rescale is None else np.array(rescale)
    with np.errstate(all="ignore"):
        weights, one = np.array(weight).astype(compute), np.float64(scale).astype(compute)
        coefficients = np.concatenate([weights, (np.array(weight) * factor).astype(compute), factor.astype(compute)])
    taking_part = tuple(k for k in kept if weights[k] and one)
    return taking_part, bool(np.isfinite(coefficients.reshape(3, -1)[:, list(taking_part)]).all() and np.isfinite(one))


def draws(step: Apply) -> bool:
    """Tell whether the numbers of a tensor's entries show in the result, as those of random masks do."""
    if isinstance(step, Elementwise):
        return step.seed is not None
    return isinstance(step, Consensus) and step.keep is not None


def looks_along(step: Apply, item: Item) -> bool:
    """Tell whether a step looks at more of a tensor than one entry after another, or at where they are in its shape."""
    if isinstance(step, PerMatrix) and len(item.shape) != 2:
        step = step.otherwise
    return isinstance(step, SumOfSlices | PerRow | PerMatrix) or (isinstance(step, Elementwise) and len(step.rows) > 0)


def slices_of(item: Item, along: str) -> tuple[int, int]:
    """Return how many slices a tensor has, and the length of each."""
    shape = item.shape
    elements = int(np.prod(shape, dtype=np.int64))
    if not elements:
        return 0, 1
    length = 1 if not shape else shape[-1] if along == "rows" or len(shape) == 1 else shape[0]
    return elements // length, length


KeepRow: TypeAlias = tuple[Array, Array, Array, Array]
"""Keys, thresholds, cuts, and places among the cuts on a device, of one row of `mergekit_cl.kernels.Keep`, [models, 2] each."""


def keep_for(
    keep: KeepStep | None, item: Item, models: Sequence[int], compute: np.dtype[Any], pending: Pending | None = None
) -> KeepRow:
    """Turn a rule into numbers for one row. All cuts are looked at but for those that are ``pending``."""
    seed = keep.seed if isinstance(keep, AtRandom) else 0
    keys = np.array([hash_key(seed, item.name, k) for k in models], np.uint32)
    cuts = np.array([_cuts(keep, k, compute, pending) for k in models], np.int64)
    return keys, cuts[..., 1], cuts[..., 0], cuts[..., 2]


def keep_of_rows(kind: Literal["all", "random", "magnitude"], rows: Sequence[KeepRow], pending: Pending | None = None) -> Keep:
    """Put what `keep_for` returned for each row of a table into one `mergekit_cl.kernels.Keep`."""
    keys, thresholds, cuts, places = (np.array(parts) for parts in zip(*rows, strict=True))
    return (
        Keep(kind, keys, thresholds, cuts) if pending is None else Keep(kind, keys, thresholds, cuts, pending.selected, places)
    )


def _pending(keep: KeepStep | None, models: Sequence[int], compute: np.dtype[Any]) -> Pending | None:
    """Return what the cuts of these models that are on a device belong to, if the kernels can take them from there."""
    if not isinstance(keep, AtLeast) or compute != np.float32:
        return None
    cuts = [each[k] for each in (keep.cuts, keep.less) if each is not None for k in models]
    return next((cut.pending for cut in cuts if isinstance(cut, PendingCut)), None)


def _on_host(keep: Keep, settled: Sequence[Cut], compute: np.dtype[Any]) -> Keep:
    """Put cuts into a rule in place of those on the device."""
    assert keep.places is not None
    placed = np.array([_place(cut, compute) for cut in settled], np.int64)[keep.places]
    thresholds, cuts = (np.where(keep.places < 0, own, placed[..., n]) for own, n in ((keep.thresholds, 1), (keep.cuts, 0)))
    return Keep(keep.kind, keep.keys, thresholds, cuts)


def kind_of(keep: KeepStep | None) -> Literal["all", "random", "magnitude"]:
    """Return the kind of a rule, as the kernels call it."""
    return "all" if keep is None else "random" if isinstance(keep, AtRandom) else "magnitude"


def lists(keep: KeepStep | None) -> list[Sequence[Any]]:
    """Return what a rule has for each model."""
    if keep is None:
        return []
    return [keep.density] if isinstance(keep, AtRandom) else [keep.cuts, *([] if keep.less is None else [keep.less])]


def _keeps_nothing(keep: KeepStep | None, k: int) -> bool:
    if keep is None:
        return False
    return keep.density[k] <= 0 if isinstance(keep, AtRandom) else keep.cuts[k].keeps_nothing


def _cuts(
    keep: KeepStep | None, k: int, compute: np.dtype[Any], pending: Pending | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return (pattern, threshold, place) of the cut that entries must be before, and of that which they must not be before."""
    none, beyond = (-1, 0, -1), (2 ** (8 * compute.itemsize - 1) - 1, 0, -1)
    if keep is None:
        return none, beyond
    if isinstance(keep, AtRandom):
        return (-1, round(keep.density[k] * _HASHES), -1), beyond
    cuts = [keep.cuts[k], *([] if keep.less is None else [keep.less[k]])]
    placed = [
        (0, 0, cut.number) if isinstance(cut, PendingCut) and cut.pending is pending else (*_place(cut, compute), -1)
        for cut in cuts
    ]
    return placed[0], placed[1] if len(placed) > 1 else beyond


def _place(cut: Cut, compute: np.dtype[Any]) -> tuple[int, int]:
    """Turn a cut into a pattern, and a threshold for the hashes of the entries that have it."""
    magnitude, share = cut.magnitude, cut.share
    if magnitude < 0:
        return -1, 0
    with np.errstate(over="ignore"):
        value = compute.type(magnitude)
    if float(value) != magnitude:  # a float64 cut through float32 entries: none equals it
        value, share = (np.nextafter(value, compute.type(0)) if float(value) > magnitude else value), 0.0
    pattern, threshold = int(value.view(f"i{compute.itemsize}")), round(share * _HASHES)
    return (pattern - 1, 0) if threshold >= _HASHES else (pattern, threshold)


def _copy(table: Table, pieces: Array) -> bool:
    """Copy the first column to the last, byte for byte; without an input, write zeros."""
    for row, start, stop in pieces.tolist():
        *inputs, out = table.spans[row]
        out[start:stop] = inputs[0][start:stop] if inputs else 0
    return False
