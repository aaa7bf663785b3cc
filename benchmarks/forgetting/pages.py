"""The report: all tables and pictures, as Markdown and as a page that is one file."""

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from .cells import write_whole
from .claims import CHECK, CLAIMS, MARGIN
from .pictures import CAPTIONS, draw, overview
from .protocol import Result
from .tables import claim_table, claims_table, flax_table, learners_table, overview_table, sequences_table

TITLE = "Does it keep what it learned?"
QUICK = (
    "> **A QUICK RUN: THESE NUMBERS MEAN NOTHING.** Next to nothing was trained, to see that everything works. "
    "Run it without `--quick` for numbers.\n\n"
)
KINDS = {
    "domain": "From task to task the inputs change; the outputs keep their meaning (domain-incremental).",
    "class": "Every task brings new classes into one head (class-incremental).",
    "task": "Every task has a head of its own, and the network is told which task it is (task-incremental).",
    "language": "The text changes; what is learned is the next character.",
}
METRICS = """\
`R[i, j]` is the accuracy on the test part of task j after training on tasks 0 to i, of T tasks.

- **average accuracy**: on all tasks after the last one, `sum_j R[T-1, j] / T`.
- **forgetting**: the loss since each task's best, `sum_{j<T-1} (max_{i<T-1} R[i, j] - R[T-1, j]) / (T-1)`
  ([Chaudhry et al. 2018](https://arxiv.org/abs/1801.10112)). Less is better.
- **backward transfer**: the change since each task was learned, `sum_{j<T-1} (R[T-1, j] - R[j, j]) / (T-1)`
  ([Lopez-Paz & Ranzato 2017](https://arxiv.org/abs/1706.08840)).
- **forward transfer**: what earlier tasks do for one not yet learned, `sum_{j>0} (R[j-1, j] - start[j]) / (T-1)`, where `start`
  is the accuracy before the first task (the same source).
- **learning accuracy**: on each task just after training on it, `sum_j R[j, j] / T`
  ([Riemer et al. 2019](https://arxiv.org/abs/1810.11910)).
- **bits per character**: the mean cross-entropy over all tasks after the last one, divided by ln 2. Less is better.
- **extra memory**: what a learner keeps beside model and optimizer while it trains the last task (an anchor, Fisher
  information, a teacher, stored examples, models of earlier tasks), in MB (10^6 bytes), and in multiples of the trained
  parameters at 4 bytes each. Merging methods keep the models of all tasks here; a soup or Task Arithmetic needs a running
  sum only. Images are stored as float32, as they are trained on; as bytes they would take a quarter.
- **time per step**: wall-clock time of a task with all that a learner does at its end, divided by its steps, as a multiple of
  sequential fine-tuning's. All learners of a sequence are measured with their chosen values, in one process, one after the
  other, with one thread. Rehearsal adds examples to each batch, and so takes longer.

`±` is the half width of a 95 % confidence interval of the mean over seeds, by Student's t distribution. It is about training
again from other first weights, on other batches. It is not about other test examples, which are the same for all seeds (of 500
examples in all, an accuracy of 75 % has a standard error of 2 points), nor about the choice of hyper-parameters, which one seed
made.

"""
CHOICES = """\
Each learner may try the same number of sets of hyper-parameters, or all that it has if these are fewer. Each set is trained
with a seed that is used for nothing else, and scored by its average accuracy on the validation parts after the last task. The
best one is then trained with every seed, and scored on the test parts, which nothing is chosen by. Where trials are near to
each other, chance decides between them. Training, validation and test parts share no example. SFA's p is not chosen: it is
part of the learner. The Flax versions take over the values chosen for PyTorch. "All tasks at once" is trained on the examples
of all tasks together: a bound, since the others see one task at a time. Rehearsal keeps a percentage of the training parts of
all tasks but the last, of which a run may draw fewer than there are.

"""
JUDGED = f"""\
A claim is judged by differences in average accuracy, SFA less the other learner, on the same seeds. It *held* if the 95 %
interval of the difference is above 0, *not held* if it is below 0, else it is *undecided*; for *comparable* it is -{MARGIN:g}
points in place of 0. About several others, it held if it held against all of them, and not held if not against at least one.
Nothing is corrected for the number of comparisons: one interval in twenty may miss by chance. The last row is not a claim of
the paper.

"""


OVERVIEW = (
    "SFA (p = 0.25) less other learners. Right of 0 SFA is better. Hollow: 0 lies inside the interval. Grey: the margin within "
    "which it is comparable. Scales differ."
)


@dataclass(frozen=True)
class Report:
    """The files that were written."""

    markdown: Path
    page: Path
    pictures: tuple[Path, ...]


def write(results: Sequence[Result], folder: Path) -> Report:
    """Write ``report.md``, ``report.html``, and ``pictures/*.png``; each file is complete or absent.

    Args:
        results: What result files hold, one for each sequence, in the order of the report.
        folder: Where to write, made if need be; files there are replaced. The same results give the same files.

    """
    pictures: dict[str, bytes] = {}
    sections = [_head(results, pictures), *(_sequence(result, pictures) for result in results), _method(results)]
    text = "".join(sections)
    for name, data in pictures.items():
        write_whole(folder / name, data)
    write_whole(folder / "report.md", text.encode())
    write_whole(folder / "report.html", _page(text, pictures).encode())
    return Report(folder / "report.md", folder / "report.html", tuple(folder / name for name in pictures))


