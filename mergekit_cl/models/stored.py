"""Tensors of checkpoints as leaves. A merge into memory reads them as NumPy arrays; one into files reads windows of them."""

from collections.abc import Sequence
from math import prod

import numpy as np

from mergekit_cl.checkpoint.stored import Source, is_source, numpy_dtype
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Array, Span
from mergekit_cl.layout import Entry


def owns(value: object) -> bool:
    """See `mergekit_cl.models.Library`, also for the functions below."""
    return is_source(value)


def describe(leaf: Source, name: str) -> Entry:
    return Entry(name, leaf.shape, leaf.dtype)


def memory(leaf: Source) -> tuple[int, int]:
    return 0, 0


def span(leaf: Source) -> Span:
    elements = np.empty(prod(leaf.shape), numpy_dtype(leaf.dtype))
    leaf.read(0, len(elements), elements)
    return elements


def dense(leaves: Sequence[Source]) -> Sequence[Source]:
    return leaves


def empty(leaf: Source, dtype: str) -> Span:
    return np.empty(prod(leaf.shape), numpy_dtype(dtype))


def build(span: Span, leaf: Source) -> Array:
    array: Array = span.reshape(leaf.shape)
    return array


def writable(leaf: Source) -> Span | None:
    raise MergeError("a checkpoint is not written in place; pass out= the path of a new one")


def written(leaf: Source, span: Span | None) -> None:
    writable(leaf)  # an error: there is nothing to finish
