"""model_stock: numbers by hand, by tensors and by rows; both sides of its thresholds."""

from math import cos, sin, sqrt

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import MergeError, merge


def f64(*values: object) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)


HALF = [f64(3, 3, 0), f64(3, 0, 3)]
ZERO = f64(0, 0, 0)


def test_half_a_cosine_is_two_thirds_of_the_way() -> None:
    assert merge(HALF, "model_stock", base=ZERO) == pytest.approx([2, 1, 1])
    base = f64(10, 20, 30)
    assert merge([base + model for model in HALF], "model_stock", base=base) == pytest.approx([12, 21, 31])


def test_the_cosine_is_the_mean_over_all_pairs() -> None:
    # cosines 1/2, 1/2 and 1/2: t = 3/2 / 2; and 1/2, 0, 1/sqrt(2)
    merged = merge([*HALF, f64(0, 3, 3)], "model_stock", base=ZERO)
    assert merged == pytest.approx([1.5, 1.5, 1.5])
    cosine = (0.5 + sqrt(0.5)) / 3
    t = 3 * cosine / (1 + 2 * cosine)
    assert merge([*HALF, f64(0, 0, 3)], "model_stock", base=ZERO) == pytest.approx([t * 2, t, t * 2])


def test_parallel_task_vectors_are_averaged_and_orthogonal_ones_dropped() -> None:
    base = f64(1, 1)
    assert merge([f64(2, 1), f64(4, 1)], "model_stock", base=base) == pytest.approx([3, 1])
    assert merge([f64(2, 1), f64(1, 7)], "model_stock", base=base).tolist() == [1, 1]


def test_filter_wise_has_a_t_for_each_row() -> None:
    base = f64([0, 0], [5, 5])
    models = [f64([2, 0], [6, 5]), f64([4, 0], [5, 6])]
    rows = merge(models, "model_stock", base=base, filter_wise=True)
    assert rows == pytest.approx(f64([3, 0], [5, 5]))
    cosine = 8 / sqrt(5 * 17)
    t = 2 * cosine / (1 + cosine)
    assert merge(models, "model_stock", base=base) == pytest.approx(base + t * f64([3, 0], [0.5, 0.5]))
    assert merge(HALF, "model_stock", base=ZERO, filter_wise=True) == pytest.approx([2, 1, 1])


@pytest.mark.parametrize(("angle", "singular"), [(1e-3, True), (1e-2, False)])
def test_opposite_task_vectors_leave_the_base(angle: float, singular: bool) -> None:
    # 1 + cos is angle**2 / 2: 5e-7, and 5e-5
    t = 0 if singular else -2 * cos(angle) / (1 - cos(angle))
    models = [f64(1, 0), f64(-cos(angle), sin(angle))]
    expected = [t * (1 - cos(angle)) / 2, t * sin(angle) / 2]
    assert merge(models, "model_stock", base=f64(0, 0)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("scale", "cosine"), [(1.1e-3, 0.5), (0.5e-3, 0.125)])
def test_products_of_norms_below_1e_6_count_as_1e_6(scale: float, cosine: float) -> None:
    models = [scale * f64(1, 0), scale * f64(0.5, sqrt(0.75))]
    t = 2 * cosine / (1 + cosine)
    merged = merge(models, "model_stock", base=f64(0, 0))
    assert merged == pytest.approx([t * scale * 0.75, t * scale * sqrt(0.1875)], rel=1e-9)


def test_a_model_equal_to_the_base_is_at_a_right_angle() -> None:
    base = f64(1, 1)
    assert merge([base, f64(4, 1)], "model_stock", base=base).tolist() == [1, 1]


def test_one_model_is_too_few() -> None:
    with pytest.raises(MergeError, match="model_stock merges 2 or more models, but got 1"):
        merge([f64(1)], "model_stock", base=f64(0))
