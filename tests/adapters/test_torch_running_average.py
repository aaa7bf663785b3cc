"""RunningAverage in a PyTorch loop: what is averaged, evaluation with it, how it resumes, what it refuses."""

import copy
import doctest
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn

from mergekit_cl import CheckpointError, MergeError, MismatchError, NonFiniteError, merge
from mergekit_cl.adapters.torch import running_average as module
from mergekit_cl.adapters.torch.running_average import RunningAverage

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
KINDS: list[dict[str, Any]] = [{"kind": "ema", "decay": 0.7}, {"kind": "uniform"}, {"kind": "last", "last": 3}]


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Compare bits: -0.0 is not 0.0."""
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and bits(one[name]) == bits(other[name]) for name in one)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, average: RunningAverage | None = None
) -> list[dict[str, torch.Tensor]]:
    trajectory = []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)).float(), Y).backward()
        optimizer.step()
        if average is not None:
            average.step()
        trajectory.append(weights(model))
    return trajectory


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)


def held(average: RunningAverage) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in average.average.items()}


def test_docstring_examples() -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 5
    assert not results.failed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "ema", "decay": 0.75}, [1.0, 1.25, 2.4375, 3.828125]),
        ({"kind": "uniform"}, [1.0, 1.5, 3.0, 4.25]),
        ({"kind": "last", "last": 2}, [1.0, 1.5, 4.0, 7.0]),
        ({"kind": "last", "last": 1}, [1.0, 2.0, 6.0, 8.0]),
        ({"kind": "uniform", "every": 2}, [None, 2.0, 2.0, 5.0]),
        ({"kind": "uniform", "start": 2}, [None, 2.0, 4.0, 16 / 3]),
        ({"kind": "uniform", "start": 1, "every": 2}, [1.0, 1.0, 3.5, 3.5]),
        ({"kind": "ema", "decay": 0.0}, [1.0, 2.0, 6.0, 8.0]),
        ({"kind": "ema", "decay": 1.0}, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_formulas_by_hand(options: dict[str, Any], expected: list[float | None]) -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = RunningAverage([weight], **options)
    for value, mean in zip((1.0, 2.0, 6.0, 8.0), expected, strict=True):
        weight.data.fill_(value)
        average.step()
        if mean is None:
            with (
                pytest.raises(MergeError, match=r"nothing was captured yet; the first capture is after step 2"),
                average.swapped(),
            ):
                pass
        else:
            assert average.average["parameter 0"].item() == torch.tensor(mean).item()
    assert weight.item() == 8.0


def test_the_decay_may_change_on_the_way() -> None:
    weight = nn.Parameter(torch.ones(1))
    average = RunningAverage([weight], decay=0.5)
    for value, decay, mean in ((1.0, 0.5, 1.0), (3.0, 0.5, 2.0), (6.0, 0.75, 3.0), (6.0, 0.0, 6.0)):
        weight.data.fill_(value)
        average.decay = decay
        average.step()
        assert average.average["parameter 0"].item() == mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_equal_to_merges_by_hand(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    average = RunningAverage(model, every=2, start=3, **options)
    trajectory = train(model, sgd(model), 9, average)[2::2]
    assert (average.step_count, average.captures) == (9, 4)
    expected = trajectory[0]
    for number, captured in enumerate(trajectory[1:], 1):
        if options["kind"] == "ema":
            expected = merge([expected, captured], "sfa", beta=0.7)
        else:
            expected = merge([expected, captured], "linear", weight=[number, 1])
    if options["kind"] == "last":
        expected = merge(trajectory[-3:], "linear")
    assert equal(held(average), expected)
    assert equal(weights(model), trajectory[-1])


@pytest.mark.parametrize("kind", ["ema", "uniform"])
def test_against_torch_and_float64(kind: Any) -> None:
    model, exact = network(), dict[str, torch.Tensor]()
    average = RunningAverage(model, kind, **({"decay": 0.9} if kind == "ema" else {}))
    fn = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if kind == "ema" else {"avg_fn": get_swa_avg_fn()}
    peer = AveragedModel(model, **fn)
    optimizer = sgd(model)
    for step in range(30):
        train(model, optimizer, 1, average)
        peer.update_parameters(model)
        for name, value in model.state_dict().items():
            weight = 0.1 if kind == "ema" else 1 / (step + 1)
            exact[name] = exact[name] + weight * (value.double() - exact[name]) if step else value.double()
    for name, value in average.average.items():
        scale = exact[name].abs().max()
        ours, theirs = (
            (tensor.double() - exact[name]).abs().max() / scale for tensor in (value, peer.module.state_dict()[name])
        )
        assert ours < 2e-7
        assert theirs < 4e-7
        assert (value - peer.module.state_dict()[name]).abs().max() < 5e-7 * scale


def test_a_slow_average_of_bfloat16_needs_float32() -> None:
    model = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))]
    narrow, wide = (RunningAverage(model, decay=0.9999, dtype=dtype) for dtype in (None, torch.float32))
    for average in (narrow, wide):
        average.step()
    model[0].data += 1
    for _ in range(1000):
        narrow.step()
        wide.step()
    assert (narrow.average["parameter 0"] == 1).all()  # it has never moved
    exact = 2 - 0.9999**1000
    assert ((wide.average["parameter 0"] - exact).abs() < 1e-5).all()
    with wide.swapped():
        assert (model[0] == torch.tensor(exact).bfloat16()).all()
    assert (model[0] == 2).all()
    assert ((wide.average["parameter 0"] - exact).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_swapped_and_back(options: dict[str, Any], dtype: torch.dtype | None) -> None:
    model = network()
    average = RunningAverage(model, dtype=dtype, **options)
    train(model, sgd(model), 4, average)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[0].weight[0, 1] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)  # a NaN of its own
    own, mean = weights(model), held(average)
    places = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]

    def unchanged() -> bool:
        same = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == places
        return same and equal(weights(model), own) and equal(held(average), mean)

    memory = average.average
    with average.swapped():
        assert equal(weights(model), {name: tensor.float() for name, tensor in mean.items()})
        if options["kind"] != "last" and dtype is None:
            assert equal(memory, own)  # exchanged, without a copy of either
        assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == places
    assert unchanged()
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert unchanged()
    for act, message in (
        (average.step, "a step inside swapped"),
        (average.state_dict, r"state_dict\(\) inside swapped"),
        (lambda: average.load_state_dict({}), r"load_state_dict\(\) inside swapped"),
        (lambda: average.copy_to(model), r"copy_to\(\) inside swapped"),
        (lambda: average.average, "average inside swapped"),
        (lambda: average.swapped().__enter__(), r"swapped\(\) inside swapped"),
        (sgd(model).step, r"an optimizer steps inside swapped\(\)"),
        (lambda: train(model, sgd(model), 1), r"an optimizer steps inside swapped\(\)"),
    ):
        with pytest.raises(MergeError, match=message), average.swapped():
            act()
        assert unchanged()
    other = network(1)
    with average.swapped():
        train(other, sgd(other), 1)  # another model may be trained
    train(model, sgd(model), 1)
    assert average.step_count == 4


def test_swapped_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    average = RunningAverage(model, "uniform")
    train(model, sgd(model), 2, average)
    own, mean, copies = weights(model), held(average), 0
    clone = torch.Tensor.clone

    def out_of_memory(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        copies += 1
        if copies == 3:
            raise torch.OutOfMemoryError
        return clone(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            average.swapped().__enter__()
    assert equal(weights(model), own)
    assert equal(held(average), mean)


def test_gradients_of_before_a_swap_are_refused() -> None:
    model = network()
    average = RunningAverage(model)
    train(model, sgd(model), 1, average)
    loss = model(X).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), average.swapped():
        loss.backward()


def test_buffers() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    model, same = build(), build()
    kept, averaged = RunningAverage(model, "uniform"), RunningAverage(same, "uniform", buffers="average")
    trajectory = train(model, sgd(model), 3, kept)
    train(same, sgd(same), 3, averaged)
    mean = merge([{n: t for n, t in w.items() if "num" not in n} for w in trajectory[:2]], "linear")
    mean = merge([mean, {n: t for n, t in trajectory[2].items() if "num" not in n}], "linear", weight=[2, 1])
    assert not any("running" in name for name in kept.average)
    assert equal(held(averaged), {name: mean[name] for name in averaged.average})
    assert {"1.running_mean", "1.running_var"} < averaged.average.keys()
    for average, network_ in ((kept, model), (averaged, same)):
        own = weights(network_)
        with average.swapped():
            statistics = own if average is kept else mean
            assert equal({"": network_[1].running_mean}, {"": statistics["1.running_mean"]})
            update_bn([X], network_)
            assert network_[1].num_batches_tracked == 1
            assert not torch.equal(network_[1].running_mean, statistics["1.running_mean"])
        assert equal(weights(network_), own)
    with pytest.raises(MergeError, match="needs the module"):
        RunningAverage(model.parameters(), buffers="average")


@pytest.mark.parametrize("interrupted", range(9))
@pytest.mark.parametrize(("options", "place"), [*zip(KINDS, ("memory", "cpu", "memory"), strict=True), (KINDS[2], "files")])
def test_resumed_runs_are_bit_equal(options: dict[str, Any], place: str, interrupted: int, tmp_path: Path) -> None:
    where = str(tmp_path / "captures") if place == "files" else place
    model = network(dtype=torch.bfloat16)
    optimizer = sgd(model)
    average = RunningAverage(model, average=where, dtype=torch.float32, start=2, every=2, **options)
    train(model, optimizer, interrupted, average)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}, file)
    train(model, optimizer, 8 - interrupted, average)  # and then it is killed
    expected = held(average)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(seed=1, dtype=torch.bfloat16)
    optimizer = sgd(again)
    other: dict[str, Any] = {"kind": "last", "last": 5} if place == "files" else {}
    resumed = RunningAverage(again, average=where, **other)  # the state's settings take over
    resumed.load_state_dict(saved["average"])
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, 8 - interrupted, resumed)
    assert equal(held(resumed), expected)
    assert (resumed.every, resumed.start, resumed.step_count, resumed.captures) == (2, 2, 8, 4)
    assert repr(resumed) == repr(average)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_going_back_to_a_state(options: dict[str, Any]) -> None:
    model = network()
    optimizer, average = sgd(model), RunningAverage(model, **options)
    train(model, optimizer, 3, average)
    state = copy.deepcopy([each.state_dict() for each in (model, optimizer, average)])
    train(model, optimizer, 3, average)
    expected = held(average)
    for each, saved in zip((model, optimizer, average), state, strict=True):
        each.load_state_dict(saved)
    train(model, optimizer, 3, average)
    assert equal(held(average), expected)


def test_captures_in_files(tmp_path: Path) -> None:
    model = network()
    average = RunningAverage(model, "last", last=2, average=tmp_path / "captures")

    def files() -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "captures").iterdir())

    optimizer = sgd(model)
    trajectory = train(model, optimizer, 3, average)
    assert files() == [2, 3]
    with average.swapped():
        assert equal(weights(model), merge(trajectory[1:], "linear"))
    state = average.state_dict()
    assert state["memory"] == []
    train(model, optimizer, 3, average)
    assert files() == [2, 3, 5, 6]  # the state would not be worth anything without the first two
    average.state_dict()
    train(model, optimizer, 1, average)
    assert files() == [5, 6, 7]

    with pytest.raises(CheckpointError, match=r"step-00000002.safetensors, which the state names, cannot be used; restore it"):
        average.load_state_dict(state)
    state = average.state_dict()
    file = tmp_path / "captures" / "step-00000006.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        average.load_state_dict(state)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"a capture in .* cannot be read"), average.swapped():
        pass
    in_memory = RunningAverage(model, "last", last=2)
    with pytest.raises(MergeError, match="was kept in a folder of files; build this with average= that folder"):
        in_memory.load_state_dict(state)
    with pytest.raises(MergeError, match="was kept in memory; build this so too"):
        average.load_state_dict(in_memory.state_dict())
    with pytest.raises(MergeError, match='files are for kind="last"'):
        RunningAverage(model, average=tmp_path)


def test_tied_and_frozen_parameters() -> None:
    model = network()
    tied = nn.ModuleDict({"a": model[0], "b": model[0], "c": model[2]})
    model[2].bias.requires_grad_(False)
    average = RunningAverage(tied, decay=0.5)
    assert "3 tensors" in repr(average)
    first = weights(model)
    average.step()
    with torch.no_grad():
        model[0].weight += 1
    average.step()
    assert equal({"": average.average["a.weight"]}, {"": merge([first["0.weight"], model[0].weight.detach()], "sfa", beta=0.5)})
    with average.swapped():
        assert torch.allclose(model[0].weight, first["0.weight"] + 0.5)  # once, not twice
    assert average.average.keys() == {"a.weight", "a.bias", "c.weight"}
    model[0].weight.requires_grad_(False)  # frozen on the way: it stands still, and its average goes on to it
    for _ in range(40):
        average.step()
    assert torch.allclose(average.average["a.weight"], model[0].weight, atol=1e-7)
    model[2].bias.requires_grad_(True)
    with pytest.raises(MergeError, match=r'"c.bias" was frozen, or not there, when this was built'):
        average.step()


def test_attached_to_an_optimizer() -> None:
    by_step, by_hook = network(), network()
    first, second = RunningAverage(by_step, "uniform"), RunningAverage(by_hook, "uniform")
    train(by_step, sgd(by_step), 5, first)
    optimizer = sgd(by_hook)
    assert second.attach(optimizer) is second
    train(by_hook, optimizer, 5)
    assert equal(held(first), held(second))
    with pytest.raises(MergeError, match="counts the steps itself"):
        second.step()
    with pytest.raises(MergeError, match="attached to an optimizer already"):
        second.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    for _ in range(2):  # the scale is too large: both steps are skipped
        optimizer.zero_grad()
        scaler.scale(by_hook(X).sum() * 1e30).backward()
        scaler.step(optimizer)
        scaler.update()
    assert second.step_count == 5
    second.detach()
    train(by_hook, optimizer, 1)
    assert second.step_count == 5
    assert second.step()


def test_a_compiled_module() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    average = RunningAverage(compiled, "uniform")
    train(compiled, sgd(model), 3, average)
    assert average.average.keys() == dict(model.named_parameters()).keys()
    own = compiled(X)
    with average.swapped():
        plain = network()
        average_of = {name: p.detach().clone() for name, p in model.named_parameters()}
        plain.load_state_dict(average_of)
        assert torch.equal(compiled(X), plain(X))
    assert torch.equal(compiled(X), own)
    RunningAverage(model, "uniform").load_state_dict(average.state_dict())


def test_copy_to() -> None:
    model, other = network(), network(seed=3, dtype=torch.bfloat16)
    model[2].requires_grad_(False)
    average = RunningAverage(model, decay=0.5)
    with pytest.raises(MergeError, match="nothing was captured yet"):
        average.copy_to(other)
    train(model, sgd(model), 4, average)
    mean, own = held(average), weights(model)
    average.copy_to(other)
    assert equal(weights(other), {name: tensor.bfloat16() for name, tensor in (own | mean).items()})
    assert all(p.grad is None and p.grad_fn is None for p in other.parameters())
    larger = nn.Sequential(nn.Linear(4, 9), nn.Tanh())
    before = weights(larger)
    with pytest.raises(
        MismatchError, match=r'"2.weight" is missing\n.*"2.bias" is missing\n.*"0.weight" has the shape \(9, 4\)'
    ):
        average.copy_to(larger)
    assert equal(weights(larger), before)
    average.copy_to(model)
    assert equal(weights(model), own | mean)


class Tied(nn.Module):
    """An embedding and a head: one parameter, two parameters in one memory, or two of their own; and a frozen twin."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        if how == "object":
            self.head.weight = self.embed.weight
        elif how == "memory":
            self.head.weight = nn.Parameter(self.embed.weight.data)

    def values(self) -> list[float]:
        return [part.weight.data[0, 0].item() for part in (self.embed, self.head)]


