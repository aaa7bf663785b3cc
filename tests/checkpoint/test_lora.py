"""Adapters put onto their base, and merged: against PEFT, against full matrices in float64, and against numbers by hand."""

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_cl.checkpoint.folder import Checkpoint, open_checkpoint
from mergekit_cl.checkpoint.lora import Adapter, Patched, apply_adapter, merge_adapters, refuse_adapters
from mergekit_cl.checkpoint.stored import Source, numpy_dtype
from mergekit_cl.errors import CheckpointError, MergeError, NonFiniteError
from mergekit_cl.kernels import Array

PREFIX = "base_model.model."


def read(source: Source) -> Array:
    out = np.empty(int(np.prod(source.shape)), numpy_dtype(source.dtype))
    source.read(0, out.size, out)
    return out.reshape(source.shape)


def config_of(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "base"} | changes


def save_model(folder: Path, tensors: Mapping[str, Array]) -> Checkpoint:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    return open_checkpoint(folder)


def save_adapter(folder: Path, tensors: Mapping[str, Array], **changes: Any) -> Checkpoint:
    folder.mkdir()
    save_file(
        {PREFIX + name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config_of(**changes)))
    return open_checkpoint(folder)


def linear(
    module: str, rank: int = 2, shape: tuple[int, int] = (5, 3), seed: int = 0, dtype: Any = np.float32
) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        f"{module}.lora_A.weight": random.standard_normal((rank, shape[1])).astype(dtype),
        f"{module}.lora_B.weight": random.standard_normal((shape[0], rank)).astype(dtype),
    }


def product(tensors: Mapping[str, Array], module: str) -> Array:
    a, b = (tensors[f"{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
    return b @ a


# ---------------------------------------------------------------------------------------------------------- with PEFT


@dataclass
class Trained:
    """A base, an adapter of it, both as PEFT writes them, and the weights after PEFT's merge_and_unload."""

    base: Path
    adapter: Path
    merged: dict[str, Array]


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes | changes))


def _gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes | changes))


def _convolutions() -> Any:
    from torch import nn

    return nn.ModuleDict({"line": nn.Conv1d(4, 6, 3), "plane": nn.Conv2d(3, 5, (2, 3)), "point": nn.Conv2d(5, 4, 1)})


