"""nuslerp: numbers by hand, with and without a base, by tensors, rows and columns; both sides of its thresholds."""

from math import acos, cos, pi, sin, sqrt

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import MergeError, merge


def f64(*values: object) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)


RIGHT = [f64(2, 0), f64(0, 2)]
GRIDS = [f64([2, 0], [3, 0]), f64([0, 2], [3, 0])]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([2, 1], [sqrt(3), 1]),
        (1, [sqrt(2), sqrt(2)]),
        ([1, 0], [2, 0]),
        ([0, 1], [0, 2]),
        ([2, -0.5], [sqrt(3), -1]),  # t = -1/3, 30 degrees beyond
        ([1e308, 1e308], [sqrt(2), sqrt(2)]),
        ([-2, -1], [sqrt(3), 1]),
    ],
)
def test_weights_say_how_far_to_go(weight: object, expected: list[float]) -> None:
    assert merge(RIGHT, "nuslerp", weight=weight) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("weight", "t"), [([0, 0], 0.5), ([2, -2], 0.5), ([2e-7, 7e-7], 0.5), ([2e-7, -11e-7], 0.5), ([3e-7, 9e-7], 0.75)]
)
def test_weights_that_sum_to_less_than_1e_6_go_half_way(weight: list[float], t: float) -> None:
    assert merge(RIGHT, "nuslerp", weight=weight) == pytest.approx([2 * cos(t * pi / 2), 2 * sin(t * pi / 2)])


def test_equal_weights_are_the_default() -> None:
    assert merge(RIGHT, "nuslerp").tolist() == merge(RIGHT, "nuslerp", weight=[1, 1]).tolist()


def test_task_vectors_are_added_to_the_base() -> None:
    base = f64(10, 20)
    assert merge([base + m for m in RIGHT], "nuslerp", base=base, weight=[2, 1]) == pytest.approx([10 + sqrt(3), 21])


def test_rows_have_angles_of_their_own() -> None:
    rows = merge(GRIDS, "nuslerp", nuslerp_flatten=False)
    assert rows == pytest.approx(f64([sqrt(2), sqrt(2)], [3, 0]))
    assert rows[1].tobytes() == GRIDS[0][1].tobytes()
    flat = 0.5 / cos(acos(9 / 13) / 2)
    for row_wise in (False, True):
        merged = merge(GRIDS, "nuslerp", nuslerp_row_wise=row_wise)
        assert merged == pytest.approx(flat * (GRIDS[0] + GRIDS[1]))


def test_row_wise_vectors_run_along_the_first_dimension() -> None:
    # columns (2, 3) and (0, 3), cos 3 / sqrt(13); (0, 0) and (2, 0), which counts as a right angle
    weight = 0.5 / cos(acos(3 / sqrt(13)) / 2)
    merged = merge(GRIDS, "nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True)
    assert merged == pytest.approx(f64([weight * 2, sqrt(0.5) * 2], [weight * 6, 0]))
    turned = merge([grid.T for grid in GRIDS], "nuslerp", nuslerp_flatten=False)
    assert merged == pytest.approx(turned.T, rel=1e-15)


def test_rows_of_task_vectors() -> None:
    base = f64([1, 2], [3, 4])
    merged = merge([base + grid for grid in GRIDS], "nuslerp", base=base, nuslerp_flatten=False)
    assert merged == pytest.approx(base + f64([sqrt(2), sqrt(2)], [3, 0]))


def test_a_vector_is_one_slice() -> None:
    for row_wise in (False, True):
        merged = merge(RIGHT, "nuslerp", weight=[2, 1], nuslerp_flatten=False, nuslerp_row_wise=row_wise)
        assert merged == pytest.approx([sqrt(3), 1])


def test_slices_are_of_one_tensor() -> None:
    with pytest.raises(MergeError, match="scope"):
        merge([{"a": vector, "b": -vector} for vector in RIGHT], "nuslerp", nuslerp_flatten=False, scope="model")


@pytest.mark.parametrize(("gap", "linear"), [(1e-4, True), (1e-3, False)])
def test_opposite_vectors_are_interpolated_linearly(gap: float, linear: bool) -> None:
    models = [f64(1, 0), f64(-cos(gap), sin(gap))]
    weight = 0.5 if linear else 0.5 / sin(gap / 2)
    assert merge(models, "nuslerp") == pytest.approx([weight * (1 - cos(gap)), weight * sin(gap)], rel=1e-6)


def test_small_angles_have_no_threshold() -> None:
    model = f64(cos(0.01), sin(0.01))
    weight = 0.5 / cos(0.005)  # slerp would take 0.5
    assert merge([f64(1, 0), model], "nuslerp") == pytest.approx([weight * (1 + model[0]), weight * model[1]], rel=1e-9)


@pytest.mark.parametrize(("scale", "angle"), [(1e-6, pi / 3), (1e-7, pi / 3), (5e-8, acos(0.125)), (1e-10, acos(0.5e-6))])
def test_norms_below_1e_7_count_as_1e_7(scale: float, angle: float) -> None:
    merged = merge([scale * f64(1, 0), scale * f64(0.5, sqrt(0.75))], "nuslerp")
    weight = scale * 0.5 / cos(angle / 2)
    assert merged == pytest.approx([weight * 1.5, weight * sqrt(0.75)], rel=1e-8)


def test_a_model_equal_to_the_base_is_at_a_right_angle() -> None:
    base = f64(1, 1)
    assert merge([base, f64(3, 1)], "nuslerp", base=base, weight=[2, 1]) == pytest.approx([2, 1])
