"""SFA beside accelerate: what counts as a step, and checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from mergekit_cl import merge
from mergekit_cl.adapters.torch import SFA


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """Forget the settings that accelerate keeps for the whole process."""
    reset()
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A model, its optimizer and SFA, prepared; gradients of three batches make a step."""

    def __init__(self, seed: int = 0, *, attached: bool = False, every: int = 2) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.05))
        self.sfa, self.attached = SFA(self.model, beta=0.3, every=every), attached
        if attached:
            self.sfa.attach(self.optimizer)
        self.accelerator.register_for_checkpointing(self.sfa)

    def train(self, batches: range) -> list[int]:
        """Train; return the batches after which it was merged."""
        merged = []
        for batch in batches:
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch))
            before = self.sfa.merges
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(nn.functional.cross_entropy(self.model(inputs), torch.arange(8) % 3))
                self.optimizer.step()
                self.optimizer.zero_grad()
                if not self.attached and self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                    self.sfa.step()
            if self.sfa.merges > before:
                merged.append(batch)
        return merged

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("attached", [False, True])
def test_only_steps_of_the_optimizer_count(attached: bool) -> None:
    run = Run(attached=attached)
    anchor = run.weights()
    assert run.train(range(1, 18)) == [6, 12]
    assert run.sfa.step_count == 5
    before = run.weights()
    by_loop = Run(every=100)
    for batches in (range(1, 7), range(7, 13)):
        by_loop.train(batches)
        by_loop.model.load_state_dict(merge([anchor, by_loop.weights()], beta=0.3))
    by_loop.train(range(13, 18))
    same(before, by_loop.weights())


@pytest.mark.parametrize("interrupted", [3, 6, 9, 12])
def test_resumed_from_its_checkpoint(interrupted: int, tmp_path: Path) -> None:
    run = Run()
    run.train(range(1, interrupted + 1))
    run.accelerator.save_state(str(tmp_path / "state"))
    run.train(range(interrupted + 1, 16))
    reset()
    again = Run(seed=1)
    again.accelerator.load_state(str(tmp_path / "state"))
    again.train(range(interrupted + 1, 16))
    assert (again.sfa.step_count, again.sfa.merges) == (run.sfa.step_count, run.sfa.merges) == (5, 2)
    same(run.weights(), again.weights())


def test_a_step_that_the_scaler_skipped_does_not_count() -> None:
    Accelerator(cpu=True)
    weight = nn.Parameter(torch.ones(3))
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=0.1), scaler=scaler)
    sfa = SFA([weight], beta=0.5, every=1).attach(optimizer)
    for factor, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == skipped
    assert sfa.step_count == 2
    # 1 - 0.1, averaged with 1: 0.95; again: 0.85, averaged: 0.925
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.925))
