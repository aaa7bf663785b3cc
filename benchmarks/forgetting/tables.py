"""The numbers as tables: in Markdown for the report, smaller ones for the terminal."""

import math
from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .claims import CHECK, CLAIMS, Claim, Finding, Verdict, judge_all, overall
from .protocol import Result, Values
from .statistics import (
    AVERAGE,
    FORGETTING,
    LEARNING,
    Interval,
    Metric,
    difference,
    held,
    metrics_of,
    parameter_bytes,
    step_ratio,
    summary,
)

GROUPS = ("fine-tuning", "SFA", "merging", "penalty", "rehearsal", "bound")
ABSENT = "-"
MARKS: dict[Verdict, str] = {"held": "✓", "not held": "✗", "undecided": "?"}


def learners_table(result: Result) -> str:
    """Make the table of a sequence: a row for each learner, in groups; what is best of a column in bold, bounds apart."""
    metrics = metrics_of(result)
    best = {metric.title: _best(result, metric) for metric in metrics}
    rows = []
    for group in GROUPS:
        members = [name for name, learner in result["learners"].items() if learner["group"] == group]
        rows += [[f"*{group}*"]] if members else []
        for name in members:
            learner = result["learners"][name]
            cells = []
            for metric in metrics:
                interval = summary(result, name, metric)
                text = _interval(interval, places=metric.places)
                cells.append(f"**{text}**" if interval.mean == best[metric.title] else text)
            cost = [_memory(result, name), _ratio(step_ratio(result, name)), _values(learner["values"])]
            rows.append([learner["title"], *cells, *cost])
    headings = [f"{metric.title} ({metric.unit})" if metric.unit != "bits" else metric.title for metric in metrics]
    return markdown(["learner", *headings, "extra memory", "time per step", "chosen"], rows, left=(0, -1))


def overview_table(results: Sequence[Result]) -> str:
    """Make the table of average accuracies: a row per learner, a column per sequence; the best of a column in bold."""
    best = [_best(result, AVERAGE) for result in results]
    titles = {name: x["title"] for result in results for name, x in result["learners"].items() if x["group"] != "flax"}
    rows = []
    for name, title in titles.items():
        cells = []
        for result, highest in zip(results, best, strict=True):
            interval = summary(result, name, AVERAGE) if name in result["learners"] else None
            text = ABSENT if interval is None else _interval(interval)
            cells.append(f"**{text}**" if interval is not None and interval.mean == highest else text)
        rows.append([title, *cells])
    return markdown(["average accuracy (%)", *(result["sequence"]["title"] for result in results)], rows)


def flax_table(result: Result) -> str:
    """Make the table of the learners that ran in Flax as well; empty if there are none."""
    rows = []
    for name, learner in result["learners"].items():
        twin = name.removesuffix("-flax")
        if learner["group"] != "flax" or twin not in result["learners"]:
            continue
        for metric in (AVERAGE, FORGETTING, LEARNING):
            both = [_interval(summary(result, each, metric)) for each in (twin, name)]
            apart = difference(result, name, twin, metric)
            assert apart is not None
            rows.append([result["learners"][twin]["title"], metric.title, *both, _interval(apart, sign="+")])
    return markdown(["learner", "metric", "PyTorch", "Flax", "Flax less PyTorch"], rows, left=(0, 1)) if rows else ""


def claims_table(results: Sequence[Result]) -> str:
    """Make the table of all claims: what comes out over all sequences, and on which."""
    rows = []
    for claim in (*CLAIMS, CHECK):
        findings = judge_all(claim, results)
        where = [_where(claim, findings, verdict) for verdict in MARKS]
        rows.append([claim.title, f"**{overall(findings)}**", *where])
    return markdown(["claim", "overall", *(f"{verdict} on" for verdict in MARKS)], rows, left=range(5))


def claim_table(claim: Claim, results: Sequence[Result]) -> str:
    """Make the table of a claim: a row for each sequence, a column for each rival; empty if nothing was measured."""
    findings = judge_all(claim, results)
    present = {each.rival for finding in findings for each in finding.comparisons}
    rivals = [rival for rival in (*claim.rivals, *claim.beside) if rival in present]
    headings = [_titled(rival, results) if rival in claim.rivals else f"*{_titled(rival, results)}*" for rival in rivals]
    rows = []
    for finding in findings:
        cells = {each.rival: f"{MARKS[each.verdict]} {_interval(each.difference, '+')}" for each in finding.comparisons}
        row = [cells.get(rival, ABSENT) for rival in rivals]
        rows.append([finding.result["sequence"]["title"], *row, f"**{finding.verdict}**"])
    return markdown(["sequence", *headings, "verdict"], rows, left=(0, -1)) if rows else ""


