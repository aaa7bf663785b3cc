"""Formulas in torch: operation by operation, over tiles of tensors on a GPU, for what the kernels cannot do.

That is: programs that look at whole slices, that take an ``exp`` or ``log``, or are very long; functions that have to be called
with arrays, for which tiles are copied to the host and back; and functions of matrices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mergekit_cl.formula import ROW_OPERATIONS, Program
from mergekit_cl.kernels import BLOCK, Array, Formula, MatrixFormula, Slices, Table

TILE = 64 * BLOCK
"""Entries worked on at a time: a multiple of `BLOCK`, so many that starting an operation takes no longer than the operation."""


def elementwise(table: Table, formula: Formula, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.elementwise`."""
    return _apply(table, formula, None, pieces)


def per_row(table: Table, formula: Formula, slices: Slices, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_row`."""
    return _apply(table, formula, slices, pieces)


def _apply(table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.bool_]:
    finite = torch.ones(len(table.spans), dtype=torch.bool, device=table.spans[0][0].device)
    for row, tile, inputs, (values,) in _computed(table, formula, slices, pieces, len(table.dtypes) - 1):
        for each in inputs:  # first: the output may lie where one of them does
            finite[row] &= each.isfinite().all()
        finite[row] &= _write(values, table.spans[row][-1][tile])
    return np.asarray(~finite.cpu().numpy(), np.bool_)


def per_matrix(table: Table, formulas: Sequence[MatrixFormula], pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.per_matrix`."""
    nonfinite = np.zeros(len(table.spans), bool)
    for row in pieces[:, 0].tolist():
        formula, (*inputs, out) = formulas[row], table.spans[row]
        # Copies: the function may write into what it is given
        wide = [span.to(_type(formula.compute), copy=True).reshape(formula.shape) for span in inputs]
        finite = all(bool(each.isfinite().all()) for each in wide)
        values = formula(wide) if finite else torch.full_like(wide[0], torch.nan)
        nonfinite[row] = not _write(torch.as_tensor(values, dtype=_type(formula.compute), device=out.device), out)
    return nonfinite


def sum_of(table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.sum_of`."""
    sums = []
    for _, _, _, outputs in _computed(table, formula, slices, pieces, len(table.dtypes)):
        if slices is None:
            beyond = -outputs[0].numel() % BLOCK
            outputs = [torch.nn.functional.pad(output, (0, beyond)).reshape(-1, BLOCK) for output in outputs]
        sums.append(torch.stack([output.sum(dim=-1, dtype=torch.float64) for output in outputs], dim=1))
    if not sums:
        return np.zeros((0, len(formula.program.outputs) if formula.program else 0))
    return np.asarray(torch.cat(sums).cpu(), np.float64)


def histogram_of(
    table: Table, formula: Formula, slices: Slices | None, low: Array, shift: Array, bins: int, wide: bool,
    groups: npt.NDArray[np.intp], pieces: Array,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """See `mergekit_cl.kernels.Backend.histogram_of`."""
    windows = low.shape[1]
    shape = int(groups.max(initial=-1)) + 1, windows, bins + 2
    counts = torch.zeros(shape, dtype=torch.int64, device=table.spans[0][0].device)
    kind = torch.float64 if wide else _type(formula.compute)
    bits = torch.int64 if kind == torch.float64 else torch.int32
    infinity = torch.tensor(np.inf, dtype=kind, device=counts.device).view(bits)
    for group, piece in zip(groups.tolist(), pieces, strict=True):
        for row, _, _, (values,) in _computed(table, formula, slices, piece[None], len(table.dtypes)):
            patterns = values.abs().to(kind).reshape(-1).view(bits).minimum(infinity).to(torch.int64)
            counts[group, :, bins + 1] += (patterns == infinity).sum()
            for window in range(windows):
                offsets = (patterns - int(low[row, window])) >> int(shift[row, window])
                counts[group, window, bins] += (offsets >= bins).sum()
                inside = offsets[(offsets >= 0) & (offsets < bins)]
                counts[group, window, :bins] += torch.bincount(inside, minlength=bins)
    return np.asarray(counts.cpu(), np.int64)


def _computed(
    table: Table, formula: Formula, slices: Slices | None, pieces: Array, inputs: int
) -> Iterator[tuple[int, slice, list[Tensor], list[Tensor]]]:
    """Compute a formula tile by tile; yield the row, where the tile lies in it, the inputs, and the outputs."""
    device, compute = table.spans[0][0].device, _type(formula.compute)
    constants, all_numbers = (torch.tensor(each, device=device) for each in (formula.constants, formula.numbers))
    first = slices.first(table) if slices is not None else np.zeros(len(table.spans), np.int64)
    for row, start, stop in pieces.tolist():
        length = int(slices.lengths[row]) if slices is not None else 1
        step = max(1, TILE // max(1, length))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            tile = slice(begin * length, end * length)
            shape = (end - begin,) if slices is None else (end - begin, length)
            columns = [span[tile].to(compute).reshape(shape) for span in table.spans[row][:inputs]]
            uniform = [_uniform(key, tile, device).to(compute).reshape(shape) for key in formula.keys[row]]
            numbers = list(all_numbers[first[row] + begin : first[row] + end].T[:, :, None]) if slices is not None else []
            if formula.program is not None:
                outputs = evaluate(formula.program, shape, columns, constants[row], uniform, numbers)
            else:
                outputs = _called(formula.functions[row], columns, uniform, numbers)
            yield row, tile, columns, [output.expand(shape) for output in outputs]


def _called(function: Callable[..., Any], *arguments: list[Tensor]) -> list[Tensor]:
    """Call a function with arrays, on the host."""
    device = arguments[0][0].device
    arrays = [[tensor.cpu().numpy() for tensor in each] for each in arguments]
    for array in arrays[0]:
        array.flags.writeable = False
    with np.errstate(all="ignore"):
        outputs = function(*arrays)
    return [torch.tensor(np.asarray(output, arrays[0][0].dtype), device=device) for output in outputs]


def evaluate(
    program: Program,
    shape: tuple[int, ...],
    inputs: list[Tensor],
    constants: Tensor,
    uniform: list[Tensor],
    numbers: list[Tensor],
) -> list[Tensor]:
    """Carry out a program on a tile of ``shape``, [entries] or [slices, entries]; return tensors that broadcast to it."""
    # A constant is a tensor of the device: torch multiplies by the reciprocal of a number in place of dividing by it
    leaves = {"input": inputs, "constant": list(constants), "uniform": uniform, "number": numbers}
    values: list[Any] = []
    for number, (name, arguments) in enumerate(program.operations):
        if name in leaves:
            values.append(leaves[name][arguments[0]])
            continue
        given = [values[argument] for argument in arguments]
        if name == "length":
            values.append(torch.full((*shape[:-1], 1), shape[-1], dtype=constants.dtype, device=constants.device))
        elif name in ROW_OPERATIONS:
            values.append(_over_row(name, given[0], shape[-1]))
        else:
            values.append(given[0].to(constants.dtype) if name == "float" else _FUNCTIONS[name](*given))
        for argument in arguments:
            if program.last_uses[argument] == number:
                values[argument] = None
    return [values[output] for output in program.outputs]


def _over_row(name: str, values: Tensor, length: int) -> Tensor:
    if name == "ranks":
        return ranks(values)
    if values.ndim == 0 or values.shape[-1] != length:  # the same for all entries of a slice
        return values * length if name == "row_sum" else values
    if name == "row_sum":
        return values.sum(dim=-1, keepdim=True, dtype=torch.float64).to(values.dtype)
    return values.amax(dim=-1, keepdim=True) if name == "row_max" else values.amin(dim=-1, keepdim=True)


def ranks(values: Tensor) -> Tensor:
    """Rank the entries of each row, [..., n], as `mergekit_cl.formula.ranks` does."""
    count = values.shape[-1]
    if count == 1:
        return torch.full_like(values, 0.5)
    ordered, order = values.sort(dim=-1)
    position = torch.arange(count, device=values.device)
    changes = (ordered[..., 1:] != ordered[..., :-1]) & ~(ordered[..., 1:].isnan() & ordered[..., :-1].isnan())
    edge = torch.ones_like(changes[..., :1])
    starts, ends = torch.cat([edge, changes], dim=-1), torch.cat([changes, edge], dim=-1)
    first = torch.where(starts, position, 0).cummax(dim=-1).values
    last = torch.where(ends, position, count).flip(-1).cummin(dim=-1).values.flip(-1)
    most = torch.tensor(2.0 * (count - 1), dtype=torch.float64, device=values.device)
    return torch.empty_like(values).scatter_(-1, order, ((first + last).to(torch.float64) / most).to(values.dtype))


def _uniform(key: npt.NDArray[np.uint32], tile: slice, device: torch.device) -> Tensor:
    """Return the uniform numbers (see `mergekit_cl.kernels.Formula`) of a tile, float32."""
    index = torch.arange(tile.start // 4, -(-tile.stop // 4), device=device)
    word, half = 0xFFFFFFFF, 32
    # Philox-4x32-10, as in kernels/numpy/tiles.py. A product of two words has the bits of one of unsigned integers
    a, b, c, d = index & word, index >> half, torch.zeros_like(index), torch.zeros_like(index)
    one, two = key.tolist()
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> half & word) ^ b ^ one, right & word, (left >> half & word) ^ d ^ two, left & word
        one, two = (one + 0x9E3779B9) & word, (two + 0xBB67AE85) & word
    hashes = torch.stack([a, b, c, d], dim=-1).reshape(-1)[tile.start % 4 :][: tile.stop - tile.start]
    return (hashes >> 8).to(torch.float32) * 2.0**-24


def _write(values: Tensor, out: Tensor) -> Tensor:
    """Round to nearest even, once, into ``out``; tell whether all of it is finite."""
    if values.dtype == torch.float64 and out.element_size() == 2:
        values = _odd_float32(values)
    with torch.inference_mode(out.is_inference()):
        return out.copy_(values.reshape(out.shape)).isfinite().all()


def _odd_float32(values: Tensor) -> Tensor:
    """Round float64 to float32 *to odd*, as in kernels/numpy/tiles.py: rounded once more it is as if rounded once."""
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32) - (back.abs() > values.abs()).to(torch.int32)
    bits |= ((back != values) & ~values.isnan()).to(torch.int32)
    return bits.view(torch.float32)


def _type(compute: np.dtype[Any]) -> torch.dtype:
    return torch.float64 if compute == np.float64 else torch.float32


def _sign(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), values, values.sign())


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "abs": torch.abs,
    "sqrt": torch.sqrt, "sign": _sign, "copysign": torch.copysign, "max": torch.maximum, "min": torch.minimum, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne, "and": torch.logical_and,
    "or": torch.logical_or, "xor": torch.logical_xor, "not": torch.logical_not, "where": torch.where, "exp": torch.exp,
    "log": torch.log, "exp2": torch.exp2, "log2": torch.log2, "expm1": torch.expm1, "log1p": torch.log1p, "tanh": torch.tanh,
    "sin": torch.sin, "cos": torch.cos, "arctan": torch.arctan,
}  # fmt: skip
