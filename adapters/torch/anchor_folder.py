"""An anchor of sharded parameters in a folder of `torch.distributed.checkpoint`: each process writes and reads its own shards.

Beside the data the folder holds ``anchor.json``: the fingerprint, what tensors there are, and checksums of the files. The
folder is written under another name and renamed by the first process. Every function is called by all processes, in the same
order; what one of them finds wrong all of them raise.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
import xxhash

from mergekit_cl.adapters.torch.anchor import File, Memory, Place, checksum_of_local, following, previous
from mergekit_cl.adapters.torch.parameters import is_sharded
from mergekit_cl.checkpoint.staging import beside, file_errors, make_durable, mode, put_in_place, remove
from mergekit_cl.dtypes import dtype_name
from mergekit_cl.errors import CheckpointError
from mergekit_cl.models.sharded import Leaf, Shard, local_of, with_local

T = TypeVar("T")
Saved: TypeAlias = torch.Tensor | dict[str, torch.Tensor]

ADVICE = "restore the folder that the run wrote, or begin the task anew"
_INDEX = "anchor.json"
_READ = 1 << 20


class Described(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class Folder:
    """An anchor in a folder; between merges it takes no memory, and during one that of this process's shards.

    ``path`` is where it belongs, ``at`` where it is: the path itself, or the folder beside it that has not taken its place yet.
    """

    def __init__(self, path: Path, at: Path, index: Mapping[str, Any]) -> None:
        self.path, self.at, self.index = path, at, index

    @classmethod
    def of(cls, leaves: Mapping[str, Leaf], dtype: torch.dtype | None, path: Path, notes: Mapping[str, str]) -> "Folder":
        """Write tensors to a folder, unless it holds these very ones; another anchor that is there stays until `settle`."""
        fingerprint = fingerprint_of(leaves, dtype)

        def place() -> tuple[Path, dict[str, Any] | None]:
            for at in (path, following(path)):
                if mode(at) and (known := read_index(at))["fingerprint"] == fingerprint and known["notes"] == dict(notes):
                    return at, known
            return (following(path) if mode(path) else path), None

        at, known = _by_first(place)
        return cls(path, at, known or write(at, leaves, dtype, fingerprint, notes))

    @classmethod
    def find(cls, path: Path, fingerprint: str | None = None) -> "Folder":
        """Open the anchor at a path; or the one of this fingerprint, there or in a folder beside it. All of it is read.

        Raises:
            CheckpointError: It is not there, or damaged.

        """

        def search() -> tuple[Path, dict[str, Any]]:
            known = {at: read_index(at) for at in (path, previous(path), following(path)) if mode(at)}
            if not known or (fingerprint is None and path not in known):
                raise CheckpointError(f"SFA: the anchor is missing: {path} is not there; {ADVICE}")
            for at, index in known.items():
                if (at == path) if fingerprint is None else index["fingerprint"] == fingerprint:
                    if _checksums(at) != index["files"]:
                        raise CheckpointError(
                            f"SFA: the anchor at {at} is damaged: its bytes are not those that were written; {ADVICE}"
                        )
                    return at, index
            there = " or ".join(index["fingerprint"] for index in known.values())
            raise CheckpointError(
                f"SFA: the anchor at {path} is not that of the checkpoint: its fingerprint is {there}, not {fingerprint}; "
                f"{ADVICE}"
            )

        return cls(path, *_by_first(search))

    @property
    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes, and the bytes of every process."""
        return str(self.index["fingerprint"])

    @property
    def notes(self) -> dict[str, str]:
        """What was written down beside the tensors."""
        return dict(self.index["notes"])

    @property
    def names(self) -> Collection[str]:
        """What it holds."""
        return self.described.keys()

    @property
    def described(self) -> dict[str, Described]:
        """Shapes and dtypes by name."""
        return {name: Described(tuple(shape), dtype) for name, (dtype, shape) in self.index["tensors"].items()}

    def tensors(self, like: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """Read the tensors of these names, sharded as those are, to where they are.

        Raises:
            CheckpointError: The folder is gone, or is another one, or cannot be read.

        """

        def check() -> None:
            if not mode(self.at) or read_index(self.at) != self.index:
                raise CheckpointError(f"SFA: the anchor is missing: {self.at} is not there, or is another one; {ADVICE}")

        from torch.distributed.checkpoint import load  # not at the top: it takes a third of a second

        _by_first(check)
        described = self.described
        leaves = {
            name: with_local(leaf, torch.empty_like(local_of(leaf), dtype=getattr(torch, described[name].dtype)))
            for name, leaf in like.items()
        }
        with _transfer_errors(self.at, "the anchor cannot be read"):
            load(saved(leaves), checkpoint_id=self.at)
        return leaves

    def updated(
        self, leaves: Mapping[str, Leaf], like: Mapping[str, Leaf], dtype: torch.dtype | None, notes: Mapping[str, str]
    ) -> "Folder":
        """Write a new folder with the values of these tensors, and all others, which are ``like`` these; it takes the place."""
        others = {name: like[name] for name in self.names if name not in leaves}
        new = Folder.of({**self.tensors(others), **leaves}, dtype, self.path, notes)
        new.settle()
        return new

    def settle(self) -> None:
        """Let the anchor take its place; the one that was there is kept as the previous one."""
        if self.at == self.path:
            return
        before, after = previous(self.path), following(self.path)

        def rename() -> None:
            if mode(self.path) and read_index(self.path) == self.index:
                return  # another object has renamed it
            older = [(self.path, after), (before, self.path), (after, before)]
            with file_errors(self.path, "the anchor cannot be renamed"):
                for old, new in older if self.at == before else [(self.path, before), (after, self.path)]:
                    if mode(old):
                        remove(new)
                        os.rename(old, new)
                make_durable(self.path.parent)

        _by_first(rename)
        self.at = self.path

    def drop(self) -> None:
        """Remove the folder if it has not taken its place."""
        if self.at == following(self.path):
            with file_errors(self.path, "the anchor cannot be removed"):
                _by_first(lambda: remove(self.at))


def saved(leaves: Mapping[str, Leaf]) -> dict[str, Saved]:
    """Show tensors as `torch.distributed.checkpoint` and ``torch.save`` take them; nothing is copied.

    A `Shard` becomes a mapping with one entry: which elements it has ("0:12"), and the elements.
    """
    return {
        name: {f"{leaf.start}:{leaf.start + leaf.local.numel()}": local_of(leaf)} if isinstance(leaf, Shard) else leaf
        for name, leaf in leaves.items()
    }


def restored(state: Mapping[str, Any], like: Mapping[str, Leaf]) -> dict[str, Any]:
    """Turn what `saved` returned into shards again; what is not of these very shards stays a mapping."""
    found = {}
    for name, value in state.items():
        leaf = like.get(name)
        mine = saved({name: leaf})[name] if leaf is not None else None
        fits = isinstance(value, Mapping) and isinstance(mine, dict) and value.keys() == mine.keys()
        found[name] = with_local(like[name], next(iter(value.values()))) if fits else value
    return found


def fingerprint_of(leaves: Mapping[str, Leaf], dtype: torch.dtype | None = None) -> str:
    """Hash tensors as they would be written in ``dtype``: names, dtypes, shapes, and the bytes of every process."""
    own = {name: checksum_of_local(name, leaf, dtype) for name, leaf in leaves.items()}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, sorted(own.items()))
    return xxhash.xxh3_128_hexdigest(json.dumps(everybody).encode())


