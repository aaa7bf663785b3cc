"""SFA on sharded models, on 2, 3 and 4 processes: bit-equal to merges of the gathered model, resumed, refused alike on all.

Every process carries out the functions in ``CHECKS``; see the fixture `on_processes`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from mergekit_cl import NonFiniteError, merge
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor
from mergekit_cl.adapters.torch.running_average import RunningAverage
from mergekit_cl.registry import find

Weights = dict[str, torch.Tensor]
METHODS: dict[str, dict[str, Any]] = {
    "sfa": {"beta": 0.3},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "slerp": {"t": 0.4},
}


class Network(nn.Module):
    """Tied embeddings; sizes that none of 2, 3 and 4 processes share evenly, one of them smaller than 4."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(13, 6)
        self.first = nn.Linear(6, 301)
        self.second = nn.Linear(301, 3)
        self.third = nn.Linear(3, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(self.embed(tokens.flatten()))))))
        scores: torch.Tensor = self.head(self.norm(hidden))
        return scores


def sharded(mesh: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Network:
    network = Network(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard([network.first, network.second], mesh=mesh, **options)
    fully_shard(network, mesh=mesh, **options)
    return network


def batch(step: int) -> torch.Tensor:
    """Tokens that are others on every process."""
    return torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, *, evaluate: bool = True) -> None:
    """Take a step of the optimizer; then evaluate, which leaves a part of the parameters gathered."""
    optimizer.zero_grad()
    tokens = batch(step)
    nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1, 1).flatten()).backward()
    optimizer.step()
    if evaluate:
        scores(model)


def scores(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(12).view(2, 6))
    return result


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def full(model: nn.Module) -> Weights:
    """Gather all parameters of a model, by FSDP's own means."""
    with contextlib.ExitStack() as stack:
        if isinstance(model, FullyShardedDataParallel):
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            config = FullStateDictConfig(rank0_only=False)
            stack.enter_context(FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config))
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}
            return dict(sorted(weights.items()))
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    named = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in sorted(named.items())}


def by_hand(sfa: SFA, anchor: Weights, present: Weights, step: int) -> Weights:
    """What a merge of gathered tensors gives."""
    based = find(sfa.method).base == "required"
    seed = (sfa.seed << 32) + step
    models = [present] if based else [anchor, present]
    merged: Weights = merge(models, sfa.method, base=anchor if based else None, seed=seed, **sfa.parameters)
    return merged


def same(one: Weights, other: Weights) -> None:
    assert list(one) == list(other)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"other bits in {different}"


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, sfa: SFA, steps: range) -> None:
    """Train; compare each merge with that of gathered tensors, and the next forward pass with that of a whole model."""
    anchor, merges = full(model), 0
    for step in steps:
        update(model, optimizer, step)
        before = full(model)
        scores(model)
        expected = by_hand(sfa, anchor, before, step) if step % sfa.every == 0 else before
        if sfa.step():
            merges += 1
            assert any(not torch.equal(before[name], expected[name]) for name in before)
        computed = scores(model)
        same(full(model), expected)
        whole = Network(next(iter(expected.values())).dtype)
        whole.load_state_dict({**expected, "head.weight": expected["embed.weight"]})
        assert torch.equal(computed, scores(whole))
    assert merges == sfa.merges == len(steps) // sfa.every


def data_parallel_without_communication(folder: Path) -> None:
    torch.manual_seed(0)
    network = Network()
    model = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer, sfa = adam(model), SFA(model, beta=0.3, every=2)
    places = [p.data_ptr() for p in model.parameters()]
    assert sfa.state_dict()["anchor"].keys() == dict(network.named_parameters()).keys()
    anchor = full(network)
    for step in range(1, 5):
        update(model, optimizer, step)
        gradients = [(p.grad, p.grad.data_ptr()) for p in model.parameters() if p.grad is not None]
        before = full(network)
        with forbidden_communication():
            merged = sfa.step()
        assert merged == (step % 2 == 0)
        same(full(network), by_hand(sfa, anchor, before, step) if merged else before)
        assert [(p.grad, p.grad.data_ptr()) for p in model.parameters() if p.grad is not None] == gradients
    assert [p.data_ptr() for p in model.parameters()] == places
    everywhere: list[Weights] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(
        everywhere, {**full(network), **{f"anchor of {n}": t for n, t in sfa.state_dict()["anchor"].items()}}
    )
    for weights in everywhere:
        same(weights, everywhere[0])


