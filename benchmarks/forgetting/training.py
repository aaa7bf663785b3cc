"""Carries out cells: trains a network on one task after the other, or merges what was trained, and scores it.

The first weights and the batches depend on the seed alone, so that learners of one seed are compared on equal terms. Adam
begins anew at each task, with a constant learning rate. One thread of torch: a cell gives the same numbers whenever it runs
on the same machine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mergekit_cl import merge
from mergekit_cl.demo import one_thread

from .learners import needs
from .protocol import Cell, Part, Result, Task, Values
from .protocol import Sequence as Tasks
from .sequences import load
from .strategies import Batch, Outputs, Strategy, strategy_of, trained

SCORED_AT_ONCE = 250

Weights = dict[str, torch.Tensor]
Row = list[float | None]


def carry_out(cell: Cell, quick: bool, weights: Path) -> Result:
    """Carry out a cell.

    Args:
        cell: What to do.
        quick: Whether it is of the quick version of the sequence.
        weights: The folder in which cells of the purpose "weights" keep the models that other cells merge.

    Returns:
        What came out, ready for JSON:

        - "tuning": ``score``, the mean accuracy on the validation parts after the last task;
        - "final": ``accuracy`` [task, task], in row i after task i, on the test parts; ``loss``, likewise, mean cross-entropies
          in nats; ``start`` [task], accuracies before the first task; ``held``, the bytes kept beside the model and the
          optimizer during the last task; ``curve``, for the first seed of learners that train: ``steps`` [time], over all
          tasks, ``accuracy`` [time, task], ``merges``, the steps of SFA's merges, and ``starts``, the step before each task.
          What was not measured is None;
        - all: ``seconds``, of training and merging alone, and ``steps``, the optimizer's.

    """
    sequence = load(cell.sequence, quick)
    if cell.learner.endswith("-flax"):
        from . import flax_digits

        return flax_digits.carry_out(cell, sequence)
    with one_thread():
        if cell.purpose == "weights":
            return _keep_weights(cell, sequence, weights_of(cell, weights))
        needed = needs(cell)
        if needed is not None:
            return _merged(cell, sequence, weights_of(needed, weights))
        if cell.learner == "joint":
            return _jointly(cell, sequence)
        return _in_turn(cell, sequence)


def weights_of(cell: Cell, folder: Path) -> Path:
    """Return the file in which a cell of the purpose "weights" keeps its models."""
    return folder / f"{cell.name}.safetensors"


@dataclass
class Scores:
    """Scores of a network on the tasks of a sequence, on their validation or test parts."""

    sequence: Tasks
    part: str
    accuracy: list[Row] = field(default_factory=list)
    loss: list[Row] = field(default_factory=list)

    def add(self, model: nn.Module) -> None:
        """Score the network on each task, as another row."""
        scored = [score(model, self.sequence, i, self.examples(task)) for i, task in enumerate(self.sequence.tasks)]
        self.accuracy.append([accuracy for accuracy, _ in scored])
        self.loss.append([loss for _, loss in scored])

    def skip(self) -> None:
        """Add a row that is not measured."""
        self.accuracy.append([None] * len(self.sequence.tasks))
        self.loss.append([None] * len(self.sequence.tasks))

    def examples(self, task: Task) -> Part:
        """Return what is scored of a task."""
        part: Part = getattr(task, self.part)
        evaluated = self.sequence.settings.evaluated
        return part if evaluated is None else part.first(evaluated)


@torch.no_grad()
def score(model: nn.Module, sequence: Tasks, task: int, part: Part) -> tuple[float, float]:
    """Return the accuracy of a network on examples of a task, and its mean cross-entropy in nats."""
    outputs, was_training = Outputs(sequence), model.training
    model.eval()
    right, loss, positions = 0, 0.0, part.targets[0].numel()
    for start in range(0, len(part), SCORED_AT_ONCE):
        batch = batch_of(part, task, slice(start, start + SCORED_AT_ONCE))
        logits = outputs.logits(model, batch)
        right += int((logits.argmax(-1) == batch[1]).sum())
        loss += float(nn.functional.cross_entropy(logits.movedim(-1, 1), batch[1], reduction="sum"))
    model.train(was_training)
    return right / (len(part) * positions), loss / (len(part) * positions)


def batch_of(part: Part, task: int, which: slice | torch.Tensor) -> Batch:
    """Return a batch of examples of a task."""
    targets = part.targets[which]
    return part.inputs[which], targets, torch.full((len(targets),), task)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Make the optimizer of a task."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)


def draws(seed: int) -> torch.Generator:
    """Make the generator that batches are drawn with."""
    return torch.Generator().manual_seed(1_000_003 * seed + 17)


class Clock:
    """Adds up the seconds of its ``with`` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._start


