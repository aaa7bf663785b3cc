"""What the first merge() of a process costs, before and after numba's cache on disk holds the compiled loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

PROGRAM = """
import json, sys
from time import perf_counter
import numpy as np
times = [perf_counter()]
from mergekit_cl import merge
times.append(perf_counter())
dtype, elements, method = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if dtype == "bfloat16":
    from ml_dtypes import bfloat16 as dtype
models = [np.full(elements, value, dtype) for value in (1, 2)]
for call in range(2):
    start = perf_counter()
    if method == "linear":
        merged = merge(models, method, weight=[0.75, 0.25], backend="numba")
    elif method == "slerp":
        merged = merge(models, method, t=0.25, backend="numba")
    else:
        how = {"density": 0.25, "rescale": None, "weight": 0.25, "combine": "sum"}
        merged = merge(models[1:], method, base=models[0], backend="numba", **how)
    times.append(perf_counter() - start)
if method in ("linear", "slerp"):
    assert (merged == 1.25).all()
else:
    assert abs((merged == 1.25).mean() - 0.25) < 0.02 and set(np.unique(merged).tolist()) == {1.0, 1.25}
print(json.dumps({"import": times[1] - times[0], "first merge()": times[2], "second merge()": times[3]}))
"""


CASES = [("linear", dtype, elements) for dtype in ("float32", "bfloat16") for elements in (1 << 16, 8 << 20)]


@pytest.mark.parametrize(
    ("method", "dtype", "elements"), [*CASES, *((method, "bfloat16", 8 << 20) for method in ("slerp", "ties", "dare_ties"))]
)
def test_first_call(benchmark: BenchmarkFixture, tmp_path: Path, method: str, dtype: str, elements: int) -> None:
    command = [sys.executable, "-c", PROGRAM, dtype, str(elements), method]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs: list[dict[str, float]] = []

    def process() -> None:
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))

    process()
    benchmark.pedantic(process, rounds=3)  # type: ignore[no-untyped-call]
    cold, *warm = runs
    seconds = {
        "first merge(), nothing compiled": cold["first merge()"],
        **{name: min(run[name] for run in warm) for name in ("first merge()", "second merge()", "import")},
    }
    benchmark.extra_info.update(
        table="first_call", case={"method": method, "dtype": dtype, "elements": elements}, seconds=seconds
    )
