"""Sharded tensors as leaves: `DTensor` of PyTorch, and `Shard`; every process sees its own part, viewed, not copied.

All processes that share a tensor call `mergekit_cl.merge` with the same names, in any order, and each gets its part of the
result: bit for bit that of the merge of the whole tensors. The spans of a sharded leaf are those of its part. What a merge
sends between the processes depends on what it asks about a tensor (`mergekit_cl.steps`):

| what a method asks for | what is sent |
| --- | --- |
| `Sum`, `Consensus`, `Elementwise`, random masks too | nothing |
| `KthMagnitude`, `KthOf` | a histogram of each cut, in one sum over the processes for all tensors, for each round (2 to 6) |
| `Gram`, `KeptMagnitude`, `SumOf` | the blocks of 65,536 elements that are cut between processes, and a number for each block |
| `along=`, `rows=`, `SumOfSlices`, `PerRow`, `PerMatrix` | the whole tensor, one after another; for `KthOf` in each round |
| with ``nonfinite="error"`` | one number for each merge |

A part that is not a range of the flattened tensor (`DTensor` sharded by columns, or over two dimensions of a mesh in turn)
needs no more where an entry's place does not matter: for sums and cuts. For random masks, cuts through equal entries and
sums of floating numbers it is gathered, as for whole rows. A replicated `DTensor` is a plain tensor, and partial sums are
refused. Copies over the replicas of a mesh (HSDP) are computed by each of them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mergekit_cl.errors import MergeError
from mergekit_cl.kernels import Span
from mergekit_cl.layout import Entry
from mergekit_cl.models import torch as plain

_ALIGNED = 64  # bytes


@dataclass(frozen=True, eq=False)
class Shard:
    """The part that a process holds of a tensor: a contiguous range of its flattened elements.

    The parts of all processes of a group cover the tensor, each element once, in any order of the ranks; a part may be
    empty. FSDP1 and DeepSpeed hold parameters like this.

    Args:
        local: The elements from number ``start`` on, a contiguous tensor of any shape; it is written in place.
        shape: The shape of the whole tensor.
        start: The number of the first of these elements in the flattened tensor.
        group: The processes that share the tensor; ``None`` for all.

    Raises:
        MergeError: ``local`` is not contiguous, or reaches beyond the tensor.

    """

    local: torch.Tensor
    shape: tuple[int, ...]
    start: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        elements = prod(self.shape)
        if not self.local.is_contiguous():
            raise MergeError("Shard: the local part is not contiguous; pass a contiguous tensor")
        if not 0 <= self.start <= elements - self.local.numel():
            raise MergeError(
                f"Shard: {self.local.numel()} elements from number {self.start} on reach beyond a tensor of shape "
                f"{self.shape}, which has {elements}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """Where the local part lies."""
        return self.local.device

    @property
    def requires_grad(self) -> bool:
        """Whether the local part is trained."""
        return bool(self.local.requires_grad)


Leaf: TypeAlias = torch.Tensor | DTensor | Shard


def local_of(leaf: Leaf) -> torch.Tensor:
    """Return the part of a tensor that this process holds, detached, in the same memory; all of it if it is not sharded."""
    if isinstance(leaf, Shard):
        return leaf.local.detach()
    if isinstance(leaf, DTensor):
        with torch.no_grad():
            local: Any = leaf.detach().to_local()
        return cast(torch.Tensor, local.wait() if hasattr(local, "wait") else local)  # a collective may be under way
    return leaf.detach()


def with_local(leaf: Leaf, local: torch.Tensor) -> Leaf:
    """Make a tensor that is sharded as another is, of memory that is shaped as what `local_of` returns; nothing is copied."""
    if isinstance(leaf, Shard):
        return Shard(local, leaf.shape, leaf.start, leaf.group)
    if isinstance(leaf, DTensor):
        return _dtensor(local, replace(leaf._spec, tensor_meta=TensorMeta(leaf.shape, leaf.stride(), local.dtype)))
    return local


def _dtensor(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    """Make a DTensor of this very memory; `DTensor.from_local` copies what is offloaded to the device of the mesh."""
    return DTensor(local.detach(), spec, requires_grad=False)


# The library of such leaves


def owns(value: object) -> bool:
    """See `mergekit_cl.models.Library`, also for the functions below, in which memory is that of the local part."""
    return isinstance(value, DTensor | Shard)


def describe(leaf: DTensor | Shard, name: str) -> Entry:
    _check_placement(leaf)
    local = local_of(leaf)
    entry = plain.describe(local, name)
    storage = entry.storage
    if storage is None and 0 not in leaf.shape:
        # a process that holds nothing of a tensor must find the same names tied as the others do
        storage = "empty", id(leaf) if isinstance(leaf, Shard) else local.untyped_storage()._cdata
    return Entry(name, tuple(leaf.shape), entry.dtype, entry.device, storage)


def memory(leaf: DTensor | Shard) -> tuple[int, int]:
    return plain.memory(local_of(leaf))


def span(leaf: DTensor | Shard) -> Span:
    return plain.span(local_of(leaf))


def dense(leaves: Sequence[DTensor | Shard]) -> Sequence[DTensor | Shard]:
    return leaves


def empty(leaf: DTensor | Shard, dtype: str) -> Span:
    return plain.empty(local_of(leaf), dtype)


def build(span: Span, leaf: DTensor | Shard) -> Leaf:
    return with_local(leaf, plain.build(span, local_of(leaf)))


def writable(leaf: DTensor | Shard) -> Span | None:
    return plain.writable(local_of(leaf))


def written(leaf: DTensor | Shard, span: Span | None) -> None:
    plain.written(local_of(leaf), span)
    if isinstance(leaf, DTensor) and not leaf.is_inference():
        torch.autograd.graph.increment_version(leaf)


def _check_placement(leaf: DTensor | Shard) -> None:
    """Refuse what this process has no part of, or what is not the tensor's elements."""
    if isinstance(leaf, Shard):
        return
    if leaf.device_mesh.get_coordinate() is None:
        raise MergeError("this process is not part of the mesh of the DTensor; merge on the processes that hold it")
    if any(placement.is_partial() for placement in leaf.placements):
        raise MergeError(f"a DTensor of partial sums, {leaf.placements}, cannot be merged; redistribute it first")
    expected, _ = compute_local_shape_and_global_offset(leaf.shape, leaf.device_mesh, leaf.placements)
    if tuple(expected) != tuple(local_of(leaf).shape):
        raise MergeError(
            f"the local part of the DTensor has the shape {tuple(local_of(leaf).shape)}, but its placement "
            f"{leaf.placements} asks for {tuple(expected)}"
        )