def _head(results: Sequence[Result], pictures: dict[str, bytes]) -> str:
    """Write the beginning: what all sequences say together."""
    text = f"# {TITLE}\n\n" + (QUICK if any(result["quick"] for result in results) else "")
    text += (
        "The comparison of the SFA paper ([arXiv:2501.05559](https://arxiv.org/abs/2501.05559)) on data that come inside "
        "packages: a network learns tasks in turn, and is tested on all of them.\n\n"
    )
    titles = [result["sequence"]["title"] for result in results]
    text += "".join(f"- [{title}](#{_anchor(title)})\n" for title in [*titles, "How it was done"])
    text += f"\n## Average accuracy\n\n{overview_table(results)}\n"
    text += (
        "After the last task, over all tasks: means over seeds with 95 % intervals. The best is bold, apart from the bound.\n\n"
    )
    text += f"## The paper's claims\n\n{claims_table(results)}\n{JUDGED}"
    if (figure := overview(results)) is not None:
        text += _picture("overview", figure, OVERVIEW, pictures)
    for claim in (*CLAIMS, CHECK):
        if table := claim_table(claim, results):
            text += f"### {claim.title}\n\n{table}\n"
            text += "In points of average accuracy. ✓ held, ✗ not held, ? undecided."
            text += " Columns in italics decide nothing.\n\n" if claim.beside else "\n\n"
    return text


def _sequence(result: Result, pictures: dict[str, bytes]) -> str:
    """Write the section of a sequence."""
    sequence = result["sequence"]
    weights = "pretrained" if sequence["pretrained"] else "random"
    text = f"## {sequence['title']}\n\n" + (QUICK if result["quick"] else "")
    text += f"{sequence['about']} {KINDS[sequence['kind']]}\n\n"
    text += f"Tasks in order: {'; '.join(sequence['tasks'])}. {sequence['parameters']:,} parameters are trained. "
    text += f"The first weights are {weights}. What is measured: {sequence['unit']}.\n\n{learners_table(result)}\n"
    text += "The best of a column is bold, apart from bounds.\n\n"
    if table := flax_table(result):
        text += f"### {sequence['title']}: PyTorch and Flax\n\n{table}\nBoth with the values chosen for PyTorch.\n\n"
    for name, figure in draw(result).items():
        text += _picture(f"{sequence['name']}-{name}", figure, CAPTIONS[name], pictures)
    return text


def _method(results: Sequence[Result]) -> str:
    """Write the end: definitions, choices, and where it ran."""
    text = f"## How it was done\n\n### What the numbers are\n\n{METRICS}"
    text += f"### How hyper-parameters were chosen\n\n{CHOICES}{sequences_table(results)}\n### Where it ran\n\n"
    for result in results:
        machine = result["machine"]
        where = f"{machine['processor']}, {machine['cores']} cores"
        versions = f"Python {machine['python']}, PyTorch {machine['torch']}, mergekit_cl {machine['mergekit_cl']}"
        text += f"- {result['sequence']['title']}: {where}; {versions}; {result['date'][:10]}.\n"
    return text


def _picture(name: str, figure: Figure, caption: str, pictures: dict[str, bytes]) -> str:
    """Draw a picture, and write the lines that show it."""
    data = BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    pictures[file := f"pictures/{name}.png"] = data.getvalue()
    return f"![{name}]({file})\n\n*{caption}*\n\n"


def _page(text: str, pictures: dict[str, bytes]) -> str:
    """Make a page of Markdown: pictures inside, headings with the anchors that forges give them."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            heading.attrSet("id", _anchor(inline.content))
    for image in _images(tokens):
        data = b64encode(pictures[str(image.attrGet("src"))]).decode()
        image.attrSet("src", f"data:image/png;base64,{data}")
    body = parser.renderer.render(tokens, parser.options, {})
    return PAGE.format(title=escape(TITLE), style=STYLE, body=body)


def _images(tokens: Iterable[Any]) -> list[Any]:
    return [child for token in tokens for child in token.children or () if child.type == "image"]


def _anchor(title: str) -> str:
    """Return the anchor that a forge gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


STYLE = """
:root { color-scheme: light; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; }
p, ul { max-width: 48rem; }
h2 { margin-top: 3rem; padding-top: .5rem; border-top: 1px solid #ccc; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.3; margin: 1rem 0; display: block; overflow-x: auto;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
td:first-child:has(> em) { padding-top: .7rem; color: #555; }
img { display: block; max-width: min(100%, 52rem); height: auto; margin: 1.5rem 0 0; }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border: 3px solid #b00000; background: #fff0f0; font-size: 1.15rem; }
code { font-size: .9em; }
@media print {
  @page { size: A4; margin: 15mm; }
  body { font-size: 10pt; margin: 0; max-width: none; padding: 0; }
  table { display: table; font-size: 7.5pt; width: 100%; }
  th, td { padding: 1.5pt 4pt; }
  h2 ~ h2 { break-before: page; }
  h2, h3 { break-after: avoid; }
  tr, img { break-inside: avoid; }
  img { max-width: 100%; max-height: 240mm; break-after: avoid; }
}
"""
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""
