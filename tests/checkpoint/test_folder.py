"""Folders of weights as transformers, diffusers and PEFT write them, and hub ids: what is opened, what is refused, and why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_cl.checkpoint import hub
from mergekit_cl.checkpoint.folder import check_not_quantised, is_tied, open_checkpoint
from mergekit_cl.checkpoint.hub import resolve
from mergekit_cl.errors import CheckpointError


def weights(path: Path, *names: str, dtype: Any = np.float32, metadata: dict[str, str] | None = None) -> None:
    save_file({name: np.full(2, i, dtype) for i, name in enumerate(names)}, path, metadata=metadata)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def sharded(folder: Path, stem: str = "model") -> dict[str, str]:
    """Write two shards with two tensors each, and their index; return its weight_map."""
    one, two = f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"
    weights(folder / one, "a", "b")
    weights(folder / two, "c", "d", metadata={"format": "pt"})
    weight_map = {"c": two, "a": one, "b": one, "d": two}
    index(folder, weight_map, stem)
    return weight_map


def index(folder: Path, weight_map: Any, stem: str = "model") -> None:
    write(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": 32}, "weight_map": weight_map})


def refused(where: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(where)
    return str(caught.value)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.v2.safetensors"
    weights(path, "b", "a", metadata={"k": "v"})
    write(tmp_path / "config.json", {})
    checkpoint = open_checkpoint(path)
    assert (checkpoint.path, checkpoint.label, checkpoint.stem) == (path, str(path), "lora.v2")
    assert not checkpoint.is_folder
    assert checkpoint.config is None
    assert checkpoint.metadata == {"k": "v"}
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.companions() == {}
    assert open_checkpoint(str(path), "first model").label == "first model"


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "adapter_model", "model.fp16", "my_weights"])
def test_a_folder_with_one_file(tmp_path: Path, stem: str) -> None:
    weights(tmp_path / f"{stem}.safetensors", "a")
    write(tmp_path / "config.json", {"model_type": "llama", "time_step_limit": float("inf")})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.stem, checkpoint.is_folder) == (stem, True)
    assert checkpoint.config == {"model_type": "llama", "time_step_limit": float("inf")}
    assert [file.path for file in checkpoint.files] == [tmp_path / f"{stem}.safetensors"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_folder_with_shards(tmp_path: Path, stem: str) -> None:
    weight_map = sharded(tmp_path, stem)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.stem == stem
    assert [file.path.name for file in checkpoint.files] == sorted(set(weight_map.values()))
    assert list(checkpoint.tensors) == ["a", "b", "c", "d"]
    assert {name: tensor.file.path.name for name, tensor in checkpoint.tensors.items()} == weight_map
    assert checkpoint.metadata == {"format": "pt"}  # of the second file: the first has none
    out = np.empty(2, np.float32)
    checkpoint.tensors["d"].read(0, 2, out)
    assert out.tolist() == [1, 1]
    assert any(file._descriptor >= 0 for file in checkpoint.files)
    checkpoint.close()
    assert all(file._descriptor < 0 for file in checkpoint.files)


def test_the_index_of_a_variant(tmp_path: Path) -> None:
    shard = "model.fp16-00001-of-00001.safetensors"
    weights(tmp_path / shard, "a")
    write(tmp_path / "model.safetensors.index.fp16.json", {"weight_map": {"a": shard}})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.stem, list(checkpoint.tensors)) == ("model.fp16", ["a"])


def test_what_transformers_would_load_wins_over_other_files(tmp_path: Path) -> None:
    sharded(tmp_path)
    weights(tmp_path / "consolidated.safetensors", "x")
    weights(tmp_path / "model.fp16.safetensors", "y")
    (tmp_path / "pytorch_model.bin").touch()
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("stems", [("model.bf16", "model.fp16"), ("one", "two"), ("adapter_model", "model")])
def test_several_checkpoints_are_ambiguous(tmp_path: Path, stems: tuple[str, str]) -> None:
    for stem in stems:
        weights(tmp_path / f"{stem}.safetensors", "a")
    message = refused(tmp_path)
    assert "holds several checkpoints" in message
    assert all(f"{stem}.safetensors" in message for stem in stems)


def test_a_single_file_wins_over_an_index_without_shards(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "a")
    index(tmp_path, {"b": "model-00001-of-00001.safetensors"})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    index(tmp_path, {"a": "model.safetensors"})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    write(tmp_path / "model.safetensors.index.json", "nonsense")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_single_file_beside_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    weights(tmp_path / "model.safetensors", "a")
    message = refused(tmp_path)
    assert "holds the model twice" in message
    assert "delete model.safetensors, or model.safetensors.index.json and the shards" in message


def test_an_index_and_its_shards_must_agree_and_all_that_is_wrong_is_said(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    one, two = sorted(set(weight_map.values()))
    index(tmp_path, {"a": one, "c": one, "e": two, "d": two, "f": "gone.safetensors", "g": "gone.safetensors"})
    assert refused(tmp_path).splitlines() == [
        f'{tmp_path / "gone.safetensors"}: is missing; model.safetensors.index.json says that it holds tensor "f" (and 1 more)',
        f'{tmp_path / one}: lacks tensor "c", which model.safetensors.index.json says it holds; it is in {two}',
        f'{tmp_path / two}: lacks tensor "e", which model.safetensors.index.json says it holds',
        f'{tmp_path / one}: tensor "b" is not in model.safetensors.index.json; the two are not of one checkpoint',
    ]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    one, two = sorted(set(weight_map.values()))
    weights(tmp_path / two, "b", "c", "d")
    assert f'{tmp_path / two}: holds tensor "b", which is also in {one}, where model.safetensors.index.json' in refused(
        tmp_path
    )


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        "",
        1,
        None,
        [],
        "\0.safetensors",
    ],
)
def test_an_index_names_only_files_of_its_folder(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights(tmp_path / "x.safetensors", "a")
    weights(folder / "b.safetensors", "b")
    index(folder, {"a": shard, "b": "b.safetensors"})
    message = refused(folder)
    assert f'says that tensor "a" is in {shard!r}, which is not a .safetensors file of its folder' in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "not an object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', '"a" is given twice'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "model.safetensors.index.json", content)
    assert message in refused(tmp_path)
    assert "model.safetensors.index.json" in refused(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "without their index, model.safetensors.index.json" in refused(tmp_path)


def test_damaged_shards_and_a_damaged_config_are_reported_together(tmp_path: Path) -> None:
    one, two = sorted(set(sharded(tmp_path).values()))
    os.truncate(tmp_path / one, (tmp_path / one).stat().st_size - 1)
    (tmp_path / two).write_bytes(b"")
    write(tmp_path / "config.json", "{]")
    first, second, third = refused(tmp_path).splitlines()
    assert first.startswith(f"{tmp_path / one}: truncated")
    assert second.startswith(f"{tmp_path / two}: is empty")
    assert third.startswith(f"{tmp_path / 'config.json'}: is not valid JSON")


@pytest.mark.parametrize("content", ["{", "[]", "1", '"\udcff"', "[" * 100_000])
def test_a_config_that_is_wrong(tmp_path: Path, content: str) -> None:
    weights(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert refused(tmp_path).startswith(f"{tmp_path / 'config.json'}: is ")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """What an interrupted download leaves in the cache of the hub."""
    (tmp_path / "model.safetensors").symlink_to("../../blobs/none")
    assert refused(tmp_path) == f"{tmp_path / 'model.safetensors'}: cannot be read: No such file or directory"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "a.PT", "weights.pkl"])
def test_pickles_are_never_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    write(tmp_path / "config.json", {})
    for where in (tmp_path, tmp_path / name):
        message = refused(where)
        assert f"{tmp_path}: {name} is a pickle" in message
        assert "save_pretrained(folder, safe_serialization=True)" in message
        assert "safetensors.torch.save_file" in message


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("a.gguf", "GGUF"),
        ("tf_model.h5", "HDF5"),
        ("flax_model.msgpack", "Flax msgpack"),
        ("a.npz", "NumPy npz"),
        ("a.onnx", "ONNX"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, format_: str) -> None:
    (tmp_path / name).touch()
    assert f"{name} is in the format {format_}, which is not read" in refused(tmp_path)
    assert f"{name} is in the format {format_}, which is not read" in refused(tmp_path / name)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").touch()
    (tmp_path / "optimizer.pt").touch()
    assert refused(tmp_path) == f"{tmp_path}: holds no .safetensors file"
    (tmp_path / "unet").mkdir()
    weights(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "a")
    assert "but unet in it do" in refused(tmp_path)
    (tmp_path / "notes.md").touch()
    assert "is not a .safetensors file" in refused(tmp_path / "notes.md")


def test_an_index_given_as_the_model(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert "give the folder that it lies in" in refused(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 'quantization_config (quant_method "gptq")'),
        ({"quantization_config": {"bits": 4}}, "quantization_config (no quant_method)"),
        ({"quantization_config": "odd"}, "quantization_config (no quant_method)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config.quantization_config"),
    ],
)
def test_a_config_that_says_it_is_quantised(tmp_path: Path, config: Any, shown: str) -> None:
    weights(tmp_path / "model.safetensors", "a.weight")
    write(tmp_path / "config.json", config)
    (problem,) = check_not_quantised(open_checkpoint(tmp_path, "the model"))
    assert problem.startswith("the model: is quantised: config.json has ")
    assert shown in problem
    assert "dequantise the model to bfloat16 first" in problem


@pytest.mark.parametrize(
    "names",
    [
        ("a.weight", "a.weight_scale"),
        ("a.weight", "a.weight_scale_inv"),
        ("a.qweight", "a.scales"),
        ("a.weight", "a.weight.absmax"),
        ("a.weight", "a.SCB"),
        ("a.other", "a.qzeros"),
    ],
)
def test_scales_beside_weights(tmp_path: Path, names: tuple[str, str]) -> None:
    weights(tmp_path / "model.safetensors", *names, dtype=np.int8)
    (problem,) = check_not_quantised(open_checkpoint(tmp_path))
    assert f'{tmp_path / "model.safetensors"} has scales beside the weights, tensor "{names[1]}"; ' in problem


@pytest.mark.parametrize(
    "name", ["logit_scale", "a.scale", "a.scales", "layer_scale.weight", "norm.weight", "a.weight_scaled", "input_scale"]
)
def test_ordinary_parameters_are_no_scales(tmp_path: Path, name: str) -> None:
    weights(tmp_path / "model.safetensors", "a.weight", name)
    write(tmp_path / "config.json", {"quantization_config": None, "text_config": None})
    assert check_not_quantised(open_checkpoint(tmp_path)) == []


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, False),
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {}}, False),
        ({"text_config": "odd"}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_is_tied(tmp_path: Path, config: Any, tied: bool) -> None:
    weights(tmp_path / "model.safetensors", "a")
    if config is not None:
        write(tmp_path / "config.json", config)
    assert is_tied(open_checkpoint(tmp_path)) is tied


def test_companions(tmp_path: Path) -> None:
    wanted = [
        "1_Pooling/config.json",
        "LICENSE",
        "Notice.txt",
        "USE_POLICY.md",
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "config_sentence_transformers.json",
        "deep/er/modeling_parts.py",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "preprocessor_config.json",
        "qwen.tiktoken",
        "sentencepiece.bpe.model",
        "source.spm",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ]
    unwanted = [
        "README.md",
        ".gitattributes",
        ".git/config.json",
        ".cache/huggingface/x.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json",
        "model.safetensors.index.fp16.json",
        "tokenizer.pkl",
        "tf_model.h5",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
        "rng_state.pth",
        "rng_state_0.pth",
        "original/params.json",
        "original/consolidated.00.pth",
        "checkpoint-10/config.json",
        "checkpoint-10/model.safetensors",
        "checkpoint-10/deeper/config.json",
        "runs/events.out",
    ]
    for name in wanted + unwanted:
        write(tmp_path / name, "{}")
    weights(tmp_path / "model.safetensors", "a")
    (tmp_path / "broken.json").symlink_to("nowhere")
    (tmp_path / "linked.json").symlink_to("vocab.json")
    os.mkfifo(tmp_path / "pipe.json")
    write(tmp_path / "huge.json", "")
    os.truncate(tmp_path / "huge.json", 200_000_001)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.fp16.json").unlink()
    found = open_checkpoint(tmp_path).companions()
    assert sorted(found) == sorted([*wanted, "linked.json"])
    assert all(path == tmp_path / name for name, path in found.items())


def test_companions_leave_the_index_out(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path / "model.safetensors.index.fp16.json", {})
    assert open_checkpoint(tmp_path).companions() == {}


def test_hundreds_of_shards_open_in_well_under_a_second(tmp_path: Path) -> None:
    weight_map: dict[str, str] = {}
    for i in range(200):
        names = [f"layers.{i}.{j}" for j in range(100)]
        shard = f"model-{i + 1:05}-of-00200.safetensors"
        weights(tmp_path / shard, *names)
        weight_map |= dict.fromkeys(names, shard)
    index(tmp_path, weight_map)
    start = process_time()
    checkpoint = open_checkpoint(tmp_path)
    assert process_time() - start < 2  # 0.3 s when nothing else runs
    assert list(checkpoint.tensors) == [f"layers.{i}.{j}" for i in range(200) for j in sorted(range(100), key=str)]
    assert check_not_quantised(checkpoint) == []


# the hub


def cached(cache: Path, name: str, sha: str = "a" * 40) -> Path:
    """Write a repository as huggingface_hub keeps it: snapshots of links to blobs, and the commit that "main" is."""
    repository = cache / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    weights(repository / "blobs" / "1234", "a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    write(snapshot / "config.json", {"model_type": "bert"})
    write(repository / "refs" / "main", sha)
    return snapshot


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub that is used, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))  # what the variables of these names set at the first import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.mark.parametrize("name", ["org/name", "name"])
def test_the_cache_of_the_hub_is_read_offline(offline: Path, name: str) -> None:
    snapshot = cached(offline, name)
    assert resolve(name) == snapshot
    assert resolve(name, "a" * 40) == snapshot
    checkpoint = open_checkpoint(name)
    assert (checkpoint.label, list(checkpoint.tensors), checkpoint.stem) == (name, ["a"], "model")
    assert set(checkpoint.companions()) == {"config.json"}
    with pytest.raises(CheckpointError, match=f'^{name}: neither a folder here nor .* at revision "v2": '):
        resolve(name, "v2")


def test_the_variables_of_the_hub_hold(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache", "org/name")
    script = "from mergekit_cl.checkpoint.hub import resolve; print(resolve('org/name')); resolve('org/other')"
    variables = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert run.stdout == f"{snapshot}\n"
    assert run.stderr.splitlines()[-1].startswith("mergekit_cl.errors.CheckpointError: org/other: neither a folder here nor")


def test_neither_here_nor_on_the_hub(offline: Path) -> None:
    (offline.parent / "llama-3b").mkdir()
    with pytest.raises(
        CheckpointError,
        match=r"^org/name: neither a folder here nor a model of the Hugging Face Hub: .*outgoing traffic has been disabled",
    ):
        resolve("org/name")
    with pytest.raises(CheckpointError, match=r'neither a folder here \(did you mean "llama-3b"\?\) nor'):
        resolve("lama-3b")


def test_a_local_path_wins(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(offline, "org/name")
    here = offline.parent / "org" / "name"
    here.mkdir(parents=True)
    weights(here / "model.safetensors", "local")
    assert resolve("org/name") == Path("org/name")
    assert list(open_checkpoint("org/name").tensors) == ["local"]
    with pytest.raises(CheckpointError, match=r'^org/name: is a local path, which has no revision "main"'):
        resolve("org/name", "main")


@pytest.mark.parametrize(
    "where",
    [
        "./x",
        "/x/y",
        "a/b/c",
        "../x",
        "x.safetensors",
        "org/x.bin",
        "a b",
        "org/name/",
        "-x",
        "a--b",
        "a..b",
        "~/x",
        "C:\\x",
        "a\0b",
        "é",
    ],
)
def test_what_looks_like_a_path_is_not_looked_up(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "_download", lambda *arguments: pytest.fail("looked up"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file or folder$"):
        resolve(where)
    with pytest.raises(CheckpointError, match=r"no such file or folder$"):
        resolve(Path("name"))


def test_the_nearest_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "mistral-7b").mkdir()
    with pytest.raises(CheckpointError, match=f'no such file or folder; did you mean "{tmp_path / "mistral-7b"}"'):
        resolve(str(tmp_path / "mistal-7b"))


def test_an_empty_name() -> None:
    with pytest.raises(CheckpointError, match="path of a model is empty"):
        resolve("")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r'^org/name: no such file.*pip install "mergekit-cl\[hub\]"'):
        resolve("org/name")


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", "v1") == tmp_path
    patterns = asked.pop("allow_patterns")
    assert asked == {"name": "org/name", "revision": "v1"}
    needed = [
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "1_Pooling/config.json",
        "LICENSE",
        "chat.jinja",
    ]
    others = ["pytorch_model.bin", "model.pt", "model.gguf", "tf_model.h5", "README.md", "logo.png"]
    assert list(filter_repo_objects(needed + others, allow_patterns=patterns)) == needed


def test_a_failed_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fails(*arguments: Any, **options: Any) -> str:
        raise OSError("no space\n\nleft")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^org/name: neither a folder here nor a model of the Hugging Face Hub: no space left$"
    ):
        resolve("org/name")
