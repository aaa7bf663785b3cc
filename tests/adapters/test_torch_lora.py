"""SFA of low-rank adapters: the weights that a model computes with are averaged, never the factors one by one."""

import copy
from pathlib import Path  # to the imports, at the top
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mergekit_cl import MergeError, NonFiniteError
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.lora import Pair, averaged, pairs_of

peft = pytest.importorskip("peft")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.convolution = nn.Conv1d(6, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(self.embedding(words).transpose(1, 2)).mean(2)
        out: torch.Tensor = self.head(torch.tanh(self.linear(hidden)))
        return out


X = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["embedding", "convolution", "linear"], **options}
    model = peft.get_peft_model(Network(), peft.LoraConfig(**options))
    return model.to(dtype)


def train(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def effective(model: Any) -> dict[str, torch.Tensor]:
    """The weights that the model computes with: the adapter merged into its base, by PEFT itself."""
    merged = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "modules_to_save": ["head"], "bias": "all"},
        {"lora_bias": True, "target_modules": ["linear"]},
        {"rank_pattern": {"linear": 5}, "init_lora_weights": "gaussian"},
    ],
)
def test_a_fresh_adapter_averages_the_weights_exactly(options: dict[str, Any]) -> None:
    model = adapted(**options)
    before = effective(model)
    sfa = SFA(model, beta=0.25, every=3)
    assert not [name for name in sfa.anchor if ".lora_A." in name or "lora_embedding_B" in name]  # what is not zero
    optimizer = sgd(model)
    for _ in range(2):
        train(model, 3, optimizer)
        trained = effective(model)
        others = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name}
        assert [sfa.step() for _ in range(3)] == [False, False, True]
        after = effective(model)
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, 0.25 * before[name] + 0.75 * trained[name], rtol=0, atol=1e-15)
        assert any(not after[name].equal(trained[name]) for name in after)
        assert all(others[name].equal(p) for name, p in model.named_parameters() if name in others)


def test_averaging_the_factors_apart_would_be_wrong() -> None:
    model = adapted()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    before = effective(model)
    train(model, 40, sgd(model))
    trained = effective(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(0.5 * start[name] + 0.5 * p)
    apart = max((t - 0.5 * before[name] - 0.5 * trained[name]).abs().max().item() for name, t in effective(model).items())
    assert apart > 1e-4


@pytest.mark.parametrize("lora", ["exact", "svd"])
def test_dora_is_refused_while_its_factors_are_trained(lora: Any) -> None:
    model = adapted(use_dora=True, target_modules=["linear"])
    with pytest.raises(MergeError, match=r'linear.lora_A.default.weight" is a factor of DoRA.*merge_and_unload\(\)'):
        SFA(model, every=1, lora=lora)
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["linear"]))
    model.set_adapter("plain")
    assert len(SFA(model, every=1, lora=lora).anchor) == 1
    tuned = [("a.lora_a.weight", torch.ones(2, 3)), ("a.lora_b.weight", torch.zeros(3, 2)), ("a.magnitude", torch.ones(3))]
    with pytest.raises(MergeError, match=r'"a\.lora_a\.weight" is a factor of DoRA'):
        SFA([(name, nn.Parameter(tensor)) for name, tensor in tuned], every=1, lora=lora)


