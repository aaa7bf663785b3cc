"""Merges into files, as ``merge(..., out=path)`` and recipes ask for them: what is merged, what is copied, what lies beside."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from mergekit_cl import CheckpointError, MergeError, MismatchError, UnknownNameError, merge, methods
from mergekit_cl.api import prepare_files
from mergekit_cl.checkpoint.folder import open_checkpoint
from mergekit_cl.file_merge import FileMerge, prepare_recipe
from mergekit_cl.recipe import read_recipe
from mergekit_cl.report import Report

Array: TypeAlias = npt.NDArray[Any]

CODES = {
    "bool": "BOOL", "uint8": "U8", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
}  # fmt: skip
TYPES = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in CODES.items()}


def save(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, of any dtype that the format has."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return path


def load(path: Path) -> dict[str, Array]:
    """Read a file, or all files of a folder, with nothing but what the format says."""
    tensors = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(raw[start + begin : start + end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def shown(model: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (tensor.dtype.name, tensor.shape, tensor.tobytes()) for name, tensor in model.items()}

    return shown(one) == shown(other)


def tensors_of(number: int, dtype: Any = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(number)
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (9, 4),
        "layers.0.weight": (4, 4),
        "layers.1.weight": (4, 4),
        "bias": (3,),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def folder(path: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None, **files: str) -> Path:
    path.mkdir()
    save(path / "model.safetensors", tensors, {"format": "pt", "made_by": path.name})
    (path / "config.json").write_text(json.dumps(config or {"model_type": "tiny", "torch_dtype": "float32"}))
    for name, text in files.items():
        (path / name.replace("_DOT_", ".")).write_text(text)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Four checkpoints: three folders and a file."""
    made = [folder(tmp_path / f"model{number}", tensors_of(number)) for number in range(3)]
    return [*made, save(tmp_path / "model3.safetensors", tensors_of(3))]


# What is not merged is copied


@pytest.mark.parametrize(
    ("options", "merged"),
    [
        ({"only": "layers.*"}, {"layers.0.weight", "layers.1.weight"}),
        ({"exclude": ["embed*", "bias"]}, {"layers.0.weight", "layers.1.weight"}),
        ({"only": ["layers.*", "bias"], "exclude": "*.1.*"}, {"layers.0.weight", "bias"}),
        ({"exclude": "*"}, set()),
    ],
)
@pytest.mark.parametrize("has_base", [False, True])
def test_only_and_exclude(options: dict[str, Any], merged: set[str], has_base: bool, paths: list[Path], tmp_path: Path) -> None:
    models = [load(path) for path in paths]
    name, base = ("task_arithmetic", 0) if has_base else ("sfa", None)
    inputs = [1, 2, 3] if has_base else [2, 1, 0]
    whole = merge([models[k] for k in inputs], name, base=None if base is None else models[base])
    donor = models[inputs[0] if base is None else base]
    expected = {key: whole[key] if key in merged else donor[key] for key in whole}
    given, given_base = [models[k] for k in inputs], None if base is None else models[base]
    assert same(merge(given, name, base=given_base, **options), expected)
    modules = [{key: torch.from_numpy(tensor.copy()) for key, tensor in model.items()} for model in models]
    found = merge([modules[k] for k in inputs], name, base=None if base is None else modules[base], **options)
    assert same({key: tensor.numpy() for key, tensor in found.items()}, expected)
    out = merge(
        [paths[k] for k in inputs], name, base=None if base is None else paths[base], out=tmp_path / "merged", **options
    )
    assert same(load(out), expected)
    target = {key: tensor.copy() for key, tensor in given[0].items()}
    assert merge(given, name, base=given_base, out=target, **options) is target
    assert same(target, expected)
    assert same(merge([paths[k] for k in inputs], name, base=None if base is None else paths[base], **options), expected)


