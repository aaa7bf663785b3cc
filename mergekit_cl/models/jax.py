"""JAX arrays as leaves, and JAX pytrees (Flax parameters, ``nnx.State``) as models."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np

from mergekit_cl.dtypes import check_mergeable, dtype_name, type_of
from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Span
from mergekit_cl.layout import Entry

_ALIGNMENT = 64
"""Bytes; XLA takes over memory on the CPU that begins at a multiple of it, and copies any other."""


def owns(value: object) -> bool:
    """See `mergekit_cl.models.Library`, also for the functions below."""
    return isinstance(value, jax.Array)


def describe(leaf: jax.Array, name: str) -> Entry:
    if isinstance(leaf, jax.core.Tracer):
        raise MergeError("a traced array has no memory; call merge outside jax.jit")
    if leaf.is_deleted():
        raise MergeError("the array was deleted or donated; merge before it is, or copy it")
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise MergeError(
            "this process holds only a part of the array; gather it first, with jax.experimental.multihost_utils."
            "process_allgather, or merge under jax.jit with mergekit_cl.adapters.flax.sfa_merge"
        )
    dtype = "uint32" if _is_key(leaf) else dtype_name(leaf.dtype)
    check_mergeable(dtype, "JAX array")
    return Entry(name, _data(leaf).shape, dtype, _device(leaf), ("jax", id(leaf)))


def memory(leaf: jax.Array) -> tuple[int, int]:
    return 0, 0


def span(leaf: jax.Array) -> Span:
    data = _data(leaf)
    if data.is_fully_replicated:
        return _view(data.addressable_data(0), _first_device(data)).reshape(-1)
    span = empty(leaf, dtype_name(data.dtype))
    whole = span.reshape(data.shape)
    for shard in data.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = _view(shard.data, _first_device(data))
    return span


def dense(leaves: Sequence[jax.Array]) -> Sequence[jax.Array]:
    return leaves


def empty(leaf: jax.Array, dtype: str) -> Span:
    if _device(leaf) != "cpu":
        import torch

        return torch.empty(_data(leaf).size, dtype=getattr(torch, dtype), device=_device(leaf))
    stored = np.dtype(type_of.get(dtype, dtype))
    memory = np.empty(_data(leaf).size * stored.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + memory.size - _ALIGNMENT].view(stored)


def build(span: Span, leaf: jax.Array) -> jax.Array:
    data = _data(leaf)
    array = jax.numpy.from_dlpack(span) if _device(leaf) != "cpu" else span
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = jax.device_put(array.reshape(data.shape), data.sharding if data.committed else None)
    if dtype_name(array.dtype) != dtype_name(span.dtype):
        raise MergeError(f"JAX has no {dtype_name(span.dtype)} unless jax.config.update('jax_enable_x64', True) is called")
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array


def writable(leaf: jax.Array) -> Span | None:
    raise MergeError("JAX arrays cannot be written in place; leave out= away and use the result")


def written(leaf: jax.Array, span: Span | None) -> None:
    raise AssertionError("unreachable: writable() refuses JAX arrays")


def flatten(tree: Any) -> tuple[dict[str, jax.Array], Callable[[Mapping[str, Any]], Any]]:
    """Take a pytree apart into named arrays and a function that puts others in their place; no arrays, no model."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) < len(paths) or not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves.values()):
        return {}, lambda _: None
    return leaves, lambda new: jax.tree_util.tree_unflatten(structure, [new[name] for name in leaves])


def _is_key(leaf: jax.Array) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _data(leaf: jax.Array) -> jax.Array:
    """Return the integers inside a typed random key, or the array itself."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _view(data: jax.Array, device: jax.Device) -> Span:
    """View an array of one device as NumPy's, or, brought to this GPU, as PyTorch's."""
    if device.platform == "cpu":
        return np.asarray(data)
    import torch

    return torch.from_dlpack(jax.device_put(data, device))


def _device(leaf: jax.Array) -> str:
    """Name the device as torch does: "cpu", "cuda:1"; of an array that is spread over several the first."""
    device = _first_device(leaf)
    return "cpu" if device.platform == "cpu" else f"cuda:{device.local_hardware_id or 0}"


def _first_device(leaf: jax.Array) -> jax.Device:
    return min(leaf.sharding.addressable_devices, key=lambda device: device.id)
