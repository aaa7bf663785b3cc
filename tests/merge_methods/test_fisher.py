"""fisher: numbers by hand, a float64 reference, and models as a parameter wherever models may come from."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from mergekit_cl import MergeError, MismatchError, NonFiniteError, merge
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.cli import app

Array = npt.NDArray[Any]

BACKENDS = ["numpy", "numba", "triton"]


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


MODELS = [f32(1, 5), f32(3, 7)]
FISHER = [f32(3, 0), f32(1, 0)]


# Numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [1.5, 6]),  # (3 * 1 + 1 * 3) / 4; of the second entry nothing is known: the average
        ({"weight": [1, 3]}, [2, 6.5]),  # (3 * 1 + 3 * 3) / 6, (5 + 3 * 7) / 4
        ({"weight": 7}, [1.5, 6]),
        ({"weight": [0, 1]}, [3, 7]),
        ({"weight": [2, 0]}, [1, 5]),
        ({"floor": 2}, [1.8, 6]),  # (3 * 1 + 2 * 3) / 5
        ({"floor": 3}, [2, 6]),
        ({"floor": 100, "weight": [1, 3]}, [2.5, 6.5]),
    ],
)
def test_numbers_by_hand(backend: str, how: dict[str, Any], expected: list[float]) -> None:
    merged = merge(MODELS, "fisher", fisher=FISHER, backend=backend, **how)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, expected, rtol=3e-7)


def test_the_least_information_is_a_millionth_by_default() -> None:
    information = [f32(3e-6, 3e-7, 3e-6), f32(1e-6, 1e-7, 0)]
    np.testing.assert_allclose(merge([f32(0, 0, 0), f32(4, 4, 4)], "fisher", fisher=information), [1, 2, 1], rtol=3e-7)


def test_information_below_the_floor_counts_as_the_floor() -> None:
    """What is negative, which no information is, too."""
    assert merge([f32(1), f32(3)], "fisher", fisher=[f32(-5), f32(2)], floor=2).tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_in_float64(backend: str, dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    size = 700 if backend == "triton" else 40_000
    models = [rng.standard_normal(size).astype(kind) for _ in range(3)]
    information = [(rng.standard_normal(size) ** 2).astype(np.float32) * (rng.random(size) < 0.8) for _ in range(3)]
    weight, floor = [0.5, 2, 1], 0.01
    shares = [w * np.maximum(f.astype(np.float64), floor) for w, f in zip(weight, information, strict=True)]
    expected = sum(s * m.astype(np.float64) for s, m in zip(shares, models, strict=True)) / sum(shares)
    merged = merge(models, "fisher", fisher=information, weight=weight, floor=floor, backend=backend)
    assert merged.dtype == kind
    unit = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    rounding = 2.0**-53 if dtype == "float64" else 2.0**-24  # of what is computed, relative to the largest of the models
    assert (np.abs(merged.astype(np.float64) - expected) <= unit * np.abs(expected) * 1.001 + 32 * rounding).all()


def test_entries_that_agree_keep_their_bits() -> None:
    rng = np.random.default_rng(1)
    first = np.concatenate([rng.standard_normal(1000).astype(np.float32), f32(-0.0, 0, np.inf, 3e38)])
    information = [rng.random(1004).astype(np.float32) for _ in range(3)]
    for count in (1, 2, 3):
        models = [first.copy() for _ in range(count)]
        merged = merge(models, "fisher", fisher=information[:count], nonfinite="allow")
        assert merged.tobytes() == first.tobytes()


def test_a_model_of_weight_zero_has_no_part() -> None:
    models = [f32(1, 5), f32(3, 7), f32(1000, -1000)]
    merged = merge(models, "fisher", fisher=[*FISHER, f32(1e6, 1e6)], weight=[1, 1, 0])
    assert merged.tolist() == merge(MODELS, "fisher", fisher=FISHER).tolist()
    first = merge([models[2], *MODELS], "fisher", fisher=[f32(1e6, 1e6), *FISHER], weight=[0, 1, 1])
    assert first.tolist() == merged.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_counts_for_nothing_leaves_no_rounding_error(backend: str) -> None:
    """Next to one of which all is known; 1e8 - (1e8 - 1) is 0 in float32."""
    pairs = [(f32(1e8), f32(1e-6)), (f32(1), f32(1e12))]
    for order in (pairs, pairs[::-1]):
        models, information = zip(*order, strict=True)
        assert merge(list(models), "fisher", fisher=list(information), backend=backend).tolist() == [1]


def test_the_order_of_pairs_does_not_matter_and_that_of_models_alone_does() -> None:
    assert merge(MODELS[::-1], "fisher", fisher=FISHER[::-1]).tolist() == [1.5, 6]
    assert merge(MODELS, "fisher", fisher=FISHER[::-1]).tolist() == [2.5, 6]


def test_the_weight_may_differ_from_tensor_to_tensor() -> None:
    models, information = ([{"a": each.copy(), "b": each.copy()} for each in given] for given in (MODELS, FISHER))
    merged = merge(models, "fisher", fisher=information, weight=[{"filter": "b", "value": [1, 0]}])
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {"a": [1.5, 6], "b": [1, 5]}


def test_inputs_are_left_alone_and_one_of_them_may_take_the_result() -> None:
    models, information = [model.copy() for model in MODELS], [each.copy() for each in FISHER]
    merge(models, "fisher", fisher=information)
    assert [x.tolist() for x in (*models, *information)] == [x.tolist() for x in (*MODELS, *FISHER)]
    assert merge(models, "fisher", fisher=information, out=models[1]) is models[1]
    assert models[1].tolist() == [1.5, 6]
    models[1][:] = MODELS[1]
    merge(models, "fisher", fisher=information, out=information[0])
    assert information[0].tolist() == [1.5, 6]


# Where models and information come from


def linear(*rows: list[float]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer


def test_modules_and_what_is_computed_in_training_code() -> None:
    models = [linear([1.0, 5]), linear([3.0, 7])]
    information = []
    for model, examples in zip(models, ([[1.0, 0], [1.0, 2]], [[3.0, 0], [1.0, 0]]), strict=True):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for example in examples:
            model.zero_grad()
            model(torch.tensor(example)).sum().backward()
            for name, p in model.named_parameters():
                total[name] += p.grad**2 / len(examples)
        information.append(total)
    assert [each["weight"].tolist() for each in information] == [[[1, 2]], [[5, 0]]]
    merged = merge(models, "fisher", fisher=information, floor=0)
    assert isinstance(merged, nn.Linear)
    torch.testing.assert_close(merged.weight.detach(), torch.tensor([[16 / 6, 5]]))  # (1 * 1 + 5 * 3) / 6; the first's
    modules = [linear([3.0, 0]), linear([1.0, 0])]
    torch.testing.assert_close(merge(models, "fisher", fisher=modules).weight.detach(), torch.tensor([[1.5, 6]]))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two models and their information, with two tensors each, of which the second has other numbers."""
    arrays = {"m0": MODELS[0], "m1": MODELS[1], "f0": FISHER[0], "f1": FISHER[1]}
    paths = {name: tmp_path / f"{name}.safetensors" for name in arrays}
    for name, array in arrays.items():
        save_file({"a.w": array, "b.w": array + 1}, paths[name])
    return paths


