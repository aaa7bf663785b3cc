"""Merges into files: what goes into the new checkpoint, decided from headers alone, and the run that makes it.

A `FileMerge` is prepared from the arguments of `mergekit_cl.merge`, or from a recipe. Nothing has been read then but headers
and configurations, and all that they tell of has been checked. `FileMerge.describe` tells what `FileMerge.run` would do.
"""

import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from hashlib import blake2b
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from mergekit_cl.assembly import assemble, input_embedding, is_head, said_tied
from mergekit_cl.checkpoint.folder import Checkpoint
from mergekit_cl.checkpoint.reference import ModelRef, Opened, open_reference
from mergekit_cl.checkpoint.stored import DataFile, Source, Stored, is_source, numpy_dtype
from mergekit_cl.checkpoint.writer import Output, Writer
from mergekit_cl.companions import choose_tokenizer, companions_of, content, recipe_of
from mergekit_cl.errors import Faults, MergeError, listing
from mergekit_cl.execute import Advance, Nonfinite, rehearse
from mergekit_cl.globs import Globs, check_globs, chosen, globs_of
from mergekit_cl.layout import Entry, ties
from mergekit_cl.memory import Anonymous
from mergekit_cl.models import Model
from mergekit_cl.out_of_core import Job, check_memory, run
from mergekit_cl.plan import Plan, plan
from mergekit_cl.recipe import Options, Recipe, recipe_text
from mergekit_cl.registry import Method, find
from mergekit_cl.report import Report
from mergekit_cl.staging import Staged, find_device, staged_for


