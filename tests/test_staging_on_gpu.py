"""Merges of files on a GPU: the bits of the CPU, copies beside kernels, and no more memory than was said."""

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergekit_cl import MergeError, NonFiniteError, merge, methods
from mergekit_cl.kernels import BLOCK, interpreted
from mergekit_cl.kernels.triton import launch
from mergekit_cl.kernels.triton.lanes import Lane
from mergekit_cl.out_of_core import Budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or interpreted(), reason="needs a GPU, and kernels that are not interpreted"
    ),
]

Model: TypeAlias = dict[str, npt.NDArray[Any]]
Event: TypeAlias = tuple[str, int, torch.cuda.Event, torch.cuda.Event]

REQUIRED: dict[str, Any] = {"density": 0.3, "t": 0.3, "window": 2}
SUMS = {  # methods whose coefficients are sums over whole tensors, or decompositions: the last bits are a backend's own
    "fisher", "geometric_median", "iso_c", "iso_cts", "karcher", "model_stock", "multislerp", "nuslerp", "opcm", "ram",
    "ramplus_tl", "sce", "slerp", "tsv_m",
}  # fmt: skip
BITS = {"bfloat16": 6, "float16": 9, "float32": 12, "float64": 12}  # that are the same then, of the largest entry
SHAPES: dict[str, tuple[int, ...]] = {
    "big": (3, BLOCK + 77), "matrix": (65, 33), "cube": (3, 5, 7), "odd": (7,), "scalar": (), "empty": (0, 2),
}  # fmt: skip


def model(number: int) -> Model:
    rng = np.random.default_rng(number)
    dtypes = [np.dtype(ml_dtypes.bfloat16), np.dtype("f2"), np.dtype("f4"), np.dtype("f8")]
    made = {name: rng.standard_normal(shape).astype(dtypes[k % 4]) for k, (name, shape) in enumerate(SHAPES.items())}
    return made | {"steps": np.arange(10)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Model], list[Path]]:
    """Four models in memory and in files."""
    folder = tmp_path_factory.mktemp("models")
    models = [model(number) for number in range(4)]
    paths = [folder / f"{number}.safetensors" for number in range(4)]
    for each, path in zip(models, paths, strict=True):
        merge([each], "passthrough", out=path)
    return models, paths


def divided(monkeypatch: pytest.MonkeyPatch, window: int, kept: int) -> None:
    monkeypatch.setattr(Budget, "on_device", classmethod(lambda cls, *given: cls(window, kept)))


