"""``merge()``: open, plan, execute, hand back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mergekit_cl import kernels
from mergekit_cl.dtypes import EXACT, output_dtype
from mergekit_cl.errors import Faults, MergeError, MismatchError, NonFiniteError, listing, unknown
from mergekit_cl.execute import Advance, Executor
from mergekit_cl.filters import Parameters
from mergekit_cl.globs import Globs, check_globs
from mergekit_cl.globs import chosen as chosen_names
from mergekit_cl.memory import parse_size
from mergekit_cl.models import Leaf, Model, copied, open_model, tensor
from mergekit_cl.plan import placement_problems, plan
from mergekit_cl.registry import Method, find
from mergekit_cl.staging import default_memory, find_device

if TYPE_CHECKING:
    from mergekit_cl.adapter_merge import AdapterMerge
    from mergekit_cl.file_merge import FileMerge

ADAPTER_METHODS = {
    "cat": """cat

Merge LoRA adapters of one base into one whose change is the weighted sum of theirs, exactly: factors are stacked, and the rank
of a module is the sum of the ranks.

Parameters
  weight=1.0 (per model): the changes add up; weight=0.5 averages two.""",
    "svd": """svd

Merge LoRA adapters of one base into one whose change is as close to the weighted sum of theirs as a rank allows (Eckart and
Young, 1936), computed from the factors alone.

Parameters
  weight=1.0 (per model): the changes add up; weight=0.5 averages two.
  rank: of each module at most; by default the largest of the adapters' ranks.""",
}
"""The ways to merge LoRA adapters of one base into one adapter, and what is known about them."""


