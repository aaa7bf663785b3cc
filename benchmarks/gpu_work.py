"""What the rows of gpu_rows.json do: what is timed, the bytes that it has to move, and what its result is compared with."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from mergekit_cl import kernels, merge
from mergekit_cl.api import prepare
from mergekit_cl.kernels import BLOCK, Keep, Table
from mergekit_cl.models.torch import span
from mergekit_cl.registry import find

from .checkpoints import SIZES, make, warm
from .gpu_device import SAMPLE, Device, host, parts, poisoned, same_bits, some

Weights: TypeAlias = dict[str, torch.Tensor]

DENSITY, BETA, STRENGTH = 0.2, 0.3, 0.5
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "sfa": {"beta": BETA},
    "ties": {"density": DENSITY},
    "dare_ties": {"density": DENSITY},
    "magmax": {},
    "nuslerp (rows)": {"nuslerp_flatten": False},
}

SUMMED, BY_ONE = {"nuslerp (rows)"}, 1e-3
"""Methods whose coefficients are of dot products, and what part of the entries may be rounded the other way for it."""

_VIEWS = {"aligned": (0, 0), "off by 2 bytes each": (1, 0), "off by 2, 4, 6, 8 bytes": (1, 1)}


class MissingError(Exception):
    """Something that a row needs is not there."""


@dataclass
class Work:
    """What a row does."""

    bytes: int
    """read and written: every input as often as the method has to, the output once"""
    call: Callable[[], Any]
    """what is timed"""
    check: Callable[[], str]
    """calls it, compares the result with the CPU's, and says how much of it; an AssertionError where they differ"""
    before: Callable[[], object] = lambda: None
    """restores what a call changes"""
    peers: dict[str, Callable[[], Callable[[], torch.Tensor]]] = field(default_factory=dict)
    """makes the other contenders; each returns the tensor that ours writes first"""
    first: list[torch.Tensor] = field(default_factory=list)
    """the start of that tensor, as ours wrote it, on the CPU; there once it has been checked"""
    over_the_bus: bool = False
    """whether the bytes cross the bus, with whose speed they are compared then"""
    after: Callable[[], object] = lambda: None
    """gives back what is not memory"""


# One tensor


def sums(device: Device, dtype: str, models: int, into: str, views: str) -> Work:
    """Average large tensors: new memory, or in place as a step of SFA does."""
    offset, step = _VIEWS[views]
    made = device.models.large("bfloat16" if dtype == "mixed" else dtype, models)
    if dtype == "mixed":
        made = [model.to(kind) for model, kind in zip(made, (torch.float32, torch.bfloat16, torch.float16), strict=True)]
    length = device.sizes.elements - 8 if offset else device.sizes.elements

    def view(number: int, tensor: torch.Tensor) -> torch.Tensor:
        start = offset + step * number
        return tensor[start : start + length]

    inputs = [view(number, model) for number, model in enumerate(made)]
    whole = torch.empty(device.sizes.elements, dtype=torch.bfloat16 if dtype == "mixed" else made[0].dtype, device=device.torch)
    out = view(models, whole)
    in_place = into == "the last model"
    method = "sfa" if in_place else "linear"
    parameters: dict[str, Any] = {"beta": BETA} if in_place else {"weight": [1.0 + k for k in range(models)]}
    executor, _ = prepare(
        find(method), [*inputs[:-1], out] if in_place else inputs, None, out,
        backend="triton", nonfinite="allow", parameters=parameters,
    )  # fmt: skip

    def restore() -> None:
        if in_place:
            out.copy_(inputs[-1])

    def check() -> str:
        with poisoned(out):
            restore()
            executor.run()
        expected: Weights = {}
        for part in parts(length):
            where = f"from {part.start}"
            expected[where] = torch.empty(part.stop - part.start, dtype=out.dtype)
            merge([host(each[part]) for each in inputs], method, out=expected[where], backend="numpy", **parameters)
        first[:] = [host(out[:SAMPLE])]
        return same_bits({f"from {part.start}": out[part] for part in parts(length)}, expected)

    def lerp() -> Callable[[], torch.Tensor]:
        a, b = inputs
        return lambda: torch.lerp(a, b, parameters["weight"][1] / sum(parameters["weight"]), out=out)

    def foreach_lerp() -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            torch._foreach_lerp_([out], [inputs[0]], BETA)
            return out

        return call

    first: list[torch.Tensor] = []
    return Work(
        bytes=sum(each.nbytes for each in inputs) + out.nbytes,
        call=executor.run, check=check, before=restore,
        peers={"torch.lerp": lerp, "torch._foreach_lerp_": foreach_lerp}, first=first,
    )  # fmt: skip