@dataclass(frozen=True)
class FileMerge:
    """A merge into files that has been prepared.

    ``outputs`` are the tensors of the result, in the order in which they are written; ``companions`` the files beside them: by
    their names paths to copy, or contents. ``inputs`` are the checkpoints. ``notes`` are what the user should know.
    """

    target: Path
    job: Job
    outputs: tuple[Output, ...]
    companions: Mapping[str, Path | bytes]
    metadata: Mapping[str, str]
    stem: str
    inputs: tuple[Path, ...]
    notes: tuple[str, ...]
    origin: str
    """What the recipe and the arguments say, for the fingerprint."""

    @property
    def elements(self) -> int:
        """Elements of the result."""
        return sum(prod(output.shape) for output in self.outputs)

    @property
    def written(self) -> int:
        """Bytes of the tensors of the result."""
        return sum(prod(output.shape) * numpy_dtype(output.dtype).itemsize for output in self.outputs)

    @property
    def read(self) -> int:
        """Bytes that are read from files, each counted once; those of an adapter are left out."""
        merged = [leaf for each in self.job.plans for item in each.items for leaf in item.leaves if is_source(leaf)]
        return sum(
            leaf.nbytes if isinstance(leaf, Stored) else prod(leaf.shape) * numpy_dtype(leaf.dtype).itemsize
            for leaf in (*merged, *self.job.copies.values())
        )

    def run(
        self,
        *,
        overwrite: bool = False,
        verify: bool = True,
        shard_size: int | None = 50 * 10**9,
        backend: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        nonfinite: Nonfinite = "error",
        memory: int = 512 * 10**6,
        held: int = 0,
        advance: Advance = lambda _: None,
        started: Callable[[int], None] = lambda _: None,
        verified: Callable[[int], None] = lambda _: None,
    ) -> Report:
        """Merge.

        Args:
            overwrite: Whether a checkpoint that exists already is replaced, as a whole, when the new one is complete.
            verify: Whether the result is read back and compared with the checksums of what was computed.
            shard_size: Bytes of a file of the result at most; ``None`` for one file.
            backend: "auto", "numpy" or "numba"; "triton" on a GPU.
            device: Where to compute: see `mergekit_cl.staging.find_device`.
            threads: How many threads to use; ``None`` for all processors.
            nonfinite: Whether NaN and infinities in the inputs are errors.
            memory: Bytes of memory that may be allocated.
            held: Bytes of these that the process has already.
            advance: Called with numbers of elements of the result that are there.
            started: Called with the number of tensors that an earlier run, which was stopped, has left.
            verified: Called with numbers of bytes that have been read back.

        """
        begin = time.perf_counter()
        self.check(
            memory=memory, held=held, threads=threads, backend=backend, device=device, shard_size=shard_size,
            overwrite=overwrite,
        )  # fmt: skip
        device = find_device(device)
        if staged_for(backend, device) is not None:
            backend = "triton"
        before = sum(file.bytes_read for file in self.job.files)
        try:
            with (
                Anonymous() as anonymous,
                self._writer(self._fingerprint(backend, nonfinite), shard_size, overwrite) as writer,
            ):
                started(len(writer.done))
                run(
                    self.job, writer,
                    backend=backend, device=device, threads=threads, nonfinite=nonfinite, memory=memory, held=held,
                    advance=advance,
                )  # fmt: skip
                writer.commit({} if self.single else self.companions, verify=verify, advance=verified)
                resumed = len(writer.done)
        finally:
            for file in self.job.files:
                file.close()
        return Report(
            self.target,
            len(self.outputs) - len(self.job.copies),
            len(self.job.copies),
            resumed,
            sum(file.bytes_read for file in self.job.files) - before,
            self.written,
            time.perf_counter() - begin,
            anonymous.peak,
            device,
        )

    @property
    def traffic(self) -> int:
        """Bytes of tensors that are read and written, each counted once."""
        return self.read + self.written

    def check(
        self,
        *,
        memory: int,
        threads: int | None,
        backend: str,
        device: str = "cpu",
        held: int = 0,
        shard_size: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Find out before a run whether there are memory and disk space for it, and whether the target is free."""
        faults = Faults()
        staged: Staged | None = None
        with faults:
            staged = staged_for(backend, device)
        with faults:
            check_memory(self.job, memory, threads, held, staged)
        with faults:
            self._writer("", shard_size, overwrite).check()
        faults.report()

    def describe(self) -> dict[str, Any]:
        """Tell what a run would do, in types that JSON has: what becomes of how many tensors; bytes; files."""
        rows: dict[str, list[int]] = {}
        for each in self.job.plans:
            for scope, items in each.scopes:
                given = ", ".join(f"{name.rstrip('_')}={_shown(value)}" for name, value in each.parameters_of(scope).items())
                row = rows.setdefault(f"{each.method.name}({given})", [0, 0])
                row[0] += len(items)
                row[1] += sum(prod(item.shape) for item in items)
            if each.exact:
                row = rows.setdefault("copied, equal in all models", [0, 0])
                row[0] += len(each.exact)
                row[1] += sum(prod(item.shape) for item in each.exact)
        if self.job.copies:
            rows["copied, not merged"] = [len(self.job.copies), sum(prod(source.shape) for source in self.job.copies.values())]
        return {
            "target": str(self.target),
            "tensors": [
                {"what": what, "tensors": count, "elements": elements} for what, (count, elements) in rows.items() if count
            ],
            "read": self.read,
            "written": self.written,
            "companions": [] if self.single else sorted(self.companions),
            "notes": list(self.notes),
        }

    @property
    def single(self) -> bool:
        """Whether the target is one file."""
        return self.target.suffix == ".safetensors"

    def _writer(self, fingerprint: str, shard_size: int | None, overwrite: bool) -> Writer:
        return Writer(
            self.target,
            self.outputs,
            fingerprint=fingerprint,
            metadata=self.metadata,
            shard_size=shard_size,
            stem=self.stem,
            single_file=self.single,
            overwrite=overwrite,
            inputs=self.inputs,
        )

    def _fingerprint(self, backend: str, nonfinite: str) -> str:
        """Hash everything that the bytes of the result depend on.

        The last bits of floating sums are a backend's own; so a merge on a GPU, by "triton", is another than one on the CPU.
        Which GPU it is does not matter.
        """
        files = [(str(file.path.resolve()), file.size, file.mtime_ns, file.digest) for file in self.job.files]
        plans = [
            (
                each.method.name,
                _code(each.method),
                {name: repr(value) for name, value in each.parameters.given.items()},
                [
                    [scope.seed, *([item.names, item.dtype, list(map(_identity, item.leaves))] for item in items)]
                    for scope, items in each.scopes
                ],
                [[item.names, list(map(_identity, item.leaves))] for item in each.exact],
            )
            for each in self.job.plans
        ]
        copies = [(name, _identity(source)) for name, source in self.job.copies.items()]
        beside = [(name, blake2b(content(what)).hexdigest()) for name, what in sorted(self.companions.items())]
        everything = [version("mergekit-cl"), self.origin, files, plans, copies, beside, backend, nonfinite]
        return blake2b(json.dumps(everything, default=str).encode(), digest_size=16).hexdigest()


# Preparing


def prepare_models(
    method: Method,
    models: Sequence[Model],
    base: Model | None,
    target: Path,
    *,
    labels: Sequence[str],
    parameters: Mapping[str, Any],
    out_dtype: str | None = None,
    seed: int = 0,
    only: Globs = None,
    exclude: Globs = None,
    companions: Sequence[Model] = (),
) -> FileMerge:
    """Prepare the merge that the arguments of `mergekit_cl.merge` describe.

    Args:
        method: The merge method.
        models: The opened models, of any kind.
        base: The opened base, if there is one.
        target: Path of the result: a folder, or a file if it ends in ".safetensors".
        labels: What to call the models, and the base.
        parameters: Of the method.
        out_dtype: Dtype of all floating tensors of the result.
        seed: For random masks.
        only: Globs: what is merged.
        exclude: Globs: what is not.
        companions: The opened models that are parameters of the method.

    Raises:
        MergeError: The models cannot be merged so; all problems of a kind are in one message.

    """
    inputs = [*models, *companions, *([] if base is None else [base])]
    opened = [model.origin for model in inputs if model.origin is not None]
    checkpoints = [checkpoint for each in opened for checkpoint in each.checkpoints]
    donor = inputs[-1] if base is not None else inputs[0]
    rule = chosen(only, exclude)
    faults = Faults()
    names = dict.fromkeys(name for model in inputs for name in model.layout)
    with faults:
        check_globs(only, exclude, names)
    inputs, notes = _without_tied_heads(inputs, donor, labels)
    donor = inputs[-1] if base is not None else inputs[0]
    copies = {name: leaf for name, leaf in donor.leaves.items() if not rule(name)}
    with faults:
        _check_copies(copies)
    merged = [model.restricted(rule) for model in inputs]
    with faults:
        planned = plan(
            method, merged[: len(models)], None if base is None else merged[-1], merged[0],
            companions=merged[len(models) : len(models) + len(companions)], parameters=parameters, labels=labels,
            out_dtype=out_dtype, seed=seed, names=names,
        )  # fmt: skip
        rehearse(planned)
        if planned.device != "cpu":
            raise MergeError(f"the models are on {planned.device}, but files are written from the CPU; move them there first")
    faults.report()
    recipe = None
    if len(opened) == len(inputs):
        scope = {"scope": parameters["scope"]} if "scope" in parameters else {}
        recipe = recipe_of(method, [each.label for each in opened], planned, scope, out_dtype, seed, only, exclude)
    beside = companions_of(donor.origin, _dtype_of([planned]), {}, recipe, [each.label for each in opened], method.name)
    if planned.companions and not target.suffix:
        notes += (f"there is no recipe.yml: a recipe cannot say which models are {', '.join(planned.companions)}",)
    if opened and donor.origin is None and Path(target).suffix != ".safetensors":
        notes += (
            f"the result has weights alone: {labels[-1 if base is not None else 0]} is in memory, and has no config to copy",
        )
    there = {item.name for item in planned.items} | copies.keys()
    order = [name for name in dict.fromkeys([*inputs[0].layout, *copies]) if name in there]
    return _file_merge(
        target, Job(planned.by_parameters(), copies), order, beside, donor.origin, checkpoints, notes, recipe or ""
    )


def prepare_recipe(
    recipe: Recipe,
    target: Path,
    *,
    seed: int | None = None,
    only: Globs = None,
    exclude: Globs = None,
    write_card: bool = True,
    copy_tokenizer: bool = True,
) -> FileMerge:
    """Prepare the merge that a recipe describes: open its models, and bind it to them.

    Args:
        recipe: The recipe.
        target: Path of the result: a folder, or a file if it ends in ".safetensors".
        seed: For random masks; ``None`` for that of the recipe.
        only: Globs: what is merged; ``None`` for those of the recipe.
        exclude: Globs: what is not, likewise.
        write_card: Whether the result gets a README.md with the recipe.
        copy_tokenizer: Whether it gets a tokenizer.

    Raises:
        MergeError: A model cannot be opened, or the recipe does not fit the models; all problems of a kind are in one message.

    """
    said = recipe.options
    options = Options(
        said.seed if seed is None else seed,
        tuple(globs_of("only", said.only if only is None else only)),
        tuple(globs_of("exclude", said.exclude if exclude is None else exclude)),
    )
    opened: dict[ModelRef, Opened] = {}
    faults = Faults()
    for ref in recipe.models:
        with faults:
            opened[ref] = open_reference(ref)
    faults.report()
    donor = opened[recipe.donor]
    with faults:
        check_globs(options.only, options.exclude, dict.fromkeys(name for each in opened.values() for name in each.tensors))
    with faults:
        assembly = assemble(recipe, opened, chosen(options.only, options.exclude))
    faults.report()
    if assembly.scope == "model" and len(assembly.parts) > 1:
        raise MergeError(
            'scope: with "model" all tensors need the same parameters and models; leave gradients, filters and slices away'
        )
    method = find(assembly.method)
    scope = {"scope": assembly.scope} if "scope" in method.shown else {}
    plans = []
    for part in assembly.parts:
        with faults:
            parameters = {**part.parameters, **scope}
            plans.append(_plan_of(method, part.labels, part.models, part.tensors, parameters, assembly.out_dtype, options.seed))
            rehearse(plans[-1])
    with faults:
        _check_copies(assembly.copied)
    faults.report()
    copies = cast(Mapping[str, Stored], assembly.copied)
    text = recipe_text(recipe, options)
    names = [str(ref) for ref in recipe.models]
    companions = companions_of(donor, _dtype_of(plans), assembly.config_changes, text, names, method.name)
    choose_tokenizer(companions, assembly, opened, copy_tokenizer)
    if not write_card:
        companions.pop("README.md", None)
    checkpoints = [checkpoint for each in opened.values() for checkpoint in each.checkpoints]
    return _file_merge(target, Job(tuple(plans), copies), assembly.order, companions, donor, checkpoints, assembly.notes, text)


def _without_tied_heads(inputs: Sequence[Model], donor: Model, labels: Sequence[str]) -> tuple[list[Model], tuple[str, ...]]:
    """Leave out output heads that are the input embedding, as the donor's config has it; else let the embedding stand in."""
    heads = dict.fromkeys(name for model in inputs for name in model.layout if is_head(name))
    if all(model.origin is None for model in inputs):
        return list(inputs), ()  # tied or not as their memory is
    result, notes = list(inputs), []
    for name in heads:
        tied = _is_tied(donor, name)
        if tied or (tied is None and name not in donor.layout):
            result = [model.restricted(lambda other, head=name: other != head) for model in result]  # type: ignore[misc]
            notes.append(f'"{name}" is left out: the result has its input embedding for it, as its config says')
            continue
        shape = next(model.layout[name].shape for model in result if name in model.layout)
        for index, model in enumerate(result):
            if name in model.layout or _is_tied(model, name) is False:
                continue
            if (entry := input_embedding(model.layout, shape)) is not None:
                layout = {**model.layout, name: replace(entry, name=name)}
                result[index] = replace(model, layout=layout, leaves={**model.leaves, name: model.leaves[entry.name]})
                notes.append(f'{labels[index]}: its input embedding stands in for "{name}", which is tied to it')
    return result, tuple(notes)


def _is_tied(model: Model, head: str) -> bool | None:
    """Whether a head is the input embedding: by the config of a model on disk, by the memory of another; None if unknown."""
    if model.origin is not None:
        return said_tied(model.origin.config)
    return len(ties(model.layout)[head]) > 1 if head in model.layout else None


def _check_copies(copies: Mapping[str, Any]) -> None:
    """Refuse what is not copied as bytes: tensors with an adapter to be applied, tensors in memory."""
    problems = [
        f'"{name}": is left out of the merge, so it would be copied byte for byte, but it '
        f"{'has an adapter to be applied' if is_source(leaf) else 'is in memory'}; merge it too, or pass files"
        for name, leaf in copies.items()
        if not isinstance(leaf, Stored)
    ]
    if problems:
        raise MergeError(listing(problems))


def _plan_of(
    method: Method,
    labels: Sequence[str],
    count: int,
    tensors: Mapping[str, tuple[Source, ...]],
    parameters: Mapping[str, Any],
    out_dtype: str | None,
    seed: int,
) -> Plan:
    """Plan the merge of some tensors of a recipe."""
    models = []
    for column in range(len(labels)):
        leaves = {name: sources[column] for name, sources in tensors.items()}
        models.append(Model({name: Entry(name, leaf.shape, leaf.dtype) for name, leaf in leaves.items()}, leaves, dict))
    base = models[count] if count < len(models) else None
    return plan(method, models[:count], base, models[0], parameters=parameters, labels=labels, out_dtype=out_dtype, seed=seed)


def _dtype_of(plans: Sequence[Plan]) -> str | None:
    """Name the dtype of the floating tensors of the result, if all that are merged have the same."""
    dtypes = {item.dtype for each in plans for _, items in each.scopes for item in items}
    return dtypes.pop() if len(dtypes) == 1 else None


def _file_merge(
    target: Path,
    job: Job,
    order: Sequence[str],
    companions: Mapping[str, Path | bytes],
    donor: Opened | None,
    checkpoints: Sequence[Checkpoint],
    notes: tuple[str, ...],
    origin: str,
) -> FileMerge:
    entries = {item.name: Output(item.name, item.shape, item.dtype) for each in job.plans for item in each.items}
    entries |= {name: Output(name, source.shape, source.stored_dtype) for name, source in job.copies.items()}
    like = None if donor is None else donor.checkpoint
    return FileMerge(
        Path(target),
        job,
        tuple(entries[name] for name in order),
        companions,
        {"format": "pt", **({} if like is None else like.metadata)},
        like.stem if like is not None and like.is_folder else "model",
        tuple(checkpoint.path for checkpoint in checkpoints),
        notes,
        origin,
    )


# Small things


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]" if len(set(value)) > 1 else _shown(value[0])
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(method: Method) -> str:
    """Identify what a method of the user's own does; ours are those of this version."""
    if method.function.__module__.startswith("mergekit_cl.merge_methods."):
        return ""
    try:
        return inspect.getsource(method.function)
    except (OSError, TypeError):
        return os.urandom(8).hex()  # not the same twice, so never resumed


def _identity(leaf: Any) -> Any:
    """Say what a tensor is read from. What is in memory is never the same twice."""
    if isinstance(leaf, Stored):
        return [str(leaf.file.path), leaf.offset, leaf.stored_dtype, leaf.shape]
    if isinstance(leaf, DataFile):
        return str(leaf.path)
    if isinstance(leaf, np.ndarray) or not is_dataclass(leaf):
        return repr(leaf) if isinstance(leaf, str | int | float | bool | tuple | None) else os.urandom(8).hex()
    return [type(leaf).__name__, *(_identity(getattr(leaf, part.name)) for part in fields(leaf) if part.compare and part.repr)]
