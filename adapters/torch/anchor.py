"""Where an anchor is kept: in memory, or in a safetensors file that is complete at every moment and knows its own fingerprint.

The fingerprint is a hash (xxh3) of names, dtypes, shapes and bytes. Beside the file ``anchor.safetensors`` there may be
``anchor.previous.safetensors``, the anchor before it, and ``anchor.next.safetensors``, which has not taken its place yet:
whichever of them a checkpoint was made with is found by its fingerprint.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import xxhash
from filelock import FileLock

from mergekit_cl.checkpoint.header import read_header
from mergekit_cl.checkpoint.staging import beside, file_errors, make_durable, mode, remove, unlock
from mergekit_cl.checkpoint.stored import DataFile, Stored, numpy_dtype
from mergekit_cl.checkpoint.verify import KEY, block_digests, checksum_of, digests_of
from mergekit_cl.checkpoint.writer import Output, Writer
from mergekit_cl.dtypes import dtype_name
from mergekit_cl.errors import CheckpointError, MergeError
from mergekit_cl.kernels import Array
from mergekit_cl.models.sharded import Leaf, local_of, with_local

Place: TypeAlias = Literal["memory", "cpu"] | Path
"""Beside the parameters; in the memory of the CPU; or in a file."""

FINGERPRINT = "mergekit_cl.fingerprint"
"""The key, in the metadata of a file, of the fingerprint."""

_ADVICE = "restore the file that the run wrote, or begin the task anew"
_CHUNK = 256 << 20  # bytes of an anchor that are brought to another device at a time


class Memory:
    """An anchor in memory, as local tensors: of a sharded parameter the part of this process."""

    def __init__(self, locals_: dict[str, torch.Tensor]) -> None:
        self._locals = locals_

    @classmethod
    def of(cls, leaves: Mapping[str, Leaf], like: Mapping[str, Leaf], dtype: torch.dtype | None, place: Place) -> "Memory":
        """Copy tensors to where their like are; if the place is "cpu", to the CPU's memory (pinned, if those are on a GPU)."""
        return cls({name: _copied(local_of(leaf), like[name].device, dtype, place) for name, leaf in leaves.items()})

    @property
    def names(self) -> Collection[str]:
        """What it holds."""
        return self._locals.keys()

    def leaves(self, like: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """Return all tensors, sharded as those of the same names; none is copied."""
        return {name: with_local(like[name], local) if name in like else local for name, local in self._locals.items()}

    def beside(self, current: Mapping[str, Leaf]) -> dict[str, Any] | None:
        """Return the tensors that belong to these parameters, if they can be read where they are."""
        if any(self._locals[name].device != local_of(leaf).device for name, leaf in current.items()):
            return None
        return {name: with_local(leaf, self._locals[name]) for name, leaf in current.items()}

    def brought(self, current: Mapping[str, Leaf], whole: bool) -> Iterator[dict[str, Leaf]]:
        """Copy the tensors to where the parameters are; yield some at a time, or all at once.

        While some are merged, the next ones are copied: there are two buffers, which are used in turn.
        """
        groups = [list(current)] if whole else _groups(current)
        size = max(sum(_aligned(self._locals[name].nbytes) for name in group) for group in groups)
        device = local_of(next(iter(current.values()))).device
        stream = torch.cuda.Stream(device)
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in groups[:2]]
        free = [torch.cuda.current_stream(device).record_event() for _ in buffers]

        def copy(number: int) -> tuple[dict[str, Leaf], torch.cuda.Event]:
            at, there = 0, {}
            with torch.cuda.stream(stream):
                stream.wait_event(free[number % 2])
                for name in groups[number]:
                    local = self._locals[name]
                    place = buffers[number % 2][at : at + local.nbytes].view(local.dtype).view(local.shape)
                    there[name] = with_local(current[name], place.copy_(local, non_blocking=True))
                    at += _aligned(local.nbytes)
                return there, stream.record_event()

        following = copy(0)
        for number in range(len(groups)):
            there, ready = following
            if number + 1 < len(groups):
                following = copy(number + 1)
            torch.cuda.current_stream(device).wait_event(ready)
            yield there
            free[number % 2] = torch.cuda.current_stream(device).record_event()

    def take(self, leaves: Mapping[str, Leaf], dtype: torch.dtype | None, place: Place) -> None:
        """Take the values of these tensors: over those of the same names, in place; others are copied."""
        for name, leaf in leaves.items():
            if name in self._locals:
                self._locals[name].copy_(local_of(leaf))
            else:
                self._locals[name] = _copied(local_of(leaf), leaf.device, dtype, place)

    def settle(self) -> None:
        """It is where it belongs."""

    def drop(self) -> None:
        """There is nothing to remove."""


