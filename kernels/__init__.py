"""The kernels' contract, and the choice of a backend.

A kernel sees only **spans**: 1-D contiguous memory, a NumPy array on the CPU or a torch tensor on a GPU. It knows no names,
shapes, files or frameworks. Spans come as a `Table`: a row for each tensor, a column for each input and, last, the output.
What part of it a call works on is given as **pieces**, an int64 array of shape [pieces, 3] with (row, start, stop) in
elements; pieces never overlap, so a table may be split among threads in any way. No result depends on how.

Each backend is a module with the functions of `Backend`, and all backends give the same bits:

- products, sums and differences are rounded one by one (no FMA contraction) in the *compute type*: float32, or float64 where
  an input is float64; terms are taken in the order of the columns;
- bfloat16 and float16 are widened exactly and rounded once, to nearest even, also from float64;
- a *task vector* is the difference of a model from the base, in the compute type, and is never stored. An entry that equals
  the base's has the difference zero (also where both are infinite).
"""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mergekit_cl.dtypes import compute_dtype, dtype_name, type_of
from mergekit_cl.errors import BackendError, MergeError, unknown
from mergekit_cl.formula import Program

Array: TypeAlias = npt.NDArray[Any]
Span: TypeAlias = Any
"""1-D contiguous memory: a NumPy array (bfloat16 as ``ml_dtypes.bfloat16``) or, on a GPU, a torch tensor."""

BLOCK = 65_536
"""Elements per partial sum of a survey, counted from the start of a tensor. Pieces are cut at multiples of it."""

BACKENDS = ("numpy", "numba", "triton")

FLOATING = frozenset(type_of)
"""Names of the dtypes that kernels read and write."""


@dataclass(frozen=True)
class Table:
    """Spans that one kernel call works on.

    ``spans[row][column]`` all have the same length within a row, and the same dtype within a column.
    """

    spans: Sequence[Sequence[Span]]

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Name of the dtype of each column."""
        return tuple(_dtype_name(span.dtype) for span in self.spans[0])

    @cached_property
    def compute(self) -> np.dtype[Any]:
        """The type that these columns are computed in."""
        return _compute_dtype(self.dtypes)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Elements in each row, int64 [rows]."""
        return np.array([len(row[0]) for row in self.spans], np.int64)

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Address of the first element of each span, int64 [rows, columns]."""
        return np.array([[address(span) for span in row] for row in self.spans], np.int64)

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a backend keeps with this table for its next call, by what it is for."""
        return {}

    @cached_property
    def whole(self) -> npt.NDArray[np.int64]:
        """The pieces that cover the table, one for each row, int64 [rows, 3]."""
        rows = np.arange(len(self.spans))
        return np.stack([rows, np.zeros_like(rows), self.lengths], axis=1)

    def only(self, columns: Sequence[int]) -> "Table":
        """Make a table of some of the columns."""
        part = Table([[row[column] for column in columns] if len(row) else row for row in self.spans])
        dtypes = tuple(self.dtypes[column] for column in columns)
        part.__dict__.update(dtypes=dtypes, lengths=self.lengths, addresses=self.addresses[:, columns])
        return part


@dataclass(frozen=True, eq=False)
class Keep:
    """Which entries of task vectors stay, and which are dropped (become zero); K models, an entry for each [row, model].

    ``kind`` "all" keeps everything (the arrays are unused). The others compare the *hash* h of an entry, a uniform 32-bit
    number: lane ``index % 4`` of Philox-4x32-10 with counter (index // 4, 0, 0, 0) and key ``keys[row, k]``, index being
    the entry's number in its tensor (a counter beyond 32 bits continues in the second word). See Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", 2011.

    - "random" keeps an entry if h < thresholds[row, k, 0].
    - "magnitude" compares ``a``, the *pattern* of its magnitude: the bits of ``|x_k - base|`` in the compute type as an
      integer, where NaN counts as infinity. It keeps an entry if ::

          (a > cuts[row, k, 0] or (a == cuts[row, k, 0] and h < thresholds[row, k, 0]))
          and (a < cuts[row, k, 1] or (a == cuts[row, k, 1] and h >= thresholds[row, k, 1]))

      The hash of an entry matters only where its magnitude equals a cut whose threshold is not 0.
    """

    kind: Literal["all", "random", "magnitude"]
    keys: npt.NDArray[np.uint32]
    """[rows, K, 2]"""
    thresholds: npt.NDArray[np.int64]
    """[rows, K, 2], each in [0, 2**32]"""
    cuts: npt.NDArray[np.int64]
    """[rows, K, 2], each in [-1, 2**31) where the compute type is float32, in [-1, 2**63) where it is float64"""
    selected: "Selected | None" = None
    """Cuts that lie on the device: they stand for those that ``places`` names"""
    places: npt.NDArray[np.int64] | None = None
    """[rows, K, 2]: the number among ``selected`` of the cut that stands for this one and its threshold, or -1"""


