"""Rehearsal in a PyTorch loop: what is stored, what is mixed in, how it resumes, what it refuses."""

import copy
import doctest
import io
from collections import UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mergekit_cl import MergeError
from mergekit_cl.adapters.torch import rehearsal as module
from mergekit_cl.adapters.torch.rehearsal import Rehearsal
from mergekit_cl.continual.rehearsal import Balanced, Reservoir

Pair = namedtuple("Pair", ["image", "label"])


def data(task: int, examples: int = 40) -> TensorDataset:
    """Make examples whose label is 1000 * task + number, and whose image says the same."""
    labels = torch.arange(examples) + 1000 * task
    return TensorDataset(labels[:, None, None].expand(-1, 2, 3).float(), labels)


def numbers(batch: Any) -> list[int]:
    images, labels = batch
    assert images.dtype == torch.float32
    assert torch.equal(images, labels[:, None, None].expand(-1, 2, 3).float())
    return list(labels.tolist())


def test_docstring_examples() -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 5
    assert not results.failed


# workers are forks; JAX, once another test has imported it, warns of forks, and so does Python from 3.12 on
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called", r"ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_loader_come_with_stored_examples(workers: int) -> None:
    rehearsal = Rehearsal(20)
    rehearsal.remember(DataLoader(data(0), batch_size=7), task=0)
    loader = DataLoader(data(1), batch_size=8, num_workers=workers, timeout=60 if workers else 0)
    stored = {int(example["1"]) for example in rehearsal.buffer}
    assert len(stored) == len(rehearsal) == 20
    mixed = rehearsal.mixed(loader, extra=5)
    assert len(mixed) == len(loader) == 5
    drawn = []
    for number, batch in enumerate(mixed):
        assert isinstance(batch, list)  # as the loader has it
        assert numbers(batch)[:8] == list(range(1000 + 8 * number, 1008 + 8 * number))
        assert len(set(numbers(batch)[8:])) == 5
        drawn += numbers(batch)[8:]
    assert set(drawn) <= stored
    assert len(set(drawn)) > 10  # others each time: 25 draws, 15 of 20 expected


@pytest.mark.parametrize(("share", "size"), [(0.5, 16), (0.2, 10), (0.75, 28), (0.99, 28)])
def test_a_share_is_one_of_the_mixed_batch(share: float, size: int) -> None:
    rehearsal = Rehearsal(Reservoir(20))
    loader = DataLoader(data(1), batch_size=8)
    first = next(iter(rehearsal.mixed(loader, share=share)))
    assert numbers(first) == list(range(1000, 1008))  # nothing stored yet
    rehearsal.remember(data(0))
    for batch in rehearsal.mixed(loader, share=share):
        assert len(numbers(batch)) == size  # 8 / (1 - share), or all 20 that are stored
        assert sum(number < 1000 for number in numbers(batch)) == size - 8