def merge(
    models: Sequence[Any],
    method: str = "sfa",
    *,
    base: Any = None,
    out: Any = None,
    backend: str = "auto",
    device: Any = None,
    out_dtype: Any = None,
    nonfinite: Literal["error", "allow"] = "error",
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
    only: Globs = None,
    exclude: Globs = None,
    memory: int | str | None = None,
    shard_size: int | str = "50GB",
    overwrite: bool = False,
    verify: bool = True,
    **parameters: Any,
) -> Any:
    """Merge models into one.

    A model is an array (NumPy, PyTorch, JAX), a mapping from names to arrays, a ``torch.nn.Module``, a JAX pytree such as
    Flax parameters or an ``nnx.State``; or the path of a checkpoint: a safetensors file, or a folder as transformers writes it
    (or its id on the Hugging Face Hub). All models have the same tensors: names, shapes, and whether they are floating.
    Floating tensors are merged in float32 (float64 where one of them is) and rounded once. Integers and booleans are copied
    where all models agree. Tensors that are tied in every model are merged once and stay tied.

    Args:
        models: The models, in the order that the method gives a meaning to (sfa: oldest first).
        method: Name of a merge method; `mergekit_cl.methods` lists them.
        base: The model that the others were fine-tuned from, for methods that have a use for it.
        out: Where to write the result: a model of any kind that can be written; it may be one of ``models``, or the base. Or
            the path of a new checkpoint: a folder, or a file that ends in ".safetensors". Then no model need fit into memory,
            and the complete, verified checkpoint is there at the end, or nothing is; a merge that was killed goes on where it
            stopped when it is called again.
        backend: "numpy", "numba", "triton", or "auto": numba on a CPU, triton on a GPU. All give the same bits.
        device: Where a merge into a checkpoint is computed: "cpu", by default; "cuda", or a GPU with its number, "cuda:1" (of
            ROCm too); "auto", a GPU if there is one. No model need fit into its memory: they go through it, side by side with
            reading and writing. Models in memory are merged where they are.
        out_dtype: The dtype of all floating results: a name ("bfloat16"), or a dtype of any framework. Without it every
            result has the dtype that its tensor has in the first model (or in ``out``).
        nonfinite: "error" refuses NaN and infinities in what is read, and results that overflow their dtype. "allow" merges
            them like any number, whatever comes of it.
        seed: For methods with random masks: an integer.
        threads: Threads on the CPU; all processors by default. The result does not depend on it.
        progress: Whether to show a progress bar.
        only: Globs on the names of tensors (``*`` also matches dots): what is merged. The rest is copied from the base, or from
            the first model.
        exclude: Globs: what is not merged.
        memory: Bytes that a merge into a checkpoint may allocate, beside what the process has: a number, "512MB", "2GiB". By
            default "512MB", and "2GB" for a GPU, which does not count what PyTorch and the driver take for themselves.
        shard_size: Bytes of a file of a checkpoint, at most.
        overwrite: Whether a checkpoint that exists is replaced, as a whole, once the new one is complete.
        verify: Whether a new checkpoint is read back and compared with the checksums of what was computed.
        **parameters: The method's own parameters. A per-model parameter is a number, or a list with one for each model. Any
            parameter may be a list of ``{"filter": ..., "value": ...}``, of which the first whose filter matches the name of a
            tensor counts: a glob (``*`` also matches dots), or, without ``*``, ``?`` and ``[``, a part of the name. In the list
            of a per-model parameter a model may have such a list of its own. Tensors that none matches have the default.

    Returns:
        The result, of the kind of the first model and on its device (a dictionary of NumPy arrays where that is a checkpoint);
        or ``out``: the model that was written in place, or the path. The models are never changed (unless they are ``out``).

    Raises:
        UnknownNameError: No such method, parameter, backend or dtype.
        MismatchError: The models do not have the same tensors, or are on different devices.
        NonFiniteError: NaN or Inf in an input, or an overflow; nothing was written into ``out``.
        BackendError: The backend is not installed, or does not reach the tensors.
        CheckpointError: A file is damaged or missing, or cannot be written. Nothing is at the path of ``out`` then.
        MergeError: Anything else that is wrong with the input; the base of all of these.

    >>> merge([{"w": np.float32([0, 4])}, {"w": np.float32([2, 4])}], method="sfa", beta=0.25)
    {'w': array([1.5, 4. ], dtype=float32)}

    """
    if isinstance(out, str | Path):
        device = find_device(device)
        writing = prepare_files(
            models,
            method,
            base=base,
            out=out,
            device=device,
            out_dtype=out_dtype,
            seed=seed,
            only=only,
            exclude=exclude,
            parameters=parameters,
        )
        _check_options(backend, nonfinite, threads)
        with _progress_bar(writing.elements, method) if progress else nullcontext(lambda _: None) as advance, _advised():
            writing.run(
                overwrite=overwrite, verify=verify, shard_size=parse_size(shard_size, "shard_size"), backend=backend,
                device=device, threads=threads, nonfinite=nonfinite,
                memory=parse_size(default_memory(device) if memory is None else memory, "memory"), advance=advance,
            )  # fmt: skip
        return out
    if method in ADAPTER_METHODS:
        raise MergeError(f"{method} merges adapters on disk into a new one; pass out= the path of a folder")
    executor, target, kept = _prepare(
        find(method), models, base, out,
        backend=backend, out_dtype=out_dtype, nonfinite=nonfinite, seed=seed, threads=threads, parameters=parameters,
        only=only, exclude=exclude, device=device,
    )  # fmt: skip
    with _progress_bar(executor.elements, method) if progress else nullcontext(lambda _: None) as advance, _advised():
        merged = executor.run(advance)
    merged |= {name: copied(leaf, target.leaves[name], in_place=executor.plan.in_place) for name, leaf in kept.items()}
    return target.rebuild(merged) if out is None else out


def prepare_files(
    models: Sequence[Any],
    method: str = "sfa",
    *,
    base: Any = None,
    out: str | Path,
    device: str = "cpu",
    out_dtype: Any = None,
    seed: int = 0,
    only: Globs = None,
    exclude: Globs = None,
    parameters: Mapping[str, Any],
) -> "FileMerge | AdapterMerge":
    """Prepare a merge into files from arguments of `merge`: read headers, and find what is wrong. Nothing is written."""
    from mergekit_cl.adapter_merge import prepare_adapters
    from mergekit_cl.file_merge import prepare_models

    _check_list(models)
    if method in ADAPTER_METHODS:
        given = {"base": base, "only": only, "exclude": exclude, "device": None if device == "cpu" else device}
        for name in [name for name, value in given.items() if value is not None]:
            raise MergeError(f"{method} merges adapters of one base into an adapter, as a whole; leave {name}= away")
        dtype = None if out_dtype is None else output_dtype(out_dtype)
        return prepare_adapters(models, method, Path(out), parameters=parameters, out_dtype=dtype)
    faults = Faults()
    chosen, dtype, opened = None, None, None
    with faults:
        _check_seed(seed)
    with faults:
        dtype = None if out_dtype is None else output_dtype(out_dtype)
    companions: Mapping[str, Any] = {}
    with faults:
        chosen = find(method)
    if chosen is not None and chosen.companions:
        with faults:
            companions, parameters = companions_of(chosen, len(models), parameters)
        faults.report()  # the rest would be about models that are missing
    if chosen is not None:
        with faults:
            Parameters(chosen, {name: value for name, value in parameters.items() if name != "scope"}, len(models))
    with faults:
        opened = _open(models, base, None, companions)
    if chosen is not None:
        with faults:
            _check_counts(chosen, models, base)
            if opened is not None:
                inputs, opened_base, labels = opened
                prepared = prepare_models(
                    chosen, inputs[: len(models)], opened_base, Path(out), companions=inputs[len(models) :],
                    labels=labels, parameters=parameters, out_dtype=dtype, seed=seed, only=only, exclude=exclude,
                )  # fmt: skip
    faults.report()
    return prepared


