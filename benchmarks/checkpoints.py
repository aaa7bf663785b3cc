"""Folders of checkpoints to merge, and what a process that merges them costs.

``python benchmarks/checkpoints.py make DIR --size 0.95B`` writes a base and fine-tunes of it, as Hugging Face stores them;
``python benchmarks/checkpoints.py measure COMMAND...`` runs a command and prints its time, memory and bytes.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

SPREAD, NOISE = 0.02, 0.002  # standard deviations of the base, and of what fine-tuning changed
POOL = (16 << 20) - 3  # random numbers of a folder; weights repeat after so many, which saves most of the time
DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


@dataclass(frozen=True)
class Llama:
    """The sizes of a language model of Llama's architecture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name all tensors, 9 in each layer, with their shapes."""
        key_value = self.hidden // self.heads * self.kv_heads
        layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        layers = {f"model.layers.{n}.{name}.weight": shape for n in range(self.layers) for name, shape in layer.items()}
        ends = {"model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        head = {} if self.tied else {"lm_head.weight": (self.vocabulary, self.hidden)}
        return {**ends, **layers, **head}

    @property
    def parameters(self) -> int:
        """How many numbers the model has; tied ones count once."""
        return sum(prod(shape) for shape in self.shapes().values())

    def config(self, dtype: str) -> dict[str, Any]:
        """Write config.json of transformers."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype,
        }


SIZES = {
    "tiny": Llama(hidden=64, intermediate=176, layers=6, heads=4, kv_heads=2, vocabulary=384),
    "many": Llama(hidden=16, intermediate=32, layers=222, heads=2, kv_heads=1, vocabulary=64, tied=True),  # 2,000 tensors
    "0.95B": Llama(hidden=2048, intermediate=5504, layers=19, heads=32, kv_heads=4, vocabulary=32000),
    "4x": Llama(hidden=4096, intermediate=11264, layers=20, heads=32, kv_heads=4, vocabulary=32000),  # 3.8 B
}


def make(
    folder: Path,
    llama: Llama,
    *,
    models: int = 3,
    shards: int = 1,
    dtype: str = "bfloat16",
    linked: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Write ``folder/base``, ``folder/model-1`` and so on, and return these paths.

    A model is the base plus noise, rounded to ``dtype``. With ``linked`` the files of all models but the first are hard links
    to those of the first. The same arguments give the same bytes.
    """
    rng = np.random.default_rng(seed)
    elements = min(POOL, llama.parameters)
    base = rng.standard_normal(elements, np.float32) * np.float32(SPREAD)
    paths = [folder / "base", *(folder / f"model-{n}" for n in range(1, models + 1))]
    for n, path in enumerate(paths):
        if linked and n > 1:
            path.mkdir(parents=True)
            for file in paths[1].iterdir():
                (path / file.name).hardlink_to(file)
            continue
        noise = rng.standard_normal(elements, np.float32) * np.float32(NOISE if n else 0)
        _write_folder(path, llama, base + noise, shards, dtype)
    return paths


def _write_folder(path: Path, llama: Llama, pool: npt.NDArray[np.float32], shards: int, dtype: str) -> None:
    path.mkdir(parents=True)
    shapes, (_, kind) = llama.shapes(), DTYPES[dtype]
    total = llama.parameters * kind.itemsize
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        parts[done * shards // total][name] = shape
        done += prod(shape) * kind.itemsize
    parts = [part for part in parts if part]
    stored, start = pool.astype(kind), 0
    index: dict[str, str] = {}
    for n, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{n:05}-of-{len(parts):05}.safetensors"
        start = _write_file(path / file, part, pool, stored, start, dtype)
        index |= dict.fromkeys(part, file)
    if len(parts) > 1:
        _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(path / "config.json", llama.config(dtype))
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    _write_json(path / "tokenizer.json", _tokenizer())


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pool: npt.NDArray[np.float32],
    stored: npt.NDArray[Any],
    start: int,
    dtype: str,
) -> int:
    """Write a safetensors file of what the pool holds from ``start`` on, and return where the next one starts."""
    code, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = prod(shape) * kind.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            # weights of a norm lie about 1
            piece, shift = (pool, 1) if len(shape) == 1 else (stored, 0)
            for part in _pieces(piece, start, prod(shape)):
                file.write(((part + shift).astype(kind) if shift else part).view(np.uint8).data)
            start = (start + prod(shape)) % len(pool)
    return start


def _pieces(pool: npt.NDArray[Any], start: int, count: int) -> Iterator[npt.NDArray[Any]]:
    """Cut ``count`` numbers out of the pool, which begins again after its end."""
    while count:
        piece = pool[start : start + count]
        yield piece
        start, count = 0, count - len(piece)


def _tokenizer() -> dict[str, Any]:
    """Write tokenizer.json of a tokenizer that knows two words."""
    words = ["<unk>", "<s>", "</s>", "hello", "world"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": word, **flags} for n, word in enumerate(words[:3])],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "<unk>"},
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def warm(paths: Sequence[Path]) -> None:
    """Read every file once, so that it is in memory unless memory is short."""
    buffer = bytearray(8 << 20)
    for path in paths:
        for file in path.iterdir():
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass


def make_place(needed: int) -> Path:
    """Make a folder in memory (``/dev/shm``) if there is room for so many bytes and 4 GiB more, else beside temporary files."""
    shared = Path("/dev/shm")
    free = _fields("meminfo").get("MemAvailable", 0) << 10
    roomy = shared.is_dir() and min(free, shutil.disk_usage(shared).free) > needed + (4 << 30)
    return Path(tempfile.mkdtemp(prefix="mergekit-cl-", dir=shared if roomy else None))


@dataclass(frozen=True)
class Run:
    """What a process cost, children included: seconds, and bytes."""

    seconds: float
    anonymous: int
    """The most anonymous memory (RssAnon) that was seen; it is looked at every millisecond."""
    resident: int
    """The most resident memory of the process itself (VmHWM), mapped files included."""
    read: int
    """Bytes that came out of calls such as ``read``; reading a mapped file is no call."""
    written: int


def measure(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. If it fails, that is a RuntimeError with the end of what it printed."""
    with tempfile.TemporaryFile() as log:
        start = perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        ended = os.pidfd_open(process.pid)
        try:
            seconds, anonymous, resident = _watch(process.pid, ended, start)
            counted = _fields(f"{process.pid}/io")  # of children, too, that it waited for; there until we wait for it
        finally:
            os.close(ended)
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            end = log.read()[-4000:].decode(errors="replace")
            raise RuntimeError(f"exit status {process.returncode}: {' '.join(map(str, command))}\n{end}")
    return Run(seconds, anonymous, resident, counted["rchar"], counted["wchar"])


def _watch(pid: int, ended: int, start: float) -> tuple[float, int, int]:
    """Look at the memory of a process and of its children until it ends: seconds, most RssAnon in sum, VmHWM."""
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM counts from here
    children: list[int] = []
    anonymous = resident = samples = 0
    while not poll.poll(1):
        if samples % 16 == 0:
            children = _children(pid)
        samples += 1
        status = _fields(f"{pid}/status")
        now = status.get("RssAnon", 0) + sum(_fields(f"{child}/status").get("RssAnon", 0) for child in children)
        anonymous, resident = max(anonymous, now << 10), max(resident, status.get("VmHWM", 0) << 10)
    return perf_counter() - start, anonymous, resident


def _fields(name: str) -> dict[str, int]:
    """Read the numbers of a file in /proc, as they stand there; none of a process that is gone."""
    try:
        lines = Path("/proc", name).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key: int(value.split()[0]) for key, _, value in pairs if value.split()[:1] and value.split()[0].isdecimal()}


def _children(pid: int) -> list[int]:
    """List the children of a process, and theirs."""
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found + [grandchild for child in found for grandchild in _children(child)]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    maker = commands.add_parser("make", help="write a base and models as Hugging Face folders")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--size", choices=SIZES, default="0.95B")
    maker.add_argument("--layers", type=int, help="other than the size has")
    maker.add_argument("--models", type=int, default=3)
    maker.add_argument("--shards", type=int, default=1)
    maker.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    maker.add_argument("--linked", action="store_true", help="all models but the first are hard links to the first")
    commands.add_parser("measure", help="run a command, and print what it cost").add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    try:
        if given.command == "measure":
            print(json.dumps(asdict(measure(given.words)), indent=1))
            return
        llama = SIZES[given.size] if given.layers is None else replace(SIZES[given.size], layers=given.layers)
        paths = make(given.folder, llama, models=given.models, shards=given.shards, dtype=given.dtype, linked=given.linked)
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
    print(*paths, f"{llama.parameters:,} parameters, {len(llama.shapes()):,} tensors each", sep="\n")


if __name__ == "__main__":
    main()
