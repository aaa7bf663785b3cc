"""Merges of files on a device: here other memory of the CPU. That all methods give their bits is in test_out_of_core.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mergekit_cl import BackendError, CheckpointError, MergeError, NonFiniteError, kernels, merge, out_of_core, staging
from mergekit_cl.api import prepare_files
from mergekit_cl.checkpoint.stored import DataFile
from mergekit_cl.checkpoint.writer import Writer
from mergekit_cl.execute import processors
from mergekit_cl.file_merge import FileMerge
from mergekit_cl.kernels import BLOCK, Slices, Table
from mergekit_cl.kernels import numpy as numpy_kernels
from mergekit_cl.kernels.triton import lanes, launch
from mergekit_cl.kernels.triton.lanes import Lane, Lanes
from mergekit_cl.out_of_core import Budget, check_memory
from mergekit_cl.staging import Held, Staged, Task, find_device, staged_for
from mergekit_cl.windows import Incoming, Outgoing

Array = npt.NDArray[Any]
Model = dict[str, Array]

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("f2"), "float32": np.dtype("f4"), "float64": np.dtype("f8"),
}  # fmt: skip


class Recorded:
    """A source that is an array, and notes which parts of it are read."""

    name, files = "w", ()

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype.name
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int, out: Array) -> None:
        self.reads.append((start, stop))
        out[:] = self.array[start:stop]


class Result:
    """A span that is written to, and the elements that have been."""

    def __init__(self, length: int, dtype: str) -> None:
        self.array = np.zeros(length, DTYPES[dtype])
        self.span = Outgoing(dtype, length, self.write)
        self.firsts: list[int] = []

    def write(self, first: int, data: Array) -> None:
        self.firsts.append(first)
        self.array[first : first + len(data)] = data


class Late(Lane):
    """A lane whose copies are late: those to the device happen when a kernel is launched, those back when it is waited for."""

    current: list["Late"] = []  # noqa: RUF012

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__(device, size)
        self.host[:] = 0xFF
        self.there.fill_(0xFF)
        self.sends: list[Callable[[], None]] = []
        self.fetches: list[Callable[[], None]] = []
        Late.current.append(self)

    def send(self, start: int, stop: int, to: torch.Tensor, at: int) -> None:
        self.sends.append(partial(super().send, start, stop, to, at))

    def fetch(self, start: int, stop: int, source: torch.Tensor, at: int) -> None:
        self.fetches.append(partial(super().fetch, start, stop, source, at))

    def flush(self) -> None:
        for copy in self.sends:
            copy()
        self.sends = []

    def wait(self) -> None:
        self.flush()
        for copy in self.fetches:
            copy()
        self.fetches = []


def models(count: int, dtype: str = "float32", **shapes: int | tuple[int, ...]) -> list[Model]:
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()} for _ in range(count)]


def saved(folder: Path, tensors: Sequence[Model]) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(tensors))]
    for path, each in zip(paths, tensors, strict=True):
        save_file(each, path)
    return paths


def prepared(paths: Sequence[Any], name: str, out: Path, base: Any = None, **parameters: Any) -> FileMerge:
    merging = prepare_files(list(paths), name, out=out, base=base, parameters=parameters)
    assert isinstance(merging, FileMerge)
    return merging


def divided(monkeypatch: pytest.MonkeyPatch, window: int, kept: int) -> None:
    monkeypatch.setattr(Budget, "on_device", classmethod(lambda cls, *given: cls(window, kept)))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of bytes that were copied to the device."""
    sizes: list[int] = []
    send = Lane.send

    def counting(self: Lane, start: int, stop: int, to: torch.Tensor, at: int) -> None:
        sizes.append(stop - start)
        send(self, start, stop, to, at)

    monkeypatch.setattr(Lane, "send", counting)
    return sizes


@contextmanager
def gpus(count: int, current: int = 0) -> Iterator[None]:
    """Pretend that there are GPUs, until they are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "interpreted", lambda: False)
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "current_device", lambda: current)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 << 30, 16 << 30))
        yield


def at_the_third_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, act: Callable[[], object]) -> None:
    """Act before a method's third call."""
    method, calls = getattr(owner, name), count(1)

    def acting(*args: Any) -> None:
        if next(calls) == 3:
            act()
        method(*args)

    monkeypatch.setattr(owner, name, acting)


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


# Windows