@dataclass(frozen=True, eq=False)
class Selected:
    """Cuts that a backend has found on its device, or will have when the work before it is done: nobody has waited for them."""

    found: Any
    """int64 [selections, 6], a tensor on the device: the cut and the threshold of `Keep`; `SPOILED`, `MISSED`, both, or 0; the
    pattern of the rank, how many of the entries that have it make the rank, and how many there are"""

    def fetch(self) -> npt.NDArray[np.int64]:
        """Wait for the device, and copy what was found."""
        return np.asarray(self.found.cpu(), np.int64)


SPOILED, MISSED = 1, 2
"""What is known of a selection, or of a row that a kernel writes: something is not finite; a pattern was not found."""


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """How `Backend.task_vector_merge` computes a result from a base and K task vectors.

    All floating arrays have the compute type. Per entry, every operation rounded to the compute type, sums from +0 in the
    order of the models::

        d[k] = 0 if x[k] == base else x[k] - base;  0 also if not kept
        v[k] = scales[row, k] * d[k]
        u[k] = v[k] (elect "weighted", or None), or votes[row, k] * d[k] ("unweighted")
        positive = sum(u) >= 0
        agree[k] = not u[k] <= 0 if positive else not u[k] >= 0;  without election: v[k] != 0      (NaN agrees)
        total = sum of v[k] that agree;  combine "max": the one of largest magnitude, the first of equals (a NaN wins)
        "weight_mean": total /= (sum of shares[row, k] that agree, or 1 where that is 0)
        "count_mean": total /= (number that agree, or 1)
        change = factors[row] * total
        out = base if change == 0 else base + change
    """

    keep: Keep
    elect: Literal["weighted", "unweighted"] | None
    combine: Literal["sum", "weight_mean", "count_mean", "max"]
    scales: Array
    """[rows, K]"""
    votes: Array
    """[rows, K]"""
    shares: Array
    """[rows, K]"""
    factors: Array
    """[rows]"""


@dataclass(frozen=True, eq=False)
class Slices:
    """A cut of each row of a table into slices of equal length: rows of a matrix or, ``strided``, its columns.

    A row of n elements has ``n // lengths[row]`` slices. Element j of slice s is element ``s * lengths[row] + j`` of the
    row, or, strided, element ``j * (n // lengths[row]) + s``. What is given per slice is in one array for the whole
    table; that of slice s of a row is at ``first[row] + s``.
    """

    lengths: npt.NDArray[np.int64]
    strided: bool

    def counts(self, table: Table) -> npt.NDArray[np.int64]:
        """Count the slices of each row, int64 [rows]."""
        return table.lengths // self.lengths

    def first(self, table: Table) -> npt.NDArray[np.int64]:
        """Return where each row's slices begin when those of all rows are counted, int64 [rows]."""
        counts = self.counts(table)
        return np.cumsum(counts) - counts


@dataclass(frozen=True, eq=False)
class Formula:
    """A formula bound to the rows of a table: entry i of input k is entry i of column k.

    All that it computes is rounded to the compute type, operation by operation, which is that of ``constants``. Uniform
    number k of an entry is ``(h >> 8) * 2**-24``, h its hash (see `Keep`) with the key ``keys[row, k]``.
    """

    program: Program | None
    """What it computes (see `mergekit_cl.formula.Program`); ``None`` if its functions have to be called."""
    constants: Array
    """[rows, constants], in the compute type"""
    keys: npt.NDArray[np.uint32]
    """[rows, uniforms, 2]"""
    numbers: Array
    """[slices of all rows, numbers], in the compute type: what is given for each slice"""
    functions: Sequence[Callable[..., Any]] = ()
    """For each row what is called where there is no program, with arrays of the compute type that must not be written
    into: the inputs, then the uniform numbers, then the slices' numbers. A tile has the shape [entries] or, where there
    are slices, [slices, entries]; numbers are [slices, 1]. Returns a list of arrays of that shape, or that broadcast to it."""

    @property
    def compute(self) -> np.dtype[Any]:
        """The compute type."""
        return self.constants.dtype


