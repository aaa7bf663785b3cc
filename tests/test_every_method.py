"""What holds for every registered method: the same bits everywhere, any shape, no mutation, models that agree."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_cl import execute, merge, methods, survey
from mergekit_cl.dtypes import type_of
from mergekit_cl.kernels import BLOCK
from mergekit_cl.registry import Method

Array = npt.NDArray[Any]
Model = dict[str, Array]

REQUIRED = {"density": 0.3, "t": 0.3, "window": 2}
MODES: dict[str, list[dict[str, Any]]] = {
    "ties": [
        {"elect": "unweighted", "combine": "count_mean", "weight": [0.7, -1.2, 0.4]},
        {"combine": "max", "rescale": "inverse_density", "lambda_": 0.7},
        {"combine": "sum", "density": [1, 0, 0.9]},
    ],
    "dare_ties": [{"combine": "weight_mean", "weight": [0.7, -1.2, 0.4]}, {"density": [1, 0, 0.9], "seed": 3}],
    "breadcrumbs_ties": [{"gamma": [0, 0.2, 0.9], "combine": "count_mean"}],
    "sce": [{"select_topk": 0.3}, {"select_topk": 0}],
    "ramplus_tl": [{"r": 2, "alpha": 0.7, "epsilon": 0.1}],
    "nearswap": [{"t": 1e-4}],
    "lawa": [{"window": 2, "every": 2}],
    "wsm": [{"decay": "cosine", "final_ratio": 0.1}, {"decay": "linear"}],
    "geometric_median": [{"weight": [0.7, 1.2, 0.4]}],
    "della": [
        {"rescale": None, "seed": 3},
        {"elect": "unweighted", "combine": "count_mean", "weight": [0.7, -1.2, 0.4]},
        {"combine": "max", "rescale": None, "density": [1, 0, 0.4]},
    ],
    "della_linear": [{"normalize": True, "weight": [0.7, 0, 0.4], "epsilon": [0.1, 0, 0.2]}],
}
NEXT_TO_EQUAL = {"slerp", "nuslerp", "multislerp", "karcher", "geometric_median", "model_stock", "opcm", "sce"}
"""Their coefficients come from sums in float64, whose last bits are a backend's own."""

CASES = [(name, how) for name in methods() for how in [{}, *MODES.get(name, [])]]
SCOPES = ["tensor", "model"]


def run(name: str, models: list[Model], how: dict[str, Any], scope: str = "tensor", **options: Any) -> Model:
    """Merge as many of the models (the first is the base, where one can be used) as the method takes."""
    chosen = methods()[name]
    parameters = {p: value for p, value in REQUIRED.items() if p in chosen.parameters} | how
    if "scope" in chosen.shown:
        parameters["scope"] = scope
    base, given_models = inputs(chosen, models)
    parameters |= {p: [{t: np.abs(v) for t, v in m.items()} for m in given_models] for p in chosen.companions}
    if isinstance(parameters.get("weight"), list):
        parameters["weight"] = parameters["weight"][: len(given_models)]
    merged: Model = merge(given_models, name, base=base, **{"nonfinite": "allow", **options}, **parameters)
    return merged


def inputs(chosen: Method, models: list[Model]) -> tuple[Model | None, list[Model]]:
    base = None if chosen.base == "unused" else models[0]
    most = 1 if chosen.name == "slerp" else chosen.most or len(models)
    return base, models[1 : 1 + most]


def random_model(seed: int, sizes: list[int], dtypes: list[str], offset: int, near: Model | None = None) -> Model:
    rng = np.random.default_rng(seed)
    model = {}
    for index, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True)):
        name = f"tensor {index}"
        values = rng.standard_normal(size + offset) * 10.0 ** rng.integers(-5, 3, size + offset)
        values[rng.random(size + offset) < 0.1] = -0.0
        values[rng.random(size + offset) < 0.2] = 0.5  # equal magnitudes
        values[rng.random(size + offset) < 0.02] = float(ml_dtypes.finfo(type_of[dtype]).smallest_subnormal) * 3
        tensor = values.astype(type_of[dtype])[offset:]
        if near is not None:
            tensor[::3] = near[name][::3].astype(tensor.dtype)
        model[name] = tensor
    return model


@st.composite
def models(draw: st.DrawFn, most: int) -> list[Model]:
    """Four models of two tensors, of mixed dtypes and in misaligned memory, that agree in some entries."""
    sizes = [draw(st.integers(0, most) | st.integers(0, 40)) for _ in range(2)]
    seed = draw(st.integers(0, 2**32))
    drawn: list[Model] = []
    kinds = [[draw(st.sampled_from(list(type_of))) for _ in sizes] for _ in range(2)]
    for k, dtypes in enumerate([*kinds, *kinds]):
        drawn.append(random_model(seed + k, sizes, dtypes, draw(st.integers(0, 3)), drawn[0] if drawn else None))
    return drawn


def check_equal(name: str, one: Model, other: Model) -> None:
    for tensor in one:
        if name in NEXT_TO_EQUAL:
            wide = [m[tensor].astype(np.float64) for m in (one, other)]
            scale = max(np.abs(w).max(initial=0) for w in wide)
            unit = 2.0**-21 if one[tensor].itemsize > 2 else 2.0**-6 if one[tensor].dtype != np.float16 else 2.0**-9
            assert (np.abs(wide[0] - wide[1]) <= unit * np.abs(wide[0]) + 2.0**-20 * scale).all()
        else:
            assert one[tensor].tobytes() == other[tensor].tobytes(), tensor


