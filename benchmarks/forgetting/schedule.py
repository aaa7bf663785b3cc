"""What is to be run, in which order, and what keeps all processes busy with it.

The cells of a sequence become known in steps: first the trials of each learner, then, with the values that scored best, its
final cells, and after those of SFA its heat map. A `Plan` knows which cells can run now; `carry_out_all` runs them.
"""

import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeAlias

from rich.console import RenderableType

from .cells import Cache, Entry
from .learners import Learner
from .protocol import Cell, Result, Settings, Values
from .protocol import Sequence as Tasks

TUNING_SEED = 1000
GRID_LEARNER = "sfa"

Family: TypeAlias = tuple[str, str, bool]
"""Cells that take about as long: sequence, learner, whether models for merges are trained."""


@dataclass(frozen=True)
class Experiment:
    """Where sequences, learners and cells come from, what carries out a cell, and what measures costs: see these modules.

    ``report`` writes the report into a folder, and returns what to show of it.
    """

    names: tuple[str, ...]
    load: Callable[[str, bool], Tasks]
    learners_for: Callable[[str], list[Learner]]
    trials: Callable[[Learner, Settings], list[Values]]
    cell_of: Callable[[str, Learner, Values, int, str], Cell]
    needs: Callable[[Cell], Cell | None]
    weights_of: Callable[[Cell, Path], Path]
    carry_out: Callable[[Cell, bool, Path], Result]
    measure: Callable[[str, bool, dict[str, Values]], dict[str, dict[str, float]]]
    report: Callable[[list[Result], Path], Iterable[RenderableType]]


@dataclass(frozen=True)
class Outcome:
    """What a process sends back: the result and the seconds that it took; or the error, and its traceback."""

    result: Any = None
    seconds: float = 0.0
    error: str = ""
    trace: str = ""


