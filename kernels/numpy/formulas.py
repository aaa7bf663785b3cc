"""Formulas in NumPy: operation by operation, over tiles that stay in cache."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_cl.dtypes import largest_finite
from mergekit_cl.formula import LEAVES, ROW_OPERATIONS, Program, ranks
from mergekit_cl.kernels import BLOCK, Array, Formula, MatrixFormula, Slices, Table
from mergekit_cl.kernels.numpy.tiles import hashes_from, round_, round_any, widen

TILE = 32_768
"""Entries worked on at a time: a dozen buffers of float32 fit into a second-level cache."""


def elementwise(table: Table, formula: Formula, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.elementwise`."""
    return _apply(table, formula, None, pieces)


def per_row(table: Table, formula: Formula, slices: Slices, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_row`."""
    return _apply(table, formula, slices, pieces)


def _apply(table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.bool_]:
    nonfinite = np.zeros(len(table.spans), bool)
    limit = min(largest_finite(table.dtypes[-1]), largest_finite(formula.compute.name))
    with np.errstate(all="ignore"):
        for row, tile, (values,), finite in _computed(table, formula, slices, pieces, TILE, len(table.dtypes) - 1):
            out = table.spans[row][-1][tile]
            flat = np.empty(values.size, formula.compute)
            flat.reshape(values.shape)[...] = values
            if flat.max() <= limit and flat.min() >= -limit:
                round_(flat, out)
                nonfinite[row] |= not finite
            else:
                nonfinite[row] |= round_any(flat, out) or not finite
    return nonfinite


def per_matrix(table: Table, formulas: Sequence[MatrixFormula], pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_matrix`."""
    nonfinite = np.zeros(len(table.spans), bool)
    with np.errstate(all="ignore"):
        for row in pieces[:, 0].tolist():
            formula, whole = formulas[row], slice(0, int(table.lengths[row]))
            *inputs, out = (span[whole] for span in table.spans[row])
            wide = [widen(span, np.empty(span.size, formula.compute)).reshape(formula.shape) for span in inputs]
            for array in wide:
                array.flags.writeable = False
            finite = all(np.isfinite(array).all() for array in wide)
            values = np.array(formula(wide) if finite else np.full(formula.shape, np.nan), formula.compute).reshape(-1)
            nonfinite[row] = round_any(values, out)
    return nonfinite


def sum_of(table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.sum_of`."""
    sums: list[Array] = []
    with np.errstate(all="ignore"):
        size = BLOCK if slices is None else 2 * BLOCK  # large: numba leaves to NumPy what has exp and log in it
        for _, _, outputs, _ in _computed(table, formula, slices, pieces, size, len(table.dtypes)):
            added = np.array([output.sum(axis=-1, dtype=np.float64) for output in outputs])
            sums.append(added.T.reshape(-1, len(outputs)))
    return np.concatenate(sums) if sums else np.zeros((0, len(formula.program.outputs) if formula.program else 0))


def histogram_of(
    table: Table, formula: Formula, slices: Slices | None, low: Array, shift: Array, bins: int, wide: bool,
    groups: npt.NDArray[np.intp], pieces: Array,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """See `mergekit_cl.kernels.Backend.histogram_of`."""
    windows = low.shape[1]
    counts = np.zeros((int(groups.max(initial=-1)) + 1, windows, bins + 2), np.int64)
    kind = np.float64 if wide else formula.compute
    infinity = np.array(np.inf, kind).view(f"i{np.dtype(kind).itemsize}")
    with np.errstate(all="ignore"):
        for group, piece in zip(groups, pieces, strict=True):
            for row, _, (values,), _ in _computed(table, formula, slices, piece[None], TILE, len(table.dtypes)):
                magnitudes = np.abs(values).astype(kind).reshape(-1)
                patterns = np.minimum(magnitudes.view(infinity.dtype), infinity).astype(np.int64)
                counts[group, :, bins + 1] += np.count_nonzero(patterns == infinity)
                for window in range(windows):
                    offsets = patterns - low[row, window] >> shift[row, window]
                    counts[group, window, bins] += np.count_nonzero(offsets >= bins)
                    inside = offsets[(offsets >= 0) & (offsets < bins)]
                    counts[group, window, :bins] += np.bincount(inside, minlength=bins)
    return counts


def _computed(
    table: Table, formula: Formula, slices: Slices | None, pieces: Array, size: int, inputs: int
) -> Iterator[tuple[int, slice, Sequence[Array], bool]]:
    """Compute a formula tile by tile; yield the row, where the tile lies in it, the outputs, and if all inputs are finite.

    The outputs are overwritten by those of the next tile.
    """
    evaluator = Evaluator(formula.program, formula.compute) if formula.program is not None else None
    buffers = [np.empty(0, formula.compute) for _ in range(inputs)]
    first = slices.first(table) if slices is not None else None
    for row, begin, stop in _parts(slices, pieces, size):
        if slices is None:
            tile = slice(begin, stop)
            shape: tuple[int, ...] = (stop - begin,)
            numbers: list[Array] = []
        else:
            assert first is not None
            length = int(slices.lengths[row])
            tile, shape = slice(begin * length, stop * length), (stop - begin, length)
            numbers = list(formula.numbers[first[row] + begin : first[row] + stop].T[:, :, None])
        count = tile.stop - tile.start
        if inputs and len(buffers[0]) < count:
            buffers = [np.empty(count, formula.compute) for _ in range(inputs)]
        columns = [widen(span[tile], buffer) for span, buffer in zip(table.spans[row][:inputs], buffers, strict=True)]
        finite = all(np.isfinite(column).all() for column in columns)
        shaped = [column.reshape(shape) for column in columns]
        uniform = [_uniform(key, tile, formula.compute).reshape(shape) for key in formula.keys[row]]
        if evaluator is not None:
            outputs = evaluator(shape, shaped, formula.constants[row], uniform, numbers)
        else:
            outputs = formula.functions[row](shaped, uniform, numbers)
        yield row, tile, [np.broadcast_to(output, shape) for output in outputs], finite


def _parts(slices: Slices | None, pieces: Array, size: int) -> Iterator[tuple[int, int, int]]:
    """Walk through pieces in tiles of about ``size`` entries."""
    for row, start, stop in pieces.tolist():
        step = size if slices is None else max(1, size // max(1, int(slices.lengths[row])))
        for begin in range(start, stop, step):
            yield row, begin, min(begin + step, stop)


def _uniform(key: npt.NDArray[np.uint32], tile: slice, compute: np.dtype[Any]) -> Array:
    start = tile.start - tile.start % 4
    hashes = hashes_from(key, start, tile.stop - start)[tile.start - start :]
    shifted: Array = (hashes >> np.uint32(8)).astype(compute)
    shifted *= compute.type(2.0**-24)
    return shifted


class Evaluator:
    """Carries out a program on tiles; its buffers are used again and again."""

    def __init__(self, program: Program, compute: np.dtype[Any]) -> None:
        self.program, self.compute = program, compute
        self._bits = np.dtype(f"i{compute.itemsize}")
        self._plans: dict[tuple[int, ...], list[tuple[int, Callable[..., Any], tuple[int, ...], Array | None]]] = {}
        self._masks: dict[tuple[int, ...], tuple[Array, Array]] = {}
        self._leaves = [
            (number, name, arguments[0]) for number, (name, arguments) in enumerate(program.operations) if name in LEAVES
        ]

    def __call__(
        self,
        shape: tuple[int, ...],
        inputs: Sequence[Array],
        constants: Array,
        uniform: Sequence[Array],
        numbers: Sequence[Array],
    ) -> list[Array]:
        """Return the outputs of a tile of ``shape``, [entries] or [slices, entries]; overwritten by the next call."""
        leaves: dict[str, Any] = {"input": inputs, "constant": constants, "uniform": uniform, "number": numbers}
        values: list[Any] = [None] * len(self.program.operations)
        for number, leaf, k in self._leaves:
            values[number] = leaves[leaf][k]
        if shape not in self._plans:
            if len(self._plans) > 1:  # whole tiles, and the rest of a row
                self._plans, self._masks = {}, {}
            self._plans[shape] = self._plan(shape)
        for number, operation, arguments, out in self._plans[shape]:
            values[number] = operation(*[values[argument] for argument in arguments], out=out)
        return [values[output] for output in self.program.outputs]

    def _plan(self, shape: tuple[int, ...]) -> list[tuple[int, Callable[..., Any], tuple[int, ...], Array | None]]:
        """List the operations, with the function that carries out each, and the buffer that takes its values."""
        program = self.program
        small = (*shape[:-1], 1)
        steps: list[tuple[int, Callable[..., Any], tuple[int, ...], Array | None]] = []
        free: dict[tuple[bool, bool], list[Array]] = {}
        owned: dict[int, tuple[tuple[bool, bool], Array]] = {}
        for number, (name, arguments) in enumerate(program.operations):
            if name in LEAVES:
                continue
            if program.kinds[number] == "constant":
                steps.append((number, partial(self._constant, name), arguments, None))
                continue
            kind = program.truths[number], program.kinds[number] == "entry"
            spare = free.setdefault(kind, [])
            out = spare.pop() if spare else np.empty(shape if kind[1] else small, bool if kind[0] else self.compute)
            owned[number] = kind, out
            steps.append((number, self._function(name, shape[-1]), arguments, out))
            for argument in set(arguments):
                if program.last_uses[argument] == number and argument in owned:
                    was, buffer = owned.pop(argument)
                    free.setdefault(was, []).append(buffer)
        return steps

    def _function(self, name: str, length: int) -> Callable[..., Any]:
        """Return what carries out an operation, called with its arguments and ``out``."""
        if name in ROW_OPERATIONS:
            return partial(self._over_row, name, length)
        if name in ("max", "min"):
            return partial(self._extreme, name)
        if name == "where":
            return self._select
        return _number if name == "float" else _FUNCTIONS[name]

    def _constant(self, name: str, *arguments: Any, out: None) -> Any:
        """Compute a number from numbers."""
        del out
        if name == "where":
            condition, yes, no = arguments
            return yes if condition else no
        if name == "float":
            return self.compute.type(arguments[0])
        if name in ("max", "min"):
            return self._extreme(name, *arguments, out=np.empty((), self.compute))[()]
        result = _FUNCTIONS[name](*arguments)
        return result if isinstance(result, np.bool_) else self.compute.type(result)

    def _extreme(self, name: str, *arguments: Any, out: Array) -> Array:
        """Take the larger or smaller; 0 is larger than -0, for which NumPy's choice is up to the processor."""
        _FUNCTIONS[name](*arguments, out=out)
        doubtful = self._mask(out.shape)[1]
        np.equal(out, 0, out=doubtful)
        if doubtful.any():
            doubtful &= np.equal(*arguments)
            one, other = (np.asarray(value, self.compute).view(self._bits) for value in arguments)
            both = one & other if name == "max" else one | other
            np.copyto(out.view(self._bits), both, where=doubtful)
        return out

    def _select(self, condition: Any, yes: Any, no: Any, out: Array) -> Array:
        """Choose by the bits of numbers: a masked copy takes several times as long."""
        if out.dtype == bool:
            np.copyto(out, no)
            np.copyto(out, yes, where=condition)
            return out
        if np.ndim(condition) == 0:
            np.copyto(out, yes if condition else no)
            return out
        mask = self._mask(out.shape)[0]
        np.copyto(mask, condition)
        np.negative(mask, out=mask)
        bits = out.view(self._bits)
        one, other = (np.asarray(value, self.compute).view(self._bits) for value in (yes, no))
        np.bitwise_xor(one, other, out=bits)
        np.bitwise_and(bits, mask, out=bits)
        np.bitwise_xor(bits, other, out=bits)
        return out

    def _mask(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Return scratch of a shape: integers, and truths."""
        if shape not in self._masks:
            self._masks[shape] = np.empty(shape, self._bits), np.empty(shape, bool)
        return self._masks[shape]

    def _over_row(self, name: str, length: int, values: Array, out: Array) -> Array:
        if name == "length":
            out[...] = length
        elif np.ndim(values) == 0 or values.shape[-1] != length:  # the same for all entries of a slice
            alike = {"ranks": 0.5, "row_sum": values * self.compute.type(length)}
            out[...] = alike.get(name, values)
        elif name == "ranks":
            out[...] = ranks(values)
        elif name == "row_sum":
            out[...] = values.sum(axis=-1, keepdims=True, dtype=np.float64)
        else:
            (np.maximum if name == "row_max" else np.minimum).reduce(values, axis=-1, keepdims=True, out=out)
            if (out == 0).any():  # as in `_extreme`
                sign = np.signbit(values) if name == "row_min" else ~np.signbit(values)
                found = ((values == 0) & sign).any(axis=-1, keepdims=True)
                zero = self.compute.type(-0.0 if name == "row_min" else 0.0)
                out[...] = np.where(out == 0, np.where(found, zero, -zero), out)
        return out


def _number(truth: Array, out: Array) -> Array:
    np.copyto(out, truth, casting="unsafe")
    return out


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt,
    "sign": np.sign, "copysign": np.copysign, "max": np.maximum, "min": np.minimum, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal, "and": np.logical_and, "or": np.logical_or,
    "xor": np.logical_xor, "not": np.logical_not, "exp": np.exp, "log": np.log, "exp2": np.exp2, "log2": np.log2,
    "expm1": np.expm1, "log1p": np.log1p, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "arctan": np.arctan,
}  # fmt: skip
