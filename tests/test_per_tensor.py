"""Parameters that differ from tensor to tensor: lists of filters, in memory, in files, in recipes, on the command line."""

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from mergekit_cl import MergeError, UnknownNameError, each, merge, method
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.api import prepare, prepare_files
from mergekit_cl.cli import app
from mergekit_cl.filters import Parameters
from mergekit_cl.recipe import read_recipe
from mergekit_cl.registry import PerModel, find
from mergekit_cl.steps import Scope, Sum

Array = np.ndarray[Any, Any]

MLP, ATTN, NORM = "model.layers.0.mlp.weight", "model.layers.0.attn.weight", "model.norm.weight"
NAMES = (ATTN, MLP, "model.layers.1.attn.weight", "model.layers.1.mlp.weight", NORM)


def tensors(seed: int, **more: Array) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {**{name: rng.standard_normal((6, 10) if "layers" in name else 7, np.float32) for name in NAMES}, **more}


def rule(pattern: str | None, value: object) -> dict[str, object]:
    return {"value": value} if pattern is None else {"filter": pattern, "value": value}


def piecewise(models: list[Any], method: str, base: Any, parameters: Mapping[str, Mapping[str, Any]], **more: Any) -> Any:
    """Merge each tensor in a call of its own, with plain parameters; they are given by a part of the names."""
    merged: dict[str, Any] = {}
    for name in models[0]:
        own = next(values for part, values in parameters.items() if part in name)
        only = [{name: model[name]} for model in models]
        merged |= merge(only, method, base=None if base is None else {name: base[name]}, **own, **more)
    return merged


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return list(one) == list(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)


def refused(*args: Any, **more: Any) -> list[str]:
    with pytest.raises(MergeError) as caught:
        merge(*args, **more)
    return str(caught.value).splitlines()


# What it means


def test_numbers_by_hand() -> None:
    older = {name: np.float32([0, 8]) for name in ("a.mlp", "b.mlp", "b.bias")}
    newer = {name: np.float32([4, 0]) for name in older}
    merged = merge([older, newer], "linear", weight=[rule("*.mlp", [3, 1]), rule("bias", 1)])
    assert {name: values.tolist() for name, values in merged.items()} == {"a.mlp": [1, 6], "b.mlp": [1, 6], "b.bias": [2, 4]}


@pytest.mark.parametrize(
    ("method", "given", "own"),
    [
        (
            "ties",
            {"density": [rule("*.mlp.*", [0.3, 0.5]), rule("*", 0.2)], "lambda_": 0.8},
            {"mlp": {"density": [0.3, 0.5], "lambda_": 0.8}, "": {"density": 0.2, "lambda_": 0.8}},
        ),
        (  # all kinds of parameters: choices, None among them, flags, numbers
            "ties",
            {
                "density": 0.5,
                "elect": rule("mlp", "unweighted"),
                "combine": (rule("attn", "sum"), rule(None, "max")),
                "rescale": [rule("norm", "l1")],
                "lambda": [rule("attn", 2)],
                "weight": [rule("norm", np.float32([0, 1]))],
            },
            {
                "mlp": {"density": 0.5, "elect": "unweighted", "combine": "max"},
                "attn": {"density": 0.5, "combine": "sum", "lambda_": 2},
                "norm": {"density": 0.5, "combine": "max", "rescale": "l1", "weight": [0, 1]},
            },
        ),
        (
            "dare_ties",
            {"density": [[rule("mlp", 0.3), rule("*", 0.9)], 0.5], "seed": 3},
            {"mlp": {"density": [0.3, 0.5], "seed": 3}, "": {"density": [0.9, 0.5], "seed": 3}},
        ),
        ("task_arithmetic", {"weight": [rule("mlp", 0)]}, {"mlp": {"weight": 0}, "": {}}),
        ("task_arithmetic", {"normalize": [rule("mlp", True)]}, {"mlp": {"normalize": True}, "": {}}),
        (
            "model_stock",
            {"filter_wise": [rule("attn", True), rule("layers", False)]},
            {"attn": {"filter_wise": True}, "": {"filter_wise": False}},
        ),
    ],
)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_each_tensor_is_merged_as_if_alone_with_its_values(method: str, given: Any, own: Any, backend: str) -> None:
    base, models = tensors(0), [tensors(1), tensors(2)]
    merged = merge(models, method, base=base, backend=backend, **given)
    assert same(merged, piecewise(models, method, base, own, backend=backend))
    plain = {name: value for name, value in given.items() if name == "density" and isinstance(value, float)}
    assert not same(merged, merge(models, method, base=base, **{"density": 0.2, **plain} if "density" in given else {}))


