"""Recipes: what they say, what is refused, and which tensors of which models they merge with which parameters."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergekit_cl import MergeError, MismatchError, methods
from mergekit_cl.assembly import Assembly, assemble, tokenizer_problems
from mergekit_cl.chat_templates import TEMPLATES
from mergekit_cl.checkpoint.reference import ModelRef
from mergekit_cl.recipe import Condition, Options, Recipe, read_recipe, recipe_text
from mergekit_cl.registry import Parameter


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    files: tuple[Any, ...] = ()
    model: str = ""

    def read(self, start: int, stop: int, out: Any) -> None:
        raise AssertionError("headers decide everything")


@dataclass(frozen=True, eq=False)
class Model:
    label: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def checkpoint(self) -> "Model":
        return self

    def companions(self) -> Mapping[str, Path]:
        return self.files


def model(label: str, names: list[str], config: Mapping[str, Any] | None = None, **shapes: tuple[int, ...]) -> Model:
    return Model(label, {name: Tensor(name, shapes.get(name, (4, 4)), model=label) for name in names}, config)


PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def llama(label: str, layers: int = 4, head: bool = True, vocabulary: int = 8, **config: Any) -> Model:
    names = {"model.embed_tokens.weight": (vocabulary, 4), "model.norm.weight": (4,)}
    names |= {f"model.layers.{layer}.{part}": (4, 4) for layer in range(layers) for part in PARTS}
    if head:
        names["lm_head.weight"] = (vocabulary, 4)
    tensors = {name: Tensor(name, shape, model=label) for name, shape in names.items()}
    return Model(label, tensors, {"num_hidden_layers": layers, "tie_word_embeddings": False, **config})


def bind(recipe: Recipe | str, *models: Model, **options: Any) -> Assembly:
    recipe = read_recipe(recipe) if isinstance(recipe, str) else recipe
    by_label = {opened.label: opened for opened in models}
    return assemble(recipe, {ref: by_label[str(ref)] for ref in recipe.models}, **options)


def parameters(assembly: Assembly) -> dict[str, Mapping[str, Any]]:
    return {name: part.parameters for part in assembly.parts for name in part.tensors}


def origins(assembly: Assembly) -> dict[str, list[str]]:
    """What each tensor of the result is merged from, as "model:tensor"."""
    return {
        name: [f"{source.model}:{source.name}" for source in sources]  # type: ignore[attr-defined]
        for part in assembly.parts
        for name, sources in part.tensors.items()
    }


def problems(text: str) -> str:
    with pytest.raises(MergeError) as caught:
        read_recipe(text)
    return str(caught.value)


LINEAR = """
merge_method: linear
models:
  - model: A
    parameters: {weight: 1}
  - model: B
    parameters: {weight: 0.5}
"""


# Models


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", ModelRef("org/model")),
        ("org/model@main", ModelRef("org/model", "main")),
        ("a+b", ModelRef("a", None, "b")),
        ("a@1+b@2", ModelRef("a", "1", "b", "2")),
        ("a+b@2", ModelRef("a", None, "b", "2")),
    ],
)
def test_references_to_models(text: str, expected: ModelRef) -> None:
    assert ModelRef.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "a+", "a@", "+b", "a@1@2", "a+b+c", "a+b@", "a+@b"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(MergeError, match="is not path"):
        ModelRef.parse(text)


def test_references_as_mappings() -> None:
    recipe = read_recipe("""
merge_method: karcher
models:
  - model: {model: {path: a+b, revision: x}, lora: {path: c, revision: y}}
  - model: {model: c@z, lora: d}
  - model: {model: e, override_architecture: LlamaForCausalLM}
""")
    assert recipe.models == [ModelRef("a+b", "x", "c", "y"), ModelRef("c", "z", "d"), ModelRef("e")]
    assert "override_architecture" in recipe.notes[0]


def test_models_are_opened_once() -> None:
    recipe = read_recipe("""
merge_method: passthrough
base_model: base
tokenizer_source: T
slices:
  - sources: [{model: B, layer_range: [0, 2]}]
  - sources: [{model: A, layer_range: [0, 2]}]
  - sources: [{model: B, layer_range: [1, 3]}]
