"""Elastic weight consolidation: the Fisher information that is estimated, the penalty of many tasks, resuming, refusals."""

import copy
import doctest
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_cl import MergeError, MismatchError, NonFiniteError
from mergekit_cl.adapters.torch import _fisher, _penalty, ewc
from mergekit_cl.adapters.torch.ewc import EWC
from mergekit_cl.kernels.numba.formulas import LEAST

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def move(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=random).to(parameter.dtype)


def importances(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=random).to(dtype) for name, p in model.named_parameters()}


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def squares_by_hand(model: nn.Module, groups: list[Any]) -> dict[str, torch.Tensor]:
    """Average the squared gradient of the mean loss of each group (inputs, labels) in float64, in a loop."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, labels in groups:
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs.double()), labels).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / len(groups)
    return total


def assert_close(found: dict[str, Any], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=tolerance, atol=tolerance * tensor.abs().max())


SAMPLES = [(X[i : i + 1], Y[i : i + 1]) for i in range(12)]


@pytest.mark.parametrize("at_once", [100, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fisher_of_samples_equals_a_loop_in_float64(at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(dtype)
    elements = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(_fisher, "MEMORY", at_once * elements * dtype.itemsize)
    found = EWC(model, 1.0).estimate([(x.to(dtype), y) for x, y in BATCHES])
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert_close(found, squares_by_hand(model, SAMPLES), 1e-5 if dtype == torch.float32 else 1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_fisher_of_batches_equals_a_loop_and_depends_on_the_batches() -> None:
    model = network()
    zero_gradients(model)
    by_batch = EWC(model, 1.0, fisher="per_batch")
    assert_close(by_batch.estimate(BATCHES), squares_by_hand(model, BATCHES))
    assert_close(by_batch.estimate(SAMPLES), squares_by_hand(model, SAMPLES))
    one = by_batch.estimate([(X, Y)])
    assert_close(one, squares_by_hand(model, [(X, Y)]))
    per_sample = EWC(model, 1.0).estimate([(X, Y)])
    assert all((one[name] <= per_sample[name] * (1 + 1e-5)).all() for name in one)  # the mean of squares is the larger
    assert sum(float(t.sum()) for t in one.values()) < 0.5 * sum(float(t.sum()) for t in per_sample.values())
    assert all((p.grad == 0).all() for p in model.parameters())  # what was in .grad is there again


class Undecided(nn.Module):
    """A model that vmap cannot follow: it looks at its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_models_that_cannot_be_vectorised_are_taken_sample_by_sample(caplog: pytest.LogCaptureFixture) -> None:
    model = Undecided()
    with caplog.at_level("INFO"):
        found = EWC(model, 1.0).estimate(BATCHES)
    assert "samples are taken one by one" in caplog.text
    assert_close(found, squares_by_hand(model, SAMPLES))


def test_the_model_is_in_eval_mode_meanwhile_and_back_in_its_own_after() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    for fisher in ("per_sample", "per_batch"):
        found = EWC(model, 1.0, fisher=fisher).estimate(BATCHES)
        assert_close(found, squares_by_hand(model, SAMPLES if fisher == "per_sample" else BATCHES))
        assert [part.training for part in model] == [True, False, True, True]
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loss_of_ones_own_over_a_batch_of_names() -> None:
    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        assert isinstance(model, nn.Sequential)
        return batch["scale"] * nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    model = network()
    batches = [{"x": x, "y": y, "scale": 2.0} for x, y in BATCHES]
    expected = {name: 4 * tensor for name, tensor in squares_by_hand(model, SAMPLES).items()}
    assert_close(EWC(model, 1.0).estimate(batches, loss), expected)


def test_sampled_labels_are_those_that_the_model_predicts() -> None:
    """The expectation over labels by hand; 3,000 draws come within 10 % of it, and not to that of the given labels."""
    model = network()
    x, y = X[:1].repeat(3000, 1), torch.zeros(3000, dtype=torch.int64)
    probabilities = model(X[:1]).detach().softmax(-1)[0]
    expected = {name: torch.zeros_like(p).double() for name, p in model.named_parameters()}
    for label, probability in enumerate(probabilities):
        for name, tensor in squares_by_hand(model, [(X[:1], torch.tensor([label]))]).items():
            expected[name] += probability.double() * tensor
    sampled = EWC(model, 1.0, labels="sampled")
    found = sampled.estimate([(x, y)])
    assert_close(found, expected, 0.1)
    with pytest.raises(AssertionError):
        assert_close(EWC(model, 1.0).estimate([(x, y)]), expected, 0.1)
    again = sampled.estimate([(x, y)])
    assert all(torch.equal(found[name], again[name]) for name in found)
    sampled.new_task([(x, y)])
    for other in (sampled, EWC(model, 1.0, labels="sampled", seed=7)):  # each task has draws of its own
        drawn = other.estimate([(x, y)])
        assert any(not torch.equal(found[name], drawn[name]) for name in found)


