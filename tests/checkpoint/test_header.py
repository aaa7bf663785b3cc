"""Headers of safetensors files: what is read from them, and every way in which they can be wrong."""

import json
import os
import struct
import tracemalloc
from math import prod
from pathlib import Path
from time import process_time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mergekit_cl.checkpoint.header import LIMIT, read_header
from mergekit_cl.checkpoint.stored import Stored
from mergekit_cl.errors import CheckpointError

Entry = dict[str, Any]


def entry(begin: int = 0, end: int = 4, dtype: str = "F32", shape: Any = (1,), **more: Any) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def file_of(tmp_path: Path, header: dict[str, Any] | bytes, data: int = 0) -> Path:
    """Write a file: a header, as JSON unless it is bytes, and some bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert all(line.startswith((f"{path}: ", "... and ")) for line in message.splitlines())
    return message


def values(tensor: Stored) -> Any:
    out = np.empty(int(np.prod(tensor.shape)), getattr(ml_dtypes, tensor.dtype, tensor.dtype))
    tensor.read(0, out.size, out)
    return out.reshape(tensor.shape)


def test_what_the_reference_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written: dict[str, Any] = {
        "z": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(4, dtype=np.float16),
        "brain": np.arange(5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
        "empty": np.empty((0, 3), np.float64),
    }
    save_file(written, path, metadata={"format": "pt"})
    file, tensors = read_header(path)
    assert (file.path, file.size, file.mtime_ns) == (path, path.stat().st_size, path.stat().st_mtime_ns)
    assert file.metadata == {"format": "pt"}
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert file.digest == xxhash.xxh3_128_hexdigest(path.read_bytes()[8 : 8 + length])
    assert [tensor.offset for tensor in tensors] == sorted(tensor.offset for tensor in tensors)
    assert {tensor.name for tensor in tensors} == set(written)
    for tensor in tensors:
        assert (tensor.shape, tensor.stored_dtype) == (written[tensor.name].shape, written[tensor.name].dtype.name)
        np.testing.assert_array_equal(values(tensor), written[tensor.name])
    file.close()


@pytest.mark.parametrize(
    ("code", "name", "itemsize"),
    [
        ("BOOL", "bool", 1),
        ("U8", "uint8", 1),
        ("I8", "int8", 1),
        ("I16", "int16", 2),
        ("U16", "uint16", 2),
        ("I32", "int32", 4),
        ("U32", "uint32", 4),
        ("I64", "int64", 8),
        ("U64", "uint64", 8),
        ("F16", "float16", 2),
        ("BF16", "bfloat16", 2),
        ("F32", "float32", 4),
        ("F64", "float64", 8),
        ("F8_E4M3", "float8_e4m3fn", 1),
        ("F8_E5M2", "float8_e5m2", 1),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz", 1),
        ("F8_E5M2FNUZ", "float8_e5m2fnuz", 1),
        ("F8_E8M0", "float8_e8m0fnu", 1),
        ("C64", "complex64", 8),
    ],
)
def test_dtypes(tmp_path: Path, code: str, name: str, itemsize: int) -> None:
    size = 3 * itemsize
    file, (tensor,) = read_header(file_of(tmp_path, {"a": entry(0, size, code, [3])}, size))
    assert (tensor.stored_dtype, tensor.nbytes, tensor.shape) == (name, size, (3,))
    with safe_open(file.path, "np") as reference:  # the table has the names that the reference has
        assert list(reference.keys()) == ["a"]


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_below_a_byte_are_refused(tmp_path: Path, code: str) -> None:
    assert f'tensor "a": its elements ({code}) are smaller than a byte' in refused(
        file_of(tmp_path, {"a": entry(0, 3, code, [4])}, 3)
    )


def test_order_is_that_of_the_bytes_and_the_header_may_be_padded(tmp_path: Path) -> None:
    header = {"a": entry(4, 8), "b": entry(0, 4), "c": entry(8, 8, shape=[0]), "__metadata__": {}}
    _, tensors = read_header(file_of(tmp_path, json.dumps(header).encode() + b"   ", 8))
    assert [tensor.name for tensor in tensors] == ["b", "a", "c"]
    assert tensors[1].offset - tensors[0].offset == 4


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert read_header(file_of(tmp_path, {}))[1] == []
    assert read_header(file_of(tmp_path, {"__metadata__": None}))[0].metadata == {}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", 0, "not valid JSON"),
        (b"{", 0, "not valid JSON"),
        (b"{} {}", 0, "not valid JSON"),
        (b"{}\0", 0, "not valid JSON"),
        (b'{"a\xff": 1}', 0, "not UTF-8 at byte 3"),
        (b"[]", 0, "not an object"),
        (b"null", 0, "not an object"),
        (b'{"a": NaN}', 0, "NaN is not a number in JSON"),
        (b'{"a": ' + b"[" * 200_000, 0, "nested too deeply"),
        (b'{"a": ' + b'{"a":' * 200_000, 0, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "not valid JSON"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4, '"\\ud800": the name is not valid Unicode'),
        (b'{"__metadata__": {"\\udfff": "a"}}', 0, "the name is not valid Unicode"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__ is not an object whose values are strings"),
        ({"__metadata__": []}, 0, "__metadata__ is not an object"),
        (b'{"__metadata__": {"a": "\\udfff"}}', 0, "__metadata__ is not an object whose values are strings"),
        (b'{"__metadata__": {"k": "a", "k": "b"}}', 0, '"k" is given twice'),
        (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4, '"dtype" is given twice'),
        ({"a": 1}, 0, 'tensor "a": its entry is not an object'),
        ({"a": ["F32", [1], [0, 4]]}, 4, 'tensor "a": its entry is not an object'),
        ({"a": {"dtype": "F32"}}, 4, 'tensor "a": its entry lacks shape and data_offsets'),
        ({"a": entry(dtype=4)}, 4, 'tensor "a": its dtype is not a string'),
        ({"a": entry(dtype="Q4")}, 4, 'tensor "a": unknown dtype "Q4"'),
        ({"a": entry(shape=4)}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape="1")}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=[True])}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=[1.0])}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=["1"])}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=[None])}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=[-1, -1])}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=[2**64])}, 4, 'tensor "a": its shape'),
        ({"a": entry(shape=[2**32, 2**32])}, 4, "more than 2^63 elements"),
        ({"a": entry(0, 0, shape=[0, 2**32, 2**32])}, 0, "more than 2^63 elements"),
        ({"a": entry(shape=[1] * 65)}, 4, "more than 64 dimensions"),
        ({"a": entry(shape=[2**40])}, 4, 'tensor "a": has 4 bytes, but F32 of shape [1099511627776] takes 4398046511104'),
        ({"a": entry(0, 3)}, 3, 'tensor "a": has 3 bytes, but F32 of shape [1] takes 4'),
        ({"a": entry(0, 4, shape=[])}, 5, "something was appended"),
        ({"a": entry(-4, 0)}, 4, 'tensor "a": its data_offsets'),
        ({"a": entry(4, 0)}, 4, "reversed"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, 4, 'tensor "a": its data_offsets'),
        ({"a": entry(0, 4) | {"data_offsets": [0, 4.0]}}, 4, 'tensor "a": its data_offsets'),
        ({"a": entry(0, 4) | {"data_offsets": [False, 4]}}, 4, 'tensor "a": its data_offsets'),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, 'tensor "b": overlaps tensor "a"'),
        ({"a": entry(0, 8, shape=[2]), "b": entry(4, 8)}, 8, 'tensor "b": overlaps tensor "a"'),
        ({"a": entry(0, 8, shape=[2]), "b": entry(4, 4, shape=[0])}, 8, 'tensor "b": overlaps tensor "a"'),
        ({"a": entry(0, 4), "b": entry(3, 4, "U8")}, 4, 'tensor "b": overlaps tensor "a"'),
        ({"a": entry(4, 8)}, 8, 'tensor "a": the 4 bytes before it belong to no tensor'),
        ({"a": entry(0, 4), "b": entry(7, 11)}, 11, 'tensor "b": the 3 bytes before it belong to no tensor'),
    ],
)
def test_a_header_that_is_wrong(tmp_path: Path, header: Any, data: int, message: str) -> None:
    assert message in refused(file_of(tmp_path, header, data))


def test_a_name_given_twice(tmp_path: Path) -> None:
    one = json.dumps(entry())
    assert '"a" is given twice' in refused(file_of(tmp_path, f'{{"a": {one}, "a": {one}}}'.encode(), 4))


def test_all_problems_at_once(tmp_path: Path) -> None:
    header = {"a": entry(0, 4), "b": entry(2, 6), "c": entry(dtype="X"), "d": entry(shape=[-1]), "__metadata__": 1}
    lines = refused(file_of(tmp_path, header, 6)).splitlines()
    assert [next(name for name in ("metadata", '"c"', '"d"', '"b"') if name in line) for line in lines] == [
        "metadata",
        '"c"',
        '"d"',
        '"b"',
    ]


def test_an_overlap_is_one_problem(tmp_path: Path) -> None:
    header = {"a": entry(0, 8, shape=[2]), "b": entry(2, 6), "c": entry(8, 12)}
    path = file_of(tmp_path, header, 12)
    assert refused(path) == f'{path}: tensor "b": overlaps tensor "a"'


def test_a_name_in_a_message_stays_on_one_line(tmp_path: Path) -> None:
    message = refused(file_of(tmp_path, {"a\nb\x1b\x85": 1, "é": 1, "c" * 10_000: 1}))
    assert '"a\\nb\\u001b\\u0085"' in message
    assert '"é"' in message
    assert len(message.splitlines()) == 3
    assert len(message) < 1000


def test_a_truncated_file_says_by_how_much(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"a": entry(0, 4), "b": entry(4, 12, shape=[2])}, 12)
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    message = f"truncated: has {whole - 1} bytes, its header promises {whole}; copy it again"
    assert message in refused(path)
    assert 'tensor "b"' in refused(path)
    os.truncate(path, 50)
    assert "truncated: has 50 bytes, its header alone promises" in refused(path)
    os.truncate(path, 7)
    assert "truncated: has 7 bytes" in refused(path)
    os.truncate(path, 0)
    assert "empty" in refused(path)


@given(cut=st.integers(0, 90))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = file_of(tmp_path_factory.mktemp("cut"), {"a": entry(0, 4)}, 4)
    whole = path.stat().st_size
    os.truncate(path, min(cut, whole - 1))
    refused(path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    assert "something was appended" in refused(file_of(tmp_path, {"a": entry(0, 4)}, 5))
    assert "something was appended" in refused(file_of(tmp_path, {}, 1))


@pytest.mark.parametrize("claim", [LIMIT + 1, 100_000_000_000, 2**63, 2**64 - 1])
def test_a_header_of_100_gigabytes_is_not_allocated(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + b"{}")
    os.truncate(path, 200_000_000_000)  # sparse: the file is as long as the header claims to be
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"claims a header of {claim} bytes, more than the 100000000" in message
    assert peak < 1_000_000


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", LIMIT) + b"{}")
    tracemalloc.start()
    assert "truncated: has 10 bytes, its header alone promises 100000008" in refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04 and more", "a zip archive"),
        (b"\x80\x02}q\x00X\x01\x00", "a pickle"),
        (b"GGUF\x03\x00\x00\x00\x01", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_files_of_other_formats(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert what in refused(path)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.safetensors")
    assert "is not a file" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "a\0b")
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for a writer
    assert "is not a file" in refused(tmp_path / "pipe.safetensors")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path, {})

    def denied(*arguments: Any, **options: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    message = refused(path)
    monkeypatch.undo()
    assert "Permission denied" in message


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"a": entry()}, 4)
    before = len(os.listdir("/dev/fd"))
    kept = [read_header(path) for _ in range(20)]
    assert len(os.listdir("/dev/fd")) == before
    assert len(kept) == 20


def test_twenty_thousand_tensors_take_well_under_a_second(tmp_path: Path) -> None:
    header = {f"model.layers.{i}.mlp.experts.{i}.weight": entry(4 * i, 4 * i + 4) for i in range(20_000)}
    path = file_of(tmp_path, header, 80_000)
    start = process_time()
    _, tensors = read_header(path)
    assert process_time() - start < 2  # 0.2 s when nothing else runs
    assert len(tensors) == 20_000


# Anything that looks a little like a header: small numbers, so that the pieces often fit together.
sizes = st.one_of(st.integers(-1, 8), st.sampled_from([2**31, 2**63, 2**64, True, None, 1.0, "1"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "BF16", "F4", "C64", "nope"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, min_size=2, max_size=2),
    }
)


@st.composite
def fitting(draw: st.DrawFn) -> dict[str, Entry]:
    """Draw a header whose tensors lie one after the other, and then perhaps change one number of it."""
    header: dict[str, Entry] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        begin, end = end, end + int(np.prod(shape)) * 2
        header[name] = entry(begin, end, "F16", shape)
    if header and draw(st.booleans()):
        one = header[draw(st.sampled_from(sorted(header)))]
        numbers = one[draw(st.sampled_from(["shape", "data_offsets"]))]
        if numbers:
            numbers[draw(st.integers(0, len(numbers) - 1))] = draw(sizes)
    return header


def too_large(shape: list[int]) -> bool:
    """Tell whether NumPy can hold no array of this shape, empty or not."""
    return prod(size for size in shape if size) >= 2**63


@given(
    header=st.one_of(fitting(), st.dictionaries(st.text(max_size=2), entries, max_size=3)),
    more=st.integers(-1, 1),
    metadata=st.sampled_from([None, {}, {"a": "b"}, {"a": 1}]),
)
def test_files_are_accepted_just_when_the_reference_accepts_them(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], more: int, metadata: Any
) -> None:
    ends = [e["data_offsets"][1] for e in header.values()]
    end = max((end for end in ends if type(end) is int and end < 1000), default=0)
    path = file_of(tmp_path_factory.mktemp("drawn"), header | {"__metadata__": metadata}, max(0, end + more))
    try:
        with safe_open(path, "np") as reference:
            accepted = set(reference.keys())
    except SafetensorError:
        accepted = None
    if accepted is not None and any(e["dtype"] == "F4" or too_large(e["shape"]) for e in header.values()):
        accepted = None  # the two things that only the reference reads
    if accepted is None:
        refused(path)
    else:
        file, tensors = read_header(path)
        assert {tensor.name for tensor in tensors} == accepted
        at = file.size - sum(tensor.nbytes for tensor in tensors)
        for tensor in tensors:  # they cover the rest of the file, in order
            assert tensor.offset == at
            at += tensor.nbytes


@given(raw=st.binary(max_size=200), data=st.integers(0, 8))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes, data: int) -> None:
    path = file_of(tmp_path_factory.mktemp("raw"), raw, data)
    try:
        read_header(path)
    except CheckpointError as error:
        str(error).encode()


@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_damaged_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, position: int, value: int) -> None:
    path = file_of(tmp_path_factory.mktemp("damaged"), {"a": entry(0, 4), "b": entry(4, 8), "__metadata__": {"c": "d"}}, 8)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        _, tensors = read_header(path)
    except CheckpointError as error:
        str(error).encode()
    else:
        assert sum(tensor.nbytes for tensor in tensors) == 8