def _train(folder: Path, model: Any, **config: Any) -> Trained:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file as save_tensors

    torch.manual_seed(1)
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        del base["lm_head.weight"]
    (folder / "base").mkdir(parents=True)
    save_tensors(base, folder / "base" / "model.safetensors")
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    return Trained(folder / "base", folder / "adapter", {name: merged[name].numpy() for name in base})


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (_llama, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "patterns": (
        _llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.*v_proj": 7, "^model.layers.0.mlp.up_proj": 3},
            "alpha_pattern": {"mlp.(up|down)_proj": 1, "layers.0.self_attn.v_proj": 16},
            "modules_to_save": ["lm_head", "input_layernorm"],
        },
    ),
    "embedding": (_llama, {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "k_proj"]}),
    "gpt2": (
        _gpt2,
        {
            "r": 4,
            "target_modules": ["c_attn", "c_proj", "wte"],
            "fan_in_fan_out": True,
            "bias": "all",
            "modules_to_save": ["ln_f"],
        },
    ),
    "gpt2 and a linear head": (
        lambda: _gpt2(tie_word_embeddings=False),
        {"r": 4, "target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "convolutions": (_convolutions, {"r": 2, "lora_alpha": 3, "target_modules": ["line", "plane", "point"]}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    import torch

    folder = tmp_path_factory.mktemp("trained")
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (model, config) in CASES.items():
            torch.manual_seed(0)
            results[name] = _train(folder / name, model(), **config)
    return results


@pytest.mark.parametrize("case", CASES)
def test_an_applied_adapter_is_the_model_that_peft_merges(case: str, trained: dict[str, Trained]) -> None:
    files = trained[case]
    base = open_checkpoint(files.base)
    result = apply_adapter(base.tensors, open_checkpoint(files.adapter))
    assert list(result) == list(base.tensors)
    changed = 0
    for name, source in result.items():
        expected, before = files.merged[name], read(base.tensors[name])
        assert (source.shape, source.dtype, source.name) == (expected.shape, "float32", name)
        assert np.abs(read(source) - expected).max() <= 1e-6 * np.abs(expected).max(), name
        assert (source is base.tensors[name]) == np.array_equal(expected, before), name
        changed += not np.array_equal(expected, before)
    assert changed >= 3


def test_an_adapter_says_which_head_is_transposed_although_its_configuration_does_not(trained: dict[str, Trained]) -> None:
    files = trained["gpt2 and a linear head"]
    assert json.loads((files.adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    result = apply_adapter(open_checkpoint(files.base).tensors, open_checkpoint(files.adapter))
    square, head = result["transformer.h.1.attn.c_proj.weight"], result["lm_head.weight"]
    assert isinstance(square, Patched)
    assert isinstance(head, Patched)
    assert (square.shape, square.transposed) == ((32, 32), True)
    assert not head.transposed


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_peft_computes_with_a_merged_adapter_what_the_summed_weights_give(
    combination: Any, trained: dict[str, Trained], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    cases = [trained["linear"], trained["embedding"]]
    weights = [0.7, -1.25]
    merged = merge_adapters(
        [open_checkpoint(case.adapter) for case in cases],
        weights,
        combination=combination,
        rank=7 if combination == "svd" else None,
    )
    write(merged, tmp_path / "merged")
    base = load_file(cases[0].base / "model.safetensors")
    summed = {
        name: tensor + sum(w * (torch.from_numpy(case.merged[name]) - tensor) for w, case in zip(weights, cases, strict=True))
        for name, tensor in base.items()
    }
    tokens = torch.arange(12)[None] * 5
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = _llama()
        model.load_state_dict(base)
        before = model(tokens).logits
        after = PeftModel.from_pretrained(model, tmp_path / "merged")(tokens).logits
        expected = _llama()
        expected.load_state_dict(summed)
        change = expected(tokens).logits - before
    assert change.abs().max() > 0.1
    assert (after - before - change).abs().max() < 1e-4 * change.abs().max()


def test_the_summed_weights_are_those_of_the_merged_adapter_applied(trained: dict[str, Trained], tmp_path: Path) -> None:
    case = trained["patterns"]
    adapter, base = open_checkpoint(case.adapter), open_checkpoint(case.base)
    merged = merge_adapters([adapter, adapter], [0.5, 0.25], combination="cat", dtype="float32")
    result = apply_adapter(base.tensors, write(merged, tmp_path / "merged"))
    assert merged.config["modules_to_save"] == ["input_layernorm", "lm_head"]
    for name, source in result.items():
        whole = case.merged[name].astype(np.float64)
        is_replaced = "input_layernorm" in name or "lm_head" in name
        expected = whole if is_replaced else 0.25 * read(base.tensors[name]) + 0.75 * whole
        assert np.abs(read(source) - expected).max() <= 1e-6 * np.abs(expected).max(), name


# ------------------------------------------------------------------------------------------------------- without PEFT


def write(adapter: Adapter, folder: Path) -> Checkpoint:
    folder.mkdir()
    save_file(adapter.tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    return open_checkpoint(folder)


def test_numbers_by_hand(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"m.q.weight": np.array([[1, 2, 3], [4, 5, 6]], np.float32)})
    tensors = {"m.q.lora_A.weight": np.array([[1, 0, -1]], np.float32), "m.q.lora_B.weight": np.array([[2], [3]], np.float32)}
    adapter = save_adapter(tmp_path / "adapter", tensors, r=1, lora_alpha=0.5)
    assert read(apply_adapter(model.tensors, adapter)["m.q.weight"]).tolist() == [[2, 2, 2], [5.5, 5, 4.5]]


@pytest.mark.parametrize(
    ("trained_as", "stored_as"),
    [("m.q", "q"), ("q", "m.q"), ("m.q", "m.q")],
)
def test_names_may_differ_in_the_first_component(trained_as: str, stored_as: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {f"{stored_as}.weight": np.zeros((5, 3), np.float32)})
    result = apply_adapter(model.tensors, save_adapter(tmp_path / "adapter", linear(trained_as), r=2, lora_alpha=2))
    np.testing.assert_allclose(read(result[f"{stored_as}.weight"]), product(linear(trained_as), trained_as), rtol=1e-6)


@pytest.mark.parametrize("key", ["m.q.lora_A.default.weight", "base_model.model.m.q.lora_A.weight", "m.q.lora_A.other.weight"])
def test_keys_of_other_spellings(key: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"m.q.weight": np.zeros((5, 3), np.float32)})
    tensors = linear("m.q")
    folder = tmp_path / "adapter"
    folder.mkdir()
    named = {key: tensors["m.q.lora_A.weight"], key.replace("lora_A", "lora_B"): tensors["m.q.lora_B.weight"]}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config_of()))
    result = read(apply_adapter(model.tensors, open_checkpoint(folder))["m.q.weight"])
    np.testing.assert_allclose(result, 2 * product(tensors, "m.q"), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "swapped"), [(37, 70, 5, False), (50, 33, 40, True), (3, 600, 130, False), (1, 1, 1, False)]
)
def test_a_window_has_the_bits_of_the_whole(
    dtype: str, rows: int, columns: int, rank: int, swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(7)
    weight = random.standard_normal((rows, columns)).astype(numpy_dtype(dtype))
    model = save_model(tmp_path / "model", {"q.weight": weight})
    tensors = linear("q", rank, (columns, rows) if swapped else (rows, columns), dtype=numpy_dtype(dtype))
    adapter = save_adapter(tmp_path / "adapter", tensors, r=rank, lora_alpha=1.5 * rank, fan_in_fan_out=swapped)
    source = apply_adapter(model.tensors, adapter)["q.weight"]
    whole = read(source).ravel()
    for start, stop in [(0, 0), (0, 1), (weight.size - 1, weight.size), *np.sort(random.integers(0, weight.size + 1, (40, 2)))]:
        out = np.full(stop - start, 99, numpy_dtype(dtype))
        source.read(int(start), int(stop), out)
        assert out.tobytes() == whole[start:stop].tobytes()
    change = product(tensors, "q")
    exact = weight.astype(np.float64) + 1.5 * (change.T if swapped else change)
    spacing = float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)  # rounded once, so half of this; the rest is float32's own error
    bound = 0.51 * spacing * np.abs(exact) + (1e-14 if dtype == "float64" else 2e-6) * (np.abs(exact) + rank)
    assert (np.abs(whole.reshape(exact.shape).astype(np.float64) - exact) <= bound).all()


def test_wide_rows_are_cut_as_others_are(tmp_path: Path) -> None:
    columns = 2**18 + 5
    model = save_model(tmp_path / "model", {"q.weight": np.ones((3, columns), np.float32)})
    tensors = linear("q", 2, (3, columns))
    source = apply_adapter(model.tensors, save_adapter(tmp_path / "adapter", tensors))["q.weight"]
    assert isinstance(source, Patched)
    assert source.tile[0] == 2  # so that few of these rows are in memory at a time
    whole = read(source)
    np.testing.assert_allclose(whole, 1 + 2 * product(tensors, "q"), rtol=1e-5, atol=1e-5)
    out = np.empty(columns, np.float32)
    source.read(columns + 11, 2 * columns + 11, out)
    assert out.tobytes() == whole.ravel()[columns + 11 : 2 * columns + 11].tobytes()


def test_the_bits_do_not_depend_on_the_threads_of_blas(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    save_model(tmp_path / "model", {"q.weight": random.standard_normal((130, 3000)).astype(np.float32)}).close()
    save_adapter(tmp_path / "adapter", linear("q", 48, (130, 3000)), r=48).close()
    program = (
        "import sys, hashlib, numpy as np\n"
        "from mergekit_cl.checkpoint.folder import open_checkpoint\n"
        "from mergekit_cl.checkpoint.lora import apply_adapter\n"
        "model, adapter = (open_checkpoint(f'{sys.argv[1]}/{name}') for name in ('model', 'adapter'))\n"
        "out = np.empty(130 * 3000, np.float32)\n"
        "apply_adapter(model.tensors, adapter)['q.weight'].read(0, out.size, out)\n"
        "print(hashlib.sha256(out).hexdigest())\n"
    )
    digests = set()
    for threads in "14":
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, str(tmp_path)]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1
    assert len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


def test_only_the_window_is_read_and_the_factors_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_cl.checkpoint import stored

    model = save_model(tmp_path / "model", {"q.weight": np.zeros((500, 40), np.float32)})
    source = apply_adapter(model.tensors, save_adapter(tmp_path / "adapter", linear("q", 2, (500, 40))))["q.weight"]
    reads: list[tuple[str, int]] = []
    original = stored.DataFile.read

    def counted(self: stored.DataFile, offset: int, out: memoryview) -> None:
        reads.append((self.path.name, len(out)))
        original(self, offset, out)

    monkeypatch.setattr(stored.DataFile, "read", counted)
    out = np.empty(100, np.float32)
    source.read(7, 107, out)
    assert sorted(reads) == [
        ("adapter_model.safetensors", 4 * 2 * 40),
        ("adapter_model.safetensors", 4 * 500 * 2),
        ("model.safetensors", 400),
    ]
    source.read(9000, 9100, out)
    assert reads[3:] == [("model.safetensors", 400)]
    assert {file.path.name for file in source.files} == {"model.safetensors", "adapter_model.safetensors"}


def test_a_replaced_tensor_has_the_dtype_of_the_base(tmp_path: Path) -> None:
    values = np.array([1 + 2**-9, 1 + 3 * 2**-9, 3], np.float32)
    model = save_model(
        tmp_path / "model", {"q.weight": np.zeros((5, 3), np.float32), "norm.weight": np.zeros(3, ml_dtypes.bfloat16)}
    )
    for number, name in enumerate(["norm.weight", "norm.modules_to_save.weight", "norm.modules_to_save.default.weight"]):
        adapter = save_adapter(tmp_path / str(number), {**linear("q"), name: values}, modules_to_save=["norm"])
        source = apply_adapter(model.tensors, adapter)["norm.weight"]
        assert source.dtype == "bfloat16"
        assert read(source).astype(np.float32).tolist() == [1, 1 + 2**-7, 3]


def test_a_replaced_tensor_is_converted_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_cl.checkpoint.lora._PIECE", 4)
    model = save_model(tmp_path / "model", {"q.weight": np.zeros((5, 3), np.float32), "head.bias": np.zeros(11, np.float16)})
    adapter = save_adapter(tmp_path / "adapter", {**linear("q"), "head.bias": np.arange(11, dtype=np.float32)})
    source = apply_adapter(model.tensors, adapter)["head.bias"]
    out = np.empty(9, np.float16)
    source.read(1, 10, out)
    assert out.tolist() == list(range(1, 10))


def test_the_plain_name_wins_over_what_peft_left_inside_its_wrapper(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"q.weight": np.zeros((5, 3), np.float32), "n.bias": np.zeros(1, np.float32)})
    names = ("n.bias", "n.modules_to_save.bias", "n.original_module.bias")
    for number, values in enumerate([(1, 2, 3), (1, 3, 2)]):  # files are read in the order of their bytes
        tensors = {name: np.array([value], np.float32) for name, value in zip(names, values, strict=True)}
        adapter = save_adapter(tmp_path / str(number), {**linear("q"), **tensors})
        for order in (list(adapter.tensors), list(adapter.tensors)[::-1]):
            shuffled = replace(adapter, tensors={name: adapter.tensors[name] for name in order})
            assert read(apply_adapter(model.tensors, shuffled)["n.bias"]).tolist() == [1]


def test_factors_are_in_the_type_that_is_computed_in(tmp_path: Path) -> None:
    for dtype, wide in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        model = save_model(tmp_path / dtype, {"q.weight": np.zeros((5, 3), numpy_dtype(dtype))})
        source = apply_adapter(model.tensors, save_adapter(tmp_path / f"adapter {dtype}", linear("q")))["q.weight"]
        assert isinstance(source, Patched)
        assert {factor.dtype.name for factor in source.factors(source)} == {wide}


def test_what_overflows_is_infinite_and_left_to_the_reader(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"q.weight": np.full((1, 1), 6e4, np.float16)})
    tensors = {"q.lora_A.weight": np.full((1, 1), 1e4, np.float32), "q.lora_B.weight": np.full((1, 1), 1, np.float32)}
    assert np.isposinf(read(apply_adapter(model.tensors, save_adapter(tmp_path / "adapter", tensors, r=1))["q.weight"])).all()


def test_merged_convolutions_keep_their_kernels(trained: dict[str, Trained], tmp_path: Path) -> None:
    case = trained["convolutions"]
    adapter, base = open_checkpoint(case.adapter), open_checkpoint(case.base)
    merged = write(merge_adapters([adapter, adapter], [0.75, -0.25], combination="cat"), tmp_path / "merged")
    assert {name: tensor.shape for name, tensor in merged.tensors.items() if "plane" in name} == {
        f"{PREFIX}plane.lora_A.weight": (4, 3, 2, 3),
        f"{PREFIX}plane.lora_B.weight": (5, 4, 1, 1),
    }
    result = apply_adapter(base.tensors, merged)
    for name in ("line.weight", "plane.weight", "point.weight"):
        expected = (read(base.tensors[name]) + case.merged[name].astype(np.float64)) / 2
        assert np.abs(read(result[name]) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_one_transposed_adapter_is_enough_to_say_so(tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / "1", linear("q")), save_adapter(tmp_path / "2", linear("v"), fan_in_fan_out=True)]
    assert merge_adapters(adapters, [1, 1], combination="cat").config["fan_in_fan_out"] is True


