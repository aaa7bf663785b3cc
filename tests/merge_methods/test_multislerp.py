"""multislerp: numbers by hand, both sides of every flag, directions that cancel."""

from math import sqrt

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import MergeError, merge


def f64(*values: float) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)


AXES = [f64(5, 0), f64(0, 5)]


@pytest.mark.parametrize(
    ("weight", "normalize", "expected"),
    [
        ([3, 4], True, [3, 4]),
        ([3, 4], False, [21, 28]),
        (1, True, [5 * sqrt(0.5)] * 2),
        ([3, -4], True, [-3, 4]),  # weights -3 and 4
        ([-3, -4], False, [21, 28]),  # direction and norm both change their sign
        ([1, 0], True, [5, 0]),
    ],
)
def test_directions_and_norms_are_averaged_apart(weight: object, normalize: bool, expected: list[float]) -> None:
    merged = merge(AXES, "multislerp", weight=weight, normalize_weights=normalize)
    assert merged == pytest.approx(expected, rel=1e-8)


def test_norms_have_weights_too() -> None:
    merged = merge([f64(1, 0, 0), f64(0, 2, 0), f64(0, 0, 9)], "multislerp")
    assert merged == pytest.approx([4 / sqrt(3)] * 3)
    merged = merge([f64(1, 0), f64(0, 7)], "multislerp", weight=[3, 4])
    assert merged == pytest.approx([31 / 7 * 0.6, 31 / 7 * 0.8])


def test_task_vectors_are_added_to_the_base() -> None:
    base = f64(10, 20)
    merged = merge([base + axis for axis in AXES], "multislerp", base=base, weight=[3, 4])
    assert merged == pytest.approx([13, 24])


def test_eps_is_added_to_norms() -> None:
    # units 4 / 4.5 and 0.5 / 1: direction (16, 9) / sqrt(337), norm 2.25
    merged = merge([f64(4, 0), f64(0, 0.5)], "multislerp", eps=0.5)
    assert merged == pytest.approx([36 / sqrt(337), 20.25 / sqrt(337)])
    merged = merge([f64(3, 0), f64(0, 0)], "multislerp", eps=0)
    assert merged == pytest.approx([1.5, 0])


def test_one_model_is_returned_whatever_its_weight() -> None:
    for normalize in (False, True):
        merged = merge([f64(1, 2)], "multislerp", base=f64(5, 5), weight=0.5, normalize_weights=normalize)
        assert merged.tolist() == [1, 2]


def test_directions_that_cancel_are_summed() -> None:
    assert merge([f64(4, 0), f64(-2, 0)], "multislerp").tolist() == [1, 0]
    assert merge([f64(4, 0), f64(-2, 0)], "multislerp", normalize_weights=False).tolist() == [2, 0]
    third = [f64(6, 0), f64(-3, 3 * sqrt(3)), f64(-3, -3 * sqrt(3))]
    assert merge(third, "multislerp") == pytest.approx([0, 0], abs=1e-12)
    assert merge(third, "multislerp", base=f64(0, 0)) == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("eps", "gap", "linear"), [(1e-8, 1.01e-6, False), (1e-8, 0.99e-6, True), (0.1, 0.099, True), (0.1, 0.12, False)]
)
def test_what_counts_as_cancelled(eps: float, gap: float, linear: bool) -> None:
    # (1, gap) and (-1, gap): a mean direction along the second axis, of length gap
    merged = merge([f64(1, gap), f64(-1, gap)], "multislerp", eps=eps)
    assert merged == pytest.approx([0, gap if linear else sqrt(1 + gap**2)], rel=1e-3, abs=1e-9)


def test_a_vector_of_zeros_has_a_norm_but_no_direction() -> None:
    assert merge([f64(6, 0), f64(0, 0)], "multislerp") == pytest.approx([3, 0])


def test_weights_that_sum_to_zero_cannot_be_normalised() -> None:
    with pytest.raises(MergeError, match="the weights sum to zero"):
        merge(AXES, "multislerp", weight=[1, -1])
    merged = merge(AXES, "multislerp", weight=[1, -1], normalize_weights=False)
    assert merged.tolist() == [0, 0]  # the mean norm is zero
    assert merge(AXES, "multislerp", weight=0, normalize_weights=False).tolist() == [0, 0]


def test_huge_weights() -> None:
    assert merge(AXES, "multislerp", weight=[3e307, 4e307]) == pytest.approx([3, 4])
    with pytest.raises(MergeError):
        merge(AXES, "multislerp", weight=[1e308, 1e308], normalize_weights=False)
    with pytest.raises(MergeError, match=r"eps=-1: must be in \[0, inf"):
        merge(AXES, "multislerp", eps=-1)


def test_negative_weights_of_equal_models_change_their_sign_twice() -> None:
    assert merge([f64(1, 2)] * 2, "multislerp", weight=[-1, -2], normalize_weights=False).tolist() == [3, 6]
