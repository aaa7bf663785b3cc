"""Compiles kernels for GPUs that are not there, and says what is wrong with what the compilers made of them.

For programs that tests start in this folder: Triton's interpreter must be off. Launches are real, up to the point of running.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from mergekit_cl.kernels.triton import launch, tuning

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_DTYPES = {str(kind): name for name, kind in launch.DTYPES.items()}
_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was launched, and the texts that its compilers wrote."""

    kernel: str
    target: str
    reads: tuple[str, ...]
    """Dtypes of the columns that are read."""
    writes: tuple[str, ...]
    tile: int
    """Elements of a column that a program works on at a time."""
    warps: int
    fused: bool
    """Whether products and sums may be contracted."""
    texts: dict[str, str]
    """"llir"; "ptx" and "usage" (of registers and memory), of some on the first target "sass"; or "amdgcn"."""

    @property
    def on_amd(self) -> bool:
        """Whether the target is AMD's."""
        return "amdgcn" in self.texts

    @property
    def elements(self) -> int:
        """Elements of a column that a thread works on at a time."""
        return self.tile // (self.warps * TARGETS[self.target][2])

    def count(self, text: str, pattern: str) -> int:
        """Count matches at the start of words."""
        return len(re.findall(rf"(?m)(?<![\w.]){pattern}", self.texts.get(text, "")))