def test_a_square_weight_goes_by_its_neighbours(tmp_path: Path) -> None:
    zeros = {
        "h.a.weight": (3, 3),
        "h.b.weight": (3, 9),
        "h.b.bias": (9,),
        "g.a.weight": (3, 3),
        "g.b.weight": (9, 3),
        "g.b.bias": (9,),
    }
    model = save_model(tmp_path / "model", {name: np.zeros(shape, np.float32) for name, shape in zeros.items()})
    tensors = linear("h.a", shape=(3, 3)) | linear("g.a", shape=(3, 3))
    for fan_in_fan_out in (False, True):
        adapter = save_adapter(tmp_path / str(fan_in_fan_out), tensors, fan_in_fan_out=fan_in_fan_out, lora_alpha=2)
        result = apply_adapter(model.tensors, adapter)
        np.testing.assert_allclose(read(result["h.a.weight"]), product(tensors, "h.a").T, rtol=1e-6)
        np.testing.assert_allclose(read(result["g.a.weight"]), product(tensors, "g.a"), rtol=1e-6)
    alone = save_model(tmp_path / "alone", {"h.a.weight": np.zeros((3, 3), np.float32)})
    adapter = save_adapter(tmp_path / "of alone", linear("h.a", shape=(3, 3)), fan_in_fan_out=True, lora_alpha=2)
    np.testing.assert_allclose(read(apply_adapter(alone.tensors, adapter)["h.a.weight"]), product(tensors, "h.a").T, rtol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"use_dora": True}, "use_dora is set: DoRA rescales"),
    ({"lora_bias": True}, "lora_bias is set"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    ({"megatron_config": {"a": 1}}, "megatron_config is set"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    ({"target_parameters": ["experts.up"]}, "target_parameters is set"),
    ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", which changes the weights of the base'),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "loftq"}, "loftq"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"r": 0}, "r is 0, which is no rank"),
    ({"r": None}, "r is None"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": 10**400}, "which is no number"),
    ({"lora_alpha": True}, "lora_alpha is True"),
    ({"r": 10**400}, "q: is of rank 2, but of rank 1000"),
    ({"modules_to_save": "head"}, "modules_to_save is 'head'; it has to be a list"),
    ({"modules_to_save": [3]}, "modules_to_save is [3]"),
    ({"rank_pattern": ["q"]}, "rank_pattern is"),
    ({"alpha_pattern": {"(q": 3}}, 'alpha_pattern: "(q" is no regular expression'),
    ({"r": 3}, "q: is of rank 2, but of rank 3 by adapter_config.json"),
    ({"rank_pattern": {"q": 5}}, "q: is of rank 2, but of rank 5"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_kinds_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"q.weight": np.zeros((5, 3), np.float32)})
    adapter = save_adapter(tmp_path / "adapter", linear("q"), **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        apply_adapter(model.tensors, adapter)
    assert "adapter" in str(error.value)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        merge_adapters([adapter], [1.0], combination="cat")


@pytest.mark.parametrize("initial", [True, False, "gaussian", "eva", "orthogonal"])
def test_initial_weights_that_leave_the_base_alone(initial: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"q.weight": np.zeros((5, 3), np.float32)})
    assert isinstance(
        apply_adapter(model.tensors, save_adapter(tmp_path / "a", linear("q"), init_lora_weights=initial))["q.weight"], Patched
    )


def test_every_tensor_that_does_not_fit_is_in_one_message(tmp_path: Path) -> None:
    model = save_model(
        tmp_path / "model",
        {
            "q.weight": np.zeros((5, 4), np.float32),
            "i.weight": np.zeros((5, 3), np.int8),
            "head.weight": np.zeros(3, np.float32),
        },
    )
    tensors = (
        linear("q")
        | linear("gone")
        | linear("i")
        | {"head.weight": np.zeros(4, np.float32), "other.bias": np.zeros(4, np.float32)}
    )
    with pytest.raises(CheckpointError) as error:
        apply_adapter(model.tensors, save_adapter(tmp_path / "adapter", tensors))
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    for part in (
        "q: its factors have shapes (5, 2) and (2, 3), which do not fit the model's q.weight of shape (5, 4)",
        "gone.lora_A.weight matches nothing in the model, which has no gone.weight",
        "i.weight of the model is int8; dequantise",
        "head.weight has shape (4,), but head.weight of the model (3,)",
        "other.bias matches nothing",
    ):
        assert sum(part in line for line in lines) == 1, part


def _without(tensors: dict[str, Array], name: str) -> dict[str, Array]:
    return {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_without(linear("q"), "q.lora_B.weight"), "q: has lora_A, but not lora_B"),
        (_without(linear("q"), "q.lora_A.weight"), "q: has lora_B, but not lora_A"),
        ({}, "holds no lora_A"),
        (linear("q") | {"q.lora_B.bias": np.zeros(5, np.float32)}, "q.lora_B.bias is of a kind"),
        (linear("q") | {"q.lora_magnitude_vector": np.zeros(5, np.float32)}, "lora_magnitude_vector is of a kind"),
        (linear("q") | {"e.token_adapter.trainable_tokens_delta": np.zeros((2, 3), np.float32)}, "is of a kind"),
        (linear("q") | {"q.lora_A.second.weight": np.zeros((2, 3), np.float32)}, "are one factor twice"),
        (linear("q") | {"q.lora_B.weight": np.zeros((5, 3), np.float32)}, "do not fit one another"),
        (linear("q") | {"q.lora_A.weight": np.zeros(3, np.float32)}, "do not fit one another"),
        (linear("q", dtype=np.int8), "is int8, which is not read"),
    ],
)
def test_damaged_adapters(tensors: dict[str, Array], message: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"q.weight": np.zeros((5, 3), np.float32)})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        apply_adapter(model.tensors, save_adapter(tmp_path / "adapter", tensors))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[1]", "not an object"), ('{"r": 1, "r": 2}', "twice")]
)
def test_damaged_configurations(text: str, message: str, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", linear("q"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        apply_adapter({}, adapter)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read"):
        apply_adapter({}, adapter)


def summed(parts: Sequence[tuple[float, dict[str, Array], float]], module: str) -> Array:
    return sum(w * scale * product(t, module) for w, t, scale in parts if f"{module}.lora_A.weight" in t)  # type: ignore[return-value]


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Checkpoint], list[float], list[tuple[float, dict[str, Array], float]]]:
    """Three adapters that differ in rank, alpha, rank stabilisation and modules; their weights; what they hold."""
    shared = {"x.q": (5, 7), "x.v": (6, 4)}
    first = linear("x.q", 2, shared["x.q"], 1) | linear("x.v", 3, shared["x.v"], 2)
    second = linear("x.q", 4, shared["x.q"], 3)
    third = linear("x.v", 3, shared["x.v"], 4) | linear("x.o", 3, (8, 2), 5)
    adapters = [
        save_adapter(
            tmp_path / "1", first, r=2, lora_alpha=3, rank_pattern={"v": 3}, alpha_pattern={"v": 6}, target_modules=["q", "v"]
        ),
        save_adapter(tmp_path / "2", second, r=4, lora_alpha=3, use_rslora=True, target_modules=["q"]),
        save_adapter(tmp_path / "3", third, r=3, lora_alpha=12, target_modules=["v", "o"]),
    ]
    weights = [0.5, -2.0, 0.3]
    scales = [({"x.q": 1.5, "x.v": 2.0}), {"x.q": 1.5}, {"x.v": 4.0, "x.o": 4.0}]
    parts = [
        (w, {name: array for name, array in tensors.items() if name.startswith(module)}, scale)
        for w, tensors, scales_of in zip(weights, (first, second, third), scales, strict=True)
        for module, scale in scales_of.items()
    ]
    return adapters, weights, parts


