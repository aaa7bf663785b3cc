"""Sum.terms: which inputs take part, and about which of them a sum is computed."""

import numpy as np
import pytest

from mergekit_cl.steps import Sum, Terms

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
