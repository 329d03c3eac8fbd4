"""What image-text scorers are judged by: minimal changes (EqBen, Winoground), foils (VALSE), retrieval.

Each `compute` gives a dict of tensors. Ties and NaN count as wrong, as in `functional.pair_group_scores`.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_methods.functional import GroupScores, embedding_recall, eqben_subset_scores
from lightning_methods.functional._eqsim_checks import (
    check_floating,
    check_matrix,
    check_numbers,
    check_same_shape,
    check_sizes,
    group_hits,
)
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_range


class PairGroupScore(Metric):
    """Winoground's text, image and group score of quadruples, by subset and as the mean over the subsets.

    `compute` gives "text", "image" and "group", each (num_subsets,), or a scalar for one, and NaN for a subset without
    quadruples; and "mean_text", "mean_image" and "mean_group" over the other subsets. A pooled mean over quadruples
    would be that of the largest subset. What they mean is in `functional.pair_group_scores`.

    Each quadruple counts as often as it comes, also where a sampler repeats some to share them out evenly; see
    `EqBenScore` for repeats that do not count.

    Args:
        num_subsets: At least 1.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `num_subsets` is below 1, or scores and subsets do not fit.

    Example:
        >>> import torch
        >>> metric = PairGroupScore()
        >>> metric.update(*torch.tensor([[3.0, 3.0], [1.0, 3.0], [4.0, 1.0], [5.0, 5.0]]))
        >>> {name: value.item() for name, value in metric.compute().items() if name.startswith("mean")}
        {'mean_text': 0.5, 'mean_image': 0.5, 'mean_group': 0.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    text: Tensor
    image: Tensor
    group: Tensor
    total: Tensor

    def __init__(self, num_subsets: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("num_subsets", num_subsets, 1, math.inf)
        self.num_subsets = num_subsets
        for name in ("text", "image", "group", "total"):
            self.add_state(name, torch.zeros(num_subsets, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, s00: Tensor, s01: Tensor, s10: Tensor, s11: Tensor, subset: Tensor | None = None) -> None:
        """Count quadruples.

        Args:
            s00: Scores of image 0 with text 0, floating, any shape.
            s01: Image 0 with text 1, same shape.
            s10: Image 1 with text 0, same shape.
            s11: Image 1 with text 1, same shape.
            subset: Number of each quadruple's subset, integers in [0, num_subsets), same shape; None: all in the first.
        """
        check_same_shape(s00=s00, s01=s01, s10=s10, s11=s11)
        subset = _subset(subset, s00, self.num_subsets).flatten()
        for name, hit in zip(("text", "image", "group"), group_hits(s00, s01, s10, s11), strict=True):
            getattr(self, name).index_add_(0, subset, hit.flatten().long())
        self.total.index_add_(0, subset, torch.ones_like(subset))

    def compute(self) -> dict[str, Tensor]:
        """The scores, in [0, 1]."""
        return _with_means(GroupScores(*(hits / self.total for hits in (self.text, self.image, self.group))))


class EqBenScore(Metric):
    """The scores of `PairGroupScore` from single scored pairs in any order, as EqBen's annotation lists them.

    The four pairs of a quadruple may come on different ranks. A pair that comes twice, as where a sampler repeats some
    to share them out evenly, counts once.

    Args:
        num_subsets: At least 1; EqBen has 7.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `num_subsets` is below 1, if what is given does not fit, or in `compute` if pairs of some
            quadruples are missing.

    Example:
        >>> import torch
        >>> metric = EqBenScore()
        >>> for corner, score in zip([3, 0, 2, 1], [0.8, 0.9, 0.1, 0.2]):
        ...     metric.update(torch.tensor([score]), torch.tensor([corner]), torch.tensor([7]))
        >>> metric.compute()["mean_group"]
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    score: list[Tensor]
    corner: list[Tensor]
    sample: list[Tensor]
    subset: list[Tensor]

    def __init__(self, num_subsets: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("num_subsets", num_subsets, 1, math.inf)
        self.num_subsets = num_subsets
        for name in ("score", "corner", "sample", "subset"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, score: Tensor, corner: Tensor, sample: Tensor, subset: Tensor | None = None) -> None:
        """Keep scored pairs.

        Args:
            score: Floating, (P,).
            corner: 2 · image + text, integers (P,): 0 to 3 for s00, s01, s10, s11.
            sample: Number of the quadruple, integers (P,).
            subset: Number of its subset, integers (P,) in [0, num_subsets); None: all in the first.
        """
        check_floating("score", score)
        if score.ndim != 1:
            raise ValueError(f"`score` must have shape (P,), got {tuple(score.shape)}")
        for name, numbers in (("corner", corner), ("sample", sample)):
            _check_integers(name, numbers, score)
        self.score.append(score.detach())
        self.corner.append(corner.long())
        self.sample.append(sample.long())
        self.subset.append(_subset(subset, score, self.num_subsets))

    def compute(self) -> dict[str, Tensor]:
        """The scores, in [0, 1]."""
        states = (dim_zero_cat(state) for state in (self.score, self.corner, self.sample, self.subset))
        return _with_means(eqben_subset_scores(*states, num_subsets=self.num_subsets))


class FoilScore(Metric):
    """VALSE's "accuracy", "min_precision" and "pairwise"; what they mean is in `functional.foil_scores`.

    Args:
        threshold: Between no match and match.
        kwargs: Of `torchmetrics.Metric`.

    Warns:
        UserWarning: In `compute`, if scores were no probabilities; then "pairwise" alone is meaningful.

    Raises:
        ValueError: If the scores are not floating or their shapes differ.

    Example:
        >>> import torch
        >>> metric = FoilScore()
        >>> metric.update(torch.tensor([0.9, 0.7, 0.4, 0.8]), torch.tensor([0.2, 0.6, 0.3, 0.9]))
        >>> metric.compute()
        {'accuracy': tensor(0.6250), 'min_precision': tensor(0.5000), 'pairwise': tensor(0.7500)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    captions: Tensor
    foils: Tensor
    pairs: Tensor
    outside: Tensor
    total: Tensor

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        for name in ("captions", "foils", "pairs", "outside", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, caption: Tensor, foil: Tensor) -> None:
        """Count match probabilities of images with their captions and with their foils, of one shape."""
        check_same_shape(caption=caption, foil=foil)
        self.captions += (caption > self.threshold).sum()
        self.foils += (foil < self.threshold).sum()
        self.pairs += (caption > foil).sum()
        for scores in (caption, foil):
            self.outside += ((scores < 0) | (scores > 1)).sum()
        self.total += caption.numel()

    def compute(self) -> dict[str, Tensor]:
        """The scores, in [0, 1]."""
        if self.outside > 0:
            warnings.warn(
                f"{int(self.outside)} scores outside [0, 1] are no probabilities: of the foil scores only 'pairwise' "
                f"is meaningful",
                stacklevel=2,
            )
        captions, foils = self.captions / self.total, self.foils / self.total
        return {
            "accuracy": (captions + foils) / 2,
            "min_precision": torch.minimum(captions, foils),
            "pairwise": self.pairs / self.total,
        }


class EquivarianceGap(Metric):
    """How unequal the opposite changes of quadruples are: what EqSim lowers.

    `compute` gives "text", the mean of |a − b|, and "image", that of |c − d| (see `functional.eqsim_quad_loss`), and
    both divided by the mean margin of matched over mismatched scores, (s00 + s11 − s01 − s10) / 2, as "relative_text"
    and "relative_image". Compare models by the relative ones: shrinking all scores lowers the others. They say nothing
    where the margin is near 0. The division is ours.

    Example:
        >>> import torch
        >>> metric = EquivarianceGap()
        >>> metric.update(*torch.tensor([[0.9], [0.5], [0.7], [0.7]]))  # a = 0.4, b = 0, c = d = 0.2
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'text': 0.4, 'image': 0.0, 'relative_text': 2.0, 'relative_image': 0.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    text: Tensor
    image: Tensor
    margin: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("text", "image", "margin"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, s00: Tensor, s01: Tensor, s10: Tensor, s11: Tensor) -> None:
        """Count quadruples: scores of one shape, image index first."""
        check_same_shape(s00=s00, s01=s01, s10=s10, s11=s11)
        s00, s01, s10, s11 = (scores.to(self.text.dtype) for scores in (s00, s01, s10, s11))
        self.text += ((s00 - s01) - (s11 - s10)).abs().sum()
        self.image += ((s00 - s10) - (s11 - s01)).abs().sum()
        self.margin += (s00 + s11 - s01 - s10).sum() / 2
        self.total += s00.numel()

    def compute(self) -> dict[str, Tensor]:
        """The gaps; NaN before the first quadruple."""
        return {
            "text": self.text / self.total,
            "image": self.image / self.total,
            "relative_text": self.text / self.margin,
            "relative_image": self.image / self.margin,
        }


class RetrievalRecall(Metric):
    """Recall at k between images and texts, from their features; see `functional.embedding_recall`.

    `compute` gives "text_recall@k", the share of images with a text of theirs among the k best, and "image_recall@k",
    the share of texts with their image among the k best, for each k. Images and texts come in any order and on any
    rank, one kind at a time or together. One that comes twice, as where a sampler repeats some to share them out
    evenly, counts once.

    All features stand in memory, but not their similarities: `chunk` rows of them do at a time, some 10 bytes for each
    of their entries in float32.

    Args:
        k: Each at least 1; more than there are candidates means all of them.
        chunk: Images or texts that are compared with all others at a time.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `k` or `chunk` is out of its range or what is given does not fit.

    Example:
        >>> import torch
        >>> metric = RetrievalRecall(k=(1,))
        >>> metric.update(image_features=torch.eye(3), image_ids=torch.tensor([7, 8, 9]))
        >>> texts, of_image = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([7, 7, 8, 9])
        >>> metric.update(text_features=texts, text_ids=of_image, caption_ids=torch.arange(4))
        >>> metric.compute()
        {'text_recall@1': tensor(0.3333), 'image_recall@1': tensor(0.7500)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    image_features: list[Tensor]
    image_ids: list[Tensor]
    text_features: list[Tensor]
    text_ids: list[Tensor]
    caption_ids: list[Tensor]

    def __init__(self, k: Sequence[int] = (1, 5, 10), chunk: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_sizes(k, chunk)
        self.k = tuple(k)
        self.chunk = chunk
        for name in ("image_features", "image_ids", "text_features", "text_ids", "caption_ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        image_features: Tensor | None = None,
        image_ids: Tensor | None = None,
        text_features: Tensor | None = None,
        text_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
    ) -> None:
        """Keep images, texts or both.

        Args:
            image_features: Floating, (N, D); with unit length similarities are cosines.
            image_ids: Number of each image, integers (N,).
            text_features: Floating, (M, D).
            text_ids: Number of the image that each text belongs to, integers (M,).
            caption_ids: Number of the text itself, integers (M,), by which repeats are found.
        """
        images = {"image_features": image_features, "image_ids": image_ids}
        texts = {"text_features": text_features, "text_ids": text_ids, "caption_ids": caption_ids}
        for kind in (images, texts):
            given = {name: values for name, values in kind.items() if values is not None}
            if given and len(given) < len(kind):
                raise ValueError(f"{_named(kind)} come together, got only {_named(given)}")
            for name, values in given.items():
                _check_rows(name, values, given)
                getattr(self, name).append(values.detach())

    def compute(self) -> dict[str, Tensor]:
        """The shares, in [0, 1]."""
        image_ids, caption_ids = dim_zero_cat(self.image_ids), dim_zero_cat(self.caption_ids)
        images, texts = _first_of_each(image_ids), _first_of_each(caption_ids)
        found = embedding_recall(
            dim_zero_cat(self.image_features)[images],
            dim_zero_cat(self.text_features)[texts],
            image_ids[images],
            dim_zero_cat(self.text_ids)[texts],
            k=self.k,
            chunk=self.chunk,
        )
        return {
            f"{name}@{k}": share
            for name, shares in found._asdict().items()
            for k, share in zip(self.k, shares.unbind(), strict=True)
        }


def _with_means(scores: GroupScores) -> dict[str, Tensor]:
    """By subset, and their mean over the subsets that have quadruples."""
    of_subsets = scores._asdict()
    return {**of_subsets, **{f"mean_{name}": shares.nanmean() for name, shares in of_subsets.items()}}


def _subset(subset: Tensor | None, scores: Tensor, num_subsets: int) -> Tensor:
    if subset is None:
        return torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
    _check_integers("subset", subset, scores)
    check_numbers("subset", subset, num_subsets)
    return subset.long()


def _check_integers(name: str, numbers: Tensor, scores: Tensor) -> None:
    check_integer(name, numbers)
    if numbers.shape != scores.shape:
        raise ValueError(
            f"`{name}` must have the shape of the scores {tuple(scores.shape)}, got {tuple(numbers.shape)}"
        )


def _check_rows(name: str, values: Tensor, given: dict[str, Tensor]) -> None:
    features_name, features = next(iter(given.items()))
    if values is features:
        check_matrix(name, values)
        return
    check_integer(name, values)
    if values.shape != features.shape[:1]:
        expected = f"({len(features)},), a number for each row of `{features_name}`"
        raise ValueError(f"`{name}` must have shape {expected}, got {tuple(values.shape)}")


def _named(arguments: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in arguments)


def _first_of_each(ids: Tensor) -> Tensor:
    """Where each number stands for the first time."""
    ordered, order = ids.sort(stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[1:] = ordered[1:] == ordered[:-1]
    return order[~repeated]
