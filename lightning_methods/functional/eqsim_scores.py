"""How image-text scorers are judged: EqBen, Winoground, VALSE and retrieval recall. No gradient, any device.

Ties and NaN count as wrong everywhere. Score on logits in float32: probabilities saturate and tie.

Sources: Wang et al., arXiv 2303.14465, and the authors' code, for the EqBen and VALSE scores; the group score is
Winoground's (Thrush et al., CVPR 2022). Where `torch.topk` leaves the order of ties open, recall here is pessimistic,
which is our own choice.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional._eqsim_checks import (
    check_floating,
    check_matrix,
    check_numbers,
    check_same_shape,
    check_sizes,
    group_hits,
)
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import upcast


class GroupScores(NamedTuple):
    """Shares in [0, 1], scalars or one per subset; continuous random scores give 1/4, 1/4 and 1/6."""

    text: Tensor
    image: Tensor
    group: Tensor


class FoilScores(NamedTuple):
    """Shares in [0, 1], scalars."""

    accuracy: Tensor
    min_precision: Tensor
    pairwise: Tensor


class RecallScores(NamedTuple):
    """Shares in [0, 1], one for each k."""

    text_recall: Tensor
    image_recall: Tensor


@torch.no_grad()
def pair_group_scores(s00: Tensor, s01: Tensor, s10: Tensor, s11: Tensor) -> GroupScores:
    """Winoground's text, image and group score of quadruples of two images and two texts.

    - text: each image prefers its text, s00 > s01 and s11 > s10;
    - image: each text prefers its image, s00 > s10 and s11 > s01;
    - group: both.

    Args:
        s00: Scores of image 0 with text 0, floating, any shape; each element is a quadruple.
        s01: Image 0 with text 1, same shape.
        s10: Image 1 with text 0, same shape.
        s11: Image 1 with text 1, same shape.

    Returns:
        Scalars; NaN if there is no quadruple.

    Raises:
        ValueError: If the scores are not floating or their shapes differ.

    Example:
        >>> import torch
        >>> s00, s01, s10, s11 = torch.tensor([[3.0, 3.0], [1.0, 3.0], [4.0, 1.0], [5.0, 5.0]])
        >>> pair_group_scores(s00, s01, s10, s11)
        GroupScores(text=tensor(0.5000), image=tensor(0.5000), group=tensor(0.))
    """
    check_same_shape(s00=s00, s01=s01, s10=s10, s11=s11)
    dtype = upcast(s00, s01, s10, s11)[0].dtype
    return GroupScores(*(hits.to(dtype).mean() for hits in group_hits(s00, s01, s10, s11)))


@torch.no_grad()
def eqben_subset_scores(
    scores: Tensor, corner: Tensor, sample: Tensor, subset: Tensor, *, num_subsets: int
) -> GroupScores:
    """`pair_group_scores` of each subset, from single scored pairs in any order.

    Args:
        scores: Floating, (P,); P is four times the number of quadruples, or more where pairs are repeated (a repeat
            replaces the pair's score).
        corner: Which pair of its quadruple a score belongs to, integers (P,): 2 · image + text, that is 0 to 3 for s00,
            s01, s10, s11.
        sample: Number of the quadruple, integers (P,), unique within its subset.
        subset: Number of the subset, integers (P,) in [0, num_subsets).
        num_subsets: At least 1.

    Returns:
        Shares (num_subsets,); NaN for a subset without quadruples.

    Raises:
        ValueError: If shapes, dtypes or values do not fit, or pairs of some quadruples are missing.

    Example:
        >>> import torch
        >>> scores = torch.tensor([0.9, 0.1, 0.2, 0.8])
        >>> sample, subset = torch.full((4,), 7), torch.full((4,), 1)
        >>> eqben_subset_scores(scores, torch.arange(4), sample, subset, num_subsets=2).text
        tensor([nan, 1.])
    """
    check_floating("scores", scores)
    for name, numbers in (("corner", corner), ("sample", sample), ("subset", subset)):
        check_integer(name, numbers)
        if scores.ndim != 1 or numbers.shape != scores.shape:
            found = f"`scores` {tuple(scores.shape)} and `{name}` {tuple(numbers.shape)}"
            raise ValueError(f"`scores`, `corner`, `sample` and `subset` must have one shape (P,), got {found}")
    check_numbers("corner", corner, 4)
    check_numbers("subset", subset, num_subsets)

    (scores,) = upcast(scores)
    key, quadruple = torch.unique(sample.long() * num_subsets + subset.long(), return_inverse=True)
    position = 4 * quadruple + corner.long()
    table = scores.new_zeros(4 * len(key)).index_put_((position,), scores)
    filled = torch.zeros_like(table, dtype=torch.bool).index_fill_(0, position, True).view(-1, 4).all(1)
    if not filled.all():
        missing = int((~filled).sum())
        raise ValueError(f"`corner` must hold all four pairs of each quadruple, {missing} of {len(key)} are incomplete")
    of_subset = key.remainder(num_subsets)
    count = scores.new_zeros(num_subsets).index_add_(0, of_subset, torch.ones_like(key, dtype=scores.dtype))
    hits = (
        torch.zeros_like(count).index_add_(0, of_subset, hit.to(scores.dtype))
        for hit in group_hits(*table.view(-1, 4).unbind(1))
    )
    return GroupScores(*(hit / count for hit in hits))


@torch.no_grad()
def foil_scores(caption: Tensor, foil: Tensor, *, threshold: float = 0.5) -> FoilScores:
    """VALSE's scores: does an image match its caption, and not the foil, a caption that was made slightly wrong?

    - accuracy: share of captions above the threshold and foils below it, together;
    - min_precision: the smaller of the two shares;
    - pairwise: share of images with caption > foil, the only one that does not need probabilities.

    Args:
        caption: Match probabilities of image and caption, floating, (N,).
        foil: Of the same images and their foils, same shape.
        threshold: Between no match and match.

    Returns:
        Scalars; NaN for N = 0.

    Warns:
        UserWarning: If a score lies outside [0, 1].

    Raises:
        ValueError: If the scores are not floating or their shapes differ.

    Example:
        >>> import torch
        >>> foil_scores(torch.tensor([0.9, 0.7, 0.4, 0.8]), torch.tensor([0.2, 0.6, 0.3, 0.9]))
        FoilScores(accuracy=tensor(0.6250), min_precision=tensor(0.5000), pairwise=tensor(0.7500))
    """
    check_same_shape(caption=caption, foil=foil)
    if any(((scores < 0) | (scores > 1)).any() for scores in (caption, foil)):
        warnings.warn(
            "scores outside [0, 1] are no probabilities: of the foil scores only `pairwise` is meaningful", stacklevel=2
        )
    dtype = upcast(caption, foil)[0].dtype
    right_caption, right_foil = (caption > threshold).to(dtype).mean(), (foil < threshold).to(dtype).mean()
    return FoilScores(
        accuracy=(right_caption + right_foil) / 2,
        min_precision=torch.minimum(right_caption, right_foil),
        pairwise=(caption > foil).to(dtype).mean(),
    )


@torch.no_grad()
def retrieval_recall(
    similarity: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> RecallScores:
    """Recall at k of image-to-text and text-to-image retrieval.

    text_recall is the share of images with a text of the same id among their k best texts, image_recall the share of
    texts with an image of the same id among their k best images. A candidate of another id that scores as high as the
    best right one stands before it. An image or text without any counterpart is never found.

    Args:
        similarity: Floating, (images, texts). For more than fits in memory see `embedding_recall`.
        image_ids: Integers (images,).
        text_ids: Integers (texts,); an image may have any number of texts.
        k: Each at least 1; more than there are candidates means all of them.
        chunk: Rows or columns worked on at a time, which bounds the memory on top of the similarities.

    Returns:
        Two tensors (len(k),).

    Raises:
        ValueError: If shapes, dtypes or values do not fit, or there is no image or text.

    Example:
        >>> import torch
        >>> similarity = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3]])
        >>> retrieval_recall(similarity, torch.tensor([0, 1]), torch.tensor([0, 0, 1]), k=(1, 2))
        RecallScores(text_recall=tensor([0.5000, 1.0000]), image_recall=tensor([1., 1.]))
    """
    check_matrix("similarity", similarity)
    _check_ids(image_ids, similarity.shape[0], text_ids, similarity.shape[1])
    check_sizes(k, chunk)
    images_ahead = _wrong_ahead(lambda rows: similarity.T[rows], text_ids, image_ids, chunk)
    texts_ahead = _wrong_ahead(lambda rows: similarity[rows], image_ids, text_ids, chunk)
    dtype = upcast(similarity[:0])[0].dtype
    return RecallScores(
        _recall(texts_ahead, k, similarity.shape[1], dtype), _recall(images_ahead, k, similarity.shape[0], dtype)
    )


@torch.no_grad()
def embedding_recall(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    chunk: int = 256,
) -> RecallScores:
    """`retrieval_recall` of the dot products of features, which never stand in memory all at once.

    30,000 images with 150,000 texts have a similarity matrix of 18 GB; here `chunk` rows of it exist at a time.

    Args:
        image_features: Floating, (images, D); with unit norm the similarities are cosines.
        text_features: Floating, (texts, D).
        image_ids: As in `retrieval_recall`.
        text_ids: As in `retrieval_recall`.
        k: As in `retrieval_recall`.
        chunk: Images or texts worked on at a time.

    Returns:
        Two tensors (len(k),).

    Raises:
        ValueError: If shapes, dtypes or values do not fit, or there is no image or text.

    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3)[[0, 2, 1]]
        >>> embedding_recall(image, text, torch.arange(3), torch.arange(3), k=(1,)).text_recall
        tensor([0.3333])
    """
    check_matrix("image_features", image_features)
    check_matrix("text_features", text_features)
    if image_features.shape[1] != text_features.shape[1]:
        expected, found = image_features.shape[1], text_features.shape[1]
        raise ValueError(f"`text_features` must have {expected} columns as `image_features` has, got {found}")
    _check_ids(image_ids, len(image_features), text_ids, len(text_features))
    check_sizes(k, chunk)
    image, text = upcast(image_features, text_features)
    with torch.autocast(image.device.type, enabled=False):  # half-precision products would tie
        texts_ahead = _wrong_ahead(lambda rows: image[rows] @ text.T, image_ids, text_ids, chunk)
        images_ahead = _wrong_ahead(lambda rows: text[rows] @ image.T, text_ids, image_ids, chunk)
    return RecallScores(
        _recall(texts_ahead, k, len(text), image.dtype), _recall(images_ahead, k, len(image), image.dtype)
    )


def _wrong_ahead(block: Callable[[slice], Tensor], row_ids: Tensor, column_ids: Tensor, chunk: int) -> Tensor:
    """For each row, how many columns of another id score no less than the best column of its own id."""
    counts = []
    for start in range(0, len(row_ids), chunk):
        rows = slice(start, start + chunk)
        scores = block(rows)
        wrong = row_ids[rows, None] != column_ids
        best = scores.masked_fill(wrong, -math.inf).amax(1, keepdim=True)
        counts.append((wrong & ~(scores < best)).sum(1))  # "not less" holds for NaN too
    return torch.cat(counts)


def _recall(ahead: Tensor, k: Sequence[int], candidates: int, dtype: torch.dtype) -> Tensor:
    # All candidates are ahead of what has no counterpart, so k may not exceed them.
    within = torch.tensor([min(number, candidates) for number in k], device=ahead.device)
    return (ahead[:, None] < within).to(dtype).mean(0)


def _check_ids(image_ids: Tensor, images: int, text_ids: Tensor, texts: int) -> None:
    for name, ids, number in (("image_ids", image_ids, images), ("text_ids", text_ids, texts)):
        check_integer(name, ids)
        if number == 0 or ids.shape != (number,):
            raise ValueError(f"`{name}` must have shape ({number},) and at least one entry, got {tuple(ids.shape)}")
