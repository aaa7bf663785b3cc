"""PyTorch tensors as leaves: viewed as NumPy memory on the CPU, as flat tensors on a GPU."""

import copy
from typing import Any

import ml_dtypes
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mergekit_cl.dtypes import check_mergeable, dtype_name
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Span
from mergekit_cl.layout import Entry


def owns(value: object) -> bool:
    """See `mergekit_cl.models.Library`, also for the functions below."""
    return isinstance(value, torch.Tensor)


def describe(leaf: torch.Tensor, name: str) -> Entry:
    kind = type(leaf).__name__
    if is_traceable_wrapper_subclass(leaf):
        raise MergeError(f"{kind} wraps other tensors (sharded or quantised); gather or dequantise it first")
    if leaf.layout != torch.strided:
        raise MergeError(f"a tensor of layout {leaf.layout} cannot be merged; pass tensor.to_dense()")
    if leaf.device.type not in ("cpu", "cuda"):
        raise MergeError(f"a tensor on device {leaf.device} cannot be merged; move it to the CPU or to a GPU")
    dtype = dtype_name(leaf.dtype)
    check_mergeable(dtype, kind)
    storage = (str(leaf.device), leaf.data_ptr(), leaf.shape, leaf.stride(), dtype) if leaf.numel() else None
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


def empty(leaf: torch.Tensor, dtype: str) -> Span:
    return span(torch.empty(leaf.numel(), dtype=getattr(torch, dtype), device=leaf.device))


def build(span: Span, leaf: torch.Tensor) -> torch.Tensor:
    if not isinstance(span, torch.Tensor):
        bfloat16 = span.dtype == ml_dtypes.bfloat16
        span = torch.from_numpy(span.view("int16") if bfloat16 else span)
        span = span.view(torch.bfloat16) if bfloat16 else span
    return span.view(leaf.shape)


def writable(leaf: torch.Tensor) -> Span | None:
    plain = leaf.is_contiguous() and not leaf.is_neg() and leaf.data_ptr() % leaf.element_size() == 0
    return span(leaf) if plain else None


def written(leaf: torch.Tensor, span: Span | None) -> None:
    if span is not None:
        with torch.no_grad():
            leaf.copy_(build(span, leaf))
    elif not leaf.is_inference():
        # autograd must see what the kernels wrote, or a backward pass that is under way would be silently wrong
        torch.autograd.graph.increment_version(leaf)


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; tied ones stand under each of their names."""
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def copy_module(module: torch.nn.Module, dtype: str | None) -> torch.nn.Module:
    """Copy a module with its ties, its floating tensors in ``dtype`` if one is given; gradients stay behind."""
    new = copy.deepcopy(module)
    return new if dtype is None else new.to(getattr(torch, dtype))