def test_tasks_and_labels_share_the_buffer() -> None:
    rehearsal = Rehearsal(12)
    for task in range(3):
        rehearsal.remember(data(task), task=task)
    assert isinstance(rehearsal.buffer, Balanced)
    assert rehearsal.buffer.shares == {0: 4, 1: 4, 2: 4}
    rehearsal = Rehearsal(12)
    for task in range(2):
        rehearsal.remember(DataLoader(data(task), batch_size=7), task=task, labels=lambda batch: batch[1] % 3)
    assert rehearsal.buffer.shares == {(task, label): 2 for task in range(2) for label in range(3)}  # type: ignore[union-attr]
    assert all(int(example["1"]) // 1000 < 2 for example in rehearsal.buffer)


@pytest.mark.parametrize("kind", [torch.tensor, np.int64])
def test_tensors_and_numbers_of_numpy_name_groups_by_their_value(kind: Any) -> None:
    rehearsal = Rehearsal(6)
    for _ in range(2):
        for task in range(3):
            rehearsal.add(torch.zeros(4, 1), task=kind(task))
    assert rehearsal.buffer.shares == {0: 2, 1: 2, 2: 2}  # type: ignore[union-attr]
    rehearsal = Rehearsal(6)
    for task in range(2):
        for labels in ([kind(0), kind(1)], np.arange(2), torch.arange(2)):
            rehearsal.add(torch.zeros(2, 1), task=kind(task), labels=labels)
    assert sorted(rehearsal.buffer.shares) == [(0, 0), (0, 1), (1, 0), (1, 1)]  # type: ignore[union-attr]
    file = io.BytesIO()
    torch.save(rehearsal.state_dict(), file)
    file.seek(0)
    again = Rehearsal(6)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.buffer.shares == rehearsal.buffer.shares  # type: ignore[union-attr]


def test_a_loader_gives_what_the_buffer_alone_would_keep() -> None:
    rehearsal, indices = Rehearsal(Balanced(6, seed=5)), Balanced(6, seed=5)
    for task in range(3):
        rehearsal.remember(DataLoader(data(task), batch_size=7), task=task)
        indices.extend([1000 * task + i for i in range(40)], [task] * 40)
    assert [int(example["1"]) for example in rehearsal.buffer] == list(indices)


@pytest.mark.parametrize(
    "structure",
    [
        lambda x, y: x,
        lambda x, y: (x, y),
        lambda x, y: [x, {"label": y, "again": (y, y)}],
        lambda x, y: {"x": x, "label": y, "id": [f"number {i}" for i in y.tolist()]},
        lambda x, y: Pair(x, y),
        lambda x, y: UserDict({"x": x, "label": y}),
        lambda x, y: {"x": x, "names": tuple(map(str, y.tolist()))},
    ],
)
def test_structures_are_kept(structure: Any) -> None:
    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, torch.Tensor | str):
            yield value
        else:
            for item in value.values() if isinstance(value, dict | UserDict) else value:
                yield from leaves(item)

    rehearsal = Rehearsal(2)
    rehearsal.add(structure(torch.zeros(2, 3), torch.arange(2)))
    batch = structure(torch.ones(3, 3), torch.arange(3) + 5)
    before = copy.deepcopy(batch)
    mixed = rehearsal.mix(batch, extra=2)
    images = torch.cat([torch.ones(3, 3), torch.zeros(2, 3)])
    first, second = (structure(images, torch.tensor([5, 6, 7, *order])) for order in ([0, 1], [1, 0]))
    assert type(mixed) is type(batch)
    shown = str(list(leaves(mixed)))
    assert shown in (str(list(leaves(first))), str(list(leaves(second))))
    assert str(batch) == str(before)


def test_texts_of_different_lengths_are_filled_up() -> None:
    pad = {"input_ids": 9, "labels": -100}
    short = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[3, 4]])}
    long = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 8, 8]])}
    for stored, batch, ids, labels in (
        (short, long, [[5, 6, 7], [1, 2, 9]], [[8, 8, 8], [3, 4, -100]]),
        (long, short, [[1, 2, 9], [5, 6, 7]], [[3, 4, -100], [8, 8, 8]]),
    ):
        rehearsal = Rehearsal(3, pad=pad)
        rehearsal.add(stored)
        mixed = rehearsal.mix(batch, extra=1)
        assert mixed["input_ids"].tolist() == ids
        assert mixed["labels"].tolist() == labels
        assert mixed["labels"].dtype == torch.int64
        rehearsal.pad.clear()
        with pytest.raises(MergeError, match=r"pass pad=\{'input_ids': value\}"):
            rehearsal.mix(batch, extra=1)


def test_copies_of_rows_are_stored() -> None:
    rehearsal = Rehearsal(Reservoir(3))
    batch = torch.arange(8.0, requires_grad=True)[:, None] * torch.ones(1000)
    rehearsal.add(batch)
    for example in rehearsal.buffer:
        assert example[""].untyped_storage().nbytes() == 4000
        assert not example[""].requires_grad
    before = sorted(float(example[""][0]) for example in rehearsal.buffer)
    with torch.no_grad():
        batch.zero_()
    assert sorted(float(example[""][0]) for example in rehearsal.buffer) == before
    mixed = rehearsal.mix(torch.zeros(1, 1000), extra=3)
    mixed += 1
    assert sorted(float(example[""][0]) for example in rehearsal.buffer) == before


