"""The benchmarks for GPUs without one: a rehearsal in Triton's interpreter, and the tables from results that are made up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "gpu_rows.json").read_text())
NAMES = [row["name"] for row in ROWS]

RUN = {
    "date": "2026-11-23T10:00+00:00",
    "commit": "abc123+",
    "software": {"torch": "2.11.0", "triton": "3.6.0"},
    "driver": "580.1",
}
MEASURED = {
    "bytes": 6 << 30, "copied": 4 << 30, "compared": "3,145,728 entries", "elements": 1 << 30, "run": RUN,
    "yardstick": [0.001, 0.001, 0.5], "call": [0.002, 0.002, 0.9], "queued": [0.0016], "kernels": [0.0016, 0.0015, 0.0017],
    "peers": {"torch.lerp": {"seconds": [0.003, 0.004, 0.005], "alike": 0.9987}},
}  # fmt: skip


def load(name: str) -> ModuleType:
    """Import a script of the benchmarks, which is in no package here."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu() -> ModuleType:
    return load("gpu")


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The report, which reads and writes in a folder of its own."""
    module = load("report")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text('{"scale": 1, "tables": {}}')
    (tmp_path / "README.md").write_text(f"before\n{module.GPU_BEGIN}old\n{module.GPU_END}\nafter\n")
    (tmp_path / "gpu_rows.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def cells(readme: Path, *wanted: str) -> dict[str, str]:
    """Find the only row of a table that begins so, and return its cells by the names of their columns."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in readme.read_text().splitlines()]
    (number,) = [number for number, line in enumerate(lines) if line[: len(wanted)] == list(wanted)]
    head = max(n for n, line in enumerate(lines[:number]) if line[0] == "---") - 1
    return dict(zip(lines[head], lines[number], strict=True))


# The rehearsal

RUNS: list[tuple[str, list[str]]] = [
    (
        "pass",
        ["sums/bfloat16/*/2", "sums/bfloat16/new/3/a*", "sums/mixed/*", "model/SFA/bfloat16/[cs]*/allow", "terms/*",
         "model/linear/*/allow", "ties/ties/bfloat16/3/model", "surveys/*/bfloat16/[23]", "others/nuslerp/*", "bus/linear/*"],
    ),
    (
        "right = gpu_device.Launch.__call__, gpu_work.parts; gpu_work.parts = lambda count: right[1](count, 300)",
        ["sums/bfloat16/new/3/a*"],
    ),
    ("gpu_work.parts = right[1]; gpu_device.Launch.__call__ = lambda *_: None", ["sums/float32/new/2"]),
    (
        "gpu_device.Launch.__call__ = right[0]; merge = gpu_work.merge; "
        "gpu_work.merge = lambda *a, **k: merge(*a, **k).view(gpu_work.torch.int32)[7:8].add_(1)",
        ["sums/float32/new/2"],
    ),
]  # fmt: skip
"""What is done to the benchmarks, one after the other, and what is rehearsed then."""


@pytest.fixture(scope="module")
def rehearsed() -> list[str]:
    """What `RUNS` print, and what they return: in a process of its own, for Triton is told to interpret before its import."""
    script = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu
with gpu._importable():
    from benchmarks import gpu_device, gpu_work
    for change, globs in {RUNS!r}:
        exec(change)
        print("RETURNED", gpu.main(["--rehearse", "--only", *globs]), "END")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("END\n")


def test_every_kind_of_row_runs_without_a_gpu(rehearsed: list[str]) -> None:
    lines = rehearsed[0].partition("\nrehearsal; ")[2].splitlines()
    assert lines[-1] == "RETURNED 0 "
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:-1]}
    missing = {name: text for name, text in said.items() if text.startswith("not measured")}
    assert missing == {
        "model/SFA/bfloat16/captured/allow": "not measured: CUDA graphs need a GPU",
        "bus/linear/3": "not measured: the bus needs a GPU",
    }
    assert all(" as the CPU's" in text for name, text in said.items() if name not in missing)
    assert said["sums/bfloat16/new/2"] == "2,128 entries as the CPU's torch.lerp: runs"
    assert {row["kind"] for row in ROWS if row["name"] in said} == {row["kind"] for row in ROWS}


