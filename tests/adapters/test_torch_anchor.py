"""Where SFA keeps its anchor: in memory or in a file, the same bits; and what a crash, a restart or another file does to it."""

import contextlib
import copy
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn

from mergekit_cl import CheckpointError, MergeError, MismatchError, NonFiniteError, merge
from mergekit_cl.adapters.torch import SFA, anchor_folder
from mergekit_cl.adapters.torch import anchor as anchors
from mergekit_cl.adapters.torch.anchor import File, following, previous
from mergekit_cl.adapters.torch.anchor_folder import Folder, read_index
from mergekit_cl.checkpoint.staging import beside
from mergekit_cl.checkpoint.verify import verify
from mergekit_cl.models.sharded import Shard

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)).float(), Y).backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=["memory", "cpu", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return tmp_path / "anchor.safetensors" if request.param == "file" else request.param


@pytest.mark.parametrize("policy", ["fixed", "rolling"])
@pytest.mark.parametrize(
    ("options", "dtype", "anchor_dtype"),
    [
        ({"beta": 0.3}, torch.float32, None),
        ({"beta": 0.3}, torch.bfloat16, torch.float32),
        ({"beta": 0.3}, torch.float32, torch.bfloat16),
        ({"method": "ties", "density": 0.4}, torch.float32, None),
        ({"method": "ties", "density": 0.4, "scope": "model"}, torch.bfloat16, None),
        ({"method": "dare_linear", "density": 0.5, "seed": 3}, torch.float64, None),
        ({"method": "slerp", "t": 0.25}, torch.float16, None),
    ],
)
def test_equal_to_a_loop_by_hand_that_calls_merge(
    place: Any, policy: str, options: dict[str, Any], dtype: torch.dtype, anchor_dtype: torch.dtype | None
) -> None:
    model, by_hand = network(dtype=dtype), network(dtype=dtype)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, 0.9) for each in (model, by_hand)]
    sfa = SFA(model, p=0.4, total_steps=10, anchor=place, policy=policy, anchor_dtype=anchor_dtype, **options)
    names = dict(by_hand.named_parameters())
    parameters = {name: value for name, value in options.items() if name != "seed"}
    seed = options.get("seed", 0) << 32

    def cast() -> dict[str, torch.Tensor]:
        return {name: t.clone().to(anchor_dtype or dtype) for name, t in by_hand.state_dict().items() if name in names}

    anchor = cast()
    for step in range(1, 11):
        train(model, optimizers[0], 1)
        train(by_hand, optimizers[1], 1)
        assert sfa.step() == (step in (4, 8, 10))
        if step in (4, 8, 10):
            current = {name: p.detach() for name, p in names.items()}
            based = options.get("method") in ("ties", "dare_linear")
            merged = merge(
                [current] if based else [anchor, current], base=anchor if based else None, seed=seed + step, out_dtype=dtype,
                **{"method": "sfa", **parameters},
            )  # fmt: skip
            by_hand.load_state_dict(merged, strict=False)
            anchor = cast() if policy == "rolling" else anchor
    assert equal(weights(model), weights(by_hand))
    assert equal(sfa.anchor, anchor)


def resumed_at(step: int, place: Any, options: dict[str, Any], settle: bool) -> tuple[nn.Module, SFA]:
    """Train two tasks of 4 steps; break off after so many steps, and go on with new objects."""

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, SFA]:
        model = network(seed)
        optimizer = adam(model)
        return model, optimizer, SFA(model, anchor=place, **options).attach(optimizer)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, sfa: SFA, first: int, last: int) -> None:
        for number in range(first, last):
            if number == 4:
                sfa.new_task(total_steps=4)
            train(model, optimizer, 1)

    parts = build(0)
    go(*parts, 0, step)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    go(*parts, step, min(8, step + 3))  # what a run did that was lost
    file.seek(0)
    again = build(1 if settle else 0)
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*again, step, 8)
    return again[0], again[2]


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.4, "p": 0.5, "total_steps": 4},
        {"beta": 0.4, "p": 0.5, "total_steps": 4, "policy": "rolling", "buffers": "average", "optimizer_state": "reset"},
    ],
)
def test_runs_resumed_at_every_step_of_two_tasks_are_bit_equal(place: Any, options: dict[str, Any]) -> None:
    whole, _ = resumed_at(8, place, options, False)
    for step in range(8):
        model, sfa = resumed_at(step, place, options, bool(step % 2))
        assert equal(weights(model), weights(whole)), step
        assert (sfa.step_count, sfa.merges, sfa.steps_before) == (4, 2, 4), step


