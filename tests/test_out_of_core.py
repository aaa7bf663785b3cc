"""Merges of files: the bytes of the merge in memory, however small the windows, and no more memory than was allowed."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mergekit_cl import CheckpointError, MergeError, NonFiniteError, kernels, merge, methods, out_of_core
from mergekit_cl.api import prepare_files
from mergekit_cl.checkpoint.stored import DataFile, numpy_dtype
from mergekit_cl.execute import CHUNK
from mergekit_cl.file_merge import FileMerge
from mergekit_cl.kernels import BLOCK
from mergekit_cl.kernels import numpy as numpy_kernels
from mergekit_cl.kernels.triton import lanes
from mergekit_cl.out_of_core import Budget, check_memory, run
from mergekit_cl.steps import PerMatrix

Array = npt.NDArray[Any]
Model = dict[str, Array]

REQUIRED: dict[str, Any] = {"density": 0.3, "t": 0.3, "window": 2}
MODES: dict[str, list[dict[str, Any]]] = {
    "breadcrumbs": [{"gamma": [0, 0.2, 0.5], "rescale": "l1", "weight": [0.7, -1.2, 0.4]}],
    "breadcrumbs_ties": [{"gamma": [0, 0.2, 0.5], "combine": "count_mean"}],
    "dare_linear": [{"density": [1, 0, 0.9], "seed": 3}],
    "dare_ties": [{"combine": "weight_mean", "weight": [0.7, -1.2, 0.4], "seed": 5}],
    "karcher": [{"weight": [0.7, 1.2, 0.4], "max_iter": 3}],
    "linear": [{"weight": [0.7, -1.2, 0.4], "normalize": False}, {"out_dtype": "float16"}],
    "magnitude_prune": [{"density": [1, 0, 0.9], "lambda_": 0.5}],
    "model_stock": [{"filter_wise": True}],
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": [0.3, 0.9]}],
    "passthrough": [{"scale": 0.5}],
    "task_arithmetic": [{"weight": [0.7, -1.2, 0.4], "normalize": True}],
    "della": [{"rescale": "l1", "seed": 4}],
    "sce": [{"select_topk": 0.3}],
    "ties": [
        {"elect": "unweighted", "combine": "count_mean", "weight": [0.7, -1.2, 0.4]},
        {"combine": "max", "rescale": "inverse_density", "lambda_": 0.7},
        {"combine": "sum", "density": [1, 0, 0.9], "rescale": "l1", "out_dtype": "bfloat16"},
    ],
}
BY_ROW = {"arcee_fusion", "della", "della_linear"}
CASES = [(name, how) for name in methods() for how in [{}, *MODES.get(name, [])]]

SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.weight": (2, 70_001),
    "layers.1.weight": (300, 40),
    "layers.2.weight": (2, 3, 50),
    "block": (BLOCK,),
    "bias": (BLOCK + 1,),
    "column": (9, 1),
    "short": (7,),
    "scalar": (),
    "empty": (0, 3),
}
DTYPES = ["bfloat16", "float16", "float32", "float64"]
LARGEST_ROW = 70_001 * 5 * 8


def model(number: int, mixed: bool) -> Model:
    """Make a model: its tensors' dtypes are those of all models, or each model has its own."""
    rng = np.random.default_rng(number)
    made = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        dtype = numpy_dtype(DTYPES[(index + number * mixed) % 4])
        made[name] = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 2, shape)).astype(dtype)
    made["steps"] = np.arange(100, dtype=np.int64)
    made["mask"] = np.arange(BLOCK + 5) % 3 == 0
    made["layers.0.weight"][0, ::7] = 0.5  # equal magnitudes
    made["short"][1] = -0.0
    return made


