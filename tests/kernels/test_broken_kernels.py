"""The checks of compiling.py on kernels that are broken on purpose, each in one way: they find that, and nothing else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

# mypy: allow-untyped-defs, allow-incomplete-defs


@triton.jit
def _kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    stop,
    SIN: tl.constexpr,  # noqa: N803
    DTYPES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Compute ``out = x * y + x / sqrt(y)``, in the wrong way that ``SIN`` names, if any."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < stop) if SIN == "masked" else tl.load(x_ptr + at + (1 if SIN == "unaligned" else 0))
    y = tl.load(y_ptr + at)
    root = tl.sqrt(y) if SIN == "approximate root" else tl.sqrt_rn(y)
    if SIN == "approximate quotient":
        quotient = x / root
    elif SIN == "reciprocal":
        quotient = x * tl.inline_asm_elementwise("v_rcp_f32 $0, $1;", "=v,v", [root], tl.float32, is_pure=True, pack=1)
    else:
        quotient = tl.div_rn(x, root)
    out = tl.fma(x, y, quotient) if SIN == "contracted by hand" else x * y + quotient
    if SIN == "flushed":
        out = tl.inline_asm_elementwise("add.ftz.f32 $0, $1, $2;", "=r,r,r", [out, x], tl.float32, is_pure=True, pack=1)
    elif SIN == "local memory":
        out += libdevice.sin(x)
    elif SIN == "too large":
        out -= tl.sum(out, axis=0)
    if SIN == "masked store":
        tl.store(out_ptr + at, out, mask=at < stop)
    elif SIN == "truncated":
        tl.store(out_ptr + at, (out.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16))
    elif DTYPES[2] == tl.uint16:
        bits = out.to(tl.uint32, bitcast=True)
        tl.store(out_ptr + at, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16))
    else:
        tl.store(out_ptr + at, out)


NVIDIA, AMD = ("sm_90", "sm_80"), ("gfx942",)
SINS: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("", "", (*NVIDIA, *AMD), {}),
    ("", "", (*NVIDIA, *AMD), {"out": "bfloat16"}),
    ("masked", "narrow", (*NVIDIA, *AMD), {}),
    ("masked store", "narrow", (*NVIDIA, *AMD), {}),
    ("unaligned", "narrow", NVIDIA, {}),  # AMD's wide accesses need no more than the alignment of an element
    ("too large", "spills", NVIDIA, {"num_warps": 1, "maxnreg": 32}),
    ("too large", "spills", AMD, {"num_warps": 1, "BLOCK": 8192, "waves_per_eu": 8}),
    ("local memory", "spills", NVIDIA, {}),
    ("contracted by hand", "contracted", (*NVIDIA, *AMD), {}),
    ("", "contracted", (*NVIDIA, *AMD), {"enable_fp_fusion": True}),
    ("", "contracted", (*NVIDIA, *AMD), {"enable_fp_fusion": True, "fused": True}),  # which is for float64
    ("approximate quotient", "approximate", NVIDIA, {}),
    ("reciprocal", "approximate", AMD, {}),
    ("approximate root", "approximate", (*NVIDIA, *AMD), {}),
    ("approximate root", "flushed", NVIDIA, {}),
    ("flushed", "flushed", NVIDIA, {}),
    ("", "flushed", AMD, {"allow_flush_denorm": True}),
    ("truncated", "truncated", (*NVIDIA, *AMD), {"out": "bfloat16"}),
]
"""What is wrong; the check that has to find it, if any; the targets; and options of the launch."""

ALSO = {
    ("approximate", "approximate root"): {"flushed"},
    ("flushed", "approximate root"): {"approximate"},
    ("flushed", ""): {"contracted"},  # AMD's root is another then
    ("spills", "local memory"): {"contracted", "flushed"},
}
"""What other checks find there."""


def launched(sin: str, out: str = "float32", fused: bool = False, **options: Any) -> None:
    x, y = torch.zeros(2, 16384)
    stored, kind = (torch.uint16, tl.uint16) if out == "bfloat16" else (torch.float32, tl.float32)
    dtypes = tl.float32, tl.float32, kind
    options = {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False, **options}
    _kernel[(1,)](x, y, torch.zeros(16384, dtype=stored), 1001, SIN=sin, DTYPES=dtypes, **options)


def test_each_check_finds_what_is_broken_on_purpose_and_nothing_else(compiled: Callable[[str], list[dict[str, Any]]]) -> None:
    found = compiled(__file__)
    assert len(found) == sum(len(targets) for _, _, targets, _ in SINS)
    for each in found:
        wrong = {check for check, what in each["wrong"].items() if what}
        assert wrong - ALSO.get((each["check"], each["sin"]), set()) == {each["check"]} - {""}, each


if __name__ == "__main__":
    from compiling import compile_cases  # type: ignore[import-not-found]  # beside this file, which is the program

    cases = (
        (
            {"sin": sin, "check": check, "targets": targets, "fused": options.get("fused", False)},
            partial(launched, sin, **options),
        )
        for sin, check, targets, options in SINS
    )
    compile_cases(cases, {"_kernel"})
