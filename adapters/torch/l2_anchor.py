"""The pull of all weights towards those before the task, in a PyTorch training loop."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

import torch

from mergekit_cl.adapters.torch._penalty import Penalty, Row, check_finite, like, matched
from mergekit_cl.adapters.torch.parameters import skipped
from mergekit_cl.dtypes import output_dtype
from mergekit_cl.errors import MergeError, MismatchError, listing
from mergekit_cl.models.sharded import local_of


class L2Anchor(Penalty):
    """Pull the weights towards the *anchor*: the weights that the model had before the task, ``theta_o``.

    As a penalty, ``strength / 2 * sum((theta - theta_o)**2)`` (L2-SP of Li et al., https://arxiv.org/abs/1802.01483, which has
    the same factor), whose gradient is added to that of the loss before the optimizer's step::

        grad <- grad + strength * (theta - theta_o)

    or decoupled from the gradient, after the step, as AdamW's weight decay is (Loshchilov and Hutter,
    https://arxiv.org/abs/1711.05101), towards the anchor in place of zero::

        theta <- theta - lr * strength * (theta - theta_o)

    For plain SGD the two differ by terms of the order of lr squared; Adam divides a penalty's gradient by its own scale, so
    that with Adam they are different methods. Nothing is added to autograd's graph, and nothing but the anchor takes memory.
    Terms are computed in float32 (float64 where a tensor is float64), and what they are added to is rounded once.

    The anchor is taken when the object is built, and again by `new_task`: one copy of the trainable parameters. A parameter
    without a gradient at a step is left alone, and so is one that is frozen; factors of a LoRA adapter are pulled one by one.
    Tied parameters count once. After `attach`, a loop is left as it is: the term comes once for each step that the
    optimizer carries out, whatever was accumulated for it.

    Args:
        model_or_parameters: A ``torch.nn.Module``, wrapped as it is trained (DDP, FSDP2); or parameters, or pairs of name and
            parameter.
        strength: The factor of the penalty, 0 or more.
        mode: "penalty", or "decoupled".
        anchor_dtype: A dtype for the anchor; that of each parameter by default.
        backend: As in `mergekit_cl.merge`. Small models on a CPU are served by PyTorch's own operations, with the same bits.
        threads: As in `mergekit_cl.merge`.

    Raises:
        MergeError: A value out of range, nothing to train, or parameters of a kind that cannot be pulled.
        NonFiniteError: A parameter holds NaN or Inf (or does in ``anchor_dtype``).

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> pull = L2Anchor([weight], strength=0.5).attach(optimizer)
    >>> for step in range(2):
    ...     optimizer.zero_grad()
    ...     (4 * weight[0] + 0 * weight[1]).backward()
    ...     optimizer.step()
    >>> weight.tolist(), pull.penalty().item()  # [1 - 0.5 * 4, 2], then [-1 - 0.5 * (4 - 0.5 * 2), 2]
    ([-2.5, 2.0], 3.0625)

    """

    def __init__(
        self,
        model_or_parameters: torch.nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        strength: float,
        *,
        mode: Literal["penalty", "decoupled"] = "penalty",
        anchor_dtype: torch.dtype | None = None,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        super().__init__(model_or_parameters, strength, backend, threads)
        if mode not in ("penalty", "decoupled"):
            raise MergeError(f'L2Anchor: mode={mode!r}: must be "penalty" or "decoupled"')
        self.mode = mode
        self._anchor_dtype = None if anchor_dtype is None else getattr(torch, output_dtype(anchor_dtype))
        self.new_task()

    def new_task(self) -> None:
        """Begin a task: the present weights become the anchor.

        Raises:
            MergeError: As for the constructor; the anchor is then left as it is.

        """
        anchor = {
            name: like(parameter, local_of(parameter).to(self._anchor_dtype or parameter.dtype, copy=True))
            for name, parameter in self._trainable().items()
        }
        check_finite(anchor, "L2Anchor: the anchor")
        self._take(anchor)

    def add_gradients(self) -> None:
        """See `Penalty.add_gradients`; for mode "penalty"."""
        if self.mode == "decoupled":
            raise MergeError('L2Anchor: mode="decoupled" adds nothing to gradients; call pull() after optimizer.step()')
        super().add_gradients()

    def pull(self, optimizer_or_lr: torch.optim.Optimizer | float) -> None:
        """Pull the parameters that have a gradient towards the anchor, in place, in mode "decoupled".

        Call it once a step, after ``optimizer.step()``.

        Args:
            optimizer_or_lr: The learning rate; or the optimizer, whose groups have one each.

        Raises:
            MergeError: The mode is another, or it is attached to an optimizer, which does this itself.

        """
        if self.mode == "penalty":
            raise MergeError('L2Anchor: mode="penalty" pulls by gradients; call add_gradients() before optimizer.step()')
        if self._hooks:
            raise MergeError("L2Anchor: attached to an optimizer, which pulls by itself; leave this call away")
        self._pull(optimizer_or_lr)

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """See `Penalty.attach`. In mode "decoupled" the pull comes after each step, with the learning rate of each group."""
        if self.mode == "penalty":
            return super().attach(optimizer)
        inner = self._attachable(optimizer)
        self._hooks.append((inner, inner.register_step_post_hook(self._after_step)))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return settings and the anchor: numbers, strings, tensors (not copied), safe for ``weights_only=True``."""
        return {"strength": self.strength, "mode": self.mode, "anchor": dict(self.anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; settings are taken over too.

        The parameters themselves are the model's to load, before or after.

        Raises:
            MismatchError: The anchor in the state is of another model; nothing was loaded.
            MergeError: The state is not one of L2Anchor, or of another mode.

        """
        missing = [name for name in ("strength", "mode", "anchor") if name not in state]
        if missing:
            raise MergeError(f'L2Anchor: the state lacks "{missing[0]}"; pass what L2Anchor.state_dict() returned')
        if state["mode"] != self.mode:
            raise MergeError(f"L2Anchor: the state is of mode={state['mode']!r}, this is {self.mode!r}; build it with the same")
        lacking = [f'L2Anchor: the saved anchor lacks "{name}"' for name in self._trainable() if name not in state["anchor"]]
        if lacking:
            raise MismatchError(listing(lacking))
        anchor = matched(state["anchor"], self._known(), "L2Anchor: the saved anchor")
        self.strength = state["strength"]
        self._take(anchor)

    def __repr__(self) -> str:
        return f"L2Anchor(strength={self.strength}, mode={self.mode!r}, {len(self.anchor)} tensors)"

    def _take(self, anchor: dict[str, torch.Tensor]) -> None:
        self.anchor = anchor
        self._hold(anchor)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not skipped(optimizer):
            self._pull(optimizer)

    def _pull(self, optimizer_or_lr: torch.optim.Optimizer | float) -> None:
        self._refuse_unfrozen()
        if isinstance(optimizer_or_lr, torch.optim.Optimizer):
            groups = optimizer_or_lr.param_groups
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        else:
            rates = {id(held.parameter): float(optimizer_or_lr) for held in self._held}
        self._pulls.add(
            held.row(held.parameter, -rate * self.strength)
            for held in self._held
            if held.parameter.grad is not None and (rate := rates.get(id(held.parameter), 0.0))
        )

    def _rows_of_gradients(self, factor_of: Callable[[torch.Tensor], float]) -> list[Row]:
        self._refuse_unfrozen()
        return super()._rows_of_gradients(factor_of)

    def _refuse_unfrozen(self) -> None:
        for name, parameter in self._frozen.items():
            if parameter.grad is not None and parameter.requires_grad:
                raise MergeError(
                    f'L2Anchor: "{name}" was frozen when the task began, and has no anchor; call new_task() when parameters '
                    "are unfrozen"
                )
