"""What the GPU benchmarks have of the device: a clock, models to merge, and the copy that everything is compared with."""

import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton

from mergekit_cl.kernels.triton.launch import Launch
from mergekit_cl.kernels.triton.tuning import architecture

SAMPLE = 1 << 20
"""Entries of each part of a large result that is compared with the CPU's."""

_SPREAD, _NOISE = 0.02, 0.002  # standard deviations of the base, and of what fine-tuning changed
_CHUNK = 1 << 26  # random numbers that are made at a time


@dataclass(frozen=True)
class Sizes:
    """How large everything is. A model of many tensors is shaped as Llama is, with some of a few numbers."""

    elements: int
    """of a large model"""
    matrices: int
    """that a large model is viewed as, where something is done per tensor, or per row"""
    columns: int
    width: int
    inner: int
    head: int
    vocabulary: int
    layers: int
    few: int
    """tensors of the model of many that belong to no layer, and have 5 numbers or a few more"""
    checkpoint: str
    """one of the sizes in checkpoints.py"""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name the tensors of the model of many, with their shapes; in the full size they are 300."""
        layer: dict[str, tuple[int, ...]] = {
            "q": (self.width, self.width),
            "k": (self.width // 4, self.width),
            "v": (self.width // 4, self.width),
            "o": (self.width, self.width),
            "gate": (self.inner, self.width),
            "up": (self.inner, self.width),
            "down": (self.width, self.inner),
            "norm_1": (self.width,),
            "norm_2": (self.width,),
            "q_norm": (self.head,),
            "k_norm": (self.head,),
            "scale": (5,),
        }
        layers = {f"layers.{n}.{name}": shape for n in range(self.layers) for name, shape in layer.items()}
        ends = {"embedding": (self.vocabulary, self.width), "head": (self.vocabulary, self.width), "norm": (self.width,)}
        return {**layers, **ends, **{f"buckets.{n}": (5 + n,) for n in range(self.few)}}


FULL = Sizes(1 << 30, 8, 8192, 1536, 4096, 128, 65_536, layers=24, few=9, checkpoint="0.95B")
QUICK = Sizes(1 << 26, 8, 2048, 384, 1024, 128, 16_384, layers=24, few=9, checkpoint="tiny")
REHEARSAL = Sizes(2 * 1064, 2, 133, 16, 24, 8, 64, layers=1, few=3, checkpoint="tiny")


class Device:
    """A GPU; or, in a rehearsal, the CPU, where Triton interprets the kernels and the host's clock stands in for events."""

    def __init__(self, sizes: Sizes, *, rehearsed: bool) -> None:
        self.rehearsed = rehearsed
        self.torch = torch.device("cpu" if rehearsed else "cuda:0")
        if not rehearsed:
            while sizes.elements * 48 > 0.9 * torch.cuda.mem_get_info()[0]:  # 9 models of float32, a result, and the copies
                sizes = replace(sizes, elements=sizes.elements // 2)
        self.sizes = sizes
        self.models = _Models(self.torch, sizes)
        generator = torch.Generator(self.torch).manual_seed(0)
        self._source, self._target = (
            torch.randint(-(1 << 62), 1 << 62, (max(1, sizes.elements // 4),), generator=generator, device=self.torch)
            for _ in range(2)
        )
        self._pinned: torch.Tensor | None = None

    def facts(self) -> dict[str, Any]:
        """Say what is measured, with which software."""
        software = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
        software |= {"triton": triton.__version__, "cuda": torch.version.cuda or "", "rocm": torch.version.hip or ""}
        software = {name: version for name, version in software.items() if version}
        if self.rehearsed:
            return {"device": "rehearsal", "software": software}
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            "device": properties.name,
            "architecture": architecture(self.torch),
            "memory": properties.total_memory,
            "driver": _driver(),
            "software": software,
        }

    # Time

    def mark(self) -> Any:
        """Take the time, on the device's current stream."""
        if self.rehearsed:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if not self.rehearsed:
            torch.cuda.synchronize()

    def between(self, start: Any, stop: Any) -> float:
        """Return the seconds between two marks; the device has passed both."""
        return float(stop - start if self.rehearsed else start.elapsed_time(stop) / 1e3)

    def time(self, call: Callable[[], object], *, copies: int = 0) -> float:
        """Time a call from an idle device until it is idle again; or from the end of copies, during which the host goes on."""
        self.wait()
        for _ in range(copies):
            self.copy()
        start = self.mark()
        result = call()
        stop = self.mark()
        self.wait()
        del result
        return self.between(start, stop)

    def time_kernels(self, call: Callable[[], object], *, copies: int) -> float:
        """Add up the time of the kernels that a call launches, behind some copies; nothing where it launches none."""
        launches: list[tuple[Any, Any]] = []
        launched = Launch.__call__

        def timed(launch: Launch, *tensors: torch.Tensor) -> None:
            start = self.mark()
            launched(launch, *tensors)
            launches.append((start, self.mark()))

        self.wait()
        for _ in range(copies):
            self.copy()
        with patch.object(Launch, "__call__", timed):
            result = call()
        self.wait()
        del result
        return sum(self.between(start, stop) for start, stop in launches)

    # Yardsticks

    @property
    def copied(self) -> int:
        """Bytes that a copy reads and writes."""
        return 2 * int(self._source.nbytes)

    def copy(self) -> None:
        """Copy from the device's memory to its memory."""
        self._target.copy_(self._source)

    def time_copy(self) -> float:
        """Time that copy."""
        return self.time(self.copy, copies=1)

    @property
    def sent(self) -> int:
        """Bytes that are sent over the bus at a time."""
        return int(self._source.nbytes)

    def time_bus(self) -> float:
        """Time a copy of as many bytes from pinned memory of the host."""
        if self._pinned is None:
            self._pinned = torch.empty_like(self._source, device="cpu", pin_memory=not self.rehearsed).copy_(self._source)
        pinned = self._pinned
        return self.time(lambda: self._target.copy_(pinned, non_blocking=True))


class _Models:
    """A base and fine-tunes of it: base + noise, rounded; so those of bfloat16 are full of equal magnitudes, as fine-tunes are.

    The models of one kind are kept until others are asked for.
    """

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self._device, self._sizes = device, sizes
        self._kept: dict[tuple[str, torch.dtype], list[Any]] = {}

    def drop(self) -> None:
        """Forget what is kept."""
        self._kept = {}

    def large(self, dtype: str, count: int) -> list[torch.Tensor]:
        """Make ``count`` models of one tensor, [elements], the base first."""
        made = self._of("large", dtype)
        while len(made) < count:
            made.append(self._random(self._sizes.elements, len(made), getattr(torch, dtype), made[0] if made else None))
        return made[:count]

    def matrices(self, dtype: str, count: int) -> list[dict[str, torch.Tensor]]:
        """View the large models as a few matrices each."""
        views = [model.view(self._sizes.matrices, -1, self._sizes.columns) for model in self.large(dtype, count)]
        return [{f"layers.{n}": matrix for n, matrix in enumerate(model)} for model in views]

    def many(self, dtype: str, count: int) -> list[dict[str, torch.Tensor]]:
        """Make ``count`` models of 300 tensors, the base first."""
        made = self._of("many", dtype)
        while len(made) < count:
            base = made[0] if made else {}
            made.append(
                {
                    name: self._random(
                        prod(shape), 1000 * number + len(made), getattr(torch, dtype), base[name].view(-1) if base else None
                    ).view(shape)
                    for number, (name, shape) in enumerate(self._sizes.shapes().items())
                }
            )
        return made[:count]

    def _of(self, kind: str, dtype: str) -> list[Any]:
        key = kind, getattr(torch, dtype)
        if key not in self._kept:
            self._kept = {}  # before others are made: two kinds need not fit
        return self._kept.setdefault(key, [])

    def _random(self, count: int, seed: int, dtype: torch.dtype, base: torch.Tensor | None) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(seed)
        made = torch.empty(count, dtype=dtype, device=self._device)
        for start in range(0, count, _CHUNK):
            part = slice(start, min(start + _CHUNK, count))
            noise = torch.randn(part.stop - start, generator=generator, device=self._device)
            made[part] = noise * _SPREAD if base is None else base[part].float() + noise * _NOISE
        return made


# Bits


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Bring a tensor to the host's memory; one that is there is copied."""
    return tensor.detach().to("cpu", copy=True)


def parts(count: int, size: int = SAMPLE) -> list[slice]:
    """Choose what is compared of a large tensor: so many entries at its start, in its middle and at its end."""
    if count <= 3 * size:
        return [slice(0, count)]
    middle = (count - size) // 2
    return [slice(0, size), slice(middle, middle + size), slice(count - size, count)]


def some(shapes: Mapping[str, Iterable[int]]) -> list[str]:
    """Choose tensors that are compared: the first of each shape."""
    first: dict[tuple[int, ...], str] = {}
    for name, shape in shapes.items():
        first.setdefault(tuple(shape), name)
    return list(first.values())


def same_bits(results: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, by_one: float = 0.0) -> str:
    """Check that results equal the CPU's bit for bit, and say how much was compared.

    Args:
        results: Tensors by name, on any device.
        expected: Some of them, as the CPU computes them.
        by_one: What part of the entries may differ in the last place, by one: where coefficients come from sums whose last bits
            are a backend's own.

    Raises:
        AssertionError: They differ.

    """
    compared = off = 0
    for name, there in expected.items():
        here, there = _bits(results[name]), _bits(there)
        compared += len(here)
        if torch.equal(here, there):
            continue
        differing = (here != there).nonzero()[:, 0]
        apart = (here[differing].long() - there[differing].long()).abs()
        off += len(differing)
        if len(differing) > by_one * len(here) or int(apart.max()) > 1:
            raise AssertionError(
                f"{name}: {len(differing):,} of {len(here):,} entries differ from the CPU's, first number {int(differing[0])}"
            )
    return f"{compared:,} entries" + (f", {off:,} off by one" if off else "")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(-1).view(whole)


@contextmanager
def poisoned(*results: torch.Tensor) -> Iterator[None]:
    """Fill memory with NaN, and check afterwards that all of it was written.

    Raises:
        AssertionError: Something was not written.

    """
    for result in results:
        result.fill_(torch.nan)
    yield
    for number, result in enumerate(results):
        for part in result.view(-1).split(_CHUNK):
            if not bool(part.isfinite().all()):
                raise AssertionError(f"result {number}: not all of it was written, or is finite")


def _driver() -> str:
    """Return the version of the driver, as far as it can be known."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip:
        query = ["cat", "/sys/module/amdgpu/version"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