def test_stacked_factors_give_the_sum_of_the_changes(three: Any) -> None:
    adapters, weights, parts = three
    merged = merge_adapters(adapters, weights, combination="cat", dtype="float64")
    tensors = {name.removeprefix(PREFIX): array for name, array in merged.tensors.items()}
    for module, rank in {"x.q": 6, "x.v": 6, "x.o": 3}.items():
        expected = summed(parts, module)
        assert tensors[f"{module}.lora_A.weight"].shape[0] == rank
        np.testing.assert_allclose(product(tensors, module), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    config = merged.config
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"o": 3}
    assert config["target_modules"] == ["o", "q", "v"]
    assert merged.energy == {"x.q": 1.0, "x.v": 1.0, "x.o": 1.0}
    assert all(array.dtype == np.float64 for array in merged.tensors.values())


def test_the_default_dtype_is_that_of_the_first_and_is_rounded_to_once(tmp_path: Path) -> None:
    narrow = linear("q", dtype=ml_dtypes.bfloat16)
    adapters = [
        save_adapter(tmp_path / "1", narrow, lora_alpha=2),
        save_adapter(tmp_path / "2", linear("q", seed=1), lora_alpha=2),
    ]
    merged = merge_adapters(adapters, [0.3, 0.5], combination="cat").tensors
    a, b = merged[f"{PREFIX}q.lora_A.weight"], merged[f"{PREFIX}q.lora_B.weight"]
    assert (a.dtype, b.dtype) == (ml_dtypes.bfloat16, ml_dtypes.bfloat16)
    assert a[:2].tobytes() == narrow["q.lora_A.weight"].tobytes()
    expected = (0.3 * narrow["q.lora_B.weight"].astype(np.float64)).astype(ml_dtypes.bfloat16)
    assert b[:, :2].tobytes() == expected.tobytes()
    wide = merge_adapters(adapters, [0.5, 0.5], combination="cat", dtype="float32").tensors[f"{PREFIX}q.lora_B.weight"]
    assert (wide[:, :2] == narrow["q.lora_B.weight"].astype(np.float32) / 2).all()