class File:
    """An anchor in a safetensors file, written once; between merges it takes no memory.

    ``path`` is where it belongs, ``at`` where it is: the path itself, or the file beside it that has not taken its place yet.
    """

    def __init__(self, path: Path, at: Path, fingerprint: str) -> None:
        self.path, self.at, self.fingerprint = path, at, fingerprint
        self._opened: tuple[DataFile, dict[str, Stored]] | None = None

    @classmethod
    def of(cls, leaves: Mapping[str, Leaf], dtype: torch.dtype | None, path: Path, notes: Mapping[str, str]) -> "File":
        """Write tensors to a file, unless it holds these very ones; another anchor that is there stays until `settle`."""
        check_path(path)
        fingerprint = fingerprint_of(leaves, dtype)
        with _locked(path):
            for at in (path, following(path)):
                if holds(at, fingerprint, notes):
                    return cls(path, at, fingerprint)
            at = following(path) if mode(path) else path
            _write(at, leaves, dtype, fingerprint, notes)
            anchor = cls(path, at, fingerprint)
            anchor._opened = anchor._open()  # before another process may rename or drop it
        return anchor

    @classmethod
    def find(cls, path: Path, fingerprint: str | None = None) -> "File":
        """Open the anchor at a path; or the one of this fingerprint, there or in a file beside it. All of it is read.

        Raises:
            CheckpointError: It is not there, or damaged.

        """
        known = {at: metadata_of(at)[FINGERPRINT] for at in _places(path) if mode(at)}
        if not known or (fingerprint is None and path not in known):
            raise CheckpointError(f"SFA: the anchor is missing: {path} is not there; {_ADVICE}")
        found = path if fingerprint is None else next((at for at, its in known.items() if its == fingerprint), None)
        if found is None:
            raise CheckpointError(
                f"SFA: the anchor at {path} is not that of the checkpoint: its fingerprint is "
                f"{' or '.join(known.values())}, not {fingerprint}; {_ADVICE}"
            )
        anchor = cls(path, found, known[found])
        _ = anchor.stored  # which reads it
        return anchor

    @property
    def names(self) -> Collection[str]:
        """What it holds."""
        return self.stored.keys()

    @property
    def stored(self) -> dict[str, Stored]:
        """Its tensors, in the file, which is open: they can be read even when it is renamed.

        A file that this object has not written, or that was written to since, is first read and compared with the fingerprint.

        Raises:
            CheckpointError: The file is gone, or damaged.

        """
        if self._opened is None or not _unchanged(self._opened[0]):
            before, opened = self._opened, self._open()
            if before is None or _identity(before[0]) != _identity(opened[0]):
                self._verify(opened[1])
            self._opened = opened
        return self._opened[1]

    def _open(self) -> tuple[DataFile, dict[str, Stored]]:
        """Find the file by its fingerprint, also where another process has renamed it, and open it."""
        for at in (self.at, *_places(self.path) * 2):
            try:
                if mode(at) and metadata_of(at)[FINGERPRINT] == self.fingerprint:
                    file, tensors = read_header(at)
                    file.advise(0, 1)
                    if _unchanged(file):
                        self.at = at
                        return file, {tensor.name: tensor for tensor in tensors}
            except CheckpointError:
                if mode(at):  # and was not renamed just now
                    raise
        raise CheckpointError(
            f"SFA: the anchor is missing: {self.path} is not there, or is another one (its fingerprint is not "
            f"{self.fingerprint}); {_ADVICE}"
        )

    def _verify(self, stored: Mapping[str, Stored]) -> None:
        """Read everything, and compare it with the fingerprint."""
        if _combined({name: _checksum(tensor) for name, tensor in stored.items()}) != self.fingerprint:
            raise CheckpointError(
                f"SFA: the anchor at {self.at} is damaged: its bytes are not those that were written; {_ADVICE}"
            )

    @property
    def notes(self) -> dict[str, str]:
        """What was written down beside the tensors."""
        return metadata_of(self.at)

    def settle(self) -> None:
        """Let the anchor take its place; the one that was there is kept as the previous one."""
        if self.at == self.path:
            return
        before, after = previous(self.path), following(self.path)
        with file_errors(self.path, "the anchor cannot be renamed"), _locked(self.path):
            # if it is not there, another process has renamed it, and may have gone on from it
            if mode(self.at) and metadata_of(self.at)[FINGERPRINT] == self.fingerprint:
                # an older anchor, of a run that goes on from an older checkpoint, changes places with the newer one
                older = [(self.path, after), (before, self.path), (after, before)]
                for old, new in older if self.at == before else [(self.path, before), (after, self.path)]:
                    if mode(old):
                        os.replace(old, new)
                make_durable(self.path.parent)
        self.at = self.path

    def drop(self) -> None:
        """Remove the file if it has not taken its place."""
        if self.at == following(self.path):
            with file_errors(self.path, "the anchor cannot be removed"), _locked(self.path):
                remove(self.at)

    @property
    def described(self) -> Mapping[str, Stored]:
        """Shapes and dtypes by name."""
        return self.stored

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read all tensors into the CPU's memory."""
        return {name: _read(tensor) for name, tensor in self.stored.items()}

    def updated(self, leaves: Mapping[str, Leaf], dtype: torch.dtype | None, notes: Mapping[str, str]) -> "File":
        """Write a new file with the values of these tensors, and all others; it takes the place of this one."""
        new = File.of({**self.stored, **leaves}, dtype, self.path, notes)
        new.settle()
        return new

    def beside(self, current: Mapping[str, Leaf]) -> dict[str, Any] | None:
        """Return the tensors that belong to these parameters, if a merge can read them from the file."""
        stored = self.stored
        return None if _on_gpu(current) else {name: stored[name] for name in current}

    def brought(self, current: Mapping[str, Leaf], whole: bool) -> Iterator[dict[str, Leaf]]:
        """Copy the tensors to where the parameters are; yield some at a time, or all at once."""
        stored = self.stored
        for group in [list(current)] if whole else _groups(current):
            yield {name: _read(stored[name]).to(current[name].device) for name in group}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind."""
        return {**self.__dict__, "_opened": None}


def check_path(path: Path) -> None:
    """Refuse a path that no anchor can be written to."""
    if path.suffix != ".safetensors":
        raise MergeError(f'SFA: anchor="{path}": pass "memory", "cpu", or a path that ends in .safetensors')


def previous(path: Path) -> Path:
    """Name the file of the anchor before the present one."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def following(path: Path) -> Path:
    """Name the file of an anchor that has not taken its place yet."""
    return path.with_name(f"{path.stem}.next{path.suffix}")