@pytest.mark.parametrize("backend", ["numba", "numpy", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_term_has_the_same_bits_from_every_backend(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_penalty, "SMALL", LEAST)
    model = nn.Linear(130, 127, bias=False).to(dtype)
    term = EWC(model, 0.3, backend=backend)
    term.new_task(fisher=importances(model, 1))
    anchor = model.weight.detach().clone()
    move(model, 2)
    model.weight.grad = torch.randn(model.weight.shape).to(dtype)
    change = 0.3 * (importances(model, 1)["weight"] * (model.weight.detach().float() - anchor.float()))
    expected = (model.weight.grad.float() + change).to(dtype)
    term.add_gradients()
    assert torch.equal(model.weight.grad, expected)


def run_of_tasks(model: nn.Module, term: EWC, tasks: int) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """End tasks at random weights with random Fisher information; return both of each, in float64."""
    seen = []
    for task in range(tasks):
        fisher = importances(model, task)
        if task < 2:
            fisher["0.bias"][:4] = 0
        term.new_task(fisher=fisher)
        seen.append({name: (fisher[name].double(), p.detach().double().clone()) for name, p in model.named_parameters()})
        move(model, 100 + task)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_separate_tasks_in_two_buffers_equal_the_explicit_sum(dtype: torch.dtype) -> None:
    """Gradient and value of the penalty of 5 tasks, kept one by one, by autograd in float64."""
    model = network(dtype)
    term = EWC(model, 0.7)
    seen = run_of_tasks(model, term, 5)
    weights = {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
    parts = [(task[name][0] * (weights[name] - task[name][1]).square()).sum() for task in seen for name in weights]
    explicit = 0.7 / 2 * torch.stack(parts).sum()
    explicit.backward()
    zero_gradients(model)
    term.add_gradients()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-14}[dtype]
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, weight in weights.items():
        # relative to the terms of the sum, which may cancel each other
        terms = sum(0.7 * (task[name][0] * (weight.detach() - task[name][1])).abs() for task in seen)
        assert ((found[name].double() - weight.grad).abs() <= tolerance * terms).all(), name
    torch.testing.assert_close(term.penalty(), explicit.detach(), rtol=min(tolerance, 1e-6), atol=0)
    assert term.tasks == 5
    assert sum(local.numel() for held in term._held for local in held.kept) == 2 * sum(p.numel() for p in model.parameters())


def test_the_term_stays_exact_next_to_the_anchor() -> None:
    """Where sums of F and of F * theta would cancel: weights of 1,000 that have moved by a few units in the last place."""
    model = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1000.0)
    term = EWC(model, 1.0)
    for _ in range(3):
        term.new_task(fisher={"weight": torch.full((4, 1), 0.1)})
    with torch.no_grad():
        model.weight += 3 * 2.0**-14
    zero_gradients(model)
    term.add_gradients()
    torch.testing.assert_close(model.weight.grad, torch.full((4, 1), 0.3 * 3 * 2.0**-14), rtol=1e-6, atol=0)


def test_online_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    term = EWC(model, 2.0, mode="online", gamma=0.5)
    for weight, fisher in ((0.0, 4.0), (1.0, 3.0)):
        with torch.no_grad():
            model.weight.fill_(weight)
        term.new_task(fisher={"weight": torch.tensor([[fisher]])})
    with torch.no_grad():
        model.weight.fill_(3.0)
    assert term.importance["weight"].item() == 5.0  # 0.5 * 4 + 3
    assert term.penalty().item() == 20.0  # 2 / 2 * 5 * (3 - 1)**2
    zero_gradients(model)
    term.add_gradients()
    assert model.weight.grad.item() == 20.0  # 2 * 5 * (3 - 1)


def test_nothing_is_added_before_the_first_task_ends_nor_to_a_new_head() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    term = EWC(model, 1.0).attach(optimizer)
    assert term.penalty().item() == 0.0
    zero_gradients(model)
    optimizer.step()
    assert all((p.grad == 0).all() for p in model.parameters())
    term.new_task(BATCHES)
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": model[3].parameters()})
    move(model, 1)
    zero_gradients(model)
    optimizer.step()
    assert (model[0].weight.grad != 0).any()
    assert (model[3].weight.grad == 0).all()
    term.new_task([(X, Y % 2)])
    assert set(term.anchor) == {name for name, _ in model.named_parameters()}


def test_it_keeps_what_the_first_task_depends_on() -> None:
    """Weights of inputs that the first task never sees are free; the others stay near where they were."""
    model = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = X * torch.tensor([1.0, 1.0, 0.0, 0.0])
    moved = []
    for strength in (0.0, 10.0):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        term = EWC(trained, strength).attach(optimizer)
        term.new_task([(first, Y)])
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(X), Y.flip(0)).backward()
            optimizer.step()
        moved.append(trained.weight.detach().abs().sum(0))
    assert (moved[1][:2] < 0.5 * moved[0][:2]).all()
    assert (moved[1][2:] > 0.8 * moved[0][2:]).all()


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_resumed_at_every_step_of_two_tasks(mode: str) -> None:
    def run(parts: Any, steps: range) -> None:
        model, optimizer, term = parts
        for step in steps:
            if step in (2, 4):
                term.new_task([(X + step, Y)])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), (Y + step) % 3).backward()
            optimizer.step()

    def build() -> Any:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, optimizer, EWC(model, 5.0, mode=mode, gamma=0.9, labels="sampled").attach(optimizer)

    whole = build()
    run(whole, range(6))
    for step in range(1, 6):
        parts = build()
        run(parts, range(step))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        resumed = build()
        for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        run(resumed, range(step, 6))
        for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(one, other)
        assert whole[2].penalty() == resumed[2].penalty()


