"""tsv_m, iso_c, iso_cts, opcm: numbers by hand, references written differently, and what holds for all of them."""

from collections.abc import Callable, Sequence
from math import cos, pi, sin, sqrt
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mergekit_cl import MergeError, NonFiniteError, merge
from mergekit_cl.registry import find
from mergekit_cl.steps import PerMatrix, Scope

F64: TypeAlias = npt.NDArray[np.float64]

METHODS = ["tsv_m", "iso_c", "iso_cts", "opcm"]
ORDERLESS = METHODS[:3]


def f64(*values: object) -> F64:
    return np.array(values, np.float64)


def diag(*values: float) -> F64:
    return np.diag(f64(*values))


def unit(row: int, column: int, order: int = 3) -> F64:
    matrix = np.zeros((order, order))
    matrix[row, column] = 1
    return matrix


def close(expected: object) -> Any:
    return pytest.approx(np.asarray(expected), rel=1e-12, abs=1e-12)


def random_tasks(seed: int, shape: tuple[int, ...], models: int) -> list[F64]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.uniform(0.5, 2) * rng.standard_normal(shape)) for _ in range(models)]


# tsv_m


def test_tsv_m_keeps_the_largest_directions_of_each_task() -> None:
    base = np.arange(16.0).reshape(4, 4)
    tasks = [diag(5, 3, 1, 0.5), diag(0.5, 1, 2, 4)]  # two of four directions each
    models = [base + task for task in tasks]
    assert merge(models, "tsv_m", base=base) == close(base + diag(5, 3, 2, 4))
    assert merge(models, "tsv_m", base=base, lambda_=-0.5) == close(base - diag(2.5, 1.5, 1, 2))
    assert merge(models, "tsv_m", base=base, rank_share=0.5) == close(base + diag(5, 0, 0, 4))
    assert merge(models, "tsv_m", base=base, rank_share=0.99) == close(base + diag(5, 0, 0, 4))
    assert merge(models, "tsv_m", base=base, rank_share=0) == close(base + diag(5, 0, 0, 4))


def test_tsv_m_turns_directions_apart_until_they_are_orthogonal() -> None:
    """Left directions at 0 and 30 degrees end up at -30 and 60, the nearest that are orthogonal; the right ones are already."""
    angle = pi / 6
    tasks = [np.outer([1.0, 0], [2, 0]), np.outer([cos(angle), sin(angle)], [0, 3])]
    expected = np.column_stack([2 * f64(cos(-angle), sin(-angle)), 3 * f64(cos(2 * angle), sin(2 * angle))])
    assert merge(tasks, "tsv_m", base=np.zeros((2, 2))) == close(expected)
    assert merge([t.T.copy() for t in tasks], "tsv_m", base=np.zeros((2, 2))) == close(expected.T)


def test_tsv_m_of_equal_models_is_what_they_keep() -> None:
    task = diag(5, 3, 2, 1)
    assert merge([task, task.copy()], "tsv_m", base=np.zeros((4, 4))) == close(diag(5, 3, 0, 0))


def test_tsv_m_leaves_out_directions_of_singular_value_zero() -> None:
    """Each may keep two directions, but has one."""
    tasks = [3 * unit(0, 1, 4), 2 * unit(1, 2, 4)]
    assert merge(tasks, "tsv_m", base=np.zeros((4, 4))) == close(tasks[0] + tasks[1])


def test_tsv_m_of_more_models_than_directions_keeps_one_of_each() -> None:
    # left directions 1, 1, -1 and right ones 1, each divided by the square root of 3
    assert merge([f64([1]), f64([7]), f64([-2])], "tsv_m", base=f64([0])) == close([[2.0]])
    columns = [f64([3], [0], [0]), f64([0], [4], [0])]
    assert merge(columns, "tsv_m", base=np.zeros((3, 1))) == close(f64([3], [4], [0]) / sqrt(2))
    assert merge([c.T.copy() for c in columns], "tsv_m", base=np.zeros((1, 3))) == close(f64([3, 4, 0]) / sqrt(2))