def test_a_merge_is_never_done_twice_at_one_step(place: Any) -> None:
    model = network()
    optimizer = adam(model)
    sfa = SFA(model, every=2, total_steps=5, anchor=place)
    for step in range(1, 6):
        train(model, optimizer, 1)
        assert sfa.step() == (step in (2, 4, 5))
        again = SFA(model, every=9, anchor=place if isinstance(place, str) else place.with_name("other.safetensors"))
        if isinstance(place, str):
            again.load_state_dict(sfa.state_dict())
        else:
            again.resume_from(place, step)
            assert again.last_merge_step == 0
            again = sfa
        if step in (2, 4, 5):
            assert not again.finalize()
            again.finished = False


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "anchor.safetensors"
    model = network()
    sfa = SFA(model, every=1, anchor=path)
    assert os.listdir(path.parent) == ["anchor.safetensors"]
    safetensors = pytest.importorskip("safetensors.torch")
    assert equal(safetensors.load_file(path), {name: p.detach() for name, p in model.named_parameters()})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    fingerprint = metadata[anchors.FINGERPRINT]
    assert len(fingerprint) == 32
    assert sfa.state_dict()["fingerprint"] == fingerprint
    assert sfa.state_dict()["anchor"] == {}
    assert verify(path).tensors == 6
    assert sfa._kept.names == {name for name, _ in model.named_parameters()}
    assert SFA(model, every=1).save_anchor(tmp_path / "other.safetensors") == fingerprint
    with torch.no_grad():
        model[0].bias[0] += 1
    assert SFA(model, every=1).save_anchor(tmp_path / "third.safetensors") != fingerprint


def test_a_fingerprint_is_of_names_dtypes_shapes_and_bytes() -> None:
    one = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    known = anchors.fingerprint_of(one)
    assert known == anchors.fingerprint_of({name: one[name].clone() for name in ("b", "a")})
    assert known == anchors.fingerprint_of({"a": torch.ones(3, 2).T, "b": one["b"]})  # memory in another order
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].view(3, 2), "b": one["b"]},
        {"a": one["a"], "b": torch.tensor([0.0, -0.0])},
        {"a": one["a"].half(), "b": one["b"]},
        {"a": one["a"]},
    ]
    assert len({known, *map(anchors.fingerprint_of, others)}) == 6


def files(path: Path) -> dict[str, str]:
    return {p.name: anchors.metadata_of(p)[anchors.FINGERPRINT] for p in sorted(path.parent.iterdir())}


def test_another_anchor_stays_until_the_first_step_and_then_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    model = network()
    optimizer = adam(model)
    first = SFA(model, every=1, anchor=path).state_dict()["fingerprint"]
    train(model, optimizer, 1)
    sfa = SFA(model, every=1, anchor=path)
    second = sfa.state_dict()["fingerprint"]
    assert files(path) == {"anchor.next.safetensors": second, "anchor.safetensors": first}
    train(model, optimizer, 1)
    assert sfa.step()
    assert files(path) == {"anchor.previous.safetensors": first, "anchor.safetensors": second}
    sfa.new_task()
    third = sfa.state_dict()["fingerprint"]
    assert files(path) == {"anchor.previous.safetensors": second, "anchor.safetensors": third}
    inode = path.stat().st_ino
    sfa.new_task()  # with the same weights
    assert path.stat().st_ino == inode
    assert files(path) == {"anchor.previous.safetensors": second, "anchor.safetensors": third}
    # a run that resumes needs no other file: what it would have begun with is not kept
    again = SFA(network(5), every=1, anchor=path)
    assert len(files(path)) == 3
    again.load_state_dict(sfa.state_dict())
    assert files(path) == {"anchor.previous.safetensors": second, "anchor.safetensors": third}
    # from a checkpoint of the task before: both stay, in each other's place
    again.load_state_dict({**sfa.state_dict(), "fingerprint": second})
    assert files(path) == {"anchor.previous.safetensors": second, "anchor.safetensors": third}
    again.step()
    assert files(path) == {"anchor.previous.safetensors": third, "anchor.safetensors": second}


