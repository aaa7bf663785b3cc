"""The command ``python benchmarks/forgetting``: runs what is not yet done, and writes the report.

Exit codes: 0 done, 1 an error that the message explains or cells that failed, 2 wrong usage, 130 interrupted.
"""

import json
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock, Timeout
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

import mergekit_cl
from mergekit_cl.continual.metrics import average_accuracy, forgetting, learning_accuracy
from mergekit_cl.errors import Faults, MergeError, unknown
from mergekit_cl.execute import processors

from .cells import Cache, Entry, fingerprint_of, named, write_whole
from .protocol import Cell, Result, Values
from .protocol import Sequence as Tasks
from .schedule import Estimate, Experiment, Family, Outcome, Plan, carry_out_all, family, guarded, result_file

LOG_SECONDS = 30.0
"""Between two lines about the progress where the output is no terminal."""

SHOW_SECONDS = 1.0
"""Between two times that the bars on a terminal change: it takes a while to go through all cells."""

LOG_WIDTH = 160

app = typer.Typer(add_completion=False)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # processes are ended in the same orderly way
    app(prog_name="python benchmarks/forgetting")


def experiment() -> Experiment:
    """Return the experiment; what is slow to import is imported here."""
    from . import costs, learners, pages, sequences, tables, training

    def report(results: list[Result], folder: Path) -> Iterator[RenderableType]:
        written = pages.write(results, folder)
        yield from map(tables.learners_for_terminal, results)
        yield tables.claims_for_terminal(results)
        yield Text(f"Written: {written.markdown} and {written.page.name}, with {len(written.pictures)} pictures")

    return Experiment(
        sequences.NAMES,
        sequences.load,
        learners.learners_for,
        learners.trials,
        learners.cell_of,
        learners.needs,
        training.weights_of,
        training.carry_out,
        costs.measure,
        report,
    )


def _flag(name: str, help: str) -> Any:  # noqa: A002
    """Make an option without a value; its help has no column for the type."""
    return typer.Option(name, help=help, metavar="", show_default=False)


