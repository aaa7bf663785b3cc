"""The command line: ``mergekit-cl merge``, ``run``, ``verify``, ``methods`` and ``demo``.

What is slow to import is imported by the command that needs it, so that ``--help`` is quick. Exit codes: 0 done, 1 an error
that the message explains, 2 wrong usage, 3 an error of this program, 130 interrupted.
"""

import json
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from mergekit_cl import __version__
from mergekit_cl.api import ADAPTER_METHODS
from mergekit_cl.errors import Faults, MergeError, NonFiniteError, listing
from mergekit_cl.registry import Method, find
from mergekit_cl.registry import methods as registered

if TYPE_CHECKING:
    from mergekit_cl.adapter_merge import AdapterMerge
    from mergekit_cl.file_merge import FileMerge
    from mergekit_cl.report import Report


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of click, or of the copy of it that newer typers bring


class _Group(TyperGroup):
    """Commands whose errors are readable lines on standard error (and JSON, with ``--json``), without a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note what decides how errors are shown, as the command may not come to be parsed."""
        ctx.meta["json"], ctx.meta["debug"] = "--json" in args, "--debug" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""

        def fail(code: int, error: BaseException, text: str) -> NoReturn:
            if ctx.meta["json"]:
                typer.echo(json.dumps({"error": {"kind": type(error).__name__, "message": text}}))
            if code == 2 or (code == 1 and ctx.meta["debug"]):
                raise error
            if ctx.meta["debug"]:
                traceback.print_exception(error)
            typer.echo(text if code == 130 else f"error: {text}", err=True)
            raise typer.Exit(code) from None

        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except _UsageError as error:
            fail(2, error, error.format_message())  # type: ignore[attr-defined]
        except (MergeError, OSError, MemoryError) as error:
            fail(1, error, str(error) or type(error).__name__)
        except KeyboardInterrupt as error:
            fail(130, error, str(error) or "interrupted")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            fail(3, error, f"this should not have happened: {what}; --debug shows where, please report it")