def test_what_is_refused() -> None:
    model = network()
    for options, message in (
        ({"mode": "both"}, 'mode=.both.: must be "separate" or "online"'),
        ({"fisher": "exact"}, "fisher=.exact."),
        ({"labels": "true"}, "labels=.true."),
        ({"gamma": 1.5}, r"gamma=1.5: must be in \[0, 1\]"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"threads": 0}, "threads=0"),
        ({"backend": "cuda"}, 'unknown backend "cuda"'),
    ):
        with pytest.raises(MergeError, match=message):
            EWC(model, 1.0, **options)
    with pytest.raises(MergeError, match=r"got list; pass a torch.nn.Module"):
        EWC(list(model.parameters()), 1.0)
    term = EWC(model, 1.0)
    with pytest.raises(MergeError, match=r"either batches .* or fisher="):
        term.new_task()
    with pytest.raises(MergeError, match="there are no batches"):
        term.new_task(iter(()))
    with pytest.raises(MergeError, match=r"tensors of \[5, 7\] samples"):
        term.new_task([(X[:5], Y[:7])])
    for way in ("per_sample", "per_batch"):
        elsewhere = EWC(model, 1.0, fisher=way)
        with pytest.raises(MergeError, match="no parameter got a gradient: the loss does not depend on them"):
            elsewhere.new_task([(X[:1], Y[:1])], lambda _, batch: batch[0].clone().requires_grad_().sum())
        assert elsewhere.tasks == 0
    with pytest.raises(MergeError, match="draw them in your loss"):
        EWC(model, 1.0, labels="sampled").new_task(BATCHES, lambda m, b: m(b).sum())
    fisher = importances(model, 0)
    with pytest.raises(MismatchError, match=r'the Fisher information of "0.bias" has shape \(3,\), the model \(8,\)'):
        term.new_task(fisher={**fisher, "0.bias": torch.zeros(3)})
    with pytest.raises(NonFiniteError, match=r'the Fisher information of "0.bias" holds NaN or Inf'):
        term.new_task(fisher={**fisher, "0.bias": torch.full((8,), torch.inf)})
    with pytest.raises(MergeError, match=r'"0.bias" is below zero'):
        term.new_task(fisher={**fisher, "0.bias": torch.full((8,), -1.0)})
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r'the weight of "0.weight" holds NaN'):
        term.new_task(fisher=fisher)
    assert (term.tasks, term.anchor) == (0, {})


def test_states_of_other_models_are_refused() -> None:
    model = network()
    term = EWC(model, 1.0)
    term.new_task(BATCHES)
    before = term.state_dict()
    other = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 1))
    other_term = EWC(other, 1.0)
    other_term.new_task(fisher=importances(other, 0))
    with pytest.raises(MismatchError, match=r'has "1.weight", which the model lacks'):
        term.load_state_dict(other_term.state_dict())
    with pytest.raises(MismatchError, match="of different parameters"):
        term.load_state_dict({**before, "importance": {}})
    with pytest.raises(MergeError, match='lacks "gamma"'):
        term.load_state_dict({name: value for name, value in before.items() if name != "gamma"})
    with pytest.raises(MergeError, match="mode='l2'"):
        term.load_state_dict({**before, "mode": "l2"})
    negative = {name: -tensor - 1 for name, tensor in before["importance"].items()}
    for change, message in (
        ({"offset": "x"}, "offset='x'"),
        ({"tasks": -1}, "tasks=-1"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"importance": negative}, r'the saved Fisher information of "0.weight" is below zero'),
    ):
        with pytest.raises(MergeError, match=message):
            term.load_state_dict({**before, "gamma": 0.25, "seed": 7, **change})
        assert {**term.state_dict(), "anchor": 0, "importance": 0} == {**before, "anchor": 0, "importance": 0}
    assert all(torch.equal(before["anchor"][name], term.anchor[name]) for name in before["anchor"])


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    term = EWC(network(), np.float64(2.0), gamma=np.float32(0.5), seed=np.int64(3))
    torch.save(term.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert (state["strength"], state["gamma"], state["seed"]) == (2.0, 0.5, 3)


def test_an_engine_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine(nn.Module):
        pass

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=Engine))
    with pytest.raises(MergeError, match="EWC: DeepSpeed's engine averages gradients out of sight"):
        EWC(Engine(), 1.0)


def test_docstring_examples() -> None:
    assert doctest.testmod(ewc, extraglobs={"torch": torch}) == (0, 11)
