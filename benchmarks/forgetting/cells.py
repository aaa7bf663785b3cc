"""Keeps what came out of cells, a JSON file for each, so that nothing runs twice; and reads the names of cells."""

import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from mergekit_cl.errors import MergeError

from .protocol import Cell, Result, Sequence, cell

VERSION = 1
"""To be raised when the same cell would give other numbers."""

Fingerprint: TypeAlias = dict[str, Any]

_WHICH_CELLS = {"rates", "more_rates", "trials", "seeds", "betas", "ps", "grid_seeds"}
"""Settings that say which cells there are, not what comes out of one."""

_NAME = re.compile(r"([^/]+)/([^/]+)/([^/]*)/(?:(tuning|weights)-)?seed-(\d+)")


@dataclass(frozen=True)
class Entry:
    """What came out of a cell, the seconds that it took with loading and scoring, and when it was done, in ISO format."""

    result: Result
    seconds: float
    date: str


class Cache:
    """The cells of a sequence that are done, in files that are complete or absent.

    Args:
        folder: Where the files are, each under the name of its cell.
        fingerprint: What the numbers depend on beside the name of the cell. A file with another one is as good as none.

    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self._folder = folder
        self._fingerprint = json.loads(json.dumps(fingerprint))  # tuples are lists in a file

    def read(self, name: str) -> Entry | None:
        """Return what came out of a cell; None if it is not done, the file is damaged, or the fingerprint another one."""
        try:
            stored = json.loads(self._file(name).read_text())
            return Entry(**stored["entry"]) if stored["fingerprint"] == self._fingerprint else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, name: str, result: Result, seconds: float) -> Entry:
        """Keep what came out of a cell."""
        entry = Entry(json.loads(json.dumps(result)), seconds, datetime.now(UTC).isoformat(timespec="seconds"))
        write_whole(self._file(name), json.dumps({"fingerprint": self._fingerprint, "entry": asdict(entry)}).encode())
        return entry

    def drop(self, name: str) -> None:
        """Forget a cell."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def fingerprint_of(sequence: Sequence, quick: bool) -> Fingerprint:
    """Return what the numbers of a sequence's cells depend on beside their names."""
    settings = {name: value for name, value in asdict(sequence.settings).items() if name not in _WHICH_CELLS}
    tasks = [[task.name, len(task.train), len(task.validation), len(task.test)] for task in sequence.tasks]
    versions = {"protocol": VERSION, "torch": torch.__version__, "numpy": np.__version__}
    return {"settings": settings, "tasks": tasks, "quick": quick, "versions": versions}


def named(name: str) -> Cell:
    """Return the cell of a name such as ``rotated/sfa/beta=0.5,lr=0.001,p=0.25/seed-0``.

    Raises:
        MergeError: The name is not complete, or a value is no number.

    """
    try:
        if (match := _NAME.fullmatch(name)) is None:
            raise ValueError
        sequence, learner, values, purpose, seed = match.groups()
        pairs = (pair.split("=") for pair in values.split(",") if pair)
        return cell(sequence, learner, {key: float(value) for key, value in pairs}, int(seed), purpose or "final")
    except ValueError as error:
        example = "rotated/sfa/beta=0.5,lr=0.001,p=0.25/seed-0"
        raise MergeError(f"{name!r} is no cell: a name has the parts sequence/learner/values/seed, as in {example}") from error


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, with its folders, so that it is there completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)