def test_the_first_entry_that_matches_counts() -> None:
    models = [{"mlp": np.float32([0])}, {"mlp": np.float32([1])}]
    for entries, beta in [
        ([rule("m*", 0.25), rule("mlp", 0.75)], 0.25),
        ([rule("mlp", 0.75), rule("m*", 0.25)], 0.75),
        ([rule("*", 1), rule("mlp", 0.75)], 1),
        ([rule(None, 1), rule("mlp", 0.75)], 1),
        ({"filter": None, "value": 0.125}, 0.125),
    ]:
        assert merge(models, beta=entries)["mlp"].tolist() == [1 - beta]


def test_a_single_array_has_the_empty_name() -> None:
    arrays = [np.float32([0]), np.float32([1])]
    assert merge(arrays, beta=rule("*", 0.25)).tolist() == [0.75]
    assert refused(arrays, "ties", base=arrays[0], density=rule("mlp", 1)) == [
        'ties: density: the filter "mlp" matches no tensor; there is none with a name',
        'ties: density: no filter matches the array; add {"filter": "*", "value": ...} as the last entry',
    ]


def test_tied_tensors_are_known_by_their_first_name() -> None:
    models = []
    for value in (0.0, 1.0):
        shared = np.full(2, value, np.float32)
        models.append({"embed": shared, "head": shared})
    merged = merge(models, beta=[rule("embed", 0.25), rule("head", 1)])
    assert merged["head"].tolist() == [0.75, 0.75]
    assert merged["head"] is merged["embed"]


def test_integers_need_no_value() -> None:
    models = [{"w": np.float32([1]), "count": np.array([3])} for _ in range(2)]
    merged = merge(models, "slerp", t=rule("w", 0.5))
    assert merged["count"].tolist() == [3]


def test_a_filter_may_name_what_is_not_merged() -> None:
    models = [tensors(1), tensors(2, steps=np.array([1]))]
    models[0]["steps"] = np.array([1])
    merged = merge(models, beta=[rule("norm", 1), rule("steps", 0.5), rule("*", 0)], exclude="*norm*")
    assert same(merged, {**models[1], NORM: models[0][NORM]})


def test_a_whole_model_has_one_value() -> None:
    base, models = tensors(0), [tensors(1), tensors(2)]
    equal = {"density": [rule("mlp", [0.5, 0.2]), rule("*", (0.5, 0.2))], "lambda_": rule("mlp", 1)}  # 1 is the default
    merged = merge(models, "ties", base=base, scope="model", **equal)
    assert same(merged, merge(models, "ties", base=base, scope="model", density=[0.5, 0.2]))
    lines = refused(
        models, "ties", base=base, scope="model", density=[rule("mlp", 0.5), rule("*", 0.2)], weight=rule("norm", 2)
    )
    assert lines == [
        f'ties: density is (0.2, 0.2) for tensor "{ATTN}", but (0.5, 0.5) for tensor "{MLP}"; scope="model" needs one '
        "value for all tensors: leave the filters away, or the scope"
    ]


def test_the_values_are_not_changed() -> None:
    given = [rule("mlp", [0.5, 0.25]), rule("*", 0.75)]
    before = copy.deepcopy(given)
    merge([tensors(1), tensors(2)], "ties", base=tensors(0), density=given)
    assert given == before


def test_in_place_and_in_a_training_loop() -> None:
    older, newer = tensors(1), tensors(2)
    given: Any = {"beta": [rule("mlp", 0.75), rule("*", 0.25)]}
    expected = merge([older, newer], **given)
    merge([older, newer], out=newer, **given)
    assert same(newer, expected)


# What is refused