@pytest.mark.parametrize("rank", [1, 2, 3, 50])
def test_a_rank_keeps_the_best_approximation_of_the_sum(rank: int, three: Any) -> None:
    adapters, weights, parts = three
    merged = merge_adapters(adapters, weights, combination="svd", rank=rank, dtype="float64")
    tensors = {name.removeprefix(PREFIX): array for name, array in merged.tensors.items()}
    for module, full in {"x.q": 5, "x.v": 4, "x.o": 2}.items():
        u, singular, v = np.linalg.svd(summed(parts, module), full_matrices=False)
        kept = min(rank, full)
        best = u[:, :kept] * singular[:kept] @ v[:kept]
        assert tensors[f"{module}.lora_A.weight"].shape[0] == kept
        np.testing.assert_allclose(product(tensors, module), best, rtol=0, atol=1e-12 * singular[0])
        assert merged.energy[module] == pytest.approx(np.sum(singular[:kept] ** 2) / np.sum(singular**2), abs=1e-12)
        assert merged.config["rank_pattern"].get(module[2:], merged.config["r"]) == kept


def test_the_default_rank_is_the_largest_of_the_adapters(three: Any) -> None:
    adapters, weights, _ = three
    merged = merge_adapters(adapters, weights, combination="svd")
    assert {name: len(array) for name, array in merged.tensors.items() if "lora_A" in name} == {
        f"{PREFIX}x.{module}.lora_A.weight": rank for module, rank in {"q": 4, "v": 4, "o": 2}.items()
    }


def test_changes_that_cancel_are_an_adapter_of_zeros(tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / name, linear("q")) for name in "ab"]
    merged = merge_adapters(adapters, [0.0, 0.0], combination="svd")
    assert merged.energy == {"q": 1.0}
    assert not any(array.any() for array in merged.tensors.values())


