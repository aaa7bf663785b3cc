"""The pull towards an anchor: what it adds to gradients, when, how it resumes, what it refuses."""

import copy
import doctest
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergekit_cl import MergeError, MismatchError, NonFiniteError
from mergekit_cl.adapters.torch import _penalty, l2_anchor
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor
from mergekit_cl.kernels.numba.formulas import LEAST

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
LARGE = _penalty.SMALL + 1000  # elements from which on the kernels are called


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def backward(model: nn.Module, penalty: Callable[[], Any] = lambda: 0.0) -> None:
    loss = nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)), Y)
    (loss + penalty()).backward()


def shifted(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, strength: float = 0.3, **options: Any) -> Any:
    """Make a parameter with a gradient, away from the anchor of an `L2Anchor`."""
    random = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape, generator=random).to(dtype))
    pull = L2Anchor([weight], strength, **options)
    with torch.no_grad():
        weight += torch.randn(shape, generator=random).to(dtype)
    weight.grad = torch.randn(shape, generator=random).to(dtype)
    return weight, pull


def in_float32(weight: torch.Tensor, anchor: torch.Tensor, strength: float) -> torch.Tensor:
    """Compute the gradient with the term, rounded to float32 by every operation, and once to the dtype of the gradient."""
    assert weight.grad is not None
    change = weight.detach().float() - anchor.float()
    return (weight.grad.float() + strength * change).to(weight.dtype)


def test_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    pull = L2Anchor([weight], 0.5)
    with torch.no_grad():
        weight += torch.tensor([4.0, 0.0])
    weight.grad = torch.tensor([1.0, 1.0])
    assert pull.penalty().item() == 4.0  # 0.5 / 2 * 4**2
    assert pull.penalty().dtype == torch.float64
    pull.add_gradients()
    assert weight.grad.tolist() == [3.0, 1.0]  # 1 + 0.5 * 4
    pull.new_task()
    pull.add_gradients()
    assert weight.grad.tolist() == [3.0, 1.0]
    assert pull.penalty().item() == 0.0