def test_of_large_tensors_three_parts_are_compared(rehearsed: list[str]) -> None:
    assert rehearsed[1].count("900 entries as the CPU's") == 4  # two rows, each said twice
    assert "RETURNED 0 " in rehearsed[1]


def test_what_a_kernel_does_not_write_is_seen(rehearsed: list[str]) -> None:
    assert "failed: AssertionError: result 0: not all of it was written" in rehearsed[2]
    assert "RETURNED 1 " in rehearsed[2]


def test_one_bit_that_differs_from_the_cpus_is_seen(rehearsed: list[str]) -> None:
    assert "failed: AssertionError: from 0: 1 of 2,128 entries differ from the CPU's, first number 7" in rehearsed[3]
    assert "RETURNED 1 " in rehearsed[3]


# Results


class FakeDevice:
    """A device of which nothing is timed."""

    sizes = SimpleNamespace(elements=1 << 30)

    def facts(self) -> dict[str, Any]:
        return {
            "device": "GPU 7 (x)",
            "architecture": "sm_90",
            "memory": 150 << 30,
            "driver": "580.1",
            "software": {"torch": "2.11.0"},
        }

    def wait(self) -> None:
        pass


def test_a_run_that_is_killed_leaves_its_rows(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: Any = iter([{"failed": "RuntimeError: no"}, {**MEASURED, "call": [0.004]}])
    monkeypatch.setattr(gpu, "measure", lambda *_: dict(next(outcomes)))
    path = tmp_path / "gpu-7-x-.json"
    path.write_text(json.dumps({"gpu": {}, "rows": {NAMES[0]: MEASURED, NAMES[5]: MEASURED}}))
    options = gpu._options(["--results", str(tmp_path), "--commit", "c0ffee"])
    with pytest.raises(StopIteration):
        gpu._run(FakeDevice(), ROWS[:3], options)  # there is no third outcome
    found = json.loads(path.read_text())
    assert found["gpu"] == {"device": "GPU 7 (x)", "architecture": "sm_90", "memory": 150 << 30}
    assert list(found["rows"]) == [NAMES[0], NAMES[5], NAMES[1]]
    assert found["rows"][NAMES[0]]["failed"] == "RuntimeError: no"
    assert found["rows"][NAMES[5]] == MEASURED
    assert found["rows"][NAMES[1]]["call"] == [0.004]
    assert found["rows"][NAMES[1]]["run"]["commit"] == "c0ffee"
    assert not list(tmp_path.glob("*.tmp"))


def test_no_row_begins_when_time_is_up(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "measure", lambda *_: dict(MEASURED))
    clock = iter([0.0, 1.0, 1.0, 1.0, 61.0])
    monkeypatch.setattr(gpu, "perf_counter", lambda: next(clock))
    assert gpu._run(FakeDevice(), ROWS[:3], gpu._options(["--minutes", "1", "--results", str(tmp_path)])) == 0
    assert f"no time is left for {NAMES[1]}" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "gpu-7-x-.json").read_text())["rows"]) == NAMES[:1]


