"""SFA on models that DeepSpeed trains with ZeRO 1 to 3, on 2 and 3 processes: masters, weights, and what the next step does."""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mergekit_cl import MergeError, NonFiniteError, merge
from mergekit_cl.adapters.torch import SFA, RunningAverage
from mergekit_cl.models.sharded import local_of

Weights = dict[str, torch.Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "ZeRO 1, gradients in float32": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "ZeRO 2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "ZeRO 2 in float32": {"zero_optimization": {"stage": 2}},
    "ZeRO 2, masters offloaded": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
    },
    "ZeRO 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 8}, "bf16": {"enabled": True}},
    "ZeRO 3 in float32": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 8}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "no ZeRO": {},
    "no ZeRO, in bfloat16": {"bf16": {"enabled": True}},
    "ZeRO 1, gradients in turns": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}, "bf16": {"enabled": True}},
}
METHODS: dict[str, dict[str, Any]] = {"sfa": {"beta": 0.3}, "ties": {"density": 0.4}, "slerp": {"t": 0.4}}


def prepare() -> None:
    """Import DeepSpeed as on a machine without a GPU, and without the compiler that its collectives on a CPU would call."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings(action="ignore"):
        import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3))


def engine(kind: str, model: nn.Module | None = None, accumulate: int = 1) -> Any:
    """Build the engine, which speaks of deprecated functions of torch that it uses."""
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(LOCAL_RANK=f"{rank}", RANK=f"{rank}", WORLD_SIZE=f"{world}", LOCAL_SIZE=f"{world}")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # not used: the processes have met already
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = network() if model is None else model
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        **(KINDS | OTHERS)[kind],
    }
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def update(engine: Any, step: int) -> None:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
    loss = nn.functional.cross_entropy(compute(engine, inputs).float(), torch.arange(4) % 3)
    engine.backward(loss)
    engine.step()


def compute(engine: Any, inputs: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = engine(inputs.bfloat16() if engine.bfloat16_enabled() else inputs)
    return result


def masters(engine: Any) -> Weights:
    """Gather the float32 masters, by DeepSpeed's own means."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def weights(engine: Any) -> Weights:
    """Gather the weights that the model computes with."""
    import deepspeed

    stage = engine.zero_optimization_stage()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def same(one: Weights, other: Weights) -> None:
    assert list(one) == list(other)
    different = [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    assert not different, f"other bits in {different}"


def by_hand(sfa: SFA, anchor: Weights, present: Weights) -> Weights:
    based = sfa.method == "ties"
    merged: Weights = merge(
        [present] if based else [anchor, present], sfa.method, base=anchor if based else None, **sfa.parameters
    )
    return merged


def follow(kind: str, method: str) -> None:
    """Train; compare masters and weights after each merge, what the model computes with them, and the masters a step later."""
    trained, other = engine(kind), engine(kind)
    anchor = masters(trained)
    sfa = SFA(trained, method=method, every=2, **METHODS[method])
    assert list(sfa.state_dict()["anchor"]) == list(anchor)
    inputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for step in range(1, 6):
        update(trained, step)
        update(other, step)
        with torch.no_grad():
            compute(trained, inputs)
        before = masters(trained)
        expected = by_hand(sfa, anchor, before) if step % 2 == 0 else before
        assert sfa.step() == (step % 2 == 0)
        same(masters(trained), expected)
        if step % 2 == 0:
            assert any(not torch.equal(before[name], expected[name]) for name in before)
            put(other, expected)
        same(masters(other), expected)
        dtype = torch.bfloat16 if trained.bfloat16_enabled() else torch.float32
        same(weights(trained), {name: tensor.to(dtype) for name, tensor in expected.items()})
        whole = network().to(dtype)
        whole.load_state_dict(expected)
        with torch.no_grad():
            assert torch.equal(compute(trained, inputs), whole(inputs.to(dtype)))
    assert sfa.merges == 2


def put(engine: Any, values: Weights) -> None:
    """Write masters and weights by DeepSpeed's public functions, one parameter after another."""
    import deepspeed
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    partitioned = engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.named_parameters():
        if partitioned:
            size = safe_get_local_fp32_param(parameter).numel()
            part = torch.zeros(size)
            own = values[name].flatten()[dist.get_rank() * size :][:size]
            part[: own.numel()] = own
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_full_fp32_param(parameter, values[name])
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned), torch.no_grad():
            if parameter.numel():
                parameter.copy_(values[name])


def masters_and_weights_of_every_stage(folder: Path) -> None:
    for number, kind in enumerate(KINDS):
        try:
            follow(kind, ["sfa", "ties", "slerp"][number % 3])
        except Exception as error:
            error.add_note(kind)
            raise


def every_method_in_zero_3(folder: Path) -> None:
    for method in METHODS:
        follow("ZeRO 3", method)


