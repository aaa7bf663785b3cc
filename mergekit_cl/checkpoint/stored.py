"""Tensors that stay on disk: read a window at a time, never mapped.

A mapped file that somebody truncates kills the process; `os.preadv` returns fewer bytes, and that is an error with a name.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mergekit_cl.dtypes import type_of
from mergekit_cl.errors import CheckpointError
from mergekit_cl.kernels import Array

WIDENED = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
"""Dtypes that are read as bfloat16, which holds each of their values exactly."""


class Source(Protocol):
    """A tensor that is read a window at a time. What it is made of need not lie in a file as it is."""

    @property
    def name(self) -> str:
        """What the tensor is called in its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """The dtype that it is read as."""

    @property
    def files(self) -> "tuple[DataFile, ...]":
        """The files that it is read from."""

    def read(self, start: int, stop: int, out: Array) -> None:
        """Read the elements from ``start`` to ``stop``, counted in C order, into a 1-D array of `dtype`; from any thread.

        Raises:
            CheckpointError: The file is shorter than it was, or cannot be read.

        """


@dataclass(eq=False)
class DataFile:
    """A file whose bytes are read with `os.preadv`. It is opened at the first read, and again in another process.

    ``size`` in bytes, ``mtime_ns`` and ``inode`` are those of the time when its header was read; ``digest`` is a hash of the
    header. ``bytes_read`` counts what has been read since then.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int = 0
    digest: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    _descriptor: int = -1
    _lock: Lock = field(default_factory=Lock, repr=False)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        done = 0
        try:
            descriptor = self._open()
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], offset + done)
                if not count:
                    raise CheckpointError(
                        f"{self.path}: ends at byte {offset + done}, but had {self.size} bytes when the merge began; it was "
                        "truncated or replaced: restore it and merge again"
                    )
                done += count
            with self._lock:
                self.bytes_read += done
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read at byte {offset + done}: {error.strerror}") from error

    def advise(self, offset: int, length: int) -> None:
        """Tell the system that these bytes will be read soon."""
        with suppress(OSError):  # what is wrong with the file will show when it is read
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._open(), offset, length, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to, or replaced, since its header was read."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise CheckpointError(f"{self.path}: is gone: {error.strerror}") from error
        if (status.st_size, status.st_mtime_ns, status.st_ino) != (self.size, self.mtime_ns, self.inode):
            raise CheckpointError(f"{self.path}: was changed while it was read; merge again when nothing writes to it")

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        if self._descriptor < 0:
            with self._lock:
                if self._descriptor < 0:
                    self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._descriptor

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as it lies in a file, in C order: ``stored_dtype`` at byte ``offset`` of the file.

    ``stored_dtype`` is NumPy's name for the dtype of the elements in the file ("bfloat16", "float8_e4m3fn", "int64", "bool").
    """

    file: DataFile
    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    offset: int

    @property
    def dtype(self) -> str:
        """The dtype that the tensor is read as: bfloat16 where the file holds float8."""
        return "bfloat16" if self.stored_dtype in WIDENED else self.stored_dtype

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The file."""
        return (self.file,)

    @cached_property
    def itemsize(self) -> int:
        """Bytes of an element in the file."""
        return 1 if self.stored_dtype in WIDENED else numpy_dtype(self.stored_dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.itemsize

    def read(self, start: int, stop: int, out: Array) -> None:
        """See `Source.read`."""
        if self.stored_dtype in WIDENED:
            narrow = np.empty(stop - start, np.uint8)
            self.file.read(self.offset + start, narrow.data)
            np.take(_widened(self.stored_dtype), narrow, out=out.view(np.uint16))
        else:
            self.file.read(self.offset + start * self.itemsize, out.view(np.uint8).data)


def allow_open_files(count: int) -> None:
    """Raise the number of files that the process may have open as far as it may itself, for ``count`` more."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ()) + count + 128
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def is_source(value: object) -> bool:
    """Whether a value is a `Source`; arrays are not."""
    return isinstance(getattr(type(value), "files", None), property)


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of NumPy that has this name; bfloat16 and the like are those of ml_dtypes."""
    found: np.dtype[Any] = type_of.get(name) or np.dtype(getattr(ml_dtypes, name, name))
    return found


@cache
def _widened(dtype: str) -> Array:
    """List the 256 values of a dtype of one byte as bits of bfloat16."""
    bits: Array = np.arange(256, dtype=np.uint8).view(WIDENED[dtype]).astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits
