"""ProReg on a CLIP of transformers, in a LightningModule that knows nothing of the package."""

import copy

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

from lightning_methods.callbacks import ProReg
from lightning_methods.functional import fill_prompts, prompt_text_features, proreg_loss
from lightning_methods.testing._case import Batches

transformers = pytest.importorskip("transformers")

NAMES = ["dog", "guitar", "house"]
_GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(8, 3, 8, 8, generator=_GENERATOR)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def clip():
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 40, "eos_token_id": 63, "bos_token_id": 62},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


def tokens(sentence):
    """A tokenizer of characters."""
    return torch.tensor([[62, *(ord(letter) % 60 for letter in sentence), 63]])


def sentences(templates=("a photo of a", "a sketch of a {}!")):
    return fill_prompts(NAMES, templates)


@torch.no_grad()
def text_features(model, templates):
    encoded = [
        torch.cat([_embeds(model.get_text_features(input_ids=tokens(one))) for one in of_class])
        for of_class in sentences(templates)
    ]
    return prompt_text_features(torch.stack(encoded))


def _embeds(output):
    """Newer releases wrap what older ones return as a tensor."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class LitCLIP(LightningModule):
    """Fine-tunes a vision tower under a head that begins as the text features."""

    def __init__(self, model, features):
        super().__init__()
        self.vision_model, self.projection = copy.deepcopy((model.vision_model, model.visual_projection))
        self.head = nn.Parameter(features.clone())
        self.log_scale = nn.Parameter(model.logit_scale.detach().clone())

    def forward(self, images):
        pooled = self.vision_model(pixel_values=images).pooler_output
        return self.log_scale.exp() * F.normalize(self.projection(pooled)) @ F.normalize(self.head).T

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["pixel_values"]), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class LitVision(LightningModule):
    """The same with transformers' own model of a vision tower and its projection."""

    def __init__(self, model, features):
        super().__init__()
        self.visual = transformers.CLIPVisionModelWithProjection(model.config.vision_config)
        own = self.visual.state_dict().keys()
        self.visual.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
        self.visual.eval()
        self.head = nn.Parameter(features.clone())
        self.log_scale = nn.Parameter(model.logit_scale.detach().clone())

    def forward(self, images):
        features = self.visual(pixel_values=images).image_embeds
        return self.log_scale.exp() * F.normalize(features) @ F.normalize(self.head).T

    training_step = LitCLIP.training_step
    configure_optimizers = LitCLIP.configure_optimizers


def fit(module, method):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    batches = [{"pixel_values": IMAGES[rows], "labels": LABELS[rows]} for rows in (slice(4), slice(4, 8))]
    Trainer(max_epochs=2, accelerator="cpu", callbacks=[method], **quiet).fit(module, Batches(batches))


def by_hand(module, zero_shot):
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for rows in (slice(4), slice(4, 8)):
            loss = proreg_loss(module(IMAGES[rows]), zero_shot[rows], LABELS[rows], alpha=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module


@torch.no_grad()
def zero_shot_logits(model):
    """transformers' own, for one prompt a class."""
    rows = [tokens(one[0]) for one in sentences("this is")]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (0, width - row.shape[1]), value=63) for row in rows])
    return model(input_ids=ids, pixel_values=IMAGES).logits_per_image


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LitCLIP, {"snapshot": "module"}),
        (LitVision, {"snapshot": "module"}),
        (LitVision, {"snapshot": "module.visual:image_embeds", "text_features": "module.head"}),
        (LitVision, {"prompt": "zero-shot", "inputs": "batch.pixel_values"}),
    ],
)
def test_prompts_are_the_zero_shot_logits_of_transformers(kind, settings):
    model = clip()
    features = text_features(model, "this is")
    expected = zero_shot_logits(model)
    if "text_features" in settings:
        settings = {**settings, "logit_scale": model.logit_scale.exp().item()}
    if "prompt" in settings:
        frozen = LitCLIP(model, features)
        settings = {**settings, "prompt": frozen}
    module, start = kind(model, features), kind(model, features)
    torch.testing.assert_close(start(IMAGES), expected, rtol=1e-4, atol=1e-4)
    fit(module, ProReg(target="batch.labels", alpha=2.0, **settings))
    hand = by_hand(start, expected)
    for (name, value), other in zip(module.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert (module.head - features).abs().max() > 1e-3


def test_an_ensemble_of_templates_is_a_mean_of_directions():
    model = clip()
    both = text_features(model, ["this is", "a sketch of a {}!"])
    one, other = (text_features(model, template) for template in ("this is", "a sketch of a {}!"))
    torch.testing.assert_close(both, F.normalize(one + other, dim=1))
