"""merge() on arrays: hand-computed numbers, kinds of models, bad input."""

from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mergekit_cl import BackendError, MergeError, MismatchError, NonFiniteError, UnknownNameError, merge
from mergekit_cl.models.numpy import span

F32 = np.float32


def f32(values: object) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


class TestNumbers:
    """Every method and both sides of every flag, by hand."""

    def test_sfa_weighs_the_older_model_with_beta(self) -> None:
        older, newer = f32([1, 2, 8]), f32([3, 2, 0])
        assert merge([older, newer], beta=0.25).tolist() == [2.5, 2, 2]
        assert merge([older, newer], "sfa").tolist() == [2, 2, 4]

    def test_sfa_runs_through_more_than_two_models_oldest_first(self) -> None:
        # m = x0; m = b*m + (1-b)*x1; m = b*m + (1-b)*x2, with b = 0.25: 16 -> 4 -> 1 and 0.75 * 8 = 6
        assert merge([f32([16, 0]), f32([0, 0]), f32([0, 8])], beta=0.25).tolist() == [1, 6]

    def test_linear_normalizes_unless_told_not_to(self) -> None:
        models = [f32([1, 2]), f32([3, 4])]
        assert merge(models, "linear").tolist() == [2, 3]
        assert merge(models, "linear", weight=[3, 1]).tolist() == [1.5, 2.5]
        assert merge(models, "linear", weight=[3, 1], normalize=False).tolist() == [6, 10]
        assert merge(models, "linear", weight=2, normalize=False).tolist() == [8, 12]

    def test_huge_weights_are_normalised(self) -> None:
        assert merge([f32([1]), f32([3])], "linear", weight=[1e308, 1e308]).tolist() == [2]

    def test_wise_ft_starts_at_the_base(self) -> None:
        base, model = f32([1, 2]), f32([3, 6])
        assert merge([model], "wise_ft", base=base, alpha=0.25).tolist() == [1.5, 3]
        assert merge([model], "wise_ft", base=base).tolist() == [2, 4]

    def test_task_arithmetic_adds_weighted_differences(self) -> None:
        base, models = f32([1, 1]), [f32([2, 1]), f32([1, 5])]
        assert merge(models, "task_arithmetic", base=base).tolist() == [2, 5]
        assert merge(models, "task_arithmetic", base=base, weight=[2, 0.5]).tolist() == [3, 3]
        assert merge(models, "task_arithmetic", base=base, lambda_=0.5).tolist() == [1.5, 3]
        assert merge(models, "task_arithmetic", base=base, **{"lambda": 0.5}).tolist() == [1.5, 3]
        assert merge(models, "task_arithmetic", base=base, weight=[3, 1], normalize=True).tolist() == [1.75, 2]

    def test_zero_weights_give_zeros_and_leave_the_base_alone(self) -> None:
        models = [f32([1, 2]), f32([3, 4])]
        assert merge(models, "linear", weight=0, normalize=False).tolist() == [0, 0]
        assert merge(models, "task_arithmetic", base=f32([5, -0.0]), weight=0).tolist() == [5, 0]


