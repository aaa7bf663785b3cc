"""What a user may pass as a model, and how a result of its kind is built.

A model is a *container* (one array, a mapping, a ``torch.nn.Module``, a JAX pytree) of *leaves*, the arrays of a library.
Containers are opened here; one file per library knows its leaves: `numpy`, `torch`, `jax`; `sharded` knows tensors of which
every process holds a part. A library is never imported for a user who did not: its leaves can only exist where it is in
``sys.modules`` already.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Span
from mergekit_cl.layout import Entry, Layout

if TYPE_CHECKING:
    from mergekit_cl.models.sharded import Share

Leaf: TypeAlias = Any
"""An array of one of the libraries."""


class Library(Protocol):
    """What a file of this package tells about the arrays of its library.

    The memory of an array of which this process holds a part (`share_of`) is that part; its shape is that of the whole.
    """

    def owns(self, value: object) -> bool:
        """Whether a value is an array of this library."""

    def describe(self, leaf: Leaf, name: str) -> Entry:
        """Name, shape, dtype, device and storage of an array; an error where it is of a kind that has no plain memory."""

    def memory(self, leaf: Leaf) -> tuple[int, int]:
        """First and last-plus-one address that the array's elements lie in; (0, 0) where it can never be written."""

    def span(self, leaf: Leaf) -> Span:
        """The elements as 1-D contiguous memory: a view where the array is contiguous, else a copy."""

    def dense(self, leaves: Sequence[Leaf]) -> Sequence[Leaf]:
        """The arrays with their dimensions in the order of memory, if that makes all of them contiguous; else as they are.

        All must lie in memory in the same order, as convolutions in channels-last do.
        """

    def empty(self, leaf: Leaf, dtype: str) -> Span:
        """New 1-D memory on the leaf's device, for as many elements."""

    def build(self, span: Span, leaf: Leaf) -> Leaf:
        """Make an array shaped as ``leaf`` from memory that `empty` gave."""

    def writable(self, leaf: Leaf) -> Span | None:
        """The elements as memory to write to; None where the array is not contiguous. An error where it is read-only."""

    def written(self, leaf: Leaf, span: Span | None) -> None:
        """Finish a write in place: copy ``span`` into a leaf that was not contiguous, and tell the library."""


_LIBRARIES = {
    "numpy": "numpy",
    "torch.distributed.tensor": "sharded",
    "torch": "torch",
    "jax": "jax",
    "mergekit_cl.checkpoint.stored": "stored",
}
"""The module that brings an array into being, and the file of this package that knows it."""


@dataclass(frozen=True)
class Model:
    """A model that has been opened: its layout, its leaves by name, and how to put new leaves in their place.

    ``rebuild`` returns a value of the model's own kind. ``own_copy`` is set for kinds that can only be copied as a whole and
    then written in place (a ``torch.nn.Module``): called with a dtype (``None`` for each tensor's own) it returns such a copy,
    opened. ``extra`` is state that is no tensor; a result can only keep it where all models agree. ``origin`` is the
    `mergekit_cl.checkpoint.reference.Opened` of a model on disk.
    """

    layout: Layout
    leaves: Mapping[str, Leaf]
    rebuild: Callable[[Mapping[str, Leaf]], Any]
    own_copy: "Callable[[str | None], Model] | None" = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    origin: Any = None

    def restricted(self, rule: Callable[[str], bool]) -> "Model":
        """Leave out all tensors but those whose names the rule is true of."""
        layout = {name: entry for name, entry in self.layout.items() if rule(name)}
        return replace(self, layout=layout, leaves={name: self.leaves[name] for name in layout})


def library_of(value: object) -> Library | None:
    """Find the library whose array a value is."""
    for module, name in _LIBRARIES.items():
        if module in sys.modules and _library(name).owns(value):
            return _library(name)
    return None


@cache
def _library(name: str) -> Library:
    return cast(Library, import_module(f"mergekit_cl.models.{name}"))


def describe(leaf: Leaf, name: str) -> Entry:
    """Describe an array of any library; an error where the value is none."""
    library = library_of(leaf)
    if library is None:
        raise MergeError(f"{name or 'the value'}: {type(leaf).__name__} is not an array of NumPy, PyTorch or JAX")
    return library.describe(leaf, name)