@contextlib.contextmanager
def forbidden_communication() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("communicates")

    names = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, refuse)
        yield


def fully_sharded_with_every_kind_of_method(folder: Path) -> None:
    for method, parameters in METHODS.items():
        model = sharded()
        assert all(isinstance(p, DTensor) for p in model.parameters())
        follow(model, adam(model), SFA(model, method=method, every=2, seed=5, **parameters), range(1, 5))


def elementwise_merges_do_not_communicate(folder: Path) -> None:
    model = sharded()
    optimizer, sfa = adam(model), SFA(model, every=1, nonfinite="allow")
    for step in range(1, 3):
        update(model, optimizer, step)
        with forbidden_communication():
            assert sfa.step()


def an_anchor_taken_after_an_evaluation(folder: Path) -> None:
    model = sharded()
    optimizer = adam(model)
    update(model, optimizer, 1)
    scores(model)
    assert any(not isinstance(p, DTensor) for p in model.parameters())  # of the root
    before = full(model)
    scores(model)
    sfa = SFA(model, beta=1.0, every=1)
    assert all(isinstance(leaf, DTensor) for leaf in sfa.state_dict()["anchor"].values())
    update(model, optimizer, 2)
    assert sfa.step()
    same(full(model), before)
    scores(model)
    sfa.new_task()
    update(model, optimizer, 3)
    assert sfa.step()
    same(full(model), before)


def computed_in_bfloat16_kept_in_float32(folder: Path) -> None:
    model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer, sfa = adam(model), SFA(model, beta=0.3, every=2)
    anchor = full(model)
    for step in range(1, 5):
        update(model, optimizer, step)
        before = full(model)
        scores(model)
        sfa.step()
        same(full(model), by_hand(sfa, anchor, before, step) if step % 2 == 0 else before)
    assert all(tensor.dtype == torch.float32 for tensor in sfa.state_dict()["anchor"].values())


def parameters_in_bfloat16(folder: Path) -> None:
    for method in ("sfa", "ties"):
        model = sharded(dtype=torch.bfloat16)
        follow(model, adam(model), SFA(model, method=method, every=2, **METHODS[method]), range(1, 5))


def sharded_in_groups_that_are_replicated(folder: Path) -> None:
    for method, parameters in METHODS.items():
        model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        follow(model, adam(model), SFA(model, method=method, every=2, **parameters), range(1, 5))


def parameters_offloaded(folder: Path) -> None:
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))
    follow(model, adam(model), SFA(model, beta=0.3, every=2), range(1, 5))


def sharded_along_another_dimension(folder: Path) -> None:
    from torch.distributed.tensor import Shard

    model = sharded(shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] == 6 else None)
    follow(model, adam(model), SFA(model, method="ties", density=0.4, every=2), range(1, 5))


def a_hook_of_the_optimizer(folder: Path) -> None:
    model, other = sharded(), sharded()
    optimizer, by_step = adam(model), adam(other)
    attached, stepped = SFA(model, every=2).attach(optimizer), SFA(other, every=2)
    for step in range(1, 5):
        update(model, optimizer, step)
        update(other, by_step, step, evaluate=False)
        stepped.step()
    assert attached.merges == 2
    same(full(model), full(other))


def equal_to_a_loop_that_merges_by_hand(folder: Path) -> None:
    model, other = sharded(), sharded()
    optimizer, again, sfa = adam(model), adam(other), SFA(model, beta=0.3, p=0.4, total_steps=5)
    anchor = full(other)
    for step in range(1, 6):
        update(model, optimizer, step)
        update(other, again, step)
        if sfa.step():
            merged = merge([anchor, full(other)], beta=0.3)
            set_model_state_dict(
                other, {**merged, "head.weight": merged["embed.weight"]}, options=StateDictOptions(full_state_dict=True)
            )
    assert sfa.merges == 3
    same(full(model), full(other))


