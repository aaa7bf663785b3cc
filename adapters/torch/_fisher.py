"""The diagonal of the Fisher information of a model's parameters, estimated from batches of data."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from mergekit_cl.adapters.torch._penalty import wide_of
from mergekit_cl.adapters.torch.parameters import unwrapped
from mergekit_cl.errors import MergeError
from mergekit_cl.models.sharded import local_of

Loss: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]
"""``loss(model, batch)`` returns the negative log likelihood of each sample of the batch, [samples], or their mean."""

MEMORY = 256 << 20
"""Bytes that the gradients of samples that are computed side by side may take."""

_logger = logging.getLogger(__name__)


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the negative log likelihood of each label of a batch (inputs, labels), for a model that returns logits."""
    inputs, labels = batch
    return nn.functional.cross_entropy(_logits(model, inputs), labels, reduction="none")


class Estimate:
    """Sums of squared gradients of parameters, float32 (float64 for parameters of float64), on the device of each.

    Args:
        model: The model, wrapped as it is trained.
        parameters: Those to estimate for, of the model, by name.
        loss: What to differentiate.
        seed: With a number, labels are drawn from what the model predicts, in place of those of the batches (inputs, labels).

    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, torch.Tensor], loss: Loss, seed: int | None) -> None:
        self.model, self.parameters, self.loss = model, parameters, loss
        self.device = next(iter(parameters.values())).device
        self.draws = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        locals_ = {name: local_of(parameter) for name, parameter in parameters.items()}
        self.sums = {name: torch.zeros_like(local, dtype=wide_of([local])) for name, local in locals_.items()}
        self.count = 0
        self.reached = 0  # gradients that were found: none where the loss does not depend on these parameters
        self._side_by_side = max(1, MEMORY // max(1, sum(local.nbytes for local in self.sums.values())))

    def add(self, batches: Iterable[Any], fisher: Literal["per_sample", "per_batch"]) -> None:
        """Add the squares of the gradients of each sample, or of the mean loss of each batch; the model is in eval mode."""
        with _evaluating(self.model), torch.enable_grad():
            for batch in batches:
                moved = tree_map(self._to_device, dict(batch) if isinstance(batch, Mapping) else batch)
                drawn = moved if self.draws is None else self._draw(moved)
                if fisher == "per_batch":
                    self._add_batch(drawn)
                else:
                    self._add_samples(drawn)

    def share(self) -> None:
        """Add up what the processes of a `DistributedDataParallel` model have found, each from its own data."""
        replicated = _replicated(self.model)
        if replicated is not None:
            found = torch.tensor([self.count, self.reached], device=self.device)
            for tensor in (*self.sums.values(), found):
                dist.all_reduce(tensor, group=replicated.process_group)
            self.count, self.reached = found.tolist()

    @property
    def is_alone(self) -> bool:
        """Whether there are other processes, of whose data the model knows nothing."""
        shared = _replicated(self.model) is not None or any(isinstance(p, DTensor) for p in self.parameters.values())
        return not shared and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _add_batch(self, batch: Any) -> None:
        parameters = list(self.parameters.values())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            # not autograd.grad: sharded and replicated models average gradients in hooks of backward
            self.loss(self.model, batch).mean().backward()
            self._count({name: p.grad for name, p in self.parameters.items() if p.grad is not None}, 1)
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def _add_samples(self, batch: Any) -> None:
        size = _size(batch)
        start = 0
        while start < size:
            stop = min(size, start + self._side_by_side)
            part = tree_map(lambda each: each[start:stop] if _is_split(each) else each, batch)  # noqa: B023
            if stop - start == 1:
                self._add_one(part)
            else:
                try:
                    self._add_side_by_side(part, stop - start)
                except RuntimeError as error:  # cannot be vectorised, or does not fit; the model's own faults come again
                    _logger.info("EWC: samples are taken one by one, because vmap failed: %s", error)
                    self._side_by_side = 1
                    continue
            start = stop

    def _add_one(self, sample: Any) -> None:
        loss = self.loss(unwrapped(self.model), sample).sum()
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        found = dict(zip(self.parameters, gradients, strict=True))
        self._count({name: gradient for name, gradient in found.items() if gradient is not None}, 1)

    def _add_side_by_side(self, part: Any, count: int) -> None:
        model = _WithLoss(unwrapped(self.model), self.loss)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        paths = {name: names[id(parameter)] for name, parameter in self.parameters.items()}

        def loss_of(parameters: dict[str, torch.Tensor], sample: Any) -> torch.Tensor:
            alone = tree_map(lambda each, dim: each if dim is None else each[None], sample, dims)
            result: torch.Tensor = functional_call(model, parameters, (alone,)).sum()
            return result

        dims = tree_map(lambda each: 0 if _is_split(each) else None, part)
        parameters = {paths[name]: parameter.detach() for name, parameter in self.parameters.items()}
        gradients = vmap(grad(loss_of), in_dims=(None, dims), randomness="different")(parameters, part)
        self._count({name: gradients[path] for name, path in paths.items()}, count, stacked=True)

    def _count(self, gradients: Mapping[str, torch.Tensor], count: int, *, stacked: bool = False) -> None:
        for name, gradient in gradients.items():
            squares = local_of(gradient).to(self.sums[name].dtype).square()
            self.sums[name] += squares.sum(0) if stacked else squares
        self.count += count
        self.reached += len(gradients)

    @torch.no_grad()
    def _draw(self, batch: Any) -> Any:
        inputs, labels = batch
        probabilities = _logits(unwrapped(self.model), inputs).float().softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=self.draws)
        return [inputs, drawn.view(probabilities.shape[:-1]).to(labels.dtype)]

    def _to_device(self, each: Any) -> Any:
        return each.to(self.device) if isinstance(each, torch.Tensor) else each


class _WithLoss(nn.Module):
    """A model and its loss in one, so that the loss sees the model with other parameters."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> torch.Tensor:
        return self.loss(self.model, batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards each of its parts into the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _replicated(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Take what averages gradients over processes out of ``torch.compile``."""
    while "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def _logits(model: nn.Module, inputs: Any) -> torch.Tensor:
    output = model(inputs)
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def _is_split(each: Any) -> bool:
    return isinstance(each, torch.Tensor) and each.dim() > 0


def _size(batch: Any) -> int:
    sizes = {len(each) for each in tree_leaves(batch) if _is_split(each)}
    if len(sizes) != 1:
        raise MergeError(
            f'EWC: a batch has tensors of {sorted(sizes) or "no"} samples; for fisher="per_sample" all tensors of a batch hold '
            "as many samples, along their first dimension"
        )
    return sizes.pop()