def test_quick_runs_write_no_results(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measure", lambda *_: dict(MEASURED))
    assert gpu._run(FakeDevice(), ROWS[:1], gpu._options(["--quick", "--results", str(tmp_path)])) == 0
    assert not list(tmp_path.iterdir())


def test_figures_in_the_terminal(gpu: ModuleType) -> None:
    # 6 GiB in 2 ms, where a copy moves 4 GiB in 1 ms
    line = gpu._line(ROWS[0], MEASURED, rehearsed=False)
    assert line == [
        NAMES[0], "call 75.0 %", "queued 93.8 %", "kernels 93.8 %", "goal 92 %", "2.000 ms",
        "3,145,728 entries as the CPU's", "2.00 x torch.lerp",
    ]  # fmt: skip


# Tables


def test_without_results_every_row_is_not_measured(report: ModuleType, tmp_path: Path) -> None:
    report.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "No GPU has been measured yet." in text
    figures = ("call", "queued", "kernels", "call, ms", "GB moved", "copy, GB/s", "compared")
    assert text.count("| not measured") == len(ROWS) * len(figures) + sum(len(row.get("peers", [])) for row in ROWS)
    assert "%" not in text.replace(" % (kernels)", "").replace(" % (call)", "")


def test_results_become_figures(report: ModuleType, tmp_path: Path) -> None:
    graph = {name: value for name, value in MEASURED.items() if name != "kernels"}  # it launches them by itself
    peers = {"PEFT": {"not measured": "out of memory"}, "mergekit": {"seconds": [0.003], "alike": 0.5}}
    rows = {
        "sums/bfloat16/new/2": MEASURED,
        "sums/bfloat16/new/8": {"failed": "AssertionError: w: 3 entries differ", "elements": 1 << 30, "run": RUN},
        "ties/ties/bfloat16/3/tensor": {**graph, "peers": peers},
    }
    facts = {"device": "GPU 7", "architecture": "sm_90", "memory": 150e9}
    (tmp_path / "results" / "gpu-7.json").write_text(json.dumps({"gpu": facts, "rows": rows}))
    report.main()
    readme = tmp_path / "README.md"
    said = readme.read_text()
    assert "No GPU" not in said
    assert (
        "### GPU 7\n\nsm_90, 150 GB. 3 rows at commit abc123+, 2026-11-23: driver 580.1, torch 2.11.0, triton 3.6.0; " in said
    )
    # 6 GiB in 1.6 ms, where a copy moves 4 GiB in 1 ms; the slowest samples do not count
    assert cells(readme, "bfloat16", "2", "new memory", "aligned") == {
        "dtype": "bfloat16", "models": "2", "into": "new memory", "views": "aligned", "goal": "92 % (kernels)",
        "call": "75.0 %", "queued": "93.8 %", "kernels": "**93.8 %**", "call, ms": "2 (2)",
        "GB moved": "6.44", "copy, GB/s": "4,295", "compared": "3,145,728 entries",
        "times as fast as torch.lerp": "2.00 (99.9 % alike)", "times as fast as torch._foreach_lerp_": "",
    }  # fmt: skip
    failed = cells(readme, "bfloat16", "8", "new memory", "aligned")
    assert failed["call"] == "failed: AssertionError: w: 3 entries differ"
    assert failed["kernels"] == failed["compared"] == "not measured"
    ties = cells(readme, "ties", "8 tensors", "tensor", "3", "bfloat16")
    assert ties["call"] == "**75.0 %**"
    assert ties["kernels"] == ""
    assert ties["times as fast as PEFT"] == "not measured: out of memory"
    assert ties["times as fast as mergekit"] == "1.50 (50.0 % alike)"
    assert cells(readme, "bfloat16", "3", "new memory", "aligned")["call"] == "not measured"


def test_the_readme_has_what_the_report_writes() -> None:
    report = load("report")
    results = [json.loads(file.read_text()) for file in sorted((BENCHMARKS / "results").glob("*.json"))]
    text = (BENCHMARKS / "README.md").read_text()
    written = text.partition(report.GPU_BEGIN)[2].partition(report.GPU_END)[0]
    assert written == "\n" + report.write_gpus([result for result in results if "gpu" in result], ROWS) + "\n"


def test_rows_are_named_once_and_stand_in_a_table() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert {row["table"] for row in ROWS} == set(load("report").GPU_TABLES)
