"""The numerics contract, on arrays that hypothesis draws: same bits everywhere, the error bound, models that agree."""

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_cl import NonFiniteError, execute, merge
from mergekit_cl.dtypes import type_of
from mergekit_cl.kernels import BLOCK
from mergekit_cl.kernels.numba import streaming

Array = npt.NDArray[Any]
DTYPES = list(type_of)
WEIGHTS = st.floats(-2, 2).map(lambda weight: round(weight, 3))


def random_array(seed: int, size: int, dtype: str, offset: int = 0) -> Array:
    """Random values over many magnitudes, with zeros of both signs and subnormals, ``offset`` elements into memory."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size + offset) * 10.0 ** rng.integers(-5, 4, size + offset)
    values[rng.random(size + offset) < 0.1] = -0.0
    values[rng.random(size + offset) < 0.05] = float(ml_dtypes.finfo(type_of[dtype]).smallest_subnormal) * 3
    return values.astype(type_of[dtype])[offset:]


@st.composite
def cases(draw: st.DrawFn, most: int) -> tuple[list[Array], list[float], str]:
    """Models of mixed dtypes and misaligned memory that agree in some entries, weights, and a dtype for the result."""
    count = draw(st.integers(2, 4))
    size = draw(st.integers(0, most) | st.integers(0, 40))
    seed = draw(st.integers(0, 2**32))
    models = [random_array(seed + k, size, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3))) for k in range(count)]
    for model in models[1:]:
        model[::3] = models[0][::3].astype(model.dtype)
    weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count).filter(lambda w: abs(sum(w)) > 0.1))
    return models, weights, draw(st.sampled_from(DTYPES))


def merged(models: list[Array], weights: list[float], dtype: str, normalize: bool, **how: Any) -> bytes:
    options = {"weight": weights, "normalize": normalize, "out_dtype": dtype, "nonfinite": "allow"}
    return bytes(merge(models, "linear", **options, **how).tobytes())


@given(cases(3 * BLOCK), st.booleans())
@settings(max_examples=60)
def test_numpy_and_numba_give_the_same_bits(case: tuple[list[Array], list[float], str], normalize: bool) -> None:
    numpy = merged(*case, normalize, backend="numpy", threads=1)
    assert merged(*case, normalize, backend="numba", threads=2) == numpy


@given(cases(3000), st.booleans())
@settings(max_examples=25)
def test_triton_gives_the_same_bits(case: tuple[list[Array], list[float], str], normalize: bool) -> None:
    assert merged(*case, normalize, backend="triton") == merged(*case, normalize, backend="numpy")


@given(st.data())
@settings(max_examples=20)
def test_compiled_loops_for_large_tables_give_the_same_bits(data: st.DataObject) -> None:
    dtypes, out = data.draw(st.sampled_from([
        (["bfloat16"] * 2, "bfloat16"), (["float32"] * 3, "float32"), (["float16"] * 2, "float16"),
        (["float64", "bfloat16"], "bfloat16"),
    ]))  # fmt: skip
    size, offset, seed = data.draw(st.integers(9, 5000)), data.draw(st.integers(0, 40)), data.draw(st.integers(0, 999))
    models = [random_array(seed + k, size, dtype, offset) for k, dtype in enumerate(dtypes)]
    models[0][::3] = models[1][::3].astype(models[0].dtype)
    for model in models:
        model[7:9] = np.inf, -np.inf
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(dtypes), max_size=len(dtypes)))
    numpy = merged(models, weights, out, True, backend="numpy")
    in_place = models[0].copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "LEAST", 1)
        assert merged(models, weights, out, True, backend="numba") == numpy
        merge([in_place, *models[1:]], "linear", weight=weights, out=in_place, backend="numba", nonfinite="allow")
    assert in_place.tobytes() == merged(models, weights, dtypes[0], True, backend="numpy")


@given(cases(4 * BLOCK), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=25)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_threads_and_chunks_do_not_show(
    backend: str, case: tuple[list[Array], list[float], str], threads: int, blocks: int
) -> None:
    expected = merged(*case, True, backend=backend, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "CHUNK", blocks * BLOCK)
        assert merged(*case, True, backend=backend, threads=threads) == expected


@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.lists(st.floats(0, 1), min_size=2, max_size=5))
@pytest.mark.parametrize("method", ["linear", "sfa"])
def test_identical_models_return_themselves(method: str, seed: int, dtype: str, weights: list[float]) -> None:
    model = random_array(seed, 200, dtype)
    how: dict[str, Any] = {"beta": weights[0]} if method == "sfa" else {"weight": [w + 0.01 for w in weights]}
    assert merge([model.copy() for _ in weights], method, **how).tobytes() == model.tobytes()


@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.floats(-3, 3), st.floats(-1, 1))
def test_models_equal_to_the_base_return_it(seed: int, dtype: str, one: float, two: float) -> None:
    base = random_array(seed, 200, dtype)
    models = [base.copy(), base.copy()]
    assert merge(models, "task_arithmetic", base=base, weight=[one, two]).tobytes() == base.tobytes()
    assert merge(models[:1], "wise_ft", base=base, alpha=abs(two)).tobytes() == base.tobytes()


@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_the_error_bound(seed: int, dtype: str, weights: list[float]) -> None:
    """Half an ulp of the output type plus 2**-22 * sum |w x|, against exact arithmetic."""
    models = [random_array(seed + k, 100, dtype) for k in range(2)]
    total = sum(map(Fraction, weights))
    check_bound(merge(models, "linear", weight=weights), models, [Fraction(w) / total for w in weights])
    beta = weights[0]
    check_bound(merge(models, "sfa", beta=beta), models, [Fraction(beta), 1 - Fraction(beta)])
    check_bound(merge(models[1:2], "wise_ft", base=models[0], alpha=beta), models, [1 - Fraction(beta), Fraction(beta)])


@given(st.integers(0, 2**32), st.integers(3, 8))
def test_the_error_bound_for_many_models(seed: int, count: int) -> None:
    """Half an ulp plus (K + 1) * 2**-24 * sum |w_k (x_k - ref)|, also where one model is far from all others."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1, count)
    models = [rng.standard_normal(50).astype(np.float32) * np.float32(1 if k == 0 else 1e-4) for k in range(count)]
    result = merge(models, "linear", weight=weights.tolist())
    total, ref = sum(map(Fraction, weights)), models[int(np.argmax(weights))]
    for index, value in enumerate(result.tolist()):
        terms = [(Fraction(w) / total, Fraction(float(m[index]))) for w, m in zip(weights, models, strict=True)]
        exact = sum(w * x for w, x in terms)
        spread = sum(abs(w * (x - Fraction(float(ref[index])))) for w, x in terms)
        ulp = Fraction(float(np.spacing(np.float32(abs(exact)))))
        assert abs(Fraction(value) - exact) <= ulp / 2 + (count + 1) * Fraction(2) ** -24 * spread * Fraction(1001, 1000)


