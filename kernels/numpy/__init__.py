"""The NumPy backend: always there, and the oracle that the others are tested against. Works in tiles that stay in cache."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mergekit_cl.dtypes import largest_finite
from mergekit_cl.kernels import BLOCK, Array, Keep, Slices, Table, TaskVectors
from mergekit_cl.kernels.numpy.formulas import elementwise, histogram_of, per_matrix, per_row, sum_of
from mergekit_cl.kernels.numpy.tiles import INFINITY, hashes_at, hashes_from, philox, round_, round_any, walk, widen

__all__ = [
    "elementwise", "gram", "gram_of_slices", "histogram_of", "kept_magnitude", "largest_magnitude", "magnitude_histogram",
    "per_matrix", "per_row", "philox", "sum_of", "task_vector_merge", "weighted_sum", "weighted_sum_of_slices",
]  # fmt: skip

TILE = 131_072
"""Elements worked on at a time: three float32 buffers of this size are 1.5 MiB, and calls are long enough to share the GIL."""


def weighted_sum(table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum`."""
    nonfinite = np.zeros(len(table.spans), bool)
    buffers = np.empty((3, TILE), weights.dtype)
    limit = min(largest_finite(table.dtypes[-1]), largest_finite(weights.dtype.name))
    with np.errstate(all="ignore"):
        for row, tile in walk(pieces, TILE):
            *inputs, out = (span[tile] for span in table.spans[row])
            values = _sum(inputs, weights[row], about, buffers)
            if values.max() <= limit and values.min() >= -limit:
                round_(values, out)
            else:
                nonfinite[row] |= round_any(_sum(inputs, weights[row], about, buffers, infinite=True), out)
    return nonfinite


def _sum(inputs: list[Array], weights: Array, about: bool, buffers: Array, infinite: bool = False) -> Array:
    """Sum a tile in the compute type; ``infinite`` says that infinities may be among the inputs."""
    acc, x, r = buffers[:, : len(inputs[0])]
    ref = widen(inputs[0], r) if about else None
    for number, (weight, span) in enumerate(zip(weights, inputs[int(about) :], strict=True)):
        value = widen(span, x)
        if ref is not None:
            agree = value == ref if infinite else None
            value = np.subtract(ref, value, out=x)
            if agree is not None:
                value[agree] = 0  # inf - inf is NaN, but models that agree keep what they have
        if number == 0:
            np.multiply(value, weight, out=acc)
        else:
            acc += np.multiply(value, weight, out=x)
    if ref is not None:
        acc += 0  # -0 becomes +0, and then -0 - (+0) is -0: a reference keeps the sign of its zeros
        np.subtract(ref, acc, out=acc)
    return cast(Array, acc)