""")
    assert list(map(str, recipe.models)) == ["B", "A", "base", "T"]
    assert recipe.donor == ModelRef("base")


# What is refused, with its place

KARCHER = "merge_method: karcher\nmodels: [{model: A}]\n"
TIES = "merge_method: ties\nbase_model: A\nmodels: [{model: B}]\nparameters: {weight: 1, "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("[1, 2]", "the recipe is just [1, 2]: it must be a mapping"),
        ("recipe.yml", "to read a file, pass a Path"),
        ("a: [", "line 1, column 5: not YAML"),
        ("a: 1\n---\nb: 2", "not YAML: but found another document"),
        ("a: !!python/object:os.system x", "not YAML"),
        ("a: !!int ''", "not YAML"),
        ("a: 2024-13-45", "not YAML"),
        ("? [a]\n: b", "not YAML"),
        ("a: \x00", "not YAML"),
        ("[" * 1000, "not YAML"),
        (LINEAR + "merge_method: ties", 'line 8: the key "merge_method" is given twice'),
        (LINEAR + "metge_method: ties", 'unknown key "metge_method": did you mean "merge_method"?'),
        (LINEAR + "normalize: true", '"normalize" is a parameter: put it under parameters:'),
        (LINEAR + "slices: [{sources: [{model: A, layer_range: [0, 1]}]}]", "found models and slices"),
        ("merge_method: linear", "exactly one of models, slices and modules must be given; found none of them"),
        ("models: [{model: A}]", "merge_method is missing"),
        ("merge_method: [ties]\nmodels: [{model: A}]", "merge_method: must be the name of a method, not ['ties']"),
        ("merge_method: linaer\nmodels: [{model: A}]", 'unknown method "linaer": did you mean "linear"?'),
        ("merge_method: karcher\nmodels: A", "models: must be a list of mappings with a model, not 'A'"),
        ("merge_method: karcher\nmodels: [A, {model: B}]", "models[0]: must be a mapping of model, parameters, not 'A'"),
        ("merge_method: karcher\nmodels: [{}]", "models[0]: model is missing"),
        ("merge_method: karcher\nmodels: [{model: 3}]", "models[0].model: must be the path or the hub id of a model, not 3"),
        ("merge_method: karcher\nmodels: [{model: a@b@c}]", 'models[0].model: "a@b@c" is not path'),
        ("merge_method: karcher\nmodels: [{model: {model: {path: 3}}}]", "models[0].model.model: must be a path"),
        ("merge_method: karcher\nmodels: [{model: A, weigth: 1}]", 'models[0]: unknown key "weigth"'),
        ("merge_method: karcher\nmodels: [{model: A, weight: 1}]", 'models[0]: unknown key "weight": "weight" is a parameter'),
        ("merge_method: karcher\nmodels: [{model: A}, {model: A}]", "models: A is listed 2 times"),
        (LINEAR + "dtype: bfloat61", "dtype: must be one of bfloat16, float16, float32, float64, not 'bfloat61'"),
        (LINEAR + "out_dtype: int64", "out_dtype: must be one of"),
        (LINEAR + "tokenizer_source: union", "tokenizer_source: union is not supported, because"),
        (LINEAR + "tokenizer: {}", "tokenizer.source: union is not supported"),
        (LINEAR + "tokenizer: {source: base, tokens: {x: {source: A}}}", "tokenizer.tokens: is not supported, because"),
        (LINEAR + "tokenizer: {source: base, pad_to_multiple_of: 8}", "tokenizer.pad_to_multiple_of: is not supported"),
        (LINEAR + "tokenizer: {sauce: base}", 'tokenizer: unknown key "sauce": did you mean "source"?'),
        (LINEAR + "tokenizer: {source: base}\ntokenizer_source: base", "tokenizer and tokenizer_source are both given"),
        (LINEAR + "chat_template: chatlm", 'unknown template "chatlm": did you mean "chatml"?'),
        (LINEAR + "chat_template: 3", 'unknown template "3"'),
        (LINEAR + "parameters: 3", "parameters: must be a mapping"),
        (LINEAR + "parameters: {densty: 0.5}", 'parameters: unknown parameter "densty": did you mean "density"?'),
        (LINEAR + "parameters: {normalise: true}", 'parameters: unknown parameter "normalise": did you mean "normalize"?'),
        (LINEAR + "parameters: {normalize: 2}", "parameters.normalize: must be true or false, not 2"),
        (LINEAR + "parameters: {weight: x}", "parameters.weight: must be a number, not 'x'"),
        (LINEAR + "parameters: {weight: true}", "parameters.weight: must be a number, not True"),
        (LINEAR + "parameters: {weight: }", "parameters.weight: must be a number, not nothing"),
        (LINEAR + "parameters: {weight: .nan}", "parameters.weight: weight=nan: must be finite"),
        (LINEAR + "parameters: {weight: []}", "parameters.weight: must be a list of numbers, not []"),
        (LINEAR + "parameters: {weight: [1, [2]]}", "parameters.weight[1]: must be a number, not [2]"),
        (LINEAR + "parameters: {weight: [1, {value: 2}]}", "must be a condition of filter, value, not 1"),
        (LINEAR + "parameters: {weight: {filtr: a, value: 2}}", 'parameters.weight[0]: unknown key "filtr"'),
        (LINEAR + "parameters: {weight: {filter: 3, value: 2}}", "parameters.weight[0].filter: must be a part of the names"),
        (LINEAR + "parameters: {weight: {filter: mlp}}", "parameters.weight[0].value: must be a number, not nothing"),
        (KARCHER + "parameters: {max_iter: 2.5}", "max_iter: must be a whole number, not 2.5"),
        (KARCHER + "parameters: {tol: -1}", "parameters.tol: tol=-1.0: must be in [0, inf)"),
        ("merge_method: linear\nmodels: [{model: A}]", "models: linear needs weight for A; give it under its parameters:"),
        ("merge_method: linear\nmodels: [{model: A, parameters: {weight: 1}}]\nbase_model: B",
         "linear needs weight for B (as base_model, it takes part like the other models)"),
        ("merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}]", "slerp needs t; give it under"),
        ("merge_method: slerp\nbase_model: A\nmodels: [{model: B}, {model: C}]\nparameters: {t: 1}",
         "models: slerp merges 1 model besides the base A, but 2 are listed"),
        ("merge_method: slerp\nmodels: [{model: A}]\nparameters: {t: 1}", "models: slerp merges 2 models, but 1 is listed"),
        ("merge_method: model_stock\nmodels: [{model: A}, {model: B}]", "base_model: is missing; model_stock"),
        ("merge_method: model_stock\nbase_model: A\nmodels: [{model: A}, {model: B}]", "2 or more models besides the base A"),
        ("merge_method: passthrough\nbase_model: A\nmodels: [{model: B}]", "2 are listed (base_model counts as one"),
        ("merge_method: sfa\nbase_model: A\nmodels: [{model: B}]", "base_model: sfa has no use for one"),
        (TIES + "combine: mean}",
         "parameters.combine: must be one of weight_mean, count_mean, sum, max, not 'mean'"),
        (TIES + "rescale: l2}",
         "parameters.rescale: must be true or false, or one of inverse_density, l1, None, not 'l2'"),
        (TIES + "scope: {filter: x, value: model}}",
         "parameters.scope: scope is one for the whole recipe"),
        ("merge_method: passthrough\nslices: [{sources: [{model: A}]}]", "slices[0].sources[0].layer_range: must be"),
        ("merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [3, 1]}]}]", "[first, end] with 0 <="),
        ("merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [0, 1.5]}]}]", "not [0, 1.5]"),
        ("merge_method: passthrough\nslices: [{sources: []}]", "slices[0].sources: must be a list of"),
        ("merge_method: passthrough\nslices: [{source: []}]", 'slices[0]: unknown key "source": did you mean "sources"?'),
        ("merge_method: karcher\nslices: [{sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 3]}]}]",
         "slices[0].sources: have 2 and 3 layers"),
        ("merge_method: wise_ft\nbase_model: C\nslices: [{sources: [{model: A, layer_range: [0, 2]}]}]",
         "slices[0]: the base C is not among the sources"),
        (LINEAR + "mergekit_cl: {sed: 1}", 'mergekit_cl: unknown key "sed": did you mean "seed"?'),
        (LINEAR + "mergekit_cl: {seed: x}", "mergekit_cl.seed: must be a whole number, not 'x'"),
        (LINEAR + "mergekit_cl: {only: [3]}", "mergekit_cl.only: must be a glob on names of tensors, or a list, not [3]"),
        ("merge_method: karcher\nmodules: [x]", "modules: must be a mapping from names of modules"),
        ("merge_method: karcher\nmodules: {x: {}}", "modules.x: must have either models or slices"),
        ("merge_method: karcher\nmodules: {x: {models: [{modle: A}]}}", 'modules.x.models[0]: unknown key "modle"'),
    ],
)  # fmt: skip
def test_errors_have_a_place_and_a_way_out(text: str, message: str) -> None:
    assert message in problems(text)


def test_all_problems_at_once() -> None:
    found = problems("""
merge_method: ties
base_modle: A
models:
  - model: B
    parameters: {densty: 0.5}
  - model: C
    weights: 1
