"""The kernels' contract, and the choice of a backend.

A kernel sees only **spans**: 1-D contiguous memory, a NumPy array on the CPU or a torch tensor on a GPU. It knows no names,
shapes, files or frameworks. Spans come as a `Table`: a row for each tensor, a column for each input and, last, the output.
What part of it a call works on is given as **pieces**, an int64 array of shape [pieces, 3] with (row, start, stop) in
elements; pieces never overlap, so a table may be split among threads in any way. No result depends on how.

Each backend is a module with the functions of `Backend`, and all backends give the same bits:

- products, sums and differences are rounded one by one (no FMA contraction) in the *compute type*: float32, or float64 where
  an input is float64; terms are taken in the order of the columns;
- bfloat16 and float16 are widened exactly and rounded once, to nearest even, also from float64.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mergekit_cl.dtypes import compute_dtype, dtype_name, type_of
from mergekit_cl.errors import BackendError, unknown

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
        return tuple(dtype_name(span.dtype) for span in self.spans[0])

    @cached_property
    def compute(self) -> np.dtype[Any]:
        """The type that these columns are computed in."""
        return compute_dtype(self.dtypes)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Elements in each row, int64 [rows]."""
        return np.array([len(row[0]) for row in self.spans], np.int64)

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Address of the first element of each span, int64 [rows, columns]."""
        return np.array([[address(span) for span in row] for row in self.spans], np.int64)

    @cached_property
    def whole(self) -> npt.NDArray[np.int64]:
        """The pieces that cover the table, one for each row, int64 [rows, 3]."""
        rows = np.arange(len(self.spans))
        return np.stack([rows, np.zeros_like(rows), self.lengths], axis=1)


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
            float64 [blocks, K, K]: sums of float64 products. Only here the last bits are a backend's own.

        """


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
