"""What the learners do while a network is trained: each through the adapter that a user would take."""

import copy
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import nn

from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.ewc import EWC
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor
from mergekit_cl.adapters.torch.rehearsal import Rehearsal
from mergekit_cl.continual.rehearsal import Balanced

from .protocol import Sequence, Values

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Inputs, targets, and the number of each example's task."""

LWF_TEMPERATURE = 2.0


class Outputs:
    """Which outputs of the network each task uses, and the losses with the others hidden."""

    def __init__(self, sequence: Sequence) -> None:
        self.heads = [task.outputs for task in sequence.tasks]
        self._hidden: torch.Tensor | None = None

    def logits(self, model: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return logits, in which the outputs that are not of an example's task are minus infinity."""
        inputs, _, tasks = batch
        logits = model(inputs)
        if all(head is None for head in self.heads):
            return logits
        if self._hidden is None:
            self._hidden = torch.ones(len(self.heads), logits.shape[-1], dtype=torch.bool)
            for row, head in zip(self._hidden, self.heads, strict=True):
                row[slice(None) if head is None else list(head)] = False
        return logits.masked_fill(self._hidden[tasks], -torch.inf)

    def losses(self, model: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of each example, in nats; where it has several targets, their mean."""
        losses = nn.functional.cross_entropy(self.logits(model, batch).movedim(-1, 1), batch[1], reduction="none")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


class Strategy:
    """Sequential fine-tuning: nothing is done. The others say what they do beside it.

    Args:
        model: The network.
        sequence: What it learns.
        seed: For what is drawn by chance.

    """

    def __init__(self, model: nn.Module, sequence: Sequence, seed: int) -> None:
        self.model, self.sequence, self.seed, self.outputs = model, sequence, seed, Outputs(sequence)

    def begin(self, task: int, optimizer: torch.optim.Optimizer) -> None:
        """Before a task."""

    def mix(self, batch: Batch) -> Batch:
        """Return what to train on in place of a batch."""
        return batch

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch, []."""
        return self.outputs.losses(self.model, batch).mean()

    def step(self) -> bool:
        """After a step of the optimizer: whether weights were merged."""
        return False

    def end(self, task: int, examples: Batch) -> None:
        """After a task, and before another one: with the examples that it was trained on."""

    @property
    def held(self) -> int:
        """The bytes that are kept beside the model and the optimizer."""
        return 0


class _WithSFA(Strategy):
    """SFA from the second task on: before the first one there is nothing to keep."""

    def __init__(self, model: nn.Module, sequence: Sequence, seed: int, *, beta: float, p: float) -> None:
        super().__init__(model, sequence, seed)
        self.beta, self.p = beta, p
        self.sfa: SFA | None = None

    def begin(self, task: int, optimizer: torch.optim.Optimizer) -> None:
        steps = self.sequence.settings.steps
        if self.sfa is not None:
            self.sfa.new_task(total_steps=steps)
        elif task:
            self.sfa = SFA(self.model, beta=self.beta, p=self.p, total_steps=steps)

    def step(self) -> bool:
        return self.sfa is not None and self.sfa.step()

    @property
    def held(self) -> int:
        return 0 if self.sfa is None else _bytes(self.sfa.anchor.values())


class _WithL2(Strategy):
    """A pull towards the weights from before the task."""

    def __init__(self, model: nn.Module, sequence: Sequence, seed: int, *, strength: float) -> None:
        super().__init__(model, sequence, seed)
        self.strength = strength
        self.pull: L2Anchor | None = None

    def begin(self, task: int, optimizer: torch.optim.Optimizer) -> None:
        if self.pull is not None:
            self.pull.new_task()
        elif task:
            self.pull = L2Anchor(self.model, strength=self.strength)
        if self.pull is not None:
            self.pull.attach(optimizer)

    @property
    def held(self) -> int:
        return 0 if self.pull is None else _bytes(self.pull.anchor.values())


class _WithEWC(Strategy):
    """A pull towards the weights after earlier tasks, weighed by what these tasks depend on."""

    def __init__(self, model: nn.Module, sequence: Sequence, seed: int, *, strength: float, gamma: float | None = None) -> None:
        super().__init__(model, sequence, seed)
        self.ewc = EWC(model, strength) if gamma is None else EWC(model, strength, mode="online", gamma=gamma)

    def begin(self, task: int, optimizer: torch.optim.Optimizer) -> None:
        if task:
            self.ewc.attach(optimizer)

    def end(self, task: int, examples: Batch) -> None:
        some = tuple(part[: self.sequence.settings.fisher_examples] for part in examples)
        self.ewc.new_task([some], self.outputs.losses)

    @property
    def held(self) -> int:
        return _bytes(self.ewc.anchor.values()) + _bytes(self.ewc.importance.values())


class _WithLwF(Strategy):
    """Learning without Forgetting (Li and Hoiem, https://arxiv.org/abs/1606.09282): the network of before the task teaches.

    For the inputs of the new task, the outputs of earlier tasks are kept near to what they were, by the cross-entropy of
    softened predictions at a temperature of 2, times its square as in distillation. The paper weighs it by 1, and trains new
    heads alone first; this does not.
    """

    def __init__(self, model: nn.Module, sequence: Sequence, seed: int, *, strength: float) -> None:
        super().__init__(model, sequence, seed)
        self.strength = strength
        self.teacher: nn.Module | None = None
        self.known: list[tuple[int, ...] | slice] = []

    def begin(self, task: int, optimizer: torch.optim.Optimizer) -> None:
        if task:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
            heads = dict.fromkeys(self.outputs.heads[:task])
            self.known = [slice(None) if head is None else head for head in heads]

    def loss(self, batch: Batch) -> torch.Tensor:
        if self.teacher is None:
            return super().loss(batch)
        logits = self.model(batch[0])
        with torch.no_grad():
            taught = self.teacher(batch[0])
        loss = self.outputs.losses(lambda _: logits, batch).mean()
        for head in self.known:
            loss = loss + self.strength * _distillation(logits[..., head], taught[..., head])
        return loss

    @property
    def held(self) -> int:
        return 0 if self.teacher is None else _bytes(trained(self.model).values())


class _WithRehearsal(Strategy):
    """Examples of earlier tasks in every batch: ``kept`` of the examples of all tasks but the last, each task its share."""

    def __init__(self, model: nn.Module, sequence: Sequence, seed: int, *, kept: float, share: float) -> None:
        super().__init__(model, sequence, seed)
        earlier = sum(len(task.train) for task in sequence.tasks[:-1])
        self.share = share
        self.rehearsal = Rehearsal(Balanced(max(len(sequence.tasks), round(kept * earlier)), seed=seed))

    def mix(self, batch: Batch) -> Batch:
        mixed: Batch = self.rehearsal.mix(batch, share=self.share)
        return mixed

    def end(self, task: int, examples: Batch) -> None:
        self.rehearsal.remember([examples], task=task)

    @property
    def held(self) -> int:
        return sum(_bytes(example.values()) for example in self.rehearsal.buffer)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "sequential": Strategy,
    "sfa": _WithSFA,
    "l2": _WithL2,
    "ewc": _WithEWC,
    "ewc-online": _WithEWC,
    "lwf": _WithLwF,
    "rehearsal": _WithRehearsal,
}
"""By the learners' names in cells."""


def strategy_of(learner: str, model: nn.Module, sequence: Sequence, seed: int, values: Values) -> Strategy:
    """Make the strategy of a learner with its values, of which "lr" is not its own."""
    return STRATEGIES[learner](model, sequence, seed, **{name: value for name, value in values.items() if name != "lr"})


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that are trained, by name; not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _distillation(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy between softened predictions, a mean over examples (and positions)."""
    soft = nn.functional.softmax(taught / LWF_TEMPERATURE, -1)
    return -(soft * nn.functional.log_softmax(logits / LWF_TEMPERATURE, -1)).sum(-1).mean() * LWF_TEMPERATURE**2


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