def _flag(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:  # noqa: A002
    """Make an option without a value; its help has no column for the type."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar="", show_default=False, **more)


Debug = Annotated[bool, _flag("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, _flag("--json", help="Print what was done, or what is wrong, as JSON.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that the whole process may take, such as 2GiB; 512MB by default, 2GB with a GPU.",
        rich_help_panel="Resources",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu; cuda, or cuda:1 and so on, of ROCm too; auto, a GPU if there is one.",
        rich_help_panel="Resources",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "-j", "--threads", "--num-threads", min=1, help="Threads; all processors by default.", rich_help_panel="Resources"
    ),
]
Backend = Annotated[
    str, typer.Option(help="auto, numba or numpy, or triton on a GPU; the result is the same.", rich_help_panel="Resources")
]
ShardSize = Annotated[
    str,
    typer.Option("--out-shard-size", metavar="SIZE", help="Bytes of a file of the result, at most.", rich_help_panel="Output"),
]
Overwrite = Annotated[
    bool,
    _flag("--overwrite", help="Replace what is at the target, as a whole, once the result is complete.", panel="Output"),
]
Verify = Annotated[
    bool,
    _flag("--verify/--no-verify", help="Read the result back and compare it with its checksums; the default.", panel="Output"),
]
DryRun = Annotated[
    bool, _flag("--dry-run", help="Check everything that headers tell, print the plan, and stop.", panel="Output")
]
Quiet = Annotated[bool, _flag("--quiet/--no-quiet", "-q", help="No progress bar, no notes, no summary.", panel="Output")]
AllowNonfinite = Annotated[bool, _flag("--allow-nonfinite", help="Let NaN and infinities through.", panel="Output")]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Merge only these tensors, and copy the others from the base or the first model."),
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Copy these tensors instead of merging them.")]


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
    version: Annotated[bool, _flag("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
    debug: Debug = False,
) -> None:
    """Merge the weights of models, trained or still training."""


@app.command(epilog="For example: mergekit-cl merge CODER WRITER -m ties --base BASE -p density=0.2 -p weight=0.6,0.4 -o OUT")
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders, .safetensors files, or ids on the Hugging Face Hub; path@revision+lora applies an adapter.",
        ),
    ],
    method: Annotated[str, typer.Option("-m", "--method", help="See mergekit-cl methods; cat or svd for LoRA adapters.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder, or a new .safetensors file.")],
    base: Annotated[str | None, typer.Option(help="The model that the others were fine-tuned from.")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="[FILTER:]NAME=VALUE",
            help="A parameter of the method; weight=0.5,0.3 has one for each model, '*mlp*:density=0.3' one for some tensors.",
        ),
    ] = None,
    only: Only = None,
    exclude: Exclude = None,
    out_dtype: Annotated[str | None, typer.Option(help="Dtype of all floating tensors of the result.")] = None,
    seed: Annotated[int, typer.Option(help="For methods with random masks.")] = 0,
    device: Device = "cpu",
    memory: Memory = None,
    threads: Threads = None,
    backend: Backend = "auto",
    out_shard_size: ShardSize = "50GB",
    overwrite: Overwrite = False,
    verify: Verify = True,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge models into a new checkpoint."""
    from mergekit_cl.api import prepare_files

    def prepare() -> "FileMerge | AdapterMerge":
        return prepare_files(
            models,
            method,
            base=base,
            out=out,
            device=device,
            out_dtype=out_dtype,
            seed=seed,
            only=only,
            exclude=exclude,
            parameters=_parameters_of(parameter),
        )

    _carry_out(
        prepare, device=device, memory=memory, threads=threads, backend=backend, shard_size=out_shard_size, overwrite=overwrite,
        verify=verify, dry_run=dry_run, allow_nonfinite=allow_nonfinite, quiet=quiet, as_json=as_json,
    )  # fmt: skip


_IGNORED = {
    "--allow-crimes": "models need the same tensors, whatever their architectures are called",
    "--lora-merge-cache": "adapters are applied while the tensors are read, nothing is cached",
    "--lora-merge-dtype": "adapters are applied in float32",
    "--low-cpu-memory": "--memory is the limit",
    "--clone-tensors": "a layer that is used twice is written twice",
    "--trust-remote-code": "no code of a model is run",
    "--lazy-unpickle": "pickles are never opened",
    "--read-to-gpu": "files are read into memory from which a GPU copies by itself",
    "--multi-gpu": "one GPU is used",
    "--gpu-rich": "--device cuda is what it takes",
    "--async-write": "reading, computing and writing always go on side by side",
    "--write-threads": "reading, computing and writing always go on side by side",
    "--verbose": "--debug shows tracebacks",
}
"""Options of mergekit-yaml that mean nothing here, and why."""


def _without_meaning(*names: str) -> Any:
    """Make an option of mergekit-yaml that is accepted."""
    return typer.Option(*names, help=f"Accepted: {_IGNORED[names[0].split('/')[0]]}.", hidden=True)


@app.command(epilog=f"Options of mergekit-yaml that are accepted but mean nothing here: {', '.join(_IGNORED)}.")
def run(
    ctx: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe of mergekit, YAML.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a new .safetensors file.")],
    only: Only = None,
    exclude: Exclude = None,
    seed: Annotated[int | None, typer.Option("--seed", "--random-seed", help="For methods with random masks.")] = None,
    device: Device = "cpu",
    memory: Memory = None,
    threads: Threads = None,
    backend: Backend = "auto",
    out_shard_size: ShardSize = "50GB",
    copy_tokenizer: Annotated[
        bool, _flag("--copy-tokenizer/--no-copy-tokenizer", help="Copy the tokenizer; the default.", panel="Output")
    ] = True,
    write_model_card: Annotated[
        bool,
        _flag(
            "--write-model-card/--no-write-model-card",
            help="Write a README.md with the recipe; the default.",
            panel="Output",
        ),
    ] = True,
    overwrite: Overwrite = False,
    verify: Verify = True,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
    transformers_cache: Annotated[
        Path | None, typer.Option(help="Folder of the Hugging Face Hub's cache.", rich_help_panel="Resources")
    ] = None,
    safe_serialization: Annotated[bool, typer.Option("--safe-serialization/--no-safe-serialization", hidden=True)] = True,
    unsafe_truncate_embeddings: Annotated[
        bool, typer.Option("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings", hidden=True)
    ] = False,
    allow_crimes: Annotated[bool, _without_meaning("--allow-crimes/--no-allow-crimes")] = False,
    lora_merge_cache: Annotated[str | None, _without_meaning("--lora-merge-cache")] = None,
    lora_merge_dtype: Annotated[str | None, _without_meaning("--lora-merge-dtype")] = None,
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda", help="The same as --device cuda.", hidden=True)] = False,
    low_cpu_memory: Annotated[bool, _without_meaning("--low-cpu-memory/--no-low-cpu-memory")] = False,
    clone_tensors: Annotated[bool, _without_meaning("--clone-tensors/--no-clone-tensors")] = False,
    trust_remote_code: Annotated[bool, _without_meaning("--trust-remote-code/--no-trust-remote-code")] = False,
    lazy_unpickle: Annotated[bool, _without_meaning("--lazy-unpickle/--no-lazy-unpickle")] = False,
    read_to_gpu: Annotated[bool, _without_meaning("--read-to-gpu/--no-read-to-gpu")] = False,
    multi_gpu: Annotated[bool, _without_meaning("--multi-gpu/--no-multi-gpu")] = False,
    gpu_rich: Annotated[bool, _without_meaning("--gpu-rich")] = False,
    async_write: Annotated[bool, _without_meaning("--async-write/--no-async-write")] = False,
    write_threads: Annotated[int | None, _without_meaning("--write-threads")] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, hidden=True)] = 0,
) -> None:
    """Merge as a recipe of mergekit says."""
    if not safe_serialization:
        raise MergeError("--no-safe-serialization: pickles are not written; leave it away")
    if unsafe_truncate_embeddings:
        raise MergeError(
            "--unsafe-truncate-embeddings: embeddings are not cut; make the vocabularies of the models equal first"
        )
    if transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = str(transformers_cache)
    from mergekit_cl.file_merge import prepare_recipe
    from mergekit_cl.recipe import read_recipe

    def prepare() -> "FileMerge":
        return prepare_recipe(
            read_recipe(recipe),
            out,
            seed=seed,
            only=only,
            exclude=exclude,
            write_card=write_model_card,
            copy_tokenizer=copy_tokenizer,
        )

    given = {f"--{name.replace('_', '-')}" for name, value in ctx.params.items() if value}
    notes = [f"{name} has no meaning here: {why}" for name, why in _IGNORED.items() if name in given]
    _carry_out(
        prepare, device="cuda" if cuda and device == "cpu" else device, memory=memory, threads=threads, backend=backend,
        shard_size=out_shard_size, overwrite=overwrite, verify=verify, dry_run=dry_run, allow_nonfinite=allow_nonfinite,
        quiet=quiet, as_json=as_json, notes=notes,
    )  # fmt: skip


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder or file that mergekit-cl has written.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read a merged checkpoint, and compare every tensor with its checksum."""
    from mergekit_cl.checkpoint.verify import verify as verify_checkpoint
    from mergekit_cl.memory import shown_size

    read = checkpoint.glob("*.safetensors") if checkpoint.is_dir() else [checkpoint]
    total = sum(file.stat().st_size for file in read if file.exists())
    with _progress("reading", total, hidden=as_json) as advance:
        report = verify_checkpoint(checkpoint, advance)
    if as_json:
        typer.echo(
            json.dumps({"verified": str(checkpoint), "files": report.files, "tensors": report.tensors, "bytes": report.bytes})
        )
    else:
        files = f"{report.files} file{'s' * (report.files != 1)}"
        typer.echo(f"{checkpoint}: {report.tensors} tensors in {files}, {shown_size(report.bytes)}: as they were written")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the weights.")] = Path("demo-results"),
    seed: Annotated[int, typer.Option(min=0, help="Decides data split, first weights and batches.")] = 0,
    quick: Annotated[bool, _flag("--quick", help="A few steps for each task, to see that it works.")] = False,
) -> None:
    """Watch SFA keep old tasks while new ones are learned, on real digits; then merge with every method."""
    from mergekit_cl.demo import run_demo

    run_demo(out, seed=seed, quick=quick)


# What merge and run share


def _carry_out(
    prepare: "Callable[[], FileMerge | AdapterMerge]",
    *,
    device: str,
    memory: str | None,
    threads: int | None,
    backend: str,
    shard_size: str,
    overwrite: bool,
    verify: bool,
    dry_run: bool,
    allow_nonfinite: bool,
    quiet: bool,
    as_json: bool,
    notes: list[str] | None = None,
) -> None:
    """Merge, or only tell what would be done."""
    from mergekit_cl.memory import anonymous_memory, parse_size
    from mergekit_cl.staging import default_memory, find_device

    faults = Faults()
    with faults:
        device = find_device(device)
    with faults:
        limit = parse_size(default_memory(device) if memory is None else memory, "--memory")
    with faults:
        size = parse_size(re.sub(r"(?<=\d)\s*[bB]\s*$", "GB", shard_size), "--out-shard-size")  # 5B: mergekit's billions
    with faults:
        prepared = prepare()
    faults.report()
    held = anonymous_memory() or 0
    every_note = [*prepared.notes, *(notes or [])]
    if not quiet:
        for note in every_note:
            typer.echo(f"note: {note}", err=True)
    if dry_run:
        prepared.check(
            memory=limit, held=held, threads=threads, backend=backend, device=device, shard_size=size, overwrite=overwrite
        )
        _show_plan({**prepared.describe(), "device": device}, as_json)
        return
    try:
        total = prepared.traffic + (prepared.written if verify else 0)
        with _progress("merging", total, hidden=quiet or as_json) as advance:
            width = prepared.traffic / max(prepared.elements, 1)  # bytes that an element stands for
            report = prepared.run(
                overwrite=overwrite, verify=verify, shard_size=size, backend=backend, device=device, threads=threads,
                memory=limit, held=held, nonfinite="allow" if allow_nonfinite else "error",
                advance=lambda done: advance(done * width), verified=advance,
                started=lambda tensors: None if quiet or not tensors else typer.echo(
                    f"note: {tensors} of the tensors are there already, by an earlier run that was stopped", err=True
                ),
            )  # fmt: skip
    except NonFiniteError as error:
        advice = "repair or leave out what is not finite, or pass --allow-nonfinite to merge it as it is"
        raise NonFiniteError(f"{error}\n{advice}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; the target is as it was, and what is done is kept beside it: the same command goes on from there"
        ) from None
    if as_json:
        facts = {**vars(report), "target": str(report.target), "verified": verify, "notes": every_note}
        typer.echo(json.dumps(facts))
    elif not quiet:
        typer.echo(_summary(report, verify))


def _summary(report: "Report", verified: bool) -> str:
    from mergekit_cl.memory import shown_size

    rate = (report.read + report.written) / max(report.seconds, 1e-9)
    parts = [f"{report.merged} tensors merged", *([f"{report.copied} copied"] if report.copied else [])]
    if report.resumed:
        parts.append(f"{report.resumed} of them by an earlier run")
    peak = "" if report.peak is None else f", at most {shown_size(report.peak)} of memory"
    device = "" if report.device == "cpu" else f" on {report.device}"
    return (
        f"{report.target}: {', '.join(parts)}{', verified' if verified else ''}\n"
        f"read {shown_size(report.read)}, wrote {shown_size(report.written)} in {report.seconds:.1f} s "
        f"({shown_size(rate)}/s){device}{peak}"
    )


def _show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """Print what would be done."""
    if as_json:
        typer.echo(json.dumps(plan))
        return
    from mergekit_cl.memory import shown_size

    table = Table("what", Column("tensors", justify="right"), Column("elements", justify="right"))
    for row in plan["tensors"]:
        table.add_row(Text(row["what"]), f"{row['tensors']:,}", f"{row['elements']:,}")
    Console().print(table)
    typer.echo(f"to read   {shown_size(plan['read'])}")
    if "written" in plan:
        typer.echo(f"to write  {shown_size(plan['written'])} to {plan['target']}")
        typer.echo(f"beside    {', '.join(plan['companions']) or 'nothing'}")
    if plan["device"] != "cpu":
        typer.echo(f"to compute on {plan['device']}")
    typer.echo("nothing was written (--dry-run)")


@contextmanager
def _progress(doing: str, total: int, hidden: bool) -> Iterator[Callable[[float], None]]:
    """Show a progress bar with throughput and time left, on a terminal; yield what advances it, by bytes."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=hidden or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(doing, total=total)

        def advance(done: float) -> None:
            bar.update(task, advance=done)
            if bar.tasks[0].completed > total - 1:  # what is left is to make it durable, and to read it back
                bar.update(task, description="finishing")

        yield advance