def test_tsv_m_of_one_model_is_the_model() -> None:
    base, model = random_tasks(0, (5, 4), 2)
    assert merge([model], "tsv_m", base=base) == close(model)


# iso_c


def test_iso_c_makes_singular_values_equal() -> None:
    base = np.ones((2, 2))
    models = [base + diag(5, -1), base + diag(1, -1)]  # the sum: 6 and -2
    assert merge(models, "iso_c", base=base) == close(base + diag(4, -4))
    assert merge(models, "iso_c", base=base, lambda_=0.25) == close(base + diag(1, -1))


def test_iso_c_keeps_the_rotation_of_the_sum() -> None:
    assert merge([f64([0, -4], [0, 0]), f64([0, 0], [2, 0])], "iso_c", base=np.zeros((2, 2))) == close([[0, -3], [3, 0]])
    wide = merge([f64([0, 3, 4], [0, 0, 0]), f64([0, 0, 0], [1, 0, 0])], "iso_c", base=np.zeros((2, 3)))
    assert wide == close([[0, 1.8, 2.4], [3, 0, 0]])


def test_iso_c_averages_over_the_rank() -> None:
    assert merge([diag(4, 0, 0), diag(2, 0, 0)], "iso_c", base=np.zeros((3, 3))) == close(diag(6, 0, 0))
    assert merge([diag(4, 2, 0), diag(-4, 0, 0)], "iso_c", base=np.zeros((3, 3))) == close(diag(0, 2, 0))


@pytest.mark.parametrize(("small", "counts"), [(2.0**-19, False), (2.0**-17, True)])
def test_what_rounding_may_have_made_of_zero_does_not_count(small: float, counts: bool) -> None:
    """2^-18 of the largest singular value for float32, and 2^-47 for float64."""
    model = np.diag(np.float32([4, 4 * small]))
    expected = [2 + 2 * small] * 2 if counts else [4, 0]
    assert merge([model], "iso_c", base=np.zeros_like(model)) == pytest.approx(np.diag(expected), rel=1e-6)
    wide = diag(4, 4 * small * 2.0**-29)
    expected = [2, 2] if counts else [4, 0]
    assert merge([wide], "iso_c", base=np.zeros_like(wide)) == pytest.approx(np.diag(expected), rel=1e-12)


# iso_cts


def test_iso_cts_joins_common_and_own_directions() -> None:
    # 5 directions: 1 in common (18), of the 4 others 2 from each task, 8 and 1, 7 and 2; half of 5 is rounded to even
    tasks = [diag(9, 8, 1, 0, 0), diag(9, 0, 0, 7, 2)]
    base = np.full((5, 5), 3.0)
    models = [base + task for task in tasks]
    merged = merge(models, "iso_cts", base=base, common_space_fraction=0)
    assert merged == close(base + 7.2 * np.eye(5))
    assert merge(models, "iso_cts", base=base, common_space_fraction=0, lambda_=2) == close(base + 14.4 * np.eye(5))


def test_iso_cts_takes_its_fraction_from_the_sum() -> None:
    # the sum: 10, 8, 6, 4, 2, 2
    tasks = [diag(10, 0, 6, 0, 0.5, 1.5), diag(0, 8, 0, 4, 1.5, 0.5)]
    zero = np.zeros((6, 6))
    # 4 in common, 1 of each: 1.5 and 1.5
    assert merge(tasks, "iso_cts", base=zero, common_space_fraction=0.7) == close(31 / 6 * np.eye(6))
    # 2 in common: of the first 6 and 1.5, of the second 4 and 1.5
    assert merge(tasks, "iso_cts", base=zero, common_space_fraction=0.4) == close(31 / 6 * np.eye(6))
    # 5 asked for, which leaves half a direction for each: all are common
    assert merge(tasks, "iso_cts", base=zero, common_space_fraction=0.9) == close(32 / 6 * np.eye(6))