class TestPromises:
    """What the numerics contract promises at the ends of the scale."""

    @pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
    def test_weight_one_copies_bytes(self, backend: str) -> None:
        models = [f32([1e-40, -0.0, 3]), f32([7, 7, 7])]
        for beta, expected in ((1.0, models[0]), (0.0, models[1])):
            assert merge(models, beta=beta, backend=backend).tobytes() == expected.tobytes()
        assert merge([models[0]], "wise_ft", base=models[1], alpha=1, backend=backend).tobytes() == models[0].tobytes()

    def test_models_of_weight_zero_take_no_part(self) -> None:
        assert merge([f32([1]), f32([np.nan]), f32([3])], "linear", weight=[1, 0, 1]).tolist() == [2]
        assert merge([f32([np.nan]), f32([3])], beta=0).tolist() == [3]

    def test_entries_in_which_models_agree_keep_their_bits(self) -> None:
        values = np.random.default_rng(0).standard_normal(10_000).astype(F32)
        other = values.copy()
        other[::2] += 1
        for weight in ([0.3, 0.3, 0.4], [1, 2, 4], [0.1, 5, -0.7]):
            merged = merge([values, other, values], "linear", weight=weight)
            assert merged[1::2].tobytes() == values[1::2].tobytes()

    def test_infinities_that_agree_are_kept_when_allowed(self) -> None:
        mask = f32([-np.inf, np.inf, 1])
        for backend in ("numpy", "numba", "triton"):
            merged = merge([mask, mask.copy()], beta=0.3, nonfinite="allow", backend=backend)
            assert merged.tobytes() == mask.tobytes()

    def test_bfloat16_is_rounded_once_to_nearest_even(self) -> None:
        one = ml_dtypes.bfloat16(1)
        next_up = np.nextafter(one, ml_dtypes.bfloat16(2))  # 1 + 2**-7; the middle is a tie, and goes to the even 1
        above = np.nextafter(next_up, ml_dtypes.bfloat16(2))
        low, middle, high = (np.array([x]) for x in (one, next_up, above))
        assert merge([low, middle], beta=0.5).tolist() == [1.0]
        assert merge([middle, high], beta=0.5).tolist() == [float(above)]

    def test_float64_inputs_are_rounded_once(self) -> None:
        # 1 + 2**-8 + 2**-40 is above the tie between two bfloat16: rounding to float32 first would lose that and go down
        value = np.array([1 + 2.0**-8 + 2.0**-40])
        for backend in ("numpy", "numba", "triton"):
            assert merge([value, value], out_dtype="bfloat16", backend=backend).tolist() == [1 + 2.0**-7]

    def test_dtypes_may_be_mixed_and_the_result_has_the_first(self) -> None:
        merged = merge([np.array([1, 2], np.float16), np.array([2, 4], np.float64)], beta=0.5)
        assert merged.dtype == np.float16
        assert merged.tolist() == [1.5, 3]
        assert merge([np.array([1], np.float16), f32([2])], out_dtype=np.float64).dtype == np.float64

    def test_the_inputs_decide_the_compute_type(self) -> None:
        third = [f32([0]), f32([1])]
        assert merge(third, beta=2 / 3, out_dtype="float64").tolist() == [float(np.float32(1 / 3))]
        assert merge([third[0].astype(np.float64), third[1]], beta=2 / 3, out_dtype="float64").tolist() == [1 - 2 / 3]
        unused = np.array([np.nan])
        assert merge([*third, unused], "linear", weight=[2, 1, 0], out_dtype="float64").tolist() == [float(np.float32(1 / 3))]

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3), (1, 1, 1)])
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        merged = merge([np.zeros(shape, F32), np.ones(shape, F32)])
        assert merged.shape == shape
        assert (merged == 0.5).all()

    def test_inputs_are_never_changed(self) -> None:
        models: list[dict[str, npt.NDArray[Any]]]
        models = [{"a": f32([1, 2]), "b": np.arange(3)}, {"a": f32([3, 4]), "b": np.arange(3)}]
        before = [{name: array.copy() for name, array in model.items()} for model in models]
        merged = merge(models)
        for model, copy in zip(models, before, strict=True):
            assert all((model[name] == copy[name]).all() for name in copy)
            assert not any(np.shares_memory(model[name], merged[name]) for name in copy)


