"""SFA in Hugging Face's Trainer: when it merges, what lies on the disk, how it resumes, what it refuses."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors import safe_open
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from mergekit_cl import MergeError, MismatchError, NonFiniteError, merge
from mergekit_cl.adapters.transformers import SFACallback

GENERATOR = torch.Generator().manual_seed(0)
DATA = [{"x": x, "labels": y} for x, y in zip(torch.randn(20, 4, generator=GENERATOR), torch.arange(20) % 3, strict=True)]


class Network(nn.Module):
    """A network with dropout, so that a resumed run has to have the random numbers right, and with a frozen bias."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.last(self.dropout(torch.tanh(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class ByHand(TrainerCallback):
    """Merge with `merge` after the steps that are given; parameters that are called ``but`` stay as they are."""

    def __init__(self, steps: Iterable[int], method: str = "sfa", but: str = "-", **parameters: Any) -> None:
        self.steps, self.method, self.but, self.parameters = set(steps), method, but, parameters

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.anchor = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            current = {name: p for name, p in trainable(kwargs["model"]).items() if self.but not in name}
            anchor = {name: self.anchor[name] for name in current}
            if self.method == "sfa":
                merged = merge([anchor, current], "sfa", **self.parameters)
            else:
                merged = merge([current], self.method, base=anchor, seed=state.global_step, **self.parameters)
            with torch.no_grad():
                for name, parameter in kwargs["model"].named_parameters():
                    if name in merged:
                        parameter.copy_(merged[name])


class Watch(TrainerCallback):
    """Note the weights before and after the callbacks that stand before it have merged, and at each evaluation."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}
        self.evaluated: dict[int, Any] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before[state.global_step + 1] = weights(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = weights(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated[state.global_step] = weights(kwargs["model"])

    @property
    def merged(self) -> list[int]:
        """The steps after which the weights were changed."""
        return [step for step, now in self.after.items() if not equal(now, self.before[step])]


class StopAt(TrainerCallback):
    """Stop after a step, as early stopping does: when it was evaluated, or at its end."""

    def __init__(self, step: int, event: str = "on_evaluate", crash: bool = False) -> None:
        self.step, self.crash = step, crash
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True
            if self.crash:
                raise KeyboardInterrupt


class Unfreeze(TrainerCallback):
    """Freeze a layer until the second epoch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].last.requires_grad_(False)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].last.requires_grad_(state.epoch >= 1)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def trainer(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **arguments: Any) -> Trainer:
    """Build everything anew, as a new process does."""
    usual = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "log_level": "error"}
    usual |= {"max_steps": 7, "save_strategy": "no", "logging_strategy": "no", "per_device_train_batch_size": 4}
    model = Network() if model is None else model
    return Trainer(
        model, TrainingArguments(**usual | arguments), train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks)
    )


def train(folder: Path, *callbacks: TrainerCallback, resume: Any = None, **arguments: Any) -> Trainer:
    built = trainer(folder, *callbacks, **arguments)
    built.train(resume_from_checkpoint=None if resume is None else str(resume))
    return built


def assert_same(a: Trainer, b: Trainer) -> None:
    """Compare weights and the optimizer's state, bit for bit."""
    assert a.optimizer.state
    assert equal(a.model.state_dict(), b.model.state_dict())
    for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
        state, same = (run.optimizer.state.get(p, {}) for run, p in ((a, one), (b, other)))
        assert equal(state, same)


