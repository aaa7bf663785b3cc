"""The crash-proof writer: a checkpoint is built in a folder beside its target, and put there by one rename when it is complete.

``.NAME.merging/`` holds ``result/``, which becomes the target, and ``journal``: a line that says for what, then one for each
tensor that is complete, with its checksum. A process that dies leaves both. The next one with the same fingerprint reads the
tensors of the journal back, keeps those whose checksum is right, and writes the rest.
"""

import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from threading import Lock
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from filelock import FileLock

from mergekit_cl.checkpoint import staging
from mergekit_cl.checkpoint.header import CODES, LIMIT, quoted
from mergekit_cl.checkpoint.staging import file_errors
from mergekit_cl.checkpoint.stored import DataFile, Stored, allow_open_files, numpy_dtype
from mergekit_cl.checkpoint.verify import (
    DIGITS,
    KEY,
    block_digests,
    checksum_of,
    differences,
    digests_of,
    ignore,
)
from mergekit_cl.errors import CheckpointError, MergeError, listing
from mergekit_cl.kernels import BLOCK, Array

_FORMAT = 1  # of the journal
_CODE_OF = {dtype: code for code, (dtype, _) in CODES.items()}
_UNKNOWN = "?" * DIGITS  # stands for a checksum until it is known


@dataclass(frozen=True)
class Output:
    """A tensor to be written. ``dtype`` is NumPy's name ("bfloat16", "float32", "int64", "bool", "float8_e4m3fn")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * CODES[_CODE_OF[self.dtype]][1]


class Writer:
    """Writes the files of a checkpoint, so that the complete result is at the target, or what was there before.

    A context manager. `write` may be called from any thread; when the block ends, no call of it may be under way. Left by an
    exception, nothing is at the target: after a `MergeError` the staging folder is removed, after anything else, Ctrl-C too,
    it stays, and the same call resumes.

    Args:
        target: A folder; or, with ``single_file``, a safetensors file. Folders above it are made.
        outputs: All tensors that will be written, in the order in which they fill the shards.
        fingerprint: What the bytes of the result depend on (recipe and inputs): work that was begun under another is dropped.
        metadata: Goes into the header of every file.
        shard_size: Bytes of tensors in a file, at most, but for a tensor that is larger; ``None`` for one file.
        stem: What the files are called: "model", "adapter_model".
        single_file: Whether the target is a file.
        overwrite: Whether a model that is at the target may be replaced. It is replaced as a whole.
        inputs: Files and folders that are read: none of them may be replaced.

    Raises:
        CheckpointError: The outputs cannot be stored in safetensors files.

    """

    done: frozenset[str]
    """Tensors that a killed run completed, and whose checksums have been read back and found right: not to be written again."""

    def __init__(
        self,
        target: Path,
        outputs: Sequence[Output],
        *,
        fingerprint: str,
        metadata: Mapping[str, str] | None = None,
        shard_size: int | None = 50 * 10**9,
        stem: str = "model",
        single_file: bool = False,
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
    ) -> None:
        if "\0" in str(target):
            raise CheckpointError(f"{str(target)!r}: is not a path")
        self.target = Path(os.path.abspath(target))
        if not self.target.name:
            raise CheckpointError(f"{self.target}: is not a name for a result")
        _check_outputs(outputs)
        self._outputs = tuple(outputs)
        self._single_file = single_file
        self._overwrite = overwrite
        self._inputs = inputs
        self._stem = stem
        self._staging = staging.beside(self.target, "merging")
        self._result = self._staging / "result"
        self._journal_path = self._staging / "journal"
        shards = split(outputs, None if single_file else shard_size)
        names = [self.target.name] if single_file else file_names(stem, len(shards))
        self._files = [_File(self._result / name, shard, metadata or {}) for name, shard in zip(names, shards, strict=True)]
        for file in self._files:
            if file.start > LIMIT:
                raise CheckpointError(
                    f"{file.path.name}: its header would have {file.start:,} bytes, more than the {LIMIT:,} of the format; "
                    "ask for smaller shards"
                )
        self._needed = sum(file.size for file in self._files)
        self._tensors = {tensor.name: tensor for file in self._files for tensor in file.tensors}
        layout = xxhash.xxh3_64_hexdigest(b"".join(file.path.name.encode() + file.header(blank=True) for file in self._files))
        self._first_line = json.dumps({"format": _FORMAT, "fingerprint": fingerprint, "layout": layout}).encode() + b"\n"
        self._journal = -1
        self._open = False
        self._renamed = False
        self._mutex = Lock()
        self.done = frozenset()

    def __enter__(self) -> Self:
        """Take the lock; refuse a target that must not be replaced; check the room; resume, or begin.

        Raises:
            CheckpointError: The target exists, or cannot be written; another merge is writing it; the disk is too small.

        """
        with ExitStack() as undo, file_errors(self.target, "cannot be created", self._room):
            self._check_target()
            self._folder_above()
            allow_open_files(2 * len(self._files))
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock(undo)
            staging.recover(self.target)
            self._check_target()  # it is not another merge's any more
            undo.callback(self._close)
            completed = self._completed_before()
            if completed is None:
                self._begin(undo)
            else:
                self._resume(completed)
            self._open = True
            undo.pop_all()
        return self

    def check(self) -> None:
        """Refuse a target that must not be replaced or cannot be written, and a disk that is too small, but touch nothing.

        Raises:
            CheckpointError: As the block would at its beginning, but for what only the attempt to write can tell.

        """
        with file_errors(self.target, "cannot be created"):
            self._check_target()
            above = self._folder_above()
            if not os.access(above, os.W_OK | os.X_OK):
                raise CheckpointError(f"{self.target}: cannot be created: {above} may not be written to; write elsewhere")
            self._check_disk()

    def write(self, name: str, first: int, data: Array) -> None:
        """Write a window of a tensor; from any thread, in any order. Windows do not overlap, and cover the tensor.

        Args:
            name: Of the tensor.
            first: The element that the window begins with, counted in C order. Fastest at a multiple of `BLOCK`.
            data: 1-D and contiguous, of the tensor's dtype; or its bytes, uint8.

        Raises:
            CheckpointError: The disk is full, or fails; or the window is not one that is still to be written.

        """
        tensor = self._tensors.get(name)
        window = data.view(np.uint8).data
        if (
            tensor is None
            or not self._open
            or (data.dtype != tensor.array_dtype and data.dtype != np.uint8)
            or not 0 <= first <= first + len(window) // tensor.itemsize <= tensor.size
            or len(window) > tensor.left * tensor.itemsize
            or len(window) % tensor.itemsize
        ):
            raise CheckpointError(f"tensor {quoted(name)}: no window of {data.size} {data.dtype} from {first} is to be written")
        count = len(window) // tensor.itemsize
        if not count:
            return
        aligned = not first % BLOCK  # if all windows are, they also end where blocks end, since they cover the tensor
        digests = block_digests(window, tensor.itemsize) if aligned else b""
        file = tensor.file
        try:
            descriptor = file.descriptor if file.descriptor >= 0 else self._reopen(file)
            staging.write_all(descriptor, window, tensor.offset + first * tensor.itemsize)
        except OSError:
            with file_errors(file.path, needed=self._room):
                raise
        with self._mutex:
            if not aligned:
                tensor.aligned = False
            else:
                if not tensor.digests:
                    tensor.digests = bytearray(8 * -(-tensor.size // BLOCK))
                tensor.digests[first // BLOCK * 8 : first // BLOCK * 8 + len(digests)] = digests
            tensor.left -= count
            complete = not tensor.left
        if complete:
            self._complete(tensor)

    def commit(
        self, companions: Mapping[str, Path | bytes], verify: bool = True, advance: Callable[[int], None] = ignore
    ) -> None:
        """Finish the files, make them durable, read them back, and put the result in place.

        Args:
            companions: Other files of the folder, by their paths inside it ("config.json"): contents, or a file to copy.
            verify: Whether to read all tensors that were written back from the disk, and compare their checksums.
            advance: Called with the number of bytes that have been read back since the last call.

        Raises:
            CheckpointError: A tensor is incomplete, a companion's name is not usable, or what was read back is not what was
                written. Nothing is at the target then, or what was there before.

        """
        unwritten = [tensor.name for tensor in self._tensors.values() if tensor.left or not tensor.checksum]
        if unwritten:
            raise CheckpointError(listing([f"tensor {quoted(name)}: has not been written completely" for name in unwritten]))
        extra = {**self._index(), **companions}
        self._check_companions(companions)
        with file_errors(self._result, needed=self._room):
            for file in self._files:
                staging.write_all(self._reopen(file), memoryview(file.header()), 0)
                file.close()
            folders = {self._result}
            for name, content in extra.items():
                path = self._result / name
                path.parent.mkdir(parents=True, exist_ok=True)
                folders |= {self._result / parent for parent in PurePosixPath(name).parents}
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    with file_errors(content, "cannot be copied", self._room):
                        shutil.copyfile(content, path)
            for path in [*(file.path for file in self._files), *(self._result / name for name in extra), *sorted(folders)]:
                staging.make_durable(path)
            if verify:
                self._read_back(advance)
            self._put_in_place()

    def discard(self) -> None:
        """Remove what was written so far; nothing is left to resume."""
        self._close()
        with file_errors(self._staging, "cannot be removed"):
            staging.remove(self._staging)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the files and release the lock; keep what was written unless the merge itself is at fault."""
        try:
            self._close()
            if isinstance(error, MergeError) or self._renamed:
                with suppress(OSError):
                    staging.remove(self._staging)
        finally:
            staging.unlock(self._lock)

    @property
    def _room(self) -> str:
        return f"the result needs {self._needed:,} bytes in {self.target.parent}"

    def _check_target(self) -> None:
        """Refuse a target that cannot be replaced, or must not be."""
        target, inputs = self.target, set()
        if not self._single_file and target.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".gguf"):
            raise CheckpointError(f"{target}: a result is a folder, or a file that ends in .safetensors; choose another name")
        for path in self._inputs:
            inputs |= {Path(os.path.abspath(path)), Path(os.path.realpath(path))}
        real = target.parent.resolve() / target.name
        for path in sorted(inputs):
            if path.is_relative_to(real) or (real.is_relative_to(path) and path.is_dir()):
                raise CheckpointError(
                    f"{target}: is, holds or lies in the input {path}; inputs are never changed: choose another name"
                )
        mode = staging.mode(target)
        if stat.S_ISLNK(mode):
            raise CheckpointError(
                f"{target}: is a symbolic link; name what it points to ({os.readlink(target)}), or another place"
            )
        if not mode or (staging.is_vacant(target) and not self._single_file):
            return
        if stat.S_ISDIR(mode):
            refuse = self._single_file or not any(name.endswith(".safetensors") for name in os.listdir(target))
            what = "a folder" if self._single_file else "a folder, but not of a model (it holds no .safetensors file)"
        else:
            refuse = not self._single_file or not stat.S_ISREG(mode) or target.suffix != ".safetensors"
            what = "not a safetensors file" if self._single_file else "a file, not a folder"
        if refuse:
            raise CheckpointError(f"{target}: is {what}, and is not replaced; choose another name")
        if not self._overwrite:
            raise CheckpointError(
                f"{target}: exists; choose another name, or pass overwrite=True (--overwrite) to replace it as a whole"
            )

    def _folder_above(self) -> Path:
        """Find the folder, of those above the target, that is there already."""
        above = self.target.parent
        while not staging.mode(above) and above != above.parent:
            above = above.parent
        if not above.is_dir():
            raise CheckpointError(f"{self.target}: cannot be created: {above} is not a folder")
        return above

    def _take_lock(self, undo: ExitStack) -> FileLock:
        held = staging.lock(self.target)
        undo.callback(staging.unlock, held)
        return held

    def _completed_before(self) -> dict[str, str] | None:
        """Read the journal of a killed run: tensors and their checksums; ``None`` if there is none for the same result."""
        if staging.mode(self._staging):
            strangers = set(os.listdir(self._staging)) - {self._journal_path.name, self._result.name}
            if strangers:
                raise CheckpointError(
                    f"{self._staging}: holds {sorted(strangers)[0]}, which no merge has written; move it elsewhere"
                )
        try:
            lines = self._journal_path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        if not lines or lines[0] != self._first_line:
            return None
        completed = {}
        for line in lines[1:]:
            with suppress(ValueError, TypeError, KeyError):  # torn: the process died while it wrote the line
                checksum, name = json.loads(line)
                if line.endswith(b"\n") and self._tensors[name].size:
                    completed[name] = str(checksum)
        return completed

    def _begin(self, undo: ExitStack) -> None:
        """Make the staging folder, and the files in their full size."""
        staging.remove(self._staging)
        self._check_disk()
        undo.callback(shutil.rmtree, self._staging, ignore_errors=True)
        self._result.mkdir(parents=True)
        self._prepare_files()
        self._start_journal({})

    def _resume(self, completed: Mapping[str, str]) -> None:
        """Keep the tensors of a killed run whose bytes are right, and nothing else."""
        self._result.mkdir(exist_ok=True)
        ours = {file.path.name for file in self._files}
        for name in os.listdir(self._result):
            if name not in ours or not stat.S_ISREG(staging.mode(self._result / name)):
                staging.remove(self._result / name)
        self._check_disk()
        self._prepare_files()
        kept = [(tensor.stored(), completed[name]) for name, tensor in self._tensors.items() if name in completed]
        wrong = differences(kept)
        for stored, checksum in kept:
            if stored not in wrong:
                tensor = self._tensors[stored.name]
                tensor.left, tensor.checksum = 0, checksum
        self.done = frozenset(stored.name for stored, _ in kept if stored not in wrong)
        self._start_journal({name: completed[name] for name in self._tensors if name in self.done})

    def _check_disk(self) -> None:
        """Compare the room on the disk with what is needed beyond that which the staging folder holds."""
        found = [path for path in self._result.rglob("*") if stat.S_ISREG(staging.mode(path))]
        more = self._needed - sum(os.lstat(path).st_blocks * 512 for path in found)
        free = shutil.disk_usage(self._folder_above()).free
        if free < more:
            raise CheckpointError(
                f"{self.target}: the result needs {more:,} bytes more in {self.target.parent}, where {free:,} are free; "
                "free some room, or write elsewhere"
            )

    def _prepare_files(self) -> None:
        for file in self._files:
            descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                with file_errors(file.path, needed=self._room):
                    staging.preallocate(descriptor, file.size)
            finally:
                os.close(descriptor)
        for tensor in self._tensors.values():
            if not tensor.size:
                tensor.checksum = checksum_of(tensor.name, tensor.dtype, tensor.shape, b"")
                tensor.file.unfinished -= 1

    def _start_journal(self, completed: Mapping[str, str]) -> None:
        """Write the journal anew, in one step, and open it to append to it."""
        lines = [self._first_line, *(_journal_line(name, checksum) for name, checksum in completed.items())]
        for name in completed:
            self._tensors[name].file.unfinished -= 1
        new = self._result / ".journal"
        new.write_bytes(b"".join(lines))
        os.replace(new, self._journal_path)
        self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _reopen(self, file: "_File") -> int:
        with self._mutex:
            if file.descriptor < 0:
                file.descriptor = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
            return file.descriptor

    def _complete(self, tensor: "_Tensor") -> None:
        """Make the checksum of a tensor whose last window has been written, and put it into the journal."""
        digests = bytes(tensor.digests) if tensor.aligned else digests_of(tensor.stored())
        checksum = checksum_of(tensor.name, tensor.dtype, tensor.shape, digests)
        line = _journal_line(tensor.name, checksum)
        with file_errors(self._journal_path, needed=self._room):
            if os.write(self._journal, line) < len(line):
                raise CheckpointError(f"{self._journal_path}: the disk is full: {self._room}")
        with self._mutex:
            tensor.checksum = checksum
            tensor.digests = bytearray()
            tensor.file.unfinished -= 1
            if not tensor.file.unfinished:
                tensor.file.close()

    def _index(self) -> dict[str, bytes]:
        if len(self._files) == 1:
            return {}
        size, total = sum(output.size for output in self._outputs), sum(output.nbytes for output in self._outputs)
        index = {
            "metadata": {"total_parameters": size, "total_size": total},
            "weight_map": {tensor.name: tensor.file.path.name for tensor in self._tensors.values()},
        }
        return {f"{self._stem}.safetensors.index.json": json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"}

    def _check_companions(self, companions: Mapping[str, Path | bytes]) -> None:
        if companions and self._single_file:
            raise CheckpointError(f"{self.target}: is a single file, which {sorted(companions)[0]} cannot be put into")
        ours = {PurePosixPath(name) for name in [*(file.path.name for file in self._files), *self._index()]}
        paths = {name: PurePosixPath(name) for name in companions}
        for name, path in paths.items():
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise CheckpointError(f"{name!r}: is not the path of a file inside {self.target}")
            others = ours | {other for key, other in paths.items() if key != name}
            if path in others or not others.isdisjoint(path.parents):
                raise CheckpointError(f"{name!r}: is the name of another file of {self.target}")

    def _read_back(self, advance: Callable[[int], None]) -> None:
        """Compare what is on the disk with what was written: all but what a resumed run has read already."""
        for file in self._files:
            staging.forget_cached(file.path)
            with file.path.open("rb") as stream:
                if stream.read(file.start) != file.header():
                    raise CheckpointError(f"{file.path}: its header, read back, is not what was written; check the disk")
        written = [tensor for tensor in self._tensors.values() if tensor.name not in self.done]
        wrong = differences([(tensor.stored(), tensor.checksum) for tensor in written], advance)
        if wrong:
            raise CheckpointError(listing([f"{problem}; check the disk" for problem in wrong.values()]))

    def _put_in_place(self) -> None:
        self._close()
        self._check_target()
        os.unlink(self._journal_path)  # first: what the result may change places with must not be taken for work to resume
        staging.make_durable(self._staging)
        staging.put_in_place(self._files[0].path if self._single_file else self._result, self.target)
        self._renamed = True
        staging.make_durable(self.target.parent)
        with file_errors(self._staging, f"{self.target} is complete, but what it replaces cannot be removed"):
            staging.remove(self._staging)

    def _close(self) -> None:
        self._open = False
        for file in self._files:
            file.close()
        if self._journal >= 0:
            os.close(self._journal)
        self._journal = -1


class _File:
    """A file of the result: where its tensors lie, the largest elements first as in the reference implementation."""

    def __init__(self, path: Path, outputs: Iterable[Output], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self.descriptor = -1
        self.tensors = [_Tensor(self, output) for output in outputs]
        self.tensors.sort(key=lambda tensor: (-tensor.itemsize, tensor.name))
        self.unfinished = len(self.tensors)
        offset = 0
        for tensor in self.tensors:
            tensor.offset = offset
            offset += tensor.size * tensor.itemsize
        self.start = 0
        self.start = len(self.header(blank=True))
        self.size = self.start + offset
        self.reader = DataFile(path, self.size, 0)
        for tensor in self.tensors:
            tensor.offset += self.start

    def header(self, blank: bool = False) -> bytes:
        """Make the bytes before the tensors, as many with ``blank`` checksums as with the real ones."""
        checksums = "".join(_UNKNOWN if blank else tensor.checksum for tensor in self.tensors)
        entries: dict[str, object] = {"__metadata__": {**self.metadata, KEY: checksums}}
        for tensor in self.tensors:
            begin = tensor.offset - self.start
            entries[tensor.name] = {
                "dtype": _CODE_OF[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, begin + tensor.size * tensor.itemsize],
            }
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def close(self) -> None:
        """Close the file, if it is open."""
        self.reader.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class _Tensor:
    """A tensor in its file, and what of it is still to be written."""

    def __init__(self, file: _File, output: Output) -> None:
        self.file = file
        self.name, self.shape, self.dtype, self.size = output.name, output.shape, output.dtype, output.size
        self.array_dtype = numpy_dtype(output.dtype)
        self.itemsize = self.array_dtype.itemsize
        self.offset = 0  # in the file, in bytes
        self.left = output.size  # elements
        self.aligned = True  # whether all windows so far were whole blocks, so that `digests` holds theirs
        self.digests = bytearray()
        self.checksum = ""

    def stored(self) -> Stored:
        """Describe where the tensor lies, to read it back."""
        return Stored(self.file.reader, self.name, self.shape, self.dtype, self.offset)


def split(outputs: Iterable[Output], shard_size: int | None) -> list[list[Output]]:
    """Fill shards with tensors in their order; one that is larger than a shard gets its own. As transformers does it."""
    shards: list[list[Output]] = []
    current: list[Output] = []
    held = 0
    for output in outputs:
        if shard_size is not None and output.nbytes > shard_size:
            shards.append([output])
            continue
        if shard_size is not None and held + output.nbytes > shard_size:
            shards.append(current)
            current, held = [], 0
        current.append(output)
        held += output.nbytes
    if current or not shards:
        shards.append(current)
    return shards


def file_names(stem: str, count: int) -> list[str]:
    """Name the files of a checkpoint, as transformers does."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _check_outputs(outputs: Iterable[Output]) -> None:
    problems = []
    for name, count in Counter(output.name for output in outputs).items():
        if count > 1:
            problems.append(f"tensor {quoted(name)}: is to be written {count} times")
        if name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
            problems.append(f"tensor {quoted(name)}: the format does not allow this name")
    for output in outputs:
        if output.dtype not in _CODE_OF:
            problems.append(f"tensor {quoted(output.name)}: safetensors files do not hold {output.dtype}")
    if problems:
        raise CheckpointError(listing(problems))


def _journal_line(name: str, checksum: str) -> bytes:
    return json.dumps([checksum, name]).encode() + b"\n"