def test_iso_cts_turns_own_directions_apart() -> None:
    """Columns of the tasks beside the common one at 0 and 30 degrees end up at -30 and 60."""
    angle = pi / 6
    tasks = [np.zeros((3, 3)), np.zeros((3, 3))]
    for task in tasks:
        task[0, 0] = 10
    tasks[0][1:, 1] = [2, 0]
    tasks[1][1:, 2] = 4 * f64(cos(angle), sin(angle))
    expected = np.zeros((3, 3))
    expected[0, 0] = 1
    expected[1:, 1] = cos(-angle), sin(-angle)
    expected[1:, 2] = cos(2 * angle), sin(2 * angle)
    merged = merge(tasks, "iso_cts", base=np.zeros((3, 3)), common_space_fraction=0.34)
    assert merged == close(expected * (20 + 2 + 4) / 3)


def test_iso_cts_counts_directions_in_common_once() -> None:
    task = diag(8, 6, 4, 2)  # in common 16 and 12; then the same for both, 4
    merged = merge([task, task.copy()], "iso_cts", base=np.zeros((4, 4)), common_space_fraction=0.5)
    assert merged == close(diag(9, 9, 9, 0))


def test_iso_cts_of_tasks_within_the_common_space() -> None:
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    tasks = [turn @ diag(8, 6, 0, 0) @ turn, turn @ diag(6, 8.5, 0, 0) @ turn]
    merged = merge(tasks, "iso_cts", base=np.zeros((4, 4)), common_space_fraction=0.5)
    assert merged == close(turn @ diag(14.25, 14.25, 0, 0) @ turn)


@pytest.mark.parametrize(("shape", "models", "fraction"), [((6, 4), 2, 1), ((3, 5), 4, 0), ((1, 7), 2, 0.8), ((4, 4), 3, 0.8)])
def test_iso_cts_without_own_directions_is_iso_c(shape: tuple[int, int], models: int, fraction: float) -> None:
    tasks, base = random_tasks(1, shape, models), np.zeros(shape)
    common = merge(tasks, "iso_c", base=base)
    assert merge(tasks, "iso_cts", base=base, common_space_fraction=fraction).tolist() == common.tolist()


# opcm

FIRST, SECOND = diag(3, 2, 1), np.arange(1.0, 10).reshape(3, 3)  # shares of the singular values: 1/2, 5/6, 1


