"""A page of documentation for each merge method, made of its signature, its docstring, and a merge that is watched.

What a docstring may hold, in this order: a summary line; ``Formula:``; paragraphs; ``When to use:``; ``Args:``; ``Raises:``;
doctests. All but the summary may be absent. Types, ranges and defaults come from the signature, and what a method costs from
running it: see `cost`.
"""

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from doctest import DocTestParser, Example
from textwrap import dedent, fill, indent
from typing import Any, ClassVar

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Markdown, TextElement
from rich.syntax import Syntax
from rich.theme import Theme

from mergekit_cl.api import prepare
from mergekit_cl.demo import REQUIRED
from mergekit_cl.errors import MergeError
from mergekit_cl.registry import Between, Method, Parameter, methods
from mergekit_cl.steps import Elementwise, Sum

PACKAGE = "mergekit_cl.merge_methods."

_MANY = 12  # models of a merge that is watched, where there may be any number
_FEW = 3  # models whose bytes are counted for the page, where there may be any number
_BYTES = 2  # of an element of bfloat16
_SECTION = re.compile(r"(Formula|When to use|Args|Raises):")
_ON_TOP = {"PerMatrix": "What it does with whole matrices, such as singular value decompositions, comes on top."}
_ABOUT_SCOPE = "Whether each tensor is surveyed on its own, or the whole model as one."


def packaged() -> dict[str, Method]:
    """List the methods that this package brings, by name; `mergekit_cl.methods` lists the user's own too."""
    return {name: method for name, method in methods().items() if method.function.__module__.startswith(PACKAGE)}


def page(method: Method, *, links: bool = True) -> str:
    """Write the page of a method, as Markdown.

    With ``links`` it links to the pages of other methods beside it, and to the code, as seen from ``docs/methods``.
    """
    said = read(method.documentation)
    text = _linked(method) if links else _plain
    parts = [f"# {method.name}", text(said.summary), _facts(method, links)]
    if said.formula:
        parts.append(_block(said.formula, "text"))
    parts += map(text, said.paragraphs)
    if said.when:
        parts += ["## When to use", text(said.when)]
    if method.shown:
        about = {"scope": _ABOUT_SCOPE, **said.parameters}
        parts += [
            "## Parameters",
            "\n".join(_entry(f"`{p.name}` ({words(p)})", text(about.get(p.name, ""))) for p in method.shown.values()),
        ]
    parts += ["## Cost", *costs] if (costs := _costs(method)) else []
    if said.raises:
        parts += ["## Errors", "\n".join(_entry(f"`{name}`", text(when)) for name, when in said.raises.items())]
    if said.examples:
        parts += ["## Example", _block(snippet(said.examples), "python")]
    return "\n\n".join(parts) + "\n"


def show(method: Method, console: Console) -> None:
    """Print the page of a method on a terminal; where that has no colours, names keep their backquotes."""
    text = page(method, links=False)
    if console.no_color or console.color_system is None:
        parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
        parts[::2] = [re.sub(r"`([^`]+)`", r"`` `\1` ``", part) for part in parts[::2]]
        text = "".join(parts)
    with console.use_theme(_THEME):
        console.print(_Screen(text, code_theme="ansi_dark"), width=min(console.width, _WIDEST))