dtype: int8
""")
    assert len(found.splitlines()) == 5
    for part in ("base_modle", "models[0].parameters", "models[1]", "base_model: is missing", "dtype"):
        assert part in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yml").write_bytes(b"a: \xff")
    (tmp_path / "bad.yml").write_text("a: [")
    for name, message in {
        "missing.yml": "No such file",
        "latin.yml": "cannot be read",
        "bad.yml": "bad.yml: line 1",
        ".": "directory",
    }.items():
        with pytest.raises(MergeError, match=message):
            read_recipe(tmp_path / name)


KEYS = ["model", "models", "slices", "sources", "parameters", "weight", "filter", "value", "modules", "layer_range", "t"]
KEYS += ["tokenizer", "base_model", "dtype", "chat_template", "mergekit_cl"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
        ),
        max_leaves=20,
    ),
    st.sampled_from(["linear", "ties", "slerp", "passthrough", "x"]),
)
def test_nothing_but_merge_errors(value: Any, method: str) -> None:
    tree = {**value, "merge_method": method} if isinstance(value, dict) else value
    for recipe in (tree, {"merge_method": method, "models": tree}, {"merge_method": method, "slices": tree}):
        with suppress(MergeError):
            read_recipe(yaml.dump(recipe))


@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    with pytest.raises(MergeError):
        read_recipe(text)


# Parameters


def test_parameters_of_linear() -> None:
    found = bind(LINEAR, llama("A"), llama("B"))
    (part,) = found.parts
    assert (part.labels, part.models, part.parameters) == (("A", "B"), 2, {"weight": [1.0, 0.5], "normalize": True})
    assert list(part.tensors) == list(llama("A").tensors)
    assert found.method == "linear"
    assert found.donor == ModelRef("A")
    assert found.out_dtype is None
    assert found.config_changes == found.copied == {}


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("ties", {}, {"density": [1.0], "rescale": None, "combine": "weight_mean", "lambda_": 1.0}),
        ("ties", {"density": 0.5, "normalize": False, "rescale": 1, "lambda": "5e-1", "int8_mask": True},
         {"density": [0.5], "rescale": "l1", "combine": "sum", "lambda_": 0.5}),
        ("ties", {"combine": "max", "elect": "unweighted", "rescale": "inverse_density"},
         {"density": [1.0], "rescale": "inverse_density", "combine": "max", "elect": "unweighted", "lambda_": 1.0}),
        ("dare_ties", {}, {"density": [1.0], "rescale": "l1", "combine": "sum", "lambda_": 1.0}),
        ("dare_ties", {"rescale": "off", "normalize": 1},
         {"density": [1.0], "rescale": None, "combine": "weight_mean", "lambda_": 1.0}),
        ("dare_linear", {"normalize": "yes"}, {"density": [1.0], "rescale": "l1", "normalize": True, "lambda_": 1.0}),
        ("breadcrumbs", {"gamma": 0.02},
         {"density": [1.0], "gamma": [0.02], "rescale": None, "normalize": False, "lambda_": 1.0}),
        ("breadcrumbs_ties", {}, {"density": [1.0], "gamma": [0.01], "rescale": None, "combine": "sum", "lambda_": 1.0}),
        ("task_arithmetic", {"density": 0.5, "rescale": True}, {"normalize": False, "lambda_": 1.0}),
        ("della", {},
         {"density": [1.0], "epsilon": [0.15], "rescale": "l1", "combine": "weight_mean", "lambda_": 1.0}),
        ("della", {"density": 0.5, "epsilon": 0.2, "rescale": False, "normalize": False, "lambda": 2, "int8_mask": True},
         {"density": [0.5], "epsilon": [0.2], "rescale": None, "combine": "sum", "lambda_": 2.0}),
        ("della", {"rescale": "inverse_density", "combine": "max", "elect": "unweighted"},
         {"density": [1.0], "epsilon": [0.15], "rescale": "inverse_density", "combine": "max", "elect": "unweighted",
          "lambda_": 1.0}),
        ("della_linear", {"density": 0.5},
         {"density": [0.5], "epsilon": [0.15], "rescale": "l1", "normalize": False, "lambda_": 1.0}),
        ("della_linear", {"rescale": "no", "normalize": "yes"},
         {"density": [1.0], "epsilon": [0.15], "rescale": None, "normalize": True, "lambda_": 1.0}),
        ("magnitude_prune", {"density": 0.5, "rescale": False}, {"density": [0.5], "rescale": None}),
    ],
)  # fmt: skip
def test_mergekits_parameters_in_our_names(method: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = {"merge_method": method, "base_model": "A", "models": [{"model": "B"}], "parameters": {"weight": 0.3, **given}}
    (part,) = bind(yaml.dump(recipe), llama("A"), llama("B")).parts
    assert part.parameters == {"weight": [0.3], **expected}
    assert (part.labels, part.models) == (("B", "A"), 1)
    resolved = methods()[method].resolve(part.parameters, 1)
    assert resolved["weight"] == (0.3,)


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("nuslerp", {"weight": 1, "nuslerp_flatten": False, "nuslerp_row_wise": True},
         {"weight": [1.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("multislerp", {"weight": 1}, {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1e-8}),
        ("multislerp", {"weight": 1, "eps": "1e-6"}, {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1e-6}),
        ("karcher", {"max_iter": 20.0}, {"max_iter": 20, "tol": 1e-5}),
        ("karcher", {}, {"max_iter": 10, "tol": 1e-5}),
        ("sfa", {"beta": 0.25}, {"beta": 0.25}),
        ("sfa", {}, {}),
    ],
)  # fmt: skip
def test_parameters_of_methods_without_a_base(method: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = {"merge_method": method, "models": [{"model": "A"}, {"model": "B"}], "parameters": given}
    (part,) = bind(yaml.dump(recipe), llama("A"), llama("B")).parts
    assert part.parameters == expected


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("nearswap", {"t": "1e-4"}, {"t": 1e-4}),
        ("ram", {}, {"epsilon": 1e-5}),
        ("ramplus_tl", {"r": 1}, {"r": 1.0, "alpha": 0.2, "epsilon": 1e-5}),
        ("sce", {}, {"select_topk": 1.0}),
        ("sce", {"select_topk": 0.1, "int8_mask": True}, {"select_topk": 0.1}),
        ("arcee_fusion", {}, {}),
    ],
)
def test_parameters_of_methods_without_weights(method: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = {"merge_method": method, "base_model": "A", "models": [{"model": "B"}], "parameters": given}
    (part,) = bind(yaml.dump(recipe), llama("A"), llama("B")).parts
    assert part.parameters == expected
    assert (part.labels, part.models) == (("B", "A"), 1)
    methods()[method].resolve(part.parameters, 1)


def test_own_parameters_of_a_model_beside_the_default() -> None:
    recipe = "merge_method: karcher\nmodels: [{model: A, parameters: {weight: 2}}, {model: B}]"
    assert bind(recipe, llama("A"), llama("B")).parts[0].parameters["weight"] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ((7.0,), 0.3, 7.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.0, 0.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 1.0, 1.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.375, 0.4),
        ((0, 10), 0.25, 2.5),
        ((True, False), 0.99, True),
        ((True, False), 1.0, False),
        (("a", "b", "c"), 0.5, "b"),
        (("a", "b", "c"), 0.49, "a"),
    ],
)
def test_gradients(values: tuple[Any, ...], t: float, expected: Any) -> None:
    assert Condition(None, values).at(t) == pytest.approx(expected)


def test_a_gradient_over_layers_with_filters() -> None:
    found = bind("""
merge_method: slerp
base_model: A
models: [{model: B}, {model: A}]
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0]}
    - value: 0.5
""", llama("A", 5), llama("B", 5))  # fmt: skip
    t = {name: values["t"] for name, values in parameters(found).items()}
    attention = [t[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(5)]
    assert attention == pytest.approx([0, 0.5, 0.3, 0.7, 1])
    assert [t[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert t["model.layers.3.input_layernorm.weight"] == t["lm_head.weight"] == t["model.embed_tokens.weight"] == 0.5
    assert all(part.labels == ("B", "A") and part.models == 1 for part in found.parts)
    assert len(found.parts) == len(set(t.values())) == 7


def test_gradients_outside_the_layers_and_in_a_single_layer() -> None:
    text = "merge_method: slerp\nmodels: [{model: A}, {model: B}]\nparameters: {t: [0.25, 0.75]}"
    t = {name: values["t"] for name, values in parameters(bind(text, llama("A", 1), llama("B", 1))).items()}
    assert {name: value for name, value in t.items() if "layers" not in name} == dict.fromkeys(
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"], 0.25
    )
    assert t["model.layers.0.mlp.up_proj.weight"] == 0.75


def test_gradients_of_an_encoder_and_a_decoder() -> None:
    names = [
        f"{part}.block.{n}.layer.{k}.w"
        for part, count in (("encoder", 3), ("decoder", 2))
        for n in range(count)
        for k in (0, 1)
    ]
    text = "merge_method: slerp\nmodels: [{model: A}, {model: B}]\nparameters: {t: [0, 1]}"
    t = {name: values["t"] for name, values in parameters(bind(text, model("A", names), model("B", names))).items()}
    assert [t[f"encoder.block.{n}.layer.1.w"] for n in range(3)] == [0, 0.5, 1]
    assert [t[f"decoder.block.{n}.layer.0.w"] for n in range(2)] == [0, 1]


def test_lists_that_are_no_layers_by_the_config() -> None:
    names = [*(f"h.{n}.w" for n in range(3)), "classifier.0.w", "classifier.1.w"]
    text = "merge_method: slerp\nmodels: [{model: A}, {model: B}]\nparameters: {t: [0, 1]}"
    models = [model(label, names, {"n_layer": 3}) for label in "AB"]
    t = {name: values["t"] for name, values in parameters(bind(text, *models)).items()}
    assert t == {"h.0.w": 0, "h.1.w": 0.5, "h.2.w": 1, "classifier.0.w": 0, "classifier.1.w": 0}


def test_precedence() -> None:
    text = """
merge_method: linear
modules:
  default:
    slices:
      - sources:
          - {model: A, layer_range: [0, 1], parameters: {weight: {filter: mlp, value: 1}}}
          - {model: B, layer_range: [0, 1]}
        parameters: {weight: [{filter: mlp, value: 2}, {filter: attn, value: 3}]}
      - sources: [{model: A, layer_range: [1, 2]}, {model: B, layer_range: [1, 2]}]
    parameters: {weight: {filter: layers, value: 4}}
