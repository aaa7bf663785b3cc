"""The results that are kept in the repository: complete, and what the report beside them says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forgetting import pages, tables
from forgetting.cells import fingerprint_of
from forgetting.claims import CLAIMS
from forgetting.learners import LEARNERS, learners_for, trials
from forgetting.sequences import NAMES, load

FOLDER = Path(__file__).parents[2] / "benchmarks/forgetting/results"
RESULTS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
ORDERED = sorted(RESULTS, key=lambda name: NAMES.index(name.partition("@")[0]))  # as the command writes them


def test_every_sequence_is_there_with_every_learner() -> None:
    """Of sequences in another order there are the learners that the paper's claims name."""
    assert set(NAMES) <= set(RESULTS)
    named = {"sequential", "sfa", *(rival for claim in CLAIMS for rival in claim.rivals)}
    for name, result in RESULTS.items():
        whole = name in NAMES
        assert [x.name for x in learners_for(name) if whole or x.name in result["learners"]] == list(result["learners"])
        assert named & {learner.name for learner in learners_for(name)} <= set(result["learners"])
        seeds = result["sequence"]["settings"]["seeds"]
        assert seeds >= 5
        assert not result["quick"]
        for learner, found in result["learners"].items():
            assert len(found["finals"]) == seeds, (name, learner)
            like = LEARNERS[learner].like or learner
            best = max(found["trials"], key=lambda trial: trial["score"])
            assert found["values"] == best["values"] == result["learners"][like]["values"]
        assert result["grid"]
        if whole:
            assert {*result["costs"]} == {x for x in result["learners"] if LEARNERS[x].group not in ("bound", "flax")}


@pytest.mark.parametrize("name", RESULTS)
def test_it_is_what_would_be_run_today(name: str) -> None:
    result, sequence = RESULTS[name], load(name)
    settings = json.loads(json.dumps(result["sequence"]["settings"]))
    assert fingerprint_of(sequence, False)["settings"].items() <= {**settings}.items()
    assert [task.name for task in sequence.tasks] == result["sequence"]["tasks"]
    for learner, found in result["learners"].items():
        assert [trial["values"] for trial in found["trials"]] == trials(
            LEARNERS[LEARNERS[learner].like or learner], sequence.settings
        )


def test_the_report_is_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drawing the pictures again."""

    def picture(name: str, figure: Any, caption: str, pictures: Any) -> str:
        assert (FOLDER / f"pictures/{name}.png").exists()
        return f"![{name}](pictures/{name}.png)\n\n*{caption}*\n\n"

    monkeypatch.setattr(pages, "_picture", picture)
    monkeypatch.setattr(pages, "_page", lambda text, pictures: "")
    pages.write([RESULTS[name] for name in ORDERED], tmp_path)
    again = "python benchmarks/forgetting --report-only, then copy results and report"
    assert (tmp_path / "report.md").read_text() == (FOLDER / "report.md").read_text(), again


def test_the_readme_has_the_table_of_the_results() -> None:
    readme = (FOLDER.parents[2] / "README.md").read_text()
    (shown,) = re.findall(r"<!-- forgetting -->\n(.*?)<!-- /forgetting -->", readme, flags=re.DOTALL)
    assert shown == tables.overview_table([RESULTS[name] for name in ORDERED])
