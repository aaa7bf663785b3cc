"""Sequential Fine-tuning with Averaging in a PyTorch training loop."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from mergekit_cl.api import prepare
from mergekit_cl.continual.schedule import MergeSchedule
from mergekit_cl.dtypes import output_dtype
from mergekit_cl.errors import MergeError, MismatchError, NonFiniteError, listing
from mergekit_cl.execute import Executor, rehearse
from mergekit_cl.filters import Parameters
from mergekit_cl.models import open_model
from mergekit_cl.registry import find

_logger = logging.getLogger(__name__)
_SETTINGS = (
    "method",
    "parameters",
    "seed",
    "p",
    "every",
    "total_steps",
    "steps_before",
    "step_count",
    "merges",
    "last_merge_step",
)


class SFA:
    """Sequential Fine-tuning with Averaging (Kleiman et al., https://arxiv.org/abs/2501.05559, Algorithm 1).

    While a model is trained on a task of T steps, every k = max(1, round(p * T)) steps and after step T its weights are
    averaged, in place, with the *anchor*: the weights that it had before the task, ``theta_o``::

        theta <- beta * theta_o + (1 - beta) * theta

    With ``method`` the merge is that of any other method: of the present weights, with the anchor as its base, where the
    method needs one (``ties``, ``dare_ties``, ``breadcrumbs``, ``task_arithmetic``, ...); else of the anchor and the present
    weights, in this order (``slerp``, ``karcher``, ``linear``, ...). It is what `mergekit_cl.merge` computes, in place.

    The anchor is taken when the object is built, and again by `new_task`. It costs one copy of the trainable parameters;
    frozen parameters cost nothing, and one that is frozen on the way is left alone from then on. Buffers and the optimizer's
    state are left alone. A step is an update of the optimizer that the loop counts by calling `step`; with `attach`, one that
    the optimizer carried out (not one that a gradient scaler skipped).

    Args:
        model_or_parameters: A ``torch.nn.Module``; or parameters, or pairs of name and parameter (then these are averaged).
        beta: The weight of the anchor, in [0, 1]; 0.5 where it is not given; or a list with filters. For method "sfa" alone.
        p: The part of the task between two merges, in (0, 1]; needs ``total_steps``. 0.25 where ``every`` is not given.
        total_steps: The number T of steps of the task. Without it (only with ``every``) there is no merge at the end.
        every: The number k of steps between two merges, in place of p.
        method: Name of a merge method that can merge two models, or one model and a base.
        anchor_device: Where to keep the anchor; beside the parameters by default. Elsewhere it is copied for each merge.
        anchor_dtype: A dtype for the anchor; that of each parameter by default.
        nonfinite: "error" reads the parameters once more at each merge, in search of NaN and infinities, before any of them is
            written. "allow" lets them through.
        seed: For methods with random masks. A merge after s steps, counted over all tasks, has the seed ``(seed << 32) + s``:
            masks are new each time, and the same in a run that is repeated or resumed.
        backend: As in `mergekit_cl.merge`.
        threads: As in `mergekit_cl.merge`.
        **parameters: Those of the method, as in `mergekit_cl.merge`: ``SFA(model, method="ties", density=0.2, every=100)``,
            filters included.

    Raises:
        UnknownNameError: No such method, or a parameter that it does not have.
        MergeError: p without ``total_steps``, both p and ``every``, a value out of range, a method that needs more models,
            nothing to train, or parameters of a kind that cannot be merged.
        NonFiniteError: A parameter holds NaN or Inf (or does in ``anchor_dtype``).

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
        anchor_device: torch.device | str | None = None,
        anchor_dtype: torch.dtype | None = None,
        nonfinite: Literal["error", "allow"] = "error",
        seed: int = 0,
        backend: str = "auto",
        threads: int | None = None,
        **parameters: Any,
    ) -> None:
        self._source = model_or_parameters
        if not isinstance(model_or_parameters, torch.nn.Module):
            self._source = _name(model_or_parameters)
        if beta is not None or method == "sfa":
            parameters["beta"] = 0.5 if beta is None else beta
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise MergeError(f"SFA: seed={seed!r}: must be an integer")
        self.method, self.parameters, self.seed = method, _check_parameters(method, parameters), int(seed)
        if p is not None and every is not None:
            raise MergeError("SFA: both p and every are given; pass one of them")
        self.p = 0.25 if p is None and every is None else p
        self._every = every
        self._anchor_device = anchor_device
        self._anchor_dtype = None if anchor_dtype is None else getattr(torch, output_dtype(anchor_dtype))
        if nonfinite not in ("error", "allow"):
            raise MergeError(f'SFA: nonfinite={nonfinite!r}: must be "error" or "allow"')
        self._nonfinite: Literal["error", "allow"] = nonfinite
        self._backend, self._threads = backend, threads
        self._hook: Any = None
        self._prepared: tuple[Any, Executor] | None = None
        self.steps_before = self.step_count = 0
        self.new_task(total_steps=total_steps)

    def new_task(self, total_steps: int | None = None) -> None:
        """Begin a task: the present weights become the anchor, and steps are counted from 0 again.

        Args:
            total_steps: The number T of steps of the new task; needed where merges are set by p.

        Raises:
            MergeError: As for the constructor; the running task is then left as it is.

        """
        schedule, anchor = _schedule(self.p, self._every, total_steps), self._capture()
        rehearse(self._executor(anchor, self._trainable()).plan)  # finds what cannot be merged before training
        self.anchor = anchor
        self._begin(schedule, self.steps_before + self.step_count)

    def step(self) -> bool:
        """Count a step of the optimizer, and merge if it is time to. Call it after ``optimizer.step()``.

        Returns:
            Whether the parameters were averaged with the anchor (in place).

        Raises:
            NonFiniteError: It is time to merge, but a parameter holds NaN or Inf; nothing was written. The step counts, so
                that a loop which goes on merges at the steps that it would have merged at.
            MergeError: SFA is attached to an optimizer, or a parameter has become trainable since the task began.

        """
        if self._hook is not None:
            raise MergeError(
                "SFA: attached to an optimizer, which counts the steps itself; leave step() away, or detach() first"
            )
        return self._count()

    def attach(self, optimizer: torch.optim.Optimizer) -> "SFA":
        """Call `step` after each step of the optimizer, by a hook; return self."""
        if self._hook is not None:
            raise MergeError("SFA: attached to an optimizer already; detach() first")
        self._hook = optimizer.register_step_post_hook(lambda *_: self._count() and None)
        return self

    def detach(self) -> None:
        """Take the hook of `attach` away."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters and the anchor: numbers, strings, tensors (not copied), safe for ``weights_only=True``."""
        return {**{name: getattr(self, name) for name in _SETTINGS}, "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; settings are taken over too.

        The parameters themselves are the model's to load, before or after.

        Raises:
            MismatchError: The anchor in the state is of another model; nothing was loaded.
            MergeError: The state is not one of SFA.

        """
        _check_state(state)
        parameters = _check_parameters(state["method"], state["parameters"])
        schedule = MergeSchedule(state["every"], state["total_steps"])
        self.anchor = self._match(state["anchor"])
        self.method, self.parameters, self.seed = state["method"], parameters, state["seed"]
        self.p = state["p"]
        self._every = None if self.p is not None else schedule.every
        self._begin(schedule, *(state[name] for name in ("steps_before", "step_count", "merges", "last_merge_step")))

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
        """What is copied and pickled: not what was prepared for the memory of these very parameters."""
        return {**self.__dict__, "_prepared": None}

    def __repr__(self) -> str:
        settings = [] if self.method == "sfa" else [f"method={self.method!r}"]
        settings += [f"{name}={value!r}" for name, value in self.parameters.items()]
        return (
            f"SFA({', '.join(settings)}, every={self.every}, total_steps={self.total_steps}, step={self.step_count}, "
            f"{len(self.anchor)} tensors)"
        )

    def _begin(self, schedule: MergeSchedule, before: int, step: int = 0, merges: int = 0, last: int = 0) -> None:
        self._schedule, self.steps_before = schedule, before
        self.step_count, self.merges, self.last_merge_step = step, merges, last
        self._prepared = None

    def _count(self) -> bool:
        self.step_count = step = self.step_count + 1
        if self._schedule.due(step):
            self._merge(step)
            self.merges, self.last_merge_step = self.merges + 1, step
        elif self.total_steps is not None and step == self.total_steps + 1:
            _logger.warning(
                "SFA: the task's %d steps are over, and its last merge is done; until new_task() nothing is merged", step - 1
            )
        return self.last_merge_step == step

    @torch.no_grad()
    def _merge(self, step: int) -> None:
        """Average the parameters with the anchor, in place."""
        current = self._trainable()
        late = [name for name in current if name not in self.anchor]
        if late:
            raise MergeError(
                f'SFA: "{late[0]}" was frozen, or not there, when the task began, and has no anchor; call new_task() '
                "when parameters are unfrozen"
            )
        try:
            self._executor(self.anchor, current).run()
        except NonFiniteError as error:
            raise NonFiniteError(f"SFA, step {step}: nothing was merged\n{error}") from None

    def _executor(self, kept: Mapping[str, torch.Tensor], current: dict[str, torch.Tensor]) -> Executor:
        """Prepare the merge of an anchor into the parameters; keep it as long as these stay where they are in memory."""
        current = {name: current[name] for name in kept if name in current}
        chosen = find(self.method)
        # the masks of a method that draws some are new at every step
        key = [
            self.parameters,
            not chosen.orderless and self.step_count,
            *((name, p.data_ptr(), p.dtype, p.device, p.stride()) for name, p in current.items()),
        ]
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1]
        anchor = {name: kept[name].to(p.device) for name, p in current.items()}
        based = chosen.base == "required"
        executor, _ = prepare(
            chosen, [current] if based else [anchor, current], anchor if based else None, current,
            backend=self._backend, threads=self._threads, nonfinite=self._nonfinite, parameters=self.parameters,
            labels=["current", "anchor"] if based else ["anchor", "current"], constant=frozenset({-1 if based else 0}),
            seed=(self.seed << 32) + self.steps_before + self.step_count, others=list(self._parameters()),
        )  # fmt: skip
        beside = all(anchor[name] is kept[name] for name in current)
        self._prepared = (key, executor) if beside and executor.reads_in_place else None
        return executor

    def _parameters(self) -> dict[str, torch.Tensor]:
        """All parameters by name, tied ones once, without the prefix of ``torch.compile``."""
        if isinstance(self._source, torch.nn.Module):
            return {name.replace("_orig_mod.", ""): p for name, p in self._source.named_parameters()}
        return dict(self._source)  # _name made it a mapping

    def _trainable(self) -> dict[str, torch.Tensor]:
        """Parameters to average; of those that share all their memory the first."""
        found: dict[Any, tuple[str, torch.Tensor]] = {}
        for name, p in self._parameters().items():
            if p.requires_grad:
                found.setdefault((p.data_ptr(), p.shape, p.stride()) if p.numel() else name, (name, p))
        return dict(found.values())

    def _capture(self) -> dict[str, torch.Tensor]:
        """Copy the trainable parameters."""
        parameters = self._trainable()
        if not parameters:
            raise MergeError(
                "SFA: no parameter requires a gradient, so there is nothing to average; unfreeze before building SFA"
            )
        open_model(parameters, "SFA")  # refuses parameters that cannot be merged
        anchor = {
            name: p.detach().to(self._anchor_device or p.device, self._anchor_dtype or p.dtype, copy=True)
            for name, p in parameters.items()
        }
        spoiled = [name for name, tensor in anchor.items() if not tensor.isfinite().all()]
        if spoiled and self._nonfinite == "error":
            raise NonFiniteError(listing([f'SFA: the anchor of "{name}" would hold NaN or Inf' for name in spoiled]))
        return anchor

    def _match(self, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a saved anchor to where this one is kept, after checking that it is one of this model."""
        known = self._parameters()
        problems = [f'"{name}": the saved anchor holds NaN or Inf' for name, t in saved.items() if not t.isfinite().all()]
        problems += [f'the saved anchor has "{name}", which the model lacks' for name in saved if name not in known]
        problems += [f'the saved anchor lacks "{name}"' for name in self._trainable() if name not in saved]
        problems += [
            f'"{name}": the saved anchor has shape {tuple(tensor.shape)}, the model {tuple(known[name].shape)}'
            for name, tensor in saved.items()
            if name in known and tensor.shape != known[name].shape
        ]
        if problems:
            raise MismatchError(listing([f"SFA: {problem}" for problem in problems]))
        return {name: t.detach().to(self._anchor_device or known[name].device, copy=True) for name, t in saved.items()}


def _check_parameters(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Check what a method that merges the anchor and the present weights is given."""
    chosen = find(method)
    models = 1 if chosen.base == "required" else 2
    if models < chosen.least or (chosen.most is not None and models > chosen.most):
        raise MergeError(
            f"SFA: {method} merges {chosen.least} models or more, but a merge in training has only "
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


def _check_state(state: Mapping[str, Any]) -> None:
    """Refuse a state that `SFA.state_dict` cannot have returned."""
    missing = [name for name in (*_SETTINGS, "anchor") if name not in state]
    if missing:
        raise MergeError(f'SFA: the state lacks "{missing[0]}"; pass what SFA.state_dict() returned')
    counters = ("steps_before", "step_count", "merges", "last_merge_step")
    wrong = [name for name in counters if not isinstance(state[name], int) or state[name] < 0]
    wrong += [
        name for name, kind in (("method", str), ("parameters", dict), ("seed", int)) if not isinstance(state[name], kind)
    ]
    if not isinstance(state["anchor"], Mapping) or not all(_is_floating(t) for t in state["anchor"].values()):
        wrong.append("anchor")
    if state["p"] is not None:
        MergeSchedule.from_fraction(state["p"], 1)
    if wrong:
        raise MergeError(f'SFA: "{wrong[0]}" in the state is damaged: {state[wrong[0]]!r:.80}')


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _name(parameters: Any) -> dict[str, torch.Tensor]:
    """Name parameters that come without a module; each is taken once."""
    named: dict[str, torch.Tensor] = {}
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise MergeError(f"SFA: got {type(parameters).__name__}; pass a torch.nn.Module, or its parameters")
    for index, item in enumerate(parameters):
        name, parameter = item if isinstance(item, tuple) else (f"parameter {index}", item)
        if not isinstance(parameter, torch.Tensor):
            raise MergeError(
                f"SFA: {name} is {type(parameter).__name__}; pass a torch.nn.Module, parameters, or pairs of name and parameter"
            )
        if name in named and named[name] is not parameter:
            raise MergeError(f'SFA: two parameters are called "{name}"; give them names of their own')
        if not any(parameter is other for other in named.values()):
            named[name] = parameter
    return named