def anchor_of(folder: Path, name: str = "anchor.safetensors") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "sfa-anchor" / name)
    return tensors


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [2, 4, 6, 7]),
        ({"beta": 0.75, "every": 3}, [3, 6, 7]),
        ({"beta": 0.25, "p": 1.0, "anchor": "memory"}, [7]),
        ({"every": 1, "anchor": "cpu"}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_equals_a_loop_that_merges_by_hand(settings: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    watch = Watch()
    run = train(tmp_path, SFACallback(**settings), watch)
    assert_same(run, train(tmp_path / "by hand", ByHand(steps, beta=settings.get("beta", 0.5))))
    assert watch.merged == steps


def test_every_method_of_merging(tmp_path: Path) -> None:
    run = train(tmp_path, SFACallback(method="ties", density=0.5, every=3))
    assert_same(run, train(tmp_path / "by hand", ByHand([3, 6, 7], "ties", density=0.5)))
    masks = train(tmp_path, SFACallback(method="dare_ties", density=0.5, every=3))
    assert_same(masks, train(tmp_path / "by hand", ByHand([3, 6, 7], "dare_ties", density=0.5)))


def test_epochs_and_accumulated_gradients(tmp_path: Path) -> None:
    watch = Watch()
    some = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}  # 3 updates an epoch: 5 batches
    run = train(tmp_path, SFACallback(p=0.5), watch, **some)
    assert run.state.max_steps == 9
    assert watch.merged == [4, 8, 9]
    assert_same(run, train(tmp_path / "by hand", ByHand([4, 8, 9], beta=0.5), **some))


@pytest.mark.parametrize("anchor", ["file", "memory"])
def test_interrupted_at_every_step_and_resumed(anchor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"beta": 0.5, "every": 3, "anchor": anchor}
    some = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = train(tmp_path, SFACallback(**settings), **some)
    monkeypatch.setattr("mergekit_cl.adapters.torch.anchor._write", None)  # no anchor is written to resume
    for step in range(1, 7):
        watch, callback = Watch(), SFACallback(**settings)
        resumed = train(tmp_path, callback, watch, model=Network(seed=5), resume=tmp_path / f"checkpoint-{step}", **some)
        assert_same(whole, resumed)
        assert watch.merged == [s for s in (3, 6, 7) if s > step]
        assert callback.sfa is not None
        assert (callback.sfa.step_count, callback.sfa.merges, callback.sfa.last_merge_step) == (7, 3, 7)


def test_a_complete_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, SFACallback(), **some)
    again = train(tmp_path, SFACallback(), model=Network(seed=5), resume=tmp_path / "checkpoint-7", **some)
    assert again.state.global_step == 8  # Trainer takes a step more, with the learning rate 0 of the end of its schedule
    assert equal(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("crash", [False, True])
def test_a_run_that_stops_or_dies_is_resumed(step: int, crash: bool, tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "whole", SFACallback(p=0.3), **some)
    try:
        train(tmp_path, SFACallback(p=0.3), StopAt(step, "on_save", crash), **some)
    except KeyboardInterrupt:
        assert crash
    again = trainer(tmp_path, SFACallback(p=0.3), model=Network(seed=5), **some)
    again.train(resume_from_checkpoint=True)
    assert_same(whole, again)


def test_a_rolling_anchor_is_resumed_from_the_last_checkpoint(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1}
    settings: dict[str, Any] = {"every": 2, "policy": "rolling"}
    whole = train(tmp_path, SFACallback(**settings), **some)
    assert not equal(whole.model.state_dict(), train(tmp_path / "fixed", SFACallback(every=2), **some).model.state_dict())
    for step, anchor in enumerate(["memory", "file", "file", "memory", "file", "memory"], 1):
        folder, settings["anchor"] = tmp_path / str(step), anchor
        with pytest.raises(KeyboardInterrupt):
            train(folder, SFACallback(**settings), StopAt(step, "on_save", crash=True), **some)
        again = train(folder, SFACallback(**settings), model=Network(seed=5), resume=folder / f"checkpoint-{step}", **some)
        assert_same(whole, again)
    with pytest.raises(MismatchError, match=r"anchor.*later merge"):
        train(tmp_path, SFACallback(**settings), resume=tmp_path / "checkpoint-3", **some)


@pytest.mark.parametrize("anchor", ["file", "memory"])
def test_a_layer_that_is_unfrozen_on_the_way(anchor: str, tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 7}  # 3 steps an epoch
    whole = train(tmp_path, Unfreeze(), SFACallback(every=2, anchor=anchor), **some)
    assert_same(whole, train(tmp_path / "by hand", Unfreeze(), ByHand([2, 4, 6, 7], beta=0.5), **some))
    for step in (3, 5):
        resume = tmp_path / f"checkpoint-{step}"
        again = train(tmp_path, Unfreeze(), SFACallback(every=2, anchor=anchor), model=Network(5), resume=resume, **some)
        assert_same(whole, again)


def test_checkpoint_and_evaluation_of_a_step_have_its_merged_weights(tmp_path: Path) -> None:
    watch = Watch()
    some = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    train(tmp_path, SFACallback(every=2), watch, **some)
    assert watch.merged == [2, 4, 6, 7]
    for step in range(1, 8):
        assert equal(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), watch.after[step])
        assert equal(watch.evaluated[step], watch.after[step])


