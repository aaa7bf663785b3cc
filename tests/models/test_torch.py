"""PyTorch tensors, state dicts and modules as models."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_cl import MergeError, MismatchError, merge


class Tied(nn.Module):
    """An embedding tied to the output layer, a norm with buffers, a buffer that is not saved."""

    scale: torch.Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((2,), value), persistent=False)
        nn.init.constant_(self.embed.weight, value)


def test_modules_give_a_module_of_the_same_class() -> None:
    models = [Tied(1.0), Tied(3.0)]
    models[0].head.weight.requires_grad_(False)
    merged = merge(models, "linear")
    assert type(merged) is Tied
    assert merged is not models[0]
    assert merged.embed.weight is merged.head.weight
    assert not merged.head.weight.requires_grad
    assert merged.embed.weight.tolist() == [[2, 2]] * 3
    assert merged.norm.running_var.tolist() == [1, 1]
    assert merged.scale.tolist() == [1, 1]
    assert models[0].embed.weight.tolist() == [[1, 1]] * 3
    assert merge(models, out_dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_counters_of_batch_norm_must_agree() -> None:
    models = [Tied(1.0), Tied(3.0)]
    models[1].norm(torch.randn(4, 2))
    with pytest.raises(MismatchError, match=r'"norm.num_batches_tracked": its int64 values differ'):
        merge(models)


def test_a_module_whose_ties_are_not_in_every_model_is_refused() -> None:
    untied = Tied(3.0)
    untied.head.weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(MismatchError, match=r'"embed.weight" and "head.weight" are tied in the result, but not in every model'):
        merge([Tied(1.0), untied])
    merged = merge([dict(Tied(1.0).state_dict()), untied.state_dict()])
    assert (merged["embed.weight"][0, 0].item(), merged["head.weight"][0, 0].item()) == (2, 0.5)


def test_a_result_that_is_not_tied_gets_every_tensor() -> None:
    out = Tied(0.0)
    out.head.weight = nn.Parameter(torch.zeros(3, 2))
    merge([Tied(1.0), Tied(3.0)], out=out)
    assert (out.embed.weight[0, 0].item(), out.head.weight[0, 0].item()) == (2, 2)
    by_data = [Tied(1.0), Tied(3.0)]
    for model in by_data:  # copies of such a model are no longer tied
        model.head.weight = nn.Parameter(torch.zeros(3, 2))
        model.head.weight.data = model.embed.weight.data
    merged = merge(by_data)
    assert (merged.embed.weight[0, 0].item(), merged.head.weight[0, 0].item()) == (2, 2)


class Hooked(nn.Linear):
    """A module whose state dict holds copies, and leaves the bias out."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"weight": self.weight.detach().clone()}


def test_parameters_are_merged_whatever_state_dict_says() -> None:
    models = [Hooked(1, 1), Hooked(1, 1)]
    merged = merge(models)
    torch.testing.assert_close(merged.weight, (models[0].weight + models[1].weight) / 2)
    torch.testing.assert_close(merged.bias, (models[0].bias + models[1].bias) / 2)


class Extra(nn.Linear):
    """A module with extra state."""

    def __init__(self, extra: object) -> None:
        super().__init__(1, 1)
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_extra_state_must_agree() -> None:
    assert merge([Extra({"a": 1}), Extra({"a": 1})]).extra == {"a": 1}
    for one, other in [({"a": 1}, {"a": 2}), (torch.ones(1), torch.zeros(1))]:
        with pytest.raises(MismatchError, match='model 1: its extra state "_extra_state" differs'):
            merge([Extra(one), Extra(other)])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_quantised_and_lazy_modules_are_refused() -> None:
    with pytest.raises(MergeError, match=r'model 0, tensor "weight": the parameter has no shape yet'):
        merge([nn.LazyLinear(2), nn.LazyLinear(2)])
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})
    with pytest.raises(MergeError, match="dequantise the module before merging"):
        merge([packed, packed])


def test_memory_that_overlaps_itself_is_no_output() -> None:
    out = {"a": torch.zeros(4), "b": torch.zeros(1).expand(4)}
    with pytest.raises(MergeError, match='out, tensor "b": several elements share one place'):
        merge([{"a": torch.ones(4), "b": torch.ones(4)}] * 2, out=out)
    assert out["a"].tolist() == [0, 0, 0, 0]


