"""nearswap, ram, ramplus_tl, sce, arcee_fusion, della, median, magmax: by hand, beside mergekit, and what della drops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mergekit_cl import MergeError, NonFiniteError, merge, methods
from mergekit_cl.cli import app

Array = npt.NDArray[Any]

BACKENDS = ["numpy", "numba", "triton"]


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def sparse_models(shape: tuple[int, ...], count: int, seed: int, scale: float = 0.1) -> tuple[Array, list[Array]]:
    """Models that have each changed about half of the entries, some of them by very little."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    models = []
    for _ in range(count):
        change = scale * rng.standard_normal(shape) * np.where(rng.random(shape) < 0.1, 1e-5, 1)
        models.append(np.asarray(base + change * (rng.random(shape) < 0.5), np.float32))
    return base, models


def dense_models(shape: tuple[int, ...], count: int, seed: int, scale: float = 0.1) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, [np.asarray(base + scale * rng.standard_normal(shape), np.float32) for _ in range(count)]


def distant(result: Array, expected: Array) -> int:
    """Count the entries that are further from mergekit's than 1e-6 of the largest entry."""
    return int((np.abs(result - expected) > 1e-6 * np.abs(expected).max()).sum())


SHAPES = [(1000,), (37, 53), (3, 4, 5, 6), (8, 1), (1,), ()]


# By hand


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.5, [1.25, 1.5, 0.5, 1, 1.5]),  # near; 1 + 0.5; 1 - 0.5; equal; just as far as 0.5
        (0, [1, 1, 1, 1, 1]),
        (2, [1.25, 3, -1, 1, 1.5]),
        (1e9, [1.25, 3, -1, 1, 1.5]),
    ],
)
def test_nearswap(backend: str, t: float, expected: list[float]) -> None:
    model = f32(1.25, 3, -1, 1, 1.5)
    assert merge([model], "nearswap", base=np.ones(5, np.float32), t=t, backend=backend).tolist() == expected


def test_nearswap_of_tiny_differences() -> None:
    """Below 1e-6 a difference counts as 1e-6: 4e-7 / 1e-6 of the way."""
    result = merge([f32(5e-7, 2e-6)], "nearswap", base=f32(0, 0), t=4e-7)
    np.testing.assert_allclose(result, [2e-7, 4e-7], rtol=1e-6)
    base, (model,) = dense_models((1000,), 1, 0)
    assert np.array_equal(merge([model], "nearswap", base=base, t=9), model)  # not base + (model - base)
    with pytest.raises(MergeError, match=r"t=-0.1: must be in \[0, inf\)"):
        merge([f32(1)], "nearswap", base=f32(1), t=-0.1)
    with pytest.raises(MergeError, match="nearswap needs t"):
        merge([f32(1)], "nearswap", base=f32(1))


