"""Quadratic penalties as terms that are added to gradients in place: what `L2Anchor` and `EWC` share.

The gradient of ``strength / 2 * sum(F * (theta - anchor)**2)`` is ``strength * F * (theta - anchor)``. Adding it to what
backward has left takes one pass over memory, where a penalty in the loss takes several, and memory for its operations.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from math import isfinite
from numbers import Real
from typing import Any, Final, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mergekit_cl import kernels
from mergekit_cl.adapters.torch._graphs import capturing
from mergekit_cl.adapters.torch.parameters import (
    Source,
    before_write,
    is_sharded,
    parameters_of,
    source_of,
    stepping,
    trainable,
)
from mergekit_cl.adapters.torch.sharding import shards_of
from mergekit_cl.dtypes import compute_dtype, dtype_name
from mergekit_cl.errors import MergeError, MismatchError, NonFiniteError, listing, unknown
from mergekit_cl.execute import CHUNK, deal, processors
from mergekit_cl.formula import Program, Traced, trace
from mergekit_cl.kernels import Backend, Formula, Table
from mergekit_cl.models.sharded import Leaf, Shard, local_of, with_local
from mergekit_cl.models.torch import dense, memory

SMALL: Final = 1 << 17
"""Elements of a table up to which PyTorch's operations, with their temporary tensors, take less time than to call a kernel."""

WIDE: Final = 1 << 21
"""Elements of a table from which on it pays to start threads."""


_load = cache(kernels.load)


Row: TypeAlias = tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], float]
"""Target, parameter, what is kept of it (its anchor, and perhaps the importance of each entry), and a factor::

    target += factor * (importance * (parameter - anchor))

A tuple, and not a class, because there is a new one for each parameter at every step."""


class Pulls:
    """Adds pulls to tensors in place, with the same bits from every backend, by PyTorch, and with any number of threads.

    Every operation is rounded to float32 (float64 where a tensor is float64), the result once to the dtype of the target.

    Args:
        backend: As in `mergekit_cl.merge`. "numpy" stands for PyTorch's own operations.
        threads: As in `mergekit_cl.merge`.

    Raises:
        MergeError: The backend has another name, or the number of threads is none.

    """

    def __init__(self, backend: str, threads: int | None) -> None:
        if backend not in ("auto", *kernels.BACKENDS):
            raise unknown("backend", backend, ["auto", *kernels.BACKENDS])
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise MergeError(f"threads={threads!r}: must be a whole number, at least 1")
        self.backend = backend
        self.threads = processors() if threads is None else threads
        self._of_graphs: list[tuple[torch.Tensor, ...]] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Add to the target of each row its pull towards the anchor."""
        rows = list(rows)
        if capturing():
            self._of_graphs += [kept for _, _, kept, _ in rows]  # replays read them, also when there is another anchor
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            target, parameter, kept, _ = row
            groups.setdefault((target.dtype, parameter.dtype, kept[-1].dtype, target.device, len(kept)), []).append(row)
        for (*_, device, _), group in groups.items():
            self._add(group, device)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not what graphs read."""
        return {**self.__dict__, "_of_graphs": []}

    def _add(self, rows: list[Row], device: torch.device) -> None:
        """Add pulls to tensors of the same dtypes on one device."""
        name, backend = _load(self.backend, str(device))
        fitting = [_in_one_order(target, parameter, *kept) for target, parameter, kept, _ in rows]
        table = _Tensors([(*tensors, tensors[0]) for tensors in fitting if tensors])
        if name == "numpy" or (device.type == "cpu" and table.lengths.sum() <= SMALL):
            _add_in_torch(rows)
            return
        apart = [row for row, tensors in zip(rows, fitting, strict=True) if not tensors]
        if apart:
            _add_in_torch(apart)
            rows = [row for row, tensors in zip(rows, fitting, strict=True) if tensors]
        if rows:
            self._call(backend, table, _formula(table, [factor for *_, factor in rows]))
            torch.autograd.graph.increment_version([target for target, *_ in rows])

    def _call(self, backend: Backend, table: Table, formula: Formula) -> None:
        enqueue = getattr(backend, "enqueue_elementwise", None)
        on_cpu = table.spans[0][0].device.type == "cpu"
        if enqueue is not None:
            enqueue(table, formula, table.whole)  # what is not finite may stay so: nobody reads the flags, and nobody waits
        elif on_cpu and self.threads > 1 and int(table.lengths.sum()) >= WIDE:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(partial(backend.elementwise, table, formula), deal(table.lengths, self.threads, CHUNK)))
        else:
            backend.elementwise(table, formula, table.whole)


