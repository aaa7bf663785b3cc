"""The claims of the SFA paper, judged by the intervals of differences in average accuracy.

A difference is SFA less a rival, on the same seeds. Every interval has a level of 95 % by itself: nothing is corrected for
there being many of them, so one in twenty may miss by chance.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .protocol import Result
from .statistics import Interval, difference

Verdict: TypeAlias = Literal["held", "not held", "undecided"]
MARGIN = 2.0
"""Points of average accuracy by which a comparable learner may be behind."""


@dataclass(frozen=True)
class Claim:
    """That SFA is better than some rivals, or behind by less than a margin.

    Attributes:
        title: The claim, as a heading.
        rivals: Whom the claim is about: it holds if it holds against all of them.
        beside: Other rivals; they are reported, and decide nothing.
        margin: Points by which SFA may be behind.
        kinds: The kinds of sequences that the claim is about; None for all.

    """

    title: str
    rivals: tuple[str, ...]
    beside: tuple[str, ...] = ()
    margin: float = 0.0
    kinds: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Comparison:
    """SFA less a rival, and what that says of the claim."""

    rival: str
    difference: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Finding:
    """What a sequence says of a claim. ``comparisons`` has the rivals that ran, those beside included."""

    result: Result
    verdict: Verdict
    comparisons: tuple[Comparison, ...]

    def against(self, claim: Claim, verdict: Verdict) -> list[str]:
        """Return the rivals of the claim with this verdict."""
        return [each.rival for each in self.comparisons if each.rival in claim.rivals and each.verdict == verdict]


SUBJECT = "sfa"
CLAIMS = (
    Claim(
        "SFA (p = 0.25) is comparable to rehearsal, without storing data",
        ("rehearsal-1", "rehearsal-5", "rehearsal-20"),
        margin=MARGIN,
    ),
    Claim(
        "SFA (p = 0.25) is better than merging methods",
        ("task_arithmetic", "ties", "wise_ft"),
        ("soup", "dare_ties", "magmax", "opcm"),
    ),
    Claim("SFA (p = 0.25) is better than penalties", ("l2", "ewc"), ("ewc-online", "lwf")),
    Claim("Merging partially trained models (p = 0.25) is better than merging at the end (p = 1)", ("sfa-end",)),
)
CHECK = Claim(
    "SFA (p = 0.25) is better than sequential fine-tuning where the inputs change and the outputs keep their meaning",
    ("sequential",),
    kinds=("domain", "language"),
)


def decide(difference: Interval, margin: float = 0.0) -> Verdict:
    """Say whether a difference is above minus the margin: the whole interval is, none of it is, or it lies across."""
    if difference.low > -margin:
        return "held"
    return "not held" if difference.high < -margin else "undecided"


def judge(claim: Claim, result: Result) -> Finding | None:
    """Say whether a claim held on a sequence; None if the claim is not about it, or none of the rivals ran.

    It held if it held against each rival; it did not if it did not against at least one.
    """
    if claim.kinds is not None and result["sequence"]["kind"] not in claim.kinds:
        return None
    comparisons = []
    for rival in (*claim.rivals, *claim.beside):
        if (found := difference(result, SUBJECT, rival)) is not None:
            comparisons.append(Comparison(rival, found, decide(found, claim.margin)))
    verdicts = [each.verdict for each in comparisons if each.rival in claim.rivals]
    if not verdicts:
        return None
    if "not held" in verdicts:
        return Finding(result, "not held", tuple(comparisons))
    held = len(verdicts) == len(claim.rivals) and set(verdicts) == {"held"}
    return Finding(result, "held" if held else "undecided", tuple(comparisons))


def judge_all(claim: Claim, results: Iterable[Result]) -> list[Finding]:
    """Return what each sequence says of a claim, without those that say nothing."""
    return [finding for finding in (judge(claim, result) for result in results) if finding is not None]


def overall(findings: Sequence[Finding]) -> str:
    """Sum up the sequences: what those say that decide, ``mixed`` if they say both; ``not measured`` if there is none."""
    verdicts = {finding.verdict for finding in findings}
    if not verdicts:
        return "not measured"
    decided = verdicts - {"undecided"}
    if len(decided) == 2:
        return "mixed"
    if not decided:
        return "undecided"
    return decided.pop() + ("" if len(verdicts) == 1 else " where decided")
