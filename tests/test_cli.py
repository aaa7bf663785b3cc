"""The command line: what it prints, and how it fails."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import mergekit_cl
from mergekit_cl import cli, pages
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


def screen(*command: str, width: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Run a command as on a terminal, without colours by default."""
    options = {"color_system": None, **options}
    monkeypatch.setattr(cli, "Console", lambda: Console(force_terminal=True, width=width, height=25, **options))
    result = runner.invoke(app, list(command))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_gets_the_methods_in_groups_and_in_few_lines(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(line.rstrip() for line in screen("methods", width=width, monkeypatch=monkeypatch).splitlines()) + "\n"
    assert max(map(len, text.splitlines())) <= width
    groups = dict(re.findall(r"^\S[^\n]* \(base: (\w+)\)\n(.*?\n)(?=\n)", text, re.MULTILINE | re.DOTALL))
    assert list(groups) == ["unused", "optional", "required"]
    for name, method in mergekit_cl.methods().items():
        (rows,) = re.findall(rf"^{name}  .*\n(?:  .*\n)*", groups[method.base], re.MULTILINE)
        *words, models = rows.splitlines()[0].split()[1:]
        assert models == (str(method.least) if method.least == method.most else f"{method.least}{'-2' if method.most else '+'}")
        assert len(rows.splitlines()) <= {80: 3, 100: 2, 200: 1}[width]
        rest = [word for line in rows.splitlines()[1:] for word in line.split()]
        assert " ".join(words + rest) == " ".join(method.summary.replace("``", "`").split())


def test_a_pipe_gets_a_line_for_each_method() -> None:
    result = runner.invoke(app, ["methods"])
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(mergekit_cl.methods())
    (line,) = (line for line in lines if line.startswith("wise_ft "))
    assert re.fullmatch(r"wise_ft +Interpolate .*: `base \+ alpha \* \(model - base\)`\. \(base required, models 1\)", line)


def test_a_pipe_gets_the_page_of_a_method_as_it_is() -> None:
    for name in ("sfa", "ties"):
        result = runner.invoke(app, ["methods", name])
        assert result.exit_code == 0
        assert result.stdout == pages.page(mergekit_cl.methods()[name], links=False)
        assert "](" not in result.stdout


def test_a_terminal_gets_a_page_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen("methods", "ties", width=70, monkeypatch=monkeypatch)
    assert max(map(len, text.splitlines())) <= 70
    assert text.startswith("ties")
    assert "`magnitude_prune`" in text
    assert "\nWhen to use" in text
    assert "https://arxiv.org/abs/2306.01708" in text
    wide = screen("methods", "ties", width=300, monkeypatch=monkeypatch)
    assert max(len(line.rstrip()) for line in wide.splitlines()) <= 110
    assert " v_k  = weight_k * factor_k * d_k " in wide  # a formula keeps its columns


def test_colours_take_the_place_of_backquotes(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["methods"], ["methods", "ties"]):
        text = screen(*command, width=100, monkeypatch=monkeypatch, color_system="standard", no_color=False)
        assert "`" not in text
        assert "\x1b[36m" in text
        assert "`" in screen(*command, width=100, monkeypatch=monkeypatch, color_system="standard", no_color=True)


def test_the_methods_for_adapters_have_pages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "svd"):
        assert runner.invoke(app, ["methods", name]).stdout.startswith(f"{name}\n\nMerge LoRA adapters")
    assert "cat, svd" in screen("methods", width=100, monkeypatch=monkeypatch)


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
