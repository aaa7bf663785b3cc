"""What the compilers make of the Triton kernels, without a GPU: the launches are real, up to the point of running them.

Triton's interpreter must not be on for this, so a fresh process compiles, by running this file as a script.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
B, H, S, D = SIZES
CASES: list[tuple[str, tuple[str, ...], bool]] = [
    ("weighted_sum", (B, B, B, B), True),
    ("weighted_sum", (B, B, B), False),
    ("weighted_sum", (S, S, S, S), True),
    ("weighted_sum", (H, H, H, H), True),
    ("weighted_sum", (D, D, D), True),
    ("weighted_sum", (B, S, H, B), True),
    ("weighted_sum", (S, D, B), False),
    ("largest_magnitude", (B, B, B), False),
    ("largest_magnitude", (H, S, D), False),
    ("gram", (B, B, B), True),
    ("gram", (S, S), False),
    ("gram", (B,) * 6, True),
    ("gram", (D, H, D), True),
]
Found = list[dict[str, Any]]
"""What was compiled: the case's kernel, dtypes, about; target; and the texts of the compilers."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    subprocess.run([sys.executable, "-W", "error", __file__, folder], check=True, env=environment)
    return cast(Found, json.loads((folder / "found.json").read_text()))


def on(found: Found, backend: str) -> Found:
    chosen = [each for each in found if TARGETS[each["target"]][0] == backend]
    assert len(chosen) == len(CASES) * (2 if backend == "cuda" else 1)
    return chosen


def failing(found: Found, passes: Callable[[dict[str, Any]], bool]) -> list[tuple[str, ...]]:
    return [(each["kernel"], *each["dtypes"], each["target"]) for each in found if not passes(each)]