RAM = [f32(2, 1, 0.5, 0, -1, 0), f32(0, 3, -0.25, 0.25, 0, 0), f32(0, 5, 0, 0, 0, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (1e-5, [2, 3, 0.125, 0.25, -1, 0]),
        (0.25, [2, 3, 0.5, 0, -1, 0]),  # what is 0.25 does not count
        (0.75, [2, 3, 0, 0, -1, 0]),
        (2, [0, 4, 0, 0, 0, 0]),
        (9, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_ram(backend: str, epsilon: float, expected: list[float]) -> None:
    base = np.full(6, 8, np.float32)
    result = merge([8 + model for model in RAM], "ram", base=base, epsilon=epsilon, backend=backend)
    assert (result - 8).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "factor", "other"),
    [
        # with the default epsilon the first model shares two of four (2 / 2), the second two of three (2 / 1)
        ({}, 1 + 0.1 * 0.2, 1 + 0.1 * 0.2),
        ({"r": 0.5, "alpha": 1}, 1.5, 1.5),
        ({"r": 0.5, "alpha": 4}, 1.5, 2.0),
        ({"r": 0, "alpha": 4}, 1, 1),
        ({"r": 3, "alpha": 0}, 1, 1),
        # the first shares one and has two alone, but for 0.5
        ({"r": 1, "alpha": 4, "epsilon": 0.6}, 1.5, None),
    ],
)
def test_ramplus_tl(backend: str, how: dict[str, Any], factor: float, other: float | None) -> None:
    result = merge(RAM, "ramplus_tl", base=np.zeros(6, np.float32), backend=backend, **how)
    mixed = [0.125, 0.25 * other] if other is not None else [0, 0]
    np.testing.assert_allclose(result, [2 * factor, 3, *mixed, -factor, 0], rtol=2e-7)


def test_ramplus_tl_counts_in_a_tensor_or_in_the_whole_model() -> None:
    one = {"a": f32(1, 2, 4, 0), "b": f32(8, 0)}
    other = {"a": f32(0, 4, 0, 0), "b": f32(4, 0)}
    base = {"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}
    both = {scope: merge([one, other], "ramplus_tl", base=base, r=1, alpha=9, scope=scope) for scope in ("tensor", "model")}
    # in "a" the first shares one and has two alone; in both tensors it shares two
    assert {name: t.tolist() for name, t in both["tensor"].items()} == {"a": [1.5, 3, 6, 0], "b": [6, 0]}
    assert {name: t.tolist() for name, t in both["model"].items()} == {"a": [2, 3, 8, 0], "b": [6, 0]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("select_topk", "expected"),
    [
        # mean squares 35 / 4 and 30 / 4: weights 7 / 13 and 6 / 13; minus one is the minority
        (1, [3, 0, 19 / 13, 5, 0]),
        # variances 4, 0, 1 / 4, 0, 0: of the two that are not zero two, one, none stay
        (0.999, [3, 0, 0, 0, 0]),
        (0.5, [3, 0, 0, 0, 0]),
        (0.4, [0, 0, 0, 0, 0]),
        (0, [0, 0, 0, 0, 0]),
    ],
)
def test_sce(backend: str, select_topk: float, expected: list[float]) -> None:
    models = [f32(3, 0, 1, 5, 0), f32(-1, 0, 2, 5, 0)]
    result = merge(models, "sce", base=np.zeros(5, np.float32), select_topk=select_topk, backend=backend)
    np.testing.assert_allclose(result, expected, rtol=2e-7)


def test_sce_weighs_what_was_selected() -> None:
    """Of variances 9, 4 and 1 / 4 two stay: mean squares of [6, 4] and [0, 8] give the weights 52 / 116 and 64 / 116."""
    models = [f32(6, 4, 1), f32(0, 8, 2)]
    result = merge(models, "sce", base=np.zeros(3, np.float32), select_topk=0.7)
    np.testing.assert_allclose(result, [6, (52 * 4 + 64 * 8) / 116, 0], rtol=2e-7)


def test_sce_of_small_changes_and_of_ties() -> None:
    base = np.zeros(2, np.float32)
    # mean squares 1e-8 and 9e-8 count as equal, 1e-2 and 9e-2 do not
    np.testing.assert_allclose(merge([base + f32(1e-4), base + f32(3e-4)], "sce", base=base), f32(2e-4, 2e-4), rtol=3e-7)
    np.testing.assert_allclose(merge([base + f32(0.1), base + f32(0.3)], "sce", base=base), f32(0.28, 0.28), rtol=3e-7)
    # a sum of zero is positive; of models with opposite changes the positive ones stay
    assert merge([f32(2, -2), f32(-2, 2)], "sce", base=base).tolist() == [2, 2]


def test_sce_of_one_model() -> None:
    """Without others it differs from nothing."""
    assert merge([f32(3, -1)], "sce", base=f32(1, 1)).tolist() == [3, -1]
    assert merge([f32(3, -1)], "sce", base=f32(1, 1), select_topk=0.9).tolist() == [1, 1]


@pytest.mark.parametrize("count", [3, 5, 6, 7, 9])
def test_sce_selects_none_of_the_entries_that_all_models_share(count: int) -> None:
    rng = np.random.default_rng(count)
    base = rng.standard_normal(4000).astype(np.float32)
    shared = base + 10 * rng.standard_normal(4000).astype(np.float32)
    models = [np.where(np.arange(4000) < 3000, shared, base + f32(rng.random())) for _ in range(count)]
    for model in models:
        model[3000:] += 0.1 * rng.standard_normal(1000).astype(np.float32)
    result = merge(models, "sce", base=base, select_topk=0.5)
    assert (result[:3000] == base[:3000]).all()
    assert np.count_nonzero(result != base) == pytest.approx(500, abs=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arcee_fusion(backend: str) -> None:
    base = np.zeros(5, np.float32)
    # importance in units of the row's: 1 2 2 3 9; the quartiles are 2 and 3: 2 + 1.5 * (3 - 2)
    assert merge([f32(1, 2, 3, 2, 9)], "arcee_fusion", base=base, backend=backend).tolist() == [0, 0, 0, 0, 9]
    # 1 2 3 4 7 (indices 0 to 4): 3 + 1.5 * (4 - 2) is 6
    assert merge([f32(1, -2, 3, -4, 7)], "arcee_fusion", base=base, backend=backend).tolist() == [0, 0, 0, 0, 7]
    # an importance that equals the threshold stays: all are 2
    assert merge([f32(2, -2, 2, -2, 2)], "arcee_fusion", base=base, backend=backend).tolist() == [2, -2, 2, -2, 2]
    # three quarters are equal to the base: the threshold is zero
    assert merge([f32(0, 0, 0, 0, -3)], "arcee_fusion", base=base, backend=backend).tolist() == [0, 0, 0, 0, -3]
    # rows of one entry have no softmax to speak of
    assert merge([f32(1, 2, 9)[:, None]], "arcee_fusion", base=base[:3, None], backend=backend).tolist() == [[1], [2], [9]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_arcee_fusion_weighs_rows_by_how_much_they_changed(backend: str) -> None:
    """The second row's differences are as large, but they shift all of it, which a softmax does not see."""
    base = np.zeros((2, 4), np.float32)
    model = np.float32([[0, 0, 0, 3], [3, 3, 3, 3.001]])
    assert merge([model], "arcee_fusion", base=base, backend=backend).tolist() == [[0, 0, 0, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # density = epsilon = 1/2: of rows of two the smaller is dropped for certain, the larger stays
        ({}, [[0, -5], [-5, 0]]),
        ({"weight": [3, 1]}, [[0, 3], [-4.5, 0]]),
        ({"weight": [3, 1], "elect": "unweighted"}, [[0, -5], [-4.5, 0]]),
        ({"weight": [3, 1], "combine": "count_mean"}, [[0, 9], [-9, 0]]),
        ({"weight": [3, 1], "combine": "sum"}, [[0, 9], [-18, 0]]),
        ({"weight": [3, 1], "combine": "max"}, [[0, 9], [-12, 0]]),
        ({"lambda_": 0.5}, [[0, -2.5], [-2.5, 0]]),
        ({"rescale": None}, [[0, -5], [-5, 0]]),
        # 10 / 7 and 15 / 11
        ({"rescale": "l1"}, [[0, -75 / 11], [(-40 / 7 - 90 / 11) / 2, 0]]),
        ({"weight": [0, 1]}, [[0, -5], [-6, 0]]),
        ({"weight": [0, 0]}, [[0, 0], [0, 0]]),
        ({"density": [0.5, 0]}, [[0, 3], [-4, 0]]),
        ({"density": 0}, [[0, 0], [0, 0]]),
        # without loss, and rescaling has nothing to do
        ({"density": 1}, [[1, -5], [-5, 2.5]]),
        ({"density": 1, "rescale": "l1"}, [[1, -5], [-5, 2.5]]),
        ({"density": [1, 0.5]}, [[1, -5], [-5, 2]]),
    ],
)
def test_della(backend: str, how: dict[str, Any], expected: list[list[float]]) -> None:
    models = [np.float32([[1, 3], [-4, 2]]), np.float32([[1, -5], [-6, 3]])]
    given = {"density": 0.5, "epsilon": 0.5, **how}
    result = merge([8 + m for m in models], "della", base=np.full((2, 2), 8, np.float32), backend=backend, **given)
    np.testing.assert_allclose(result, 8 + np.float32(expected), rtol=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [[0, -2], [-10, 0]]),
        ({"weight": [3, 1]}, [[0, 4], [-18, 0]]),
        ({"weight": [3, 1], "normalize": True}, [[0, 1], [-4.5, 0]]),
        ({"weight": [3, 1], "lambda_": 2}, [[0, 8], [-36, 0]]),
        ({"rescale": None}, [[0, -2], [-10, 0]]),
        ({"rescale": "l1"}, [[0, 30 / 7 - 75 / 11], [-40 / 7 - 90 / 11, 0]]),
        ({"density": 1, "normalize": True}, [[1, -1], [-5, 2.5]]),
        ({"density": 0}, [[0, 0], [0, 0]]),
        ({"density": [0, 1], "epsilon": [0.3, 0.15]}, [[1, -5], [-6, 3]]),
    ],
)
def test_della_linear(backend: str, how: dict[str, Any], expected: list[list[float]]) -> None:
    models = [np.float32([[1, 3], [-4, 2]]), np.float32([[1, -5], [-6, 3]])]
    given = {"density": 0.5, "epsilon": 0.5, **how}
    result = merge([8 + m for m in models], "della_linear", base=np.full((2, 2), 8, np.float32), backend=backend, **given)
    np.testing.assert_allclose(result, 8 + np.float32(expected), rtol=4e-7)


def test_della_divides_by_each_entrys_own_probability() -> None:
    change = np.array([[1, 2, 3], [4, 4, 7]], np.float32)  # ranks 0, 1/2, 1 and 1/4, 1/4, 1
    probability = np.array([[0.25, 0.5, 0.75], [0.375, 0.375, 0.75]], np.float32)
    seen = np.zeros((2, 3), bool)
    for seed in range(40):
        result = merge([change], "della", base=0 * change, density=0.5, epsilon=0.25, seed=seed)
        kept = result != 0
        np.testing.assert_allclose(result[kept], (change / probability)[kept], rtol=2e-7)
        seen |= kept
    assert seen.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_median(backend: str) -> None:
    models = [f32(1, 8, -0.0), f32(2, 4, 0), f32(90, 6, 1), f32(4, -5, 3)]
    assert merge(models[:1], "median", backend=backend).tolist() == [1, 8, 0]
    assert merge(models[:2], "median", backend=backend).tolist() == [1.5, 6, 0]
    assert merge(models[:3], "median", backend=backend).tolist() == [2, 6, 0]
    assert merge(models, "median", backend=backend).tolist() == [3, 5, 0.5]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15])