def prepare(
    method: Method,
    models: Sequence[Any],
    base: Any,
    out: Any,
    *,
    backend: str = "auto",
    out_dtype: Any = None,
    nonfinite: Any = "error",
    seed: int = 0,
    threads: int | None = None,
    parameters: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    constant: frozenset[int] = frozenset(),
    others: Sequence[str] = (),
) -> tuple[Executor, Model]:
    """Open the models, plan the merge, bind it to a backend; also return the model that takes the result.

    Arguments are those of `merge`; ``labels`` name the models and the base in messages, ``constant`` is for `Executor`, and
    ``others`` are names that the filter of a parameter may match, beside those of the models.
    """
    executor, target, _ = _prepare(
        method, models, base, out, backend=backend, out_dtype=out_dtype, nonfinite=nonfinite, seed=seed, threads=threads,
        parameters=parameters, labels=labels, constant=constant, others=others,
    )  # fmt: skip
    return executor, target


def _prepare(
    method: Method,
    models: Sequence[Any],
    base: Any,
    out: Any,
    *,
    backend: str,
    out_dtype: Any,
    nonfinite: Any,
    seed: int,
    threads: int | None,
    parameters: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    constant: frozenset[int] = frozenset(),
    others: Sequence[str] = (),
    only: Globs = None,
    exclude: Globs = None,
    device: Any = None,
) -> tuple[Executor, Model, dict[str, Leaf]]:
    """As `prepare`; also return what is not merged but copied."""
    _check_counts(method, models, base)
    _check_options(backend, nonfinite, threads)
    _check_seed(seed)
    dtype = None if out_dtype is None else output_dtype(out_dtype)
    companions, parameters = companions_of(method, len(models), parameters)
    opened, opened_base, names = _open(models, base, labels, companions)
    target = opened[0]
    if out is not None:
        target = open_model(out, "out")
        _check_out_dtype(target, dtype)
    elif target.own_copy is not None:
        target = target.own_copy(dtype)
    kept = {}
    whole = target
    every = [*opened, *([] if opened_base is None else [opened_base])]
    all_names = dict.fromkeys(name for model in every for name in model.layout)
    if only is not None or exclude is not None:
        donor = opened[0] if opened_base is None else opened_base
        rule = chosen_names(only, exclude)
        check_globs(only, exclude, all_names)
        kept = {name: leaf for name, leaf in donor.leaves.items() if not rule(name)}
        _check_kept(donor, target, kept, out is not None or opened[0].own_copy is not None)
        opened = [model.restricted(rule) for model in opened]
        opened_base = None if opened_base is None else opened_base.restricted(rule)
        target = target.restricted(rule)
    planned = plan(
        method,
        opened[: len(models)],
        opened_base,
        target,
        parameters=parameters,
        labels=names,
        out_dtype=dtype,
        seed=int(seed),
        in_place=out is not None or opened[0].own_copy is not None,
        check_first=out is not None,
        names=[*all_names, *others],
        companions=opened[len(models) :],
    )
    _check_device(device, planned.device)
    return Executor(planned, backend=backend, threads=threads, nonfinite=nonfinite, constant=constant), whole, kept


