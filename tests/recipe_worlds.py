"""For each recipe in `callbacks/` a module that is unaware of every method, and its data, as the recipe names them."""

import torch
from PIL import Image
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_methods.modules import FrameScores, save_frame_scores


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


def encoder(width):
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


class Tagger(Sgd):
    """A Transformer encoder over sequences."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = encoder(8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        return F.cross_entropy(self.head(self.encoder(tokens).mean(1)), labels)


class Sequences(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(torch.rand(9, 8), label % 3) for label in range(4)], batch_size=2)


class VideoText(Sgd):
    """Fuses 5 words, a video's [CLS], and 8 frames of 49 patches; knows a feature of each video and text, too."""

    def __init__(self):
        super().__init__()
        self.fusion = nn.ModuleDict({"layers": nn.ModuleList(encoder(8).layers)})
        self.video_proj, self.text_proj, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 3)

    def forward(self, video, text):
        self.video_proj(video.mean(1)), self.text_proj(text.mean(1))
        fused = torch.cat([text, video.mean(1, keepdim=True), video], 1)
        for layer in self.fusion["layers"]:
            fused = layer(fused)
        return self.head(fused[:, 0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["video"], batch["text"]), batch["label"])


class Videos(LightningDataModule):
    def train_dataloader(self):
        rows = [{"video": torch.rand(8 * 49, 8), "text": torch.rand(5, 8), "label": label % 3} for label in range(4)]
        return DataLoader(rows, batch_size=2)


class Segments(Sgd):
    """Classifies the frames of a clip, and takes the mean of their logits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))

    def training_step(self, batch, batch_idx):
        videos, labels = batch
        return F.cross_entropy(self.net(videos.flatten(0, 1)).unflatten(0, videos.shape[:2]).mean(1), labels)


class Clips(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(torch.rand(2, 3, 224, 224), label) for label in range(4)], batch_size=2)


def write_hmdb51(folder):
    """The training list, the frames and their scores, of three videos."""
    keys = []
    for video in range(3):
        frames = folder / "hmdb51" / "rawframes" / f"class/v{video}"
        frames.mkdir(parents=True)
        for frame in range(2):
            Image.new("RGB", (24, 18), (80 * video, 120 * frame, 0)).save(frames / f"frame{frame + 1:06d}.jpg")
            keys.append(f"class/v{video}/frame{frame + 1:06d}.jpg")
    (folder / "hmdb51" / "trainlist01.txt").write_text("".join(f"class/v{video} 2 {video}\n" for video in range(3)))
    probs = torch.linspace(0.3, 0.9, len(keys))
    save_frame_scores(folder / "hmdb51" / "frame_scores.npz", FrameScores(keys, probs, probs))


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


class DualEncoder(Sgd):
    """Contrasts images with texts at a learned scale."""

    def __init__(self):
        super().__init__()
        self.image_encoder, self.text_encoder = nn.Linear(8, 4), nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch, batch_idx):
        image, text = self.image_encoder(batch["image"]), self.text_encoder(batch["text"])
        logits = self.logit_scale.exp() * F.normalize(image) @ F.normalize(text).T
        return F.cross_entropy(logits, torch.arange(len(logits)))


class Pairs(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"image": torch.rand(8), "text": torch.rand(6)} for _ in range(12)], batch_size=6)


#: Module and data by the recipe's name.
WORLDS = {
    "acf": (Tagger, Sequences),
    "eqsim": (DualEncoder, Pairs),
    "ikl": (Student, Images),
    "proreg": (Student, Images),
    "twbert": (VideoText, Videos),
    "stillmix": (Segments, Clips),
    "umil": (Detector, Bags),
}