def test_only_of_a_module(tmp_path: Path) -> None:
    modules = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    merged = merge(modules, "linear", only="0.*")
    assert isinstance(merged, torch.nn.Sequential)
    for key, value in merged.state_dict().items():
        average = (before[0][key].double() + before[1][key].double()) / 2
        assert torch.allclose(value.double(), average if key.startswith("0.") else before[0][key].double(), atol=1e-6)
        assert key.startswith("0.") or torch.equal(value, before[0][key])
    assert merge(modules, "linear", only="0.*", out=modules[1]) is modules[1]
    for key, value in modules[1].state_dict().items():
        assert torch.equal(value, merged.state_dict()[key])
    assert all(torch.equal(value, before[0][key]) for key, value in modules[0].state_dict().items())
    with pytest.raises(MergeError, match=r'exclude: "2\.\*" matches no tensor; names are such as 0.weight, 0.bias'):
        merge(modules, "linear", exclude="2.*")
    with pytest.raises(MergeError, match='only: "x" matches no tensor'):
        merge([np.ones(3), np.ones(3)], "linear", only="x")


@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_copied_need_not_fit_together(in_file: bool, tmp_path: Path) -> None:
    """Shapes differ, dtypes differ and cannot be merged, integers differ, or the other models lack it."""
    eighths = np.arange(256, dtype=np.uint8)
    strange = {
        "scale": eighths.view(ml_dtypes.float8_e8m0fnu),
        "wave": np.arange(6, dtype=np.complex64) * 1j,
        "eight": eighths.view(ml_dtypes.float8_e4m3fn),  # also its NaN
        "nan": np.array([np.nan, np.inf, -0.0], np.float16).view(np.uint16).view(np.float16),
    }
    first = {
        "w": np.ones(3, np.float32),
        "head": np.ones((5, 2), np.float32),
        "steps": np.arange(3),
        "own": np.ones(2, np.float64),
    }
    second = {
        "w": np.full(3, 2, np.float32),
        "head": np.ones((7, 2), np.float16),
        "steps": np.arange(9),
        "own more": np.ones(1),
    }
    globs = ["head", "steps", "own*", "nan", *(strange if in_file else ())]
    first |= strange if in_file else {"nan": strange["nan"]}
    if in_file:
        paths = [save(tmp_path / f"{k}.safetensors", tensors) for k, tensors in enumerate((first, second))]
        merged = load(merge(paths, "linear", exclude=globs, out=tmp_path / "out"))
    else:
        merged = merge([first, second], "linear", exclude=globs)
        with pytest.raises(MismatchError, match='model 1 has tensor "own more"'):
            merge([first, second], "linear", exclude=["head", "steps", "own", "nan"])
    assert same(merged, first | {"w": np.full(3, 1.5, np.float32)})


@pytest.mark.parametrize("in_file", [False, True])
def test_a_glob_may_be_for_what_only_other_models_have(in_file: bool, paths: list[Path], tmp_path: Path) -> None:
    more = load(paths[1]) | {"adapter.weight": np.ones(3, np.float32)}
    if in_file:
        merge([paths[0], save(tmp_path / "more.safetensors", more)], "linear", exclude="adapter.*", out=tmp_path / "out")
        merged = load(tmp_path / "out")
    else:
        merged = merge([load(paths[0]), more], "linear", exclude="adapter.*")
    assert same(merged, merge(paths[:2], "linear"))


