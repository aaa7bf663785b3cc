"""Cells of the forgetting experiment, on two small tasks: against loops and merges written out by hand."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from forgetting import costs, training
from forgetting.learners import LEARNERS, cell_of, learners_for, needs, trials
from forgetting.protocol import Cell, Part, Sequence, Settings, Task, cell
from forgetting.sequences import load
from forgetting.strategies import Outputs, strategy_of
from torch import nn

from mergekit_cl import MergeError, merge
from mergekit_cl.adapters.torch import SFA
from mergekit_cl.adapters.torch.l2_anchor import L2Anchor
from mergekit_cl.demo import one_thread

STEPS, BATCH, RATE, INPUTS, CLASSES = 8, 16, 0.05, 6, 4
PARAMETERS = INPUTS * CLASSES + CLASSES
SETTINGS = Settings(STEPS, BATCH, (RATE, 0.01, 0.1), trials=5, curve_points=4, curve_examples=10, fisher_examples=12)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(INPUTS, CLASSES)


def tasks(count: int = 2) -> tuple[Task, ...]:
    generator = torch.Generator().manual_seed(0)

    def part(size: int, direction: torch.Tensor) -> Part:
        inputs = torch.randn(size, INPUTS, generator=generator)
        return Part(inputs, (inputs @ direction).argmax(1))

    directions = [torch.randn(INPUTS, CLASSES, generator=generator) for _ in range(count)]
    return tuple(Task(str(i), part(60, d), part(20, d), part(30, d)) for i, d in enumerate(directions))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes what cells train on; by default two tasks that use all outputs."""

    def use(**changes: Any) -> Sequence:
        plain = Sequence("small", "Small", "About.", "domain", "accuracy", tasks(), network, SETTINGS)
        changed = replace(plain, **changes)
        for module in (training, costs):
            monkeypatch.setattr(module, "load", lambda name, quick=False: changed)
        return changed

    return use


def carry_out(tmp_path: Any, learner: str, seed: int = 0, purpose: Any = "final", **values: float) -> Any:
    the_cell = cell("small", learner, {"lr": RATE, **values}, seed, purpose)
    first = needs(the_cell)
    if first is not None:
        training.carry_out(first, False, tmp_path)
    return training.carry_out(the_cell, False, tmp_path)


