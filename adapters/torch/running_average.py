"""An average of the weights along a training, kept beside the model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mergekit_cl.adapters.torch._graphs import refuse_in_capture
from mergekit_cl.adapters.torch._penalty import Pulls, refuse_overlaps, wide_of
from mergekit_cl.adapters.torch.anchor import File, fingerprint_of, write
from mergekit_cl.adapters.torch.parameters import (
    after_write,
    before_write,
    buffers_of,
    clean,
    parameters_of,
    place_of,
    skipped,
    source_of,
    stepping,
    trainable,
    unwrapped,
)
from mergekit_cl.adapters.torch.sharding import agreed
from mergekit_cl.api import prepare
from mergekit_cl.continual.schedule import MergeSchedule
from mergekit_cl.dtypes import dtype_name, output_dtype
from mergekit_cl.errors import CheckpointError, MergeError, MismatchError, NonFiniteError, listing
from mergekit_cl.execute import Executor
from mergekit_cl.merge_methods.linear import normalized
from mergekit_cl.models import open_model
from mergekit_cl.models.sharded import Leaf, Shard, local_of, with_local
from mergekit_cl.registry import find

Kind: TypeAlias = Literal["ema", "uniform", "last"]
Locals: TypeAlias = dict[str, torch.Tensor]
"""Tensors by name; of a sharded one the part of this process."""

_SETTINGS = ("kind", "decay", "last", "every", "start")
_COUNTERS = ("step_count", "captures")


class RunningAverage:
    """Average the weights along a training, beside the model, which goes on as if nothing was averaged.

    After the steps ``start``, ``start + every``, ... (step 0 is not one of them) the weights theta are *captured*. Of the
    captures so far the average is, by ``kind``:

    - "ema": ``avg <- decay * avg + (1 - decay) * theta``, an exponential moving average. The first capture is the first
      average, and still has the weight ``decay**(n - 1)`` after n captures: it counts for long. Begin late (``start``) where
      the first weights are far from the later ones.
    - "uniform": ``avg <- avg + (theta - avg) / (n + 1)``, the mean of all captures (SWA, https://arxiv.org/abs/1803.05407).
    - "last": the mean of the latest ``last`` captures (LAWA, https://arxiv.org/abs/2209.14981), computed when it is asked for.

    `swapped` puts the average into the model for an evaluation, `copy_to` into a model for good. Parameters that require a
    gradient when this is built are averaged, tied ones once, also while they are frozen; the others cost nothing. Of parameters
    that are sharded over processes (FSDP) every process averages its own part; all processes make the same calls. The factors
    of a LoRA adapter are averaged one by one, as is customary: their product is not quite the average of the products.

    An average with a decay near one moves by less than a rounding error of bfloat16 at each capture, that is, not at all: keep
    the average of a model in bfloat16 in ``dtype=torch.float32``.

    Args:
        model_or_parameters: A ``torch.nn.Module``; or parameters, or pairs of name and parameter (then these are averaged).
        kind: Which average; see above.
        decay: For "ema": the weight of the average so far, in [0, 1]; 0.999 where it is not given. The attribute of this name
            may be set between two captures.
        last: For "last": how many captures are averaged, at least 1.
        every: Steps between two captures.
        start: The step of the first capture; 0 is the same as ``every``.
        average: Where to keep it: "memory", beside the parameters, or "cpu". It costs one copy of the parameters in ``dtype``,
            and as many as ``last`` says for "last". For "last" also the path of a folder: each capture becomes a safetensors
            file there, and files that are no longer needed are removed (those that the latest `state_dict` names stay until
            the next one, so that a run which is killed can go on).
        dtype: A dtype for the average; that of each parameter by default. It must reach as far as theirs.
        buffers: "keep" leaves floating buffers, such as those of batch normalisation, out of the average; "average" takes them
            in. Integers are never averaged.
        nonfinite: "error" reads the parameters once more at each capture, in search of NaN and infinities (and of numbers next
            to these, whose differences overflow), before the average is changed. "allow" lets them through.
        backend: As in `mergekit_cl.merge`.
        threads: As in `mergekit_cl.merge`.

    Raises:
        MergeError: A setting that the kind does not have, a value out of range, nothing to train, or parameters of a kind that
            cannot be merged, or that share a part of their memory.

    >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
    >>> average = RunningAverage([weight], "uniform")
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = weight.data.fill_(value)  # in place of a step of an optimizer
    ...     captured = average.step()
    >>> with average.swapped():
    ...     print(weight.item())
    3.0
    >>> weight.item()
    6.0

    """

    def __init__(
        self,
        model_or_parameters: nn.Module | Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        kind: Kind = "ema",
        *,
        decay: float | None = None,
        last: int | None = None,
        every: int = 1,
        start: int = 0,
        average: Literal["memory", "cpu"] | str | Path = "memory",
        dtype: torch.dtype | None = None,
        buffers: Literal["keep", "average"] = "keep",
        nonfinite: Literal["error", "allow"] = "error",
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        self._source = source_of(model_or_parameters, "RunningAverage")
        settings = {"kind": kind, "decay": decay, "last": last, "every": every, "start": start}
        self.kind, self.decay, self.last, self.every, self.start = _checked(settings)
        _one_of("buffers", buffers, ("keep", "average"))
        _one_of("nonfinite", nonfinite, ("error", "allow"))
        self._average_buffers, self._nonfinite = buffers == "average", nonfinite
        self._dtype = None if dtype is None else getattr(torch, output_dtype(dtype))
        self._device = torch.device("cpu") if average == "cpu" else None
        self._folder = None if average in ("memory", "cpu") else Path(average)
        self._backend, self._threads = backend, threads
        self._pulls = Pulls(backend, threads)
        self._hook: Any = None
        self._swapped = False
        self._prepared: tuple[Any, Executor] | None = None
        self.step_count = self.captures = 0
        self._names = [*trainable(self._source), *(buffers_of(self._source) if self._average_buffers else ())]
        leaves = self._tracked()
        self._check(leaves)
        # the average, or the latest captures, of which number n is in place n % last; in memory from the beginning, so that
        # states have one form, and memory does not run out on the way
        self._memory = [] if self._folder else [self._copied(leaves) for _ in range(self.last or 1)]
        self._files: list[File] = []
        self._written: list[Path] = []
        self._saved: set[Path] = set()

    def step(self) -> bool:
        """Count a step of the optimizer, and capture the weights if it is time to. Call it after ``optimizer.step()``.

        Returns:
            Whether the weights were captured.

        Raises:
            NonFiniteError: It is time for a capture, but a parameter holds NaN or Inf; the average is what it was. The step
                counts.
            MergeError: Called inside `swapped`, attached to an optimizer, or a parameter has become trainable on the way.
            CheckpointError: A file cannot be written.

        """
        if self._hook is not None:
            raise MergeError(
                "RunningAverage: attached to an optimizer, which counts the steps itself; leave step() away, or detach() first"
            )
        return self._count()

    def attach(self, optimizer: torch.optim.Optimizer) -> "RunningAverage":
        """Call `step` after each step of the optimizer, but not one that a gradient scaler skipped, by a hook; return self."""
        if self._hook is not None:
            raise MergeError("RunningAverage: attached to an optimizer already; detach() first")
        self._hook = stepping(optimizer, self._source, "RunningAverage").register_step_post_hook(self._after_step)
        return self

    def detach(self) -> None:
        """Take the hook of `attach` away."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the average into the model for the time of a ``with`` block; afterwards the model has its own weights again.

        Contents are exchanged, in place and in every bit, also when the block is left by an exception; parameters stay the
        objects that they are, where they are in memory. Where the average has another dtype than a parameter it is rounded
        once. Buffers get their values back too, so that ``update_bn`` may be called inside. The weights must not be changed
        inside: an optimizer that would is stopped by an error.

        Raises:
            MergeError: Nothing was captured yet, or the model is swapped already.

        """
        averages = self._averages("swapped()")
        before = self._tracked()
        # another dtype cannot hold the model's own weights, so a copy takes part in the exchange
        held = {name: average.to(local_of(before[name]).dtype) for name, average in averages.items()}
        buffers = list(unwrapped(self._source).buffers()) if isinstance(self._source, nn.Module) else []
        kept = [(buffer, buffer.clone()) for buffer in buffers]
        addresses = {local_of(leaf).data_ptr() for leaf in before.values()}
        exchanged: list[str] = []

        def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if any(local_of(p).data_ptr() in addresses for group in optimizer.param_groups for p in group["params"]):
                raise MergeError("RunningAverage: an optimizer steps inside swapped(); train the model outside of it")

        guard = register_optimizer_step_pre_hook(refuse)
        self._swapped = True
        try:
            self._exchange(held, list(held), exchanged)
            yield
        finally:
            guard.remove()
            self._swapped = False
            self._exchange(held, exchanged, [])
            with torch.no_grad():
                for buffer, values in kept:
                    buffer.copy_(values)

    def copy_to(self, module_or_parameters: Any) -> None:
        """Write the average into a model, for good: the one that is trained, or another one of the same names and shapes.

        What is not averaged, frozen parameters and buffers, is copied from the model that is trained. Tensors that are tied
        there need not be in the other model; each of them is written. Where dtypes differ values are rounded once.

        Raises:
            MergeError: Nothing was captured yet, or the model is swapped.
            MismatchError: The other model lacks a tensor, has one more, has it in another shape, or ties what is not tied in
                the model that is trained; nothing was written.

        """
        averages = self._averages("copy_to()")
        target = source_of(module_or_parameters, "RunningAverage.copy_to")
        for source in (self._source, target):
            before_write(source)
        own = _everything(self._source)
        averaged = {place_of(own[name]): average for name, average in averages.items() if place_of(own[name])}
        values = {name: averaged.get(place_of(leaf), local_of(leaf)) for name, leaf in own.items()}
        places = {name: local_of(leaf) for name, leaf in _everything(target).items()}
        problems = [f'"{name}" is missing' for name in values if name not in places]
        if isinstance(self._source, nn.Module):
            problems += [f'"{name}" is not in the model that is trained' for name in places if name not in values]
        first: dict[Any, str] = {}
        for name, place in places.items():
            other = first.setdefault(place_of(place) or name, name)
            if {name, other} <= values.keys() and values[name].data_ptr() != values[other].data_ptr():
                problems.append(f'"{name}" is tied to "{other}", but not in the model that is trained')
        problems += [
            f'"{name}" has the shape {tuple(places[name].shape)}, not {tuple(value.shape)}'
            for name, value in values.items()
            if name in places and places[name].shape != value.shape
        ]
        if problems:
            raise MismatchError(listing([f"RunningAverage.copy_to: {problem}" for problem in problems]))
        with torch.no_grad():
            for name, value in values.items():
                places[name].copy_(value)
        after_write(target)

    @property
    def average(self) -> dict[str, Any]:
        """The average by name, sharded as the parameters are; for "ema" and "uniform" the memory that is written at captures.

        Raises:
            MergeError: Nothing was captured yet, or the model is swapped.

        """
        return self._sharded(self._averages("average"))

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters and what was captured, safe for ``weights_only=True``.

        Tensors are not copied, and the average is written in place: save them, or copy them, before the next step. Captures in
        files are named, with their fingerprints.

        Raises:
            MergeError: The model is swapped, so the average is not in its place.

        """
        self._refuse_swapped("state_dict()")
        self._saved = {file.path for file in self._files}
        return {
            **{name: getattr(self, name) for name in (*_SETTINGS, *_COUNTERS)},
            "decay": None if self.decay is None else float(self.decay),
            "dtype": None if self._dtype is None else dtype_name(self._dtype),
            "memory": [self._sharded(capture) for capture in self._memory],
            "files": [{"file": file.path.name, "fingerprint": file.fingerprint} for file in self._files],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; settings are taken over too.

        The parameters themselves are the model's to load, before or after.

        Raises:
            MismatchError: The average in the state is of another model, or another process, which shares the parameters, cannot
                load its own; nothing was loaded.
            CheckpointError: A file that the state names is missing, or not what it was; nothing was loaded.
            MergeError: The state is not one of this class, or the model is swapped.

        """
        self._refuse_swapped("load_state_dict()")
        failure: Exception | None = None
        read: dict[str, Any] = {}
        try:
            read = self._read(state)
        except Exception as error:  # whatever it is, the other processes must hear of it
            failure = error
        problems = agreed([] if failure is None else [str(failure)], self._tracked().values())
        if failure is not None:
            raise failure
        if problems:
            raise MismatchError(listing(problems))
        self.__dict__.update(read)

    def _read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes that a state stands for, after checking it."""
        missing = [name for name in (*_SETTINGS, *_COUNTERS, "dtype", "memory", "files") if name not in state]
        if missing:
            raise MergeError(f'RunningAverage: the state lacks "{missing[0]}"; pass what RunningAverage.state_dict() returned')
        settings = _checked(state)
        last = settings[2]
        steps, captures = (_whole(name, state[name], least=0) for name in _COUNTERS)
        if bool(state["files"] or not state["memory"]) != bool(self._folder):
            where = "a folder of files; build this with average= that folder" if state["files"] else "memory; build this so too"
            raise MergeError(f"RunningAverage: the average of the state was kept in {where}")
        expected = min(captures, last or 1) if self._folder else last or 1
        if len(state["files"] or state["memory"]) != expected:
            raise MergeError(f"RunningAverage: the state is damaged: it does not hold {expected} captures")
        dtype = None if state["dtype"] is None else getattr(torch, output_dtype(state["dtype"]))
        memory = [self._loaded(saved, dtype) for saved in state["memory"]]
        files = [self._found(saved) for saved in state["files"]]
        return {
            **dict(zip(_SETTINGS, settings, strict=True)),
            "step_count": steps,
            "captures": captures,
            "_dtype": dtype,
            "_memory": memory,
            "_files": files,
            "_prepared": None,
            "_written": [file.path for file in files],
            "_saved": {file.path for file in files},
        }

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not what was prepared for the memory of these very parameters."""
        return {**self.__dict__, "_prepared": None}

    def __repr__(self) -> str:
        setting = {"ema": f", decay={self.decay}", "last": f", last={self.last}", "uniform": ""}[self.kind]
        return (
            f'RunningAverage("{self.kind}"{setting}, every={self.every}, start={self.start}, step={self.step_count}, '
            f"captures={self.captures}, {len(self._names)} tensors)"
        )

    # Capturing

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not skipped(optimizer):
            self._count()

    def _count(self) -> bool:
        refuse_in_capture("RunningAverage")
        self._refuse_swapped("a step")
        self.step_count = step = self.step_count + 1
        if step < self.start or (step - self.start) % self.every:
            return False
        with torch.no_grad():
            self._capture()
        self.captures += 1
        return True

    def _capture(self) -> None:
        late = trainable(self._source).keys() - set(self._names)
        if late:
            raise MergeError(
                f'RunningAverage: "{min(late)}" was frozen, or not there, when this was built, and has no average; build '
                "another one once parameters are unfrozen"
            )
        current = self._tracked()
        if self.captures and self.kind == "ema":
            try:
                self._executor(current).run()
            except NonFiniteError as error:
                raise NonFiniteError(f"RunningAverage, step {self.step_count}: the average was left alone\n{error}") from None
            return
        self._check_finite(current, f"step {self.step_count}: the average was left alone")
        if self._folder is not None:
            self._write(current, self._folder / f"step-{self.step_count:08}.safetensors")
            return
        if self.captures and self.kind == "uniform":
            self._add(current)
            return
        for name, place in self._memory[self.captures % len(self._memory)].items():
            place.copy_(local_of(current[name]))

    def _add(self, current: dict[str, Leaf]) -> None:
        """Bring the weights into the mean, with the bits of a merge ("linear") of the two: ``avg - share * (avg - theta)``."""
        _, share = normalized([self.captures, 1])
        means = self._memory[0]
        self._pulls.add(
            (mean, mean, (local_of(current[name]).detach().to(mean.device),), -share) for name, mean in means.items()
        )

    def _executor(self, current: dict[str, Leaf]) -> Executor:
        """Prepare the next update of an exponential average; keep it as long as all stays where it is in memory."""
        key = [self.decay, *((name, place_of(leaf), leaf.dtype) for name, leaf in current.items())]
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1]
        average: dict[str, Leaf] = dict(self._memory[0])
        beside = all(average[name].device == leaf.device for name, leaf in current.items())
        if beside:
            average = {name: with_local(leaf, self._memory[0][name]) for name, leaf in current.items()}
        else:
            current = {name: local_of(leaf).to(average[name].device) for name, leaf in current.items()}
        executor, _ = prepare(
            find("sfa"), [average, current], None, average,
            backend=self._backend, threads=self._threads, nonfinite=self._nonfinite,
            parameters={"beta": self.decay}, labels=["the average", "the model"],
            constant=frozenset({0}),  # an average of finite numbers is finite, so it is not read again to see
        )  # fmt: skip
        self._prepared = (key, executor) if beside and executor.reads_in_place else None
        return executor

    def _write(self, current: dict[str, Leaf], path: Path) -> None:
        """Write the weights to a file, and remove files that are not needed any more."""
        assert self.last is not None
        fingerprint = fingerprint_of(current, self._dtype)
        write(path, current, self._dtype, fingerprint, {})
        self._files = [*self._files, File(path, path, fingerprint)][-self.last :]
        needed = {file.path for file in self._files} | self._saved
        for unneeded in [written for written in self._written if written not in needed]:
            unneeded.unlink(missing_ok=True)
        self._written = [written for written in dict.fromkeys([*self._written, path]) if written in needed]

    def _copied(self, leaves: Mapping[str, Leaf]) -> Locals:
        return {
            name: local_of(leaf).to(self._device or leaf.device, self._dtype or leaf.dtype, copy=True)
            for name, leaf in leaves.items()
        }

    # The average, and the model

    def _averages(self, asked: str) -> Locals:
        """Return the average, or compute it."""
        self._refuse_swapped(asked)
        if not self.captures:
            raise MergeError(
                f"RunningAverage: {asked}: nothing was captured yet; the first capture is after step {self.start or self.every}"
            )
        if self.kind != "last":
            return self._memory[0]
        device = torch.device("cpu") if self._folder else self._device
        out = {
            name: torch.empty_like(local_of(leaf), dtype=self._dtype or leaf.dtype, device=device or leaf.device)
            for name, leaf in self._tracked().items()
        }
        try:
            captures: list[Any] = [file.stored for file in self._files]
            latest = range(max(0, self.captures - len(self._memory)), self.captures)
            captures += [self._memory[number % len(self._memory)] for number in latest]
            executor, _ = prepare(
                find("linear"), captures, None, out, backend=self._backend, threads=self._threads, nonfinite=self._nonfinite,
                parameters={}, labels=[f"capture {number}" for number in range(len(captures))],
            )  # fmt: skip
            executor.run()
        except CheckpointError as error:
            raise CheckpointError(f"RunningAverage: a capture in {self._folder} cannot be read\n{error}") from error
        return out

    @torch.no_grad()
    def _exchange(self, held: Locals, names: list[str], done: list[str]) -> None:
        """Exchange the contents of the model's tensors with what is held; note down each that is done."""
        current = self._tracked()
        for name in names:
            place = local_of(current[name])
            values = place.clone()
            place.copy_(held[name])
            held[name].copy_(values)
            done.append(name)
        after_write(self._source)

    def _leaves(self) -> dict[str, Leaf]:
        return parameters_of(self._source) | (buffers_of(self._source) if self._average_buffers else {})

    def _tracked(self) -> dict[str, Leaf]:
        """Return what is averaged, as it is in the model now."""
        before_write(self._source)
        leaves = self._leaves()
        gone = [name for name in self._names if name not in leaves]
        if gone:
            raise MergeError(f'RunningAverage: the model no longer has "{gone[0]}"; build another average for it')
        return {name: leaves[name] for name in self._names}

    # Checks

    def _check(self, leaves: dict[str, Leaf]) -> None:
        """Refuse what cannot be averaged, or not where it is to be kept."""
        if not leaves:
            raise MergeError("RunningAverage: no parameter requires a gradient, so there is nothing to average; unfreeze first")
        if self._average_buffers and not isinstance(self._source, nn.Module):
            raise MergeError('RunningAverage: buffers="average" needs the module; parameters alone have no buffers')
        open_model({name: local_of(leaf) for name, leaf in leaves.items()}, "RunningAverage")
        refuse_overlaps(leaves, "RunningAverage")
        for name, leaf in leaves.items():
            if self._dtype is not None and torch.finfo(self._dtype).max < torch.finfo(leaf.dtype).max:
                raise MergeError(
                    f'RunningAverage: dtype={self._dtype}: "{name}" is {leaf.dtype}, which holds larger numbers; choose another'
                )
        if self._folder is not None:
            if self.kind != "last":
                raise MergeError(
                    f'RunningAverage: average="{self._folder}": files are for kind="last"; keep an average of kind '
                    f'"{self.kind}", which changes at each capture, in "memory" or on the "cpu"'
                )
            if any(not isinstance(leaf, torch.Tensor) or leaf.shape != local_of(leaf).shape for leaf in leaves.values()):
                raise MergeError(
                    f'RunningAverage: average="{self._folder}": the parameters are sharded; keep their averages in "memory" or '
                    'on the "cpu"'
                )

    def _check_finite(self, leaves: Mapping[str, Leaf], where: str) -> None:
        if self._nonfinite == "error":
            problems = agreed(self._faults(leaves, where), leaves.values())
            if problems:
                raise NonFiniteError(listing(problems))

    def _faults(self, leaves: Mapping[str, Leaf], where: str) -> list[str]:
        if self._nonfinite == "allow":
            return []
        finite = [_is_finite(local_of(leaf)) for leaf in leaves.values()]
        flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []  # read all at once
        spoiled = [name for name, flag in zip(leaves, flags, strict=True) if not flag]
        return [f'RunningAverage, {where}: "{name}" holds NaN or Inf, or numbers next to it' for name in spoiled]

    def _refuse_swapped(self, asked: str) -> None:
        if self._swapped:
            raise MergeError(
                f"RunningAverage: {asked} inside swapped(), while the average is in the model; leave the block first"
            )

    # The state

    def _sharded(self, average: Locals) -> dict[str, Leaf]:
        leaves = self._tracked()
        return {name: with_local(leaves[name], local) for name, local in average.items()}

    def _loaded(self, saved: Mapping[str, Any], dtype: torch.dtype | None) -> Locals:
        """Copy what was saved to where it is kept, after checking that it is of this model."""
        if not all(isinstance(value, torch.Tensor | Shard) for value in saved.values()):
            raise MergeError("RunningAverage: the state is damaged: the average is not made of tensors")
        leaves, local = self._tracked(), {name: local_of(leaf) for name, leaf in saved.items()}
        self._match(local, {name: local_of(leaf) for name, leaf in leaves.items()})
        faults = self._faults(saved, "the saved average")
        if faults:
            raise NonFiniteError(listing(faults))
        return {
            name: local[name].to(self._device or leaf.device, dtype or leaf.dtype, copy=True) for name, leaf in leaves.items()
        }

    def _found(self, saved: Mapping[str, Any]) -> File:
        """Find a file that was saved by name, after checking that it is what it was, and of this model."""
        assert self._folder is not None
        path = self._folder / saved["file"]
        try:
            file = File.find(path, saved["fingerprint"])
            self._match(file.stored, self._tracked())
        except CheckpointError as error:
            raise CheckpointError(
                f"RunningAverage: {path}, which the state names, cannot be used; restore it\n{error}"
            ) from error
        return file

    def _match(self, saved: Mapping[str, Any], own: Mapping[str, Leaf]) -> None:
        problems = [f'the saved average has "{name}", which this one lacks' for name in saved if name not in own]
        problems += [f'the saved average lacks "{name}"' for name in own if name not in saved]
        problems += [
            f'"{name}": the saved average has shape {tuple(tensor.shape)}, the model {tuple(own[name].shape)}'
            for name, tensor in saved.items()
            if name in own and tuple(tensor.shape) != tuple(own[name].shape)
        ]
        if problems:
            raise MismatchError(listing([f"RunningAverage: {problem}" for problem in problems]))


def _checked(settings: Mapping[str, Any]) -> tuple[Any, float | None, int | None, int, int]:
    """Check settings: kind, decay, last, every, start."""
    kind, decay, last, every, start = (settings[name] for name in _SETTINGS)
    _one_of("kind", kind, get_args(Kind))
    for name, value, owner in (("decay", decay, "ema"), ("last", last, "last")):
        if value is not None and kind != owner:
            raise MergeError(f'RunningAverage: {name} is for kind="{owner}", not "{kind}"; leave it away')
    if kind == "ema":
        decay = 0.999 if decay is None else decay
        if isinstance(decay, bool) or not isinstance(decay, Real) or not 0 <= float(decay) <= 1:
            raise MergeError(f"RunningAverage: decay={decay!r}: must be in [0, 1]")
        decay = float(decay)
    if kind == "last":
        if last is None:
            raise MergeError('RunningAverage: kind="last" needs last, the number of captures to average')
        last = _whole("last", last, least=1)
    return kind, decay, last, MergeSchedule(every).every, _whole("start", start, least=0)


def _everything(source: Any) -> dict[str, Leaf]:
    """Return all parameters, and all buffers, by name: tied ones under each of their names."""
    found = parameters_of(source)
    if not isinstance(source, nn.Module):
        return found
    module = unwrapped(source)
    first = {id(parameter): clean(name) for name, parameter in module.named_parameters()}
    tied = {clean(name): first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}
    found |= {name: found[other] for name, other in tied.items() if other in found}
    return found | {clean(name): buffer for name, buffer in module.named_buffers(remove_duplicate=False)}


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        known = ", ".join(f'"{each}"' for each in allowed)
        raise MergeError(f"RunningAverage: {name}={value!r}: must be one of {known}")


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise MergeError(f"RunningAverage: {name}={value!r}: must be a whole number, {least} or more")
    return int(value)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Tell whether no entry is NaN or infinite, and no difference of two overflows: a flag, found without temporary tensors."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    wide = wide_of([tensor])
    return (torch.stack(tensor.aminmax()).to(wide).abs() <= torch.finfo(wide).max / 2).all()