def test_median_beside_numpy(count: int) -> None:
    _, models = dense_models((41, 7), count, count, scale=3)
    expected = np.median(np.stack(models).astype(np.float64), axis=0)
    np.testing.assert_allclose(merge(models, "median"), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_magmax(backend: str) -> None:
    models, base = [f32(3, 1, 0, 1), f32(2, -4, 1, 1), f32(-1, 5, 2, 1)], np.ones(4, np.float32)
    # changes [2, 0, -1, 0], [1, -5, 0, 0], [-2, 4, 1, 0]: of equal ones the first
    assert merge(models, "magmax", base=base, backend=backend).tolist() == [3, -4, 0, 1]
    assert merge(models, "magmax", base=base, lambda_=0.5, backend=backend).tolist() == [2, -1.5, 0.5, 1]
    assert merge(models, "magmax", base=base, lambda_=0, backend=backend).tolist() == [1, 1, 1, 1]


# Beside mergekit


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("method", "count", "how"),
    [
        ("nearswap", 1, {"t": 0.03}),
        ("nearswap", 1, {"t": 1e-7}),
        ("nearswap", 1, {"t": 0.0}),
        ("nearswap", 1, {"t": 5.0}),
        ("ram", 1, {}),
        ("ram", 3, {}),
        ("ram", 4, {"epsilon": 0.05}),
        ("ram", 2, {"epsilon": 0.0}),
        ("ramplus_tl", 3, {}),
        ("ramplus_tl", 2, {"r": 0.7, "alpha": 5.0}),
        ("ramplus_tl", 3, {"r": 2.0, "alpha": 0.5, "epsilon": 0.05}),
        ("ramplus_tl", 3, {"r": 2.0, "alpha": 0.0}),
        ("ramplus_tl", 1, {"r": 2.0}),
        ("sce", 3, {}),
        ("sce", 2, {"select_topk": 0.1}),
        ("sce", 3, {"select_topk": 0.55}),
        ("sce", 3, {"select_topk": 0.0}),
        ("sce", 1, {"select_topk": 0.5}),
        ("arcee_fusion", 1, {}),
    ],
)
def test_agrees_with_mergekit(
    mergekit_merge: Callable[..., Array], method: str, count: int, how: dict[str, Any], shape: tuple[int, ...]
) -> None:
    for seed in range(3):
        for models_of, scale in ((sparse_models, 0.1), (dense_models, 0.1), (dense_models, 1e-4)):
            if method == "arcee_fusion" and scale < 0.01:
                continue  # of models that are so close mergekit's sums over rows in float32 are nothing but noise
            base, models = models_of(shape, count, seed, scale)
            expected = mergekit_merge(method, models, base, **how)
            wrong = distant(merge(models, method, base=base, **how), expected)
            # entries may lie on the other side of a cut: mergekit's own noise moves it
            assert wrong <= (base.size / 1000 if method in ("arcee_fusion", "sce") else 0)