class Plan:
    """The cells of a sequence: which there are, which are done, and which can run now.

    Args:
        sequence: The tasks.
        experiment: Where learners and cells come from.
        cache: The cells that are done.
        weights: The folder of the models that merges start from.
        only: Names of the learners to run; None for all.
        cells: Run these cells, in place of those that the experiment consists of.

    Attributes:
        failed: Names of cells that raised an error.

    """

    def __init__(
        self,
        sequence: Tasks,
        experiment: Experiment,
        cache: Cache,
        weights: Path,
        only: Collection[str] | None = None,
        cells: Sequence[Cell] | None = None,
    ) -> None:
        self.sequence, self.settings = sequence, sequence.settings
        self.learners = {learner.name: learner for learner in experiment.learners_for(sequence.name)}
        self.running = [learner for name, learner in self.learners.items() if only is None or name in only]
        self.failed = set[str]()
        self._experiment, self._cache, self._weights, self._cells = experiment, cache, weights, cells
        self._entries: dict[str, Entry | None] = {}
        self._made: list[Cell] = []
        self._trials = {name: experiment.trials(each, self.settings) for name, each in self.learners.items()}

    def entry(self, cell: Cell) -> Entry | None:
        """Return what came out of a cell; None while it is not done. Trained models count if their file is there."""
        if cell.name not in self._entries:
            there = cell.purpose != "weights" or self._experiment.weights_of(cell, self._weights).exists()
            self._entries[cell.name] = self._cache.read(cell.name) if there else None
        return self._entries[cell.name]

    def finish(self, cell: Cell, outcome: Outcome) -> None:
        """Note what came out of a cell."""
        if outcome.error:
            self.failed.add(cell.name)
        else:
            self._entries[cell.name] = self._cache.write(cell.name, outcome.result, outcome.seconds)
            self._made.append(cell)

    def trials(self, learner: Learner) -> list[tuple[Values, Cell | None]]:
        """Return what a learner tries, each with the cell that scores it: none where there is nothing to choose from."""
        values = self._trials[learner.like or learner.name]
        tuned = self.learners[learner.like or learner.name]
        return [(each, self._cell(tuned, each, TUNING_SEED, "tuning") if len(values) > 1 else None) for each in values]

    def chosen(self, learner: Learner) -> Values | None:
        """Return the values with the best score, the first of these if there are several; None while a trial is missing."""
        trials = self.trials(learner)
        entries = [None if cell is None else self.entry(cell) for _, cell in trials]
        if len(trials) == 1:
            return trials[0][0]
        scores = [entry.result["score"] for entry in entries if entry is not None]
        return trials[scores.index(max(scores))][0] if len(scores) == len(trials) else None

    def finals(self, learner: Learner) -> list[Cell]:
        """Return the cells that are reported of a learner, a cell for each seed; none while its values are not chosen."""
        values = self.chosen(learner)
        return [] if values is None else [self._cell(learner, values, seed) for seed in range(self.settings.seeds)]

    def grid(self) -> list[tuple[float, float, Cell]]:
        """Return beta, p and cell of each square and seed of the heat map, if SFA has its values."""
        learner = self.learners.get(GRID_LEARNER)
        values = None if learner is None else self.chosen(learner)
        if learner is None or values is None:
            return []
        squares = [(beta, p) for beta in self.settings.betas for p in self.settings.ps]
        seeds = range(self.settings.grid_seeds)
        return [(b, p, self._cell(learner, {**values, "beta": b, "p": p}, seed)) for b, p in squares for seed in seeds]

    def cells(self) -> list[Cell]:
        """Return the cells that are known by now, in the order in which they should run, without those that they need."""
        if self._cells is not None:
            return list(self._cells)
        cells = [each for learner in self.running for each in [*self._tuning(learner), *self.finals(learner)]]
        if any(learner.name == GRID_LEARNER for learner in self.running):
            cells += [cell for _, _, cell in self.grid()]
        return list({cell.name: cell for cell in cells}.values())

    def needed(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that have to run before some others."""
        needs = (self._experiment.needs(cell) for cell in cells)
        return list({cell.name: cell for cell in needs if cell is not None}.values())

    def every(self) -> list[Cell]:
        """Return the cells that are known by now, those included that others need."""
        cells = self.cells()
        return [*cells, *self.needed(cells)]

    def ready(self, busy: Collection[str]) -> Cell | None:
        """Return the next cell that can run, while those of the names ``busy`` are running; None if there is none now."""
        for cell in self._missing():
            need = self._experiment.needs(cell)
            first = cell if need is None or self.entry(need) is not None else need
            if first.name not in busy and first.name not in self.failed:
                return first
        return None

    def left(self) -> list[Family]:
        """Return the family of each cell that is still to run, those included that have no name yet."""
        if self._cells is not None:
            later = []
        else:
            unknown = [
                each for each in self.running if self.chosen(each) is None and not any(map(self._lost, self._tuning(each)))
            ]
            later = [(learner.runs, self.settings.seeds) for learner in unknown]
            squares = len(self.settings.betas) * len(self.settings.ps) * self.settings.grid_seeds
            later += [(learner.runs, squares) for learner in unknown if learner.name == GRID_LEARNER]
        missing = self._missing()
        needed = [cell for cell in self.needed(missing) if self.entry(cell) is None]
        unnamed = [(self.sequence.name, runs, False) for runs, count in later for _ in range(count)]
        return [*map(family, needed), *map(family, missing), *unnamed]

    def done(self) -> list[tuple[Cell, Entry]]:
        """Return the cells that are done, with what came out."""
        cells = {cell.name: cell for cell in [*self.cells(), *self._made]}.values()
        return [(cell, entry) for cell in cells if (entry := self.entry(cell)) is not None]

    def drop_weights(self) -> None:
        """Delete the models that merges started from; in a run of single cells those alone that were made for it."""
        cells = self.cells()
        made = [cell for cell in self._made if cell.purpose == "weights" and cell not in cells]
        for cell in self.needed(cells) if self._cells is None else made:
            self._experiment.weights_of(cell, self._weights).unlink(missing_ok=True)

    def _cell(self, learner: Learner, values: Values, seed: int, purpose: str = "final") -> Cell:
        return self._experiment.cell_of(self.sequence.name, learner, values, seed, purpose)

    def _tuning(self, learner: Learner) -> list[Cell]:
        return [cell for _, cell in self.trials(learner) if cell is not None]

    def _missing(self) -> list[Cell]:
        """Return the cells that are still to run, without those that are lost."""
        return [cell for cell in self.cells() if self.entry(cell) is None and not self._lost(cell)]

    def _lost(self, cell: Cell) -> bool:
        """Return whether a cell, or what it needs, has failed."""
        return not self.failed.isdisjoint(each.name for each in [cell, *self.needed([cell])])


def carry_out_all(
    plans: Sequence[Plan],
    executor: Executor,
    jobs: int,
    work: Callable[[Cell], Any],
    finished: Callable[[Plan, Cell, Outcome], None],
) -> None:
    """Run the cells of all plans, those of the first plan first.

    Args:
        plans: What is to be run.
        executor: Where cells run.
        jobs: How many cells run at once.
        work: Carries out a cell, in the executor.
        finished: Is told of each cell after it has run.

    Raises:
        BrokenProcessPool: A process was killed.

    """
    busy: dict[Future[Outcome], tuple[Plan, Cell]] = {}
    while True:
        while len(busy) < jobs and (found := _next(plans, {cell.name for _, cell in busy.values()})):
            busy[executor.submit(guarded, work, found[1])] = found
        if not busy:
            return
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            plan, cell = busy.pop(future)
            plan.finish(cell, outcome := future.result())
            finished(plan, cell, outcome)


def guarded(work: Callable[..., Any], *given: object) -> Outcome:
    """Do something, and return what came out or the error; an error itself cannot always be sent from process to process."""
    start = perf_counter()
    try:
        result = work(*given)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    return Outcome(result, perf_counter() - start)


def family(cell: Cell) -> Family:
    """Return the family of a cell."""
    return cell.sequence, cell.learner, cell.purpose == "weights"


class Estimate:
    """How long cells take, by those that have run."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[object, ...], list[float]] = {}

    def add(self, of: Family, seconds: float) -> None:
        """Note the seconds of a cell."""
        for key in (of, of[:1], ()):
            self._seconds.setdefault(key, []).append(seconds)

    def seconds(self, left: Sequence[Family]) -> float | None:
        """Estimate the seconds of cells: the median of the family, or else of the sequence, or else of all; None without any.

        A median, as the first cells of a process also import libraries and load data.
        """
        if not self._seconds:
            return None
        known = (next(self._seconds[key] for key in (of, of[:1], ()) if key in self._seconds) for of in left)
        return sum(median(each) for each in known)


def result_file(plan: Plan, quick: bool, machine: Result, costs: dict[str, dict[str, float]]) -> Result | None:
    """Put together what is known of a sequence; a learner that lacks a seed is left out.

    Args:
        plan: The cells of the sequence.
        quick: Whether they are of its quick version.
        machine: What they ran on.
        costs: What `costs.measure` found; empty if it was not run.

    Returns:
        What the report is written from, ready for JSON; None if no learner is complete.

    """
    sequence = plan.sequence
    learners, dates = {}, []
    for learner in plan.learners.values():
        finals = [plan.entry(cell) for cell in plan.finals(learner)]
        complete = [entry for entry in finals if entry is not None]
        if complete and len(complete) == len(finals):
            learners[learner.name] = {
                "title": learner.title,
                "group": learner.group,
                "runs": learner.runs,
                "values": plan.chosen(learner),
                "trials": [{"values": values, "score": score} for values, score in _scores(plan, learner)],
                "finals": [entry.result for entry in complete],
            }
            dates += [entry.date for entry in complete]
    if not learners:
        return None
    squares = [(beta, p, cell, plan.entry(cell)) for beta, p, cell in plan.grid()]
    grid = [
        {"beta": beta, "p": p, "seed": cell.seed, "accuracy": entry.result["accuracy"]}
        for beta, p, cell, entry in squares
        if entry is not None
    ]
    dates += [entry.date for *_, entry in squares if entry is not None]
    values = plan.chosen(plan.learners[GRID_LEARNER]) if GRID_LEARNER in plan.learners else None
    about = {name: getattr(sequence, name) for name in ("name", "title", "about", "kind", "unit", "pretrained")}
    parameters = sum(each.numel() for each in sequence.network(0).parameters() if each.requires_grad)
    more = {"tasks": [task.name for task in sequence.tasks], "parameters": parameters, "settings": asdict(sequence.settings)}
    return {
        "sequence": {**about, **more},
        "quick": quick,
        "machine": machine,
        "date": max(dates),
        "learners": learners,
        "grid": grid,
        "grid_lr": None if values is None else values["lr"],
        "costs": costs,
    }


def _scores(plan: Plan, learner: Learner) -> Iterator[tuple[Values, float | None]]:
    for values, cell in plan.trials(learner):
        entry = None if cell is None else plan.entry(cell)
        yield values, None if entry is None else entry.result["score"]


def _next(plans: Sequence[Plan], busy: Collection[str]) -> tuple[Plan, Cell] | None:
    for plan in plans:
        cell = plan.ready(busy)
        if cell is not None:
            return plan, cell
    return None
