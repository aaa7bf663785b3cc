"""Numbers of bytes as people write them, and the memory that the system says the process has."""

import mmap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_cl import MergeError, memory
from mergekit_cl.memory import Anonymous, anonymous_memory, parse_size, shown_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("7", 7),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        (" 2GiB ", 2 << 30),
        ("1.5GB", 1_500_000_000),
        ("1k", 1000),
        ("1KiB", 1024),
        ("3T", 3 * 10**12),
        ("10B", 10),
        ("0.5MiB", 1 << 19),
        (10**18, 10**18),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-1", -1, "0", 0, "1e9", "5 XB", "1,5GB", "nan", None, True, False, [5], "1 2MB", "0.1B"]
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(MergeError, match=r"shard_size=.*must be a number of bytes, such as 512MB or 2GiB"):
        parse_size(text, "shard_size")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (512_000_000, "512.0 MB"),
        (1.25e12, "1.2 TB"),
        (1e16, "10000.0 TB"),
    ],
)
def test_shown_sizes(size: float, text: str) -> None:
    assert shown_size(size) == text


def new(size: int) -> Any:
    """Take memory from the system, and none that the process has had before."""
    array = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = 1
    return array


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_anonymous_memory_is_what_arrays_take() -> None:
    before = anonymous_memory()
    assert before is not None
    assert before > 1 << 20
    array = new(64 << 20)
    with_array = anonymous_memory()
    assert with_array is not None
    assert abs(with_array - before - array.nbytes) < 8 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_the_peak_is_seen_after_the_memory_is_given_back() -> None:
    before = anonymous_memory() or 0
    with Anonymous() as watched:
        array = new(96 << 20)
        time.sleep(0.1)
        del array
    assert watched.peak is not None
    assert watched.peak - before > 90 << 20
    assert (anonymous_memory() or 0) - before < 10 << 20


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert anonymous_memory() is None
    with Anonymous() as watched:
        time.sleep(0.01)
    assert watched.peak is None
    monkeypatch.setattr(Path, "read_text", lambda self: "Name: python\nVmRSS: 5 kB\n")
    assert memory.anonymous_memory() is None
