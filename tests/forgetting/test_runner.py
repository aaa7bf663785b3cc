"""The runner, with an experiment that takes no time: what runs, in which order, what is kept, and what is shown."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from forgetting import cli
from forgetting.cells import Cache, fingerprint_of, named
from forgetting.learners import Learner
from forgetting.protocol import Part, Sequence, Settings, Task, cell
from forgetting.schedule import Estimate, Experiment, Plan, carry_out_all, result_file
from typer.testing import CliRunner

from mergekit_cl.errors import MergeError, unknown

ROOT = Path(__file__).parents[2]
NAMES = ("one", "two")
SETTINGS = Settings(10, 4, (0.1, 0.2), trials=2, seeds=2, betas=(0.5, 0.75), ps=(0.25, 1.0), grid_seeds=1)

PLAIN = Learner("plain", "plain", "fine-tuning")  # tries two learning rates
SFA = Learner("sfa", "SFA, p = 0.25", "SFA", fixed={"p": 0.25, "beta": 0.5})
TIES = Learner("ties", "TIES", "merging", merges="per-task")
TWIN = Learner("plain-flax", "plain, in Flax", "flax", like="plain")
JOINT = Learner("joint", "all at once", "bound", fixed={"only": 1.0})  # has nothing to choose from
LEARNERS = [PLAIN, SFA, TIES, TWIN, JOINT]

SCORES = {"plain": {0.1: 0.5, 0.2: 0.75}, "sfa": {0.1: 0.5, 0.2: 0.5}, "ties": {0.1: 0.75, 0.2: 0.25}}
ACCURACY = [[0.75, 0.25], [0.5, 1.0]]  # 75 % on average, 25 points forgotten, 87.5 % learned


def sequence(name: str, quick: bool) -> Sequence:
    if name not in NAMES and name != "one@1-0":
        raise unknown("sequence", name, NAMES)
    part = Part(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    tasks = (Task("first", part, part.first(2), part.first(1)), Task("second", part, part, part))
    settings = replace(SETTINGS, steps=1) if quick else SETTINGS
    return Sequence(name, name.title(), "Nothing.", "domain", "accuracy", tasks, lambda seed: torch.nn.Linear(2, 2), settings)


def trials(learner: Learner, settings: Settings) -> list[dict[str, float]]:
    values = [{**learner.fixed, "lr": rate} for rate in settings.rates]
    return values[:1] if learner.name == "joint" else values


def needs(of: Any) -> Any:
    return cell(of.sequence, "per-task", {"lr": dict(of.values)["lr"]}, of.seed, "weights") if of.learner == "ties" else None


def weights_of(of: Any, folder: Path) -> Path:
    return folder / f"{of.name}.safetensors"


def carry_out(of: Any, quick: bool, weights: Path) -> dict[str, Any]:
    if of.purpose == "weights":
        weights_of(of, weights).parent.mkdir(parents=True, exist_ok=True)
        weights_of(of, weights).write_text("models")
        return {"seconds": 1.0, "steps": 10}
    if of.learner == "ties":
        assert weights_of(needs(of), weights).exists()
    if of.purpose == "tuning":
        return {"score": SCORES[of.learner][dict(of.values)["lr"]], "seconds": 1.0, "steps": 10}
    return {"accuracy": ACCURACY, "loss": ACCURACY, "start": [0.0, 0.0], "curve": None, "seconds": 1.0, "steps": 10, "held": 8}


def measure(name: str, quick: bool, chosen: Any) -> dict[str, dict[str, float]]:
    return {"plain": {"step": 0.5}}


def report(results: list[dict[str, Any]], folder: Path) -> list[str]:
    return [f"reported: {result['sequence']['name']}" for result in results]


EXPERIMENT = Experiment(
    NAMES,
    sequence,
    lambda name: LEARNERS,
    trials,
    lambda name, learner, values, seed, purpose="final": cell(name, learner.runs, values, seed, purpose),
    needs,
    weights_of,
    carry_out,
    measure,
    report,
)


class AtOnce(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*given, **named))
        return future


class Lab:
    """The experiment, with a list of what ran, and cells that fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.bad: set[str] = set()
        self.experiment = replace(EXPERIMENT, carry_out=self.carry_out)

    def carry_out(self, of: Any, quick: bool, weights: Path) -> dict[str, Any]:
        self.ran.append(of.name)
        if of.name in self.bad:
            raise ValueError("it is bad")
        return carry_out(of, quick, weights)

    def plan(self, name: str = "one", **more: Any) -> Plan:
        tasks = sequence(name, False)
        return Plan(tasks, self.experiment, Cache(self.folder / "cells", fingerprint_of(tasks, False)), self.folder, **more)

    def run(self, *plans: Plan, jobs: int = 1) -> list[str]:
        self.ran.clear()
        carry_out_all(plans, AtOnce(), jobs, lambda of: self.experiment.carry_out(of, False, self.folder), lambda *_: None)
        return list(self.ran)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


