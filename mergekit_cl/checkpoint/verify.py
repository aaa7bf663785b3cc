"""Checksums of tensors: made as a file is written, kept in its header, compared when it is read back.

The checksum of a tensor is XXH3 (64 bits) over its name, dtype and shape and the digests, XXH3 too, of its blocks of
`mergekit_cl.kernels.BLOCK` elements; a block is hashed by whichever thread has it. It finds damage, not forgery.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import xxhash

from mergekit_cl.checkpoint.header import parse_object, quoted, read_header
from mergekit_cl.checkpoint.stored import Stored
from mergekit_cl.errors import CheckpointError
from mergekit_cl.kernels import BLOCK

KEY = "mergekit_cl.checksums"
"""The entry of a header's metadata with the checksums of its tensors, 16 hexadecimal digits each, in `read_header`'s order."""

DIGITS = 16
_READ = 1 << 20  # bytes read at a time
_PIECE = 64 * _READ  # bytes that a thread takes at a time
_THREADS = 8
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` has read, and found to be what was written."""

    files: int
    tensors: int
    bytes: int


def ignore(_: int) -> None:
    """Report progress to nobody."""


def verify(path: str | os.PathLike[str], advance: Callable[[int], None] = ignore) -> VerifyReport:
    """Read a safetensors file, or a folder of them, that mergekit_cl wrote, and compare every tensor with its checksum.

    Args:
        path: The file or the folder.
        advance: Called with the number of bytes that have been read since the last call.

    Returns:
        How much was read.

    Raises:
        CheckpointError: A tensor, a header or the index is not what was written, or a file has no checksums; a line for each
            of the faults, with file and tensor.

    """
    path = Path(path)
    problems: list[str] = []
    files, indices = _files(path)
    tensors_of: dict[str, set[str]] = {}
    expected: list[tuple[Stored, str]] = []
    for name in files:
        file = path / name if path.is_dir() else path
        try:
            found, tensors = read_header(file)
        except CheckpointError as error:
            problems += str(error).splitlines()
            continue
        tensors_of[name] = {tensor.name for tensor in tensors}
        checksums = found.metadata.get(KEY, "")
        if KEY not in found.metadata:
            problems.append(f"{file}: holds no checksums: it was not written by mergekit_cl, or was rewritten since")
        elif len(checksums) != DIGITS * len(tensors):
            problems.append(f"{file}: holds {len(checksums) / DIGITS:g} checksums for {len(tensors)} tensors; write it again")
        else:
            expected += zip(tensors, _split(checksums), strict=True)
    if path.is_dir():
        problems += _index_problems(path, files, indices, tensors_of)
    problems += differences(expected, advance).values()
    if problems:
        raise CheckpointError("\n".join(problems))
    return VerifyReport(len(files), len(expected), sum(tensor.nbytes for tensor, _ in expected))


def differences(expected: Sequence[tuple[Stored, str]], advance: Callable[[int], None] = ignore) -> dict[Stored, str]:
    """Read tensors, in a few threads, and say what is wrong with those whose bytes do not have the checksum beside them.

    One file after another is open.
    """
    wrong: dict[Stored, str] = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for file, group in groupby(expected, key=lambda each: each[0].file):
            try:
                wrong |= _differences(list(group), pool, advance)
            finally:
                file.close()
    return wrong


