"""slerp: numbers by hand, both sides of its thresholds, and what it refuses."""

from math import acos, cos, pi, sin, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import MergeError, merge


def f64(*values: float) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)


def slerp(base: npt.NDArray[Any], model: npt.NDArray[Any], t: float) -> list[float]:
    merged = merge([model], "slerp", base=base, t=t)
    assert merged.tobytes() == merge([base, model], "slerp", t=t).tobytes()
    return merged.tolist()  # type: ignore[no-any-return]


def test_a_right_angle() -> None:
    assert slerp(f64(2, 0), f64(0, 2), t=1 / 3) == pytest.approx([sqrt(3), 1])
    assert slerp(f64(2, 0), f64(0, 2), t=2 / 3) == pytest.approx([1, sqrt(3)])


def test_vectors_keep_their_norms() -> None:
    assert slerp(f64(2, 0), f64(0, 8), t=1 / 3) == pytest.approx([sqrt(3), 4])


def test_an_acute_and_an_obtuse_angle() -> None:
    # half-way, both weights are 1 / (2 cos(angle / 2)): 1 / sqrt(3) for 60 degrees, 1 for 120
    for angle, weight in ((pi / 3, 1 / sqrt(3)), (2 * pi / 3, 1)):
        model = f64(cos(angle), sin(angle))
        assert slerp(f64(1, 0), model, t=0.5) == pytest.approx([weight * (1 + model[0]), weight * model[1]])


def test_the_ends_are_the_models_bit_for_bit() -> None:
    base, model = np.float32([1e-40, -0.0, 3]), np.float32([7, 0.1, 7])
    assert merge([model], "slerp", base=base, t=0).tobytes() == base.tobytes()
    assert merge([model], "slerp", base=base, t=1).tobytes() == model.tobytes()


@pytest.mark.parametrize(("cosine", "linear"), [(0.9994, False), (0.9996, True), (-0.9994, False), (-0.9996, True)])
def test_almost_parallel_vectors_are_interpolated_linearly(cosine: float, linear: bool) -> None:
    weight = 0.5 if linear else 0.5 / cos(acos(cosine) / 2)  # 0.500075 and 28.9
    model = f64(cosine, sqrt(1 - cosine**2))
    assert slerp(f64(1, 0), model, t=0.5) == pytest.approx([weight * (1 + cosine), weight * model[1]], rel=1e-9)


@pytest.mark.parametrize(("scale", "weight"), [(1.1e-8, 1 / sqrt(3)), (0.9e-8, sqrt(0.5))])
def test_norms_of_at_most_1e_8_count_as_one(scale: float, weight: float) -> None:
    merged = slerp(scale * f64(1, 0), scale * f64(0.5, sqrt(0.75)), t=0.5)  # 60 degrees, or as good as 90
    assert merged == pytest.approx([scale * weight * 1.5, scale * weight * sqrt(0.75)], rel=1e-9)


def test_a_tensor_of_zeros_is_at_a_right_angle() -> None:
    assert slerp(f64(0, 0), f64(3, 0), t=1 / 3) == pytest.approx([1.5, 0])
    assert slerp(f64(3, 0), f64(0, 0), t=1 / 3) == pytest.approx([3 * sqrt(0.75), 0])


@pytest.mark.parametrize(
    ("models", "base", "message"),
    [
        (1, False, "slerp interpolates between two models, but got 1: pass a base= and one model, or two models and no base"),
        (2, True, "slerp interpolates between two models, but got 3"),
        (3, False, "slerp merges 1 to 2 models, but got 3"),
    ],
)
def test_other_numbers_of_models_are_refused(models: int, base: bool, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge([f64(1)] * models, "slerp", base=f64(1) if base else None, t=0.5)


def test_t_has_no_default() -> None:
    with pytest.raises(MergeError, match="slerp needs t"):
        merge([f64(1), f64(2)], "slerp")
