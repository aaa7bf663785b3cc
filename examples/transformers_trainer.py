"""Teach a small Vision Transformer digits the right way up, then turned by 90 degrees: SFA in Hugging Face's Trainer."""

import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from mergekit_cl.adapters.transformers import SFACallback
from mergekit_cl.demo import rotated_digits, score

torch.manual_seed(0)
torch.set_num_threads(1)
tasks = rotated_digits(seed=0)[:2]
digits: dict[str, Any] = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = ViTForImageClassification(ViTConfig(**digits, **size))


def classify(images: torch.Tensor) -> torch.Tensor:
    """Return the scores of the ten digits."""
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(images.view(-1, 1, 28, 28)).logits
    return scores


with tempfile.TemporaryDirectory() as folder:
    for number, task in enumerate(tasks):
        arguments = TrainingArguments(
            f"{folder}/task-{number + 1}", max_steps=150, per_device_train_batch_size=64, learning_rate=3e-3,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        images = task.train_images.view(-1, 1, 28, 28)
        data = [{"pixel_values": image, "labels": digit} for image, digit in zip(images, task.train_digits, strict=True)]
        callbacks = [SFACallback(beta=0.25, p=0.25)] if number else []  # there is something to forget from the second task on
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        print(f"after task {number + 1}:", *(f"task {i + 1} {a:.3f}" for i, a in enumerate(score(classify, tasks))))