def test_ranks_that_differ_among_modules_of_one_name(tmp_path: Path) -> None:
    layers = [linear("layers.1.q", 2) | linear("layers.11.q", 2), linear("layers.1.q", 3) | linear("x.layers.1.q", 3)]
    adapters = [
        save_adapter(tmp_path / "1", layers[0], target_modules=r".*\.q"),
        save_adapter(tmp_path / "2", layers[1], r=3, target_modules=["q"], layers_to_transform=[1]),
    ]
    merged = merge_adapters(adapters, [1, 1], combination="cat")
    assert merged.config["target_modules"] == ["layers.1.q", "layers.11.q", "x.layers.1.q"]
    assert merged.config["layers_to_transform"] is None
    for name, array in merged.tensors.items():
        if "lora_A" in name:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            found = [rank for key, rank in merged.config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", module)]
            assert (
                (found or [merged.config["r"]])[0]
                == len(array)
                == {"layers.1.q": 5, "layers.11.q": 2, "x.layers.1.q": 3}[module]
            )
    apply_adapter(
        save_model(
            tmp_path / "model", {f"{m}.weight": np.zeros((5, 3), np.float32) for m in merged.config["target_modules"]}
        ).tensors,
        write(merged, tmp_path / "merged"),
    )


def test_whole_tensors_are_averaged_or_refused(tmp_path: Path) -> None:
    heads = [np.array([1, 2], np.float32), np.array([5, 10], np.float32)]
    counts = np.array([3], np.int64)
    adapters = [
        save_adapter(
            tmp_path / str(i),
            {**linear("q"), "head.weight": head, "head.count": counts, "q.bias": head},
            modules_to_save=["head"],
        )
        for i, head in enumerate(heads)
    ]
    merged = merge_adapters(adapters, [3, 1], combination="cat")
    assert merged.tensors[f"{PREFIX}head.weight"].tolist() == [2, 4]
    assert merged.tensors[f"{PREFIX}head.count"].tolist() == [3]
    assert merged.tensors[f"{PREFIX}q.base_layer.bias"].tolist() == [2, 4]
    with pytest.raises(CheckpointError, match="weights add up to zero"):
        merge_adapters(adapters, [1, -1], combination="cat")
    lacking = save_adapter(tmp_path / "lacking", linear("q"))
    with pytest.raises(CheckpointError, match=r"head\.weight: some adapters bring this tensor whole, but not .*lacking"):
        merge_adapters([*adapters, lacking], [1, 1, 1], combination="cat")
    other = save_adapter(
        tmp_path / "other", {**linear("q"), "head.weight": heads[0], "head.count": counts + 1, "q.bias": heads[0]}
    )
    with pytest.raises(CheckpointError, match="int64 and differs"):
        merge_adapters([adapters[0], other], [1, 1], combination="cat")


def test_copies_of_the_base_are_kept_where_they_agree(tmp_path: Path) -> None:
    copy = np.arange(15, dtype=np.float32).reshape(5, 3)
    adapters = [
        save_adapter(tmp_path / "0", linear("q", seed=3)),
        save_adapter(tmp_path / "1", {**linear("q"), "q.base_layer.weight": copy}),
        save_adapter(tmp_path / "2", {**linear("q"), "q.base_layer.weight": copy}),
        save_adapter(tmp_path / "3", {**linear("q"), "q.base_layer.weight": copy + 1}),
        save_adapter(tmp_path / "4", {**linear("q"), "q.base_layer.weight": copy[:4]}),
    ]
    merged = merge_adapters(adapters[:3], [1, 2, -3], combination="cat")
    assert merged.tensors[f"{PREFIX}q.base_layer.weight"].tobytes() == copy.tobytes()
    assert list(merged.tensors).count(f"{PREFIX}q.weight") == 0
    for other in adapters[3:]:
        with pytest.raises(
            CheckpointError, match=r"q\.weight: the adapters bring copies of this tensor of their base, which differ"
        ):
            merge_adapters([*adapters[:2], other], [1, 1, 1], combination="cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "another"}, "base_model_name_or_path in adapter_config.json differs"),
        ({"task_type": "SEQ_CLS"}, "task_type in adapter_config.json differs"),
        ({"revision": "v2"}, "revision in adapter_config.json differs"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is set"),
    ],
)
def test_adapters_of_different_bases_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapters = [
        save_adapter(tmp_path / "1", linear("q"), revision="main"),
        save_adapter(tmp_path / "2", linear("q"), **changes),
    ]
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(adapters, [1, 1], combination="cat")


def test_adapters_of_different_shapes_are_refused(tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / "1", linear("q")), save_adapter(tmp_path / "2", linear("q", shape=(5, 4)))]
    with pytest.raises(CheckpointError, match="q: the adapters' lora_A and lora_B do not fit one another"):
        merge_adapters(adapters, [1, 1], combination="cat")


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "1", linear("q"))
    with pytest.raises(CheckpointError) as error:
        merge_adapters([adapter], [1, float("nan")], combination="mean", rank=0)
    assert len(str(error.value).splitlines()) == 4
    with pytest.raises(CheckpointError, match="no adapters"):
        merge_adapters([], [], combination="cat")
    with pytest.raises(CheckpointError, match="a rank has no meaning"):
        merge_adapters([adapter], [1], combination="cat", rank=4)
    with pytest.raises(MergeError, match="float33"):
        merge_adapters([adapter], [1], combination="cat", dtype="float33")


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_nan_and_overflow_are_named(combination: Any, tmp_path: Path) -> None:
    bad = linear("q")
    bad["q.lora_A.weight"][1, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"adapter_model\.safetensors: .*q\.lora_A\.weight holds NaN"):
        merge_adapters([save_adapter(tmp_path / "nan", bad)], [1], combination=combination)
    with pytest.raises(NonFiniteError, match=r"q: lora_[AB] of the result: overflows float16"):
        merge_adapters([save_adapter(tmp_path / "large", linear("q", dtype=np.float16))], [1e12], combination=combination)


def test_averaged_factors_are_refused_with_the_reason() -> None:
    error = refuse_adapters("linear")
    assert isinstance(error, CheckpointError)
    for part in ("linear: ", "mean(B) @ mean(A) is not mean(B @ A)", '"cat"', '"svd"', '"base+adapter"'):
        assert part in str(error)
