"""What the documentation shows is what the code does: doctests, the README's snippets and generated parts."""

import ast
import doctest
import importlib
import re
import shlex
import sys
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mergekit_cl
from mergekit_cl import pages
from mergekit_cl.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = ROOT / "docs/methods"
MODULES = sorted(
    {".".join(("mergekit_cl", *path.relative_to(ROOT / "mergekit_cl").with_suffix("").parts)).removesuffix(".__init__")
     for folder in ("mergekit_cl", "mergekit_cl/kernels", "mergekit_cl/adapters")
     for path in (ROOT / folder).rglob("*.py")}
)  # fmt: skip


def generated() -> dict[Path, str]:
    """Write everything that is made of the registry: the README with its table of methods, and the methods' pages."""
    readme, rows = README.read_text(), pages.table("docs/methods")
    return {
        README: re.sub(r"(?<=<!-- methods -->\n).*?(?=<!-- /methods -->)", lambda _: rows + "\n", readme, flags=re.DOTALL),
        PAGES / "README.md": pages.index(),
        **{PAGES / f"{name}.md": pages.page(method) for name, method in pages.packaged().items()},
    }


def test_the_table_and_the_pages_of_methods_are_the_registry() -> None:
    expected = generated()
    different = [
        str(path.relative_to(ROOT)) for path, text in expected.items() if not path.exists() or path.read_text() != text
    ]
    assert different == [], "run: make docs"
    assert set(PAGES.iterdir()) == expected.keys() - {README}, "run: make docs"


@pytest.mark.parametrize("name", pages.packaged())
def test_a_page_says_everything(name: str) -> None:
    method = pages.packaged()[name]
    said = pages.read(method.documentation)
    assert said.formula
    assert said.when
    assert said.summary == method.summary
    assert said.summary.endswith(".")
    assert list(said.parameters) == [*method.companions, *method.parameters]
    assert all(said.parameters.values())
    assert "## Cost" in pages.page(method)
    assert max(map(len, said.formula.splitlines())) <= 120


@pytest.mark.parametrize("name", pages.packaged())
def test_the_example_on_a_page_runs(name: str) -> None:
    """It is run from the page, as a reader would, and has to print what the comments below each line say."""
    (program,) = re.findall(r"## Example\n\n```python\n(.*?)```", pages.page(pages.packaged()[name]), flags=re.DOTALL)
    lines = [line for line in program.splitlines() if line]
    program = "\n".join(lines)
    examples = []
    for statement in ast.parse(program).body:
        end = statement.end_lineno or 0
        printed = [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines[end:])]
        source = lines[statement.lineno - 1 : end]
        examples.append(doctest.Example("\n".join(source) + "\n", "".join(f"{line}\n" for line in printed)))
    assert any(example.want for example in examples)
    assert len(lines) == sum(len((example.source + example.want).splitlines()) for example in examples)
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(doctest.DocTest(examples, {}, name, None, None, None)).failed == 0


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # what frameworks say of a machine without a GPU
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore:.*LeafSpec:FutureWarning")
def test_snippets_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mergekit_cl.memory.anonymous_memory", lambda: 0)  # the command line is not a process of its own here
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(snippets) >= 4
    scope: dict[str, object] = {"__name__": "readme"}
    sys.modules["readme"] = type(sys)("readme")
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    assert "clipped_average" in mergekit_cl.methods()
    commands = re.findall(r"^mergekit-cl ((?:merge|run|verify) [^#\n]*)", README.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, (command, result.output)
    weights = [(tmp_path / "models" / name / "model.safetensors").read_bytes() for name in ("merged", "average", "again")]
    assert weights[0] == weights[1] == weights[2]


def test_files_that_are_linked_exist() -> None:
    forgetting = ROOT / "benchmarks/forgetting"
    written = (ROOT / "benchmarks/README.md", forgetting / "README.md", forgetting / "results/report.md")
    for page in (README, ROOT / "CONTRIBUTING.md", *written, *PAGES.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"np": np, "torch": torch})
    assert result.failed == 0


def test_public_names_are_documented() -> None:
    missing = [
        name for name in mergekit_cl.__all__ if name != "Steps" and not (getattr(mergekit_cl, name).__doc__ or "").strip()
    ]
    assert missing == []


if __name__ == "__main__":
    PAGES.mkdir(parents=True, exist_ok=True)
    written = generated()
    for path, text in written.items():
        path.write_text(text)
    for path in set(PAGES.iterdir()) - written.keys():
        path.unlink()
