"""Checkpoints as they lie on disk: a safetensors file, or a folder as transformers, diffusers and PEFT write it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISREG
from typing import Any

from mergekit_cl.checkpoint.header import parse_object, quoted, read_header
from mergekit_cl.checkpoint.hub import resolve
from mergekit_cl.checkpoint.stored import DataFile, Stored
from mergekit_cl.errors import CheckpointError, listing

_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
"""What transformers, diffusers and PEFT call their weights. They win over other names and over variants (model.fp16)."""

_INDEX = re.compile(r"(.+)\.safetensors\.index(\.[^.]+)?\.json")  # the variant fp16 is in model.safetensors.index.fp16.json
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".h5": "HDF5",
    ".keras": "Keras",
    ".msgpack": "Flax msgpack",
    ".npz": "NumPy npz",
    ".npy": "NumPy npy",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
}
_WEIGHTS = _PICKLES | _FORMATS.keys() | {".safetensors"}

_TRAINING_STATE = ("trainer_state.json", "training_args.*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")

_COMPANIONS = (
    "*.json",
    "*.py",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.codes",
    "*.tiktoken",
    "spiece*",
    "chat_template*",
    "license*",
    "licence*",
    "notice*",
    "use_policy*",
)
"""Files, in small letters, that a copy of a model needs beside its weights. A README describes the model that it came with."""

_LARGEST_COMPANION = 200_000_000  # bytes

_SCALES = re.compile(r"(?:\.weight_scale(?:_2)?|_scale_inv|\.scale_weight|\.qzeros|\.absmax|\.SCB)$")

_DEQUANTISE = (
    "numbers and scales cannot be averaged apart: dequantise the model to bfloat16 first (in transformers: "
    "`model.dequantize()`, then `save_pretrained`), or take the checkpoint that it was quantised from"
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: its headers have been read and checked, its tensors have not.

    ``path`` is the file or folder, and ``label`` what messages call it. ``tensors`` are by name, in the order of the files, and
    in a file in that of their bytes. ``metadata`` is that of the first file that has some. ``config`` is the parsed config.json
    of a folder. ``stem`` is what the weights are called: "model", "diffusion_pytorch_model", "adapter_model", or a file's name.
    """

    path: Path
    label: str
    files: tuple[DataFile, ...]
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    stem: str
    is_folder: bool

    def companions(self) -> dict[str, Path]:
        """List the files of a folder, beside its weights, that a copy of the model needs: by their name in the folder.

        Configurations, tokenizers, chat templates, code, licences; also those in sub-folders, unless these hold weights.
        """
        found: dict[str, Path] = {}
        if not self.is_folder:
            return found
        for folder, folders, names in os.walk(self.path):
            at = Path(folder)
            if at != self.path and any(Path(name).suffix.lower() in _WEIGHTS for name in names):
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found |= {str((at / name).relative_to(self.path)): at / name for name in sorted(names) if _is_companion(at / name)}
        return found

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()


def open_checkpoint(where: str | Path, label: str | None = None) -> Checkpoint:
    """Open a safetensors file, or a folder that holds one or an index of several, and read their headers.

    Args:
        where: A path, or a hub id; see `resolve`.
        label: What messages call it; by default ``where``.

    Raises:
        CheckpointError: There is no such checkpoint, it is in another format, it is ambiguous which of the files is meant, or a
            file is damaged; or the index and the files disagree. All that was found is in the one message.

    """
    path = resolve(where)
    label = str(where) if label is None else label
    return _open_folder(path, label) if path.is_dir() else _open_file(path, label)


def check_not_quantised(checkpoint: Checkpoint) -> list[str]:
    """List the signs that the checkpoint is quantised: a configuration that says so, scales beside the weights."""
    problems = []
    for config, inside in ((checkpoint.config, ""), (_text_config(checkpoint), "text_config.")):
        for key in ("quantization_config", "compression_config"):
            if config and (found := config.get(key)):
                method = found.get("quant_method") if isinstance(found, dict) else None
                named = f"quant_method {quoted(method)}" if isinstance(method, str) else "no quant_method"
                problems.append(f"{checkpoint.label}: is quantised: config.json has {inside}{key} ({named}); {_DEQUANTISE}")
    tensors = checkpoint.tensors
    packed = {f"{name.removesuffix('.qweight')}.scales" for name in tensors if name.endswith(".qweight")}
    scales = [tensor for name, tensor in tensors.items() if _SCALES.search(name) or name in packed]
    if scales:
        found = _first([tensor.name for tensor in scales])
        problems.append(
            f"{checkpoint.label}: is quantised: {scales[0].file.path} has scales beside the weights, {found}; {_DEQUANTISE}"
        )
    return problems


