"""Models that DeepSpeed trains with ZeRO 1, 2 or 3: float32 masters, spread over processes, and the weights that follow them.

``SFA(engine, ...)`` finds its way here. What is averaged are the masters, in place and where they are; then the weights in
the dtype of the computation are made of them, as a step of DeepSpeed does. To write one without the other is the usual mistake:
the model computes with old weights until the next step, or the next step brings the old ones back::

    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    sfa = SFA(engine, beta=0.5, p=0.25, total_steps=1000)
    for batch in batches:
        engine.backward(engine(batch))
        engine.step()
        if engine.was_step_applied():  # not so while gradients are accumulated, nor when a scaled loss overflowed
            sfa.step()
"""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_fp32_param
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from mergekit_cl.errors import MergeError
from mergekit_cl.models.sharded import Leaf, Shard


def source_of(engine: "deepspeed.DeepSpeedEngine") -> "nn.Module | Zero":
    """Return what is averaged of an engine: the masters of ZeRO; the module itself where it has none (stage 0 in float32).

    Raises:
        MergeError: The engine is of a kind that has not been tested; see `Zero`.

    """
    if isinstance(engine, PipelineEngine):
        raise MergeError("SFA: DeepSpeed's pipeline engine has not been tested with merges in training, and is refused")
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return engine.module
    return Zero(engine.module, engine.optimizer)


@dataclass(frozen=True, eq=False)
class Zero:
    """Parameters of a model that is trained with ZeRO: the float32 masters, each process's part where it is.

    Args:
        module: The model, as in ``engine.module``.
        optimizer: DeepSpeed's optimizer, as in ``engine.optimizer``.

    Raises:
        MergeError: No ZeRO of stage 1 to 3; or ``round_robin_gradients``, experts, tensor parallelism, masters on a disk, or on
            another device than the model.

    """

    module: nn.Module
    optimizer: Any

    def __post_init__(self) -> None:
        optimizer = self.optimizer
        kind = type(optimizer)
        if kind not in (DeepSpeedZeroOptimizer, BF16_Optimizer, DeepSpeedZeroOptimizer_Stage3):  # subclasses were not tested
            raise MergeError(f"SFA: DeepSpeed's {kind.__name__} has not been tested with merges in training; use ZeRO 1 to 3")
        parallel = getattr(optimizer, "model_parallel_group", None)  # of ZeRO 1 to 3; BF16_Optimizer keeps what it comes from
        mpu = getattr(optimizer, "mpu", None)
        refused = {
            "round_robin_gradients, with which DeepSpeed takes masters of one parameter for those of another": (
                kind is DeepSpeedZeroOptimizer and optimizer.round_robin_gradients  # so in 0.19.8
            ),
            "experts, which has not been tested": getattr(optimizer, "has_moe_layers", False),
            "tensor parallelism, which has not been tested": (parallel is not None and dist.get_world_size(parallel) > 1)
            or (mpu is not None and bwc_tensor_model_parallel_world_size(mpu) > 1),
            "masters on a disk, which has not been tested": getattr(optimizer, "swap_optimizer", False),
            "parameters on a disk, which has not been tested": getattr(optimizer, "params_in_nvme_and_cpu", False),
            "masters on another device than the model, which has not been tested": (
                self._masters()[0].device != _weights_of(self.module).device
            ),
        }
        for reason in [reason for reason, there in refused.items() if there]:
            raise MergeError(f"SFA: DeepSpeed is set to {reason}; merges in training are refused")

    def leaves(self) -> dict[str, Leaf]:
        """Return all parameters by name: shards of the masters, in their memory; what is frozen as the model has it."""
        return {name: self._leaf(parameter) for name, parameter in self.module.named_parameters()}

    def before_write(self) -> None:
        """Do nothing: the masters are always where `leaves` says."""

    def after_write(self) -> None:
        """Make the weights of all processes of the masters, as the end of DeepSpeed's own step does; all processes call this.

        ZeRO 1 and 2 gather the weights once; ZeRO 3 gathers those that it keeps whole (small ones).
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def _leaf(self, parameter: nn.Parameter) -> Leaf:
        if hasattr(parameter, "ds_id"):
            master = safe_get_local_fp32_param(parameter)  # None for frozen ones
            group = parameter.ds_process_group
            local = parameter.ds_tensor if master is None else master
            start = min(dist.get_rank(group) * local.numel(), parameter.ds_numel)
            local = local.detach()[: parameter.ds_numel - start]  # the last process's part is padded
            return Shard(local.requires_grad_(parameter.requires_grad), parameter.ds_shape, start, group)
        if not hasattr(parameter, "_hp_mapping"):
            return parameter
        mapping = parameter._hp_mapping  # None where this process has no part of it
        local = self._masters()[0][:0] if mapping is None else mapping.hp_fragment
        start = 0 if mapping is None else mapping.lp_fragment_address.start
        return Shard(local.detach().requires_grad_(parameter.requires_grad), parameter.shape, start, parameter._dp_group)

    def _masters(self) -> list[torch.Tensor]:
        """Return this process's part of the masters, flat, one for each group of parameters."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, name):
                return list(getattr(self.optimizer, name))
        raise AssertionError(type(self.optimizer))


def _weights_of(module: nn.Module) -> torch.Tensor:
    """Return a parameter of the model, or the part of it that this process holds."""
    parameter = next(module.parameters())
    return getattr(parameter, "ds_tensor", parameter)
