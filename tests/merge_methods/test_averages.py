"""ema, lawa, wsm and geometric_median: numbers by hand, both sides of every parameter, and what their papers promise."""

from fractions import Fraction
from math import cos, pi, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_cl import MergeError, merge
from mergekit_cl.merge_methods.ema import ema
from mergekit_cl.merge_methods.lawa import lawa
from mergekit_cl.merge_methods.wsm import wsm
from mergekit_cl.steps import Scope

Array = npt.NDArray[Any]

DECAYS = ["linear", "cosine", "1-sqrt"]


def f64(*values: float) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)


def scope(models: int) -> Scope:
    return Scope(("w",), models, has_base=False)


def unit_models(count: int) -> list[Array]:
    """Models whose weighted sum is the list of weights."""
    return list(np.eye(count))


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.5, [1 / 7, 2 / 7, 4 / 7]),
        (0.9, [0.81 / 2.71, 0.9 / 2.71, 1 / 2.71]),
        (0, [0, 0, 1]),
        (1, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_ema_weighs_by_age(decay: float, expected: list[float]) -> None:
    assert merge(unit_models(3), "ema", decay=decay) == pytest.approx(expected, abs=1e-15)


def test_ema_remembers_ten_checkpoints_by_default() -> None:
    assert merge(unit_models(3), "ema").tobytes() == merge(unit_models(3), "ema", decay=0.9).tobytes()


def test_ema_is_adams_bias_corrected_moment() -> None:
    models = list(np.random.default_rng(0).standard_normal((20, 50)))
    for decay in (0.1, 0.9, 0.99):
        moment = np.zeros(50)
        for model in models:
            moment = decay * moment + (1 - decay) * model
        assert merge(models, "ema", decay=decay) == pytest.approx(moment / (1 - decay**20), abs=1e-12)


@pytest.mark.parametrize("decay", [1 - 1e-12, 1 - 2.0**-53, 0.999, 1e-300])
def test_ema_is_exact_next_to_its_limits(decay: float) -> None:
    weights = ema(scope(200), decay=decay).weights
    exact = Fraction(decay)
    total = sum(exact**age for age in range(200)) if decay > 1e-9 else Fraction(1)
    for age in (0, 1, 100, 199):
        assert weights[-1 - age] == pytest.approx(float(exact**age / total), rel=1e-13)


def test_ema_at_its_ends_gives_the_bits_of_linear_and_of_the_newest() -> None:
    models = list(np.random.default_rng(0).standard_normal((7, 1000)).astype(np.float32))
    assert merge(models, "ema", decay=1).tobytes() == merge(models, "linear").tobytes()
    models[-1][0] = -0.0
    assert merge(models, "ema", decay=0).tobytes() == models[-1].tobytes()


@pytest.mark.parametrize(
    ("window", "every", "expected"),
    [
        (1, 1, [0, 0, 0, 0, 1]),
        (3, 1, [0, 0, 1 / 3, 1 / 3, 1 / 3]),
        (5, 1, [0.2] * 5),
        (99, 1, [0.2] * 5),
        (2, 2, [0, 0, 0.5, 0, 0.5]),
        (3, 2, [1 / 3, 0, 1 / 3, 0, 1 / 3]),
        (4, 3, [0, 0.5, 0, 0, 0.5]),
        (2, 4, [0.5, 0, 0, 0, 0.5]),
        (2, 5, [0, 0, 0, 0, 1]),
    ],
)
def test_lawa_averages_the_latest(window: int, every: int, expected: list[float]) -> None:
    assert merge(unit_models(5), "lawa", window=window, every=every) == pytest.approx(expected, abs=1e-15)


def test_lawa_takes_each_checkpoint_unless_told_otherwise() -> None:
    assert merge(unit_models(3), "lawa", window=2).tolist() == [0, 0.5, 0.5]


def test_lawa_does_not_read_the_others() -> None:
    broken, old, new = np.full(3, np.nan), f64(1, 2, 3), f64(3, 2, 1)
    assert merge([broken, old, new], "lawa", window=2).tolist() == [2, 2, 2]
    assert merge([old, broken, new], "lawa", window=2, every=2).tolist() == [2, 2, 2]
    with pytest.raises(MergeError, match="finite"):
        merge([broken, old, new], "lawa", window=3)


def test_lawa_over_all_gives_the_bits_of_linear() -> None:
    models = list(np.random.default_rng(0).standard_normal((7, 1000)).astype(np.float32))
    assert merge(models, "lawa", window=7).tobytes() == merge(models, "linear").tobytes()


HALF = {
    "linear": [3 / 4, 1 / 2, 1 / 4],
    "cosine": [(1 + cos(pi / 4)) / 2, 1 / 2, (1 - cos(pi / 4)) / 2],
    "1-sqrt": [1 / 2, 1 - sqrt(1 / 2), 1 - sqrt(3 / 4)],
}


@pytest.mark.parametrize("final_ratio", [0, 0.1, 1])
@pytest.mark.parametrize("decay", DECAYS)
def test_wsm_scales_updates_as_the_schedule_does(decay: str, final_ratio: float) -> None:
    start, *updates = np.random.default_rng(0).standard_normal((4, 30))
    checkpoints = list(np.cumsum([start, *updates], axis=0))
    factors = [final_ratio + (1 - final_ratio) * w for w in HALF[decay]]
    expected = start + sum(w * g for w, g in zip(factors, updates, strict=True))
    assert merge(checkpoints, "wsm", decay=decay, final_ratio=final_ratio) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [1 / 3, 1 / 3, 1 / 3]),
        ("cosine", [1 / 4, 1 / 2, 1 / 4]),
        ("1-sqrt", [1 / sqrt(3), (sqrt(2) - 1) / sqrt(3), (sqrt(3) - sqrt(2)) / sqrt(3)]),
    ],
)
def test_wsm_weights_of_three_checkpoints(decay: str, expected: list[float]) -> None:
    assert merge(unit_models(3), "wsm", decay=decay) == pytest.approx(expected, abs=1e-15)
    ending = [0.8 * w for w in expected[:2]] + [0.8 * expected[2] + 0.2]
    assert merge(unit_models(3), "wsm", decay=decay, final_ratio=0.2) == pytest.approx(ending, abs=1e-15)