MERGED = {"a.w": [1.5, 6], "b.w": [8 / 3, 7]}  # b: (4 * 2 + 2 * 4) / 6
FIRST = {"a.w": [1, 5], "b.w": [2, 6]}


def check(tensors: dict[str, Array], expected: dict[str, list[float]]) -> None:
    assert sorted(tensors) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(tensors[name], values, rtol=3e-7)


@pytest.mark.parametrize("given", ["paths", "models in memory", "information in memory"])
def test_checkpoints(files: dict[str, Path], tmp_path: Path, given: str) -> None:
    models: list[Any] = [files["m0"], files["m1"]]
    information: list[Any] = [files["f0"], files["f1"]]
    if given == "models in memory":
        models = [load_file(path) for path in models]
    if given == "information in memory":
        information = [load_file(path) for path in information]
    out = tmp_path / "out.safetensors"
    merge(models, "fisher", fisher=information, out=out)
    check(load_file(out), MERGED)
    check(merge(models, "fisher", fisher=tuple(information)), MERGED)


@pytest.mark.parametrize(
    ("how", "merged"), [({"only": "a.*"}, "a.w"), ({"exclude": ["a.*"]}, "b.w"), ({"only": ["*.w"], "exclude": "b.w"}, "a.w")]
)
def test_only_some_tensors(files: dict[str, Path], tmp_path: Path, how: dict[str, Any], merged: str) -> None:
    """The others are the first model's, and no information of them is needed."""
    expected = {**FIRST, merged: MERGED[merged]}
    paths = [[files[name] for name in names] for names in (("m0", "m1"), ("f0", "f1"))]
    out = tmp_path / "out.safetensors"
    merge(paths[0], "fisher", fisher=paths[1], out=out, **how)
    check(load_file(out), expected)
    models, information = ([load_file(path) for path in each] for each in paths)
    check(merge(models, "fisher", fisher=information, **how), expected)
    partial = [{merged: each[merged]} for each in information]
    check(merge(models, "fisher", fisher=partial, **how), expected)


