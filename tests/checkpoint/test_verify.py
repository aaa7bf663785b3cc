import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_cl.checkpoint import verify as module
from mergekit_cl.checkpoint.header import read_header
from mergekit_cl.checkpoint.verify import VerifyReport, differences, verify
from mergekit_cl.checkpoint.writer import Output, Writer
from mergekit_cl.errors import CheckpointError
from mergekit_cl.kernels import BLOCK

OUTPUTS = (
    Output("a", (BLOCK + 3,), "int16"),
    Output("empty", (0,), "bool"),
    Output("b", (2, 5), "float64"),
    Output("c", (), "float32"),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of three shards: [a], [empty, b], [c]."""
    with Writer(tmp_path / "model", OUTPUTS, fingerprint="", shard_size=80) as to:
        to.write("a", 0, np.arange(BLOCK + 3, dtype=np.uint16).view(np.int16))
        to.write("b", 0, np.arange(10.0))
        to.write("c", 0, np.float32([7]))
        to.commit({"config.json": b"{}"})
    return tmp_path / "model"


def shard(model: Path, number: int) -> Path:
    return model / f"model-0000{number}-of-00003.safetensors"


def problems(path: Path) -> list[str]:
    """Verify what is damaged, and list the faults without the folder's name."""
    with pytest.raises(CheckpointError) as caught:
        verify(path)
    return [line.removeprefix(f"{path}/") for line in str(caught.value).splitlines()]


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 16
    file.write_bytes(raw)


def test_all_is_well(model: Path) -> None:
    read: list[int] = []
    size = 2 * (BLOCK + 3) + 80 + 4
    assert verify(model, read.append) == VerifyReport(files=3, tensors=4, bytes=size)
    assert sum(read) == size
    assert verify(str(shard(model, 2))) == VerifyReport(files=1, tensors=2, bytes=80)


def test_pieces_do_not_matter(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1)
    monkeypatch.setattr(module, "_READ", 1)
    assert verify(model).tensors == 4


@pytest.mark.parametrize("at", [-1, -2 * (BLOCK + 3), -6, -7])
def test_every_flipped_byte_is_found(model: Path, at: int) -> None:
    flip(shard(model, 1), at)
    assert problems(model) == [
        'model-00001-of-00003.safetensors: tensor "a": damaged: its bytes are not those that were written'
    ]


def test_all_problems_are_listed(model: Path) -> None:
    flip(shard(model, 1), -1)
    flip(shard(model, 2), -1)
    shard(model, 3).unlink()
    (model / "old.safetensors").write_bytes(b"")
    found = problems(model)
    assert len(found) == 5
    assert found[0] == "old.safetensors: is empty: has 0 bytes, no header"
    assert found[1] == "model-00003-of-00003.safetensors: is missing; model.safetensors.index.json lists 1 of its tensors"
    assert found[2] == "old.safetensors: does not belong to the model: no index lists it"
    assert found[3].startswith('model-00001-of-00003.safetensors: tensor "a": damaged')
    assert found[4].startswith('model-00002-of-00003.safetensors: tensor "b": damaged')


def test_a_truncated_file(model: Path) -> None:
    file = shard(model, 1)
    file.write_bytes(file.read_bytes()[:-1])
    (found,) = problems(model)
    assert "model-00001-of-00003.safetensors: truncated" in found
    assert 'tensor "a"' in found


def test_a_file_that_is_truncated_while_it_is_read(model: Path) -> None:
    _, tensors = read_header(shard(model, 1))
    shard(model, 1).write_bytes(shard(model, 1).read_bytes()[:-BLOCK])
    wrong = differences([(tensors[0], "0" * 16)])
    assert [*wrong] == tensors
    assert "ends at byte" in wrong[tensors[0]]
    assert '(in tensor "a")' in wrong[tensors[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"a"', '"x"'), "tensor"),
        (('"I16"', '"U16"'), 'tensor "a": damaged'),
        ((f'"shape":[{BLOCK + 3}]', f'"shape":[1,{BLOCK + 3}]'), 'tensor "a": damaged'),
        (('"mergekit_cl.checksums"', '"mergekit_cl.checksumz"'), "holds no checksums: it was not written by mergekit_cl"),
    ],
)
def test_changed_headers(model: Path, change: tuple[str, str], message: str) -> None:
    """The checksum covers name, dtype and shape."""
    raw = shard(model, 1).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(change[0].encode(), change[1].encode()).rstrip()
    assert header != raw[8 : 8 + length].rstrip()
    shard(model, 1).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert message in "\n".join(problems(model))


def test_checksums_that_are_too_few(model: Path) -> None:
    raw = shard(model, 2).read_bytes()
    at = raw.index(b"checksums") + len('checksums":"')
    shard(model, 2).write_bytes(raw[:at] + raw[at + 16 :].replace(b'"}', b'"}' + b" " * 16, 1))
    assert problems(model) == ["model-00002-of-00003.safetensors: holds 1 checksums for 2 tensors; write it again"]


def test_a_checksum_is_not_that_of_another_tensor(tmp_path: Path) -> None:
    with Writer(tmp_path / "m", [Output("a", (4,), "int8"), Output("b", (4,), "int8")], fingerprint="") as to:
        for name in ("a", "b"):
            to.write(name, 0, np.zeros(4, np.int8))
        to.commit({})
    checksums = read_header(tmp_path / "m/model.safetensors")[0].metadata["mergekit_cl.checksums"]
    assert checksums[:16] != checksums[16:]


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff", b"[" * 100_000],
    ids=lambda index: repr(index[:30]),
)
def test_a_damaged_index(model: Path, index: bytes) -> None:
    (model / "model.safetensors.index.json").write_bytes(index)
    assert problems(model) == ["model.safetensors.index.json: is not an index of tensors and their files"]


def test_an_index_that_contradicts_the_files(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["weight_map"]["a"] = shard(model, 3).name
    path.write_text(json.dumps(index))
    assert problems(model) == [
        'model-00003-of-00003.safetensors: tensor "a": is missing, but model.safetensors.index.json lists it',
        "model-00001-of-00003.safetensors: does not belong to the model: no index lists it",
    ]
    del index["weight_map"]["a"], index["weight_map"]["b"]
    index["weight_map"]["a"] = shard(model, 1).name
    path.write_text(json.dumps(index))
    assert problems(model) == ['model-00002-of-00003.safetensors: tensor "b": model.safetensors.index.json does not list it']
    path.unlink()
    assert "but no index" in problems(model)[0]
    for number in (1, 2):
        shard(model, number).unlink()
    assert problems(model) == [
        f"{model}: holds model-00003-of-00003.safetensors, but no index (*.safetensors.index.json) that says which files belong"
    ]


def test_files_of_others(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    (message,) = problems(tmp_path)
    assert message == "a.safetensors: holds no checksums: it was not written by mergekit_cl, or was rewritten since"
    (tmp_path / "sub").mkdir()
    assert "holds no safetensors files" in problems(tmp_path / "sub")[0]
    assert "No such file" in problems(tmp_path / "missing")[0]
    assert "cannot be read" in problems(tmp_path / "\0")[0]
    (tmp_path / "b.safetensors").mkdir()
    assert len(problems(tmp_path / "b.safetensors")) == 1