def _differences(
    expected: Sequence[tuple[Stored, str]], pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> dict[Stored, str]:
    """Do so for the tensors of a file."""
    wrong: dict[Stored, str] = {}
    jobs = [
        [(pool.submit(_digests_of_part, tensor, *part), part[1] - part[0]) for part in _parts(tensor)] for tensor, _ in expected
    ]
    try:
        for (tensor, checksum), parts in zip(expected, jobs, strict=True):
            digests = bytearray()
            try:
                for job, size in parts:
                    digests += job.result()
                    advance(size)
            except CheckpointError as error:
                wrong[tensor] = f"{error} (in tensor {quoted(tensor.name)})"
                continue
            if checksum_of(tensor.name, tensor.stored_dtype, tensor.shape, digests) != checksum:
                wrong[tensor] = (
                    f"{tensor.file.path}: tensor {quoted(tensor.name)}: damaged: its bytes are not those that were written"
                )
    finally:
        for job, _ in chain.from_iterable(jobs):
            job.cancel()
        wait([job for job, _ in chain.from_iterable(jobs)])
    return wrong


def checksum_of(name: str, dtype: str, shape: Iterable[int], digests: bytes | bytearray) -> str:
    """Make the checksum of a tensor, 16 hexadecimal digits, from the digests of its blocks."""
    return xxhash.xxh3_64_hexdigest(json.dumps([name, dtype, list(shape)]).encode() + digests)


def block_digests(data: memoryview, itemsize: int) -> bytes:
    """Hash bytes of a tensor, from the beginning of a block on, block by block: 8 bytes for each."""
    size = BLOCK * itemsize
    digest = xxhash.xxh3_64_digest  # lets other threads run from 100 KB on
    return b"".join([digest(data[start : start + size]) for start in range(0, len(data), size)])


def digests_of(tensor: Stored) -> bytes:
    """Read a tensor, and hash it block by block."""
    return b"".join([_digests_of_part(tensor, *part) for part in _parts(tensor)])


def _split(checksums: str) -> Iterator[str]:
    return (checksums[start : start + DIGITS] for start in range(0, len(checksums), DIGITS))


def _parts(tensor: Stored) -> list[tuple[int, int]]:
    """Cut the bytes of a tensor, at blocks, into parts for threads."""
    size = max(1, _PIECE // (BLOCK * tensor.itemsize)) * BLOCK * tensor.itemsize
    return [(start, min(start + size, tensor.nbytes)) for start in range(0, tensor.nbytes, size)]


def _digests_of_part(tensor: Stored, start: int, stop: int) -> bytes:
    block = BLOCK * tensor.itemsize
    buffer = np.empty(min(max(_READ // block, 1) * block, stop - start), np.uint8).data
    digests = []
    for first in range(start, stop, len(buffer)):
        window = buffer[: stop - first]
        tensor.file.read(tensor.offset + first, window)
        digests.append(block_digests(window, tensor.itemsize))
    return b"".join(digests)


def _files(path: Path) -> tuple[list[str], list[str]]:
    """List the names of the safetensors files at ``path``, and of the indices."""
    try:
        if not path.is_dir():
            return [path.name], []
        names = sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    files = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if not files and not indices:
        raise CheckpointError(f"{path}: holds no safetensors files; name a file or folder that mergekit_cl wrote")
    return files, indices


def _index_problems(
    folder: Path, files: Sequence[str], indices: Sequence[str], tensors_of: Mapping[str, set[str]]
) -> list[str]:
    """Compare indices with the files: every shard is there, none is left over, every tensor is where its index says."""
    if not indices:
        if len(files) == 1 and not _SHARD.search(files[0]):
            return []
        return [f"{folder}: holds {', '.join(files)}, but no index (*.safetensors.index.json) that says which files belong"]
    problems: list[str] = []
    listed: set[str] = set()
    for name in indices:
        where: object = None
        with suppress(OSError, ValueError):
            where = parse_object((folder / name).read_bytes())[0].get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            problems.append(f"{folder / name}: is not an index of tensors and their files")
            return problems
        names_in: dict[str, set[str]] = {file: set() for file in where.values()}
        for tensor, file in where.items():
            names_in[file].add(tensor)
        listed |= names_in.keys()
        for file, names in sorted(names_in.items()):
            if file not in files:
                problems.append(f"{folder / file}: is missing; {name} lists {len(names)} of its tensors")
            elif file in tensors_of:  # its header could be read
                problems += [
                    f"{folder / file}: tensor {quoted(tensor)}: is missing, but {name} lists it"
                    for tensor in sorted(names - tensors_of[file])
                ]
                problems += [
                    f"{folder / file}: tensor {quoted(tensor)}: {name} does not list it"
                    for tensor in sorted(tensors_of[file] - names)
                ]
    problems += [f"{folder / file}: does not belong to the model: no index lists it" for file in files if file not in listed]
    return problems
