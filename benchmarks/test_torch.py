"""merge() of two large tensors against PyTorch's own interpolation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mergekit_cl import merge


@pytest.mark.parametrize("into", ["new memory", "out", "the first model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interpolation(
    dtype: torch.dtype,
    into: str,
    scaled: Callable[[int], int],
    threads: int,
    race: Callable[..., None],
    check: Callable[..., None],
) -> None:
    a, b = (torch.rand(scaled(64 << 20)).to(dtype) for _ in range(2))
    out, mine, theirs = torch.zeros_like(a), a.clone(), a.clone()

    def merged(target: torch.Tensor | None, nonfinite: Any = "error") -> Any:
        first = mine if target is mine else a
        return merge([first, b], method="linear", weight=[0.75, 0.25], out=target, nonfinite=nonfinite, threads=threads)

    def lerp() -> torch.Tensor:
        if into == "the first model":
            torch._foreach_lerp_([theirs], [b], 0.25)
            return theirs
        return torch.lerp(a, b, 0.25, out=out if into == "out" else None)

    target = {"new memory": None, "out": out, "the first model": mine}[into]
    check(merged(target), [a, b], [0.75, 0.25])
    check(lerp(), [a, b], [0.75, 0.25])
    rival = "torch._foreach_lerp_" if into == "the first model" else "torch.lerp"
    race(
        {"merge()": lambda: merged(target), 'merge(nonfinite="allow")': lambda: merged(target, "allow"), "PyTorch": lerp},
        rounds=15,
        table="torch",
        case={"dtype": str(dtype).removeprefix("torch."), "into": into, "PyTorch": rival},
        bytes=3 * a.nbytes,
    )