parameters: {weight: 5, normalize: false}
"""
    weights = {name: values["weight"] for name, values in parameters(bind(text, llama("A"), llama("B"))).items()}
    assert weights == {
        "model.embed_tokens.weight": [5, 5],
        "model.layers.0.self_attn.q_proj.weight": [3, 3],
        "model.layers.0.mlp.up_proj.weight": [1, 2],
        "model.layers.0.input_layernorm.weight": [4, 4],
        "model.layers.1.self_attn.q_proj.weight": [4, 4],
        "model.layers.1.mlp.up_proj.weight": [4, 4],
        "model.layers.1.input_layernorm.weight": [4, 4],
        "model.norm.weight": [5, 5],
        "lm_head.weight": [5, 5],
    }


def test_filters_see_the_inputs_name_for_a_models_own_parameters_and_the_results_for_shared_ones() -> None:
    text = """
merge_method: linear
slices:
  - sources: [{model: A, layer_range: [2, 3]}, {model: B, layer_range: [3, 4]}]
parameters:
  weight: [{filter: layers.2, value: 2}, {filter: layers.3, value: 3}, {value: 1}]
  normalize: [{filter: layers.0, value: false}, {value: true}]
"""
    found = parameters(bind(text, llama("A"), llama("B")))
    assert found["model.layers.0.mlp.up_proj.weight"] == {"weight": [2, 3], "normalize": False}
    assert found["model.norm.weight"] == {"weight": [1, 1], "normalize": True}


def test_filters_are_case_sensitive_parts_of_names_and_a_star_is_any() -> None:
    text = """
merge_method: slerp
models: [{model: A}, {model: B}]
parameters: {t: [{filter: MLP, value: 0.1}, {filter: "up_pro", value: 0.2}, {filter: "*", value: 0.3}, {value: 0.4}]}
"""
    found = parameters(bind(text, llama("A"), llama("B")))
    assert {name: values["t"] for name, values in found.items() if ".0." in name or name == "norm"} == {
        "model.layers.0.self_attn.q_proj.weight": 0.3,
        "model.layers.0.mlp.up_proj.weight": 0.2,
        "model.layers.0.input_layernorm.weight": 0.3,
    }


def test_a_required_parameter_whose_filters_fit_not_every_tensor() -> None:
    text = "merge_method: slerp\nmodels: [{model: A}, {model: B}]\nparameters: {t: {filter: mlp, value: 0.1}}"
    with pytest.raises(MergeError, match=r'slerp needs t for "model\.embed_tokens\.weight", but no filter fits its name'):
        bind(text, llama("A"), llama("B"))
    text = LINEAR.replace("weight: 1", "weight: {filter: mlp, value: 1}")
    with pytest.raises(MergeError, match=r"linear needs weight of A for"):
        bind(text, llama("A"), llama("B"))


def test_a_gradient_of_whole_numbers_has_to_stay_whole() -> None:
    text = "merge_method: karcher\nmodels: [{model: A}, {model: B}]\nparameters: {max_iter: [1, 3]}"
    assert parameters(bind(text, llama("A", 3), llama("B", 3)))["model.layers.1.mlp.up_proj.weight"]["max_iter"] == 2
    with pytest.raises(MergeError, match=r"the gradient gives .* 1\.66667, but it must be a whole number"):
        bind(text, llama("A", 4), llama("B", 4))


def test_parameters_of_other_methods_are_ignored_with_a_note() -> None:
    recipe = read_recipe("""
merge_method: slerp
models: [{model: A, parameters: {weight: 1, t: 0.9}}, {model: B}]
parameters: {t: 0.5, int8_mask: true, normalize: true}
""")
    assert [note.split(":")[0] for note in recipe.notes] == [
        "parameters.int8_mask", "parameters.normalize", "models[0].parameters.weight", "models[0].parameters.t",
    ]  # fmt: skip
    assert parameters(bind(recipe, llama("A"), llama("B")))["lm_head.weight"] == {"t": 0.5}


def test_scope_of_the_whole_model() -> None:
    text = TIES + "density: 0.2, scope: model}"
    assert bind(text, llama("A"), llama("B")).scope == "model"
    with pytest.raises(MergeError, match="scope: model needs the same models and parameters for all tensors"):
        bind(text.replace("0.2", "[0.2, 0.5]"), llama("A"), llama("B"))
    assert bind(LINEAR, llama("A"), llama("B")).scope == "tensor"


def test_a_method_of_mergekit_without_all_of_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_cl import PerModel, Scope, Sum, each, method, registry

    for name in ("della", "della_linear"):
        monkeypatch.delitem(registry._methods, name)

    @method(paper="", base="required")
    def della(scope: Scope, *, density: PerModel[float], epsilon: PerModel[float] = each(0.1), normalize: bool = False) -> Sum:
        """Stand in."""
        return Sum([1.0])

    text = "merge_method: della\nbase_model: A\nmodels: [{model: B}]\nparameters: {density: 0.4, weight: 1}"
    assert "mergekit's weight is not there for della" in problems(text)

    @method(paper="", base="required")
    def della_linear(
        scope: Scope, *, density: PerModel[float], weight: PerModel[float], epsilon: PerModel[float] = each(0.1)
    ) -> Sum:
        """Stand in."""
        return Sum([1.0])

    found = parameters(bind(text.replace("della", "della_linear"), llama("A"), llama("B")))["lm_head.weight"]
    assert found == {"density": [0.4], "weight": [1.0], "epsilon": [0.15]}


# The base


def test_a_base_that_is_listed_or_not() -> None:
    for listed in ("", ", {model: A, parameters: {weight: 9}}"):
        text = "merge_method: task_arithmetic\nbase_model: A\nparameters: {weight: 0.5}\n"
        text += f"models: [{{model: B}}, {{model: C}}{listed}]"
        (part,) = bind(text, llama("A"), llama("B"), llama("C")).parts
        assert (part.labels, part.models, part.parameters["weight"]) == (("B", "C", "A"), 2, [0.5, 0.5])


def test_the_base_takes_part_in_methods_that_have_no_use_for_one() -> None:
    text = "merge_method: linear\nbase_model: A\nmodels: [{model: B, parameters: {weight: 2}}]\nparameters: {weight: 1}"
    (part,) = bind(text, llama("A"), llama("B")).parts
    assert (part.labels, part.models, part.parameters["weight"]) == (("B", "A"), 2, [2.0, 1.0])
    assert bind(text, llama("A"), llama("B")).donor == ModelRef("A")


def test_a_base_of_a_slice() -> None:
    text = """
merge_method: slerp
base_model: A
slices:
  - sources: [{model: A, layer_range: [0, 1]}, {model: B, layer_range: [0, 1]}]
  - sources: [{model: A, layer_range: [1, 2]}, {model: B, layer_range: [1, 2]}]
    base_model: B
parameters: {t: 0.1}
"""
    found = origins(bind(text, llama("A"), llama("B")))
    assert [source[0] for source in found["model.layers.0.mlp.up_proj.weight"]] == ["B", "A"]
    assert [source[0] for source in found["model.layers.1.mlp.up_proj.weight"]] == ["A", "B"]


# Slices


def test_layers_are_stacked_and_numbered_anew() -> None:
    text = """
merge_method: passthrough
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
  - sources: [{model: B, layer_range: [1, 4], parameters: {scale: {filter: mlp, value: 0.5}}}]
