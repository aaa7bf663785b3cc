"""SFA and penalties on a GPU: the bits of the CPU, who waits for whom, and what CUDA graphs hold."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("xxhash")

from mergekit_cl import MergeError, NonFiniteError
from mergekit_cl.adapters.torch import EWC, SFA, L2Anchor, RunningAverage
from mergekit_cl.kernels import interpreted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or interpreted(), reason="needs a GPU, and kernels that are not interpreted"
    ),
]


def model_on(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(600, 900), nn.Linear(900, 77).bfloat16(), nn.Linear(77, 3).half()).to(device)


def moved(*models: nn.Module) -> None:
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                p += torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view(p.shape).to(p)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@contextmanager
def waits() -> Iterator[list[Any]]:
    """List the synchronisations that PyTorch's operations ask for."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        seen.clear()  # of the warning that this mode is a prototype
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("nonfinite", ["error", "allow"])
@pytest.mark.parametrize("policy", ["fixed", "rolling"])
@pytest.mark.parametrize("captured", [False, True])
def test_merges_wait_once_and_have_the_bits_of_the_cpu(nonfinite: Any, policy: Any, captured: bool) -> None:
    on_gpu, on_cpu = model_on("cuda"), model_on("cpu")
    options: dict[str, Any] = {"beta": 0.3, "every": 1, "policy": policy, "nonfinite": nonfinite}
    sfa, other = SFA(on_gpu, **options), SFA(on_cpu, **options)
    if captured:
        sfa.capture()
        assert same(on_gpu, on_cpu)
    for step in range(4):
        moved(on_gpu, on_cpu)
        torch.cuda.synchronize()
        with waits() as seen:
            assert sfa.step()
        assert other.step()
        assert same(on_gpu, on_cpu)
        if step:  # at first tables are made
            assert len(seen) == (nonfinite == "error")


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_not_finite_is_explained_and_nothing_is_written(captured: bool) -> None:
    on_gpu, on_cpu = model_on("cuda"), model_on("cpu")
    sfa, other = SFA(on_gpu, every=1), SFA(on_cpu, every=1)
    if captured:
        sfa.capture()
    moved(on_gpu, on_cpu)
    with torch.no_grad():
        for model in (on_gpu, on_cpu):
            model[0].weight[7, 7] = float("nan")
    before = copy.deepcopy(on_gpu)
    for each in (sfa, other):
        with pytest.raises(NonFiniteError, match=r'nothing was merged\ncurrent, tensor "0.weight": 1 NaN$'):
            each.step()
    assert torch.equal(before[1].weight, on_gpu[1].weight)
    assert torch.equal(before[2].weight, on_gpu[2].weight)
    for value in (1.0, 3e38):  # with which an overflow cannot be ruled out
        with torch.no_grad():
            for model in (on_gpu, on_cpu):
                model[0].weight[7, 7] = value
        assert sfa.step()
        assert other.step()
        assert same(on_gpu, on_cpu)


def test_a_graph_is_recorded_anew_where_anything_has_changed() -> None:
    on_gpu, on_cpu = model_on("cuda"), model_on("cpu")
    sfa, other = SFA(on_gpu, beta=0.3, every=1).capture(), SFA(on_cpu, beta=0.3, every=1)

    def merged() -> None:
        moved(on_gpu, on_cpu)
        assert sfa.step()
        assert other.step()
        assert same(on_gpu, on_cpu)

    merged()
    sfa.beta = other.beta = 0.75
    merged()
    sfa.new_task()
    other.new_task()
    merged()
    on_gpu[0].weight.data = on_gpu[0].weight.data.clone()
    filler = [torch.full((600, 900), 7.0, device="cuda") for _ in range(3)]  # where the parameter was
    merged()
    assert all(bool((each == 7).all()) for each in filler)
    with pytest.raises(MergeError, match="contiguous, and on a GPU"):
        SFA(on_cpu, every=1).capture()


def test_an_anchor_in_pinned_memory_is_there_when_it_is_read() -> None:
    weights = [nn.Parameter(torch.full((48 << 20,), float(n), device="cuda")) for n in range(4)]  # more than two parts
    sfa = SFA(weights, beta=0.5, every=1, anchor="cpu")
    for step in range(3):
        with torch.no_grad():
            for weight in weights:
                weight.fill_(float(step + 1))
        assert sfa.step()
        assert all(bool((weight == (n + step + 1) / 2).all()) for n, weight in enumerate(weights))


@pytest.mark.parametrize("kind", ["ema", "uniform"])
def test_running_averages_wait_once_at_a_capture(kind: Any) -> None:
    on_gpu, on_cpu = model_on("cuda"), model_on("cpu")
    average, other = (RunningAverage(model, kind, dtype=torch.float32) for model in (on_gpu, on_cpu))
    for step in range(4):
        moved(on_gpu, on_cpu)
        with waits() as seen:
            average.step()
        other.step()
        assert step < 2 or len(seen) == 1
    for name, values in other.average.items():
        assert torch.equal(values, average.average[name].cpu())


def with_gradients(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.125)
    return model


@pytest.mark.parametrize("penalty", ["l2", "ewc"])
def test_penalties_wait_for_nothing(penalty: str) -> None:
    models = model_on("cuda"), model_on("cpu")
    pulls: list[Any] = []
    for model in models:
        if penalty == "l2":
            pulls.append(L2Anchor(model, 0.5))
        else:
            pulls.append(EWC(model, 0.5))
            pulls[-1].new_task(fisher={name: torch.full_like(p, 0.25).float() for name, p in model.named_parameters()})
    for step in range(4):
        moved(*models)
        for model in models:
            with_gradients(model)
        for pull in pulls:
            pull.strength = 0.5 + step
        with waits() as seen:
            pulls[0].add_gradients()
        pulls[1].add_gradients()
        assert not seen or not step  # at first kernels are compiled
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one.grad.cpu(), other.grad)


@pytest.mark.parametrize("kept", [True, False])
def test_penalties_in_a_graph_that_the_user_captures(kept: bool) -> None:
    """A whole step: gradients that stay where they are, or that are made by the graph, in its own memory."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32).cuda()
    by_hand = copy.deepcopy(model)
    pull, other = L2Anchor(model, 0.5), L2Anchor(by_hand, 0.5)
    moved(model, by_hand)

    def step(model: nn.Module, pull: L2Anchor) -> None:
        torch.stack([p.square().sum() for p in model.parameters()]).sum().backward()
        pull.add_gradients()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(model, pull)
    torch.cuda.current_stream().wait_stream(side)
    step(by_hand, other)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=not kept)
    with torch.cuda.graph(graph):
        step(model, pull)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        graph.replay()
        by_hand.zero_grad()
        step(by_hand, other)
        assert same(model, by_hand)
    with_gradients(model)  # elsewhere again, and not by what the graph has copied
    with_gradients(by_hand)
    pull.add_gradients()
    other.add_gradients()
    for one, two in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_steps_inside_a_capture_are_refused() -> None:
    model = model_on("cuda")
    sfa = SFA(model, every=1)
    moved(model)
    assert sfa.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        model[0].weight.detach().add_(1)  # an empty graph is warned of
        with pytest.raises(MergeError, match="a CUDA graph is being captured"):
            sfa.step()
    assert sfa.merges == 1
