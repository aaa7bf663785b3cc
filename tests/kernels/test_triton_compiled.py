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
CASES: list[tuple[str, tuple[str, ...], Any]] = [
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
    ("task_vector_merge", (B, B, B, B, B), ("magnitude", "weighted", "weight_mean")),
    ("task_vector_merge", (S, S, S, S), ("random", "unweighted", "count_mean")),
    ("task_vector_merge", (D, D, D, D), ("all", None, "weight_mean")),
    ("task_vector_merge", (D, D, D), ("magnitude", "weighted", "max")),
    ("task_vector_merge", (B, S, H, B), ("all", "weighted", "sum")),
    ("magnitude_histogram", (B, B, B), True),
    ("magnitude_histogram", (D, H), False),
    ("kept_magnitude", (B, B, B), "magnitude"),
    ("kept_magnitude", (S, S), "random"),
    ("weighted_sum_of_slices", (B, B, B, B), False),
    ("weighted_sum_of_slices", (S, S, S, S), True),
    ("weighted_sum_of_slices", (D, H, B), True),
    ("gram_of_slices", (B, B, B, B), False),
    ("gram_of_slices", (S, S, S), True),
]
"""Kernel; dtypes; and of the merge what is kept, elected, combined; of slices whether strided; of the rest whether about."""