def fingerprint_of(leaves: Mapping[str, Leaf | Stored], dtype: torch.dtype | None = None) -> str:
    """Hash tensors as they would be written in ``dtype``: names, dtypes, shapes and bytes, in whatever order they come."""
    return _combined({name: checksum_of_local(name, leaf, dtype) for name, leaf in leaves.items()})


def checksum_of_local(name: str, leaf: Leaf | Stored, dtype: torch.dtype | None = None) -> str:
    """Hash a tensor as it would be written in ``dtype``: name, dtype, shape, and the bytes that this process has."""
    output = _output(name, leaf, dtype)
    digests = block_digests(_host(leaf, dtype).data, numpy_dtype(output.dtype).itemsize)
    return checksum_of(name, output.dtype, output.shape, digests)


def holds(path: Path, fingerprint: str, notes: Mapping[str, str]) -> bool:
    """Whether a file is there and says that it holds this anchor, with these notes."""
    return bool(mode(path)) and metadata_of(path) == {"format": "pt", FINGERPRINT: fingerprint, **notes}


def metadata_of(path: Path) -> dict[str, str]:
    """Read what the file of an anchor says about itself.

    Raises:
        CheckpointError: It is damaged, or not the file of an anchor.

    """
    try:
        metadata = dict(read_header(path)[0].metadata)
    except CheckpointError as error:
        raise CheckpointError(f"SFA: the anchor cannot be read; {_ADVICE}\n{error}") from error
    metadata.pop(KEY, None)
    if FINGERPRINT not in metadata:
        raise CheckpointError(f"SFA: {path} is there, but is not an anchor, and is not replaced; choose another path")
    return metadata


