"""``merge()``: open, plan, execute, hand back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from mergekit_cl import kernels
from mergekit_cl.dtypes import EXACT, output_dtype
from mergekit_cl.errors import MergeError, NonFiniteError, unknown
from mergekit_cl.execute import Advance, Executor
from mergekit_cl.models import Model, open_model, tensor
from mergekit_cl.plan import plan
from mergekit_cl.registry import Method, find


def merge(
    models: Sequence[Any],
    method: str = "sfa",
    *,
    base: Any = None,
    out: Any = None,
    backend: str = "auto",
    out_dtype: Any = None,
    nonfinite: Literal["error", "allow"] = "error",
    seed: int = 0,
    threads: int | None = None,
    progress: bool = False,
    **parameters: Any,
) -> Any:
    """Merge models into one.

    A model is an array (NumPy, PyTorch, JAX), a mapping from names to arrays, a ``torch.nn.Module``, or a JAX pytree such as
    Flax parameters or an ``nnx.State``. All models have the same tensors: names, shapes, and whether they are floating.
    Floating tensors are merged in float32 (float64 where one of them is) and rounded once. Integers and booleans are copied
    where all models agree. Tensors that are tied in every model are merged once and stay tied.

    Args:
        models: The models, in the order that the method gives a meaning to (sfa: oldest first).
        method: Name of a merge method; `mergekit_cl.methods` lists them.
        base: The model that the others were fine-tuned from, for methods that have a use for it.
        out: Where to write the result: a model of any kind that can be written. It may be one of ``models``, or the base.
        backend: "numpy", "numba", "triton", or "auto": numba on a CPU, triton on a GPU. All give the same bits.
        out_dtype: The dtype of all floating results: a name ("bfloat16"), or a dtype of any framework. Without it every
            result has the dtype that its tensor has in the first model (or in ``out``).
        nonfinite: "error" refuses NaN and infinities in what is read, and results that overflow their dtype. "allow" lets
            them through.
        seed: For methods with random masks: an integer.
        threads: Threads on the CPU; all processors by default. The result does not depend on it.
        progress: Whether to show a progress bar.
        **parameters: The method's own parameters. A per-model parameter is a number, or a list with one for each model.

    Returns:
        The result, of the kind of the first model and on its device; or ``out``, written in place. The models are never
        changed (unless they are ``out``).

    Raises:
        UnknownNameError: No such method, parameter, backend or dtype.
        MismatchError: The models do not have the same tensors, or are on different devices.
        NonFiniteError: NaN or Inf in an input, or an overflow; nothing was written into ``out``.
        BackendError: The backend is not installed, or does not reach the tensors.
        MergeError: Anything else that is wrong with the input; the base of all of these.

    >>> merge([{"w": np.float32([0, 4])}, {"w": np.float32([2, 4])}], method="sfa", beta=0.25)
    {'w': array([1.5, 4. ], dtype=float32)}

    """
    chosen = find(method)
    executor, target = prepare(
        chosen, models, base, out,
        backend=backend, out_dtype=out_dtype, nonfinite=nonfinite, seed=seed, threads=threads, parameters=parameters,
    )  # fmt: skip
    with _progress_bar(executor.elements, method) if progress else nullcontext(lambda _: None) as advance:
        try:
            merged = executor.run(advance)
        except NonFiniteError as error:
            advice = 'repair or leave out what is not finite, or pass nonfinite="allow" to merge it as it is'
            raise NonFiniteError(f"{error}\n{advice}") from None
    return target.rebuild(merged) if out is None else out


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
) -> tuple[Executor, Model]:
    """Open the models, plan the merge, bind it to a backend; also return the model that takes the result.

    Arguments are those of `merge`; ``labels`` name the models and the base in messages, ``constant`` is for `Executor`.
    """
    _check_counts(method, models, base)
    if nonfinite not in ("error", "allow"):
        raise MergeError(f'nonfinite={nonfinite!r}: must be "error" or "allow"')
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise MergeError(f"seed={seed!r}: must be an integer")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise MergeError(f"threads={threads!r}: must be a whole number, at least 1")
    if backend not in ("auto", *kernels.BACKENDS):
        raise unknown("backend", backend, ["auto", *kernels.BACKENDS])
    dtype = None if out_dtype is None else output_dtype(out_dtype)
    names = list(labels or [f"model {index}" for index in range(len(models))])
    opened = [open_model(model, name) for model, name in zip(models, names, strict=False)]
    opened_base = None
    if base is not None:
        names = [*names, "base"] if len(names) == len(models) else names
        opened_base = open_model(base, names[-1])
    target = opened[0]
    if out is not None:
        target = open_model(out, "out")
        _check_out_dtype(target, dtype)
    elif target.own_copy is not None:
        target = target.own_copy(dtype)
    planned = plan(
        method,
        opened,
        opened_base,
        target,
        parameters=parameters,
        labels=names,
        out_dtype=dtype,
        seed=int(seed),
        in_place=out is not None or opened[0].own_copy is not None,
        check_first=out is not None,
    )
    return Executor(planned, backend=backend, threads=threads, nonfinite=nonfinite, constant=constant), target


@contextmanager
def _progress_bar(elements: int, title: str) -> Iterator[Advance]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task(title, total=elements)
        yield lambda done: bar.update(task, advance=done)


def _check_counts(method: Method, models: Sequence[Any], base: Any) -> None:
    """Check how many models there are, and that there is a base where one is needed."""
    if not isinstance(models, list | tuple):
        raise MergeError(f"models: got {type(models).__name__}; pass a list of models, such as [older, newer]")
    count = len(models)
    if count < method.least or (method.most is not None and count > method.most):
        most = "or more" if method.most is None else f"to {method.most}"
        wanted = f"{method.least}" if method.least == method.most else f"{method.least} {most}"
        raise MergeError(
            f"{method.name} merges {wanted} model{'s' if wanted != '1' else ''}, but got {count}"
            f"{' (the base is passed as base=, not in the list)' if method.base == 'required' else ''}"
        )
    if method.base == "required" and base is None:
        raise MergeError(f"{method.name} needs the model that the others were fine-tuned from: pass base=...")
    if method.base == "unused" and base is not None:
        raise MergeError(f"{method.name} has no use for a base; leave base= away, or list it among the models")


def _check_out_dtype(target: Model, dtype: str | None) -> None:
    for name, entry in target.layout.items():
        if dtype is not None and entry.dtype not in (dtype, *EXACT):
            raise MergeError(f"out, {tensor(name)}: is {entry.dtype}, but out_dtype is {dtype}; leave out_dtype away")