def save(folder: Path, tensors: Model, shards: int) -> Path:
    """Write a file, or a folder of several."""
    if shards == 1:
        save_file(tensors, path := folder.with_suffix(".safetensors"))
        return path
    folder.mkdir()
    where = {name: f"model-{1 + index % shards:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[list[Model], list[Path]]]:
    """Four models with the same dtypes (False) or with mixed ones (True): in memory and on disk, as files and as shards."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {}
    for mixed in (False, True):
        models = [model(number, mixed) for number in range(4)]
        paths = [save(folder / f"{number}-{mixed}", tensors, [1, 3, 2, 1][number]) for number, tensors in enumerate(models)]
        kinds[mixed] = models, paths
    return kinds


def arguments(name: str, how: dict[str, Any], models: Sequence[Any], scope: str) -> tuple[list[Any], dict[str, Any]]:
    """Choose as many of four models as a method takes (the first is the base, if it has one), and its parameters."""
    method = methods()[name]
    options = {p: value for p, value in REQUIRED.items() if p in method.parameters} | how
    if "scope" in method.shown and not (how.get("filter_wise") or how.get("nuslerp_flatten") is False):
        options["scope"] = scope
    base = None if method.base == "unused" else models[0]
    most = 1 if name == "slerp" else method.most or 3
    options |= {companion: list(models[:most]) for companion in method.companions}
    return list(models[1 : 1 + most]), {"base": base, **options}


class Soiled(lanes.Lane):
    """A lane whose memory holds NaN of all dtypes, so that what was not copied shows."""

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__(device, size)
        self.host[:] = 0xFF
        self.there.fill_(0xFF)


class Memory:
    """A sink that keeps what it is given, and notes how."""

    def __init__(self, merging: FileMerge, done: frozenset[str] = frozenset()) -> None:
        self.done = done
        self.tensors = {o.name: np.full(o.size * numpy_dtype(o.dtype).itemsize, 0xAB, np.uint8) for o in merging.outputs}
        self.windows = {o.name: 0 for o in merging.outputs}
        self.sizes = {o.name: numpy_dtype(o.dtype).itemsize for o in merging.outputs}

    def write(self, name: str, first: int, data: Array) -> None:
        assert name not in self.done
        at = first * self.sizes[name]
        raw = data.view(np.uint8)
        self.tensors[name][at : at + len(raw)] = raw
        self.windows[name] += 1


def prepared(paths: list[Any], name: str, options: dict[str, Any]) -> FileMerge:
    kinds = {key: options[key] for key in ("base", "out_dtype", "seed", "only", "exclude") if key in options}
    parameters = {key: value for key, value in options.items() if key not in kinds}
    merging = prepare_files(paths, name, out="unused", parameters=parameters, **kinds)
    assert isinstance(merging, FileMerge)
    return merging


def divide(monkeypatch: pytest.MonkeyPatch, window: int, kept: int) -> None:
    for name in ("of", "on_device"):
        monkeypatch.setattr(Budget, name, classmethod(lambda cls, *given: cls(window, kept)))


@pytest.mark.parametrize(("backend", "mixed"), [("numpy", True), ("numba", True), ("numba", False)])
@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_the_bytes_of_the_merge_in_memory(
    name: str,
    how: dict[str, Any],
    backend: str,
    mixed: bool,
    stored: dict[bool, tuple[list[Model], list[Path]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In tiny windows and large ones, surveys windowed, in groups, and all at once, by one thread and by three."""
    models, paths = stored[mixed]
    sliced = "filter_wise" in how or "nuslerp_flatten" in how or name in BY_ROW
    scoped = "scope" in methods()[name].shown and (not sliced or name in BY_ROW)
    for scope in ["tensor", "model"] if scoped else ["tensor"]:
        given, options = arguments(name, how, models, scope)
        expected: Model = merge(given, name, backend=backend, threads=1, nonfinite="allow", **options)
        given, options = arguments(name, how, paths, scope)
        merging = prepared(given, name, options)
        window = LARGEST_ROW if sliced else 1
        for least, kept, threads in ((window, 0, 3), (window, 3 << 20, 1), (8 << 20, 1 << 30, 3)):
            # columns and matrices need the whole tensor
            whole = "nuslerp_row_wise" in how or methods()[name].ends_in(PerMatrix)
            room = max(kept, 30 << 20) if whole else kept
            divide(monkeypatch, least, room)
            sink = Memory(merging)
            counted: list[int] = []
            run(merging.job, sink, backend=backend, threads=threads, nonfinite="allow", advance=counted.append)
            wrong = [key for key, raw in sink.tensors.items() if raw.tobytes() != expected[key].tobytes()]
            assert not wrong, (scope, least, kept, threads)
            assert set(sink.tensors) == set(expected)
            assert sum(counted) == merging.elements == sum(tensor.size for tensor in expected.values())
            if least == 1:
                assert sink.windows["layers.0.weight"] == (1 if whole else 3)
                assert sink.windows["bias"] == 2


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_the_bytes_of_the_merge_on_a_device(
    name: str, how: dict[str, Any], stored: dict[bool, tuple[list[Model], list[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staged on other memory of the CPU, where NumPy's kernels stand for Triton's: in windows, and kept as far as it fits."""
    models, paths = stored[True]
    given, options = arguments(name, how, models, "tensor")
    expected: Model = merge(given, name, backend="numpy", nonfinite="allow", **options)
    sliced = "filter_wise" in how or "nuslerp_flatten" in how or name in BY_ROW
    whole = "nuslerp_row_wise" in how or methods()[name].ends_in(PerMatrix)
    given, options = arguments(name, how, paths, "tensor")
    merging = prepared(given, name, options)
    monkeypatch.setattr(kernels, "load", lambda backend, device: (backend, numpy_kernels))
    monkeypatch.setattr(lanes, "Lane", Soiled)
    for window, kept, threads in ((LARGEST_ROW if sliced else 1, 0, 3), (1 << 20, 60 << 20 if whole else 6 << 20, 2)):
        divide(monkeypatch, window, 60 << 20 if whole else kept)
        sink = Memory(merging)
        counted: list[int] = []
        run(merging.job, sink, backend="triton", threads=threads, nonfinite="allow", advance=counted.append)
        wrong = [key for key, raw in sink.tensors.items() if raw.tobytes() != expected[key].tobytes()]
        assert not wrong, (window, kept)
        assert sum(counted) == merging.elements
        if window == 1:
            assert sink.windows["layers.0.weight"] == 3


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_the_files_that_are_written(
    name: str, how: dict[str, Any], stored: dict[bool, tuple[list[Model], list[Path]]], tmp_path: Path
) -> None:
    models, paths = stored[True]
    given, options = arguments(name, how, models, "tensor")
    expected: Model = merge(given, name, nonfinite="allow", **options)
    given, options = arguments(name, how, paths, "tensor")
    out = tmp_path / ("merged.safetensors" if len(how) % 2 else "merged")
    assert merge(given, name, out=out, shard_size="200kB", memory="300MB", nonfinite="allow", **options) == out
    files = [out] if out.is_file() else sorted(out.glob("*.safetensors"))
    assert len(files) == 1 if out.is_file() else len(files) > 1
    merged = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert merged[key].dtype == tensor.dtype
        assert merged[key].shape == tensor.shape
        assert merged[key].tobytes() == tensor.tobytes(), key
    in_memory = merge(given, name, nonfinite="allow", **options)  # paths, but no out
    assert {key: value.tobytes() for key, value in in_memory.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_groups_of_tensors_are_kept_within_the_budget(
    stored: dict[bool, tuple[list[Model], list[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group is at most half of what can be kept; a tensor that is larger than all of it is read again for every sweep."""
    given, options = arguments("ties", {}, stored[False][1], "tensor")
    merging = prepared(given, "ties", options)
    (planned,) = merging.job.plans
    parts = list(out_of_core._parts(planned, 3 << 20))
    sizes = [[int(np.prod(item.shape)) * out_of_core._width(item, result=False) for item in part.items] for part, _ in parts]
    assert sum(len(part.items) for part, _ in parts) == len(planned.items)
    assert [kept for _, kept in parts].count(True) >= 2
    assert all(sum(group) <= 3 << 19 or len(group) == 1 for group, (_, kept) in zip(sizes, parts, strict=True) if kept)
    assert all(sum(group) <= 3 << 20 for group, (_, kept) in zip(sizes, parts, strict=True) if kept)
    before = sum(file.bytes_read for file in merging.job.files)
    divide(monkeypatch, 8 << 20, 1 << 30)
    run(merging.job, Memory(merging))
    once = sum(file.bytes_read for file in merging.job.files) - before
    mask_and_steps = 4 * (BLOCK + 5 + 800) + 2 * (BLOCK + 5 + 800)  # compared, and copied
    assert once <= merging.read + mask_and_steps
    divide(monkeypatch, 1, 0)
    run(merging.job, Memory(merging))
    assert sum(file.bytes_read for file in merging.job.files) - before - once > 2 * once


# What goes wrong


def test_too_little_memory_names_what_is_needed() -> None:
    with pytest.raises(MergeError, match=r"memory: 50 MB are too little for 4 threads; give (\d+) MB or more") as caught:
        Budget.of(50 * 10**6, 4)
    enough = int(str(caught.value).split("give ")[1].split()[0])
    budget = Budget.of(enough * 10**6, 4)
    assert budget.window >= 1 << 20
    for threads in (1, 2, 7):
        for memory in (200 << 20, 512 << 20, 5 << 30):
            budget = Budget.of(memory, threads)
            assert budget.window > 0
            assert budget.kept >= 0
            assert budget.window * threads + budget.kept <= memory - out_of_core._FIXED
    with pytest.raises(MergeError, match="are too little"):
        Budget.of((enough - 1) * 10**6, 4)


WHOLE = [
    ("model_stock", {"filter_wise": True}, "rows"),
    ("nuslerp", {"nuslerp_flatten": False}, "rows"),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, "columns"),
]


def sparse(name: str, how: dict[str, Any], folder: Path) -> FileMerge:
    """Prepare a merge of files of which next to nothing takes room on the disk."""
    header: dict[str, Any] = {
        key: {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin + 2 * prod(shape)]}
        for key, shape, begin in (("big", [2, 40_000_000], 0), ("small", [2, 5], 160_000_000))
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    paths = [folder / f"{number}.safetensors" for number in range(4)]
    for path in paths:
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(path, 8 + len(raw) + 160_000_020)
    given, options = arguments(name, how, paths, "tensor")
    return prepared(given, name, options)


@pytest.mark.parametrize(("name", "how", "along"), WHOLE, ids=str)
def test_rows_and_columns_that_do_not_fit_are_refused_before_anything_is_read(
    name: str, how: dict[str, Any], along: str, tmp_path: Path
) -> None:
    merging = sparse(name, how, tmp_path)
    before = [file.bytes_read for file in merging.job.files]
    with pytest.raises(
        MergeError, match=rf'tensor "big": {name} looks at whole {along}, \d+ MB at once.* give it \d+ MB'
    ) as caught:
        merging.run(memory=200 << 20, threads=2)
    assert "small" not in str(caught.value)
    with pytest.raises(MergeError, match="big"):
        run(merging.job, Memory(merging), memory=200 << 20, threads=2)
    assert [file.bytes_read for file in merging.job.files] == before
    assert not Path("unused").exists()
    check_memory(merging.job, 2 << 30, 2)


@pytest.mark.parametrize(
    ("name", "how", "threads"),
    [(name, how, 2) for name, how, _ in WHOLE] + [(name, how, 1) for name, how, _ in WHOLE],
)
def test_the_memory_that_is_asked_for_is_enough(name: str, how: dict[str, Any], threads: int, tmp_path: Path) -> None:
    merging = sparse(name, how, tmp_path)
    with pytest.raises(MergeError) as caught:
        check_memory(merging.job, 200 << 20, threads)
    enough = int(str(caught.value).split("give it ")[1].split()[0])
    with pytest.raises(MergeError):
        check_memory(merging.job, (enough - 2) * 10**6, threads)
    check_memory(merging.job, enough * 10**6, threads)


def test_triton_does_not_merge_files_on_the_cpu(
    stored: dict[bool, tuple[list[Model], list[Path]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(MergeError, match='backend="triton" merges on a GPU; pass device="cuda"'):
        merge(stored[False][1], "sfa", out=tmp_path / "out", backend="triton")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("window", [1, 8 << 20])
@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "dare_ties", "passthrough"])
def test_nonfinite_inputs_are_named_with_their_file(
    name: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"w": np.ones((3, BLOCK), np.float32) * (k + 1), "v": np.ones(5, np.float32)} for k in range(4)]
    models[1]["w"][2, 5] = np.nan
    models[1]["w"][0, 1] = np.inf
    paths = [save(tmp_path / str(number), tensors, 2) for number, tensors in enumerate(models)]
    given, options = arguments(name, {}, paths, "tensor")
    monkeypatch.setattr(out_of_core, "WINDOW", window)
    with pytest.raises(NonFiniteError) as caught:
        merge(given, name, out=tmp_path / "out", **options)
    for part in ("1 NaN and 1 Inf", 'tensor "w"', str(paths[1]), ".safetensors", "nonfinite="):
        assert part in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)
    if name != "slerp":  # whose angle is not a number then
        merge(given, name, out=tmp_path / "out", nonfinite="allow", **options)
        given, options = arguments(name, {}, models, "tensor")
        expected = merge(given, name, nonfinite="allow", **options)
        merged = merge([tmp_path / "out"], "passthrough", nonfinite="allow")
        assert all(np.array_equal(merged[key], tensor, equal_nan=True) for key, tensor in expected.items())


@pytest.mark.parametrize("window", [1, 8 << 20])
def test_results_that_overflow_are_refused(window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        save(tmp_path / str(k), {"w": np.full(3 * BLOCK, 6e4, np.float16), "v": np.ones(3, np.float16)}, 1) for k in range(2)
    ]
    monkeypatch.setattr(out_of_core, "WINDOW", window)
    with pytest.raises(NonFiniteError, match='tensor "w": finite inputs overflow float16'):
        merge(paths, "linear", normalize=False, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integers_that_differ_in_the_last_element_are_refused(tmp_path: Path) -> None:
    models: list[Model] = [{"n": np.zeros(CHUNK + 1, np.uint8), "w": np.ones(3, np.float32)} for _ in range(2)]
    models[1]["n"][-1] = 1
    paths = [save(tmp_path / str(number), tensors, 1) for number, tensors in enumerate(models)]
    with pytest.raises(MergeError, match=r'1\.safetensors, tensor "n": its uint8 values differ'):
        merge(paths, "linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def after(reads: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act before the read of that number."""
    count = 0
    read = DataFile.read

    def counting(self: DataFile, offset: int, out: memoryview) -> None:
        nonlocal count
        count += 1
        if count == reads:
            act()
        read(self, offset, out)

    monkeypatch.setattr(DataFile, "read", counting)


@pytest.mark.parametrize("reads", [1, 3, 4])
@pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_file_that_is_truncated_during_the_merge(
    name: str, reads: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    models = [{"w": rng.standard_normal((5, BLOCK)).astype(np.float32), "v": np.ones(5, np.float32)} for _ in range(4)]
    paths = [save(tmp_path / str(number), tensors, 1) for number, tensors in enumerate(models)]
    given, options = arguments(name, {}, paths, "tensor")
    merging = prepared(given, name, options)
    object.__setattr__(merging, "target", tmp_path / "out")
    divide(monkeypatch, 1, kept)
    after(reads, lambda: os.truncate(paths[1], 200), monkeypatch)
    with pytest.raises(CheckpointError, match=r"1\.safetensors: (ends at byte|was changed)"):
        merging.run(threads=2)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)


@pytest.mark.parametrize("how", ["rewrite", "replace", "remove"])
def test_a_file_that_changes_during_the_merge(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was read completely before."""
    models = [{"w": np.ones((5, BLOCK), np.float32) * k} for k in range(2)]
    paths = [save(tmp_path / str(number), tensors, 1) for number, tensors in enumerate(models)]
    other = save(tmp_path / "other", {"w": np.zeros((5, BLOCK), np.float32)}, 1)
    os.utime(other, ns=(1, 1))  # files that are written one right after the other may have the same time

    def change() -> None:
        if how == "rewrite":
            with paths[0].open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")
            os.utime(paths[0], ns=(1, 1))
        elif how == "replace":
            os.replace(other, paths[0])
        else:
            os.remove(paths[0])

    divide(monkeypatch, 1, 0)
    after(9, change, monkeypatch)
    with pytest.raises(CheckpointError, match=r"0\.safetensors: (was changed|is gone)"):
        merge(paths, "linear", out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.merging").exists()


# Interrupted, and done again


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear"])
def test_an_interrupted_merge_goes_on_where_it_stopped(
    name: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    names = [f"layers.{number}.w" for number in range(6)]
    models = [
        {key: rng.standard_normal(4 * BLOCK + 3).astype(np.float32) for key in names} | {"left": np.ones(9, np.float16)}
        for _ in range(4)
    ]
    paths = [save(tmp_path / str(number), tensors, 1 + number % 2) for number, tensors in enumerate(models)]
    given, options = arguments(name, {}, paths, scope)
    options["exclude"] = "left"
    divide(monkeypatch, 1, 6 << 20)
    whole = merge(given, name, out=tmp_path / "whole.safetensors", **options).read_bytes()

    def merging(target: str) -> FileMerge:
        new = prepared(given, name, options)
        object.__setattr__(new, "target", tmp_path / target)
        return new

    left = [14 * BLOCK]

    def stop(done: int) -> None:
        left[0] -= done
        if left[0] < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging("out.safetensors").run(advance=stop, threads=1)
    assert not (tmp_path / "out.safetensors").exists()
    assert (tmp_path / ".out.safetensors.merging").is_dir()
    started: list[int] = []
    counted: list[int] = []
    again = merging("out.safetensors")
    report = again.run(started=started.append, advance=counted.append)
    fresh = merging("fresh.safetensors").run()
    assert 0 < report.resumed < 7
    assert started == [report.resumed]
    assert sum(counted) == again.elements
    assert fresh.resumed == 0
    if scope == "tensor" or name == "linear":
        assert report.read < fresh.read
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "fresh.safetensors").read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", ["weight", "dtype", "backend", "input", "nothing"])
def test_work_that_was_begun_for_another_result_is_not_used(change: str, tmp_path: Path) -> None:
    models = [{f"layers.{k}.w": np.full(1000, k + number, np.float32) for k in range(5)} for number in range(2)]
    paths = [save(tmp_path / str(number), tensors, 1) for number, tensors in enumerate(models)]

    def merging(**options: Any) -> FileMerge:
        new = prepared(paths, "linear", {"weight": [1, 3]} | options)
        object.__setattr__(new, "target", tmp_path / "out.safetensors")
        return new

    def stop(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging().run(advance=stop, backend="numpy")
    if change == "input":
        models[0]["layers.0.w"][:] = 100
        save(tmp_path / "0", models[0], 1)
        os.utime(paths[0], ns=(1, 1))
    changes: dict[str, dict[str, Any]] = {"weight": {"weight": [3, 1]}, "dtype": {"out_dtype": "float16"}}
    options = changes.get(change, {})
    report = merging(**options).run(backend="numba" if change == "backend" else "numpy")
    assert (report.resumed > 0) == (change == "nothing")
    expected = merge(models, "linear", **{"weight": [1, 3], **options})
    merged = load_file(tmp_path / "out.safetensors")
    assert {key: value.tobytes() for key, value in merged.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_what_is_done_is_neither_read_nor_written_again(
    stored: dict[bool, tuple[list[Model], list[Path]]],
) -> None:
    models, paths = stored[False]
    given, options = arguments("ties", {"exclude": "layers.1*"}, paths, "tensor")
    merging = prepared(given, "ties", options)
    expected = merge(models[1:], "ties", base=models[0], exclude="layers.1*", density=0.3)
    done = frozenset(merging.job.copies) | {"layers.0.weight", "mask", "empty", "steps", "bias", "block"}
    sink = Memory(merging, done)
    run(merging.job, sink)
    assert {name for name, count in sink.windows.items() if count} == {"layers.2.weight", "column", "short", "scalar"}
    assert all(sink.tensors[name].tobytes() == expected[name].tobytes() for name, count in sink.windows.items() if count)
    assert sum(file.bytes_read for file in merging.job.files) < 50_000


@pytest.mark.parametrize("exclude", ["layers.1*", "*"])
def test_nothing_is_left_to_merge(exclude: str, stored: dict[bool, tuple[list[Model], list[Path]]]) -> None:
    """All was done by a run that was killed just before its end; or all is copied."""
    given, options = arguments("ties", {"exclude": exclude}, stored[False][1], "tensor")
    merging = prepared(given, "ties", options)
    done = frozenset(output.name for output in merging.outputs) if exclude != "*" else frozenset()
    sink = Memory(merging, done)
    counted: list[int] = []
    run(merging.job, sink, advance=counted.append)
    assert sum(counted) == merging.elements
    if done:
        assert not any(sink.windows.values())
    else:
        assert all(sink.tensors[key].tobytes() == tensor.tobytes() for key, tensor in stored[False][0][0].items())


# Memory


CHILD = """
import sys
from mergekit_cl import merge
from mergekit_cl.memory import anonymous_memory
merge([{"w": __import__("numpy").ones(100_000, "f4")}] * 2, "linear")  # what is imported and compiled at the first call
print(anonymous_memory(), flush=True)
sys.stdin.readline()
merge(%(given)r, out=%(out)r, memory=%(memory)r, verify=False, **%(options)r)
"""


def peak_of(given: list[str], out: Path, memory: int, **options: Any) -> int:
    """Merge in another process; return the most anonymous memory that it had beyond what it had at the beginning."""
    code = textwrap.dedent(CHILD % {"given": given, "out": str(out), "memory": memory, "options": options})
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    with child, Path(f"/proc/{child.pid}/status").open("rb", buffering=0) as status:
        before = int(child.stdout.readline())
        child.stdin.write("go\n")
        child.stdin.flush()
        peak = 0
        while child.poll() is None:
            status.seek(0)
            for line in status.read().splitlines():
                if line.startswith(b"RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.001)
    assert child.returncode == 0
    assert out.exists()
    return peak - before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Four models, each one tensor of 128 MB, or many small ones that have as much, or integers."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    paths: dict[str, list[str]] = {"one": [], "many": [], "integers": []}
    for number in range(4):
        piece = rng.standard_normal((64, 1 << 14)).astype(ml_dtypes.bfloat16)
        for kind, tensors in (
            ("one", {"w": np.tile(piece, (64, 1))}),
            ("integers", {"n": np.arange(16 << 20), "w": piece}),
            ("many", {f"layers.{index}.w": piece[: 1 + index % 32] for index in range(200)}),
        ):
            paths[kind].append(str(folder / f"{kind}{number}.safetensors"))
            save_file(tensors, paths[kind][-1])
    return paths


COLUMNS: dict[str, Any] = {"nuslerp_flatten": False, "nuslerp_row_wise": True, "base": None}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize(
    ("name", "kind", "memory", "how"),
    [
        ("linear", "one", 110, {"base": None}),
        ("linear", "integers", 110, {"base": None}),
        ("ties", "one", 110, {"density": 0.3}),
        ("ties", "many", 110, {"density": 0.3}),
        ("ties", "many", 350, {"density": 0.3}),
        ("nuslerp", "one", 530, COLUMNS),
    ],
)
def test_the_memory_of_a_merge_stays_within_the_budget(
    name: str, kind: str, memory: int, how: dict[str, Any], large: dict[str, list[str]], tmp_path: Path
) -> None:
    base, *models = large[kind]
    size = memory * 10**6
    peak = peak_of(
        models[:2] if how is COLUMNS else models,
        tmp_path / "out.safetensors",
        size,
        **{"method": name, "base": base, "threads": 2, **how},
    )
    assert peak <= size