def train(
    strategy: Strategy, task: int, rate: float, generator: torch.Generator, pauses: Sequence[int] = ()
) -> Iterator[tuple[int, bool]]:
    """Train on a task: yield, after steps that merged or are in ``pauses``, the step (from 1), and whether it merged."""
    model, part, settings = strategy.model, strategy.sequence.tasks[task].train, strategy.sequence.settings
    optimizer = optimizer_of(model, rate)
    strategy.begin(task, optimizer)
    model.train()
    for step in range(1, settings.steps + 1):
        drawn = torch.randint(len(part), (settings.batch,), generator=generator)
        loss = strategy.loss(strategy.mix(batch_of(part, task, drawn)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        merged = strategy.step()
        if merged or step in pauses:
            yield step, merged


def _in_turn(cell: Cell, sequence: Tasks) -> Result:
    """Train on one task after the other."""
    model, values, settings = sequence.network(cell.seed), dict(cell.values), sequence.settings
    strategy = strategy_of(cell.learner, model, sequence, cell.seed, values)
    final = cell.purpose == "final"
    scores, curve, generator, clock = _scores(cell, sequence), _Curve(sequence), draws(cell.seed), Clock()
    drawn = final and cell.seed == 0
    pauses = {round(settings.steps * (i + 1) / settings.curve_points) for i in range(settings.curve_points)} if drawn else set()
    start = _start(model, sequence) if final else []
    if drawn:
        curve.add(0, model)
    for i, task in enumerate(sequence.tasks):
        before, steps = i * settings.steps, train(strategy, i, values["lr"], generator, sorted(pauses))
        curve.starts.append(before)
        while True:
            with clock:
                step, merged = next(steps, (None, False))
            if step is None:
                break
            if merged:
                curve.merges.append(before + step)
            if drawn:
                curve.add(before + step, model)
        if i + 1 < len(sequence.tasks):
            with clock:
                strategy.end(i, batch_of(task.train, i, slice(None)))
        if final or i + 1 == len(sequence.tasks):
            scores.add(model)
    result = {"seconds": clock.seconds, "steps": settings.steps * len(sequence.tasks)}
    return _result(cell, scores, start, result, strategy.held, curve.drawn() if drawn else None)


def _jointly(cell: Cell, sequence: Tasks) -> Result:
    """Train on all tasks at once, as long as the others do on all of them."""
    model, settings, generator, clock = sequence.network(cell.seed), sequence.settings, draws(cell.seed), Clock()
    strategy, scores = Strategy(model, sequence, cell.seed), _scores(cell, sequence)
    start = _start(model, sequence) if cell.purpose == "final" else []
    tasks = torch.cat([torch.full((len(task.train),), i) for i, task in enumerate(sequence.tasks)])
    inputs = torch.cat([task.train.inputs for task in sequence.tasks])
    targets = torch.cat([task.train.targets for task in sequence.tasks])
    optimizer, steps = optimizer_of(model, dict(cell.values)["lr"]), settings.steps * len(sequence.tasks)
    model.train()
    with clock:
        for _ in range(steps):
            which = torch.randint(len(tasks), (settings.batch,), generator=generator)
            loss = strategy.loss((inputs[which], targets[which], tasks[which]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if cell.purpose == "final":
        for _ in sequence.tasks[1:]:
            scores.skip()
    scores.add(model)
    held = sum(task.train.inputs.nbytes + task.train.targets.nbytes for task in sequence.tasks[:-1])
    return _result(cell, scores, start, {"seconds": clock.seconds, "steps": steps}, held, None)


def _keep_weights(cell: Cell, sequence: Tasks, file: Path) -> Result:
    """Train the models that merges start from, and keep them.

    "sequential": the weights after each task, learned in turn. "per-task": of each task a model of its own, from the first
    weights if these were pretrained, or else from those after the first task.
    """
    rate, clock = dict(cell.values)["lr"], Clock()
    model, generator = sequence.network(cell.seed), draws(cell.seed)
    strategy = Strategy(model, sequence, cell.seed)
    kept = {"start": copied(model)}
    for i in range(len(sequence.tasks)):
        if cell.learner == "per-task" and i:
            _set(model, kept[_base(sequence)])
        with clock:
            for _ in train(strategy, i, rate, generator):
                pass
        kept[str(i)] = copied(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{which}/{name}": tensor for which, each in kept.items() for name, tensor in each.items()}
    save_file(flat, file, metadata={"seconds": repr(clock.seconds)})
    return {"seconds": clock.seconds, "steps": sequence.settings.steps * len(sequence.tasks)}


def _merged(cell: Cell, sequence: Tasks, file: Path) -> Result:
    """Merge, after each task, the models of the tasks until then; training does not go on from what was merged."""
    kept, seconds = _read(file)
    values = {name: value for name, value in cell.values if name != "lr"}
    model, clock, scores = sequence.network(cell.seed), Clock(), _scores(cell, sequence)
    count = len(sequence.tasks)
    start = _start(model, sequence) if cell.purpose == "final" else []
    for i in range(count) if cell.purpose == "final" else [count - 1]:
        with clock:
            _set(model, merge_models(cell.learner, sequence, kept, i, values, cell.seed))
        scores.add(model)
    copies = 1 if cell.learner == "wise_ft" else count if sequence.pretrained else count - 1
    held = copies * sum(tensor.nbytes for tensor in kept["start"].values())
    times = {"seconds": seconds + clock.seconds, "steps": sequence.settings.steps * count}
    return _result(cell, scores, start, times, held, None)


def merge_models(method: str, sequence: Tasks, kept: dict[str, Weights], last: int, values: Values, seed: int) -> Weights:
    """Merge the models of the tasks until the last one; one that is itself the base has no task vector.

    Args:
        method: The learner: a merge method, or "soup".
        sequence: The tasks.
        kept: The models: "start", and the number of each task.
        last: The number of the last task.
        values: Parameters of the method.
        seed: For methods with random masks.

    """
    models = [kept[str(i)] for i in range(last + 1)]
    base = kept[_base(sequence)]
    merged: Weights
    if method == "soup":
        merged = merge(models, "linear")
        return merged
    tuned = models if sequence.pretrained else models[1:]
    if method == "wise_ft":
        tuned = tuned[-1:]
    parameters: dict[str, Any] = dict(values)
    merged = merge(tuned, method, base=base, seed=seed, **parameters) if tuned else base
    return merged


def _base(sequence: Tasks) -> str:
    return "start" if sequence.pretrained else "0"


@dataclass
class _Curve:
    """Accuracies on a part of the test examples while the tasks are learned."""

    sequence: Tasks
    steps: list[int] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    merges: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, step: int, model: nn.Module) -> None:
        count = self.sequence.settings.curve_examples
        tests = [task.test.first(count) for task in self.sequence.tasks]
        self.steps.append(step)
        self.accuracy.append([score(model, self.sequence, i, test)[0] for i, test in enumerate(tests)])

    def drawn(self) -> Result:
        return {"steps": self.steps, "accuracy": self.accuracy, "merges": self.merges, "starts": self.starts}


def _scores(cell: Cell, sequence: Tasks) -> Scores:
    return Scores(sequence, "test" if cell.purpose == "final" else "validation")


def _start(model: nn.Module, sequence: Tasks) -> list[float]:
    scores = Scores(sequence, "test")
    return [score(model, sequence, i, scores.examples(task))[0] for i, task in enumerate(sequence.tasks)]


def _result(cell: Cell, scores: Scores, start: list[float], times: Result, held: int, curve: Result | None) -> Result:
    if cell.purpose == "tuning":
        return {"score": fmean(score for score in scores.accuracy[-1] if score is not None), **times}
    return {"accuracy": scores.accuracy, "loss": scores.loss, "start": start, "curve": curve, **times, "held": held}


def copied(model: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in trained(model).items()}


@torch.no_grad()
def _set(model: nn.Module, weights: Weights) -> None:
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name])


def _read(file: Path) -> tuple[dict[str, Weights], float]:
    kept: dict[str, Weights] = {}
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118  (it is no dictionary)
            which, _, name = key.partition("/")
            kept.setdefault(which, {})[name] = stored.get_tensor(key)
        return kept, float(stored.metadata()["seconds"])
