"""Kill merges at random moments, run them again, and see that the result is the same: ``python benchmarks/kill.py``.

Each merge is a process of its own, killed with SIGKILL: at a random time (+0.1 s after it began to write, or -0.1 s before), or
before a random change of the files beside the target: some, such as the rename, take too little time to be hit by chance. Then
the same command is run again. Every time, there must be nothing at the target, or what was there, or the complete result;
then the complete result, byte for byte; and of what was complete, nothing may be read again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TENSORS, ROWS, COLUMNS = 200, 250, 200  # 40 MB in float32
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.listdir", "shutil.rmtree"}
PROGRAM = """
import atexit, os, signal, sys
left = int(sys.argv.pop(1))
def hook(event, args):
    global left
    if event == "ctypes.dlsym":
        ours = "renameat2" in args
    else:
        ours = event in {events} and any("{beside}." in str(each) for each in args)
    if ours:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
atexit.register(lambda: print("changes", -left, file=sys.stderr))
from mergekit_cl.cli import main
main()
"""
"""The command line, which kills itself before it asks for the n-th change (or look) beside the target; never if n is 0."""


@dataclass(frozen=True)
class Scene:
    """A merge: its target, what it is, and whether a model is at the target before."""

    title: str
    target: str
    method: tuple[str, ...]
    more: tuple[str, ...] = ()

    @property
    def replaces(self) -> bool:
        return "--overwrite" in self.more


LINEAR = ("a", "b", "-m", "linear", "-p", "weight=0.25,0.75")
TIES = ("a", "b", "--base", "base", "-m", "ties", "-p", "density=0.4", "--memory", "180MB")
SCENES = (
    Scene("linear, a file", "out.safetensors", LINEAR),
    Scene("linear, shards over one file", "out", LINEAR, ("--out-shard-size", "9MB", "--overwrite")),
    Scene("ties, shards", "out", TIES, ("--out-shard-size", "9MB")),
    Scene("ties, one file over shards", "out", TIES, ("--overwrite",)),
)


class Merges:
    """The runs of one scene, in a folder with the models."""

    def __init__(self, folder: Path, scene: Scene) -> None:
        self.folder, self.scene = folder, scene
        self.target = folder / "results" / scene.target
        self.staging = self.target.with_name(f".{scene.target}.merging")
        self.program = PROGRAM.format(events=EVENTS, beside=f"/.{scene.target}")
        self.clear()
        self.old = contents(self.target)
        for _ in range(2):  # the first one finds nothing in memory yet
            self.clear()
            self.begun, self.seconds, (code, self.fresh, self.events) = self.whole()
            assert code == 0
        self.expected = contents(self.target)

    def whole(self) -> tuple[float, float, tuple[int, dict[str, Any], int]]:
        """Merge undisturbed: the seconds until the staging folder was there, and until it was gone."""
        begin = time.monotonic()
        process = self.start(0)
        while process.poll() is None and not self.staging.exists():
            time.sleep(0.001)
        begun = time.monotonic() - begin
        while process.poll() is None and self.staging.exists():
            time.sleep(0.001)
        return begun, time.monotonic() - begin, ended(process)

    def start(self, kill_at: int) -> subprocess.Popen[str]:
        options = ["-o", self.target, "--json", "--threads", "1", "--backend", "numpy", *self.scene.more]
        return subprocess.Popen(
            [sys.executable, "-c", self.program, str(kill_at), "merge", *self.scene.method, *map(str, options)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def complete(self) -> int | None:
        """Count the tensors that the journal has; ``None`` without one."""
        journal = self.staging / "journal"
        return journal.read_bytes().count(b"\n") - 1 if journal.exists() else None

    def clear(self) -> None:
        """Make the results as they were before the merge."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if self.scene.replaces:
            shutil.copytree(
                self.folder / ("base" if "shards" in self.scene.title.split(" over ")[0] else "sharded"), self.target
            )

    def kill(self, seconds: float | None, change: int) -> tuple[list[str], list[str]]:
        """Kill a merge, and run it again. Return a row of the table, and what is wrong."""
        self.clear()
        process = self.start(change)
        if seconds is not None:  # counted from the first byte, as the start of a process takes longer or shorter
            while seconds > 0 and process.poll() is None and not self.staging.exists():
                time.sleep(0.001)
            time.sleep(seconds if seconds > 0 else self.begun + seconds)
            process.kill()
        code, _, _ = ended(process)
        wrong, there, complete = [], contents(self.target), self.complete()
        if code not in (-signal.SIGKILL, 0):
            wrong.append(f"exit code {code}")
        if there not in (self.old, self.expected):
            wrong.append("neither the old nor the new model was there")
        code, again, errors = ended(self.start(0))
        done = not self.scene.replaces and there == self.expected
        if done:
            state = "in place"
            if code != 1:
                wrong.append(f"a complete result was not left alone: exit code {code}")
        else:
            state = "nothing begun" if complete is None else f"{max(0, complete)}"
            state = "in place" if there == self.expected else state
            if code or contents(self.target) != self.expected:
                wrong.append(f"the result is another: exit code {code}, {errors}")
            elif sorted(os.listdir(self.target.parent)) != [self.target.name]:
                wrong.append(f"left over: {os.listdir(self.target.parent)}")
            elif not max(0, (complete or 0) - 1) <= again["resumed"] <= max(0, complete or 0):
                wrong.append(f"{again['resumed']} tensors were resumed")  # all, but perhaps a line that was being written
            elif again["read"] * TENSORS != self.fresh["read"] * (TENSORS - again["resumed"]):
                wrong.append("more was read than what was missing")
        moment = f"change {change} of {self.events}"
        if seconds is not None:
            moment = f"{seconds:+.3f} s of {self.seconds - self.begun:.2f}"
        read = "-" if done else f"{again.get('read', 0) / 1e6:.1f} of {self.fresh['read'] / 1e6:.1f}"
        return [self.scene.title, moment, state, read, "; ".join(wrong) or "ok"], wrong


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], int]:
    """Wait for a process: its exit code, what it printed, and how many changes it made."""
    out, err = process.communicate()
    changes = [int(line.split()[1]) for line in err.splitlines() if line.startswith("changes ")]
    return process.returncode, json.loads(out or "{}"), changes[0] if changes else 0


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def make_models(folder: Path, generator: np.random.Generator) -> None:
    """Write the models, with the first also as shards."""
    for name in ("base", "a", "b"):
        tensors = {
            f"layers.{n:03d}.weight": generator.standard_normal((ROWS, COLUMNS), dtype=np.float32) for n in range(TENSORS)
        }
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    half = {name: f"model-0000{1 + (number >= TENSORS // 2)}-of-00002.safetensors" for number, name in enumerate(tensors)}
    (folder / "sharded").mkdir()
    for file in sorted(set(half.values())):
        save_file({name: array for name, array in tensors.items() if half[name] == file}, folder / "sharded" / file)
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": half}))


def show(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """Kill, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="how often")
    parser.add_argument("--seed", type=int, default=0, help="for the moments")
    parser.add_argument("--folder", type=Path, help="where to work; on tmpfs that is faster")
    given = parser.parse_args()
    generator = random.Random(given.seed)
    rows, faults = [["merge", "killed at", "tensors complete", "MB read when resumed", "result"]], 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        make_models(Path(folder), np.random.default_rng(given.seed))
        for number, scene in enumerate(SCENES):
            merges = Merges(Path(folder), scene)
            count = len(range(number, given.kills, len(SCENES)))
            by_change = count // 4
            timed = count - by_change
            early = timed // 6
            moments: list[tuple[float | None, int]] = [(-merges.begun * generator.random(), 0) for _ in range(early)]
            span = (merges.seconds - merges.begun) / max(1, timed - early)
            moments += [(span * (part + generator.random()), 0) for part in range(timed - early)]
            moments += [(None, change) for change in sorted(generator.sample(range(1, merges.events + 1), by_change))]
            for seconds, change in moments:
                row, wrong = merges.kill(seconds, change)
                rows.append(row)
                faults += bool(wrong)
    show(rows)
    print(f"\n{len(rows) - 1} kills, {faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