class TestMappings:
    def test_nested_and_ordered_mappings_keep_their_form(self) -> None:
        model = {"block": {"w": f32([2])}, "head": f32([4])}
        assert merge([model, {"block": {"w": f32([4])}, "head": f32([4])}]) == {
            "block": {"w": f32([3])},
            "head": f32([4]),
        }

    def test_order_of_names_does_not_matter(self) -> None:
        merged = merge([{"a": f32([0]), "b": f32([2])}, {"b": f32([4]), "a": f32([0])}])
        assert list(merged) == ["a", "b"]
        assert merged["b"].tolist() == [3]

    def test_any_mapping_is_a_model_and_names_must_be_unique(self) -> None:
        frozen = MappingProxyType({"w": f32([2])})
        assert merge([frozen, {"w": f32([4])}]) == {"w": f32([3])}
        with pytest.raises(MergeError, match=r'model 0: two tensors are called "a.b"'):
            merge([{"a.b": f32([1]), "a": {"b": f32([2])}}] * 2)

    def test_integers_of_different_width_are_refused(self) -> None:
        with pytest.raises(MismatchError, match="dtype int32, but model 0 has int64"):
            merge([{"n": np.arange(3)}, {"n": np.arange(3, dtype=np.int32)}])

    def test_tied_tensors_stay_tied(self) -> None:
        def model(value: float) -> dict[str, np.ndarray]:
            shared = f32([value, value])
            return {"embed": shared, "head": shared, "other": f32([value])}

        merged = merge([model(1), model(3)])
        assert merged["embed"] is merged["head"]
        assert merged["embed"].tolist() == [2, 2]

    def test_scalars_are_not_taken_for_tied_tensors(self) -> None:
        merged = merge([{"a": np.float32(1), "b": np.float32(2)}, {"a": np.float32(3), "b": np.float32(10)}])
        assert (merged["a"].item(), merged["b"].item()) == (2, 6)

    def test_tied_models_into_an_output_that_is_not_tied(self) -> None:
        def model(value: float) -> dict[str, npt.NDArray[Any]]:
            shared = f32([value])
            return {"embed": shared, "head": shared}

        out = {"embed": f32([0]), "head": f32([0])}
        merge([model(1), model(3)], out=out)
        assert (out["embed"].tolist(), out["head"].tolist()) == ([2], [2])

    def test_tensors_tied_in_one_model_only_are_merged_apart(self) -> None:
        shared = f32([1])
        merged = merge([{"a": shared, "b": shared}, {"a": f32([3]), "b": f32([5])}])
        assert (merged["a"].tolist(), merged["b"].tolist()) == ([2], [3])

    def test_integers_are_copied_where_equal(self) -> None:
        models = [{"w": f32([value]), "ids": np.arange(3), "flag": np.array(True)} for value in (0, 1)]
        merged = merge(models, out_dtype="float16")
        assert merged["ids"].dtype == np.arange(3).dtype
        assert merged["ids"].tolist() == [0, 1, 2]
        assert merged["flag"].tolist() is True
        models[1]["ids"] = np.arange(1, 4)
        with pytest.raises(MismatchError, match=r'model 1, tensor "ids": its int64 values differ'):
            merge(models)

    def test_memory_that_is_not_aligned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mergekit_cl.kernels.numba.streaming.LEAST", 1)
        buffers = [bytearray(4 * 5000 + 1) for _ in range(2)]
        older, newer = (np.frombuffer(buffer, F32, offset=1) for buffer in buffers)
        newer += 4
        assert not newer.flags.aligned
        assert span(newer).flags.aligned
        assert (merge([older, newer], beta=0.25) == 3).all()
        assert (merge([older, newer], beta=0.25, out=newer) == 3).all()
        assert (newer == 3).all()

    def test_strided_and_foreign_endian_arrays(self) -> None:
        grid = np.arange(12, dtype=F32).reshape(3, 4)
        merged = merge([{"w": grid.T}, {"w": (grid + 2).T.astype(">f4")}])
        assert merged["w"].tolist() == (grid.T + 1).tolist()