def test_wsm_defaults_to_1_sqrt_down_to_zero() -> None:
    assert merge(unit_models(4), "wsm").tobytes() == merge(unit_models(4), "wsm", decay="1-sqrt", final_ratio=0).tobytes()
    assert merge(unit_models(4), "wsm")[0] == pytest.approx(0.5)


def test_wsm_at_its_ends_gives_the_bits_of_linear_and_of_the_newest() -> None:
    models = list(np.random.default_rng(0).standard_normal((7, 1000)))
    assert merge(models, "wsm", decay="linear").tobytes() == merge(models, "linear").tobytes()
    for decay in DECAYS:
        assert merge(models, "wsm", decay=decay, final_ratio=1).tobytes() == models[-1].tobytes()


@given(models=st.integers(1, 3000), number=st.floats(0, 1), window=st.integers(1, 4000), every=st.integers(1, 50))
def test_weights_of_checkpoints_are_those_of_an_average(models: int, number: float, window: int, every: int) -> None:
    steps = [wsm(scope(models), decay=decay, final_ratio=number) for decay in ("linear", "cosine", "1-sqrt")]
    steps += [ema(scope(models), decay=number), lawa(scope(models), window=window, every=every)]
    for step in steps:
        assert len(step.weights) == models
        assert min(step.weights) >= 0
        terms = step.terms(np.dtype(np.float64))
        assert terms.reference is not None or terms.copied is not None  # they add up to one: bits of equal entries stay


