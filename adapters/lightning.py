"""Sequential Fine-tuning with Averaging in Lightning's Trainer: a callback."""

import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.parameters import before_write, is_sharded, parameters_of
from mergekit_cl.errors import MergeError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# Lightning comes under two names, each with classes of its own: the one in use is the one that has been imported
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_lightning: Any = import_module(
    next((name for name in _NAMES if name in sys.modules), _NAMES[0] if find_spec("lightning") else _NAMES[1])
)

_BESIDE = "mergekit_cl.anchor."  # what names of sharded anchors begin with in a checkpoint


class SFACallback(_lightning.Callback):
    """Sequential Fine-tuning with Averaging (Kleiman et al., https://arxiv.org/abs/2501.05559) for a ``Trainer``.

    ``Trainer(callbacks=[SFACallback(beta=0.5, p=0.25)])`` averages the parameters of the module that is fitted, in place, with
    those that it had when ``fit`` began (the *anchor*). `SFA` has the formula, and all that a merge does and leaves alone.

    *When.* A merge comes at the end of the training batch (``on_train_batch_end``) that completed the step at which it is due:
    before the validation and the checkpoint of that step, which see merged weights. A step is a batch after which
    ``trainer.global_step`` has grown: with accumulated gradients the last of its batches; with several optimizers one step,
    however many of them stepped in the batch. As Lightning counts, a step that a gradient scaler skipped is one too. Where
    training ends before step T (early stopping, ``max_time``), or without a known T, the weights are merged once more when
    training ends; checkpoints of that step were written before, and hold weights that were not.

    *How long.* T is the number of steps that ``max_epochs`` and ``max_steps`` allow; ``total_steps`` has to be given (or
    ``every``, in place of p) where Lightning can't know it: data of unknown length without ``max_steps``, manual
    optimization, ``GradientAccumulationScheduler``.

    *Tasks.* Each ``fit`` is a task with a new anchor, in a new Trainer or in one that goes on (then T is what is left of its
    epochs and steps), unless ``ckpt_path`` resumes one. The anchor is taken when training starts: after
    ``configure_model``, with parameters where they are trained. What another callback unfreezes as an epoch begins
    (``BaseFinetuning``) is taken up then.

    *Checkpoints* hold the anchor, and so grow by one copy of the trainable parameters; with ``anchor=PATH`` they hold its
    fingerprint. A resumed run continues bit for bit, with the settings of the checkpoint; a step that was merged is not merged
    again. Lightning itself begins the loader anew when it resumes within an epoch, so that a run sees the same batches only if
    the loader keeps a state of its own, or the checkpoint is of the end of an epoch. A checkpoint written when training has
    ended (``trainer.save_checkpoint`` after ``fit``) holds the weights after the last merge: a run that ended early and goes on
    from there has one merge more than a run that never stopped. ``validate``, ``test`` and ``predict`` have nothing to do with
    any of it.

    *Strategies.* One device, DDP, and ``ModelParallelStrategy`` with FSDP2 (``fully_shard``), whose checkpoints hold the anchor
    sharded as the parameters are, under names that begin with ``mergekit_cl.anchor.``.

    Lightning comes as ``lightning.pytorch`` and as ``pytorch_lightning``. Where both are installed, import the one in use
    before this module.

    Args:
        beta: As in `SFA`: the weight of the anchor; 0.5 where it is not given.
        p: As in `SFA`: the part of the task between two merges; 0.25 where ``every`` is not given.
        every: As in `SFA`: the number of steps between two merges, in place of p.
        total_steps: The number T of steps of each task, where it is not to be computed.
        anchor: As in `SFA`: "memory", "cpu", or a path.
        **options: All other options of `SFA` but ``optimizer_state``: ``method`` and its parameters, ``anchor_dtype``,
            ``policy``, ``buffers``, ...

    Raises:
        MergeError: In ``fit``, before the first batch: what `SFA` raises; T is unknown, or not that of the checkpoint;
            the checkpoint has no anchor; a strategy that is not supported.
        CheckpointError: In ``fit``: the file of the anchor cannot be written, or is missing, or damaged.
        NonFiniteError: In ``fit``, at a merge: a parameter holds NaN or Inf; nothing was written.

    """

    def __init__(
        self,
        beta: float | Sequence[Mapping[str, Any]] | None = None,
        p: float | None = None,
        *,
        every: int | None = None,
        total_steps: int | None = None,
        anchor: str | Path = "memory",
        **options: Any,
    ) -> None:
        if "optimizer_state" in options:
            raise MergeError(
                "SFACallback: optimizer_state is not offered here, since Lightning steps the optimizers; they keep their state"
            )
        self._options = {"beta": beta, "p": p, "every": every, "anchor": anchor, **options}
        self._total_steps = total_steps
        self._module: LightningModule | None = None
        self._sfa: SFA | None = None
        self._restored: dict[str, Any] | None = None
        self._began = (0, 0)
        self._global_step = 0

    @property
    def sfa(self) -> SFA:
        """What merges: its counters, its anchor, its beta, which may be set between two merges.

        Raises:
            MergeError: No training has started.

        """
        if self._sfa is None:
            raise MergeError("SFACallback: there is nothing to see before training has started")
        return self._sfa

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Forget what another run has loaded."""
        self._restored = None

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Take the anchor; or the one of the checkpoint, if the run is resumed."""
        if _is_a(trainer.strategy, "DeepSpeedStrategy", "FSDPStrategy"):
            raise MergeError(
                f"SFACallback: {type(trainer.strategy).__name__} keeps the parameters where this callback does not reach them; "
                "train with DDP, or with ModelParallelStrategy and fully_shard"
            )
        restored = self._restored
        if restored is None and trainer.ckpt_path is not None:
            raise MergeError(
                f"SFACallback: {trainer.ckpt_path} has no anchor, since it was saved without this callback. To begin a task "
                "with its weights, load them (load_from_checkpoint) and leave ckpt_path away; to train on without merging, "
                "leave the callback away"
            )
        self._began = (trainer.global_step, trainer.current_epoch) if restored is None else restored["began"]
        total_steps = self._length(trainer)
        if restored is None:
            self._begin(pl_module, total_steps)
            self._global_step = trainer.global_step
        else:
            self._resume(pl_module, total_steps, restored, trainer.ckpt_path)
            self._restored = None
            self._count(trainer)  # in case that the checkpoint was written between the step and its merge

    def on_train_batch_start(self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int) -> None:
        """Take parameters into the anchor that another callback has unfrozen as the epoch began."""
        if batch_idx == 0:
            self.sfa.include()

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step that the batch completed, if any, and merge if it is time to."""
        self._count(trainer)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Merge for the last time, unless the last step was merged."""
        self.sfa.finalize()

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Forget what was loaded to evaluate."""
        if stage != "fit":
            self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `SFA` and where the task began."""
        if self._restored is not None or self._sfa is None:
            return self._restored or {}
        return {"sfa": self._sfa.state_dict(), "began": self._began, "global_step": self._global_step}

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Put a sharded anchor where all processes save their parts: beside the parameters."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            return
        anchor = state["sfa"]["anchor"]
        shards = {name: tensor for name, tensor in anchor.items() if is_sharded(tensor)}
        if any(map(is_sharded, checkpoint["state_dict"].values())):
            checkpoint["state_dict"].update({_BESIDE + name: tensor for name, tensor in shards.items()})
            saved = {name: tensor.dtype for name, tensor in shards.items()}
        else:  # the checkpoint is one file, with all parameters whole
            saved = {name: tensor.full_tensor() for name, tensor in shards.items()}
        checkpoint["callbacks"][self.state_key] = {**state, "sfa": {**state["sfa"], "anchor": {**anchor, **saved}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = state_dict

    def _begin(self, module: "LightningModule", total_steps: int | None) -> None:
        if self._sfa is not None and self._module is module:
            self._sfa.new_task(total_steps)
        else:
            self._sfa = SFA(module, total_steps=total_steps, **self._options)
            self._module = module

    def _resume(self, module: "LightningModule", total_steps: int | None, restored: dict[str, Any], path: Any) -> None:
        state = restored["sfa"]
        if state["total_steps"] != total_steps:
            raise MergeError(
                f"SFACallback: the checkpoint is of a task of {state['total_steps']} steps, but with this Trainer it has "
                f"{total_steps}; resume with the same data, max_epochs and max_steps, or pass total_steps"
            )
        sfa = SFA(module, total_steps=total_steps, resume=True, **self._options)
        # a checkpoint that was written after the last merge of a run that ended early says that the task is over
        sfa.load_state_dict({**state, "finished": False, "anchor": _complete(state["anchor"], module, path)})
        self._sfa, self._module = sfa, module
        self._global_step = restored["global_step"]

    def _count(self, trainer: "Trainer") -> None:
        if trainer.global_step > self._global_step:
            self._global_step = trainer.global_step
            self.sfa.step()

    def _length(self, trainer: "Trainer") -> int | None:
        """Return the number of steps of the task: those that were left to the Trainer when it began."""
        if self._total_steps is not None:
            return self._total_steps
        changing = any(_is_a(callback, "GradientAccumulationScheduler") for callback in trainer.callbacks)
        known = trainer.lightning_module.automatic_optimization and not changing
        steps, epochs = self._began
        limits: list[int] = []
        if known and trainer.max_steps != -1:
            limits.append(trainer.max_steps - steps)
        if known and trainer.max_epochs != -1 and trainer.num_training_batches != math.inf:
            each = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            limits.append(each * (trainer.max_epochs - epochs))
        if limits:
            return min(limits)
        if self._options["every"] is not None:
            return None
        raise MergeError(
            "SFACallback: Lightning can't know how many steps this training has (data without a length, manual "
            "optimization, or GradientAccumulationScheduler), and p is a part of them: pass total_steps, or every in place of p"
        )


def _complete(saved: Mapping[str, Any], module: "LightningModule", path: Any) -> dict[str, Any]:
    """Complete a saved anchor: with what lies beside the parameters, of which it has the dtypes, and sharded where they are."""
    before_write(module)
    like = parameters_of(module)
    dtypes = {name: dtype for name, dtype in saved.items() if isinstance(dtype, torch.dtype)}
    missing = {_BESIDE + name: torch.empty_like(like[name], dtype=dtype) for name, dtype in dtypes.items()}
    if missing:
        from torch.distributed.checkpoint import load

        load({"state_dict": missing}, checkpoint_id=path)
    anchor = {name: missing.get(_BESIDE + name, tensor) for name, tensor in saved.items()}
    return {
        name: distribute_tensor(tensor, leaf.device_mesh, leaf.placements)
        if isinstance(leaf := like.get(name), DTensor) and not is_sharded(tensor)
        else tensor
        for name, tensor in anchor.items()
    }


def _is_a(thing: Any, *names: str) -> bool:
    """Whether it is of a class of such a name, whichever of the two names Lightning goes by."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)
