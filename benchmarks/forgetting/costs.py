"""What the learners cost: seconds of a step, and bytes kept, measured side by side in one process."""

from collections.abc import Mapping
from time import perf_counter

import torch

from mergekit_cl.demo import one_thread

from .learners import Learner, learners_for
from .protocol import Sequence, Values
from .sequences import load
from .strategies import strategy_of
from .training import batch_of, copied, draws, merge_models, train

ROUNDS = 2


def measure(name: str, quick: bool, chosen: Mapping[str, Values]) -> dict[str, dict[str, float]]:
    """Time the second task of a sequence for each learner: from its begin to its end, all learners in turn, some rounds.

    What a learner does once for a task (the Fisher information of EWC, the merge of finished models) is divided among the steps
    of the task. The shortest round counts. The joint learner does what sequential fine-tuning does at a step.

    Args:
        name: Name of the sequence.
        quick: Whether to take its quick version.
        chosen: The values of each learner that is measured, "sequential" among them.

    Returns:
        For each learner ``step``, seconds of wall-clock time for a step, with one thread.

    """
    sequence = load(name, quick)
    learners = [x for x in learners_for(name) if x.name in chosen and x.group not in ("bound", "flax")]
    best: dict[str, float] = {}
    with one_thread():
        _task(learners[0], sequence, chosen[learners[0].name])  # the first of a process is slow
        for _ in range(1 if quick else ROUNDS):
            for learner in learners:
                values = chosen[learner.name]
                seconds = _merge(learner, sequence, values) if learner.merges else _task(learner, sequence, values)
                best[learner.name] = min(seconds, best.get(learner.name, seconds))
    plain = best["sequential"]
    extra = {learner.name: plain if learner.merges else 0.0 for learner in learners}
    return {learner: {"step": (seconds + extra[learner]) / sequence.settings.steps} for learner, seconds in best.items()}


def _task(learner: Learner, sequence: Sequence, values: Values) -> float:
    """Return the seconds that the second task takes."""
    model, generator = sequence.network(0), draws(0)
    strategy = strategy_of(learner.runs, model, sequence, 0, values)
    first, second = (batch_of(task.train, i, slice(None)) for i, task in enumerate(sequence.tasks[:2]))
    strategy.end(0, first)
    start = perf_counter()
    for _ in train(strategy, 1, values["lr"], generator):
        pass
    if len(sequence.tasks) > 2:  # there is nothing to do at the end of the last task
        strategy.end(1, second)
    return perf_counter() - start


def _merge(learner: Learner, sequence: Sequence, values: Values) -> float:
    """Return the seconds that it takes to merge the models of all tasks; here they differ by noise alone."""
    model, noise = sequence.network(0), torch.Generator().manual_seed(0)
    kept = {"start": copied(model)}
    for i in range(len(sequence.tasks)):
        kept[str(i)] = {name: x + 1e-3 * torch.randn(x.shape, generator=noise) for name, x in kept["start"].items()}
    own = {name: value for name, value in values.items() if name != "lr"}
    start = perf_counter()
    merge_models(learner.name, sequence, kept, len(sequence.tasks) - 1, own, 0)
    return perf_counter() - start