@pytest.mark.parametrize(
    ("method", "parameters"), [("ema", {"decay": 0.3}), ("lawa", {"window": 4}), ("wsm", {}), ("wsm", {"decay": "cosine"})]
)
def test_entries_that_agree_keep_their_bits(method: str, parameters: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    same = rng.standard_normal(1000).astype(np.float32)
    models = [np.concatenate([same, rng.standard_normal(50).astype(np.float32)]) for _ in range(11)]
    assert merge(models, method, **parameters)[:1000].tobytes() == same.tobytes()
    assert merge(models[:1], method, **parameters).tobytes() == models[0].tobytes()


def cost(point: Array, models: Array, weight: Array) -> float:
    return float(weight @ np.linalg.norm(models - point, axis=1))


def surplus(point: Array, models: Array, weight: Array) -> float:
    """How much the models pull at a point beyond the weight of those that lie there, of all weight: 0 at the median."""
    away = models - point
    distances = np.linalg.norm(away, axis=1)
    there = distances <= 1e-9 * distances.max()
    pull = np.linalg.norm((weight[~there] / distances[~there]) @ away[~there])
    return float(max(pull - weight[there].sum(), 0) / weight.sum())


FERMAT = 0.5 - 0.5 / sqrt(3)
CORNERS = [f64(0, 0), f64(1, 0), f64(0, 1)]


@pytest.mark.parametrize(
    ("models", "weight", "expected"),
    [
        ([f64(0, 1), f64(9, 1), f64(3, 1)], 1, [3, 1]),
        (CORNERS, 1, [FERMAT, FERMAT]),
        ([f64(0, 0), f64(1, 0), f64(0.5, sqrt(0.75))], 1, [0.5, sqrt(1 / 12)]),
        ([f64(0, 0), f64(2, 0), f64(2, 2), f64(0, 4)], 1, [4 / 3, 4 / 3]),
        ([f64(0, 0), f64(2, 0), f64(2, 2), f64(-200, 404)], 1, [4 / 3, 4 / 3]),
        (CORNERS, [1.5, 1, 1], [0, 0]),
        (CORNERS, [1.3, 1, 1], None),
        (CORNERS, [1, 3, 1], [1, 0]),
        ([f64(0, 0), f64(5, 1), f64(-5, 1)], 1, [0, 0]),
        ([*CORNERS, f64(7, 7)], [1, 1, 1, 0], [FERMAT, FERMAT]),
        (CORNERS, [1e308, 1e308, 1e308], [FERMAT, FERMAT]),
    ],
)
def test_medians_known_in_closed_form(models: list[Array], weight: Any, expected: list[float] | None) -> None:
    if expected is None:  # on the diagonal, where the pulls of the others along it are 1.3 / sqrt(2) each
        sine = 1.3 / 2
        side = (1 - sine / sqrt(1 - sine**2)) / 2
        expected = [side, side]
    assert merge(models, "geometric_median", weight=weight) == pytest.approx(expected, abs=1e-9)


def test_a_model_that_is_the_median_comes_back_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    models = list(rng.standard_normal((3, 500)).astype(np.float32))
    models[1][:3] = -0.0, 1e-45, 7
    for weight in ([1, 2.1, 1], [1, 1.99, 1]):  # three models far apart: the others pull with sqrt(3) at least
        assert merge(models, "geometric_median", weight=weight).tobytes() == models[1].tobytes()


def test_where_several_points_are_medians() -> None:
    line = [f64(0, 0), f64(10, 10), f64(1, 1), f64(4, 4)]
    assert merge(line, "geometric_median").tolist() == [2.5, 2.5]
    assert merge(line[:2], "geometric_median").tolist() == [5, 5]
    assert merge(line[:2], "geometric_median", weight=[1.01, 1]).tolist() == [0, 0]
    assert merge(line[1:], "geometric_median", weight=[2, 1, 1]).tolist() == [8, 8]  # between 4 (weight 1) and 10 (weight 2)


def test_models_that_coincide_count_as_one() -> None:
    a, b, c, d = np.random.default_rng(0).standard_normal((4, 10))
    twice = merge([a, b, c, a, d], "geometric_median")
    assert twice == pytest.approx(merge([a, b, c, d], "geometric_median", weight=[2, 1, 1, 1]), abs=1e-12)
    assert merge([a, b, a.copy()], "geometric_median").tobytes() == a.tobytes()
    assert merge([b, a, b, a], "geometric_median") == pytest.approx((a + b) / 2)


@pytest.mark.parametrize(("gap", "equal"), [(3e-8, True), (1e-4, False)])
def test_models_as_close_as_rounding_are_averaged(gap: float, equal: bool) -> None:
    models = [f64(1, 1), f64(1 + gap, 1), f64(1 + gap, 1 - gap)]
    merged = merge(models, "geometric_median")
    middle = f64(1 + 2 / 3 * gap, 1 - gap / 3) if equal else f64(1 + gap * (1 - FERMAT), 1 - gap * FERMAT)
    assert merged == pytest.approx(middle, abs=1e-5 * gap)


def test_distances_survive_a_large_common_part() -> None:
    rng = np.random.default_rng(0)
    common, deltas = rng.standard_normal(5000), 1e-4 * rng.standard_normal((5, 5000)) * f64(1, 1, 2, 9, 3)[:, None]
    expected = merge(list(deltas), "geometric_median")
    error = merge(list(common + deltas), "geometric_median") - common - expected
    assert np.abs(error).max() < 1e-6 * np.abs(expected).max()


@st.composite
def points(draw: st.DrawFn) -> tuple[Array, Array]:
    """Models in few or many dimensions, some of them equal, some far off, and weights."""
    count, dimensions = draw(st.integers(2, 7)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    models = rng.standard_normal((count, dimensions)) * 10.0 ** rng.integers(-1, 2, (count, 1))
    models = models[rng.integers(0, count, count)] if draw(st.booleans()) else models
    weight = draw(st.just(np.ones(count)) | st.lists(st.floats(0.1, 3), min_size=count, max_size=count).map(np.array))
    return models, weight


@given(points())
@settings(max_examples=200)
def test_nothing_pulls_at_the_median(drawn: tuple[Array, Array]) -> None:
    models, weight = drawn
    merged = merge(list(models), "geometric_median", weight=weight.tolist())
    assert np.isfinite(merged).all()
    nearest = models[np.linalg.norm(models - merged, axis=1).argmin()]
    assert min(surplus(merged, models, weight), surplus(nearest, models, weight)) < 1e-6
    best = min(cost(model, models, weight) for model in models)
    assert cost(merged, models, weight) <= best * (1 + 1e-9)


@given(points())
@settings(max_examples=30)
def test_it_is_no_worse_than_ten_thousand_steps_of_weiszfeld(drawn: tuple[Array, Array]) -> None:
    models, weight = drawn
    point = weight @ models / weight.sum()
    for _ in range(10_000):
        distances = np.maximum(np.linalg.norm(models - point, axis=1), 1e-12)
        following = (weight / distances) @ models / (weight / distances).sum()
        if (following == point).all():
            break
        point = following
    merged = merge(list(models), "geometric_median", weight=weight.tolist())
    assert cost(merged, models, weight) <= cost(point, models, weight) * (1 + 1e-9)


@given(points(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_the_order_of_the_models_does_not_matter(drawn: tuple[Array, Array], shuffle: Any) -> None:
    models, weight = drawn
    order = list(range(len(models)))
    shuffle.shuffle(order)
    merged = merge(list(models), "geometric_median", weight=weight.tolist())
    other = merge(list(models[order]), "geometric_median", weight=weight[order].tolist())
    assert other == pytest.approx(merged, abs=2e-6 * np.abs(models).max())


def test_an_outlier_moves_it_little_however_far() -> None:
    rng = np.random.default_rng(0)
    models = list(rng.standard_normal((9, 100)))
    clean = merge(models, "geometric_median")
    away = rng.standard_normal(100)
    moved = [np.linalg.norm(merge([*models, far * away], "geometric_median") - clean) for far in (10, 1e3, 1e9, 1e30)]
    assert moved == pytest.approx([moved[-1]] * 4, rel=0.05)
    assert moved[2] == pytest.approx(moved[3], rel=1e-7)
    assert moved[-1] < 0.2 * np.linalg.norm(models[0] - clean)


def test_max_iter_and_tol() -> None:
    models, weight = list(np.eye(3)), [1.7, 1, 1]  # close to the first model: plain Weiszfeld takes hundreds of steps
    height = 0.85 / sqrt(1 - 0.85**2) * sqrt(1 / 2)  # above the middle of the others, where each pulls down with 0.85
    exact = height / sqrt(3 / 2)
    errors = [merge(models, "geometric_median", weight=weight, max_iter=n)[0] - exact for n in (1, 2, 3, 4)]
    assert np.abs(errors) == pytest.approx([3e-3, 1e-5, 1e-10, 0], rel=0.3, abs=1e-15)
    for tol, steps in ((1e-3, 3), (1e-5, 4)):
        merged = merge(models, "geometric_median", weight=weight, tol=tol)
        assert merged.tobytes() == merge(models, "geometric_median", weight=weight, max_iter=steps).tobytes()


@pytest.mark.parametrize("seed", [9, 11, 14])
def test_an_outlier_with_almost_half_of_the_weight_is_left_in_few_steps(seed: int) -> None:
    """Newton's whole step goes too far here, and Weiszfeld's are too small for a hundred of them."""
    models = np.random.default_rng(seed).standard_normal((5, 20)) * f64(1, 10, 100, 1e3, 1e4)[:, None]
    weight = f64(1, 1, 1, 1, 3.95)
    merged = merge(list(models), "geometric_median", weight=weight.tolist(), max_iter=12)
    assert surplus(merged, models, weight) < 1e-9


@pytest.mark.parametrize(("tol", "expected"), [(0.05, True), (0.04, False)])
def test_tol_decides_when_a_model_is_the_median(tol: float, expected: bool) -> None:
    merged = merge(CORNERS, "geometric_median", weight=[1.35, 1, 1], tol=tol)  # the others pull with sqrt(2), 4.8 % more
    assert (merged.tolist() == [0, 0]) is expected


def test_a_point_is_a_tensor_or_a_model() -> None:
    models = [{"a": f64(x), "b": f64(y)} for x, y in CORNERS]
    assert {t: v.tolist() for t, v in merge(models, "geometric_median").items()} == {"a": [0], "b": [0]}
    merged = merge(models, "geometric_median", scope="model")
    assert merged["a"] == pytest.approx([FERMAT])
    assert merged["b"] == pytest.approx([FERMAT])


def test_models_without_weight_are_left_out() -> None:
    models = [f64(np.nan, 0), *CORNERS]
    assert merge(models, "geometric_median", weight=[0, 1, 1, 1], nonfinite="allow") == pytest.approx([FERMAT] * 2)
    assert merge(models, "geometric_median", weight=[0, 0, 1, 0], nonfinite="allow").tolist() == [1, 0]


def test_models_at_an_infinite_distance_are_averaged() -> None:
    models = [f64(np.inf, 1), f64(2, 3), f64(2, 5)]
    assert merge(models, "geometric_median", nonfinite="allow")[1] == 3
    huge = [f64(1e200), f64(2e200), f64(6e200)]
    assert merge(huge, "geometric_median", nonfinite="allow") == pytest.approx([3e200])
    with pytest.raises(MergeError, match="overflows"):
        merge(huge, "geometric_median")


@pytest.mark.parametrize(
    "parameters",
    [{"method": "ema", "decay": 0.5}, {"method": "lawa", "window": 2}, {"method": "wsm"}, {"method": "geometric_median"}],
)
def test_one_model_and_models_of_integers(parameters: dict[str, Any]) -> None:
    model = {"w": np.float32([-0.0, 1e-45, 3]), "n": np.array([3, 4])}
    for merged in (merge([model], **parameters), merge([model, model], **parameters)):
        assert {t: v.tobytes() for t, v in merged.items()} == {t: v.tobytes() for t, v in model.items()}
    integers = merge([{"n": np.array([3, 4])}, {"n": np.array([3, 4])}], **parameters)
    assert integers["n"].tolist() == [3, 4]


@pytest.mark.parametrize(("method", "parameters", "message"), [
    ("ema", {"decay": 1.5}, r"decay=1\.5: must be in \[0, 1\]"),
    ("ema", {"decay": 0.5, "base": f64(1)}, "ema has no use for a base"),
    ("lawa", {}, r"lawa needs window: pass window=\.\.\. \(how many"),
    ("lawa", {"window": 0}, r"window=0: must be in \[1, inf"),
    ("lawa", {"window": 2.5}, r"window=2\.5: must be an integer"),
    ("lawa", {"window": 2, "every": 0}, r"every=0: must be in \[1, inf"),
    ("lawa", {"window": 2, "base": f64(1)}, "lawa has no use for a base"),
    ("wsm", {"decay": "sqrt"}, "decay='sqrt': must be one of 'linear', 'cosine', '1-sqrt'"),
    ("wsm", {"final_ratio": -0.1}, r"final_ratio=-0\.1: must be in \[0, 1\]"),
    ("wsm", {"base": f64(1)}, "wsm has no use for a base"),
    ("geometric_median", {"weight": [1, -1]}, r"weight=-1: must be in \[0, inf"),
    ("geometric_median", {"weight": 0}, "the weights sum to zero"),
    ("geometric_median", {"max_iter": 0}, "max_iter=0"),
    ("geometric_median", {"max_iter": 1.5}, "max_iter=1.5: must be an integer"),
    ("geometric_median", {"tol": -1}, "tol=-1"),
    ("geometric_median", {"base": f64(1)}, "geometric_median has no use for a base"),
])  # fmt: skip
def test_bad_parameters(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge([f64(1), f64(2)], method, **parameters)
