"""The command line: what it prints, and how it fails."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mergekit_cl
from mergekit_cl import cli
from mergekit_cl.cli import app

runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"mergekit-cl {mergekit_cl.__version__}\n"


def test_no_command_shows_help() -> None:
    result = runner.invoke(app, [])
    assert "demo" in result.output
    assert "methods" in result.output


def test_methods_lists_every_method_within_80_columns() -> None:
    result = runner.invoke(app, ["methods"])
    assert result.exit_code == 0
    for name, method in mergekit_cl.methods().items():
        (row,) = re.findall(rf"^│ {name} +│.*?(?=^[├└])", result.stdout, re.MULTILINE | re.DOTALL)
        words = " ".join(" ".join(line.split("│")[2].strip() for line in row.splitlines() if "│" in line).split())
        for parameter in method.shown.values():
            assert f"- {parameter}" in words
        assert method.paper in words.replace(" ", "")  # a long address is folded
        assert f"│ {method.base} " in row
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_methods_name_prints_the_whole_documentation() -> None:
    result = runner.invoke(app, ["methods", "sfa"])
    method = mergekit_cl.methods()["sfa"]
    assert result.exit_code == 0
    assert result.stdout.startswith("sfa\n")
    assert method.documentation.replace("`", "") in result.stdout
    assert "  beta=0.5 in [0, 1]\n" in result.stdout
    assert "models: 2 or more\n" in result.stdout
    assert "base:   unused\n" in result.stdout
    assert f"paper:  {method.paper}\n" in result.stdout


def test_a_terminal_gets_paragraphs_reflowed_and_examples_as_they_are() -> None:
    paragraphs = mergekit_cl.methods()["sfa"].documentation.replace("`", "").split("\n\n")
    text = cli.documentation(mergekit_cl.methods()["sfa"], reflow=True).plain
    assert paragraphs[1] not in text
    assert paragraphs[1].replace("\n", " ") in text
    assert ">>> " in paragraphs[2]
    assert paragraphs[2] in text


def test_number_of_models() -> None:
    assert "models: 1\n" in runner.invoke(app, ["methods", "wise_ft"]).stdout
    assert "models: 1 or more\n" in runner.invoke(app, ["methods", "linear"]).stdout


def test_an_error_is_one_line_on_stderr() -> None:
    result = runner.invoke(app, ["methods", "lineal"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == 'error: unknown method "lineal": did you mean "linear"?\n'


def test_debug_lets_the_error_through() -> None:
    result = runner.invoke(app, ["--debug", "methods", "lineal"])
    assert isinstance(result.exception, mergekit_cl.UnknownNameError)


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr("mergekit_cl.demo.run_demo", lambda *args, **options: calls.append((args, options)))
    assert runner.invoke(app, ["demo"]).exit_code == 0
    assert runner.invoke(app, ["demo", "--out", str(tmp_path), "--seed", "3", "--quick"]).exit_code == 0
    assert calls == [
        ((Path("demo-results"),), {"seed": 0, "quick": False}),
        ((tmp_path,), {"seed": 3, "quick": True}),
    ]


def test_help_loads_nothing_slow() -> None:
    slow = ["torch", "numba", "jax", "matplotlib", "mlxtend", "triton", "pandas"]
    code = f"import sys, mergekit_cl.cli; print([name for name in {slow} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_main_runs_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-cl", "methods", "lineal"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
