from functools import partial

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer


class Recorder(LightningModule):
    """Keeps the batches that each kind of step was given."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.LazyLinear(1)
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.head(batch[0].flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)
        self.head(batch[0].flatten(1))

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)
        self.head(batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def trainer():
    """Builds a quiet Trainer for one epoch on the CPU."""
    return partial(
        Trainer,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def model():
    return Recorder()