def is_tied(checkpoint: Checkpoint) -> bool:
    """Tell whether config.json says that the output head is the input embedding, of the model or of its text model.

    False where it does not say. Then transformers takes the default of the model's class (true for GPT-2, BERT, Gemma; false
    for Llama), which only its code knows. transformers 5 writes the key into every config.json; older ones left a true out.
    """
    for config in (checkpoint.config, _text_config(checkpoint)):
        if config and "tie_word_embeddings" in config:
            return config["tie_word_embeddings"] is True
    return False


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    inner = (checkpoint.config or {}).get("text_config")
    return inner if isinstance(inner, dict) else None


def _is_companion(path: Path) -> bool:
    name = path.name.lower()
    if path.name.startswith(".") or path.suffix.lower() in _WEIGHTS or name.endswith(".index.json") or _INDEX.fullmatch(name):
        return False
    if any(fnmatchcase(name, pattern) for pattern in _TRAINING_STATE):
        return False
    if not any(fnmatchcase(name, pattern) for pattern in _COMPANIONS):
        return False
    try:
        status = path.stat()
    except OSError:  # a link to nothing
        return False
    return S_ISREG(status.st_mode) and status.st_size <= _LARGEST_COMPANION


def _foreign(path: Path, names: list[str]) -> str | None:
    """Say what to do about the first of these files that holds weights in a format that is not read."""
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix in _PICKLES:
            return (
                f"{path}: {name} is a pickle, which can run any code when it is opened, and is not read; convert it where you "
                "trust it: load the model in transformers and `save_pretrained(folder, safe_serialization=True)`, or "
                "`safetensors.torch.save_file(torch.load(path, weights_only=True), path)`"
            )
        if suffix in _FORMATS:
            return (
                f"{path}: {name} is in the format {_FORMATS[suffix]}, which is not read; convert it to safetensors, or take "
                "the checkpoint that it was made from"
            )
    return None


def _open_file(path: Path, label: str) -> Checkpoint:
    if path.suffix.lower() != ".safetensors":
        advice = "; give the folder that it lies in" if _INDEX.fullmatch(path.name) else ""
        raise CheckpointError(_foreign(path.parent, [path.name]) or f"{path}: is not a .safetensors file{advice}")
    file, tensors = read_header(path)
    by_name = {tensor.name: tensor for tensor in tensors}
    return Checkpoint(path, label, (file,), by_name, file.metadata, config=None, stem=path.stem, is_folder=False)