def companions_of(method: Method, models: int, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the parameters that are models out of the others; name each model of them."""
    companions: dict[str, Any] = {}
    rest = dict(parameters)
    for name in method.companions:
        given = rest.pop(name, None)
        if given is None:
            raise MergeError(
                f"{method.name} needs {name}: pass {name}=[...], a list with a model for each of the {models} models"
            )
        each = [given] if models == 1 and not isinstance(given, list | tuple) else given
        if not isinstance(each, list | tuple) or len(each) != models:
            count = f"{len(each)} of them" if isinstance(each, list | tuple) else type(each).__name__
            raise MergeError(f"{method.name}: {name}: must be a list with a model for each of the {models} models, not {count}")
        companions |= {f"{name} {index}": model for index, model in enumerate(each)}
    return companions, rest


def _open(
    models: Sequence[Any], base: Any, labels: Sequence[str] | None = None, companions: Mapping[str, Any] = MappingProxyType({})
) -> tuple[list[Model], Model | None, list[str]]:
    """Open the models, what stands beside them, and the base; name them as the caller does, or by path or number."""
    names = list(labels or [_label(model, f"model {index}") for index, model in enumerate(models)])
    names[len(models) : len(models)] = [_label(model, name) for name, model in companions.items()]
    if base is not None and len(names) == len(models) + len(companions):
        names.append(_label(base, "base"))
    opened: list[Model] = []
    faults = Faults()
    for model, name in zip([*models, *companions.values(), *([] if base is None else [base])], names, strict=True):
        with faults:
            opened.append(open_model(model, name))
    faults.report()
    return (opened, None, names) if base is None else (opened[:-1], opened[-1], names)


def _label(model: Any, otherwise: str) -> str:
    return str(model) if isinstance(model, str | Path) else otherwise


def _check_options(backend: str, nonfinite: Any, threads: int | None) -> None:
    if nonfinite not in ("error", "allow"):
        raise MergeError(f'nonfinite={nonfinite!r}: must be "error" or "allow"')
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise MergeError(f"threads={threads!r}: must be a whole number, at least 1")
    if backend not in ("auto", *kernels.BACKENDS):
        raise unknown("backend", backend, ["auto", *kernels.BACKENDS])


def _check_device(device: Any, actual: str) -> None:
    """Refuse another device than that of models in memory."""
    if device is not None and str(device) not in (actual, actual.partition(":")[0], "auto"):
        raise MergeError(
            f'device="{device}" is for merges into a checkpoint: pass the path of a new one as out=, or leave device away; '
            f"models in memory (here on {actual}) are merged where they are"
        )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise MergeError(f"seed={seed!r}: must be an integer")


def _check_kept(donor: Model, target: Model, kept: Mapping[str, Leaf], in_place: bool) -> None:
    """Refuse to copy a tensor to where it does not fit."""
    problems = [
        f"{tensor(name)}: is not merged but copied, and does not fit into the result: shape {donor.layout[name].shape}, "
        f"{donor.layout[name].dtype}, to {'nothing' if there is None else f'shape {there.shape}, {there.dtype}'}"
        for name in kept
        if (there := target.layout.get(name)) is None
        or there.shape != donor.layout[name].shape
        or (in_place and there.dtype != donor.layout[name].dtype)
    ]
    problems += placement_problems([donor, target], ["the model that it is copied from", "out"], kept)
    if problems:
        raise MismatchError(listing(problems))


@contextmanager
def _advised() -> Iterator[None]:
    """Say what to do about NaN."""
    try:
        yield
    except NonFiniteError as error:
        advice = 'repair or leave out what is not finite, or pass nonfinite="allow" to merge it as it is'
        raise NonFiniteError(f"{error}\n{advice}") from None


@contextmanager
def _progress_bar(elements: int, title: str) -> Iterator[Advance]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task(title, total=elements)
        yield lambda done: bar.update(task, advance=done)


def _check_list(models: Any) -> None:
    if not isinstance(models, list | tuple):
        raise MergeError(f"models: got {type(models).__name__}; pass a list of models, such as [older, newer]")


def _check_counts(method: Method, models: Sequence[Any], base: Any) -> None:
    """Check how many models there are, and that there is a base where one is needed."""
    _check_list(models)
    count = len(models)
    if count < method.least or (method.most is not None and count > method.most):
        most = "or more" if method.most is None else f"to {method.most}"
        wanted = f"{method.least}" if method.least == method.most else f"{method.least} {most}"
        raise MergeError(
            f"{method.name} merges {wanted} model{'s' if wanted != '1' else ''}, but got {count}"
            f"{' (the base is passed as base=, not in the list)' if method.base == 'required' else ''}"
        )
    if method.base == "required" and base is None:
        raise MergeError(f"{method.name} needs the model that the others were fine-tuned from: pass base=... (--base)")
    if method.base == "unused" and base is not None:
        raise MergeError(f"{method.name} has no use for a base; leave base= (--base) away, or list it among the models")


def _check_out_dtype(target: Model, dtype: str | None) -> None:
    for name, entry in target.layout.items():
        if dtype is not None and entry.dtype not in (dtype, *EXACT):
            raise MergeError(f"out, {tensor(name)}: is {entry.dtype}, but out_dtype is {dtype}; leave out_dtype away")