def test_what_is_written(tmp_path: Path) -> None:
    start = trainable(Network())
    run = train(tmp_path, SFACallback(beta=0.25), save_strategy="steps", save_steps=4)
    assert sorted(file.name for file in (tmp_path / "sfa-anchor").iterdir()) == ["anchor.safetensors", "sfa.json"]
    assert equal(anchor_of(tmp_path), start)
    with safe_open(tmp_path / "sfa-anchor" / "anchor.safetensors", "pt") as file:
        fingerprint = file.metadata()["mergekit_cl.fingerprint"]
    assert json.loads((tmp_path / "sfa-anchor" / "sfa.json").read_text()) == {
        "fingerprint": fingerprint, "method": "sfa", "parameters": {"beta": 0.25}, "every": 2, "total_steps": 7,
    }  # fmt: skip
    assert run.state.stateful_callbacks["sfa"]["fingerprint"] == fingerprint
    elsewhere = tmp_path / "elsewhere"
    train(tmp_path / "other", SFACallback(anchor_dir=elsewhere))
    assert (elsewhere / "anchor.safetensors").exists()
    assert not (tmp_path / "other" / "sfa-anchor").exists()


def test_early_stopping_merges_at_the_end_and_leaves_checkpoints_as_they_were(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    watch = Watch()
    run = train(tmp_path, SFACallback(p=0.4), watch, StopAt(5), **some)
    assert run.state.global_step == 5
    current = {name: watch.after[5][name] for name in trainable(run.model)}
    expected = merge([trainable(Network()), current], "sfa", beta=0.5)
    assert equal(trainable(run.model), expected)
    assert equal(load_file(tmp_path / "checkpoint-5" / "model.safetensors"), watch.after[5])
    resumed = train(tmp_path, SFACallback(p=0.4), resume=tmp_path / "checkpoint-5", **some)
    assert_same(resumed, train(tmp_path / "whole", SFACallback(p=0.4), **some))


def test_a_run_that_stops_at_a_merge_is_not_merged_twice(tmp_path: Path) -> None:
    watch = Watch()
    run = train(tmp_path, SFACallback(every=3), watch, StopAt(6), eval_strategy="steps", eval_steps=1)
    assert equal(weights(run.model), watch.after[6])


@pytest.mark.parametrize("early", [False, True])
def test_the_best_model_is_left_as_it_was_saved(early: bool, tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    some |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst
    stop = [EarlyStoppingCallback(2)] if early else []
    run = train(tmp_path, SFACallback(every=4), *stop, learning_rate=0.1, **some)
    best = run.state.best_global_step
    assert best < run.state.global_step
    assert (run.state.global_step < 7) == early
    assert equal(weights(run.model), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))


def test_a_second_call_of_train_is_a_new_task(tmp_path: Path) -> None:
    callback = SFACallback()
    run = trainer(tmp_path, callback)
    run.train()
    first = trainable(run.model)
    run.train()
    assert equal(anchor_of(tmp_path), first)
    assert equal(anchor_of(tmp_path, "anchor.previous.safetensors"), trainable(Network()))
    reference = trainer(tmp_path / "by hand", ByHand([2, 4, 6, 7], beta=0.5))
    reference.train()
    reference.train()
    assert_same(run, reference)


def test_a_fresh_run_keeps_the_anchor_of_the_run_before(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2}
    old = train(tmp_path, SFACallback(), **some)
    for _ in range(2):  # the same start twice: the old anchor is still there
        train(tmp_path, SFACallback(), model=Network(seed=1), max_steps=1, **some)
    assert equal(anchor_of(tmp_path), trainable(Network(seed=1)))
    assert equal(anchor_of(tmp_path, "anchor.previous.safetensors"), trainable(Network()))
    assert_same(train(tmp_path, SFACallback(), resume=tmp_path / "checkpoint-4", **some), old)
    assert equal(anchor_of(tmp_path), trainable(Network()))  # the two have changed places
    assert equal(anchor_of(tmp_path, "anchor.previous.safetensors"), trainable(Network(seed=1)))
    for seed in (2, 3):
        train(tmp_path, SFACallback(), model=Network(seed=seed), max_steps=1)
    with pytest.raises(MismatchError, match=r"anchor.* is not that of the checkpoint of step 4.*another run"):
        train(tmp_path, SFACallback(), resume=tmp_path / "checkpoint-4", **some)


@pytest.mark.parametrize("anchor", ["file", "memory"])
def test_the_anchor_of_the_run_before_stays_until_a_step_is_done(anchor: str, tmp_path: Path) -> None:
    class Dies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    some = {"save_strategy": "steps", "save_steps": 4}
    old = train(tmp_path, SFACallback(anchor=anchor), **some)
    for seed in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, SFACallback(anchor=anchor), Dies(), model=Network(seed=seed))
        assert equal(anchor_of(tmp_path), trainable(Network()))
    assert_same(train(tmp_path, SFACallback(anchor=anchor), resume=tmp_path / "checkpoint-4", **some), old)