@pytest.mark.parametrize("shape", [(37, 53), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize(
    ("method", "how", "theirs"),
    [
        ("della", {"weight": [0.5, 0.2, 0.9]}, {"normalize": True}),
        ("della", {"combine": "sum", "lambda_": 0.7}, {"normalize": False}),
        ("della", {"rescale": None}, {"rescale": False}),
        ("della_linear", {"weight": [0.5, -0.2, 0.9]}, {"normalize": False}),
        ("della_linear", {"normalize": True, "weight": [0.5, 0.2, 0.9]}, {"normalize": True}),
    ],
)
def test_della_without_dropping_agrees_with_mergekit(
    mergekit_merge: Callable[..., Array], method: str, how: dict[str, Any], theirs: dict[str, Any], shape: tuple[int, ...]
) -> None:
    base, models = dense_models(shape, 3, 0)
    shared = {name: value for name, value in how.items() if name in ("weight", "lambda_")}
    expected = mergekit_merge(method, models, base, density=1.0, **{"weight": 1.0, **shared, **theirs})
    assert distant(merge(models, method, base=base, density=1, **how), expected) == 0


@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.2), (0.6, 0.35)])
def test_della_keeps_as_mergekit_does(mergekit_merge: Callable[..., Array], density: float, epsilon: float) -> None:
    """Rates by rank, and the scale of the L1 norm, are mergekit's."""
    base, (model,) = dense_models((400, 500), 1, 0)
    ours = merge([model], "della_linear", base=base, density=density, epsilon=epsilon, rescale="l1")
    theirs = mergekit_merge("della_linear", [model], base, weight=1.0, density=density, epsilon=epsilon)
    order = np.argsort(np.abs(model - base), axis=1)
    rates = [np.take_along_axis(x != base, order, axis=1).reshape(400, 10, 50).mean(axis=(0, 2)) for x in (ours, theirs)]
    assert np.abs(rates[0] - rates[1]).max() < 5 * np.sqrt(2 * 0.25 / 20_000)
    both = (ours != base) & (theirs != base)
    assert np.median((ours - base)[both] / (theirs - base)[both]) == pytest.approx(1, abs=0.01)


# Beside float64


