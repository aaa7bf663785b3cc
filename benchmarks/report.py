"""Writes the tables of README.md from a run of the benchmarks: ``python benchmarks/report.py RUN.json [NAME]``.

A summary of the run is kept as ``results/NAME.json``; given that in place of a run, the tables are written again. A run of some
of the benchmarks replaces their tables and leaves the others as they are: all rows of a table are from one run.
The tables of a trial run (``MERGEKIT_CL_BENCH_SCALE``) are printed, and nothing is written.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by report.py -->\n", "<!-- end of what report.py writes -->"


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


def main(path: str, name: str = "") -> None:
    """Read a run or a summary, keep the summary, and write the tables into README.md."""
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
    before, _, rest = (HERE / "README.md").read_text().partition(BEGIN)
    (HERE / "README.md").write_text(before + BEGIN + "\n" + write(summary) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(*sys.argv[1:])
