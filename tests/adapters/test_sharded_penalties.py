"""L2Anchor, EWC and RunningAverage on several processes: what one process computes of all data; what is refused, by all."""

import copy
import importlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor

from mergekit_cl import MergeError, MismatchError
from mergekit_cl.adapters.torch.ewc import EWC
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor
from mergekit_cl.adapters.torch.running_average import RunningAverage
from mergekit_cl.models.sharded import local_of

X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def network() -> nn.Sequential:
    """Make a model whose tensors do not divide evenly among processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def mine(batch: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return this process's part of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return [(X[start : start + batch][rank::world], Y[start : start + batch][rank::world]) for start in range(0, 12, batch)]


def sharded(model: nn.Module) -> nn.Module:
    for part in model:
        if list(part.parameters()):
            fully_shard(part)
    return fully_shard(model)


def whole(tensor: Any) -> torch.Tensor:
    gathered: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach()


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(whole(tensor), whole(other[name]), rtol=tolerance, atol=tolerance)


def fsdp2(folder: Path) -> None:
    """Train with both terms on shards, and whole on one process; evaluate in between; save and load what is kept."""
    models = [network(), sharded(network())]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    terms: list[Any] = []
    for model, optimizer in zip(models, optimizers, strict=True):
        local = mine(6) if model is models[1] else [(X[:6], Y[:6]), (X[6:], Y[6:])]
        ewc = EWC(model, 3.0, fisher="per_batch").attach(optimizer)
        ewc.new_task(local)
        pulls = [L2Anchor(model, 0.5, mode=mode).attach(optimizer) for mode in ("penalty", "decoupled")]
        terms.append([ewc, *pulls])
        for _ in range(3):
            optimizer.zero_grad()
            inputs, labels = mine()[0] if model is models[1] else (X, Y)
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            with torch.no_grad():
                model(inputs)
        terms[-1][0].new_task(local)
    same(*[dict(model.named_parameters()) for model in models])
    same(terms[0][0].importance, terms[1][0].importance)
    for one, other in zip(*terms, strict=True):
        assert all(isinstance(tensor, DTensor) for tensor in other.anchor.values())
        assert 0 < one.penalty() == pytest.approx(float(other.penalty()), rel=1e-5)

    ewc = terms[1][0]
    saved, before = ewc.state_dict(), copy.deepcopy({name: whole(t) for name, t in ewc.anchor.items()})
    checkpoint.save({"anchor": saved["anchor"], "importance": saved["importance"]}, checkpoint_id=str(folder / "ewc"))
    ewc.new_task(mine(6))
    loaded = {key: {name: torch.zeros_like(t) for name, t in saved[key].items()} for key in ("anchor", "importance")}
    checkpoint.load(loaded, checkpoint_id=str(folder / "ewc"))
    ewc.load_state_dict({**saved, **loaded})
    assert all(torch.equal(whole(ewc.anchor[name]), tensor) for name, tensor in before.items())
    with pytest.raises(MergeError, match=r"is sharded.*per_batch"):
        EWC(models[1], 1.0).new_task(mine())
    late = network()
    pull = L2Anchor(late, 1.0)
    with pytest.raises(MergeError, match=r"build L2Anchor after the model has been wrapped"):
        pull.attach(torch.optim.SGD(sharded(late).parameters(), lr=0.1))


def ddp(folder: Path) -> None:
    """Estimate the Fisher information of samples, and of batches, each process from its own data; then train on."""
    del folder
    model = nn.parallel.DistributedDataParallel(network())
    found = EWC(model, 1.0).estimate(mine(6))
    same(found, EWC(network(), 1.0).estimate([(X, Y)]))
    assert "0.weight" in found
    by_batch = EWC(model, 1.0, fisher="per_batch").estimate(mine(6))
    same(by_batch, EWC(network(), 1.0, fisher="per_batch").estimate([(X[:6], Y[:6]), (X[6:], Y[6:])]))
    reference = network()
    for each, (inputs, labels) in ((model, mine()[0]), (reference, (X, Y))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        L2Anchor(each, 0.5).attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(each(inputs), labels).backward()
            optimizer.step()
    same(dict(model.module.named_parameters()), dict(reference.named_parameters()))


def every_process_has_the_same_importance(folder: Path) -> None:
    """Estimate in models that are compiled around DDP, or within; and say so where nothing is shared."""
    del folder
    expected = EWC(network(), 1.0).estimate([(X, Y)])
    wrap = nn.parallel.DistributedDataParallel
    for model in (torch.compile(wrap(network()), backend="eager"), wrap(torch.compile(network(), backend="eager"))):
        same(EWC(model, 1.0).estimate(mine(6)), expected)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("mergekit_cl.adapters.torch.ewc")
    logger.addHandler(handler)
    EWC(wrap(network()), 1.0).estimate(mine(6))
    assert not records
    for fisher in ("per_sample", "per_batch"):
        EWC(network(), 1.0, fisher=fisher).estimate(mine(6))
    logger.removeHandler(handler)
    assert [record.getMessage()[:70] for record in records] == [
        "EWC: the Fisher information is that of this process's own data, and ma"
    ] * 2
    lonely = EWC(wrap(network()), 1.0)  # one process has no data; both must end
    same(lonely.estimate(mine(6) if dist.get_rank() else []), EWC(network(), 1.0).estimate([(X[1::2], Y[1::2])]))


def fsdp1(folder: Path) -> None:
    """Refuse what FSDP1 has flattened, also where it shards nothing: gradients are not found beside what it shows."""
    del folder
    for strategy in (ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD):
        for original in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = FullyShardedDataParallel(
                    network(), sharding_strategy=strategy, use_orig_params=original, device_id=torch.device("cpu")
                )
            for build in (L2Anchor, EWC):
                with pytest.raises(MergeError, match=r"is trained by FSDP1 .* use FSDP2 \(fully_shard\) or DDP"):
                    build(model, 1.0)


def a_state_that_one_process_refuses_is_refused_by_all(folder: Path) -> None:
    """Damage the average's state on one process: the other must not wait for it, nor load its own."""
    del folder
    model = sharded(network())
    average = RunningAverage(model, "uniform")
    average.step()
    state = average.state_dict()
    before = {name: whole(tensor) for name, tensor in average.average.items()}
    changes: list[dict[str, Any]] = [{"memory": [{}]}, {"captures": -1}, {"memory": [3]}]
    for change in changes:
        damaged = {**state, **change} if dist.get_rank() else state
        with pytest.raises((MergeError, AttributeError)) as refused:
            average.load_state_dict(damaged)
        assert dist.get_rank() or isinstance(refused.value, MismatchError)
        assert average.captures == 1
    shorter = {name: local_of(tensor)[:-1] for name, tensor in state["memory"][0].items()}
    with pytest.raises(MismatchError, match="has shape"):
        average.load_state_dict({**state, "memory": [shorter]} if dist.get_rank() else state)
    same(average.average, before, 0)


def prepare() -> None:
    """Import once, for all processes, what takes a while."""
    importlib.import_module("torch._dynamo")


CHECKS = {
    fsdp2: (2,),
    ddp: (2,),
    every_process_has_the_same_importance: (2,),
    fsdp1: (2,),
    a_state_that_one_process_refuses_is_refused_by_all: (2,),
}


def test_two_processes(on_processes: Callable[[str, int], None]) -> None:
    on_processes(__file__, 2)
