"""Modules whose parameters are spread over processes: where the parts are, and what a module needs before they are written.

With FSDP2 (``fully_shard``) parameters are DTensors, and need nothing but to be sharded again before a write. FSDP1
(``FullyShardedDataParallel``) flattens parameters into one; the parts of each are found here, whether or not it was built
with ``use_orig_params``. DeepSpeed is in `mergekit_cl.adapters.torch.deepspeed`.
"""

import sys
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mergekit_cl.errors import MergeError
from mergekit_cl.models.sharded import Leaf, Shard


def before_write(module: nn.Module) -> None:
    """Shard again what FSDP has gathered.

    After a forward pass without a backward pass, parameters of the root (and others, by setting) are whole, in the dtype of
    the computation: what is written into them then is lost, and what is written into the shards is not seen by the next
    forward pass. All processes call this, between two steps. It moves no data, and is nothing for other modules.
    """
    for _, part in _parts(module, "FSDPModule"):
        part.reshard()
    for _, part in _parts(module, "FullyShardedDataParallel"):
        if part._handle is not None and _is_gathered(part._handle):
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(part, part._handle, True)


def shards_of(module: nn.Module) -> dict[str, Leaf]:
    """Return the parameters that FSDP1 has flattened, by the names that they had: shards, in the memory that is trained.

    Where FSDP1 does not shard (``NO_SHARD``) they are whole tensors. `before_write` comes first. A parameter requires a
    gradient if it did when it was flattened, or does now (with ``use_orig_params``).

    Raises:
        MergeError: A parameter lies in memory in another order than that of its dimensions.

    """
    found: dict[str, Leaf] = {}
    for path, part in _parts(module, "FullyShardedDataParallel"):
        if part._handle is not None:
            for name, leaf in _flattened(part._handle):
                found[f"{path}.{name}" if path else name] = leaf
    return found


def refuse_partitioned(module: nn.Module, owner: str) -> None:
    """Refuse a module that DeepSpeed trains by masters of its own: what is written into it would be lost."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            raise MergeError(
                f'{owner}: "{name}" is trained by DeepSpeed, which keeps float32 masters of its own; pass the engine that '
                "deepspeed.initialize returned (or mergekit_cl.adapters.torch.deepspeed.Zero(model, optimizer))"
            )


def agreed(problems: Iterable[str], leaves: Iterable[Leaf]) -> list[str]:
    """Return the problems that any process of those that share the tensors has found: the same list for each.

    What one process alone finds in its shards must stop all of them, or the others wait for it. All processes call this, with
    leaves of the same names. It communicates only where a leaf is sharded.
    """
    found = list(dict.fromkeys(problems))
    for group in _groups(leaves):
        everybody: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everybody, found, group=group)
        found = list(dict.fromkeys(problem for each in everybody for problem in each))
    return found


def _groups(leaves: Iterable[Leaf]) -> list[dist.ProcessGroup | None]:
    """Return the groups of processes that share tensors, each once, in the order of the leaves."""
    groups: dict[Hashable, dist.ProcessGroup | None] = {}
    for leaf in leaves:
        if isinstance(leaf, Shard):
            groups.setdefault(leaf.group, leaf.group)
        elif isinstance(leaf, DTensor):
            for group in leaf.device_mesh.get_all_groups():
                groups.setdefault(group, group)
    return list(groups.values())


def _is_gathered(handle: Any) -> bool:
    """Whether FSDP1 holds the whole of parameters that it shards; before the first forward pass it never does."""
    return handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard") and not handle.needs_unshard()


def _flattened(handle: Any) -> Iterator[tuple[str, Leaf]]:
    """Yield name and shard of each of the parameters that were flattened into one."""
    flat = handle.flat_param
    # what is sharded is not set apart before the first forward pass; what is not sharded is trained where it is
    shard = (getattr(flat, "_local_shard", flat) if handle.uses_sharded_strategy else flat).detach()
    trained = [flat] * len(flat._fqns) if flat._params is None else flat._params
    columns = (flat._fqns, flat._shapes, flat._contiguities, flat._shard_param_infos, trained)
    for name, shape, contiguous, info, parameter in zip(*columns, strict=True):
        if not contiguous:
            raise MergeError(
                f'"{name}" was not contiguous (channels-last?) when FSDP flattened it; make it contiguous before wrapping the '
                "model, or use fully_shard"
            )
        local = shard[info.offset_in_shard or 0 :][: info.numel_in_shard or 0]
        if handle.uses_sharded_strategy:
            local.requires_grad_(parameter.requires_grad)
            yield name, Shard(local, shape, info.intra_param_start_idx or 0, handle.process_group)
        else:
            yield name, local.view(shape).requires_grad_(parameter.requires_grad)


def _parts(module: nn.Module, kind: str) -> list[tuple[str, Any]]:
    """Return path and module of each that FSDP wraps; of none where FSDP was never imported, and there can be none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (
        [] if fsdp is None else [(path, part) for path, part in module.named_modules() if isinstance(part, getattr(fsdp, kind))]
    )
