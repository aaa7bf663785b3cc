"""Aligns models, resolves parameters, and checks everything that can be checked before a byte of data is read."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from mergekit_cl.dtypes import EXACT, unmergeable
from mergekit_cl.errors import Faults, MergeError, MismatchError, listing
from mergekit_cl.filters import Parameters
from mergekit_cl.layout import Entry, ties
from mergekit_cl.models import Leaf, Library, Model, library_of, share_of, tensor
from mergekit_cl.registry import SCOPE, Method
from mergekit_cl.steps import Scope


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor to merge, under all the names that are tied to it; the data is read through ``leaves``.

    ``leaves`` are its arrays in the inputs of the plan (models, then the base); ``like`` is the array that the result
    resembles, or, where ``in_place``, the array that it is written into.
    """

    names: tuple[str, ...]
    dtype: str
    leaves: tuple[Leaf, ...]
    like: Leaf

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of all of the arrays."""
        return self.library.describe(self.like, self.name).shape

    @cached_property
    def library(self) -> Library:
        """The library of the array that the result resembles."""
        library = library_of(self.like)
        assert library is not None
        return library


@dataclass(frozen=True)
class Plan:
    """A merge, ready to run: nothing in it depends on the data.

    ``scopes`` are what the method is called for, each with the tensors that it consists of. ``labels`` say what to call each
    input in messages: the models, as many for each of the ``companions`` (parameters that are models), then the base (where
    there is one). ``in_place`` says that results go into tensors that exist already, ``check_first`` that these must not be
    touched if anything is wrong.
    """

    method: Method
    parameters: Parameters
    scopes: tuple[tuple[Scope, tuple[Item, ...]], ...]
    exact: tuple[Item, ...]
    labels: tuple[str, ...]
    models: int
    device: str
    in_place: bool
    check_first: bool
    companions: tuple[str, ...] = ()

    @cached_property
    def traces(self) -> dict[Any, Any]:
        """The formulas that have been traced for this plan."""
        return {}

    @property
    def items(self) -> tuple[Item, ...]:
        """All tensors of the merge."""
        return (*(item for _, group in self.scopes for item in group), *self.exact)

    @property
    def has_base(self) -> bool:
        """Whether the last input is the base."""
        return len(self.labels) > self.models * (1 + len(self.companions))

    def parameters_of(self, scope: Scope) -> Mapping[str, Any]:
        """Return what the method is called with for a scope; an equal choice is the same object."""
        return self.parameters.at(scope.names[0] if scope.names else "")

    def by_parameters(self) -> "tuple[Plan, ...]":
        """Split the plan: in each part the method is called with the same parameters for all scopes."""
        parts: dict[int, list[tuple[Scope, tuple[Item, ...]]]] = {}
        for scope, items in self.scopes:
            parts.setdefault(id(self.parameters_of(scope)), []).append((scope, items))
        if len(parts) < 2:
            return (self,)
        return tuple(
            replace(self, scopes=tuple(scopes), exact=() if number else self.exact)
            for number, scopes in enumerate(parts.values())
        )


def plan(
    method: Method,
    models: Sequence[Model],
    base: Model | None,
    target: Model,
    *,
    parameters: Mapping[str, object],
    labels: Sequence[str],
    out_dtype: str | None = None,
    in_place: bool = False,
    check_first: bool = False,
    seed: int = 0,
    names: Iterable[str] = (),
    companions: Sequence[Model] = (),
) -> Plan:
    """Plan a merge of opened models.

    Args:
        method: The merge method.
        models: The models, in their order; all have the same tensors.
        base: The base, where the method has one.
        target: The model that the result resembles (then it is one of the models), or is written into.
        parameters: What the user gave for the method, ``scope`` included.
        labels: What to call the models, and then the base, in messages.
        out_dtype: The dtype of all floating results; ``None`` for that of the target's tensors.
        in_place: Whether to write into the target's tensors.
        check_first: Whether the target is the user's own, so that nothing may be written before all is checked.
        seed: For methods with random masks.
        names: Tensors that are not merged, but that the filter of a parameter may match.
        companions: The models that are parameters of the method, in the order of `Method.companions`.

    Raises:
        MismatchError: Names, shapes, devices, kinds of dtype or ties differ. One message lists all problems.
        MergeError: A parameter is missing, unknown or out of range, or memory of the output overlaps an input.

    """
    given = dict(parameters)
    inputs = [*models, *companions, *([] if base is None else [base])]
    merged: list[str] | None = None
    faults = Faults()
    with faults:
        device = _check_alignment(inputs, target, labels)
        items = _items(inputs, target)
        if any(share_of(item.like) for item in items):
            items.sort(key=lambda item: min(item.names))  # what processes send each other is in one order in all of them
        merged = [item.name for item in items if item.dtype not in EXACT]
        if in_place:
            if method.orderless:
                items = [_flat(item) for item in items]
            _check_target(items, target)
        if check_first:
            _check_overlap(items, labels)
    with faults:
        kind = SCOPE.check(given.pop("scope", "tensor") if "scope" in method.shown else "tensor", f"{method.name}:")
    with faults:
        settings = Parameters(method, given, len(models), merged, [*target.layout, *names])
    faults.report()
    if kind == "model":
        settings.check_equal(merged or ())
    exact = tuple(item for item in items if item.dtype in EXACT)
    floating = [item for item in items if item.dtype not in EXACT]
    if out_dtype is not None and not in_place:
        floating = [Item(item.names, out_dtype, item.leaves, item.like) for item in floating]
    groups = [(item,) for item in floating] if kind == "tensor" else [tuple(floating)] if floating else []
    scopes = tuple(
        (
            Scope(
                tuple(name for item in group for name in item.names),
                len(models),
                base is not None,
                seed,
                elements=sum(prod(item.shape) for item in group),
            ),
            group,
        )
        for group in groups
    )
    return Plan(
        method, settings, scopes, exact, tuple(labels), len(models), device, in_place, check_first, tuple(method.companions)
    )


def _check_alignment(inputs: Sequence[Model], target: Model, labels: Sequence[str]) -> str:
    """Check that all inputs and the target have the same tensors, on one device; return that device."""
    first = inputs[0].layout
    problems = []
    for model, label in zip([*inputs[1:], target], [*labels[1:], "out"], strict=True):
        problems += [f"{label} lacks {tensor(name)}, which {labels[0]} has" for name in first if name not in model.layout]
        problems += [f"{label} has {tensor(name)}, which {labels[0]} lacks" for name in model.layout if name not in first]
        problems += [
            f"{label}, {tensor(name)}: {fault}"
            for name, entry in model.layout.items()
            if name in first and (fault := _difference(entry, first[name], labels[0]))
        ]
    problems += [
        f"{label}, {tensor(name)}: {fault}"
        for model, label in zip(inputs, labels, strict=True)
        for name, entry in model.layout.items()
        if (fault := unmergeable(entry.dtype))
    ]
    problems += _extra_problems(inputs, labels)
    problems += placement_problems([*inputs, target], [*labels, "out"], first)
    if problems:
        raise MismatchError(listing(problems))
    devices = {entry.device: name for name, entry in first.items()}
    if len(devices) > 1:
        (one, name), (other, other_name), *_ = devices.items()
        raise MismatchError(f'{labels[0]}: "{name}" is on {one}, but "{other_name}" on {other}; move the model to one device')
    return next(iter(devices), "cpu")


def _extra_problems(inputs: Sequence[Model], labels: Sequence[str]) -> list[str]:
    """List what modules keep beside tensors, and not all of them alike."""
    if not any(model.extra for model in inputs):
        return []
    from mergekit_cl.models.torch import same_extra

    return [
        f'{label}: its extra state "{name}" differs from that of {labels[0]}, and cannot be averaged; merge state dicts'
        for model, label in zip(inputs[1:], labels[1:], strict=True)
        for name, value in model.extra.items()
        if inputs[0].extra and not same_extra(value, inputs[0].extra.get(name))
    ]


def placement_problems(models: Sequence[Model], labels: Sequence[str], names: Iterable[str]) -> list[str]:
    """List tensors that the processes do not share in the same way in all of the models."""
    problems = []
    for name in names:
        one = share_of(models[0].leaves[name])
        for model, label in zip(models[1:], labels[1:], strict=True):
            other = share_of(model.leaves.get(name))
            if name in model.leaves and (one and one.placement) != (other and other.placement):
                problems.append(
                    f"{label}, {tensor(name)}: {other or 'not sharded'}, but {labels[0]} has {one or 'all of it'}; "
                    "place the tensors of all models alike"
                )
    return problems


def _difference(entry: Entry, other: Entry, label: str) -> str:
    if entry.shape != other.shape:
        return f"shape {entry.shape}, but {label} has {other.shape}; only models of the same architecture can be merged"
    if entry.device != other.device:
        return f"on {entry.device}, but {label} is on {other.device}; move all models to one device"
    if (entry.dtype in EXACT) != (other.dtype in EXACT):
        return f"dtype {entry.dtype}, but {label} has {other.dtype}; integers cannot be merged with floating numbers"
    if entry.dtype in EXACT and entry.dtype != other.dtype:
        return f"dtype {entry.dtype}, but {label} has {other.dtype}; integers are copied as they are, so make the dtypes equal"
    return ""


def _items(inputs: Sequence[Model], target: Model) -> list[Item]:
    """List the tensors of a merge. Names that are tied in every input, and in the target, are one tensor."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    tied = [ties(model.layout) for model in (*inputs, target)]
    for name in target.layout:
        groups.setdefault(tuple(group[name] for group in tied), []).append(name)
    return [
        Item(
            tuple(names),
            target.layout[names[0]].dtype,
            tuple(m.leaves[names[0]] for m in inputs),
            target.leaves[names[0]],
        )
        for names in groups.values()
    ]


