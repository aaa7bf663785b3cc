"""What a crash-proof write needs of the file system: a lock, room, durable files, and a rename that replaces the old whole."""

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mergekit_cl.errors import CheckpointError

_ADVICE = {
    errno.ENOSPC: "free some room, or write elsewhere",
    errno.EDQUOT: "free some room, or write elsewhere",
    errno.EFBIG: "the system allows no files of that size; ask for smaller shards",
    errno.EACCES: "write elsewhere, or ask for the right to write there",
    errno.EPERM: "write elsewhere, or ask for the right to write there",
    errno.EROFS: "write elsewhere",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or ask for larger shards",
}
_NO_PREALLOCATION = (errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def file_errors(path: Path, doing: str = "cannot be written", needed: str = "") -> Iterator[None]:
    """Turn an error of the system into a `CheckpointError` that names the file, or ``path`` where the system names none.

    ``needed`` says how much room is needed, for an error that is about room.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str | Path) else path
        room = f" ({needed})" if needed and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        advice = f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
        raise CheckpointError(f"{name}: {doing}: {error.strerror or error}{room}{advice}") from error


def beside(target: Path, ending: str) -> Path:
    """Name a hidden file or folder beside ``target``, so that a rename between the two never copies."""
    return target.with_name(f".{target.name}.{ending}")


def lock(target: Path) -> FileLock:
    """Take the lock of ``target``, which the system gives back when the process dies; release it with `unlock`."""
    held = FileLock(beside(target, "lock"), timeout=0, thread_local=False)
    try:
        held.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another merge is writing to {target}: wait until it has ended, or choose another name"
        ) from error
    return held


def unlock(held: FileLock) -> None:
    """Remove the file of a lock while it is held, then release it: whoever had opened it sees that it is no longer there."""
    with suppress(OSError):
        os.unlink(held.lock_file)
    held.release()


def preallocate(descriptor: int, size: int) -> None:
    """Give a file ``size`` bytes, and room for them where the file system can promise it; what it holds stays."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, bytes, at ``offset``; a disk that takes only a part of them says why at the next attempt."""
    done = os.pwrite(descriptor, data, offset)
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def make_durable(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Let the system drop what it holds of a file in memory, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    kind = mode(path)
    if stat.S_ISDIR(kind):
        shutil.rmtree(path)
    elif kind:
        os.unlink(path)


def mode(path: Path) -> int:
    """Return the mode of what is at ``path`` itself, of a link too, for `stat.S_ISDIR` and the like; 0 where nothing is."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def is_vacant(path: Path) -> bool:
    """Tell whether nothing, or an empty folder, is at ``path``."""
    kind = mode(path)
    return not kind or (stat.S_ISDIR(kind) and not os.listdir(path))


def put_in_place(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``, and replace what is there as a whole.

    A file, or nothing, is replaced by one rename. A folder changes places with the new one, which at every moment leaves
    either the one or the other at ``target``; the old one is then at ``new``, for the caller to remove. Where the system
    cannot do that, the old one is put aside first, and `recover` puts it back if the process dies just then.
    """
    if is_vacant(target) or not new.is_dir():
        os.replace(new, target)
    elif not _exchange(new, target):
        aside = beside(target, "replaced")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        make_durable(target.parent)
        remove(aside)


def recover(target: Path) -> None:
    """Put back, or remove, the old folder that a process which died in `put_in_place` had put aside."""
    aside = beside(target, "replaced")
    if not mode(aside):
        return
    if is_vacant(target):
        os.replace(aside, target)
    else:
        remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))