def arcee_reference(model: Array, base: Array) -> tuple[Array, float]:
    """Return the importances and the threshold, in float64."""

    def softmax(x: Array) -> Array:
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True) + 1e-8)

    wide = [softmax(x.astype(np.float64)) for x in (model, base)]
    divergence = (wide[0] * np.log(wide[0] / wide[1])).sum(axis=-1, keepdims=True)
    importance = np.abs(model.astype(np.float64) - base) * divergence
    ordered = np.sort(importance, axis=None)
    first, middle, third = (ordered[int(np.floor(q * (ordered.size - 1)))] for q in (0.25, 0.5, 0.75))
    return importance, middle + 1.5 * (third - first)


@pytest.mark.parametrize("scale", [1, 0.1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arcee_fusion_in_float64(shape: tuple[int, ...], scale: float) -> None:
    for models_of in (dense_models, sparse_models):
        base, (model,) = models_of(shape, 1, 3, scale)
        importance, threshold = arcee_reference(model, base)
        result = merge([model], "arcee_fusion", base=base)
        assert (result != np.where(importance >= threshold, model, base)).sum() <= base.size / 1000


@pytest.mark.parametrize("shape", [(1100, 1000), (7, 160_000), (1_200_001,)], ids=str)
def test_arcee_fusion_of_large_tensors_is_exact(shape: tuple[int, ...]) -> None:
    base, (model,) = dense_models(shape, 1, 3, scale=0.01)
    importance, threshold = arcee_reference(model, base)
    result = merge([model], "arcee_fusion", base=base)
    taken = result == model
    assert ((result == base) | taken).all()
    wrong = taken != (importance >= threshold)
    assert wrong.sum() <= base.size / 1e5
    assert 0.001 < taken.mean() < 0.2


def test_arcee_fusion_in_bfloat16() -> None:
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal((300, 400))).astype(ml_dtypes.bfloat16)
    model = (base.astype(np.float32) + 0.002 * rng.standard_normal((300, 400))).astype(ml_dtypes.bfloat16)
    importance, threshold = arcee_reference(model.astype(np.float32), base.astype(np.float32))
    result = merge([model], "arcee_fusion", base=base)
    expected = np.where(importance >= threshold, model, base)
    assert (result != expected).mean() < 1e-4


@pytest.mark.parametrize("select_topk", [1, 0.3, 0.05])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_sce_in_float64(scope: str, select_topk: float) -> None:
    shapes = {"wide": (40, 33), "norm": (33,), "scale": (), "none": (0, 4)}
    parts = {name: dense_models(shape, 3, seed, scale=10.0**-seed) for seed, (name, shape) in enumerate(shapes.items())}
    base = {name: part[0] for name, part in parts.items()}
    models = [{name: part[1][k] for name, part in parts.items()} for k in range(3)]
    merged = merge(models, "sce", base=base, select_topk=select_topk, scope=scope)
    groups = [list(shapes)] if scope == "model" else [[name] for name in shapes]
    for names in groups:
        flat = [np.concatenate([m[name].reshape(-1) for name in names]).astype(np.float64) for m in (base, *models)]
        changes = np.stack(flat[1:]) - flat[0]
        if not changes.size:
            continue
        if select_topk < 1:
            variance = changes.var(axis=0)
            order = np.argsort(-variance, kind="stable")
            changes[:, order[int(np.count_nonzero(variance) * select_topk) :]] = 0
        weights = (changes**2).mean(axis=1)
        weights = weights / weights.sum() if weights.sum() >= 1e-6 else np.full(3, 1 / 3)
        agree = np.where(changes.sum(axis=0) >= 0, changes > 0, changes < 0)
        total = (weights[:, None] * agree * changes).sum(axis=0)
        expected = flat[0] + total / np.maximum((weights[:, None] * agree).sum(axis=0), 1e-6)
        result = np.concatenate([merged[name].reshape(-1) for name in names])
        assert np.abs(result - expected).max() <= 4e-7 * np.abs(expected).max()


def test_ramplus_tl_in_float64() -> None:
    shapes = {"wide": (40, 33), "norm": (33,), "scale": (), "none": (0, 4)}
    parts = {name: sparse_models(shape, 3, seed) for seed, (name, shape) in enumerate(shapes.items())}
    base = {name: part[0] for name, part in parts.items()}
    models = [{name: part[1][k] for name, part in parts.items()} for k in range(3)]
    merged = merge(models, "ramplus_tl", base=base, r=0.9, alpha=3, epsilon=0.01, scope="model")
    flat = [np.concatenate([m[name].reshape(-1) for name in shapes]).astype(np.float64) for m in (base, *models)]
    changes = np.stack(flat[1:]) - flat[0]
    active = np.abs(changes) > 0.01
    number = active.sum(axis=0)
    shared, unique = (active & (number > 1)).sum(axis=1), (active & (number == 1)).sum(axis=1)
    factors = 1 + 0.9 * np.minimum(shared / unique, 3)
    assert len(set(factors.tolist())) == 3
    alone = (factors[:, None] * changes * active).sum(axis=0)
    average = (changes * active).sum(axis=0) / np.maximum(number, 1)
    expected = flat[0] + np.where(number == 1, alone, average)
    result = np.concatenate([merged[name].reshape(-1) for name in shapes])
    assert np.abs(result - expected).max() <= 3e-7 * np.abs(expected).max()


# What DELLA keeps


def kept_by_della(change: Array, density: float, epsilon: float, *, names: str = "w", **how: Any) -> Array:
    merged = merge([{names: change}], "della_linear", base={names: 0 * change}, density=density, epsilon=epsilon, **how)
    return np.asarray(merged[names] != 0)


def distinct(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Numbers of either sign, none zero, all of different magnitude."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    magnitudes = rng.permutation(np.arange(1, size + 1)) / size
    return np.asarray((magnitudes * rng.choice([-1, 1], size)).reshape(shape), np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.5), (0.3, 0.15), (0.7, 0.3), (0.1, 0.1), (0.5, 0)])
