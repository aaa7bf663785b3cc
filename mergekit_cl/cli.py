"""The command line: ``mergekit-cl demo`` and ``mergekit-cl methods``.

What is slow to import is imported by the command that needs it, so that ``--help`` is quick.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from mergekit_cl import __version__
from mergekit_cl.errors import MergeError
from mergekit_cl.registry import Method, find
from mergekit_cl.registry import methods as registered


class _Group(TyperGroup):
    """Commands whose `MergeError` is one readable line on standard error, and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MergeError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergekit-cl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge the weights of models, trained or still training."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the weights.")] = Path("demo-results"),
    seed: Annotated[int, typer.Option(min=0, help="Decides data split, first weights and batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps for each task, to see that it works.")] = False,
) -> None:
    """Watch SFA keep old tasks while new ones are learned, on real digits; then merge with every method."""
    from mergekit_cl.demo import run_demo

    run_demo(out, seed=seed, quick=quick)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the whole documentation of this method.")] = None,
) -> None:
    """List the merge methods, or document one."""
    console = Console()
    if name is None:
        console.print(methods_table())
        console.print("A method's whole documentation: mergekit-cl methods NAME", highlight=False)
    else:
        text = documentation(find(name), reflow=console.is_terminal)
        console.print(text, soft_wrap=not console.is_terminal)  # a file gets the lines as they were written


def methods_table() -> Table:
    """Make the table of all registered methods."""
    table = Table("method", Column("what it does, parameters, paper", overflow="fold"), "base", "models", show_lines=True)
    for method in registered().values():
        lines = [
            _code(method.summary),
            *(Text("- ") + each for each in _parameters(method)),
            Text(method.paper, style="dim", overflow="fold"),
        ]
        table.add_row(Text(method.name, style="bold"), Text("\n").join(lines), method.base, _models(method))
    return table


def documentation(method: Method, *, reflow: bool = False) -> Text:
    """Lay out everything that is known about a method; reflow joins the lines of its paragraphs, but not of examples."""
    paragraphs = method.documentation.split("\n\n")
    if reflow:
        paragraphs = [p if re.search(r"^(>>>|\s|[-*] )", p, re.MULTILINE) else p.replace("\n", " ") for p in paragraphs]
    facts = {"base": method.base, "models": _models(method), "paper": method.paper}
    return Text("\n").join([
        Text(method.name, style="bold"),
        Text(),
        _code("\n\n".join(paragraphs)),
        Text(),
        Text("Parameters", style="bold"),
        *(Text("  ") + parameter for parameter in _parameters(method) or [Text("none")]),
        Text(),
        *(Text(f"{fact + ':':8}{value}") for fact, value in facts.items()),
    ])  # fmt: skip


def _parameters(method: Method) -> list[Text]:
    return [
        Text(str(parameter) + (", required" if parameter.required else ""), style="green")
        for parameter in method.shown.values()
    ]


def _models(method: Method) -> str:
    if method.least == method.most:
        return str(method.least)
    return f"{method.least} or more" if method.most is None else f"{method.least} to {method.most}"


def _code(documentation: str) -> Text:
    """Show ````code```` and ```names``` of a docstring in colour, without the backquotes."""
    text = Text()
    for index, part in enumerate(re.split(r"``(.+?)``|`(.+?)`", documentation, flags=re.DOTALL)):
        text.append(part or "", style="cyan" if index % 3 else "")
    return text