def largest_magnitude(table: Table, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.largest_magnitude`."""
    largest = np.zeros((len(table.spans), len(table.dtypes)))
    scratch = np.empty(TILE, table.compute)
    for row, tile in walk(pieces, TILE):
        for column, span in enumerate(table.spans[row]):
            values = widen(span[tile], scratch)
            largest[row, column] = np.maximum(largest[row, column], np.abs(values, out=scratch[: len(values)]).max())
    return largest


def gram(table: Table, about: bool, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram`."""
    blocks = []
    for row, block in walk(pieces, BLOCK):
        columns = [span[block].astype(table.compute) for span in table.spans[row]]
        with np.errstate(all="ignore"):
            if about:
                ref, *columns = columns
                columns = [_difference(column, ref) for column in columns]
            stacked = np.stack([column.astype(np.float64) for column in columns])
            blocks.append(stacked @ stacked.T)
    count = len(table.dtypes) - about
    return np.array(blocks).reshape(-1, count, count)


def gram_of_slices(table: Table, about: bool, slices: Slices, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.gram_of_slices`."""
    count = len(table.dtypes) - about
    sums = [np.empty((0, count, count))]
    for row, first, last in _slice_tiles(slices, pieces):
        columns = [_sliced(span, slices, row, first, last).astype(table.compute) for span in table.spans[row]]
        with np.errstate(all="ignore"):
            if about:
                ref, *columns = columns
                columns = [_difference(column, ref) for column in columns]
            stacked = np.stack(columns, axis=1).astype(np.float64)  # [slices, columns, elements]
            sums.append(stacked @ stacked.swapaxes(1, 2))
    return np.concatenate(sums)


def weighted_sum_of_slices(
    table: Table, weights: Array, references: npt.NDArray[np.int64], slices: Slices, pieces: Array
) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.weighted_sum_of_slices`."""
    nonfinite = np.zeros(len(table.spans), bool)
    begins = slices.first(table)
    for row, first, last in _slice_tiles(slices, pieces):
        *inputs, out = (_sliced(span, slices, row, first, last) for span in table.spans[row])
        wide = np.stack([column.astype(weights.dtype) for column in inputs])
        part = slice(begins[row] + first, begins[row] + last)
        chosen = references[part]
        about = (chosen >= 0)[:, None]
        with np.errstate(all="ignore"):
            ref = np.take_along_axis(wide, chosen[None, :, None], axis=0)[0]
            acc = np.where(about, weights.dtype.type(0), weights.dtype.type(-0.0))
            for column, weight in zip(wide, weights[part].T, strict=True):
                value = np.where(about, np.where(ref == column, 0, ref - column), column)
                acc = acc + np.where(
                    (weight == 0)[:, None] | (about & (value == 0)), acc.dtype.type(-0.0), weight[:, None] * value
                )
            acc = np.where(about, ref - acc, acc)
            nonfinite[row] |= round_any(
                flat := np.ascontiguousarray(acc).reshape(-1), rounded := np.empty(flat.size, out.dtype)
            )
        out[...] = rounded.reshape(acc.shape)
    return nonfinite


def _slice_tiles(slices: Slices, pieces: Array) -> Iterator[tuple[int, int, int]]:
    """Walk through the slices of the pieces, so many at a time that they stay in cache."""
    for row, first, last in pieces.tolist():
        step = max(1, TILE // max(1, int(slices.lengths[row])))
        for begin in range(first, last, step):
            yield row, begin, min(begin + step, last)


def _sliced(span: Array, slices: Slices, row: int, first: int, last: int) -> Array:
    """View slices of a span, [slices, elements]."""
    length = int(slices.lengths[row])
    if slices.strided:
        return span[0 : len(span)].reshape(length, -1).T[first:last]
    return span[first * length : last * length].reshape(-1, length)


def magnitude_histogram(
    table: Table, low: Array, shift: Array, bins: int, wide: bool, groups: npt.NDArray[np.intp], pieces: Array
) -> npt.NDArray[np.int64]:
    """See `mergekit_cl.kernels.Backend.magnitude_histogram`."""
    models = low.shape[1]
    counts = np.zeros((int(groups.max(initial=-1)) + 1, models, bins + 2), np.int64)
    vectors = _TaskVectors(table, models)
    for group, piece in zip(groups, pieces, strict=True):
        found: list[list[Array]] = [[] for _ in range(models)]
        for row, tile in walk(piece[None], TILE):
            vectors.read(row, tile)
            for k, values in enumerate(vectors.values):
                if not vectors.finite:
                    counts[group, k, bins + 1] += np.count_nonzero(~np.isfinite(values))
                patterns = vectors.patterns(values.astype(np.float64) if wide else values)
                start = int(low[row, k])
                width = min(bins << int(shift[row, k]), 1 << (8 * patterns.itemsize - 1))  # what is below wraps around to more
                if start + width <= INFINITY[patterns.itemsize]:
                    counts[group, k, bins] += np.count_nonzero(np.greater_equal(patterns, start + width, out=vectors.mask))
                offsets = np.subtract(patterns, start, out=patterns).view(f"u{patterns.itemsize}")
                # as offsets[mask], in a third of the time
                inside = offsets.take(np.flatnonzero(np.less(offsets, width, out=vectors.mask)))
                found[k].append(inside >> inside.dtype.type(shift[row, k]))
                if sum(map(len, found[k])) > bins:  # adding up costs as much as there are bins
                    counts[group, k, :bins] += _bincount(found[k], bins)
        for k, parts in enumerate(found):
            counts[group, k, :bins] += _bincount(parts, bins)
    return counts


def _bincount(parts: list[Array], bins: int) -> Array:
    """Count what is in the parts, and forget them."""
    counts = np.bincount(np.concatenate([np.empty(0, np.int64), *(part.astype(np.int64) for part in parts)]), minlength=bins)
    parts.clear()
    return counts


def kept_magnitude(table: Table, keep: Keep, pieces: Array) -> npt.NDArray[np.float64]:
    """See `mergekit_cl.kernels.Backend.kept_magnitude`."""
    models = len(table.dtypes) - 1
    blocks = []
    vectors = _TaskVectors(table, models)
    with np.errstate(all="ignore"):
        for row, tile in walk(pieces, BLOCK):
            vectors.read(row, tile)
            everything = [np.abs(values).sum(dtype=np.float64) for values in vectors.values]
            vectors.drop(keep, row, tile.start)
            rest = [np.abs(values).sum(dtype=np.float64) for values in vectors.values]
            blocks.append(np.stack([everything, rest], axis=1))
    return np.array(blocks).reshape(-1, models, 2)


def task_vector_merge(table: Table, how: TaskVectors, pieces: Array) -> npt.NDArray[np.bool_]:
    """See `mergekit_cl.kernels.Backend.task_vector_merge`."""
    nonfinite = np.zeros(len(table.spans), bool)
    vectors = _TaskVectors(table, how.scales.shape[1], how.scales.dtype)
    limit = min(largest_finite(table.dtypes[-1]), largest_finite(how.scales.dtype.name))
    with np.errstate(all="ignore"):
        for row, tile in walk(pieces, TILE):
            out = table.spans[row][-1][tile]
            vectors.read(row, tile)
            finite = vectors.finite
            if finite:
                values = vectors.merge(how, row, tile.start)
                if values.max() <= limit and values.min() >= -limit:
                    round_(values, out)
                    continue
                vectors.read(row, tile)
                vectors.finite = False  # something overflows, and must not be multiplied by zero to drop it
            nonfinite[row] |= round_any(vectors.merge(how, row, tile.start), out) or not finite
    return nonfinite


class _TaskVectors:
    """Tiles of models minus their base, in buffers that stay in cache: new memory would cost more than the arithmetic."""

    def __init__(self, table: Table, models: int, compute: Any = None) -> None:
        compute = np.dtype(compute or table.compute)
        self._spans, self._models = table.spans, models
        self._numbers = np.empty((models + 3, TILE), compute)
        self._truths = np.empty((models + 3, TILE), bool)
        self._patterns = np.empty(TILE, f"i{compute.itemsize}")

    def read(self, row: int, tile: slice) -> None:
        """Read a tile of the base into ``base``, of the task vectors into ``values``; see whether these are ``finite``."""
        base, *models = self._spans[row][: self._models + 1]
        self.count = tile.stop - tile.start
        self._sum, self._scratch, buffer, *self.values = self._numbers[:, : self.count]
        self.mask, self._positive, self._other, *self._agree = self._truths[:, : self.count]
        self.base = widen(base[tile], buffer)
        self.finite = True
        with np.errstate(all="ignore"):
            for value, model in zip(self.values, models, strict=True):
                np.subtract(widen(model[tile], value), self.base, out=value)
                if not (value.max(initial=0) < np.inf and value.min(initial=0) > -np.inf):
                    value[model[tile].astype(value.dtype) == self.base] = 0  # infinities that agree
                    self.finite &= bool(np.isfinite(value).all())

    def patterns(self, values: Array) -> Array:
        """Return the bits of magnitudes as integers; NaN counts as infinity."""
        bits = values.view(f"i{values.itemsize}")
        out = self._patterns[: len(bits)] if bits.dtype == self._patterns.dtype else None
        patterns: Array = np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=out)
        return patterns if self.finite else np.minimum(patterns, INFINITY[bits.itemsize], out=patterns)

    def drop(self, keep: Keep, row: int, start: int) -> None:
        """Set the entries that are not kept to zero; ``start`` is the index of the first entry in its tensor."""
        if keep.kind == "all":
            return
        if keep.kind == "random":
            for k, (least, _) in enumerate(keep.thresholds[row, : self._models].tolist()):
                if least < 1 << 32:
                    self._keep(k, np.less(hashes_from(keep.keys[row, k], start, self.count), least, out=self.mask))
            return
        ties: list[tuple[int, bool, Array]] = []
        for k, (low, high) in enumerate(keep.cuts[row, : self._models].tolist()):
            patterns = self.patterns(self.values[k])
            kept = np.greater(patterns, low, out=self._agree[k])
            if high <= INFINITY[patterns.itemsize]:
                kept &= np.less_equal(patterns, high, out=self._other)
            for upper, cut in enumerate((low, high)):
                if keep.thresholds[row, k, upper] and cut <= min(high, INFINITY[patterns.itemsize]):
                    at = np.flatnonzero(np.equal(patterns, cut, out=self._other))
                    ties += [(k, bool(upper), at)] if at.size else []
        if ties:  # of all models together: NumPy's calls cost more than the arithmetic
            hashes = iter(hashes_at(keep.keys[row], start, [(k, at) for k, _, at in ties]))
            for (k, upper, at), hashed in zip(ties, hashes, strict=True):
                limit = keep.thresholds[row, k, int(upper)]
                self._agree[k][at] = (self._agree[k][at] & (hashed >= limit)) if upper else hashed < limit
        for k in range(self._models):
            self._keep(k, self._agree[k])

    def _keep(self, k: int, kept: Array) -> None:
        if self.finite:
            np.multiply(self.values[k], kept, out=self.values[k])
        else:
            self.values[k][~kept] = 0

    def merge(self, how: TaskVectors, row: int, start: int) -> Array:
        """Combine the task vectors, which are used up, as `TaskVectors` says; return the result."""
        self.drop(how.keep, row, start)
        if how.elect == "unweighted":
            self._elect(how.votes[row])
        for value, scale in zip(self.values, how.scales[row], strict=True):
            if scale != 1:
                value *= scale
        if how.elect == "weighted":
            self._elect(np.ones_like(how.votes[row]))
        if how.elect is None:
            for value, agree in zip(self.values, self._agree, strict=True):
                np.not_equal(value, 0, out=agree)
        else:
            for k, agree in enumerate(self._agree):
                self._keep(k, agree)
        total, *others = self.values
        for value in others:
            if how.combine == "max":
                np.copyto(total, value, where=(np.abs(value) > np.abs(total)) | np.isnan(value))
            else:
                total += value
        if how.combine in ("weight_mean", "count_mean"):
            total /= self._divisor(how.shares[row] if how.combine == "weight_mean" else np.ones_like(how.shares[row]))
        total *= how.factors[row]
        np.subtract(0, total, out=total)  # +0 for both zeros, and then -0 - (+0) is -0: the base keeps the sign of its zeros
        return cast(Array, np.subtract(self.base, total, out=total))

    def _elect(self, votes: Array) -> None:
        """Elect signs; see which models agree. NaN agrees with everything, and so it shows in the result."""
        total, vote, positive, opposed = self._sum, self._scratch, self._positive, self._other
        total[:] = 0
        for value, weight in zip(self.values, votes, strict=True):
            total += value if weight == 1 else np.multiply(value, weight, out=vote)
        np.greater_equal(total, 0, out=positive)
        for value, weight, agree in zip(self.values, votes, self._agree, strict=True):
            vote = value if weight == 1 else np.multiply(value, weight, out=self._scratch)
            np.less_equal(vote, 0, out=opposed)
            np.greater_equal(vote, 0, out=agree)
            opposed &= positive
            np.greater(agree, positive, out=agree)  # and not positive
            agree |= opposed
            np.logical_not(agree, out=agree)

    def _divisor(self, shares: Array) -> Array:
        """Add up the shares of the models that agree, with 1 for 0."""
        divisor: Array = self._sum
        if (shares == 1).all() and len(shares) < 256:
            votes = self.mask.view(np.uint8)
            votes[:] = 0
            for agree in self._agree:
                votes += agree
            return cast(Array, np.maximum(votes, 1, out=votes))
        divisor[:] = 0
        for agree, share in zip(self._agree, shares, strict=True):
            divisor += np.multiply(agree, share, out=self._scratch)
        divisor += np.equal(divisor, 0, out=self.mask)
        return divisor


def _difference(values: Array, ref: Array) -> Array:
    """Subtract; what is equal, also where it is infinite, has the difference zero."""
    difference: Array = values - ref
    if not np.isfinite(difference).all():
        difference[values == ref] = 0
    return difference
