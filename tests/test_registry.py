"""@method: what it reads, what it refuses."""

import subprocess
import sys
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergekit_cl import Between, MergeError, PerModel, Scope, Sum, each, merge, method, methods
from mergekit_cl.registry import find


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def test_the_decorator_returns_the_function_itself() -> None:
    @method(paper="https://example.org", models=(2, 2))
    def halves(scope: Scope, *, share: Annotated[float, Between(0, 1)] = 0.5) -> Sum:
        """Mix two models."""
        return Sum([share, 1 - share])

    assert halves(Scope(("w",), 2, False)).weights == (0.5, 0.5)
    assert merge([f32([0]), f32([4])], "halves", share=0.25).tolist() == [3]
    assert methods()["halves"].summary == "Mix two models."
    assert str(methods()["halves"].parameters["share"]) == "share=0.5 in [0, 1]"


def test_kinds_of_parameters() -> None:
    @method(paper="")
    def kinds(
        scope: Scope,
        *,
        ratio: PerModel[Annotated[float, Between(0, 1)]],
        mode: Literal["a", "b"] = "a",
        times: Annotated[int, Between(1, 3)] = 2,
        scale: PerModel[float] = each(1.0),
    ) -> Sum:
        """Check parameters."""
        return Sum([])

    resolve = find("kinds").resolve
    assert resolve({"ratio": 0.5}, 2) == {"ratio": (0.5, 0.5), "mode": "a", "times": 2, "scale": (1.0, 1.0)}
    assert resolve({"ratio": f32([0, 1]), "scale": (1, 2)}, 2)["ratio"] == (0.0, 1.0)
    assert resolve({"ratio": torch.tensor([0.5, 1]), "times": np.int64(3)}, 2)["ratio"] == (0.5, 1.0)
    for bad, message in [
        ({}, "kinds needs ratio"),
        ({"ratio": [0.5, 2]}, r"model 1: ratio=2: must be in \[0, 1\]"),
        ({"ratio": 0, "mode": "c"}, "mode='c': must be one of 'a', 'b'"),
        ({"ratio": 0, "times": 1.5}, "times=1.5: must be an integer"),
        ({"ratio": 0, "times": 4}, r"must be in \[1, 3\]"),
        ({"ratio": 0, "times": True}, "must be an integer"),
    ]:
        with pytest.raises(MergeError, match=message):
            resolve(bad, 2)


def test_refusals() -> None:
    def no_docstring(scope: Scope) -> Sum: ...

    def positional(scope: Scope, beta: float) -> Sum:
        """Doc."""

    def unannotated(scope, *, beta=1):  # type: ignore[no-untyped-def]
        """Doc."""

    def text(scope: Scope, *, mode: str) -> Sum:
        """Doc."""

    def reserved(scope: Scope, *, seed: int) -> Sum:
        """Doc."""

    def sfa(scope: Scope) -> Sum:
        """Doc."""

    def scopeless(*, share: float = 1.0) -> Sum:
        """Doc."""

    for function, message in [
        (scopeless, "first parameter must be the scope"),
        (no_docstring, "needs a docstring"),
        (positional, "keyword-only"),
        (unannotated, "needs an annotation"),
        (text, "is not a type of parameter"),
        (reserved, "belongs to merge"),
        (sfa, "the name is taken by mergekit_cl.merge_methods.sfa"),
    ]:
        with pytest.raises(TypeError, match=message):
            method(paper="")(function)  # type: ignore[type-var]


def test_string_annotations_are_understood() -> None:
    program = """
from __future__ import annotations
import numpy as np
from mergekit_cl import Fraction, PerModel, Scope, Sum, each, merge, method

@method(paper="")
def mine(scope: Scope, *, weight: PerModel[Fraction] = each(0.5)) -> Sum:
    '''Mine.'''
    return Sum(weight)

print(merge([np.float32([2]), np.float32([4])], "mine").tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[3.0]\n"


def test_a_method_that_returns_nonsense_is_named() -> None:
    @method(paper="")
    def broken(scope: Scope) -> Sum:
        """Return no step."""
        return None  # type: ignore[return-value]

    @method(paper="")
    def short(scope: Scope) -> Sum:
        """Return too few weights."""
        return Sum([1.0])

    @method(paper="")
    def baseless(scope: Scope) -> Sum:
        """Use a base that there is not."""
        return Sum([0.5, 0.5], base_weight=1)

    @method(paper="")
    def dividing(scope: Scope) -> Sum:
        """Divide by zero."""
        return Sum([1 / 0])

    @method(paper="")
    def wordy(scope: Scope) -> Sum:
        """Weigh with words."""
        return Sum(["a", 1])  # type: ignore[list-item]

    for name, message in [
        ("dividing", "dividing failed with ZeroDivisionError: division by zero"),
        ("wordy", "wordy failed with ValueError"),
        ("broken", "returned NoneType"),
        ("short", "for 2 models"),
        ("baseless", "0 base"),
    ]:
        with pytest.raises(MergeError, match=message):
            merge([f32([1])] * 2, name)