def test_all_problems_at_once() -> None:
    lines = refused(
        [tensors(1), tensors(2)],
        "ties",
        base=tensors(0),
        density=[rule("*.mpl.*", 0.3), rule("attn", 1.5), rule("norm", [0.1])],
        weight=[[rule("mlp", "heavy")], 2],
        lambda_=[rule("mlp", 1), 0.5],
        combine={"filter": "norm", "value": "mean"},
        rescale={"value": "l1", "glob": "*"},
        elect={"filter": 3, "value": "weighted"},
        densty={"value": 1},
    )
    mlps = ", ".join(f'tensor "{name}"' for name in NAMES if "mlp" in name)
    wanted = [
        'unknown parameter of ties "densty": did you mean "density"?',
        'ties: filter "attn": density=1.5: must be in [0, 1]',
        'ties: filter "norm": density=[0.1]: 1 values for 2 models; give one number for all of them, or a list with one for '
        "each, in their order",
        "ties: model 0, filter \"mlp\": weight='heavy': must be a number",
        'ties: lambda_[1]=0.5: must be {"filter": ..., "value": ...} as the others; for all other tensors add '
        '{"filter": "*", "value": ...}, and put the filters of one model into a list of their own',
        "ties: filter \"norm\": combine='mean': must be one of 'weight_mean', 'count_mean', 'sum', 'max'",
        "ties: rescale[0]={'value': 'l1', 'glob': '*'}: must be "
        '{"filter": ..., "value": ...}, with these keys and no others',
        "ties: elect[0]: filter=3: must be a glob on names of tensors, or a part of them",
        'ties: density: the filter "*.mpl.*" matches no tensor; names are such as ' + ", ".join(n for n in NAMES if "mlp" in n),
        f'ties: density: no filter matches {mlps}; add {{"filter": "*", "value": ...}} as the last entry',
    ]
    assert sorted(line.split(" (")[0] for line in lines) == sorted(wanted)  # what is in brackets is a method's own advice


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"filter": "mlp"}], r'density\[0\]=\{.filter.: .mlp.\}: must be \{"filter"'),
        ({}, r"density\[0\]=\{\}: must be"),
        ([{1: 2, "value": 3}], r"density\[0\]="),
        ([[rule("mlp", 0.5)]], "density: 1 items for 2 models"),
        (
            [[rule("mlp", 0.5)], []],
            r'density\[1\]: must be \{"filter": ..., "value": ...\}, or a list of these, not an empty one',
        ),
        ([[rule("mlp", 0.5), 0.2], 0.5], r"density\[0\]\[1\]=0.2: must be"),
        ([[rule("*", 0.5)], "a"], r"model 1: density='a': must be a number"),
        ([[rule("*", [0.5, 0.5])], 0.5], r'model 0, filter "\*": density=\[0.5, 0.5\]: must be a number'),
        ([rule("*", rule("*", 0.5))], 'filter "\\*": density=\\{.*must be a number'),
        ([rule("*", None)], "density=None: must be a number"),
        ([rule("*", float("nan"))], "density=nan: must be in"),
        ([[rule("mlp", 0.5)], [rule("*", 0.5)]], "density of model 0: no filter matches tensor"),
        (rule("mlp", 0.5), f'density: no filter matches tensor "{ATTN}", tensor .*, tensor "{NORM}"; add'),
        (
            rule("norm.*", 0.5),
            r'the filter "norm\.\*" matches no tensor; a glob has to match the whole name, as "\*norm\.\*" would',
        ),
        (rule("x.*", 0.5), rf'the filter "x\.\*" matches no tensor; names are such as {NAMES[0]}, '),
    ],
)
def test_what_is_no_list_of_filters(given: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge([tensors(1), tensors(2)], "ties", base=tensors(0), density=given)


def test_problems_of_models_are_told_too() -> None:
    lines = refused([tensors(1), {**tensors(2), "more": np.float32([1])}], beta=rule("mlp", 7))
    assert any("more" in line for line in lines)
    assert 'sfa: filter "mlp": beta=7: must be in [0, 1]' in lines


def test_nothing_is_written_where_something_is_wrong() -> None:
    older, newer = tensors(1), tensors(2)
    refused([older, newer], beta=rule("atn", 0.25), out=newer)
    assert same(newer, tensors(2))


def test_scope_has_no_filters() -> None:
    lines = refused([tensors(1)], "ties", base=tensors(0), density=1, scope=[rule("*", "model")])
    assert "scope=" in lines[0]
    assert "must be one of 'tensor', 'model'" in lines[0]


def test_an_unknown_parameter_with_filters() -> None:
    with pytest.raises(UnknownNameError, match='unknown parameter of sfa "bet": did you mean "beta"'):
        merge([tensors(1), tensors(2)], bet=rule("*", 1))


def test_methods_of_ones_own() -> None:
    @method(paper="")
    def mine(scope: Scope, *, share: PerModel[float] = each(0.5), signs: PerModel[bool] = each(False)) -> Sum:
        """Mix."""
        return Sum([-part if sign else part for part, sign in zip(share, signs, strict=True)])

    models = [{"a": np.float32([1]), "b": np.float32([1])}, {"a": np.float32([2]), "b": np.float32([2])}]
    merged = merge(models, "mine", share=rule("a", [1, 2]), signs=[[rule("b", True)], False])
    assert merged["a"].tolist() == [5]
    assert merged["b"].tolist() == [0.5]


# Many tensors


def test_values_are_resolved_once_for_each_choice() -> None:
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(2500) for part in ("q", "k", "mlp", "norm")]
    model = {name: np.zeros(1, np.float32) for name in names}
    given = {"density": [rule("*.mlp.*", 0.5), rule(".q.", 0.25), rule("*", 0.75)], "weight": [[rule("norm", 2)], 1]}
    begin = time.perf_counter()
    executor, _ = prepare(find("ties"), [model, model], model, None, parameters=given)
    plan = executor.plan
    chosen = {id(plan.parameters_of(scope)): plan.parameters_of(scope) for scope, _ in plan.scopes}
    assert time.perf_counter() - begin < 10  # 10,000 tensors, a second on a slow machine
    assert sorted((each["density"][0], each["weight"]) for each in chosen.values()) == [
        (0.25, (1, 1)),
        (0.5, (1, 1)),
        (0.75, (1, 1)),
        (0.75, (2, 1)),
    ]
    assert sum(len(part.scopes) for part in plan.by_parameters()) == 10_000
    assert len(plan.by_parameters()) == 4
    assert all(len({id(part.parameters_of(scope)) for scope, _ in part.scopes}) == 1 for part in plan.by_parameters())


