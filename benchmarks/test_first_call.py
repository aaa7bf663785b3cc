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
dtype, elements = sys.argv[1], int(sys.argv[2])
if dtype == "bfloat16":
    from ml_dtypes import bfloat16 as dtype
models = [np.full(elements, value, dtype) for value in (1, 2)]
for call in range(2):
    start = perf_counter()
    merged = merge(models, method="linear", weight=[0.75, 0.25], backend="numba")
    times.append(perf_counter() - start)
assert (merged == 1.25).all()
print(json.dumps({"import": times[1] - times[0], "first merge()": times[2], "second merge()": times[3]}))
"""


@pytest.mark.parametrize("elements", [1 << 16, 8 << 20], ids=["64 Ki", "8 Mi"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_call(benchmark: BenchmarkFixture, tmp_path: Path, dtype: str, elements: int) -> None:
    command = [sys.executable, "-c", PROGRAM, dtype, str(elements)]
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
    benchmark.extra_info.update(table="first_call", case={"dtype": dtype, "elements": elements}, seconds=seconds)
