"""A small CLIP of transformers in a plain LightningModule, as anyone would have it, and a tokenizer for it.

They know nothing of EqSim. What adds it to the training is a callback.
"""

import math
from collections.abc import Iterable
from typing import Any

from pytorch_lightning import LightningModule
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from lightning_methods.metrics import EquivarianceGap, PairGroupScore, RetrievalRecall

_SPECIAL = ("[PAD]", "[UNK]", "[BOS]")
_END = "[EOS]"
_LONGEST = 20


def word_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with a token for each word of the captions.

    Args:
        captions: Where the words come from.
    """
    words = [*_SPECIAL, *sorted({word for caption in captions for word in caption.split()}), _END]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, numbers[name]) for name in ("[BOS]", _END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"[BOS] $A {_END}", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": _END}
    make: Any = PreTrainedTokenizerFast  # of which transformers does not say the types
    made: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, model_max_length=_LONGEST, **names)
    return made


class LitCLIP(LightningModule):
    """Trains CLIP with its own contrastive loss on batches {"image", "text", ...}, "text" as tokenized.

    Evaluations have three loaders: quadruples, of which it logs the shares that are right (means over the subsets) and
    how unequal their opposite changes are; images, and texts, among which each looks for its counterpart.

    Args:
        num_words: Size of the tokenizer; its last word ends a text.
        num_subsets: Subsets of the quadruples.
        image_size: Side of the images.
        width: Width of both transformers, which have two layers each.
        scale: What cosines are multiplied with in the loss; None: learned, as CLIP does.
        lr: Highest learning rate, after a tenth of the steps.
        weight_decay: Weight decay.
    """

    def __init__(
        self,
        num_words: int,
        num_subsets: int = 7,
        image_size: int = 32,
        width: int = 64,
        scale: float | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.lr = lr
        self.weight_decay = weight_decay
        size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": num_words - 1}
        text = {**size, **ids, "vocab_size": num_words, "max_position_embeddings": _LONGEST}
        vision = {**size, "image_size": image_size, "patch_size": 8}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width // 2))
        self.shares, self.gap, self.recall = PairGroupScore(num_subsets), EquivarianceGap(), RetrievalRecall(k=(1,))

    def forward(self, image: Tensor, text: dict[str, Tensor]) -> Any:
        """CLIP's output, with its loss, for images and texts that belong together row by row."""
        return self.clip(pixel_values=image, **text, return_loss=True)

    def on_fit_start(self) -> None:
        """Called before the training, when weights have been loaded: sets the scale and holds it."""
        if self.scale is not None:
            self.clip.logit_scale.requires_grad_(False).fill_(math.log(self.scale))

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """The contrastive loss of a batch."""
        loss: Tensor = self(batch["image"], batch["text"]).loss
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Adds a batch of quadruples, images or texts to the metrics."""
        if dataloader_idx == 0:
            images = [self._image(batch[key]) for key in ("image0", "image1")]
            texts = [self._text(batch[key]) for key in ("caption0", "caption1")]
            s00, s01, s10, s11 = ((image * text).sum(1) for image in images for text in texts)
            self.shares.update(s00, s01, s10, s11, subset=batch["subset"])
            self.gap.update(s00, s01, s10, s11)
        elif dataloader_idx == 1:
            self.recall.update(self._image(batch["image"]), batch["image_id"])
        else:
            text = self._text(batch["text"])
            self.recall.update(text_features=text, text_ids=batch["image_id"], caption_ids=batch["text_id"])

    def on_validation_epoch_end(self) -> None:
        """Called after the last batch: logs the metrics."""
        shares, gap, recall = self.shares.compute(), self.gap.compute(), self.recall.compute()
        self.log_dict({name: shares[f"mean_{name}"] for name in ("group", "text", "image")})
        self.log("gap", (gap["relative_text"] + gap["relative_image"]) / 2)
        self.log("recall", (recall["text_recall@1"] + recall["image_recall@1"]) / 2)
        for metric in (self.shares, self.gap, self.recall):
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def _image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    def _text(self, text: dict[str, Tensor]) -> Tensor:
        return F.normalize(self.clip.get_text_features(**text).pooler_output, dim=1)

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate rises and falls once over the training."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.lr, steps, pct_start=0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