def test_entries_with_equal_values_are_one_choice() -> None:
    executor, _ = prepare(
        find("sfa"), [tensors(1), tensors(2)], None, None, parameters={"beta": [rule("mlp", 0.25), rule("*", 0.25)]}
    )
    assert executor.plan.by_parameters() == (executor.plan,)


def test_what_is_given_again_is_the_same() -> None:
    given = {
        "density": [rule("mlp", [0.5, 0.25]), rule("*", 1)],
        "combine": rule("mlp", "sum"),
        "weight": [[rule("mlp", 2)], 3],
    }
    first = Parameters(find("ties"), given, 2)
    assert first.given == {
        "density": [[rule("mlp", 0.5), rule("*", 1.0)], [rule("mlp", 0.25), rule("*", 1.0)]],
        "weight": [[rule("mlp", 2.0), rule("*", 1.0)], 3.0],
        "rescale": None,
        "elect": "weighted",
        "combine": [rule("mlp", "sum"), rule("*", "weight_mean")],
        "lambda_": 1.0,
    }
    again = Parameters(find("ties"), first.given, 2)
    assert again.given == first.given
    assert [again.at(name) for name in NAMES] == [first.at(name) for name in NAMES]


# Files, recipes, the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three models: base, a and b; two of their tensors are integers."""
    monkeypatch.setattr("mergekit_cl.memory.anonymous_memory", lambda: 50_000_000)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        save_file(tensors(seed, **{"model.layers.0.steps": np.array([7])}), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "tiny", "dtype": "float32"}))
    return tmp_path


FILES: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": [rule("*.mlp.*", [0.3, 0.5]), rule("*", 0.2)], "lambda_": 0.8}),
    ("ties", {"density": [rule("*.mlp.*", 0.3), rule("[!x]*.attn.*", 0.5), rule("norm", 1)]}),  # none for the integers
    ("dare_ties", {"density": [[rule("*layers.?.mlp*", 0.5), rule("*", 0.9)], 0.5], "combine": rule("attn", "max"), "seed": 5}),
    ("ties", {"density": 0.5, "rescale": rule("mlp", "l1"), "lambda_": [rule("norm", 0.1), rule("attn", 3)]}),
    ("task_arithmetic", {"weight": [rule("mlp", [1, -1])], "normalize": rule("attn", True), "exclude": "*norm*"}),
    ("model_stock", {"filter_wise": [rule("*mlp*", True)]}),
    ("nuslerp", {"nuslerp_flatten": rule("mlp", False), "nuslerp_row_wise": rule("layers.0", True), "weight": [1, 3]}),
    ("ties", {"density": [rule("mlp", 0.5), rule("*", 0.5)], "scope": "model"}),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("method", "given"), FILES)