ORDER = """\
one/plain/lr=0.1/tuning-seed-1000
one/plain/lr=0.2/tuning-seed-1000
one/plain/lr=0.2/seed-0
one/plain/lr=0.2/seed-1
one/sfa/beta=0.5,lr=0.1,p=0.25/tuning-seed-1000
one/sfa/beta=0.5,lr=0.2,p=0.25/tuning-seed-1000
one/sfa/beta=0.5,lr=0.1,p=0.25/seed-0
one/sfa/beta=0.5,lr=0.1,p=0.25/seed-1
one/per-task/lr=0.1/weights-seed-1000
one/ties/lr=0.1/tuning-seed-1000
one/per-task/lr=0.2/weights-seed-1000
one/ties/lr=0.2/tuning-seed-1000
one/per-task/lr=0.1/weights-seed-0
one/ties/lr=0.1/seed-0
one/per-task/lr=0.1/weights-seed-1
one/ties/lr=0.1/seed-1
one/plain-flax/lr=0.2/seed-0
one/plain-flax/lr=0.2/seed-1
one/joint/lr=0.1,only=1/seed-0
one/joint/lr=0.1,only=1/seed-1
one/sfa/beta=0.5,lr=0.1,p=1/seed-0
one/sfa/beta=0.75,lr=0.1,p=0.25/seed-0
one/sfa/beta=0.75,lr=0.1,p=1/seed-0""".splitlines()


def test_order(lab: Lab) -> None:
    """Trials, then finals with the best values (the first of equal ones); what is needed first; a twin tries nothing.

    One square of the heat map, beta 0.5 and p 0.25, is among the final cells already.
    """
    assert lab.run(lab.plan()) == ORDER


def test_the_next_sequence_begins_while_the_last_is_busy(lab: Lab) -> None:
    one, two = lab.plan("one", only=["plain"]), lab.plan("two", only=["plain"])
    tuning = [cell("one", "plain", {"lr": rate}, 1000, "tuning").name for rate in (0.1, 0.2)]
    first = one.ready(())
    assert first is not None
    assert first.name == tuning[0]
    assert one.ready(tuning) is None  # the finals wait for both trials
    ready = two.ready(tuning)
    assert ready is not None
    assert ready.name == "two/plain/lr=0.1/tuning-seed-1000"
    ran = lab.run(one, two, jobs=3)
    assert ran[:3] == [*tuning, ready.name]
    assert sorted(ran) == sorted({*ran})


def test_some_learners(lab: Lab) -> None:
    """A twin alone: what it takes its values from is tried, and not more."""
    assert lab.run(lab.plan(only=["plain-flax"])) == [*ORDER[:2], *ORDER[16:18]]


def test_nothing_runs_twice(lab: Lab) -> None:
    lab.run(lab.plan())
    assert lab.run(lab.plan()) == []