WRITERS = ("weighted_sum", "task_vector_merge", "weighted_sum_of_slices")
Found = list[dict[str, Any]]
"""What was compiled: the case's kernel, dtypes, how; target; elements of a tile; and the texts of the compilers."""


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
        sizes = [SIZES[dtype] * each["tile"] // 128 for dtype in each["dtypes"]]  # bytes of a column for each of 128 threads
        loads, stores = (re.findall(rf"{op}\.global\S*\.(?:v4\.b32|v2\.b64)\s", each["ptx"]) for op in ("ld", "st"))
        if each["kernel"] in WRITERS:
            return [16 * len(loads), 16 * len(stores)] == [sum(sizes[:-1]), sizes[-1]]
        return bool(16 * len(loads) == sum(sizes))

    assert not failing(on(found, "cuda"), wide)
    assert not failing(on(found, "hip"), lambda each: "_load_dwordx4" in each["gcn"] or len(each["dtypes"]) == 6)


def test_registers_do_not_spill(found: Found) -> None:
    # On sm_90 alone: Triton 3.6 spills 16 bytes of the first case on sm_80 to fit one more program
    hopper = [each for each in on(found, "cuda") if each["target"] == "sm_90"]
    assert not failing(hopper, lambda each: bool(re.search(r"STACK:0 .*LOCAL:0 ", each["dump"])))
    kept = r"\.private_segment_fixed_size: 0\s(?s:.*)\.vgpr_spill_count: 0\s"
    assert not failing(on(found, "hip"), lambda each: bool(re.search(kept, each["gcn"])))


def divides(each: dict[str, Any]) -> bool:
    return each["kernel"] == "task_vector_merge" and each["how"][2] in ("weight_mean", "count_mean")


def test_products_and_sums_are_not_contracted(found: Found) -> None:
    assert not failing(on(found, "cuda"), lambda each: not re.search(r"\bfma\.", each["ptx"]))
    # Divisions are made of fused steps
    assert not failing(on(found, "cuda"), lambda each: bool(re.search(r"\b[FDH]FMA", each["dump"])) == divides(each))
    # v_fma_mix with a factor 1.0 is LLVM's sum of a float32 and a float16, rounded once
    contracted = r"\bv_(?!fma_mix\S* \S+ \S+ 1\.0)(?:pk_)?(?:fma|fmac|mad|mac)_\w*f\d\d"

    def fused(each: dict[str, Any]) -> int:
        return len(re.findall(contracted, each["gcn"]))

    assert not failing(on(found, "hip"), lambda each: 2 * fused(each) == 5 * each["gcn"].count("v_div_scale_"))


def test_divisions_are_rounded_to_nearest(found: Found) -> None:
    def nearest(each: dict[str, Any]) -> bool:
        letter = "f64" if D in each["dtypes"] else "f32"
        # one for each element of a thread, in two bodies
        expected = {f"div.rn.{letter}": 2 * each["tile"] // 128} if divides(each) else {}
        return Counter(re.findall(r"\b(?:div|rcp)\.[a-z.]*f\d\d", each["ptx"])) == expected

    assert not failing(on(found, "cuda"), nearest)
    assert not failing(on(found, "hip"), lambda each: ("v_div_fixup_" in each["gcn"]) == divides(each))


def test_every_rounding_is_done(found: Found) -> None:
    def complete(each: dict[str, Any]) -> bool:
        steps = Counter(re.findall(r"\b[FD](?:ADD|MUL)\b", each["dump"]))
        # Of each element of a thread, in two bodies
        letter, elements = "D" if D in each["dtypes"] else "F", 2 * each["tile"] // 128
        if each["kernel"] == "weighted_sum":
            # About a reference: a difference and a sum (the first to +0) for each term, and the difference at the end
            terms = len(each["dtypes"]) - 1 - each["how"]
            sums, products = 2 * terms + 1 if each["how"] else terms - 1, terms
        elif each["kernel"] == "weighted_sum_of_slices":
            terms = len(each["dtypes"]) - 1
            sums, products = 2 * terms + 1, terms
        else:
            # A difference, a vote and a summand of each model, and the change of the base. That the first vote is
            # added to +0 makes no difference to what is elected, and the compiler knows
            terms = len(each["dtypes"]) - 2
            sums, products = 3 * terms, terms + 1
        return steps == +Counter({f"{letter}ADD": elements * sums, f"{letter}MUL": elements * products})

    counted = [each for each in on(found, "cuda") if each["kernel"] in WRITERS]
    counted = [each for each in counted if each["kernel"] != "task_vector_merge" or each["how"][2] == "sum"]
    assert not failing(counted, complete)


def test_a_slice_is_summed_in_one_order(found: Found) -> None:
    # whether its tile is full or not: so there is one sum for each pair in the program
    def once(each: dict[str, Any]) -> bool:
        columns = len(each["dtypes"]) - (each["how"] is False)
        return bool(each["sums"] == columns * (columns + 1) // 2)

    assert not failing([each for each in found if each["kernel"] == "gram_of_slices"], once)


def test_subnormals_are_not_flushed(found: Found) -> None:
    assert not failing(on(found, "cuda"), lambda each: "ftz" not in each["ptx"])
    # but for integer quotients, and inside of divisions that are rounded to nearest
    flushed = r"(?<!\bF2I)\.FTZ"
    assert not failing(on(found, "cuda"), lambda each: divides(each) or not re.search(flushed, each["dump"]))
    modes = [".amdhsa_float_denorm_mode_32 3", ".amdhsa_float_denorm_mode_16_64 3"]
    assert not failing(on(found, "hip"), lambda each: all(mode in each["gcn"] for mode in modes))


def test_alignment_is_that_of_each_piece(found: Found) -> None:
    flat = [each for each in found if not each["kernel"].endswith("slices")]
    assert not failing(flat, lambda each: each["aligned"] == [1, 1, 0, 0, 1])


def test_refuses_tensors_on_the_cpu(found: Found) -> None:
    assert not failing(found, lambda each: "loaded to work on a GPU, but the tensors are on cpu" in each["refusal"])


def compile_all(folder: Path) -> None:
    """Compile every case for every target, by the launches themselves, and write what came out to ``folder``."""
    import numpy as np
    import torch
    from compiling import compile_instead  # type: ignore[import-not-found]  # beside this file, which is the program

    from mergekit_cl.dtypes import compute_dtype
    from mergekit_cl.errors import BackendError
    from mergekit_cl.kernels import Keep, Slices, Table, TaskVectors
    from mergekit_cl.kernels import triton as backend

    found: Found = []

    def facts(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        return {
            "aligned": arguments[0][:, 3].tolist(),
            "sums": kernel.asm["ttgir"].count('"tt.reduce"'),
            "tile": options.get("TILE") or options.get("BLOCK") or options["ROWS"] * options["COLUMNS"],
        }

    try:
        backend.launch.device_of(Table([[np.zeros(3)]]))
    except BackendError as error:
        refusal = str(error)
    modules = (backend.compiled, backend.slicing, backend.task_vectors)
    kernels = [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]
    compile_instead(backend, kernels, found, TARGETS, folder / "cubin", facts)
    pieces = np.array([[0, 0, 2048], [0, 2048, 4096], [1, 0, 100], [0, 3, 100], [0, 16, 100]])

    def launch(kernel: str, dtypes: tuple[str, ...], how: Any) -> None:
        spans = [torch.zeros(4096, dtype=getattr(torch, dtype)) for dtype in dtypes]
        table = Table([spans, [*(span[:100] for span in spans[:-1]), spans[-1][1:101]]])
        compute = compute_dtype(dtypes[:-1])
        numbers, integers = np.ones((2, len(dtypes), 2), compute), np.ones((2, len(dtypes), 2), np.int64)
        if kernel == "weighted_sum":
            backend.weighted_sum(table, numbers[:, 1 + how :, 0], how, pieces)
        elif kernel == "largest_magnitude":
            backend.largest_magnitude(table, pieces)
        elif kernel == "gram":
            backend.gram(table, how, pieces)
        elif kernel == "task_vector_merge":
            keep, elect, combine = how
            of_models = numbers[:, 2:, 0]
            kept = Keep(keep, *(each[:, 2:] for each in (integers.astype(np.uint32), integers, integers)))
            backend.task_vector_merge(
                table, TaskVectors(kept, elect, combine, of_models, of_models, of_models, numbers[:, 0, 0]), pieces
            )
        elif kernel == "magnitude_histogram":
            backend.magnitude_histogram(table, integers[:, 1:, 0], integers[:, 1:, 0], 1000, how, np.arange(5), pieces)
        elif kernel == "kept_magnitude":
            kept = Keep(how, *(each[:, 1:] for each in (integers.astype(np.uint32), integers, integers)))
            backend.kept_magnitude(table, kept, pieces)
        else:
            matrix = Table([spans])
            slices = Slices(np.array([64 if how else 2048]), how)
            count = int(slices.counts(matrix)[0])
            piece = np.array([[0, 0, count]])
            if kernel == "gram_of_slices":
                backend.gram_of_slices(matrix, not how, slices, piece)
            else:
                weights, references = np.ones((count, len(dtypes) - 1), compute), np.zeros(count, np.int64)
                backend.weighted_sum_of_slices(matrix, weights, references, slices, piece)

    for kernel, dtypes, how in CASES:
        for target in TARGETS:
            found.append({"kernel": kernel, "dtypes": dtypes, "how": how, "target": target, "refusal": refusal})
            launch(kernel, dtypes, how)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