def gram(device: Device, what: str, models: int, dtype: str, reads: int) -> Work:
    """Find all dot products of large tensors."""
    spans, table, backend = _table(device, dtype, models)

    def check() -> str:
        found = getattr(backend, what)(table, False, table.whole)
        compared = 0
        for blocks in parts(len(found), SAMPLE // BLOCK):
            part = slice(blocks.start * BLOCK, blocks.stop * BLOCK)  # the last block may be a short one
            there = Table([[span(host(each[part])) for each in spans]])
            compared += _close(found[blocks], _numpy().gram(there, False, there.whole))
        return f"{compared:,} sums, to 1e-12"

    return Work(reads * sum(each.nbytes for each in spans), lambda: getattr(backend, what)(table, False, table.whole), check)


def largest(device: Device, what: str, models: int, dtype: str, reads: int) -> Work:
    """Find the largest magnitude of large tensors, as the search for what is not finite does."""
    spans, table, backend = _table(device, dtype, models)

    def check() -> str:
        [found] = getattr(backend, what)(table, table.whole)
        expected = [max(float(part.double().abs().max()) for part in each.split(1 << 24)) for each in spans]
        if found.tolist() != expected:
            raise AssertionError(f"the largest magnitudes are {expected}, but {found.tolist()} were found")
        return f"{len(spans[0]):,} entries"

    return Work(reads * sum(each.nbytes for each in spans), lambda: getattr(backend, what)(table, table.whole), check)


def kept(device: Device, what: str, models: int, dtype: str, reads: int) -> Work:
    """Add up the magnitudes of task vectors, and those that random masks keep."""
    spans, table, backend = _table(device, dtype, models + 1)
    keys = np.arange(2 * models, dtype=np.uint32).reshape(1, models, 2) + np.uint32(7)
    thresholds = np.full((1, models, 2), round(DENSITY * 2**32))
    keep = Keep("random", keys, thresholds, np.zeros((1, models, 2), np.int64))

    def check() -> str:
        found = getattr(backend, what)(table, keep, table.whole)
        blocks = parts(len(found), SAMPLE // BLOCK)[0]  # the first, for an entry's mask depends on its number
        there = Table([[span(host(each[: blocks.stop * BLOCK])) for each in spans]])
        return f"{_close(found[blocks], _numpy().kept_magnitude(there, keep, there.whole)):,} sums, to 1e-12"

    return Work(reads * sum(each.nbytes for each in spans), lambda: getattr(backend, what)(table, keep, table.whole), check)


def _table(device: Device, dtype: str, columns: int) -> tuple[list[torch.Tensor], Table, Any]:
    spans = device.models.large(dtype, columns)
    return spans, Table([[span(each) for each in spans]]), kernels.load("triton", str(device.torch))[1]


def _close(found: Any, expected: Any) -> int:
    """Compare sums in float64, of which the last bits are a backend's own."""
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max()):
        raise AssertionError(
            f"sums differ from the CPU's by {np.abs(found - expected).max()}, the largest being {expected.max()}"
        )
    return int(found.size)


def _numpy() -> Any:
    return kernels.load("numpy", "cpu")[1]


# Models


def merging(
    device: Device,
    what: str,
    models: int,
    dtype: str,
    reads: int,
    *,
    of: str = "300 tensors",
    scope: str = "tensor",
    nonfinite: str = "error",
    into: str = "new memory",
) -> Work:
    """Merge models of many tensors, by the call that a user makes."""
    method = what.split()[0]
    based = find(method).base == "required"
    given = (device.models.many if of == "300 tensors" else device.models.matrices)(dtype, models + based)
    base, tuned = (given[0], given[1:]) if based else (None, given)
    parameters = PARAMETERS[what] | ({"scope": scope} if scope == "model" else {})
    out = {name: torch.empty_like(tensor) for name, tensor in given[0].items()} if into == "out" else None

    def call() -> Weights:
        return cast(
            Weights, merge(tuned, method, base=base, out=out, backend="triton", nonfinite=cast(Any, nonfinite), **parameters)
        )

    def check() -> str:
        with poisoned(*(out or {}).values()):
            merged = call()
        first[:] = [host(next(iter(merged.values())).view(-1)[:SAMPLE])]
        names = list(merged) if scope == "model" else some({name: tensor.shape for name, tensor in merged.items()})
        here = [{name: host(model[name]) for name in names} for model in given]
        expected = merge(here[based:], method, base=here[0] if based else None, backend="numpy", **parameters)
        return same_bits(merged, expected, by_one=BY_ONE if what in SUMMED else 0.0)

    def mergekit() -> Callable[[], torch.Tensor]:
        return _mergekit(method, given, based)

    def peft() -> Callable[[], torch.Tensor]:
        assert base is not None
        return _peft(base, tuned)

    def lerp() -> Callable[[], torch.Tensor]:
        old, new = given

        def call() -> torch.Tensor:
            first, *_ = [torch.lerp(new[name], old[name], BETA) for name in new]
            return first

        return call

    first: list[torch.Tensor] = []
    written = sum(tensor.nbytes for tensor in given[0].values())
    return Work(
        bytes=(reads * len(given) + 1) * written, call=call, check=check,
        peers={"mergekit": mergekit, "PEFT": peft, "torch.lerp": lerp}, first=first,
    )  # fmt: skip


def sfa_step(device: Device, what: str, models: int, dtype: str, nonfinite: str, reads: int) -> Work:
    """Average a model in training with its anchor: all that a step of a loop pays for it; or the engine's part alone."""
    base, current = (list(model.values()) for model in device.models.many(dtype, models))
    model = torch.nn.ParameterList(tensor.clone() for tensor in base)
    weights = [parameter.data for parameter in model]
    merged = {str(number): tensor for number, tensor in enumerate(weights)}
    anchor = {str(number): tensor for number, tensor in enumerate(base)}
    if what == "sfa, prepared":
        executor, _ = prepare(
            find("sfa"), [anchor, merged], None, merged,
            backend="triton", nonfinite=nonfinite, constant=frozenset({0}), parameters={"beta": BETA},
        )  # fmt: skip
        call: Callable[[], object] = executor.run
    else:
        from mergekit_cl.adapters.torch import SFA

        sfa = SFA(model, beta=BETA, every=1, backend="triton", nonfinite=cast(Any, nonfinite))
        call = sfa.step

    def restore() -> None:
        torch._foreach_copy_(weights, current)

    def check() -> str:
        if what == "SFA.step(), captured":
            if device.rehearsed:
                raise MissingError("CUDA graphs need a GPU")
            restore()
            sfa.capture()
        for _ in range(2):  # after the first the anchor is known to be finite
            restore()
            call()
        first[:] = [host(weights[0].view(-1)[:SAMPLE])]
        names = some({name: tensor.shape for name, tensor in anchor.items()})
        older, newer = ({name: host(tensors[int(name)]) for name in names} for tensors in (base, current))
        return same_bits(merged, merge([older, newer], "sfa", beta=BETA, backend="numpy"))

    def foreach_lerp() -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            torch._foreach_lerp_(weights, base, BETA)
            return weights[0]

        return call

    first: list[torch.Tensor] = []
    size = sum(tensor.nbytes for tensor in base)
    # The search for NaN reads what may have changed: not the anchor
    return Work(
        bytes=(models + 1 + (reads - 1)) * size, call=call, check=check, before=restore,
        peers={"torch._foreach_lerp_": foreach_lerp}, first=first,
    )  # fmt: skip


def term(device: Device, what: str, dtype: str, reads: int) -> Work:
    """Add the gradient of a penalty to the gradients of a model in training."""
    from mergekit_cl.adapters.torch import EWC, L2Anchor

    base, moved, slopes = (list(model.values()) for model in device.models.many(dtype, 3))

    def penalty_of(
        numbers: Sequence[int], place: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[Any, list[torch.nn.Parameter]]:
        model = torch.nn.ParameterList(place(base[number]) for number in numbers)
        if what == "L2Anchor.add_gradients()":
            penalty: Any = L2Anchor(model, STRENGTH, backend="triton" if place is torch.clone else "numpy")
        else:
            penalty = EWC(model, STRENGTH, backend="triton" if place is torch.clone else "numpy")
            names = [name for name, _ in model.named_parameters()]
            penalty.new_task(
                fisher={name: place(slopes[number]).float().abs() for name, number in zip(names, numbers, strict=True)}
            )
        for parameter, number in zip(model, numbers, strict=True):
            parameter.data.copy_(moved[number])
            parameter.grad = place(slopes[number])
        return penalty, list(model)

    penalty, parameters = penalty_of(range(len(base)), torch.clone)
    gradients = [cast(torch.Tensor, parameter.grad) for parameter in parameters]

    def restore() -> None:
        torch._foreach_copy_(gradients, slopes)

    def check() -> str:
        restore()
        penalty.add_gradients()
        names = some({str(number): tensor.shape for number, tensor in enumerate(base)})
        there, few = penalty_of([int(name) for name in names], host)
        there.add_gradients()
        expected = {name: cast(torch.Tensor, parameter.grad) for name, parameter in zip(names, few, strict=True)}
        return same_bits({name: gradients[int(name)] for name in names}, expected)

    beside = [*penalty.anchor.values(), *getattr(penalty, "importance", {}).values()]
    read = sum(each.nbytes for each in chain(parameters, beside))
    return Work(
        bytes=reads * (read + sum(each.nbytes for each in gradients)) + sum(each.nbytes for each in gradients),
        call=penalty.add_gradients, check=check, before=restore,
    )  # fmt: skip


# Checkpoints


def checkpoint(device: Device, what: str, models: int, dtype: str) -> Work:
    """Merge checkpoints that lie in memory, by way of the bus."""
    if device.rehearsed:
        raise MissingError("the bus needs a GPU")
    llama = SIZES[device.sizes.checkpoint]
    memory = Path("/dev/shm")
    based = find(what).base == "required"
    need = llama.parameters * 2 * (models + 4)
    if not memory.is_dir() or shutil.disk_usage(memory).free < need:
        raise MissingError(f"/dev/shm has no room for {need / 1e9:.0f} GB")
    folder = Path(tempfile.mkdtemp(prefix="mergekit-cl-", dir=memory))
    try:
        base, *tuned = make(folder, llama, models=models, dtype=dtype)
        warm([base, *tuned])
    except BaseException:
        shutil.rmtree(folder)
        raise

    def call(where: str = "cuda", backend: str = "auto") -> None:
        options: Mapping[str, Any] = {"device": where, "backend": backend, "memory": "8GB", "verify": False, "overwrite": True}
        merge(tuned, what, base=base if based else None, out=folder / where, **options, **PARAMETERS[what])

    def check() -> str:
        call()
        call("cpu")
        compared = 0
        for file in sorted((folder / "cpu").glob("*.safetensors")):
            with file.open("rb") as one, (folder / "cuda" / file.name).open("rb") as other:
                while block := one.read(1 << 26):
                    if block != other.read(1 << 26):
                        raise AssertionError(f"{file.name}: its bytes differ from what the CPU wrote")
                    compared += len(block)
        return f"{compared:,} bytes of files"

    read = sum(file.stat().st_size for path in [base, *tuned][1 - based :] for file in path.glob("*.safetensors"))
    return Work(read, call, check, over_the_bus=True, after=lambda: shutil.rmtree(folder))


# Other contenders


def _mergekit(method: str, given: Sequence[Weights], based: bool) -> Callable[[], torch.Tensor]:
    from mergekit.merge_methods.api import merge_state_dicts

    parameters = {"weight": 1.0} | ({"density": DENSITY} if based else {})

    def call() -> torch.Tensor:
        merged = merge_state_dicts(given, method, base=0 if based else None, parameters=parameters)
        return cast(torch.Tensor, next(iter(merged.values())))

    return call


def _peft(base: Weights, tuned: Sequence[Weights]) -> Callable[[], torch.Tensor]:
    from peft.utils.merge_utils import ties

    def call() -> torch.Tensor:
        weights = torch.ones(len(tuned), device=next(iter(base.values())).device)
        merged = [
            tensor + ties([model[name] - tensor for model in tuned], weights, DENSITY).to(tensor.dtype)
            for name, tensor in base.items()
        ]
        return merged[0]

    return call


KINDS: dict[str, Callable[..., Work]] = {
    "sums": sums, "gram": gram, "largest": largest, "kept": kept, "merging": merging, "sfa_step": sfa_step, "term": term,
    "checkpoint": checkpoint,
}  # fmt: skip
