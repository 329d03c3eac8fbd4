"""What gives images and texts their scores: a model of transformers, or a function of the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    """Which image of a sample is scored with which of its texts.

    Args:
        rounds: Pairs of an image's and a text's key in the batch, in the order of the scores. Together the pairs of the
            first round hold every image, and of quadruples every text.
    """

    rounds: tuple[tuple[Key, ...], ...]

    @property
    def pairs(self) -> tuple[Key, ...]:
        """All pairs, in the order of the scores."""
        return tuple(sorted(pair for one in self.rounds for pair in one))


QUADS = Layout(
    rounds=((("image0", "caption0"), ("image1", "caption1")), (("image0", "caption1"), ("image1", "caption0")))
)
SINGLE = Layout(rounds=((("image", "caption"),),))
FOILS = Layout(rounds=((("image", "caption"),), (("image", "foil"),)))


class Scorer(Protocol):
    """What `eval-eqben` asks for scores.

    Attributes:
        transform: What the datamodule should do to images.
        tokenizer: What it should do to texts.
    """

    transform: Any
    tokenizer: Any

    def __call__(self, batch: Mapping[str, Any], layout: Layout) -> Tensor:
        """Scores (B, pairs), float32 on the CPU."""


def load_scorer(model: str, device: torch.device) -> Scorer:
    """The scorer that a string names.

    Args:
        model: "package.module:function", looked for in the current folder too, or a name or folder of transformers.
        device: Where a model of transformers runs; a function sees to that itself.

    Raises:
        ValueError: There is no such function, or the model has no features of images and texts.
        ModuleNotFoundError: The package or transformers is not installed.
        OSError: transformers does not find the model.
    """
    if ":" in model and not Path(model).exists():
        return _FunctionScorer(model)
    return _TransformersScorer(model, device)


class _TransformersScorer:
    """Cosines of a dual encoder; each image and each text of a sample is encoded once."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.transform = self.tokenizer = f"transformers:{name}"
        try:
            from transformers import AutoModel
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'model {name!r} needs transformers, which is not installed: pip install "lightning-methods[text]"; '
                "for a function of yours write package.module:function"
            ) from error
        self.model = AutoModel.from_pretrained(name)
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ValueError(
                f"{name}: {type(self.model).__name__} has no get_image_features and get_text_features; for other "
                "models write a function and give package.module:function"
            )
        self.model.float().eval().to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Any], layout: Layout) -> Tensor:
        images = {
            key: self._unit(self.model.get_image_features(pixel_values=batch[key].to(self.device)))
            for key in dict.fromkeys(image for image, _ in layout.pairs)
        }
        texts = {
            key: self._unit(self.model.get_text_features(**{k: v.to(self.device) for k, v in batch[key].items()}))
            for key in dict.fromkeys(text for _, text in layout.pairs)
        }
        return torch.stack([(images[image] * texts[text]).sum(1) for image, text in layout.pairs], 1).cpu()

    @staticmethod
    def _unit(features: Any) -> Tensor:
        # From version 5 on transformers wraps the features.
        return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=1)


class _FunctionScorer:
    """Scores of the user's function, or cosines of the embeddings that it gives."""

    tokenizer = None

    def __init__(self, path: str) -> None:
        module, _, name = path.partition(":")
        here = str(Path.cwd())  # a console script has its own folder on the path instead
        if here not in sys.path:
            sys.path.insert(0, here)
        function = getattr(import_module(module), name, None)
        if not callable(function):
            raise ValueError(f"{path}: module {module} has no function {name!r}")
        self.path = path
        self.transform = _unchanged
        self.function: Callable[[list[Image.Image], list[str]], Any] = function

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Any], layout: Layout) -> Tensor:
        scores: dict[Key, Tensor] = {}
        images: dict[str, Tensor] = {}
        texts: dict[str, Tensor] = {}
        for pairs in layout.rounds:
            if all(image in images and text in texts for image, text in pairs):
                continue
            result = self._ask([batch[image] for image, _ in pairs], [batch[text] for _, text in pairs])
            if isinstance(result, Tensor):
                scores |= dict(zip(pairs, result.chunk(len(pairs)), strict=True))
            else:
                images |= zip((image for image, _ in pairs), result[0].chunk(len(pairs)), strict=True)
                texts |= zip((text for _, text in pairs), result[1].chunk(len(pairs)), strict=True)
        columns = [
            scores[pair] if pair in scores else (images[pair[0]] * texts[pair[1]]).sum(1) for pair in layout.pairs
        ]
        return torch.stack(columns, 1)

    def _ask(self, images: Sequence[list[Image.Image]], texts: Sequence[list[str]]) -> Tensor | tuple[Tensor, Tensor]:
        """Scores (N,), or unit embeddings of images and texts, (N, D) each."""
        count = sum(map(len, images))
        try:
            result = self.function(list(chain(*images)), list(chain(*texts)))
        except (ValueError, OSError, ImportError) as error:  # which would be shortened to a sentence: show where it was
            raise RuntimeError(f"{self.path} failed") from error
        if isinstance(result, (tuple, list)) and len(result) == 2:
            image, text = (torch.as_tensor(part).float().cpu() for part in result)
            if image.ndim == 2 and image.shape == text.shape and len(image) == count:
                return F.normalize(image, dim=1), F.normalize(text, dim=1)
            found = f"two of shapes {tuple(image.shape)} and {tuple(text.shape)}"
        else:
            scores = torch.as_tensor(result).float().cpu()
            if scores.shape == (count,):
                return scores
            found = f"shape {tuple(scores.shape)}"
        raise ValueError(
            f"{self.path} was given {count} images and {count} texts and should return their scores, ({count},), or "
            f"embeddings of both, ({count}, D) each; it returned {found}"
        )


def _unchanged(image: Image.Image) -> Image.Image:
    return image
