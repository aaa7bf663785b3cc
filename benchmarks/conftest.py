"""What the benchmarks share: sizes, models, a check against exact arithmetic, and a race between contenders."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from math import isqrt
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

SCALE = float(os.environ.get("MERGEKIT_CL_BENCH_SCALE", "1"))
THREADS = 2

_LOAD = os.getloadavg()[0]
_UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["packages"] = {name: version(name) for name in ("numpy", "numba", "torch", "mergekit")}
    machine_info.update(scale=SCALE, load=_LOAD)


@pytest.fixture(scope="session", autouse=True)
def threads() -> int:
    """Threads that every contender has."""
    torch.set_num_threads(THREADS)
    return THREADS


@pytest.fixture(scope="session")
def scaled() -> Callable[[int], int]:
    """Shrink a number of elements by ``MERGEKIT_CL_BENCH_SCALE``, to try out the benchmarks themselves."""
    return lambda elements: max(4096, int(elements * SCALE))


@pytest.fixture(scope="session")
def copy(threads: int) -> Iterator[Callable[..., None]]:
    """Copy an array, a part in each thread: the yardstick."""
    with ThreadPoolExecutor(threads) as pool:

        def run(source: npt.NDArray[Any], target: npt.NDArray[Any], parts: int = threads) -> None:
            bits = np.dtype(f"u{source.itemsize}")  # numpy copies a dtype that is not its own element by element
            pieces = (np.array_split(array.view(bits), parts) for array in (target, source))
            list(pool.map(np.copyto, *pieces))

        yield run


@pytest.fixture(scope="session")
def transformer() -> Callable[..., dict[str, torch.Tensor]]:
    """Make 300 tensors shaped as in a transformer of 33 layers, with about ``elements`` random numbers in all."""

    def run(elements: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
        width = isqrt(elements // 460)
        square, wide, tall = (width, width), (width * 8 // 3, width), (width, width * 8 // 3)
        layer = {"q": square, "k": square, "v": square, "o": square, "gate": wide, "up": wide, "down": tall}
        shapes: dict[str, tuple[int, ...]] = {f"layers.{n}.{name}": shape for n in range(33) for name, shape in layer.items()}
        norms = {f"layers.{n}.{name}": (width,) for n in range(33) for name in ("norm_1", "norm_2")}
        ends = {"embedding": (32 * width, width), "head": (32 * width, width), "norm": (width,)}
        generator = torch.Generator().manual_seed(seed)
        shapes |= norms | ends
        return {name: torch.rand(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return run


@pytest.fixture
def race(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Time contenders in turn, round by round, so that all of them meet the same noise.

    pytest-benchmark times the first; the others run in the set-up of each of its rounds.
    """

    def run(contenders: Mapping[str, Callable[[], object]], *, rounds: int, **info: object) -> None:
        (name, first), *others = contenders.items()
        seconds: dict[str, list[float]] = {other: [] for other, _ in others}

        def run_others() -> None:
            for other, call in others:
                start = perf_counter()
                call()
                seconds[other].append(perf_counter() - start)

        benchmark.pedantic(first, setup=run_others, rounds=rounds if SCALE >= 1 else 2)  # type: ignore[no-untyped-call]
        beside = {other: {"min": min(times), "median": median(times)} for other, times in seconds.items()}
        benchmark.extra_info.update(info, name=name, beside=beside)

    return run


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """Compare a sample of a result with a weighted sum in float64.

    The bound leaves room for float32 arithmetic on the way and for ``roundings`` to the dtype of the result.
    """

    def run(result: Any, models: Sequence[Any], weights: Sequence[float], roundings: int = 1) -> None:
        sample = np.random.default_rng(1).integers(0, len(result.reshape(-1)), 10_000)
        inputs = np.stack([_exact(model, sample) for model in models])
        expected = np.array(weights) @ inputs
        arithmetic = 16 * _UNIT_ROUNDOFF["float32"] * np.abs(inputs).max(axis=0)
        rounding = roundings * _UNIT_ROUNDOFF[str(result.dtype).removeprefix("torch.")] * (np.abs(expected) + arithmetic)
        np.testing.assert_array_less(np.abs(_exact(result, sample) - expected), arithmetic + rounding)

    return run


def _exact(tensor: Any, sample: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    taken = tensor.reshape(-1)[sample]
    return np.asarray(taken.detach().double() if isinstance(taken, torch.Tensor) else taken, np.float64)
