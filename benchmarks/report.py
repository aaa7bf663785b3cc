"""Writes the tables of README.md from a run of the benchmarks: ``python benchmarks/report.py [RUN.json [NAME]]``.

A summary of the run is kept as ``results/NAME.json``; given that in place of a run, the tables are written again. A run of some
of the benchmarks replaces their tables and leaves the others as they are: all rows of a table are from one run.
The tables of a trial run (``MERGEKIT_CL_BENCH_SCALE``) are printed, and nothing is written.

The tables of GPUs are written each time, from what gpu.py has left in ``results``: a table for each device, and for each row of
gpu_rows.json what was measured, or that nothing was.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by report.py -->\n", "<!-- end of what report.py writes -->"
GPU_BEGIN, GPU_END = "<!-- of GPUs, written by report.py -->\n", "<!-- end of what report.py writes of GPUs -->"


def summarize(run: dict[str, Any]) -> dict[str, Any]:
    """Keep what the tables need of pytest-benchmark's JSON: by the name of a table the run that it is from, and its rows."""
    machine = run["machine_info"]
    facts = {
        "machine": f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores",
        "software": {"Python": machine["python_version"], **machine["packages"]},
        "date": run["datetime"][:10],
        "load": machine["load"],
    }
    tables: dict[str, Any] = {}
    for row in map(_row, run["benchmarks"]):
        tables.setdefault(row.pop("table", ""), {"run": facts, "rows": []})["rows"].append(row)
    return {"scale": machine["scale"], "tables": tables}


def _row(benchmark: dict[str, Any]) -> Row:
    """Put the contender that pytest-benchmark timed beside the others, all as [minimum, median] in seconds."""
    row = dict(benchmark["extra_info"])
    if "name" in row:
        stats = benchmark["stats"]
        times = {row.pop("name"): stats, **row.pop("beside")}
        row["seconds"] = {name: (round(t["min"], 6), round(t["median"], 6)) for name, t in times.items()}
    return row


def write(summary: dict[str, Any]) -> str:
    """Write all tables, each run's under a line that says where and when that was."""
    parts: list[str] = []
    last = None
    for table, (title, columns) in TABLES.items():
        if found := summary["tables"].get(table):
            if found["run"] != last:
                last = found["run"]
                software = ", ".join(f"{name} {version}" for name, version in last["software"].items())
                parts.append(f"{last['machine']}; {software}; {last['date']}; load average before the run {last['load']:.1f}.")
            parts += [f"### {title}", _table([columns(row) for row in found["rows"]])]
    return "\n\n".join(parts) + "\n"


def _table(rows: Iterable[dict[str, str]]) -> str:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _copy_columns(row: Row) -> dict[str, str]:
    """Compare with the bandwidth of a copy, and with the expression."""
    seconds, per_copy = row["seconds"], row["bytes"] / row["copied"]
    copy = min(seconds["copy"], seconds["copy in one thread"])  # on a busy machine one thread may be the faster way
    ours = ("kernel", "merge(out=)", "merge()")
    return {
        **_case(row),
        **{f"{name} / copy": _ratio(copy, seconds[name], per_copy) for name in ours},
        "kernel / expression": _ratio(seconds["expression"], seconds["kernel"]),
        "kernel, GB/s": f"{row['bytes'] / seconds['kernel'][0] / 1e9:.1f}",
        **{f"{name}, GB/s": f"{row['copied'] / seconds[name][0] / 1e9:.1f}" for name in ("copy", "copy in one thread")},
        **{f"{name}, s": _seconds(seconds[name]) for name in (*ours, "expression")},
    }


def _method_columns(row: Row) -> dict[str, str]:
    """Compare with mergekit, and with the floor: the bytes that have to be moved, at the speed of the copy."""
    seconds = row["seconds"]
    copy = min(seconds["copy"], seconds["copy in one thread"])
    floor = tuple(time * row["bytes"] / row["copied"] for time in copy)
    ours, theirs = ("merge()", "NumPy"), seconds.get("mergekit")
    return {
        **_case(row),
        **{f"{name}, times as fast as mergekit": _ratio(theirs, seconds[name]) if theirs else "" for name in ours},
        **{f"{name}, multiple of the floor": _ratio(seconds[name], (floor[0], floor[1])) for name in ours},
        **{f"{name}, s": _seconds(seconds[name]) for name in ours},
        "mergekit, s": _seconds(theirs) if theirs else "",
        "floor, s": f"{floor[0]:.3g}",
    }


