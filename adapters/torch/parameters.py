"""The tensors of a model as adapters see them: named as in the model itself, tied ones once, sharded ones as shards."""

import sys
from collections.abc import Hashable, Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mergekit_cl.adapters.torch import sharding
from mergekit_cl.errors import MergeError
from mergekit_cl.models.sharded import Leaf, Shard, local_of


class Holder(Protocol):
    """What trains a model by tensors of its own, such as DeepSpeed's masters (`mergekit_cl.adapters.torch.deepspeed.Zero`)."""

    @property
    def module(self) -> nn.Module:
        """The model."""

    def leaves(self) -> dict[str, Leaf]:
        """Return all parameters by name."""

    def before_write(self) -> None:
        """Bring the parameters into the state in which they may be read and written."""

    def after_write(self) -> None:
        """Let the model follow what was written."""


Source: TypeAlias = nn.Module | Holder | dict[str, torch.Tensor]
"""What parameters are found in: a module; what holds them for one; or named parameters, as `source_of` returns them."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def source_of(model_or_parameters: Any, owner: str) -> Source:
    """Check what a user passed as a model; name parameters that come without one.

    Args:
        model_or_parameters: A module; or a parameter, parameters, or pairs of name and parameter; or DeepSpeed's engine.
        owner: What to call the asking class in errors: "SFA".

    Raises:
        MergeError: It is none of these, or two parameters have one name; or DeepSpeed trains the module, by masters.

    """
    if "deepspeed" in sys.modules and isinstance(model_or_parameters, sys.modules["deepspeed"].DeepSpeedEngine):
        from mergekit_cl.adapters.torch.deepspeed import source_of as source_of_engine

        return source_of_engine(model_or_parameters)
    if hasattr(model_or_parameters, "after_write"):
        holder: Holder = model_or_parameters
        return holder
    if isinstance(model_or_parameters, nn.Module):
        sharding.refuse_partitioned(model_or_parameters, owner)
        return model_or_parameters
    named: dict[str, torch.Tensor] = {}
    parameters = [model_or_parameters] if isinstance(model_or_parameters, torch.Tensor) else model_or_parameters
    if not isinstance(parameters, Iterable):
        raise MergeError(f"{owner}: got {type(parameters).__name__}; pass a torch.nn.Module, or its parameters")
    for index, item in enumerate(parameters):
        name, parameter = item if isinstance(item, tuple) else (f"parameter {index}", item)
        if not isinstance(parameter, torch.Tensor):
            raise MergeError(
                f"{owner}: {name} is {type(parameter).__name__}; pass a torch.nn.Module, parameters, or pairs of name and "
                "parameter"
            )
        if name in named and named[name] is not parameter:
            raise MergeError(f'{owner}: two parameters are called "{name}"; give them names of their own')
        if not any(parameter is other for other in named.values()):
            named[name] = parameter
    return named


def stepping(optimizer: Any, source: Source, owner: str) -> torch.optim.Optimizer:
    """Return the optimizer whose hooks see its steps, taken out of what wraps it (of accelerate, or Lightning).

    Raises:
        MergeError: It is no optimizer of PyTorch; or DeepSpeed steps it, for parts of the model one after another.

    """
    if not isinstance(source, nn.Module | dict):
        raise MergeError(
            f"{owner}: DeepSpeed steps parts of the model one after another; leave attach() away, and call step() after "
            "engine.step(), where engine.was_step_applied()"
        )
    inner: Any = optimizer
    while "_optimizer_step_post_hooks" not in getattr(inner, "__dict__", ()):
        if not hasattr(inner, "optimizer"):
            raise MergeError(
                f"{owner}: {type(optimizer).__name__} has no hooks after its steps; call step() after each of them"
            )
        inner = inner.optimizer
    found: torch.optim.Optimizer = inner
    return found


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer, in a hook after its step, has left the step out, as a gradient scaler had it do."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def parameters_of(source: Source) -> dict[str, Leaf]:
    """Return all parameters by name, those that are one object once: plain tensors, DTensors, or shards (FSDP1, DeepSpeed).

    Names are those of the model itself, without what wrappers (DDP, FSDP, ``torch.compile``, activation checkpointing) add.
    """
    if isinstance(source, dict):
        return dict(source)
    if not isinstance(source, nn.Module):
        return source.leaves()
    module = unwrapped(source)
    found: dict[str, Leaf] = {clean(name): parameter for name, parameter in module.named_parameters()}
    shards = sharding.shards_of(module)
    if shards:
        found = {name: leaf for name, leaf in found.items() if not name.endswith("_flat_param")}
    return found | {clean(name): shard for name, shard in shards.items()}


def trainable(source: Source) -> dict[str, Leaf]:
    """Return the parameters that require a gradient; of those that share all their memory the first."""
    return once({name: leaf for name, leaf in parameters_of(source).items() if leaf.requires_grad})


def buffers_of(source: Source) -> dict[str, torch.Tensor]:
    """Return the floating buffers of a module that its state dict holds; of those that share their memory the first."""
    if isinstance(source, dict):
        return {}
    found = {}
    for path, part in unwrapped(source if isinstance(source, nn.Module) else source.module).named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in part._non_persistent_buffers_set:
                found[clean(f"{path}.{name}" if path else name)] = buffer
    return once(found)


def before_write(source: Source) -> None:
    """Bring parameters into the state in which they may be read and written: what FSDP has gathered is sharded again."""
    if isinstance(source, nn.Module):
        sharding.before_write(source)
    elif not isinstance(source, dict):
        source.before_write()


def after_write(source: Source) -> None:
    """Let a model follow what was written into its parameters, where it does not compute with these themselves."""
    if not isinstance(source, nn.Module | dict):
        source.after_write()


def unwrapped(module: nn.Module) -> nn.Module:
    """Take a module out of ``torch.compile``, `DistributedDataParallel` and `DataParallel`."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        else:
            return module


def clean(name: str) -> str:
    """Take what wrappers of parts of a model add out of the name of a tensor."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def once(leaves: dict[str, Any]) -> dict[str, Any]:
    """Of tensors that share all their memory keep the first; of sharded ones all, so that every process keeps the same."""
    found: dict[Hashable, tuple[str, Leaf]] = {}
    for name, leaf in leaves.items():
        found.setdefault(name if is_sharded(leaf) else place_of(leaf) or name, (name, leaf))
    return dict(found.values())


def is_sharded(leaf: Leaf) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(leaf, DTensor | Shard)


def place_of(leaf: Leaf) -> Hashable:
    """Return what two tensors have in common if they share all their memory; None where this process holds no element."""
    local = local_of(leaf)
    return (local.data_ptr(), local.shape, local.stride()) if local.numel() else None