def test_the_file_of_a_cell(lab: Lab) -> None:
    """What differs runs again: a damaged file, half a file, another fingerprint. How many seeds there are does not matter."""
    lab.run(lab.plan(only=["plain"]))
    file = lab.folder / "cells" / f"{ORDER[2]}.json"
    whole = file.read_text()
    for damaged in ("", whole[:-9], "[]", "{}", json.dumps({**json.loads(whole), "entry": {"result": {}}})):
        file.write_text(damaged)
        assert lab.run(lab.plan(only=["plain"])) == [ORDER[2]], damaged

    tasks = sequence("one", False)
    print_ = fingerprint_of(tasks, False)
    more_seeds = replace(tasks, settings=replace(SETTINGS, seeds=9, betas=(0.1,), rates=(0.1,)))
    assert fingerprint_of(more_seeds, False) == print_
    fewer = replace(tasks, tasks=(tasks.tasks[0], replace(tasks.tasks[1], test=tasks.tasks[1].test.first(2))))
    for other in (replace(tasks, settings=replace(SETTINGS, steps=11)), fewer, replace(tasks, tasks=tasks.tasks[::-1])):
        assert json.dumps(fingerprint_of(other, False)) != json.dumps(print_)
        assert Cache(lab.folder / "cells", fingerprint_of(other, False)).read(ORDER[2]) is None
    assert Cache(lab.folder / "cells", fingerprint_of(tasks, True)).read(ORDER[2]) is None
    assert Cache(lab.folder / "cells", print_).read(ORDER[2]) is not None


