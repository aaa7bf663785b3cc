"""What the demo found, as tables, a sentence and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from mergekit_cl.continual.metrics import average_accuracy, backward_transfer, learning_accuracy

if TYPE_CHECKING:
    import torch

ROTATIONS = ("0°", "90°", "180°", "270°")
RUNS = PLAIN, AVERAGED = "fine-tuning", "SFA"
METRICS = (average_accuracy, backward_transfer, learning_accuracy)

Matrix = NDArray[np.float64]
Weights = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Merged:
    """What one method made of the checkpoints: weights and accuracy [task]; or none, and the reason why."""

    inputs: str
    weights: Weights = field(default_factory=dict)
    accuracy: Matrix | None = None
    problem: str = ""


@dataclass(frozen=True)
class DemoResults:
    """All numbers of the demo, as fractions.

    ``accuracy`` has a matrix for each run: accuracy[run][i, j] on the test digits of task j after training on task i.
    ``merged`` has every registered method. ``files`` are the files that were written.
    """

    seed: int
    accuracy: dict[str, Matrix]
    merged: dict[str, Merged]
    files: tuple[Path, ...]


def runs_table(results: DemoResults) -> Table:
    """Make the table of both runs: accuracy on each task after the last one, and what sums it up, in percent."""
    headings = [metric.__name__.replace("_", "\n") for metric in METRICS]
    table = _table("Accuracy after the last task, in %", "run", *ROTATIONS, *headings)
    table.caption = (
        "Backward transfer: the change of earlier tasks since learned, in points.\n"
        "Learning accuracy: the average over tasks, each just after it was learned."
    )
    for run, matrix in results.accuracy.items():
        table.add_row(run, *_percent([*matrix[-1], *(metric(matrix) for metric in METRICS)]))
    return table


def merges_table(results: DemoResults) -> Table:
    """Make the table of all methods: accuracy of the merged checkpoints on each task, in percent."""
    table = _table(f"The checkpoints of {PLAIN} merged: accuracy in %", "method", "merged", *ROTATIONS, "average")
    for name, result in results.merged.items():
        if result.accuracy is None:
            table.add_row(name, escape(result.problem))
        else:
            table.add_row(name, result.inputs, *_percent([*result.accuracy, result.accuracy.mean()]))
    table.caption = "start: the weights before the first task, which are the base."
    table.add_section()
    for note, run in (("the last", PLAIN), ("while training", AVERAGED)):
        last = results.accuracy[run][-1]
        table.add_row(f"({run})", note, *_percent([*last, last.mean()]))
    return table


def summary(results: DemoResults) -> str:
    """Say in one sentence what the numbers say."""
    plain, sfa = results.accuracy[PLAIN], results.accuracy[AVERAGED]
    *parts, last = [f"{metric.__name__.replace('_', ' ')} {_compare(metric(sfa), metric(plain))}" for metric in METRICS]
    text = f"In this run (seed {results.seed}), compared with {PLAIN} alone, SFA has an {', a '.join(parts)}, and a {last}"
    averages = {name: result.accuracy.mean() for name, result in results.merged.items() if result.accuracy is not None}
    if averages:
        best = max(averages, key=averages.__getitem__)
        against = _compare(averages[best], average_accuracy(sfa))
        text += f"; compared with SFA, the best merge of the saved checkpoints, {best}, has an average accuracy {against}"
    return f"{text}."


def _compare(new: float, old: float) -> str:
    """Put two fractions into words: ``12.0 points higher (60.0 instead of 48.0)``."""
    new, old = round(100 * new, 1), round(100 * old, 1)
    if new == old:
        return f"as high ({new:.1f})"
    return f"{abs(new - old):.1f} points {'higher' if new > old else 'lower'} ({new:.1f} instead of {old:.1f})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "method", "merged") else "right")
    return table


def _percent(fractions: Sequence[float]) -> list[str]:
    return [f"{100 * fraction:.1f}" for fraction in fractions]


def draw(accuracy: Mapping[str, Matrix], file: Path) -> None:
    """Draw the accuracy matrices side by side, in one hue: readable in print and without colour vision."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, len(accuracy), sharey=True)
    for panel, (run, matrix) in zip(panels, accuracy.items(), strict=True):
        image = panel.imshow(100 * matrix, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(matrix):
            ink = "white" if value > 0.7 else "black"
            panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", size=13, color=ink)
        panel.set_xticks(range(len(ROTATIONS)), ROTATIONS)
        panel.set_yticks(range(len(ROTATIONS)), ROTATIONS)
        panel.set_xlabel("tested on digits turned by")
        panel.set_title(f"{run}\naverage of the last row: {100 * average_accuracy(matrix):.1f} %")
    panels[0].set_ylabel("after training on digits turned by\n(from top to bottom)")
    figure.colorbar(image, ax=panels, label="accuracy on test digits (%)", shrink=0.8)
    figure.savefig(file, dpi=150)
