"""Formulas bound to tensors: traced, or to be called; put together into what kernels take."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mergekit_cl.errors import MergeError
from mergekit_cl.formula import Program, Traced, trace
from mergekit_cl.kernels import Array, Formula, Slices, Span
from mergekit_cl.models import tensor
from mergekit_cl.plan import Item, Plan
from mergekit_cl.steps import Elementwise, KthOf, PerRow, SumOf

WithFormula: TypeAlias = Elementwise | SumOf | KthOf


@dataclass(frozen=True, eq=False)
class FormulaRow:
    """The formula of a step for one tensor.

    ``sources`` are the inputs that it reads, numbered as the models are, the base as -1 and first. ``slice_length`` is that of
    the slices that it looks at, or 0 where it has none.
    """

    program: Program | None
    function: Callable[..., Any]
    sources: tuple[int, ...]
    constants: tuple[float, ...]
    keys: npt.NDArray[np.uint32]
    numbers: Array
    compute: np.dtype[Any]
    slice_length: int
    outputs: int

    @property
    def kind(self) -> Hashable:
        """What rows of one kernel call have in common."""
        return self.program, self.sources, self.compute, bool(self.slice_length), self.numbers.shape[1]


def bind(plan: Plan, item: Item, step: WithFormula, compute: np.dtype[Any]) -> FormulaRow:
    """Bind the formula of a step to a tensor.

    Raises:
        MergeError: The step does not fit the plan, or its formula looks at more than it may.

    """
    name = plan.method.name
    asked = getattr(step, "read", None)
    read = tuple(range(plan.models) if asked is None else asked if isinstance(asked, Iterable) else [asked])
    if not all(isinstance(k, int | np.integer) and 0 <= k < plan.models for k in read):
        raise MergeError(f"{name}: {type(step).__name__} reads models {list(read)}: their numbers are 0 to {plan.models - 1}")
    first = int(plan.has_base)
    if not read and not first:
        raise MergeError(f"{name}: {type(step).__name__} reads no model, and there is no base")
    uniform = len(read) if step.seed is not None else 0
    numbers = _numbers(name, item, step)
    models = list(range(first, first + len(read)))
    keywords: dict[str, Any] = {
        **({"uniform": uniform} if step.seed is not None else {}),
        **({"rows": len(numbers.T)} if len(numbers.T) else {}),
    }
    more: list[int] = []  # what stands beside the models, as inputs of the plan
    for place, companion in enumerate(plan.companions, 1):
        start = first + len(read) + len(more)
        keywords[companion] = list(range(start, start + len(read)))
        more += [place * plan.models + k for k in read]
    traced = _traced(plan, step.formula, [0, models] if first else [models], keywords)
    program = traced.program if traced is not None else None
    along = isinstance(step, PerRow) or (isinstance(step, SumOf) and step.along is not None)
    if program is not None and program.by_row and not (along or len(numbers.T)):
        advice = 'along="rows"' if isinstance(step, SumOf) else "PerRow"
        raise MergeError(f"{name}: a formula of {type(step).__name__} looks along rows, but is called with parts; use {advice}")
    by_row = bool(len(numbers.T)) or (along and (program is None or program.by_row or isinstance(step, SumOf)))
    call = _Call(name, step.formula, plan.has_base, len(read), tuple(keywords))
    single = not isinstance(step, SumOf)
    if program is not None:
        outputs = len(program.outputs)
    else:
        outputs = _try(
            call, first + len(models) + len(more), uniform, numbers.shape[1], compute, by_row=by_row, apart=not along
        )
    if single and outputs != 1:
        raise MergeError(f"{name}: a formula of {type(step).__name__} returned {outputs} arrays; it returns one")
    return FormulaRow(
        program,
        call,
        (*((-1,) if first else ()), *read, *more),
        traced.constants if traced is not None else (),
        np.array([hash_key(step.seed or 0, item.name, k) for k in read[:uniform]], np.uint32).reshape(uniform, 2),
        numbers,
        compute,
        _slice_length(item) if by_row else 0,
        outputs,
    )


def _traced(plan: Plan, formula: Callable[..., Any], arguments: list[Any], keywords: Mapping[str, Any]) -> Traced | None:
    """Trace a formula, once for all tensors of a plan; not for longer, because it may look at what changes later."""
    if not isinstance(formula, partial):
        return trace(formula, arguments, keywords)
    given = formula.args, tuple(formula.keywords.items())
    # 0.0 and -0.0, or 1 and True, are equal, and not the same
    key = formula.func, *given, repr(given), repr((arguments, keywords))
    try:
        if key not in plan.traces:
            plan.traces[key] = trace(formula, arguments, keywords)
        return cast(Traced | None, plan.traces[key])
    except TypeError:  # what it was given cannot be hashed
        return trace(formula, arguments, keywords)


def formula_of(rows: Sequence[FormulaRow]) -> tuple[Formula, Slices | None]:
    """Put formulas of one kind together for a kernel call; also say how the rows of its table are cut."""
    compute = rows[0].compute
    with np.errstate(over="ignore"):
        constants = np.array([row.constants for row in rows], np.float64).reshape(len(rows), -1).astype(compute)
        numbers = np.concatenate([row.numbers for row in rows]).astype(compute)
    keys = np.array([row.keys for row in rows], np.uint32).reshape(len(rows), -1, 2)
    functions = [row.function for row in rows] if rows[0].program is None else ()
    lengths = np.array([row.slice_length for row in rows], np.int64)
    slices = Slices(lengths, strided=False) if rows[0].slice_length else None
    return Formula(rows[0].program, constants, keys, numbers, functions), slices


def compute_of(rows: Sequence[Sequence[Span]]) -> np.dtype[Any]:
    """Return the type that formulas of a scope are computed in: one for all of its tensors, so that cuts hold for all."""
    wide = any(str(span.dtype).endswith("float64") for row in rows for span in row)
    return np.dtype(np.float64 if wide else np.float32)


def hash_key(seed: int, name: str, k: int) -> tuple[int, int]:
    """Make the key of the hashes of model k in a tensor."""
    digest = blake2b(f"{seed}\0{k}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _slice_length(item: Item) -> int:
    return max(1, item.shape[-1]) if item.shape else 1


def _numbers(name: str, item: Item, step: WithFormula) -> Array:
    """Return the numbers of each slice, float64 [slices, numbers]."""
    try:
        given = [np.asarray(each, np.float64) for each in getattr(step, "rows", ())]
    except (TypeError, ValueError) as error:
        raise MergeError(f"{name}: the rows of {type(step).__name__} are no numbers: {error}") from None
    slices = int(np.prod(item.shape, dtype=np.int64)) // _slice_length(item)
    for each in given:
        if each.shape != (slices,):
            raise MergeError(f"{name}: {type(step).__name__} has rows of shape {each.shape} for {tensor(item.name)}: expected "
                             f"[slices] = {(slices,)}")  # fmt: skip
    return np.stack(given, axis=1) if given else np.zeros((slices, 0))


@dataclass(frozen=True)
class _Call:
    """Calls a formula with arrays."""

    method: str
    formula: Callable[..., Any]
    has_base: bool
    models: int
    keywords: tuple[str, ...]

    def __call__(self, inputs: list[Array], uniform: list[Array], numbers: list[Array]) -> list[Array]:
        inputs, uniform, numbers = (list(map(_read_only, group)) for group in (inputs, uniform, numbers))
        given = {"uniform": uniform, "rows": numbers}
        rest = iter(inputs)
        arguments = [*([next(rest)] if self.has_base else []), list(islice(rest, self.models))]
        named = {name: given[name] if name in given else list(islice(rest, self.models)) for name in self.keywords}
        try:
            result = self.formula(*arguments, **named)
            outputs = [np.asarray(each) for each in (result if isinstance(result, list | tuple) else [result])]
        except MergeError:
            raise
        except Exception as error:  # whatever a user's formula raises
            advice = ""
            if "read-only" in str(error):
                advice = "; what it is given must not be written into: use x = x + y, or a copy"
            if "broadcast" in str(error):
                advice = "; a formula is called with parts of tensors, flattened, and must not depend on their shape"
            raise MergeError(f"{self.method}: its formula failed with {type(error).__name__}: {error}{advice}") from error
        return [self._fitted(each, inputs[0]) for each in outputs]

    def _fitted(self, output: Array, like: Array) -> Array:
        """Return an array that a formula returned in the shape and the dtype of its inputs."""
        if output.dtype.kind not in "fiub":
            raise MergeError(
                f"{self.method}: its formula returned {output.dtype} for {like.dtype}: it has to return real numbers"
            )
        try:
            return np.broadcast_to(output, like.shape).astype(like.dtype, copy=False)
        except ValueError:
            raise MergeError(
                f"{self.method}: its formula returned an array of shape {output.shape} for arrays of shape {like.shape}"
            ) from None


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _try(call: _Call, inputs: int, uniform: int, numbers: int, compute: np.dtype[Any], *, by_row: bool, apart: bool) -> int:
    """Call a formula with a few numbers; count the arrays that it returns, and see that it looks at no more than it may."""
    random = np.random.default_rng(0)
    shape = (2, 4) if by_row else (8,)
    given = [[random.random(shape).astype(compute) for _ in range(count)] for count in (inputs, uniform)]
    more = [random.random((2, 1)).astype(compute) for _ in range(numbers)]

    def run(part: slice) -> list[Array]:
        with np.errstate(all="ignore"):
            return call(*([array[part] for array in group] for group in (*given, more)))

    half = shape[0] // 2
    whole, parts = run(slice(None)), zip(run(slice(half)), run(slice(half, None)), strict=True)
    if not all(np.array_equal(one, np.concatenate(pair), equal_nan=True) for one, pair in zip(whole, parts, strict=True)):
        advice = "return PerRow for a formula that looks along rows" if apart else "it may look along rows, and no further"
        raise MergeError(
            f"{call.method}: an entry that its formula computes depends on others that are not always there; {advice}"
        )
    return len(whole)