def test_files_and_the_recipe_that_is_written(folder: Path, method: str, given: dict[str, Any]) -> None:
    models, base = ["a", "b"], "base" if find(method).base == "required" else None
    merge(models, method, base=base, out="out", **given)
    loaded = [load_file(f"{name}/model.safetensors") for name in ("a", "b", "base")]
    expected = merge(loaded[:2], method, base=loaded[2] if base else None, **given)
    found = load_file("out/model.safetensors")
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    CliRunner().invoke(app, ["run", "out/recipe.yml", "again", "--memory", "64GB"], catch_exceptions=False)
    for file in ("model.safetensors", "recipe.yml", "README.md", "config.json"):
        assert (folder / "again" / file).read_bytes() == (folder / "out" / file).read_bytes(), file


def test_the_recipe_says_the_same(folder: Path) -> None:
    given: Any = {
        "density": [rule("*.mlp.*", [0.3, 0.5]), rule("attn", 0.4)],
        "weight": [[rule("norm", 2)], 3],
        "combine": "sum",
    }
    given["lambda_"] = rule("attn", 0.5)
    lines = refused(["a", "b"], "ties", base="base", out="out", **given)
    assert lines == [f'ties: density: no filter matches tensor "{NORM}"; add {{"filter": "*", "value": ...}} as the last entry']
    given["density"].append(rule("norm", 1))
    merge(["a", "b"], "ties", base="base", out="out", **given)
    recipe = yaml.safe_load((folder / "out" / "recipe.yml").read_text())
    integers = rule("*", 1.0)  # a recipe has values for them too
    assert [each["model"] for each in recipe["models"]] == ["a", "b"]
    assert [each["parameters"] for each in recipe["models"]] == [
        {
            "density": [rule("*.mlp.*", 0.3), rule("attn", 0.4), rule("norm", 1.0), integers],
            "weight": [rule("norm", 2.0), rule("*", 1.0)],
        },
        {"density": [rule("*.mlp.*", 0.5), rule("attn", 0.4), rule("norm", 1.0), integers], "weight": 3.0},
    ]
    assert recipe["parameters"]["lambda"] == [rule("attn", 0.5), rule("*", 1.0)]
    read_recipe(folder / "out" / "recipe.yml")


def test_globs_in_a_recipe(folder: Path) -> None:
    text = """
merge_method: linear
models: [{model: a}, {model: b}]
parameters:
  weight: [{filter: "*.layers.?.mlp.*", value: 1}, {filter: "*layers.0*", value: 0}, {filter: norm, value: 3}, {value: 2}]
  normalize: {filter: "model.layers.*", value: false}
"""
    (folder / "recipe.yml").write_text(text)
    result = CliRunner().invoke(app, ["run", "recipe.yml", "out", "--memory", "64GB", "--no-write-model-card"])
    assert result.exit_code == 0, result.output
    one, other, found = (load_file(f"{name}/model.safetensors") for name in ("a", "b", "out"))
    for name, weight, divisor in [(MLP, 1, 1), (ATTN, 0, 1), ("model.layers.1.attn.weight", 2, 1), (NORM, 3, 6)]:
        expected = (weight * one[name].astype(np.float64) + weight * other[name]) / divisor
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_a_plan_tells_what_has_which_values(folder: Path) -> None:
    args = ["merge", "a", "b", "-m", "sfa", "-p", "*.mlp.*:beta=0.25", "-p", "beta=0.75", "-o", "out", "--dry-run", "--json"]
    result = CliRunner().invoke(app, [*args, "--memory", "64GB"])
    rows = {row["what"]: row["tensors"] for row in json.loads(result.stdout)["tensors"]}
    assert rows == {"sfa(beta=0.75)": 3, "sfa(beta=0.25)": 2, "copied, equal in all models": 1}