def test_pulls_by_hand_after_the_step() -> None:
    weight, other = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    pull = L2Anchor([weight, other], 0.5, mode="decoupled")
    groups = [{"params": [weight], "lr": 0.5}, {"params": [other], "lr": torch.tensor(1.0)}]
    optimizer = torch.optim.SGD(groups)
    for parameter in (weight, other):
        parameter.grad = torch.tensor([-4.0])
    optimizer.step()  # to 3 and 5
    pull.pull(optimizer)
    assert (weight.item(), other.item()) == (2.5, 3.0)  # 3 - 0.5 * 0.5 * 2, 5 - 0.5 * 4
    pull.pull(1.0)
    assert (weight.item(), other.item()) == (1.75, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_the_penalty_in_the_loss(dtype: torch.dtype) -> None:
    model, reference = network(dtype), network(torch.float64)
    pull = L2Anchor(model, 0.7)
    anchors = [p.detach().clone() for p in reference.parameters()]
    with torch.no_grad():
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            one += torch.sin(torch.arange(one.numel(), dtype=dtype)).view_as(one)
            other.copy_(one)

    def penalty() -> torch.Tensor:
        return sum(0.7 / 2 * (p - a).square().sum() for p, a in zip(reference.parameters(), anchors, strict=True))

    backward(model)
    pull.add_gradients()
    backward(reference, penalty)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pull.penalty(), penalty().detach(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("mode", ["penalty", "decoupled"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trajectories_of_sgd(mode: str, momentum: float) -> None:
    """As a penalty the same as one in the loss; decoupled the same as a loop that pulls by hand; 10 steps in float64."""
    model, reference = network(torch.float64), network(torch.float64)
    anchors = [p.detach().clone() for p in reference.parameters()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=momentum) for m in (model, reference)]
    L2Anchor(model, 0.7, mode=mode).attach(optimizers[0])
    for _ in range(10):
        optimizers[0].zero_grad()
        backward(model)
        optimizers[0].step()
        optimizers[1].zero_grad()
        pairs = list(zip(reference.parameters(), anchors, strict=True))
        factor = 0.7 / 2 if mode == "penalty" else 0.0
        backward(reference, lambda: sum(factor * (p - a).square().sum() for p, a in pairs))  # noqa: B023
        optimizers[1].step()
        if mode == "decoupled":
            with torch.no_grad():
                for p, a in pairs:
                    p -= 0.1 * 0.7 * (p - a)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(anchors[0], reference[0].weight, rtol=0.01)


@pytest.mark.parametrize("backend", ["numba", "numpy", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_gives_the_same_bits(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_penalty, "SMALL", LEAST)
    weight, pull = shifted(LEAST + 1, dtype=dtype, backend=backend)
    expected = in_float32(weight, pull.anchor["parameter 0"], 0.3)
    pull.add_gradients()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("mode", ["penalty", "decoupled"])
def test_a_step_never_waits_for_the_device(mode: str, monkeypatch: pytest.MonkeyPatch, looks: Callable[..., list[str]]) -> None:
    monkeypatch.setattr(_penalty, "SMALL", 0)
    models, optimizers = [network(), network()], []
    models[0][0].to(torch.bfloat16)
    models[1][0].to(torch.bfloat16)
    pulls = []
    for model, backend in zip(models, ("triton", "numpy"), strict=True):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1))
        pulls.append(L2Anchor(model, 0.5, mode=mode, backend=backend).attach(optimizers[-1]))
    seen = looks("item", "cpu", "tolist", "numpy", "__bool__", "__float__")
    for strength in (0.5, 0.5, 0.25):  # which may change from step to step
        for model, pull, optimizer in zip(models, pulls, optimizers, strict=True):
            pull.strength = strength
            with torch.no_grad():
                for p in model.parameters():
                    p += 1
                    p.grad = torch.full_like(p, 0.125)
            optimizer.step()
    assert not seen
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(one, network()[2].bias)


def test_the_anchor_of_a_captured_step_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else holds the memory that replays read."""
    _, pull = shifted(3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pull.add_gradients()
    monkeypatch.undo()
    captured = weakref.ref(pull._held[0].kept[0])
    pull.new_task()
    pull.add_gradients()
    other = weakref.ref(pull._held[0].kept[0])
    assert copy.deepcopy(pull)._pulls._of_graphs == []
    pull.new_task()
    gc.collect()
    assert captured() is not None
    assert other() is None


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_penalty, "WIDE", LARGE)
    weight, pull = shifted(5, LARGE // 5 + 1, threads=3)
    expected = in_float32(weight, pull.anchor["parameter 0"], 0.3)
    pull.add_gradients()
    assert torch.equal(weight.grad, expected)


@given(
    seed=st.integers(0, 99),
    shape=st.lists(st.integers(0, 5), max_size=3),
    strength=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    anchor_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    kernels=st.booleans(),
)
def test_every_shape_and_dtype(
    seed: int, shape: list[int], strength: float, dtype: torch.dtype, anchor_dtype: torch.dtype | None, kernels: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_penalty, "SMALL", -1 if kernels else 1000)
        options: dict[str, Any] = {"backend": "triton"} if kernels else {}  # numba leaves small tables to NumPy
        weight, pull = shifted(*shape, dtype=dtype, seed=seed, strength=strength, anchor_dtype=anchor_dtype, **options)
        assert pull.anchor["parameter 0"].dtype == (anchor_dtype or dtype)
        expected = in_float32(weight, pull.anchor["parameter 0"], strength)
        pull.add_gradients()
        assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("elements", [40, LARGE])
def test_orders_of_memory(elements: int) -> None:
    """Kernels where all tensors of a row are in one order, PyTorch for the others; of these, and of a few, too."""
    weights = [
        nn.Parameter(torch.randn(2, elements // 8, 2, 4).contiguous(memory_format=torch.channels_last)) for _ in range(3)
    ]
    pull = L2Anchor(weights, 0.3)
    with torch.no_grad():
        for weight in weights:
            weight += torch.randn(weight.shape)
    weights[0].grad = torch.randn(weights[0].shape).contiguous(memory_format=torch.channels_last)
    weights[1].grad = torch.randn(weights[1].shape)
    weights[2].grad = torch.randn(4, 2, elements // 8, 2).permute(1, 2, 3, 0)
    expected = [in_float32(weight, anchor, 0.3) for weight, anchor in zip(weights, pull.anchor.values(), strict=True)]
    pull.add_gradients()
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.equal(weight.grad, gradient)


def test_what_the_kernels_are_given_is_compiled() -> None:
    """NumPy computes smaller tables, and would not know the tensors that are in these."""
    assert _penalty.SMALL >= LEAST


def test_gradients_that_are_none_stay_none_and_their_parameters_where_they_are() -> None:
    for mode in ("penalty", "decoupled"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        L2Anchor(model, 0.5, mode=mode).attach(optimizer)
        with torch.no_grad():
            model[2].weight += 1
        before = model[2].weight.detach().clone()
        model[0](X).sum().backward()
        optimizer.step()
        assert model[2].weight.grad is None
        assert torch.equal(model[2].weight, before)


def test_tied_parameters_count_once_and_frozen_ones_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    pull = L2Anchor(model, 1.0)
    assert set(pull.anchor) == {"0.weight", "0.bias", "1.bias"}
    with torch.no_grad():
        model[0].weight += 1
    model(X[:, :3]).sum().backward()
    before = model[0].weight.grad.clone()
    pull.add_gradients()
    assert torch.equal(model[0].weight.grad, before + (model[0].weight - pull.anchor["0.weight"]))
    assert pull.penalty().item() == pytest.approx(4.5, rel=1e-6)


def test_a_parameter_that_is_unfrozen_needs_a_new_task() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pull = L2Anchor(model, 0.5).attach(optimizer)
    backward(model)
    optimizer.step()
    model.requires_grad_(True)
    backward(model)
    with pytest.raises(MergeError, match=r'"0.weight" was frozen .* new_task'):
        optimizer.step()
    pull.new_task()
    optimizer.step()
    assert len(pull.anchor) == 4


def test_accumulated_gradients_get_one_term_a_step() -> None:
    model, by_hand = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, by_hand)]
    L2Anchor(model, 0.5).attach(optimizers[0])
    pull = L2Anchor(by_hand, 0.5)
    for _ in range(3):
        for m, optimizer in zip((model, by_hand), optimizers, strict=True):
            optimizer.zero_grad()
            backward(m)
            backward(m)
            if m is by_hand:
                pull.add_gradients()
            optimizer.step()
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_called_before_clipping_the_sum_is_clipped_and_attached_the_term_is_not() -> None:
    weight = nn.Parameter(torch.tensor([0.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    pull = L2Anchor([weight], 1.0)
    results = []
    for attached in (False, True):
        with torch.no_grad():
            weight.fill_(3.0)
        weight.grad = torch.tensor([7.0])
        if attached:
            pull.attach(optimizer)
        else:
            pull.add_gradients()
        nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        results.append(weight.item())
    assert results == pytest.approx([2.0, -1.0], rel=1e-5)  # 3 - 1, and 3 - (1 + 3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("mode", ["penalty", "decoupled"])
def test_with_a_gradient_scaler(fused: bool, unscaled: bool, mode: str) -> None:
    """The same weights as without one, exactly: the scale is a power of two. A step that is skipped has no pull."""
    models, pulls = [network(), network()], []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, fused=fused)
        pulls.append((L2Anchor(model, 0.5, mode=mode).attach(optimizer), optimizer))
        with torch.no_grad():
            model[0].weight += 0.5
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        for model, (_, optimizer) in zip(models, pulls, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            if model is models[0]:
                if step != 2:
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if step == 2:
                model[0].weight.grad[0, 0] = torch.inf
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 2.0**9
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_maximized_groups_are_pulled_too() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5, maximize=True)
    L2Anchor([weight], 1.0).attach(optimizer)
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == 2.0
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == 2.5  # 2 + 0.5 * (2 - (2 - 1))


def test_only_parameters_of_the_optimizer_are_touched() -> None:
    model = network()
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2]))
    pull = L2Anchor(model, 0.5).attach(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    backward(model)
    kept = model[2].weight.grad.clone()
    first.step()
    assert torch.equal(model[2].weight.grad, kept)
    pull.attach(second)
    expected = kept + 0.5 * (model[2].weight - pull.anchor["2.weight"])
    second.step()
    assert torch.equal(model[2].weight.grad, expected)
    pull.detach()
    kept = model[0].weight.grad.clone()
    first.step()
    assert torch.equal(model[0].weight.grad, kept)


@pytest.mark.parametrize("mode", ["penalty", "decoupled"])
def test_resumed_at_every_step(mode: str) -> None:
    def run(parts: Any, steps: int) -> None:
        model, optimizer, _ = parts
        for _ in range(steps):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()

    def build() -> Any:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, optimizer, L2Anchor(model, 0.5, mode=mode, anchor_dtype=torch.bfloat16).attach(optimizer)

    whole = build()
    run(whole, 5)
    for step in range(5):
        parts = build()
        run(parts, step)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        resumed = build()
        run(resumed, 1)
        for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        run(resumed, 5 - step)
        for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_copy_with_its_model_is_of_its_own() -> None:
    model = network()
    pull = L2Anchor(model, 0.5).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    other, pull_of_other = copy.deepcopy((model, pull))
    with torch.no_grad():
        other[0].weight += 1
    assert pull.penalty().item() == 0.0
    assert pull_of_other.penalty().item() == pytest.approx(0.25 * 32)
    backward(other)
    pull_of_other.add_gradients()  # the hooks stay with the optimizer


def test_a_compiled_model_has_the_names_of_its_own() -> None:
    model = torch.compile(network(), backend="eager")
    pull = L2Anchor(model, 0.5)
    assert set(pull.anchor) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    network().load_state_dict(pull.state_dict()["anchor"])


def test_gradients_that_autograd_needs_are_known_to_have_changed() -> None:
    for elements in (10, LARGE):
        weight, pull = shifted(elements)
        product = (weight.grad.requires_grad_() * weight.grad).sum()
        weight.grad.requires_grad_(False)
        pull.add_gradients()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_what_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for strength in (-1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(MergeError, match="strength"):
            L2Anchor(model, strength)
    with pytest.raises(MergeError, match="mode='both'"):
        L2Anchor(model, 1.0, mode="both")
    with pytest.raises(MergeError, match="no parameter requires a gradient"):
        L2Anchor(network().requires_grad_(False), 1.0)
    with pytest.raises(MergeError, match="none of its 4 parameters has a gradient; call add_gradients"):
        L2Anchor(model, 1.0).add_gradients()
    with pytest.raises(MergeError, match="the optimizer has none of its 4 parameters"):
        L2Anchor(network(), 1.0).attach(optimizer)
    with pytest.raises(MergeError, match=r"call pull\(\)"):
        L2Anchor(model, 1.0, mode="decoupled").add_gradients()
    with pytest.raises(MergeError, match=r"call add_gradients\(\)"):
        L2Anchor(model, 1.0).pull(0.1)
    for mode in ("penalty", "decoupled"):
        pull = L2Anchor(model, 1.0, mode=mode).attach(optimizer)
        with pytest.raises(MergeError, match="attached to an optimizer"):
            pull.add_gradients() if mode == "penalty" else pull.pull(optimizer)
        with pytest.raises(MergeError, match="attached to this optimizer already"):
            pull.attach(optimizer)
        pull.detach()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r'the anchor of "0.weight" holds NaN'):
        L2Anchor(model, 1.0)
    with pytest.raises(MergeError, match='L2Anchor: "weight" is on the meta device, and has no values'):
        L2Anchor(nn.Linear(2, 2, device="meta"), 1.0)
    with pytest.raises(MergeError, match='unknown backend "cuda"'):
        L2Anchor(network(), 1.0, backend="cuda")
    for threads in (0, -2, True, "a"):
        with pytest.raises(MergeError, match="threads="):
            L2Anchor(network(), 1.0, threads=threads)


def test_parameters_that_share_a_part_of_their_memory_would_be_pulled_twice() -> None:
    weight, flat = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(6))
    for pair in ([weight, nn.Parameter(weight.data.t())], [flat, nn.Parameter(flat.data[4:])]):
        with pytest.raises(MergeError, match='"parameter 0" and "parameter 1" share a part of their memory'):
            L2Anchor(pair, 1.0)
    halves = [nn.Parameter(half) for half in torch.zeros(6).split(3)]
    assert len(L2Anchor([*halves, nn.Parameter(torch.zeros(0))], 1.0).anchor) == 3
    assert len(L2Anchor([weight, nn.Parameter(weight.data)], 1.0).anchor) == 1


def test_a_strength_of_numpy_is_saved_as_a_number(tmp_path: Path) -> None:
    for number in (np.float64(0.5), np.float32(0.5)):
        torch.save(L2Anchor(network(), number).state_dict(), tmp_path / "state")
        assert torch.load(tmp_path / "state", weights_only=True)["strength"] == 0.5


def test_a_closure_is_refused_because_its_gradients_come_after_the_hook() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    L2Anchor(model, 1.0).attach(optimizer)
    with pytest.raises(MergeError, match=r"closure.*add_gradients"):
        optimizer.step(lambda: model(X).sum())


def test_an_optimizer_of_accelerate_pulls_when_it_steps() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, by_hand = network(), network()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    L2Anchor(prepared, 0.5).attach(optimizer)
    plain = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    L2Anchor(by_hand, 0.5).attach(plain)
    for step in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(X), Y))
            optimizer.step()
            optimizer.zero_grad()
        (nn.functional.cross_entropy(by_hand(X), Y) / 2).backward()
        if step % 2:
            plain.step()
            plain.zero_grad()
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    pull = L2Anchor(embedding, 1.0)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(MergeError, match=r'"weight" is sparse .*use sparse=False'):
        pull.add_gradients()


def test_states_of_other_models_are_refused() -> None:
    pull = L2Anchor(network(), 1.0)
    before = pull.state_dict()
    other = L2Anchor(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 1)), 1.0).state_dict()
    with pytest.raises(MismatchError, match=r'lacks "2.weight"'):
        pull.load_state_dict(other)
    with pytest.raises(MismatchError, match=r'"0.weight" has shape \(9, 4\), the model \(8, 4\)'):
        pull.load_state_dict({**before, "anchor": {**before["anchor"], "0.weight": torch.zeros(9, 4)}})
    with pytest.raises(MismatchError, match=r'has "more", which the model lacks'):
        pull.load_state_dict({**before, "anchor": {**before["anchor"], "more": torch.zeros(1)}})
    with pytest.raises(NonFiniteError, match=r'"0.bias" holds NaN'):
        pull.load_state_dict({**before, "anchor": {**before["anchor"], "0.bias": torch.full((8,), torch.nan)}})
    with pytest.raises(MergeError, match='lacks "mode"'):
        pull.load_state_dict({"strength": 1.0, "anchor": {}})
    with pytest.raises(MergeError, match="mode='decoupled'"):
        pull.load_state_dict({**before, "mode": "decoupled"})
    assert all(torch.equal(before["anchor"][name], pull.anchor[name]) for name in pull.anchor)


def test_docstring_examples() -> None:
    assert doctest.testmod(l2_anchor, extraglobs={"torch": torch}) == (0, 5)


def test_a_state_brings_its_strength() -> None:
    weight = nn.Parameter(torch.zeros(2))
    again = L2Anchor([weight], 0.5)
    again.load_state_dict(L2Anchor([weight], 0.25).state_dict())
    assert again.strength == 0.25
