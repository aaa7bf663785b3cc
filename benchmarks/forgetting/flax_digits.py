"""Sequential fine-tuning, SFA and L2 in Flax, to show that both frameworks agree.

The first weights and the batches are those of the runs in PyTorch.
"""

from collections.abc import Iterator
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_cl.errors import MergeError

from .protocol import Cell, Part, Result, Sequence, Task

try:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from mergekit_cl.adapters.flax import L2State, SFAState, l2, sfa
except ImportError as error:
    raise MergeError(
        'learners in Flax need flax, jax and optax, not all of them installed: pip install ".[forgetting]"'
    ) from error


class Learned(NamedTuple):
    """A network after some tasks.

    ``seconds`` are those of training so far, and ``held`` the bytes of the anchor that was kept during the last task.
    """

    model: nnx.Module
    seconds: float
    held: int


def carry_out(cell: Cell, sequence: Sequence) -> Result:
    """Train a network in Flax on one task after the other, and score it on the test parts.

    Args:
        cell: A learner ("sequential-flax", "sfa-flax" or "l2-flax"), its values, and the seed; the purpose is "final".
        sequence: The tasks. Its network is a ``torch.nn.Sequential`` of ``Linear`` and ``ReLU``.

    Returns:
        What `training.carry_out` returns for this purpose, without a curve. ``seconds`` leave out what compiling takes.

    """
    accuracy, loss = [], []
    for learned in learn_in_turn(cell, sequence):
        scored = [_score(learned.model, task, sequence.settings.evaluated) for task in sequence.tasks]
        accuracy.append([right for right, _ in scored])
        loss.append([nats for _, nats in scored])
    steps = sequence.settings.steps * len(sequence.tasks)
    result = {"accuracy": accuracy[1:], "loss": loss[1:], "start": accuracy[0], "curve": None}
    return {**result, "seconds": learned.seconds, "steps": steps, "held": learned.held}


def learn_in_turn(cell: Cell, sequence: Sequence) -> Iterator[Learned]:
    """Train on one task after the other.

    Yields:
        The network before the first task, and the same one after each.

    """
    model, settings = _in_flax(sequence.network(cell.seed)), sequence.settings
    later = _transformation(cell.learner, cell.values, settings.steps)
    first = _transformation("sequential-flax", (("lr", dict(cell.values)["lr"]),), settings.steps)  # nothing to keep yet
    generator, seconds = torch.Generator().manual_seed(1_000_003 * cell.seed + 17), 0.0
    yield Learned(model, seconds, 0)
    for number, task in enumerate(sequence.tasks):
        tx = later if number else first
        warm = nnx.clone(model)  # takes a step that compiles, and is dropped
        _learn(warm, nnx.Optimizer(warm, tx, wrt=nnx.Param), *_arrays(task.train, slice(settings.batch)), task.outputs)
        start = perf_counter()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)  # which takes the anchor
        for _ in range(settings.steps):
            drawn = torch.randint(len(task.train), (settings.batch,), generator=generator)
            _learn(model, optimizer, *_arrays(task.train, drawn), task.outputs)
        jax.block_until_ready(nnx.state(model))
        seconds += perf_counter() - start
        yield Learned(model, seconds, _held(optimizer))


def _in_flax(network: Any) -> nnx.Module:
    """Make a network of PyTorch's layers anew in Flax, with the same weights."""
    return nnx.Sequential(*(_linear(layer) if isinstance(layer, torch.nn.Linear) else nnx.relu for layer in network))


def _linear(layer: torch.nn.Linear) -> nnx.Linear:
    made = nnx.Linear(layer.in_features, layer.out_features, rngs=nnx.Rngs(0))
    made.kernel = nnx.Param(jnp.array(layer.weight.detach().numpy().T))
    made.bias = nnx.Param(jnp.array(layer.bias.detach().numpy()))
    return made


@cache  # a transformation that is made anew is compiled anew
def _transformation(learner: str, values: tuple[tuple[str, float], ...], steps: int) -> Any:
    """Make what optimizes in tasks of so many steps."""
    given = dict(values)
    adam = optax.adam(given["lr"])
    match learner:
        case "sequential-flax":
            return adam
        case "sfa-flax":
            return optax.chain(adam, sfa(given["beta"], p=given["p"], total_steps=steps))
        case "l2-flax":
            return optax.chain(l2(given["strength"]), adam)
    raise MergeError(f"{learner}: there is no such learner in Flax; choose sequential-flax, sfa-flax or l2-flax")


@nnx.jit
def _learn(model: nnx.Module, optimizer: nnx.Optimizer, inputs: Any, targets: Any, outputs: Any) -> None:
    """Take a step of the optimizer, down the mean loss of a batch."""
    optimizer.update(model, nnx.grad(lambda model: _losses(model, inputs, targets, outputs)[0].mean())(model))


@nnx.jit
def _losses(model: Any, inputs: Any, targets: Any, outputs: Any) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of each example, and whether it is right; outputs that the task does not use are hidden."""
    logits = model(inputs)
    if outputs is not None:
        logits = jnp.where(jnp.zeros(logits.shape[-1], bool).at[jnp.array(outputs)].set(True), logits, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets), logits.argmax(axis=-1) == targets


def _score(model: nnx.Module, task: Task, evaluated: int | None) -> tuple[float, float]:
    """Return the accuracy on the test part of a task, and the mean cross-entropy in nats."""
    losses, right = map(np.asarray, _losses(model, *_arrays(task.test, slice(evaluated)), task.outputs))
    return float(right.mean()), float(losses.mean(dtype=np.float64))


def _arrays(part: Part, which: slice | torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    return part.inputs[which].numpy(), part.targets[which].numpy().astype(np.int32)  # JAX has no int64 by default


def _held(optimizer: nnx.Optimizer) -> int:
    """Count the bytes of the anchors in the state of an optimizer."""
    nodes = jax.tree.leaves(nnx.as_pure(optimizer.opt_state), is_leaf=_has_anchor)
    return sum(leaf.nbytes for node in nodes if _has_anchor(node) for leaf in jax.tree.leaves(node.anchor))


def _has_anchor(node: object) -> bool:
    return isinstance(node, SFAState | L2State)