def a_nan_on_one_process_stops_all(folder: Path) -> None:
    for method in ("sfa", "ties"):
        model = sharded()
        optimizer, sfa = adam(model), SFA(model, method=method, every=2, **METHODS[method])
        update(model, optimizer, 1, evaluate=False)
        assert not sfa.step()
        update(model, optimizer, 2, evaluate=False)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.first.weight.to_local().view(-1)[-1] = float("nan")
        before = full(model)
        with pytest.raises(NonFiniteError, match=r"first\.weight"):
            sfa.step()
        after = full(model)
        assert all(torch.equal(before[name].nan_to_num(9), after[name].nan_to_num(9)) for name in before)
        assert sfa.merges == 0
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.second.weight.to_local().view(-1)[0] = float("inf")
    with pytest.raises(NonFiniteError, match="second"):
        SFA(model, every=2)


def frozen_parameters_are_left_alone(folder: Path) -> None:
    model = sharded()
    model.second.requires_grad_(False)
    sfa, optimizer = SFA(model, beta=0.5, every=2), adam(model)
    assert not [name for name in sfa.state_dict()["anchor"] if name.startswith("second")]
    before = full(model)
    for step in range(1, 3):
        update(model, optimizer, step)
        sfa.step()
    after = full(model)
    assert [name for name in before if torch.equal(before[name], after[name])] == ["second.bias", "second.weight"]


def parameters_unfrozen_on_the_way(folder: Path) -> None:
    model = sharded()
    model.second.requires_grad_(False)
    optimizer = adam(model)
    sfa, anchor = SFA(model, beta=0.25, every=4).attach(optimizer), full(model)
    for step in range(1, 5):
        model.second.requires_grad_(step > 2)
        if step == 4:
            sfa.detach()
        update(model, optimizer, step)
    before = full(model)
    assert not torch.equal(before["second.weight"], anchor["second.weight"])
    assert sfa.step()
    same(full(model), by_hand(sfa, anchor, before, 4))


