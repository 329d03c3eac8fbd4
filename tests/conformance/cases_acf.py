"""Cases of Ada-ClustFormer: a small Transformer on sequences, and timm's attention on a grid."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import AdaClustFormer
from lightning_methods.testing import Case


class Tagger(LightningModule):
    """Two layers of torch's attention, or of timm's."""

    def __init__(self, timm: bool = False) -> None:
        super().__init__()
        kinds = [Attention(8, num_heads=2) if timm else nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)]
        self.layers, self.head, self.timm = nn.ModuleList(kinds), nn.Linear(8, 3), timm

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = F.layer_norm(x, (8,))
            x = x + (layer(y) if self.timm else layer(y, y, y)[0])
        return self.head(x.mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class PreNorm(Tagger):
    """Two of torch's pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def tagger(timm: bool = False, **settings: object) -> Case:
    torch.manual_seed(0)
    module, batch = Tagger(timm), (torch.randn(8, 9, 8), torch.arange(8) % 3)
    return Case(AdaClustFormer("module.layers.*", **settings), module, batch)


def pre_norm(**settings: object) -> Case:
    torch.manual_seed(0)
    module, batch = PreNorm(), (torch.randn(8, 9, 8), torch.arange(8) % 3)
    return Case(AdaClustFormer("module.layers.*.self_attn", **settings), module, batch)


CASES = {
    "AdaClustFormer": lambda: tagger(init_bias=1.0),
    "AdaClustFormer-timm-grid": lambda: tagger(
        timm=True, kind="grid", grid_size=[2, 4], prefix_tokens=1, init_bias=1.0, normalize=True
    ),
    "AdaClustFormer-alone": lambda: tagger(monotone=False, init_bias=1.0, norm="layer"),
    "AdaClustFormer-residual": lambda: pre_norm(clusters_from="module.layers.*", init_bias=1.0),
}

YAML = {
    "AdaClustFormer": {
        "modules": "module.encoder.layers.*.self_attn",
        "kind": "grid",
        "grid_size": [14, 14],
        "prefix_tokens": 1,
        "init_bias": 4.0,
        "monotone": False,
        "clusters_from": ["module.encoder.layers.*"],
    },
}