def _race_columns(row: Row) -> dict[str, str]:
    """Compare the first contender with the others."""
    (_, first), *others = row["seconds"].items()
    return {
        **_case(row),
        **{f"times as fast as {name}": _ratio(times, first) for name, times in others},
        **{f"{name}, s": _seconds(times) for name, times in row["seconds"].items()},
    }


def _process_columns(row: Row) -> dict[str, str]:
    """Compare whole processes: their time, and the most anonymous memory of any of their runs."""
    (name, _), *_ = row["seconds"].items()
    return {
        **_race_columns(row),
        f"{name}, GB/s": f"{row['bytes'] / row['seconds'][name][0] / 1e9:.3g}",
        **{f"{contender}, peak MB": f"{most['anonymous'] / 1e6:,.0f}" for contender, most in row["most"].items()},
        **{f"{name}, GB {kind}": f"{row['most'][name][kind] / 1e9:.3g}" for kind in ("read", "written")},
    }


def _growth_columns(row: Row) -> dict[str, str]:
    """Show what a merge costs beyond a process that does nothing."""
    (name, ours), (_, nothing) = row["seconds"].items()
    above = ours[0] - nothing[0], ours[1] - nothing[1]
    return {
        **_case(row),
        "above nothing, s": _seconds(above),
        "above nothing, ms per tensor": f"{1e3 * above[0] / row['case']['tensors']:.3g}",
        "above nothing, GB/s": f"{row['bytes'] / above[0] / 1e9:.3g}",
        **{f"{contender}, s": _seconds(times) for contender, times in row["seconds"].items()},
        f"{name}, peak MB": f"{row['most'][name]['anonymous'] / 1e6:,.0f}",
    }


def _term_columns(row: Row) -> dict[str, str]:
    """Show what a penalty adds to a step of training, and the same penalty in the loss."""
    seconds, temporary = row["seconds"], row["temporary"]
    return {
        **_case(row),
        "its term, times as fast as in the loss": _ratio(seconds["its term"], seconds["our term"]),
        "its term, part of a plain step": _part(seconds["our term"], seconds["plain"]),
        "in the loss": _part(seconds["its term"], seconds["plain"]),
        "the step, beyond a plain one": _part(seconds["ours"], seconds["plain"], 1),
        "with it in the loss": _part(seconds["in the loss"], seconds["plain"], 1),
        "kept, MB": f"{row['kept'] / 1e6:.1f}",
        "temporary, MB": f"{temporary['ours'] / 1e6:.1f}",
        "temporary in the loss, MB": f"{temporary['in the loss'] / 1e6:.1f}",
        **{f"{name}, s": _seconds(seconds[name]) for name in ("plain", "our term", "its term")},
    }


def _sfa_columns(row: Row) -> dict[str, str]:
    """Show what the merges of a run take, spread over its steps."""
    seconds, merges, steps = row["seconds"], row["merges"], row["case"]["steps of the run"]
    both = zip(seconds["merge"], seconds["count"], strict=True)
    spread = tuple((merges * merge + (steps - merges) * count) / steps for merge, count in both)
    return {
        **_case(row),
        "merges": str(merges),
        "part of a plain run": _part((spread[0], spread[1]), seconds["plain"]),
        "kept, MB": f"{row['kept'] / 1e6:.1f}",
        "temporary, MB": f"{row['temporary']['ours'] / 1e6:.1f}",
        **{f"{name}, s": _seconds(times) for name, times in seconds.items()},
    }


def _rehearsal_columns(row: Row) -> dict[str, str]:
    seconds = row["seconds"]
    return {
        **_case(row),
        "the step, beyond a plain one": _part(seconds["ours"], seconds["plain"], 1),
        "kept, MB": f"{row['kept'] / 1e6:.1f}",
        **{f"{name}, s": _seconds(times) for name, times in seconds.items()},
    }


