"""The header of a safetensors file: read whole, checked whole, before a byte of the tensors is read.

The format: 8 bytes with the length of the header, the header in JSON, and the bytes of the tensors, one after the other without
gaps. https://github.com/huggingface/safetensors#format
"""

import json
from collections import Counter
from math import prod
from pathlib import Path
from stat import S_ISREG
from typing import Any, NoReturn

import xxhash

from mergekit_cl.checkpoint.stored import DataFile, Stored
from mergekit_cl.errors import CheckpointError, listing

LIMIT = 100_000_000
"""Bytes that a header may have; the limit of the reference implementation."""

CODES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""The names of dtypes in the format, what `Stored.stored_dtype` calls them, and bytes of an element."""

_BELOW_A_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})

_OTHER_FILES = {
    b"version ": "a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`",
    b"PK\x03\x04": "a zip archive (a pickle of PyTorch, or .npz), not safetensors",
    b"\x80": "a pickle, not safetensors",
    b"GGUF": "a GGUF file, not safetensors",
    b"\x89HDF": "an HDF5 file, not safetensors",
    b"<": "a web page, not safetensors; download the file itself",
}
"""What files that are mistaken for safetensors begin with. Read as the length of a header, each is far beyond the limit."""

_DIMENSIONS = 64  # the most that NumPy and PyTorch hold
_ELEMENTS = 2**63 - 1


def read_header(path: Path) -> tuple[DataFile, list[Stored]]:
    """Open a safetensors file: its header, and where each tensor lies, in the order of their bytes.

    Raises:
        CheckpointError: The file is missing, not a safetensors file, truncated, or its header contradicts itself. All that is
            wrong with the header is in the one message.

    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a file")
    file = DataFile(path, status.st_size, status.st_mtime_ns, status.st_ino)
    try:
        raw = _header_of(file)
    finally:
        file.close()
    file.digest = xxhash.xxh3_128_hexdigest(raw)
    try:
        header, problems = parse_object(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header {error}; the file is damaged or not safetensors") from error
    metadata = header.pop("__metadata__", None)
    if metadata is not None:
        if isinstance(metadata, dict) and all(isinstance(value, str) and _has_utf8(value) for value in metadata.values()):
            file.metadata = metadata
        else:
            problems.append("__metadata__ is not an object whose values are strings")
    tensors, more = _tensors(file, header, 8 + len(raw))
    problems += more
    if problems:
        raise CheckpointError(listing([f"{path}: {problem}" for problem in problems]))
    return file, tensors


def parse_object(raw: bytes | bytearray) -> tuple[dict[str, Any], list[str]]:
    """Parse an object in JSON, and list the names that it gives twice, at any depth, each as a problem.

    Raises:
        ValueError: It is not an object in JSON and UTF-8. The message goes on from what was parsed: "is not valid JSON: ...".

    """
    twice: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return found

    try:
        text = raw.decode()
        parsed = json.loads(text, object_pairs_hook=to_dict, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("is JSON, but not an object")
    problems = [f"{quoted(name)} is given twice" for name in twice]
    if "\\u" in text:  # half a surrogate pair has no UTF-8: it could be neither printed nor written
        names = [*parsed, *(name for inner in parsed.values() if isinstance(inner, dict) for name in inner)]
        problems += [f"{quoted(name)}: the name is not valid Unicode" for name in names if not _has_utf8(name)]
    return parsed, problems


def quoted(name: str) -> str:
    """Show a name from a file in a message: in quotes, on one line, and not longer than that."""
    head = name[:200]
    shown = json.dumps(head, ensure_ascii=not head.isprintable())
    return shown if len(name) <= 200 else f"{shown}..."


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _header_of(file: DataFile) -> bytearray:
    """Read the bytes of the header. None are allocated before the length has been checked against the file."""
    if file.size < 8:
        raise CheckpointError(f"{file.path}: is {'empty' if not file.size else 'truncated'}: has {file.size} bytes, no header")
    prefix = bytearray(8)
    file.read(0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > LIMIT:
        for magic, what in _OTHER_FILES.items():
            if prefix.startswith(magic):
                raise CheckpointError(f"{file.path}: is {what}")
        raise CheckpointError(
            f"{file.path}: claims a header of {length} bytes, more than the {LIMIT} that the format allows; "
            "the file is damaged or not safetensors"
        )
    if length > file.size - 8:
        raise CheckpointError(
            f"{file.path}: truncated: has {file.size} bytes, its header alone promises {8 + length}; copy it again"
        )
    raw = bytearray(length)
    file.read(8, memoryview(raw))
    return raw


def _tensors(file: DataFile, header: dict[str, Any], start: int) -> tuple[list[Stored], list[str]]:
    """Check the entries one by one, and then that together they cover the bytes from ``start`` to the end of the file."""
    problems: list[str] = []
    placed: list[tuple[int, int, Stored]] = []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _checked(entry)
        except ValueError as error:
            problems.append(f"tensor {quoted(name)}: {error}")
        else:
            placed.append((begin, end, Stored(file, name, shape, dtype, start + begin)))
    placed.sort(key=lambda item: item[:2])

    all_known = not problems  # an entry that is wrong may account for bytes that seem to belong to none
    covered, last = 0, ""
    for begin, end, tensor in placed:
        if begin < covered:
            problems.append(f"tensor {quoted(tensor.name)}: overlaps tensor {quoted(last)}")
        elif begin > covered and all_known:
            problems.append(f"tensor {quoted(tensor.name)}: the {begin - covered} bytes before it belong to no tensor")
        if end > covered:
            covered, last = end, tensor.name
    available = file.size - start
    if covered > available:
        cut = next(tensor.name for _, end, tensor in placed if end > available)
        problems.append(
            f"truncated: has {file.size} bytes, its header promises {start + covered}; copy it again "
            f"(tensor {quoted(cut)} is cut off)"
        )
    elif covered < available and all_known:
        problems.append(
            f"has {file.size} bytes, its header accounts for {start + covered}: something was appended, or the header is of "
            "another file; copy it again"
        )
    return [tensor for _, _, tensor in placed], problems


def _checked(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return the dtype, the shape, and the first and last offset of an entry, or raise ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("its entry is not an object with dtype, shape and data_offsets")
    if missing := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
        raise ValueError(f"its entry lacks {' and '.join(missing)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str):
        raise ValueError("its dtype is not a string")
    if code in _BELOW_A_BYTE:
        raise ValueError(f"its elements ({code}) are smaller than a byte, which is not read; dequantise it to bfloat16 first")
    if code not in CODES:
        raise ValueError(f"unknown dtype {quoted(code)}; known: {', '.join(CODES)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise ValueError("its shape is not a list of whole numbers from 0 on")
    if len(shape) > _DIMENSIONS or prod(size for size in shape if size) > _ELEMENTS:
        raise ValueError(f"its shape has more than {_DIMENSIONS} dimensions, or more than 2^63 elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise ValueError("its data_offsets are not two whole numbers from 0 on")
    begin, end = offsets
    if begin > end:
        raise ValueError(f"its data_offsets are reversed: it ends at {end}, before it begins at {begin}")
    dtype, itemsize = CODES[code]
    if end - begin != (need := prod(shape) * itemsize):
        raise ValueError(f"has {end - begin} bytes, but {code} of shape {shape} takes {need}")
    return dtype, tuple(shape), begin, end


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _ELEMENTS
