"""Models by name: ``path[@revision][+lora[@revision]]``, as recipes and command lines write them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mergekit_cl.checkpoint.folder import Checkpoint, check_not_quantised, open_checkpoint
from mergekit_cl.checkpoint.hub import resolve
from mergekit_cl.checkpoint.lora import apply_adapter, is_adapter, refuse_adapters
from mergekit_cl.checkpoint.stored import Source
from mergekit_cl.errors import CheckpointError, MergeError, listing


@dataclass(frozen=True)
class ModelRef:
    """A model as a recipe names it: ``path[@revision][+lora[@revision]]``; paths are local ones, or ids of the hub.

    >>> ModelRef.parse("org/model@main+adapter")
    ModelRef(path='org/model', revision='main', lora='adapter', lora_revision=None)
    """

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """Read the short form; a path that exists as it is has no revision and no adapter."""
        if os.path.exists(text):
            return cls(text)
        parts = [part.split("@") for part in text.split("+")]
        if len(parts) > 2 or any(len(part) > 2 or not all(part) for part in parts):
            raise MergeError(
                f'"{text}" is not path[@revision][+lora[@revision]]; in a recipe, a path that itself has an @ or a + is '
                "written as {model: {path: ...}}"
            )
        named = [name for part in parts for name in (part[0], part[1] if len(part) > 1 else None)]
        return cls(cast(str, named[0]), *named[1:])

    def __str__(self) -> str:
        model, lora = (
            f"{path}@{revision}" if revision else f"{path or ''}"
            for path, revision in ((self.path, self.revision), (self.lora, self.lora_revision))
        )
        return f"{model}+{lora}" if lora else model


@dataclass(frozen=True, eq=False)
class Opened:
    """An opened checkpoint, and its tensors with an adapter (if one was named) applied as they are read.

    ``label`` is what the user called it, and messages do.
    """

    checkpoint: Checkpoint
    adapter: Checkpoint | None
    label: str
    tensors: Mapping[str, Source]

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The parsed config.json."""
        return self.checkpoint.config

    def companions(self) -> dict[str, Path]:
        """List the other files of the checkpoint's folder, by name."""
        return self.checkpoint.companions()

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All that is read."""
        return (self.checkpoint,) if self.adapter is None else (self.checkpoint, self.adapter)


def open_reference(what: str | Path | ModelRef) -> Opened:
    """Open a model by its name, or at a path.

    Raises:
        CheckpointError: See `open_checkpoint`, `resolve` and `apply_adapter`; or it is quantised, or an adapter by itself.

    """
    ref = ModelRef(str(what)) if isinstance(what, Path) else ModelRef.parse(what) if isinstance(what, str) else what
    where = what if isinstance(what, Path) else resolve(ref.path, ref.revision)
    checkpoint = open_checkpoint(where, str(ref))
    if is_adapter(checkpoint):
        raise refuse_adapters(str(ref))
    if problems := check_not_quantised(checkpoint):
        raise CheckpointError(listing(problems))
    if ref.lora is None:
        return Opened(checkpoint, None, str(ref), checkpoint.tensors)
    adapter = open_checkpoint(resolve(ref.lora, ref.lora_revision), ref.lora)
    return Opened(checkpoint, adapter, str(ref), apply_adapter(checkpoint.tensors, adapter))
