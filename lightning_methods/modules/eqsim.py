"""EqSim with its settings in one place, on the embeddings of a batch."""

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_methods.functional import (
    EqSimTerms,
    cross_modal_consistency_loss,
    eqsim_all_pairs_loss,
    eqsim_close_far_loss,
    eqsim_itm_loss,
    eqsim_sample_close,
    in_modal_consistency_loss,
)
from lightning_methods.functional._eqsim_checks import check_matrix
from lightning_methods.functional._eqsim_criterion import Criterion, Hinge
from lightning_methods.functional._logits import check_choice, check_positive, check_range, upcast
from lightning_methods.functional.eqsim import Activation, ItmActivation
from lightning_methods.modules._repr import changed_arguments

Mode: TypeAlias = Literal["close_far", "close_only", "all_pairs", "itm", "cyclic", "cross_modal", "in_modal"]


class EqSimLoss(nn.Module):
    """EqSim, or a penalty that it is compared with, for a batch of matched embeddings. It has no parameters.

    Modes:

    - "close_far": `functional.eqsim_close_far_loss`, the variant that was released;
    - "close_only": its close part;
    - "all_pairs": `functional.eqsim_all_pairs_loss`;
    - "itm": `functional.eqsim_itm_loss`, of the match scores of a model without embeddings: call `match`;
    - "cross_modal" and "in_modal": `functional.cross_modal_consistency_loss` and `in_modal_consistency_loss` of
      cosines; they read `weight` and `normalize` alone;
    - "cyclic": these two together, in the manner of CyCLIP.

    Args:
        mode: See above.
        activation: "softmax": the scores are the softmax of each image's logits over all texts; None: cosines. In mode
            "itm" all of `functional.eqsim_itm_loss`.
        num_samples: K: hard partners drawn on each side of an anchor, at least 1.
        margin: As in `functional.eqsim_quad_loss`, of the close part or of all pairs.
        weight: At least 0; as there. The losses come weighted.
        far_margin: As in `functional.eqsim_close_far_loss`.
        far_scale: As there.
        text_side: As in `functional.eqsim_quad_loss`, like all that follow but the last.
        image_side: As above.
        group_side: As above.
        hinge: As above.
        positive_reg: As above.
        relative: As above.
        eps: As above.
        normalize: Divide embeddings by their length; one of length 0 stays 0. False takes dot products as they are.

    Raises:
        ValueError: If an argument is out of its range, or no side is on.

    Source:
        Wang et al., "Equivariant Similarity for Vision-Language Foundation Models", ICCV 2023, arXiv 2303.14465.

    Example:
        >>> import torch
        >>> loss = EqSimLoss("all_pairs", activation=None, margin=0.0, weight=1.0)
        >>> image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> loss(image, text, logit_scale=100.0).total  # p = 1 - 0.8, e = 0.6 - 0, and both sides: 2 (p² + e²)
        tensor(0.8000)
    """

    def __init__(
        self,
        mode: Mode = "close_far",
        *,
        activation: ItmActivation | None = "softmax",
        num_samples: int = 4,
        margin: float = 0.1,
        weight: float = 0.5,
        far_margin: float = 0.0,
        far_scale: float = 1.0,
        text_side: bool = True,
        image_side: bool = True,
        group_side: bool = False,
        hinge: Hinge = "mean",
        positive_reg: bool = False,
        relative: bool = False,
        eps: float = 0.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Mode)
        if activation is not None:
            check_choice("activation", activation, ItmActivation if mode == "itm" else Activation)
        check_range("num_samples", num_samples, 1, math.inf)
        check_range("weight", weight, 0, math.inf)
        check_range("far_margin", far_margin, 0, math.inf)
        check_positive(far_scale=far_scale)
        self.mode = mode
        self.activation: Any = activation  # of the type that the mode takes
        self.num_samples = num_samples
        self.far_margin = far_margin
        self.far_scale = far_scale
        self.normalize = normalize
        self.criterion = Criterion(
            text_side, image_side, group_side, margin, weight, hinge, positive_reg, relative, eps
        ).check()

    @property
    def draws(self) -> bool:
        """Whether the mode compares anchors with hard partners, which have to be drawn."""
        return self.mode in ("close_far", "close_only")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        close_index: Tensor | None = None,
        num_anchors: int | None = None,
        exclude: Tensor | None = None,
    ) -> EqSimTerms:
        """The loss of a batch; in modes of one term, that term is `total` and `close`, and `far` is 0.

        Args:
            image_features: Floating, (G, D), in distributed training those of all ranks with the own rows first.
            text_features: Same shape; row i belongs to row i of the images.
            logit_scale: Multiplier that makes logits of cosines, not its logarithm. It is used by the softmax and by
                the draw of the partners.
            close_index: Partners of the anchors, integers (B, K'). None draws them with torch's global generator.
            num_anchors: B, the first B samples are anchors; None: all G. In mode "all_pairs" only pairs of anchors
                count.
            exclude: Boolean (G, G): samples that are not to be compared, such as `ids[:, None] == ids` where several
                texts belong to one image. Not used by the consistency penalties.

        Raises:
            ValueError: If shapes, dtypes or options do not fit, or the batch is too small for `num_samples`.
        """
        if self.mode in ("cyclic", "cross_modal", "in_modal"):
            return self._consistency(image_features, text_features)
        cosines = self.similarities(image_features, text_features)
        logits = cosines * logit_scale
        if self.draws and close_index is None:
            close_index = eqsim_sample_close(
                logits, num_samples=self.num_samples, num_anchors=num_anchors, exclude=exclude
            )
        return self.terms(cosines if self.activation is None else logits, close_index, num_anchors, exclude)

    def similarities(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosines (or dot products) of all images, as rows, with all texts, (G, G), in float32 at least."""
        check_matrix("image_features", image_features)
        check_matrix("text_features", text_features)
        if image_features.shape != text_features.shape:
            expected, found = tuple(image_features.shape), tuple(text_features.shape)
            raise ValueError(f"`text_features` must have the shape of `image_features` {expected}, got {found}")
        image, text = upcast(image_features, text_features)
        if self.normalize:
            image, text = _unit(image), _unit(text)
        with torch.autocast(image.device.type, enabled=False):  # squared differences are below half precision
            return image @ text.T

    def terms(
        self,
        scores: Tensor,
        close_index: Tensor | None = None,
        num_anchors: int | None = None,
        exclude: Tensor | None = None,
    ) -> EqSimTerms:
        """The loss of a given matrix of similarities or, before their softmax, logits; images are rows.

        Args:
            scores: Floating, (G, G); in mode "all_pairs" also (B, G).
            close_index: As in `forward`, but not drawn.
            num_anchors: As in `forward`.
            exclude: As in `forward`.

        Raises:
            ValueError: If shapes, dtypes or options do not fit, if `close_index` is missing, or if the mode takes
                something else.
        """
        if self.draws:
            return self._close_far(scores, close_index, num_anchors, exclude)
        if self.mode == "all_pairs":
            rows = slice(len(scores) if num_anchors is None else num_anchors)
            exclude = None if exclude is None else exclude[rows, rows]
            criterion = self.criterion._asdict()
            return _only(eqsim_all_pairs_loss(scores[rows], activation=self.activation, exclude=exclude, **criterion))
        if self.mode == "cross_modal":
            return _only(cross_modal_consistency_loss(scores, logit_scale=1.0, weight=self.criterion.weight))
        needs = "the four scores of `match`" if self.mode == "itm" else "features: it compares images with images"
        raise ValueError(f"`mode` {self.mode!r} takes no matrix of scores but {needs}")

    def match(self, s00: Tensor, s01: Tensor, s10: Tensor, s11: Tensor) -> EqSimTerms:
        """The loss of match scores, s00 (N,) and the others (N, M) or (N,), in mode "itm".

        Raises:
            ValueError: If shapes or dtypes do not fit, or in another mode.
        """
        if self.mode != "itm":
            raise ValueError(f"`mode` must be 'itm' for match scores, got {self.mode!r}")
        criterion = self.criterion._asdict()
        return _only(eqsim_itm_loss(s00, s01, s10, s11, activation=self.activation, **criterion))

    def extra_repr(self) -> str:
        """The constructor's arguments that differ from the defaults."""
        return changed_arguments(self, {**vars(self), **self.criterion._asdict()})

    def _close_far(
        self, scores: Tensor, close_index: Tensor | None, num_anchors: int | None, exclude: Tensor | None
    ) -> EqSimTerms:
        if close_index is None:
            raise ValueError(f"`close_index` is missing: mode {self.mode!r} compares anchors with given partners")
        if num_anchors is not None and len(close_index) != num_anchors:
            raise ValueError(f"`close_index` must have `num_anchors` rows, {num_anchors}, got {len(close_index)}")
        terms = eqsim_close_far_loss(
            scores,
            close_index,
            activation=self.activation,
            far_margin=self.far_margin,
            far_scale=self.far_scale,
            exclude=exclude,
            **self.criterion._asdict(),
        )
        return terms if self.mode == "close_far" else _only(terms.close)

    def _consistency(self, image_features: Tensor, text_features: Tensor) -> EqSimTerms:
        # With cosines and a scale of 1: the logits' own scale cancels out.
        losses = []
        if self.mode != "in_modal":
            cosines = self.similarities(image_features, text_features)
            losses.append(cross_modal_consistency_loss(cosines, logit_scale=1.0, weight=self.criterion.weight))
        if self.mode != "cross_modal":
            images = self.similarities(image_features, image_features)
            texts = self.similarities(text_features, text_features)
            losses.append(in_modal_consistency_loss(images, texts, logit_scale=1.0, weight=self.criterion.weight))
        return _only(torch.stack(losses).sum())


def _only(loss: Tensor) -> EqSimTerms:
    return EqSimTerms(loss, loss, torch.zeros_like(loss))


def _unit(features: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / length.masked_fill(length == 0, 1)  # 0 stays 0, and its gradient finite