def _first_call_columns(row: Row) -> dict[str, str]:
    return {**_case(row), **{f"{name}, s": f"{seconds:.3g}" for name, seconds in row["seconds"].items()}}


def _accuracy_columns(row: Row) -> dict[str, str]:
    return {**_case(row), **{name: f"{value:.3g}" for name, value in row["errors"].items()}}


def _case(row: Row) -> dict[str, str]:
    return {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in row["case"].items()}


def _ratio(slower: tuple[float, float], faster: tuple[float, float], factor: float = 1) -> str:
    """Show how many times as fast, from the minima and in parentheses from the medians."""
    minimum, middle = (factor * a / b for a, b in zip(slower, faster, strict=True))
    return f"**{minimum:.2f}** ({middle:.2f})"


def _part(times: tuple[float, float], whole: tuple[float, float], less: float = 0) -> str:
    """Show how large a part of the whole something is, from the minima and in parentheses from the medians."""
    minimum, middle = (100 * (a / b - less) for a, b in zip(times, whole, strict=True))
    return f"**{minimum:.2f} %** ({middle:.2f} %)"


def _seconds(times: tuple[float, float]) -> str:
    return f"{times[0]:.3g} ({times[1]:.3g})"


TABLES: dict[str, tuple[str, Callable[[Row], dict[str, str]]]] = {
    "weighted_sum": ("weighted_sum of arrays of 64 Mi elements", _copy_columns),
    "torch": ("merge() of two tensors of 64 Mi elements, beside PyTorch", _race_columns),
    "state_dicts": ("merge() of state dicts, beside mergekit 0.1.5", _race_columns),
    "methods": ("Merge methods on bfloat16 state dicts of 64 Mi elements", _method_columns),
    "accuracy": ("Errors in bfloat16, against the same merge in float64", _accuracy_columns),
    "sfa_step": ("A step of SFA on a PyTorch model", _race_columns),
    "training_terms": ("Penalties in a training loop, beside the same penalties in the loss", _term_columns),
    "training_sfa": ("SFA in a training loop", _sfa_columns),
    "training_rehearsal": ("Rehearsal in a training loop", _rehearsal_columns),
    "flax": ("A training step in JAX, with the schedule of SFA inside the compiled step", _race_columns),
    "recipes": ("Recipes of mergekit, in float32, against mergekit", _accuracy_columns),
    "checkpoints": ("Whole processes, beside mergekit-yaml", _process_columns),
    "checkpoint_memory": ("Models four times the size", _process_columns),
    "checkpoint_growth": ("linear of models that grow", _growth_columns),
    "first_call": ("The first call of a process", _first_call_columns),
}


# GPUs

GPU_TABLES = {
    "sums": ("Weighted sums of large tensors", "kernels"),
    "model": ("A model of 300 tensors", "call"),
    "ties": ("Task vectors", "call"),
    "surveys": ("Surveys of large tensors", "kernels"),
    "bus": ("Checkpoints, by way of the bus", "call"),
}
"""Titles, and which figure a goal is for."""

NOT_MEASURED = "not measured"