def read_index(path: Path) -> dict[str, Any]:
    """Read what the folder of an anchor says about itself.

    Raises:
        CheckpointError: It cannot be read, or is not the folder of an anchor.

    """
    try:
        index = json.loads((path / _INDEX).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"SFA: {path} is there, but is not an anchor of sharded parameters, and is not replaced; choose another path"
        ) from error
    return dict(index)


def write(
    path: Path, leaves: Mapping[str, Leaf], dtype: torch.dtype | None, fingerprint: str, notes: Mapping[str, str]
) -> dict[str, Any]:
    """Write tensors to a folder: in the end it is there, complete and durable, or what was there before is.

    Returns:
        What the folder says about itself.

    """
    new = beside(path, "writing")

    def prepare() -> None:
        with file_errors(path, "the anchor cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(new)

    def finish() -> dict[str, Any]:
        tensors = {name: [dtype_name(dtype or leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}
        index = {"fingerprint": fingerprint, "notes": dict(notes), "tensors": tensors, "files": _checksums(new)}
        with file_errors(path, "the anchor cannot be written"):
            (new / _INDEX).write_text(json.dumps(index))
            make_durable(new / _INDEX)
            make_durable(new)
            put_in_place(new, path)
            make_durable(path.parent)
            remove(new)
        return index

    from torch.distributed.checkpoint import save

    _by_first(prepare)
    copies = {name: with_local(leaf, local_of(leaf).to(dtype or leaf.dtype)) for name, leaf in leaves.items()}
    with _transfer_errors(path, "the anchor cannot be written"):
        save(saved(copies), checkpoint_id=new)
    return _by_first(finish)


Anchor: TypeAlias = Memory | File | Folder


def keep(
    leaves: Mapping[str, Leaf],
    like: Mapping[str, Leaf],
    dtype: torch.dtype | None,
    place: Place,
    notes: Mapping[str, str],
) -> Anchor:
    """Keep copies of tensors, for parameters that are ``like``; on a disk with ``notes``."""
    if not isinstance(place, Path):
        return Memory.of(leaves, like, dtype, place)
    kind = Folder if any(map(is_sharded, leaves.values())) else File
    return kind.of(leaves, dtype, place, notes)


def find(path: Path, fingerprint: str | None, like: Mapping[str, Leaf]) -> File | Folder:
    """Open the anchor at a path, for parameters that are ``like``; see `File.find`."""
    return (Folder if any(map(is_sharded, like.values())) else File).find(path, fingerprint)


def save_once(path: Path, leaves: Mapping[str, Leaf], notes: Mapping[str, str]) -> str:
    """Write tensors to a folder, unless it holds these very ones; what is no anchor is not replaced. Return the fingerprint."""
    fingerprint = fingerprint_of(leaves)

    def is_there() -> bool:
        known = read_index(path) if mode(path) else {}
        return (known.get("fingerprint"), known.get("notes")) == (fingerprint, dict(notes))

    if not _by_first(is_there):
        write(path, leaves, None, fingerprint, notes)
    return fingerprint


def _by_first(action: Callable[[], T]) -> T:
    """Let the first process do something, and tell all others what came of it, or what went wrong."""
    outcome: list[Any] = [None, None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except CheckpointError as error:
            outcome[1], cause = str(error), error
        except Exception as error:  # whatever it is, the others wait
            outcome[1], cause = f"SFA: the anchor cannot be read or written: {type(error).__name__}: {error}", error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1]) from cause
    result: T = outcome[0]
    return result


@contextmanager
def _transfer_errors(path: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong in `torch.distributed.checkpoint`, in all processes alike, into an error about the anchor."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # no Exception, but a BaseException
        rank, (first, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"SFA: {path}: {what} (process {rank}: {type(first).__name__}: {first})") from error


def _checksums(folder: Path) -> dict[str, str]:
    """Hash the files of a folder, but for what is said about them."""
    found = {}
    with file_errors(folder, "the anchor cannot be read"):
        for name in sorted(os.listdir(folder)):
            if name != _INDEX:
                digest = xxhash.xxh3_128()
                with (folder / name).open("rb") as file:
                    while data := file.read(_READ):
                        digest.update(data)
                found[name] = digest.hexdigest()
    return found