@pytest.mark.parametrize(("a", "b"), [("lora_a", "lora_b"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_factors_of_other_libraries_are_pairs(a: str, b: str) -> None:
    first, second = nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.zeros(2, 1))
    sfa = SFA([(f"q.{a}.weight", first), (f"q.{b}.weight", second)], beta=0.25, every=1)
    with torch.no_grad():
        first.copy_(torch.tensor([[3.0, 4.0]]))
        second.fill_(8.0)
    sfa.step()
    assert (first.tolist(), second.tolist()) == ([[3.0, 4.0]], [[6.0], [6.0]])  # 0.25 * 0 + 0.75 * 8


def test_rows_of_tokens_are_averaged_exactly() -> None:
    model = adapted(target_modules=["linear"], trainable_token_indices={"embedding": [1, 4, 7]})
    before = effective(model)
    sfa = SFA(model, beta=0.25, every=1)
    train(model, 3, sgd(model))
    trained = effective(model)
    sfa.step()
    for name, tensor in effective(model).items():
        torch.testing.assert_close(tensor, 0.25 * before[name] + 0.75 * trained[name], rtol=0, atol=1e-15)
    assert not trained["embedding.weight"].equal(before["embedding.weight"])


def test_magnitudes_of_dora_alone_are_averaged_as_parameters() -> None:
    model = adapted(use_dora=True, target_modules=["linear"])
    name = "base_model.model.linear.lora_magnitude_vector.default.weight"
    for other, p in model.named_parameters():
        p.requires_grad_(other == name)
    before = model.get_parameter(name).detach().clone()
    sfa = SFA(model, beta=0.25, every=1)
    train(model, 2, sgd(model))
    trained = model.get_parameter(name).detach().clone()
    sfa.step()
    torch.testing.assert_close(model.get_parameter(name).detach(), 0.25 * before + 0.75 * trained, rtol=0, atol=1e-15)
    assert not trained.equal(before)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_a_continued_adapter_is_refused_or_approximated() -> None:
    model = adapted()
    optimizer = sgd(model)
    train(model, 3, optimizer)
    refused = r'SFA: neither ".*lora_embedding_A.*" nor ".*" is zero: .*merge_and_unload\(\)\), or pass lora="svd"'
    sfa = SFA(model, every=1)
    for attempt in (sfa.step, sfa.new_task, lambda: sfa.save_anchor("unwritten.safetensors")):
        with pytest.raises(MergeError, match=refused):
            attempt()
    assert sfa.step_count == 0
    base, before = effective(adapted()), effective(model)
    sfa = SFA(model, beta=0.25, every=1, lora="svd")
    train(model, 3, optimizer)
    trained = effective(model)
    assert sfa.step()
    after = effective(model)
    for name in ("linear.weight", "convolution.weight", "embedding.weight"):
        change = (0.25 * before[name] + 0.75 * trained[name] - base[name]).flatten(1)
        expected = best(change, 2)
        torch.testing.assert_close((after[name] - base[name]).flatten(1), expected, rtol=0, atol=1e-13)
        assert (expected - change).abs().max() > 1e-8  # it is no product of that rank
    state = sfa.state_dict()
    again = SFA(copy.deepcopy(model), every=9, lora="svd")
    again.load_state_dict(state)
    assert again.anchor.keys() == sfa.anchor.keys()
    assert len([name for name in sfa.anchor if "_A" in name]) == 3


def test_the_signs_of_factors_are_determined() -> None:
    generator = torch.Generator().manual_seed(1)
    a0, b0, a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3)) * 2)
    new_a, new_b = averaged(0.4, (a0, b0), (a, b))
    torch.testing.assert_close(new_b @ new_a, best(0.4 * b0 @ a0 + 0.6 * b @ a, 3), rtol=0, atol=1e-14)
    largest = new_b.gather(0, new_b.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(new_b.norm(dim=0), new_a.norm(dim=1))
    flipped = averaged(0.4, (-a0, -b0), (-a, -b))
    torch.testing.assert_close(flipped[0], new_a, rtol=0, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_the_approximation_is_the_best_of_its_rank(rank: int, rows: int, columns: int, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a0, a = (torch.randn(rank, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    b0, b = (torch.randn(rows, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    new_a, new_b = averaged(beta, (a0, b0), (a, b))
    assert new_a.shape == a.shape
    assert new_b.shape == b.shape
    whole = beta * b0 @ a0 + (1 - beta) * b @ a
    error = torch.linalg.norm(new_b @ new_a - whole)
    least = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    assert abs(error - least) < 1e-12


def test_one_factor_alone_is_averaged_as_a_parameter() -> None:
    model = adapted(target_modules=["linear"])
    train(model, 2, sgd(model))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)  # as in LoRA-FA
    before = effective(model)
    sfa = SFA(model, beta=0.25, every=1)
    train(model, 2, sgd(model))
    trained = effective(model)
    sfa.step()
    mean = 0.25 * before["linear.weight"] + 0.75 * trained["linear.weight"]
    torch.testing.assert_close(effective(model)["linear.weight"], mean, rtol=0, atol=1e-15)


def test_rolling_anchors_have_products_from_the_second_merge_on() -> None:
    model = adapted(target_modules=["linear"])
    with pytest.raises(MergeError, match=r'policy="rolling" averages products .*pass lora="svd"'):
        SFA(model, every=1, policy="rolling")
    base = effective(model)["linear.weight"]
    sfa = SFA(model, beta=0.5, every=1, policy="rolling", lora="svd")
    optimizer = sgd(model)
    anchor = base
    for _ in range(3):
        train(model, 1, optimizer)
        mean = 0.5 * anchor + 0.5 * effective(model)["linear.weight"]
        sfa.step()
        anchor = effective(model)["linear.weight"]
        torch.testing.assert_close(anchor - base, best(mean - base, 2), rtol=0, atol=1e-13)


def test_adapters_unfrozen_on_the_way() -> None:
    model = adapted(target_modules=["linear"], modules_to_save=["head"])
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in factors:
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = effective(model)
    sfa = SFA(model, beta=0.25, every=4).attach(optimizer)
    train(model, 2, optimizer)
    for p in factors:
        p.requires_grad_(True)
    train(model, 1, optimizer)
    trained = copy.deepcopy(model)
    train(trained, 1, torch.optim.SGD(trained.parameters(), 0.5))
    train(model, 1, optimizer)
    assert sfa.merges == 1
    for name, tensor in effective(model).items():
        torch.testing.assert_close(tensor, 0.25 * before[name] + 0.75 * effective(trained)[name], rtol=0, atol=1e-15)


def test_non_finite_factors() -> None:
    model = adapted(target_modules=["linear"], modules_to_save=["head"])
    train(model, 1, sgd(model))
    sfa = SFA(model, every=1, lora="svd")
    with torch.no_grad():
        model.get_parameter("base_model.model.linear.lora_B.default.weight")[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"(?s)SFA, step 1: nothing was merged.*linear.lora_B.default.weight"):
        sfa.step()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_merged() -> None:
    with pytest.raises(MergeError, match=r'ties cannot merge LoRA factors .*only method "sfa" can'):
        SFA(adapted(), method="ties", density=0.5, every=1)
    for config in (
        peft.LoHaConfig(r=2, target_modules=["linear"]),
        peft.LoKrConfig(r=2, target_modules=["linear"]),
        peft.AdaLoraConfig(init_r=2, target_modules=["linear"], total_step=9),
    ):
        model = peft.get_peft_model(Network(), config)
        with pytest.raises(MergeError, match=r'SFA: "base_model.model.linear" is .* of PEFT, whose weight is no sum'):
            SFA(model, every=1)
        model.requires_grad_(False)
        model.base_model.model.head.requires_grad_(True)
        assert len(SFA(model, every=1).anchor) == 2
    ia3 = peft.get_peft_model(Network(), peft.IA3Config(target_modules=["linear"], feedforward_modules=[]))
    assert len(SFA(ia3, every=1).anchor) == 1


def test_pairs_are_found_by_their_names() -> None:
    names = ["a.lora_A.x.weight", "a.lora_B.x.weight", "a.lora_B.y.weight", "b.lora_embedding_A.x", "b.lora_embedding_B.x"]
    names += [
        "lora_A",
        "lora_B",
        "c.lora_A.weight",
        "c.lora_B.weight",
        "c.lora_B.bias",
        "lora_Another",
        "lora_alpha",
        "d.lora_magnitude_vector",
    ]
    assert pairs_of(names) == [
        Pair("a.lora_A.x.weight", "a.lora_B.x.weight"),
        Pair("b.lora_embedding_A.x", "b.lora_embedding_B.x"),
        Pair("lora_A", "lora_B"),
        Pair("c.lora_A.weight", "c.lora_B.weight"),
    ]


def test_a_task_that_is_refused_leaves_no_anchor_behind(tmp_path: Path) -> None:
    model, path = adapted(target_modules=["linear"]), tmp_path / "anchor.safetensors"
    SFA(model, every=1, anchor=path)
    train(model, 2, sgd(model))
    before = path.read_bytes()
    sfa = SFA(model, every=1, anchor=path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for _ in range(2):
        with pytest.raises(MergeError, match="PiSSA"):
            sfa.step()
    assert (list(tmp_path.glob("*.safetensors")), path.read_bytes()) == ([path], before)
    with torch.no_grad():
        model.get_parameter("base_model.model.linear.lora_B.default.weight").zero_()
    sfa.new_task()
    assert sfa.step()  # what was refused is over


def test_a_run_is_resumed_from_its_trained_adapter() -> None:
    model = adapted()
    optimizer = sgd(model)
    sfa = SFA(model, beta=0.25, every=3).attach(optimizer)
    train(model, 2, optimizer)
    again = copy.deepcopy(model)
    resumed = SFA(again, every=9)  # of a model that has been loaded already
    resumed.load_state_dict(sfa.state_dict())
    for each, continued in ((model, optimizer), (again, sgd(again))):
        if each is again:
            resumed.attach(continued)
        train(each, 4, continued)
    assert (resumed.step_count, resumed.merges) == (6, 2)
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_optimizer_forgets_factors_that_were_replaced() -> None:
    model = adapted(target_modules=["linear"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    train(model, 1, optimizer)
    SFA(model, every=2, lora="svd", optimizer_state="reset").attach(optimizer)
    train(model, 1, optimizer)
    assert len(optimizer.state) == 2
    train(model, 1, optimizer)
    assert not optimizer.state


def test_products_in_float32_are_computed_in_float64() -> None:
    generator = torch.Generator().manual_seed(2)
    factors = [torch.randn(*shape, generator=generator) for shape in ((3, 7), (5, 3)) * 2]
    wide = [factor.double() for factor in factors]
    found, expected = (averaged(0.4, (a0, b0), (a, b)) for a0, b0, a, b in (factors, wide))
    assert all(one.equal(other.float()) for one, other in zip(found, expected, strict=True))


def test_a_refused_adapter_goes_on_from_the_anchor_that_was_saved(tmp_path: Path) -> None:
    model = adapted(target_modules=["linear"])
    SFA(model, every=1).save_anchor(tmp_path / "anchor.safetensors")
    train(model, 1, sgd(model))
    sfa = SFA(model, every=2)
    for attempt in (sfa.step, sfa.finalize):
        sfa.step_count = 1  # so that there is something to finalize
        with pytest.raises(MergeError, match="has been trained before"):
            attempt()
    assert not sfa.finished
    sfa.resume_from(tmp_path / "anchor.safetensors", 1)
    assert sfa.step()
    sfa.resume_from(tmp_path / "anchor.safetensors", 1)
    assert sfa.finalize()