def share_of(leaf: Leaf) -> "Share | None":
    """Return what this process holds of an array that processes share; ``None`` if that is all of it."""
    sharded = sys.modules.get("mergekit_cl.models.sharded")
    return None if sharded is None else cast("Share | None", sharded.share(leaf))


def open_model(value: Any, where: str) -> Model:
    """Open a model of any kind.

    Args:
        value: An array; a (nested) mapping from names to arrays; a ``torch.nn.Module``; a JAX pytree; the path of
            a checkpoint, or its id on the Hugging Face Hub.
        where: What to call it in errors: "model 0", "base".

    Raises:
        MergeError: The value is not a model, or one of its arrays has no plain memory.

    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if isinstance(value, str | Path):
        from mergekit_cl.checkpoint.reference import open_reference

        opened = open_reference(value)
        return replace(_opened(opened.tensors, dict, where), origin=opened)
    if library_of(value) is not None:
        return _opened({"": value}, lambda leaves: leaves[""], where)
    if torch is not None and isinstance(value, torch.nn.Module):
        return _open_module(value, where)
    if isinstance(value, dict) and any(_walk(value, "")) and _only_arrays(value):
        return _open_mapping(value, where)
    if jax is not None:
        from mergekit_cl.models.jax import flatten

        leaves, rebuild = flatten(value)
        if leaves:
            return _opened(leaves, rebuild, where)
    if isinstance(value, Mapping):
        if not isinstance(value, dict) and value and _only_arrays(dict(value)):
            return _open_mapping(dict(value), where)
        strange = next(((k, v) for k, v in _walk(value, "") if library_of(v) is None), None)
        detail = "it is empty" if strange is None else f'"{strange[0]}" is {type(strange[1]).__name__}, not an array'
    else:
        detail = f"got {type(value).__name__}"
    raise MergeError(
        f"{where}: {detail}; a model is an array, a mapping from names to arrays, a torch.nn.Module, a JAX pytree, or a path"
    )


def _opened(leaves: Mapping[str, Leaf], rebuild: Callable[[Mapping[str, Leaf]], Any], where: str) -> Model:
    layout = {}
    for name, leaf in leaves.items():
        try:
            layout[name] = describe(leaf, name)
        except MergeError as error:
            raise MergeError(f"{where}, {tensor(name)}: {error}") from None
    return Model(layout, leaves, rebuild)


def copied(leaf: Leaf, like: Leaf, *, in_place: bool) -> Leaf:
    """Copy an array as one of another library, or into it; both have the same shape, and in place the same dtype."""
    source, library = library_of(leaf), library_of(like)
    assert source is not None
    assert library is not None
    span = source.span(leaf)
    if not in_place:
        out = library.empty(like, source.describe(leaf, "").dtype)
        out[:] = span
        return library.build(out, like)
    place = library.writable(like)
    if place is not None:
        place[:] = span
    library.written(like, span if place is None else None)
    return like


def tensor(name: str) -> str:
    """Show a tensor's name in a message; a model that is one array has the empty name."""
    return f'tensor "{name}"' if name else "the array"


def _open_module(module: Any, where: str) -> Model:
    from mergekit_cl.models.torch import copy_module, module_extra, module_tensors

    def own_copy(dtype: str | None) -> Model:
        return _open_module(copy_module(module, dtype, where), where)

    opened = _opened(module_tensors(module), lambda _: module, where)
    return replace(opened, own_copy=own_copy, extra=module_extra(module, where))


def _open_mapping(mapping: dict[Any, Any], where: str) -> Model:
    leaves: dict[str, Leaf] = {}
    for name, leaf in _walk(mapping, ""):
        if name in leaves:
            raise MergeError(f'{where}: two tensors are called "{name}"; rename one')
        leaves[name] = leaf
    return _opened(leaves, lambda new: _refill(mapping, new, ""), where)


def _only_arrays(mapping: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds arrays and mappings of arrays, and nothing else."""
    return all(_only_arrays(value) if isinstance(value, dict) else library_of(value) is not None for value in mapping.values())


def _walk(mapping: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Leaf]]:
    """List the arrays of a nested mapping; the names of nested ones are joined by dots."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refill(mapping: Any, leaves: Mapping[str, Leaf], prefix: str) -> Any:
    """Copy a nested mapping (its type and attributes too), with new leaves."""
    new = copy.copy(mapping)
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        new[key] = _refill(value, leaves, f"{name}.") if isinstance(value, dict) else leaves[name]
    return new