class TestInPlace:
    def test_out_may_be_an_input(self) -> None:
        older, newer = f32([1, 2]), f32([3, 2])
        assert merge([older, newer], out=newer, beta=0.25) is newer
        assert newer.tolist() == [2.5, 2]

    def test_out_may_be_strided(self) -> None:
        target = np.zeros((2, 4), F32)
        merge([f32([1, 2]), f32([3, 4])], out=target[:, 1])
        assert target.tolist() == [[0, 2, 0, 0], [0, 3, 0, 0]]

    def test_fortran_order_is_merged_where_it_lies(self) -> None:
        models = [np.asfortranarray(np.arange(6, dtype=F32).reshape(2, 3) + k) for k in (0, 2)]
        out = np.zeros((2, 3), F32, order="F")
        assert merge(models, out=out).tolist() == (models[0] + 1).tolist()
        mixed = merge([models[0], np.ascontiguousarray(models[1])], out=np.zeros((2, 3), F32))
        assert mixed.tolist() == (models[0] + 1).tolist()

    def test_out_decides_the_dtype(self) -> None:
        target = {"w": np.zeros(1, np.float16)}
        assert merge([{"w": f32([1])}, {"w": f32([2])}], out=target) is target
        assert target["w"].tolist() == [1.5]
        with pytest.raises(MergeError, match="out_dtype"):
            merge([{"w": f32([1])}, {"w": f32([2])}], out=target, out_dtype="float32")

    def test_partial_overlap_is_refused(self) -> None:
        memory = np.arange(8, dtype=F32)
        with pytest.raises(MergeError, match="shares part of its memory"):
            merge([memory[:4], f32([0, 0, 0, 0])], out=memory[1:5])
        assert memory.tolist() == list(range(8))

    def test_swapped_tensors_are_refused(self) -> None:
        a, b = f32([1]), f32([2])
        with pytest.raises(MergeError, match="shares part of its memory"):
            merge([{"a": a, "b": b}, {"a": a.copy(), "b": b.copy()}], out={"a": b, "b": a})

    def test_an_output_that_overlaps_itself_is_refused(self) -> None:
        out = np.lib.stride_tricks.as_strided(np.zeros(4, F32), (3, 2), (4, 4))
        with pytest.raises(MergeError, match="several elements share one place"):
            merge([np.zeros((3, 2), F32)] * 2, out=out)

    def test_integers_beside_an_out_dtype(self) -> None:
        out: dict[str, npt.NDArray[Any]] = {"w": f32([0]), "n": np.arange(2)}
        merge([{"w": f32([1]), "n": np.arange(2)}] * 2, out=out, out_dtype="float32")
        assert out["w"].tolist() == [1]

    def test_read_only_output_is_refused(self) -> None:
        target = np.zeros(1, F32)
        target.flags.writeable = False
        with pytest.raises(MergeError, match='out, tensor "w": the array is read-only'):
            merge([{"w": f32([1])}, {"w": f32([2])}], out={"w": target})

    def test_nothing_is_written_before_all_is_checked(self) -> None:
        models = [{"a": f32([1]), "b": f32([1])}, {"a": f32([3]), "b": f32([np.nan])}]
        with pytest.raises(NonFiniteError, match='model 1, tensor "b": 1 NaN'):
            merge(models, out=models[0])
        assert models[0]["a"].tolist() == [1]

    def test_an_overflow_is_found_before_writing(self) -> None:
        target = np.zeros(1, np.float16)
        with pytest.raises(NonFiniteError, match="the array: finite inputs overflow float16"):
            merge([f32([1e5]), f32([1e5])], out=target)
        assert target.tolist() == [0]
        merge([f32([1e5]), f32([1e5])], out=target, nonfinite="allow")
        assert target.tolist() == [np.inf]

    def test_an_overflow_on_the_way_is_found_too(self) -> None:
        target = {"a": f32([3e38, 0]), "b": f32([1, 1])}  # 3e38 - -3e38 is infinite in float32
        with pytest.raises(NonFiniteError, match='tensor "a": finite inputs overflow'):
            merge([{"a": f32([-3e38, 0]), "b": f32([0, 0])}, target], beta=0.01, out=target)
        assert target["b"].tolist() == [1, 1]
        assert target["a"].tolist() == f32([3e38, 0]).tolist()

    def test_several_tensors_are_reported_together(self) -> None:
        target = {"a": f32([np.nan]), "b": f32([np.inf]), "c": f32([1])}
        with pytest.raises(NonFiniteError) as caught:
            merge([{name: f32([1]) for name in target}, target], out=target)
        assert str(caught.value).splitlines()[:2] == ['model 1, tensor "a": 1 NaN', 'model 1, tensor "b": 1 Inf']
        assert target["c"].tolist() == [1]

    def test_large_values_that_do_not_overflow_pass(self) -> None:
        target = np.zeros(1, np.float16)
        merge([np.array([6e4], np.float16), np.array([6.4e4], np.float16)], out=target)
        assert target.tolist() == [62016.0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: merge([]), MergeError, "sfa merges 2 or more models, but got 0"),
            (lambda: merge([f32([1])]), MergeError, "sfa merges 2 or more models, but got 1"),
            (lambda: merge([f32([1])] * 2, "wise_ft", base=f32([1])), MergeError, "merges 1 model, but got 2"),
            (lambda: merge(f32([[1], [2]])), MergeError, "models: got ndarray; pass a list of models"),
            (lambda: merge([f32([1])], "wise_ft"), MergeError, "pass base="),
            (lambda: merge([f32([1])] * 2, base=f32([1])), MergeError, "sfa has no use for a base"),
            (lambda: merge([f32([1])] * 2, beta=1.5), MergeError, r"beta=1.5: must be in \[0, 1\]"),
            (lambda: merge([f32([1])] * 2, beta="x"), MergeError, "beta='x': must be a number"),
            (lambda: merge([f32([1])] * 2, beta=float("nan")), MergeError, "beta=nan"),
            (lambda: merge([f32([1])] * 2, "linear", normalize=1), MergeError, "must be True or False"),
            (lambda: merge([f32([1])] * 2, "linear", weight=[1]), MergeError, "1 values for 2 models"),
            (lambda: merge([f32([1])] * 2, "linear", weight=[1, -1]), MergeError, "the weights sum to zero"),
            (lambda: merge([f32([1])] * 2, None), MergeError, "method=None: must be the name"),
            (lambda: merge([f32([1])] * 2, "linear", weight=10**400), MergeError, "must be finite"),
            (
                lambda: merge([f32([1])] * 2, "linear", weight=[1e39, 1], normalize=False),
                MergeError,
                "are not finite in float32",
            ),
            (
                lambda: merge([f32([1])], "task_arithmetic", base=f32([1]), weight=10, lambda_=1e308),
                MergeError,
                "task_arithmetic",
            ),
            (lambda: merge([{"a": {"b": None}}] * 2), MergeError, 'model 0: "a.b" is NoneType, not an array'),
            (lambda: merge([np.ma.masked_array([1.0], [True])] * 2), MergeError, "masked array"),
            (lambda: merge([f32([1])] * 2, "liner"), UnknownNameError, 'unknown method "liner": did you mean "linear"'),
            (lambda: merge([f32([1])] * 2, betta=0.5), UnknownNameError, 'betta": did you mean "beta"'),
            (lambda: merge([f32([1])] * 2, backend="cuda"), UnknownNameError, "unknown backend"),
            (lambda: merge([f32([1])] * 2, out_dtype="int8"), UnknownNameError, "unknown out_dtype"),
            (lambda: merge([f32([1])] * 2, threads=0), MergeError, "threads=0"),
            (lambda: merge([f32([1])] * 2, nonfinite="maybe"), MergeError, "nonfinite='maybe'"),
            (lambda: merge([f32([1])] * 2, scope="model"), UnknownNameError, "scope"),
            (lambda: merge([1.0, 2.0]), MergeError, "model 0: got float; a model is"),
            (lambda: merge([{}, {}]), MergeError, "model 0: it is empty"),
            (lambda: merge([{"w": "x"}] * 2), MergeError, 'model 0: "w" is str, not an array'),
            (
                lambda: merge([f32([1]), f32([1, 2])]),
                MismatchError,
                r"model 1, the array: shape \(2,\), but model 0 has \(1,\)",
            ),
            (
                lambda: merge([{"a": f32([1])}, {"b": f32([1])}]),
                MismatchError,
                'model 1 lacks tensor "a", which model 0 has',
            ),
            (
                lambda: merge([{"a": f32([1])}, {"a": np.array([1])}]),
                MismatchError,
                "integers cannot be merged with floating",
            ),
            (lambda: merge([np.array([1], np.complex64)] * 2), MergeError, "complex64 cannot be merged"),
            (lambda: merge([np.array(["x"])] * 2), MergeError, "cannot be merged"),
            (lambda: merge([np.ones(2, ml_dtypes.float8_e4m3fn)] * 2), MergeError, "float8_e4m3fn cannot be merged"),
        ],
    )
    def test_message(self, call, error, message) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(error, match=message):
            call()

    @pytest.mark.parametrize("backend", ["numpy", "numba", "triton"])
    def test_non_finite_input_names_model_and_tensor(self, backend: str) -> None:
        good, bad = {"u": f32([1, 2]), "w": f32([1, 2])}, {"u": f32([1, 2]), "w": f32([np.nan, -np.inf])}
        with pytest.raises(NonFiniteError, match=r'model 1, tensor "w": 1 NaN and 1 Inf\n.*nonfinite="allow"'):
            merge([good, bad], backend=backend)
        merged = merge([good, bad], nonfinite="allow", backend=backend)
        assert np.isnan(merged["w"][0])
        assert merged["w"][1] == -np.inf
        with pytest.raises(NonFiniteError, match="model 1"):  # a copy reads it too
            merge([good, bad], beta=0, backend=backend)

    def test_all_problems_are_reported_at_once(self) -> None:
        one = {f"t{i}": f32([1]) for i in range(28)}
        with pytest.raises(MismatchError) as caught:
            merge([one, {**{f"t{i}": f32([1, 2]) for i in range(27)}, "extra": f32([0])}])
        assert str(caught.value).count("\n") == 20
        assert "... and 9 more" in str(caught.value)

    def test_a_named_backend_that_is_absent_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mergekit_cl.kernels.find_spec", lambda name: None if name == "numba" else name)
        with pytest.raises(BackendError, match="needs the package numba: pip install numba"):
            merge([f32([1])] * 2, backend="numba")
        assert merge([f32([1]), f32([3])]).tolist() == [2]  # auto falls back to numpy

    def test_triton_on_a_cpu_needs_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
            merge([f32([1])] * 2, backend="triton")
