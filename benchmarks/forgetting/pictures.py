"""The numbers as pictures, for the screen and for paper: colours that differ for everyone, and shapes that differ in grey."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from .claims import CLAIMS, MARGIN, SUBJECT, decide
from .protocol import Result
from .statistics import (
    AVERAGE,
    FORGETTING,
    LEARNING,
    Interval,
    best,
    difference,
    held,
    mean_interval,
    mean_matrix,
    parameter_bytes,
    step_ratio,
    summary,
)

Vector: TypeAlias = NDArray[np.float64]

WIDTH, DPI = 7.0, 150  # inches: what fits on a page, so that letters are printed as large as they are here
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": DPI}
GREY = "0.45"


@dataclass(frozen=True)
class Look:
    """How the learners of a group are drawn; the colours are those of Okabe and Ito."""

    colour: str
    marker: str
    line: str = "-"


LOOKS = {
    "fine-tuning": Look("#000000", "s", ":"),
    "SFA": Look("#D55E00", "D"),
    "merging": Look("#0072B2", "o"),
    "penalty": Look("#009E73", "^"),
    "rehearsal": Look("#CC79A7", "v", "--"),
    "bound": Look("#56B4E9", "P"),
}
RIVALS = ("sequential", *(rival for claim in reversed(CLAIMS) for rival in claim.rivals))


def draw(result: Result) -> dict[str, Figure]:
    """Draw the pictures of a sequence that there are numbers for, by the names in `CAPTIONS`."""
    makers: dict[str, Callable[[Result], Figure | None]] = {
        "matrices": _matrices,
        "curves": _curves,
        "costs": _costs,
        "beta-p": _grid,
        "front": _front,
    }
    with rc_context(STYLE):
        figures = {name: make(result) for name, make in makers.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


CAPTIONS = {
    "matrices": "Accuracy on each task (columns) after training on each task (rows), in %, the mean over seeds; above, the "
    "average of the last row. Of merging, penalties and rehearsal the one with the best average.",
    "curves": "Accuracy on each task while all of them are learned, with the first seed; of rehearsal the buffer with the best "
    "average. Triangles: SFA has just merged. Grey: the task is being trained.",
    "costs": "Average accuracy against what a learner keeps beside model and optimizer, and against the time of a step. "
    "Up and to the left is better.",
    "beta-p": "Average accuracy of SFA for each beta and p. Beta is the share of the weights from before the task in a merge, "
    "p the share of a task's steps between two merges.",
    "front": "Accuracy on tasks just learned against how much is forgotten later. Up and to the left is better; the line joins "
    "the learners that no other one beats in both.",
}


def overview(results: Sequence[Result]) -> Figure | None:
    """Draw SFA less each rival, on all sequences, with intervals; None if there is nothing to compare."""
    titles = {name: learner["title"] for result in results for name, learner in result["learners"].items()}
    rivals = [rival for rival in RIVALS if any(difference(result, SUBJECT, rival) for result in results)]
    if not rivals:
        return None
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + (0.5 + 0.2 * len(rivals)) * rows), layout="constrained")
        panels = [*figure.subplots(rows, columns, squeeze=False, sharey=True).flat]
        for panel, result in zip(panels, results, strict=False):
            _forest(panel, result, rivals)
        for panel in panels[len(results) :]:
            panel.remove()
        panels[0].set_yticks(range(len(rivals)), [titles[rival] for rival in rivals])
        panels[0].set_ylim(len(rivals) - 0.4, -0.6)
        figure.supxlabel("SFA (p = 0.25) less the other learner: points of average accuracy, 95 % intervals", size=9)
    return figure


def _forest(panel: Any, result: Result, rivals: Sequence[str]) -> None:
    panel.set_title(textwrap.fill(result["sequence"]["title"], 40), loc="left")
    panel.axvline(0, color="black", linewidth=0.8)
    panel.axvspan(-MARGIN, 0, color="0.9", linewidth=0)
    for y, rival in enumerate(rivals):
        if (apart := difference(result, SUBJECT, rival)) is not None:
            look = LOOKS[result["learners"][rival]["group"]]
            face = "white" if decide(apart) == "undecided" else look.colour
            shape = {"marker": look.marker, "color": look.colour, "markerfacecolor": face, "markersize": 5, "capsize": 2}
            panel.errorbar(apart.mean, y, xerr=_bars(apart), linestyle="none", elinewidth=1, **shape)


def _matrices(result: Result) -> Figure | None:
    learners = result["learners"]
    chosen = ["sequential", "sfa", "sfa-end", *(best(result, group) for group in ("merging", "penalty", "rehearsal"))]
    names = [name for name in chosen if name is not None and name in learners]
    if not names:
        return None
    tasks = result["sequence"]["tasks"]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, name in zip(panels.flat, names, strict=False):
        matrix = mean_matrix(result, name)
        panel.imshow(matrix, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                ink = "white" if value > 65 else "black"
                panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
        panel.set_title(f"{learners[name]['title']}\n{matrix[-1].mean():.1f}")
        panel.set_xticks(range(len(tasks)), [f"{number}" for number in range(1, len(tasks) + 1)])
        panel.set_yticks(range(len(tasks)), [f"{task}  {number}" for number, task in enumerate(tasks, 1)])
    for panel in panels.flat[len(names) :]:
        panel.remove()
    figure.supxlabel("tested on task", size=9)
    figure.supylabel("after training on (from top to bottom)", size=9)
    return figure


def _curves(result: Result) -> Figure | None:
    learners = result["learners"]
    candidates = [name for name in ("sequential", "sfa", best(result, "rehearsal")) if name in learners]
    curves = {name: learners[name]["finals"][0]["curve"] for name in candidates}
    curves = {name: curve for name, curve in curves.items() if curve is not None}
    if not curves:
        return None
    tasks = result["sequence"]["tasks"]
    figure = Figure(figsize=(WIDTH, 0.8 + 1.25 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    any_curve = next(iter(curves.values()))
    bounds = [*any_curve["starts"], any_curve["steps"][-1]]
    for j, panel in enumerate(panels):
        panel.axvspan(bounds[j], bounds[j + 1], color="0.9", linewidth=0)
        for bound in bounds[1:-1]:
            panel.axvline(bound, color=GREY, linewidth=0.6)
        for name, curve in curves.items():
            look = LOOKS[learners[name]["group"]]
            steps, accuracy = np.array(curve["steps"]), 100 * np.array(curve["accuracy"])[:, j]
            panel.plot(steps, accuracy, look.line, color=look.colour, linewidth=1.4, label=learners[name]["title"])
            merges = np.array(curve["merges"], float)
            panel.plot(merges, np.interp(merges, steps, accuracy), "^", color=look.colour, markersize=5)
        panel.set_title(tasks[j], loc="left", pad=2)
        panel.set_ylim(-4, 104)
        panel.set_yticks((0, 50, 100))
    panels[0].set_xlim(bounds[0], bounds[-1])
    panels[-1].set_xlabel("training steps, all tasks in turn")
    figure.supylabel("accuracy (%)", size=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, handlelength=3)
    return figure


def _costs(result: Result) -> Figure | None:
    size = parameter_bytes(result)
    accuracy = {name: summary(result, name, AVERAGE) for name in _shown(result, *LOOKS)}
    memory = {name: _exactly(held(result, name) / size) for name in accuracy}
    ratios = {name: step_ratio(result, name) for name in accuracy}
    time = {name: _exactly(ratio) for name, ratio in ratios.items() if ratio is not None}
    axes = [("extra memory, in multiples of the trained parameters at 4 bytes", memory)]
    axes += [("time of a step, in multiples of sequential fine-tuning's", time)] if time else []
    if not accuracy:
        return None
    figure = Figure(figsize=(WIDTH, 4.2 * len(axes)), layout="constrained")
    panels = figure.subplots(len(axes), 1, squeeze=False)[:, 0]
    for panel, (label, across) in zip(panels, axes, strict=True):
        panel.set_xlabel(label)
        panel.set_ylabel("average accuracy (%)")
        if across is memory:
            panel.set_xscale("symlog", linthresh=1, linscale=0.8)
            most = max(each.mean for each in memory.values())
            ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= max(1.0, 1.3 * most)]
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xlim(-0.06, 1.3 * max(1.0, most))
            panel.minorticks_off()
    for panel, (_, across) in zip(panels, axes, strict=True):
        _points(figure, panel, result, {name: (x, accuracy[name]) for name, x in across.items()})
    return figure


def _grid(result: Result) -> Figure | None:
    if not result["grid"]:
        return None
    betas, ps = (sorted({cell[name] for cell in result["grid"]}) for name in ("beta", "p"))
    figure = Figure(figsize=(1.9 + 0.95 * len(ps), 1.4 + 0.62 * len(betas)), layout="constrained")
    panel = figure.subplots()
    values: dict[tuple[float, float], list[float]] = {}
    for cell in result["grid"]:
        values.setdefault((cell["beta"], cell["p"]), []).append(AVERAGE.of(cell))
    intervals = {where: mean_interval(numbers) for where, numbers in values.items()}
    means = np.full((len(betas), len(ps)), np.nan)
    for (beta, p), interval in intervals.items():
        means[betas.index(beta), ps.index(p)] = interval.mean
    shade = Normalize(np.nanmin(means), np.nanmax(means))
    panel.imshow(means, norm=shade, cmap="Blues", aspect="auto", origin="lower")
    for (beta, p), interval in intervals.items():
        half = f"\n± {interval.half:.1f}" if len(values[beta, p]) > 2 else ""  # two seeds say next to nothing of others
        ink = "white" if shade(interval.mean) > 0.6 else "black"
        panel.text(ps.index(p), betas.index(beta), f"{interval.mean:.1f}{half}", ha="center", va="center", color=ink)
    panel.set_xticks(range(len(ps)), [f"{p:g}" for p in ps])
    panel.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    panel.set_xlabel("p")
    panel.set_ylabel("beta")
    seeds = max(map(len, values.values()))
    of_seeds = "of one seed" if seeds == 1 else f"of {seeds} seeds"
    title = f"SFA, learning rate {result['grid_lr']:g}: average accuracy (%) {of_seeds}"
    if "sequential" in result["learners"]:
        plain = mean_interval(map(AVERAGE.of, result["learners"]["sequential"]["finals"][:seeds])).mean
        title += f"\nsequential fine-tuning, likewise: {plain:.1f}"
    panel.set_title(title, loc="left")
    return figure


def _front(result: Result) -> Figure | None:
    points = {name: (summary(result, name, FORGETTING), summary(result, name, LEARNING)) for name in _shown(result, *LOOKS)}
    points = {name: (x, y) for name, (x, y) in points.items() if not np.isnan(x.mean + y.mean)}
    if not points:
        return None
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.set_xlabel("forgetting (points)")
    panel.set_ylabel("learning accuracy (%)")
    front, highest = list[tuple[float, float]](), -np.inf
    for x, y in sorted((x.mean, -y.mean) for x, y in points.values()):
        if -y > highest:
            front, highest = [*front, (x, -y)], -y
    panel.plot(*np.array(front).T, color=GREY, linewidth=3, alpha=0.5, zorder=1, drawstyle="steps-post")
    _points(figure, panel, result, points)
    return figure


def _points(figure: Figure, panel: Any, result: Result, points: dict[str, tuple[Interval, Interval]]) -> None:
    """Draw learners as points with intervals, and write their titles in a column beside, each with a line to its point."""
    for name, (x, y) in points.items():
        look = LOOKS[result["learners"][name]["group"]]
        shape = {"marker": look.marker, "color": look.colour, "markersize": 8, "markeredgecolor": "white"}
        panel.errorbar(x.mean, y.mean, xerr=_bars(x), yerr=_bars(y), elinewidth=0.8, ecolor=look.colour, zorder=3, **shape)
    low, high = panel.get_ylim()
    low, high = max(low, -2), min(high, 102)  # with two seeds an interval may be longer
    panel.set_ylim(low, high)
    figure.draw_without_rendering()  # now the panel has its size
    names = sorted(points, key=lambda name: points[name][1].mean)
    gap = 1.3 * 9 / (72 * panel.get_window_extent().height / figure.dpi)
    heights = _spread(np.array([(points[name][1].mean - low) / (high - low) for name in names]), gap)
    for name, height in zip(names, heights, strict=True):
        x, y = points[name]
        learner = result["learners"][name]
        colour = LOOKS[learner["group"]].colour
        line = {
            "arrowstyle": "-",
            "color": colour,
            "alpha": 0.5,
            "linewidth": 0.6,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 3,
        }
        where = {"xy": (x.mean, y.mean), "xytext": (1.03, height), "textcoords": "axes fraction", "arrowprops": line}
        ink = 0.7 * np.array(to_rgb(colour))  # letters are thin: darker than points
        panel.annotate(learner["title"], color=ink, va="center", annotation_clip=False, zorder=2, **where)


def _spread(heights: Vector, gap: float) -> Vector:
    """Move heights, in ascending order, no further than it takes to be a gap apart, and between 0 and 1."""
    shifts = gap * np.arange(len(heights))
    moved: Vector = isotonic_regression(heights - shifts).x
    return np.clip(moved, 0, max(0.0, 1 - shifts[-1])) + shifts


def _shown(result: Result, *groups: str) -> list[str]:
    return [name for name, learner in result["learners"].items() if learner["group"] in groups]


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)


def _bars(interval: Interval) -> Vector | None:
    """Return how far an interval reaches to either side [side, point]; None if it has no ends, or no width."""
    if np.isinf(interval.half) or interval.half == 0:
        return None
    return np.array([[interval.mean - interval.low], [interval.high - interval.mean]])