@settings(max_examples=40)
@given(
    columns=st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=3),
    out=st.sampled_from(sorted(DTYPES)),
    on_disk=st.lists(st.booleans(), min_size=3, max_size=3),
    parts=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=4),
    portion=st.sampled_from([16, 64, 1 << 22]),
)
def test_windows_are_what_the_kernels_would_see_of_whole_tensors(
    columns: list[str], out: str, on_disk: list[bool], parts: list[tuple[int, int]], portion: int
) -> None:
    """An element's index, its value, and its alignment as if all tensors began at a multiple of 64 bytes."""
    rng = np.random.default_rng(0)
    tables, results, arrays = [], [], []
    for start, length in parts:
        inputs = [rng.standard_normal(start + length + 5).astype(DTYPES[dtype]) for dtype in columns]
        arrays.append(inputs)
        results.append(Result(start + length + 5, out))
        spans = [Incoming(Recorded(x)) if disk else x for x, disk in zip(inputs, on_disk, strict=False)]
        tables.append([*spans, results[-1].span])
    tables.append([*(np.zeros(9, DTYPES[dtype]) for dtype in columns), Outgoing(out, 9, lambda *_: pytest.fail("written"))])
    which = np.array([(row, start, start + length) for row, (start, length) in enumerate(parts)])

    def kernel(part: Table, pieces: Array) -> str:
        assert part.dtypes == (*columns, out)
        assert part.lengths.tolist() == [len(row[0]) for row in tables]
        assert len(part.spans[-1][0]) == 0
        assert launch.device_of(part) == torch.device("cpu")
        for row, start, stop in pieces.tolist():
            assert (part.addresses[row] % 16 == 0).all()
            for k, array in enumerate(arrays[row]):
                assert part.spans[row][k][start:stop].tobytes() == array[start:stop].tobytes()
            part.spans[row][-1][start:stop] = np.arange(start, stop) % 100
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "PORTION", portion)
        assert Staged(Lanes("cpu")).call(kernel, Table(tables), None, which) == "done"
    for (start, length), result in zip(parts, results, strict=True):
        assert result.firsts == [start]
        assert (result.array[start : start + length] == (np.arange(start, start + length) % 100).astype(DTYPES[out])).all()
        assert not result.array[:start].any()