@app.command(epilog="For example: python benchmarks/forgetting --quick --sequence rotated --learner sfa")
def run(
    quick: Annotated[bool, _flag("--quick", help="Too few steps to learn much, enough to see that all works.")] = False,
    sequence: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run this sequence; give it again for another; all by default.")
    ] = None,
    learner: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Run this learner, likewise. What a step costs is measured if all run."),
    ] = None,
    order: Annotated[
        str | None, typer.Option(metavar="ORDER", help="Learn the tasks of one sequence in this order, such as 3-2-1-0.")
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Run the cells of these names again, show what comes out, and do no more."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cells to run at once; one for each core by default.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for cells, results and the report.")] = Path(".forgetting"),
    report_only: Annotated[bool, _flag("--report-only", help="Run nothing: write the report from what is done.")] = False,
    keep_weights: Annotated[bool, _flag("--keep-weights", help="Keep the large files that merges start from.")] = False,
) -> None:
    """Compare SFA with other ways to learn tasks in turn, on data that come inside packages.

    What is done is kept in DIR/cells: a run that was interrupted goes on where it stopped.

    The report is in DIR/report, that of a quick run in DIR/quick/report.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        work = _Run(experiment(), console, out / "quick" if quick else out, quick, jobs or processors(), keep_weights)
        names = _ordered(sequence, order)
        if (learner is not None) + (cell is not None) + report_only > 1:
            raise MergeError("--learner, --cell and --report-only exclude each other: name one of them")
        if cell is not None:
            work.again(names, cell)
        elif report_only:
            work.report_only(names)
        else:
            work.all(names, learner)
    except ModuleNotFoundError as error:
        typer.echo(f'error: {error.name} is missing: pip install ".[forgetting]"', err=True)
        raise typer.Exit(1) from None
    except (MergeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except BrokenProcessPool:
        typer.echo(
            "error: a process was killed, perhaps as memory ran out; the same command goes on, --jobs 1 needs less", err=True
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: what is done is kept, the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if work.failed:
        typer.echo(f"error: failed: {len(work.failed)}; the same command tries again", err=True)
        raise typer.Exit(1)


def _ordered(names: list[str] | None, order: str | None) -> list[str] | None:
    """Return the names of sequences with the order that was asked for."""
    if order is None:
        return names
    if names is None or len(names) != 1:
        raise MergeError(f"--order {order} is for one sequence: name it with --sequence")
    return [f"{names[0]}@{order}"]


@dataclass
class _Run:
    """What the command does, with its folders."""

    experiment: Experiment
    console: Console
    out: Path
    quick: bool
    jobs: int
    keep_weights: bool
    failed: list[str] = field(default_factory=list)

    def all(self, names: Sequence[str] | None, learners: Sequence[str] | None) -> None:
        """Run what is not yet done, and write the report."""
        sequences = self._load(names or self.experiment.names)
        known = {each.name for sequence in sequences for each in self.experiment.learners_for(sequence.name)}
        for name in learners or ():
            if name not in known:
                raise unknown("learner", name, known)
        plans = [self._plan(sequence, only=learners) for sequence in sequences]
        with self._alone():
            self._carry_out(plans, self._conclude)
            if learners is None:
                self._measure(plans)
            self._report()

    def again(self, names: Sequence[str] | None, glob: str) -> None:
        """Run the cells again whose names match, and show what comes out."""
        first, slash, _ = glob.partition("/")
        literal = bool(slash) and not set(first) & set("*?[")
        sequences = self._load([first] if literal else names or self.experiment.names)
        with self._alone():
            known = [cell for sequence in sequences for cell in self._plan(sequence).every()]
            wanted = [cell for cell in known if fnmatchcase(cell.name, glob)] or [self._named(glob, sequences, known)]
            plans = []
            for sequence in sequences:
                cells = [cell for cell in wanted if cell.sequence == sequence.name]
                for cell in cells:
                    self._cache(sequence).drop(cell.name)
                plans.append(self._plan(sequence, cells=cells))
            self._carry_out(plans, lambda plan: None if self.keep_weights else plan.drop_weights())
        table = Table("cell", *(_right(each) for each in ("average accuracy", "forgetting", "learning accuracy", "seconds")))
        for plan in plans:
            for cell in plan.cells():
                table.add_row(cell.name, *_numbers(plan.entry(cell)))
        self.console.print(table)
        self.console.print("The report is as it was: --report-only writes it anew.")

    def report_only(self, names: Sequence[str] | None) -> None:
        """Write the report from what is done."""
        folder = self.out / "cells"
        begun = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
        with self._alone():
            for sequence in self._load(names or [name for name in begun if name.partition("@")[0] in self.experiment.names]):
                self._conclude(self._plan(sequence), complete=False)
            self._report()

    def _named(self, name: str, sequences: Sequence[Tasks], known: Sequence[Cell]) -> Cell:
        """Return the cell of a complete name, of the one sequence; if it is none, say which are near."""
        try:
            cell = named(name)
        except MergeError as error:
            names = [each.name for each in known]
            near = get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
            later = "cells with the chosen values come to be known when all trials of a learner are done"
            message = "\n".join([f"--cell {name}: no cell matches ({later}); there are {len(names)}, such as", *near])
            raise MergeError(message) from error
        plan = self._plan(sequences[0])
        needed = {each.runs: sorted(plan.trials(each)[0][0]) for each in plan.learners.values()}
        if cell.purpose != "weights":
            if cell.learner not in needed:
                raise unknown("learner of cells", cell.learner, needed)
            if [key for key, _ in cell.values] != needed[cell.learner]:
                raise MergeError(
                    f"--cell {name}: {cell.learner} needs the values {', '.join(needed[cell.learner])}, and no others"
                )
        return cell

    def _load(self, names: Sequence[str]) -> list[Tasks]:
        """Load sequences; name all data that are missing in one error."""
        faults, sequences = Faults(), []
        for name in dict.fromkeys(names):
            with faults:
                sequences.append(self.experiment.load(name, self.quick))
        faults.report()
        return sequences

    def _cache(self, sequence: Tasks) -> Cache:
        return Cache(self.out / "cells", fingerprint_of(sequence, self.quick))

    def _costs(self, plan: Plan) -> Cache:
        return Cache(self.out / "cells", {**fingerprint_of(plan.sequence, self.quick), "chosen": _chosen(plan)})

    def _plan(self, sequence: Tasks, **more: Any) -> Plan:
        return Plan(sequence, self.experiment, self._cache(sequence), self.out / "weights", **more)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other runs out of the folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.out / ".lock", timeout=0):
                yield
        except Timeout:
            raise MergeError(
                f"{self.out}: another run is at work here; wait for it, or choose another folder with --out"
            ) from None

    def _carry_out(self, plans: Sequence[Plan], conclude: Callable[[Plan], None]) -> None:
        """Run the cells of all plans, and conclude each plan as soon as nothing of it is left."""

        def finished(plan: Plan, cell: Cell, outcome: Outcome) -> None:
            screen.finished(cell, outcome)
            if outcome.error:
                self._fail(cell.name, outcome)
            else:
                self._traceback(cell.name).unlink(missing_ok=True)
            if not plan.left():
                conclude(plan)

        begun = [plan for plan in plans if plan.left()]
        for plan in plans:
            if plan not in begun:
                conclude(plan)
        if begun:
            work = partial(_work, self.experiment.carry_out, self.quick, self.out / "weights")
            with _Screen(self.console, begun, self.jobs) as screen, processes(self.jobs) as executor:
                carry_out_all(begun, executor, self.jobs, work, finished)

    def _fail(self, name: str, outcome: Outcome) -> None:
        """Say what went wrong; the traceback is in a file."""
        self.failed.append(name)
        write_whole(self._traceback(name), outcome.trace.encode())
        self.console.print(f"failed: {name}: {outcome.error}\n        traceback: {self._traceback(name)}", markup=False)

    def _traceback(self, name: str) -> Path:
        return self.out / "cells" / f"{name}.error"

    def _conclude(self, plan: Plan, complete: bool = True) -> None:
        """Write the result file of a sequence, and delete models that are no longer needed."""
        everything, name = self._plan(plan.sequence), plan.sequence.name
        costs = self._costs(plan).read(f"{name}/costs")
        result = result_file(everything, self.quick, _machine(), {} if costs is None else costs.result)
        if result is not None:
            write_whole(self._results(name), json.dumps(result).encode())
        missing = [learner for learner in everything.learners if result is None or learner not in result["learners"]]
        if missing:
            self.console.print(f"{name}: not in the results, as cells are missing: {', '.join(missing)}", markup=False)
        if complete and not plan.failed and not self.keep_weights:
            plan.drop_weights()

    def _measure(self, plans: Sequence[Plan]) -> None:
        """Measure what learners cost, one sequence after the other, while nothing else runs."""
        missing = []
        for plan in plans:
            cache, name = self._costs(plan), f"{plan.sequence.name}/costs"
            if cache.read(name) is None:
                missing.append((plan, cache, name))
        if not missing:
            return
        with processes(1) as executor:
            for plan, cache, name in missing:
                self.console.print(f"{plan.sequence.name}: measuring what a step of each learner costs, alone")
                outcome = executor.submit(
                    guarded, self.experiment.measure, plan.sequence.name, self.quick, _chosen(plan)
                ).result()
                if outcome.error:
                    self._fail(name, outcome)
                else:
                    cache.write(name, outcome.result, outcome.seconds)
                    self._conclude(plan, complete=False)

    def _results(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"

    def _report(self) -> None:
        """Write the report from all result files, and show its table."""
        names = [path.stem for path in sorted((self.out / "results").glob("*.json"))]
        known = self.experiment.names
        names.sort(key=lambda name: known.index(base) if (base := name.partition("@")[0]) in known else len(known))
        if not names:
            raise MergeError(f"{self.out}: nothing to report, as no learner is complete for any sequence")
        results = [json.loads(self._results(name).read_text()) for name in names]
        for each in self.experiment.report(results, self.out / "report"):
            self.console.print(each)


class _Screen:
    """Shows how far the cells are: bars on a terminal, else a line now and then."""

    def __init__(self, console: Console, plans: Sequence[Plan], jobs: int) -> None:
        self._console, self._plans, self._jobs = console, plans, jobs
        self._shown = self._said = monotonic()
        self._estimate = Estimate()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        names = [*(plan.sequence.name for plan in plans), "all"]
        self._bars = [self._progress.add_task(name, total=None, left="") for name in names]
        for plan in plans:
            for cell, entry in plan.done():
                self._estimate.add(family(cell), entry.seconds)

    def __enter__(self) -> "_Screen":
        self._progress.start()
        self._show()
        self._log()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._progress.stop()
        self._log()

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        """Show that a cell has run."""
        if not outcome.error:
            self._estimate.add(family(cell), outcome.seconds)
        if monotonic() - self._shown >= SHOW_SECONDS:
            self._show()
        if monotonic() - self._said >= LOG_SECONDS:
            self._log()

    def _show(self) -> None:
        self._shown = monotonic()
        done = [len(plan.done()) for plan in self._plans]
        left = [plan.left() for plan in self._plans]
        done, left = [*done, sum(done)], [*left, [each for of_plan in left for each in of_plan]]
        for bar, count, families in zip(self._bars, done, left, strict=True):
            self._progress.update(bar, completed=count, total=count + len(families), left=self._time(families))

    def _log(self) -> None:
        if self._console.is_terminal:
            return
        self._said = monotonic()
        done, left = sum(len(plan.done()) for plan in self._plans), [each for plan in self._plans for each in plan.left()]
        now = next((plan.sequence.name for plan in self._plans if plan.left()), "all")
        self._console.print(f"{datetime.now():%H:%M:%S} {now}: {done} of {done + len(left)} cells done, {self._time(left)}")

    def _time(self, left: Sequence[Family]) -> str:
        """Say how long cells will take."""
        if not left:
            return "none left"
        seconds = self._estimate.seconds(left)
        if seconds is None:
            return "time left: unknown"
        minutes = round(seconds / self._jobs / 60)
        if minutes < 1:
            return "less than a minute left"
        return f"about {minutes} min left" if minutes < 60 else f"about {minutes // 60} h {minutes % 60:02} min left"


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """Start processes, of one thread each; end them at once if the block is left with an error."""
    os.environ["OMP_NUM_THREADS"] = "1"  # they inherit it
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, context, initializer=_begin)
    try:
        yield executor
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _chosen(plan: Plan) -> dict[str, Values]:
    """Return the values of each learner that has been tuned."""
    chosen = {name: plan.chosen(learner) for name, learner in plan.learners.items()}
    return {name: values for name, values in chosen.items() if values is not None}


def _work(carry_out: Callable[[Cell, bool, Path], Any], quick: bool, weights: Path, cell: Cell) -> Any:
    return carry_out(cell, quick, weights)


def _machine() -> dict[str, Any]:
    """Describe this machine and its software."""
    cpus = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        if cpus.exists()
        else []
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mergekit_cl": mergekit_cl.__version__,
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": processors(),
    }


def _numbers(entry: Entry | None) -> list[str]:
    """Return what the table shows of a cell; of one for tuning its score on the validation parts."""
    if entry is None:
        return ["failed", "", "", ""]
    result, seconds = entry.result, f"{entry.seconds:.1f}"
    if "accuracy" not in result:
        score = f"{100 * result['score']:.1f} (validation)" if "score" in result else ""
        return [score, "", "", seconds]
    values = (metric(result["accuracy"]) for metric in (average_accuracy, forgetting, learning_accuracy))
    return [*("" if value != value else f"{100 * value:.1f}" for value in values), seconds]


def _right(title: str) -> Column:
    return Column(title, justify="right")