def test_a_merge_with_other_filters_is_another_merge(folder: Path) -> None:
    def fingerprint(value: object) -> str:
        return prepare_files(["a", "b"], out="out", parameters={"beta": value})._fingerprint("numpy", "error")  # type: ignore

    same_twice = [fingerprint([rule("mlp", 0.25), rule("*", 0.5)]) for _ in range(2)]
    assert same_twice[0] == same_twice[1]
    others = [fingerprint([rule("attn", 0.25), rule("*", 0.5)]), fingerprint([rule("mlp", 0.5), rule("*", 0.25)])]
    assert len({same_twice[0], *others}) == 3


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        (["*.mlp.*:density=0.3,0.5", "density=0.2"], {"density": [rule("*.mlp.*", [0.3, 0.5]), rule("*", 0.2)]}),
        (["density=0.2", "*.mlp.*:density=0.3,0.5"], {"density": [rule("*.mlp.*", [0.3, 0.5]), rule("*", 0.2)]}),
        ([' mlp : lambda = 1e-3', "*:lambda=2"], {"lambda_": [rule("mlp", 0.001), rule("*", 2)]}),
        (['density=[{"filter": "mlp", "value": [0.3, 1]}, {"value": 1}]'], {"density": [rule("mlp", [0.3, 1]), rule(None, 1)]}),
        (['rescale={"filter": "mlp", "value": null}', "weight=[1, 2.5]"], {"rescale": rule("mlp", None), "weight": [1, 2.5]}),
        (["a:b:combine=sum", "norm:normalize=true"], {"combine": [rule("a:b", "sum")], "normalize": [rule("norm", True)]}),
        (["layers.[01].*:t=0"], {"t": [rule("layers.[01].*", 0)]}),
    ],
)  # fmt: skip
def test_parameters_on_the_command_line(
    arguments: list[str], parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def stop(*_: Any, **more: Any) -> None:
        seen.update(more["parameters"])
        raise MergeError("seen")

    monkeypatch.setattr("mergekit_cl.api.prepare_files", stop)
    options = [part for argument in arguments for part in ("-p", argument)]
    CliRunner().invoke(app, ["merge", "a", "-m", "ties", "-o", "out", *options])
    assert seen == parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([":density=0.3"], "-p :density=0.3: must be name=value"),
        (["mlp:=0.3"], "-p mlp:=0.3: must be name=value"),
        (["mlp:density="], "-p mlp:density=: must be name=value"),
        (["density=[0.3"], "-p density=[0.3: is not JSON: "),
        (["density=" + "[" * 100_000], "is not JSON: "),
        (
            ["mlp:density=0.3", 'density={"value": 1}'],
            "-p mlp:density=...: density has filters in JSON too; give all in one way",
        ),
        (["mlp:density=0.3", "density=1", "density=2", "weight=1,"], "-p density=2: density is given twice"),
        (["mpl:beta=0.3"], 'sfa: beta: the filter "mpl" matches no tensor; names are such as model.layers.0.mlp.weight'),
    ],
)
def test_parameters_that_cannot_be_read(folder: Path, arguments: list[str], message: str) -> None:
    options = [part for argument in arguments for part in ("-p", argument)]
    result = CliRunner().invoke(app, ["merge", "a", "b", "-m", "sfa", "-o", "out", *options, "--memory", "64GB"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not Path("out").exists()


# Training


class Net(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.Linear(4, 4, bias=False)
        self.mlp = torch.nn.Linear(4, 4, bias=False)


def weights(model: torch.nn.Module) -> dict[str, Array]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("ties", {"density": [rule("*mlp*", 0.3), rule("attn", 0.9)], "lambda_": 0.5}),
        ("sfa", {"beta": [rule("mlp", 0.9)]}),
        ("linear", {"weight": [[rule("mlp", 0.2), rule("*", 0.5)], 1]}),
    ],
)
def test_sfa(method: str, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    anchor = weights(model)
    averaging = SFA(model, method=method, every=1, **given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    current = weights(model)
    based = find(method).base == "required"
    expected = merge([current] if based else [anchor, current], method, base=anchor if based else None, **given)
    assert averaging.step()
    assert same(weights(model), expected)
    state = averaging.state_dict()
    again = SFA(model, every=1)
    again.load_state_dict(state)
    assert again.state_dict()["parameters"] == state["parameters"]
    if method == "sfa":
        with pytest.raises(AttributeError, match="not the same for all tensors"):
            _ = averaging.beta


def test_sfa_state_is_plain(tmp_path: Path) -> None:
    averaging = SFA(Net(), method="ties", every=2, density=(rule("mlp", np.float32(0.5)), rule("*", torch.tensor(1.0))))
    torch.save(averaging.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["parameters"] == {"density": [[rule("mlp", 0.5), rule("*", 1.0)]]}


def test_sfa_with_a_filter_for_what_is_frozen() -> None:
    model = Net()
    averaging = SFA(model, every=1, beta=[rule("mlp", 0.9), rule("attn", 0.1)])
    model.mlp.weight.requires_grad_(False)
    assert averaging.step()
    with pytest.raises(MergeError, match=r'the filter "mpl" matches no tensor; names are such as mlp\.weight'):
        SFA(model, every=1, beta=[rule("mpl", 0.9)])
    with pytest.raises(MergeError, match='filter "mlp": beta=9: must be in'):
        SFA(model, every=1, beta=[rule("mlp", 9)])
