"""The report: intervals, verdicts, tables and pictures, for results that are made up."""

import base64
import io
import math
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("torch")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from forgetting import claims, pages, pictures, tables
from forgetting.protocol import Settings
from forgetting.statistics import BITS, Interval, difference, mean_interval, metrics_of, step_ratio, summary

Result = dict[str, Any]

# learner: title, group, accuracy when learned, share kept for each task learned since, numbers kept for each parameter, time
LEARNERS: dict[str, tuple[str, str, float, float, float, float]] = {
    "sequential": ("sequential fine-tuning", "fine-tuning", 0.95, 0.6, 0.0, 1.0),
    "sfa": ("SFA, p = 0.25", "SFA", 0.9, 0.85, 1.0, 1.02),
    "sfa-end": ("SFA, p = 1", "SFA", 0.93, 0.75, 1.0, 1.01),
    "wise_ft": ("WiSE-FT", "merging", 0.92, 0.74, 1.0, 1.01),
    "soup": ("model soup", "merging", 0.6, 0.8, 4.0, 1.01),
    "task_arithmetic": ("Task Arithmetic", "merging", 0.7, 0.82, 4.0, 1.02),
    "ties": ("TIES", "merging", 0.71, 0.83, 4.0, 1.1),
    "dare_ties": ("DARE-TIES", "merging", 0.7, 0.83, 4.0, 1.12),
    "magmax": ("MagMax", "merging", 0.72, 0.83, 4.0, 1.05),
    "opcm": ("OPCM", "merging", 0.65, 0.85, 4.0, 1.3),
    "l2": ("L2", "penalty", 0.88, 0.8, 1.0, 1.1),
    "ewc": ("EWC", "penalty", 0.87, 0.82, 6.0, 1.4),
    "ewc-online": ("EWC, online", "penalty", 0.87, 0.81, 2.0, 1.2),
    "lwf": ("LwF", "penalty", 0.9, 0.7, 1.0, 1.35),
    "rehearsal-1": ("rehearsal, 1 % kept", "rehearsal", 0.94, 0.8, 0.3, 1.2),
    "rehearsal-5": ("rehearsal, 5 % kept", "rehearsal", 0.94, 0.9, 1.4, 1.2),
    "rehearsal-20": ("rehearsal, 20 % kept", "rehearsal", 0.94, 0.96, 5.5, 1.2),
    "joint": ("all tasks at once", "bound", 0.96, 1.0, 0.0, 1.0),
    "sequential-flax": ("sequential fine-tuning, in Flax", "flax", 0.95, 0.6, 0.0, 1.0),
    "sfa-flax": ("SFA, p = 0.25, in Flax", "flax", 0.9, 0.85, 1.0, 1.02),
}


