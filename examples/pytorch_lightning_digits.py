"""Learn to read digits the right way up, then turned by 90 degrees, without forgetting the first: SFA with Lightning."""

import logging
import warnings
from typing import Any

import pytorch_lightning as lightning
import torch

from mergekit_cl.adapters.lightning import SFACallback
from mergekit_cl.demo import network, rotated_digits, score

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*does not have many workers")


class Reader(lightning.LightningModule):
    """A network that reads digits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(seed=0)

    def training_step(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        images, digits = batch
        return torch.nn.functional.cross_entropy(self.network(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


lightning.seed_everything(0, verbose=False)
torch.set_num_threads(1)
tasks = rotated_digits(seed=0)[:2]
module = Reader()

for number, task in enumerate(tasks):
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(task.train_images, task.train_digits), batch_size=64, shuffle=True
    )
    callbacks = [SFACallback(beta=0.35, p=0.25)] if number else []  # there is something to forget from the second task on
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    print(f"after task {number + 1}:", *(f"task {i + 1} {right:.3f}" for i, right in enumerate(score(module.network, tasks))))