def narrow(made: Compiled) -> str:
    """Look for spans that are not read or written 16 bytes at a time where a block is whole and aligned.

    Only there accesses have no predicate. Loops may have a first pass of their own, which reads the same columns once more.
    """
    for verb, short, dtypes in (("load", "ld", made.reads), ("store", "st", made.writes)):
        sizes = [_SIZES[dtype] * made.elements for dtype in dtypes]
        if made.on_amd:
            # Spans are accessed by buffer instructions; where a tile has strides as tables are, whose accesses add to these.
            # A thread whose part of a column is smaller takes it at once
            for width in (8, 16):
                needed = sum(max(size // 16, 1) for size in sizes if min(size, 16) == width)
                kinds = ("buffer", "global")
                found = max(made.count("amdgcn", rf"{kind}_{verb}_dwordx{width // 4}\s") for kind in kinds)
                if found < needed:
                    return f"a thread {verb}s {width} bytes at a time {found} times, not {needed}"
        elif sizes:
            found = 16 * len(re.findall(rf"(?m)^\s*{short}\.global\S*\.(?:v4\.b32|v2\.b64)\s", made.texts["ptx"]))
            if found % sum(sizes) or not found:
                return f"a thread {verb}s {found} bytes 16 at a time, not {sum(sizes)}"
    return ""


def spills(made: Compiled) -> str:
    """Look for registers that spill, and for any other memory of a thread's own."""
    if made.on_amd:
        found = re.findall(r"\.(?:private_segment_fixed_size|vgpr_spill_count): +[1-9]\d*", made.texts["amdgcn"])
    else:
        found = re.findall(r"\b(?:STACK|LOCAL):[1-9]\d*", made.texts["usage"])
        found += re.findall(r"\.local\b", made.texts["ptx"]) + re.findall(r"\b(?:STL|LDL)\b", made.texts.get("sass", ""))
    return ", ".join(sorted(set(found)))


def contracted(made: Compiled) -> str:
    """Look for products and sums that are rounded together, but for sums in float64 where a kernel was launched so."""
    types = ("f16", "f32") if made.fused else ("f16", "f32", "f64")
    if made.on_amd:
        return ", ".join(f"v_fma_{kind}" for kind in types if _fused(made, kind) > _parts(made, kind))
    found = [each for each in re.findall(r"\bfma\.\S+", made.texts["ptx"]) if each.endswith(types)]
    if "sass" in made.texts and not _divides(made):  # quotients and roots are made of fused steps
        found += re.findall(r"\bFFMA\S*|\bHFMA2\S*(?=\s)(?! \w+, -RZ, RZ,)", made.texts["sass"])
        found += re.findall(r"\bDFMA\S*", made.texts["sass"]) if not made.fused else []
    return ", ".join(sorted(set(found)))


def approximate(made: Compiled) -> str:
    """Look for quotients, roots and other functions that are not rounded to nearest."""
    if not made.on_amd:
        return ", ".join(sorted(set(re.findall(r"\b[a-z0-9]+\.(?:approx|full)\S*", made.texts["ptx"]))))
    found = set(re.findall(r"\bv_(?:exp|log|sin|cos)_f\d\d", made.texts["amdgcn"]))
    for kind in ("f16", "f32", "f64"):
        # Integers of 64 bits are divided by way of a reciprocal, which is scaled by nearly 2**64
        exact = made.count("amdgcn", f"v_div_fixup_{kind}") + made.count("amdgcn", r"v_mul_f32\S* .*0x5f7ffffc")
        if made.count("amdgcn", f"v_rcp_{kind}") > exact:
            found.add(f"v_rcp_{kind}")
        if _fused(made, kind) < _parts(made, kind):
            found.add(f"v_sqrt_{kind}")
    return ", ".join(sorted(found))


def flushed(made: Compiled) -> str:
    """Look for subnormals that are taken for zero, but inside of quotients, and of those of integers."""
    if made.on_amd:
        modes = re.findall(r"\.amdhsa_float_denorm_mode_\w+ [0-2]", made.texts["amdgcn"])
        return ", ".join(modes)
    found = re.findall(r"\b\S+\.ftz\b\S*", made.texts["ptx"])
    if not _divides(made):
        found += re.findall(r"\b(?!F2I)\w+\S*\.FTZ\b", made.texts.get("sass", ""))
    return ", ".join(sorted(set(found)))


def truncated(made: Compiled) -> str:
    """Look for results that are cut off: of bfloat16, which integers round, half a unit is added in front of that."""
    found = re.findall(r"\bcvt\.r[zmp]\.\S+", made.texts.get("ptx", ""))
    halves = re.findall(r" = add (?:\w+ )*(?:i32|<(\d+) x i32>) .*\b32767\b", made.texts["llir"])
    if "bfloat16" in made.writes and sum(int(lanes or 1) for lanes in halves) < made.elements:
        found.append("bfloat16")
    return ", ".join(sorted(set(found)))


def _fused(made: Compiled, kind: str) -> int:
    """Count the fused steps on an AMD target, but for sums of two types, rounded once, and parts of quotients of integers."""
    names = "fma|fmac|fmamk|fmaak|mad|madmk|madak|mac"
    return made.count("amdgcn", rf"v_(?!fma_mix\S* \S+ \S+ 1\.0)(?:pk_)?(?:{names})_\w*{kind}(?!.*\b0x[4c]f800000)")


def _parts(made: Compiled, kind: str) -> float:
    """Count those that quotients (with two scalings, five of them) and roots are made of."""
    roots = made.count("amdgcn", f"v_(?:sqrt|rsq)_{kind}")
    return 2.5 * made.count("amdgcn", f"v_div_scale_{kind}") + {"f32": 2, "f64": 7}.get(kind, 0) * roots


CHECKS: tuple[Callable[[Compiled], str], ...] = (narrow, spills, contracted, approximate, flushed, truncated)


def _divides(made: Compiled) -> bool:
    return bool(re.search(r"\b(?:div|sqrt|rcp)\.rn\b", made.texts["ptx"]))


def operations(made: Compiled) -> dict[str, int]:
    """Count the quotients, roots, maxima and minima that the source asks for and, of the first target, sums and products."""
    if made.on_amd:
        names = {"div": "v_div_fixup_", "sqrt": "v_(?:sqrt|rsq)_", "nan": "v_cmp_[ou]_"}
        counts = {f"{name}.{kind}": made.count("amdgcn", at + kind) for name, at in names.items() for kind in ("f32", "f64")}
    else:
        counts = Counter(re.findall(r"\b(?:div|rcp|sqrt|rsqrt|max|min)\.[a-zA-Z.]*f\d\d|\bsetp\.nan\.f\d\d", made.texts["ptx"]))
        counts += Counter(re.findall(r"\b[FD](?:ADD|MUL)\b", made.texts.get("sass", "")))
    return {name: count for name, count in counts.items() if count}


def compile_cases(cases: Iterable[tuple[dict[str, Any], Callable[[], None]]], writers: Collection[str]) -> None:
    """Compile what cases launch. The arguments of the program are the target, and the JSON file that is written.

    An entry is made for each kernel that a case launches: what the case says, the kernel's name, the target, its dtypes, the
    elements of a thread, `operations`, and what the checks find "wrong".

    Args:
        cases: What to write of each case, and what launches kernels. A case with "targets" is for these alone. Only one that
            is "fused" may contract float64.
        writers: Names of the kernels that write the last of their columns.

    """
    target, file = sys.argv[1], Path(sys.argv[2])
    found: list[dict[str, Any]] = []
    known: set[str] = set()
    case: dict[str, Any] = {}
    ordinary = triton.JITFunction.run

    class Driver:
        """As much of a GPU's driver as a kernel that is only compiled asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget(*TARGETS[target])

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def run(kernel: Any, *arguments: Any, warmup: bool, grid: Any, **options: Any) -> Any:
        if warmup:
            return ordinary(kernel, *arguments, warmup=True, grid=grid, **options)
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        if compiled.hash not in known:
            known.add(compiled.hash)
            disassembled = target == "sm_90" and (kernel.fn.__name__ in writers or case.get("fused", False))
            texts = _texts(compiled, file.with_suffix(".cubin"), disassembled)
            dtypes = tuple(_DTYPES[str(dtype)] for dtype in options.get("DTYPES", ()))
            inputs = len(dtypes) - (kernel.fn.__name__ in writers)
            tile = options.get("TILE") or options.get("BLOCK") or options.get("ROWS", 1) * options.get("COLUMNS", 1)
            made = Compiled(
                kernel.fn.__name__, target, dtypes[:inputs], dtypes[inputs:], tile, options["num_warps"],
                case.get("fused", False), texts,
            )  # fmt: skip
            found.append({
                **case, "kernel": made.kernel, "target": target, "reads": made.reads, "writes": made.writes,
                "elements": made.elements, "operations": operations(made), "sums": compiled.asm["ttgir"].count('"tt.reduce"'),
                "wrong": {check.__name__: check(made) for check in CHECKS},
            })  # fmt: skip
        return None

    triton.JITFunction.run = run
    triton.runtime.driver.set_active(Driver())
    launch.device_of = lambda table: torch.device("cpu")
    tuning.architecture = lambda device: target  # type: ignore[assignment]
    for case, launches in cases:
        if target in case.get("targets", TARGETS):
            known.clear()
            launches()
    file.write_text(json.dumps(found))


def _texts(compiled: Any, binary: Path, disassembled: bool) -> dict[str, str]:
    texts = {name: compiled.asm[name] for name in ("llir", "ptx", "amdgcn") if name in compiled.asm}
    if "cubin" in compiled.asm:
        binary.write_bytes(compiled.asm["cubin"])
        # Disassembling takes as long as compiling: it is for what is rounded
        for name, option in {"usage": "-res-usage", **({"sass": "-sass"} if disassembled else {})}.items():
            texts[name] = subprocess.run([_CUOBJDUMP, option, binary], check=True, capture_output=True).stdout.decode()
    return texts