def made_up(name: str = "rotated", tasks: int = 4, seeds: int = 5, kind: str = "domain", title: str = "") -> Result:
    """Make a result file up: earlier tasks are forgotten by a factor for each task since, with noise for each seed."""
    random = np.random.default_rng([tasks, *name.encode()])
    settings = asdict(Settings(300, 64, (1e-3, 3e-4, 3e-3), 6, seeds=seeds))
    common = random.normal(0, 0.01, seeds)  # what a seed is for all learners
    rows, columns = np.indices((tasks, tasks))

    def final(learner: str, seed: int) -> Result:
        _, group, learned, kept, numbers, _ = LEARNERS[learner]
        accuracy = np.where(rows >= columns, learned * np.clip(kept + random.normal(0, 0.02), 0, 1) ** (rows - columns), 0.15)
        accuracy = np.clip(accuracy + common[seed] + random.normal(0, 0.01, (tasks, tasks)), 0, 1)
        steps = np.arange(0, 300 * tasks + 1, 25)
        place = steps[:, None] / 300 - np.arange(tasks)
        curve = np.where(place < 0, 0.1, learned * np.where(place < 1, 1 - 0.8 * np.exp(-8 * place), kept ** (place - 1)))
        merges = [300 * task + 75 * k for task in range(1, tasks) for k in (1, 2, 3, 4)] if learner.startswith("sfa") else []
        shown = {"steps": steps.tolist(), "accuracy": curve.tolist(), "merges": merges}
        return {
            "accuracy": [[None] * tasks] * (tasks - 1) + [[learned] * tasks] if group == "bound" else accuracy.tolist(),
            "loss": (2 * (1 - accuracy)).tolist(),
            "start": [0.1] * tasks,
            "curve": {**shown, "starts": [300 * task for task in range(tasks)]} if seed == 0 and group != "bound" else None,
            "seconds": 4.0,
            "steps": 300 * tasks,
            "held": int(4 * 269_322 * numbers),
        }

    learners = {}
    for learner, (label, group, *_) in LEARNERS.items():
        values = {"beta": 0.5, "lr": 0.001, "p": 0.25} if "sfa" in learner else {"lr": 0.001}
        trials = [{"values": values, "score": 0.5}] * 6
        finals = [final(learner, seed) for seed in range(seeds)]
        learners[learner] = {
            "title": label,
            "group": group,
            "runs": learner,
            "values": values,
            "trials": trials,
            "finals": finals,
        }
    grid = [
        {"beta": beta, "p": p, "seed": seed, "accuracy": (np.eye(tasks) * beta + 0.1 * p + random.normal(0, 0.01)).tolist()}
        for beta in settings["betas"]
        for p in settings["ps"]
        for seed in range(settings["grid_seeds"])
    ]
    sequence = {
        "name": name,
        "title": title or name.capitalize(),
        "about": "5,000 digits that are made up.",
        "kind": kind,
        "unit": "accuracy",
        "tasks": [f"{90 * task}°" for task in range(tasks)],
        "pretrained": False,
        "parameters": 269_322,
        "settings": settings,
    }
    return {
        "sequence": sequence,
        "quick": False,
        "machine": {"python": "3.11.9", "torch": "2.13.0", "mergekit_cl": "0.1.0", "processor": "made up", "cores": 2},
        "date": "2026-01-31T12:00:00+00:00",
        "learners": learners,
        "grid": grid,
        "grid_lr": 0.001,
        "costs": {learner: {"step": 0.002 * values[-1]} for learner, values in LEARNERS.items() if values[1] != "bound"},
    }


def by_hand(**averages: list[float]) -> Result:
    """Make a result file of two tasks: both were learned to 0.75, and have this accuracy at the end, seed by seed."""
    result = made_up(seeds=1)
    result["grid"], result["costs"] = [], {"sequential": {"step": 0.002}, "sfa": {"step": 0.0025}}
    result["sequence"] |= {"tasks": ["one", "two"], "parameters": 1_000_000}
    learners = {name.replace("_", "-") if "rehearsal" in name or name == "sfa_end" else name: a for name, a in averages.items()}
    common = {
        "start": [0.25, 0.25],
        "curve": None,
        "seconds": 1.0,
        "steps": 2,
        "loss": [[9.0, 9.0], [math.log(2), math.log(8)]],
    }
    result["learners"] = {
        name: {
            "title": LEARNERS[name][0],
            "group": LEARNERS[name][1],
            "runs": name,
            "values": {"beta": 0.5, "lr": 1e-3},
            "trials": [{"values": {"beta": 0.5, "lr": 1e-3}, "score": 0.5}],
            "finals": [{**common, "accuracy": [[0.75, 0.5], [a, a]], "held": 6_000_000} for a in accuracies],
        }
        for name, accuracies in learners.items()
    }
    return result


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """Return a full result, and one of two seeds in which parts are missing."""
    lean = made_up("characters", 3, seeds=2, kind="language", title="Plays, law, code")
    lean["quick"], lean["grid"], lean["costs"] = True, [], {}
    lean["learners"] = {name: lean["learners"][name] for name in ("sequential", "sfa", "l2", "joint")}
    for learner in lean["learners"].values():
        learner["finals"][0]["curve"] = None
    return [made_up(), lean]


@pytest.fixture(scope="module")
def figures(results: list[Result]) -> dict[str, Any]:
    return {**pictures.draw(results[0]), "overview": pictures.overview(results)}


