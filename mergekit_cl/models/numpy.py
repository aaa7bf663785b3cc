"""NumPy arrays (and scalars) as leaves; bfloat16 is ``ml_dtypes.bfloat16``."""

from collections.abc import Sequence

import numpy as np

from mergekit_cl.dtypes import check_mergeable, type_of
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Array, Span
from mergekit_cl.layout import Entry, memory_order, overlaps_itself


def owns(value: object) -> bool:
    """See `mergekit_cl.models.Library`, also for the functions below."""
    return isinstance(value, np.ndarray | np.generic)


def describe(leaf: Array, name: str) -> Entry:
    if isinstance(leaf, np.ma.MaskedArray):
        raise MergeError("a masked array cannot be merged; fill it first")
    check_mergeable(leaf.dtype.name, "NumPy array")
    shared = isinstance(leaf, np.ndarray) and leaf.size  # a scalar has no memory of its own
    storage = ("cpu", leaf.ctypes.data, leaf.shape, leaf.strides, leaf.dtype.name) if shared else None
    return Entry(name, leaf.shape, leaf.dtype.name, "cpu", storage)


def memory(leaf: Array) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(leaf) if np.size(leaf) else (0, 0)


def span(leaf: Array) -> Span:
    leaf = np.asarray(leaf)
    return np.require(leaf, leaf.dtype.newbyteorder("="), ["C", "ALIGNED"]).reshape(-1)


def dense(leaves: Sequence[Array]) -> Sequence[Array]:
    if len({leaf.strides for leaf in leaves}) > 1:
        return leaves
    ordered = [np.transpose(leaf, memory_order(leaf.strides)) for leaf in leaves]
    return ordered if all(leaf.flags.c_contiguous for leaf in ordered) else leaves


def empty(leaf: Array, dtype: str) -> Span:
    return np.empty(np.size(leaf), type_of.get(dtype, dtype))


def build(span: Span, leaf: Array) -> Array:
    array: Array = span.reshape(np.shape(leaf))
    return array


def writable(leaf: Array) -> Span | None:
    if not isinstance(leaf, np.ndarray) or not leaf.flags.writeable:
        raise MergeError("the array is read-only; pass arrays that can be written")
    if overlaps_itself(leaf.shape, leaf.strides):
        raise MergeError("several elements share one place in memory; pass an array that holds each of them")
    plain = leaf.flags.c_contiguous and leaf.flags.aligned and leaf.dtype.isnative
    return leaf.reshape(-1) if plain else None


def written(leaf: Array, span: Span | None) -> None:
    if span is not None:
        leaf[...] = span.reshape(leaf.shape)
