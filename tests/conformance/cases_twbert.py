"""Cases of TW-BERT: a model of two towers, and one that fuses words and patches in one attention."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import AlignBeforeFuse, TrajectoryWordAlignment
from lightning_methods.testing import Case

FRAMES, PATCHES, WORDS = 2, 3, 4


class TwoTowers(LightningModule):
    """Features of whole videos and texts, and of their parts; trained to tell pairs in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.word = nn.Linear(5, 6), nn.Linear(3, 6)
        self.video, self.text = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        return self.video(self.patch(video).tanh().mean(1)) @ self.text(self.word(text).tanh().mean(1)).T

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["video"], batch["text"])
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Matcher(nn.Module):
    """Whether texts belong to videos, from tokens of both."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, text: Tensor, video: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = torch.ones_like(text[..., :1]) if mask is None else mask[..., None].to(text.dtype)
        return self.head(torch.cat([(weights * text).sum(1).tanh(), video.mean(1).tanh()], 1))


class Matched(TwoTowers):
    """The same with a matcher, which by itself sees pairs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.matcher = Matcher()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        pairs = self.matcher(self.word(batch["text"]), self.patch(batch["video"]), batch.get("mask"))
        return super().training_step(batch, batch_idx) + 0.1 * pairs.square().mean()


def two_towers(kind: type[TwoTowers] = TwoTowers) -> tuple[TwoTowers, dict[str, Tensor]]:
    torch.manual_seed(0)
    batch = {
        "video": torch.randn(8, FRAMES * PATCHES, 5),
        "text": torch.randn(8, WORDS, 3),
        "mask": torch.ones(8, WORDS, dtype=torch.long),
    }
    batch["mask"][::2, 2:] = 0
    return kind(), batch


def align(kind: type[TwoTowers] = TwoTowers, **settings: object) -> Case:
    module, batch = two_towers(kind)
    given = {"inputs": ["batch.video", "batch.text"], "queue_size": 20, "momentum": 0.5, **settings}
    return Case(AlignBeforeFuse("module.video", "module.text", **given), module, batch)


class Fusion(LightningModule):
    """Classifies [words; video CLS; patches], fused by torch's attention or by timm's."""

    def __init__(self, timm: bool = False) -> None:
        super().__init__()
        self.attention = Attention(8, num_heads=2) if timm else nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head, self.timm = nn.LayerNorm(8), nn.Linear(8, 3), timm

    def forward(self, x: Tensor) -> Tensor:
        fused = self.attention(x) if self.timm else self.attention(x, x, x)[0]
        return self.head(self.norm(x + fused)[:, 0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fusion(timm: bool = False, **settings: object) -> Case:
    torch.manual_seed(0)
    module, batch = Fusion(timm), (torch.randn(8, WORDS + 1 + FRAMES * PATCHES, 8), torch.arange(8) % 3)
    sizes = {"num_frames": FRAMES, "patches_per_frame": PATCHES}
    return Case(TrajectoryWordAlignment("module.attention", **sizes, **settings), module, batch)


CASES = {
    "TrajectoryWordAlignment": lambda: fusion(norm="module.norm"),
    "TrajectoryWordAlignment-timm": lambda: fusion(timm=True),
    "AlignBeforeFuse": lambda: align(vtc_weight=0.5),
    "AlignBeforeFuse-fine": lambda: align(
        video_tokens="module.patch",
        text_tokens="module.word",
        text_mask="batch.mask",
        num_frames=FRAMES,
        fine_weight=0.5,
        fine_queue_size=12,
    ),
    "AlignBeforeFuse-vtm": lambda: align(
        Matched,
        video_tokens="module.patch#-1",
        text_tokens="module.word#-1",
        text_mask="batch.mask",
        matcher="module.matcher",
    ),
    "AlignBeforeFuse-widths": lambda: align(widths=[8, 8], embed_dim=4, queue_size=0, ema_every="optimizer_step"),
}

YAML = {
    "TrajectoryWordAlignment": {
        "modules": ["module.fusion.0.attention", "module.fusion.1.attention"],
        "num_frames": 8,
        "patches_per_frame": 49,
        "norm": "module.fusion.0.norm",
        "dropout": 0.2,
    },
    "AlignBeforeFuse": {
        "video": "module.video_proj",
        "text": "module.text_proj",
        "inputs": ["batch.video", "batch.text"],
        "widths": [768, 512],
        "video_tokens": "module.video_tokens",
        "text_tokens": "module.text_tokens",
        "matcher": "module.matcher",
        "queue_size": 4096,
        "alpha": 0.2,
    },
}
