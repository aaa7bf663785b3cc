"""What the documentation shows is what the code does: doctests, the README's snippets and generated parts."""

import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mergekit_cl
from mergekit_cl.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODULES = sorted(
    {".".join(("mergekit_cl", *path.relative_to(ROOT / "mergekit_cl").with_suffix("").parts)).removesuffix(".__init__")
     for folder in ("mergekit_cl", "mergekit_cl/kernels", "mergekit_cl/adapters")
     for path in (ROOT / folder).rglob("*.py")}
)  # fmt: skip


def methods_table() -> str:
    """Write the README's table of methods from the registry."""
    rows = ["| method | | parameters | base | paper |", "| --- | --- | --- | --- | --- |"]
    for name, method in mergekit_cl.methods().items():
        parameters = "<br>".join(f"`{parameter}`" for parameter in method.shown.values())
        paper = method.paper.removeprefix("https://").removeprefix("arxiv.org/abs/")
        summary, base = method.summary.replace("``", "`"), method.base.replace("unused", "none")
        rows.append(f"| `{name}` | {summary} | {parameters} | {base} | [{paper}]({method.paper}) |")
    return "\n".join(rows)


def with_methods_table(readme: str) -> str:
    return re.sub(r"(?<=<!-- methods -->\n).*?(?=<!-- /methods -->)", lambda _: methods_table() + "\n", readme, flags=re.DOTALL)


def test_the_table_of_methods_is_the_registry() -> None:
    assert with_methods_table(README.read_text()) == README.read_text(), "run: make docs"


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
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"):
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
    README.write_text(with_methods_table(README.read_text()))