@dataclass(frozen=True, eq=False)
class MatrixFormula:
    """A function of whole matrices, bound to one row of a table: (base, models), or (models) without a base.

    It is called with arrays [m, n] of the compute type, NumPy's, or torch's on a GPU, and returns one.
    """

    function: Callable[..., Any]
    has_base: bool
    compute: np.dtype[Any]
    shape: tuple[int, ...]
    label: str
    """What to call it in messages: the merge method and the tensor."""

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Call the function with the inputs [m, n], the base first; what it raises becomes a `MergeError`."""
        arguments = [inputs[0], list(inputs[1:])] if self.has_base else [list(inputs)]
        try:
            result = self.function(*arguments)
        except MergeError as error:
            raise MergeError(f"{self.label}: {error}") from error
        except Exception as error:  # whatever a user's function raises
            raise MergeError(f"{self.label}: its formula failed with {type(error).__name__}: {error}") from error
        if tuple(getattr(result, "shape", ())) != self.shape:
            shape = tuple(getattr(result, "shape", ()))
            raise MergeError(f"{self.label}: its formula returned a result of shape {shape} for matrices of shape {self.shape}")
        if getattr(result.dtype, "kind", "f") not in "fiub" or getattr(result.dtype, "is_complex", False):
            raise MergeError(f"{self.label}: its formula returned {result.dtype}: it has to return real numbers")
        return result


class Backend(Protocol):
    """What a backend provides. ``pieces`` is int64 [pieces, 3]: (row, start, stop)."""

    def weighted_sum(self, table: Table, weights: Array, about: bool, pieces: Array) -> npt.NDArray[np.bool_]:
        """Write ``out = ref - sum_k w[k] * (ref - x[k])`` (about), or ``out = sum_k w[k] * x[k]``, into the last column.

        Args:
            table: Columns [ref, x_0, ..., x_{K-1}, out] about a reference, else [x_0, ..., x_{K-1}, out]. ``out`` may be one
                of the inputs of its row.
            weights: [rows, K]; their dtype is the compute type, that of the inputs (`Table.compute` without the output).
            about: Whether column 0 is the reference. An entry equal to it contributes exactly nothing, so that entries in
                which all inputs agree keep their bits (signed zeros and infinities too).
            pieces: What to compute.

        Returns:
            bool [rows]: True where a result that was written is NaN or infinite. All weights are non-zero, so a non-finite
            input always shows in its row.

        """

    def largest_magnitude(self, table: Table, pieces: Array) -> npt.NDArray[np.float64]:
        """Find ``max |x|`` of every column of every row, float64 [rows, columns]; 0 where nothing is read, NaN beats all."""

    def gram(self, table: Table, about: bool, pieces: Array) -> npt.NDArray[np.float64]:
        """Sum the products of all pairs of columns over each `BLOCK` of the pieces, in their order.

        Args:
            table: Columns [x_0, ..., x_{K-1}], or [ref, x_0, ..., x_{K-1}] about a reference; nothing is written.
            about: Whether to take ``x_k - ref`` (rounded to the compute type) in place of ``x_k``.
            pieces: What to read; each starts at a multiple of `BLOCK`.

        Returns:
            float64 [blocks, K, K]: sums of float64 products. In floating sums like this one, and only there, the last bits
            are a backend's own.

        """

    def gram_of_slices(self, table: Table, about: bool, slices: Slices, pieces: Array) -> npt.NDArray[np.float64]:
        """Sum the products of all pairs of columns over each slice; arguments as for `gram`, but for the pieces.

        Args:
            table: As for `gram`.
            about: As for `gram`.
            slices: How the rows are cut.
            pieces: (row, first slice, slice after the last).

        Returns:
            float64 [slices of all pieces, K, K], in their order.

        """

    def weighted_sum_of_slices(
        self, table: Table, weights: Array, references: npt.NDArray[np.int64], slices: Slices, pieces: Array
    ) -> npt.NDArray[np.bool_]:
        """Compute `weighted_sum` with weights, and a reference, for each slice.

        Args:
            table: Columns [x_0, ..., x_{K-1}, out].
            weights: [slices of all rows, K] in the compute type. That of a reference does not matter.
            references: The column that a slice is summed about, int64 [slices of all rows]; -1 for a plain sum. An entry
                equal to the reference contributes exactly nothing; an input of weight zero too.
            slices: How the rows are cut.
            pieces: (row, first slice, slice after the last).

        Returns:
            bool [rows]: True where a result that was written is not finite.

        """

    def magnitude_histogram(
        self, table: Table, low: Array, shift: Array, bins: int, wide: bool, groups: npt.NDArray[np.intp], pieces: Array
    ) -> npt.NDArray[np.int64]:
        """Count the magnitudes of task vectors in a window of their patterns (see `Keep`), all models in one sweep.

        Args:
            table: Columns [base, x_0, ..., x_{K-1}]; nothing is written. A column may occur twice.
            low: Where the windows start, int64 [rows, K].
            shift: Pattern p counts in bin ``(p - low[row, k]) >> shift[row, k]`` if that is in [0, bins); int64 [rows, K].
            bins: Bins of every window.
            wide: Whether patterns are those of the magnitudes as float64, 63 bits, although the compute type is float32.
            groups: For each piece the histogram that it is added to: [pieces], from 0 to groups - 1, all of which occur.
            pieces: What to read.

        Returns:
            int64 [groups, K, bins + 2]: the bins; then how many patterns are above the window; then how many ``x_k - base``
            are NaN or infinite (they have the pattern of infinity).

        """

    def kept_magnitude(self, table: Table, keep: Keep, pieces: Array) -> npt.NDArray[np.float64]:
        """Sum ``|x_k - base|`` over each `BLOCK` of the pieces, in their order: of all entries, and of those that are kept.

        Args:
            table: Columns [base, x_0, ..., x_{K-1}]; nothing is written.
            keep: Which entries are kept.
            pieces: What to read; each starts at a multiple of `BLOCK`.

        Returns:
            float64 [blocks, K, 2]: sums in float64 of magnitudes in the compute type; the last bits are a backend's own.

        """

    def task_vector_merge(self, table: Table, how: TaskVectors, pieces: Array) -> npt.NDArray[np.bool_ | np.int32]:
        """Trim or drop, weigh, elect signs, average what agrees, add to the base; written into the last column.

        Args:
            table: Columns [base, x_0, ..., x_{K-1}, out]. ``out`` may be one of the inputs of its row.
            how: What to compute.
            pieces: What to compute it for; each starts at a multiple of `BLOCK`.

        Returns:
            bool [rows]: True where a result, or any difference ``x_k - base`` (also one that is dropped), is not finite. Where
            cuts are ``how.keep.selected``, int32 [rows] instead: `SPOILED` for that, and `MISSED` in rows that were not written
            because one of their cuts has not been found.

        """

    def elementwise(self, table: Table, formula: Formula, pieces: Array) -> npt.NDArray[np.bool_]:
        """Compute a formula, entry by entry.

        Args:
            table: Columns [x_0, ..., x_{K-1}, out]. ``out`` may be one of the inputs of its row.
            formula: What to compute; its program has no operation on rows.
            pieces: What to compute it for; each starts at a multiple of `BLOCK`.

        Returns:
            bool [rows]: True where an input that is read or a result that is written is not finite.

        """

    def per_row(self, table: Table, formula: Formula, slices: Slices, pieces: Array) -> npt.NDArray[np.bool_]:
        """Compute a formula that looks at whole slices, or has numbers for each.

        Args:
            table: As for `elementwise`.
            formula: What to compute.
            slices: How the rows are cut; not strided.
            pieces: (row, first slice, slice after the last).

        Returns:
            As `elementwise`.

        """

    def per_matrix(self, table: Table, formulas: Sequence[MatrixFormula], pieces: Array) -> npt.NDArray[np.bool_]:
        """Call functions of whole matrices.

        Args:
            table: Columns [x_0, ..., x_{K-1}, out].
            formulas: One for each row.
            pieces: (row, 0, 1).

        Returns:
            As `elementwise`.

        """

    def sum_of(self, table: Table, formula: Formula, slices: Slices | None, pieces: Array) -> npt.NDArray[np.float64]:
        """Add up the outputs of a formula over each `BLOCK` of the pieces, in their order, or over each slice.

        Args:
            table: Columns [x_0, ..., x_{K-1}]; nothing is written.
            formula: What to add up.
            slices: How the rows are cut, not strided; ``None`` for blocks.
            pieces: What to read; each starts at a multiple of `BLOCK`. With slices: (row, first slice, slice after the last).

        Returns:
            float64 [blocks, outputs] or [slices, outputs]: sums in float64; the last bits are a backend's own.

        """

    def histogram_of(
        self, table: Table, formula: Formula, slices: Slices | None, low: Array, shift: Array, bins: int, wide: bool,
        groups: npt.NDArray[np.intp], pieces: Array,
    ) -> npt.NDArray[np.int64]:  # fmt: skip
        """Count the magnitudes of a formula's only output in windows of their patterns, as `magnitude_histogram` does.

        Args:
            table: Columns [x_0, ..., x_{K-1}]; nothing is written.
            formula: What to count.
            slices: As for `sum_of`.
            low: Where the windows start, int64 [rows, windows].
            shift: int64 [rows, windows].
            bins: Bins of every window.
            wide: Whether patterns are those of the magnitudes as float64.
            groups: For each piece the histogram that it is added to.
            pieces: As for `sum_of`.

        Returns:
            int64 [groups, windows, bins + 2]: the bins; how many patterns are above the window; how many magnitudes are NaN or
            infinite (they have the pattern of infinity).

        """


class SelectingBackend(Backend, Protocol):
    """A backend that also selects on its device, so that nobody has to wait between a survey and what is made of it."""

    def select_magnitudes(
        self, tables: Sequence[Table], numbers: Sequence[npt.NDArray[np.intp]], ranks: npt.NDArray[np.int64]
    ) -> Selected:
        """Find the patterns (see `Keep`) of given ranks among those of task vectors; return at once, without waiting.

        A pattern may be missed (see `Selected`), if rarely: then it has to be found by `magnitude_histogram`.

        Args:
            tables: Columns [base, x_0, ..., x_{K-1}], computed in float32; nothing is written. A column may occur twice.
            numbers: For each table the selections that its columns belong to, [rows, K]. Those of a row are selections among
                the same rows, which may be in several tables.
            ranks: From 1 (the largest) to the number of entries, int64 [selections].

        """


_dtype_name = cache(dtype_name)
_compute_dtype = cache(compute_dtype)


def address(span: Span) -> int:
    """Return the address of the first element of a span."""
    return cast(int, span.data_ptr() if hasattr(span, "data_ptr") else span.__array_interface__["data"][0])


def interpreted() -> bool:
    """Tell whether Triton kernels run in its interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def load(backend: str, device: str) -> tuple[str, Backend]:
    """Choose and import the backend for tensors on ``device``.

    Args:
        backend: "numpy", "numba", "triton", or "auto": numba on a CPU (numpy where numba is not installed), triton on a GPU.
        device: "cpu" or a torch device such as "cuda:0".

    Returns:
        The backend's name and its module.

    Raises:
        BackendError: The backend is not installed, or does not work on that device. A named backend is never replaced.

    """
    if backend not in ("auto", *BACKENDS):
        raise unknown("backend", backend, ["auto", *BACKENDS])
    on_cpu = device == "cpu"
    if backend == "auto":
        backend = ("numba" if find_spec("numba") else "numpy") if on_cpu else "triton"
    if backend == "triton":
        if on_cpu and not interpreted():
            raise BackendError(
                'backend="triton" needs tensors on a GPU, but they are on the CPU; move them, choose '
                '"numba" or "auto", or set TRITON_INTERPRET=1 to run the kernels in Triton\'s interpreter'
            )
        needs = ["triton", "torch"]
    elif not on_cpu:
        raise BackendError(f'backend="{backend}" works on the CPU, but the tensors are on {device}; use "triton" or "auto"')
    else:
        needs = [backend]
    for package in needs:
        if find_spec(package) is None:
            raise BackendError(f'backend="{backend}" needs the package {package}: pip install {package}')
    return backend, cast(Backend, importlib.import_module(f"mergekit_cl.kernels.{backend}"))


def backend_of(tensor: object) -> Literal["numpy", "numba", "triton"]:
    """Say which backend ``backend="auto"`` takes for a tensor of any framework.

    >>> backend_of(np.zeros(3))
    'numba'
    """
    device = str(getattr(tensor, "device", "cpu"))
    return cast(Literal["numpy", "numba", "triton"], load("auto", device if device.startswith("cuda") else "cpu")[0])
