"""The dtypes that can be merged, by name, whatever framework a tensor comes from.

A storage dtype is widened exactly to the *compute type* (float32, or float64 where a floating input is float64) and rounded
once, to nearest even, when the result is stored.
"""

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from mergekit_cl.errors import MergeError, unknown

type_of: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
"""The floating dtypes that kernels read and write, and how numpy holds each."""

EXACT = frozenset({"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})
"""Integers and booleans: never averaged, only copied where all models agree."""


def dtype_name(dtype: object) -> str:
    """Name a dtype of any framework, or a name itself: ``torch.bfloat16``, ``np.float16``, ``"float32"`` -> ``"float32"``.

    >>> dtype_name(np.float32), dtype_name("torch.bfloat16")
    ('float32', 'bfloat16')
    """
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    try:
        return np.dtype(dtype).name  # type: ignore[call-overload, no-any-return]
    except TypeError:
        return str(dtype).removeprefix("torch.")


def output_dtype(dtype: object) -> str:
    """Check a dtype that a user asks results to have."""
    name = dtype_name(dtype)
    if name not in type_of:
        raise unknown("out_dtype", name, type_of)
    return name


def compute_dtype(dtypes: Iterable[str]) -> np.dtype[Any]:
    """Choose the type that tensors of these floating dtypes are merged in."""
    return np.dtype(np.float64 if "float64" in dtypes else np.float32)


def check_mergeable(dtype: str, where: str) -> None:
    """Refuse a tensor that is neither floating, integer nor boolean."""
    if fault := unmergeable(dtype):
        raise MergeError(f"{where}: {fault}")


def unmergeable(dtype: str) -> str:
    """Say why a dtype cannot be merged; nothing where it can."""
    if dtype in type_of or dtype in EXACT:
        return ""
    if dtype.startswith("complex"):
        advice = "merge its real and imaginary parts as two tensors"
    elif dtype.startswith(("float8", "float4", "float6", "int", "uint", "q")):
        advice = "dequantise it to float32 or bfloat16 first"
    else:
        advice = "convert it to one of these, or leave it out"
    return f"dtype {dtype} cannot be merged (only {', '.join(type_of)}); {advice}"


def largest_finite(dtype: str) -> float:
    """Return the largest finite number of a floating dtype."""
    return float(ml_dtypes.finfo(type_of[dtype]).max)