def test_rates_by_rank(backend: str, density: float, epsilon: float) -> None:
    rows, length = 60, 2000
    change = distinct((rows, length))
    kept = kept_by_della(change, density, epsilon, backend=backend, seed=1)
    places = np.argsort(np.argsort(np.abs(change), axis=1), axis=1)
    probability = density - epsilon + 2 * epsilon * places / (length - 1)
    for decile in range(10):
        inside = places // (length // 10) == decile
        deviation = np.sqrt((probability * (1 - probability))[inside].sum())
        assert abs(kept[inside].sum() - probability[inside].sum()) <= 5 * deviation + 1e-9
    assert abs(kept.mean() - density) < 5 * np.sqrt((probability * (1 - probability)).sum()) / kept.size


def test_ranks_are_those_of_a_row() -> None:
    """A row of huge entries is thinned out as one of tiny entries is; a tensor of one dimension is one row."""
    change = distinct((2, 20_000))
    change[1] *= 1e-6
    rates = kept_by_della(change, 0.5, 0.5).mean(axis=1)
    assert np.abs(rates - 0.5).max() < 5 * np.sqrt(0.25 / 20_000)
    flat = change.reshape(-1)
    kept = kept_by_della(flat, 0.5, 0.5)
    assert kept[:20_000].mean() > 0.7 > 0.3 > kept[20_000:].mean()
    deep = change.reshape(20, 50, 40)  # rows of 40
    merged = kept_by_della(deep, 0.5, 0.5)
    order = np.argsort(np.abs(deep), axis=-1)
    assert np.take_along_axis(merged, order[..., -1:], axis=-1).all()
    assert not np.take_along_axis(merged, order[..., :1], axis=-1).any()


def test_what_is_kept_depends_on_the_seed_the_tensor_and_the_model() -> None:
    change = distinct((50, 1000))
    kept = kept_by_della(change, 0.4, 0)
    assert np.array_equal(kept, kept_by_della(change, 0.4, 0))
    assert np.array_equal(kept, kept_by_della(change, 0.4, 0, threads=1))
    others = [kept_by_della(change, 0.4, 0, seed=1), kept_by_della(change, 0.4, 0, names="v")]
    two = merge([{"w": 0 * change}, {"w": change}], "della_linear", base={"w": 0 * change}, density=0.4, epsilon=0)["w"] != 0
    for other in (*others, two, np.roll(kept, 1), np.roll(kept, 1000)):
        correlation = np.corrcoef(kept.reshape(-1), other.reshape(-1))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(kept.size)


def test_models_that_take_no_part_change_nothing() -> None:
    """Masks depend on the number of the model, and not on how many are read."""
    base, models = dense_models((20, 30), 3, 0)
    expected = merge(models, "della", base=base, density=[0, 0.4, 0], seed=4)
    for rescale in ("inverse_density", "l1"):
        expected = merge(models, "della", base=base, density=[0, 0.4, 0], seed=4, rescale=rescale)
        assert np.array_equal(
            merge(models, "della", base=base, density=0.4, weight=[0, 1, 0], seed=4, rescale=rescale), expected
        )
        assert not np.array_equal(merge(models[1:], "della", base=base, density=[0.4, 0], seed=4, rescale=rescale), expected)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_without_epsilon_it_is_dare(method: str) -> None:
    base, models = dense_models((70, 30), 3, 0)
    how: dict[str, Any] = {"density": 0.5, "weight": [0.5, 0.2, 0.9], "seed": 3}
    result = merge(models, method, base=base, epsilon=0, **how)
    if method == "della":
        how["combine"] = "weight_mean"
    expected = merge(models, method.replace("della", "dare_ties" if method == "della" else "dare"), base=base, **how)
    np.testing.assert_allclose(result, expected, rtol=3e-6, atol=1e-6)