@dataclass(frozen=True, eq=False)
class _Tensors(Table):
    """A table of whole tensors. All of a row hold their elements in one order, so that none has to be flattened."""

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """See `Table.lengths`."""
        return np.array([row[0].numel() for row in self.spans], np.int64)

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """See `Table.addresses`."""
        return np.array([[tensor.data_ptr() for tensor in row] for row in self.spans], np.int64)


def _in_one_order(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return tensors whose elements lie densely, and in one order, as contiguous ones; nothing if they don't."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            break
    else:
        return tensors
    views = dense(tensors)
    return views if all(view.is_contiguous() for view in views) else ()


def _pulled(target: Any, parameter: Any, anchor: Any, *importance: Any) -> Any:
    change = parameter - anchor
    for each in importance:
        change = each * change
    return target + 1.0 * change  # the constant is each row's own


def _traced(columns: int) -> Program:
    traced = trace(_pulled, list(range(columns)))
    assert isinstance(traced, Traced)
    return traced.program


_PROGRAMS = {columns: _traced(columns) for columns in (3, 4)}


def _formula(table: Table, factors: Sequence[float]) -> Formula:
    rows = len(factors)
    constants = np.array(factors, np.float64).reshape(rows, 1).astype(table.compute)
    program = _PROGRAMS[len(table.dtypes) - 1]
    return Formula(program, constants, np.zeros((rows, 0, 2), np.uint32), np.zeros((0, 0), table.compute))


@torch.no_grad()
def _add_in_torch(rows: list[Row]) -> None:
    """Do what the kernels do, operation by operation; a sum of products in one operation would be rounded differently."""
    targets, moved, kept, factors = zip(*rows, strict=True)
    wide = wide_of((targets[0], moved[0], *kept[0]))
    parameters, anchors, *importance = (
        [tensor if tensor.dtype is wide else tensor.to(wide) for tensor in column]
        for column in (moved, *zip(*kept, strict=True))
    )
    change: Any = torch._foreach_sub(parameters, anchors)
    for column in importance:
        torch._foreach_mul_(change, column)
    torch._foreach_mul_(change, factors)
    if targets[0].dtype is wide:
        torch._foreach_add_(targets, change)
    else:
        torch._foreach_add_(change, [target.to(wide) for target in targets])
        torch._foreach_copy_(targets, change)


def wide_of(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the type that tensors are computed in."""
    wide: torch.dtype = getattr(torch, compute_dtype(dtype_name(tensor.dtype) for tensor in tensors).name)
    return wide


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter that is pulled. It is held itself: what FSDP shows as a module's parameters may be copies at times."""

    name: str
    parameter: torch.Tensor
    kept: tuple[torch.Tensor, ...]
    """What this process holds of the anchor, and of its importance."""

    def row(self, target: torch.Tensor, factor: float) -> Row:
        """Return what is added to the gradient, or to the parameter."""
        return _local(target), _local(self.parameter), self.kept, factor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor


class Penalty:
    """A quadratic penalty in a training loop: attached to optimizers, or called by hand."""

    def __init__(self, source: Any, strength: float, backend: str, threads: int | None) -> None:
        self._source: Source = source_of(source, self._name)
        self.strength = strength
        self._pulls = Pulls(backend, threads)
        self._hooks: list[tuple[torch.optim.Optimizer, Any]] = []
        self._held: list[Held] = []
        self._frozen: dict[str, torch.Tensor] = {}

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def strength(self) -> float:
        """The factor of the penalty; it may be set between two steps."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self._strength = checked_strength(strength, self._name)

    def add_gradients(self) -> None:
        """Add the gradient of the penalty to the gradients, in place. Call it once a step, after backward.

        A parameter without a gradient is left alone. Called before ``clip_grad_norm_``, the sum is clipped, as if the penalty
        stood in the loss; attached, the term is added after it, as weight decay is. With a gradient scaler call
        ``scaler.unscale_(optimizer)`` first.

        On a GPU nothing waits for it. A CUDA graph of a step may hold the call, once one was made outside of a graph. Replays
        add the term with the strength and the anchor of that moment, so capture the step anew after `new_task`.

        Raises:
            MergeError: It is attached to an optimizer, there is no gradient, or a gradient is sparse.

        """
        if self._hooks:
            raise MergeError(f"{self._name}: attached to an optimizer, which adds the term itself; leave this call away")
        if self._held and all(held.parameter.grad is None for held in self._held):
            raise MergeError(
                f"{self._name}: none of its {len(self._held)} parameters has a gradient; call add_gradients() after "
                f"backward(), and build {self._name} after the model has been wrapped or moved"
            )
        self._pulls.add(self._rows_of_gradients(lambda _: self.strength))

    @torch.no_grad()
    def penalty(self) -> torch.Tensor:
        """Compute the value of the penalty, without a graph, for logs; sharded parameters are summed over all processes.

        Returns:
            A float64 scalar, on the device of the first parameter.

        """
        return self.strength / 2 * (self._offset + self._total(_square(held) for held in self._held))

    def detach(self) -> None:
        """Take the hooks of `attach` away."""
        for _, hook in self._hooks:
            hook.remove()
        self._hooks = []

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Add the term before each step of the optimizer, by a hook; return self. It may be called for several optimizers.

        Only gradients of the optimizer's own parameters are touched. With a gradient scaler they are no longer scaled when the
        hook runs (a fused optimizer, which unscales them itself, gets a scaled term), and a step that is skipped has no term.

        Raises:
            MergeError: The optimizer has none of the parameters, or is attached already; or, at a step, it is given a closure.

        """
        inner = self._attachable(optimizer)
        self._hooks.append((inner, inner.register_step_pre_hook(self._before_step)))
        return self

    # What subclasses keep

    _offset: float = 0.0
    """What the penalty has beside the sum over its rows, twice and without its strength."""

    def _known(self) -> dict[str, torch.Tensor]:
        """Return all parameters by name."""
        return {name: leaf for name, leaf in parameters_of(self._source).items() if not isinstance(leaf, Shard)}

    def _trainable(self) -> dict[str, torch.Tensor]:
        """Return the trainable parameters by name; refuse those that nothing can be added to."""
        before_write(self._source)
        leaves = trainable(self._source)
        found = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Shard)}
        if not leaves:
            raise MergeError(f"{self._name}: no parameter requires a gradient; unfreeze before building {self._name}")
        flattened = shards_of(self._source) if isinstance(self._source, torch.nn.Module) else {}
        for name in [name for name in leaves if name in flattened or name not in found]:
            raise MergeError(
                f'{self._name}: "{name}" is trained by FSDP1 (FullyShardedDataParallel) or DeepSpeed, whose gradients are not '
                "found beside it; use FSDP2 (fully_shard) or DDP"
            )
        for name, leaf in found.items():
            if leaf.is_meta:
                raise MergeError(f'{self._name}: "{name}" is on the meta device, and has no values; initialise the model first')
            if dtype_name(leaf.dtype) not in kernels.FLOATING or is_quantised(leaf):
                raise MergeError(f'{self._name}: "{name}" is {type(leaf).__name__} of {leaf.dtype}; train bfloat16 to float64')
        refuse_overlaps(found, self._name)
        self._frozen = {name: leaf for name, leaf in self._known().items() if not leaf.requires_grad}
        return found

    def _hold(self, *kept: Mapping[str, torch.Tensor]) -> None:
        """Pull parameters towards anchors, by name, and by the importance of each entry, where that is given."""
        known = self._known()
        self._held = [
            Held(name, known[name], tuple(local_of(each[name]) for each in kept)) for name in kept[0] if name in known
        ]

    def _total(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Add up float64 scalars, one for each parameter that is pulled; those of shards over the processes that share them."""
        sums: dict[Any, torch.Tensor] = {}
        device = None
        for part, held in zip(parts, self._held, strict=True):
            device = device or part.device
            leaf = held.parameter
            key = (leaf.device_mesh, leaf.placements) if isinstance(leaf, DTensor) else None
            sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64, device=device)) + part.to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for key, part in sums.items():
            total += part if key is None else _summed(part, *key)
        return total

    # Hooks

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*arguments[1:], keywords.get("closure"))):
            raise MergeError(
                f"{self._name}: step() was given a closure, which computes the gradients when the hook has run; detach(), and "
                "call add_gradients() in the closure, after backward() (in Lightning: in on_before_optimizer_step)"
            )
        scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer under a GradScaler
        strength = self.strength * (1.0 if scale is None else float(scale))
        signs = {id(p): -1.0 if group.get("maximize") else 1.0 for group in optimizer.param_groups for p in group["params"]}
        self._pulls.add(self._rows_of_gradients(lambda parameter: strength * signs.get(id(parameter), 0.0)))

    def _rows_of_gradients(self, factor_of: Callable[[torch.Tensor], float]) -> list[Row]:
        """Pair gradients with what is added to them; a factor of zero leaves one alone."""
        rows = []
        for held in self._held:
            gradient = held.parameter.grad
            if gradient is None or not (factor := factor_of(held.parameter)):
                continue
            if gradient.layout != torch.strided:
                raise MergeError(
                    f'{self._name}: the gradient of "{held.name}" is sparse ({gradient.layout}); use sparse=False: the term is '
                    "dense"
                )
            rows.append(held.row(gradient, factor))
        return rows

    def _attachable(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer whose steps count, after checking it: that which accelerate has wrapped."""
        inner = stepping(optimizer, self._source, self._name)
        if any(attached is inner for attached, _ in self._hooks):
            raise MergeError(f"{self._name}: attached to this optimizer already; detach() first")
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._held and not any(id(held.parameter) in given for held in self._held):
            raise MergeError(
                f"{self._name}: the optimizer has none of its {len(self._held)} parameters; build {self._name} after the model "
                "has been wrapped or moved, of the parameters that the optimizer updates"
            )
        return inner

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not the hooks, which belong to the optimizer."""
        return {**self.__dict__, "_hooks": []}


def _square(held: Held) -> torch.Tensor:
    """Sum up the importance times the squared distance from the anchor, in float64."""
    parameter = _local(held.parameter).detach()
    anchor, *importance = (tensor.to(parameter.device) for tensor in held.kept)
    wide = wide_of((parameter, *held.kept))
    change = parameter.to(wide) - anchor.to(wide)
    product = change * change
    for each in importance:
        product *= each
    return product.sum(dtype=torch.float64)


def _summed(part: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> torch.Tensor:
    """Add up what processes hold that share a tensor; those that hold the same count once."""
    kinds = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    total: torch.Tensor = DTensor.from_local(part, mesh, kinds, run_check=False).full_tensor()
    return total


def checked_strength(strength: Any, owner: str) -> float:
    """Return the factor of a penalty as a float.

    Raises:
        MergeError: It is no number, or below zero, or not finite.

    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not (isfinite(strength) and float(strength) >= 0):
        raise MergeError(f"{owner}: strength={strength!r}: must be a number, 0 or more")
    return float(strength)


def refuse_overlaps(leaves: Mapping[str, Leaf], owner: str) -> None:
    """Refuse parameters that lie in the same memory in part, or in another order: what is done to one is done to both.

    Raises:
        MergeError: There are some.

    """
    whole = {name: local_of(leaf) for name, leaf in leaves.items() if not is_sharded(leaf)}
    places = sorted((str(leaf.device), *memory(leaf), name) for name, leaf in whole.items() if leaf.numel())
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(places):
        if device == other_device and start < stop:
            one, two = sorted((name, other))
            raise MergeError(
                f'{owner}: "{one}" and "{two}" share a part of their memory; pass parameters that have memory of their own, '
                "or make the two one parameter"
            )


def is_quantised(leaf: torch.Tensor) -> bool:
    """Whether a tensor holds others that stand for its values."""
    return is_traceable_wrapper_subclass(leaf) and not isinstance(leaf, DTensor)


def like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Make a tensor that is sharded as another is."""
    return cast(torch.Tensor, with_local(tensor, local))


def matched(saved: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Copy saved tensors to where the parameters of their names are, after checking that they are of this model.

    Args:
        saved: Tensors by the names of parameters.
        known: All parameters of the model.
        what: What to call a saved tensor: "L2Anchor: the saved anchor".

    Raises:
        MismatchError: A name or a shape is not one of the model's.
        NonFiniteError: There is NaN or Inf in them.

    """
    problems = [f'{what} has "{name}", which the model lacks' for name in saved if name not in known]
    problems += [
        f'{what} of "{name}" has shape {tuple(leaf.shape)}, the model {tuple(known[name].shape)}'
        for name, leaf in saved.items()
        if name in known and tuple(leaf.shape) != tuple(known[name].shape)
    ]
    if problems:
        raise MismatchError(listing(problems))
    found = {}
    for name, leaf in saved.items():
        place = local_of(known[name])
        local = local_of(leaf)
        if local.shape != place.shape:
            raise MismatchError(
                f'{what} of "{name}" is sharded differently ({tuple(local.shape)} of it are here, of the parameter '
                f"{tuple(place.shape)}); load it with torch.distributed.checkpoint"
            )
        found[name] = like(known[name], torch.empty_like(place, dtype=local.dtype).copy_(local))
    check_finite(found, what)
    return found


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        NonFiniteError: There are some.

    """
    spoiled = [name for name, tensor in tensors.items() if not local_of(tensor).isfinite().all()]
    if spoiled:
        raise NonFiniteError(listing([f'{what} of "{name}" holds NaN or Inf' for name in spoiled]))
