"""ties, dare, breadcrumbs, magnitude_prune: by hand, beside mergekit, PEFT and the paper, and the statistics of masks."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_cl import MergeError, NonFiniteError, merge

Array = npt.NDArray[Any]

ZERO = np.zeros(4, np.float32)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def random_models(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, [(base + 0.1 * rng.standard_normal(shape)).astype(np.float32) for _ in range(count)]


def trimmed(vector: Array, density: float) -> Array:
    """Keep the largest entries, by sorting."""
    kept = np.zeros_like(vector)
    if density and vector.size:
        largest = np.argsort(-np.abs(vector), kind="stable")[: max(1, int(density * vector.size))]
        kept[largest] = vector[largest]
    return kept


# By hand


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # of [4, -1, 3, 2] two stay: [4, 0, 3, 0]; of [-2, 5, 1, 0]: [-2, 5, 0, 0]; signs: + + + +
        ({}, [4, 5, 3, 0]),
        ({"lambda_": 0.5}, [2, 2.5, 1.5, 0]),
        # weighted: [4, 0, 3, 0] and [-6, 15, 0, 0]: - + + +
        ({"weight": [1, 3]}, [-2, 5, 3, 0]),
        ({"weight": [1, 3], "combine": "sum"}, [-6, 15, 3, 0]),
        ({"weight": [1, 3], "combine": "count_mean"}, [-6, 15, 3, 0]),
        ({"weight": [1, 3], "combine": "max"}, [-6, 15, 3, 0]),
        ({"weight": [1, 3], "elect": "unweighted"}, [4, 5, 3, 0]),
        ({"weight": [1, 3], "elect": "unweighted", "combine": "count_mean"}, [4, 15, 3, 0]),
        # negative weights turn the sign of what they weigh, and of the divisor
        ({"weight": [-1, 1]}, [(-4 - 2) / (-1 + 1 or 1), 5, 3, 0]),
        ({"weight": [-2, 1], "combine": "sum"}, [-10, 5, -6, 0]),
        ({"weight": [0, 1]}, [-2, 5, 0, 0]),
        ({"density": [0.5, 0]}, [4, 0, 3, 0]),
        ({"density": [0, 0.25]}, [0, 5, 0, 0]),
        ({"density": [1, 0.1]}, [4, 5, 3, 2]),  # one entry stays, at least; the -1 of the first model does not agree
        # L1: [4, 0, 3, 0] * 10 / 7, [-2, 5, 0, 0] * 8 / 7
        ({"rescale": "l1"}, [40 / 7, 40 / 7, 30 / 7, 0]),
        ({"rescale": "inverse_density"}, [8, 10, 6, 0]),
    ],
)
@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_ties(backend: str, how: dict[str, Any], expected: list[float]) -> None:
    models = [f32(4, -1, 3, 2), f32(-2, 5, 1, 0)]
    result = merge([1 + m for m in models], "ties", base=1 + ZERO, backend=backend, **{"density": 0.5, **how})
    np.testing.assert_allclose(result, 1 + np.float32(expected), rtol=3e-7)


def test_means_divide_by_what_agrees() -> None:
    models = [f32(3, 1), f32(1, -5), f32(5, 2)]
    base = np.zeros(2, np.float32)
    assert merge(models, "ties", base=base, density=1).tolist() == [3, -5]
    assert merge(models, "ties", base=base, density=1, weight=[1, 1, 2]).tolist() == [14 / 4, f32(5 / 3)]
    assert merge(models, "ties", base=base, density=1, weight=[1, 1, 2], combine="count_mean").tolist() == [f32(14 / 3), 5 / 2]
    assert merge(models, "ties", base=base, density=1, weight=[1, 1, 2], combine="max").tolist() == [10, 4]
    assert merge(models, "ties", base=base, density=1, weight=[1, 1, 2], combine="sum").tolist() == [14, 5]


def test_a_tie_of_signs_is_positive() -> None:
    models = [f32(2, -2), f32(-2, 2)]
    assert merge(models, "ties", base=np.zeros(2, np.float32), density=1).tolist() == [2, 2]


def test_weights_scale_scope_and_gamma() -> None:
    model, base = f32(9, -3, 2, 1), ZERO
    assert merge([model], "magnitude_prune", base=base, density=0.5, weight=2, lambda_=0.5).tolist() == [9, -3, 0, 0]
    assert merge([model], "magnitude_prune", base=base, density=0.5, weight=2, normalize=True).tolist() == [9, -3, 0, 0]
    assert merge([model], "breadcrumbs", base=base, density=0.25, gamma=0.5).tolist() == [0, 0, 2, 0]
    assert merge([model], "breadcrumbs", base=base, density=0.75, gamma=0.5).tolist() == [0, -3, 2, 1]  # one goes, not two
    assert merge([model], "breadcrumbs", base=base, density=1, gamma=0.5).tolist() == [9, -3, 2, 1]
    assert merge([model], "breadcrumbs", base=base, density=0.2, gamma=0).tolist() == [0, 0, 0, 0]  # int(0.8)
    tensors, zeros = {"a": f32(8, 1), "b": f32(4, 2)}, {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    pruned = {
        scope: merge([tensors], "magnitude_prune", base=zeros, density=0.75, scope=scope) for scope in ("tensor", "model")
    }
    assert {name: t.tolist() for name, t in pruned["tensor"].items()} == {"a": [8, 0], "b": [4, 0]}
    assert {name: t.tolist() for name, t in pruned["model"].items()} == {"a": [8, 0], "b": [4, 2]}


def test_a_missing_density_is_explained() -> None:
    with pytest.raises(MergeError, match=r"ties needs density: pass density=\.\.\. \(the paper uses 0\.2\)"):
        merge([ZERO], "ties", base=ZERO)
    with pytest.raises(MergeError, match=r"density=1.5: must be in \[0, 1\]"):
        merge([ZERO], "ties", base=ZERO, density=1.5)
    with pytest.raises(MergeError, match="elect='weihgted': must be one of 'weighted', 'unweighted'"):
        merge([ZERO], "ties", base=ZERO, density=1, elect="weihgted")
    with pytest.raises(MergeError, match="model that the others were fine-tuned from"):
        merge([ZERO], "ties", density=1)


# Beside the peers


SHAPES = [(1000,), (37, 53), (3, 4, 5, 6), (1,), (), (600_001,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("method", "how", "theirs"),
    [
        ("ties", {"density": 0.2}, {}),
        ("ties", {"density": [0.29, 0.5, 0.9], "weight": [1, 0.3, 0.7], "lambda_": 1.3}, {}),
        ("ties", {"density": 0.4, "weight": [1, -0.4, 0.7], "combine": "sum"}, {"normalize": False}),
        ("ties", {"density": 0.4, "rescale": "l1"}, {"rescale": True}),
        ("ties", {"density": 1}, {}),
        ("breadcrumbs", {"density": 0.3, "gamma": 0.05, "weight": [1, 0.3, 0.7]}, {}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.5, "normalize": True}, {"normalize": True}),
        ("breadcrumbs", {"density": 0.3, "rescale": "l1"}, {"rescale": True}),
        ("breadcrumbs_ties", {"density": [0.1, 0.6, 0.9], "gamma": [0, 0.01, 0.2], "lambda_": 0.7}, {}),
        ("breadcrumbs_ties", {"density": 0.3, "combine": "weight_mean"}, {"normalize": True}),
    ],
)
def test_agrees_with_mergekit(
    mergekit_merge: Callable[..., Array], method: str, how: dict[str, Any], theirs: dict[str, Any], shape: tuple[int, ...]
) -> None:
    base, models = random_models(shape, seed=len(shape))
    parameters = {"weight": 1.0, **{k: v for k, v in how.items() if k not in ("combine", "normalize", "rescale")}, **theirs}
    expected = mergekit_merge(method, models, base, **parameters)
    result = merge(models, method, base=base, **how)
    assert np.abs(result - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_without_dropping_agrees_with_mergekit(mergekit_merge: Callable[..., Array], method: str) -> None:
    base, models = random_models((50, 40))
    expected = mergekit_merge(method, models, base, weight=[0.5, 0.2, 0.9], density=1.0, lambda_=0.8)
    result = merge(models, method, base=base, weight=[0.5, 0.2, 0.9], density=1, lambda_=0.8)
    assert np.abs(result - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("weight", [[1, 1, 1], [1, 0.3, 0.3]])
def test_agrees_with_peft(weight: list[float]) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    import torch

    base, models = random_models((40, 30))
    vectors = [torch.tensor(model - base) for model in models]
    for density in (0.2, 0.53):
        expected = base + peft.ties(vectors, torch.tensor(weight), density).numpy()
        result = merge(models, "ties", base=base, density=density, weight=weight, elect="unweighted", combine="count_mean")
        assert np.abs(result - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_the_paper_over_the_whole_model(backend: str, density: float) -> None:
    """Trim, elect and take the disjoint mean over all parameters, in float64 (arXiv:2306.01708, Algorithm 1)."""
    shapes = {"embedding": (400, 33), "norm": (33,), "scale": (), "none": (0, 4)}
    parts = {name: random_models(shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    base = {name: part[0] for name, part in parts.items()}
    models = [{name: part[1][k] * np.float32(1 + k / 9) for name, part in parts.items()} for k in range(3)]
    flat = [np.concatenate([tensor.reshape(-1) for tensor in model.values()]) for model in (base, *models)]
    vectors = np.stack([trimmed(x - flat[0], density) for x in flat[1:]]).astype(np.float64)
    sign = np.where(vectors.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(vectors) == sign
    expected = flat[0] + 0.7 * (vectors * agree).sum(axis=0) / np.maximum(1, agree.sum(axis=0))
    result = merge(
        models, "ties", base=base, density=density, elect="unweighted", combine="count_mean", scope="model", lambda_=0.7,
        backend=backend,
    )  # fmt: skip
    merged = np.concatenate([tensor.reshape(-1) for tensor in result.values()])
    assert np.abs(merged - expected).max() <= 2e-7 * np.abs(expected).max()


def test_a_whole_model_of_mixed_dtypes() -> None:
    """Magnitudes of float32 and float64 tensors are compared exactly."""
    rng = np.random.default_rng(0)
    base: dict[str, Array] = {"single": rng.standard_normal(500).astype(np.float32), "double": rng.standard_normal(400)}
    model = {name: (t + rng.standard_normal(t.shape)).astype(t.dtype) for name, t in base.items()}
    result = merge([model], "magnitude_prune", base=base, density=0.3, scope="model", backend="numpy")
    vectors = {name: model[name] - base[name] for name in base}
    magnitudes = np.concatenate([np.abs(v).astype(np.float64) for v in vectors.values()])
    cut = np.sort(magnitudes)[-270]
    for name in base:
        kept = np.abs(vectors[name]) >= cut
        assert np.array_equal(result[name] != base[name], kept)


# Entries that equal the cut


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_of_equal_entries_the_right_part_stays(backend: str) -> None:
    base = np.zeros(200_000, np.float32)
    model = base + np.float32(0.5)
    model[:20_000] = 7.0
    merged = merge([model], "magnitude_prune", base=base, density=0.4, backend=backend)
    assert (merged[:20_000] == 7).all()
    kept = merged[20_000:] == 0.5
    assert abs(kept.mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / 180_000)
    # and by no pattern: neighbours are independent
    assert abs((kept[1:] & kept[:-1]).mean() - 1 / 9) < 0.005


def test_the_kept_part_of_bfloat16_models_is_the_density() -> None:
    """Fine-tunes in bfloat16 are full of equal magnitudes: to keep all that equal the cut kept 32 % in place of 20 %."""
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal(300_000)).astype(ml_dtypes.bfloat16)
    model = (base.astype(np.float32) + 1e-4 * rng.standard_normal(300_000)).astype(ml_dtypes.bfloat16)
    merged = merge([model], "magnitude_prune", base=base, density=0.2)
    assert abs((merged != base).mean() - 0.2) < 0.002
    levels, counts = np.unique(np.abs(model.astype(np.float32) - base.astype(np.float32)), return_counts=True)
    assert counts[levels > 0].max() > 5000


def test_breadcrumbs_of_equal_entries() -> None:
    model = np.ones(100_000, np.float32)
    merged = merge([model], "breadcrumbs", base=0 * model, density=0.3, gamma=0.2)
    assert abs(merged.mean() - 0.3) < 0.01
    both = merge([model], "magnitude_prune", base=0 * model, density=0.5)
    assert (merged <= both).all()  # what stays is a part of the upper half: the order of equal entries is one


# Masks


def masks(size: int, density: float, names: str = "w", models: int = 1, **how: Any) -> Array:
    """Return what is kept, bool [names, models, size]."""
    base = {name: np.zeros((size, models), np.float32) for name in names}
    tuned = [
        {name: np.where(np.arange(models) == k, 1.0, base[name]).astype(np.float32) for name in names} for k in range(models)
    ]
    kept = []
    for k in range(models):
        one_hot = [float(k == other) for other in range(models)]
        merged = merge(tuned, "dare_linear", base=base, density=density, weight=one_hot, rescale=None, **how)
        kept.append([merged[name][:, k] != 0 for name in names])
    return np.array(kept).swapaxes(0, 1)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_masks_have_the_right_rate(density: float) -> None:
    kept = masks(100_000, density)[0, 0]
    assert abs(kept.mean() - density) < 5 * np.sqrt(density * (1 - density) / kept.size)
    for lag in (1, 2, 3, 4, 1000):  # and no pattern: four neighbours share a call of Philox
        assert abs((kept[lag:] & kept[:-lag]).mean() - density**2) < 5 * np.sqrt(density**2 / kept.size)


def test_masks_are_independent_between_models_and_tensors_and_repeat_under_a_seed() -> None:
    one, other = masks(50_000, 0.3, "ab", 2), masks(50_000, 0.3, "ab", 2, seed=1)
    assert np.array_equal(one, masks(50_000, 0.3, "ab", 2, seed=0))
    drawn = [*one.reshape(4, -1), *other.reshape(4, -1)]
    for i, mask in enumerate(drawn):
        for another in drawn[:i]:
            assert abs((mask & another).mean() - 0.09) < 5 * np.sqrt(0.09 / 50_000)


def test_a_mask_depends_on_the_name_the_model_and_the_index_alone() -> None:
    base = {"a": np.zeros(1000, np.float32), "b": np.zeros(70_000, np.float32)}
    tuned = {name: 1 + t for name, t in base.items()}
    both = merge([tuned], "dare_linear", base=base, density=0.5)
    alone = merge([{"b": tuned["b"]}], "dare_linear", base={"b": base["b"]}, density=0.5)
    short = merge([{"b": tuned["b"][:777]}], "dare_linear", base={"b": base["b"][:777]}, density=0.5, scope="model")
    assert both["b"].tobytes() == alone["b"].tobytes()
    assert both["b"][:777].tobytes() == short["b"].tobytes()
    second = merge([base, tuned], "dare_linear", base=base, density=0.5)
    assert (second["b"] != both["b"]).any()
    # whatever way the memory lies
    wide = {"b": tuned["b"].reshape(100, 700)}
    fortran = {"b": np.asfortranarray(wide["b"])}
    merge([fortran], "dare_linear", base={"b": np.zeros((100, 700), np.float32, "F")}, density=0.5, out=fortran)
    assert np.array_equal(fortran["b"].reshape(-1), both["b"])


@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_models_merged_together_have_the_masks_that_they_have_alone(backend: str) -> None:
    base, models = np.zeros(1000, np.float32), [np.full(1000, 2.0**k, np.float32) for k in range(3)]
    how: dict[str, Any] = {"density": 0.5, "rescale": None, "backend": backend}
    alone = [merge(models, "dare_linear", base=base, weight=one_hot, **how) for one_hot in np.eye(3)]
    together = merge(models, "dare_linear", base=base, **how)
    assert np.array_equal(together, sum(alone))
    assert len(set(together.tolist())) == 8
    # of entries that equal the cut, too
    pruned = merge(models, "magnitude_prune", base=base, **how)
    one_by_one = [merge(models, "magnitude_prune", base=base, weight=one_hot, **how) for one_hot in np.eye(3)]
    assert np.array_equal(pruned, sum(one_by_one))


@pytest.mark.parametrize("rescale", ["inverse_density", "l1"])
def test_the_mean_over_seeds_is_the_unpruned_merge(rescale: str) -> None:
    base, models = random_models((200,), 2)
    full = merge(models, "task_arithmetic", base=base, weight=[0.6, 0.4])
    draws = [
        merge(models, "dare_linear", base=base, weight=[0.6, 0.4], density=0.5, rescale=rescale, seed=s) for s in range(2000)
    ]
    error = np.mean(draws, axis=0) - full
    spread = np.std(draws, axis=0) / np.sqrt(len(draws))
    # the L1 ratio is a ratio of random numbers, and so is biased by some tenths of a percent
    assert (np.abs(error) <= 5 * spread + (0.01 * np.abs(full - base) if rescale == "l1" else 0)).all()


def test_dare_rescales() -> None:
    base, model = np.zeros(10_000, np.float32), np.linspace(1, 2, 10_000, dtype=np.float32)
    for rescale, factor in [("inverse_density", 4.0), (None, 1.0)]:
        merged = merge([model], "dare_linear", base=base, density=0.25, rescale=rescale)
        assert set((merged[merged != 0] / model[merged != 0]).tolist()) == {factor}
    merged = merge([model], "dare_linear", base=base, density=0.25, rescale="l1")
    assert np.abs(merged).sum(dtype=np.float64) == pytest.approx(np.abs(model).sum(dtype=np.float64), rel=1e-6)


# Degenerate tensors

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}),
    ("ties", {"elect": "unweighted", "combine": "count_mean", "rescale": "l1"}),
    ("ties", {"combine": "max", "rescale": "inverse_density"}),
    ("dare_linear", {}),
    ("dare_linear", {"rescale": "l1", "normalize": True}),
    ("dare_ties", {}),
    ("dare_ties", {"combine": "weight_mean", "rescale": "l1"}),
    ("breadcrumbs", {}),
    ("breadcrumbs_ties", {"gamma": 0.3}),
    ("magnitude_prune", {"rescale": "l1"}),
]


@pytest.mark.parametrize("shape", [(), (1,), (7, 1), (0,), (0, 3), (5,)], ids=str)
@pytest.mark.parametrize(("method", "how"), METHODS)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_degenerate_tensors(method: str, how: dict[str, Any], scope: str, shape: tuple[int, ...]) -> None:
    base, models = random_models(shape, 2)
    for density in (0, 0.01, 0.5, 1):
        for given_models in (models, [base, base], [base + 1, base + 1]):
            result = merge(given_models, method, base=base, density=density, scope=scope, **how)
            assert result.shape == shape
            assert np.isfinite(result).all()
            if density == 0 or given_models[0] is base:
                assert result.tobytes() == base.tobytes()
    zeros = np.zeros(shape, np.float32)
    assert not merge([zeros, zeros], method, base=zeros, density=0.5, scope=scope, **how).any()


@given(st.integers(0, 2**32), st.sampled_from(METHODS), st.sampled_from(["float32", "bfloat16", "float16", "float64"]))
def test_models_equal_to_the_base_return_it_bit_for_bit(seed: int, chosen: tuple[str, dict[str, Any]], dtype: str) -> None:
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal(100) * 10.0 ** rng.integers(-6, 4, 100)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    base[::7] = -0.0
    method, how = chosen
    for backend in ("numpy", "numba"):
        assert (
            merge([base.copy(), base.copy()], method, base=base, density=0.5, backend=backend, **how).tobytes()
            == base.tobytes()
        )


# Bad input


@pytest.mark.parametrize(("method", "how"), METHODS)
@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_what_is_not_finite_is_named(backend: str, method: str, how: dict[str, Any]) -> None:
    base, model = np.ones(50, np.float32), np.ones(50, np.float32)
    spoiled = model.copy()
    spoiled[[3, 17]] = np.nan, -np.inf
    for models, where, label in (([model, spoiled], base, "model 1"), ([model, model], spoiled, "base")):
        with pytest.raises(NonFiniteError, match=f"{label}, the array: 1 NaN and 1 Inf"):
            merge(models, method, base=where, density=0.5, backend=backend, **how)
        out = model.copy()
        with pytest.raises(NonFiniteError, match=label):
            merge(models, method, base=where, density=0.5, backend=backend, out=out, **how)
        assert (out == 1).all()


def test_an_overflow_is_explained_and_nothing_is_written() -> None:
    base, model = np.float16([1, -60000]), np.float16([2, 60000])
    for density in (1, 0.5):
        out = model.copy()
        with pytest.raises(NonFiniteError, match="finite inputs overflow float16"):
            merge([model], "ties", base=base, density=density, lambda_=2.0, out=out)
        assert out.tobytes() == model.tobytes()
    with pytest.raises(NonFiniteError, match="overflow"):
        merge([np.float32([3e38, 0])], "ties", base=np.float32([-3e38, 0]), density=0.5)
    with pytest.raises(MergeError, match="not finite"):
        merge([model], "ties", base=base, density=1, weight=1e60)


def test_infinities_that_agree_stay() -> None:
    base, model = f32(np.inf, -np.inf, 1, 2), f32(np.inf, -np.inf, 3, 2)
    merged = merge([model], "ties", base=base, density=0.5, nonfinite="allow")
    assert merged.tolist() == [np.inf, -np.inf, 3, 2]


def test_a_model_of_weight_zero_is_not_read() -> None:
    spoiled = f32(np.nan, 0, 0, 0)
    for method, how in METHODS:
        result = merge([f32(1, 2, 3, 4), spoiled], method, base=ZERO, density=0.5, weight=[1, 0], **how)
        assert np.isfinite(result).all()


def test_all_weights_zero_is_the_base() -> None:
    base = f32(1, 2, -0.0, 4)
    for method, how in METHODS:
        if not how.get("normalize"):
            models = [base + 1, base + 2]
            assert merge(models, method, base=base, density=0.5, weight=0, **how).tobytes() == base.tobytes()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"normalize": True}, 'unknown parameter of ties "normalize": combine: mergekit\'s normalize=True is "weight_mean"'),
        ({"majority_sign_method": "total"}, 'majority_sign_method="total" is "unweighted"'),
        ({"rescale": True}, "rescale=True: must be one of 'inverse_density', 'l1', None .mergekit's rescale=True is \"l1\""),
        ({"rescale": False}, "its False None"),
        ({"scoep": "model"}, 'did you mean "scope"'),
        ({"density": 1e-320, "rescale": "inverse_density"}, "density=.*too small to multiply by 1 / density"),
        ({"seed": "a"}, "seed='a': must be an integer"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": True}, "seed=True"),
        ({"seed": None}, "seed=None"),
    ],
)
def test_bad_parameters(how: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge([f32(1, 2)], "ties", base=f32(0, 0), **{"density": 0.5, **how})


def test_memory_does_not_grow_with_the_number_of_tensors() -> None:
    def peak(tensors: int) -> int:
        rng = np.random.default_rng(0)
        base = {f"w{i}": rng.standard_normal(40_000).astype(np.float32) for i in range(tensors)}
        tuned = [{name: t + 1 for name, t in base.items()} for _ in range(2)]
        merge(tuned, "ties", base=base, density=0.2, out=tuned[0])
        tracemalloc.start()
        merge(tuned, "ties", base=base, density=0.2, out=tuned[0], threads=1)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(50), peak(400)
    assert many < few + (64 << 20)  # the histograms of 400 tensors would be 8 times those of 50