dtype: float16
"""
    found = bind(text, llama("A", torch_dtype="float32", layer_types=list("abcd")), llama("B", layer_types=list("efgh")))
    sources = origins(found)
    layers = [sources[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(6)]
    expected = ["A:{}0", "A:{}1", "A:{}2", "B:{}1", "B:{}2", "B:{}3"]
    assert layers == [[name.format("model.layers.") + ".mlp.up_proj.weight"] for name in expected]
    assert sources["model.embed_tokens.weight"] == ["A:model.embed_tokens.weight"]
    assert sources["model.norm.weight"] == ["B:model.norm.weight"]
    assert sources["lm_head.weight"] == ["B:lm_head.weight"]
    assert len(sources) == 6 * 3 + 3
    assert found.config_changes == {"num_hidden_layers": 6, "layer_types": list("abcfgh"), "torch_dtype": "float16"}
    assert found.out_dtype == "float16"
    given_parameters = parameters(found)
    assert given_parameters["model.layers.3.mlp.up_proj.weight"] == {"scale": 0.5}
    assert given_parameters["model.layers.3.self_attn.q_proj.weight"] == given_parameters["lm_head.weight"] == {}


def test_what_a_config_lists_for_each_layer_comes_from_the_base() -> None:
    text = """
merge_method: slerp
base_model: B
slices: [{sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [2, 4]}]}]
parameters: {t: 0.5}
"""
    found = bind(text, llama("A", layer_types=list("abcd")), llama("B", layer_types=list("efgh")))
    assert found.config_changes == {"num_hidden_layers": 2, "layer_types": ["g", "h"]}


def test_a_donor_whose_layers_are_not_in_the_result() -> None:
    text = "merge_method: passthrough\nbase_model: C\nslices: [{sources: [{model: A, layer_range: [0, 3]}]}]"
    assert bind(text, llama("A"), llama("C", 6)).config_changes == {"num_hidden_layers": 3}
    found = bind(text, llama("A"), model("C", ["h.0.w"], {"n_layer": 1, "tie_word_embeddings": False}))
    assert (found.donor, found.config_changes) == (ModelRef("C"), {})
    assert "the config of C has no number of layers that could be set to 3" in found.notes


def test_forty_four_layers() -> None:
    text = """
merge_method: passthrough
slices:
  - sources: [{model: A, layer_range: [0, 24]}]
  - sources: [{model: B, layer_range: [12, 32]}]
"""
    found = bind(text, llama("A", 32), llama("B", 32))
    assert found.config_changes == {"num_hidden_layers": 44}
    assert origins(found)["model.layers.24.mlp.up_proj.weight"] == ["B:model.layers.12.mlp.up_proj.weight"]
    assert {part.labels for part in found.parts} == {("A",), ("B",)}


def test_the_gradient_runs_within_each_slice() -> None:
    text = """
merge_method: slerp
slices:
  - sources: [{model: A, layer_range: [0, 3]}, {model: B, layer_range: [0, 3]}]
  - sources: [{model: A, layer_range: [3, 4]}, {model: B, layer_range: [3, 4]}]
parameters: {t: [0.2, 0.6]}
"""
    found = parameters(bind(text, llama("A"), llama("B")))
    assert [found[f"model.layers.{n}.mlp.up_proj.weight"]["t"] for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.6])


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"n_layer": 2}, {"n_layer": 1}),
        ({"num_layers": 2, "num_attention_heads": 2}, {"num_layers": 1}),
        ({"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}},
         {"text_config.num_hidden_layers": 1}),
        ({"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 2}},
         {"num_hidden_layers": 1, "text_config.num_hidden_layers": 1}),
        ({"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"], "moe_layers": [0, 7]}},
         {"text_config.num_hidden_layers": 1, "text_config.layer_types": ["b"]}),
        ({"hidden_size": 2}, {}),
        (None, {}),
    ],
)  # fmt: skip
def test_the_number_of_layers_in_the_config(config: dict[str, Any] | None, changes: dict[str, Any]) -> None:
    names = ["transformer.h.0.w", "transformer.h.1.w", "transformer.wte.weight", "transformer.ln_f.weight"]
    text = "merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [1, 2]}]}]"
    found = bind(text, model("A", names, config))
    assert found.config_changes == changes
    assert origins(found)["transformer.h.0.w"] == ["A:transformer.h.1.w"]
    assert bool(found.notes) == (config == {"hidden_size": 2})


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "gpt_neox.embed_in.weight",
     "model.tok_embeddings.weight", "bert.embeddings.LayerNorm.weight", "transformer.word_embeddings.weight",
     "backbone.embeddings.weight", "embed_positions.weight", "conv1.weight", "shared.weight"],
)  # fmt: skip
def test_what_comes_before_the_layers(name: str) -> None:
    assert _origin(name) == [f"A:{name}"]


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "lm_head.weight", "embed_out.weight", "transformer.ln_f.bias", "bert.pooler.dense.weight",
     "classifier.bias", "output.weight", "score.weight", "model.final_layernorm.weight", "cls.predictions.bias",
     "vocab_projector.bias", "backbone.norm_f.weight", "unembed.weight"],
)  # fmt: skip
def test_what_comes_after_the_layers(name: str) -> None:
    assert _origin(name) == [f"B:{name}"]


def _origin(name: str) -> list[str]:
    slices = [{"sources": [{"model": label, "layer_range": [0, 1]}]} for label in "AB"]
    text = yaml.dump({"merge_method": "passthrough", "slices": slices})
    config = {"tie_word_embeddings": False}
    return origins(bind(text, *(model(label, [name, "h.0.w"], config) for label in "AB")))[name]


def test_experts_are_no_layers() -> None:
    names = [f"model.layers.{n}.mlp.experts.{k}.w" for n in range(2) for k in range(3)]
    text = "merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [1, 2]}]}]"
    found = origins(bind(text, model("A", names)))
    assert found == {f"model.layers.0.mlp.experts.{k}.w": [f"A:model.layers.1.mlp.experts.{k}.w"] for k in range(3)}


def test_the_config_tells_which_list_holds_the_layers() -> None:
    names = ["model.layers.0.w", "model.layers.1.w", *(f"visual.blocks.{n}.w" for n in range(3))]
    text = "merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [1, 2]}]}]"
    found = origins(bind(text, model("A", names, {"num_hidden_layers": 2, "vision_config": {"depth": 3}})))
    assert list(found) == ["model.layers.0.w", "visual.blocks.0.w", "visual.blocks.1.w", "visual.blocks.2.w"]
    with pytest.raises(MergeError, match=r"several lists of layers \(model.layers.0 to model.layers.1, visual.blocks.0 to"):
        bind(text, model("A", names))


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((llama("A", 2), llama("B", 4)), r"slices\[0\]: layer_range \[0, 3\] of A: it has 2 layers, so the end is at most 2"),
        ((model("A", ["w"]), llama("B")), "no tensor of A has the number of a layer in its name"),
        ((model("A", [f"h.{n}.w" for n in range(3)]), llama("B")),
         "layers of the models have different names: h., model.layers."),
        ((model("A", ["h.0.w", "h.2.w"]), model("B", [f"h.{n}.w" for n in range(3)])), 'A lacks "h.1.w", for "h.1.w" of B'),
    ],
)  # fmt: skip
def test_slices_that_do_not_fit(models: tuple[Model, ...], message: str) -> None:
    text = "merge_method: karcher\nslices: [{sources: [{model: A, layer_range: [0, 3]}, {model: B, layer_range: [0, 3]}]}]"
    with pytest.raises(MergeError, match=message):
        bind(text, *models)


# Modules


def test_modules_by_the_beginning_of_names() -> None:
    text = """
merge_method: slerp
modules:
  encoder: {models: [{model: A}, {model: B}], parameters: {t: [0, 1]}}
  decoder: {slices: [{sources: [{model: A, layer_range: [1, 2]}, {model: B, layer_range: [1, 2]}]}], parameters: {t: 0.5}}
