"""The writer, and what it promises when the process is killed at any moment: this file run as a script does the killing."""

# ruff: noqa: PT012 - a writer fails as a block

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_cl.checkpoint import staging, writer
from mergekit_cl.checkpoint.stored import numpy_dtype
from mergekit_cl.checkpoint.verify import verify
from mergekit_cl.checkpoint.writer import Output, Writer, file_names, split
from mergekit_cl.errors import CheckpointError
from mergekit_cl.kernels import BLOCK, Array

OUTPUTS = (
    Output("embed.weight", (3, 50), "bfloat16"),
    Output("mask", (7,), "bool"),
    Output("layer.weight", (40, 5), "float32"),
    Output("nothing", (0, 4), "float32"),
    Output("positions", (9,), "int64"),
    Output("scale", (), "float16"),
    Output("narrow", (5,), "float8_e4m3fn"),
)
COMPANIONS = {"config.json": b"{}\n", "custom/code.py": b"pass\n"}
SHARD = 380  # bytes: makes three files of OUTPUTS


def values(output: Output, seed: int = 0) -> Array:
    """Make the elements of a tensor: 1-D, of its dtype, finite; the same each time."""
    generator = np.random.default_rng([seed, *output.name.encode()])
    return generator.integers(0, 2 if output.dtype == "bool" else 50, output.size).astype(numpy_dtype(output.dtype))


def fill(to: Writer, outputs: Sequence[Output] = OUTPUTS, seed: int = 0) -> list[str]:
    """Write all that is to be written, and say what that was."""
    names = [output.name for output in outputs if output.name not in to.done]
    for output in outputs:
        if output.name in names:
            to.write(output.name, 0, values(output, seed))
    return names


def merge(target: Path, *, seed: int = 0, companions: Mapping[str, Path | bytes] = COMPANIONS, **options: Any) -> list[str]:
    options = {"fingerprint": str(seed), "shard_size": SHARD, "metadata": {"format": "pt"}, **options}
    with Writer(target, OUTPUTS, **options) as to:
        written = fill(to, seed=seed)
        to.commit(companions)
    return written


def contents(path: Path) -> dict[str, bytes]:
    """Read all that is in a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def interrupt(target: Path, names: Sequence[str], seed: int = 0, **options: Any) -> None:
    """Write some tensors, and press Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), Writer(target, OUTPUTS, fingerprint=str(seed), shard_size=SHARD, **options) as to:
        fill(to, [output for output in OUTPUTS if output.name in names], seed)
        raise KeyboardInterrupt


# what is written


def test_files_by_hand(tmp_path: Path) -> None:
    outputs = [Output("b", (3,), "bool"), Output("a", (2, 1), "float32"), Output("empty", (0,), "int64")]
    with Writer(tmp_path / "m.safetensors", outputs, fingerprint="", metadata={"k": "v"}, single_file=True) as to:
        to.write("a", 0, np.float32([1, 2]))
        to.write("b", 0, np.array([True, False, True]))
        to.commit({})
    raw = (tmp_path / "m.safetensors").read_bytes()
    checksums = "".join(
        xxhash.xxh3_64_hexdigest(f'["{name}", "{dtype}", {shape}]'.encode() + digests)
        for name, dtype, shape, digests in [
            ("empty", "int64", [0], b""),
            ("a", "float32", [2, 1], xxhash.xxh3_64_digest(np.float32([1, 2]).tobytes())),
            ("b", "bool", [3], xxhash.xxh3_64_digest(b"\x01\x00\x01")),
        ]
    )
    header = (
        '{"__metadata__":{"k":"v","mergekit_cl.checksums":"' + checksums + '"},'
        '"empty":{"dtype":"I64","shape":[0],"data_offsets":[0,0]},'
        '"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BOOL","shape":[3],"data_offsets":[8,11]}}'
    )
    length = -(-len(header) // 8) * 8
    assert raw == length.to_bytes(8, "little") + header.ljust(length).encode() + np.float32([1, 2]).tobytes() + b"\x01\x00\x01"
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_safetensors_loads_the_files(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors import torch as for_torch
    from safetensors.numpy import load_file

    merge(tmp_path / "model", metadata={"format": "pt", "mergekit_cl.checksums": "of an input"})
    found: dict[str, Any] = {}
    for file in sorted((tmp_path / "model").glob("*.safetensors")):
        found |= for_torch.load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            if "narrow" not in opened.keys():  # noqa: SIM118 - not a mapping
                assert set(load_file(file)) == set(opened.keys())
    assert found.keys() == {output.name for output in OUTPUTS}
    for output in OUTPUTS:
        tensor = found[output.name]
        assert (tuple(tensor.shape), str(tensor.dtype)) == (output.shape, f"torch.{output.dtype}")
        wanted = values(output).astype(np.float64)
        np.testing.assert_array_equal(tensor.to(torch.float64).reshape(-1).numpy(), wanted, strict=True)


def test_index_and_companions(tmp_path: Path) -> None:
    (tmp_path / "vocab").write_bytes(b"words")
    merge(tmp_path / "deep" / "er" / "model", companions={**COMPANIONS, "tokenizer.model": tmp_path / "vocab"})
    made = contents(tmp_path / "deep/er/model")
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(made) == ["config.json", "custom/code.py", *files, "model.safetensors.index.json", "tokenizer.model"]
    assert (made["tokenizer.model"], made["custom/code.py"]) == (b"words", b"pass\n")
    index = {
        "metadata": {"total_parameters": 150 + 7 + 200 + 9 + 1 + 5, "total_size": 300 + 7 + 800 + 72 + 2 + 5},
        "weight_map": {
            "embed.weight": files[1],
            "layer.weight": files[0],  # larger than a shard: a file of its own, which is complete before the current one
            "mask": files[1],
            "narrow": files[2],
            "nothing": files[1],
            "positions": files[1],
            "scale": files[2],
        },
    }
    assert json.loads(made["model.safetensors.index.json"]) == index
    assert made["model.safetensors.index.json"].decode() == json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert verify(tmp_path / "deep/er/model").tensors == len(OUTPUTS)


@given(sizes=st.lists(st.integers(0, 12), max_size=12), limit=st.integers(1, 20))
def test_shards_are_those_of_transformers(sizes: list[int], limit: int) -> None:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    ours = split([Output(str(i), (size + 1,), "float64") for i, size in enumerate(sizes)], limit * 8)
    # an element more each, as empty tensors count as one to them
    tensors = {str(i): torch.zeros(size + 1, dtype=torch.float64) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit * 8)
    if sizes:
        assert dict(zip(file_names("model", len(ours)), [[o.name for o in shard] for shard in ours], strict=True)) == (
            theirs.filename_to_tensors
        )
    else:
        assert ours == [[]]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    with Writer(tmp_path / "m", [], fingerprint="") as to:
        to.commit({})
    assert verify(tmp_path / "m").tensors == 0


SHAPES = st.one_of(st.just(()), st.tuples(st.integers(0, 70)), st.tuples(st.integers(0, 9), st.integers(0, 9)))
DTYPES = st.sampled_from(["bfloat16", "float32", "float64", "int64", "bool", "int16", "float8_e5m2", "uint8"])


@settings(max_examples=40)
@given(data=st.data())
def test_any_windows_in_any_order_from_any_thread(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Blocks of 8 elements stand for those of 65,536, so that windows of all kinds occur."""
    outputs = [
        Output(f"tensor {i}", *kind) for i, kind in enumerate(data.draw(st.lists(st.tuples(SHAPES, DTYPES), max_size=6)))
    ]
    aligned = data.draw(st.booleans())
    windows = []
    for output in outputs:
        cuts = data.draw(st.sets(st.integers(1, max(1, (output.size - 1) // 8 if aligned else output.size - 1)), max_size=4))
        bounds = [
            0,
            *sorted(cut * 8 if aligned else cut for cut in cuts if output.size > (cut * 8 if aligned else cut)),
            output.size,
        ]
        windows += [(output, first, last) for first, last in pairwise(bounds)]
    windows = data.draw(st.permutations(windows))
    shard_size = data.draw(st.none() | st.integers(1, 600))
    raw = data.draw(st.booleans())
    folder = tmp_path_factory.mktemp("any")

    def put(to: Writer, window: tuple[Output, int, int]) -> None:
        output, first, last = window
        part = values(output)[first:last]
        to.write(output.name, first, part.view(np.uint8) if raw else part)

    with mock.patch.object(writer, "BLOCK", 8), mock.patch("mergekit_cl.checkpoint.verify.BLOCK", 8):
        with Writer(folder / "m", outputs, fingerprint="", shard_size=shard_size) as to:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda window: put(to, window), windows))
            to.commit({})
        read: list[int] = []
        report = verify(folder / "m", read.append)
        with Writer(folder / "whole", outputs, fingerprint="", shard_size=shard_size) as to:
            fill(to, outputs)
            to.commit({})
    assert contents(folder / "m") == contents(folder / "whole")
    assert (report.tensors, report.bytes, sum(read)) == (len(outputs), *2 * [sum(output.nbytes for output in outputs)])
    for file in (folder / "m").glob("*.safetensors"):
        raw_file = file.read_bytes()
        start = 8 + int.from_bytes(raw_file[:8], "little")
        header = json.loads(raw_file[8:start])
        listed = header.pop("__metadata__")["mergekit_cl.checksums"]
        assert start % 8 == 0
        assert len(listed) == 16 * len(header)
        for name, entry in header.items():
            output = next(output for output in outputs if output.name == name)
            begin, end = (start + offset for offset in entry["data_offsets"])
            stored = raw_file[begin:end]
            assert begin % numpy_dtype(output.dtype).itemsize == 0
            assert stored == values(output).tobytes()
            block = 8 * numpy_dtype(output.dtype).itemsize
            digests = b"".join(xxhash.xxh3_64_digest(stored[i : i + block]) for i in range(0, len(stored), block))
            described = json.dumps([name, output.dtype, list(output.shape)]).encode()
            assert xxhash.xxh3_64_hexdigest(described + digests) in listed
    shutil.rmtree(folder)


def test_real_blocks(tmp_path: Path) -> None:
    output = Output("x", (2 * BLOCK + 5,), "bfloat16")
    data = np.arange(output.size, dtype=np.uint16).view(ml_dtypes.bfloat16)
    for name, bounds in {"aligned": [0, BLOCK, output.size], "not": [0, 1, BLOCK + 1, output.size]}.items():
        with Writer(tmp_path / name, [output], fingerprint="") as to:
            for first, last in reversed(list(pairwise(bounds))):
                to.write("x", first, data[first:last])
            to.commit({})
    assert contents(tmp_path / "aligned") == contents(tmp_path / "not")
    assert verify(tmp_path / "not").bytes == 2 * output.size


def test_outputs_that_cannot_be_stored(tmp_path: Path) -> None:
    wrong = [
        Output("c", (2,), "complex128"),
        Output("a", (1,), "bool"),
        Output("a", (1,), "bool"),
        Output("__metadata__", (), "bool"),
    ]
    with pytest.raises(CheckpointError) as caught:
        Writer(tmp_path / "m", [*wrong, Output("\ud800", (), "bool")], fingerprint="")
    assert str(caught.value).splitlines() == [
        'tensor "a": is to be written 2 times',
        'tensor "__metadata__": the format does not allow this name',
        'tensor "\\ud800": the format does not allow this name',
        'tensor "c": safetensors files do not hold complex128',
    ]
    with pytest.raises(CheckpointError, match="smaller shards"), mock.patch.object(writer, "LIMIT", 100):
        Writer(tmp_path / "m", OUTPUTS, fingerprint="")
    with pytest.raises(CheckpointError, match="not a path"):
        Writer(tmp_path / "m\0", OUTPUTS, fingerprint="")


@pytest.mark.parametrize(
    ("name", "first", "data"),
    [
        ("mask", 6, np.ones(2, bool)),
        ("mask", -1, np.ones(2, bool)),
        ("mask", 0, np.ones(7, np.int8)),
        ("other", 0, np.ones(1, bool)),
        ("layer.weight", 0, np.ones(6, np.uint8)),
        ("positions", 0, np.ones(3, np.int64)),  # written twice
    ],
)
def test_windows_that_are_not_to_be_written(tmp_path: Path, name: str, first: int, data: Array) -> None:
    with pytest.raises(CheckpointError, match=f'tensor "{name}"'), Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        to.write("positions", 0, values(OUTPUTS[4]))
        to.write(name, first, data)
    assert os.listdir(tmp_path) == []


def test_incomplete_tensors_are_not_committed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        fill(to, OUTPUTS[1:])
        to.write("embed.weight", 0, values(OUTPUTS[0])[:149])
        to.commit({})
    assert str(caught.value) == 'tensor "embed.weight": has not been written completely'
    with pytest.raises(CheckpointError, match="to be written"):
        to.write("embed.weight", 149, values(OUTPUTS[0])[149:])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "companions",
    [
        {"../config.json": b""},
        {"/config.json": b""},
        {"": b""},
        {"a": b"", "a/b": b""},
        {"a": b"", "./a": b""},
        {"model.safetensors.index.json": b""},
        {"model-00001-of-00003.safetensors/x": b""},
        {"x": Path("missing")},
    ],
    ids=str,
)
def test_companions_that_cannot_be_written(tmp_path: Path, companions: dict[str, bytes]) -> None:
    with pytest.raises(CheckpointError) as caught:
        merge(tmp_path / "m", companions=companions)
    assert next(iter(companions)) in str(caught.value) or "missing: cannot be copied: No such file" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_single_file_has_no_companions(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="single file, which config"):
        merge(tmp_path / "m.safetensors", single_file=True)


# resume


def test_resume_writes_the_rest_and_the_same_bytes(tmp_path: Path) -> None:
    merge(tmp_path / "whole", metadata={})
    interrupt(tmp_path / "m", ["mask", "layer.weight"])
    assert sorted(os.listdir(tmp_path)) == [".m.merging", "whole"]
    written = merge(tmp_path / "m", metadata={})
    assert written == ["embed.weight", "nothing", "positions", "scale", "narrow"]
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["m", "whole"]


def test_resume_does_not_read_back_at_commit_what_it_has_read_before(tmp_path: Path) -> None:
    interrupt(tmp_path / "m", ["mask", "layer.weight"])
    read: list[int] = []
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="0", shard_size=SHARD) as to:
        assert to.done == {"mask", "layer.weight"}
        fill(to)
        to.commit({}, advance=read.append)
    assert sum(read) == 300 + 72 + 2 + 5


def _flip(folder: Path, data: bytes) -> None:
    """Change a byte of a tensor that one of the files in a folder holds."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        if (at := raw.find(data)) >= 0:
            raw[at + len(data) // 2] ^= 4
            file.write_bytes(raw)
            return
    raise AssertionError("not found")


def _truncate(folder: Path, data: bytes) -> None:
    file = next(file for file in folder.glob("*.safetensors") if data in file.read_bytes())
    os.truncate(file, 100)


def _remove(folder: Path, data: bytes) -> None:
    next(file for file in folder.glob("*.safetensors") if data in file.read_bytes()).unlink()


@pytest.mark.parametrize("damage", [_flip, _truncate, _remove])
def test_damaged_staging_is_written_again(tmp_path: Path, damage: Callable[[Path, bytes], None]) -> None:
    merge(tmp_path / "whole", metadata={})
    interrupt(tmp_path / "m", ["embed.weight", "layer.weight"])
    damage(tmp_path / ".m.merging/result", values(OUTPUTS[2]).tobytes())
    assert "layer.weight" in merge(tmp_path / "m", metadata={})
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_of_the_journal_is_ignored(tmp_path: Path, cut: int) -> None:
    merge(tmp_path / "whole", metadata={})
    interrupt(tmp_path / "m", ["mask", "positions"])
    journal = tmp_path / ".m.merging/journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    interrupt(tmp_path / "m", ["embed.weight"])  # its line must not be glued to what is left of the torn one
    assert merge(tmp_path / "m", metadata={}) == ["layer.weight", "nothing", "positions", "scale", "narrow"]
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "journal",
    [b"", b"\0" * 200, b"{}\n", b'{"format": 1, "fing', None],
)
def test_a_useless_journal_means_to_start_anew(tmp_path: Path, journal: bytes | None) -> None:
    interrupt(tmp_path / "m", ["mask"])
    path = tmp_path / ".m.merging/journal"
    path.unlink() if journal is None else path.write_bytes(journal)
    assert len(merge(tmp_path / "m")) == len(OUTPUTS)
    verify(tmp_path / "m")


def test_useless_lines_of_the_journal_are_ignored(tmp_path: Path) -> None:
    interrupt(tmp_path / "m", ["mask"])
    with (tmp_path / ".m.merging/journal").open("ab") as journal:
        journal.write(b'\0\0\0\n[]\n7\n["0", "unknown"]\n["0"]\n[3, "scale"]\n["0", {}]\n["0", "nothing"]\n\xff\n')
    assert merge(tmp_path / "m", metadata={}) == [output.name for output in OUTPUTS if output.name != "mask"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_size": None}, {"stem": "adapter"}, {"metadata": {"new": ""}}], ids=str)
def test_work_for_another_result_is_dropped(tmp_path: Path, change: dict[str, Any]) -> None:
    interrupt(tmp_path / "m", ["mask"])
    options: dict[str, Any] = {"metadata": {}, **change}
    assert len(merge(tmp_path / "m", **options)) == len(OUTPUTS)
    merge(tmp_path / "whole", **options)
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_files_of_a_killed_commit_do_not_survive(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "m", OUTPUTS, fingerprint="0", shard_size=SHARD) as to:
        fill(to)
        with mock.patch.object(staging, "make_durable", side_effect=KeyboardInterrupt):
            to.commit({"old/name.json": b"", "config.json": b"long, long"})
    assert (tmp_path / ".m.merging/result/old/name.json").exists()
    assert merge(tmp_path / "m", metadata={}) == ["nothing"]
    merge(tmp_path / "whole", metadata={})
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")
    assert not (tmp_path / "m/old").exists()


def test_strangers_in_the_staging_folder_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".m.merging").mkdir()
    (tmp_path / ".m.merging/diary.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"holds diary\.txt, which no merge has written"):
        merge(tmp_path / "m")
    assert contents(tmp_path) == {".m.merging/diary.txt": b"dear"}


@pytest.mark.parametrize("error", [CheckpointError("bad"), RuntimeError("a bug"), KeyboardInterrupt()], ids=repr)
def test_what_an_error_leaves(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        fill(to)
        raise error
    assert os.listdir(tmp_path) == ([] if isinstance(error, CheckpointError) else [".m.merging"])


def test_discard(tmp_path: Path) -> None:
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        fill(to)
        to.discard()
    assert os.listdir(tmp_path) == []


# what is at the target


def _old_model(path: Path) -> dict[str, bytes]:
    path.mkdir()
    (path / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (path / "model.safetensors.index.json").write_bytes(b"old")
    (path / "sub").mkdir()
    (path / "sub/old.json").write_bytes(b"old")
    return contents(path)


def test_a_model_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    old = _old_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"exists; choose another name, or pass overwrite=True \(--overwrite\)"):
        merge(tmp_path / "m")
    with (
        pytest.raises(CheckpointError, match="completely"),
        Writer(tmp_path / "m", OUTPUTS, fingerprint="", overwrite=True) as to,
    ):
        to.commit({})
    assert contents(tmp_path) == {f"m/{name}": data for name, data in old.items()}
    merge(tmp_path / "m", overwrite=True)
    merge(tmp_path / "whole")
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")
    assert not (tmp_path / "m/sub").exists()
    assert sorted(os.listdir(tmp_path)) == ["m", "whole"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    options: dict[str, Any] = {"single_file": True, "companions": {}}
    with pytest.raises(CheckpointError, match="exists"):
        merge(target, **options)
    assert target.read_bytes() == b"old"
    merge(target, overwrite=True, **options)
    assert verify(target).tensors == len(OUTPUTS)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_check_ahead_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _old_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match="exists"):
        Writer(tmp_path / "m", OUTPUTS, fingerprint="").check()
    with pytest.raises(CheckpointError, match="is not a folder"):
        Writer(tmp_path / "m/sub/old.json/m", OUTPUTS, fingerprint="").check()
    Writer(tmp_path / "m", OUTPUTS, fingerprint="", overwrite=True).check()
    Writer(tmp_path / "new/m", OUTPUTS, fingerprint="").check()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"{tmp_path} may not be written to"):
        Writer(tmp_path / "new/m", OUTPUTS, fingerprint="").check()
    assert contents(tmp_path) == {f"m/{name}": data for name, data in old.items()}
    assert os.listdir(tmp_path) == ["m"]


def test_a_replaced_model_is_not_taken_for_work_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files may be linked elsewhere."""
    merge(tmp_path / "m", seed=1)
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "m").glob("*.safetensors"):
        os.link(file, tmp_path / "links" / file.name)
    linked = contents(tmp_path / "links")
    real = staging.put_in_place

    def stop(new: Path, target: Path) -> None:
        real(new, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "put_in_place", stop)
        merge(tmp_path / "m", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".m.merging", "links", "m"]
    merge(tmp_path / "m", overwrite=True)
    assert contents(tmp_path / "links") == linked
    assert sorted(os.listdir(tmp_path)) == ["links", "m"]


def test_stopped_right_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _old_model(tmp_path / "m")
    real = staging.make_durable

    def stop(path: Path) -> None:
        real(path)
        if path == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr(staging, "make_durable", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "m", overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    assert verify(tmp_path / "m").tensors == len(OUTPUTS)


def test_files_are_closed_when_they_are_complete(tmp_path: Path) -> None:
    """There may be more of them than a process may have open."""
    interrupt(tmp_path / "m", ["mask"])
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="0", shard_size=SHARD) as to:
        to.write("scale", 0, values(OUTPUTS[5]))
        assert [file.descriptor >= 0 for file in to._files] == [False, False, True]
        fill(to, [output for output in OUTPUTS if output.name != "scale"])
        assert [file.descriptor for file in to._files] == [-1, -1, -1]
        to.commit({})


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    merge(tmp_path / "m")
    verify(tmp_path / "m")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_folder, {}, "a folder, but not of a model"),
        (lambda path: path.write_bytes(b"x"), {}, "is a file, not a folder"),
        (lambda path: path.write_bytes(b"x"), {"single_file": True}, "not a safetensors file"),
        (lambda path: path.mkdir(), {"single_file": True}, "is a folder"),
        (_old_model, {"single_file": True}, "is a folder"),
        (os.mkfifo, {"single_file": True}, "not a safetensors file"),
        (lambda path: path.symlink_to("elsewhere"), {}, r"symbolic link; name what it points to \(elsewhere\)"),
    ],
)
def test_what_is_never_replaced(tmp_path: Path, make: Callable[[Path], None], options: dict[str, Any], message: str) -> None:
    make(tmp_path / "m")
    before = [os.lstat(tmp_path / "m"), os.listdir(tmp_path)]
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "m", overwrite=True, companions={}, **options)
    assert [os.lstat(tmp_path / "m"), os.listdir(tmp_path)] == before


@pytest.mark.parametrize(
    ("target", "single_file"),
    [
        ("in", False),
        ("in/../in/sub/..", False),
        (".", False),
        ("in/a.safetensors", True),
        ("link", False),
        ("in/new.safetensors", True),
        ("in/sub/new", False),
    ],
)
def test_inputs_are_never_replaced(tmp_path: Path, target: str, single_file: bool) -> None:
    for folder in ("in", "in/sub"):
        (tmp_path / folder).mkdir()
    (tmp_path / "in/a.safetensors").write_bytes(b"old")
    (tmp_path / "x.safetensors").write_bytes(b"old")
    (tmp_path / "link").symlink_to("in")
    inputs = [tmp_path / "in"] if "new" in target else [tmp_path / "link/a.safetensors"]
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"the input|symbolic link"):
        merge(tmp_path / target, overwrite=True, single_file=single_file, inputs=inputs, companions={})
    assert contents(tmp_path) == before
    merge(tmp_path / "beside/m", inputs=inputs)


def test_a_target_that_appears_during_the_merge_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists"), Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        fill(to)
        old = _old_model(tmp_path / "m")
        to.commit({})
    assert contents(tmp_path / "m") == old


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert staging._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"
    with pytest.raises(FileNotFoundError, match="c"):
        staging._exchange(tmp_path / "a", tmp_path / "c")


def test_without_an_exchange_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    old = _old_model(tmp_path / "m")
    rename = os.rename

    def refuse(one: Path, other: Path) -> None:
        if Path(one).name == "result":
            raise OSError(errno.EIO, "broken", str(other))
        rename(one, other)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="broken"):
        patch.setattr(os, "rename", refuse)
        merge(tmp_path / "m", overwrite=True)
    assert contents(tmp_path) == {f"m/{name}": data for name, data in old.items()}
    rename(tmp_path / "m", tmp_path / ".m.replaced")  # as if killed between the two renames
    with pytest.raises(CheckpointError, match="exists"):
        merge(tmp_path / "m")
    assert contents(tmp_path) == {f"m/{name}": data for name, data in old.items()}
    merge(tmp_path / "m", overwrite=True)
    assert os.listdir(tmp_path) == ["m"]
    verify(tmp_path / "m")


# the disk


def test_room_is_checked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        needed = to._needed
    staging.remove(tmp_path / ".m.merging")
    assert needed > sum(output.nbytes for output in OUTPUTS)
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with pytest.raises(CheckpointError) as caught, Writer(tmp_path / "m", OUTPUTS, fingerprint=""):
        pass
    assert str(caught.value) == (
        f"{tmp_path}/m: the result needs {needed:,} bytes more in {tmp_path}, where {needed - 1:,} are free; "
        "free some room, or write elsewhere"
    )
    with pytest.raises(CheckpointError, match="the result needs"):
        Writer(tmp_path / "deep/er/m", OUTPUTS, fingerprint="").check()
    assert os.listdir(tmp_path) == []
    free[0] = needed
    Writer(tmp_path / "deep/er/m", OUTPUTS, fingerprint="").check()
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        fill(to)
        raise KeyboardInterrupt
    free[0] = 0  # the room has been taken before
    Writer(tmp_path / "m", OUTPUTS, fingerprint="other").check()
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        assert len(to.done) == len(OUTPUTS) - 1
        to.commit({})


def _failing(code: int, after: int = 0) -> Callable[..., Any]:
    """Stand for a call of the system that fails, once it has been called some times."""
    calls = count()
    real = os.pwrite

    def call(*args: Any) -> Any:
        if next(calls) < after:
            return real(*args)
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate", "fsync"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    old = _old_model(tmp_path / "m")
    monkeypatch.setattr(os, call, _failing(code, after=2 if call == "pwrite" else 0))
    with pytest.raises(CheckpointError) as caught:
        merge(tmp_path / "m", overwrite=True)
    for part in (f"{tmp_path}/.m.merging/result", os.strerror(code), "the result needs"):
        assert part in str(caught.value)
    assert contents(tmp_path) == {f"m/{name}": data for name, data in old.items()}


def test_disk_full_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(CheckpointError, match=r"journal: the disk is full: the result needs [\d,]+ bytes"):
        merge(tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_a_failed_check_of_the_disk_keeps_what_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "m", ["mask"])
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(os, "posix_fallocate", _failing(errno.ENOSPC))
        merge(tmp_path / "m", metadata={})
    assert "mask" not in merge(tmp_path / "m", metadata={})


def test_file_systems_that_do_not_preallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _failing(errno.EOPNOTSUPP))
    merge(tmp_path / "m")
    verify(tmp_path / "m")


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    merge(tmp_path / "m")
    monkeypatch.undo()
    merge(tmp_path / "whole")
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damaged", ["tensor", "header"])
def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    real = staging.make_durable

    def damage(path: Path) -> None:
        real(path)
        if path.suffix == ".safetensors":
            raw = bytearray(path.read_bytes())
            raw[-1 if damaged == "tensor" else 10] ^= 1
            path.write_bytes(raw)

    monkeypatch.setattr(staging, "make_durable", damage)
    with pytest.raises(CheckpointError, match="check the disk") as caught:
        merge(tmp_path / "m")
    assert damaged == "header" or [line.split('"')[1] for line in str(caught.value).splitlines()] == [
        "layer.weight",
        "mask",
        "narrow",
    ]
    assert os.listdir(tmp_path) == []
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        fill(to)
        to.commit({}, verify=False)
    with pytest.raises(CheckpointError):
        verify(tmp_path / "m")


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in ("file/m", "file/sub/m"):
        with pytest.raises(CheckpointError, match="file is not a folder"):
            merge(tmp_path / target)
    with pytest.raises(CheckpointError, match="File name too long; choose a shorter name"):
        merge(tmp_path / ("m" * 250))
    with pytest.raises(CheckpointError, match="File name too long; choose a shorter name"):
        merge(tmp_path / ("m" * 300))
    with pytest.raises(CheckpointError, match="is not a name"):
        merge(Path("/"))
    assert os.listdir(tmp_path) == ["file"]
    for call in ("open", "mkdir"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Read-only file system; write elsewhere"):
            patch.setattr(os, call, _failing(errno.EROFS))
            merge(tmp_path / "m")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        merge(tmp_path / "m")
    tmp_path.chmod(0o700)


# other processes


def test_two_writers(tmp_path: Path) -> None:
    with Writer(tmp_path / "m", OUTPUTS, fingerprint="") as to:
        with pytest.raises(CheckpointError, match=f"another merge is writing to {tmp_path}/m"):
            merge(tmp_path / "m")
        merge(tmp_path / "other")
        fill(to)
        to.commit({})
    assert sorted(os.listdir(tmp_path)) == ["m", "other"]


def test_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, __file__, "hold", str(tmp_path / "m")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="another merge is writing"):
            merge(tmp_path / "m")
        holder.kill()
    assert sorted(os.listdir(tmp_path)) == [".m.lock", ".m.merging"]
    merge(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("mode", ["fresh", "overwrite", "two renames", "random", "limit"])
def test_killed(tmp_path: Path, mode: str) -> None:
    subprocess.run([sys.executable, __file__, mode, str(tmp_path)], check=True, timeout=50)


def _forked(work: Callable[[], int]) -> int:
    """Run something in a process of its own, and return its status; -9 if it was killed."""
    process = os.fork()
    if process == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _die_before_call(number: int) -> None:
    """Let this process be killed right before one of its calls of the system that change something."""
    calls = count(1)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in (
        "open",
        "pwrite",
        "write",
        "mkdir",
        "ftruncate",
        "posix_fallocate",
        "fsync",
        "rename",
        "replace",
        "unlink",
        "rmdir",
    ):
        setattr(os, name, dying(getattr(os, name)))
    staging._exchange = dying(staging._exchange)


def _kill_everywhere(folder: Path, mode: str) -> None:
    """Kill a merge before each of its calls; each time, the old or the new model is whole, and the next merge finishes it."""
    if mode == "two renames":
        staging._exchange = lambda one, other: False
    merge(folder / "whole")
    whole = contents(folder / "whole")
    target, kept = folder / "at" / "m", []
    for number in count(1):
        target.parent.mkdir()
        old = {} if mode == "fresh" else _old_model(target)

        def run(number: int = number) -> int:
            _die_before_call(number)
            merge(target, overwrite=mode != "fresh")
            return 0

        def resume() -> int:
            return len(OUTPUTS) - len(merge(target, overwrite=True))

        died = _forked(run)
        assert died in (0, -signal.SIGKILL), died
        found = contents(target) if target.exists() else {}
        if mode == "two renames" and not found:
            found = contents(folder / "at/.m.replaced")
        assert found in (old, whole), (number, sorted(found))
        if not died:
            assert found == whole
            break
        done = _forked(resume)
        assert 0 <= done < len(OUTPUTS), done
        kept.append(done)
        assert contents(target) == whole, number
        assert os.listdir(target.parent) == ["m"], (number, os.listdir(target.parent))
        shutil.rmtree(target.parent)
    assert len(kept) > 40, kept
    assert set(kept) == set(range(len(OUTPUTS))), kept  # all but the empty tensor are kept from some moment on


def _kill_at_random(folder: Path) -> None:
    """Kill a merge with several threads again and again, until it has ended."""
    outputs = [Output(f"t{number}", (BLOCK + 100 * number,), "bfloat16") for number in range(40)]

    def run(target: Path, pause: float) -> int:
        with Writer(target, outputs, fingerprint="", shard_size=10**6) as to, ThreadPoolExecutor(3) as pool:

            def put(output: Output) -> None:
                for first in range(0, output.size, BLOCK // 2):  # not all at the start of a block
                    to.write(output.name, first, values(output)[first : first + BLOCK // 2])
                    time.sleep(pause)

            list(pool.map(put, [output for output in outputs if output.name not in to.done]))
            to.commit({})
        return 0

    run(folder / "whole", 0)
    chance, kills = random.Random(1), 0
    while not (folder / "m").exists():
        process = os.fork()
        if process == 0:
            os._exit(run(folder / "m", 0.005))
        time.sleep(chance.uniform(0.0, 0.03 + 0.005 * kills))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
    assert kills >= 5, kills
    assert contents(folder / "m") == contents(folder / "whole")


def _limit_files(folder: Path) -> None:
    """Let the system refuse files beyond a size."""
    output = Output("x", (3 * BLOCK,), "float32")
    for preallocates in (True, False):

        def run(preallocates: bool = preallocates) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            if not preallocates:
                staging.preallocate = lambda descriptor, size: None
            with Writer(folder / "m", [output], fingerprint="") as to:
                to.write("x", 0, values(output))
            return 1

        def refused(run: Callable[[], int] = run) -> int:
            try:
                return run()
            except CheckpointError as error:
                return 0 if "model.safetensors: cannot be written: File too large (the result needs" in str(error) else 2

        assert _forked(refused) == 0
        assert os.listdir(folder) == []


def _hold(target: Path) -> None:
    with Writer(target, OUTPUTS, fingerprint=""):
        print("held", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    os.fsync = lambda fd: None  # for speed; a killed process loses nothing that the system has taken over
    kind, where = sys.argv[1], Path(sys.argv[2])
    if kind == "hold":
        _hold(where)
    elif kind == "random":
        _kill_at_random(where)
    elif kind == "limit":
        _limit_files(where)
    else:
        _kill_everywhere(where, kind)