def write(
    path: Path, leaves: Mapping[str, Leaf], dtype: torch.dtype | None, fingerprint: str, notes: Mapping[str, str]
) -> None:
    """Write tensors to a safetensors file: in the end it is there, complete and durable, or what was there before is.

    Processes that write the same anchor to one place wait for one another, and the first one writes.

    Raises:
        CheckpointError: The file cannot be written, or something that is no anchor is there already.

    """
    with _locked(path):
        if not holds(path, fingerprint, notes):
            _write(path, leaves, dtype, fingerprint, notes)


def _write(
    path: Path, leaves: Mapping[str, Leaf | Stored], dtype: torch.dtype | None, fingerprint: str, notes: Mapping[str, str]
) -> None:
    outputs = [_output(name, leaf, dtype) for name, leaf in leaves.items()]
    metadata = {"format": "pt", FINGERPRINT: fingerprint, **notes}
    with Writer(path, outputs, fingerprint=fingerprint, metadata=metadata, single_file=True, overwrite=True) as writer:
        for name, leaf in leaves.items():
            if name not in writer.done:
                writer.write(name, 0, _host(leaf, dtype))
        writer.commit({})


def _combined(checksums: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(checksums[name] for name in sorted(checksums)).encode())


def _checksum(tensor: Stored) -> str:
    """Read a tensor from its file, and make the checksum that `fingerprint_of` makes."""
    return checksum_of(tensor.name, tensor.stored_dtype, tensor.shape, digests_of(tensor))


def _output(name: str, leaf: Leaf | Stored, dtype: torch.dtype | None) -> Output:
    return Output(name, tuple(leaf.shape), leaf.dtype if isinstance(leaf, Stored) else dtype_name(dtype or leaf.dtype))


def _host(leaf: Leaf | Stored, dtype: torch.dtype | None) -> Array:
    """Bring the bytes of a tensor to the CPU, 1-D; one in a file keeps its dtype."""
    tensor = _read(leaf) if isinstance(leaf, Stored) else local_of(leaf).to("cpu", dtype or leaf.dtype)
    array: Array = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return array


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process writes an anchor to this place; the folder is made."""
    with file_errors(path, "the anchor cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside(path, "anchor"), thread_local=False)
        lock.acquire()
    try:
        yield
    finally:
        unlock(lock)


def _places(path: Path) -> tuple[Path, ...]:
    return path, previous(path), following(path)


def _unchanged(file: DataFile) -> bool:
    try:
        file.check_unchanged()
    except CheckpointError:
        return False
    return True


def _identity(file: DataFile) -> tuple[int, int, int]:
    return file.inode, file.size, file.mtime_ns


def _read(stored: Stored) -> torch.Tensor:
    """Read a tensor from its file."""
    tensor = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    stored.read(0, prod(stored.shape), tensor.view(-1).view(torch.uint8).numpy())
    return tensor


def _copied(local: torch.Tensor, device: torch.device, dtype: torch.dtype | None, place: Place) -> torch.Tensor:
    if place != "cpu" or device.type == "cpu":
        return local.to(device, dtype or local.dtype, copy=True)
    return torch.empty(local.shape, dtype=dtype or local.dtype, pin_memory=True).copy_(local)


def _on_gpu(leaves: Mapping[str, Leaf]) -> bool:
    return any(leaf.device.type != "cpu" for leaf in leaves.values())


def _groups(leaves: Mapping[str, Leaf]) -> list[list[str]]:
    """Divide tensors into groups of so many bytes, alike in all processes; larger ones have a group of their own."""
    groups: list[list[str]] = []
    room = 0
    for name, leaf in leaves.items():
        size = prod(leaf.shape) * leaf.dtype.itemsize
        if room < size:
            groups.append([])
            room = _CHUNK
        groups[-1].append(name)
        room -= size
    return groups


def _aligned(size: int) -> int:
    return -(-size // 256) * 256