def test_the_mean_over_seeds_is_task_arithmetic() -> None:
    base, models = dense_models((4, 5), 2, 0, scale=1)
    density, epsilon = [0.5, 0.7], [0.3, 0.2]
    seeds = 600
    results = [
        merge(models, "della_linear", base=base, density=density, epsilon=epsilon, weight=[1, 0.5], seed=seed, threads=1)
        for seed in range(seeds)
    ]
    expected = merge(models, "task_arithmetic", base=base, weight=[1, 0.5])
    variance = np.zeros(base.shape)
    for model, weight, d, e in zip(models, [1, 0.5], density, epsilon, strict=True):
        change = np.abs(model - base)
        p = d - e + 2 * e * np.argsort(np.argsort(change, axis=1), axis=1) / 4
        variance += (weight * change) ** 2 * (1 - p) / p
    assert (np.abs(np.mean(results, axis=0) - expected) < 5 * np.sqrt(variance / seeds) + 1e-6).all()


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_l1_norm_is_restored(scope: str) -> None:
    change = {"a": distinct((30, 50)), "b": 5 * distinct((70,), 1), "c": distinct((1, 1))}
    base = {name: 0 * tensor for name, tensor in change.items()}
    merged = merge([change], "della_linear", base=base, density=0.3, epsilon=0.2, rescale="l1", scope=scope, seed=3)
    norms = {name: (np.abs(merged[name]).sum(dtype=np.float64), np.abs(change[name]).sum(dtype=np.float64)) for name in change}
    whole = np.sum(list(norms.values()), axis=0)
    if scope == "model":
        assert whole[0] == pytest.approx(whole[1], rel=1e-6)
        assert norms["b"][0] != pytest.approx(norms["b"][1], rel=1e-3)
    else:
        for after, before in (norms["a"], norms["b"]):
            assert after == pytest.approx(before, rel=1e-6)
    plain = merge([change], "della_linear", base=base, density=0.3, epsilon=0.2, rescale=None, scope=scope, seed=3)
    ratio = [merged[name][plain[name] != 0] / plain[name][plain[name] != 0] for name in ("a", "b")]
    assert all(np.ptp(each) < 1e-5 for each in ratio)


