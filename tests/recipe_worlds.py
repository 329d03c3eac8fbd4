"""For each recipe in `callbacks/` a module that is unaware of every method, and its data, as the recipe names them."""

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Sgd(LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Student(Sgd):
    """CIFAR-100 sized."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 100))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)


class Images(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(torch.rand(3, 32, 32), label) for label in range(4)], batch_size=2)


class Detector(Sgd):
    """One logit for each snippet of a bag."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(512, 1)

    def forward(self, features):
        return self.head(features)

    def training_step(self, batch, batch_idx):
        highest = self(batch["features"]).squeeze(-1).amax(1)
        return F.binary_cross_entropy_with_logits(highest, batch["label"].float())


class Bags(LightningDataModule):
    def train_dataloader(self):
        bags = [{"features": torch.rand(8, 512), "label": number % 2, "vid": number} for number in range(4)]
        return DataLoader(bags, batch_size=2)


#: Module and data by the recipe's name.
WORLDS = {
    "ikl": (Student, Images),
    "umil": (Detector, Bags),
}
