"""Names of parameters without what wrappers add, tied ones once, and what is no source of parameters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mergekit_cl import MergeError
from mergekit_cl.adapters.torch.parameters import (
    after_write,
    before_write,
    buffers_of,
    once,
    parameters_of,
    source_of,
    trainable,
)


class Holder:
    """As DeepSpeed's masters are held."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.master = torch.ones(2, requires_grad=True)
        self.module = nn.BatchNorm1d(2)

    def leaves(self) -> dict[str, torch.Tensor]:
        return {"w": self.master}

    def before_write(self) -> None:
        self.calls.append("before")

    def after_write(self) -> None:
        self.calls.append("after")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


NAMES = ["0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]


def test_names_are_those_of_the_model_itself(one_process: None) -> None:
    model = network()
    assert list(parameters_of(model)) == NAMES
    inner = network()
    inner[1] = torch.compile(checkpoint_wrapper(inner[1]), backend="eager")
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        nn.parallel.DistributedDataParallel(model),
        torch.compile(nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")), backend="eager"),
        inner,
    ):
        assert list(parameters_of(wrapped)) == NAMES
        assert list(buffers_of(wrapped)) == ["1.1.running_mean", "1.1.running_var"]
    named = nn.Module()
    named.module = model  # a name like any other
    assert list(parameters_of(named)) == [f"module.{name}" for name in NAMES]


def test_leaves_are_the_parameters_themselves() -> None:
    model = network()
    assert all(leaf is model.get_parameter(name) for name, leaf in parameters_of(model).items())
    pairs = dict(model.named_parameters())
    assert parameters_of(source_of(pairs.items(), "SFA")) == pairs


def test_trainable_parameters_are_listed_once() -> None:
    model = network()
    model[1][0].bias.requires_grad_(False)
    model.again = model[0]
    model.register_parameter("twin", nn.Parameter(model[0].weight.data))  # the same memory
    model.register_parameter("flat", nn.Parameter(model[0].weight.data.view(-1)))  # the same memory, in another shape
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    model.register_parameter("void", nn.Parameter(torch.zeros(0)))
    assert list(trainable(model)) == ["twin", "flat", "empty", "void", *NAMES[1:3], *NAMES[4:]]
    assert "1.0.bias" in parameters_of(model)


def test_buffers_are_floating_persistent_and_listed_once() -> None:
    model = network()
    model.register_buffer("again", model[1][1].running_mean)
    model.register_buffer("rotation", torch.ones(2), persistent=False)
    model.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    assert list(buffers_of(model)) == ["again", "1.1.running_var"]
    assert buffers_of({"w": torch.ones(1)}) == {}
    assert list(once({"a": torch.ones(2), "b": torch.ones(2)})) == ["a", "b"]


def test_what_holds_parameters_for_a_model() -> None:
    holder = Holder()
    source = source_of(holder, "SFA")
    assert source is holder
    assert trainable(source)["w"] is holder.master
    assert buffers_of(source).keys() == {"running_mean", "running_var"}
    before_write(source)
    after_write(source)
    for other in (network(), {"w": torch.ones(1)}):
        before_write(other)
        after_write(other)
    assert holder.calls == ["before", "after"]


def test_what_is_no_source() -> None:
    for wrong, message in [
        (None, "EWC: got NoneType; pass a torch.nn.Module, or its parameters"),
        ([3], "EWC: parameter 0 is int; pass"),
        ([("w", torch.ones(1)), ("w", torch.ones(1))], 'EWC: two parameters are called "w"'),
    ]:
        with pytest.raises(MergeError, match=message):
            source_of(wrong, "EWC")
