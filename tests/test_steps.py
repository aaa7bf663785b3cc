"""Steps: which inputs of a sum take part, and about which of them it is computed; what a step refuses to be."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mergekit_cl import MergeError, Scope, Steps, merge, method
from mergekit_cl.steps import AtLeast, AtRandom, Consensus, Cut, Gram, KeptMagnitude, KthMagnitude, Sum, SumOfSlices, Terms

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.mark.parametrize(
    ("step", "sources", "reference"),
    [
        (Sum([0.25, 0.75]), (0,), 1),
        (Sum([0.75, 0.25]), (1,), 0),
        (Sum([0.5, 0.5]), (1,), 0),
        (Sum([0.2, 0.3, 0.5]), (0, 1), 2),
        (Sum([0, 0.5, 0.5]), (2,), 1),
        (Sum([0.3], base_weight=0.7), (0,), -1),
        (Sum([0.7], base_weight=0.3), (-1,), 0),
        (Sum([1, 1, 1], base_weight=-2), (0, 1, 2), -1),
        (Sum([1, 1]), (0, 1), None),
        (Sum([2, -1]), (1,), 0),
        (Sum([0.1, 0.2, 0.7]), (0, 1), 2),  # their sum is 0.9999999999999999
        (Sum([0.1, 0.2, 0.6999]), (0, 1, 2), None),
        (Sum([1, 0]), (0,), None),
        (Sum([1e30, -1e30, 1]), (1, 2), 0),
        (Sum([0, 0]), (), None),
    ],
)
def test_participants(step: Sum, sources: tuple[int, ...], reference: int | None) -> None:
    terms = step.terms(F32)
    assert (terms.sources, terms.reference) == (sources, reference)


def test_weights_that_are_huge_or_not_finite() -> None:
    assert Sum([1e308, 1e308]).terms(F64) == Terms((0, 1), (1e308, 1e308), None)
    assert Sum([float("inf"), -float("inf")]).terms(F32).reference is None


def test_weights_are_rounded_once_to_the_compute_type() -> None:
    assert Sum([0.1, 0.9]).terms(F32).weights == (float(np.float32(0.1)),)
    assert Sum([0.1, 0.9]).terms(F64).weights == (0.1,)


def test_a_weight_that_rounds_to_zero_takes_no_part() -> None:
    assert Sum([1e-60, 1.0]).terms(F32).copied == 1
    assert Sum([1e-60, 1.0]).terms(F64).copied is None


def test_copied_is_one_input_of_weight_one() -> None:
    assert Sum([0, 1.0]).terms(F32).copied == 1
    assert Sum([0.0], base_weight=1).terms(F32).copied == -1
    assert Sum([0, 2.0]).terms(F32).copied is None
    assert Sum([0.5, 0.5]).terms(F32).copied is None


def test_slices_have_references_of_their_own() -> None:
    # heaviest of an average; none for a plain sum, for a single participant, or for weights that are not finite
    weights = np.array([[0.25, 0.5], [0.75, 0.0], [2, 1], [0, 0], [np.nan, 1], [0.25, 0.25], [1e-60, 0.5]])
    rounded, references = SumOfSlices(weights, np.array([0.25, 0.25, 0, 1, 0, 0.5, 0.5])).terms(F32, has_base=True)
    assert references.tolist() == [1, 0, -1, -1, -1, 2, 2]
    assert rounded.dtype == F32
    assert rounded[6].tolist() == [0, 0.5, 0.5]
    assert SumOfSlices(weights[:2]).terms(F64, has_base=False)[1].tolist() == [-1, -1]
    assert SumOfSlices(np.array([[0.5, 0.5]])).terms(F32, has_base=False)[1].tolist() == [0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consensus([1.0, 1.0], elect="foo"), "Consensus: elect='foo': must be one of None, 'weighted'"),
        (lambda: Consensus([1.0, 1.0], combine="foo"), "Consensus: combine='foo'"),
        (lambda: Gram(along="diag"), "Gram: along='diag'"),
        (lambda: SumOfSlices(np.ones((1, 2)), along="diag"), "SumOfSlices: along='diag'"),
        (lambda: Cut(np.nan), "the magnitude must be a number"),
        (lambda: Cut(1.0, share=2.0), "the share in"),
        (lambda: Cut(1.0, share=-1.0), "the share in"),
        (lambda: AtRandom([0.5, np.nan], 0), "AtRandom: density"),
        (lambda: AtRandom([0.5, 1.5], 0), "AtRandom: density"),
        (lambda: KthMagnitude([[1.5, 2]]), "ranks are integers"),  # type: ignore[list-item]
    ],
)
def test_steps_that_make_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make()


@pytest.mark.parametrize(
    ("survey", "step", "message"),
    [
        (KthMagnitude([[1]]), None, "for 2 models and 6 elements"),
        (KthMagnitude([[1, 7]]), None, "for 2 models and 6 elements"),
        (KeptMagnitude(AtLeast([Cut(1.0)] * 2), [True]), None, "for 2 models"),
        (KeptMagnitude(AtLeast([Cut(1.0)]), [True, True]), None, "for 2 models"),
        (KeptMagnitude(AtLeast([Cut(1.0)] * 2, [Cut(2.0)]), [True, True]), None, "for 2 models"),
        ("dots", None, "yielded str, which is not a survey"),
        (Gram(), Consensus([1.0]), "for 2 models"),
        (Gram(), Consensus([1.0, 1.0], rescale=[1.0]), "for 2 models"),
        (Gram(), Consensus([1.0, 1.0], AtRandom([1.0], 0)), "for 2 models"),
        (Gram(), SumOfSlices(np.ones((3, 2))), r"shape \(3, 2\) for the array; expected \[slices, models\] = \(2, 2\)"),
        (Gram(), SumOfSlices(np.ones((2, 2)), np.ones(5)), r"base_weights of shape \(5,\) for 2 slices"),
        (Gram(), "sum", "returned str, which is not an apply step"),
    ],
)
def test_steps_that_do_not_fit(survey: Any, step: Any, message: str) -> None:
    @method(paper="", base="required")
    def strange(scope: Scope) -> Steps:
        """Return what it was given."""
        yield survey
        return step  # type: ignore[no-any-return]

    model = np.ones((2, 3), np.float32)
    with pytest.raises(MergeError, match=message):
        merge([model, model], "strange", base=model)


def test_a_step_takes_arrays() -> None:
    @method(paper="", base="required")
    def rescaled(scope: Scope) -> Consensus:
        """Scale two task vectors."""
        return Consensus(np.array([1.0, 2.0]), rescale=np.array([3.0, 5.0]))

    base, models = np.float32([1]), [np.float32([2]), np.float32([3])]
    assert merge(models, "rescaled", base=base).tolist() == [1 + 3 * 1 + 2 * 5 * 2]
