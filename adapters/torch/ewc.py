"""Elastic weight consolidation in a PyTorch training loop."""

import logging
import sys
from collections.abc import Iterable, Mapping
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from mergekit_cl.adapters.torch._fisher import Estimate, Loss, classify
from mergekit_cl.adapters.torch._penalty import Penalty, check_finite, checked_strength, like, matched, wide_of
from mergekit_cl.errors import MergeError, MismatchError, listing
from mergekit_cl.models.sharded import local_of

_logger = logging.getLogger(__name__)

_SETTINGS = ("strength", "mode", "gamma", "fisher", "labels", "seed", "tasks", "offset")


class EWC(Penalty):
    """Elastic weight consolidation (Kirkpatrick et al., https://arxiv.org/abs/1612.00796).

    After each task the weights ``theta_t`` are kept, with the diagonal ``F_t`` of the Fisher information: how much the task
    depends on each of them. The tasks that follow pay a penalty, whose gradient is added to that of the loss in place::

        strength / 2 * sum_t sum(F_t * (theta - theta_t)**2)        grad <- grad + strength * sum_t F_t * (theta - theta_t)

    (Kirkpatrick's factor; Avalanche has no 1/2.) In mode "separate" all tasks count alike. Their sum is kept as one penalty
    about the mean of the ``theta_t``, weighed by the ``F_t``, and a constant. That is equal in exact arithmetic, and takes two
    copies of the parameters, however many tasks there were; the mean is rounded at each task, as weights are. In mode "online"
    (Schwarz et al., https://arxiv.org/abs/1805.06370) the Fisher information fades, ``F <- gamma * F + F_t``, and the anchor is
    the latest ``theta_t``; the paper's other gamma, of the penalty, is part of ``strength`` here.

    Both copies are float32 (float64 for parameters of float64). Nothing is added to autograd's graph. Parameters without a
    gradient at a step, and those that have no Fisher information yet (a new head, one that was frozen), are left alone.

    The Fisher information is the mean of squared gradients of the log likelihood:

    - "per_sample", over samples, as it is defined. Gradients are computed side by side (``torch.func.vmap``) where the model
      allows it, else one by one. Under `DistributedDataParallel` each process takes its own samples, and the sums are added up;
      without it every process has the information of its own data alone (the log says so).
    - "per_batch", over batches, of the gradient of a batch's mean loss (as Avalanche does). It is faster, and smaller the
      larger the batches are: with gradients that are independent, by the size of a batch. Gradients are what backward leaves in
      ``.grad``: averaged over processes, if they are. For parameters sharded by FSDP2 it is the only way.

    The model is in eval mode meanwhile: dropout is off, statistics of batch normalisation stay as they are.

    Args:
        model: A ``torch.nn.Module``, wrapped as it is trained (DDP, FSDP2; FSDP1 and DeepSpeed are refused).
        strength: The factor of the penalty, 0 or more.
        mode: "separate", or "online".
        gamma: For mode "online": how much of the Fisher information of earlier tasks stays, in [0, 1].
        fisher: "per_sample", or "per_batch".
        labels: "given" takes the labels of the data (the empirical Fisher information). "sampled" draws them from what the
            model predicts, as the definition has it; for classifiers, without a ``loss`` of your own (it can draw them itself).
        seed: For labels that are drawn.
        backend: As in `mergekit_cl.merge`. Small models on a CPU are served by PyTorch's own operations, with the same bits.
        threads: As in `mergekit_cl.merge`.

    Raises:
        MergeError: A value out of range, nothing to train, or parameters of a kind that cannot be pulled.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> ewc = EWC(model, strength=0.5)
    >>> half_square = lambda model, batch: model(batch)[:, 0] ** 2 / 2
    >>> ewc.new_task([torch.tensor([[1.0, 0.0], [2.0, 0.0]])], half_square)  # gradients [1, 0] and [4, 0]
    >>> ewc.importance["weight"].tolist()
    [[8.5, 0.0]]
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(2.0)
    >>> ewc.penalty().item()  # 0.5 / 2 * 8.5 * 2**2
    8.5
    >>> model.weight.grad = torch.zeros(1, 2)
    >>> ewc.add_gradients()
    >>> model.weight.grad.tolist()
    [[8.5, 0.0]]

    """

    def __init__(
        self,
        model: torch.nn.Module,
        strength: float,
        *,
        mode: Literal["separate", "online"] = "separate",
        gamma: float = 1.0,
        fisher: Literal["per_sample", "per_batch"] = "per_sample",
        labels: Literal["given", "sampled"] = "given",
        seed: int = 0,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise MergeError(f"EWC: got {type(model).__name__}; pass a torch.nn.Module, whose gradients it can compute")
        if "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine):
            raise MergeError(
                "EWC: DeepSpeed's engine averages gradients out of sight, so that processes would have different importances; "
                "use DDP or FSDP2"
            )
        super().__init__(model, strength, backend, threads)
        self.model = model
        self.mode, self.fisher, self.labels = mode, fisher, labels
        self.gamma, self.seed, self.tasks = gamma, seed, 0
        self._take_settings({name: getattr(self, name) for name in _SETTINGS})
        self.anchor: dict[str, torch.Tensor] = {}
        self.importance: dict[str, torch.Tensor] = {}
        self._trainable()

    def new_task(
        self,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        *,
        fisher: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """End a task: its weights, and the Fisher information that its data have of them, are kept from now on.

        Args:
            batches: Batches of the task's data; all of them are used, so pass a part of a loader for less.
            loss: See `estimate`.
            fisher: The Fisher information, or another measure of importance, in place of batches: a tensor for each parameter,
                by name, of its shape and not below zero.

        Raises:
            MergeError: Neither, or both, of the two; or as for `estimate`.
            MismatchError: ``fisher`` is not one of this model.
            NonFiniteError: A weight, or its Fisher information, is NaN or infinite; nothing was changed.

        """
        if (batches is None) == (fisher is None):
            raise MergeError("EWC: pass either batches of the task's data, or fisher= what was estimated before")
        leaves = self._trainable()
        if fisher is None:
            assert batches is not None
            fisher = self.estimate(batches, loss)
        else:
            fisher = matched(fisher, self._known(), "EWC: the Fisher information")
        weights = {name: leaf for name, leaf in leaves.items() if name in fisher}
        check_finite(weights, "EWC: the weight")
        check_finite(fisher, "EWC: the Fisher information")
        _refuse_negative(fisher, "the Fisher information")
        self._consolidate(weights, fisher)
        self.tasks += 1

    def estimate(self, batches: Iterable[Any], loss: Loss | None = None) -> dict[str, torch.Tensor]:
        """Estimate the diagonal Fisher information of the trainable parameters, at their present values.

        Args:
            batches: Batches of data, moved to the device of the model. For "per_sample" every tensor in a batch holds as many
                samples, along its first dimension.
            loss: ``loss(model, batch)`` returns the negative log likelihood of each sample, [samples] (or their mean; with
                "per_sample" it is called with batches of one). By default batches are pairs (inputs, labels), and the model
                returns logits, [samples, classes].

        Returns:
            For each parameter a tensor of its shape, float32 (float64 for float64), sharded as it is.

        Raises:
            MergeError: No batches, batches that the options do not fit, a loss that no parameter has a part in, or sharded
                parameters with "per_sample".

        """
        leaves = self._trainable()
        sharded = [name for name, leaf in leaves.items() if isinstance(leaf, DTensor)]
        if sharded and self.fisher == "per_sample":
            raise MergeError(
                f'EWC: "{sharded[0]}" is sharded, and backward averages its gradients over all processes, so that those of '
                'single samples are not known; use fisher="per_batch"'
            )
        if loss is not None and self.labels == "sampled":
            raise MergeError('EWC: labels="sampled" draws labels for the default loss only; draw them in your loss')
        estimate = Estimate(self.model, leaves, loss or classify, self.seed + self.tasks if self.labels == "sampled" else None)
        estimate.add(batches, self.fisher)
        if estimate.is_alone:
            _logger.warning(
                "EWC: the Fisher information is that of this process's own data, and may be another elsewhere: the model is "
                "not wrapped by DistributedDataParallel or fully_shard; pass it wrapped, or the same data to all processes"
            )
        if self.fisher == "per_sample":
            estimate.share()
        if not estimate.count:
            raise MergeError("EWC: there are no batches to estimate from; pass some (an iterator can be used only once)")
        if not estimate.reached:
            raise MergeError(
                "EWC: no parameter got a gradient: the loss does not depend on them; build EWC of the model that the loss is "
                "computed with, as it is wrapped"
            )
        return {name: like(leaves[name], total / estimate.count) for name, total in estimate.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return settings, anchor and Fisher information: numbers, strings, tensors (not copied), safe for `torch.load`."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**settings, "anchor": dict(self.anchor), "importance": dict(self.importance)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; settings are taken over too.

        The parameters themselves are the model's to load, before or after.

        Raises:
            MismatchError: What is kept in the state is of another model; nothing was loaded.
            MergeError: The state is not one of EWC, or damaged; nothing was loaded.

        """
        missing = [name for name in (*_SETTINGS, "anchor", "importance") if name not in state]
        if missing:
            raise MergeError(f'EWC: the state lacks "{missing[0]}"; pass what EWC.state_dict() returned')
        settings = self._checked(state)
        if state["anchor"].keys() != state["importance"].keys():
            raise MismatchError("EWC: the saved anchor and the saved Fisher information are of different parameters")
        known = self._known()
        anchor = matched(state["anchor"], known, "EWC: the saved anchor")
        importance = matched(state["importance"], known, "EWC: the saved Fisher information")
        _refuse_negative(importance, "the saved Fisher information")
        self._take_settings(settings)
        self._take(anchor, importance)

    @property
    def offset(self) -> float:
        """What tasks of different weights cost wherever the weights are: a constant of the penalty, in mode "separate"."""
        return self._offset

    @offset.setter
    def offset(self, offset: float) -> None:
        self._offset = float(offset)

    def __repr__(self) -> str:
        return (
            f"EWC(strength={self.strength}, mode={self.mode!r}, fisher={self.fisher!r}, tasks={self.tasks}, "
            f"{len(self.anchor)} tensors)"
        )

    @torch.no_grad()
    def _consolidate(self, weights: Mapping[str, torch.Tensor], fisher: Mapping[str, torch.Tensor]) -> None:
        """Add the penalty of a task to that of the tasks before."""
        anchor, importance = dict(self.anchor), dict(self.importance)
        if self.mode == "online":
            importance = {name: like(leaf, self.gamma * local_of(leaf)) for name, leaf in importance.items()}
        spread: dict[str, torch.Tensor] = {}
        for name, leaf in weights.items():
            here = local_of(leaf)
            wide = wide_of([here])
            here, new = here.to(wide, copy=True), local_of(fisher[name]).to(here.device, wide)
            if name in importance:
                before = local_of(importance[name])
                total = before + new
                if self.mode == "separate":
                    # the sum of two parabolas is one about their weighed mean, and a constant
                    moved = here - local_of(anchor[name])
                    share = torch.where(total > 0, new / total, 1.0)
                    spread[name] = (before * share * moved * moved).sum(dtype=torch.float64)
                    here = local_of(anchor[name]) + share * moved
                new = total
            else:
                new = new.clone()
            anchor[name], importance[name] = like(leaf, here), like(leaf, new)
        self._take(anchor, importance)
        zero = torch.zeros((), dtype=torch.float64)
        self._offset += float(self._total(spread.get(held.name, zero) for held in self._held))

    def _take(self, anchor: dict[str, torch.Tensor], importance: dict[str, torch.Tensor]) -> None:
        self.anchor, self.importance = anchor, importance
        self._hold(anchor, importance)

    def _take_settings(self, settings: Mapping[str, Any]) -> None:
        for name, value in self._checked(settings).items():
            setattr(self, name, value)

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings and counters as strings and numbers of Python, after checking all of them."""
        known = {"mode": ("separate", "online"), "fisher": ("per_sample", "per_batch"), "labels": ("given", "sampled")}
        for name, values in known.items():
            if given[name] not in values:
                raise MergeError(f'EWC: {name}={given[name]!r}: must be "{values[0]}" or "{values[1]}"')
        gamma, seed, tasks, offset = (given[name] for name in ("gamma", "seed", "tasks", "offset"))
        if isinstance(gamma, bool) or not isinstance(gamma, Real) or not 0 <= float(gamma) <= 1:
            raise MergeError(f"EWC: gamma={gamma!r}: must be in [0, 1]")
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise MergeError(f"EWC: seed={seed!r}: must be an integer")
        if isinstance(tasks, bool) or not isinstance(tasks, Integral) or int(tasks) < 0:
            raise MergeError(f"EWC: tasks={tasks!r}: must be a number of tasks, 0 or more")
        if isinstance(offset, bool) or not isinstance(offset, Real) or not (isfinite(offset) and float(offset) >= 0):
            raise MergeError(f"EWC: offset={offset!r}: must be a number, 0 or more")
        return {
            **{name: given[name] for name in known},
            "strength": checked_strength(given["strength"], "EWC"),
            "gamma": float(gamma),
            "seed": int(seed),
            "tasks": int(tasks),
            "offset": float(offset),
        }


def _refuse_negative(fisher: Mapping[str, torch.Tensor], what: str) -> None:
    negative = [name for name, leaf in fisher.items() if bool((local_of(leaf) < 0).any())]
    if negative:
        raise MergeError(listing([f'EWC: {what} of "{name}" is below zero' for name in negative]))
