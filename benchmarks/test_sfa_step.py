"""A step of the SFA adapter on a model of 300 tensors against PyTorch's ways to average weights in a training loop."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from mergekit_cl.adapters.torch import SFA


def model_of(tensors: dict[str, torch.Tensor]) -> torch.nn.ParameterList:
    return torch.nn.ParameterList(tensor.clone() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sfa_step(
    dtype: torch.dtype,
    scaled: Callable[[int], int],
    transformer: Callable[..., dict[str, torch.Tensor]],
    threads: int,
    race: Callable[..., None],
    check: Callable[..., None],
) -> None:
    anchor, current = (transformer(scaled(128 << 20), dtype, seed) for seed in range(2))
    model = model_of(anchor)
    sfa = SFA(model, beta=0.5, every=1, threads=threads)
    unchecked = SFA(model, beta=0.5, every=1, threads=threads, nonfinite="allow")
    trained = model_of(current)
    model.load_state_dict(trained.state_dict())
    kept, lerped = list(anchor.values()), [tensor.clone() for tensor in current.values()]
    averages = {
        "multi_avg_fn": AveragedModel(model_of(anchor), multi_avg_fn=get_swa_multi_avg_fn()),
        "avg_fn": AveragedModel(model_of(anchor), avg_fn=get_swa_avg_fn()),
    }
    for average in averages.values():
        average.n_averaged += 1  # the anchor counts as the first model, so that one update is their mean

    assert sfa.step()
    torch._foreach_lerp_(lerped, kept, 0.5)
    for average in averages.values():
        average.update_parameters(trained)
    results = {"SFA": model, "_foreach_lerp_": lerped, **averages}
    for contender, result in results.items():
        tensors = result if contender == "_foreach_lerp_" else result.parameters()
        for merged, *inputs in zip(tensors, kept, current.values(), strict=True):
            check(merged, inputs, [0.5, 0.5], roundings=3 if contender == "avg_fn" else 1)

    def checked() -> None:
        assert torch.stack(torch._foreach_norm(lerped, torch.inf)).isfinite().all()
        torch._foreach_lerp_(lerped, kept, 0.5)

    race(
        {
            "SFA.step": sfa.step,
            'SFA.step, nonfinite="allow"': unchecked.step,
            "torch._foreach_lerp_": lambda: torch._foreach_lerp_(lerped, kept, 0.5),
            "torch._foreach_lerp_ after a check": checked,
            **{f"AveragedModel, {name}": partial(average.update_parameters, trained) for name, average in averages.items()},
        },
        rounds=15,
        table="sfa_step",
        case={
            "dtype": str(dtype).removeprefix("torch."),
            "tensors": len(kept),
            "elements": sum(t.numel() for t in kept),
        },
        bytes=3 * sum(tensor.nbytes for tensor in kept),
    )