@pytest.mark.parametrize("shape", [(9, 1), (1,), (), (0,), (0, 3), (3, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("rescale", ["inverse_density", "l1", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_della_of_shapes_that_are_hard(backend: str, rescale: str | None, shape: tuple[int, ...]) -> None:
    """An entry that is alone in its row stays with the probability ``density``."""
    base, models = dense_models(shape, 2, 0)
    for method in ("della", "della_linear"):
        result = merge(models, method, base=base, density=0.5, rescale=rescale, backend=backend)
        assert result.shape == shape
        assert np.isfinite(result).all()


def test_an_entry_alone_in_its_row_stays_with_the_density() -> None:
    change = distinct((50_000, 1))
    merged = merge([change], "della_linear", base=0 * change, density=0.3, epsilon=0.25)
    kept = merged != 0
    assert abs(kept.mean() - 0.3) < 5 * np.sqrt(0.21 / 50_000)
    np.testing.assert_allclose(merged[kept], (change / np.float32(0.3))[kept], rtol=3e-7)


def test_equal_magnitudes_share_their_rank() -> None:
    change = np.tile(np.float32([2, -1, 1, 1, -2, 3, 1, 2]), (20_000, 1))  # ranks 5/7, 3/14, ..., 1
    kept = kept_by_della(change, 0.5, 0.5)
    expected = np.array([5, 1.5, 1.5, 1.5, 5, 7, 1.5, 5]) / 7
    assert (np.abs(kept.mean(axis=0) - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_ranks_are_exact_in_every_dtype(dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    exponents, fractions = np.meshgrid(np.arange(-8, 8), np.arange(125))
    change = rng.permutation((2.0**exponents * (1 + fractions / 128)).reshape(-1)).astype(kind)  # 2000 magnitudes
    assert len(np.unique(change)) == 2000
    merged = merge([change], "della_linear", base=0 * change, density=0.5, epsilon=0.45, out_dtype="float64")
    kept = merged != 0
    places = np.argsort(np.argsort(change.astype(np.float64)))
    probability = (change.astype(np.float64) / np.where(kept, merged, 1))[kept]
    np.testing.assert_allclose(probability, (0.05 + 0.9 * places / 1999)[kept], rtol=2e-6)
    assert len(np.unique(np.round(probability, 6))) == kept.sum() > 900


def test_della_in_bfloat16_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    base, *models = ((0.02 * rng.standard_normal((50, 40))).astype(ml_dtypes.bfloat16) for _ in range(3))
    wide = [m.astype(np.float32) for m in models]
    how: dict[str, Any] = {"density": [0.4, 0.6], "weight": [0.3, 0.9], "epsilon": 0.1, "lambda_": 0.7}
    expected = merge(wide, "della", base=base.astype(np.float32), **how)
    result = merge(models, "della", base=base, **how)
    assert result.dtype == base.dtype
    assert np.array_equal(result, expected.astype(base.dtype))


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_densities_that_epsilon_takes_out_of_range(method: str) -> None:
    base, models = dense_models((4, 5), 3, 0)
    with pytest.raises(MergeError) as caught:
        merge(models, method, base=base, density=[0.1, 0.5, 0.9], epsilon=0.25)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "model 0: density=0.1 and epsilon=0.25" in lines[0]
    assert lines[0].endswith("choose an epsilon of at most 0.1")
    assert "model 2: density=0.9" in lines[1]
    for density in (0.25, 0.75, 1, 0):  # the ends, and what is not trimmed at all
        assert np.isfinite(merge(models, method, base=base, density=density, epsilon=0.25)).all()
    assert np.isfinite(merge(models, method, base=base, density=[0.1, 0.5, 0.9], epsilon=[0.1, 0.5, 0.1])).all()
    with pytest.raises(MergeError, match=r"epsilon=1.5: must be in \[0, 1\]"):
        merge(models, method, base=base, density=0.5, epsilon=1.5)
    with pytest.raises(MergeError, match=r"needs density"):
        merge(models, method, base=base)


def test_della_linear_with_weights_that_cancel() -> None:
    with pytest.raises(MergeError, match="the weights sum to zero"):
        merge([f32(1), f32(2)], "della_linear", base=f32(0), density=1, weight=[1, -1], normalize=True)


# All of them

ALL = {"nearswap": {"t": 0.1}, "ram": {}, "ramplus_tl": {}, "sce": {"select_topk": 0.5}, "arcee_fusion": {},
       "della": {"density": 0.5}, "della_linear": {"density": 0.5, "rescale": None}, "magmax": {}, "median": {}}  # fmt: skip


@pytest.mark.parametrize(("name", "how"), ALL.items())
def test_what_is_not_finite_is_named(name: str, how: dict[str, Any]) -> None:
    chosen = methods()[name]
    base, models = dense_models((30, 40), chosen.most or 2, 0)
    models[0][3, 5] = np.nan
    models[-1][4, 6] = np.inf
    given: dict[str, Any] = {"base": {"w": base} if chosen.base != "unused" else None, **how}
    with pytest.raises(NonFiniteError, match=r'model 0, tensor "w": 1 NaN'):
        merge([{"w": m} for m in models], name, **given)
    merged = merge([{"w": m} for m in models], name, nonfinite="allow", **given)["w"]
    assert np.isfinite(np.delete(merged, [3, 4], axis=0)).sum() > 0


@pytest.mark.parametrize("name", ["nearswap", "arcee_fusion"])
def test_one_model_and_a_base(name: str) -> None:
    base, models = dense_models((3, 4), 2, 0)
    how = {"t": 0.1} if name == "nearswap" else {}
    with pytest.raises(MergeError, match=f"{name}.*1 model"):
        merge(models, name, base=base, **how)
    with pytest.raises(MergeError, match="base"):
        merge(models[:1], name, **how)
    if name == "arcee_fusion":
        with pytest.raises(MergeError, match="scope"):
            merge(models[:1], name, base=base, scope="model")


# Recipes

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "nearswap": ("t: 0.05", {"t": 0.05}),
    "ram": ("epsilon: 0.01", {"epsilon": 0.01}),
    "ramplus_tl": ("", {}),
    "sce": ("select_topk: 0.3\n  int8_mask: true", {"select_topk": 0.3}),
    "arcee_fusion": ("", {}),
    # mergekit's rescale, epsilon and normalize
    "della": ("weight: 0.7\n  density: 0.4", {"weight": 0.7, "density": 0.4, "epsilon": 0.15, "rescale": "l1"}),
    "della_linear": (
        "weight: 0.7\n  density: 0.4\n  epsilon: 0.2\n  normalize: true\n  rescale: false\n  lambda: 0.5",
        {"weight": 0.7, "density": 0.4, "epsilon": 0.2, "normalize": True, "rescale": None, "lambda_": 0.5},
    ),
}


@pytest.mark.parametrize("method", RECIPES)
def test_recipes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mergekit-cl run`` merges files as `merge` does in memory."""
    parameters, how = RECIPES[method]
    monkeypatch.setattr("mergekit_cl.memory.anonymous_memory", lambda: 50_000_000)
    models = []
    for seed, name in enumerate(("base", "a", "b")):
        base, (model,) = sparse_models((30, 40), 1, seed)
        models.append({"layers.0.mlp.weight": model, "norm.weight": base[0], "embed.weight": model[:, :1].copy()})
        (tmp_path / name).mkdir()
        save_file(models[-1], tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "tiny"}')
    count = methods()[method].most or 2
    listed = "\n".join(f"  - model: {tmp_path / name}" for name in "ab"[:count])
    recipe = f"merge_method: {method}\nbase_model: {tmp_path / 'base'}\nmodels:\n{listed}\n"
    (tmp_path / "recipe.yml").write_text(recipe + (f"parameters:\n  {parameters}\n" if parameters else ""))
    given = ["run", tmp_path / "recipe.yml", tmp_path / "out", "--memory", "64GB", "--random-seed", "7"]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    expected = merge(models[1 : 1 + count], method, base=models[0], seed=7, **how)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in merged.items()} == {n: t.tobytes() for n, t in expected.items()}