def learn(
    model: nn.Module, task: Task, generator: torch.Generator, after: Any = lambda: None, before: Any = lambda: None
) -> None:
    """Train on a task, as `training` promises that it does."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    for _ in range(STEPS):
        drawn = torch.randint(len(task.train), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(task.train.inputs[drawn]), task.train.targets[drawn]).backward()
        before()
        optimizer.step()
        after()


def scored(model: nn.Module, task: Task, part: str = "test") -> tuple[float, float]:
    """Return accuracy and cross-entropy, in float64."""
    examples = getattr(task, part)
    logits = model(examples.inputs).detach().double()
    right = (logits.argmax(1) == examples.targets).double().mean().item()
    return right, nn.functional.cross_entropy(logits, examples.targets).item()


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + 17)


def trained(learner: str, seed: int, first: Task, second: Task) -> tuple[nn.Module, list[nn.Module]]:
    """Train on two tasks by hand; return the model, and copies of it after each task."""
    model, copies, generator = network(seed), [], generator_of(seed)
    learn(model, first, generator)
    copies.append(_copy(model))
    if learner == "sfa":
        sfa = SFA(model, beta=0.3, p=0.25, total_steps=STEPS)
        learn(model, second, generator, after=sfa.step)
    elif learner == "l2":
        learn(model, second, generator, before=L2Anchor(model, strength=0.5).add_gradients)
    else:
        learn(model, second, generator)
    return model, [*copies, _copy(model)]


def _copy(model: nn.Module) -> nn.Module:
    copied = nn.Linear(INPUTS, CLASSES)
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.mark.parametrize(
    ("learner", "values"), [("sequential", {}), ("sfa", {"beta": 0.3, "p": 0.25}), ("l2", {"strength": 0.5})]
)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_cell_is_the_loop_by_hand(sequence: Any, tmp_path: Any, learner: str, values: Any, seed: int) -> None:
    first, second = sequence().tasks
    result = carry_out(tmp_path, learner, seed, **values)
    _, models = trained(learner, seed, first, second)
    for row, model in enumerate(models):
        for column, task in enumerate((first, second)):
            accuracy, loss = scored(model, task)
            assert result["accuracy"][row][column] == pytest.approx(accuracy, abs=1e-12)
            assert result["loss"][row][column] == pytest.approx(loss, rel=1e-6)
    assert result["start"] == [pytest.approx(scored(network(seed), task)[0]) for task in (first, second)]
    assert result["steps"] == 2 * STEPS
    assert (result["curve"] is None) == (seed != 0)
    assert result["seconds"] > 0


def test_the_learners_differ(sequence: Any, tmp_path: Any) -> None:
    sequence()
    values = {
        "sfa": {"beta": 0.5, "p": 0.25}, "l2": {"strength": 1.0}, "ewc": {"strength": 10.0}, "lwf": {"strength": 1.0},
        "ewc-online": {"strength": 10.0, "gamma": 0.9}, "rehearsal": {"kept": 0.2, "share": 0.5}, "sequential": {},
    }  # fmt: skip
    losses = {name: carry_out(tmp_path, name, **own)["loss"] for name, own in values.items()}
    after_first = {str(loss[0]) for loss in losses.values()}
    assert len(after_first) == 1, "on the first task there is nothing to keep"
    after_second = {name: sum(loss[1]) for name, loss in losses.items()}
    # with one earlier task, online and separate EWC are the same
    assert after_second.pop("ewc-online") == after_second["ewc"]
    assert len(set(after_second.values())) == len(after_second)
    for name, loss in losses.items():
        if name != "sequential":
            assert loss[1][0] < losses["sequential"][1][0], name


def test_ewc_keeps_apart_from_online_with_two_earlier_tasks(sequence: Any, tmp_path: Any) -> None:
    sequence(tasks=tasks(3))
    separate = carry_out(tmp_path, "ewc", strength=10.0)["loss"]
    fading = carry_out(tmp_path, "ewc-online", strength=10.0, gamma=0.5)["loss"]
    assert separate[:2] == fading[:2]
    assert separate[2] != fading[2]


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("learner", "values", "method"),
    [
        ("wise_ft", {"alpha": 0.3}, "wise_ft"),
        ("soup", {}, "linear"),
        ("task_arithmetic", {"lambda_": 0.7}, "task_arithmetic"),
        ("ties", {"lambda_": 1.0, "density": 0.5}, "ties"),
        ("dare_ties", {"lambda_": 1.0, "density": 0.5}, "dare_ties"),
    ],
)
def test_merges_are_those_of_the_models_of_single_tasks(
    sequence: Any, tmp_path: Any, learner: str, values: Any, method: str, pretrained: bool
) -> None:
    both = sequence(pretrained=pretrained).tasks
    result = carry_out(tmp_path, learner, 2, **values)
    models: list[nn.Module] = []
    start, generator = network(2), generator_of(2)
    for task in both:
        in_turn = learner == "wise_ft" or not pretrained
        model = _copy(models[-1] if models and in_turn else start)
        learn(model, task, generator)
        models.append(model)
    for row in range(2):
        if learner == "soup":
            expected = merge([model.state_dict() for model in models[: row + 1]], "linear")
        elif not pretrained and row == 0:
            expected = models[0].state_dict()  # it is the base
        else:
            base = start if pretrained else models[0]
            tuned = models[: row + 1] if pretrained else models[1:]
            tuned = tuned[-1:] if learner == "wise_ft" else tuned
            expected = merge([m.state_dict() for m in tuned], method, base=base.state_dict(), seed=2, **values)
        merged = nn.Linear(INPUTS, CLASSES)
        merged.load_state_dict(expected)
        assert result["loss"][row] == [pytest.approx(scored(merged, task)[1], rel=1e-6) for task in both]
    others = 1 if learner == "wise_ft" else 2 if pretrained else 1
    assert result["held"] == others * 4 * PARAMETERS
    assert result["curve"] is None


def test_joint_training_has_its_last_row_only(sequence: Any, tmp_path: Any) -> None:
    sequence()
    result = carry_out(tmp_path, "joint")
    assert result["accuracy"][0] == [None, None]
    assert min(result["accuracy"][1]) > 0.3
    assert result["steps"] == 2 * STEPS


def test_the_same_cell_gives_the_same_numbers(sequence: Any, tmp_path: Any) -> None:
    sequence()
    names = {"sfa": {"beta": 0.5, "p": 0.25}, "rehearsal": {"kept": 0.2, "share": 0.5}, "ewc": {"strength": 10.0}}
    for learner, values in names.items():
        once, again = (carry_out(tmp_path, learner, **values) for _ in range(2))
        assert once.pop("seconds") != again.pop("seconds")
        assert once == again
        assert carry_out(tmp_path, learner, 1, **values)["loss"] != once["loss"]


def test_tuning_sees_validation_parts_alone_and_testing_test_parts_alone(sequence: Any, tmp_path: Any) -> None:
    both = sequence().tasks
    no_examples: Any = None
    sequence(tasks=tuple(replace(task, test=no_examples) for task in both))
    for learner in ("sequential", "joint", "soup"):
        score = carry_out(tmp_path, learner, 1000, "tuning")
        assert score.keys() == {"score", "seconds", "steps"}
    _, models = trained("sequential", 1000, *both)
    expected = sum(scored(models[1], task, "validation")[0] for task in both) / 2
    assert carry_out(tmp_path, "sequential", 1000, "tuning")["score"] == pytest.approx(expected)
    sequence(tasks=tuple(replace(task, validation=no_examples) for task in both))
    for learner in ("sequential", "joint", "soup"):
        assert len(carry_out(tmp_path, learner)["accuracy"]) == 2


def test_only_so_many_examples_are_scored(sequence: Any, tmp_path: Any) -> None:
    first, second = sequence(settings=replace(SETTINGS, evaluated=7)).tasks
    result = carry_out(tmp_path, "sequential")
    _, models = trained("sequential", 0, first, second)
    logits = models[1](first.test.inputs[:7])
    assert result["accuracy"][1][0] == pytest.approx((logits.argmax(1) == first.test.targets[:7]).double().mean().item())


def test_the_curve_has_every_merge(sequence: Any, tmp_path: Any) -> None:
    both = sequence().tasks
    curve = carry_out(tmp_path, "sfa", beta=0.3, p=0.5)["curve"]
    assert curve["merges"] == [STEPS + 4, STEPS + 8]
    assert curve["steps"] == [0, 2, 4, 6, 8, 10, 12, 14, 16]  # four points in each task, after the merge where there is one
    assert curve["starts"] == [0, STEPS]
    start = [(network(0)(t.test.inputs[:10]).argmax(1) == t.test.targets[:10]).double().mean().item() for t in both]
    assert curve["accuracy"][0] == [pytest.approx(accuracy) for accuracy in start]


@pytest.mark.parametrize(
    ("learner", "values", "held"),
    [
        ("sequential", {}, 0),
        ("sfa", {"beta": 0.5, "p": 0.25}, 4 * PARAMETERS),
        ("l2", {"strength": 1.0}, 4 * PARAMETERS),
        ("ewc", {"strength": 10.0}, 8 * PARAMETERS),  # their mean, and the Fisher information
        ("lwf", {"strength": 1.0}, 4 * PARAMETERS),
        ("rehearsal", {"kept": 0.2, "share": 0.5}, 12 * (4 * INPUTS + 8 + 8)),  # 12 of 60; inputs, target, number of the task
    ],
)
def test_what_is_held(sequence: Any, tmp_path: Any, learner: str, values: Any, held: int) -> None:
    sequence()
    assert carry_out(tmp_path, learner, **values)["held"] == held


def test_outputs_of_other_tasks_are_hidden(sequence: Any, tmp_path: Any) -> None:
    first, second = tasks()
    halves = [Part(task.train.inputs, task.train.targets % 2) for task in (first, second)]
    shifted = Part(halves[1].inputs, halves[1].targets + 2)
    headed = (
        Task("left", halves[0], halves[0], halves[0], outputs=(0, 1)),
        Task("right", shifted, shifted, shifted, outputs=(2, 3)),
    )
    small = sequence(tasks=headed, kind="task")
    batch = (first.test.inputs[:2], torch.tensor([0, 3]), torch.tensor([0, 1]))
    model = network(0)
    logits = Outputs(small).logits(model, batch)
    plain = model(batch[0])
    assert torch.equal(logits[0], torch.cat([plain[0, :2], torch.full((2,), -torch.inf)]))
    assert torch.equal(logits[1], torch.cat([torch.full((2,), -torch.inf), plain[1, 2:]]))
    losses = Outputs(small).losses(model, batch)
    by_hand = [torch.logsumexp(plain[0, :2], 0) - plain[0, 0], torch.logsumexp(plain[1, 2:], 0) - plain[1, 3]]
    assert torch.allclose(losses, torch.stack(by_hand))
    for learner in learners_for("small"):
        if learner.group != "flax":
            values = trials(learner, SETTINGS)[0]
            result = carry_out(tmp_path, learner.runs, **values)
            assert result["accuracy"][1][1] > 0.3, learner.name


def test_targets_at_every_position(sequence: Any, tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(1)

    def texts(size: int) -> Part:
        inputs = torch.randn(size, 5, INPUTS, generator=generator)
        return Part(inputs, inputs[..., :CLASSES].argmax(-1))

    both = tuple(Task(str(i), texts(40), texts(10), texts(10)) for i in range(2))
    sequence(tasks=both, kind="language")
    for learner in learners_for("small"):
        if learner.group != "flax":
            carry_out(tmp_path, learner.runs, **trials(learner, SETTINGS)[0])
    result = carry_out(tmp_path, "sequential")
    model, generator = network(0), generator_of(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    for _ in range(STEPS):
        drawn = torch.randint(40, (BATCH,), generator=generator)
        optimizer.zero_grad()
        logits = model(both[0].train.inputs[drawn])
        nn.functional.cross_entropy(logits.flatten(0, 1), both[0].train.targets[drawn].flatten()).backward()
        optimizer.step()
    logits = model(both[0].test.inputs)
    assert result["accuracy"][0][0] == pytest.approx((logits.argmax(-1) == both[0].test.targets).double().mean().item())
    assert result["loss"][0][0] == pytest.approx(
        nn.functional.cross_entropy(logits.flatten(0, 1), both[0].test.targets.flatten()).item(), rel=1e-5
    )


def test_lwf_pulls_towards_what_the_network_said(sequence: Any) -> None:
    both = sequence().tasks
    model = network(0)
    strategy = strategy_of("lwf", model, sequence(), 0, {"strength": 0.5, "lr": 0.1})
    optimizer = training.optimizer_of(model, 0.1)
    batch = training.batch_of(both[1].train, 1, slice(0, 4))
    plain = strategy.loss(batch)
    strategy.begin(1, optimizer)
    with torch.no_grad():
        taught = torch.softmax(model(batch[0]).double() / 2, 1)
        model.weight.add_(1.0)
        said = torch.log_softmax(model(batch[0]).double() / 2, 1)
        plain = nn.functional.cross_entropy(model(batch[0]).double(), batch[1])
    expected = plain + 0.5 * 4 * -(taught * said).sum(1).mean()
    assert strategy.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_learner_may_try_as_much() -> None:
    settings = replace(SETTINGS, trials=7, more_rates=(0.02, 0.03, 0.04, 0.06))
    for learner in LEARNERS.values():
        tried = trials(learner, settings)
        assert len(tried) == 7
        assert len({str(sorted(values.items())) for values in tried}) == len(tried)
        assert tried[0] == {**learner.fixed, **{name: values[0] for name, values in learner.space.items()}, "lr": RATE}
        assert tried == trials(learner, settings)
        for name, values in learner.space.items():
            assert [each[name] for each in tried[: len(values)]] == list(values), "a few trials see each value"
        rates = (*settings.rates, *(() if learner.space else settings.more_rates))
        assert [each["lr"] for each in tried[:3]] == list(settings.rates)
        assert {each["lr"] for each in tried} == set(rates)
        few = replace(settings, trials=1000)
        combinations = len(rates)
        for values in learner.space.values():
            combinations *= len(values)
        assert len(trials(learner, few)) == combinations


def test_names_of_cells() -> None:
    sfa = LEARNERS["sfa-end"]
    named = cell_of("rotated@1-0-2-3", sfa, {"p": 1.0, "lr": 0.001, "beta": 0.5}, 3)
    assert named.name == "rotated@1-0-2-3/sfa/beta=0.5,lr=0.001,p=1/seed-3"
    assert named == Cell("rotated@1-0-2-3", "sfa", (("beta", 0.5), ("lr", 0.001), ("p", 1.0)), 3)
    assert needs(named) is None
    merged = cell_of("rotated", LEARNERS["ties"], {"lr": 0.001, "lambda_": 1.0, "density": 0.2}, 1000, "tuning")
    assert merged.name == "rotated/ties/density=0.2,lambda_=1,lr=0.001/tuning-seed-1000"
    needed = needs(merged)
    assert needed is not None
    assert needed.name == "rotated/per-task/lr=0.001/weights-seed-1000"
    assert needs(cell_of("rotated", LEARNERS["wise_ft"], {"lr": 0.001, "alpha": 0.5}, 0)) == cell(
        "rotated", "sequential", {"lr": 0.001}, 0, "weights"
    )


def test_flax_twins_run_on_one_sequence() -> None:
    assert [learner.name for learner in learners_for("rotated@3-2-1-0") if learner.group == "flax"] == [
        "sequential-flax", "sfa-flax", "l2-flax",
    ]  # fmt: skip
    assert not [learner for learner in learners_for("permuted") if learner.group == "flax"]


def test_the_order_of_tasks() -> None:
    plain, turned = load("rotated", True), load("rotated@3-1-0-2", True)
    assert [task.name for task in turned.tasks] == [plain.tasks[i].name for i in (3, 1, 0, 2)]
    assert turned.name == "rotated@3-1-0-2"
    assert load("rotated", True) is plain


@pytest.mark.parametrize("order", ["0-1-2", "0-1-2-2", "0-1-2-4", "a-1-2-3", "0--1-2-3"])
def test_an_order_that_is_none(order: str) -> None:
    with pytest.raises(MergeError, match="does not name each task once; its tasks are 0: 0°, 1: 90°"):
        load(f"rotated@{order}", True)


def test_an_unknown_sequence() -> None:
    with pytest.raises(MergeError, match="rotatet"):
        load("rotatet")


def test_costs_are_of_all_learners_that_train_or_merge(sequence: Any) -> None:
    sequence()
    chosen = {x.name: trials(x, SETTINGS)[0] for x in learners_for("small")}
    measured = costs.measure("small", True, chosen)
    assert list(measured) == [x.name for x in learners_for("small") if x.group not in ("bound", "flax")]
    few = {name: chosen[name] for name in ("sequential", "l2")}
    assert list(costs.measure("small", True, few)) == ["sequential", "l2"]
    assert all(cost["step"] > 0 for cost in measured.values())
    assert measured["soup"]["step"] > measured["sequential"]["step"]