def read(path: Any) -> Model:
    found: Model = merge([path], "passthrough", nonfinite="allow")
    return found


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (name, kept)
        for name in sorted(methods().keys() - {"arcee_fusion"})  # which compares numbers that are exp and log
        for kept in (0, 1 << 30)
        if kept or name not in {"iso_c", "iso_cts", "opcm", "tsv_m"}  # matrices are always kept
    ],
)
def test_every_method_gives_the_bits_of_the_cpu(
    name: str, kept: int, stored: tuple[list[Model], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows by four threads, and kept on the GPU."""
    method = methods()[name]
    how = {p: value for p, value in REQUIRED.items() if p in method.parameters}
    most = 1 if name == "slerp" else method.most or 3

    def given(models: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        companions = dict.fromkeys(method.companions, models[:most])
        return models[1 : 1 + most], {"base": None if method.base == "unused" else models[0], **how, **companions}

    models, options = given(stored[0])
    expected: Model = merge(models, name, backend="numpy", **options)
    divided(monkeypatch, 4 << 20, kept)
    paths, options = given(stored[1])
    found = read(merge(paths, name, out=tmp_path / "out.safetensors", device="cuda", threads=4, **options))
    for key, tensor in expected.items():
        assert found[key].shape == tensor.shape
        assert found[key].dtype == tensor.dtype
        if name not in SUMS or tensor.dtype.kind == "i":
            assert found[key].tobytes() == tensor.tobytes(), key
        elif tensor.size:
            wide, other = found[key].astype(np.float64), tensor.astype(np.float64)
            assert np.abs(wide - other).max() <= np.abs(other).max() * 2.0 ** -BITS[tensor.dtype.name], key


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Note what is put on which stream, with events before and after it."""
    events: list[Event] = []
    mutex = Lock()

    def noting(what: str, original: Callable[..., None]) -> Callable[..., None]:
        def note(*args: Any) -> None:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            original(*args)
            after.record()
            with mutex:
                events.append((what, torch.cuda.current_stream().cuda_stream, before, after))

        return note

    for what, owner, name in (("send", Lane, "send"), ("fetch", Lane, "fetch"), ("launch", launch.Launch, "__call__")):
        monkeypatch.setattr(owner, name, noting(what, getattr(owner, name)))
    return events


def test_copies_and_launches_of_several_threads_overlap(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has a stream of its own, and while one's window is on the bus, another's is too, or is computed."""
    tensors = {f"w{k}": np.full(64 << 20, k, np.float16) for k in range(4)}
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        merge([tensors], "passthrough", out=path, verify=False)
    divided(monkeypatch, 32 << 20, 0)
    start = torch.cuda.Event(enable_timing=True)
    start.record()
    merge(paths, "linear", out=tmp_path / "out.safetensors", device="cuda", threads=4, verify=False)
    torch.cuda.synchronize()
    streams = {stream for _, stream, _, _ in events}
    assert len(streams) >= 4
    assert torch.cuda.default_stream().cuda_stream not in streams
    spans = [(start.elapsed_time(a), start.elapsed_time(b), what, stream) for what, stream, a, b in events]
    apart = [
        (one[2], other[2])
        for one in spans
        for other in spans
        if one[3] != other[3] and one[0] < other[0] < one[1]  # another stream's began before this had ended
    ]
    assert {"send", "fetch"} <= {what for pair in apart for what in pair}
    assert any(pair in (("send", "fetch"), ("fetch", "send")) for pair in apart)  # both ways at once


def test_host_memory_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []
    make = Lane.__init__

    def noting(self: Lane, *args: Any) -> None:
        make(self, *args)
        pinned.append(self._pinned.is_pinned())

    monkeypatch.setattr(Lane, "__init__", noting)
    merge([{"w": np.ones(1000, np.float32)}], "passthrough", out=tmp_path / "out.safetensors", device="cuda")
    assert pinned
    assert all(pinned)


@pytest.mark.parametrize(("name", "kept"), [("linear", 0), ("ties", 64 << 20)])
def test_the_memory_of_the_gpu_is_bounded(name: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, one for each thread; what is kept; and some for what the kernels count in."""
    rng = np.random.default_rng(0)
    tensors = [{f"w{k}": rng.standard_normal(2 << 20).astype(np.float32) for k in range(12)} for _ in range(3)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, each in zip(paths, tensors, strict=True):
        merge([each], "passthrough", out=path, verify=False)
    divided(monkeypatch, 8 << 20, kept)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    how = {"base": paths[0], "density": 0.4} if name == "ties" else {}
    out = merge(paths[1:], name, out=tmp_path / "out.safetensors", device="cuda", threads=3, verify=False, **how)
    counted = (128 << 20) + (32 << 20) if name == "ties" else 4 << 20
    assert torch.cuda.max_memory_allocated() - before <= 3 * (8 << 20) + kept + counted
    how = {"base": tensors[0], "density": 0.4} if name == "ties" else {}
    expected = merge(tensors[1:], name, backend="numpy", **how)
    assert {key: value.tobytes() for key, value in read(out).items()} == {key: v.tobytes() for key, v in expected.items()}


def test_a_gpu_without_memory_left_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    merge([{"w": np.ones(16 << 20, np.float32)}], "passthrough", out=path, verify=False)
    divided(monkeypatch, 64 << 20, 0)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(MergeError, match=r"cuda:\d: out of memory \(.*\); stop what else uses this GPU, allow fewer"):
            merge([path], "linear", out=tmp_path / "out.safetensors", device="cuda", threads=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {each.name for each in tmp_path.iterdir()} <= {"a.safetensors", ".out.safetensors.merging"}


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_what_is_not_finite_is_named_as_on_the_cpu(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [{"w": np.ones(3 * BLOCK, np.float32) * k} for k in range(1, 4)]
    tensors[1]["w"][2 * BLOCK + 5] = np.nan
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, each in zip(paths, tensors, strict=True):
        merge([each], "passthrough", out=path, nonfinite="allow")
    divided(monkeypatch, 1 << 20, kept)
    messages = []
    for device in ("cpu", "cuda"):
        with pytest.raises(NonFiniteError, match=r'1\.safetensors.*tensor "w": 1 NaN') as caught:
            merge(paths[1:], "ties", base=paths[0], density=0.5, out=tmp_path / "out.safetensors", device=device)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not (tmp_path / "out.safetensors").exists()


def test_each_gpu_can_be_named(tmp_path: Path) -> None:
    tensors = [{"w": np.arange(1000, dtype=np.float32) * k} for k in range(1, 3)]
    expected = merge(tensors, "linear", backend="numpy")["w"].tobytes()
    for number in range(torch.cuda.device_count()):
        out = merge(tensors, "linear", out=tmp_path / f"{number}.safetensors", device=f"cuda:{number}")
        assert read(out)["w"].tobytes() == expected
