"""Sequential Fine-tuning with Averaging in a PyTorch training loop."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mergekit_cl.adapters.torch import anchor_folder
from mergekit_cl.adapters.torch import lora as low_rank
from mergekit_cl.adapters.torch._graphs import refuse_in_capture
from mergekit_cl.adapters.torch.anchor import File, Memory, Place, check_path, fingerprint_of, write
from mergekit_cl.adapters.torch.anchor_folder import Anchor, Folder, keep, restored, saved
from mergekit_cl.adapters.torch.lora import Pair, pairs_of
from mergekit_cl.adapters.torch.parameters import (
    Source,
    after_write,
    before_write,
    buffers_of,
    is_sharded,
    parameters_of,
    place_of,
    skipped,
    source_of,
    stepping,
    trainable,
)
from mergekit_cl.adapters.torch.sharding import agreed
from mergekit_cl.api import prepare
from mergekit_cl.checkpoint.stored import is_source
from mergekit_cl.continual.schedule import MergeSchedule
from mergekit_cl.dtypes import dtype_name, type_of
from mergekit_cl.errors import MergeError, MismatchError, NonFiniteError, listing, unknown
from mergekit_cl.execute import Executor, rehearse
from mergekit_cl.filters import Parameters
from mergekit_cl.models import Leaf, open_model
from mergekit_cl.models.sharded import Shard, local_of, with_local
from mergekit_cl.out_of_core import span_of
from mergekit_cl.plan import plan
from mergekit_cl.registry import Method, find

_logger = logging.getLogger(__name__)
_OPTIONS = {
    "policy": ("fixed", "rolling"),
    "optimizer_state": ("keep", "reset"),
    "buffers": ("keep", "average"),
    "lora": ("exact", "svd"),
    "nonfinite": ("error", "allow"),
}
_COUNTERS = ("steps_before", "step_count", "merges", "last_merge_step")
_SETTINGS = ("method", "parameters", "seed", "p", "every", "total_steps", "policy", "optimizer_state", "buffers", "lora")
_STEPS_BEFORE = "steps_before"
_STEP = "step"  # of the task, whose merge has given an anchor that rolls
_QUANTISED = ("Params4bit", "Int8Params")  # of bitsandbytes, which packs codes into tensors


class SFA:
    """Sequential Fine-tuning with Averaging (Kleiman et al., https://arxiv.org/abs/2501.05559, Algorithm 1).

    While a model is trained on a task of T steps, every k = max(1, round(p * T)) steps and after step T its weights are
    averaged, in place, with the *anchor*: the weights that it had before the task, ``theta_o``::

        theta <- beta * theta_o + (1 - beta) * theta

    With ``method`` the merge is that of any other method: of the present weights, with the anchor as its base, where the
    method needs one (``ties``, ``dare_ties``, ``breadcrumbs``, ``task_arithmetic``, ...); else of the anchor and the present
    weights, in this order (``slerp``, ``karcher``, ``linear``, ...). It is what `mergekit_cl.merge` computes, in place:
    no parameter is replaced, so compiled models, CUDA graphs, and whatever else holds their memory go on.

    The anchor is taken when the object is built, and again by `new_task`. It holds the trainable parameters, tied ones once;
    frozen parameters cost nothing, and one that is frozen on the way is left alone from then on. One that is unfrozen on the
    way is taken up, as it was while frozen, by `attach`, or by `include`. A step is an update of the optimizer that the loop
    counts by calling `step`; with `attach`, one that the optimizer carried out (not one that a gradient scaler skipped, nor
    one that only accumulates gradients).

    Sharded parameters (FSDP, DeepSpeed's engine) are merged where they are: every process builds and steps its own SFA. What
    an optimizer keeps that gives the parameters anew at its next step (masters of apex's O2, schedule-free's z) does not follow
    a merge: pass these masters to SFA, or use another optimizer.

    Args:
        model_or_parameters: A ``torch.nn.Module``; or parameters, or pairs of name and parameter (then these are averaged);
            or DeepSpeed's engine.
        beta: The weight of the anchor, in [0, 1]; 0.5 where it is not given; or a list with filters. For method "sfa" alone.
        p: The part of the task between two merges, in (0, 1]; needs ``total_steps``. 0.25 where ``every`` is not given.
        total_steps: The number T of steps of the task. Without it (only with ``every``) there is no merge at the end, but
            that of `finalize`.
        every: The number k of steps between two merges, in place of p.
        method: Name of a merge method that can merge two models, or one model and a base.
        anchor: "memory" keeps it beside the parameters, "cpu" in the CPU's memory, from where it is copied part by part for
            each merge. A path (it ends in .safetensors) keeps it in a file, which is read at merges; between them it takes no
            memory. The anchor of sharded parameters is in a folder of `torch.distributed.checkpoint` there. It is there
            complete, or as it was, whenever the process dies. Another anchor at the path stays until
            the first step is counted, and then beside it (``NAME.previous.safetensors``) until the next new anchor.
        anchor_dtype: A dtype for the anchor; that of each parameter by default.
        policy: "fixed" keeps the anchor for the task. "rolling" makes the merged weights the anchor of the next merge.
        optimizer_state: "reset" clears what the optimizer keeps of merged parameters (moments, step counts) after each
            merge; it needs `attach`.
        buffers: "average" merges floating buffers of the module's state dict (running means) as parameters; integers never.
        lora: What to do with a pair of LoRA factors of which none is zero when the anchor is taken. "exact" refuses, at the
            first step (until then a saved anchor may be loaded): the average of two products is no product of their rank.
            "svd" takes the nearest one that is; the factors are others then, which the moments of an optimizer do not know
            (see ``optimizer_state``). Where one is zero, as in a fresh adapter, the average is exact: that factor is averaged,
            and the other left alone. Only method "sfa" merges pairs; factors of DoRA are refused.
        nonfinite: "error" reads the parameters once more at each merge, in search of NaN and infinities, before any of them is
            written. "allow" lets them through.
        seed: For methods with random masks. A merge after s steps, counted over all tasks, has the seed ``(seed << 32) + s``:
            masks are new each time, and the same in a run that is repeated or resumed.
        resume: True takes no anchor here, for a run that goes on: nothing is copied, hashed or written, and `load_state_dict`
            or `resume_from` has to bring the anchor before the first step.
        backend: As in `mergekit_cl.merge`.
        threads: As in `mergekit_cl.merge`.
        **parameters: Those of the method, as in `mergekit_cl.merge`: ``SFA(model, method="ties", density=0.2, every=100)``,
            filters included.

    Raises:
        UnknownNameError: No such method, or a parameter that it does not have.
        MergeError: p without ``total_steps``, both p and ``every``, a value out of range, a method that needs more models,
            nothing to train, or parameters of a kind that cannot be merged (quantised ones, LoRA pairs: see ``lora``).
        NonFiniteError: A parameter holds NaN or Inf (or does in ``anchor_dtype``).
        CheckpointError: The anchor cannot be written, or something that is no anchor is at its path.

    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> sfa = SFA(model, beta=0.5, p=0.25, total_steps=8)
    >>> for step in range(8):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    ...     if sfa.step():
    ...         print("merged after step", step + 1)
    merged after step 2
    merged after step 4
    merged after step 6
    merged after step 8

    """

    def __init__(
        self,
        model_or_parameters: torch.nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        beta: float | Sequence[Mapping[str, Any]] | None = None,
        p: float | None = None,
        total_steps: int | None = None,
        *,
        every: int | None = None,
        method: str = "sfa",
        anchor: Literal["memory", "cpu"] | str | Path = "memory",
        anchor_dtype: torch.dtype | None = None,
        policy: Literal["fixed", "rolling"] = "fixed",
        optimizer_state: Literal["keep", "reset"] = "keep",
        buffers: Literal["keep", "average"] = "keep",
        lora: Literal["exact", "svd"] = "exact",
        nonfinite: Literal["error", "allow"] = "error",
        seed: int = 0,
        resume: bool = False,
        backend: str = "auto",
        threads: int | None = None,
        **parameters: Any,
    ) -> None:
        self._source = source_of(model_or_parameters, "SFA")
        if beta is not None or method == "sfa":
            parameters["beta"] = 0.5 if beta is None else beta
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise MergeError(f"SFA: seed={seed!r}: must be an integer")
        self.method, self.parameters, self.seed = method, _check_parameters(method, parameters), int(seed)
        if p is not None and every is not None:
            raise MergeError("SFA: both p and every are given; pass one of them")
        self.p = 0.25 if p is None and every is None else p
        self._every = every
        self._place = _place(anchor)
        self._anchor_dtype = None if anchor_dtype is None else _dtype(anchor_dtype)
        self.policy, self.optimizer_state, self.buffers, self.lora = policy, optimizer_state, buffers, lora
        _check_options(policy=policy, optimizer_state=optimizer_state, buffers=buffers, lora=lora, nonfinite=nonfinite)
        if buffers == "average" and isinstance(self._source, dict):
            raise MergeError('SFA: buffers="average" needs the module, which has the buffers; got parameters')
        self._nonfinite: Literal["error", "allow"] = nonfinite
        self._backend, self._threads = backend, threads
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []
        self._prepared: tuple[Any, Executor] | None = None
        self._repeatable: tuple[list[Any], Executor, dict[str, Leaf]] | None = None
        self._recorded = False
        self.steps_before = self.step_count = 0
        self.finished = False
        self._refused: MergeError | None = None
        self._taken: Anchor | None = None
        self._begin_task(_schedule(self.p, every, total_steps), 0, resumable=True, take=not resume)

    def new_task(self, total_steps: int | None = None) -> None:
        """Begin a task: the present weights become the anchor, and steps are counted from 0 again.

        An anchor in a file takes the place of the one before, which is kept beside it until the next.

        Args:
            total_steps: The number T of steps of the new task; needed where merges are set by p.

        Raises:
            MergeError: As for the constructor; the running task is then left as it is.

        """
        self._check_anchored()
        self._begin_task(_schedule(self.p, self._every, total_steps), self.steps_before + self.step_count)
        self._refused = None
        self._kept.settle()

    def step(self) -> bool:
        """Count a step of the optimizer, and merge if it is time to. Call it after ``optimizer.step()``.

        Returns:
            Whether the parameters were averaged with the anchor (in place).

        Raises:
            NonFiniteError: It is time to merge, but a parameter holds NaN or Inf; nothing was written. The step counts, so
                that a loop which goes on merges at the steps that it would have merged at.
            CheckpointError: The anchor's file is gone, or damaged; nothing was written.
            MergeError: SFA is attached to an optimizer, or a parameter has become trainable since the task began; or there is
                no anchor yet (``resume=True``).

        """
        if self._hooks:
            raise MergeError(
                "SFA: attached to an optimizer, which counts the steps itself; leave step() away, or detach() first"
            )
        return self._count()

    def finalize(self) -> bool:
        """End a task whose loop has ended, perhaps before step T: merge now, unless there is nothing to merge.

        There is nothing where no step was done, where the last step was merged, and where the task is over. Afterwards the task
        is over: until `new_task` steps are counted, but nothing is merged.

        Returns:
            Whether the parameters were averaged with the anchor (in place).

        Raises:
            MergeError: As `step`; the task is not over then.

        """
        self._check_anchored()
        over = self.finished or (self.total_steps is not None and self.step_count >= self.total_steps)
        merged = not over and self.last_merge_step != self.step_count
        if merged:
            self._check_ready()
            self._merge(self.step_count)
        self.finished = True
        return merged

    def include(self) -> list[str]:
        """Take parameters into the anchor that were unfrozen since the task began; between unfreezing and their next step.

        As long as a parameter is frozen it equals its anchor, so nothing is lost. With `attach` this is done before each
        step of the optimizer.

        Returns:
            The names of the parameters.

        Raises:
            MergeError: They are of a kind that cannot be merged.
            NonFiniteError: One of them holds NaN or Inf.

        """
        leaves = self._leaves()
        _, _, late = self._divided(leaves)
        added = self._chosen({name: leaves[name] for name in late})
        if added:
            self._check_anchor(added)
            self._update(added)
        return list(added)

    def capture(self) -> "SFA":
        """Record the merge as a CUDA graph, which is replayed at each merge from now on; return self. Nothing is merged here.

        A merge is one launch then, however many tensors there are; it waits for the GPU once, for what the check has found, and
        with ``nonfinite="allow"`` not at all. It writes the same bits, and raises the same errors.

        The graph is one of the memory that parameters and anchor lie in now. Where that has changed, or a setting has, as by
        `new_task`, `load_state_dict` or ``beta``, the next merge records it anew; if the merge has become one that no graph can
        hold, it is done without one from then on, and the log says so. A state does not hold the graph, and neither does a copy
        or a pickle, for which this is to be called again.

        Raises:
            MergeError: A graph cannot hold the merge: it takes more than weighted sums of whole tensors (a method that surveys,
                or draws masks; pairs of LoRA factors with ``lora="svd"``); parameters are sharded, not contiguous, or not on a
                GPU; the anchor is not beside them in memory; or a graph is being captured already.

        """
        self._check_ready()
        plain, pairs, _ = self._divided(self._leaves())
        beside = self._kept.beside(plain) if isinstance(self._kept, Memory) else None
        obstacles = {
            f"{self.method} does not compute the same weighted sums each time": not find(self.method).orderless,
            'products of LoRA factors are decomposed on the way (lora="svd")': bool(pairs),
            'the anchor does not lie beside the parameters; build SFA with anchor="memory"': beside is None,
        }
        for obstacle in [obstacle for obstacle, stands in obstacles.items() if stands]:
            raise MergeError(f"SFA.capture: a CUDA graph cannot hold this merge: {obstacle}")
        assert beside is not None
        self._executor(beside, plain, lasting=True).record()
        self._recorded = True
        return self

    def attach(self, optimizer: torch.optim.Optimizer) -> "SFA":
        """Call `step` after each step of the optimizer, and `include` before it, by hooks; return self.

        An optimizer that wraps another one (of accelerate, or Lightning) is unwrapped.

        Raises:
            MergeError: It is attached already, or this is no optimizer of PyTorch, or DeepSpeed's, or one of other parameters.

        """
        if self._hooks:
            raise MergeError("SFA: attached to an optimizer already; detach() first")
        inner = stepping(optimizer, self._source, "SFA")
        leaves = parameters_of(self._source)
        # parts of flattened parameters (FSDP1) are not those that the optimizer has
        if not _of_optimizer(inner, leaves) and not any(isinstance(leaf, Shard) for leaf in leaves.values()):
            raise MergeError(
                f"SFA: the optimizer has none of its {len(leaves)} parameters; build SFA of the parameters that the optimizer "
                "updates, after the model has been wrapped or moved"
            )
        self._optimizer = inner
        self._hooks = [
            inner.register_step_pre_hook(lambda *_: self._include_new()),
            inner.register_step_post_hook(self._after_step),
        ]
        return self

    def detach(self) -> None:
        """Take the hooks of `attach` away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer = [], None

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters and the anchor: numbers, strings, tensors (not copied), safe for ``weights_only=True``.

        Of an anchor in a file it holds the fingerprint and no tensors, unless the policy is "rolling", which moves the file on.
        Tensors of sharded parameters are sharded, for `torch.distributed.checkpoint`.
        """
        rolling = self.policy == "rolling"
        on_disk = not isinstance(self._kept, Memory) and not rolling
        anchor = {} if on_disk else self.anchor
        if rolling:
            anchor = {name: with_local(leaf, local_of(leaf).clone()) for name, leaf in anchor.items()}
        return {
            **{name: _plain(getattr(self, name)) for name in (*_SETTINGS, *_COUNTERS, "finished")},
            "fingerprint": None if isinstance(self._kept, Memory) or rolling else self._kept.fingerprint,
            "anchor": saved(anchor),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; settings are taken over too.

        The parameters themselves are the model's to load, before or after. An anchor in a file is found by its fingerprint at
        the path of this object, or in one of the files beside it.

        Raises:
            MismatchError: The anchor in the state is of another model; nothing was loaded.
            CheckpointError: The file of the anchor is missing or damaged, or is another one.
            MergeError: The state is not one of SFA.

        """
        _check_state(state)
        parameters = _check_parameters(state["method"], state["parameters"])
        schedule = MergeSchedule(state["every"], state["total_steps"])
        known, fingerprint = self._known(), state["fingerprint"]
        kept: Anchor
        if fingerprint is None:
            anchor = restored(state["anchor"], known)
            self._check_match(anchor, state["buffers"])
            step = state["last_merge_step"] if state["policy"] == "rolling" else 0
            kept = keep(anchor, known, None, self._place, self._notes(state["steps_before"], step))
        elif isinstance(self._place, Path):
            kept = anchor_folder.find(self._place, fingerprint, known)
            self._check_match(kept.described, state["buffers"])
        else:
            raise MergeError(
                "SFA: the state does not hold its anchor, which is in a file: build SFA with anchor= the path of that file"
            )
        self._replace(kept)
        self._refused = None
        self.method, self.parameters, self.seed = state["method"], parameters, state["seed"]
        self.p = state["p"]
        self._every = None if self.p is not None else schedule.every
        self.policy, self.optimizer_state = state["policy"], state["optimizer_state"]
        self.buffers, self.lora = state["buffers"], state["lora"]
        self._begin(schedule, *(state[name] for name in _COUNTERS), finished=state["finished"])

    def save_anchor(self, path: str | Path) -> str:
        """Write the anchor to a safetensors file, for `resume_from`; nothing is written where that file holds it already.

        The anchor of sharded parameters is written by all processes, to a folder of `torch.distributed.checkpoint`.

        The file is there complete, or as it was before, whenever the process dies.

        Args:
            path: The file; folders above it are made.

        Returns:
            The fingerprint: a hash of names, dtypes, shapes and bytes, which stands in the file's metadata too.

        Raises:
            CheckpointError: It cannot be written, or something that is no anchor is there.

        """
        self._check_anchored()
        if self._refused is not None:
            raise self._refused
        path, kept, notes = Path(path), self._kept, self._notes(self.steps_before, self._step_of_anchor)
        anchor = self.anchor if isinstance(kept, Memory) else None
        sharded = isinstance(kept, Folder) if anchor is None else any(map(is_sharded, anchor.values()))
        if sharded:
            return anchor_folder.save_once(path, self.anchor, notes)
        check_path(path)
        leaves = kept.stored if isinstance(kept, File) else self.anchor
        fingerprint = kept.fingerprint if isinstance(kept, File) else fingerprint_of(leaves)
        write(path, leaves, None, fingerprint, notes)
        return fingerprint

    def resume_from(self, path: str | Path, step: int) -> None:
        """Go on with a task after so many of its steps, from an anchor that `save_anchor` wrote, or ``anchor=path``.

        For loops that keep no `state_dict`: settings are those of this object. The merge that was due after that step counts as
        done, as the weights were saved after it. The parameters are the model's to load, before or after.

        Args:
            path: The file; for sharded parameters, the folder.
            step: How many steps of the task were done.

        Raises:
            CheckpointError: The file is missing, damaged, or not an anchor.
            MismatchError: It is the anchor of another model: names, shapes or dtypes differ; or, for policy "rolling", that of
                another merge than the last one up to this step.
            MergeError: The number of steps is none.

        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise MergeError(f"SFA: step={step!r}: must be a number of steps, 0 or more")
        known = self._known()
        found = anchor_folder.find(Path(path), None, known)
        self._check_match(found.described, self.buffers, by_dtype=True)
        notes = {key: value for key, value in found.notes.items() if key in (_STEPS_BEFORE, _STEP)}
        expected = self._schedule.last(step) if self.policy == "rolling" else 0
        if int(notes.get(_STEP, 0)) != expected:
            raise MismatchError(
                f"SFA: the anchor at {path} is that of step {notes.get(_STEP, 0)} of the task, but to go on after step {step} "
                f'with policy="{self.policy}" takes that of step {expected}; pass the file that was saved then'
            )
        if self._place != Path(path):
            self._replace(keep(self._read(found), known, None, self._place, notes))
        else:
            self._replace(found)
        self._refused = None
        before = int(notes.get(_STEPS_BEFORE, 0))
        self._begin(self._schedule, before, step, self._schedule.merges(step), self._schedule.last(step))

    @property
    def anchor(self) -> dict[str, Leaf]:
        """The weights that the parameters are averaged with, by name; of an anchor in a file, they are read into memory."""
        return self._read(self._kept)

    @property
    def beta(self) -> float:
        """The weight of the anchor, for method "sfa"; it may be set between two merges."""
        if self.method != "sfa":
            raise AttributeError(f"{self.method} has no beta; its parameters are in SFA.parameters")
        if isinstance(self.parameters["beta"], list):
            raise AttributeError("beta is not the same for all tensors; its filters are in SFA.parameters")
        return float(self.parameters["beta"])

    @beta.setter
    def beta(self, beta: float) -> None:
        self.parameters = _check_parameters(self.method, {"beta": beta})

    @property
    def every(self) -> int:
        """Steps between two merges."""
        return self._schedule.every

    @property
    def total_steps(self) -> int | None:
        """Steps of the task."""
        return self._schedule.total_steps

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not what was prepared for the memory of these very parameters, nor hooks and graphs."""
        prepared = {"_prepared": None, "_repeatable": None, "_recorded": False}
        return {**self.__dict__, **prepared, "_hooks": [], "_optimizer": None, "_seen": set()}

    def __repr__(self) -> str:
        settings = [] if self.method == "sfa" else [f"method={self.method!r}"]
        settings += [f"{name}={value!r}" for name, value in self.parameters.items()]
        return (
            f"SFA({', '.join(settings)}, every={self.every}, total_steps={self.total_steps}, step={self.step_count}, "
            f"{'no anchor yet' if self._taken is None else f'{len(self._taken.names)} tensors'})"
        )

    # Counting

    def _begin_task(self, schedule: MergeSchedule, before: int, *, resumable: bool = False, take: bool = True) -> None:
        """Take an anchor, and start to count; if anything is wrong, nothing has changed.

        What a saved anchor may take the place of, if it is ``resumable``, is only refused when it is used.
        """
        leaves = self._leaves()
        if not any(leaf.requires_grad for leaf in leaves.values()):
            raise MergeError(
                "SFA: no parameter requires a gradient, so there is nothing to average; unfreeze before building SFA"
            )
        chosen = self._chosen(leaves, resumable=resumable)
        plain = {name: leaf for name, leaf in chosen.items() if name not in _names(self._products(chosen, chosen))}
        if plain:
            rehearse(self._executor(plain, plain).plan)  # finds what cannot be merged before training
        if take:
            self._check_anchor(chosen)
            self._kept = keep(chosen, chosen, self._anchor_dtype, self._place, self._notes(before))
        self._begin(schedule, before)

    def _begin(
        self, schedule: MergeSchedule, before: int, step: int = 0, merges: int = 0, last: int = 0, *, finished: bool = False
    ) -> None:
        self._schedule, self.steps_before = schedule, before
        self.step_count, self.merges, self.last_merge_step, self.finished = step, merges, last, finished
        self._prepared = None
        self._warned = False
        self._seen: set[int] = set()

    def _check_anchored(self) -> None:
        """Refuse to go on before a run that was to be resumed has been."""
        if self._taken is None:
            raise MergeError(
                "SFA: built with resume=True, and has no anchor yet; call load_state_dict() or resume_from() before the first "
                "step, or leave resume away to begin a task"
            )

    def _check_ready(self) -> None:
        """Refuse to go on with what the constructor could not refuse."""
        refuse_in_capture("SFA")
        self._check_anchored()
        if self._refused is not None:
            self._kept.drop()
            raise self._refused
        if self.optimizer_state == "reset" and self._optimizer is None:
            raise MergeError('SFA: optimizer_state="reset" needs the optimizer: call attach(optimizer) in place of step()')

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not skipped(optimizer):
            self._count()

    def _count(self) -> bool:
        self._check_ready()
        self._kept.settle()
        self.step_count = step = self.step_count + 1
        over = self.finished or (self.total_steps is not None and step > self.total_steps)
        if over and not self._warned:
            self._warned = True
            _logger.warning("SFA: the task is over after %d steps; until new_task() nothing is merged", step - 1)
        if not over and self._schedule.due(step):
            self._merge(step)
        return self.last_merge_step == step

    def _include_new(self) -> None:
        """Take up parameters that were unfrozen since the last step; it costs a look at each that the optimizer has."""
        assert self._optimizer is not None
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad}
        if not trained <= self._seen:
            self.include()
            self._seen = trained

    # Merging

    @torch.no_grad()
    def _merge(self, step: int) -> None:
        """Average the parameters with the anchor, in place."""
        try:
            merged = self._merged_as_before() or self._merged_anew()
        except NonFiniteError as error:
            raise NonFiniteError(f"SFA, step {step}: nothing was merged\n{error}") from None
        after_write(self._source)
        self.merges, self.last_merge_step = self.merges + 1, step
        if self.policy == "rolling":
            self._roll(merged)
        if self.optimizer_state == "reset":
            self._reset(merged)

    def _merged_as_before(self) -> dict[str, Leaf]:
        """Merge what was merged the last time, by the same launches, if a look at the model finds it as it was; else nothing.

        It finds out in a tenth of the time that it takes to collect the tensors by their names, during which a GPU would wait.
        """
        if self._prepared is None or self._repeatable is None:
            return {}
        (settings, *_), executor = self._prepared
        outline, prepared, merged = self._repeatable
        if executor is not prepared or settings != _plain(self.parameters) or outline != _outline_of(self._source):
            return {}
        executor.run()
        return merged

    def _merged_anew(self) -> dict[str, Leaf]:
        """Merge what is to be merged now; return it by name."""
        leaves = self._leaves()
        plain, pairs, late = self._divided(leaves)
        if late:
            raise MergeError(
                f'SFA: "{late[0]}" was frozen, or not there, when the task began, and has no anchor; call new_task() when '
                "parameters are unfrozen; or, to go on with the task, include() before the optimizer moves them (attach() does)"
            )
        factors = self._averaged_pairs(pairs, leaves)
        if plain:
            self._average(plain)
        for name, values in factors.items():
            leaves[name].copy_(values)
        merged = {**plain, **{name: leaves[name] for name in factors}}
        self._repeatable = None
        if self._prepared is not None and not factors and find(self.method).orderless:
            outline, executor = _outline_of(self._source), self._prepared[1]
            self._repeatable = (outline, executor, merged) if outline and not executor.shares else None
        return merged

    def _average(self, current: dict[str, Leaf]) -> None:
        """Merge the anchor into these tensors, in place."""
        if isinstance(self._kept, Folder):
            self._executor(self._kept.tensors(current), current).run()
            return
        beside = self._kept.beside(current)
        if beside is not None:
            executor = self._executor(beside, current, lasting=True)
            if self._recorded and not executor.is_recorded:
                self._record_again(executor)
            executor.run()
            return
        spoiled = self._spoiled(current)  # in all of them, before any is written
        if spoiled:
            raise NonFiniteError(listing([f'current, tensor "{name}": NaN or Inf' for name in spoiled]))
        for part in self._kept.brought(current, whole=self.parameters.get("scope") == "model"):
            self._executor(part, {name: current[name] for name in part}).run()

    def _record_again(self, executor: Executor) -> None:
        """Record a merge of other memory, or by other settings, than `capture` did."""
        try:
            executor.record()
        except (MergeError, RuntimeError) as error:  # PyTorch's own are the latter: another capture is under way, memory
            self._recorded = False
            _logger.warning("SFA: merges are not replayed from a CUDA graph any more\n%s", error)

    def _executor(self, anchor: Mapping[str, Any], current: dict[str, Leaf], *, lasting: bool = False) -> Executor:
        """Prepare the merge of an anchor into tensors; a ``lasting`` one is kept as long as these stay where they are."""
        anchor = {name: anchor[name] for name in current}
        chosen = find(self.method)
        # the masks of a method that draws some are new at every step
        key = [
            _plain(self.parameters),
            not chosen.orderless and self.step_count,
            *((name, place_of(leaf), leaf.dtype, leaf.device) for name, leaf in current.items()),
        ]
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1]
        based = chosen.base == "required"
        models, base = ([current], anchor) if based else ([anchor, current], None)
        labels = ["current", "anchor"] if based else ["anchor", "current"]
        seed = (self.seed << 32) + self.steps_before + self.step_count
        if any(map(is_source, anchor.values())):
            executor = self._from_file(chosen, models, base, current, labels, seed)
            in_place = all(leaf.is_contiguous() for leaf in current.values())
        else:
            executor, _ = prepare(
                chosen, models, base, current,
                backend=self._backend, threads=self._threads, nonfinite=self._nonfinite, parameters=self.parameters,
                labels=labels, constant=self._constant(labels), seed=seed, others=list(self._known()),
            )  # fmt: skip
            in_place = executor.reads_in_place
        if lasting:
            self._prepared = (key, executor) if in_place else None
        return executor

    def _from_file(
        self,
        chosen: Method,
        models: list[dict[str, Any]],
        base: Mapping[str, Any] | None,
        current: dict[str, Leaf],
        labels: list[str],
        seed: int,
    ) -> Executor:
        """Prepare a merge that reads the anchor from its file a window at a time."""
        planned = plan(
            chosen,
            [open_model(model, label) for model, label in zip(models, labels, strict=False)],
            None if base is None else open_model(base, "anchor"),
            open_model(current, "out"),
            parameters=self.parameters,
            labels=labels,
            seed=seed,
            in_place=True,
            check_first=True,
            names=list(self._known()),
        )
        spans = {item.name: tuple(map(span_of, item.leaves)) for item in planned.items}
        return Executor(
            planned, backend=self._backend, threads=self._threads, nonfinite=self._nonfinite, spans=spans,
            constant=self._constant(labels),
        )  # fmt: skip

    def _constant(self, labels: list[str]) -> frozenset[int]:
        """Number the input that never changes, if the anchor does not."""
        if self.policy == "rolling":
            return frozenset()
        return frozenset({-1 if labels[-1] == "anchor" else 0})

    def _averaged_pairs(self, pairs: Sequence[Pair], leaves: Mapping[str, Leaf]) -> dict[str, torch.Tensor]:
        """Average products of factors with those of the anchor; return the new factors by name."""
        if not pairs:
            return {}
        anchor = self.anchor
        parameters = Parameters(find(self.method), self.parameters, 2, [pair.b for pair in pairs], list(self._known()))
        factors: dict[str, torch.Tensor] = {}
        for pair in pairs:
            current = tuple(leaves[name].detach() for name in pair)
            kept = tuple(anchor[name].to(leaves[name].device) for name in pair)
            spoiled = [name for name, values in zip(pair * 2, current + kept, strict=True) if not values.isfinite().all()]
            if spoiled:
                raise NonFiniteError(f'"{spoiled[0]}" holds NaN or Inf, so its product has no singular values')
            new = low_rank.averaged(parameters.at(pair.b)["beta"], kept, current)
            factors.update(zip(pair, new, strict=True))
        return factors

    def _reset(self, merged: Mapping[str, Leaf]) -> None:
        """Clear what the optimizer keeps of these parameters."""
        assert self._optimizer is not None
        for parameter in _of_optimizer(self._optimizer, merged):
            self._optimizer.state.pop(parameter, None)

    # What is averaged

    def _known(self) -> dict[str, Leaf]:
        """All parameters and floating buffers by name."""
        before_write(self._source)
        return {**parameters_of(self._source), **buffers_of(self._source)}

    def _leaves(self) -> dict[str, Leaf]:
        """What could be averaged now: trainable parameters, and buffers if they are."""
        before_write(self._source)
        return {**trainable(self._source), **(buffers_of(self._source) if self.buffers == "average" else {})}

    def _chosen(self, leaves: dict[str, Leaf], *, resumable: bool = False) -> dict[str, Leaf]:
        """Leave out what needs no anchor, the partner of a LoRA factor that is zero; refuse what cannot be averaged."""
        problems = [
            f'SFA: "{name}" is {type(leaf).__name__}: quantised weights cannot be averaged; freeze it, and train an '
            "adapter beside it"
            for name, leaf in leaves.items()
            if type(leaf).__name__ in _QUANTISED
        ]
        if problems:
            raise MergeError(listing(problems))
        low_rank.refuse_other_products(self._source)
        low_rank.refuse_magnitudes(parameters_of(self._source), leaves)
        pairs = pairs_of(leaves)
        if pairs and self.method != "sfa":
            raise MergeError(
                f'SFA: {self.method} cannot merge LoRA factors ("{pairs[0].b}"), whose products are the weights; only '
                'method "sfa" can: choose it, or merge whole models'
            )
        if pairs and self.policy == "rolling" and self.lora == "exact":
            raise MergeError(
                'SFA: policy="rolling" averages products of LoRA factors from the second merge on, which is no product of '
                'their rank; pass lora="svd" for the nearest one, or policy="fixed"'
            )
        if pairs and self.policy == "fixed":
            factors = [(name, leaves[name]) for pair in pairs for name in pair]
            moved = set(agreed([name for name, leaf in factors if local_of(leaf).any()], leaves.values()))
            zeros = [(pair, name) for pair in pairs for name in (pair.b, pair.a) if name not in moved]
            still = {pair: pair.other(name) for pair, name in reversed(zeros)}
            leaves = {name: leaf for name, leaf in leaves.items() if name not in still.values()}
            pairs = [pair for pair in pairs if pair not in still]
            if pairs and self.lora == "exact":
                refused = MergeError(
                    f'SFA: neither "{pairs[0].a}" nor "{pairs[0].b}" is zero: the adapter has been trained before (or was '
                    "initialised so, as by PiSSA and OLoRA), and the average of two products of LoRA factors is no product of "
                    "their rank; merge it into its base and add a fresh one (PEFT: merge_and_unload()), or pass "
                    'lora="svd" for the nearest one that is'
                )
                if not resumable:
                    raise refused
                self._refused = refused
        if self.lora == "svd" and any(is_sharded(leaves[name]) for name in _names(pairs)):
            raise MergeError(
                'SFA: lora="svd" needs whole factors, but they are sharded; merge the adapter into its base instead'
            )
        return leaves

    def _divided(self, leaves: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], list[Pair], list[str]]:
        """Divide tensors: what is averaged by itself, pairs whose products are, and names of those that have no anchor."""
        kept = self._kept.names
        products = self._products(kept, leaves)
        together = _names(pairs_of(kept))
        alone = {pair.other(name) for pair in pairs_of({**leaves, **dict.fromkeys(kept)}) for name in pair if name in kept}
        plain = {name: leaf for name, leaf in leaves.items() if name in kept and name not in together}
        return plain, products, [name for name in leaves if name not in kept and name not in alone]

    def _products(self, kept: Iterable[str], leaves: Iterable[str]) -> list[Pair]:
        """Pairs of which both factors have an anchor, and are trained."""
        trained = set(leaves)
        return [pair for pair in pairs_of(kept) if trained.issuperset(pair)]

    # Anchors

    @property
    def _kept(self) -> Anchor:
        self._check_anchored()
        assert self._taken is not None
        return self._taken

    @_kept.setter
    def _kept(self, kept: Anchor) -> None:
        self._taken = kept

    @property
    def _step_of_anchor(self) -> int:
        """The step of the task whose merge has given the anchor; 0 where it is what the task began with."""
        return self.last_merge_step if self.policy == "rolling" else 0

    def _notes(self, before: int, step: int = 0) -> dict[str, str]:
        """What is written down beside an anchor."""
        return {_STEPS_BEFORE: str(before), **({_STEP: str(step)} if step else {})}

    def _read(self, kept: Anchor) -> dict[str, Leaf]:
        """Return all tensors of an anchor, read into memory if they are not there."""
        if isinstance(kept, File):
            return kept.tensors()
        known = self._known()
        return kept.leaves(known) if isinstance(kept, Memory) else kept.tensors({name: known[name] for name in kept.names})

    def _roll(self, merged: Mapping[str, Leaf]) -> None:
        """Make the merged weights the anchor, if its dtype can hold them."""
        spoiled = self._spoiled(merged, self._anchor_dtype) if self._anchor_dtype is not None else []
        if spoiled:
            raise NonFiniteError(
                f'SFA, step {self.step_count}: the weights were merged, but "{spoiled[0]}" does not fit into an anchor of '
                f"{dtype_name(self._anchor_dtype)}, which is left as it was; build SFA with a wider anchor_dtype"
            )
        self._update(merged)

    def _update(self, leaves: Mapping[str, Leaf]) -> None:
        """Give the anchor the values of these tensors; it takes up those that it did not have."""
        kept, dtype, notes = self._kept, self._anchor_dtype, self._notes(self.steps_before, self._step_of_anchor)
        if isinstance(kept, Memory):
            if not all(name in kept.names for name in leaves):
                self._prepared = None
            kept.take(leaves, dtype, self._place)
            return
        self._prepared = None
        if isinstance(kept, File):
            self._kept = kept.updated(leaves, dtype, notes)
        else:
            self._kept = kept.updated(leaves, self._known(), dtype, notes)

    def _replace(self, kept: Anchor) -> None:
        """Take another anchor; one on a disk that has not taken its place, and is not this one, is not needed any more."""
        before = self._taken
        if isinstance(before, File | Folder) and (isinstance(kept, Memory) or kept.at != before.at):
            before.drop()
        self._kept = kept

    def _check_anchor(self, leaves: Mapping[str, Leaf]) -> None:
        """Refuse NaN and infinities in what is to be an anchor, in its dtype; all processes do if one finds some."""
        spoiled = self._spoiled(leaves, self._anchor_dtype)
        if spoiled:
            raise NonFiniteError(listing([f'SFA: the anchor of "{name}" would hold NaN or Inf' for name in spoiled]))

    def _spoiled(self, leaves: Mapping[str, Leaf], dtype: torch.dtype | None = None) -> list[str]:
        """Name the tensors that hold NaN or Inf, or would in a dtype; none where that is allowed."""
        if self._nonfinite == "allow":
            return []
        finite = [local_of(leaf).to(dtype or leaf.dtype).isfinite().all() for leaf in leaves.values()]
        flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []  # read all at once
        return agreed([name for name, flag in zip(leaves, flags, strict=True) if not flag], leaves.values())

    def _check_match(self, saved: Mapping[str, Any], buffers: str, *, by_dtype: bool = False) -> None:
        """Check that a saved anchor is one of this model."""
        known = self._known()
        leaves = {**trainable(self._source), **(buffers_of(self._source) if buffers == "average" else {})}
        other = [name for name, tensor in saved.items() if isinstance(tensor, Mapping)]
        if agreed(other, known.values()):
            raise MismatchError(
                f'SFA: "{other[0] if other else next(iter(saved))}": the saved anchor is of other shards than the model has; '
                "load it in as many processes as saved it"
            )
        alone = {pair.other(name) for pair in pairs_of(leaves) for name in pair if name in saved}
        problems = [f'the saved anchor has "{name}", which the model lacks' for name in saved if name not in known]
        problems += [f'the saved anchor lacks "{name}"' for name in leaves if name not in saved and name not in alone]
        problems += [
            f'"{name}": the saved anchor has shape {tuple(tensor.shape)}, the model {tuple(known[name].shape)}'
            for name, tensor in saved.items()
            if name in known and tuple(tensor.shape) != tuple(known[name].shape)
        ]
        tensors = {name: tensor for name, tensor in saved.items() if isinstance(tensor, torch.Tensor | Shard)}
        problems += [
            f'"{name}": the saved anchor is sharded in another way than the model; load it with torch.distributed.checkpoint'
            for name, tensor in tensors.items()
            if name in known and local_of(tensor).shape != local_of(known[name]).shape and tensor.shape == known[name].shape
        ]
        if by_dtype:
            expected = {name: dtype_name(self._anchor_dtype or leaf.dtype) for name, leaf in known.items()}
            problems += [
                f'"{name}": the saved anchor is {tensor.dtype}, that of the model would be {expected[name]}'
                for name, tensor in saved.items()
                if name in known and tensor.dtype != expected[name]
            ]
        if self._nonfinite == "error":
            problems += [
                f'"{name}": the saved anchor holds NaN or Inf'
                for name, tensor in tensors.items()
                if not local_of(tensor).isfinite().all()
            ]
        problems = agreed(problems, known.values())
        if problems:
            raise MismatchError(listing([f"SFA: {problem}" for problem in problems]))