@pytest.fixture(scope="module")
def written(results: list[Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    pages.write(results, folder)
    return folder


def test_interval_by_hand() -> None:
    """s of 1 to 5 is sqrt(2.5), t with 4 degrees of freedom 2.776 at 95 % and 2.132 at 90 %."""
    found = mean_interval([1, 2, 3, 4, 5])
    assert (found.mean, found.half) == (3, pytest.approx(1.963, abs=5e-4))
    assert (found.low, found.high) == (pytest.approx(1.037, abs=5e-4), pytest.approx(4.963, abs=5e-4))
    assert mean_interval([1, 2, 3, 4, 5], level=0.9).half == pytest.approx(1.507, abs=5e-4)


def test_one_value_says_nothing_of_others() -> None:
    assert mean_interval([3.0]) == Interval(3.0, -math.inf, math.inf)
    assert claims.decide(mean_interval([3.0])) == "undecided"


def test_differences_are_paired_by_seed() -> None:
    """10, 5 and 10 points: mean 8.33, s = 2.887, t = 4.303, half width 7.17; the two means alone would give more."""
    result = by_hand(sfa=[0.5, 0.6, 0.7], l2=[0.4, 0.55, 0.6])
    found = difference(result, "sfa", "l2")
    assert (found.mean, found.half) == (pytest.approx(25 / 3), pytest.approx(7.171, abs=5e-4))


def test_differences_are_of_the_seeds_that_both_have() -> None:
    found = difference(by_hand(sfa=[0.5, 0.6, 0.1], l2=[0.4, 0.5]), "sfa", "l2")
    assert (found.mean, found.half) == (pytest.approx(10), pytest.approx(0, abs=1e-9))
    assert difference(by_hand(sfa=[0.5]), "sfa", "l2") is None


def test_only_text_has_bits_per_character() -> None:
    """The losses of the last row are ln 2 and ln 8: 1 and 3 bits."""
    result = by_hand(sfa=[0.5, 0.5])
    assert BITS not in metrics_of(result)
    result["sequence"]["kind"] = "language"
    assert BITS in metrics_of(result)
    assert summary(result, "sfa", BITS).mean == pytest.approx(2)


def test_time_is_in_steps_of_sequential_fine_tuning() -> None:
    assert step_ratio(by_hand(), "sfa") == 1.25
    assert step_ratio(by_hand(), "l2") is None


@pytest.mark.parametrize(
    ("low", "high", "better", "comparable"),
    [
        (0.1, 5, "held", "held"),
        (0, 5, "undecided", "held"),
        (-1.9, -0.1, "not held", "held"),
        (-2, 0, "undecided", "undecided"),
        (-5, -2, "not held", "undecided"),
        (-5, -2.1, "not held", "not held"),
    ],
)
def test_verdicts_at_their_boundaries(low: float, high: float, better: str, comparable: str) -> None:
    interval = Interval((low + high) / 2, low, high)
    assert claims.decide(interval) == better
    assert claims.decide(interval, claims.MARGIN) == comparable


SFA = [0.5, 0.51, 0.52]
AHEAD, BEHIND, LEVEL = [0.4, 0.41, 0.42], [0.6, 0.61, 0.62], [0.4, 0.51, 0.62]  # SFA is; LEVEL: by 10, 0 and -10 points
REHEARSAL, MERGING, PENALTIES, END = claims.CLAIMS


@pytest.mark.parametrize(
    ("claim", "rivals", "verdict"),
    [
        (PENALTIES, {"l2": AHEAD, "ewc": AHEAD}, "held"),
        (PENALTIES, {"l2": AHEAD, "ewc": LEVEL}, "undecided"),
        (PENALTIES, {"l2": BEHIND, "ewc": LEVEL}, "not held"),
        (PENALTIES, {"l2": AHEAD}, "undecided"),  # EWC was not measured
        (PENALTIES, {"l2": AHEAD, "ewc": AHEAD, "lwf": BEHIND}, "held"),  # the paper does not name LwF
        (MERGING, {"ties": AHEAD, "wise_ft": AHEAD, "task_arithmetic": BEHIND}, "not held"),
        (MERGING, {"ties": AHEAD, "wise_ft": AHEAD, "task_arithmetic": AHEAD, "magmax": BEHIND}, "held"),
        (REHEARSAL, {"rehearsal_1": AHEAD, "rehearsal_5": AHEAD, "rehearsal_20": BEHIND}, "not held"),
        (REHEARSAL, {f"rehearsal_{size}": [0.51, 0.52, 0.53] for size in (1, 5, 20)}, "held"),  # behind by 1 point
        (END, {"sfa_end": AHEAD}, "held"),
        (END, {"sfa_end": [0.51, 0.52, 0.53]}, "not held"),
        (claims.CHECK, {"sequential": AHEAD}, "held"),
    ],
)
def test_claims_hold_against_all_rivals(claim: claims.Claim, rivals: dict[str, list[float]], verdict: str) -> None:
    finding = claims.judge(claim, by_hand(sfa=SFA, **rivals))
    assert finding.verdict == verdict
    assert len(finding.comparisons) == len(rivals)


def test_claims_are_not_judged_where_they_say_nothing() -> None:
    assert claims.judge(PENALTIES, by_hand(sfa=SFA, ties=AHEAD)) is None
    assert claims.judge(PENALTIES, by_hand(l2=AHEAD, ewc=AHEAD)) is None
    result = by_hand(sfa=SFA, sequential=AHEAD)
    result["sequence"]["kind"] = "class"
    assert claims.judge(claims.CHECK, result) is None


def test_overall() -> None:
    held, failed = by_hand(sfa=[0.6, 0.6], sfa_end=[0.5, 0.5]), by_hand(sfa=[0.4, 0.4], sfa_end=[0.5, 0.5])
    open_ = by_hand(sfa=[0.4, 0.6], sfa_end=[0.5, 0.5])
    for results, said in (
        ([held, held], "held"),
        ([failed], "not held"),
        ([held, failed], "mixed"),
        ([held, open_, failed], "mixed"),
        ([open_], "undecided"),
        ([open_, held], "held where decided"),
        ([failed, open_, open_], "not held where decided"),
        ([], "not measured"),
    ):
        assert claims.overall(claims.judge_all(END, results)) == said


def test_table_of_learners() -> None:
    """Of SFA: 50 % at the end; forgetting 75 - 50, forward transfer 50 - 25, learning (75 + 50) / 2; 6 MB are 1.5 x 4 MB."""
    table = tables.learners_table(by_hand(sequential=[0.25, 0.25], sfa=[0.5, 0.5], joint=[0.75, 0.75])).splitlines()
    assert table[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    assert table[2] == "| *fine-tuning* |  |  |  |  |  |  |  |  |"
    assert table[5] == (
        "| SFA, p = 0.25 | **50.0 ± 0.0** | **25.0 ± 0.0** | **-25.0 ± 0.0** | **25.0 ± 0.0** | **62.5 ± 0.0** "
        "| 6.00 MB (1.50 x) | 1.25 x | beta 0.5, lr 0.001 |"
    )
    assert table[3].startswith(
        "| sequential fine-tuning | 25.0 ± 0.0 | 50.0 ± 0.0 | -50.0 ± 0.0 | **25.0 ± 0.0** | 50.0 ± 0.0 |"
    )
    assert table[7].startswith("| all tasks at once | 75.0 ± 0.0 |")  # a bound is not the best
    assert table[7].endswith(" | - | beta 0.5, lr 0.001 |")  # its steps were not timed


def test_what_was_not_measured_is_no_number() -> None:
    table = tables.learners_table(made_up()).splitlines()
    assert table[-1].startswith("| all tasks at once | 96.0 ± 0.0 | - | - | - | - | 0 |")
    one_seed = tables.learners_table(by_hand(sfa=[0.5])).splitlines()
    assert one_seed[3].startswith("| SFA, p = 0.25 | **50.0** |")


def test_overview_has_a_column_for_each_sequence() -> None:
    one = by_hand(sequential=[0.25, 0.25], sfa=[0.5, 0.5], joint=[0.75, 0.75])
    two = by_hand(sequential=[0.5, 0.5], l2=[0.25, 0.25])
    two["sequence"]["title"] = "Another"
    assert tables.overview_table([one, two]).splitlines() == [
        f"| average accuracy (%) | {one['sequence']['title']} | Another |",
        "| --- | ---: | ---: |",
        "| sequential fine-tuning | 25.0 ± 0.0 | **50.0 ± 0.0** |",
        "| SFA, p = 0.25 | **50.0 ± 0.0** | - |",
        "| all tasks at once | 75.0 ± 0.0 | - |",
        "| L2 | - | 25.0 ± 0.0 |",
    ]


def test_table_of_claims_names_who_it_is_due_to() -> None:
    one, two = by_hand(sfa=SFA, l2=BEHIND, ewc=BEHIND, lwf=BEHIND), by_hand(sfa=SFA, l2=AHEAD, ewc=AHEAD)
    one["sequence"]["title"], two["sequence"]["title"] = "One", "Two"
    row = next(line for line in tables.claims_table([one, two]).splitlines() if "penalties" in line)
    assert row == f"| {PENALTIES.title} | **mixed** | Two | One (against L2 and EWC) | - |"
    table = tables.claim_table(PENALTIES, [one, two]).splitlines()
    assert table[0] == "| sequence | L2 | EWC | *LwF* | verdict |"
    assert table[2:] == [
        "| One | ✗ -10.0 ± 0.0 | ✗ -10.0 ± 0.0 | ✗ -10.0 ± 0.0 | **not held** |",
        "| Two | ✓ +10.0 ± 0.0 | ✓ +10.0 ± 0.0 | - | **held** |",
    ]
    assert tables.claim_table(MERGING, [one, two]) == ""


def test_table_of_flax() -> None:
    result = by_hand(sfa=[0.5, 0.5])
    assert tables.flax_table(result) == ""
    result["learners"]["sfa-flax"] = by_hand(sfa=[0.25, 0.25])["learners"]["sfa"] | {"group": "flax"}
    assert tables.flax_table(result).splitlines()[2:] == [
        "| SFA, p = 0.25 | average accuracy | 50.0 ± 0.0 | 25.0 ± 0.0 | -25.0 ± 0.0 |",
        "| SFA, p = 0.25 | forgetting | 25.0 ± 0.0 | 50.0 ± 0.0 | +25.0 ± 0.0 |",
        "| SFA, p = 0.25 | learning accuracy | 62.5 ± 0.0 | 50.0 ± 0.0 | -12.5 ± 0.0 |",
    ]
    assert "Flax" not in tables.learners_table(result)


@pytest.mark.parametrize("width", [80, 100])
def test_tables_for_the_terminal_lose_nothing(results: list[Result], width: int) -> None:
    """In 80 columns two titles take a second line; no number is broken or left out."""
    output = io.StringIO()
    console = Console(file=output, width=width)
    for table in (*map(tables.learners_for_terminal, results), tables.claims_for_terminal(results)):
        console.print(table)
    assert "…" not in output.getvalue()
    assert re.search(r"SFA, p = 0.25 .* 1.08 MB .* 1.02 x", output.getvalue())
    if width == 100:
        assert not [title for title, *_ in LEARNERS.values() if title not in output.getvalue()]


def test_labels_keep_apart_and_near() -> None:
    """Three around 0.5 go as far down as up; what is apart stays; above 1 there is no room."""
    assert pictures._spread(np.array([0.5, 0.5, 0.5]), 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert pictures._spread(np.array([0.1, 0.5, 0.52]), 0.1) == pytest.approx([0.1, 0.46, 0.56])
    assert pictures._spread(np.array([0.97, 1.0]), 0.1) == pytest.approx([0.9, 1.0])


def test_letters_are_large_enough_to_print(figures: dict[str, Any]) -> None:
    from matplotlib.text import Text

    for figure in figures.values():
        assert figure.get_figwidth() <= 7  # inches: no wider than a page, which would make them smaller
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8


def test_labels_of_points_lie_apart_and_inside(figures: dict[str, Any]) -> None:
    from matplotlib.text import Text

    for name, count in (("costs", 18 + 17), ("front", 17)):  # of all tasks at once neither time nor forgetting is known
        figures[name].draw_without_rendering()
        columns = [[Text.get_window_extent(label) for label in panel.texts] for panel in figures[name].axes]
        assert sum(map(len, columns)) == count
        for places in columns:
            assert max(place.x1 for place in places) <= figures[name].bbox.x1
            for lower, upper in pairwise(sorted(places, key=lambda place: float(place.y0))):
                assert lower.y1 <= upper.y0


def test_merges_and_tasks_are_in_the_picture_of_curves(results: list[Result], figures: dict[str, Any]) -> None:
    panels = figures["curves"].axes
    assert [panel.get_title("left") for panel in panels] == ["0°", "90°", "180°", "270°"]
    marked = [line for line in panels[0].lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in marked] == [results[0]["learners"]["sfa"]["finals"][0]["curve"]["merges"]]


def test_heat_map_has_means_of_seeds_and_sequential_beside() -> None:
    result = by_hand(sequential=[0.25, 0.25, 0.25, 0.75], sfa=[0.5, 0.5])  # the fourth seed is not in the map
    result["grid"] = [
        {"beta": beta, "p": p, "seed": seed, "accuracy": [[0.9, 0.9], [accuracy, accuracy]]}
        for beta, p, seed, accuracy in [
            *((0.5, 1.0, seed, 0.5) for seed in range(3)),
            (0.25, 0.5, 0, 0.75),
            (0.25, 0.5, 1, 0.25),
        ]
    ]
    panel = pictures.draw(result)["beta-p"].axes[0]
    assert {text.get_position(): text.get_text() for text in panel.texts} == {(1, 1): "50.0\n± 0.0", (0, 0): "50.0"}
    assert "learning rate 0.001: average accuracy (%) of 3 seeds" in panel.get_title("left")
    assert panel.get_title("left").endswith("sequential fine-tuning, likewise: 25.0")


def test_pictures_that_nothing_is_known_of_are_not_drawn(results: list[Result], figures: dict[str, Any]) -> None:
    assert list(figures) == [*pictures.CAPTIONS, "overview"]
    assert list(pictures.draw(results[1])) == ["matrices", "costs", "front"]
    assert pictures.overview([by_hand(l2=[0.5])]) is None


def test_report_has_every_sequence_learner_and_picture(results: list[Result], written: Path) -> None:
    text, page = ((written / name).read_text() for name in ("report.md", "report.html"))
    for result in results:
        assert f"## {result['sequence']['title']}\n" in text
        assert f'id="{pages._anchor(result["sequence"]["title"])}"' in page
        for name, learner in result["learners"].items():
            title = LEARNERS[name.removesuffix("-flax")][0] if learner["group"] == "flax" else learner["title"]
            assert f"| {title} |" in text
            assert f">{title}</td>" in page
    shown = re.findall(r"]\((pictures/[^)]*)\)", text)
    assert sorted(shown) == sorted(f"pictures/{file.name}" for file in (written / "pictures").iterdir())
    assert len(shown) == 1 + 5 + 3
    assert {file.name for file in written.iterdir()} == {"report.md", "report.html", "pictures"}


def test_links_lead_to_headings(written: Path) -> None:
    page = (written / "report.html").read_text()
    links = re.findall(r'href="#([^"]*)"', page)
    assert links == ["rotated", "plays-law-code", "how-it-was-done"]
    assert set(links) <= set(re.findall(r'id="([^"]*)"', page))


def test_page_is_one_file(written: Path) -> None:
    page = (written / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [
        (written / name).read_bytes() for name in re.findall(r"]\((pictures/[^)]*)\)", (written / "report.md").read_text())
    ]


def test_quick_runs_say_so_loudly(written: Path) -> None:
    text = (written / "report.md").read_text()
    first, full, quick = text.index(pages.QUICK), text.index("## Rotated"), text.index("## Plays")
    assert first < text.index("## The paper's claims")
    assert text[full:quick].count(pages.QUICK) == 0
    assert text[quick:].count(pages.QUICK) == 1
    assert "QUICK" not in tables.learners_table(made_up())


def test_report_says_where_and_how_much(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "- Rotated: made up, 2 cores; Python 3.11.9, PyTorch 2.13.0, mergekit_cl 0.1.0; 2026-01-31.\n" in text
    assert "| Rotated | 269,322 | 4 | 300 | 64 | all | 0.001, 0.0003, 0.003 | 6 | 5 |\n" in text


def test_same_results_give_the_same_files(results: list[Result], written: Path, tmp_path: Path) -> None:
    report = pages.write(results[1:], tmp_path)
    one, other = (re.findall("## Plays.*## How", file.read_text(), re.S) for file in (report.markdown, written / "report.md"))
    assert len(one) == 1
    assert one == other
    kept = [file for file in report.pictures if file.name.startswith("characters")]
    assert [file.read_bytes() for file in kept] == [(written / "pictures" / file.name).read_bytes() for file in kept]