@pytest.mark.parametrize("there", ["object", "memory", "apart"])
@pytest.mark.parametrize("here", ["object", "memory"])
def test_copy_to_writes_every_one_of_tied_parameters(here: str, there: str) -> None:
    model, other = Tied(here), Tied(there)
    average = RunningAverage(model, "uniform")
    for value in (1.0, 2.0, 6.0):
        model.embed.weight.data.fill_(value)
        average.step()
    other.frozen.data.zero_()
    average.copy_to(other)
    assert other.values() == [3.0, 3.0]
    assert other.frozen.tolist() == [7.0, 7.0]
    assert model.values() == [6.0, 6.0]
    average.copy_to(model)
    assert model.values() == [3.0, 3.0]


@pytest.mark.parametrize("there", ["object", "memory"])
def test_copy_to_refuses_other_ties_and_parameters_that_it_would_leave(there: str) -> None:
    model, other = Tied("apart"), Tied(there)
    average = RunningAverage(model, "uniform")
    average.step()
    before = weights(other)
    with pytest.raises(MismatchError, match=r'"head.weight" is tied to "embed.weight", but not in the model that is trained'):
        average.copy_to(other)
    assert equal(weights(other), before)
    larger = Tied("apart")
    larger.more = nn.Linear(1, 1, bias=False)
    with pytest.raises(MismatchError, match=r'"more.weight" is not in the model that is trained'):
        average.copy_to(larger)


