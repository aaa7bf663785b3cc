"""How much memory the process has: numbers of bytes as people write them, and what the system says."""

import re
from pathlib import Path
from threading import Event, Thread

from mergekit_cl.errors import MergeError

_UNITS = {"": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)} | {"B": 1}
_UNITS |= {prefix: 1000**power for power, prefix in enumerate("KMGT", 1)}


def parse_size(value: int | str, what: str) -> int:
    """Read a number of bytes: ``512MB`` is 512,000,000, ``512MiB`` is 536,870,912; a plain number is bytes.

    >>> parse_size("1.5GB", "memory"), parse_size("2GiB", "memory"), parse_size(7, "memory")
    (1500000000, 2147483648, 7)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value)) if not isinstance(value, bool) else None
    if found is None or found[2].upper() not in _UNITS or not (size := int(float(found[1]) * _UNITS[found[2].upper()])):
        raise MergeError(f"{what}={value!r}: must be a number of bytes, such as 512MB or 2GiB")
    return size


def shown_size(size: float) -> str:
    """Write a number of bytes for people.

    >>> shown_size(1_234_567_890), shown_size(999)
    ('1.2 GB', '999 bytes')
    """
    for unit, bytes_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size:.0f} bytes"


def anonymous_memory() -> int | None:
    """Return the bytes of anonymous memory that the process has (RssAnon), ``None`` where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


class Anonymous:
    """Watches the anonymous memory of the process while a ``with`` block runs; ``peak`` is the most that was seen."""

    peak: int | None = None

    def __enter__(self) -> "Anonymous":
        self._stop = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            now = anonymous_memory()
            if now is None:
                return
            self.peak = max(self.peak or 0, now)
            if self._stop.wait(0.02):
                return