def _parameters_of(given: list[str] | None) -> dict[str, Any]:
    """Read name=value, and filter:name=value for the tensors that a filter matches; the other tensors have the plain value."""
    plain: dict[str, Any] = {}
    filtered: dict[str, list[dict[str, Any]]] = {}
    problems = []
    for each in given or []:
        left, _, text = (part.strip() for part in each.partition("="))
        pattern, colon, name = (part.strip() for part in left.rpartition(":"))
        name += "_" * iskeyword(name)  # lambda
        try:
            if not name or bool(colon) != bool(pattern):
                raise MergeError(_FORM)
            value = _values(text)
            if colon:
                filtered.setdefault(name, []).append({"filter": pattern, "value": value})
            elif name in plain:
                raise MergeError(f"{name} is given twice; a list of values has commas")
            else:
                plain[name] = value
        except MergeError as error:
            problems.append(f"-p {each}: {error}")
    for name, entries in filtered.items():
        rest = plain.get(name)
        if isinstance(rest, dict) or (isinstance(rest, list) and any(isinstance(item, dict | list) for item in rest)):
            problems.append(f"-p {entries[0]['filter']}:{name}=...: {name} has filters in JSON too; give all in one way")
        plain[name] = [*entries, *([{"filter": "*", "value": rest}] if name in plain else [])]
    if problems:
        raise MergeError(listing(problems))
    return plain