def _open_folder(path: Path, label: str) -> Checkpoint:
    stem, index = _choose(path)
    problems: list[str] = []
    shard_of: dict[str, str] = {}
    if index is None:
        shards = [f"{stem}.safetensors"]
    else:
        shard_of, problems = _read_index(path / index)
        shards = sorted(set(shard_of.values()))
    files: list[DataFile] = []
    held: dict[str, dict[str, Stored]] = {}
    meant: dict[str, list[str]] = {}
    for name, shard in shard_of.items():
        meant.setdefault(shard, []).append(name)
    for shard in shards:
        if index is not None and not os.path.lexists(path / shard):
            problems.append(f"{path / shard}: is missing; {index} says that it holds {_first(meant[shard])}")
            continue
        try:
            file, tensors = read_header(path / shard)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            files.append(file)
            held[shard] = {tensor.name: tensor for tensor in tensors}
    if index is not None:
        problems += _disagreements(path, index, shard_of, held)
    config = None
    if os.path.lexists(path / "config.json"):
        try:
            config = _read_config(path / "config.json")
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(listing(problems))
    metadata = next((file.metadata for file in files if file.metadata), {})
    by_name = {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
    return Checkpoint(path, label, tuple(files), by_name, metadata, config, stem, is_folder=True)


def _choose(folder: Path) -> tuple[str, str | None]:
    """Decide which weights of a folder are meant: their stem, and the name of their index if they are sharded."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from error
    files = [name for name in names if name.endswith(".safetensors") and not _SHARD.fullmatch(name)]
    singles = {name.removesuffix(".safetensors") for name in files}
    indices = {match[1] + (match[2] or ""): name for name in names if (match := _INDEX.fullmatch(name))}
    stems = singles | indices.keys()
    if not stems:
        raise CheckpointError(_no_weights(folder, names))
    chosen = [stem for stem in _STEMS if stem in stems] or sorted(stems)
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder}: holds several checkpoints ({', '.join(f'{stem}.safetensors' for stem in chosen)}); "
            "give the path of one of the files, or move the others elsewhere"
        )
    stem = chosen[0]
    if stem not in singles:
        return stem, indices[stem]
    if stem in indices:  # transformers takes the single file, and so do we, unless nobody can tell which is stale
        _refuse_mix(folder, stem, indices[stem])
    return stem, None


def _refuse_mix(folder: Path, stem: str, index: str) -> None:
    try:
        shard_of, _ = _read_index(folder / index)
    except CheckpointError:
        return
    single = f"{stem}.safetensors"
    shards = sorted(shard for shard in set(shard_of.values()) - {single} if os.path.lexists(folder / shard))
    if shards:
        raise CheckpointError(
            f"{folder}: holds the model twice, as {single} and as {len(shards)} shards ({shards[0]}, ...) with {index}; one of "
            f"the two is stale: delete {single}, or {index} and the shards"
        )


def _no_weights(folder: Path, names: list[str]) -> str:
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        stem = shards[0].rsplit("-", 3)[0]
        return (
            f"{folder}: holds shards ({shards[0]}{', ...' if len(shards) > 1 else ''}) without their index, "
            f"{stem}.safetensors.index.json; copy that too, or give the path of one shard to open it alone"
        )
    weights = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _TRAINING_STATE)]
    if foreign := _foreign(folder, weights):
        return foreign
    inside = [name for name in names if (folder / name).is_dir() and any((folder / name).glob("*.safetensors"))]
    if inside:
        return f"{folder}: holds no weights itself, but {', '.join(inside)} in it do; give the path of one of these"
    return f"{folder}: holds no .safetensors file"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json as transformers does: Infinity is a number, and of names given twice the last one counts."""
    raw = _read(path)
    try:
        config = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is JSON, but not an object")
    return config


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read an index: the file that each tensor is in, and what is wrong with the rest."""
    raw = _read(path)
    try:
        index, twice = parse_object(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map from the names of tensors to files")
    problems = [f"{path}: {problem}" for problem in twice]
    shard_of = {name: shard for name, shard in weight_map.items() if _is_shard_name(shard)}
    wrong: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if name not in shard_of:
            wrong.setdefault(repr(shard)[:200], []).append(name)
    for shown, names in wrong.items():
        problems.append(f"{path}: says that {_first(names)} is in {shown}, which is not a .safetensors file of its folder")
    return shard_of, problems


def _first(names: list[str]) -> str:
    """Name the first of some tensors, and count the others."""
    return f"tensor {quoted(names[0])}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _is_shard_name(shard: Any) -> bool:
    return isinstance(shard, str) and shard.endswith(".safetensors") and shard.isprintable() and not set(shard) & set("/\\")


def _disagreements(path: Path, index: str, shard_of: dict[str, str], held: dict[str, dict[str, Stored]]) -> list[str]:
    """Compare an index with the headers of its shards, those that could be read."""
    problems = []
    lies_in = {name: shard for shard, tensors in held.items() for name in tensors}
    for name, shard in shard_of.items():
        if shard in held and name not in held[shard]:
            where = f"; it is in {lies_in[name]}" if name in lies_in else ""
            problems.append(f"{path / shard}: lacks tensor {quoted(name)}, which {index} says it holds{where}")
    for shard, tensors in held.items():
        for name in tensors:
            if name not in shard_of:
                problems.append(f"{path / shard}: tensor {quoted(name)} is not in {index}; the two are not of one checkpoint")
            elif (other := shard_of[name]) != shard and name in held.get(other, {}):
                problems.append(
                    f"{path / shard}: holds tensor {quoted(name)}, which is also in {other}, where {index} says it is"
                )
    return problems
