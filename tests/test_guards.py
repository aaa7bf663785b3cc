"""What no other test would notice if it went wrong: found by faults that were put into the code on purpose."""

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import MergeError, NonFiniteError, Scope, Steps, Sum, execute, merge, method, survey
from mergekit_cl.api import prepare
from mergekit_cl.kernels import BLOCK
from mergekit_cl.registry import find
from mergekit_cl.steps import Apply, Consensus, Gram, KthMagnitude, SumOfSlices

Array = npt.NDArray[Any]

BACKENDS = ["numpy", "numba"]
ZERO = np.zeros(4, np.float32)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


# Slices


@pytest.mark.parametrize(
    ("weights", "base", "references"),
    [
        ([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5], [2, -1], [1, 1]], None, [1, 0, 0, 0, -1]),
        ([[0.3, 0], [0.7, 0], [0.5, 0], [0.25, 0.25], [1, 0]], [0.7, 0.3, 0.5, 0.5, 1], [2, 0, 2, 2, -1]),
        ([[1, 0], [0, 0], [1e-60, 1], [0.1, 0.9 - 1e-9], [inf, 1], [inf, -inf]], None, [-1] * 6),
        ([[0.5, 0], [0.5, 0]], 0.5, [2, 2]),
    ],
)
def test_each_slice_has_a_reference_of_its_own(weights: list[list[float]], base: Any, references: list[int]) -> None:
    step = SumOfSlices(np.array(weights, np.float64), 0.0 if base is None else np.array(base))
    rounded, chosen = step.terms(np.dtype(np.float32), has_base=base is not None)
    assert chosen.tolist() == references
    assert rounded.dtype == np.float32
    assert rounded[:, :2].tolist() == np.float32(weights).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_does_not_read_what_has_no_weight_there(backend: str) -> None:
    @method(paper="")
    def chooser(scope: Scope) -> Steps:
        """Take a row from each model."""
        yield Gram()
        return SumOfSlices(np.array([[2.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))

    models = [np.float32([[1], [np.nan], [-0.0]]), np.float32([[np.inf], [-0.0], [-0.0]])]
    merged = merge(models, "chooser", backend=backend, nonfinite="allow")
    assert merged.tobytes() == np.float32([[2], [-0.0], [-0.0]]).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_that_agree_stay_in_slices(backend: str) -> None:
    @method(paper="")
    def halfway(scope: Scope) -> Apply:
        """Average."""
        return SumOfSlices(np.full((2, 2), 0.5))

    model = np.float32([[np.inf, 3], [-np.inf, 5]])
    assert merge([model, model.copy()], "halfway", backend=backend, nonfinite="allow").tobytes() == model.tobytes()


def test_progress_counts_the_elements_of_slices(capsys: pytest.CaptureFixture[str]) -> None:
    models = [np.full((50, 20), value, np.float32) for value in (1, 2)]
    merge(models, "nuslerp", weight=[1, 1], nuslerp_flatten=False, progress=True)
    assert "100%" in capsys.readouterr().out


# Tables


def test_steps_of_different_kinds_are_kept_apart() -> None:
    def check(step: Callable[[str], Apply], expected: list[float], **options: Any) -> None:
        @method(paper="", base="optional")
        def by_name(scope: Scope) -> Apply:
            """Return a step that depends on the name."""
            return step(scope.names[0])

        models = [{name: f32(value) for name in "abc"} for value in (2, 4)]
        merged = merge(models, "by_name", **options)
        assert [merged[name][0] for name in "abc"] == expected

    about: dict[str, Sum] = {"a": Sum([1, 1]), "b": Sum([0.5, 0.5]), "c": Sum([1, 2])}
    check(about.__getitem__, [6, 3, 10])
    combine: dict[str, Any] = {"a": "sum", "b": "max", "c": "count_mean"}
    base = {name: f32(0) for name in "abc"}
    check(lambda name: Consensus([1, 1], combine=combine[name]), [6, 4, 3], base=base)


@pytest.mark.parametrize("threads", [1, 2])
def test_histograms_that_take_too_much_memory_are_counted_in_parts(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = {f"tensor {k}": rng.standard_normal(1000 + 100 * k).astype(np.float32) for k in range(7)}
    base = {name: np.zeros_like(t) for name, t in model.items()}
    for counters in (1, 3000, 10**9):
        monkeypatch.setattr(survey, "_COUNTERS", counters)
        merged = merge([model], "magnitude_prune", base=base, density=0.3, threads=threads)
        assert [np.count_nonzero(t) for t in merged.values()] == [300 + 30 * k for k in range(7)]


def test_histograms_of_shares_that_do_not_begin_with_the_first_tensor() -> None:
    rng = np.random.default_rng(0)
    model = {
        name: rng.standard_normal(size).astype(np.float32)
        for name, size in zip("abc", (140_000, 150_000, 160_000), strict=True)
    }
    base = {name: np.zeros_like(t) for name, t in model.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "CHUNK", BLOCK)
        merged = merge([model], "magnitude_prune", base=base, density=0.3, threads=2, backend="numpy")
    for tensor in merged.values():
        assert abs(np.count_nonzero(tensor) - 0.3 * tensor.size) < 3  # but for equal magnitudes


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_over_tensors_of_different_dtypes(backend: str) -> None:
    model: dict[str, Array] = {"half": np.array([1], np.float16), "double": np.array([1e300])}
    base = {name: np.zeros_like(t) for name, t in model.items()}
    merged = merge([model], "ties", base=base, density=1, rescale="l1", scope="model", backend=backend)
    assert merged == model


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_must_be_finite_too(backend: str) -> None:
    for index in range(20):
        model = np.ones(20, np.float32)
        model[index] = np.nan
        with pytest.raises(NonFiniteError, match="model 0, the array: 1 NaN"):
            merge([model], "dare_linear", base=0 * ZERO.repeat(5), density=0.2, backend=backend)


def test_weights_of_task_vectors_are_finite() -> None:
    with pytest.raises(MergeError, match=r"its weights .* are not finite in float32"):
        merge([ZERO + 1], "ties", base=ZERO, density=1, weight=1e60)


# Surveys that do not fit


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (KthMagnitude([[5]]), "asking: .* for 1 models and 4 elements"),
        (KthMagnitude([[-1]]), "asking: .* for 1 models and 4 elements"),
        (KthMagnitude([[1], [1, 2]]), "asking: .* for 1 models and 4 elements"),
        (3, "asking: yielded int, which is not a survey"),
    ],
)
def test_bad_surveys(asked: Any, message: str) -> None:
    @method(paper="", base="required")
    def asking(scope: Scope) -> Steps:
        """Ask."""
        yield asked
        return Sum([1.0])

    with pytest.raises(MergeError, match=message):
        merge([ZERO], "asking", base=ZERO)


def test_cuts_need_a_base() -> None:
    @method(paper="")
    def baseless(scope: Scope) -> Steps:
        """Ask for a cut without a base."""
        yield KthMagnitude([[1]])
        return Sum([1.0])

    with pytest.raises(MergeError, match="task vectors need a base"):
        merge([ZERO], "baseless")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_refuses_what_is_not_finite_even_if_the_step_does_not_read_it(backend: str) -> None:
    @method(paper="", base="required")
    def looking(scope: Scope) -> Steps:
        """Look at the model, return the base."""
        yield KthMagnitude([[1]])
        return Sum([0.0], base_weight=1.0)

    with pytest.raises(NonFiniteError, match="model 0, the array: 1 NaN"):
        merge([f32(1, np.nan)], "looking", base=f32(0, 0), backend=backend)
    with pytest.raises(NonFiniteError, match="what looking asks for, of finite inputs, overflows"):
        merge([f32(1, 3e38)], "looking", base=f32(0, -3e38), backend=backend)


@pytest.mark.parametrize(
    "step", [Consensus([1, 1]), Consensus([1], rescale=[1, 1]), SumOfSlices(np.ones((2, 1))), SumOfSlices(np.ones((1, 2)))]
)
def test_steps_that_do_not_fit(step: Apply) -> None:
    @method(paper="", base="required")
    def misfit(scope: Scope) -> Apply:
        """Return it."""
        return step

    with pytest.raises(MergeError, match=r"misfit: returned (Consensus|SumOfSlices)"):
        merge([ZERO], "misfit", base=ZERO)


# Parameters of the methods


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        # of [4, -1, 3, 2] two stay: [4, 0, 3, 0]; of [-2, 5, 1, 0]: [-2, 5, 0, 0]
        ("ties", {"weight": [0, 1], "rescale": "l1"}, [-16 / 7, 40 / 7, 0, 0]),
        ("ties", {"density": [0.5, 0.25], "rescale": "inverse_density"}, [8, 20, 6, 0]),
        ("magnitude_prune", {"rescale": "l1"}, [40 / 7 - 16 / 7, 40 / 7, 30 / 7, 0]),
        ("magnitude_prune", {"weight": [1, 3], "normalize": True}, [-0.5, 3.75, 0.75, 0]),
        ("dare_linear", {"density": 1, "weight": [1, 3], "normalize": True}, [-0.5, 3.5, 1.5, 0.5]),
        ("breadcrumbs", {"gamma": 0, "weight": [1, 3], "normalize": True}, [-0.5, 3.75, 0.75, 0]),
        ("breadcrumbs", {"gamma": 0.25, "weight": [1, 0]}, [0, 0, 3, 2]),
        ("breadcrumbs_ties", {"gamma": 0, "rescale": "l1"}, [40 / 7, 40 / 7, 30 / 7, 0]),
        # weighted: [4, -1, 3, 2] and [-6, 15, 3, 0]: - + + +; unweighted: + + + +
        ("dare_ties", {"density": 1, "weight": [1, 3]}, [-6, 15, 6, 2]),
        ("dare_ties", {"density": 1, "weight": [1, 3], "elect": "unweighted"}, [4, 15, 6, 2]),
        ("dare_ties", {"density": 1, "weight": [1, 3], "combine": "count_mean"}, [-6, 15, 3, 2]),
        ("dare_ties", {"density": 1, "weight": [1, 3], "combine": "weight_mean"}, [-2, 5, 1.5, 2]),
        ("breadcrumbs_ties", {"density": 1, "weight": [1, 3], "elect": "unweighted"}, [4, 15, 6, 2]),
        ("breadcrumbs_ties", {"density": 1, "weight": [1, 3], "combine": "max"}, [-6, 15, 3, 2]),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(backend: str, name: str, how: dict[str, Any], expected: list[float]) -> None:
    models = [f32(4, -1, 3, 2), f32(-2, 5, 1, 0)]
    merged = merge(models, name, base=ZERO, backend=backend, **{"density": 0.5, **how})
    np.testing.assert_allclose(merged, np.float32(expected), rtol=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elections(backend: str) -> None:
    tie = merge([f32(2, -2), f32(-2, 2)], "ties", base=ZERO[:2], density=1, backend=backend)
    assert tie.tolist() == [2, 2]
    how = {"density": 1, "weight": [1, 4], "elect": "unweighted", "combine": "sum"}
    merged = merge([f32(3e38), f32(-1e38)], "ties", base=ZERO[:1], backend=backend, **how)
    assert merged == f32(3e38)  # -4e38 overflows, but the other sign is elected
    base = f32(np.inf, -np.inf, 1, 2)
    for name, density in (("ties", 0.5), ("ties", 1), ("breadcrumbs", 1), ("dare_ties", 1)):
        merged = merge([base + f32(0, 0, 2, 0)], name, base=base, density=density, nonfinite="allow", backend=backend)
        assert merged.tolist() == [np.inf, -np.inf, 3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_of_some_entries_and_not_a_number_is_not_a_number(backend: str) -> None:
    for models in ([f32(1), f32(np.nan)], [f32(np.nan), f32(1)]):
        merged = merge(models, "ties", base=ZERO[:1], density=1, combine="max", nonfinite="allow", backend=backend)
        assert np.isnan(merged)


def test_one_model_is_dropped_from_and_the_other_is_not() -> None:
    ones = np.ones(1000, np.float32)
    merged = merge([ones, ones], "dare_linear", base=0 * ones, density=[1, 0.5], weight=[1, 2], rescale=None)
    assert set(merged.tolist()) == {1, 3}


def test_dare_ties_has_the_masks_of_dare_linear() -> None:
    ones = np.ones(1000, np.float32)
    drawn = [
        [merge([ones], name, base=0 * ones, density=0.5, seed=seed).tobytes() for name in ("dare_linear", "dare_ties")]
        for seed in (0, 1)
    ]
    assert drawn[0][0] == drawn[0][1] != drawn[1][0] == drawn[1][1]


def test_a_method_surveys_anew_in_each_run() -> None:
    first, second = f32(2, 0), f32(0, 2)
    how = {"weight": [1, 1], "max_iter": 10, "tol": 1e-5, "scope": "tensor"}
    executor, _ = prepare(find("karcher"), [first, second], None, first, parameters=how)
    executor.run()
    np.testing.assert_allclose(first, [np.sqrt(2), np.sqrt(2)], rtol=1e-6)
    first[:], second[:] = [3, 0], [5, 0]
    executor.run()
    np.testing.assert_allclose(first, [4, 0], rtol=1e-6)


def test_a_model_of_weight_zero_gives_karcher_no_direction() -> None:
    merged = merge([np.array([1e-6, 0]), np.array([0, 1e-6]), np.array([5.0, 0])], "karcher", weight=[1, 1, 0])
    np.testing.assert_allclose(merged, [5e-7, 5e-7])  # the others are shorter than tol


def test_a_direction_next_to_opposite_pulls_nowhere() -> None:
    merged = merge([np.array([1.0, 0]), np.array([-1, 1e-7])], "karcher", weight=[10, 1])
    np.testing.assert_allclose(merged, [1, 0], atol=1e-6)  # by 3.1 * 1 / 11 otherwise, to the side on which the 1e-7 is


def test_parallel_vectors_whose_cosine_is_rounded_to_more_than_one() -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 3))
    merged = merge([vectors, 3 * vectors], "nuslerp", weight=[1, 1], nuslerp_flatten=False)
    np.testing.assert_allclose(merged, 2 * vectors, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_that_agree_have_no_part_in_the_angles_of_rows(backend: str) -> None:
    base = np.float32([[np.inf, 1], [2, 2]])
    model = base + np.float32([[0, 1], [1, 1]])
    merged = merge([model, model.copy()], "model_stock", base=base, filter_wise=True, nonfinite="allow", backend=backend)
    assert merged.tobytes() == model.tobytes()


def test_a_model_of_density_zero_is_not_read() -> None:
    for name in ("ties", "dare_linear", "breadcrumbs"):
        merged = merge([f32(1, 2, 3, 4), f32(np.nan, 0, 0, 0)], name, base=ZERO, density=[1, 0])
        assert merged.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("gap", [-(2.0**-30), 2.0**-30])
def test_a_cut_between_two_float32_values(gap: float) -> None:
    """It is an entry of a float64 tensor, next to which 1 is the nearest float32."""
    model: dict[str, Array] = {"single": f32(1, 0.1), "double": np.array([1 + gap, 0.0 if gap < 0 else 2.0])}
    base = {name: np.zeros_like(t) for name, t in model.items()}
    merged = merge([model], "magnitude_prune", base=base, density=0.5, scope="model")
    assert merged["single"].tolist() == ([1, 0] if gap < 0 else [0, 0])
    assert merged["double"].tolist() == model["double"].tolist()


# Overflows in place: nothing is written


@pytest.mark.parametrize(
    ("name", "base", "models", "how"),
    [
        ("ties", [0], [[60000]], {"weight": 1e-3, "lambda_": 2}),  # 60 is divided by 0.001
        ("ties", [0], [[100], [-100]], {"weight": [1, -0.999]}),  # 199.9 is divided by 0.001
        ("ties", [0], [[40000], [40000]], {"combine": "sum"}),
        ("dare_linear", [0], [[100]], {"density": 0.001, "seed": 2}),  # of 1000 entries some stay, times 1000
        ("nuslerp", None, [[[60000, 60000]], [[60000, -60000]]], {"weight": 1, "nuslerp_flatten": False}),  # 120000 * sqrt(0.5)
    ],
)
def test_an_overflow_is_found_before_anything_is_written(name: str, base: Any, models: list[Any], how: dict[str, Any]) -> None:
    density = {} if name == "nuslerp" else {"density": 1}
    repeats = 10_000 if name == "dare_linear" else 1
    first, *others = (np.repeat(np.float16(model), repeats, axis=0) for model in models)
    given = None if base is None else np.repeat(np.float16(base), repeats)
    before = first.tobytes()
    with pytest.raises(NonFiniteError, match="finite inputs overflow float16"):
        merge([first, *others], name, base=given, out=first, **{**density, **how})
    assert first.tobytes() == before


def test_a_task_vector_that_overflows_is_found_before_anything_is_written() -> None:
    model = f32(3e38)
    with pytest.raises(NonFiniteError, match="finite inputs overflow float32"):
        merge([model], "ties", base=f32(-3e38), density=1, weight=0.01, combine="sum", out=model)
    assert model.tolist() == f32(3e38).tolist()


def test_an_overflow_on_the_way_to_a_wider_dtype_is_found_before_anything_is_written() -> None:
    out = np.ones(1)
    with pytest.raises(NonFiniteError, match="finite inputs overflow float64"):
        merge([f32(3e38), f32(3e38)], "linear", normalize=False, out=out)
    assert out == 1


def test_a_difference_between_slices_that_overflows_is_found_before_anything_is_written() -> None:
    @method(paper="")
    def average(scope: Scope) -> Apply:
        """Average about the first model, from which the second is 3.5e38 away."""
        return SumOfSlices(np.array([[0.5, 0.001, 0.499]]))

    models = [f32(-0.5e38), f32(3e38), f32(0)]
    with pytest.raises(NonFiniteError, match="finite inputs overflow float32"):
        merge(models, "average", out=models[0])
    assert models[0] == f32(-0.5e38)


def test_weights_of_slices_are_finite() -> None:
    @method(paper="")
    def huge(scope: Scope) -> Apply:
        """Weigh with more than a float32 holds."""
        return SumOfSlices(np.array([[1e39]]))

    with pytest.raises(MergeError, match="are not finite in float32"):
        merge([f32(1)], "huge")


def test_a_slice_that_overflows_is_found_before_anything_is_written() -> None:
    @method(paper="")
    def fourfold(scope: Scope) -> Apply:
        """Multiply the second row by 4."""
        return SumOfSlices(np.array([[1.0], [4.0]]))

    model = np.float16([[20000], [20000]])
    with pytest.raises(NonFiniteError, match="finite inputs overflow float16"):
        merge([model], "fourfold", out=model)
    assert (model == 20000).all()