@given(drawn=models(3 * BLOCK), scope=st.sampled_from(SCOPES))
@settings(max_examples=8)
@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_numpy_and_numba_give_the_same_bits(name: str, how: dict[str, Any], scope: str, drawn: list[Model]) -> None:
    expected = run(name, drawn, how, scope, backend="numpy", threads=1)
    check_equal(name, run(name, drawn, how, scope, backend="numba", threads=2), expected)


@given(drawn=models(2000), scope=st.sampled_from(SCOPES))
@settings(max_examples=4)
@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_triton_gives_the_same_bits(name: str, how: dict[str, Any], scope: str, drawn: list[Model]) -> None:
    expected = run(name, drawn, how, scope, backend="numpy", threads=1)
    check_equal(name, run(name, drawn, how, scope, backend="triton"), expected)


@given(drawn=models(4 * BLOCK), scope=st.sampled_from(SCOPES), threads=st.integers(1, 4), blocks=st.integers(1, 5))
@settings(max_examples=6)
@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_threads_and_chunks_do_not_show(
    backend: str, name: str, how: dict[str, Any], scope: str, drawn: list[Model], threads: int, blocks: int
) -> None:
    expected = run(name, drawn, how, scope, backend=backend, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "CHUNK", blocks * BLOCK)
        merged = run(name, drawn, how, scope, backend=backend, threads=threads)
    assert {t: v.tobytes() for t, v in merged.items()} == {t: v.tobytes() for t, v in expected.items()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_large_tensors_whose_cuts_are_guessed_from_a_sample(dtype: str, scope: str) -> None:
    """Also where the sample is all wrong, and where it holds nothing but equal magnitudes."""
    sizes = [3_000_000, 70_000, 600_000]
    models = [random_model(k, sizes, [dtype] * 3, 0) for k in range(4)]
    for model in models[1:]:
        model["tensor 2"][:] = models[0]["tensor 2"]
        model["tensor 2"][5:40_000] += model["tensor 2"].dtype.type(1)
    step = 32 * (600_000 // (600_000 // 16))
    for model in models[2:]:  # a sample of runs of 32 sees none of these
        model["tensor 2"].reshape(-1)[: 600_000 // step * step].reshape(-1, step)[:, 32:] += model["tensor 2"].dtype.type(3)
    for density in (0.001, 0.2, 0.97):
        results = [
            run("ties", models, {"density": density}, scope, backend=backend, threads=threads)
            for backend, threads in (("numpy", 2), ("numba", 1), ("numba", 2))
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(survey, "SAMPLED", 10**9)
            patch.setattr(survey, "_BINS", (256, 256))
            results.append(run("ties", models, {"density": density}, scope, backend="numba"))
        for other in results[1:]:
            check_equal("ties", other, results[0])


@given(drawn=models(300), scope=st.sampled_from(SCOPES))
@settings(max_examples=10)
@pytest.mark.parametrize("name", methods())
def test_in_place_gives_the_same_bits_and_inputs_are_left_alone(name: str, scope: str, drawn: list[Model]) -> None:
    before = [{t: v.tobytes() for t, v in model.items()} for model in drawn]
    merged = run(name, drawn, {}, scope)
    assert [{t: v.tobytes() for t, v in model.items()} for model in drawn] == before
    chosen = methods()[name]
    _, given_models = inputs(chosen, drawn)
    run(name, drawn, {}, scope, out=given_models[0])
    for tensor, value in merged.items():
        assert given_models[0][tensor].tobytes() == value.tobytes()


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(list(type_of)), scope=st.sampled_from(SCOPES))
@settings(max_examples=15)
@pytest.mark.parametrize("name", methods())
def test_models_that_agree_return_themselves(name: str, seed: int, dtype: str, scope: str) -> None:
    model = random_model(seed, [200, 1], [dtype] * 2, 0)
    how = {} if name != "task_arithmetic" else {"weight": 0.3}
    merged = run(name, [{t: v.copy() for t, v in model.items()} for _ in range(4)], how, scope)
    for tensor, value in merged.items():
        assert value.tobytes() == model[tensor].tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (1, 5), (0,), (0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
@pytest.mark.parametrize("name", methods())
def test_any_shape(name: str, backend: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    models = [{"w": rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]
    for scope in SCOPES:
        for given_models in (models, [{"w": np.zeros(shape, np.float32)}] * 4):
            merged = run(name, given_models, {}, scope, backend=backend, nonfinite="error")["w"]
            assert merged.shape == shape
            assert np.isfinite(merged).all()


ORDER_MATTERS = {
    "sfa", "ema", "lawa", "wsm", "opcm",  # by their definition
    "dare_linear", "dare_ties", "della", "della_linear",  # each model has masks of its own
}  # fmt: skip


@given(seed=st.integers(0, 2**32), order=st.permutations([1, 2, 3]), scope=st.sampled_from(SCOPES))
@settings(max_examples=8)
@pytest.mark.parametrize("name", sorted(n for n in methods().keys() - ORDER_MATTERS if methods()[n].most is None))
def test_the_order_of_the_models_does_not_matter(name: str, seed: int, order: list[int], scope: str) -> None:
    rng = np.random.default_rng(seed)
    base = {"w": rng.standard_normal((30, 20)), "v": rng.standard_normal(50)}
    models = [base, *({t: v + 0.1 * rng.standard_normal(v.shape) for t, v in base.items()} for _ in range(3))]
    expected = run(name, models, {}, scope)
    merged = run(name, [base, *(models[k] for k in order)], {}, scope)
    for tensor in expected:
        np.testing.assert_allclose(merged[tensor], expected[tensor], rtol=1e-10, atol=1e-12)