@pytest.mark.parametrize(
    ("alpha", "added"),
    [
        (0, [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.5, [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.83, [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.84, [[0, 0, 3], [0, 0, 6], [7, 8, 0]]),
        (1, np.zeros((3, 3))),
    ],
)
def test_opcm_leaves_out_what_is_in_the_directions_of_the_sum(alpha: float, added: Any) -> None:
    base = np.full((3, 3), 2.0)
    total = FIRST + np.array(added)
    mean = (sqrt(14) + sqrt(285)) / 2
    expected = base + mean * total / np.linalg.norm(total)
    assert merge([base + FIRST, base + SECOND], "opcm", base=base, alpha=alpha) == close(expected)


def test_opcm_depends_on_the_order() -> None:
    base = np.zeros((3, 3))
    one, other = merge([FIRST, SECOND], "opcm", base=base), merge([SECOND, FIRST], "opcm", base=base)
    assert abs(one - other).max() > 0.1
    assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(other)) == pytest.approx((sqrt(14) + sqrt(285)) / 2)


def test_opcm_goes_on_with_a_merged_model() -> None:
    """Exact where the task vectors are orthogonal and of one length: what is merged is divided by the square root of k."""
    base, tasks = np.full((3, 3), 5.0), [unit(0, 0), unit(0, 1), unit(2, 2)]
    models = [base + task for task in tasks]
    whole = merge(models, "opcm", base=base)
    assert whole == close(base + sum(tasks) / sqrt(3))
    two = merge(models[:2], "opcm", base=base)
    assert two == close(base + (tasks[0] + tasks[1]) / sqrt(2))
    assert merge([two, models[2]], "opcm", base=base, merged=2) == close(whole)
    assert merge([two, models[2]], "opcm", base=base) == close(base + (tasks[0] + tasks[1]) / 2 + tasks[2] / sqrt(2))


def test_opcm_of_vectors_is_their_sum_of_the_mean_length() -> None:
    base = f64(1, 1)
    assert merge([base + f64(3, 0), base + f64(0, 4)], "opcm", base=base) == close([1 + 2.1, 1 + 2.8])
    # 3 times the square root of 4, and 4: the sum is 10 sqrt(0.52) long; the mean length is (4 * 3 + 4) / 5
    assert merge([f64(3, 0), f64(0, 4)], "opcm", base=f64(0, 0), merged=4) == close(f64(6, 4) * 3.2 / sqrt(52))
    assert merge([f64(2, -2), f64(-2, 2)], "opcm", base=f64(0, 0)).tolist() == [0, 0]
    assert merge([f64(2, 1), f64(2, 1)], "opcm", base=f64(0, 0)) == close([2, 1])


@pytest.mark.parametrize(("left", "cancel"), [(1e-7, True), (1e-5, False)])
def test_opcm_does_not_enlarge_what_rounding_leaves_of_a_sum(left: float, cancel: bool) -> None:
    """The sum is ``left`` of the mean length."""
    models = [f64(1, 0), f64(-1, left)]
    assert merge(models, "opcm", base=f64(0, 0)) == pytest.approx(f64(0, 0 if cancel else 1), abs=1e-6)


@pytest.mark.parametrize("merged", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_opcm_of_one_model_is_the_model(merged: int, dtype: type) -> None:
    shapes: list[tuple[int, ...]] = [(4, 3), (5,)]
    for shape in shapes:
        pair: list[Any] = [task.astype(dtype) for task in random_tasks(2, shape, 2)]
        base, model = pair
        assert merge([model], "opcm", base=base, merged=merged).tobytes() == model.tobytes()


# Against references that are written differently


def by_eigh(matrix: F64) -> tuple[F64, F64, F64]:
    """Singular vectors and values of a matrix of full rank by the eigenvectors of its smaller Gram matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = by_eigh(matrix.T)
        return u, s, v
    squares, v = np.linalg.eigh(matrix.T @ matrix)
    order = np.argsort(-squares)
    s = np.sqrt(squares[order])
    return matrix @ v[:, order] / s, s, v[:, order]


def whitened(matrix: F64) -> F64:
    """Return A (A^T A)^(-1/2)."""
    squares, q = np.linalg.eigh(matrix.T @ matrix)
    return np.asarray(matrix @ q / np.sqrt(squares) @ q.T)


def reference_tsv_m(tasks: Sequence[F64]) -> F64:
    kept = min(tasks[0].shape) // len(tasks)
    parts = [by_eigh(task) for task in tasks]
    u = whitened(np.hstack([u[:, :kept] for u, _, _ in parts]))
    v = whitened(np.hstack([v[:, :kept] for _, _, v in parts]))
    return np.asarray(
        sum(s * np.outer(u[:, i], v[:, i]) for i, s in enumerate(np.concatenate([s[:kept] for _, s, _ in parts])))
    )


def reference_iso_c(tasks: Sequence[F64]) -> F64:
    u, s, v = by_eigh(sum(tasks, start=np.zeros_like(tasks[0])))
    return np.asarray(s.mean() * u @ v.T)


def reference_iso_cts(tasks: Sequence[F64]) -> F64:
    directions = min(tasks[0].shape)
    each = round((directions - int(directions * 0.8)) / len(tasks))
    common = directions - each * len(tasks)
    u, s, v = by_eigh(sum(tasks, start=np.zeros_like(tasks[0])))
    us, ss, vs = [u[:, :common]], [s[:common]], [v[:, :common]]
    outside = np.eye(len(u)) - us[0] @ us[0].T
    for task in tasks:
        squares, vectors = np.linalg.eigh((outside @ task).T @ outside @ task)
        order = np.argsort(-squares)[:each]
        vs.append(vectors[:, order])
        ss.append(np.sqrt(squares[order]))
        us.append(outside @ task @ vs[-1] / ss[-1])
    return np.asarray(np.concatenate(ss).mean() * whitened(np.hstack(us)) @ whitened(np.hstack(vs)).T)


def reference_opcm(tasks: Sequence[F64]) -> F64:
    """Algorithm 1 as it stands: rescale after each model; bases of the whole spaces; products of directions one by one."""
    merged, factor, lengths = tasks[0], 1.0, [float(np.linalg.norm(tasks[0]))]
    for task in tasks[1:]:
        u, s, vt = np.linalg.svd(merged, full_matrices=True)
        split = next(i for i in range(len(s)) if s[: i + 1].sum() / s.sum() > 0.5)
        new = np.zeros_like(task)
        for i in range(task.shape[0]):
            for j in range(task.shape[1]):
                if i != j and not (i < split and j < split):
                    new += (u[:, i] @ task @ vt[j]) * np.outer(u[:, i], vt[j])
        lengths.append(float(np.linalg.norm(task)))
        total = factor * merged + new
        factor = float(np.linalg.norm(total)) / float(np.mean(lengths))
        merged = total / factor
    return merged


REFERENCES: dict[str, Callable[[Sequence[F64]], F64]] = {
    "tsv_m": reference_tsv_m, "iso_c": reference_iso_c, "iso_cts": reference_iso_cts, "opcm": reference_opcm
}  # fmt: skip


@pytest.mark.parametrize("models", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(12, 8), (7, 16), (10, 10)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_references(method: str, shape: tuple[int, int], models: int) -> None:
    base, *tasks = random_tasks(models, shape, models + 1)
    expected = base + REFERENCES[method](tasks)
    merged = merge([base + task for task in tasks], method, base=base)
    assert merged == pytest.approx(expected, abs=1e-8 * abs(expected).max())
    narrow = [array.astype(np.float32) for array in (base, *(base + task for task in tasks))]
    wide = [array.astype(np.float64) for array in narrow]
    expected = merge(wide[1:], method, base=wide[0])
    merged = merge(narrow[1:], method, base=narrow[0])
    assert merged.dtype == np.float32
    assert abs(merged - expected).max() <= 2.0**-23 * abs(expected).max()


# What holds for all


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1), (1, 1), (0, 3), (3, 0), (3,), (), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_models_equal_to_the_base_return_it(method: str, shape: tuple[int, ...], models: int) -> None:
    base = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    base[np.random.default_rng(1).random(shape) < 0.3] = -0.0
    merged = merge([base.copy() for _ in range(models)], method, base=base)
    assert merged.tobytes() == base.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_no_model_changes_keep_their_bits(method: str) -> None:
    base = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    base[2] = -0.0
    models = [base.copy() for _ in range(2)]
    models[0][[0, 4]] += 1
    models[1][4] -= 0.5
    assert merge(models, method, base=base)[[1, 2, 3, 5]].tobytes() == base[[1, 2, 3, 5]].tobytes()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000), st.permutations(range(5)))
@pytest.mark.parametrize("method", METHODS)
def test_any_matrices(method: str, rows: int, columns: int, models: int, seed: int, order: list[int]) -> None:
    """Finite, inputs left alone, and, but for opcm, the order does not matter."""
    base, *given_models = (x.astype(np.float32) for x in random_tasks(seed, (rows, columns), models + 1))
    before = [array.tobytes() for array in (base, *given_models)]
    merged = merge(given_models, method, base=base)
    assert [array.tobytes() for array in (base, *given_models)] == before
    assert np.isfinite(merged).all()
    if method in ORDERLESS:
        permuted = merge([given_models[k] for k in order if k < models], method, base=base)
        assert permuted == pytest.approx(merged, abs=2.0**-18 * float(abs(merged).max()))


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4), (2, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("method", ORDERLESS)
def test_other_tensors_get_the_mean_of_the_task_vectors(method: str, shape: tuple[int, ...]) -> None:
    base = np.ones(shape)
    models = [base + 1, base + 5]
    assert merge(models, method, base=base) == close(base + 3)
    assert merge(models, method, base=base, lambda_=0.5) == close(base + 1.5)


@pytest.mark.parametrize("method", METHODS)
def test_pytorch_tensors_give_the_same(method: str) -> None:
    """The formula as it is called on a GPU."""
    base, *models = random_tasks(4, (9, 7), 4)
    step = find(method)(Scope(("w",), 3, True), **find(method).resolve({}, 3))
    if not isinstance(step, PerMatrix):
        next(step)
        with pytest.raises(StopIteration) as returned:
            step.send(np.eye(3))
        step = returned.value.value
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.tensor(array, dtype=dtype) for array in (base, *models)]
        merged = step.formula(tensors[0], tensors[1:])
        expected = step.formula(tensors[0].numpy(), [tensor.numpy() for tensor in tensors[1:]])
        assert isinstance(merged, torch.Tensor)
        assert merged.dtype == dtype
        assert merged.numpy() == pytest.approx(expected, rel=2e-7 if dtype == torch.float32 else 1e-12)
        for shape in ((9, 7), (0, 3), (3, 0)):
            given_base = torch.ones(shape, dtype=dtype)
            same = step.formula(given_base, [given_base.clone()] * 3)
            assert same.numpy().tobytes() == given_base.numpy().tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_computed_wide_and_rounded_once(method: str) -> None:
    narrow = [array.astype(ml_dtypes.bfloat16) for array in random_tasks(5, (8, 6), 3)]
    wide = [array.astype(np.float32) for array in narrow]
    merged = merge(narrow[1:], method, base=narrow[0])
    assert merged.dtype == ml_dtypes.bfloat16
    assert merged.tobytes() == merge(wide[1:], method, base=wide[0]).astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints(method: str, tmp_path: Path) -> None:
    models = []
    for k in range(3):
        tensors = {"a.weight": (8, 6), "a.bias": (8,), "embedding": (11, 4), "empty": (0, 4), "scalar": ()}
        models.append({name: random_tasks(k, shape, 1)[0].astype(np.float32) for name, shape in tensors.items()})
        save_file(models[k], tmp_path / f"{k}.safetensors")
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    merge(paths[1:], method, base=paths[0], out=tmp_path / "out.safetensors")
    expected = merge(models[1:], method, base=models[0])
    written = load_file(tmp_path / "out.safetensors")
    assert {name: value.tobytes() for name, value in written.items()} == {n: v.tobytes() for n, v in expected.items()}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite(method: str) -> None:
    base, *models = random_tasks(6, (3, 3), 3)
    models[1][0, 2] = np.nan
    with pytest.raises(NonFiniteError):
        merge(models, method, base=base)
    assert np.isnan(merge(models, method, base=base, nonfinite="allow")).all()
    models[1][0, 2] = -1.7e308
    base[0, 2] = 1.7e308
    with pytest.raises(NonFiniteError):
        merge(models, method, base=base)


@pytest.mark.parametrize("method", METHODS)
def test_a_decomposition_that_fails_is_explained(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def svd(*_: Any, **__: Any) -> Any:
        raise np.linalg.LinAlgError("SVD did not converge")

    base, *models = random_tasks(7, (3, 4), 3)
    monkeypatch.setattr(np.linalg, "svd", svd)
    expected = r"matrix of shape \(3, 4\) were not found \(SVD did not converge\); leave .* with exclude="
    with pytest.raises(MergeError, match=expected):
        merge(models, method, base=base)


def test_what_a_model_leaves_alone_is_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np.linalg, "svd")
    base, model = random_tasks(8, (3, 4), 2)
    for method in METHODS:
        assert merge([base.copy(), base.copy()], method, base=base).tolist() == base.tolist()
    expected = base + (model - base) / 2  # the mean length
    assert merge([model, base.copy()], "opcm", base=base) == close(expected)


def test_parameters_out_of_range() -> None:
    base = np.zeros((2, 2))
    for method, wrong in (("tsv_m", {"rank_share": 1.5}), ("iso_cts", {"common_space_fraction": -0.1}),
                          ("opcm", {"alpha": 2}), ("opcm", {"merged": 0})):  # fmt: skip
        with pytest.raises(MergeError, match=f"{method}: {next(iter(wrong))}="):
            merge([base], method, base=base, **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_is_needed(method: str) -> None:
    with pytest.raises(MergeError, match="base"):
        merge([np.eye(2)], method)
