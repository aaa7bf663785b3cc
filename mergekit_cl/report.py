"""What a merge into files reports."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """What a merge has done: numbers of tensors, bytes, seconds; ``peak`` is anonymous memory, ``None`` where it is unknown.

    ``device`` is where it was computed: "cpu", "cuda:0".
    """

    target: Path
    merged: int
    copied: int
    resumed: int
    read: int
    written: int
    seconds: float
    peak: int | None
    device: str = "cpu"