def sequences_table(results: Sequence[Result]) -> str:
    """Make the table of what was trained on each sequence, and how much was tried."""
    rows = []
    for result in results:
        sequence, settings = result["sequence"], result["sequence"]["settings"]
        numbers = [f"{sequence['parameters']:,}", f"{len(sequence['tasks'])}", f"{settings['steps']}", f"{settings['batch']}"]
        scored = "all" if settings["evaluated"] is None else f"{settings['evaluated']}"
        tried = sorted({len(learner["trials"]) for learner in result["learners"].values() if learner["trials"]})
        rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
        if settings["more_rates"]:
            rates += f" (with nothing else to choose also {', '.join(f'{rate:g}' for rate in settings['more_rates'])})"
        trials = " or ".join(map(str, tried)) or ABSENT
        rows.append([sequence["title"], *numbers, scored, rates, trials, f"{settings['seeds']}"])
    headings = [
        "parameters trained",
        "tasks",
        "steps for each",
        "batch",
        "examples of a test or validation part that are scored",
    ]
    headings += ["learning rates", "trials of a learner", "seeds"]
    return markdown(["sequence", *headings], rows)


def learners_for_terminal(result: Result) -> Table:
    """Make the table of a sequence for a terminal."""
    metrics = (AVERAGE, FORGETTING, LEARNING)
    table = Table(
        title=result["sequence"]["title"], title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("learner")
    for heading in ("average\naccuracy", "forgetting\n", "learning\naccuracy", "extra\nmemory", "time per\nstep"):
        table.add_column(heading, justify="right", no_wrap=True)
    group = None
    for name, learner in result["learners"].items():
        if group not in (None, learner["group"]):
            table.add_section()
        group = learner["group"]
        cells = [_interval(summary(result, name, metric)) for metric in metrics]
        table.add_row(learner["title"], *cells, _memory(result, name, multiples=False), _ratio(step_ratio(result, name)))
    return table


def claims_for_terminal(results: Sequence[Result]) -> Table:
    """Make the table of all claims for a terminal."""
    table = Table("claim", "overall", "held on", title="What the paper claims", title_justify="left", show_lines=True)
    for claim in (*CLAIMS, CHECK):
        findings = judge_all(claim, results)
        on = sum(finding.verdict == "held" for finding in findings)
        table.add_row(claim.title, overall(findings), f"{on} of {len(findings)}")
    return table


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """Write a Markdown table, with numbers to the right, and the columns ``left`` to the left; short rows are filled up."""
    rule = ["---:"] * len(headings)
    for column in left:
        rule[column] = "---"
    filled = [[*row, *[""] * (len(headings) - len(row))] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [headings, rule, *filled])


def _best(result: Result, metric: Metric) -> float:
    """Return the best mean of a metric among those that are no bound, and no twin in Flax."""
    names = [name for name, learner in result["learners"].items() if learner["group"] not in ("bound", "flax")]
    choose: Callable[..., float] = max if metric.more_is_better else min
    means = (summary(result, name, metric).mean for name in names)
    return choose((mean for mean in means if not math.isnan(mean)), default=math.nan)


def _where(claim: Claim, findings: Iterable[Finding], verdict: Verdict) -> str:
    """Name the sequences with a verdict, and of several rivals those that it is due to; it is held against all of them."""
    names = []
    for finding in findings:
        if finding.verdict == verdict:
            rivals = finding.against(claim, verdict) if verdict != "held" and len(claim.rivals) > 1 else []
            against = " and ".join(_titled(rival, [finding.result]) for rival in rivals)
            names.append(finding.result["sequence"]["title"] + (f" (against {against})" if against else ""))
    return "; ".join(names) or ABSENT


def _titled(learner: str, results: Iterable[Result]) -> str:
    return next(str(each["learners"][learner]["title"]) for each in results if learner in each["learners"])


def _interval(interval: Interval, sign: str = "", places: int = 1) -> str:
    if math.isnan(interval.mean):
        return ABSENT
    mean = f"{interval.mean:{sign}z.{places}f}"
    return mean if math.isinf(interval.half) else f"{mean} ± {interval.half:.{places}f}"


def _memory(result: Result, learner: str, multiples: bool = True) -> str:
    size = held(result, learner)
    if size == 0:
        return "0"
    return f"{size / 1e6:.2f} MB" + (f" ({size / parameter_bytes(result):.2f} x)" if multiples else "")


def _ratio(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{ratio:.2f} x"


def _values(values: Values) -> str:
    return ", ".join(f"{name.rstrip('_')} {value:g}" for name, value in values.items())
