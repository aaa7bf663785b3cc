"""SFA in a PyTorch training loop: when it merges, what it writes, how it resumes, what it refuses."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_cl import MergeError, MismatchError, NonFiniteError, merge, methods
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.continual.schedule import MergeSchedule

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, sfa: SFA | None = None) -> list[int]:
    merged = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)).float(), Y).backward()
        optimizer.step()
        if sfa is not None and sfa.step():
            merged.append(step)
    return merged


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"p": 0.25, "total_steps": 8}, 8, [2, 4, 6, 8]),
        ({"total_steps": 8}, 8, [2, 4, 6, 8]),
        ({"p": 0.4, "total_steps": 10}, 10, [4, 8, 10]),
        ({"p": 1.0, "total_steps": 5}, 5, [5]),
        ({"p": 0.01, "total_steps": 3}, 3, [1, 2, 3]),
        ({"p": 0.25, "total_steps": 10}, 10, [2, 4, 6, 8, 10]),  # round(2.5) is 2
        ({"every": 3}, 7, [3, 6]),
        ({"every": 3, "total_steps": 7}, 7, [3, 6, 7]),
    ],
)
def test_merge_points(options: dict[str, Any], steps: int, expected: list[int]) -> None:
    model = network()
    sfa = SFA(model, **options)
    assert train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps, sfa) == expected
    assert (sfa.merges, sfa.last_merge_step, sfa.step_count) == (len(expected), expected[-1], steps)


@given(st.integers(1, 7), st.none() | st.integers(1, 12), st.integers(0, 15))
def test_the_merges_that_are_done_after_a_step_are_those_that_were_due(every: int, total: int | None, step: int) -> None:
    schedule = MergeSchedule(every, total)
    due = [number for number in range(1, step + 1) if schedule.due(number)]
    assert schedule.merges(step) == len(due)
    assert schedule.last(step) == max(due, default=0)


def test_the_formula_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    sfa = SFA([weight], beta=0.25, every=1)
    with torch.no_grad():
        weight += torch.tensor([4.0, 0.0])
    assert sfa.step()
    assert weight.tolist() == [4.0, 2.0]  # 0.25 * 1 + 0.75 * 5
    assert sfa.step()
    assert weight.tolist() == [3.25, 2.0]  # the anchor is still 1
    sfa.beta = 1.0
    assert sfa.step()
    assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_a_loop_by_hand_that_calls_merge(dtype: torch.dtype) -> None:
    model, by_hand = network(dtype=dtype), network(dtype=dtype)
    train(model, adam := torch.optim.Adam(model.parameters(), 0.01), 10, SFA(model, beta=0.3, p=0.4, total_steps=10))
    anchor, optimizer = weights(by_hand), torch.optim.Adam(by_hand.parameters(), 0.01)
    for step in range(1, 11):
        train(by_hand, optimizer, 1)
        if step in (4, 8, 10):
            by_hand.load_state_dict(merge([anchor, by_hand.state_dict()], beta=0.3))
    assert equal(weights(model), weights(by_hand))
    assert adam.state_dict()["state"][0]["step"] == 10


def test_attached_to_an_optimizer() -> None:
    by_step, by_hook = network(), network()
    train(by_step, torch.optim.SGD(by_step.parameters(), 0.1), 6, SFA(by_step, every=2))
    optimizer = torch.optim.SGD(by_hook.parameters(), 0.1)
    sfa = SFA(by_hook, every=2).attach(optimizer)
    train(by_hook, optimizer, 6)
    assert sfa.merges == 3
    assert equal(weights(by_step), weights(by_hook))
    with pytest.raises(MergeError, match="counts the steps itself"):
        sfa.step()
    with pytest.raises(MergeError, match="attached to an optimizer already"):
        sfa.attach(optimizer)
    sfa.detach()
    optimizer.step()
    assert sfa.step_count == 6
    assert not sfa.step()


@pytest.mark.parametrize("interrupted", range(9))
def test_resumed_runs_are_bit_equal(interrupted: int) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    sfa = SFA(model, beta=0.4, p=0.25, total_steps=8)
    train(model, optimizer, interrupted, sfa)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sfa": sfa.state_dict()}, file)
    train(model, optimizer, 8 - interrupted, sfa)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(seed=1)
    optimizer = torch.optim.Adam(again.parameters(), 0.01)
    resumed = SFA(again, beta=0.9, every=1)  # the state's settings take over
    resumed.load_state_dict(saved["sfa"])
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, 8 - interrupted, resumed)
    assert equal(weights(model), weights(again))
    assert (resumed.beta, resumed.p, resumed.merges) == (0.4, 0.25, 4)


def test_a_state_is_not_changed_by_training_on() -> None:
    model = network()
    sfa = SFA(model, every=1)
    state = sfa.state_dict()
    before = copy.deepcopy(state)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 2, sfa)
    sfa.new_task()
    assert state["step_count"] == before["step_count"] == 0
    assert equal(state["anchor"], before["anchor"])


def test_a_new_task_has_a_new_anchor() -> None:
    weight = nn.Parameter(torch.tensor([0.0]))
    sfa = SFA([weight], beta=0.5, p=1, total_steps=1)
    for task in range(2):
        with torch.no_grad():
            weight += 4
        assert sfa.step()
        assert weight.item() == [2, 4][task]
        sfa.new_task(total_steps=1)
    with pytest.raises(MergeError, match="pass total_steps"):
        sfa.new_task()


def test_frozen_parameters_cost_nothing_and_buffers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    sfa = SFA(model, beta=1.0, every=1)
    assert sorted(sfa.anchor) == ["1.bias", "1.weight", "2.bias", "2.weight"]
    mean = model[1].running_mean.clone()
    before = weights(model)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1, sfa)
    assert torch.equal(model[2].weight, before["2.weight"])
    assert not torch.equal(model[1].running_mean, mean)


def test_parameters_unfrozen_on_the_way_are_refused_at_the_merge() -> None:
    model = network()
    model[0].requires_grad_(False)
    sfa = SFA(model, every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, 1, sfa)
    model[0].requires_grad_(True)
    with pytest.raises(MergeError, match=r'"0.weight" was frozen.*call new_task\(\).*include\(\) before.*attach\(\) does'):
        train(model, optimizer, 1, sfa)
    sfa.new_task()
    assert train(model, optimizer, 2, sfa) == [2]


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("attached", [True, False])
def test_parameters_unfrozen_on_the_way_are_averaged_with_what_they_were(place: str, attached: bool, tmp_path: Path) -> None:
    model = network()
    before = weights(model)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sfa = SFA(model, beta=1.0, every=3, anchor="memory" if place == "memory" else tmp_path / "anchor.safetensors")
    if attached:
        sfa.attach(optimizer)
    assert sorted(sfa.anchor) == ["2.bias", "2.weight"]
    for step in range(1, 4):
        if step == 2:
            model[0].weight.requires_grad_(True)
        if step == 3:
            model[0].bias.requires_grad_(True)
        if not attached:
            assert sfa.include() == [[], ["0.weight"], ["0.bias"]][step - 1]
        merged = train(model, optimizer, 1, None if attached else sfa)
        assert merged == ([1] if step == 3 and not attached else [])
    assert sfa.merges == 1
    assert equal(before, weights(model))
    assert equal(before, sfa.anchor)


def test_parameters_frozen_on_the_way_are_left_alone() -> None:
    model = network()
    sfa = SFA(model, beta=1.0, every=2)
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, 1, sfa)
    model[2].requires_grad_(False)
    train(model, optimizer, 1, sfa)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_a_loop_that_ends_early_is_finalized(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.zeros(1))
    sfa = SFA([weight], beta=0.5, every=3, total_steps=9)
    assert not sfa.finalize()  # no step was done
    sfa.new_task(9)
    for _ in range(4):
        with torch.no_grad():
            weight.fill_(4.0)
        sfa.step()
    assert sfa.last_merge_step == 3
    state = sfa.state_dict()
    assert sfa.finalize()
    assert weight.item() == 2.0
    assert (sfa.merges, sfa.last_merge_step, sfa.step_count) == (2, 4, 4)
    assert not sfa.finalize()
    again = SFA([weight], every=1)
    again.load_state_dict(sfa.state_dict())
    assert not again.finalize()
    assert not [step for step in range(5, 11) if again.step()]  # the task is over: 6 and 9 are no merges any more
    assert weight.item() == 2.0
    assert [record.getMessage().count("over after 4 steps") for record in caplog.records] == [1]
    again.new_task(2)
    assert [again.step(), again.step()] == [True, True] if again.every == 1 else [False, True]
    sfa.load_state_dict(state)
    assert sfa.finalize()


def test_a_merge_of_the_last_step_is_not_done_again_by_finalize() -> None:
    weight = nn.Parameter(torch.zeros(1))
    for options in ({"every": 2}, {"every": 5, "total_steps": 4}, {"every": 5, "total_steps": 3}):
        sfa = SFA([weight], **options)
        for _ in range(4):
            sfa.step()
        assert not sfa.finalize(), options


def test_optimizer_state_is_cleared_where_it_was_merged() -> None:
    model = network()
    model[2].requires_grad_(False)
    other = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([*model.parameters(), other], 0.01)
    sfa = SFA(model, every=2, optimizer_state="reset").attach(optimizer)
    for step in range(1, 4):
        optimizer.zero_grad()
        other.grad = torch.ones(2)
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        assert len(optimizer.state) == (1 if step == 2 else 3)
        assert optimizer.state[other]["step"] == step
    assert optimizer.state[model[0].weight]["step"] == 1
    with pytest.raises(MergeError, match=r'optimizer_state="reset" needs the optimizer: call attach\(optimizer\)'):
        SFA(model, every=2, optimizer_state="reset").step()
    del sfa


def test_buffers_are_averaged_if_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model.register_buffer("table", torch.ones(2), persistent=False)
    model.register_buffer("narrow", torch.ones(2, dtype=torch.float16))
    model.register_buffer("tied", model[1].running_mean)
    by_hand = copy.deepcopy(model)
    anchor = weights(by_hand)
    sfa = SFA(model, beta=0.3, every=2, buffers="average")
    assert sorted(set(sfa.anchor) - dict(model.named_parameters()).keys()) == ["1.running_var", "narrow", "tied"]
    for each in (model, by_hand):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        train(each, optimizer, 2, sfa if each is model else None)
    del anchor["1.num_batches_tracked"]
    merged = merge([anchor, {name: tensor for name, tensor in weights(by_hand).items() if name in anchor}], beta=0.3)
    assert equal(merged, weights(model))
    assert model[1].num_batches_tracked == 2
    assert model.table.tolist() == [1.0, 1.0]
    state = sfa.state_dict()
    del state["anchor"]["narrow"]
    with pytest.raises(MismatchError, match='the saved anchor lacks "narrow"'):
        sfa.load_state_dict(state)


def test_rolling_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([8.0]))
    sfa = SFA([weight], beta=0.5, every=1, policy="rolling")
    held = sfa.state_dict()
    for expected in (4.0, 2.0, 1.0):  # with the fixed policy 4, 4, 4
        with torch.no_grad():
            weight.zero_()
        sfa.step()
        assert weight.item() == expected
    assert held["anchor"]["parameter 0"].item() == 8.0
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        sfa.step()
    assert sfa.anchor["parameter 0"].item() == 1.0


def test_an_anchor_that_rolls_is_checked_every_time() -> None:
    weight = nn.Parameter(torch.ones(2))
    sfa = SFA([weight], beta=0.5, every=1, policy="rolling")
    sfa.step()
    sfa.anchor["parameter 0"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"anchor, tensor .parameter 0.: 1 NaN"):
        sfa.step()
    assert weight.tolist() == [1.0, 1.0]


class Params4bit(nn.Parameter):
    """As bitsandbytes calls it."""


def test_quantised_parameters() -> None:
    model = network()
    model[0].weight = Params4bit(torch.zeros(8, 4), requires_grad=True)
    with pytest.raises(MergeError, match=r'SFA: "0.weight" is Params4bit: quantised weights cannot be averaged; freeze it'):
        SFA(model, every=1)
    model[0].weight = Params4bit(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert sorted(SFA(model, every=1).anchor) == ["0.bias", "2.bias", "2.weight"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_trained_on(backend: str) -> None:
    plain, model = network(), network()
    compiled = torch.compile(model, backend=backend)
    results = []
    for each in (plain, compiled):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        sfa = SFA(each, beta=0.3, every=2)
        pointers = [p.data_ptr() for p in each.parameters()]
        train(each, optimizer, 4, sfa)
        assert sfa.merges == 2
        assert [p.data_ptr() for p in each.parameters()] == pointers
        results.append(sfa.anchor)
    assert equal(*results)
    assert equal(weights(plain), weights(model))


def test_accumulated_gradients_are_one_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sfa = SFA(model, every=2).attach(optimizer)
    for batch in range(1, 13):
        nn.functional.cross_entropy(model(X), Y).backward()
        if batch % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert (sfa.step_count, sfa.merges) == (4, 2)


def test_an_optimizer_in_a_wrapper_is_found() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sfa = SFA(model, every=1).attach(Wrapper(Wrapper(optimizer)))
    optimizer.step()
    assert sfa.step_count == 1
    with pytest.raises(MergeError, match=r"Linear has no hooks after its steps; call step\(\)"):
        SFA(model, every=1).attach(nn.Linear(1, 1))


def test_tied_parameters_are_merged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    sfa = SFA(model, beta=0.5, every=1)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    sfa.step()
    torch.testing.assert_close(model[1].weight, before + 0.5)
    assert SFA([*model.parameters(), *model.parameters()], every=1).anchor.keys() == {"parameter 0"}


def test_non_finite_parameters_are_named_and_nothing_is_written() -> None:
    model = network()
    sfa = SFA(model, every=1)
    with torch.no_grad():
        model[2].bias[1] = float("nan")
        model[0].weight += 1
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r'SFA, step 1: nothing was merged\ncurrent, tensor "2.bias": 1 NaN'):
        sfa.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(NonFiniteError, match=r'the anchor of "2.bias" would hold NaN'):
        SFA(model, every=1)


def test_a_step_counts_though_its_merge_failed() -> None:
    weight = nn.Parameter(torch.zeros(1))
    sfa = SFA([weight], every=2, total_steps=5)
    merged = []
    for step in range(1, 6):
        with torch.no_grad():
            weight.fill_(float("nan") if step == 2 else 1.0)
        try:
            merged += [step] if sfa.step() else []
        except NonFiniteError:
            merged.append(-step)
    assert merged == [-2, 4, 5]
    assert (sfa.merges, sfa.last_merge_step) == (2, 5)


def test_non_finite_parameters_pass_when_allowed() -> None:
    weight = nn.Parameter(torch.tensor([1.0, float("inf")]))
    sfa = SFA([weight], every=1, nonfinite="allow")
    with torch.no_grad():
        weight[0] = 3
    assert sfa.step()
    assert weight.tolist() == [2.0, float("inf")]
    with pytest.raises(MergeError, match="nonfinite='maybe'"):
        SFA([nn.Parameter(torch.ones(1))], every=1, nonfinite="maybe")


def test_parameters_stay_where_they_are_and_autograd_sees_the_write() -> None:
    model = network()
    sfa = SFA(model, every=1)
    pointers = [p.data_ptr() for p in model.parameters()]
    loss = model(X).square().sum()
    sfa.step()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_anchor_dtype() -> None:
    weight = nn.Parameter(torch.tensor([1.0 + 2**-9, 70000.0]))
    sfa = SFA([weight], beta=1.0, every=1, anchor_dtype=torch.bfloat16, anchor="cpu")
    assert sfa.anchor["parameter 0"].dtype == torch.bfloat16
    sfa.step()
    assert weight.tolist() == [1.0, 70144.0]
    with pytest.raises(NonFiniteError, match="parameter 0"):
        SFA([weight], every=1, anchor_dtype=torch.float16)


def test_weights_loaded_by_assignment_are_found() -> None:
    model = network()
    sfa = SFA(model, beta=1.0, every=1)
    anchor = weights(model)
    for seed in (1, 2):
        model.load_state_dict(network(seed).state_dict(), assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        sfa.step()
        assert equal(weights(model), anchor)


@pytest.mark.parametrize(
    ("weight", "kept"),
    [
        (torch.zeros(3, 2).t(), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(3, 4)[:, ::2], False),
    ],
)
def test_strided_parameters(weight: torch.Tensor, kept: bool) -> None:
    weight = nn.Parameter(weight)
    sfa = SFA({"w": weight}.items(), beta=0.5, every=1)
    sfa.step()
    assert (sfa._prepared is not None) is kept
    for value in (4.0, 8.0):
        with torch.no_grad():
            weight.fill_(value)
        sfa.step()
        assert (weight == value / 2).all()


def test_names_of_compiled_models_are_those_of_the_model() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    assert SFA(compiled, every=1).anchor.keys() == SFA(model, every=1).anchor.keys()


def test_steps_beyond_the_task_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    sfa = SFA(model, p=0.5, total_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert train(model, optimizer, 2, sfa) == [1, 2]
    assert not sfa.step()
    assert not sfa.step()
    assert [record.getMessage().count("over after 2 steps") for record in caplog.records] == [1]


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_skips_are_not_steps_when_attached(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    sfa = SFA(model, every=1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for spoil in (True, False):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
        if spoil:
            model[0].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert sfa.step_count == 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"p": 0.5}, "pass total_steps"),
        ((), {}, "pass total_steps"),
        ((), {"p": 0.5, "every": 2, "total_steps": 4}, "both p and every"),
        ((1.5,), {"every": 1}, r"beta=1.5: must be in \[0, 1\]"),
        ((0.5, 0), {"total_steps": 4}, "p=0: must be a fraction"),
        ((0.5, 1.2), {"total_steps": 4}, "p=1.2: must be a fraction"),
        ((), {"every": 0}, "every=0"),
        ((), {"every": 2.5}, "every=2.5"),
        ((), {"total_steps": 0}, "total_steps=0"),
        ((), {"every": 1, "policy": "roll"}, 'policy=\'roll\': must be "fixed" or "rolling"'),
        ((), {"every": 1, "optimizer_state": None}, "optimizer_state=None"),
        ((), {"every": 1, "buffers": True}, "buffers=True"),
        ((), {"every": 1, "lora": "cat"}, "lora='cat'"),
    ],
)
def test_bad_settings(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        SFA(network(), *arguments, **options)


def test_what_cannot_be_merged_is_found_before_training() -> None:
    weight = nn.Parameter(torch.zeros(3))
    expanded = nn.Parameter(torch.zeros(1).expand(3))
    for parameters, options, message in [
        ([weight], {"backend": "nmba"}, 'did you mean "numba"'),
        ([weight], {"threads": 0}, "threads=0"),
        ([weight], {"anchor_dtype": torch.int8}, 'unknown anchor_dtype "int8"'),
        ([weight], {"buffers": "average"}, 'buffers="average" needs the module'),
        ([expanded], {}, "several elements share one place in memory"),
        ([("w", weight), ("w", nn.Parameter(torch.ones(1)))], {}, 'two parameters are called "w"'),
        (torch.optim.SGD([weight]), {}, "got SGD"),
        (None, {}, "got NoneType"),
    ]:
        with pytest.raises(MergeError, match=message):
            SFA(parameters, every=1, **options)
    assert SFA(weight, every=1).anchor.keys() == {"parameter 0"}


def test_parameters_that_share_their_memory_are_merged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.data = model[0].weight.data
    sfa = SFA(model, beta=0.5, every=1)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    assert sfa.step()
    torch.testing.assert_close(model[1].weight.detach(), before + 0.5)


def test_parameters_of_the_method_may_be_changed_between_merges() -> None:
    weight = nn.Parameter(torch.zeros(2))
    sfa = SFA([weight], beta=0.5, every=1)
    merged = []
    for beta in (0.5, 0.25):
        state = sfa.state_dict()
        sfa.parameters["beta"] = beta
        with torch.no_grad():
            weight.fill_(8.0)
        sfa.step()
        merged.append(weight[0].item())
    assert merged == [4.0, 6.0]  # 0.5 * 0 + 0.5 * 8, 0.25 * 0 + 0.75 * 8
    assert state["parameters"] == {"beta": 0.5}  # as when it was taken


def test_numbers_of_numpy_are_saved_as_those_of_python() -> None:
    sfa = SFA(network(), np.float64(0.3), np.float64(0.25), 8)
    sfa.parameters["beta"] = np.float32(0.5)
    torch.save(sfa.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert (state["p"], state["parameters"]) == (0.25, {"beta": 0.5})


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model, master = network(), nn.Parameter(torch.zeros(3))
    sfa = SFA(model, every=1)
    with pytest.raises(MergeError, match="the optimizer has none of its 4 parameters"):
        sfa.attach(torch.optim.SGD([master], 0.1))
    optimizer = torch.optim.SGD([master, model[2].bias], 0.1)
    sfa.attach(optimizer)
    train(model, optimizer, 1)
    assert sfa.merges == 1


def test_a_rolling_anchor_that_its_dtype_cannot_hold_stays_as_it_was() -> None:
    weight = nn.Parameter(torch.ones(2))
    sfa = SFA([weight], beta=0.5, every=1, policy="rolling", anchor_dtype=torch.float16)
    with torch.no_grad():
        weight.fill_(1e6)
    with pytest.raises(NonFiniteError, match=r'step 1: the weights were merged, but "parameter 0" does not fit .* of float16'):
        sfa.step()
    assert weight.tolist() == [500000.5, 500000.5]
    assert sfa.anchor["parameter 0"].tolist() == [1.0, 1.0]
    assert (sfa.step_count, sfa.merges) == (1, 1)


def test_copies_and_pickles() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sfa = SFA(model, every=2).attach(optimizer)
    train(model, optimizer, 3)
    again = copy.deepcopy(sfa)
    assert (again.step_count, again.merges) == (3, 1)
    assert equal(again.anchor, sfa.anchor)
    assert again.step()  # a copy is attached to nothing


def test_nothing_to_train_and_strange_parameters() -> None:
    with pytest.raises(MergeError, match="no parameter requires a gradient"):
        SFA(network().requires_grad_(False), every=1)
    with pytest.raises(MergeError, match="parameter 0 is int"):
        SFA([3], every=1)


def test_a_state_of_another_model_is_refused() -> None:
    sfa = SFA(network(), every=1)
    state = SFA(nn.Linear(2, 2), every=1).state_dict()
    with pytest.raises(MismatchError, match='the saved anchor has "weight", which the model lacks'):
        sfa.load_state_dict(state)
    with pytest.raises(MergeError, match='lacks "anchor"'):
        sfa.load_state_dict({k: v for k, v in state.items() if k != "anchor"})
    damaged: list[tuple[str, Any]] = [("step_count", "x"), ("merges", -1), ("anchor", [1]), ("p", 7.0), ("every", 0)]
    damaged += [("finished", 1), ("policy", "x"), ("fingerprint", 3)]
    for name, value in [*damaged, ("seed", 1.5), ("method", 3), ("parameters", [0.5])]:
        with pytest.raises(MergeError, match=name):
            sfa.load_state_dict({**sfa.state_dict(), name: value})
    spoiled = {name: torch.full_like(t, float("nan")) for name, t in sfa.anchor.items()}
    with pytest.raises(MismatchError, match="the saved anchor holds NaN"):
        sfa.load_state_dict({**sfa.state_dict(), "anchor": spoiled})
    wrong = SFA(network(), every=1).state_dict()
    wrong["anchor"]["0.bias"] = torch.zeros(2)
    with pytest.raises(MismatchError, match=r'"0.bias": the saved anchor has shape \(2,\), the model \(8,\)'):
        sfa.load_state_dict(wrong)


# Other methods at the merge points

REQUIRED = {"density": 0.3, "t": 0.25, "window": 2}


def mergeable() -> list[str]:
    """Methods that can merge two models, or one and a base."""
    counts = {name: 2 - (m.base == "required") for name, m in methods().items()}
    return [name for name, m in methods().items() if m.least <= counts[name] <= (m.most or 2) and not m.companions]


@pytest.mark.parametrize("name", mergeable())
def test_any_method_merges_the_anchor_and_the_present_weights(name: str) -> None:
    chosen = methods()[name]
    parameters: dict[str, Any] = {p: v for p, v in REQUIRED.items() if p in chosen.parameters}
    if "scope" in chosen.shown:
        parameters["scope"] = "model"
    model, by_hand = network(), network()
    anchor = {n: t.clone() for n, t in by_hand.state_dict().items()}
    sfa = SFA(model, method=name, every=3, seed=5, **parameters)
    optimizers = [torch.optim.Adam(m.parameters(), 0.05) for m in (model, by_hand)]
    for step in range(1, 7):
        for m, optimizer in zip((model, by_hand), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(X), Y).backward()
            optimizer.step()
        if sfa.step():
            current, based = by_hand.state_dict(), chosen.base == "required"
            merged = merge(
                [current] if based else [anchor, current],
                name,
                base=anchor if based else None,
                seed=(5 << 32) + step,
                **parameters,
            )
            by_hand.load_state_dict(merged)
    assert sfa.merges == 2
    assert equal(weights(model), weights(by_hand))
    assert equal(weights(model), anchor) == (name == "arcee_fusion")  # of so few entries none stands out


@pytest.mark.parametrize("name", ["task_arithmetic", "linear", "slerp", "ties"])
def test_spoiled_weights_are_found_at_a_later_merge_too(name: str) -> None:
    parameters = {p: v for p, v in REQUIRED.items() if p in methods()[name].parameters}
    model = network()
    sfa = SFA(model, method=name, every=1, **parameters)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert sfa.step()
    before = weights(model)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r'step 2: nothing was merged\ncurrent, tensor "0.weight": 1 NaN'):
        sfa.step()
    after = weights(model)
    assert after["0.weight"].isnan().sum() == 1
    del before["0.weight"], after["0.weight"]
    assert equal(after, before)


def test_a_run_with_random_masks_resumes_bit_for_bit() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, SFA]:
        model = network()
        sfa = SFA(model, method="dare_ties", every=2, density=[0.5], rescale="l1", seed=7)
        return model, torch.optim.Adam(model.parameters(), 0.05), sfa

    model, optimizer, sfa = build()
    train(model, optimizer, 8, sfa)
    again, other, resumed = build()
    train(again, other, 3, resumed)
    buffer = io.BytesIO()
    torch.save([again.state_dict(), other.state_dict(), resumed.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    again = network(3)
    other, resumed = torch.optim.Adam(again.parameters(), 0.05), SFA(again, beta=0.1, every=99)
    for part, state in zip((again, other, resumed), states, strict=True):
        part.load_state_dict(state)
    assert (resumed.method, resumed.parameters, resumed.seed) == ("dare_ties", {"density": (0.5,), "rescale": "l1"}, 7)
    train(again, other, 5, resumed)
    assert equal(weights(again), weights(model))
    assert "method='dare_ties', density=(0.5,), rescale='l1', every=2" in repr(resumed)
    with pytest.raises(AttributeError, match="dare_ties has no beta"):
        _ = resumed.beta


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "model_stock"},
            "model_stock merges 2 models or more, but a merge in training has only the anchor as the base",
        ),
        ({"method": "passthrough"}, "passthrough merges at most 1, but a merge in training has the anchor and the present"),
        ({"method": "ties"}, r"ties needs density: pass density=\.\.\. \(the paper uses 0.2\)"),
        ({"method": "ties", "density": 2}, "density=2"),
        ({"method": "ties", "density": [0.1, 0.2]}, "2 values for 1 models"),
        ({"method": "ties", "densty": 0.2}, 'did you mean "density"'),
        ({"method": "ties", "density": 0.2, "beta": 0.5}, "parameter of ties"),
        ({"method": "ties", "density": 0.2, "scope": "layer"}, "scope='layer'"),
        ({"method": "tise"}, 'did you mean "ties"'),
        ({"lambda_": 2}, "parameter of sfa"),
    ],
)
def test_bad_methods_and_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        SFA(network(), every=2, **options)


def test_masks_are_new_at_every_merge_of_every_task() -> None:
    weight = nn.Parameter(torch.zeros(256))
    merged = []
    sfa = SFA([weight], method="dare_linear", density=0.5, rescale=None, every=2, total_steps=4)
    for _ in range(2):
        for _ in range(4):
            with torch.no_grad():
                weight.fill_(1.0)
            if sfa.step():
                merged.append(weight.detach().clone())
        with torch.no_grad():
            weight.zero_()
        sfa.new_task(4)
    assert len(merged) == 4
    assert all(not torch.equal(one, other) for i, one in enumerate(merged) for other in merged[:i])
    assert sfa.state_dict()["steps_before"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nuslerp", "nuslerp_flatten": False, "scope": "model"}, 'slices of a tensor need scope="tensor"'),
        ({"method": "karcher", "weight": 0}, "weights sum to zero"),
        ({"method": "linear", "weight": [1, -1]}, "weights sum to zero"),
        ({"method": "multislerp", "weight": [1, -1]}, "normalize_weights=False"),
        ({"method": "magnitude_prune", "density": 0.5, "weight": 0, "normalize": True}, "weights sum to zero"),
        ({"method": "dare_ties", "density": 0.2, "seed": "x"}, "seed='x'"),
    ],
)
def test_what_never_can_be_merged_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        SFA(network(), every=2, **options)


def test_a_model_of_weight_zero_leaves_the_anchor() -> None:
    weight = nn.Parameter(torch.ones(8))
    sfa = SFA([weight], method="ties", density=0.2, weight=0, rescale="l1", every=1)
    with torch.no_grad():
        weight.fill_(3.0)
    sfa.step()
    assert (weight == 1).all()


def test_a_state_brings_its_schedule_to_the_next_task() -> None:
    state = SFA(network(), every=3).state_dict()
    resumed = SFA(network(), p=0.5, total_steps=4)
    resumed.load_state_dict(state)
    resumed.new_task()
    assert (resumed.p, resumed.every, resumed.total_steps) == (None, 3, None)


def test_what_is_taken_up_on_the_way_is_checked() -> None:
    model = network()
    model[0].requires_grad_(False)
    sfa = SFA(model, every=1)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    model[0].requires_grad_(True)
    with pytest.raises(NonFiniteError, match=r'the anchor of "0.weight" would hold NaN'):
        sfa.include()
    assert sorted(sfa.anchor) == ["2.bias", "2.weight"]


def test_a_detached_sfa_has_no_optimizer_to_reset() -> None:
    model = network()
    sfa = SFA(model, every=1, optimizer_state="reset").attach(torch.optim.SGD(model.parameters(), 0.1))
    sfa.detach()
    with pytest.raises(MergeError, match=r"needs the optimizer: call attach\(optimizer\)"):
        sfa.step()
    assert sfa.step_count == 0


def test_a_state_that_is_not_finite_is_loaded_when_allowed() -> None:
    weight = nn.Parameter(torch.tensor([1.0, float("inf")]))
    state = SFA([weight], every=1, nonfinite="allow").state_dict()
    again = SFA([weight], every=1, nonfinite="allow")
    again.load_state_dict(state)
    assert again.anchor["parameter 0"].tolist() == [1.0, float("inf")]
    with torch.no_grad():
        weight.zero_()
    refusing = SFA([weight], every=1)
    with pytest.raises(MismatchError, match="the saved anchor holds NaN or Inf"):
        refusing.load_state_dict(state)


def test_the_end_of_each_task_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    sfa = SFA(network(), every=1, total_steps=1)
    for _ in range(2):
        assert [sfa.step(), sfa.step()] == [True, False]
        sfa.new_task(1)
    assert [record.getMessage().count("over after 1 steps") for record in caplog.records] == [1, 1]


def test_every_setting_comes_with_a_state() -> None:
    settings = {"policy": "rolling", "optimizer_state": "reset", "buffers": "average", "lora": "svd", "seed": 3}
    sfa = SFA(network(), method="slerp", t=0.25, every=3, **settings)
    again = SFA(network(), p=0.5, total_steps=4)
    again.load_state_dict(sfa.state_dict())
    one, other = again.state_dict(), sfa.state_dict()
    del one["anchor"], other["anchor"]
    assert one == other


def test_the_state_of_a_parameter_that_shares_its_memory_is_cleared() -> None:
    weight = nn.Parameter(torch.ones(2))
    view = nn.Parameter(weight.data)  # another object, as some wrappers make them
    optimizer = torch.optim.Adam([view], 0.1)
    SFA([weight], every=1, optimizer_state="reset").attach(optimizer)
    view.grad = torch.ones(2)
    optimizer.step()
    assert not optimizer.state


# A merge that is done again, as it was before


def replaced(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)


def elsewhere(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data + 1


def in_another_order(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.view(4, 8).t()  # the same memory, and the same shape


def frozen(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)


def another_part(model: nn.Module) -> None:
    model[0] = copy.deepcopy(model[0])


@pytest.mark.parametrize("change", [replaced, elsewhere, in_another_order, frozen, another_part])
def test_what_has_changed_since_the_last_merge_is_seen(change: Any) -> None:
    model, by_hand = network(), network()
    sfa, other = SFA(model, beta=0.3, every=1), SFA(by_hand, beta=0.3, every=1)
    for step in range(4):
        for each in (model, by_hand):
            moved(each)
        other._repeatable = other._prepared = None
        if step == 2:
            before = list(model.parameters())
            kept = [p.data for p in before]
            values = [p.clone() for p in kept]
            change(model)
            change(by_hand)
        assert sfa.step()
        assert other.step()
        assert (sfa._repeatable is not None) == (change is not in_another_order or step < 2)
        assert equal(weights(model), weights(by_hand))
    left = [p for p, value in zip(kept, values, strict=True) if torch.equal(p, value)]
    assert len(left) == {replaced: 1, elsewhere: 1, in_another_order: 0, frozen: 0, another_part: 2}[change]


def test_a_merge_that_is_done_again_takes_no_second_look_at_names(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.tensor([4.0]))
    sfa = SFA([weight], beta=0.25, every=1)
    results = []
    for step in range(3):
        if step == 2:
            monkeypatch.setattr(SFA, "_leaves", None)
        with torch.no_grad():
            weight.fill_(8.0)
        assert sfa.step()
        results.append(weight.item())
    assert results == [7.0, 7.0, 7.0]
    sfa.beta = 0.5
    with pytest.raises(TypeError):
        sfa.step()


# On a GPU: the device decides, and a CUDA graph holds the merge


def mixed() -> nn.Sequential:
    """Make a model of two dtypes, one of whose tensors has more than one block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 90), nn.Linear(90, 7).bfloat16())


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += torch.linspace(-1, 1, p.numel()).view(p.shape)


