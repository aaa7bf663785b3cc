"""Rehearsal in a PyTorch training loop: examples of earlier tasks, mixed into the batches of the present one."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from mergekit_cl.continual.rehearsal import Balanced, Reservoir
from mergekit_cl.errors import MergeError

Example: TypeAlias = dict[str, Any]
"""The parts of an example by their path in the batch ("0", "labels", "image.pixels"): tensors on the CPU, and texts."""


class Rehearsal:
    """Keep examples of earlier tasks, and mix them into the batches of later ones (experience replay).

    A batch is a tensor, or tuples, lists and mappings of tensors, as a ``DataLoader`` collates them; every tensor has a row for
    each example, and so have lists of texts. Examples are stored on the CPU, as copies of their rows. What is mixed in goes to
    the device of the batch.

    Args:
        buffer: The buffer that decides what is kept; or how many examples to keep, for a `Balanced` one.
        pad: For batches whose tensors differ in length, as those of texts: the value that fills a tensor up, at the end of each
            dimension, by its path in the batch: ``{"input_ids": 0, "attention_mask": 0, "labels": -100}``.

    Raises:
        MergeError: The capacity is out of range.

    >>> rehearsal = Rehearsal(4)
    >>> first = [torch.zeros(2, 1), torch.zeros(2, 1)]  # the batches of a loader
    >>> rehearsal.remember(first, task="first")
    >>> second = [torch.ones(2, 1), torch.ones(2, 1)]
    >>> for batch in rehearsal.mixed(second, share=0.5):
    ...     print(batch.flatten().tolist())
    [1.0, 1.0, 0.0, 0.0]
    [1.0, 1.0, 0.0, 0.0]

    """

    def __init__(self, buffer: int | Reservoir | Balanced, *, pad: Mapping[str, float] | None = None) -> None:
        self.buffer = buffer if isinstance(buffer, Reservoir | Balanced) else Balanced(buffer)
        self.pad = dict(pad or {})

    def add(self, batch: Any, *, task: Any = None, labels: Any = None) -> None:
        """Offer the examples of a batch to the buffer, which copies those that it keeps.

        Args:
            batch: The batch, on any device.
            task: The task that they are from: a number (or a tensor of one), or a string. A `Balanced` buffer gives every task
                the same share.
            labels: The label of each example, as a tensor, an array or a list. Then it gives every label of every task the same
                share.

        Raises:
            MergeError: The batch is of another structure, its tensors differ in their number of rows, there are not as many
                labels as examples, or the buffer has no room for another task or label.

        """
        rows = _Rows(batch)
        if labels is None:
            groups = [task] * len(rows)
        else:
            labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
            groups = [(task, label) for label in labels]
        if len(groups) != len(rows):
            raise MergeError(f"Rehearsal: {len(groups)} labels for a batch of {len(rows)}; pass the label of each example")
        if isinstance(self.buffer, Balanced):
            self.buffer.extend(rows, groups)
        else:
            self.buffer.extend(rows)

    def remember(self, source: Any, *, task: Any = None, labels: Callable[[Any], Any] | None = None) -> None:
        """Offer all examples of a task to the buffer, as at its end.

        Args:
            source: A ``DataLoader``, or anything that yields batches; or a ``Dataset``, which is read in its order, with the
                default collation. One pass is made over it.
            task: As in `add`.
            labels: Takes a batch and returns the label of each of its examples: ``lambda batch: batch[1]``.

        Raises:
            MergeError: As in `add`; batches before the faulty one were offered.

        """
        batches = DataLoader(source, batch_size=256) if isinstance(source, Dataset) else source
        for batch in batches:
            self.add(batch, task=task, labels=None if labels is None else labels(batch))

    def mixed(self, loader: Iterable[Any], *, share: float | None = None, extra: int | None = None) -> "Mixed":
        """Wrap a loader: each of its batches comes with stored examples appended, as `mix` does it.

        The result can be iterated again and again (it draws other examples every time), and has the length of the loader.

        Args:
            loader: A ``DataLoader``, with workers or without, or anything that yields batches.
            share: As in `mix`.
            extra: As in `mix`.

        Raises:
            MergeError: Both share and extra are given, or none, or one out of range.

        """
        _check_amount(share, extra)
        return Mixed(self, loader, share, extra)

    def mix(self, batch: Any, *, share: float | None = None, extra: int | None = None) -> Any:
        """Return a batch with stored examples appended, drawn at random without repetition.

        Args:
            batch: The batch; it is not changed. While nothing is stored, it is returned as it is.
            share: The part of the result that is stored examples, in (0, 1): with 0.5 as many as the batch has.
            extra: In its place the number of stored examples. Where fewer are stored, all of them are appended.

        Returns:
            A batch of the same structure, dtypes and devices.

        Raises:
            MergeError: The stored examples do not fit to the batch: another structure, dtype or shape. Or as for `mixed`.

        """
        _check_amount(share, extra)
        rows = _Rows(batch)
        if extra is None:
            assert share is not None
            extra = round(len(rows) * share / (1 - share))
        drawn = self.buffer.sample(extra)
        if not drawn:
            return batch
        for example in drawn:
            if example.keys() != rows.parts.keys():
                raise MergeError(
                    f"Rehearsal: the batch has {_listed(rows.parts)}, but a stored example has {_listed(example)}; store and "
                    "mix batches of one structure"
                )
        parts = {path: self._joined(path, part, [example[path] for example in drawn]) for path, part in rows.parts.items()}
        return _rebuilt(batch, iter(parts.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the buffer: numbers, groups, and the examples (not copied), safe for ``weights_only=True``."""
        return self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: what is kept and what is drawn from then on is the same.

        Raises:
            MergeError: The state is damaged, or one of another kind of buffer; nothing was loaded.

        """
        self.buffer.load_state_dict(state)

    def __len__(self) -> int:
        return len(self.buffer)

    def __repr__(self) -> str:
        return f"Rehearsal({self.buffer!r})"

    def _joined(self, path: str, part: Any, stored: list[Any]) -> Any:
        """Append what is stored to a part of a batch."""
        if not isinstance(part, torch.Tensor):
            return type(part)([*part, *stored])
        kinds = {(tensor.dtype, tensor.dim()) for tensor in stored}
        if kinds != {(part.dtype, part.dim() - 1)}:
            raise MergeError(
                f"Rehearsal: {_named(path)} is {part.dtype} with {part.dim()} dimensions, but stored as {_listed(kinds)}; "
                "store and mix batches of one kind"
            )
        if all(tensor.shape == part.shape[1:] for tensor in stored):
            return torch.cat([part, torch.stack(stored).to(part.device)])
        if path not in self.pad:
            raise MergeError(
                f"Rehearsal: {_named(path)} has the shape {tuple(part.shape)}, but examples of the shape "
                f"{tuple(next(t.shape for t in stored if t.shape != part.shape[1:]))} are stored; to fill up the shorter ones "
                f"pass pad={{{path!r}: value}}"
            )
        largest = [max(sizes) for sizes in zip(part.shape[1:], *(tensor.shape for tensor in stored), strict=True)]
        joined = part.new_full((len(part) + len(stored), *largest), self.pad[path])
        joined[(slice(len(part)), *map(slice, part.shape[1:]))] = part
        for row, tensor in enumerate(stored, len(part)):
            joined[(row, *map(slice, tensor.shape))] = tensor.to(part.device)
        return joined


class Mixed:
    """A loader whose batches have stored examples appended; see `Rehearsal.mixed`."""

    def __init__(self, rehearsal: Rehearsal, loader: Iterable[Any], share: float | None, extra: int | None) -> None:
        self.rehearsal, self.loader, self.share, self.extra = rehearsal, loader, share, extra

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield self.rehearsal.mix(batch, share=self.share, extra=self.extra)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


class _Rows(Sequence[Example]):
    """The examples of a batch; each is copied when it is asked for."""

    def __init__(self, batch: Any) -> None:
        self.parts = dict(_parts(batch, ""))
        sizes = {path: len(part) for path, part in self.parts.items()}
        if not sizes:
            raise MergeError("Rehearsal: the batch is empty; pass tensors that have a row for each example")
        if len(set(sizes.values())) > 1:
            raise MergeError(
                f"Rehearsal: the batch has another number of rows in each of its parts ({_listed(map(str, sizes.items()))}); "
                "every part needs a row for each example"
            )
        self._size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        return {
            path: part[index].detach().to("cpu", copy=True) if isinstance(part, torch.Tensor) else part[index]
            for path, part in self.parts.items()
        }


def _parts(batch: Any, path: str) -> Iterator[tuple[str, Any]]:
    """List the tensors of a batch, and its lists of texts, in the order in which `_rebuilt` asks for them."""
    if (isinstance(batch, torch.Tensor) and batch.dim()) or _are_texts(batch):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from _parts(batch[key], f"{path}.{key}" if path else str(key))
    elif isinstance(batch, tuple | list):
        for index, item in enumerate(batch):
            yield from _parts(item, f"{path}.{index}" if path else str(index))
    else:
        kind = "a tensor without dimensions" if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise MergeError(f"Rehearsal: {_named(path)} is {kind}; a batch is made of tensors with a row for each example")


def _rebuilt(batch: Any, parts: Iterator[Any]) -> Any:
    """Make a batch of the same structure from other parts."""
    if isinstance(batch, torch.Tensor) or _are_texts(batch):
        return next(parts)
    if isinstance(batch, Mapping):
        items = {key: _rebuilt(batch[key], parts) for key in batch}
        if type(batch) is dict:
            return items
        new = copy.copy(batch)  # a class of its own, such as the batches of transformers
        new.update(items)  # type: ignore[attr-defined]
        return new
    rebuilt = [_rebuilt(item, parts) for item in batch]
    return type(batch)(*rebuilt) if hasattr(batch, "_fields") else type(batch)(rebuilt)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(item, str | bytes) for item in value)


def _check_amount(share: float | None, extra: int | None) -> None:
    if (share is None) == (extra is None):
        raise MergeError(
            "Rehearsal: pass one of share, the part of a mixed batch that is stored examples, and extra, their number"
        )
    if share is not None and not 0 < share < 1:
        raise MergeError(f"Rehearsal: share={share!r}: must be between 0 and 1")
    if extra is not None and (isinstance(extra, bool) or not isinstance(extra, int) or extra < 0):
        raise MergeError(f"Rehearsal: extra={extra!r}: must be a number of examples, 0 or more")


def _named(path: str) -> str:
    return f'"{path}" of the batch' if path else "the batch"


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))