def _flat(item: Item) -> Item:
    """Look at tensors that all lie in memory in the same order, without gaps, in that order: then none has to be copied."""
    leaves = [*item.leaves, item.like]
    if not all(map(item.library.owns, leaves)):
        return item
    *inputs, like = item.library.dense(leaves)
    return Item(item.names, item.dtype, tuple(inputs), like)


def _check_target(items: Sequence[Item], target: Model) -> None:
    """Refuse a target whose tied tensors would have to take two results."""
    result_of = {name: item for item in items for name in item.names}
    for group in ties(target.layout).values():
        apart = [name for name in group if result_of[name] is not result_of[group[0]]]
        if apart:
            raise MismatchError(f'"{group[0]}" and "{apart[0]}" are tied in the result, but not in every model; tie them in '
                                "all models, or merge state dicts in which they are not tied")  # fmt: skip
    for item in items:
        try:
            item.library.writable(item.like)
        except MergeError as error:
            raise MergeError(f"out, {tensor(item.name)}: {error}") from None


def _check_overlap(items: Sequence[Item], labels: Sequence[str]) -> None:
    """Refuse an output that shares part of its memory with an input, or all of it with another tensor's input."""
    outputs = sorted((*item.library.memory(item.like), index) for index, item in enumerate(items))
    starts = [start for start, _, _ in outputs]
    longest = max((stop - start for start, stop, _ in outputs), default=0)

    def hits(start: int, stop: int) -> list[int]:
        low, high = bisect_left(starts, start - longest), bisect_left(starts, stop)
        return [index for begin, end, index in outputs[low:high] if begin < stop and start < end]

    for index, item in enumerate(items):
        for leaf, label in zip((*item.leaves, item.like), (*labels, "out"), strict=True):
            library = library_of(leaf)
            assert library is not None
            for hit in hits(*library.memory(leaf)):
                same = library.describe(leaf, "").storage == items[hit].library.describe(items[hit].like, "").storage
                if hit != index or not same:
                    raise MergeError(
                        f"{label}, {tensor(item.name)}: shares part of its memory with the output "
                        f"{tensor(items[hit].name)}; write into the whole tensor itself, or into memory of its own"
                    )