def test_a_column_that_occurs_twice_is_read_and_copied_once(sent: list[int]) -> None:
    source = Recorded(np.arange(100, dtype=np.float32))
    span = Incoming(source)

    def kernel(part: Table, pieces: Array) -> None:
        assert part.addresses[0, 0] == part.addresses[0, 1]
        assert part.spans[0][1][40:60].tolist() == list(range(40, 60))

    Staged(Lanes("cpu")).call(kernel, Table([[span, span]]), Slices(np.array([10]), False), np.array([[0, 4, 6]]))
    assert source.reads == [(40, 60)]
    assert sum(sent) <= 20 * 4 + 64


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize(
    ("name", "how"), [("linear", {"weight": [0.2, 0.5, 0.3]}), ("ties", {"density": 0.4}), ("slerp", {"t": 0.4})]
)
def test_copies_may_be_late(name: str, how: dict[str, Any], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a copy still reads or writes is neither filled again nor looked at before. With Triton's kernels."""
    tensors = models(4, "bfloat16", big=(2, 3001), odd=77, scalar=())
    paths = saved(tmp_path, tensors)
    taken, with_base = {"linear": (3, False), "ties": (3, True), "slerp": (1, True)}[name]
    expected = merge(tensors[1 : 1 + taken], name, base=tensors[0] if with_base else None, backend="numpy", **how)
    run = launch.Launch.__call__

    def flushing(self: launch.Launch, *tensors: torch.Tensor) -> None:
        for lane in Late.current:
            if not any(lane in each._idle for each in owners):  # its stream is the one that is launched on
                lane.flush()
        run(self, *tensors)

    owners: list[Lanes] = []
    make = Lanes.__init__

    def noting(self: Lanes, device: str) -> None:
        owners.append(self)
        make(self, device)

    monkeypatch.setattr(Lanes, "__init__", noting)
    monkeypatch.setattr(launch.Launch, "__call__", flushing)
    monkeypatch.setattr(lanes, "Lane", Late)
    monkeypatch.setattr(Late, "current", [])
    monkeypatch.setattr(staging, "PORTION", 1 << 10)
    divided(monkeypatch, 1 << 20, kept)
    out = merge(
        paths[1 : 1 + taken], name, base=paths[0] if with_base else None, backend="triton", threads=1,
        out=tmp_path / "out.safetensors", **how,
    )  # fmt: skip
    assert {key: value.tobytes() for key, value in load_file(out).items()} == {k: v.tobytes() for k, v in expected.items()}
    assert Late.current
    assert not any(lane.sends or lane.fetches for lane in Late.current)


def test_threads_take_windows_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's kernels: windows that begin within a tensor, and tables of which some rows are not there."""
    tensors = models(3, "bfloat16", w=BLOCK + 101, v=100, u=2 * BLOCK)
    paths = saved(tmp_path, tensors)
    expected = merge(tensors, "linear", backend="numpy", weight=[0.2, 0.5, 0.3])
    divided(monkeypatch, 1, 0)
    out = merge(paths, "linear", backend="triton", threads=3, weight=[0.2, 0.5, 0.3], out=tmp_path / "out.safetensors")
    assert {key: value.tobytes() for key, value in load_file(out).items()} == {k: v.tobytes() for k, v in expected.items()}


def test_each_lane_is_used_by_one_thread_at_a_time_and_again() -> None:
    lanes = Lanes("cpu")
    with lanes.lane(1000) as one, lanes.lane(1000) as other:
        assert one is not other
        assert one.size == len(one.host) == one.there.numel() == 1024
    with lanes.lane(10) as again:
        assert again in (one, other)
    with lanes.lane(1025) as larger:
        assert larger.size == 2048
    assert len(lanes._idle) == 2


# Kept on the device


def test_what_is_held_is_cut_into_tasks_that_move_at_once(sent: list[int]) -> None:
    lengths = {"float32": [2 * BLOCK + 3, 0, 5], "bfloat16": [BLOCK + 1, 7], "float64": [1]}
    sources = [Recorded((np.arange(n) % 101).astype(DTYPES[dtype])) for dtype, counts in lengths.items() for n in counts]
    window = 4 * BLOCK
    held = Held(Staged(Lanes("cpu")), [Incoming(source) for source in sources], window)
    for task in held.loads:
        assert task.places[-1].end - task.places[0].at <= window
        assert all(place.start % BLOCK == 0 for place in task.places)
        task()
        assert task.written == 0
    assert len(held.loads) == len(sent) < 6  # and not one for each tensor
    for source, span in zip(sources, held.spans, strict=True):
        assert span.tobytes() == source.array.tobytes()
        assert len(span) == 0 or kernels.address(span) % 64 == 0
        ends = [0, *(stop for _, stop in sorted(source.reads))]
        assert sorted(source.reads) == list(zip(ends, [*ends[1:-1], len(span)], strict=False)) or not len(span)
    results = [Result(len(source.array), source.dtype) for source in sources]
    back = Held(Staged(Lanes("cpu")), [result.span for result in results], window)
    for source, span in zip(sources, back.spans, strict=True):
        span[:] = source.array
    assert sum(task.written for task in back.stores) == sum(len(source.array) for source in sources)
    for task in back.stores:
        task()
    assert all(result.array.tobytes() == source.array.tobytes() for source, result in zip(sources, results, strict=True))


@pytest.mark.parametrize(
    ("name", "kept", "times"), [("linear", 0, 1), ("ties", 1 << 30, 1), ("ties", 0, 3), ("della", 1 << 30, 1)]
)
def test_what_is_kept_crosses_the_bus_once(
    name: str, kept: int, times: int, tmp_path: Path, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = models(3, a=(30, 1000), b=(3, 17), c=4000)
    paths = saved(tmp_path, tensors)
    monkeypatch.setattr(kernels, "load", lambda backend, device: (backend, numpy_kernels))
    divided(monkeypatch, 1 << 20, kept)
    monkeypatch.setattr(staging, "PORTION", 1 << 12)
    how = {"density": 0.3} if name != "linear" else {}
    base = None if name == "linear" else paths[0]
    merge(paths[1:] if base else paths, name, base=base, out=tmp_path / "out.safetensors", backend="triton", **how)
    size = sum(tensor.nbytes for each in tensors for tensor in each.values())
    assert sum(sent) < size + 64 * 9 if times == 1 else sum(sent) > (times - 1) * size
    assert sum(sent) >= size


def test_results_are_written_while_the_next_inputs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there is room for both: two groups of tensors take half of what may be kept each; a larger one comes alone."""
    tensors = models(2, **{f"t{number}": 1000 for number in range(6)}, z=4001)
    paths = saved(tmp_path, tensors)
    each = 1000 * 4 * 3
    events: list[str] = []
    allocated: list[int] = []
    monkeypatch.setattr(kernels, "load", lambda backend, device: (backend, numpy_kernels))
    read, write, allocate = Incoming.read, Writer.write, Lanes.allocate

    def reading(self: Incoming, start: int, stop: int, out: Array) -> None:
        events.append(f"read {self.source.name}")
        read(self, start, stop, out)

    def writing(self: Writer, name: str, first: int, data: Array) -> None:
        events.append(f"write {name}")
        write(self, name, first, data)

    def allocating(self: Lanes, size: int) -> torch.Tensor:
        allocated.append(size)
        return allocate(self, size)

    monkeypatch.setattr(Incoming, "read", reading)
    monkeypatch.setattr(Writer, "write", writing)
    monkeypatch.setattr(Lanes, "allocate", allocating)
    divided(monkeypatch, 1, 4 * each + 2 * 12 * 64)
    merge(paths[1:], "ties", base=paths[0], density=0.5, out=tmp_path / "out.safetensors", backend="triton", threads=1)
    assert len(allocated) == 8  # inputs and results of (t0, t1), (t2, t3), (t4, t5), z
    assert max(allocated) <= 2 * (4001 * 4 + 64)
    assert (
        "".join(event[0] for event in events[:10]) == "rrrr" + "rwrrwr"
    )  # t0 and t1; then t2 and t3, with the results of these
    assert events.index("read z") > events.index("write t5")  # no room for z beside them
    assert events[-1] == "write z"


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_what_an_earlier_run_has_written_is_not_written_again(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But read again, where one scope has all tensors."""
    tensors = models(3, a=1000, b=(3, 300), c=5)
    paths = saved(tmp_path, tensors)
    monkeypatch.setattr(kernels, "load", lambda backend, device: (backend, numpy_kernels))
    divided(monkeypatch, 1 << 20, kept)
    written: dict[str, Array] = {}

    class Sink:
        done = frozenset({"a"})

        def write(self, name: str, first: int, data: Array) -> None:
            assert first == 0
            written[name] = data.copy()

    merging = prepared(paths[1:], "ties", tmp_path / "out", paths[0], density=0.3, scope="model")
    counted: list[int] = []
    out_of_core.run(merging.job, Sink(), backend="triton", threads=2, advance=counted.append)
    expected = merge(tensors[1:], "ties", base=tensors[0], density=0.3, scope="model", backend="numpy")
    assert {key: value.tobytes() for key, value in written.items()} == {key: expected[key].tobytes() for key in "bc"}
    assert sum(counted) == 1905


def test_two_lists_of_tasks_end_together() -> None:
    tasks = [Task(lambda _: None, (), number) for number in range(8)]
    order = out_of_core._interleaved(tasks[:2], tasks[2:])
    assert [tasks.index(task) for task in order] == [2, 3, 0, 4, 5, 6, 1, 7]
    assert out_of_core._interleaved([], tasks) == tasks


# Memory


def test_windows_on_their_way_to_a_gpu_are_powers_of_two() -> None:
    fixed = 96 << 20
    assert Budget.on_device(fixed + (1 << 30), 4, 0, 10 << 30) == Budget(64 << 20, (10 << 30) - (256 << 20))
    assert Budget.on_device(fixed + (100 << 20) + 5, 4, 5, 10 << 30) == Budget(16 << 20, (10 << 30) - (64 << 20))
    assert Budget.on_device(fixed + (1 << 30), 4, 0, 64 << 20) == Budget(8 << 20, 32 << 20)  # of the GPU's half
    with pytest.raises(MergeError, match=r"memory: .* are too little for 4 threads; give \d+ MB or more"):
        Budget.on_device(fixed + (7 << 20), 4, 0, 10 << 30)
    with pytest.raises(MergeError, match=r"the GPU has 7 MB to spare, too little for 4 threads; stop what else"):
        Budget.on_device(fixed + (1 << 30), 4, 0, 7 * 10**6)


def test_where_a_gpu_computes_some_threads_wait() -> None:
    assert out_of_core._threads(None) == processors()
    assert out_of_core._threads(Staged(Lanes("cpu"))) == min(processors() + 2, 32)


@pytest.mark.parametrize(
    ("name", "how", "kept", "what"),
    [
        (
            "nuslerp",
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            4_799_999,
            r"whole columns, 5 MB .* the GPU has room for 4",
        ),
        ("nuslerp", {"nuslerp_flatten": False}, 4_799_999, r"whole rows, 3 MB .* a window has room for 1 MB"),
        ("tsv_m", {}, 4_800_000, r"whole matrices, \d+ MB .* the GPU has room for 2"),
    ],
)
def test_what_does_not_fit_into_the_gpu_is_refused_before_anything_is_read(
    name: str, how: dict[str, Any], kept: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = saved(tmp_path, models(3, big=(2, 200_000), small=(2, 5)))
    with_base = name == "tsv_m"
    merging = prepared(paths[1:], name, tmp_path / "out.safetensors", paths[0] if with_base else None, **how)
    before = sum(file.bytes_read for file in merging.job.files)
    divided(monkeypatch, 1 << 20, kept)
    with pytest.raises(MergeError, match=rf'tensor "big": {name} looks at {what}.*; merge on the CPU') as caught:
        merging.run(backend="triton", threads=2)
    assert "small" not in str(caught.value)
    assert sum(file.bytes_read for file in merging.job.files) == before
    assert not (tmp_path / "out.safetensors").exists()
    if name == "nuslerp":
        divided(monkeypatch, 1 << 20, 4_800_000)
        check_memory(merging.job, 1 << 30, 2, 0, Staged(Lanes("cpu")))


# What goes wrong


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("fault", ["nan", "truncated", "full", "memory", "interrupted"])
def test_a_merge_that_fails_leaves_nothing(fault: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = models(3, w=3 * BLOCK + 1, v=100)
    if fault == "nan":
        tensors[1]["w"][BLOCK + 7] = np.nan
    paths = saved(tmp_path, tensors)
    monkeypatch.setattr(kernels, "load", lambda backend, device: (backend, numpy_kernels))
    divided(monkeypatch, 1, kept)
    if fault == "truncated":
        at_the_third_call(monkeypatch, DataFile, "read", lambda: paths[1].write_bytes(b"short"))
    elif fault == "full":
        at_the_third_call(monkeypatch, Writer, "write", raising(CheckpointError("the disk is full")))
    elif fault == "memory":
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        at_the_third_call(monkeypatch, Lane, "fetch", raising(error))
    expected = {
        "nan": (NonFiniteError, r'1\.safetensors.*tensor "w": 1 NaN'), "truncated": (CheckpointError, r"1\.safetensors"),
        "full": (CheckpointError, "the disk is full"),
        "memory": (MergeError, r"cpu: out of memory \(CUDA out of memory. Tried to allocate 2 GiB\); stop what else"),
        "interrupted": (KeyboardInterrupt, "now"),
    }  # fmt: skip
    merging = prepared(paths[1:], "ties", tmp_path / "out.safetensors", paths[0], density=0.5)

    def advance(done: int) -> None:
        if fault == "interrupted" and done:
            raise KeyboardInterrupt("now")

    with pytest.raises(expected[fault][0], match=expected[fault][1]):
        merging.run(backend="triton", threads=2, advance=advance)
    kinds = {path.name for path in tmp_path.iterdir()} - {path.name for path in paths}
    assert kinds <= {".out.safetensors.merging"}  # from which the same command goes on
    monkeypatch.undo()
    if fault in ("full", "memory", "interrupted"):
        monkeypatch.setattr(kernels, "load", lambda backend, device: (backend, numpy_kernels))
        again = prepared(paths[1:], "ties", tmp_path / "out.safetensors", paths[0], density=0.5)
        again.run(backend="triton", threads=2)
        expected_tensors = merge(tensors[1:], "ties", base=tensors[0], density=0.5, backend="numpy")
        assert {k: v.tobytes() for k, v in load_file(again.target).items()} == {
            k: v.tobytes() for k, v in expected_tensors.items()
        }


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("name", ["ties", "linear"])
def test_what_is_not_finite_is_named_by_its_file(name: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Triton's kernels; the message is the CPU's."""
    tensors = models(3, w=3001, v=10)
    tensors[1]["w"][2077] = np.inf
    paths = saved(tmp_path, tensors)
    divided(monkeypatch, 1 << 20, kept)
    how: dict[str, Any] = {"base": paths[0], "density": 0.5} if name == "ties" else {}
    messages = []
    for backend in ("numpy", "triton"):
        with pytest.raises(NonFiniteError, match=r'1\.safetensors.*tensor "w": 1 Inf') as caught:
            merge(paths[1:], name, out=tmp_path / "out.safetensors", backend=backend, **how)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_models_in_memory_go_through_a_device_into_a_file(tmp_path: Path) -> None:
    tensors = models(2, w=(3, 50), v=7)
    merged = merge(tensors, "linear", out=tmp_path / "out.safetensors", backend="triton")
    expected = merge(tensors, "linear", backend="numpy")
    assert {k: v.tobytes() for k, v in load_file(merged).items()} == {k: v.tobytes() for k, v in expected.items()}


# Which device


def test_devices_have_names() -> None:
    assert find_device(None) == find_device("cpu") == find_device(torch.device("cpu")) == find_device("auto") == "cpu"
    for name in ("gpu", "cuda:", "cuda:x", "mps", "cuda 1", ""):
        with pytest.raises(MergeError, match=f'device={name!r}: must be "cpu", "cuda", a GPU with its number such as "cuda:1"'):
            find_device(name)
    with pytest.raises(BackendError, match=r'device="cuda": TRITON_INTERPRET is set, .*; unset it'):
        find_device("cuda")
    with gpus(0), pytest.raises(BackendError, match=r'device="cuda": PyTorch finds no GPU.*; leave device .* away'):
        find_device("cuda")
    with gpus(2, current=1):
        assert find_device("cuda") == find_device("auto") == find_device(torch.device("cuda:1")) == "cuda:1"
        assert find_device("cuda:0") == "cuda:0"
        with pytest.raises(BackendError, match='device="cuda:2": the GPUs are cuda:0 to cuda:1'):
            find_device("cuda:2")
    with gpus(1), pytest.raises(BackendError, match='device="cuda:3": cuda:0 is the only GPU'):
        find_device("cuda:3")


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(BackendError, match=f'device="cuda" needs the package {package}: pip install {package}'):
        find_device("cuda")
    assert find_device("auto") == "cpu"


def test_backends_and_devices_that_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert staged_for("auto", "cpu") is None
    assert staged_for("numpy", "cpu") is None
    staged = staged_for("triton", "cpu")  # in the interpreter
    assert staged is not None
    assert staged.device == "cpu"
    with gpus(1):
        for backend in ("numpy", "numba"):
            with pytest.raises(BackendError, match=f'backend="{backend}" works on the CPU; leave backend or device'):
                staged_for(backend, "cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match='backend="triton" merges on a GPU; pass device="cuda"'):
        staged_for("triton", "cpu")


def test_models_in_memory_are_merged_where_they_are(tmp_path: Path) -> None:
    tensors = models(2, w=5)
    for each in (tensors, saved(tmp_path, tensors)):
        with pytest.raises(
            MergeError, match=r'device="cuda" is for merges into a checkpoint: pass the path of a new one as out='
        ):
            merge(each, "linear", device="cuda")
    for device in ("cpu", "auto", None):
        assert merge(tensors, "linear", device=device)["w"].shape == (5,)


def test_a_merge_goes_on_on_another_gpu_but_not_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of floating sums are a backend's own."""
    merging = prepared(saved(tmp_path, models(2, w=5)), "linear", tmp_path / "out.safetensors")
    asked: list[str] = []
    fingerprint = FileMerge._fingerprint

    def noting(self: FileMerge, *args: str) -> str:
        asked.append(fingerprint(self, *args))
        return asked[-1]

    monkeypatch.setattr(FileMerge, "_fingerprint", noting)
    monkeypatch.setattr("mergekit_cl.file_merge.run", lambda *_, **__: raising(KeyboardInterrupt())())
    monkeypatch.setattr(Staged, "free", lambda self: 8 << 30)
    for options in ({"device": "cuda:0"}, {"device": "cuda:1", "backend": "triton"}, {}, {"backend": "numpy"}):
        with gpus(2), pytest.raises(KeyboardInterrupt):
            merging.run(**options)
    assert asked[0] == asked[1]
    assert len(set(asked)) == 3


def test_the_device_is_reported(tmp_path: Path) -> None:
    merging = prepared(saved(tmp_path, models(2, w=5)), "linear", tmp_path / "out.safetensors")
    assert merging.run(backend="triton").device == "cpu"
