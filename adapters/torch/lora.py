"""Low-rank adapters while they are trained: which parameters are factors of a product, and how products average.

Factors of LoRA are known by the names that PEFT, torchtune, diffusers and kohya's scripts give them.
The weight of a module is ``W + s * B @ A``. An average of two such weights is not the product of averaged factors. It is exact
where one factor of the anchor is zero, as in an adapter that was just added (B; of an embedding A):
``beta * W + (1 - beta) * (W + s * B @ A)`` is ``W + s * ((1 - beta) * B) @ A``, so that factor is averaged, with zero, and the
other left alone. Everything else that an adapter trains (biases, rows of tokens, ``modules_to_save``) enters the weights by
itself, and is averaged as any parameter. DoRA divides ``W + s * B @ A`` by its norm: no factors give an average of such
weights.
"""

import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from mergekit_cl.adapters.torch.parameters import Source
from mergekit_cl.errors import MergeError, listing

_REST = r"(?P<rest>\.(?!weight$)[^.]+)?(\.weight)?"
_FACTOR = re.compile(r"(?P<module>(.+\.)?)(?P<kind>lora[._](embedding_)?)(?P<factor>[AaBb]|down|up)" + _REST)
_MAGNITUDE = re.compile(r"(?P<module>(.+\.)?)(lora_magnitude_vector|magnitude)" + _REST)
_FIRST = ("A", "a", "down")  # the factor that comes first in a computation
_LINEAR = {
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",  # if no factor is trained beside it: see `refuse_magnitudes`
    "trainable_tokens_delta",
    "ia3_l",
    "ln_tuning_layers",
}


class Pair(NamedTuple):
    """The names of the two factors of a product: A is (rank, ...), B is (..., rank) or (..., rank, 1, 1)."""

    a: str
    b: str

    def other(self, name: str) -> str:
        """Return the name of the other factor."""
        return self.a if name == self.b else self.b


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """Find the pairs of factors among the names of parameters that are averaged.

    A factor whose partner is not among them does not change: it is averaged as any parameter, which is exact.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match:
            factor = "A" if match["factor"] in _FIRST else "B"
            found.setdefault(match.group("module", "kind", "rest"), {})[factor] = name
    return [Pair(factors["A"], factors["B"]) for factors in found.values() if len(factors) == 2]


def refuse_magnitudes(names: Iterable[str], trained: Iterable[str]) -> None:
    """Refuse LoRA factors that are trained in a module which has a magnitude too (DoRA).

    Args:
        names: Of all parameters.
        trained: Names of those that are to be averaged.

    Raises:
        MergeError: There are such.

    """
    magnitudes = {match.group("module", "rest") for match in map(_MAGNITUDE.fullmatch, names) if match}
    for name in trained:
        match = _FACTOR.fullmatch(name)
        if match and match.group("module", "rest") in magnitudes:
            raise MergeError(
                f'SFA: "{name}" is a factor of DoRA, which divides the weights by their norm: no factors give the average of '
                "two such weights; merge the adapter into its base before SFA (PEFT: merge_and_unload()), or train plain LoRA "
                "(use_dora=False)"
            )


def refuse_other_products(source: Source) -> None:
    """Refuse adapters of PEFT whose parameters are factors of other products (LoHa, LoKr, AdaLoRA, OFT, VeRA, ...).

    Raises:
        MergeError: There are such, and they are trained.

    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not isinstance(source, nn.Module):
        return
    problems = [
        f'SFA: "{path}" is {type(part).__name__} of PEFT, whose weight is no sum of its parameters ({kind}): their '
        "average is not that of the weights; merge the adapter into its base before the task ends, or train a LoRA adapter"
        for path, part in source.named_modules()
        if isinstance(part, tuners.BaseTunerLayer)
        for kind in part.adapter_layer_names
        if kind not in _LINEAR and any(p.requires_grad for p in _parameters(getattr(part, kind, None)))
    ]
    if problems:
        raise MergeError(listing(problems))


def averaged(
    beta: float, anchor: tuple[torch.Tensor, torch.Tensor], current: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average two products ``B @ A``, and return the factors of the best approximation of the average that has their rank.

    The factors of the average, ``[beta * B0, (1 - beta) * B]`` and ``[A0; A]``, have twice the rank. What is kept of it are its
    largest singular values (Eckart and Young, 1936), computed in float64 from the factors alone. Each factor takes the
    root of them; a column of B is positive where it is largest.

    Args:
        beta: The weight of the anchor.
        anchor: Its A [rank, ...] and B [..., rank].
        current: The present A and B, of the same shapes.

    Returns:
        New tensors A and B, as the present ones in shape and dtype.

    """
    (a0, b0), (a, b) = ((x.double().flatten(1), y.double().flatten(1)) for x, y in (anchor, current))
    outer, left = torch.linalg.qr(torch.cat([beta * b0, (1 - beta) * b], 1))
    inner, right = torch.linalg.qr(torch.cat([a0, a]).T)
    u, singular, v = torch.linalg.svd(left @ right.T, full_matrices=False)
    rank = min(len(a), len(singular))
    root = singular[:rank].sqrt()
    new_b, new_a = (outer @ u[:, :rank]) * root, (inner @ v[:rank].T * root).T
    largest = new_b.abs().argmax(0, keepdim=True)
    sign = torch.where(new_b.gather(0, largest) < 0, -1.0, 1.0)[0]
    full_a, full_b = torch.zeros_like(a), torch.zeros_like(b)
    full_a[:rank], full_b[:, :rank] = new_a * sign[:, None], new_b * sign
    return full_a.view(current[0].shape).to(current[0].dtype), full_b.view(current[1].shape).to(current[1].dtype)


def _parameters(value: object) -> Iterable[nn.Parameter]:
    """List the parameters that a part of an adapter's layer holds; it may hold none, or settings."""
    if isinstance(value, nn.Parameter):
        return [value]
    return value.parameters() if isinstance(value, nn.Module | nn.ParameterDict) else []