def a_nan_on_one_process_stops_all(folder: Path) -> None:
    for kind in ("ZeRO 2", "ZeRO 3"):
        trained = engine(kind)
        sfa = SFA(trained, every=1)
        update(trained, 1)
        held, before = own(trained), weights(trained)
        if dist.get_rank() == 0:
            held["0.weight"][-1] = float("nan")
        with pytest.raises(NonFiniteError, match=r"0\.weight"):
            sfa.step()
        same(weights(trained), before)
        assert sfa.merges == 0


def own(engine: Any) -> Weights:
    """This process's part of the masters, in their memory."""
    from mergekit_cl.adapters.torch.deepspeed import Zero

    return {name: local_of(leaf) for name, leaf in Zero(engine.module, engine.optimizer).leaves().items()}


def frozen_parameters_are_left_alone(folder: Path) -> None:
    for kind in ("ZeRO 1", "ZeRO 3"):
        model = network()
        model[2].requires_grad_(False)
        trained = engine(kind, model)
        sfa, before = SFA(trained, beta=0.5, every=1), weights(trained)
        assert list(sfa.state_dict()["anchor"]) == ["0.weight", "0.bias", "3.weight", "3.bias"]
        update(trained, 1)
        assert sfa.step()
        after = weights(trained)
        assert [name for name in before if torch.equal(before[name], after[name])] == ["2.weight", "2.bias"]


def accumulated_gradients_are_no_steps(folder: Path) -> None:
    trained = engine("ZeRO 2", accumulate=3)
    sfa, merged = SFA(trained, every=2), []
    for step in range(1, 13):
        update(trained, step)
        if trained.was_step_applied() and sfa.step():
            merged.append(step)
    assert merged == [6, 12]


def resumed_from_a_checkpoint(folder: Path) -> None:
    from mergekit_cl.adapters.torch.deepspeed import Zero

    for kind in ("ZeRO 2", "ZeRO 3"):
        file = folder / f"{kind} {dist.get_rank()}.pt"
        trained = engine(kind)
        sfa = SFA(trained, method="ties", density=0.4, every=2)
        for step in range(1, 6):
            update(trained, step)
            sfa.step()
            if step == 3:
                trained.save_checkpoint(str(folder / kind))
                torch.save(sfa.state_dict(), file)
        again = engine(kind)
        resumed = SFA(Zero(again.module, again.optimizer), method="ties", density=0.4, every=2)  # all that a Trainer tells
        again.load_checkpoint(str(folder / kind))
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for step in (4, 5):
            update(again, step)
            assert resumed.step() == (step == 4)
        same(masters(again), masters(trained))
        same(weights(again), weights(trained))


def without_masters_the_module_is_averaged(folder: Path) -> None:
    trained = engine("no ZeRO")
    sfa, anchor = SFA(trained, beta=0.25, every=1), weights(trained)
    update(trained, 1)
    before = weights(trained)
    assert sfa.step()
    same(weights(trained), by_hand(sfa, anchor, before))


def what_was_not_tested_is_refused(folder: Path) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from mergekit_cl.adapters.torch.deepspeed import Zero

    for kind, message in (
        ("no ZeRO, in bfloat16", "FP16_UnfusedOptimizer has not been tested.*use ZeRO 1 to 3"),
        ("ZeRO 1, gradients in turns", "round_robin_gradients, with which DeepSpeed takes masters"),
    ):
        with pytest.raises(MergeError, match=message):
            SFA(engine(kind), every=1)
    trained = engine("ZeRO 3")
    for adapter in (SFA, RunningAverage):
        with pytest.raises(MergeError, match=r"call step\(\)"):
            adapter(trained, every=1).attach(trained.optimizer)
    with pytest.raises(MergeError, match="pass the engine"):
        SFA(trained.module, every=1)
    for name, message in (("swap_optimizer", "masters on a disk"), ("params_in_nvme_and_cpu", "parameters on a disk")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trained.optimizer, name, True)
            with pytest.raises(MergeError, match=message):
                SFA(trained, every=1)
    other: Any = type("OtherOptimizer", (DeepSpeedZeroOptimizer_Stage3,), {})
    with pytest.raises(MergeError, match="OtherOptimizer has not been tested"):
        Zero(trained.module, other.__new__(other))


CHECKS: dict[Callable[[Path], None], tuple[int, ...]] = {
    masters_and_weights_of_every_stage: (2, 3),
    every_method_in_zero_3: (3,),
    a_nan_on_one_process_stops_all: (2, 3),
    frozen_parameters_are_left_alone: (2,),
    accumulated_gradients_are_no_steps: (2,),
    resumed_from_a_checkpoint: (2,),
    without_masters_the_module_is_averaged: (2,),
    what_was_not_tested_is_refused: (2,),
}


@pytest.mark.parametrize("world", [2, 3])
def test_on_processes(on_processes: Callable[[str, int], None], world: int) -> None:
    on_processes(__file__, world)
