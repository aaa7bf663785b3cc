"""Sequential Fine-tuning with Averaging in Hugging Face's Trainer, and in the trainers of TRL that are built on it."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DeepSpeedOptimizerWrapper
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.anchor import FINGERPRINT, File, following, metadata_of, previous
from mergekit_cl.adapters.torch.anchor_folder import Folder, keep, read_index
from mergekit_cl.errors import CheckpointError, MergeError, MismatchError

_logger = logging.getLogger(__name__)
_RECORD = "sfa"  # in TrainerState.stateful_callbacks; not the name of a class, or Trainer would build callbacks from it


class SFACallback(TrainerCallback):
    """Average the weights with those from before the task while `transformers.Trainer` trains: see `SFA` for the method.

    A call of ``Trainer.train`` is a task of ``state.max_steps`` steps, whether these are given or follow from epochs. After
    every k-th step, and after the last one, the weights are merged in ``on_step_end``: the evaluation and the checkpoint of
    this step have the merged weights. A step is an update that the Trainer counts in ``global_step``: accumulated gradients
    make one, and one that a gradient scaler skipped counts as well. The optimizer's state is left alone. Parameters that a
    callback before this one unfreezes as an epoch begins are taken up as they were while frozen. With DeepSpeed (ZeRO 1 to 3)
    the float32 masters are averaged, and the model follows them.

    **On the disk.** When the task begins, the anchor is written to ``<output_dir>/sfa-anchor/anchor.safetensors``, once (of
    sharded parameters that is a folder), and beside it ``sfa.json``, the settings for a reader. Checkpoints hold the
    fingerprint of their anchor (in ``trainer_state.json``), and what was merged. A run that is resumed from any of them
    continues bit for bit with the anchor of this fingerprint. Where a task begins in a folder with an earlier anchor, that one
    stays until the first step is done, and is then kept as ``anchor.previous.safetensors`` until the next, so that the
    checkpoints of the run before can still be resumed. Resuming needs the folder ``sfa-anchor``; take it along with the
    checkpoints. With ``policy="rolling"`` only checkpoints that are not older than the merge before the last can be resumed.

    **Settings on resuming** are those of this callback, not those of the checkpoint: where the method or its parameters
    differ, a warning is logged. Another ``max_steps`` moves the merges if these are set by p; this is refused, and the error
    says how to keep the earlier k with ``every``. Refused is, too, what would leave the last merge undone: a ``max_steps`` that
    the checkpoint has reached without being merged. When a finished run is resumed, the Trainer takes one step more; it is not
    merged, and `SFA` logs that the task is over. When ``auto_find_batch_size`` starts over, the task begins anew, with the
    weights as they are then.

    **A run that stops early** (early stopping is decided after the checkpoint of that step is written) is merged once more
    in ``on_train_end``, in memory: ``trainer.save_model()`` writes the result. Checkpoints stay as training left them, so that
    resuming one of them is still equal to a run that never stopped. With ``load_best_model_at_end`` the best checkpoint is
    left as it was saved; evaluate and save every k-th step if only merged weights should be candidates.

    **Trials** of a hyper-parameter search that share an output folder one after the other replace each other's anchor; trials
    side by side need ``anchor="memory"`` and an ``anchor_dir`` each.

    Args:
        beta: As in `SFA`: the weight of the anchor; 0.5 where it is not given. For method "sfa" alone.
        p: As in `SFA`: the part of the task between two merges; 0.25 where ``every`` is not given.
        every: As in `SFA`: the number k of steps between two merges, in place of p.
        method: As in `SFA`: any merge method for two models, or for one and a base.
        anchor: "file" reads the written anchor at each merge and needs no memory between them; "memory" holds it beside the
            parameters as well, "cpu" in memory of the CPU. All of them write it, for runs that are resumed.
        anchor_dir: The folder for the anchor, in place of ``<output_dir>/sfa-anchor``.
        **settings: What else `SFA` takes, parameters of the method included, but for ``total_steps``.

    Raises:
        MergeError: Both p and ``every``, or another ``anchor``. What `SFA` refuses is refused when training begins.

    Example::

        Trainer(model, arguments, train_dataset=data, callbacks=[SFACallback(beta=0.5, p=0.25)]).train()

    """

    def __init__(
        self,
        beta: Any = None,
        p: float | None = None,
        *,
        every: int | None = None,
        method: str = "sfa",
        anchor: Literal["file", "memory", "cpu"] = "file",
        anchor_dir: str | Path | None = None,
        **settings: Any,
    ) -> None:
        if anchor not in ("file", "memory", "cpu"):
            raise MergeError(
                f'SFACallback: anchor={anchor!r}: must be "file", "memory" or "cpu"; anchor_dir says where the file is'
            )
        if p is not None and every is not None:
            raise MergeError("SFACallback: both p and every are given; pass one of them")
        if "total_steps" in settings:
            raise MergeError("SFACallback: total_steps is the Trainer's max_steps, or follows from its epochs; leave it away")
        if settings.get("optimizer_state") == "reset":
            raise MergeError('SFACallback: optimizer_state="reset" is for SFA in a loop of your own; leave it away')
        self.sfa: SFA | None = None
        """The averaging of the present task, or of the last one; None before any."""
        self._kind, self._folder, self._file = anchor, anchor_dir, Path()
        self._waiting: Any = None  # the written anchor of "memory" or "cpu", until a step is done
        self._settings = {"beta": beta, "p": p, "every": every, "method": method, **settings}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the anchor and write it; or, where a run is resumed, find the anchor that it began with.

        Raises:
            MergeError: What `SFA` refuses; or the checkpoint was made without the callback, or with merges at other steps, or
                there is no step left for the last merge.
            CheckpointError: The anchor of the run that is resumed is missing or damaged.
            MismatchError: It is the anchor of another run, or of another model.

        """
        # absolute, as the program may change its folder while it trains
        self._file = file = Path(self._folder or Path(args.output_dir, "sfa-anchor")).absolute() / "anchor.safetensors"
        found = _find(file, state) if state.global_step else None
        self._waiting = None
        self.sfa = SFA(
            _source(kwargs["model"], kwargs["optimizer"]),
            total_steps=state.max_steps,
            anchor=file if self._kind == "file" else self._kind,
            resume=found is not None,
            **self._settings,
        )
        if found is None:
            self._record(state)
        else:
            self._resume(found, state)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take parameters into the anchor that a callback before this one has unfrozen as the epoch began."""
        if self._running().include():
            self._record(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step, and merge if it is time to.

        Raises:
            NonFiniteError: A parameter holds NaN or Inf at a merge; nothing was written.

        """
        sfa = self._running()
        self._settle()
        if sfa.step_count < state.global_step and sfa.step():  # a callback that was added twice is called twice
            _logger.info("SFA: merged after step %d of %d", state.global_step, state.max_steps)
            if sfa.policy == "rolling":
                self._record(state)
                self._settle()
            _note_merges(sfa, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Merge once more if training stopped early, and the best checkpoint was not loaded in its place."""
        reloaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not reloaded and self._running().finalize():
            _logger.info("SFA: merged after step %d, where training stopped", state.global_step)

    def _running(self) -> SFA:
        if self.sfa is None:
            raise MergeError("SFACallback: no anchor was taken, since the callback was added after training began")
        return self.sfa

    def _record(self, state: TrainerState) -> None:
        """Write the anchor; note in the Trainer's state, hence in each checkpoint, and for a reader, which one it is."""
        self._note(state, self._written(self._running()))

    def _note(self, state: TrainerState, fingerprint: str) -> None:
        """Note which anchor and which settings the run has: in the Trainer's state, and for a reader."""
        sfa = self._running()
        record: dict[str, Any] = {"fingerprint": fingerprint, "method": sfa.method, "parameters": sfa.parameters}
        record |= {"every": sfa.every, "total_steps": sfa.total_steps}
        if state.is_world_process_zero:
            self._file.with_name("sfa.json").write_text(json.dumps(record, indent=2) + "\n")
        state.stateful_callbacks[_RECORD] = record
        _note_merges(sfa, state)

    def _written(self, sfa: SFA) -> str:
        """Write the anchor to its file, unless it is there; keep another one that is there as the previous one."""
        by_file = self._kind == "file"
        if by_file and sfa.policy == "fixed":
            return str(sfa.state_dict()["fingerprint"])
        notes = {"steps_before": "0"}  # noted as SFA notes it
        if sfa.policy == "rolling" and sfa.last_merge_step:
            notes["step"] = str(sfa.last_merge_step)
        kept: Any = keep(sfa.anchor, {}, None, self._file, notes)
        if not by_file:  # SFA puts its own file in place
            self._waiting = kept
        return str(kept.fingerprint)

    def _settle(self) -> None:
        """Let the written anchor take its place, as a step is done: until then that of the run before may be needed."""
        if self._waiting is not None:
            self._waiting.settle()
            self._waiting = None

    def _resume(self, found: Path, state: TrainerState) -> None:
        """Go on with an anchor that was found, after what the checkpoint says was merged."""
        sfa, record = self._running(), state.stateful_callbacks[_RECORD]
        step, last = state.global_step, record["last_merge_step"]
        if self._settings["every"] is None and sfa.every != record["every"]:
            raise MergeError(
                f"SFACallback: the run that is resumed merged every {record['every']} steps, but p={sfa.p} means every "
                f"{sfa.every} now that max_steps is {sfa.total_steps} in place of {record['total_steps']}; pass "
                f"every={record['every']} to go on as before, or max_steps={record['total_steps']}"
            )
        if step >= state.max_steps and last != step:
            raise MergeError(
                f"SFACallback: the checkpoint of step {step} was last merged after step {last}, and "
                f"max_steps={state.max_steps} leaves no step for the last merge; pass max_steps={step + 1} or more"
            )
        before = {name: record[name] for name in ("method", "parameters")}
        now = json.loads(json.dumps({"method": sfa.method, "parameters": sfa.parameters}))
        if now != before:
            _logger.warning("SFA: the checkpoint was made with %s, but is resumed with %s, which is used now", before, now)
        sfa.resume_from(found, step)
        sfa.merges, sfa.last_merge_step = record["merges"], last
        if self._kind != "file":
            self._waiting = _opened(self._file, found)
        self._note(state, record["fingerprint"])
        _logger.info("SFA: resumed after step %d with the anchor in %s", step, found)


def _note_merges(sfa: SFA, state: TrainerState) -> None:
    """Note what was merged, for the checkpoint of this step: a run that is resumed may have other steps to merge at."""
    state.stateful_callbacks[_RECORD] |= {"merges": sfa.merges, "last_merge_step": sfa.last_merge_step}


def _source(model: torch.nn.Module, optimizer: Any) -> Any:
    """Return what SFA averages: the model; where DeepSpeed trains it, the masters that its optimizer keeps."""
    if not isinstance(optimizer, DeepSpeedOptimizerWrapper) or isinstance(optimizer.optimizer, torch.optim.Optimizer):
        return model
    from mergekit_cl.adapters.torch.deepspeed import Zero

    return Zero(model, optimizer.optimizer)


def _find(file: Path, state: TrainerState) -> Path:
    """Find the anchor that a checkpoint belongs to: the present one, that of the task before, or one not in its place yet."""
    record = state.stateful_callbacks.get(_RECORD)
    if record is None:
        raise MergeError(
            f"SFACallback: the checkpoint of step {state.global_step} was made without SFACallback, so its anchor, the weights "
            "before the task, is not known; begin the task anew, or resume without the callback"
        )
    known = {path: _fingerprint(path) for path in (file, previous(file), following(file)) if path.exists()}
    for path, fingerprint in known.items():
        if fingerprint == record["fingerprint"]:
            return path
    advice = "copy the folder of the run that made the checkpoint there, or name it with anchor_dir"
    if known:
        raise MismatchError(
            f"SFACallback: the anchor in {file.parent} is not that of the checkpoint of step {state.global_step} (its "
            f"fingerprint is {' or '.join(known.values())}, not {record['fingerprint']}): another run, or a later merge with "
            f'policy="rolling", has replaced it; {advice}'
        )
    raise CheckpointError(
        f"SFACallback: {file} is missing: the anchor, the weights before the task, without which the run cannot be resumed "
        f"after step {state.global_step}; {advice}"
    )


def _fingerprint(path: Path) -> str:
    """Read what the file of an anchor, or the folder of a sharded one, says about itself."""
    return str(read_index(path)["fingerprint"] if path.is_dir() else metadata_of(path)[FINGERPRINT])


def _opened(file: Path, found: Path) -> File | Folder:
    """Open an anchor that was found at a file or beside it, so that it can take its place."""
    return Folder(file, found, read_index(found)) if found.is_dir() else File(file, found, _fingerprint(found))