def test_aligned_blocks_are_read_and_written_16_bytes_at_a_time(found: Found) -> None:
    def wide(each: dict[str, Any]) -> bool:
        writes = each["kernel"] == "weighted_sum"
        tile = 1024 if len(each["dtypes"]) == 6 else 2048
        sizes = [SIZES[dtype] * tile // 128 for dtype in each["dtypes"]]  # bytes of a column for each of 128 threads
        loads, stores = (re.findall(rf"{op}\.global\S*\.(?:v4\.b32|v2\.b64)\s", each["ptx"]) for op in ("ld", "st"))
        expected = (sum(sizes[:-1]), sizes[-1]) if writes else (sum(sizes), 0)
        return (16 * len(loads), 16 * len(stores)) == expected

    assert not failing(on(found, "cuda"), wide)
    assert not failing(on(found, "hip"), lambda each: "buffer_load_dwordx4" in each["gcn"] or len(each["dtypes"]) == 6)


def test_registers_do_not_spill(found: Found) -> None:
    # On sm_90 alone: Triton 3.6 spills 16 bytes of the first case on sm_80 to fit one more program
    hopper = [each for each in on(found, "cuda") if each["target"] == "sm_90"]
    assert not failing(hopper, lambda each: bool(re.search(r"STACK:0 .*LOCAL:0 ", each["dump"])))
    kept = r"\.private_segment_fixed_size: 0\s(?s:.*)\.vgpr_spill_count: 0\s"
    assert not failing(on(found, "hip"), lambda each: bool(re.search(kept, each["gcn"])))


def test_products_and_sums_are_not_contracted(found: Found) -> None:
    assert not failing(on(found, "cuda"), lambda each: not re.search(r"\bfma\.", each["ptx"]))
    assert not failing(on(found, "cuda"), lambda each: not re.search(r"\b[FDH]FMA", each["dump"]))
    # v_fma_mix with a factor 1.0 is LLVM's sum of a float32 and a float16, rounded once
    contracted = r"\bv_(?!fma_mix\S* \S+ \S+ 1\.0)(?:pk_)?(?:fma|fmac|mad|mac)_\w*f\d\d"
    assert not failing(on(found, "hip"), lambda each: not re.search(contracted, each["gcn"]))


def test_every_rounding_is_done(found: Found) -> None:
    def complete(each: dict[str, Any]) -> bool:
        terms = len(each["dtypes"]) - 1 - each["about"]
        steps = Counter(re.findall(r"\b[FD](?:ADD|MUL)\b", each["dump"]))
        # 16 elements of a thread, in two bodies. About a reference: a difference and a sum (the first to +0) for each
        # term, and the difference at the end
        sums = 2 * terms + 1 if each["about"] else terms - 1
        letter = "D" if D in each["dtypes"] else "F"
        return steps == +Counter({f"{letter}ADD": 32 * sums, f"{letter}MUL": 32 * terms})

    assert not failing([each for each in on(found, "cuda") if each["kernel"] == "weighted_sum"], complete)


def test_subnormals_are_not_flushed(found: Found) -> None:
    assert not failing(on(found, "cuda"), lambda each: "ftz" not in each["ptx"] and ".FTZ" not in each["dump"])
    modes = [".amdhsa_float_denorm_mode_32 3", ".amdhsa_float_denorm_mode_16_64 3"]
    assert not failing(on(found, "hip"), lambda each: all(mode in each["gcn"] for mode in modes))


def test_alignment_is_that_of_each_piece(found: Found) -> None:
    assert not failing(found, lambda each: each["aligned"] == [1, 1, 0, 0, 1])


def test_refuses_tensors_on_the_cpu(found: Found) -> None:
    assert not failing(found, lambda each: "loaded to work on a GPU, but the tensors are on cpu" in each["refusal"])


def compile_all(folder: Path) -> None:
    """Compile every case for every target, by the launches themselves, and write what came out to ``folder``."""
    import numpy as np
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from mergekit_cl.errors import BackendError
    from mergekit_cl.kernels import Table
    from mergekit_cl.kernels import triton as backend

    found: Found = []
    binary = folder / "cubin"
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    class Driver:
        """As much of a GPU's driver as a kernel that is only compiled asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget(*TARGETS[found[-1]["target"]])

        def get_current_device(self) -> str:
            return cast(str, found[-1]["target"])

        def get_current_stream(self, device: str) -> int:
            return 0

    class Compiled:
        """A kernel that compiles what it would launch."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                kernel = self.kernel.warmup(*arguments, grid=grid, **options)
                found[-1]["aligned"] = arguments[1][:, 3].tolist()
                if "cubin" in kernel.asm:
                    binary.write_bytes(kernel.asm["cubin"])
                    dump = subprocess.run([cuobjdump, "-res-usage", "-sass", binary], check=True, capture_output=True)
                    found[-1] |= {"ptx": kernel.asm["ptx"], "dump": dump.stdout.decode()}
                else:
                    found[-1]["gcn"] = kernel.asm["amdgcn"]

            return launch

    try:
        backend._device(Table([[np.zeros(3)]]))
    except BackendError as error:
        refusal = str(error)
    backend._device = lambda table: torch.device("cpu")
    triton.runtime.driver.set_active(Driver())
    for name in ("_weighted_sum_kernel", "_largest_magnitude_kernel", "_gram_kernel"):
        setattr(backend.compiled, name, Compiled(getattr(backend.compiled, name)))
    pieces = np.array([[0, 0, 2048], [0, 2048, 4096], [1, 0, 100], [0, 3, 100], [0, 16, 100]])
    for kernel, dtypes, about in CASES:
        spans = [torch.zeros(4096, dtype=getattr(torch, dtype)) for dtype in dtypes]
        table = Table([spans, [*(span[:100] for span in spans[:-1]), spans[-1][1:101]]])
        for target in TARGETS:
            found.append({"kernel": kernel, "dtypes": dtypes, "about": about, "target": target, "refusal": refusal})
            if kernel == "weighted_sum":
                backend.weighted_sum(table, np.ones((2, len(dtypes) - 1 - about), table.compute), about, pieces)
            elif kernel == "gram":
                backend.gram(table, about, pieces)
            else:
                backend.largest_magnitude(table, pieces)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