"""
    names = ["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "decoder.block.1.w", "shared.weight"]
    models = [model(label, names, {"num_layers": 2, "num_decoder_layers": 2}) for label in "AB"]
    found = bind(text, *models)
    assert {name: values["t"] for name, values in parameters(found).items()} == {
        "encoder.block.0.w": 0, "encoder.block.1.w": 1, "decoder.block.0.w": 0.5,
    }  # fmt: skip
    assert found.config_changes == {"num_decoder_layers": 1}
    assert found.copied == {"shared.weight": models[0].tensors["shared.weight"]}
    assert found.notes == ("1 tensors are in none of the modules and are copied from A",)


def test_modules_of_models_that_see() -> None:
    text = """
merge_method: slerp
modules:
  text_decoder: {models: [{model: A}, {model: B}], parameters: {t: 0.1}}
  vision_tower: {models: [{model: A}, {model: B}], parameters: {t: 0.2}}
  multi_modal_projector: {models: [{model: A}, {model: B}], parameters: {t: 0.3}}
"""
    names = ["model.language_model.layers.0.w", "lm_head.bias", "model.visual.blocks.0.w", "visual.merger.mlp.0.w"]
    found = parameters(bind(text, model("A", names), model("B", names)))
    assert [found[name]["t"] for name in names] == [0.1, 0.1, 0.2, 0.3]
    only_text = yaml.safe_load(text)
    del only_text["modules"]["vision_tower"], only_text["modules"]["multi_modal_projector"]
    assert list(bind(yaml.dump(only_text), model("A", names), model("B", names)).copied) == names[2:]


def test_a_module_that_is_not_there() -> None:
    text = "merge_method: karcher\nmodules: {vision: {models: [{model: A}]}}"
    with pytest.raises(
        MergeError, match=r"modules.vision: A has no tensors of a module vision; its names begin with model.embed"
    ):
        bind(text, llama("A"))


def test_modules_that_overlap_take_the_longer_name() -> None:
    text = "merge_method: passthrough\nmodules: {a: {models: [{model: A}]}, a.b: {models: [{model: B}]}}"
    found = origins(bind(text, model("A", ["a.b.w", "a.w"]), model("B", ["a.b.w", "a.w"])))
    assert found == {"a.w": ["A:a.w"], "a.b.w": ["B:a.b.w"]}


# Tensors that do not fit


def test_all_that_does_not_fit_is_said_at_once() -> None:
    short, wide = dict(llama("A").tensors), dict(llama("B").tensors)
    del short["model.norm.weight"]
    wide["model.layers.1.mlp.up_proj.weight"] = Tensor("x", (4, 5))
    wide["extra"] = Tensor("extra", (1,))
    wide["model.layers.2.mlp.up_proj.weight"] = Tensor("x", (4, 4), "int64")
    with pytest.raises(MismatchError) as caught:
        bind(LINEAR, Model("A", short, {}), Model("B", wide, {}))
    assert str(caught.value).splitlines() == [
        'B, "model.layers.1.mlp.up_proj.weight": shape (4, 5), but A has (4, 4); '
        "only models of the same architecture can be merged",
        'B, "model.layers.2.mlp.up_proj.weight": dtype int64, but A has float32; '
        "integers can only be copied where all models agree",
        'A lacks "model.norm.weight", for "model.norm.weight" of B',
        'A lacks "extra", for "extra" of B',
    ]


def test_vocabularies_of_different_size() -> None:
    with pytest.raises(MismatchError, match="the vocabularies differ; resize the embeddings"):
        bind(LINEAR, llama("A"), llama("B", vocabulary=9))


def test_buffers_that_some_models_have() -> None:
    old = dict(llama("B").tensors) | {"model.layers.0.self_attn.rotary_emb.inv_freq": Tensor("x", (2,))}
    found = bind(LINEAR, llama("A"), Model("B", old, {}))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in parameters(found)
    assert "left out: model.layers.0.self_attn.rotary_emb.inv_freq" in found.notes[0]


def test_what_is_not_merged_is_copied() -> None:
    text = """