def test_a_file_is_there_completely_or_not_at_all(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(lab.folder, {})
    cache.write("a/b", {"score": 1}, 1.0)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cache.write("a/b", {"score": 2}, 1.0)
    entry = cache.read("a/b")
    assert entry is not None
    assert entry.result == {"score": 1}


def test_models_for_merges(lab: Lab) -> None:
    """They are deleted at the end; if a merge has to run again, so have they, and no others."""
    plan = lab.plan()
    lab.run(plan)
    files = sorted(path.name for path in lab.folder.rglob("*.safetensors"))
    assert files == ["weights-seed-0.safetensors", "weights-seed-1.safetensors"] + ["weights-seed-1000.safetensors"] * 2
    plan.drop_weights()
    assert list(lab.folder.rglob("*.safetensors")) == []
    (lab.folder / "cells/one/ties/lr=0.1/seed-1.json").unlink()
    assert lab.run(lab.plan()) == ["one/per-task/lr=0.1/weights-seed-1", "one/ties/lr=0.1/seed-1"]


def test_a_cell_that_fails(lab: Lab) -> None:
    """What needs it does not run: the merges of models, the finals of a learner, its twin. All else does."""
    lab.bad = {"one/plain/lr=0.2/tuning-seed-1000", "one/per-task/lr=0.1/weights-seed-1"}
    plan = lab.plan()
    gone = {*ORDER[2:4], *ORDER[16:18], "one/ties/lr=0.1/seed-1"}
    assert lab.run(plan) == [name for name in ORDER if name not in gone]
    assert plan.failed == lab.bad
    assert plan.left() == []  # that could run
    result = result_file(plan, False, {}, {})
    assert result is not None
    assert [*result["learners"]] == ["sfa", "joint"]  # ties lacks a seed
    lab.bad = set()
    again = lab.run(lab.plan())
    assert sorted(again) == sorted({*gone, "one/plain/lr=0.2/tuning-seed-1000", "one/per-task/lr=0.1/weights-seed-1"})


def test_result_file(lab: Lab) -> None:
    plan = lab.plan()
    assert result_file(plan, False, {}, {}) is None
    lab.run(plan)
    result = result_file(plan, False, {"python": "3"}, {"plain": {"step": 0.5}})
    assert result is not None
    assert result["sequence"] | {"settings": None} == {
        "name": "one", "title": "One", "about": "Nothing.", "kind": "domain", "unit": "accuracy", "pretrained": False,
        "tasks": ["first", "second"], "parameters": 6, "settings": None,
    }  # fmt: skip
    assert result["sequence"]["settings"]["betas"] == (0.5, 0.75)
    assert (result["quick"], result["machine"], result["costs"]) == (False, {"python": "3"}, {"plain": {"step": 0.5}})
    assert [*result["learners"]] == ["plain", "sfa", "ties", "plain-flax", "joint"]
    final = carry_out(named("one/plain/lr=0.2/seed-0"), False, lab.folder)
    trials = [{"values": {"lr": 0.1}, "score": 0.5}, {"values": {"lr": 0.2}, "score": 0.75}]
    plain = {"title": "plain", "group": "fine-tuning", "runs": "plain", "values": {"lr": 0.2}, "trials": trials}
    assert result["learners"]["plain"] == {**plain, "finals": [final, final]}
    twin = {**plain, "title": "plain, in Flax", "group": "flax", "runs": "plain-flax"}
    assert result["learners"]["plain-flax"] == {**twin, "finals": [final, final]}
    assert result["learners"]["joint"]["trials"] == [{"values": {"only": 1.0, "lr": 0.1}, "score": None}]
    squares = [(0.5, 0.25), (0.5, 1.0), (0.75, 0.25), (0.75, 1.0)]
    assert result["grid"] == [{"beta": beta, "p": p, "seed": 0, "accuracy": ACCURACY} for beta, p in squares]
    assert result["grid_lr"] == 0.1
    assert result["date"] == max(entry.date for _, entry in plan.done())


def test_what_is_left(lab: Lab) -> None:
    """Before anything has run: 6 trials and 2 of joint have names; then 2 finals of 4 learners, 4 squares, 2 trainings."""
    left = lab.plan().left()
    assert len(left) == 6 + 2 + 4 * 2 + 4 + 2
    assert left.count(("one", "per-task", True)) == 2
    assert left.count(("one", "sfa", False)) == 2 + 2 + 4
    plan = lab.plan()
    lab.run(plan)
    assert plan.left() == []


def test_estimate() -> None:
    plain, ties, other = ("one", "plain", False), ("one", "ties", False), ("two", "plain", False)
    estimate = Estimate()
    assert estimate.seconds([plain]) is None
    for of, seconds in ((plain, 9.0), (plain, 1.0), (plain, 2.0), (("three", "plain", False), 4.0)):
        estimate.add(of, seconds)
    assert estimate.seconds([plain, plain]) == 4.0  # twice the median of 1, 2, 9
    assert estimate.seconds([ties]) == 2.0  # that of its sequence
    assert estimate.seconds([other]) == 3.0  # the median of 1, 2, 4, 9
    assert estimate.seconds([]) == 0.0


def test_names_of_cells() -> None:
    for of in (
        cell("rotated@3-2-1-0", "sfa", {"p": 0.25, "beta": 0.5, "lr": 0.001}, 3),
        cell("one", "plain", {"lr": 3e-05}, 1000, "tuning"),
        cell("one", "soup", {}, 0, "weights"),
    ):
        assert named(of.name) == of
    assert named("one/x/lr=1/seed-2") == cell("one", "x", {"lr": 1.0}, 2)
    for bad in ("one/x/seed-0", "one/x/lr/seed-0", "one/x/lr=much/seed-0", "one/x/lr=1/seed-", "one/x/lr=1/test-seed-0"):
        with pytest.raises(MergeError, match="is no cell: a name has the parts"):
            named(bad)


# ---- the command


@pytest.fixture
def command(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Return what runs the command in this process, and returns its exit code and what it said."""

    @contextmanager
    def at_once(jobs: int) -> Iterator[Executor]:
        yield AtOnce()

    monkeypatch.setattr(cli, "processes", at_once)
    monkeypatch.setattr(cli, "experiment", lambda: lab.experiment)

    def run(*options: str) -> tuple[int, str]:
        lab.ran.clear()
        result = CliRunner().invoke(cli.app, ["--out", str(lab.folder / "out"), *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


def test_command(lab: Lab, command: Any) -> None:
    code, said = command("--jobs", "1")
    assert code == 0, said
    assert lab.ran == [*ORDER, *(name.replace("one/", "two/") for name in ORDER)]
    assert "46 of 46 cells done, none left" in said
    assert said.endswith("reported: one\nreported: two\n")
    out = lab.folder / "out"
    assert list(out.rglob("*.safetensors")) == []
    result = json.loads((out / "results/one.json").read_text())
    assert result["costs"] == {"plain": {"step": 0.5}}
    assert {*result["machine"]} == {"python", "torch", "mergekit_cl", "processor", "cores"}
    assert command() == (0, "reported: one\nreported: two\n")
    assert lab.ran == []


def test_costs_need_all_learners(lab: Lab, command: Any) -> None:
    command("--sequence", "one", "--learner", "plain", "--keep-weights")
    assert lab.ran == ORDER[:4]
    result = json.loads((lab.folder / "out/results/one.json").read_text())
    assert ([*result["learners"]], result["costs"], result["grid"]) == (["plain"], {}, [])


def test_quick_has_a_folder_of_its_own(lab: Lab, command: Any) -> None:
    command("--quick", "--sequence", "one", "--keep-weights")
    assert [path.name for path in (lab.folder / "out").iterdir()] == ["quick"]
    assert len(list((lab.folder / "out/quick/weights").rglob("*.safetensors"))) == 4
    assert json.loads((lab.folder / "out/quick/results/one.json").read_text())["quick"] is True


def test_report_is_in_the_order_of_the_names(lab: Lab, command: Any) -> None:
    lab.experiment = replace(lab.experiment, names=("two", "one"))
    _, said = command("--learner", "plain")
    assert said.endswith("reported: two\nreported: one\n")


def test_a_learner_that_fails_ends_its_sequence_all_the_same(lab: Lab, command: Any) -> None:
    lab.bad = {ORDER[0], ORDER[8]}  # a trial, and models that trials need
    code, said = command("--sequence", "one")
    assert code == 1
    assert "one: not in the results, as cells are missing: plain, ties, plain-flax\n" in said
    assert [*json.loads((lab.folder / "out/results/one.json").read_text())["learners"]] == ["sfa", "joint"]


def test_order_of_tasks(lab: Lab, command: Any) -> None:
    code, said = command("--sequence", "one", "--order", "1-0", "--learner", "joint")
    assert (code, lab.ran) == (0, ["one@1-0/joint/lr=0.1,only=1/seed-0", "one@1-0/joint/lr=0.1,only=1/seed-1"])
    assert "one@1-0: not in the results, as cells are missing: plain, sfa, ties, plain-flax\n" in said
    assert command("--order", "1-0") == (1, "error: --order 1-0 is for one sequence: name it with --sequence\n")


def test_report_only(lab: Lab, command: Any) -> None:
    code, said = command("--report-only")
    assert (code, "nothing to report" in said) == (1, True)
    command("--sequence", "one")
    (lab.folder / "out/results/one.json").unlink()
    (lab.folder / "out/cells/one" / "joint/lr=0.1,only=1/seed-0.json").unlink()
    code, said = command("--report-only")
    assert (code, said) == (0, "one: not in the results, as cells are missing: joint\nreported: one\n")
    assert lab.ran == []


def test_cells_by_name(lab: Lab, command: Any) -> None:
    command("--sequence", "one", "--learner", "plain", "--learner", "ties")
    weights = lab.folder / "out/weights/one/per-task/lr=0.1/weights-seed-0.safetensors"
    code, said = command("--cell", "one/ties/*/seed-0")
    assert (code, lab.ran) == (0, ["one/per-task/lr=0.1/weights-seed-0", "one/ties/lr=0.1/seed-0"])
    assert not weights.exists()
    row = next(line for line in said.splitlines() if "one/ties" in line)
    assert row.replace("│", "").split()[:-1] == ["one/ties/lr=0.1/seed-0", "75.0", "25.0", "87.5"]
    code, said = command("--cell", "*/plain/*")
    assert lab.ran == [*ORDER[:4], *(name.replace("one/", "two/") for name in ORDER[:2])]
    assert "50.0 (validation)" in said
    assert command("--cell", "one/plain/lr=7/seed-5")[0] == 0  # in no plan
    assert lab.ran == ["one/plain/lr=7/seed-5"]


def test_models_that_are_there_outlive_single_cells(lab: Lab, command: Any) -> None:
    command("--sequence", "one", "--learner", "ties", "--keep-weights")
    command("--cell", "one/ties/*")
    assert "one/per-task/lr=0.1/weights-seed-0" not in lab.ran
    assert len(list(lab.folder.rglob("*.safetensors"))) == 4
    command("--report-only")
    assert len(list(lab.folder.rglob("*.safetensors"))) == 4
    command("--sequence", "one", "--learner", "ties")
    command("--cell", "one/per-task/lr=0.1/weights-seed-0")  # whoever asks for models gets them
    assert len(list(lab.folder.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequence", "onw"], 'unknown sequence "onw": did you mean "one"?'),
        (["--sequence", "onw", "--sequence", "tow"], 'unknown sequence "tow": did you mean "two"?'),
        (["--learner", "plian"], 'unknown learner "plian": did you mean "plain"?'),
        (["--cell", "one/plian/*"], "there are 10, such as\none/plain/lr="),
        (["--cell", "one/x/lr=1/seed-0"], 'unknown learner of cells "x": known: joint, plain, plain-flax, sfa, ties'),
        (["--cell", "one/plain/seed-0"], "--cell one/plain/seed-0: no cell matches"),
        (["--cell", "one/plain-flax/p=1/seed-0"], "plain-flax needs the values lr, and no others"),
        (["--cell", "*", "--report-only"], "exclude each other"),
    ],
)
def test_wrong_names(command: Any, lab: Lab, options: list[str], message: str) -> None:
    code, said = command(*options)
    assert (code, lab.ran) == (1, [])
    assert said.startswith("error: ")
    assert message in said


def test_all_missing_data_are_named_before_anything_runs(command: Any, lab: Lab) -> None:
    def load(name: str, quick: bool) -> Sequence:
        if name == "two":
            return sequence(name, quick)
        raise MergeError(f"{name}: its data are missing")

    lab.experiment = replace(lab.experiment, names=("one", "two", "three"), load=load)
    assert command() == (1, "error: one: its data are missing\nthree: its data are missing\n")
    assert lab.ran == []


def test_command_with_a_cell_that_fails(command: Any, lab: Lab) -> None:
    lab.bad = {ORDER[-1]}
    code, said = command("--sequence", "one")
    assert code == 1
    trace = lab.folder / f"out/cells/{ORDER[-1]}.error"
    assert f"failed: {ORDER[-1]}: ValueError: it is bad" in said
    assert "in carry_out" in trace.read_text()
    assert "error: failed: 1; the same command tries again" in said
    assert "reported: one" in said
    assert len(json.loads((lab.folder / "out/results/one.json").read_text())["grid"]) == 3
    assert len(list(lab.folder.rglob("*.safetensors"))) == 4  # for the next time
    lab.bad = set()
    assert command("--sequence", "one")[0] == 0
    assert lab.ran == ORDER[-1:]
    assert not trace.exists()
    assert list(lab.folder.rglob("*.safetensors")) == []


def test_one_run_at_a_time(command: Any, lab: Lab) -> None:
    (lab.folder / "out").mkdir()
    with FileLock(lab.folder / "out/.lock"):
        code, said = command("--sequence", "one")
    assert (code, lab.ran) == (1, [])
    assert "another run is at work here" in said


def test_in_processes_of_its_own(tmp_path: Path) -> None:
    """As users call it, with two processes."""
    options = ["--jobs", "2", "--sequence", "one", "--learner", "plain", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, __file__, *options], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("4 of 4 cells done, none left\nreported: one\n")
    assert sorted(path.stem for path in (tmp_path / "cells/one/plain").rglob("*.json")) == [
        "seed-0",
        "seed-1",
        "tuning-seed-1000",
        "tuning-seed-1000",
    ]


def test_interrupted(command: Any, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(of: Any, quick: bool, weights: Path) -> dict[str, Any]:
        if len(lab.ran) == 3:
            raise KeyboardInterrupt
        return lab.carry_out(of, quick, weights)

    whole = lab.experiment
    lab.experiment = replace(whole, carry_out=interrupt)
    code, said = command("--sequence", "one", "--jobs", "1")
    assert code == 130
    assert said.endswith("interrupted: what is done is kept, the same command goes on from there\n")
    lab.experiment = whole
    command("--sequence", "one", "--jobs", "1")
    assert lab.ran == ORDER[3:]


if __name__ == "__main__":  # the command with this experiment, in processes of its own
    cli.experiment = lambda: EXPERIMENT
    cli.main()