_FORM = "must be name=value, such as -p density=0.2 or -p weight=0.5,0.3, or filter:name=value, such as -p '*mlp*:density=0.3'"


def _values(text: str) -> Any:
    """Read a value: numbers, true and false, none, words; a list has commas; what begins with a bracket is JSON."""
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MergeError(f"is not JSON: {error}") from None
    values = [part.strip() for part in text.split(",")]
    if not all(values):
        raise MergeError(_FORM)
    return [_value(value) for value in values] if len(values) > 1 else _value(values[0])


def _value(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:  # YAML takes 1e-5 for a word
        return float(text) if re.search(r"[.eE]", text) else int(text)
    except ValueError:
        return text


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the whole documentation of this method.")] = None,
) -> None:
    """List the merge methods, or document one."""
    console = Console()
    if name is None:
        console.print(methods_table(console), soft_wrap=not console.is_terminal)
    elif name in ADAPTER_METHODS:
        console.print(ADAPTER_METHODS[name], highlight=False, soft_wrap=not console.is_terminal)
    else:
        from mergekit_cl.pages import page, show

        if console.is_terminal:
            show(find(name), console)
        else:
            typer.echo(page(find(name), links=False), nl=False)


_GROUPS = {
    "unused": "Of models alone",
    "optional": "Of models, or of their differences from a base",
    "required": "Of what models have learned since their base",
}


