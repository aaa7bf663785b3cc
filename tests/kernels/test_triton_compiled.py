"""What the compilers make of the Triton kernels, without a GPU: the launches are real, up to the point of running them.

Triton's interpreter must not be on for this, so fresh processes compile, by running this file as a script (see compiling.py).
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

B, H, S, D = SIZES = ("bfloat16", "float16", "float32", "float64")
Found = list[dict[str, Any]]
NVIDIA = ("sm_90", "sm_80")
ALL, HOPPER = (*NVIDIA, "gfx942"), ("sm_90",)


def blended(models: Sequence[Any], uniform: Sequence[Any]) -> Any:
    base, *others = models
    best = base - base
    for other, share in zip(others, uniform, strict=False):
        change = np.where(share < 0.5, other - base, 0.0)
        best = np.where(np.abs(change) > np.abs(best), change, best)
    return base + 0.7 * best


def averaged(models: Sequence[Any]) -> Any:
    x, y, z = models
    return (x * z + 0.25 * y) / np.maximum(np.minimum(z, -y), 1e-8)


def rooted(models: Sequence[Any]) -> Any:
    x, y, z = models
    return np.copysign(np.sqrt(np.abs(x)), y) * np.sign(z) + np.where(~((x < y) ^ (y >= z)) & (x != z), x, y)


def multiplied(models: Sequence[Any]) -> Any:
    return [models[0] * models[1] + models[1], models[0]]


def differing(models: Sequence[Any]) -> Any:
    return models[0] - 0.3 * models[1]


CASES: list[tuple[str, tuple[str, ...], Any, tuple[str, ...]]] = [
    ("weighted_sum", (B, B, B), True, ALL),
    ("weighted_sum", (H, H, H, H), True, ALL),
    ("weighted_sum", (S, S, S), False, ALL),
    ("weighted_sum", (B, S, H, B), True, HOPPER),
    ("weighted_sum", (D, D), False, ALL),
    ("weighted_sum", (S, D, B), True, HOPPER),
    ("weighted_sum", (B,) * 10, True, HOPPER),  # eight models
    ("weighted_sum", (S,) * 10, True, HOPPER),
    ("largest_magnitude", (B, H, S, D), None, ALL),
    ("gram", (B, B, B), True, ALL),
    ("gram", (H, S), False, ALL),
    ("gram", (D, H), True, ALL),
    ("gram", (B,) * 8, False, HOPPER),
    ("task_vector_merge", (B, B, B, B), ("magnitude", "weighted", "weight_mean"), ALL),
    ("task_vector_merge", (S, S, S, S), ("random", "unweighted", "count_mean"), ALL),
    ("task_vector_merge", (D, H, D, D), ("all", None, "weight_mean"), ALL),
    ("task_vector_merge", (D, B, H), ("magnitude", "weighted", "max"), ALL),
    ("task_vector_merge", (B, S, H, B), ("all", "weighted", "sum"), HOPPER),
    ("task_vector_merge", (B,) * 10, ("magnitude", "weighted", "weight_mean"), HOPPER),
    ("magnitude_histogram", (B, B), True, ALL),
    ("magnitude_histogram", (H, S, D), False, ALL),
    ("kept_magnitude", (B, S, H), "magnitude", ALL),
    ("kept_magnitude", (B, B), "random", HOPPER),
    ("kept_magnitude", (D, D), "all", ALL),
    ("weighted_sum_of_slices", (B, B, B), False, ALL),
    ("weighted_sum_of_slices", (S, S, S), True, ALL),
    ("weighted_sum_of_slices", (D, H, D), True, ALL),
    ("weighted_sum_of_slices", (H, B, H), False, ALL),
    ("gram_of_slices", (B, B, B), False, ALL),
    ("gram_of_slices", (S, H, D), True, ALL),
    ("elementwise", (B, B, B, B), blended, ALL),
    ("elementwise", (S, S, S, S), averaged, ALL),
    ("elementwise", (D, D, D, D), averaged, ALL),
    ("elementwise", (S, H, S, H), rooted, ALL),
    ("sum_of", (B, H), multiplied, ALL),
    ("sum_of", (S, D), multiplied, ALL),
    ("histogram_of", (B, S), differing, ALL),
    ("histogram_of", (D, H), differing, ALL),
    ("guarded", (B, B, B), True, ALL),
    ("guarded", (H, S, H), True, ALL),
    ("guarded", (S, S), False, ALL),
    ("guarded", (D, D), False, ALL),
    ("select", (B, B, B, B), None, ALL),
    ("select", (H, S), None, ALL),
]
"""Function; dtypes; of the merge what is kept, elected, combined; of slices whether strided; the formula; of the rest whether
about; targets. Every kernel is given every dtype, and writes every dtype, if it writes spans."""

WRITERS = ("weighted_sum", "task_vector_merge", "weighted_sum_of_slices", "elementwise", "guarded_weighted_sum")
"""Functions whose kernels write a column."""

GATHERING = "_sample_kernel"
"""The kernel that reads runs of neighbours, wherever they begin."""

SELECTING = (GATHERING, "_sweep_kernel")
"""Kernels that are given no float64."""

FUSED = ("gram", "gram_of_slices")
"""Functions whose float64 products and sums may be contracted: of float32, these products are exact."""


@pytest.fixture(scope="module")
def found(compiled: Callable[[str], Found]) -> Found:
    return compiled(__file__)


def failing(found: Found, passes: Callable[[dict[str, Any]], Any]) -> list[tuple[Any, ...]]:
    assert found
    return [(each["kernel"], *each["reads"], *each["writes"], each["target"]) for each in found if not passes(each)]


def wrong(found: Found, check: str) -> list[Any]:
    return [
        (each["kernel"], each["reads"], each["writes"], each["target"], each["wrong"][check])
        for each in found
        if each["wrong"][check]
    ]


def test_every_kernel_is_compiled_for_every_dtype_and_target(found: Found) -> None:
    from mergekit_cl.kernels import triton as backend

    modules = [import_module(f"{backend.__name__}.{each.name}") for each in iter_modules(backend.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {each["kernel"] for each in found} == kernels
    assert {(each["function"], tuple(each["given"])) for each in found} == {
        (function, dtypes) for function, dtypes, *_ in CASES
    }
    for target in ALL:
        for kernel in kernels:
            of_kernel = [each for each in found if (each["kernel"], each["target"]) == (kernel, target)]
            for side in ("reads", "writes"):
                dtypes = {dtype for each in of_kernel for dtype in each[side]}
                assert dtypes in (set(), set(SIZES) - ({D} if kernel in SELECTING else set())), (kernel, target, side)


def test_aligned_blocks_are_read_and_written_16_bytes_at_a_time(found: Found) -> None:
    assert not wrong([each for each in found if each["kernel"] != GATHERING], "narrow")


def test_registers_do_not_spill(found: Found) -> None:
    assert not wrong(found, "spills")


def test_products_and_sums_are_not_contracted(found: Found) -> None:
    assert not wrong(found, "contracted")


def test_subnormals_are_not_flushed(found: Found) -> None:
    assert not wrong(found, "flushed")


def test_results_are_rounded_and_not_cut_off(found: Found) -> None:
    assert not wrong(found, "truncated")


BODIES = (1.5, 2)
"""A kernel has a body for whole blocks, and one with masks that works on as many elements, or on half, at a time."""

PTX = ("div", "rcp", "sqrt", "rsqrt", "max", "min")
"""Operations whose rounding, or whose result for NaN, their names tell."""


def quotients(each: dict[str, Any]) -> list[str]:
    if each["function"] == "task_vector_merge":
        return ["div"] if each["how"][2] in ("weight_mean", "count_mean") else []
    return {"averaged": ["div", "max", "min"], "rooted": ["sqrt"]}.get(str(each["how"]), [])


def test_quotients_and_roots_are_rounded_to_nearest_and_nan_wins(found: Found) -> None:
    assert not wrong(found, "approximate")

    def nearest(each: dict[str, Any]) -> bool:
        kind, asked = "f64" if D in each["reads"] else "f32", quotients(each)
        if each["target"] == "gfx942":
            names = {name: f"{name}.{kind}" for name in ("div", "sqrt")}
            nan = each["operations"].get(f"nan.{kind}", 0)
        else:
            propagates = "" if kind == "f64" else ".NaN"  # else by comparisons
            names = {name: f"{name}.rn.{kind}" for name in ("div", "sqrt")}
            names |= {name: f"{name}{propagates}.{kind}" for name in ("max", "min")}
            nan = each["operations"].get("setp.nan.f64", 0) if kind == "f64" else each["elements"]
        told = {name for name in each["operations"] if name.partition(".")[0] in PTX}
        asked_for = {names[name] for name in asked if name in names}
        counts = {each["operations"].get(name) for name in asked_for}
        return (
            told == asked_for
            and counts <= {each["elements"] * bodies for bodies in BODIES}
            and len(counts) <= 1
            and ("max" not in asked or nan >= each["elements"])
        )

    assert not failing(found, nearest)


def test_every_rounding_is_done(found: Found) -> None:
    def complete(each: dict[str, Any]) -> bool:
        letter = "D" if D in each["reads"] else "F"
        terms = len(each["reads"]) - (each["function"] == "task_vector_merge" or each["how"] is True)
        if each["function"] == "weighted_sum":
            # About a reference: a difference and a sum (the first to +0) for each term, and the difference at the end
            sums, products = 2 * terms + 1 if each["how"] else terms - 1, terms
        elif each["function"] == "weighted_sum_of_slices":
            terms = len(each["reads"])
            sums, products = 2 * terms + 1, terms
        else:
            # A difference, a vote and a summand of each model, and the change of the base. That the first vote is
            # added to +0 makes no difference to what is elected, and the compiler knows
            sums, products = 3 * terms, terms + 1
        steps = {name: each["operations"].get(name, 0) for name in ("FADD", "FMUL", "DADD", "DMUL")}
        expected = {f"{letter}ADD": sums, f"{letter}MUL": products}
        return any(  # a constant may be computed too
            all(
                0 <= count - elements * expected.get(name, 0) < max(1, elements * (name in expected))
                for name, count in steps.items()
            )
            for elements in (each["elements"] * bodies for bodies in BODIES)
        )

    counted = [each for each in found if each["target"] == "sm_90" and each["function"] in WRITERS[:3]]
    assert not failing([each for each in counted if isinstance(each["how"], bool) or each["how"][2] == "sum"], complete)


def test_a_slice_is_summed_in_one_order(found: Found) -> None:
    # whether its tile is full or not: so there is one sum for each pair in the program
    def once(each: dict[str, Any]) -> bool:
        columns = len(each["reads"]) - (each["how"] is False)
        return bool(each["sums"] == columns * (columns + 1) // 2)

    assert not failing([each for each in found if each["function"] == "gram_of_slices"], once)


def launch(function: str, dtypes: tuple[str, ...], how: Any) -> None:
    """Launch what a case names: on tensors that nothing reads."""
    import torch

    from mergekit_cl.dtypes import compute_dtype
    from mergekit_cl.formula import trace
    from mergekit_cl.kernels import Formula, Keep, Slices, Table, TaskVectors
    from mergekit_cl.kernels import triton as backend
    from mergekit_cl.kernels.triton import selection
    from mergekit_cl.kernels.triton.guarded import GuardedSums
    from mergekit_cl.select import SAMPLED

    spans = [torch.zeros(4096, dtype=getattr(torch, dtype)) for dtype in dtypes]
    table, count = Table([spans]), len(dtypes)
    inputs = count - (function in WRITERS)
    compute = compute_dtype(dtypes[:inputs])
    numbers, integers = np.ones((1, count, 2), compute), np.ones((1, count, 2), np.int64)

    def keep(kind: Any, models: int) -> Keep:
        return Keep(kind, *(each[:, :models] for each in (integers.astype(np.uint32), integers, integers)))

    if function == "weighted_sum":
        backend.weighted_sum(table, numbers[:, how:inputs, 0], how, table.whole)
    elif function == "largest_magnitude":
        backend.largest_magnitude(table, table.whole)
    elif function == "gram":
        backend.gram(table, how, table.whole)
    elif function == "task_vector_merge":
        kept, elect, combine = how
        each = numbers[:, : inputs - 1, 0]
        steps = TaskVectors(keep(kept, inputs - 1), elect, combine, each, each, each, numbers[:, 0, 0])
        backend.task_vector_merge(table, steps, table.whole)
    elif function == "magnitude_histogram":
        window = integers[:, 1:, 0]
        backend.magnitude_histogram(table, window, window, 1000, how, np.zeros(1, np.intp), table.whole)
    elif function == "kept_magnitude":
        backend.kept_magnitude(table, keep(how, inputs - 1), table.whole)
    elif function == "guarded":
        sums = GuardedSums(Table([[*spans, spans[-1]]]))
        sums.add(Table([[*spans, spans[-1]]]), numbers[:, how:, 0], how, np.ones(1))
        sums.launch()
    elif function == "select":
        tensors = [torch.zeros(SAMPLED, dtype=getattr(torch, dtype)) for dtype in dtypes]
        selection.select([Table([tensors])], [np.arange(inputs - 1)[None]], np.ones(inputs - 1, np.int64))
    elif function.endswith("slices"):
        slices = Slices(np.array([64 if how else 2048]), how)
        number = int(slices.counts(table)[0])
        piece = np.array([[0, 0, number]])
        if function == "gram_of_slices":
            backend.gram_of_slices(table, not how, slices, piece)
        else:
            weights, references = np.ones((number, inputs), compute), np.zeros(number, np.int64)
            backend.weighted_sum_of_slices(table, weights, references, slices, piece)
    else:
        uniform = {"uniform": inputs - 1} if how is blended else {}
        traced = trace(how, [list(range(inputs))], uniform)
        assert traced is not None
        keys = np.ones((1, *uniform.values(), 2) if uniform else (1, 0, 2), np.uint32)
        formula = Formula(traced.program, np.array([traced.constants], compute).reshape(1, -1), keys, np.zeros((0, 0), compute))
        if function == "elementwise":
            backend.elementwise(table, formula, table.whole)
        elif function == "sum_of":
            backend.sum_of(table, formula, None, table.whole)
        else:
            zero = np.zeros((1, 1), np.int64)
            backend.histogram_of(table, formula, None, zero, zero, 100, False, np.zeros(1, np.intp), table.whole)


if __name__ == "__main__":
    from compiling import compile_cases  # type: ignore[import-not-found]  # beside this file, which is the program

    cases = (
        (
            {
                "function": function,
                "given": dtypes,
                "how": getattr(how, "__name__", how),
                "targets": targets,
                "fused": function in FUSED,
            },
            partial(launch, function, dtypes, how),
        )
        for function, dtypes, how, targets in CASES
    )
    compile_cases(cases, {f"_{function}_kernel" for function in WRITERS})