def flattened_by_fsdp1(folder: Path) -> None:
    strategies = [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]
    cases: list[dict[str, Any]] = [{"sharding_strategy": strategy} for strategy in strategies]
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        cases = [{"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}]
    for case in cases:
        for method, original in (("sfa", True), ("ties", True), ("dare_ties", False), ("slerp", False)):
            options = {**case, "use_orig_params": original, "device_id": torch.device("cpu")}
            with warnings.catch_warnings(action="ignore"):  # torch: one strategy, and collectives that it uses, are deprecated
                network = Network()
                network.first = FullyShardedDataParallel(network.first, **options)
                model = FullyShardedDataParallel(network, **options)
                follow(model, adam(model), SFA(model, method=method, every=2, **METHODS[method]), range(1, 5))


def resumed_from_a_checkpoint(folder: Path) -> None:
    model = sharded()
    optimizer, sfa = adam(model), SFA(model, method="ties", density=0.4, p=0.5, total_steps=6)
    for step in range(1, 7):
        update(model, optimizer, step)
        sfa.step()
        if step == 4:
            save(folder / "resumed", model, optimizer, sfa)
    again = sharded()
    optimizer = adam(again)
    resumed = SFA(again, method="ties", density=0.4, p=0.5, total_steps=6)
    load(folder / "resumed", again, optimizer, resumed)
    assert resumed.step_count == 4
    for step in (5, 6):
        update(again, optimizer, step)
        assert resumed.step() == (step == 6)
    same(full(model), full(again))


def resumed_by_fewer_processes(folder: Path) -> None:
    """Save on all processes, go on with all but the last: another sharding of the same model and anchor."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = sharded()
    optimizer, sfa = adam(model), SFA(model, method="ties", density=0.4, every=2)
    for step in range(1, 4):
        update(model, optimizer, step)
        sfa.step()
    save(folder / "fewer", model, optimizer, sfa)
    expected, anchor = full(model), {name: tensor.full_tensor() for name, tensor in sfa.state_dict()["anchor"].items()}
    few = DeviceMesh("cpu", list(range(world - 1)))
    if rank < world - 1:
        again = sharded(few)
        optimizer = adam(again)
        resumed = SFA(again, method="ties", density=0.4, every=2)
        load(folder / "fewer", again, optimizer, resumed, process_group=few.get_group())
        same(full(again), expected)
        loaded = resumed.state_dict()["anchor"]
        same({name: tensor.full_tensor() for name, tensor in loaded.items()}, anchor)
        assert all(tensor.device_mesh == few for tensor in loaded.values())
        update(again, optimizer, 4)
        before = full(again)
        assert resumed.step()
        same(full(again), by_hand(resumed, dict(sorted(anchor.items())), before, 4))


def an_anchor_in_a_folder(folder: Path) -> None:
    """The anchor is read from the disk at merges; a run goes on from it, with what `SFA.state_dict` says, or by its steps."""
    model, other = sharded(), sharded()
    optimizer, sfa = adam(model), SFA(model, beta=0.3, every=2, anchor=folder / "anchor")
    again, memory = adam(other), SFA(other, beta=0.3, every=2)
    for step in range(1, 6):
        update(model, optimizer, step)
        update(other, again, step)
        assert sfa.step() == memory.step()
        same(full(model), full(other))
        if step == 3:
            save(folder / "state", model, optimizer, sfa)
    assert not sfa.state_dict()["anchor"]
    expected = full(model)
    for by_steps in (False, True):
        model = sharded()
        optimizer = adam(model)
        resumed = SFA(model, beta=0.3, every=2, anchor=folder / "anchor")
        load(folder / "state", model, optimizer, resumed)
        if by_steps:
            resumed = SFA(model, beta=0.3, every=2)
            resumed.resume_from(folder / "anchor", 3)
        for step in (4, 5):
            update(model, optimizer, step)
            assert resumed.step() == (step == 4)
        same(full(model), expected)


def averages_and_penalties_on_shards(folder: Path) -> None:
    model, other = sharded(), Network()
    optimizer = adam(model)
    average, pull = RunningAverage(model, "uniform"), L2Anchor(model, 0.1)
    expected, anchor = [], full(model)
    for step in range(1, 4):
        update(model, optimizer, step, evaluate=False)
        scores(model)
        average.step()
        expected.append(full(model))
    mean = merge(expected, "linear")
    found = {name: tensor.full_tensor() for name, tensor in sorted(average.average.items())}
    assert all((found[name] - mean[name]).abs().max() < 1e-6 for name in mean)
    scores(model)
    with average.swapped():
        same(full(model), found)
        other.load_state_dict({**found, "head.weight": found["embed.weight"]})
        assert torch.equal(scores(model), scores(other))
    same(full(model), expected[-1])
    optimizer.zero_grad()
    scores(model)
    model(batch(9)).sum().backward()
    before = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters() if p.grad is not None}
    pull.add_gradients()
    for name, p in model.named_parameters():
        added = p.grad.full_tensor() - before[name]
        assert torch.allclose(added, 0.1 * (expected[-1][name] - anchor[name]), atol=1e-5)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sfa: SFA) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "sfa": sfa.state_dict()}, checkpoint_id=str(folder))


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sfa: SFA, process_group: dist.ProcessGroup | None = None
) -> None:
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "sfa": sfa.state_dict()}
    dcp.load(saved, checkpoint_id=str(folder), process_group=process_group)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    sfa.load_state_dict(saved["sfa"])


ALL = (2, 3, 4)
CHECKS: dict[Callable[[Path], None], tuple[int, ...]] = {
    data_parallel_without_communication: ALL,
    fully_sharded_with_every_kind_of_method: ALL,
    elementwise_merges_do_not_communicate: ALL,
    an_anchor_taken_after_an_evaluation: ALL,
    computed_in_bfloat16_kept_in_float32: (2, 4),
    parameters_in_bfloat16: (3,),
    sharded_in_groups_that_are_replicated: (4,),
    parameters_offloaded: (2,),
    sharded_along_another_dimension: (3,),
    a_hook_of_the_optimizer: ALL,
    equal_to_a_loop_that_merges_by_hand: ALL,
    a_nan_on_one_process_stops_all: ALL,
    frozen_parameters_are_left_alone: ALL,
    parameters_unfrozen_on_the_way: (3,),
    flattened_by_fsdp1: (2, 4),
    resumed_from_a_checkpoint: ALL,
    resumed_by_fewer_processes: ALL,
    an_anchor_in_a_folder: ALL,
    averages_and_penalties_on_shards: (2, 3),
}


@pytest.mark.parametrize("world", ALL)
def test_on_processes(on_processes: Callable[[str, int], None], world: int) -> None:
    on_processes(__file__, world)