# Dtypes


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_is_widened_exactly(dtype: Any, tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8).view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))]
    models = [{"w": finite, "v": np.resize(finite, 70_000)}, {"w": finite[::-1].copy(), "v": np.resize(finite[3:], 70_000)}]
    paths = [save(tmp_path / f"{k}.safetensors", tensors) for k, tensors in enumerate(models)]
    merged = load(merge(paths, "linear", weight=[0.25, 0.5], normalize=False, out=tmp_path / "out.safetensors"))
    for name, tensor in merged.items():
        one, other = (model[name].astype(np.float32) for model in models)
        assert tensor.dtype == ml_dtypes.bfloat16
        assert tensor.tobytes() == (np.float32(0.25) * one + np.float32(0.5) * other).astype(ml_dtypes.bfloat16).tobytes()
    alone = load(merge(paths[:1], "passthrough", out=tmp_path / "alone.safetensors"))["w"]
    assert alone.tobytes() == finite.astype(ml_dtypes.bfloat16).tobytes()
    assert (alone.astype(np.float32) == finite.astype(np.float32)).all()
    assert merge(paths[:1], "passthrough")["w"].tobytes() == alone.tobytes()
    wide = load(
        merge([paths[0], {"w": finite.astype(np.float32), "v": np.zeros(70_000)}], "sfa", out=tmp_path / "wide.safetensors")
    )
    assert wide["w"].tobytes() == alone.tobytes()
    with pytest.raises(MergeError, match=r'0\.safetensors, tensor "w".*(NaN|Inf)'):
        merge([save(paths[0], {"w": every}), save(paths[1], {"w": every})], "linear", out=tmp_path / "nan.safetensors")