@pytest.mark.parametrize("nonfinite", ["error", "allow"])
def test_a_merge_that_the_device_allows_waits_once(nonfinite: Any, looks: Callable[..., list[str]]) -> None:
    model, by_hand = mixed(), mixed()
    sfa = SFA(model, beta=0.3, every=1, nonfinite=nonfinite, backend="triton")
    other = SFA(by_hand, beta=0.3, every=1, nonfinite=nonfinite, backend="numpy")
    seen = looks("item", "cpu", "tolist", "__bool__")
    for _ in range(2):
        moved(model)
        seen.clear()
        assert sfa.step()
        assert seen == (["item"] if nonfinite == "error" else [])
    for _ in range(2):
        moved(by_hand)
        assert other.step()
    assert equal(weights(model), weights(by_hand))


@pytest.mark.parametrize("beta", [0.3, 1.0, [{"filter": "0.", "value": 1.0}, {"value": 0.5}]])
def test_what_the_device_refuses_is_explained_and_nothing_is_written(beta: Any) -> None:
    model, by_hand = mixed(), mixed()
    sfa = SFA(model, beta=beta, every=1, backend="triton")
    other = SFA(by_hand, beta=beta, every=1, backend="numpy")
    for merger in ((model, sfa), (by_hand, other)):
        moved(merger[0])
        merger[1].step()
        with torch.no_grad():
            merger[0][1].bias[3] = float("nan")
    before = weights(model)
    refused = 'nothing was merged\ncurrent, tensor "1.bias": 1 NaN$'
    for merger in ((model, sfa), (by_hand, other)):
        if beta == 1.0:  # the present weights are not read
            assert merger[1].step()
            continue
        with pytest.raises(NonFiniteError, match=refused):
            merger[1].step()
        del before["1.bias"]
        assert equal(before, weights(merger[0]))
        before = weights(by_hand)
    for merger in ((model, sfa), (by_hand, other)):
        with torch.no_grad():
            merger[0][1].bias[3] = 3.0e38  # an overflow cannot be ruled out, and there is none
        assert merger[1].step()
    assert equal(weights(model), weights(by_hand))
    assert model[1].bias[3].isfinite()