def test_a_crash_between_two_renames_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    model = network()
    state = SFA(model, every=1, anchor=path).state_dict()
    for name in (anchors.previous(path), anchors.following(path)):
        path.rename(name)
        sfa = SFA(network(7), every=1, anchor=path)  # takes the place that is free
        sfa.load_state_dict(state)
        sfa.step()
        assert anchors.metadata_of(path)[anchors.FINGERPRINT] == state["fingerprint"]
        assert equal(sfa.anchor, {name: p.detach() for name, p in model.named_parameters()})


def test_the_file_may_be_renamed_by_another_process_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    one, other = network(), network()
    first, second = SFA(one, beta=1.0, every=1, anchor=path), SFA(other, beta=1.0, every=1, anchor=path)
    begin = weights(one)
    for model in (one, other):
        train(model, adam(model), 1)
    first.step()
    train(one, adam(one), 1)
    first.new_task()
    second.step()  # it is one task behind
    assert all(torch.equal(p, begin[name]) for name, p in other.named_parameters())


def test_a_damaged_missing_or_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    model = network()
    sfa = SFA(model, every=1, anchor=path)
    state, data = sfa.state_dict(), path.read_bytes()
    before = weights(model)

    def fresh() -> SFA:
        for other in tmp_path.iterdir():
            other.unlink()
        return SFA(network(3), every=1, anchor=path)

    for content, advice in [(None, "missing"), (data[:-1] + b"?", "damaged")]:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"(?s)SFA: the anchor .*{advice}.*restore the file .*begin the task anew"):
            sfa.step()
        path.write_bytes(data)
    path.write_bytes(data[:100])
    with pytest.raises(CheckpointError, match=r"(?s)the anchor cannot be read; restore the file.*truncated"):
        sfa.step()
    assert equal(weights(model), before)

    again = fresh()
    with pytest.raises(CheckpointError, match=r"the anchor at .* is not that of the checkpoint: its fingerprint is .*restore"):
        again.load_state_dict(state)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"the anchor is missing: .*anchor.safetensors is not there; restore the file"):
        again.load_state_dict(state)
    path.write_bytes(data[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"the anchor at .* is damaged: its bytes are not those"):
        again.load_state_dict(state)
    with pytest.raises(MergeError, match="does not hold its anchor, which is in a file: build SFA with anchor="):
        SFA(network(), every=1).load_state_dict(state)
    other = SFA(nn.Linear(2, 2), every=1, anchor=tmp_path / "other.safetensors")
    again = SFA(network(), every=1, anchor=tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match='the saved anchor has "weight", which the model lacks'):
        again.load_state_dict(other.state_dict())


def test_what_is_no_anchor_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"w": torch.ones(2)}, path)
    data = path.read_bytes()
    for attempt in (lambda: SFA(network(), every=1, anchor=path), lambda: SFA(network(), every=1).save_anchor(path)):
        with pytest.raises(CheckpointError, match="is there, but is not an anchor, and is not replaced; choose another path"):
            attempt()
    assert path.read_bytes() == data
    for wrong in ("gpu", tmp_path / "anchor.pt", 3):
        with pytest.raises(MergeError, match=r"SFA: anchor="):
            SFA(network(), every=1, anchor=wrong)
    with pytest.raises(CheckpointError, match="cannot be"):
        SFA(network(), every=1, anchor=path / "below.safetensors")


