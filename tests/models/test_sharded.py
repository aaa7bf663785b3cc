"""Sharded tensors in a single process, which holds all of them; `tests/test_sharded.py` has the merges of several."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Along

from mergekit_cl import MergeError, merge
from mergekit_cl.models import describe, share_of
from mergekit_cl.models.sharded import Shard, local_of, with_local


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh, *values: float) -> DTensor:
    return distribute_tensor(torch.tensor(values, dtype=torch.float32), mesh, [Along(0)])


def test_local_memory_is_that_of_the_leaf(mesh: DeviceMesh) -> None:
    plain, shard = torch.ones(3, requires_grad=True), Shard(torch.ones(2), (5, 1), 3)
    parameter = torch.nn.Parameter(sharded(mesh, 1, 1))
    for leaf in (plain, shard, parameter):
        local = local_of(leaf)
        assert type(local) is torch.Tensor
        assert not local.requires_grad
        local[1] = 7
    assert plain.tolist() == [1, 7, 1]
    assert shard.local.tolist() == [1, 7]
    assert parameter.full_tensor().tolist() == [1, 7]


def test_other_memory_is_sharded_in_the_same_way(mesh: DeviceMesh) -> None:
    memory = torch.tensor([3.0, 4.0])
    shard = with_local(Shard(torch.ones(2), (5, 1), 3), memory)
    assert isinstance(shard, Shard)
    assert (shard.shape, shard.start, shard.group) == ((5, 1), 3, None)
    like = sharded(mesh, 1, 1)
    tensor = with_local(like, memory)
    assert isinstance(tensor, DTensor)
    assert tensor.placements == like.placements
    for leaf in (shard, tensor, with_local(torch.ones(2), memory)):
        assert local_of(leaf).data_ptr() == memory.data_ptr()


def test_offloaded_memory_is_not_copied_to_the_device_of_the_mesh(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    like = sharded(mesh, 1, 1)
    monkeypatch.setattr(mesh, "_device_type", "meta")
    memory = torch.tensor([3.0, 4.0], dtype=torch.bfloat16, requires_grad=True)
    tensor = with_local(like, memory)
    assert local_of(tensor).data_ptr() == memory.data_ptr()
    assert (tensor.dtype, tensor.shape, tensor.requires_grad) == (torch.bfloat16, (2,), False)


def test_a_shard_lies_within_its_tensor() -> None:
    with pytest.raises(MergeError, match=r"3 elements from number 4 on reach beyond a tensor of shape \(2, 3\), which has 6"):
        Shard(torch.ones(3), (2, 3), 4)
    with pytest.raises(MergeError, match="not contiguous"):
        Shard(torch.ones(4)[::2], (2, 3), 0)
    entry = describe(Shard(torch.ones(2, dtype=torch.bfloat16), (2, 3), 4), "w")
    assert (entry.shape, entry.dtype, entry.device) == ((2, 3), "bfloat16", "cpu")


def test_who_holds_nothing_finds_the_same_ties(mesh: DeviceMesh) -> None:
    one, other = Shard(torch.ones(0), (3,), 3), Shard(torch.ones(0), (3,), 3)
    assert describe(one, "a").storage == describe(one, "b").storage
    assert describe(one, "a").storage != describe(other, "b").storage
    nothing = distribute_tensor(torch.ones(0, 2), mesh, [Along(0)])
    assert describe(nothing, "a").storage is None


def test_one_process_holds_all(mesh: DeviceMesh) -> None:
    models = [sharded(mesh, 1, 2, 3), sharded(mesh, 3, 2, 1)]
    assert share_of(models[0]) is None
    merged = merge(models, "sfa", beta=0.25)
    assert isinstance(merged, DTensor)
    assert merged.full_tensor().tolist() == [2.5, 2, 1.5]
    before = models[1]._version
    assert merge(models, "sfa", beta=0.25, out=models[1]) is models[1]
    assert models[1]._version > before
    assert models[1].full_tensor().tolist() == [2.5, 2, 1.5]
    with pytest.raises(MergeError, match="NaN"):
        merge([sharded(mesh, 1, torch.nan), sharded(mesh, 1, 2)], "linear")
    fragments = [Shard(torch.tensor([1.0, 2.0]), (1, 2), 0), Shard(torch.tensor([3.0, 4.0]), (1, 2), 0)]
    assert merge(fragments, "linear").local.tolist() == [2, 3]
