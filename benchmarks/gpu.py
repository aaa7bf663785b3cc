"""Measures the kernels on a GPU: ``python benchmarks/gpu.py``, with any Python that has torch, Triton, NumPy and ml_dtypes.

Nothing has to be installed or fetched. Every result is compared with the CPU's before it is timed. Rows, which gpu_rows.json
lists, go into ``results/DEVICE.json`` one by one, the most important first, so that a run that is killed leaves what it has;
``python benchmarks/report.py`` writes the tables. Without a GPU ``--rehearse`` carries out every row in Triton's interpreter.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from benchmarks.gpu_device import Device
    from benchmarks.gpu_work import Work

Row: TypeAlias = dict[str, Any]

HERE = Path(__file__).resolve().parent
ROUNDS, PEER_ROUNDS = 25, 5
SECONDS = 2.0
"""What the rounds of a row, and those of each other contender, take at most; a round that has begun ends."""

TILES, WARPS = (1024, 2048, 4096, 8192), (2, 4, 8)


def main(arguments: list[str]) -> int:
    """Measure; return 1 if a row failed, 2 where there is no GPU."""
    options = _options(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    rows = json.loads((HERE / "gpu_rows.json").read_text())
    for glob in options.only:
        if not any(fnmatch(row["name"], glob) for row in rows):
            print(f"--only {glob!r}: matches no row of gpu_rows.json; names are such as {rows[0]['name']}", file=sys.stderr)
            return 2
    rows = [row for row in rows if any(fnmatch(row["name"], glob) for glob in options.only)]
    if find_spec("torch") is None:
        print(f"{sys.executable} has no torch; name another with make bench-gpu PYTHON=...", file=sys.stderr)
        return 2
    with _importable():
        import torch

        from benchmarks.gpu_device import FULL, QUICK, REHEARSAL, Device

        if not options.rehearse and not torch.cuda.is_available():
            print("No GPU is there that torch can use. --rehearse tries this script out without one.", file=sys.stderr)
            return 2
        device = Device(REHEARSAL if options.rehearse else QUICK if options.quick else FULL, rehearsed=options.rehearse)
        if options.tune:
            _tune(device, rows)
            return 0
        return _run(device, rows, options)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="rows, by their names in gpu_rows.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no row after so many minutes (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds; no results are written")
    parser.add_argument("--rehearse", action="store_true", help="tiny models in Triton's interpreter; no results are written")
    parser.add_argument("--tune", action="store_true", help="measure tiles and warps in place of the rows, and print the best")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="where the results go")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    return parser.parse_args(arguments)


def _importable() -> ExitStack:
    """Let mergekit_cl be imported from this checkout, installed or not.

    The top of the tree must not be on the import path: ``kernels`` there would hide another distribution's. So a folder with
    links to what is imported is.
    """
    stack = ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    for name in ("mergekit_cl", "benchmarks"):
        Path(folder, name).symlink_to(HERE.parent / name)
    sys.path.insert(0, folder)
    stack.callback(sys.path.remove, folder)
    return stack


def _run(device: "Device", rows: list[Row], options: argparse.Namespace) -> int:
    facts = device.facts()
    now = datetime.now(UTC).isoformat(timespec="minutes")
    run = {
        "date": now,
        "commit": options.commit or _commit(),
        "software": facts.pop("software"),
        "driver": facts.pop("driver", ""),
    }
    lasting = not (options.rehearse or options.quick)
    path = options.results / f"{re.sub(r'[^a-z0-9]+', '-', facts['device'].lower())}.json"
    known = json.loads(path.read_text())["rows"] if lasting and path.exists() else {}
    begun, failed = perf_counter(), 0
    lines: list[list[str]] = []
    for row in rows:
        if perf_counter() - begun > 60 * options.minutes:
            print(f"no time is left for {row['name']} and what comes after it")
            break
        start = perf_counter()
        outcome = measure(device, row, 1 if options.rehearse else 5 if options.quick else ROUNDS)
        outcome |= {"elements": device.sizes.elements, "run": run}
        failed += "failed" in outcome
        lines.append(_line(row, outcome, rehearsed=options.rehearse))
        print(f"{perf_counter() - start:6.1f} s  " + "  ".join(filter(None, lines[-1])), flush=True)
        if lasting:
            known[row["name"]] = outcome
            _write(path, {"gpu": facts, "rows": known})
        try:
            device.wait()
        except RuntimeError as error:  # what a kernel did wrong is reported again and again by all that follows
            print(f"the device is of no more use: {error}", file=sys.stderr)
            failed += 1
            break
    print(f"\n{facts['device']}; {', '.join(f'{name} {version}' for name, version in run['software'].items())}")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return int(failed > 0)


def measure(device: "Device", row: Row, rounds: int) -> Row:
    """Check a row and time it: seconds of every round, or why there are none."""
    import torch

    from benchmarks.gpu_work import KINDS, MissingError

    try:
        work = KINDS[row["kind"]](device, **row["case"])
        try:
            return _measured(device, row, work, rounds)
        finally:
            work.after()
    except MissingError as missing:
        return {"not measured": str(missing)}
    except ModuleNotFoundError as missing:
        return {"not measured": f"{missing.name} is not installed"}
    except torch.cuda.OutOfMemoryError:
        return {"not measured": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}
    finally:
        gc.collect()


def _measured(device: "Device", row: Row, work: "Work", rounds: int) -> Row:
    """Time a row after checking it.

    *call* is from an idle device until it is idle again, *queued* from when the device has done what came before, so without
    what the host does meanwhile, *kernels* the kernels alone.
    """
    outcome: Row = {"bytes": work.bytes, "compared": work.check()}
    outcome["copied"] = device.sent if work.over_the_bus else device.copied
    yardstick = device.time_bus if work.over_the_bus else device.time_copy
    yardstick()
    samples: dict[str, list[float]] = {name: [] for name in ("yardstick", "call", "queued", "kernels")}

    def time(name: str, timed: Callable[[], float]) -> float:
        work.before()
        seconds = timed()
        samples[name].append(round(seconds, 9))
        return seconds

    end = perf_counter() + SECONDS
    while len(samples["call"]) < rounds and (perf_counter() < end or not samples["call"]):
        copy = time("yardstick", yardstick)
        call = time("call", lambda: device.time(work.call))
        if not work.over_the_bus:
            copies = 1 + min(100, int(2 * call / copy))  # for longer than the host needs
            time("queued", partial(device.time, work.call, copies=copies))
            time("kernels", partial(device.time_kernels, work.call, copies=copies))
    if not any(samples["kernels"]):
        del samples["kernels"]  # a graph launches them by itself
    outcome |= {name: seconds for name, seconds in samples.items() if seconds}
    outcome["peers"] = {name: _peer(device, work, name, rounds) for name in row.get("peers", [])}
    return outcome


def _peer(device: "Device", work: "Work", name: str, rounds: int) -> Row:
    """Time another contender; also find what part of its result is as ours, but for the last bit of bfloat16."""
    import torch

    try:
        call = work.peers[name]()
        work.before()
        (ours,) = work.first
        theirs = call().reshape(-1)[: len(ours)].cpu().double()
        alike = float(((theirs - ours.double()).abs() <= 2.0**-7 * ours.double().abs()).double().mean())
        seconds: list[float] = []
        end = perf_counter() + SECONDS
        while len(seconds) < min(rounds, PEER_ROUNDS) and (perf_counter() < end or not seconds):
            work.before()
            seconds.append(round(device.time(call), 9))
        return {"seconds": seconds, "alike": round(alike, 6)}
    except ModuleNotFoundError as missing:
        return {"not measured": f"{missing.name} is not installed"}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"not measured": "out of memory"}
    except Exception as error:  # another package's
        return {"not measured": f"{type(error).__name__}: {error}".split("\n")[0]}


def _line(row: Row, outcome: Row, *, rehearsed: bool) -> list[str]:
    """Put a row into words, for the terminal; a rehearsal has no times that mean anything."""
    for reason in ("not measured", "failed"):
        if reason in outcome:
            return [row["name"], f"{reason}: {outcome[reason]}", *[""] * 6]
    peers, as_ours = outcome["peers"], f"{outcome['compared']} as the CPU's"
    if rehearsed:
        beside = [f"{name}: {peer.get('not measured', 'runs')}" for name, peer in peers.items()]
        return [row["name"], as_ours, *[""] * 5, ", ".join(beside)]
    copy = outcome["copied"] / median(outcome["yardstick"])
    parts = [
        f"{key} {100 * outcome['bytes'] / median(outcome[key]) / copy:.1f} %" if key in outcome else ""
        for key in ("call", "queued", "kernels")
    ]
    goal = f"goal {row['goal']} %" if "goal" in row else ""
    beside = [
        f"{median(peer['seconds']) / median(outcome['call']):.2f} x {name}"
        if "seconds" in peer
        else f"{name}: {peer['not measured']}"
        for name, peer in peers.items()
    ]
    return [row["name"], *parts, goal, f"{1e3 * median(outcome['call']):.3f} ms", as_ours, ", ".join(beside)]


def _tune(device: "Device", rows: Iterable[Row]) -> None:
    """Measure the kernels with other tiles and warps, and print what belongs into kernels/triton/tuning.py."""
    from benchmarks.gpu_work import KINDS
    from mergekit_cl.kernels.triton.tuning import Shape, architecture, shape_of, using

    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        for kind in row.get("tunes", "").split():
            by_kind.setdefault(kind, []).append(row)
    entries: list[str] = []
    for kind, chosen in by_kind.items():
        present = shape_of(kind, device.torch)
        speeds: dict[Shape, float] = {}
        for shape in dict.fromkeys([present, *(Shape(tile, warps) for tile, warps in product(TILES, WARPS))]):
            with using(**{kind: shape}):
                speeds[shape] = _speed(device, chosen)
            print(f"{kind}, {shape}: {f'{speeds[shape] / 1e9:.0f} GB/s' if speeds[shape] else 'does not run'}", flush=True)
        fastest = max(speeds, key=lambda shape: speeds[shape])
        if speeds[fastest] > 1.01 * speeds[present]:  # less is noise
            with using(**{kind: fastest}):
                for row in chosen:
                    KINDS[row["kind"]](device, **row["case"]).check()
            entries.append(f'    "{kind}": {fastest},')
            print(entries[-1], flush=True)
    print("\n".join([f'\nSHAPES["{architecture(device.torch)}"] = {{', *entries, "}"]))


def _speed(device: "Device", rows: Iterable[Row]) -> float:
    """Find the bytes a second that the kernels of some rows move, on average; zero if one of them fails."""
    from benchmarks.gpu_work import KINDS

    speeds = []
    for row in rows:
        try:
            work = KINDS[row["kind"]](device, **row["case"])
            work.before()
            work.call()  # compiles
            seconds = []
            for _ in range(7):
                work.before()
                seconds.append(device.time_kernels(work.call, copies=1))
            speeds.append(work.bytes / median(seconds))
        except Exception as error:  # too many registers, or too much shared memory: of the compiler, or of the driver
            print(f"  {row['name']}: {type(error).__name__}: {error}".split("\n")[0])
            return 0.0
    return geometric_mean(speeds)


def _write(path: Path, results: Row) -> None:
    """Write results at once, so that a run that is killed leaves the last ones whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in results["rows"].items())
    beside.write_text(f'{{"gpu": {json.dumps(results["gpu"])}, "rows": {{\n{rows}\n}}}}\n')
    beside.replace(path)


def _commit() -> str:
    """Name the commit that is checked out, with a "+" if files differ from it."""
    try:
        describe = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