def test_an_anchor_is_saved_once_and_resumed_from(tmp_path: Path, place: Any) -> None:
    path = tmp_path / "saved.safetensors"
    model = network()
    optimizer = adam(model)
    sfa = SFA(model, beta=0.4, every=2, total_steps=5, anchor=place)
    fingerprint = sfa.save_anchor(path)
    inode = path.stat().st_ino
    begin = weights(model)
    for step in range(1, 6):
        train(model, optimizer, 1)
        sfa.step()
        assert sfa.save_anchor(path) == fingerprint
        assert path.stat().st_ino == inode
        if step in (3, 4):
            continued = copy.deepcopy((model, optimizer))
            continued[1].param_groups[0]["params"] = list(continued[0].parameters())
            where = place if isinstance(place, str) else place.with_name("mine.safetensors")
            resumed = SFA(continued[0], beta=0.4, every=2, total_steps=5, anchor=where)
            resumed.resume_from(path, step)
            assert (resumed.step_count, resumed.merges, resumed.last_merge_step) == (step, step // 2, step // 2 * 2)
            assert equal(resumed.anchor, sfa.anchor)
    assert all(torch.equal(sfa.anchor[name], begin[name]) for name in sfa.anchor)
    sfa.new_task(total_steps=5)
    assert sfa.save_anchor(path) != fingerprint
    after = SFA(model, beta=0.4, every=2, total_steps=5)
    after.resume_from(path, 0)
    assert after.steps_before == 5


def test_resumed_from_a_file_at_every_step(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"

    def run(stop: int) -> dict[str, torch.Tensor]:
        model = network()
        sfa = SFA(model, method="dare_linear", density=0.5, seed=3, every=2, total_steps=5, anchor=path)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(stop):
            train(model, optimizer, 1)
            sfa.step()
        again = network(4)
        again.load_state_dict(model.state_dict())
        sfa = SFA(again, method="dare_linear", density=0.5, seed=3, every=2, total_steps=5, anchor=path)
        sfa.resume_from(path, stop)
        optimizer = torch.optim.SGD(again.parameters(), 0.1)
        for step in range(stop, 5):
            train(again, optimizer, 1)
            assert sfa.step() == (step + 1 in (2, 4, 5))
        return weights(again)

    expected = run(5)
    assert all(equal(run(stop), expected) for stop in range(5))


def test_what_cannot_be_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    sfa = SFA(network(), every=1)
    with pytest.raises(CheckpointError, match=r"SFA: the anchor is missing: .* is not there; restore the file"):
        sfa.resume_from(path, 3)
    SFA(nn.Linear(4, 8), every=1).save_anchor(path)
    with pytest.raises(MismatchError, match='the saved anchor has "weight", which the model lacks'):
        sfa.resume_from(path, 3)
    SFA(network(dtype=torch.bfloat16), every=1).save_anchor(path)
    with pytest.raises(MismatchError, match=r'"0.weight": the saved anchor is bfloat16, that of the model would be float32'):
        sfa.resume_from(path, 3)
    SFA(network(), every=1, anchor_dtype=torch.bfloat16).resume_from(path, 3)
    for step in (-1, 1.0, True):
        with pytest.raises(MergeError, match="must be a number of steps"):
            sfa.resume_from(path, step)
    assert (sfa.step_count, sfa.last_merge_step) == (0, 0)


def test_nothing_has_changed_when_a_new_task_cannot_begin(place: Any) -> None:
    model = network()
    sfa = SFA(model, every=1, anchor=place)
    anchor = {name: leaf.clone() for name, leaf in sfa.anchor.items()}
    train(model, adam(model), 1)
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r'the anchor of "0.weight" would hold NaN'):
        sfa.new_task()
    assert equal(sfa.anchor, anchor)


def test_copies_and_pickles_read_the_same_file(tmp_path: Path) -> None:
    sfa = SFA(network(), beta=1.0, every=1, anchor=tmp_path / "anchor.safetensors")
    again = pickle.loads(pickle.dumps(sfa))
    train(again._source, adam(again._source), 1)
    assert again.step()
    assert equal(again.anchor, sfa.anchor)


class Masters:
    """As DeepSpeed holds them: a range of the flattened parameter, here all of it."""

    def __init__(self) -> None:
        self.local = torch.arange(12.0, requires_grad=True)
        self.module = nn.Module()

    def leaves(self) -> dict[str, Shard]:
        return {"w": Shard(self.local, (3, 4), 0)}

    def before_write(self) -> None:
        pass

    def after_write(self) -> None:
        self.weights = self.local.detach().bfloat16()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_state_of_shards(one_process: None) -> None:
    masters = Masters()
    sfa = SFA(masters, beta=0.5, every=2)
    file = io.BytesIO()
    torch.save(sfa.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state["anchor"]["w"]) == ["0:12"]
    with torch.no_grad():
        masters.local += 4
    again = SFA(masters, every=1)
    again.load_state_dict(state)
    assert not again.step()
    assert again.step()
    assert masters.local.tolist() == [i + 2.0 for i in range(12)]
    assert masters.weights.tolist() == masters.local.tolist()
    state["anchor"]["w"] = {"0:6": torch.zeros(6)}
    with pytest.raises(MismatchError, match='"w": the saved anchor is of other shards than the model has; load it in as many'):
        again.load_state_dict(state)


class Stream:
    """A stream of a GPU, as far as the order of what the CPU does goes: everything is done at once."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_event(self, event: object) -> None:
        assert event is not None

    def record_event(self) -> object:
        return object()


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_anchors_elsewhere_are_brought_part_by_part(place: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "_CHUNK", chunk)
    for kind in (anchors.Memory, anchors.File):
        monkeypatch.setattr(kind, "beside", lambda self, current: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    for options in ({}, {"method": "ties", "density": 0.4, "scope": "model"}, {"method": "dare_ties", "density": 0.5}):
        model, by_hand = network(), network()
        sfa, plain = SFA(model, every=1, anchor=place, **options), SFA(by_hand, every=1, **options)
        assert isinstance(plain._kept, anchors.Memory)
        monkeypatch.setattr(plain._kept, "beside", plain._kept.leaves)
        for _ in range(2):
            for each in (model, by_hand):
                train(each, torch.optim.SGD(each.parameters(), 0.1), 1)
            assert sfa.step()
            assert plain.step()
            assert equal(weights(model), weights(by_hand))
    with torch.no_grad():
        model[3].bias[1] = float("nan")  # in the last part
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r'step 3: nothing was merged\ncurrent, tensor "3.bias": NaN or Inf'):
        sfa.step()
    assert equal({**weights(model), "3.bias": torch.ones(3)}, {**before, "3.bias": torch.ones(3)})


def test_a_file_takes_no_memory(tmp_path: Path) -> None:
    model = nn.Linear(1024, 4096, bias=False)  # 16 MB
    sfa = SFA(model, beta=0.5, every=1, anchor=tmp_path / "anchor.safetensors", threads=1)
    sfa.step()  # what is imported and compiled for the first merge is not the anchor's
    with torch.no_grad():
        model.weight += 1
    tracemalloc.start()  # sees the memory of NumPy
    sfa.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
    assert not any(torch.is_tensor(value) for value in vars(sfa._kept).values())


RANKS = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from mergekit_cl import CheckpointError, merge
from mergekit_cl.adapters.torch import SFA
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

def build(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model)
    return model

def train(model, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(24.0).view(6, 4).sin()).square().sum().backward()
        optimizer.step()

def full(model):
    model.reshard()
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}

def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)

path = folder / "anchor"
for policy in ("fixed", "rolling"):
    for options in ({"beta": 0.3}, {"method": "ties", "density": 0.4}):
        model = build(0)
        sfa = SFA(model, every=2, anchor=path, policy=policy, **options)
        anchor = full(model)
        for step in range(1, 5):
            train(model)
            before = full(model)
            if sfa.step():
                based = "method" in options
                expected = merge(
                    [before] if based else [anchor, before], base=anchor if based else None, seed=step, **options
                )
                assert same(full(model), expected), (policy, options, step)
                anchor = expected if policy == "rolling" else anchor
        assert same({name: t.full_tensor() for name, t in sfa.anchor.items()}, anchor)

model = build(1)
sfa = SFA(model, beta=0.3, every=2, total_steps=4, anchor=path)
train(model, 1); sfa.step()
state, begin = sfa.state_dict(), full(model)
assert state["anchor"] == {} and len(state["fingerprint"]) == 32
assert sfa.save_anchor(folder / "saved") == sfa.save_anchor(folder / "saved") == state["fingerprint"]
weights = {name: p.detach().clone() for name, p in model.named_parameters()}
dcp.save({"model": weights, "sfa": state, "memory": SFA(model, every=1).state_dict()}, checkpoint_id=folder / "checkpoint")
for _ in range(3):
    train(model); sfa.step()
expected = full(model)
sfa.new_task(total_steps=4)  # what came after the checkpoint, and is lost

def resumed(how):
    again = build(2)
    sfa = SFA(again, beta=0.3, every=2, total_steps=4, anchor="memory" if how == "saved" else path)
    target = {"model": {name: p.detach() for name, p in again.named_parameters()}, "sfa": sfa.state_dict()}
    if how == "saved":
        del target["sfa"]
    dcp.load(target, checkpoint_id=folder / "checkpoint")
    sfa.resume_from(folder / "saved", 1) if how == "saved" else sfa.load_state_dict(target["sfa"])
    for _ in range(3):
        train(again); sfa.step()
    assert same(full(again), expected), how

resumed("state")
resumed("saved")
state = SFA(build(2), every=1).state_dict()
dcp.load({"memory": state}, checkpoint_id=folder / "checkpoint")
sfa = SFA(build(2), every=1)
sfa.load_state_dict(state)
assert same({name: t.full_tensor() for name, t in sfa.anchor.items()}, begin)

# parameters that every process has whole, as with DDP: one file, which all of them write and rename
plain = [nn.Linear(40, 30), nn.Linear(40, 30)]
for model in plain:
    torch.manual_seed(3)
    model.reset_parameters()
one, other = SFA(plain[0], every=2, anchor=folder / "whole.safetensors"), SFA(plain[1], every=2)
for task in range(6):
    for step in range(3):
        for model in plain:
            with torch.no_grad():
                model.weight.mul_(1.1)
        dist.barrier()
        assert one.step() == other.step()
    assert one.anchor["weight"].equal(other.anchor["weight"])
    assert plain[0].weight.equal(plain[1].weight)
    one.new_task(), other.new_task()

if rank == 0:
    data = next((folder / "saved").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
dist.barrier()
for where, message in ((folder / "saved", "damaged"), (folder / "none", "missing"), (folder / "checkpoint", "not an anchor")):
    try:
        sfa.resume_from(where, 1)
    except CheckpointError as error:
        assert message in str(error), error
    else:
        raise AssertionError(where)
print("done", sorted(os.listdir(folder)))
dist.destroy_process_group()
"""


def test_sharded_anchors_in_folders(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RANKS, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert all("done" in output for output in outputs), "\n".join(outputs)
    assert {"anchor", "anchor.previous", "checkpoint", "saved"} <= set(os.listdir(tmp_path))


CHILD = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mergekit_cl.adapters.torch.anchor import File, beside, fingerprint_of, following, metadata_of, write
torch.set_num_threads(1)
path, moments, before = Path(sys.argv[1]), random.Random(0), 0
generations = [{f"w{i}": torch.full((20_000,), float(number)) for i in range(4)} for number in range(2)]
known = [fingerprint_of(leaves) for leaves in generations]
File.of(generations[0], None, path, {})
seen = set()
for round in range(60):
    child = os.fork()
    if not child:
        for number in range(10**6):
            File.of(generations[number % 2], None, path, {}).settle()
    time.sleep(0.02 * moments.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = 0
    for number, fingerprint in enumerate(known):
        try:
            anchor = File.find(path, fingerprint)
        except ValueError as error:
            assert "is not that of the checkpoint" in str(error), error
        else:
            found += 1
            seen.add((number, anchor.at.name))
            assert all((tensor == number).all() for tensor in anchor.tensors().values())
    assert found, os.listdir(path.parent)
    File.of(generations[round % 2], None, path, {}).settle()
print(sorted(seen))
"""


def test_kill_while_the_anchor_is_written_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("(")) > 3, done.stdout  # it was killed at different moments
    print(done.stdout)


def test_a_resumed_run_takes_no_anchor_of_its_own(place: Any, tmp_path: Path) -> None:
    model = network()
    sfa, optimizer = SFA(model, p=0.5, total_steps=8, anchor=place), adam(model)
    saved = sfa.save_anchor(tmp_path / "saved.safetensors")
    for _ in range(3):
        train(model, optimizer, 1)
        sfa.step()
    state, before = sfa.state_dict(), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    present = copy.deepcopy(model)

    with torch.no_grad():
        present[0].weight[0] = float("nan")  # not loaded yet: nothing of it is looked at
    resumed = SFA(present, p=0.5, total_steps=8, anchor=place, resume=True)
    assert "no anchor yet" in repr(resumed)
    for use in (
        resumed.step, resumed.finalize, resumed.include, lambda: resumed.new_task(8), resumed.state_dict,
        lambda: resumed.save_anchor(tmp_path / "other.safetensors"), lambda: resumed.anchor,
    ):  # fmt: skip
        with pytest.raises(MergeError, match="has no anchor yet; call load_state_dict"):
            use()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before

    present.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    by_file = SFA(other := copy.deepcopy(model), p=0.5, total_steps=8, anchor=place, resume=True)
    by_file.resume_from(tmp_path / "saved.safetensors", 3)
    assert by_file.save_anchor(tmp_path / "saved.safetensors") == saved
    assert [each.step() for each in (sfa, resumed, by_file)] == [True] * 3
    assert equal(weights(model), weights(present))
    assert equal(weights(model), weights(other))


def test_a_rolling_anchor_is_resumed_from_at_its_own_step_alone(tmp_path: Path) -> None:
    def rolling() -> SFA:
        return SFA(network(), every=2, policy="rolling", anchor=path, resume=True)

    path, early = tmp_path / "anchor.safetensors", tmp_path / "early.safetensors"
    model = network()
    sfa, optimizer = SFA(model, every=2, policy="rolling", anchor=path), adam(model)
    sfa.save_anchor(tmp_path / "first.safetensors")
    for step in range(1, 6):
        train(model, optimizer, 1)
        sfa.step()
        if step == 3:
            sfa.save_anchor(early)
    for file, step, of, expected in [
        (path, 3, 4, 2),
        (path, 1, 4, 0),
        (early, 5, 2, 4),
        (tmp_path / "first.safetensors", 3, 0, 2),
    ]:
        with pytest.raises(MismatchError, match=f"is that of step {of} of the task.* after step {step} .* of step {expected};"):
            rolling().resume_from(file, step)
    with pytest.raises(MismatchError, match="is that of step 2 of the task"):
        SFA(network(), every=2, resume=True).resume_from(early, 3)
    (resumed := rolling()).resume_from(path, 5)
    assert equal(resumed.anchor, sfa.anchor)
    (resumed := rolling()).resume_from(early, 3)
    written = early.stat().st_mtime_ns
    assert resumed.save_anchor(early) == File.find(early).fingerprint != File.find(path).fingerprint
    assert early.stat().st_mtime_ns == written


def test_a_file_is_open_before_another_process_may_drop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "anchor.safetensors", File._open

    def opened(self: File) -> Any:
        with pytest.raises(Timeout):
            FileLock(beside(path, "anchor"), blocking=False).acquire()
        return real(self)

    File.of({"w": torch.ones(3)}, None, path, {})
    monkeypatch.setattr(File, "_open", opened)
    assert File.of({"w": torch.zeros(3)}, None, path, {}).at == following(path)


def test_what_goes_wrong_with_a_folder_is_an_error_about_the_anchor(
    tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "anchor.safetensors"
    leaves = Masters().leaves()
    folder = Folder.of(leaves, None, path, {})
    data = next(path.glob("*.distcp"))
    data.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"anchor.safetensors: the anchor cannot be read \(process 0: "):
        folder.tensors(leaves)
    with pytest.raises(CheckpointError, match="the anchor cannot be read or written: KeyError: 'no such key'"):
        anchor_folder._by_first(lambda: {"a": 1}["no such key"])
    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match=r"the anchor cannot be written \(process 0: ZeroDivisionError"):
        Folder.of({"w": Shard(torch.zeros(12), (3, 4), 0)}, None, path, {})


def test_a_folder_that_has_been_renamed_already_settles(tmp_path: Path, one_process: None) -> None:
    path = tmp_path / "anchor.safetensors"
    shards = [{"w": Shard(torch.full((12,), float(value)), (3, 4), 0)} for value in range(2)]
    Folder.of(shards[0], None, path, {})
    one, other = (Folder.of(shards[1], None, path, {}) for _ in range(2))
    for folder in (one, other):
        folder.settle()
        assert read_index(path) == folder.index
    assert read_index(previous(path))["fingerprint"] != one.fingerprint
    assert torch.equal(other.tensors(shards[0])["w"].local, torch.ones(12))


def test_steps_of_earlier_tasks_are_noted_in_every_file(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    model = network()
    sfa = SFA(model, every=1)
    sfa.step()
    sfa.new_task()
    loaded = SFA(network(1), every=1, anchor=path)  # writes the anchor of a state that was in memory
    loaded.load_state_dict(sfa.state_dict())
    loaded.step()
    again = SFA(network(1), every=1)
    again.resume_from(path, 1)
    assert again.steps_before == 1
    rolling = SFA(model, every=1, anchor=tmp_path / "rolling.safetensors", policy="rolling")
    rolling.step()
    rolling.new_task()
    train(model, adam(model), 1)
    rolling.step()  # writes the merged weights
    again = SFA(network(1), every=1, policy="rolling")
    again.resume_from(tmp_path / "rolling.safetensors", 1)
    assert again.steps_before == 1


def test_non_finite_parameters_pass_when_allowed(place: Any) -> None:
    weight = nn.Parameter(torch.tensor([1.0, float("inf")]))
    sfa = SFA([weight], every=1, anchor=place, nonfinite="allow")
    with torch.no_grad():
        weight[0] = 3
    assert sfa.step()
    assert weight.tolist() == [2.0, float("inf")]


def test_a_filter_of_a_tensor_that_was_frozen_on_the_way_is_no_error(place: Any) -> None:
    model = network()
    sfa = SFA(model, [{"filter": "0.weight", "value": 0.0}, {"value": 1.0}], every=1, anchor=place)
    begin = weights(model)
    train(model, adam(model), 1)
    model[0].weight.requires_grad_(False)
    assert sfa.step()
    assert torch.equal(model[3].weight, begin["3.weight"])
    assert not torch.equal(model[0].weight, begin["0.weight"])


def test_what_is_taken_up_on_the_way_has_the_dtype_of_the_anchor(place: Any) -> None:
    model = network()
    model[0].requires_grad_(False)
    sfa = SFA(model, every=1, anchor=place, anchor_dtype=torch.bfloat16)
    model[0].requires_grad_(True)
    assert sfa.include() == ["0.weight", "0.bias"]
    assert {tensor.dtype for tensor in sfa.anchor.values()} == {torch.bfloat16}


def test_the_previous_anchor_stays_when_one_checkpoint_is_loaded_after_another(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    model = network()
    sfa = SFA(model, every=1, anchor=path)
    older = sfa.state_dict()
    train(model, adam(model), 1)
    sfa.new_task()
    newer = sfa.state_dict()
    there = files(path)
    for state in (older, newer, older):
        sfa.load_state_dict(state)
        assert files(path) == there


def test_an_anchor_in_a_file_is_merged_by_the_backend_that_was_asked_for(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    sfa = SFA(model, every=1, anchor=place, backend="numpy")
    used = []
    original = SFA._executor

    def watched(*args: Any, **named: Any) -> Any:
        executor = original(*args, **named)
        used.append(executor.backend_name)
        return executor

    monkeypatch.setattr(SFA, "_executor", watched)
    sfa.step()
    assert used == ["numpy"]


def test_a_task_that_begins_with_the_weights_of_the_last_one_has_its_own_note(tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    model = network()
    sfa = SFA(model, beta=1.0, every=1, anchor=path)
    sfa.step()
    sfa.new_task()
    again = SFA(model, every=1)
    again.resume_from(path, 0)
    assert again.steps_before == 1