merge_method: linear
slices: [{sources: [{model: A, layer_range: [2, 3]}, {model: B, layer_range: [1, 2]}]}]
parameters: {weight: 1}
"""
    found = bind(text, llama("A"), llama("B"), names=lambda name: "mlp" not in name)
    assert {name: (source.name, source.model) for name, source in found.copied.items()} == {  # type: ignore[attr-defined]
        "model.layers.0.mlp.up_proj.weight": ("model.layers.2.mlp.up_proj.weight", "A")
    }
    assert "model.layers.0.mlp.up_proj.weight" not in parameters(found)
    base = "merge_method: wise_ft\nbase_model: A\nmodels: [{model: B}]"
    copied = bind(base, llama("A"), llama("B"), names=lambda name: "norm" in name).copied
    assert {source.model for source in copied.values()} == {"A"}  # type: ignore[attr-defined]


# Heads that are tied to the embedding


def test_an_embedding_stands_in_for_a_tied_head() -> None:
    tied = llama("B", head=False, tie_word_embeddings=True)
    found = bind(LINEAR, llama("A"), tied)
    assert origins(found)["lm_head.weight"] == ["A:lm_head.weight", "B:model.embed_tokens.weight"]
    assert "stands in" in found.notes[0]
    nested = Model("B", tied.tensors, {"text_config": {"tie_word_embeddings": True}})
    assert origins(bind(LINEAR, llama("A"), nested))["lm_head.weight"][1] == "B:model.embed_tokens.weight"


def test_a_config_that_does_not_say_whether_a_missing_head_is_tied() -> None:
    silent = Model("B", llama("B", head=False).tensors, {"model_type": "gpt2"})
    assert origins(bind(LINEAR, llama("A"), silent))["lm_head.weight"][1] == "B:model.embed_tokens.weight"
    wide = Model("B", llama("B", head=False, vocabulary=9).tensors, {})
    with pytest.raises(MismatchError, match=r'B lacks "lm_head\.weight"'):
        bind(LINEAR, llama("A"), wide)


def test_an_output_inside_a_layer_is_no_head() -> None:
    names = ["encoder.layer.0.attention.output.weight", "wte.weight"]
    assert list(parameters(bind(LINEAR, *(model(label, names, {"tie_word_embeddings": True}) for label in "AB")))) == names


def test_a_head_that_is_missing_and_not_tied() -> None:
    with pytest.raises(MismatchError, match=r'B lacks "lm_head\.weight"'):
        bind(LINEAR, llama("A"), llama("B", head=False))


def test_no_model_has_a_head() -> None:
    found = bind(LINEAR, *(llama(label, head=False, tie_word_embeddings=True) for label in "AB"))
    assert "lm_head.weight" not in parameters(found)
    assert found.notes == ()


def test_the_head_is_left_out_where_the_donor_is_tied() -> None:
    for donor in (llama("A", head=False, tie_word_embeddings=True), llama("A", tie_word_embeddings=True)):
        found = bind(LINEAR, donor, llama("B"))
        assert "lm_head.weight" not in {*parameters(found), *found.copied}
        assert "left out" in found.notes[0]


# The files beside the weights


def test_dtypes() -> None:
    found = bind(LINEAR + "dtype: torch.bfloat16", llama("A", dtype="float32", text_config={"dtype": "float32"}), llama("B"))
    assert found.out_dtype == "bfloat16"
    assert found.config_changes == {"dtype": "bfloat16", "text_config.dtype": "bfloat16"}
    assert any("computed in float32" in note for note in found.notes)
    found = bind(LINEAR + "dtype: float32\nout_dtype: float16", llama("A"), llama("B"))
    assert (found.out_dtype, found.config_changes, found.notes) == ("float16", {"torch_dtype": "float16"}, ())


def tokenizer(folder: Path, tokens: list[str], **more: Any) -> dict[str, Path]:
    folder.mkdir()
    content = {"model": {"vocab": {token: index for index, token in enumerate(tokens)}}, "added_tokens": [], **more}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return {"tokenizer.json": folder / "tokenizer.json"}


def test_tokenizers(tmp_path: Path) -> None:
    same = [Model(label, llama(label).tensors, {}, tokenizer(tmp_path / label, ["x", "y"])) for label in "AB"]
    assert bind(LINEAR + "tokenizer_source: B", *same).tokenizer == ModelRef("B")
    assert bind(LINEAR + "tokenizer: {source: B}", *same).tokenizer == ModelRef("B")
    assert bind(LINEAR + "tokenizer_source: base", *same).tokenizer is None
    assert bind(LINEAR + "tokenizer_source: A", *same).tokenizer is None
    other = Model("B", llama("B").tensors, {}, tokenizer(tmp_path / "other", ["y", "x"]))
    for source in ("A", "B", "base"):
        with pytest.raises(MergeError, match=r"the vocabulary of . \(2 tokens\) is not that of . \(2\); reordering"):
            bind(LINEAR + f"tokenizer_source: {source}", same[0], other)
    bind(LINEAR, same[0], other)


def test_kinds_of_vocabulary_files(tmp_path: Path) -> None:
    def opened(**files: str) -> Model:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("_json", ".json").replace("_txt", ".txt")).write_text(content)
        return Model("M", {}, None, {path.name: path for path in folder.iterdir()})

    wordpiece = opened(tokenizer_json='{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "c", "id": 2}]}')
    unigram = opened(
        tokenizer_json='{"model": {"vocab": [["a", -1.5], ["b", -2]]}, "added_tokens": [{"content": "c", "id": 2}]}'
    )
    two_files = opened(vocab_json='{"a": 0, "b": 1}', added_tokens_json='{"c": 2}')
    lines = opened(vocab_txt="a\nb\nc\n")
    other = opened(vocab_txt="a\nc\nb\n")
    without = opened()
    assert tokenizer_problems(wordpiece, [wordpiece, unigram, two_files, lines, without]) == []
    assert len(tokenizer_problems(wordpiece, [other, lines])) == 1
    assert tokenizer_problems(without, [other]) == []
    for broken in ("{", "[]", '{"model": 3}'):
        tokenizer_problems(opened(tokenizer_json=broken), [wordpiece])
    assert "tokenizer.json: cannot be read" in tokenizer_problems(opened(tokenizer_json="{"), [])[0]


def test_chat_templates(tmp_path: Path) -> None:
    def with_template(label: str, name: str, content: str) -> Model:
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / name).write_text(content)
        return Model(label, llama(label).tensors, {}, {name: tmp_path / label / name})

    text = "merge_method: karcher\nmodels: [{model: A}, {model: B}, {model: C}]\nchat_template: "
    a = with_template("A", "chat_template.jinja", "{{ one }}\n")
    b = with_template("B", "tokenizer_config.json", json.dumps({"chat_template": "{{ two }}"}))
    named = [{"name": "tool_use", "template": "{{ x }}"}, {"name": "default", "template": "{{ two }}"}]
    c = with_template("C", "chat_template.json", json.dumps({"chat_template": named}))
    assert bind(text + "auto", a, b, c).chat_template == "{{ two }}"
    assert bind(text + "auto", a, b, llama("C")).chat_template == "{{ one }}"  # the first of equally many
    assert bind(text + '"{{ messages }}"', a, b, c).chat_template == "{{ messages }}"
    assert bind(text + "chatml", a, b, c).chat_template == TEMPLATES["chatml"]
    none = bind(text + "auto", llama("A"), llama("B"), llama("C"))
    assert none.chat_template is None
    assert "none of the models" in none.notes[0]
    assert bind(LINEAR, llama("A"), llama("B")).chat_template is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n"),
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                   "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n[|assistant|]"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
                   "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]"),
    ],
)  # fmt: skip
def test_a_conversation_in_each_format(name: str, expected: str) -> None:
    messages = [
        {"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), "SUAV", strict=True)
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders
    text = environment.from_string(TEMPLATES[name]).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert text == expected


def test_models_from_files(tmp_path: Path) -> None:
    from mergekit_cl.checkpoint.reference import open_reference

    for label in "AB":
        tokens = tokenizer(tmp_path / label, ["x"])
        tokens["tokenizer.json"].with_name("config.json").write_text('{"num_hidden_layers": 2, "tie_word_embeddings": false}')
        names = ["model.layers.0.w", "model.layers.1.w", "lm_head.weight"]
        save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / label / "model.safetensors")
    recipe = read_recipe(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {tmp_path}/A, layer_range: [1, 2]}}]
  - sources: [{{model: {tmp_path}/B, layer_range: [0, 2]}}]
tokenizer_source: {tmp_path}/B
chat_template: chatml
dtype: float16
""")
    opened = {ref: open_reference(ref) for ref in recipe.models}
    found = assemble(recipe, opened)
    assert {name: sources[0].files[0].path.parent.name for part in found.parts for name, sources in part.tensors.items()} == {
        "model.layers.0.w": "A", "model.layers.1.w": "B", "model.layers.2.w": "B", "lm_head.weight": "B",
    }  # fmt: skip
    assert found.tokenizer == ModelRef(f"{tmp_path}/B")
    assert found.config_changes == {"num_hidden_layers": 3, "torch_dtype": "float16"}
    for each in opened.values():
        each.checkpoint.close()


# As YAML again