@pytest.mark.parametrize("interrupted", range(10))
def test_a_resumed_loop_sees_the_same_batches(interrupted: int) -> None:
    tasks = [DataLoader(data(task), batch_size=8) for task in range(2)]  # 5 batches each

    def loop(rehearsal: Rehearsal, first: int, last: int) -> list[list[int]]:
        seen = []
        for step in range(first, last):
            batch = [*tasks[step // 5]][step % 5]
            seen.append(numbers(rehearsal.mix(batch, extra=3)))
            rehearsal.add(batch, task=step // 5, labels=batch[1] % 2)
        return seen

    rehearsal = Rehearsal(Balanced(8, seed=1))
    loop(rehearsal, 0, interrupted)
    file = io.BytesIO()
    torch.save(rehearsal.state_dict(), file)
    file.seek(0)
    resumed = Rehearsal(8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert loop(resumed, interrupted, 10) == loop(rehearsal, interrupted, 10)


def test_a_loader_without_a_length() -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            yield from torch.arange(5.0)

    rehearsal = Rehearsal(2)
    rehearsal.remember(Stream(), task="stream")
    mixed = rehearsal.mixed(DataLoader(Stream(), batch_size=2), extra=2)
    assert [len(batch) for batch in mixed] == [4, 4, 3]
    with pytest.raises(TypeError):
        len(mixed)


@pytest.mark.parametrize(
    ("stored", "batch", "message"),
    [
        (torch.ones(2, 3), [torch.ones(2, 3)], "store and mix batches of one structure"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}, "the batch has a, b, but a stored example has a;"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64), "the batch is torch.float64"),
        ([torch.ones(2, 3)], [torch.ones(2, 3, 1)], '"0" of the batch is torch.float32 with 3 dimensions'),
        ([torch.ones(2, 3)], [torch.ones(2, 4)], r"shape \(2, 4\), but examples of the shape \(3,\) are stored"),
        (torch.ones(2), {"loss": torch.tensor(1.0)}, '"loss" of the batch is a tensor without dimensions'),
        (torch.ones(2), (torch.ones(2), None), '"1" of the batch is NoneType'),
        (torch.ones(2), (torch.ones(2), torch.ones(3)), "another number of rows"),
        (torch.ones(2), {}, "the batch is empty"),
    ],
)
def test_batches_that_do_not_fit(stored: Any, batch: Any, message: str) -> None:
    rehearsal = Rehearsal(2)
    rehearsal.add(stored)
    with pytest.raises(MergeError, match=message):
        rehearsal.mix(batch, extra=1)


def test_bad_arguments() -> None:
    rehearsal = Rehearsal(2)
    for share, extra in ((None, None), (0.5, 3), (0.0, None), (1.0, None), (float("nan"), None), (None, -1), (None, 1.5)):
        with pytest.raises(MergeError, match=r"Rehearsal: (pass one of )?(share|extra)"):
            rehearsal.mixed([], share=share, extra=extra)
    with pytest.raises(MergeError, match="1 labels for a batch of 2"):
        rehearsal.add(torch.ones(2), labels=[1])
    with pytest.raises(MergeError, match="capacity=0"):
        Rehearsal(0)
    assert len(rehearsal) == rehearsal.buffer.seen == 0


@pytest.mark.parametrize(("rows", "share", "stored"), [(4, 0.3, 2), (7, 0.3, 3), (5, 0.1, 1), (4, 0.1, 0), (6, 0.7, 14)])
def test_a_share_is_rounded_to_the_nearest_number_of_examples(rows: int, share: float, stored: int) -> None:
    rehearsal = Rehearsal(20)
    rehearsal.add(torch.zeros(20, 1))
    assert len(rehearsal.mix(torch.ones(rows, 1), share=share)) == rows + stored