class Recording(TorchDispatchMode):
    """Stands for `torch.cuda.graph`: notes down what is launched meanwhile, in place of doing it."""

    def __init__(self, graph: "Graph", **options: Any) -> None:
        super().__init__()
        assert options["capture_error_mode"] == "thread_local"
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        assert function in (torch.ops.aten.zero_.default,), f"{function} is no part of a fixed sequence over fixed memory"
        self.graph.work.append(lambda: function(*given, **(named or {})))
        return given[0]

    def __enter__(self) -> Any:
        Graph.recording = self.graph
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        Graph.recording = None
        super().__exit__(*error)


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    recording: "Graph | None" = None
    replays = 0

    def __init__(self) -> None:
        self.work: list[Any] = []

    def replay(self) -> None:
        Graph.replays += 1
        for each in self.work:
            each()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let graphs be recorded without a GPU; list the kernels that are launched, but for those of replays."""
    from mergekit_cl.kernels.triton import guarded
    from mergekit_cl.kernels.triton.launch import Launch

    launched: list[str] = []
    whole = Launch.__call__

    def launch(self: Any, *tensors: torch.Tensor) -> None:
        if Graph.recording is not None:
            Graph.recording.work.append(lambda: whole(self, *tensors))
        else:
            launched.append(self.kernel.fn.__name__)
            whole(self, *tensors)

    monkeypatch.setattr(guarded, "RECORDABLE", {"cpu"})
    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    Graph.replays = 0
    yield launched
    Graph.recording = None


@pytest.mark.parametrize("policy", ["fixed", "rolling"])
@pytest.mark.parametrize("nonfinite", ["error", "allow"])
def test_a_captured_merge_is_replayed_with_the_same_bits(policy: Any, nonfinite: Any, launches: list[str]) -> None:
    model, by_hand = mixed(), mixed()
    options: dict[str, Any] = {"beta": 0.3, "every": 2, "policy": policy, "nonfinite": nonfinite}
    sfa, other = SFA(model, backend="triton", **options), SFA(by_hand, backend="numpy", **options)
    moved(model)
    before = weights(model)
    assert sfa.capture() is sfa
    assert equal(weights(model), before)
    launches.clear()
    moved(by_hand)
    for step in range(1, 7):
        moved(model)
        moved(by_hand)
        assert sfa.step() == other.step() == (step % 2 == 0)
        assert equal(weights(model), weights(by_hand))
    assert (launches, Graph.replays) == ([], 3)


def test_what_a_replay_refuses_is_explained_and_nothing_is_written(launches: list[str]) -> None:
    model, by_hand = mixed(), mixed()
    sfa, other = SFA(model, every=1, backend="triton").capture(), SFA(by_hand, every=1, backend="numpy")
    for merger in (model, by_hand):
        moved(merger)
        with torch.no_grad():
            merger[0].weight[5, 5] = float("inf")
    before = weights(model)
    for merger in (sfa, other):
        with pytest.raises(NonFiniteError, match=r'step 1: nothing was merged\ncurrent, tensor "0.weight": 1 Inf$'):
            merger.step()
    assert equal(weights(model), before)
    for merger, each in ((model, sfa), (by_hand, other)):
        with torch.no_grad():
            merger[0].weight[5, 5] = 1.0
        assert each.step()
        with torch.no_grad():
            merger[0].weight[5, 5] = 3e38  # an overflow cannot be ruled out, and there is none
        assert each.step()
    assert equal(weights(model), weights(by_hand))
    assert model[0].weight[5, 5] > 1e38
    assert Graph.replays == 3


def test_an_anchor_next_to_the_limits_is_checked_by_every_replay(launches: list[str]) -> None:
    weight = nn.Parameter(torch.tensor([3e38, 1.0]))
    sfa = SFA([weight], beta=0.5, every=1, backend="triton").capture()
    with torch.no_grad():
        weight.copy_(torch.tensor([2e38, 3.0]))
    assert sfa.step()
    assert weight.tolist() == torch.tensor([2.5e38, 2.0]).tolist()
    with torch.no_grad():
        weight.copy_(torch.tensor([-1.5e38, 3.0]))  # which is far from the limits, but not its difference
    with pytest.raises(NonFiniteError, match='"parameter 0": finite inputs overflow float32'):
        sfa.step()
    assert weight.tolist() == torch.tensor([-1.5e38, 3.0]).tolist()
    assert Graph.replays == 2


def test_a_graph_is_recorded_anew_where_anything_has_changed(launches: list[str]) -> None:
    model, by_hand = mixed(), mixed()
    sfa, other = SFA(model, beta=0.3, every=1, backend="triton").capture(), SFA(by_hand, beta=0.3, every=1, backend="numpy")
    recorded = []

    def merged() -> None:
        for merger, each in ((model, sfa), (by_hand, other)):
            moved(merger)
            assert each.step()
        assert equal(weights(model), weights(by_hand))
        recorded.append(getattr(sfa._prepared[1]._guarded, "_graph", None) if sfa._prepared else None)

    merged()
    merged()
    sfa.beta = other.beta = 0.75
    merged()
    sfa.new_task()
    other.new_task()
    merged()
    model[0].weight.data = model[0].weight.data.clone()
    merged()
    sfa.load_state_dict(sfa.state_dict())
    merged()
    assert None not in recorded
    assert recorded[0] is recorded[1]
    assert len(set(map(id, recorded))) == 5
    assert Graph.replays == 6


def test_a_merge_that_no_graph_can_hold_any_more_is_done_without_one(
    launches: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = mixed()
    sfa = SFA(model, every=1, backend="triton").capture()
    moved(model)
    state = SFA(mixed(), every=1, method="slerp", t=0.5).state_dict()
    sfa.load_state_dict(state)
    assert sfa.step()
    assert sfa.step()
    (record,) = caplog.records
    assert record.message.startswith("SFA: merges are not replayed from a CUDA graph any more\nslerp: a CUDA graph cannot hold")
    assert Graph.replays == 0


def test_copies_and_states_have_no_graph(launches: list[str]) -> None:
    model = mixed()
    sfa = SFA(model, every=1, backend="triton")
    keys = sfa.state_dict().keys()
    sfa.capture()
    assert sfa.state_dict().keys() == keys
    twin, its_sfa = copy.deepcopy((model, sfa))
    moved(model)
    moved(twin)
    assert its_sfa.step()
    assert Graph.replays == 0
    assert sfa.step()
    assert Graph.replays == 1
    assert equal(weights(model), weights(twin))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slerp", "t": 0.5}, "slerp does not compute the same weighted sums each time"),
        ({"method": "ties", "density": 0.5}, "ties does not compute the same"),
        ({"method": "dare_linear", "density": 0.5}, "dare_linear does not compute the same"),
        ({"method": "magmax"}, "magmax: a CUDA graph cannot hold this merge, but one of weighted sums"),
        ({"anchor": "anchor.safetensors"}, "the anchor does not lie beside the parameters; build SFA with anchor="),
        ({"backend": "numpy"}, "sfa: a CUDA graph cannot hold this merge, but one of weighted sums"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(
    options: dict[str, Any], message: str, launches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    sfa = SFA(model, every=1, **{"backend": "triton", **options})
    with pytest.raises(MergeError, match=message):
        sfa.capture()
    assert sfa.step()
    with pytest.raises(MergeError, match="has no anchor yet"):
        SFA(model, every=1, resume=True, backend="triton").capture()


def test_parameters_that_are_not_contiguous_are_copied_and_no_graph_can_hold_that(launches: list[str]) -> None:
    with pytest.raises(MergeError, match="tensors that are whole, contiguous, and on a GPU"):
        SFA([nn.Parameter(torch.randn(6, 4)[:, ::2])], every=1, backend="triton").capture()


def test_without_a_gpu_there_is_no_graph() -> None:
    with pytest.raises(MergeError, match="a CUDA graph holds work of a GPU, but the tensors are on cpu; move them to a GPU"):
        SFA(network(), every=1, backend="triton").capture()


def test_steps_inside_a_capture_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached, free = SFA(model, every=1).attach(optimizer), SFA(model, every=1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for count in (free.step, free.finalize, free.capture, optimizer.step):
        free.step_count = 1
        with pytest.raises(MergeError, match=r"SFA: a CUDA graph is being captured.*call step\(\) after each replay"):
            count()
    assert (attached.step_count, attached.merges, free.merges) == (0, 0, 0)