def methods_table(console: Console) -> RenderableType:
    """Lay out a list of all registered methods: by what they need on a terminal, in plain lines elsewhere."""
    colours = console.color_system is not None and not console.no_color

    def summary(method: Method) -> Text:
        return _code(method.summary) if colours else Text(method.summary.replace("``", "`"))

    known = registered().values()
    widest = max(len(method.name) for method in known)
    if not console.is_terminal:
        return Text("\n").join(
            Text(f"{method.name:{widest}}  {summary(method)} (base {method.base}, models {_models(method)})")
            for method in known
        )
    tables: list[RenderableType] = []
    for base, title in _GROUPS.items():
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(width=widest, style="bold")
        table.add_column(ratio=1)
        table.add_column(justify="right", width=4, style="dim")
        for method in known:
            if method.base == base:
                table.add_row(method.name, summary(method), _models(method))
        tables += [Text(f"{title} (base: {base})", style="bold underline"), table, ""]
    return Group(
        *tables,
        Text("The last column is the number of models. A method's page: mergekit-cl methods NAME"),
        Text("Of LoRA adapters on disk: cat, svd"),
    )


def _models(method: Method) -> str:
    """Say how many models a method merges, in a few characters: 1, 2+, 1-2."""
    if method.least == method.most:
        return str(method.least)
    return f"{method.least}+" if method.most is None else f"{method.least}-{method.most}"


def _code(line: str) -> Text:
    """Show ````code```` and ```names``` of a line of a docstring in colour, without the backquotes."""
    text = Text()
    for index, part in enumerate(re.split(r"``(.+?)``|`(.+?)`", line)):
        text.append(part or "", style="cyan" if index % 3 else "")
    return text