def test_folders_get_the_files_of_the_first_model_and_no_recipe(tmp_path: Path) -> None:
    """A recipe has no place for parameters that are models."""
    for name, array in [("m0", MODELS[0]), ("m1", MODELS[1]), ("f0", FISHER[0]), ("f1", FISHER[1])]:
        (tmp_path / name).mkdir()
        save_file({"w": array}, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "tiny", "of": "{name}"}}')
    names = [str(tmp_path / name) for name in ("m0", "m1", "f0", "f1")]
    merge(names[:2], "fisher", fisher=names[2:], out=tmp_path / "out")
    check(load_file(tmp_path / "out" / "model.safetensors"), {"w": [1.5, 6]})
    assert '"m0"' in (tmp_path / "out" / "config.json").read_text()
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is not a process of its own here."""
    monkeypatch.setattr("mergekit_cl.memory.anonymous_memory", lambda: 0)


def run(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))


def test_on_the_command_line(files: dict[str, Path], tmp_path: Path) -> None:
    models, out = [files["m0"], files["m1"]], tmp_path / "out.safetensors"
    given = ["merge", *models, "-m", "fisher", "-o", out, "-p", f"fisher={files['f0']},{files['f1']}"]
    result = run(*given, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "64 bytes" in result.output  # of four files
    assert not out.exists()
    result = run(*given, "-p", "weight=1,3")
    assert result.exit_code == 0, result.output
    check(load_file(out), {"a.w": [2, 6.5], "b.w": [3.2, 7.5]})  # b: (4 * 2 + 6 * 4) / 10, (6 + 3 * 8) / 4
    result = run("merge", models[0], "-m", "fisher", "-o", tmp_path / "one.safetensors", "-p", f"fisher={files['f0']}")
    assert result.exit_code == 0, result.output
    check(load_file(tmp_path / "one.safetensors"), FIRST)


def test_what_is_wrong_on_the_command_line(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    given = ["merge", files["m0"], files["m1"], "-m", "fisher", "-o", out]
    for more, message in [
        ([], "fisher needs fisher: pass fisher=[...], a list with a model for each of the 2 models"),
        (["-p", f"fisher={files['f0']}"], "fisher: fisher: must be a list with a model for each of the 2 models"),
        (["-p", f"fisher={files['f0']},{tmp_path / 'none'}"], "none: no such file or folder"),
        (["-p", f"fisher={files['f0']},{files['f1']}", "-p", "floor=-1"], "fisher: floor=-1: must be in [0, inf)"),
    ]:
        result = run(*given, *more)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert not out.exists()


# What is wrong


@pytest.mark.parametrize(
    ("information", "message"),
    [
        (None, r"fisher needs fisher: pass fisher=\[\.\.\.\], a list with a model for each of the 2 models"),
        ([], "fisher: fisher: must be a list with a model for each of the 2 models, not 0 of them"),
        (FISHER[:1], "must be a list with a model for each of the 2 models, not 1 of them"),
        ([*FISHER, FISHER[0]], "not 3 of them"),
        (FISHER[0], "must be a list with a model for each of the 2 models, not ndarray"),
        ({"w": FISHER[0]}, "must be a list with a model for each of the 2 models, not dict"),
        (0.5, "must be a list with a model for each of the 2 models, not float"),
        ([1, FISHER[1]], "fisher 0: got int; a model is an array"),
        ([FISHER[0], f32(1, 2, 3)], r"fisher 1, the array: shape \(3,\), but model 0 has \(2,\)"),
        ([np.array([1, 2]), FISHER[1]], "fisher 0, the array: dtype int64, but model 0 has float32"),
        ([FISHER[0], {"w": FISHER[1]}], 'fisher 1 has tensor "w", which model 0 lacks'),
        ([FISHER[0], f32(np.nan, 1)], "fisher 1, the array: 1 NaN"),
    ],
)
def test_wrong_information(information: Any, message: str, tmp_path: Path) -> None:
    given = {} if information is None else {"fisher": information}
    with pytest.raises(MergeError, match=message):
        merge(MODELS, "fisher", **given)
    target = MODELS[0].copy()
    with pytest.raises(MergeError, match=message):
        merge([target, MODELS[1]], "fisher", out=target, **given)
    assert target.tolist() == [1, 5]
    with pytest.raises(MergeError, match=message):
        merge(MODELS, "fisher", out=tmp_path / "out.safetensors", **given)
    assert not list(tmp_path.iterdir())


def test_no_information_is_none() -> None:
    with pytest.raises(MergeError, match=r"fisher needs fisher: pass fisher=\[...\]"):
        merge(MODELS, "fisher", fisher=None)


def test_a_model_alone_may_have_its_information_alone() -> None:
    assert merge(MODELS[:1], "fisher", fisher=FISHER[0]).tolist() == [1, 5]
    assert merge(MODELS[:1], "fisher", fisher=FISHER[:1]).tolist() == [1, 5]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"floor": -1}, r"fisher: floor=-1: must be in \[0, inf\)"),
        ({"weight": [-1, 1]}, r"fisher: model 0: weight=-1: must be in \[0, inf\)"),
        ({"weight": 0}, r"weight=\[0.0, 0.0\]: the weights sum to zero and cannot be normalised; change them$"),
        ({"base": f32(0, 0)}, "fisher has no use for a base"),
        ({"fishers": FISHER}, 'unknown parameter of fisher "fishers": did you mean "fisher"'),
    ],
)
def test_wrong_parameters(how: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge(MODELS, "fisher", fisher=FISHER, **how)


def test_several_problems_at_once() -> None:
    with pytest.raises(MergeError) as raised:
        merge(MODELS, "fisher", fisher=[f32(1, 2, 3), FISHER[1]], weigth=3, floor=-2)
    for message in ("fisher 0, the array: shape (3,)", '"weigth": did you mean "weight"', "floor=-2: must be in [0, inf)"):
        assert message in str(raised.value)


def test_names_of_tensors_have_to_be_those_of_the_models() -> None:
    models = [{"w": model} for model in MODELS]
    with pytest.raises(MismatchError) as raised:
        merge(models, "fisher", fisher=[{"v": FISHER[0]}, {"w": FISHER[1]}])
    assert 'fisher 0 lacks tensor "w", which model 0 has' in str(raised.value)
    assert 'fisher 0 has tensor "v", which model 0 lacks' in str(raised.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_floor_an_entry_that_nobody_knows_is_not_a_number(backend: str) -> None:
    """Which is found before anything is written."""
    merged = merge(MODELS, "fisher", fisher=FISHER, floor=0, nonfinite="allow", backend=backend)
    assert merged[0] == 1.5
    assert np.isnan(merged[1])
    target = MODELS[0].copy()
    with pytest.raises(NonFiniteError, match="the array: finite inputs overflow float32"):
        merge([target, MODELS[1]], "fisher", fisher=FISHER, floor=0, out=target, backend=backend)
    assert target.tolist() == [1, 5]


def test_recipes_and_sfa_refuse_it(files: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: fisher\nmodels:\n  - model: {files['m0']}\n  - model: {files['m1']}\n")
    result = run("run", recipe, tmp_path / "out")
    assert result.exit_code == 1
    message = "merge_method: fisher needs models as parameters (fisher), which recipes do not have; use mergekit-cl merge"
    assert message in " ".join(result.output.split())
    for more in ({}, {"fisher": [linear([1.0, 1])]}):
        with pytest.raises(MergeError, match=r"SFA: fisher needs models beside those that it merges \(fisher\)"):
            SFA(linear([1.0, 1]), method="fisher", **more)
