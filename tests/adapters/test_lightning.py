"""SFA in Lightning's Trainer: when it merges, what validation and checkpoints see, how it resumes, what it refuses."""

import copy
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import BaseFinetuning, Callback, EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import nn

from mergekit_cl import MergeError, NonFiniteError, merge
from mergekit_cl.adapters.lightning import SFACallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{message}")
    for message in (
        "does not have many workers",
        "no `val_dataloader`",
        "exists and is not empty",
        "LeafSpec.` is deprecated",
        "callbacks used to create the checkpoint need to be provided",
        "dataloader is not resumable",
    )
]

RANDOM = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(8, 4, generator=RANDOM), torch.randint(3, (8,), generator=RANDOM)) for _ in range(5)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Lightning logs which devices there are, and why training stopped."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def loader(batches: int) -> Any:
    """So many batches; what is in them depends on the step alone (`Module.loss`), so that runs can resume anywhere."""
    return torch.utils.data.DataLoader(range(batches), batch_size=None)


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(100))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model: nn.Module, step: int) -> torch.Tensor:
    images, labels = BATCHES[step % len(BATCHES)]
    return nn.functional.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), labels)


class Module(lightning.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = network(seed)
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss(self.network, self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.network[0].weight.detach().clone())
        self.log("loss", loss(self.network, 0), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class TwoOptimizers(Module):
    """Each batch trains the first layer, then the last one; the first batch of an epoch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers() if batch_idx else ():
            optimizer.zero_grad()
            self.manual_backward(loss(self.network, 0))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.network[index].parameters(), 0.1) for index in (0, 2)]


class Watch(Callback):
    """Notes the weights after each batch, and what was merged until then."""

    def __init__(self, callback: SFACallback | None = None) -> None:
        self.callback = callback
        self.weights: list[dict[str, torch.Tensor]] = []
        self.merges: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(copy.deepcopy(pl_module.state_dict()))
        if self.callback is not None:
            self.merges.append(self.callback.sfa.merges)


def trainer(*callbacks: Callback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    return lightning.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet, **options)


def fit(
    *callbacks: Callback, module: Module | None = None, batches: Any = 4, ckpt_path: str | Path | None = None, **options: Any
) -> lightning.Trainer:
    """Train, without validation, and return the trainer."""
    fitting = trainer(*callbacks, limit_val_batches=0, **options)
    fitting.fit(module or Module(), loader(batches) if isinstance(batches, int) else batches, ckpt_path=ckpt_path)
    return fitting


def by_hand(
    steps: int, merged: list[int], accumulated: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train in a loop of one's own that calls merge() after some of the steps; return weights and optimizer's state."""
    model = nn.ModuleDict({"network": network().to(dtype)})
    optimizer, anchor = torch.optim.Adam(model.parameters(), 0.01), copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for _ in range(accumulated):
            (loss(model["network"], step - 1) / accumulated).backward()
        optimizer.step()
        if step in merged:
            model.load_state_dict(_merged(anchor, model.state_dict(), **options))
    return model.state_dict(), optimizer.state_dict()["state"]


def _merged(anchor: Any, current: Any, method: str = "sfa", **options: Any) -> Any:
    if method == "sfa":
        return merge([anchor, current], **options)
    return merge([current], base=anchor, method=method, **options)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def optimizer_state(fitted: lightning.Trainer) -> dict[str, Any]:
    return dict(fitted.optimizers[0].state_dict()["state"])


@pytest.mark.parametrize(
    ("options", "training", "merged", "loop"),
    [
        ({}, {"max_epochs": 3}, [3, 6, 9, 12], {"beta": 0.5}),
        ({"beta": 0.3, "p": 0.4}, {"max_epochs": 3, "max_steps": 10}, [4, 8, 10], {"beta": 0.3}),
        ({"every": 5}, {"max_epochs": 3}, [5, 10, 12], {"beta": 0.5}),
        ({"p": 0.5}, {"max_epochs": 3, "accumulate_grad_batches": 2}, [3, 6], {"beta": 0.5, "accumulated": 2}),
        ({"method": "ties", "density": 0.5, "every": 3}, {"max_epochs": 2}, [3, 6, 8], {"method": "ties", "density": 0.5}),
        ({"beta": 0.3, "anchor": "cpu"}, {"max_epochs": 1, "precision": "bf16-true"}, [1, 2, 3, 4],
         {"beta": 0.3, "dtype": torch.bfloat16}),
    ],
)  # fmt: skip
def test_equal_to_a_loop_by_hand_that_calls_merge(
    options: dict[str, Any], training: dict[str, Any], merged: list[int], loop: dict[str, Any]
) -> None:
    callback, module = SFACallback(**options), Module()
    watch = Watch(callback)
    fitted = fit(callback, watch, module=module, **training)
    weights, state = by_hand(merged[-1], merged, **loop)
    assert fitted.global_step == callback.sfa.step_count == merged[-1]
    assert equal(dict(module.state_dict()), dict(weights))
    assert equal(optimizer_state(fitted), state)
    batches = range(1, len(watch.merges) + 1)  # a step may take two of them
    assert watch.merges == [sum(step <= batch // loop.get("accumulated", 1) for step in merged) for batch in batches]


def test_validation_and_checkpoints_of_a_step_see_merged_weights(tmp_path: Path) -> None:
    module, callback = Module(), SFACallback(beta=1.0, every=4)  # beta=1 brings the anchor back
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fitting = trainer(keep, callback, max_epochs=2, num_sanity_val_steps=0)
    fitting.fit(module, loader(4), loader(1))
    start = network()[0].weight
    assert [torch.equal(weight, start) for weight in module.validated] == [True, True]
    saved = [torch.load(tmp_path / f"step={step}.ckpt", weights_only=True) for step in range(1, 9)]
    merged = [torch.equal(each["state_dict"]["network.0.weight"], start) for each in saved]
    assert merged == [False, False, False, True] * 2
    assert [each["callbacks"]["SFACallback"]["sfa"]["merges"] for each in saved] == [0, 0, 0, 1, 1, 1, 1, 2]


def test_frozen_layers_stay_and_cost_nothing() -> None:
    module = Module()
    module.network[0].requires_grad_(False)
    callback = SFACallback(every=2)
    fit(callback, module=module, max_epochs=1)
    assert torch.equal(module.network[0].weight, network()[0].weight)
    assert sorted(callback.sfa.state_dict()["anchor"]) == ["network.2.bias", "network.2.weight"]


RESUMED: list[dict[str, Any]] = [
    {"beta": 0.4, "p": 0.4},
    {"beta": 0.4, "every": 2, "policy": "rolling"},
    {"method": "dare_ties", "density": 0.5, "p": 0.4, "seed": 3},
    {"beta": 0.4, "p": 0.4, "anchor": "file"},
]


@pytest.mark.parametrize("options", RESUMED)
def test_resumed_runs_are_bit_equal(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if options.get("anchor") == "file":
        options = {**options, "anchor": tmp_path / "anchor.safetensors"}
    training = {"batches": 3, "max_epochs": 2, "accumulate_grad_batches": 1}
    callback, module, keep = SFACallback(**options), Module(), ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1
    )  # fmt: skip
    expected = fit(callback, keep, module=module, **training)
    assert callback.sfa.merges == 3
    monkeypatch.setattr("mergekit_cl.adapters.torch.anchor._write", None)  # no anchor is written to resume
    for interrupted in range(1, 7):
        resumed, again = SFACallback(**options), Module(seed=1)
        finished = fit(resumed, module=again, ckpt_path=tmp_path / f"step={interrupted}.ckpt", **training)
        assert equal(dict(again.state_dict()), dict(module.state_dict())), interrupted
        assert equal(optimizer_state(finished), optimizer_state(expected)), interrupted
        assert (resumed.sfa.merges, resumed.sfa.step_count, resumed.sfa.last_merge_step) == (3, 6, 6), interrupted
    expected.save_checkpoint(tmp_path / "end.ckpt")
    resumed = SFACallback(**options)
    fit(resumed, ckpt_path=tmp_path / "end.ckpt", **training)  # there is nothing to train
    assert equal(resumed.state_dict(), callback.state_dict())


class Stops(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Fails(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("out of luck")


@pytest.mark.parametrize("before", [True, False])
def test_resumed_after_an_error_around_a_merge(before: bool, tmp_path: Path) -> None:
    """The checkpoint is written after the step, and before or after its merge: which is done once in any case."""
    keep = ModelCheckpoint(tmp_path, "{step}", save_on_exception=True)
    callback, fails = SFACallback(every=2), Fails(4)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(*((fails, callback) if before else (callback, fails)), keep, max_epochs=2)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert saved["callbacks"]["SFACallback"]["sfa"]["merges"] == (1 if before else 2)
    module = Module()
    fit(SFACallback(every=2), module=module, max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt")
    assert equal(dict(module.state_dict()), dict(by_hand(8, [2, 4, 6, 8], beta=0.5)[0]))


def test_training_that_ends_early_merges_once_more(tmp_path: Path) -> None:
    module, callback = Module(), SFACallback(beta=0.5, p=0.5)
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    stop = EarlyStopping("loss", patience=1, min_delta=100)
    trainer(stop, callback, keep, max_epochs=100, num_sanity_val_steps=0).fit(module, loader(4), loader(1))
    assert (callback.sfa.step_count, callback.sfa.merges, callback.sfa.last_merge_step) == (8, 1, 8)
    on_disk = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert equal(dict(on_disk), dict(by_hand(8, [])[0]))  # a run that resumes would not have stopped here
    assert equal(dict(module.state_dict()), dict(by_hand(8, [8], beta=0.5)[0]))


def test_a_checkpoint_of_the_end_of_training_goes_on(tmp_path: Path) -> None:
    """It holds the merge that ended training, and is no reason to merge no more."""
    ended = fit(SFACallback(every=4), Stops(3), max_epochs=2)
    ended.save_checkpoint(tmp_path / "end.ckpt")
    assert equal(dict(ended.lightning_module.state_dict()), dict(by_hand(3, [3], beta=0.5)[0]))
    callback, module = SFACallback(every=4), Module()
    fit(callback, module=module, max_epochs=2, ckpt_path=tmp_path / "end.ckpt")  # Lightning says that the epoch is over
    assert equal(dict(module.state_dict()), dict(by_hand(7, [3, 4, 7], beta=0.5)[0]))
    assert (callback.sfa.step_count, callback.sfa.merges, callback.sfa.finished) == (7, 3, True)


def test_every_fit_is_a_task(tmp_path: Path) -> None:
    module, callback = Module(), SFACallback(beta=1.0, p=1.0)
    start = copy.deepcopy(module.state_dict())
    fitting = fit(callback, module=module, max_epochs=1)
    assert equal(dict(module.state_dict()), dict(start))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    second = copy.deepcopy(module.state_dict())

    fitting.fit_loop.max_epochs = 3  # the same trainer goes on: two epochs are left
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fitting.callbacks.append(keep)
    fitting.fit(module, loader(4))
    assert (fitting.global_step, callback.sfa.step_count, callback.sfa.total_steps, callback.sfa.merges) == (12, 8, 8, 1)
    assert equal(dict(module.state_dict()), dict(second))

    resumed, again = SFACallback(beta=1.0, p=1.0), Module()
    fit(resumed, module=again, max_epochs=3, ckpt_path=tmp_path / "step=7.ckpt")
    assert (resumed.sfa.step_count, resumed.sfa.total_steps) == (8, 8)
    assert equal(dict(again.state_dict()), dict(second))

    with torch.no_grad():
        module.network[0].bias.add_(1)
    third = copy.deepcopy(module.state_dict())
    fit(callback, module=module, max_epochs=1, batches=2)  # a new trainer, with fewer data
    assert (callback.sfa.step_count, callback.sfa.total_steps) == (2, 2)
    assert equal(dict(module.state_dict()), dict(third))
    fitting = fit(callback, module=module, max_steps=3)
    fitting.fit_loop.epoch_loop.max_steps = 5
    fitting.fit(module, loader(4))
    assert (fitting.global_step, callback.sfa.total_steps, callback.sfa.merges) == (5, 2, 1)
    fit(callback, module=(other := Module(seed=5)), max_epochs=1)  # another module
    assert equal(dict(other.network.state_dict()), dict(network(5).state_dict()))


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 1, "max_steps": 7}, 4),
        ({"max_epochs": -1, "max_steps": 2}, 2),
        ({"max_steps": 2}, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"fast_dev_run": 2}, 2),
        ({"max_steps": 3, "batches": torch.utils.data.DataLoader(Unsized(), batch_size=None)}, 3),
    ],
)
def test_the_length_of_a_task_is_what_lightning_estimates(training: dict[str, Any], expected: int) -> None:
    callback = SFACallback(p=1.0)
    fitted = fit(callback, **training)
    assert callback.sfa.total_steps == expected == fitted.estimated_stepping_batches == fitted.global_step
    assert (callback.sfa.merges, callback.sfa.last_merge_step) == (1, expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ((), {"max_epochs": 2, "batches": torch.utils.data.DataLoader(Unsized(), batch_size=None)}),
        lambda: ((), {"max_epochs": -1}),
        lambda: ((), {"max_epochs": 2, "module": TwoOptimizers()}),
        lambda: ((GradientAccumulationScheduler({1: 2}),), {"max_epochs": 2}),
    ],
)
def test_a_task_of_unknown_length(build: Callable[[], tuple[tuple[Callback, ...], dict[str, Any]]]) -> None:
    others, training = build()
    with pytest.raises(MergeError, match=r"can't know how many steps.*pass total_steps, or every"):
        fit(SFACallback(p=0.5), *others, **training)
    others, training = build()
    callback = SFACallback(p=0.5, total_steps=4)
    fit(callback, *others, Stops(4), **training)
    assert (callback.sfa.every, callback.sfa.total_steps) == (2, 4)
    assert callback.sfa.last_merge_step == callback.sfa.step_count


def test_several_optimizers_in_one_batch_are_one_step() -> None:
    callback, module = SFACallback(every=4), TwoOptimizers()
    watch = Watch(callback)
    fitted = fit(callback, watch, module=module, max_epochs=3)
    assert (fitted.global_step, callback.sfa.step_count) == (18, 9)  # 12 batches, 3 of them without a step
    assert watch.merges == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert (callback.sfa.merges, callback.sfa.last_merge_step) == (3, 9)  # and when training ended


def test_a_checkpoint_without_an_anchor(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(keep, max_epochs=1)
    with pytest.raises(MergeError, match=r"step=2\.ckpt has no anchor, .*load_from_checkpoint"):
        fit(SFACallback(), max_epochs=1, ckpt_path=tmp_path / "step=2.ckpt")


def test_a_checkpoint_of_weights_alone(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=True)
    fit(SFACallback(every=2), keep, max_epochs=1)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert "callbacks" not in saved
    assert equal(dict(saved["state_dict"]), dict(by_hand(2, [2], beta=0.5)[0]))


def test_a_checkpoint_of_a_task_of_another_length(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(SFACallback(), keep, max_epochs=1)
    callback = SFACallback()
    with pytest.raises(MergeError, match="of a task of 4 steps, but with this Trainer it has 8"):
        fit(callback, max_epochs=2, ckpt_path=tmp_path / "step=2.ckpt")
    fit(callback, max_epochs=2)  # what was loaded is forgotten
    assert (callback.sfa.step_count, callback.sfa.merges) == (8, 4)
    callback = SFACallback(total_steps=4)
    fit(callback, max_epochs=1, ckpt_path=tmp_path / "step=2.ckpt")
    assert callback.sfa.last_merge_step == 4


def test_an_anchor_file_that_is_missing(tmp_path: Path) -> None:
    keep, anchor = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1), tmp_path / "anchor.safetensors"
    fit(SFACallback(anchor=anchor), keep, max_epochs=1)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["SFACallback"]["sfa"]
    assert not any(isinstance(value, dict) and any(map(torch.is_tensor, value.values())) for value in state.values())
    anchor.unlink()
    with pytest.raises(MergeError, match="anchor"):
        fit(SFACallback(anchor=anchor), module=Module(seed=1), max_epochs=1, ckpt_path=tmp_path / "step=2.ckpt")


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    callback, module = SFACallback(every=3), Module()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fitting = trainer(callback, keep, max_epochs=1)
    fitting.validate(module, loader(1), verbose=False)
    assert callback.state_dict() == {}
    with pytest.raises(MergeError, match="before training has started"):
        callback.sfa  # noqa: B018
    fitting.fit(module, loader(4), loader(1))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(callback.state_dict())
    fitting.test(module, loader(1), ckpt_path=str(tmp_path / "step=2.ckpt"), verbose=False)
    assert not equal(dict(module.state_dict()), dict(weights))
    assert equal(callback.state_dict(), state)
    fit(callback, module=module, max_epochs=1)  # nor is what was loaded to test a checkpoint to resume
    assert callback.sfa.step_count == 4


def test_layers_that_are_made_late_and_compiled_ones() -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__()
            del self.network

        def configure_model(self) -> None:
            if not hasattr(self, "network"):
                self.network = network()

    module, callback = Late(), SFACallback(every=4)
    fit(callback, module=module, max_epochs=1)
    assert equal(dict(module.state_dict()), dict(by_hand(4, [4], beta=0.5)[0]))
    module = Module()
    module.network = torch.compile(module.network, backend="eager")
    callback = SFACallback(every=4)
    fit(callback, module=module, max_epochs=1)
    assert sorted(callback.sfa.state_dict()["anchor"])[0] == "network.0.bias"
    assert torch.equal(next(module.parameters()), by_hand(4, [4], beta=0.5)[0]["network.0.weight"])


def test_layers_that_are_unfrozen_between_epochs() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.network[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                pl_module.network[0].requires_grad_(True)

    module, callback, watch = Module(), SFACallback(beta=1.0, every=6), Watch()
    start = copy.deepcopy(module.state_dict())
    fit(callback, Unfreeze(), watch, module=module, max_epochs=2)
    frozen = [torch.equal(weights["network.0.weight"], start["network.0.weight"]) for weights in watch.weights]
    assert frozen == [True, True, True, True, False, True, False, True]  # merged after step 6, and at the end
    assert equal(dict(module.state_dict()), dict(start))


def test_a_lora_adapter_is_merged_exactly_and_resumes(tmp_path: Path) -> None:
    class Adapted(Module):
        def __init__(self) -> None:
            super().__init__()
            self.network.requires_grad_(False)
            self.network[0].lora_A, self.network[0].lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
            nn.init.zeros_(self.network[0].lora_B.weight)
            self.network[0].register_forward_hook(lambda part, given, out: out + part.lora_B(part.lora_A(given[0])))

    module, callback = Adapted(), SFACallback(beta=0.5, every=2)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    watch = Watch()
    fit(watch, callback, keep, module=module, max_epochs=1)
    before, after = watch.weights[1], torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(after["network.0.lora_A.weight"], before["network.0.lora_A.weight"])
    assert torch.equal(after["network.0.lora_B.weight"], before["network.0.lora_B.weight"] / 2)
    again, resumed = Adapted(), SFACallback(beta=0.5, every=2)
    fit(resumed, module=again, max_epochs=1, ckpt_path=tmp_path / "step=1.ckpt")
    assert equal(dict(again.state_dict()), dict(module.state_dict()))
    assert (resumed.sfa.lora, resumed.sfa.merges) == ("exact", 2)


def test_bad_settings_are_found_before_training() -> None:
    for options, message in [
        ({"beta": 2.0}, "beta"),
        ({"p": 0.5, "every": 2}, "both p and every"),
        ({"method": "fisher"}, "fisher"),
        ({"nonfinite": "hide"}, "nonfinite"),
    ]:
        watch = Watch()
        with pytest.raises(MergeError, match=message):
            fit(SFACallback(**options), watch, max_epochs=1)
        assert watch.weights == []
    with pytest.raises(MergeError, match="optimizer_state is not offered"):
        SFACallback(optimizer_state="reset")


def test_weights_that_are_not_finite() -> None:
    class Spoils(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                pl_module.network[0].bias.data[0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"step 2.*\n.*network.0"):
        fit(SFACallback(every=1), Spoils(), max_epochs=1)


def test_strategies_that_are_refused() -> None:
    callback = SFACallback()
    from pytorch_lightning.strategies import FSDPStrategy

    fitting = trainer(callback, max_epochs=1)
    fitting.strategy.__class__ = type("Fake", (FSDPStrategy,), {})
    with pytest.raises(MergeError, match="Fake keeps the parameters"):
        callback.on_train_start(fitting, Module())


DISTRIBUTED = """
import logging, os, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mergekit_cl import merge
from mergekit_cl.adapters.lightning import SFACallback

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = torch.randn(2, 5, 8, 4, generator=torch.Generator().manual_seed(0))  # of both processes, for five steps
labels = torch.arange(80).view(2, 5, 8) % 3
loader = torch.utils.data.DataLoader(range(8), batch_size=None)  # four steps for each process


class Module(lightning.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))

    def training_step(self, _):
        at = self.global_rank, self.global_step % 5
        return nn.functional.cross_entropy(self.network(images[at]), labels[at])

    def validation_step(self, _):
        self.network(images[0, 0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Sharded(Module):
    def configure_model(self):
        if not isinstance(self.network[0].weight, DTensor):
            fully_shard(self.network[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def gathered(module):
    return {
        name: (t.full_tensor() if isinstance(t := p.detach(), DTensor) else t).clone() for name, p in module.named_parameters()
    }


class ByHand(Callback):
    \"\"\"Merges gathered weights with merge(), and writes them back.\"\"\"

    def on_train_start(self, trainer, module):
        self.anchor = gathered(module)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step in (3, 6, 8):
            merged = merge([self.anchor, gathered(module)], beta=0.4)
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if isinstance(parameter, DTensor):
                        merged[name] = distribute_tensor(merged[name], parameter.device_mesh, parameter.placements)
                    parameter.copy_(merged[name])


def fit(module, strategy, *callbacks, ckpt_path=None):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False, enable_progress_bar=False,
        num_sanity_val_steps=1, enable_model_summary=False, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def equal(one, other):
    one, other = gathered(one), gathered(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def check(name, sound):
    if not sound:
        raise SystemExit(f"FAILED: {name}")
    sys.stdout.write(f"passed: {name}\\n")
    sys.stdout.flush()


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def fsdp(sharded=True):
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=sharded)


other = os.fork()  # one import serves both processes
os.environ["LOCAL_RANK"] = "0" if other else "1"
for kind, strategies in (
    (Module, {"ddp": (ddp, "memory", [4]), "ddp, a file": (ddp, folder / "anchor.safetensors", [6])}),  # step 6 was merged
    (
        Sharded,
        {
            "fsdp2": (fsdp, "memory", [4, 6]),
            "fsdp2, a folder": (fsdp, folder / "anchor", [4]),
            "fsdp2, one file": (lambda: fsdp(False), "cpu", [6]),
        },
    ),
):
    fit(by_hand := kind(), ddp() if kind is Module else fsdp(), ByHand())
    for name, (strategy, anchor, interrupted) in strategies.items():
        callback = SFACallback(beta=0.4, every=3, anchor=anchor)
        keep = ModelCheckpoint(folder / name, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = fit(module := kind(), strategy(), callback, keep)
        check(f"{name}: steps", (callback.sfa.step_count, callback.sfa.merges, trainer.world_size) == (8, 3, 2))
        check(f"{name}: equal to merge()", equal(module, by_hand))
        for step in interrupted:
            resumed = SFACallback(beta=0.4, every=3, anchor=anchor)
            fit(again := kind(seed=1), strategy(), resumed, ckpt_path=str(folder / name / f"step={step}.ckpt"))
            check(f"{name}: resumed after step {step}", equal(again, by_hand) and resumed.sfa.merges == 3)
    if kind is Module:  # a second task: both processes have the anchor in one file
        callback.sfa.beta = 1.0
        fit(module, ddp(), callback)
        check("ddp: a second task", equal(module, by_hand) and callback.sfa.merges == 3)
        rolling = {"every": 2, "policy": "rolling", "anchor": folder / "rolling.safetensors"}
        keep = ModelCheckpoint(folder / "rolling", "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(module, ddp(), SFACallback(**rolling), keep)
        fit(again := kind(seed=1), ddp(), SFACallback(**rolling), ckpt_path=str(folder / "rolling" / "step=3.ckpt"))
        check("ddp: resumed right before a merge that replaces the anchor", equal(again, module))
if other and os.waitpid(other, 0)[1]:
    raise SystemExit("FAILED: the other process")
"""


def test_two_processes(tmp_path: Path) -> None:
    """DDP, and FSDP2 with Lightning's ModelParallelStrategy, each against merge() of the gathered weights; and resumed."""
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    training = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, **common},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = training.communicate(timeout=280)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(training.pid, signal.SIGKILL)
    assert training.returncode == 0, printed
    assert printed.count("passed:") == 2 * 18, printed