@pytest.mark.parametrize("anchor", ["file", "memory"])
def test_a_process_that_died_while_anchors_changed_places(anchor: str, tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 4}
    old = train(tmp_path, SFACallback(), **some)
    train(tmp_path, SFACallback(), model=Network(seed=1), max_steps=1)
    folder = tmp_path / "sfa-anchor"  # died between the last two renames of three
    (folder / "anchor.previous.safetensors").rename(folder / "anchor.next.safetensors")
    (folder / "anchor.safetensors").rename(folder / "anchor.previous.safetensors")
    assert_same(train(tmp_path, SFACallback(anchor=anchor), resume=tmp_path / "checkpoint-4", **some), old)
    assert equal(anchor_of(tmp_path), trainable(Network()))
    assert equal(anchor_of(tmp_path, "anchor.previous.safetensors"), trainable(Network(seed=1)))


def test_a_program_that_changes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaves(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monkeypatch.chdir(tmp_path)

    (tmp_path / "begun").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    run = train(Path("run"), SFACallback(), Leaves())
    assert run.state.global_step == 7
    assert equal(anchor_of(tmp_path / "begun" / "run"), trainable(Network()))


def test_resuming_without_its_anchor_is_refused(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, SFACallback(), **some)
    shutil.move(tmp_path / "sfa-anchor", tmp_path / "moved")
    for anchor in ("file", "memory"):
        with pytest.raises(MergeError, match=r"anchor(.|\n)*anchor_dir"):
            train(tmp_path, SFACallback(anchor=anchor), resume=tmp_path / "checkpoint-4", **some)
    assert not (tmp_path / "sfa-anchor").exists()
    moved = SFACallback(anchor_dir=tmp_path / "moved")
    assert_same(train(tmp_path, moved, resume=tmp_path / "checkpoint-4", **some), whole)


def test_a_checkpoint_made_without_the_callback_is_refused(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, **some)
    with pytest.raises(MergeError, match=r"checkpoint of step 4 was made without SFACallback(.|\n)*anchor"):
        train(tmp_path, SFACallback(), resume=tmp_path / "checkpoint-4", **some)


def test_a_damaged_anchor_and_one_of_another_model_are_refused(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, SFACallback(), **some)
    file = tmp_path / "sfa-anchor" / "anchor.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(MergeError, match="anchor"):
        train(tmp_path, SFACallback(), resume=tmp_path / "checkpoint-4", **some)
    file.write_bytes(content[:-1])
    with pytest.raises(MergeError, match="anchor"):
        train(tmp_path, SFACallback(), resume=tmp_path / "checkpoint-4", **some)


def test_other_steps_between_merges_on_resuming(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, SFACallback(p=0.5), max_steps=8, **some)
    with pytest.raises(MergeError, match=r"every 4 steps.*every 6 .*max_steps(.|\n)*every=4"):
        train(tmp_path, SFACallback(p=0.5), max_steps=12, resume=tmp_path / "checkpoint-6", **some)
    watch = Watch()
    train(tmp_path, SFACallback(every=4), watch, max_steps=11, resume=tmp_path / "checkpoint-6", **some)
    assert watch.merged == [8, 11]


def test_what_was_merged_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, SFACallback(p=0.4), **some)  # after steps 3, 6 and 7
    callback, watch = SFACallback(p=0.4), Watch()
    train(tmp_path, callback, watch, max_steps=8, resume=tmp_path / "checkpoint-7", **some)  # p=0.4 is every third step still
    assert watch.merged == [8]
    assert callback.sfa is not None
    assert (callback.sfa.merges, callback.sfa.last_merge_step) == (4, 8)
    with pytest.raises(MergeError, match=r"step 5 was last merged after step 3, and max_steps=5 .*max_steps=6 or more"):
        train(tmp_path, SFACallback(every=3), max_steps=5, resume=tmp_path / "checkpoint-5", **some)