EXAMPLES = {
    "linear": LINEAR + "parameters: {normalize: true}\ndtype: float16",
    "gradient slerp": """
slices:
  - sources:
      - model: A
        layer_range: [0, 4]
      - model: B
        layer_range: [0, 4]
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "ties": """
models:
  - model: A
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: C
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: D
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "passthrough": """
slices:
  - sources:
    - model: A
      layer_range: [0, 3]
  - sources:
    - model: B
      layer_range: [1, 4]
merge_method: passthrough
dtype: float16
""",
    "model stock": "models: [{model: A}, {model: B}]\nmerge_method: model_stock\nbase_model: C\ndtype: bfloat16",
    "dare ties": """
models:
  - model: C
  - model: A
    parameters: {density: 0.53, weight: 0.4}
  - model: B
    parameters: {density: 0.53, weight: [0.1, 0.3]}
merge_method: dare_ties
base_model: C
parameters: {int8_mask: true}
""",
    "dare linear": """
models: [{model: A, parameters: {weight: 0.4, density: 0.5}}, {model: B, parameters: {weight: 0.6}}]
merge_method: dare_linear
base_model: C
parameters: {rescale: false, lambda: 0.8}
""",
    "breadcrumbs": """
models: [{model: A, parameters: {weight: 0.4, density: 0.9, gamma: 0.02}}, {model: B, parameters: {weight: 0.6}}]
merge_method: breadcrumbs
base_model: C
""",
    "breadcrumbs ties": """
models: [{model: A, parameters: {weight: 0.4, density: [0.9, 0.5]}}, {model: B, parameters: {weight: 0.6}}]
merge_method: breadcrumbs_ties
base_model: C
parameters: {density: 0.8, normalize: 1}
""",
    "task arithmetic": """
models: [{model: A, parameters: {weight: [1, 0.2, 0.5]}}, {model: B, parameters: {weight: {filter: mlp, value: 2}}}]
merge_method: task_arithmetic
base_model: C
parameters: {weight: 0.5, normalize: {filter: attn, value: true}}
""",
    "nuslerp": """
models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: [0.3, 0.9]}}]
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: [true, false]}
""",
    "multislerp": """
models: [{model: A, parameters: {weight: 0.3}}, {model: B, parameters: {weight: 0.3}}, {model: C, parameters: {weight: 0.4}}]
merge_method: multislerp
base_model: D
parameters: {normalize_weights: false, eps: 1e-6}
""",
    "della": """
models:
  - {model: A, parameters: {weight: 0.4, density: 0.9, epsilon: 0.05}}
  - {model: B, parameters: {weight: [0.6, 0.1], density: {filter: mlp, value: 0.3}}}
merge_method: della
base_model: C
parameters: {density: [0.6, 0.7], epsilon: 0.1, lambda: 1.1}
""",
    "della linear": """
models: [{model: A, parameters: {weight: 0.4}}, {model: B, parameters: {weight: 0.6}}]
merge_method: della_linear
base_model: C
parameters: {density: 0.5, normalize: true, rescale: false}
""",
    "sce": "models: [{model: A}, {model: B}]\nmerge_method: sce\nbase_model: C\nparameters: {select_topk: [0.1, 0.5]}",
    "arcee fusion": "models: [{model: A}, {model: B}]\nmerge_method: arcee_fusion\nbase_model: A",
    "nearswap": """
models: [{model: A}]
merge_method: nearswap
base_model: B
parameters: {t: [{filter: mlp, value: 1e-4}, {value: 1}]}
""",
    "ram": "models: [{model: A}, {model: B}]\nmerge_method: ram\nbase_model: C\nparameters: {epsilon: [1e-4, 1e-5]}",
    "ramplus": "models: [{model: A}, {model: B}]\nmerge_method: ramplus_tl\nbase_model: C\nparameters: {r: 0.2, alpha: 1}",
    "karcher": "models: [{model: A}, {model: B}]\nmerge_method: karcher\nparameters: {max_iter: 20, tol: 1e-7}",
    "modules": """
merge_method: slerp
base_model: A
modules:
  default:
    slices:
      - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [2, 4]}]
      - sources: [{model: B, layer_range: [1, 2]}, {model: A, layer_range: [3, 4]}]
        parameters: {t: {filter: layers.2, value: 0.9}}
    parameters: {t: [{filter: up_proj, value: [0, 1]}, {filter: norm, value: 0.25}]}
parameters: {t: 0.5}
""",
    "linear with a base": """
merge_method: linear
base_model: C
models: [{model: A, parameters: {weight: {filter: norm, value: 3}}}, {model: B}]
parameters: {weight: [1, 2], normalize: false}
""",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_is_the_same_recipe(name: str) -> None:
    recipe = read_recipe(EXAMPLES[name])
    text = recipe_text(recipe)
    assert read_recipe(text) == recipe
    assert recipe_text(read_recipe(text)) == text
    assert yaml.safe_load(text) == yaml.safe_load(EXAMPLES[name])


def test_options_of_our_own() -> None:
    text = LINEAR + "mergekit_cl: {seed: 3, only: '*.mlp.*', exclude: [a, b]}"
    recipe = read_recipe(text)
    assert recipe.options == Options(3, ("*.mlp.*",), ("a", "b"))
    assert read_recipe(recipe_text(recipe)).options == recipe.options
    other = read_recipe(recipe_text(recipe, Options(seed=4)))
    assert other.options == Options(4)
    assert read_recipe(recipe_text(other, Options())) == read_recipe(LINEAR)
    assert "mergekit_cl" not in recipe_text(read_recipe(LINEAR))


def test_every_method_with_all_of_its_parameters_spelled_out() -> None:
    for name, chosen in methods().items():
        if chosen.companions:
            continue
        count = max(chosen.least, 2 if name == "slerp" else 1)
        values = {
            p.name.rstrip("_"): (1 if p.type is int else 0.5) if p.required else _default(p) for p in chosen.parameters.values()
        }
        recipe = {"merge_method": name, "models": [{"model": label} for label in "ABC"[:count]], "parameters": values}
        if chosen.base == "required":
            recipe["base_model"] = "D"
        found = bind(yaml.safe_dump(recipe), *map(llama, "ABCD"))
        (part,) = found.parts
        assert part.models == count
        resolved = chosen.resolve(part.parameters, count)
        assert resolved == chosen.resolve({p.name: values[p.name.rstrip("_")] for p in chosen.parameters.values()}, count)


def _default(parameter: Parameter) -> Any:
    return parameter.default[0] if isinstance(parameter.default, tuple) else parameter.default


def test_anchors_are_written_out() -> None:
    recipe = read_recipe("""
merge_method: linear
models:
  - {model: A, parameters: &same {weight: 0.25}}
  - {model: B, parameters: {<<: *same}}
  - {model: C, parameters: *same}
""")
    text = recipe_text(recipe)
    assert "&" not in text
    assert read_recipe(text) == recipe


# Against mergekit's own planner


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that lets mergekit plan a recipe for models of four layers."""
    pytest.importorskip("mergekit.plan")
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    root = tmp_path_factory.mktemp("models")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 4, "vocab_size": 8,
        "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    for label in "ABCD":
        (root / label).mkdir()
        (root / label / "config.json").write_text(json.dumps(config))
        save_file({"lm_head.weight": np.zeros((8, 4), np.float32)}, root / label / "model.safetensors")

    def plan(text: str) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]]:
        tree = json.loads(json.dumps(yaml.safe_load(text)))

        def absolute(value: Any, key: str = "") -> Any:
            if isinstance(value, dict):
                return {name: absolute(item, name) for name, item in value.items()}
            if isinstance(value, list):
                return [absolute(item) for item in value]
            return str(root / value) if key in ("model", "base_model") else value

        recipe = MergeConfiguration.model_validate(absolute(tree))
        options = MergeOptions()
        LoaderCache().setup(options=options)
        planner = MergePlanner(recipe, get_architecture_info(recipe, options), options, recipe.referenced_models()[0].config())
        planner._plan()
        found = {}
        for weight, task in planner._tensors:
            inputs = {Path(str(model)).name: info.name for model, info in _gathered(task).items()}
            own = {Path(str(model)).name: dict(values.items()) for model, values in task.input_parameters.items()}
            found[weight.name] = (dict(task.parameters.items()), own, [f"{label}:{inputs[label]}" for label in inputs])
        return found

    return plan


def _gathered(task: Any) -> dict[Any, Any]:
    return dict(task.gather_tensors.weight_info.items())


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6) | st.lists(st.booleans(), min_size=1, max_size=4), st.floats(0, 1)
)
def test_the_same_gradients_as_mergekit(values: list[Any], t: float) -> None:
    theirs = pytest.importorskip("mergekit.config").evaluate_setting("w", values, t, validate=lambda value: value)
    assert Condition(None, tuple(values)).at(t) == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_tensors_and_parameters_as_mergekit(name: str, planned: Any) -> None:
    theirs = planned(EXAMPLES[name])
    models = [model_with(label, theirs) for label in "ABCD"]
    found = bind(EXAMPLES[name], *models)
    sources = origins(found)
    assert set(sources) == set(theirs)
    for part in found.parts:
        for tensor in part.tensors:
            shared, own, inputs = theirs[tensor]
            assert sorted(inputs) == sorted(sources[tensor])
            labels = part.labels[: part.models]
            expected = dict(shared)
            for parameter in {p for values in own.values() for p in values}:
                expected[parameter] = [own[label][parameter] for label in labels]
            given_parameters = {key.rstrip("_"): value for key, value in part.parameters.items()}
            expected.pop("int8_mask", None)
            if "combine" in given_parameters:
                expected["combine"] = "weight_mean" if expected.pop("normalize") else "sum"
            if "rescale" in given_parameters:
                expected["rescale"] = "l1" if expected["rescale"] else None
            if found.method == "task_arithmetic":
                del expected["density"], expected["rescale"]
            if found.method == "passthrough":
                assert expected.pop("scale") == [None]
            assert given_parameters == expected


def model_with(label: str, planned: Mapping[str, Any]) -> Model:
    """A model that has what the architecture of the plan has, in four layers."""
    suffixes = {name.split(".", 3)[3] for name in planned if ".layers." in name}
    names = [f"model.layers.{layer}.{suffix}" for layer in range(4) for suffix in sorted(suffixes)]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return model(label, names, {"num_hidden_layers": 4, "tie_word_embeddings": False})


def test_densities_beyond_their_range_are_taken_as_its_ends() -> None:
    recipe = read_recipe("merge_method: ties\nbase_model: A\nmodels: [{model: B}]\nparameters: {weight: 1, density: [1.5, -2]}")
    assert recipe.parameters["density"][0].values == (1.0, 0.0)
    assert any("a density of 1.5 is taken as 1" in note for note in recipe.notes)