def index() -> str:
    """Write the page that lists the pages of all methods of the package, as Markdown."""
    rows = [
        f"| [`{name}`]({name}.md) | {in_cell(method.summary)} | {base_of(method)} | {models_of(method)} | {_total(method)} |"
        for name, method in packaged().items()
    ]
    return "\n".join([
        "# Merge methods",
        "",
        "A page for each, made of the method's file by `make docs`. `mergekit-cl methods NAME` prints it.",
        "",
        "Reads are those of a whole merge, per element, for K models, with the defaults; there is one write. Where a survey",
        "finds a tensor in the processor's cache, or among what a merge of files keeps in memory, reading it again is cheap.",
        "With `out=` a model that exists, all inputs are read once more, in search of NaN, before anything is written.",
        "",
        "| method | | base | models | reads |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ])  # fmt: skip


def table(folder: str) -> str:
    """Write a table of the methods of the package, whose pages lie in ``folder``, as Markdown."""
    rows = [
        f"| [`{name}`]({folder}/{name}.md) | {in_cell(method.summary)} | {base_of(method)} |"
        for name, method in packaged().items()
    ]
    return "\n".join(["| method | | base |", "| --- | --- | --- |", *rows])


def base_of(method: Method) -> str:
    """Say in a word whether a method has a base: required, optional, none."""
    return method.base.replace("unused", "none")


def models_of(method: Method) -> str:
    """Say how many models a method merges, without the base."""
    if method.least == method.most:
        return str(method.least)
    if method.most is None:
        return f"{method.least} or more"
    return f"{method.least} {'or' if method.most == method.least + 1 else 'to'} {method.most}"


def words(parameter: Parameter) -> str:
    """Say what a parameter may be, and what it is by default.

    >>> words(methods()["ties"].parameters["density"])
    'a number in [0, 1], one for each model; required'
    """
    if parameter.of_models:
        return "a list of models, one for each model; required"
    if parameter.choices:
        *others, last = (f"`{_quoted(choice)}`" for choice in parameter.choices)
        kind = f"{', '.join(others)} or {last}" if others else last
    else:
        kind = {float: "a number", int: "an integer", bool: "`True` or `False`"}.get(parameter.type, parameter.type.__name__)
    kind += f" {_limits(parameter.range)}" if parameter.range is not None else ""
    if parameter.required:
        return f"{kind}{', one for each model' if parameter.per_model else ''}; required"
    default = parameter.default[0] if parameter.per_model and len(parameter.default) == 1 else parameter.default
    return f"{kind}{', one for each model' if parameter.per_model else ''}; default `{_quoted(default)}`"


def in_cell(text: str) -> str:
    """Turn a line of a docstring into Markdown for a cell of a table."""
    return _plain(text).replace("|", "\\|")


# What a docstring says


@dataclass
class Said:
    """What a docstring says, by section. Texts are as they were written."""

    summary: str
    formula: str = ""
    paragraphs: list[str] = field(default_factory=list)
    when: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    raises: Mapping[str, str] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)


def read(documentation: str) -> Said:
    """Take a docstring (without its indentation) apart."""
    first, *blocks = re.split(r"\n\s*\n", documentation.strip())
    said = Said(_without_examples(" ".join(first.splitlines())))
    with suppress(ValueError):  # what looks like a doctest, and is none
        said.examples = DocTestParser().get_examples(documentation)
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for block in blocks:
        heading, _, rest = block.partition("\n")
        if _SECTION.fullmatch(heading):
            current = sections[heading[:-1]] = [rest]
        elif current is not None and block.startswith(" "):
            current.append(block)  # a section goes on
        else:
            current = None
            if text := _without_examples(block):
                said.paragraphs.append(re.sub(r" ?::$", ":", text))
    joined = {name: dedent("\n\n".join(parts)).strip() for name, parts in sections.items()}
    said.formula, said.when = joined.get("Formula", ""), joined.get("When to use", "")
    said.parameters, said.raises = _named(joined.get("Args", "")), _named(joined.get("Raises", ""))
    return said


def snippet(examples: Iterable[Example]) -> str:
    """Write doctests as a program that can be copied; what is printed follows as comments."""
    lines = []
    for example in examples:
        lines.append(example.source.rstrip())
        lines += [f"# {line}".rstrip() for line in example.want.splitlines()]
    program = "\n".join(lines)
    imports = {"np": "import numpy as np", "torch": "import torch"}  # doctests have these
    needed = [line for name, line in imports.items() if re.search(rf"\b{name}\.", program) and line not in program]
    given = [line for line in lines if line.startswith(("from ", "import "))]
    return "\n".join([*needed, *given, "", *(line for line in lines if line not in given)])


def _without_examples(block: str) -> str:
    return block[: match.start()].rstrip() if (match := re.search(r"^>>> ", block, re.MULTILINE)) else block


def _named(section: str) -> dict[str, str]:
    """Read ``name: text`` entries, whose further lines are indented."""
    entries = re.split(r"^(\w+): ?", section, flags=re.MULTILINE)[1:]
    return {name: dedent(f"    {text}").strip() for name, text in zip(entries[::2], entries[1::2], strict=True)}


# What a method costs


@dataclass(frozen=True)
class Pass:
    """Sweeps of a step over inputs: over how many models, and whether over the base."""

    step: str
    sweeps: int
    models: int
    base: bool


@dataclass(frozen=True)
class Cost:
    """What a merge reads, pass by pass; the last one writes the result. With each model it reads ``beside`` more."""

    passes: tuple[Pass, ...]
    models: int
    base: bool
    beside: int = 0

    @property
    def reads_all(self) -> bool:
        """Whether every pass reads all models."""
        return all(each.models == self.models for each in self.passes)

    def reads(self, models: int) -> int:
        """Count how often an entry of a tensor is read from any input, for so many models."""
        return sum(each.sweeps * (min(each.models, models) * (1 + self.beside) + each.base) for each in self.passes)

    @property
    def formula(self) -> str:
        """That number, for K models where all of them are read."""
        if not self.reads_all:
            return str(self.reads(self.models))
        times = sum(each.sweeps for each in self.passes) * (1 + self.beside)
        base = sum(each.sweeps for each in self.passes if each.base)
        factor = str(times) if times > 1 else ""
        if base == times:
            return f"{factor}(K + 1)" if factor else "K + 1"
        return f"{factor}K + {base}" if base else f"{factor}K"


def cost(method: Method, *, base: bool | None = None, **parameters: Any) -> Cost:
    """Watch a small merge with a method's defaults: which surveys it asks for, and which apply step it returns.

    A step costs as many sweeps over its inputs as its class says (``sweeps``, else one). Values for parameters without a
    default are those of the demo, or the middle of their range.

    Args:
        method: The method.
        base: Whether there is a base; by default where the method needs one.
        **parameters: Of the method, to find out what they change.

    Raises:
        MergeError: The method does not run with these.

    """
    has_base = method.base == "required" if base is None else base
    count = (method.least if has_base else method.most) if method.most is not None else max(_MANY, method.least)
    assert count is not None
    values: dict[str, Any] = _required(method) | parameters
    rng = np.random.default_rng(0)
    start, *models = ({"w": rng.standard_normal((4, 8), np.float32)} for _ in range(count + 1))
    values |= dict.fromkeys(method.companions, models)
    steps: list[Any] = []
    executor, _ = prepare(
        _watched(method, steps), models, start if has_base else None, None, backend="numpy", threads=1, parameters=values
    )
    executor.run()
    return Cost(tuple(_pass(step, count, has_base) for step in steps), count, has_base, len(method.companions))


def _pass(step: Any, models: int, base: bool) -> Pass:
    sources = {*range(models), -1}
    if isinstance(step, Sum):
        sources = set(step.terms(np.dtype(np.float32)).inputs)
    elif isinstance(step, Elementwise) and step.read is not None:
        sources = {*step.read, -1}
    return Pass(type(step).__name__, getattr(step, "sweeps", 1), len(sources - {-1}), base and -1 in sources)


def _watched(method: Method, steps: list[Any]) -> Method:
    """Make a method that notes its steps."""

    def run(scope: Any, **parameters: Any) -> Any:
        steps.clear()
        outcome = method(scope, **{name: value for name, value in parameters.items() if name not in method.companions})
        if method.surveys:
            return relay(outcome)
        steps.append(outcome)
        return outcome

    def relay(outcome: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        reply = None
        while True:
            try:
                steps.append(outcome.send(reply))
            except StopIteration as end:
                steps.append(end.value)
                return end.value
            reply = yield steps[-1]

    return replace(method, function=run, is_formula=False)


def _required(method: Method) -> dict[str, Any]:
    """Choose values for the parameters without a default."""
    return {p.name: REQUIRED.get(p.name, _middle(p)) for p in method.parameters.values() if p.required}


def _middle(parameter: Parameter) -> Any:
    if parameter.choices:
        return parameter.choices[0]
    if parameter.type not in (float, int, bool):
        raise MergeError(f"{parameter.name}: there is no value to try")
    low, high = (parameter.range.low, parameter.range.high) if parameter.range else (-np.inf, np.inf)
    if parameter.type is float and np.isfinite([low, high]).all():
        return (low + high) / 2
    return parameter.type(min(max(_FEW if parameter.type is int else 0.5, low), high))


def _costs(method: Method) -> list[str]:
    """Write what a method costs; nothing where it does not run with made-up values."""
    try:
        usual = cost(method, base=method.base != "unused")
        without = cost(method) if method.base == "optional" else usual
    except MergeError:
        return []
    any_number = method.most is None
    reads = _reads(usual, any_number)
    if method.base == "optional" and (other := _reads(without, any_number)) != reads:
        reads = f"{reads} with a base, {other} without"
    lines = [_step(each, usual, method, last=each is usual.passes[-1]) for each in usual.passes]
    lines += [_mode(name, value, changed, usual, any_number) for name, value, changed in _modes(method, usual)]
    few = _FEW if any_number else usual.models
    inputs = f"{few} model{'s' * (few > 1)}" + " and a base" * usual.base
    size = _BYTES * (usual.reads(few) + 1)
    if not usual.reads_all:
        given = ", ".join(f"`{name}={_quoted(value)}`" for name, value in _required(method).items())
        of = f" of {usual.models} models{f' with {given}' if given else ''}"
        return [f"Per element{of}: {reads}, and 1 write.", "\n".join(lines)]
    total = f"Per element{', for K models' * any_number}: {reads}, and 1 write."
    total += f" That is {size} bytes for {inputs} in bfloat16."
    return [total, "\n".join(lines)]


def _reads(spent: Cost, any_number: bool) -> str:
    reads = spent.formula if any_number else str(spent.reads(spent.models))
    return f"{reads} read{'s' * (reads != '1')}"


def _step(each: Pass, spent: Cost, method: Method, last: bool) -> str:
    if each.models < spent.models:
        inputs = f"{each.models} of {spent.models} models"
    else:
        inputs = "every model" if method.most is None else "the model" if each.models == 1 else "both models"
    inputs += "".join(f", and its {name}" for name in method.companions)
    if each.base:
        inputs += " and, where there is one, the base" if method.base == "optional" else " and the base"
    often = {1: "once", 2: "twice"}.get(each.sweeps, f"{each.sweeps} times")
    besides = f" {_ON_TOP[each.step]}" if each.step in _ON_TOP else ""
    kind, writes = "" if last else " (a survey)", ", and writes the result" * last
    return _item(f"`{each.step}`{kind} reads {inputs} {often}{writes}.{besides}")


def _modes(method: Method, usual: Cost) -> Iterable[tuple[str, Any, Cost]]:
    """Find the choices and flags that change what is read."""
    for parameter in method.parameters.values():
        for value in _others(parameter):
            if value == parameter.default:
                continue
            try:
                changed = cost(method, base=usual.base, **{parameter.name: value})
            except MergeError:
                continue
            if [replace(each, step="") for each in changed.passes] != [replace(each, step="") for each in usual.passes]:
                yield parameter.name, value, changed


def _others(parameter: Parameter) -> Sequence[Any]:
    """List values that may change the cost: of a number whose default is an end of its range the middle."""
    if parameter.choices or parameter.type is bool:
        return parameter.choices or (True, False)
    limits = parameter.range
    if parameter.required or parameter.type is not float or limits is None or not np.isfinite([limits.low, limits.high]).all():
        return ()
    return ((limits.low + limits.high) / 2,) if parameter.default in (limits.low, limits.high) else ()


def _mode(name: str, value: Any, changed: Cost, usual: Cost, any_number: bool) -> str:
    steps = [each.step for each in usual.passes]
    more = [each.step for each in changed.passes if each.step not in steps]
    why = f", for `{'` and `'.join(more)}`" if more else ""
    return _item(f"With `{name}={_quoted(value)}` it is {_reads(changed, any_number)}{why}.")


def _total(method: Method) -> str:
    try:
        spent = cost(method, base=method.base != "unused")
    except MergeError:
        return "?"
    reads = spent.formula if method.most is None else str(spent.reads(spent.models))
    if not spent.reads_all:
        reads += f" of {spent.models}"
    return reads + (" and linear algebra" if any(each.step == "PerMatrix" for each in spent.passes) else "")


# On a terminal


_WIDEST = 110  # longer lines are hard to read
_THEME = Theme({
    "markdown.h1": "bold underline", "markdown.h2": "bold", "markdown.code": "cyan", "markdown.item.bullet": "none"
})  # fmt: skip


class _Heading(TextElement):
    """A heading that stands on the left."""

    @classmethod
    def create(cls, markdown: Markdown, token: Any) -> "_Heading":  # noqa: ARG003
        """Begin a heading."""
        heading = cls()
        heading.style_name = f"markdown.{token.tag}"
        return heading

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Code(CodeBlock):
    """Code that is indented, without empty lines around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))


class _Screen(Markdown):
    """Markdown as it reads best on a terminal."""

    elements: ClassVar[Any] = {**Markdown.elements, "heading_open": _Heading, "fence": _Code}


# Markdown


def _facts(method: Method, links: bool) -> str:
    base = {"required": "required", "optional": "optional", "unused": "not used"}[method.base]
    facts = [f"- Base: {base}", f"- Models: {models_of(method)}"]
    if method.paper:
        name = re.sub(r"^https?://(arxiv\.org/abs/|(www\.)?)", "", method.paper)
        name = f"arXiv:{name}" if "arxiv.org/abs/" in method.paper else name
        facts.append(f"- Paper: [{name}]({method.paper})" if links else f"- Paper: {method.paper}")
    module = method.function.__module__
    if links and module.startswith(PACKAGE):
        facts.append(f"- Code: [{module.rpartition('.')[2]}.py](../../{module.replace('.', '/')}.py)")
    return "\n".join(facts)


def _linked(method: Method) -> Callable[[str], str]:
    others = packaged().keys() - {method.name}
    return lambda text: re.sub(r"(?<!`)`(\w+)`(?!`)", lambda m: _link(m[1]) if m[1] in others else m[0], _plain(text))


def _link(name: str) -> str:
    return f"[`{name}`]({name}.md)"


def _plain(text: str) -> str:
    """Turn what a docstring says into Markdown: ``code`` has one backquote there."""
    return re.sub(r"``(.+?)``", lambda m: f"`{' '.join(m[1].split())}`", text, flags=re.DOTALL)


def _entry(name: str, text: str) -> str:
    """Write an item of a list, in lines as long as those of the code."""
    if "\n\n" in text or "\n- " in text:
        return f"- {name}: {indent(text, '  ').lstrip()}"
    return _item(f"{name}: {text}" if text else name)


def _item(text: str) -> str:
    line = " ".join(text.split())
    return fill(line, 128, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _block(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _limits(limits: Between) -> str:
    if np.isinf(limits.low):
        return f"of at most {limits.high:g}"
    return f"of at least {limits.low:g}" if np.isinf(limits.high) else f"in {limits}"