def test_other_settings_on_resuming_are_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, SFACallback(every=3), **some)
    callback = SFACallback(beta=0.9, every=3)
    with caplog.at_level("WARNING", "mergekit_cl"):
        train(tmp_path, SFACallback(every=3), resume=tmp_path / "checkpoint-4", **some)
        assert not caplog.records
        train(tmp_path, callback, resume=tmp_path / "checkpoint-4")
    assert "made with {'method': 'sfa', 'parameters': {'beta': 0.5}}, but is resumed with" in caplog.text
    assert callback.sfa is not None
    assert callback.sfa.beta == 0.9


def test_callback_states_that_are_restored_change_nothing(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    whole = train(tmp_path, SFACallback(beta=0.25, every=3), **some)
    resumed = train(tmp_path, SFACallback(beta=0.25, every=3), resume=tmp_path / "checkpoint-3", **some)
    assert_same(whole, resumed)
    plain = train(tmp_path / "without", resume=tmp_path / "checkpoint-3", **some)  # a checkpoint is not bound to the callback
    assert plain.state.global_step == 7


def test_a_callback_that_is_given_twice_merges_once(tmp_path: Path) -> None:
    callback = SFACallback()
    once = train(tmp_path / "once", SFACallback())
    assert_same(train(tmp_path, callback, callback), once)


def test_only_weights_in_checkpoints(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    train(tmp_path, SFACallback(every=3), **some)
    watch = Watch()
    train(tmp_path, SFACallback(every=3), watch, resume=tmp_path / "checkpoint-4", **some)
    assert watch.merged == [6, 7]


def test_numbers_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    kwargs["model"].last.weight[0, 0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"step 4(.|\n)*last\.weight"):
        train(tmp_path, SFACallback(every=2), Spoil())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": "gpu"}, "anchor=\"gpu\"|anchor='gpu'"),
        ({"p": 0.5, "every": 2}, "both p and every"),
        ({"p": 1.5}, "p=1.5"),
        ({"every": 0}, "every=0"),
        ({"beta": 1.5}, "beta"),
        ({"method": "nearest"}, "nearest"),
        ({"total_steps": 5}, "total_steps"),
        ({"optimizer_state": "reset"}, "optimizer_state"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=message):
        train(tmp_path, SFACallback(**settings))
    assert not (tmp_path / "sfa-anchor" / "anchor.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing`:FutureWarning")  # TRL's and PEFT's own
@pytest.mark.parametrize("lora", [False, True])
def test_sft_with_tied_embeddings_and_with_lora(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = ["<pad>", "<eos>", *(str(number) for number in range(30))]
    rules = Tokenizer(models.WordLevel(dict(zip(words, range(32), strict=True)), unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", eos_token="<eos>")
    data = Dataset.from_list([{"text": " ".join(str((i + j) % 30) for j in range(8))} for i in range(16)])
    size = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=1, pad_token_id=0)
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True) if lora else None

    def tune(callback: TrainerCallback) -> SFTTrainer:
        torch.manual_seed(0)
        arguments = SFTConfig(
            str(tmp_path / type(callback).__name__), max_steps=4, per_device_train_batch_size=4, max_length=16, bf16=False,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", learning_rate=0.01,
        )  # fmt: skip
        model = GPT2LMHeadModel(size)
        tuned = SFTTrainer(
            model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback], peft_config=adapter
        )
        tuned.train()
        return tuned

    # of a fresh adapter A stays as it is, and B is averaged with its zeros: so is W + BA with W
    tuned, by_hand = tune(SFACallback(beta=0.25, every=3)), tune(ByHand([3, 4], but="lora_A", beta=0.25))
    assert_same(tuned, by_hand)
    assert ("lora" in next(iter(anchor_of(tmp_path / "SFACallback")))) == lora


def prepare() -> None:
    """Let processes of a test be on the CPU, also where there is a GPU."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def know_the_others() -> None:
    """Set what accelerate wants to be told by torchrun."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def check_processes_that_share_a_folder(folder: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
    rank, world = dist.get_rank(), dist.get_world_size()
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
        "OMP_NUM_THREADS": 1,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    for anchor in ("file", "memory"):
        old = train(folder / anchor, SFACallback(anchor=anchor), model=Network(seed=3), max_steps=1, **some)
        assert old.args.world_size == dist.get_world_size()
        whole = train(folder / anchor, SFACallback(every=3, anchor=anchor), **some)
        assert_same(whole, train(folder / f"{anchor} by hand", ByHand([3, 6, 7], beta=0.5), **some))
        assert equal(anchor_of(folder / anchor), trainable(Network()))
        assert equal(anchor_of(folder / anchor, "anchor.previous.safetensors"), trainable(Network(seed=3)))
        dist.barrier()
        resume = folder / anchor / "checkpoint-4"
        again = train(folder / anchor, SFACallback(every=3, anchor=anchor), model=Network(seed=5), resume=resume, **some)
        assert_same(whole, again)
        dist.barrier()
        if not dist.get_rank():
            shutil.rmtree(folder / anchor / "sfa-anchor")
        dist.barrier()
        with pytest.raises(MergeError, match="anchor"):
            train(folder / anchor, SFACallback(every=3, anchor=anchor), resume=resume, **some)


def check_deepspeed(folder: Path) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    know_the_others()
    some: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "use_cpu": False, "ddp_backend": "gloo"}
    some |= {"deepspeed": {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}}
    some["deepspeed"]["train_micro_batch_size_per_gpu"] = "auto"
    watch, anchor = Watch(), trainable(Network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DeepSpeed
        train(folder / "zero", SFACallback(), model=Network(seed=3), max_steps=1, **some)  # leaves another anchor behind
        whole = train(folder / "zero", SFACallback(every=3), watch, **some)
        resume = folder / "zero" / "checkpoint-4"
        again = train(folder / "zero", SFACallback(every=3), model=Network(seed=5), resume=resume, **some)
    assert whole.deepspeed.zero_optimization_stage() == 1
    assert watch.merged == [3, 6, 7]
    for step in watch.merged:
        current, merged = ({name: known[step][name] for name in anchor} for known in (watch.before, watch.after))
        assert equal(merge([anchor, current], "sfa", beta=0.5), merged)
    assert equal(whole.model.state_dict(), again.model.state_dict())


CHECKS = {check_processes_that_share_a_folder: (2,), check_deepspeed: (2,)}


def test_processes_that_train_together(on_processes: Callable[[str, int], None]) -> None:
    on_processes(__file__, 2)


def test_a_run_that_stops_before_any_evaluation_has_no_best_model_and_is_merged(tmp_path: Path) -> None:
    some = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    some |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    watch = Watch()
    run = train(tmp_path, SFACallback(every=7), watch, StopAt(2, "on_step_end"), **some)
    assert (run.state.global_step, run.state.best_model_checkpoint) == (2, None)
    current = {name: watch.after[2][name] for name in trainable(run.model)}
    assert equal(trainable(run.model), merge([trainable(Network()), current], "sfa", beta=0.5))
