"""What the methods of continual learning add to a step of training, in time and memory, beside penalties in the loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.ewc import EWC
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor

STRENGTH, CLASSES = 0.25, 64
STEPS, MERGES = 100, 4  # of a run with p=0.25


def mlp(elements: int) -> nn.Module:
    width = max(8, int((elements / 2.4) ** 0.5))
    return nn.Sequential(nn.Linear(width // 3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
                         nn.ReLU(), nn.Linear(width, CLASSES))  # fmt: skip


class Transformer(nn.Module):
    """Six layers, of about ``elements`` numbers in all, that name the kind of a sequence of tokens."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        width = max(8, int((elements / 76) ** 0.5) // 8 * 8)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(4 * width, width)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layers(self.embedding(tokens)).mean(1))
        return found


@dataclass
class Run:
    """A model in training; ``add`` is called between backward and the optimizer's step, ``penalty`` is added to the loss."""

    model: nn.Module
    batches: Iterator[Any]
    add: Callable[[], object] = lambda: None
    penalty: Callable[[], Any] = lambda: 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> None:
        inputs, labels = next(self.batches)
        self.optimizer.zero_grad()
        (nn.functional.cross_entropy(self.model(inputs), labels) + self.penalty()).backward()
        self.add()
        self.optimizer.step()


@pytest.fixture(params=["MLP, batches of 128", "transformer, batches of 8 x 64 tokens"])
def make(request: pytest.FixtureRequest, scaled: Callable[[int], int]) -> Callable[..., Run]:
    """Make runs that start from the same weights, and see the same batch."""
    elements = scaled(10_000_000)

    def run(**hooks: Any) -> Run:
        torch.manual_seed(0)
        model = mlp(elements) if request.param.startswith("MLP") else Transformer(elements)
        if isinstance(model, Transformer):
            inputs = torch.randint(model.embedding.num_embeddings, (8, 64))
        else:
            inputs = torch.randn(128, model[0].in_features)
        batch = inputs, torch.randint(CLASSES, (len(inputs),))
        return Run(model, repeat(batch), **hooks)

    run.__name__ = request.param
    return run


def case(make: Callable[..., Run], run: Run, method: str) -> dict[str, Any]:
    return {"model": make.__name__, "parameters": sum(p.numel() for p in run.model.parameters()), "method": method}


def temporary(call: Callable[[], object]) -> int:
    """Measure the most bytes that PyTorch has allocated at a time during a call, beyond those before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    assert watched.profiler is not None
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def anchors_of(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def move(run: Run) -> None:
    """Take a step, and move all weights away from the anchor."""
    run.step()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in run.model.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=random)


@pytest.mark.parametrize("method", ["L2Anchor", "EWC"])
def test_penalties(
    method: str, make: Callable[..., Run], threads: int, race: Callable[..., None], check: Callable[..., None]
) -> None:
    plain, ours, in_loss = make(), make(), make()
    anchors = anchors_of(in_loss)
    random = torch.Generator().manual_seed(1)
    fisher = [torch.rand(p.shape, generator=random) for p in in_loss.model.parameters()]

    if method == "EWC":
        term: Any = EWC(ours.model, STRENGTH, threads=threads)
        term.new_task(fisher=dict(zip(dict(ours.model.named_parameters()), fisher, strict=True)))
    else:
        term = L2Anchor(ours.model, STRENGTH, threads=threads)

    def penalty() -> torch.Tensor:
        pairs = zip(in_loss.model.parameters(), anchors, strict=True)
        if method == "EWC":
            parts = [(f * (p - a).square()).sum() for f, (p, a) in zip(fisher, pairs, strict=True)]
        else:
            parts = [(p - a).square().sum() for p, a in pairs]
        return STRENGTH / 2 * torch.stack(parts).sum()

    ours.add, in_loss.penalty = term.add_gradients, penalty
    for run in (ours, in_loss):
        move(run)
        before = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
        add = term.add_gradients if run is ours else penalty().backward
        add()
        for p, a, f, gradient in zip(run.model.parameters(), anchors, fisher, before, strict=True):
            importance = f.double() if method == "EWC" else 1.0
            check(p.grad, [gradient, importance * (p.double() - a.double())], [1.0, STRENGTH])

    kept = sum(tensor.nbytes for tensor in anchors) * (2 if method == "EWC" else 1)
    held = [*term.anchor.values(), *(term.importance.values() if method == "EWC" else ())]
    assert sum(tensor.nbytes for tensor in held) == kept
    race(
        {
            "plain": plain.step,
            "ours": ours.step,
            "in the loss": in_loss.step,
            "our term": term.add_gradients,
            "its term": lambda: penalty().backward(),
        },
        rounds=15,
        table="training_terms",
        case=case(make, plain, method),
        kept=kept,
        temporary={
            "ours": temporary(term.add_gradients),
            "in the loss": temporary(lambda: penalty().backward()),
        },
    )


def test_sfa(make: Callable[..., Run], threads: int, race: Callable[..., None], check: Callable[..., None]) -> None:
    plain, ours = make(), make()
    anchors = anchors_of(ours)
    sfa = SFA(ours.model, beta=0.5, every=1, threads=threads)
    counted = SFA(ours.model, beta=0.5, every=1 << 30, threads=threads)
    move(ours)
    before = anchors_of(ours)
    assert sfa.step()
    for p, a, b in zip(ours.model.parameters(), anchors, before, strict=True):
        check(p, [a, b], [0.5, 0.5])
    race(
        {"plain": plain.step, "merge": sfa.step, "count": counted.step},
        rounds=15,
        table="training_sfa",
        case={**case(make, plain, "SFA, p=0.25"), "steps of the run": STEPS},
        merges=MERGES,
        kept=sum(tensor.nbytes for tensor in anchors),
        temporary={"ours": temporary(sfa.step)},
    )


def test_rehearsal(make: Callable[..., Run], race: Callable[..., None]) -> None:
    rehearsal_module = pytest.importorskip("mergekit_cl.adapters.torch.rehearsal")
    plain, ours = make(), make()
    batch = next(plain.batches)
    rehearsal = rehearsal_module.Rehearsal(2 * len(batch[0]))
    rehearsal.remember([batch, batch], task="first")
    ours.batches = iter(rehearsal.mixed(repeat(batch), share=0.5))
    inputs, labels = next(ours.batches)
    assert len(inputs) == len(labels) == 2 * len(batch[0])
    assert torch.equal(inputs[: len(batch[0])], batch[0])
    race(
        {"plain": plain.step, "ours": ours.step},
        rounds=15,
        table="training_rehearsal",
        case=case(make, plain, "rehearsal, half of each batch"),
        kept=2 * sum(tensor.nbytes for tensor in batch),
    )
