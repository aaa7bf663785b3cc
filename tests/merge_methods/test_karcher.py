"""karcher: numbers by hand, both sides of every parameter, and that the result is the minimum it is meant to be."""

from math import cos, pi, sin, sqrt

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_cl import MergeError, merge


def f64(*values: float) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([1, 2], [4 * cos(pi / 3), 4 * sin(pi / 3)]),
        (1, [4.5 * sqrt(0.5)] * 2),
        ([1, 0], [6, 0]),
        ([5, 1], [5.5 * cos(pi / 12), 5.5 * sin(pi / 12)]),
        ([1e308, 1e308], [4.5 * sqrt(0.5)] * 2),
    ],
)
def test_two_models_divide_the_angle(weight: object, expected: list[float]) -> None:
    merged = merge([f64(6, 0), f64(0, 3)], "karcher", weight=weight)
    assert merged == pytest.approx(expected, abs=1e-12)


def test_the_norm_is_the_mean_norm() -> None:
    merged = merge([f64(1, 0, 0), f64(0, 2, 0), f64(0, 0, 9)], "karcher")
    assert merged == pytest.approx([4 / sqrt(3)] * 3)


def test_without_iterations_it_is_multislerp() -> None:
    models = list(np.random.default_rng(0).standard_normal((3, 10)) + 1)
    start = merge(models, "multislerp", weight=[1, 2, 3], eps=0)
    assert merge(models, "karcher", weight=[1, 2, 3], max_iter=0) == pytest.approx(start, rel=1e-12)
    assert merge(models, "karcher", weight=[1, 2, 3], tol=0.5) == pytest.approx(start, rel=1e-12)
    end = merge(models, "karcher", weight=[1, 2, 3])
    assert np.abs(end - start).max() > 1e-3
    once = merge(models, "karcher", weight=[1, 2, 3], max_iter=1)
    assert 0 < np.abs(end - once).max() < np.abs(end - start).max() / 10


@given(st.integers(0, 2**32), st.lists(st.floats(0.1, 1), min_size=2, max_size=5))
def test_the_pulls_of_the_models_add_up_to_zero(seed: int, weight: list[float]) -> None:
    models = np.random.default_rng(seed).standard_normal((len(weight), 20)) + 1
    merged = merge(list(models), "karcher", weight=weight, tol=1e-7, max_iter=100)
    norms = np.linalg.norm(models, axis=1)
    assert np.linalg.norm(merged) == pytest.approx(norms @ weight / sum(weight))
    mean, units = merged / np.linalg.norm(merged), models / norms[:, None]
    cosines = units @ mean
    angles = np.arccos(cosines)
    pulls = (angles / np.sin(angles))[:, None] * (units - cosines[:, None] * mean)
    assert np.linalg.norm(weight @ pulls) / sum(weight) < 1.1e-7


@pytest.mark.parametrize(("norm", "directed"), [(0.9e-5, False), (1.1e-5, True)])
def test_models_of_a_norm_up_to_tol_have_no_direction(norm: float, directed: bool) -> None:
    merged = merge([f64(4, 0), f64(0, norm)], "karcher")
    assert merged == pytest.approx([2 * sqrt(0.5), 2 * sqrt(0.5)] if directed else [2, 0], rel=1e-4)


def test_without_any_direction_it_is_the_average() -> None:
    assert merge([f64(4e-6, 0), f64(0, 2e-6)], "karcher").tolist() == [2e-6, 1e-6]
    assert merge([f64(4, 0), f64(0, 2)], "karcher", tol=10).tolist() == [2, 1]


def test_directions_that_cancel_are_averaged() -> None:
    assert merge([f64(4, 0), f64(-2, 0)], "karcher").tolist() == [1, 0]
    third = [f64(6, 0), f64(-3, 3 * sqrt(3)), f64(-3, -3 * sqrt(3))]
    assert merge(third, "karcher") == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(("gap", "averaged"), [(1e-6, True), (1e-4, False)])
def test_what_counts_as_cancelled(gap: float, averaged: bool) -> None:
    merged = merge([f64(1, gap), f64(-1, gap)], "karcher")
    assert merged == pytest.approx([0, gap if averaged else 1], rel=1e-4, abs=1e-9)


def test_a_direction_opposite_to_the_mean_pulls_nowhere() -> None:
    assert merge([f64(4, 0), f64(-4, 0)], "karcher", weight=[3, 1]) == pytest.approx([4, 0])
    for tol in (0, 1e-9):
        assert merge([f64(4, 2), f64(-4, -2)], "karcher", weight=[3, 1], tol=tol) == pytest.approx([4, 2])


@pytest.mark.parametrize(("parameters", "message"), [
    ({"weight": [1, -1]}, r"weight=-1: must be in \[0, inf"),
    ({"weight": 0}, "the weights sum to zero"),
    ({"max_iter": -1}, "max_iter=-1"),
    ({"max_iter": 1.5}, "max_iter=1.5: must be an integer"),
    ({"tol": -1}, "tol=-1"),
    ({"base": f64(1)}, "karcher has no use for a base"),
])  # fmt: skip
def test_bad_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge([f64(1), f64(2)], "karcher", **parameters)