def test_quantised_checkpoints_and_other_dtypes_are_refused_together(tmp_path: Path) -> None:
    one = save(tmp_path / "0.safetensors", {"w": np.ones(3, np.complex64), "v": np.ones(3, ml_dtypes.float8_e8m0fnu)})
    with pytest.raises(MergeError) as caught:
        merge([one, one], "linear", out=tmp_path / "out")
    assert 'tensor "w": dtype complex64 cannot be merged' in str(caught.value)
    assert 'tensor "v": dtype float8_e8m0fnu cannot be merged' in str(caught.value)
    scaled = {"a.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "a.weight_scale_inv": np.ones((1, 1), np.float32)}
    for tensors, config in ((scaled, {}), (tensors_of(0), {"quantization_config": {"quant_method": "fp8"}})):
        path = folder(tmp_path / f"quantised{len(config)}", tensors, config or {"model_type": "x"})
        with pytest.raises(CheckpointError, match="is quantised"):
            merge([path, path], "linear", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_checkpoints_are_refused_in_memory_too(tmp_path: Path) -> None:
    path = folder(tmp_path / "quantised", tensors_of(0), {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match="is quantised"):
        merge([path, path], "linear")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16, np.float64])
def test_out_dtype(dtype: Any, paths: list[Path], tmp_path: Path) -> None:
    merge(paths[:2], "linear", out=tmp_path / "out", out_dtype=dtype)
    merged = load(tmp_path / "out")
    assert same(merged, merge([load(path) for path in paths[:2]], "linear", out_dtype=dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "tiny", "torch_dtype": merged["bias"].dtype.name}
    again = merge([tmp_path / "out"], "passthrough", out=tmp_path / "again")
    assert same(load(again), merged)


def test_a_config_says_the_dtype_where_it_did_before(tmp_path: Path) -> None:
    config = {"dtype": "float32", "zeta": [1, {"a": None}], "text": "é"}
    path = folder(tmp_path / "model", tensors_of(0), config)
    merge([path], "passthrough", out=tmp_path / "out", out_dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    merge([path], "passthrough", out=tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == (path / "config.json").read_bytes()


# Adapters


def adapter(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    path.mkdir()
    factors = {
        "base_model.model.layers.0.lora_A.weight": rng.standard_normal((2, 4)).astype(np.float32),
        "base_model.model.layers.0.lora_B.weight": rng.standard_normal((4, 2)).astype(np.float32),
    }
    save(path / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"], "base_model_name_or_path": "base"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def change_of(path: Path) -> Array:
    """Return scale * B @ A of the one module, in float64."""
    factors = load(path)
    a, b = (np.concatenate([factors[name] for name in factors if f"lora_{letter}" in name]) for letter in "AB")
    config = json.loads((path / "adapter_config.json").read_text())
    change: Array = config["lora_alpha"] / config["r"] * (b.astype(np.float64) @ a.astype(np.float64))
    return change


@pytest.mark.parametrize("into_file", [False, True])
def test_an_adapter_is_applied_as_its_base_is_read(into_file: bool, paths: list[Path], tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora")
    given = [f"{paths[0]}+{lora}", str(paths[1])]
    merged = load(merge(given, "linear", out=tmp_path / "out")) if into_file else merge(given, "linear")
    one, other = load(paths[0]), load(paths[1])
    one["layers.0.weight"] = (one["layers.0.weight"] + change_of(lora)).astype(np.float32)
    for name, tensor in merge([one, other], "linear").items():
        assert np.allclose(merged[name], tensor, rtol=1e-6, atol=1e-6)
        assert name == "layers.0.weight" or merged[name].tobytes() == tensor.tobytes()
    if into_file:
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        again = prepare_recipe(read_recipe(tmp_path / "out" / "recipe.yml"), tmp_path / "again")
        again.run()
        assert same(load(tmp_path / "again"), merged)


def test_a_patched_tensor_is_not_copied(paths: list[Path], tmp_path: Path) -> None:
    """Or, where nothing of it is patched, byte for byte."""
    lora = adapter(tmp_path / "lora")
    given = [f"{paths[0]}+{lora}", paths[1]]
    with pytest.raises(MergeError, match=r'"layers\.0\.weight": is left out of the merge.* has an adapter to be applied'):
        merge(given, "linear", exclude="layers.*", out=tmp_path / "out")
    merged = load(merge(given, "linear", exclude="layers.1*", out=tmp_path / "out"))
    assert merged["layers.1.weight"].tobytes() == load(paths[0])["layers.1.weight"].tobytes()


def test_adapters_are_not_averaged(paths: list[Path], tmp_path: Path) -> None:
    given = [adapter(tmp_path / f"lora{k}", k) for k in range(2)]
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        with pytest.raises(CheckpointError) as caught:
            merge(given, "linear", out=out)
        assert "cat" in str(caught.value)
        assert "svd" in str(caught.value)
        assert not out.exists()
    with pytest.raises(MergeError):
        merge([paths[0], given[0]], "linear", out=tmp_path / "out")


def test_adapters_are_not_averaged_in_memory_either(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="svd"):
        merge([adapter(tmp_path / f"lora{k}", k) for k in range(2)], "linear")


def test_adapters_become_one(paths: list[Path], tmp_path: Path) -> None:
    given = [adapter(tmp_path / f"lora{k}", k) for k in range(2)]
    wanted = 0.5 * change_of(given[0]) - 2 * change_of(given[1])
    out = merge(given, "cat", weight=[0.5, -2], out=tmp_path / "cat")
    assert np.allclose(change_of(out), wanted, rtol=1e-5, atol=1e-5)
    assert {tensor.shape for tensor in load(out).values()} == {(4, 4)}
    merge([str(path) for path in given], "svd", weight=[0.5, -2], rank=1, out=str(tmp_path / "svd"))
    left, values, right = np.linalg.svd(wanted)
    assert np.allclose(change_of(tmp_path / "svd"), values[0] * np.outer(left[:, 0], right[0]), rtol=1e-4, atol=1e-4)
    merged = merge([f"{paths[0]}+{out}"], "passthrough")["layers.0.weight"]
    assert np.allclose(merged, load(paths[0])["layers.0.weight"] + wanted, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_with_a_merge_of_adapters(paths: list[Path], tmp_path: Path) -> None:
    given = [adapter(tmp_path / f"lora{k}", k) for k in range(2)]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"models": [*given, paths[0]]}, "model0: is not a LoRA adapter"),
        ({"base": paths[0]}, "leave base= away"),
        ({"rank": 1}, 'unknown parameter of cat "rank"'),
        ({"wieght": 1}, 'did you mean "weight"'),
        ({"weight": [1, 2, 3]}, "weight"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"method": "svd", "rank": "x"}, "rank"),
        ({"out": tmp_path / "out.safetensors"}, "an adapter is a folder"),
        ({"out": given[0]}, "inputs are never changed"),
    ]
    for options, message in wrong:
        with pytest.raises(MergeError, match=message):
            merge(**{"models": given, "method": "cat", "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_into_files_only(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="out="):
        merge([adapter(tmp_path / "lora")], "cat")


@pytest.mark.parametrize("option", ["only", "exclude"])
def test_globs_have_no_meaning_for_adapters(option: str, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=option):
        merge([adapter(tmp_path / "lora")], "cat", out=tmp_path / "out", **{option: "*layers*"})


@pytest.mark.parametrize("given", [[tensors_of(0), tensors_of(1)], [3], [None]], ids=["arrays", "number", "none"])
def test_models_in_memory_are_no_adapters(given: list[Any], tmp_path: Path) -> None:
    with pytest.raises(MergeError):
        merge(given, "cat", out=tmp_path / "out")


@pytest.mark.parametrize("given", ["//", {}, []], ids=["text", "mapping", "none"])
def test_adapters_come_in_a_list(given: Any, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"adapter|list"):
        merge(given, "cat", out=tmp_path / "out")


# What lies beside the weights


def test_companions_come_from_the_base_or_the_first_model(tmp_path: Path) -> None:
    made = [
        folder(
            tmp_path / f"model{k}", tensors_of(k), tokenizer_DOT_json=f"{{}} {k}", README_DOT_md="old", LICENSE="mine",
            optimizer_DOT_bin="no", **({"chat_template_DOT_jinja": "{{ x }}"} if k else {}),
        )
        for k in range(3)
    ]  # fmt: skip
    first = merge(made, "sfa", out=tmp_path / "first")
    assert sorted(os.listdir(first)) == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "recipe.yml",
        "tokenizer.json",
    ]
    assert (first / "tokenizer.json").read_text() == "{} 0"
    merge(made[:2], "task_arithmetic", base=made[2], out=tmp_path / "based")
    assert (tmp_path / "based" / "tokenizer.json").read_text() == "{} 2"
    assert (tmp_path / "based" / "chat_template.jinja").exists()
    assert open_checkpoint(first).metadata["made_by"] == "model0"
    assert open_checkpoint(first).metadata["format"] == "pt"
    single = merge(made, "sfa", out=tmp_path / "one.safetensors")
    assert open_checkpoint(single).metadata["made_by"] == "model0"
    assert same(load(single), load(first))


def test_the_model_card_says_what_was_done_and_never_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [folder(tmp_path / f"model{k}", tensors_of(k)) for k in range(2)]
    contents = []
    for now in (0.0, 2e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        out = merge(made, "linear", weight=[0.3, 0.7], out=tmp_path / "out", overwrite=True)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1]
    card = contents[0]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == [str(path) for path in made]
    assert "merge" in front["tags"]
    for part in ("linear", methods()["linear"].paper, "weight: 0.3", *map(str, made)):
        assert part in card
    assert contents[0]["recipe.yml"].decode().strip() in card


REPRODUCED: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": [0.3, 0.7, -0.5], "normalize": False}),
    ("linear", {"weight": 2, "out_dtype": "bfloat16"}),
    ("sfa", {"beta": 0.3}),
    ("wise_ft", {"alpha": 0.2}),
    ("passthrough", {"scale": 0.7}),
    ("passthrough", {}),
    ("task_arithmetic", {"weight": [1, 0.5, 0.25], "lambda_": 0.6, "normalize": True}),
    ("ties", {"density": [0.5, 1, 0.25], "lambda_": 1.5, "rescale": None}),
    ("ties", {"density": 0.5, "rescale": "l1", "elect": "unweighted", "combine": "sum", "scope": "model"}),
    ("ties", {"density": 0.5, "combine": "count_mean", "only": "layers.*"}),
    ("dare_ties", {"density": [0.5, 0.7, 0.9], "seed": 7, "rescale": "inverse_density"}),
    ("dare_linear", {"density": 0.5, "seed": 3, "rescale": None, "exclude": ["embed*", "bias"]}),
    ("breadcrumbs", {"density": 0.6, "gamma": [0.1, 0, 0.2], "rescale": "l1"}),
    ("breadcrumbs_ties", {"density": 0.6, "combine": "max"}),
    ("magnitude_prune", {"density": [1, 0.1, 0.5], "scope": "model"}),
    ("slerp", {"t": 0.25}),
    ("slerp", {"t": 0.25, "scope": "model"}),
    ("nuslerp", {"nuslerp_flatten": False, "weight": [0.2, 0.9]}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {"weight": [0.2, 0.9, 1], "eps": 1e-7}),
    ("multislerp", {"normalize_weights": False}),
    ("karcher", {"max_iter": 3, "tol": 1e-3}),
    ("karcher", {"weight": [1, 2, 3]}),
    ("model_stock", {"filter_wise": True}),
    ("model_stock", {}),
]


@pytest.mark.parametrize(("name", "options"), REPRODUCED, ids=str)
def test_the_recipe_makes_the_same_bytes_again(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = [folder(tmp_path / f"model{k}", tensors_of(k)) for k in range(4)]
    method = methods()[name]
    base = made[0] if method.base != "unused" else None
    models = made[1 : 1 + (1 if name == "slerp" else method.most or 3)]
    out = merge(models, name, base=base, out=tmp_path / "out", **options)
    recipe = read_recipe(out / "recipe.yml")
    assert recipe.options.seed == options.get("seed", 0)
    again = prepare_recipe(recipe, tmp_path / "again", **vars(recipe.options))
    assert again.run().copied == sum(key in options for key in ("exclude", "only")) * 2
    assert same(load(tmp_path / "again"), load(out))
    assert (tmp_path / "again" / "config.json").read_bytes() == (out / "config.json").read_bytes()
    text = (tmp_path / "again" / "recipe.yml").read_text()
    assert yaml.safe_load(text) == yaml.safe_load((out / "recipe.yml").read_text())


@pytest.mark.parametrize("options", [{"seed": 7}, {"only": "layers.*"}, {"exclude": ["bias"]}], ids=str)
def test_the_recipe_alone_says_the_seed_and_what_is_merged(options: dict[str, Any], paths: list[Path], tmp_path: Path) -> None:
    out = merge(paths[1:], "dare_linear", base=paths[0], density=0.5, out=tmp_path / "out", **options)
    prepare_recipe(read_recipe(out / "recipe.yml"), tmp_path / "again").run()
    assert same(load(tmp_path / "again"), load(out))
    assert (tmp_path / "again" / "recipe.yml").read_bytes() == (out / "recipe.yml").read_bytes()


# Models of several kinds, and what is wrong with them


def test_paths_arrays_and_modules_together(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    arrays = {"weight": np.ones((2, 3), np.float64), "bias": np.zeros(2, ml_dtypes.bfloat16)}
    path = save(tmp_path / "stored.safetensors", {"bias": np.ones(2, np.float16), "weight": np.ones((2, 3), np.float32)})
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    expected = merge([load(path), arrays, state], "linear")
    assert same(merge([path, arrays, module], "linear"), expected)
    assert same(load(merge([path, arrays, module], "linear", out=tmp_path / "out.safetensors")), expected)
    merge([module, path, arrays], "linear", out=tmp_path / "folder")
    assert sorted(os.listdir(tmp_path / "folder")) == ["model.safetensors"]
    target = {name: np.zeros_like(value) for name, value in load(path).items()}
    merge([path, arrays, module], "linear", out=target)
    assert same(target, expected)
    in_place = merge([module, path], "sfa", out=module)
    assert in_place is module
    with pytest.raises(MergeError, match="is in memory; merge it too, or pass files"):
        merge([module, path], "linear", exclude="bias", out=tmp_path / "new")


def test_a_single_array_has_no_name_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(MergeError):
        merge([np.ones(3), np.ones(3), {"": np.ones(4)}], "linear", out=tmp_path / "out")


def test_tied_tensors_of_a_module_are_written_once(tmp_path: Path) -> None:
    modules = []
    for _ in range(2):
        module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        module["head"].weight = module["embed"].weight
        modules.append(module)
    merged = load(merge(modules, "linear", out=tmp_path / "out.safetensors"))
    assert list(merged) == ["embed.weight"]
    average = (modules[0]["embed"].weight + modules[1]["embed"].weight).detach().numpy() / 2
    assert np.allclose(merged["embed.weight"], average, atol=1e-6)


def test_inputs_are_not_replaced(paths: list[Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    given = [paths[0], paths[3]]
    inside = paths[0] / "model.safetensors"
    for out in (paths[0], paths[3], tmp_path, inside, tmp_path / "x" / ".." / paths[0].name):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="inputs are never changed"):
                merge(given, "linear", out=out, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_a_model_that_exists_is_replaced_as_a_whole_where_asked_for(paths: list[Path], tmp_path: Path) -> None:
    old = folder(tmp_path / "out", tensors_of(9), old_DOT_json="{}")
    with pytest.raises(CheckpointError, match="exists; choose another name, or pass overwrite=True"):
        merge(paths[:2], "linear", out=old)
    assert same(load(old), tensors_of(9))
    merge(paths[:2], "linear", out=old, overwrite=True, shard_size=200)
    assert same(load(old), merge(paths[:2], "linear"))
    assert not (old / "old.json").exists()
    assert not (old / "model.safetensors").exists()
    assert (old / "model.safetensors.index.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_all_that_is_wrong_is_said_at_once(paths: list[Path], tmp_path: Path) -> None:
    lacking = load(paths[1])
    del lacking["bias"]
    lacking["layers.0.weight"] = np.ones((4, 5), np.float32)
    path = folder(tmp_path / "lacking", lacking)
    with pytest.raises(MergeError) as caught:
        merge([paths[0], path], "linear", wieght=0.3, exclude="*nrom*", out=tmp_path / "out")
    for part in (
        'did you mean "weight"',
        'lacks tensor "bias"',
        '"layers.0.weight": shape (4, 5)',
        '"*nrom*" matches no tensor',
    ):
        assert part in str(caught.value)
    with pytest.raises(MergeError) as caught:
        merge([tmp_path / "nowhere", tmp_path / "model.bin", 5], "linear", out=tmp_path / "out")
    assert "nowhere" in str(caught.value)
    assert "model.bin" in str(caught.value)
    assert "model 2: got int" in str(caught.value)
    assert not (tmp_path / "out").exists()


def wrong_options(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        {"method": "liner"},
        {"backend": "numbo"},
        {"nonfinite": "maybe"},
        {"threads": 0},
        {"threads": True},
        {"seed": 1.5},
        {"seed": None},
        {"memory": "lots"},
        {"memory": "1MB"},
        {"memory": 0},
        {"shard_size": "0"},
        {"shard_size": "-5GB"},
        {"out_dtype": "int8"},
        {"out_dtype": "float33"},
        {"models": "abc"},
        {"models": []},
        {"weight": [1, 2, 3]},
        {"weight": float("nan")},
        {"scope": "model"},
        {"only": ["nothing*"]},
        {"out": tmp_path / "a\0b"},
        {"out": ""},
        {"out": "/"},
        {"base": tmp_path},
        {"models": [tmp_path / "a\0b", tmp_path]},
    ]


@pytest.mark.parametrize("number", range(len(wrong_options(Path()))))
def test_wrong_arguments_are_errors_of_ours_and_leave_nothing(number: int, paths: list[Path], tmp_path: Path) -> None:
    options = wrong_options(tmp_path)[number]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MergeError) as caught:
        merge(**{"models": paths[:2], "method": "linear", "out": tmp_path / "out", **options})
    assert str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# Reports


def test_what_a_run_would_do_and_what_it_did(paths: list[Path], tmp_path: Path) -> None:
    merging = prepare_files(paths[:2], "linear", out=tmp_path / "out", parameters={"weight": [1, 3]}, exclude="bias")
    assert isinstance(merging, FileMerge)
    told = merging.describe()
    json.dumps(told)
    assert told["target"] == str(tmp_path / "out")
    assert told["tensors"] == [
        {"what": "linear(weight=[1, 3], normalize=True)", "tensors": 3, "elements": 68},
        {"what": "copied, not merged", "tensors": 1, "elements": 3},
    ]
    assert told["read"] == merging.read == 2 * 68 * 4 + 3 * 4
    assert told["written"] == merging.written == 71 * 4
    assert merging.elements == 71
    assert not (tmp_path / "out").exists()
    done: list[int] = []
    report = merging.run(advance=done.append)
    assert isinstance(report, Report)
    assert (report.merged, report.copied, report.resumed) == (3, 1, 0)
    assert (report.read, report.written) == (merging.read, merging.written)
    assert report.seconds > 0
    assert sum(done) == 71
    assert report.peak is None or report.peak > 1 << 20


@pytest.mark.parametrize("kind", ["arrays", "module"])
def test_what_is_in_memory_is_not_read(kind: str, tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    path = save(tmp_path / "stored.safetensors", state)
    merging = prepare_files([path, state if kind == "arrays" else module], "linear", out=tmp_path / "out", parameters={})
    assert merging.describe()["read"] == 8 * 4
    assert merging.run().read == 8 * 4


def test_float8_is_read_a_byte_for_each_element(tmp_path: Path) -> None:
    path = save(tmp_path / "stored.safetensors", {name: np.ones(100, ml_dtypes.float8_e5m2) for name in ("w", "left")})
    merging = prepare_files([path, path], "linear", out=tmp_path / "out", exclude="left", parameters={})
    assert isinstance(merging, FileMerge)
    assert merging.run().read == 300
    assert merging.read == 300
    assert merging.written == 300


def test_files_are_closed_after_a_merge_and_after_an_error(paths: list[Path], tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the system does not tell")

    def open_files() -> list[str]:
        links = [os.readlink(link) for link in descriptors.iterdir() if link.exists()]
        return [link for link in links if link.startswith(str(tmp_path))]

    merging = prepare_files(paths, "linear", out=tmp_path / "out", parameters={})
    merging.run()
    assert open_files() == []
    shutil.copy(paths[3], tmp_path / "short.safetensors")
    broken = prepare_files([paths[3], tmp_path / "short.safetensors"], "linear", out=tmp_path / "new", parameters={})
    os.truncate(tmp_path / "short.safetensors", 400)
    with pytest.raises(CheckpointError, match=r"short\.safetensors"):
        broken.run()
    del broken
    assert open_files() == []


def test_what_changed_since_it_was_prepared_is_refused(paths: list[Path], tmp_path: Path) -> None:
    merging = prepare_files(paths[:2], "linear", out=tmp_path / "out", parameters={})
    path = paths[0] / "model.safetensors"
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was read"):
        merging.run()
    assert not (tmp_path / "out").exists()


def test_unknown_names_keep_their_kind(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match='did you mean "linear"'):
        merge(paths, "liner", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["x.bin", "x.PT", "x.gguf"])
def test_a_result_is_not_called_as_a_pickle_is(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"w": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"a folder, or a file that ends in \.safetensors"):
        merge([path], "linear", out=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_result_without_a_config_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"w": np.ones(3, np.float32)})
    merging = prepare_files([{"w": np.ones(3, np.float32)}, path], "linear", out=tmp_path / "out", parameters={})
    assert merging.notes == ("the result has weights alone: model 0 is in memory, and has no config to copy",)
    assert prepare_files([path], "linear", out=tmp_path / "out", parameters={}).notes == ()
