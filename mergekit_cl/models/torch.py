"""PyTorch tensors as leaves: viewed as NumPy memory on the CPU, as flat tensors on a GPU."""

import copy
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mergekit_cl.dtypes import check_mergeable, dtype_name
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Span
from mergekit_cl.layout import Entry, memory_order, overlaps_itself


def owns(value: object) -> bool:
    """See `mergekit_cl.models.Library`, also for the functions below."""
    return isinstance(value, torch.Tensor)


def describe(leaf: torch.Tensor, name: str) -> Entry:
    kind = type(leaf).__name__
    if torch.nn.parameter.is_lazy(leaf):
        raise MergeError("the parameter has no shape yet; run the model once, so that its lazy modules know theirs")
    if is_traceable_wrapper_subclass(leaf):
        raise MergeError(f"{kind} wraps other tensors (sharded or quantised); gather or dequantise it first")
    if leaf.layout != torch.strided:
        raise MergeError(f"a tensor of layout {leaf.layout} cannot be merged; pass tensor.to_dense()")
    if leaf.device.type not in ("cpu", "cuda"):
        raise MergeError(f"a tensor on device {leaf.device} cannot be merged; move it to the CPU or to a GPU")
    dtype = dtype_name(leaf.dtype)
    check_mergeable(dtype, kind)
    strides = tuple(stride * leaf.element_size() for stride in leaf.stride())
    storage = (str(leaf.device), leaf.data_ptr(), tuple(leaf.shape), strides, dtype) if leaf.numel() else None
    return Entry(name, tuple(leaf.shape), dtype, str(leaf.device), storage)


def memory(leaf: torch.Tensor) -> tuple[int, int]:
    if not leaf.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    return leaf.data_ptr(), leaf.data_ptr() + (reach + 1) * leaf.element_size()


def span(leaf: torch.Tensor) -> Span:
    flat = leaf.detach().resolve_neg().contiguous().view(-1)
    if flat.data_ptr() % flat.element_size():
        flat = flat.clone()
    if flat.device.type != "cpu":
        return flat
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return flat.numpy()


def dense(leaves: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    if len({leaf.stride() for leaf in leaves}) > 1:
        return leaves
    ordered = [leaf.permute(memory_order(leaf.stride())) for leaf in leaves]
    return ordered if all(leaf.is_contiguous() for leaf in ordered) else leaves


def empty(leaf: torch.Tensor, dtype: str) -> Span:
    return span(torch.empty(leaf.numel(), dtype=getattr(torch, dtype), device=leaf.device))


def build(span: Span, leaf: torch.Tensor) -> torch.Tensor:
    if not isinstance(span, torch.Tensor):
        bfloat16 = span.dtype == ml_dtypes.bfloat16
        span = torch.from_numpy(span.view("int16") if bfloat16 else span)
        span = span.view(torch.bfloat16) if bfloat16 else span
    return span.view(leaf.shape)


def writable(leaf: torch.Tensor) -> Span | None:
    if overlaps_itself(leaf.shape, leaf.stride()):
        raise MergeError("several elements share one place in memory; pass a tensor that holds each of them")
    plain = leaf.is_contiguous() and not leaf.is_neg() and leaf.data_ptr() % leaf.element_size() == 0
    return span(leaf) if plain else None


def written(leaf: torch.Tensor, span: Span | None) -> None:
    if span is not None:
        with torch.inference_mode(leaf.is_inference()), torch.no_grad():
            leaf.copy_(build(span, leaf))
    elif not leaf.is_inference():
        # autograd must see what the kernels wrote, or a backward pass that is under way would be silently wrong
        torch.autograd.graph.increment_version(leaf)


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; tied ones stand under each of their names."""
    tensors: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        buffers = {name: b for name, b in part._buffers.items() if name not in part._non_persistent_buffers_set}
        tensors |= {f"{dot}{name}": t for name, t in {**part._parameters, **buffers}.items() if t is not None}
    return tensors


def module_extra(module: torch.nn.Module, where: str) -> dict[str, Any]:
    """What a module keeps beside tensors, by name: its extra state. An error where that is quantised weights."""
    extra: dict[str, Any] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == "_extra_state":
            extra[name] = value
        elif not isinstance(value, torch.Tensor):
            raise MergeError(f'{where}: "{name}" is {type(value).__name__}, not a tensor; dequantise the module before merging')
    return extra


def same_extra(one: Any, other: Any) -> bool:
    """Whether two values of extra state are equal, as far as can be told."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return bool(torch.equal(one, other))
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def copy_module(module: torch.nn.Module, dtype: str | None, where: str) -> torch.nn.Module:
    """Copy a module with its ties, its floating tensors in ``dtype`` if one is given; gradients stay behind."""
    try:
        new = copy.deepcopy(module)
    except Exception as error:
        raise MergeError(f"{where}: the module cannot be copied ({error}); merge state dicts, or pass out=") from error
    return new if dtype is None else new.to(getattr(torch, dtype))