# What processes do together


@dataclass(frozen=True)
class Processes:
    """The processes that share a tensor: those of a group, or of the groups along several dimensions of a mesh.

    Every method is called by all of them, in the same order, and returns the same to all.
    """

    ranks: tuple[tuple[int, ...], ...]
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = field(compare=False)

    @property
    def rank(self) -> int:
        """The number of this process among all."""
        return int(dist.get_rank())

    def add(self, arrays: Sequence[npt.NDArray[np.int64]]) -> None:
        """Add up integers over the processes, in place: one all-reduce for all of the arrays."""
        flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])).to(self.device)
        self._add(flat)
        parts = np.split(flat.cpu().numpy(), np.cumsum([array.size for array in arrays])[:-1])
        for array, part in zip(arrays, parts, strict=True):
            array[...] = part.reshape(array.shape)

    def collect(self, value: Any) -> list[Any]:
        """Return what each of the processes gave, which is pickled."""
        values = [value]
        for group in self.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, values, group=group)
            values = [each for part in gathered for each in part]
        return values

    def assemble(self, parts: Sequence[tuple[int, int, Span]]) -> list[Span]:
        """Put spans together, of which every process has a part: (length, where its part begins, its part); one all-reduce."""
        bytes_ = [_bytes(part) for *_, part in parts]
        sizes = [-(-length * part.dtype.itemsize // _ALIGNED) * _ALIGNED for length, _, part in parts]
        flat = torch.zeros(sum(sizes) // 8, dtype=torch.int64, device=self.device)
        memory = flat.view(torch.uint8)
        places = np.cumsum([0, *sizes]).tolist()
        for (_, start, part), there, place in zip(parts, bytes_, places, strict=False):
            begin = place + start * part.dtype.itemsize
            memory[begin : begin + len(there)].copy_(there)
        self._add(flat)  # every byte is zero in all processes but one
        if parts and isinstance(parts[0][2], np.ndarray):
            memory = memory.cpu().numpy()
        elif parts:
            memory = memory.to(parts[0][2].device)
        return [
            memory[place : place + length * part.dtype.itemsize].view(part.dtype)
            for (length, _, part), place in zip(parts, places, strict=False)
        ]

    def _add(self, flat: torch.Tensor) -> None:
        for group in self.groups:
            dist.all_reduce(flat, group=group)


def _bytes(span: Span) -> torch.Tensor:
    """View a span as its bytes."""
    if isinstance(span, np.ndarray):
        return torch.from_numpy(span.view(np.uint8))
    return cast(torch.Tensor, span.as_strided((len(span),), (1,)).view(torch.uint8))


@dataclass(frozen=True, eq=False)
class Share:
    """The part of a tensor that this process holds: elements from number ``first`` on, or ``None`` where it is no range.

    ``placement`` is equal for tensors that are shared in the same way.
    """

    leaf: DTensor | Shard
    processes: Processes
    first: int | None
    placement: Hashable

    def __str__(self) -> str:
        if isinstance(self.leaf, DTensor):
            return f"sharded as {', '.join(map(str, self.leaf.placements))} over {self.leaf.device_mesh}"
        start, count, ranks = self.leaf.start, self.leaf.local.numel(), self.processes.ranks[0]
        return f"a Shard of elements {start} to {start + count}, of processes {', '.join(map(str, ranks))}"

    @property
    def local(self) -> Span:
        """The elements of this process."""
        return span(self.leaf)

    def whole(self) -> Span:
        """Gather the whole tensor; called by all of its processes."""
        if self.first is not None:
            return self.processes.assemble([(prod(self.leaf.shape), self.first, self.local)])[0]
        with torch.no_grad():
            return plain.span(cast(DTensor, self.leaf).detach().full_tensor())

    def empty(self, dtype: str) -> Span:
        """Make memory for the whole tensor."""
        return plain.empty(torch.empty(self.leaf.shape, device=self.leaf.device), dtype)

    def own(self, whole: Span) -> Span:
        """Copy the part of this process out of the whole tensor; nothing is sent."""
        if self.first is not None:
            part = whole[self.first : self.first + len(self.local)]
            return part.copy() if isinstance(part, np.ndarray) else part.clone()
        leaf = cast(DTensor, self.leaf)
        full = plain.build(whole, torch.empty(leaf.shape, device="meta"))  # of which the shape is all that matters
        with torch.no_grad():
            mesh, meta = leaf.device_mesh, TensorMeta(full.shape, full.stride(), full.dtype)
            replicas = _dtensor(full, DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta))
            return span(replicas.redistribute(placements=leaf.placements))


def share(leaf: object) -> Share | None:
    """Return what this process holds of a tensor; ``None`` if that is all of it."""
    if isinstance(leaf, Shard):
        group = leaf.group if leaf.group is not None else dist.group.WORLD
        groups = () if group is None or dist.get_world_size(group) == 1 else (group,)
        first: int | None = leaf.start
        key: Hashable = (leaf.start, leaf.local.numel())
    elif isinstance(leaf, DTensor):
        mesh = leaf.device_mesh
        along = [d for d, placement in enumerate(leaf.placements) if not placement.is_replicate() and mesh.size(d) > 1]
        groups = tuple(mesh.get_group(d) for d in along)
        first = _first(leaf, along)
        key = (mesh, leaf.placements)
    else:
        return None
    if not groups:
        return None
    local = local_of(leaf)
    ranks = tuple(tuple(dist.get_process_group_ranks(group)) for group in groups)
    return Share(leaf, Processes(ranks, _device(groups[0], local.device), groups), first, (ranks, key))


def _first(leaf: DTensor, along: Sequence[int]) -> int | None:
    """Return the number of the first local element of the flattened tensor, if each process has a range of it."""
    placements = [leaf.placements[d] for d in along]
    dims = {placement.dim for placement in placements if type(placement) is Sharded}
    if len(dims) != 1 or any(type(placement) is not Sharded for placement in placements):
        return None
    (dim,) = dims
    shape: tuple[int, ...] = tuple(leaf.shape)
    if prod(shape[:dim]) != 1:
        return None
    _, offset = compute_local_shape_and_global_offset(shape, leaf.device_mesh, leaf.placements)
    return int(offset[dim]) * prod(shape[dim + 1 :])


def _device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return where a group communicates: beside the tensor if it can."""
    kinds = {kind.type for kind in group._device_types}
    return device if device.type in kinds else torch.device("cuda", torch.cuda.current_device())