def write_gpus(results: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """Write the tables of each device; without one, those that say what there would be."""
    if not results:
        return "\n\n".join(["No GPU has been measured yet.", *_gpu_tables({}, rows)]) + "\n"
    parts: list[str] = []
    for device in results:
        facts, measured = device["gpu"], device["rows"]
        memory = f", {facts['memory'] / 1e9:.0f} GB" if "memory" in facts else ""
        parts += [f"### {facts['device']}", f"{facts.get('architecture', '')}{memory}. {_runs(measured)}"]
        parts += _gpu_tables(measured, rows)
    return "\n\n".join(parts) + "\n"


def _runs(measured: dict[str, Row]) -> str:
    """Say when rows were measured, with what, and how large their large tensors are."""
    runs: dict[str, int] = {}
    for row in measured.values():
        run = row["run"]
        software = ", ".join(f"{name} {version}" for name, version in run["software"].items())
        text = f"commit {run['commit']}, {run['date'][:10]}: driver {run['driver']}, {software}; {row['elements']:,} elements"
        runs[text] = runs.get(text, 0) + 1
    return " ".join(f"{count} rows at {text}." for text, count in runs.items())


def _gpu_tables(measured: dict[str, Row], rows: Sequence[Row]) -> list[str]:
    parts = []
    for table, (title, aim) in GPU_TABLES.items():
        chosen = [row for row in rows if row["table"] == table]
        columns = [_gpu_columns(row, aim, measured.get(row["name"])) for row in chosen]
        # first what a row is, then its figures, then other contenders; in all rows
        names = dict.fromkeys([name for part in zip(*columns, strict=True) for each in part for name in each], "")
        parts += [f"#### {title}", _table([names | case | figures | beside for case, figures, beside in columns])]
    return parts


def _gpu_columns(row: Row, aim: str, found: Row | None) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Put a row of gpu_rows.json beside what was measured of it: parts of the bandwidth of a copy, from medians."""
    case, goal = _case(row), f"{row['goal']} % ({aim})" if "goal" in row else ""
    figures = dict.fromkeys(("call", "queued", "kernels", "call, ms", "GB moved", "copy, GB/s", "compared"), "")
    if found is None or "call" not in found:
        why = [f"{key}: {found[key]}" for key in (NOT_MEASURED, "failed") if key in found] if found else []
        figures = dict.fromkeys(figures, NOT_MEASURED) | {"call": "".join(why) or NOT_MEASURED}
        beside = dict.fromkeys(row.get("peers", []), NOT_MEASURED)
    else:
        copy = found["copied"] / median(found["yardstick"])
        for key in {"call", "queued", "kernels"} & found.keys():
            part = f"{100 * found['bytes'] / median(found[key]) / copy:.1f} %"
            figures[key] = f"**{part}**" if key == aim and "goal" in row else part
        figures["call, ms"] = f"{1e3 * median(found['call']):.3g} ({1e3 * min(found['call']):.3g})"
        figures["GB moved"] = f"{found['bytes'] / 1e9:.3g}"
        figures["copy, GB/s"] = f"{copy / 1e9:,.0f}"
        figures["compared"] = found["compared"]
        beside = {name: _beside(peer, found) for name, peer in found["peers"].items()}
    return case, {"goal": goal} | figures, {f"times as fast as {name}": text for name, text in beside.items()}


def _beside(peer: Row, ours: Row) -> str:
    if "seconds" not in peer:
        return f"{NOT_MEASURED}: {peer[NOT_MEASURED]}"
    return f"{median(peer['seconds']) / median(ours['call']):.2f} ({100 * peer['alike']:.1f} % alike)"


def main(path: str = "", name: str = "") -> None:
    """Write the tables into README.md: those of a run or a summary, if one is given, and those of GPUs."""
    if path:
        _take(path, name)
    devices = [json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))]
    rows = json.loads((HERE / "gpu_rows.json").read_text())
    _replace(GPU_BEGIN, write_gpus([device for device in devices if "gpu" in device], rows), GPU_END)


def _take(path: str, name: str) -> None:
    """Read a run or a summary, keep the summary, and write its tables into README.md."""
    run = json.loads(Path(path).read_text())
    summary = summarize(run) if "benchmarks" in run else run
    if summary["scale"] != 1:
        print(write(summary))
        return
    machine = next(iter(summary["tables"].values()))["run"]["machine"]
    name = name or re.sub(r"\W+", "-", machine).lower()
    kept = HERE / "results" / f"{name}.json"
    kept.parent.mkdir(exist_ok=True)
    if kept.exists():
        summary["tables"] = json.loads(kept.read_text())["tables"] | summary["tables"]
    kept.write_text(json.dumps(summary, indent=1) + "\n")
    _replace(BEGIN, write(summary), END)


def _replace(begin: str, tables: str, end: str) -> None:
    """Write tables between two marks in README.md."""
    before, _, rest = (HERE / "README.md").read_text().partition(begin)
    (HERE / "README.md").write_text(before + begin + "\n" + tables + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main(*sys.argv[1:])
