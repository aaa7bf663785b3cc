"""merge() of three state dicts of 300 bfloat16 tensors against mergekit's merge_state_dicts."""

from collections.abc import Callable

import pytest
import torch

from mergekit_cl import merge

WEIGHTS = [1.0, 2.0, 3.0]


def test_state_dicts(
    scaled: Callable[[int], int],
    transformer: Callable[..., dict[str, torch.Tensor]],
    threads: int,
    race: Callable[..., None],
    check: Callable[..., None],
) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    models = [transformer(scaled(512 << 20), torch.bfloat16, seed) for seed in range(3)]

    def ours() -> dict[str, torch.Tensor]:
        return merge(models, method="linear", weight=WEIGHTS, threads=threads)  # type: ignore[no-any-return]

    def theirs() -> dict[str, torch.Tensor]:
        return mergekit.merge_state_dicts(models, "linear", parameters={"weight": WEIGHTS})  # type: ignore[no-any-return]

    for contender in (ours, theirs):
        merged = contender()
        for name in models[0]:
            check(merged[name], [model[name] for model in models], [1 / 6, 2 / 6, 3 / 6])
    del merged
    race(
        {"merge()": ours, "mergekit merge_state_dicts": theirs},
        rounds=5,
        table="state_dicts",
        case={"models": len(models), "tensors": len(models[0]), "elements": sum(t.numel() for t in models[0].values())},
        bytes=4 * sum(tensor.nbytes for tensor in models[0].values()),
    )
