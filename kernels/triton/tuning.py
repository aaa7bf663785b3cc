"""Sizes of blocks, and warps, per kind of kernel and architecture: a table, so that nothing is tuned when a program starts.

What keeps the memory bus busy is bytes in flight: on an H200 some 3 MB for 132 multiprocessors. A thread that reads 16 or 32
bytes of each input at a time has them, at the registers that the kernels need. The entries below follow from that and from
what compiles without spilling. ``benchmarks/gpu.py --tune`` measures others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """Elements that a program works on at a time, and its warps (of 32 threads; of 64 on CDNA)."""

    tile: int
    warps: int


_ANY = {
    "sum": Shape(2048, 4),
    "maximum": Shape(2048, 4),
    "task_vectors": Shape(2048, 4),
    "formula": Shape(2048, 4),
    "histogram": Shape(2048, 4),
    "gram": Shape(2048, 4),
    "kept": Shape(2048, 4),
    "slices": Shape(2048, 4),
    "selection": Shape(2048, 4),
}
"""The table where an architecture has none of its own: 16 elements for each thread, of bfloat16 two accesses of 16 bytes."""

SHAPES: dict[str, dict[str, Shape]] = {}
"""What has been measured, by architecture ("sm_90", "gfx942") and kind. No architecture has been measured yet."""

_overridden: dict[str, Shape] = {}


def shape_of(kind: str, device: torch.device) -> Shape:
    """Look up the shape of a kind of kernel for a device."""
    return _overridden.get(kind) or SHAPES.get(architecture(device), {}).get(kind) or _ANY[kind]


@contextmanager
def using(**shapes: Shape) -> Iterator[None]:
    """Use other shapes for some kinds meanwhile, in all threads: to measure them."""
    before = dict(_overridden)
    _overridden.update(shapes)
    try:
        yield
    finally:
        _overridden.clear()
        _overridden.update(before)


@cache
def architecture(device: torch.device) -> str:
    """Name the architecture of a device: "sm_90", "gfx942"; "cpu" in the interpreter."""
    if device.type != "cuda":
        return str(device.type)
    properties = torch.cuda.get_device_properties(device)
    name = str(getattr(properties, "gcnArchName", ""))  # "gfx942:sramecc+:xnack-"
    return name.partition(":")[0] or f"sm_{properties.major}{properties.minor}"