def test_parameters_that_share_a_part_of_their_memory_are_refused() -> None:
    weight, flat = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(6))
    for pair in ([weight, nn.Parameter(weight.data.t())], [flat, nn.Parameter(flat.data[:4])]):
        with pytest.raises(MergeError, match='"parameter 0" and "parameter 1" share a part of their memory'):
            RunningAverage(pair)


def test_uniform_is_not_planned_again_at_each_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    average = RunningAverage(model, "uniform")
    monkeypatch.setattr(module, "prepare", None)
    trajectory = train(model, sgd(model), 3, average)
    monkeypatch.undo()
    expected = trajectory[0]
    for captures, theta in enumerate(trajectory[1:], 1):
        expected = merge([expected, theta], "linear", weight=[captures, 1])
    assert equal(held(average), expected)


def test_the_sign_of_zero_is_that_of_merges_and_what_overflows_is_refused() -> None:
    weight = nn.Parameter(torch.tensor([-0.0, 0.0]))
    average = RunningAverage([weight], "uniform")
    for _ in range(3):
        average.step()
    assert bits(average.average["parameter 0"]) == bits(torch.tensor([-0.0, 0.0]))
    weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r'step 4: .* "parameter 0" holds NaN or Inf, or numbers next to it'):
        average.step()
    assert bits(average.average["parameter 0"]) == bits(torch.tensor([-0.0, 0.0]))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_steps_that_a_gradient_scaler_skips_do_not_count(options: dict[str, Any]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    average = RunningAverage(model, "uniform").attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for factor in (1.0, float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(X), Y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (average.step_count, average.captures) == (2, 2)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_what_is_not_finite_never_reaches_the_average(options: dict[str, Any]) -> None:
    for captures in (0, 2):
        model = network()
        average = RunningAverage(model, **options)
        optimizer = sgd(model)
        train(model, optimizer, captures, average)
        before = held(average) if captures else {}
        good = weights(model)
        with torch.no_grad():
            model[2].bias[1] = float("nan")
        with pytest.raises(NonFiniteError, match=rf"step {captures + 1}: the average was left alone[^$]*2\.bias"):
            average.step()
        assert (average.step_count, average.captures) == (captures + 1, captures)
        if captures:
            assert equal(held(average), before)
        model.load_state_dict(good)
        assert average.step()
        allowed = RunningAverage(model, nonfinite="allow", **options)
        with torch.no_grad():
            model[2].bias[1] = float("inf")
        allowed.step()
        assert allowed.average["2.bias"].isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    weights = [nn.Parameter(torch.zeros(0, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    average = RunningAverage(weights, "uniform")
    assert average.step()
    with torch.no_grad():
        weights[1][1] = value
    with pytest.raises(
        NonFiniteError, match=r'RunningAverage, step 2: the average was left alone: "parameter 1" holds NaN or Inf'
    ):
        average.step()
    assert average.average["parameter 1"].tolist() == [1, 1, 1]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_sharded_parameters(options: dict[str, Any], process_group: None) -> None:
    model, sharded = network(), network()
    fully_shard(sharded)

    def whole() -> dict[str, torch.Tensor]:
        sharded.reshard()
        return {name: p.full_tensor().clone() for name, p in sharded.named_parameters()}

    plain, spread = (RunningAverage(each, **options) for each in (model, sharded))
    for step in range(4):
        whole()
        for each, average in ((model, plain), (sharded, spread)):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.mul_(1 + 0.1 * step)
                each(X)  # an evaluation leaves the parameters of the root whole
            average.step()
    own, objects = whole(), list(sharded.parameters())
    assert all(isinstance(leaf, DTensor) for leaf in spread.average.values())
    assert equal({name: leaf.full_tensor() for name, leaf in spread.average.items()}, held(plain))
    with plain.swapped(), spread.swapped(), torch.no_grad():
        assert torch.equal(model(X), sharded(X))
        assert equal(whole(), weights(model))
        sharded(X)
    assert equal(whole(), own)
    assert all(one is other for one, other in zip(objects, sharded.parameters(), strict=True))
    again = RunningAverage(sharded, **options)
    again.load_state_dict(spread.state_dict())
    assert equal({name: leaf.full_tensor() for name, leaf in again.average.items()}, held(plain))


def test_copies_and_pickles() -> None:
    model = network()
    average = RunningAverage(model, decay=0.5)
    train(model, sgd(model), 3, average)
    for other in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        before = held(average)
        other.step()
        assert other.captures == 4
        assert equal(held(average), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mean"}, "kind='mean': must be one of \"ema\""),
        ({"decay": 1.5}, r"decay=1.5: must be in \[0, 1\]"),
        ({"decay": float("nan")}, "decay=nan"),
        ({"decay": True}, "decay=True"),
        ({"kind": "uniform", "decay": 0.5}, 'decay is for kind="ema", not "uniform"'),
        ({"last": 3}, 'last is for kind="last", not "ema"'),
        ({"kind": "last"}, "needs last"),
        ({"kind": "last", "last": 0}, "last=0: must be a whole number, 1 or more"),
        ({"every": 0}, "every=0"),
        ({"start": -1}, "start=-1"),
        ({"start": 1.0}, "start=1.0"),
        ({"buffers": "drop"}, "buffers='drop'"),
        ({"nonfinite": "skip"}, "nonfinite='skip'"),
        ({"dtype": torch.float16}, 'dtype=torch.float16: "0.weight" is torch.float32, which holds larger numbers'),
        ({"dtype": torch.int32}, 'unknown out_dtype "int32"'),
        ({"threads": 0}, "threads=0"),
        ({"backend": "cuda"}, 'unknown backend "cuda"'),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        RunningAverage(network(), **options)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    for options in (
        {"decay": np.float64(0.5), "every": np.int64(2)},
        {"decay": np.float32(0.5), "start": np.int64(2)},
        {"kind": "last", "last": np.int64(2)},
    ):
        average = RunningAverage(network(), **options)
        torch.save(average.state_dict(), tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
        assert all(state[name] == value for name, value in options.items())
    average = RunningAverage(network())
    average.decay = np.float64(0.25)
    assert type(average.state_dict()["decay"]) is float


def test_nothing_to_average() -> None:
    with pytest.raises(MergeError, match="no parameter requires a gradient"):
        RunningAverage(network().requires_grad_(False))
    with pytest.raises(MergeError, match="got int"):
        RunningAverage(3)
    model = network()
    average = RunningAverage(model)
    del model[2]
    with pytest.raises(MergeError, match=r'no longer has "2.weight"'):
        average.step()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"captures": None}, MergeError, 'lacks "captures"'),
        ({"memory": None}, MergeError, 'lacks "memory"'),
        ({"kind": "mean"}, MergeError, "kind='mean'"),
        ({"decay": 2}, MergeError, "decay=2"),
        ({"dtype": "int8"}, MergeError, "int8"),
        ({"step_count": -1}, MergeError, "step_count=-1"),
        ({"memory": [{}, {}]}, MergeError, "does not hold 1 captures"),
        ({"memory": [{"0.weight": 1}]}, MergeError, "not made of tensors"),
        ({"memory": [{"0.weight": torch.ones(8, 4)}]}, MismatchError, 'the saved average lacks "0.bias"'),
        ({"memory": [{"0.weight": torch.ones(2)}]}, MismatchError, r'"0.weight": .* shape \(2,\), the model \(8, 4\)'),
        ({"memory": [{"x": torch.ones(2)}]}, MismatchError, 'the saved average has "x", which this one lacks'),
        (
            {"memory": [{**weights(network()), "2.bias": torch.full([3], torch.inf)}]},
            NonFiniteError,
            r'"2.bias" holds NaN or Inf',
        ),
    ],
)
def test_damaged_states(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    average = RunningAverage(model, decay=0.5)
    train(model, sgd(model), 2, average)
    before, settings = held(average), repr(average)
    state = {name: value for name, value in {**average.state_dict(), **change}.items() if change.get(name, ...) is not None}
    with pytest.raises(error, match=message):
        average.load_state_dict(state)
    assert equal(held(average), before)
    assert repr(average) == settings


class Masters:
    """What trains a model by tensors of its own, as DeepSpeed does; the model computes with rounded ones."""

    def __init__(self) -> None:
        self.local = torch.zeros(2, requires_grad=True)
        self.weights = torch.zeros(2, dtype=torch.bfloat16)

    def leaves(self) -> dict[str, torch.Tensor]:
        return {"w": self.local}

    def before_write(self) -> None:
        pass

    def after_write(self) -> None:
        self.weights = self.local.detach().bfloat16()


def test_a_model_follows_what_is_written_to_its_masters() -> None:
    masters = Masters()
    average = RunningAverage(masters, "uniform")
    for value in (2.0, 4.0):
        masters.local.data.fill_(value)
        masters.after_write()
        average.step()
    with average.swapped():
        assert masters.weights.tolist() == [3.0, 3.0]
    assert masters.weights.tolist() == [4.0, 4.0]
    average.copy_to(masters)
    assert masters.weights.tolist() == [3.0, 3.0]


def test_files_of_a_state_stay_when_a_resumed_run_goes_on_and_go_when_it_is_saved_again(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(1))
    first = RunningAverage([weight], "last", last=2, average=tmp_path)
    first.step()
    first.step()
    state = first.state_dict()
    resumed = RunningAverage([weight], "last", last=2, average=tmp_path)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step()
    RunningAverage([weight], "last", last=2, average=tmp_path).load_state_dict(state)  # once more, after another crash
    resumed.state_dict()
    resumed.step()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"step-{step:08}.safetensors" for step in (4, 5, 6)]  # those of the later state, and the newest


@pytest.mark.parametrize("kind", ["ema", "uniform", "last"])
def test_weights_loaded_by_assignment_are_captured(kind: Any) -> None:
    models = [network(seed) for seed in range(3)]
    average = RunningAverage(models[0], kind, **{"ema": {"decay": 0.5}, "uniform": {}, "last": {"last": 3}}[kind])
    states = [weights(each) for each in models]
    by_hand = states[0]["0.weight"]
    average.step()
    average.step()  # the same weights; what was prepared for their memory is kept
    for state in states[1:]:
        models[0].load_state_dict(copy.deepcopy(state), assign=True)
        for parameter in models[0].parameters():
            parameter.requires_grad_(True)
        average.step()
        by_hand = 0.5 * by_hand + 0.5 * state["0.weight"]
    parts = {"ema": [], "uniform": [0, 0, 1, 2], "last": [0, 1, 2]}[kind]
    expected = sum(states[i]["0.weight"] for i in parts) / len(parts) if parts else by_hand
    torch.testing.assert_close(average.average["0.weight"], expected)