def test_inference_tensors_can_be_written() -> None:
    with torch.inference_mode():
        target = torch.zeros(3, 2).t()
    merge([torch.ones(2, 3), torch.ones(2, 3)], out=target)
    assert target.sum().item() == 6


def test_one_memory_seen_through_two_libraries() -> None:
    array = np.zeros(3, np.float32)
    merge([torch.from_numpy(array), torch.ones(3)], out=array)
    assert array.tolist() == [0.5] * 3


def test_state_dicts_stay_state_dicts() -> None:
    models = [nn.Linear(2, 2) for _ in range(2)]
    state = merge([m.state_dict() for m in models])
    assert type(state) is type(models[0].state_dict())
    assert state._metadata == models[0].state_dict()._metadata
    models[0].load_state_dict(state)


def test_kinds_may_be_mixed() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    merged = merge([one, two.state_dict(), {name: p.detach().numpy() for name, p in two.named_parameters()}], "linear")
    assert merged.weight.item() == pytest.approx((one.weight + 2 * two.weight).item() / 3, abs=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    values = torch.arange(12, dtype=dtype).reshape(3, 4)
    for view in (values, values.t(), values[:, 1:3], values[1], values.expand(2, 3, 4)):
        merged = merge([view, view + 2])
        assert merged.dtype == dtype
        assert torch.equal(merged, view + 1)


def test_in_place_on_any_layout_bumps_the_version() -> None:
    for tensor in (torch.zeros(2, 3), torch.zeros(3, 2).t(), torch.zeros(2, 6)[:, ::2]):
        version = tensor._version
        assert merge([tensor, torch.ones(2, 3)], out=tensor) is tensor
        assert torch.equal(tensor, torch.full((2, 3), 0.5))
        assert tensor._version > version


def test_dense_memory_in_any_order_is_merged_where_it_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2)]
    expected = merge(plain, beta=0.3)
    last = [t.to(memory_format=torch.channels_last) for t in plain]
    for models, out in [
        (last, last[0].clone()),
        (last, plain[0].clone()),
        ([last[0], plain[1]], last[1].clone()),
        (last, last[1]),
    ]:
        assert torch.equal(merge(models, out=out, beta=0.3), expected)


def test_writing_into_the_middle_of_a_graph_is_seen_by_autograd() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = (weight * weight).sum()
    merge([weight, torch.zeros(2)], out=weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_into_a_module() -> None:
    target = nn.Linear(1, 1)
    pointers = [p.data_ptr() for p in target.parameters()]
    source = nn.Linear(1, 1)
    assert merge([source, source], "linear", out=target) is target
    assert [p.data_ptr() for p in target.parameters()] == pointers
    assert torch.equal(target.weight, source.weight)


def test_integer_and_boolean_tensors() -> None:
    model = {"w": torch.zeros(2), "ids": torch.arange(3), "mask": torch.tensor([True, False])}
    merged = merge([model, {**model, "w": torch.ones(2)}])
    assert merged["ids"].dtype == torch.int64
    assert torch.equal(merged["mask"], model["mask"])
    assert merged["ids"] is not model["ids"]


def test_bfloat16_has_the_bits_of_float32_arithmetic() -> None:
    rng = np.random.default_rng(0)
    one, two = (torch.from_numpy(rng.standard_normal(5000).astype(np.float32)).bfloat16() for _ in range(2))
    wide = two.float() - 0.25 * (two.float() - one.float())
    assert torch.equal(merge([one, two], beta=0.25), wide.bfloat16())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, device="meta"), "device meta cannot be merged"),
        (torch.zeros(2, 2).to_sparse(), "to_dense"),
        (torch.zeros(2, dtype=torch.complex64), "complex64 cannot be merged"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn cannot be merged"),
    ],
)
def test_refused(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge([{"w": tensor}, {"w": tensor}])


def test_models_on_different_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_cl.layout import Entry
    from mergekit_cl.models import torch as library

    describe = library.describe
    moved = torch.ones(1)
    monkeypatch.setattr(
        library,
        "describe",
        lambda leaf, name: Entry(name, (1,), "float32", "cuda:0") if leaf is moved else describe(leaf, name),
    )
    with pytest.raises(MismatchError, match=r'model 1, tensor "w": on cuda:0, but model 0 is on cpu'):
        merge([{"w": torch.ones(1)}, {"w": moved}])
    with pytest.raises(MismatchError, match='model 0: "v" is on cpu, but "w" on cuda:0'):
        merge([{"v": torch.ones(1), "w": moved}] * 2)
