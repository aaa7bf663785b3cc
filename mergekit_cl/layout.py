"""What a model consists of, without its data: the name, shape and dtype of each tensor, and which of them are one tensor."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Entry:
    """One tensor of a model.

    ``storage`` is equal for names that share all their memory (tied tensors); ``None`` where nothing can be shared.
    ``device`` is "cpu", or the name that the tensor's framework gives its device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    storage: Hashable = None


Layout: TypeAlias = Mapping[str, Entry]
"""The tensors of a model by name, in the model's own order."""


def ties(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Group the names that share their memory, by name; a tensor that is not tied is alone in its group.

    >>> ties({"a": Entry("a", (2,), "float32", storage=7), "b": Entry("b", (2,), "float32", storage=7)})
    {'a': ('a', 'b'), 'b': ('a', 'b')}
    """
    groups: dict[Hashable, list[str]] = {}
    for entry in layout.values():
        groups.setdefault(entry.name if entry.storage is None else (entry.storage,), []).append(entry.name)
    return {name: tuple(group) for group in groups.values() for name in group}


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements of an array may share memory, as those of an expanded one do.

    >>> overlaps_itself((2, 3), (3, 1)), overlaps_itself((2, 3), (0, 1)), overlaps_itself((0, 3), (0, 0))
    (False, True, False)
    """
    if 0 in shape:
        return False
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def memory_order(strides: Sequence[int]) -> list[int]:
    """Dimensions in the order in which memory holds them, from the slowest to the fastest.

    >>> memory_order((12, 1, 4))
    [0, 2, 1]
    """
    return sorted(range(len(strides)), key=lambda dimension: -abs(strides[dimension]))
