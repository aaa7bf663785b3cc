"""Merges of LoRA adapters of one base into one adapter."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

from mergekit_cl.checkpoint.folder import Checkpoint, open_checkpoint
from mergekit_cl.checkpoint.lora import Adapter, is_adapter, merge_adapters
from mergekit_cl.checkpoint.writer import Output, Writer
from mergekit_cl.companions import as_json
from mergekit_cl.errors import CheckpointError, Faults, MergeError, listing, unknown
from mergekit_cl.execute import Advance
from mergekit_cl.memory import Anonymous
from mergekit_cl.registry import Between, Parameter
from mergekit_cl.report import Report


@dataclass(frozen=True)
class AdapterMerge:
    """A merge of LoRA adapters of one base into one adapter that has been prepared."""

    target: Path
    adapters: tuple[Checkpoint, ...]
    combination: Literal["cat", "svd"]
    weights: tuple[float, ...]
    rank: int | None
    dtype: str | None
    notes: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of the adapters."""
        return sum(prod(tensor.shape) for adapter in self.adapters for tensor in adapter.tensors.values())

    @property
    def traffic(self) -> int:
        """Bytes of tensors that are read."""
        return sum(tensor.nbytes for adapter in self.adapters for tensor in adapter.tensors.values())

    @property
    def written(self) -> int:
        """Bytes of the tensors of the result."""
        return sum(array.nbytes for array in self.merged.tensors.values())

    @cached_property
    def merged(self) -> Adapter:
        """The result, in memory: adapters are small."""
        return merge_adapters(self.adapters, self.weights, combination=self.combination, rank=self.rank, dtype=self.dtype)

    def check(self, *, overwrite: bool = False, **_: Any) -> None:
        """Find out whether the adapters fit together, and whether the target is free; the arguments are `FileMerge.check`'s."""
        self._writer(overwrite).check()

    def run(self, *, overwrite: bool = False, verify: bool = True, advance: Advance = lambda _: None, **_: Any) -> Report:
        """Merge; the arguments are those of `FileMerge.run`, of which an adapter needs few."""
        begin = time.perf_counter()
        files = [file for adapter in self.adapters for file in adapter.files]
        before = sum(file.bytes_read for file in files)
        try:
            with Anonymous() as anonymous, self._writer(overwrite) as writer:
                for name, array in self.merged.tensors.items():
                    writer.write(name, 0, array.reshape(-1))
                advance(self.elements)
                writer.commit(self._companions, verify=verify)
        finally:
            for file in files:
                file.close()
        read, count = sum(file.bytes_read for file in files) - before, len(self.merged.tensors)
        return Report(self.target, count, 0, 0, read, self.written, time.perf_counter() - begin, anonymous.peak)

    def describe(self) -> dict[str, Any]:
        """Tell what a run would do, in types that JSON has."""
        rank = f", rank={self.rank}" if self.rank else ""
        what = f"{self.combination}(weight={list(self.weights)}{rank}) of {len(self.adapters)} adapters"
        tensors = self.merged.tensors.values()
        return {
            "target": str(self.target),
            "tensors": [{"what": what, "tensors": len(tensors), "elements": sum(array.size for array in tensors)}],
            "read": self.traffic,
            "written": self.written,
            "companions": sorted(self._companions),
            "notes": list(self.notes),
        }

    @property
    def _companions(self) -> dict[str, Path | bytes]:
        return {**self.adapters[0].companions(), "adapter_config.json": as_json(self.merged.config)}

    def _writer(self, overwrite: bool) -> Writer:
        return Writer(
            self.target,
            [Output(name, array.shape, array.dtype.name) for name, array in self.merged.tensors.items()],
            fingerprint=os.urandom(16).hex(),  # never resumed: it takes no time
            metadata={"format": "pt", **self.adapters[0].metadata},
            shard_size=None,
            stem="adapter_model",
            overwrite=overwrite,
            inputs=[adapter.path for adapter in self.adapters],
        )


def prepare_adapters(
    given: Any, method: str, target: Path, *, parameters: Mapping[str, Any], out_dtype: str | None
) -> AdapterMerge:
    """Prepare a merge of LoRA adapters: "cat", exact, or "svd", the best at a rank. Parameters are weight, and rank for svd."""
    known = {"weight", *(["rank"] if method == "svd" else [])}
    for name in parameters:
        if name not in known:
            raise unknown(f"parameter of {method}", name, known)
    if not isinstance(given, list | tuple) or not all(isinstance(each, str | Path) for each in given):
        raise MergeError(f"{method} merges adapters on disk; pass a list of their folders")
    opened: list[Checkpoint] = []
    faults = Faults()
    for each in given:
        with faults:
            opened.append(open_checkpoint(each))
    faults.report()
    problems = [
        f"{adapter.label}: is not a LoRA adapter (it has no adapter_config.json); {method} merges adapters of one base"
        for adapter in opened
        if not is_adapter(adapter)
    ]
    if problems:
        raise CheckpointError(listing(problems))
    if target.suffix == ".safetensors":
        raise CheckpointError(f"{target}: an adapter is a folder; pass the path of one")
    weight, rank = parameters.get("weight", 1.0), parameters.get("rank")
    weights = Parameter("weight", float, per_model=True).resolve(weight, len(opened), f"{method}:")
    if rank is not None:
        rank = Parameter("rank", int, range=Between(1)).check(rank, f"{method}:")
    return AdapterMerge(target, tuple(opened), cast(Literal["cat", "svd"], method), weights, rank, out_dtype)