def _outline_of(source: Source) -> list[Any]:
    """Return what differs where a model has other tensors than it had, or has them elsewhere, or trains others.

    It is empty for what holds tensors in other ways than a module or a mapping does, or shards them.
    """
    tensors: list[torch.Tensor | None] = []
    if isinstance(source, dict):
        tensors += source.values()
    modules = [source] if isinstance(source, torch.nn.Module) else []
    while modules:
        module = modules.pop()
        tensors += [*module._parameters.values(), *module._buffers.values()]
        modules += [part for part in module._modules.values() if part is not None]
    if any(map(is_sharded, tensors)):
        return []
    return [(id(t), t.data_ptr(), t.shape, t.stride(), t.requires_grad) for t in tensors if t is not None]


def _check_parameters(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Check what a method that merges the anchor and the present weights is given."""
    chosen = find(method)
    models = 1 if chosen.base == "required" else 2
    if models < chosen.least or (chosen.most is not None and models > chosen.most):
        only, count = ("only ", f"{chosen.least} models or more") if models < chosen.least else ("", f"at most {chosen.most}")
        raise MergeError(
            f"SFA: {method} merges {count}, but a merge in training has {only}"
            f"{'the anchor as the base and ' if models == 1 else 'the anchor and '}the present weights; choose another method"
        )
    if chosen.companions:
        needs = ", ".join(chosen.companions)
        raise MergeError(f"SFA: {method} needs models beside those that it merges ({needs}); call merge() with them instead")
    given = dict(parameters)
    scope = {"scope": given.pop("scope")} if "scope" in given and "scope" in chosen.shown else {}
    names = {name.rstrip("_") for name in given}
    checked = Parameters(chosen, given, models).given
    return {**{name: value for name, value in checked.items() if name.rstrip("_") in names}, **scope}


def _schedule(p: float | None, every: int | None, total_steps: int | None) -> MergeSchedule:
    if p is None:
        assert every is not None
        return MergeSchedule(every, total_steps)
    if total_steps is None:
        raise MergeError(f"SFA: p={p} is a part of the task, so its length is needed: pass total_steps, or every in place of p")
    return MergeSchedule.from_fraction(p, total_steps)


def _check_options(**options: object) -> None:
    for name, value in options.items():
        if value not in _OPTIONS[name]:
            one, other = _OPTIONS[name]
            raise MergeError(f'SFA: {name}={value!r}: must be "{one}" or "{other}"')


def _check_state(state: Mapping[str, Any]) -> None:
    """Refuse a state that `SFA.state_dict` cannot have returned."""
    missing = [name for name in (*_SETTINGS, *_COUNTERS, "finished", "fingerprint", "anchor") if name not in state]
    if missing:
        raise MergeError(f'SFA: the state lacks "{missing[0]}"; pass what SFA.state_dict() returned')
    wrong = [name for name in _COUNTERS if not isinstance(state[name], int) or state[name] < 0]
    kinds = {"method": str, "parameters": dict, "seed": int, "finished": bool, "fingerprint": str | None}
    wrong += [name for name, kind in kinds.items() if not isinstance(state[name], kind)]
    wrong += [name for name, known in _OPTIONS.items() if name in _SETTINGS and state[name] not in known]
    if not isinstance(state["anchor"], Mapping) or not all(_is_floating(t) for t in state["anchor"].values()):
        wrong.append("anchor")
    if state["p"] is not None:
        MergeSchedule.from_fraction(state["p"], 1)
    if wrong:
        raise MergeError(f'SFA: "{wrong[0]}" in the state is damaged: {state[wrong[0]]!r:.80}')


def _is_floating(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_floating, value.values()))
    return isinstance(value, torch.Tensor | Shard) and value.dtype.is_floating_point


def _place(anchor: object) -> Place:
    """Check where an anchor is to be kept."""
    if anchor == "memory" or anchor == "cpu":
        return anchor
    if not isinstance(anchor, str | Path):
        raise MergeError(f'SFA: anchor={anchor!r}: must be "memory", "cpu", or a path')
    return Path(anchor)


def _dtype(dtype: object) -> torch.dtype:
    """Check the dtype of an anchor."""
    name = dtype_name(dtype)
    if name not in type_of:
        raise unknown("anchor_dtype", name, type_of)
    found: torch.dtype = getattr(torch, name)
    return found


def _plain(setting: Any) -> Any:
    """Copy a setting, with numbers of Python in place of NumPy's, which ``torch.load(weights_only=True)`` refuses."""
    if isinstance(setting, Mapping):
        return {name: _plain(value) for name, value in setting.items()}
    if isinstance(setting, list | tuple):
        return type(setting)(map(_plain, setting))
    return setting.item() if hasattr(setting, "item") else setting


def _of_optimizer(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Leaf]) -> list[torch.Tensor]:
    """List the parameters of an optimizer that are among these, or share their memory."""
    known = {id(leaf) for leaf in leaves.values()} | {place_of(leaf) for leaf in leaves.values()} - {None}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in given if id(parameter) in known or place_of(parameter) in known]


def _names(pairs: Iterable[Pair]) -> set[str]:
    return {name for pair in pairs for name in pair}
