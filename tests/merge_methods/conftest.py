"""mergekit 0.1.5 to compare with, where it is installed."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch

Array: TypeAlias = npt.NDArray[Any]


@pytest.fixture(scope="session")
def mergekit_merge() -> Callable[..., Array]:
    """Return ``merge(method, tensors, base=None, **parameters)``, which lets mergekit merge one tensor per model.

    Tensors are NumPy arrays or PyTorch tensors, without the base; the result is a NumPy array, float32 where NumPy has no such
    dtype. A parameter that is a list or a tuple has one value for each of ``tensors``, in their order, and never one for the
    base. ``lambda_`` is mergekit's lambda.
    """
    api = pytest.importorskip("mergekit.merge_methods.api")

    def merge(method: str, tensors: list[Any], base: Any = None, **parameters: Any) -> Array:
        given = [torch.tensor(tensor) if not isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
        if base is not None:
            given.insert(0, torch.tensor(base) if not isinstance(base, torch.Tensor) else base)
        offset = base is not None
        merged: torch.Tensor = api.merge_tensors(
            given,
            method,
            base_index=0 if base is not None else None,
            parameters={
                name.rstrip("_"): dict(enumerate(value, offset)) if isinstance(value, list | tuple) else value
                for name, value in parameters.items()
            },
        )
        return np.asarray(merged.float().numpy() if merged.dtype == torch.bfloat16 else merged.numpy())

    return merge