def check_bound(result: Array, models: list[Array], weights: list[Fraction]) -> None:
    for index, value in enumerate(result.tolist()):
        terms = [w * Fraction(float(model[index])) for w, model in zip(weights, models, strict=True)]
        exact, magnitude = sum(terms), sum(map(abs, terms))
        ulp = Fraction(float(np.spacing(np.abs(np.array(float(exact)).astype(result.dtype)))))
        slack = Fraction(2) ** (-22 if result.dtype != np.float64 else -51) * magnitude
        assert abs(Fraction(value) - exact) <= ulp / 2 + slack


@given(st.integers(0, 2**32), st.permutations(range(4)))
def test_permuting_models_changes_nothing_beyond_the_bound(seed: int, order: list[int]) -> None:
    models, weights = [random_array(seed + k, 300, "float32") for k in range(4)], [0.1, 0.2, 0.3, 0.4]
    one = merge(models, "linear", weight=weights).astype(np.float64)
    other = merge([models[k] for k in order], "linear", weight=[weights[k] for k in order]).astype(np.float64)
    magnitude = sum(w * np.abs(m.astype(np.float64)) for w, m in zip(weights, models, strict=True))
    assert (np.abs(one - other) <= np.spacing(np.abs(one).astype(np.float32)) + 2.0**-21 * magnitude).all()


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_close_models_lose_only_the_last_rounding(seed: int, beta: float) -> None:
    """Models that differ by a hundredth: within 0.51 ulp, where beta * a + (1 - beta) * b loses more than one."""
    older = np.random.default_rng(seed).uniform(1, 1.9, 500).astype(np.float32)
    newer = (older * np.float32(1.01)).astype(np.float32)
    exact = beta * older.astype(np.float64) + (1 - beta) * newer.astype(np.float64)
    error = np.abs(merge([older, newer], beta=beta).astype(np.float64) - exact)
    assert (error <= 0.53 * np.spacing(np.float32(1))).all()


@pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
def test_an_overflow_on_the_way_to_a_wider_dtype_is_found(backend: str) -> None:
    large = np.full(3, 3e38, np.float32)
    with pytest.raises(NonFiniteError, match="overflow"):
        merge([large, large], "linear", normalize=False, out_dtype="float64", backend=backend)
    with pytest.raises(NonFiniteError, match="overflow"):
        merge([large, large], "ties", base=0 * large, density=1, combine="sum", out_dtype="float64", backend=backend)
