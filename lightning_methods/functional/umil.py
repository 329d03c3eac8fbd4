r"""UMIL: one detector for the snippets that are certain and, without labels, for those that are not.

A detector trained on bags (videos) learns whatever comes with their most abnormal snippets, context included. UMIL asks
it to separate normal and abnormal among confident snippets, and at the same time to separate ambiguous ones along the
clusters of their features. The context differs between the two sets, so what serves both is the anomaly itself.

Symbols: B bags, V views of each (the first weak, the last strong), K snippets, D features. f is the detector, with
class 1 abnormal; g is a second head, the cluster head.

The two sets come from `confidence_split`; the clustering loss is `pairwise_cluster_loss`. All of it is computed in
float32 at least, with shapes that do not depend on values, and without waiting for the device.

Source: Lv et al., "Unbiased Multiple Instance Learning for Weakly Supervised Video Anomaly Detection", CVPR 2023, arXiv
2303.12369. The paper's equations could not be read: losses are those of the authors' code, in which the invariance
terms reach no parameter, because of names that do not match. Two terms are found in an earlier public version of that
code only (`compat_confident` and `confident`). The variance of the risks is taken from Yue et al., "Make the U in UDA
Matter", NeurIPS 2023, arXiv 2309.12742; that the paper's constraint is meant so is our guess, and it is off by default.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._bags import as_views, check_same_bags
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_positive, check_range
from lightning_methods.functional.umil_mil import temporal_smoothness, temporal_sparsity, umil_mil_loss
from lightning_methods.functional.umil_pairs import (
    Similarity,
    label_similarity,
    pair_loss_sums,
    pair_mask,
    pairwise_cluster_loss,
    snippet_similarity,
)


class DetectorLoss(NamedTuple):
    """The weighted sum, and its parts, unweighted; `consistency_sum` is that of the two consistencies."""

    total: Tensor
    mil: Tensor
    margin: Tensor
    consistency: Tensor
    cluster_consistency: Tensor
    consistency_sum: Tensor
    cluster: Tensor
    smooth: Tensor
    sparse: Tensor


class InvarianceLoss(NamedTuple):
    """The weighted sum, and its parts, unweighted."""

    total: Tensor
    cluster: Tensor
    compat: Tensor
    compat_confident: Tensor
    variance: Tensor
    confident: Tensor


def umil_detector_loss(
    logits: Tensor,
    cluster_logits: Tensor,
    features: Tensor,
    bag_labels: Tensor,
    *,
    weight_consistency: float = 1.0,
    weight_cluster_consistency: float = 1.0,
    weight_smooth: float = 0.01,
    weight_sparse: float = 0.001,
    weight_cluster: float = 0.01,
    threshold: float = 0.8,
    cluster_threshold: float = 0.8,
    similarity_threshold: float = 0.7,
    margin: bool = True,
) -> DetectorLoss:
    r"""The loss of every epoch: MIL, agreement of the views, priors on the scores, and clusters of all snippets.

    - mil, margin: `umil_mil_loss`, with weight 1.
    - consistency: cross-entropy of the strong view with the prediction of the weak one where that is sure, its larger
      probability ≥ `threshold`. The sum is divided by all B · K snippets. No gradient reaches the weak view.
    - cluster_consistency: the same for g, with `cluster_threshold`. Both are 0 with one view.
    - smooth, sparse: `temporal_smoothness` and `temporal_sparsity` of the abnormal probabilities.
    - cluster: `pairwise_cluster_loss` of g over all B · K snippets.

    Args:
        logits: f, floating, (B, V, K, 2) or (B, K, 2).
        cluster_logits: g, same shape.
        features: Floating, (B, V, K, D) or (B, K, D); no gradient goes there.
        bag_labels: (B,), above 0 for abnormal.
        weight_consistency: Weight of the term, like the next four.
        weight_cluster_consistency: As above.
        weight_smooth: As above.
        weight_sparse: As above.
        weight_cluster: As above.
        threshold: In [0, 1].
        cluster_threshold: In [0, 1].
        similarity_threshold: As in `snippet_similarity`.
        margin: Whether the margin takes part; see `umil_mil_loss` for its danger.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> loss = umil_detector_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.eye(3)[None], torch.tensor([0]))
        >>> loss.mil, loss.sparse
        (tensor(0.3466), tensor(1.5000))
    """
    detector, clusters, z = _views(logits, cluster_logits, features)
    check_range("threshold", threshold, 0, 1)
    check_range("cluster_threshold", cluster_threshold, 0, 1)
    mil = umil_mil_loss(detector, bag_labels, margin=margin)
    consistency = _consistency(detector, threshold)
    cluster_consistency = _consistency(clusters, cluster_threshold)
    scores = detector.softmax(-1)[..., 1]
    smooth, sparse = temporal_smoothness(scores), temporal_sparsity(scores)
    cluster = pairwise_cluster_loss(
        z[:, 0].flatten(0, 1),
        clusters[:, 0].flatten(0, 1),
        clusters[:, -1].flatten(0, 1),
        threshold=similarity_threshold,
    ).loss
    total = (
        mil.mil
        + mil.margin
        + weight_consistency * consistency
        + weight_cluster_consistency * cluster_consistency
        + weight_smooth * smooth
        + weight_sparse * sparse
        + weight_cluster * cluster
    )
    both = consistency + cluster_consistency
    return DetectorLoss(total, *mil, consistency, cluster_consistency, both, cluster, smooth, sparse)


def umil_invariance_loss(
    logits: Tensor,
    cluster_logits: Tensor,
    features: Tensor,
    ambiguous: Tensor,
    pseudo_labels: Tensor | None = None,
    *,
    weight_cluster: float = 1.0,
    weight_compat: float = 1.0,
    weight_compat_confident: float = 1.0,
    weight_variance: float = 0.0,
    weight_confident: float = 1.0,
    weight_by_confidence: bool = False,
    similarity_threshold: float = 0.7,
    mode: Similarity = "cosine",
    topk: int = 2,
    eps: float = 1e-7,
) -> InvarianceLoss:
    r"""The loss after the warm-up: one detector for the ambiguous snippets A and the confident ones C of a batch.

    Over pairs of A, alike or not by their features (`snippet_similarity`), and over pairs of C, alike if their
    pseudo-labels are equal, the mean of `pairwise_bce` between weak and strong view:

    - cluster: of g on A. compat: of f on A. These two are what the authors released.
    - compat_confident: of g on C (from the authors' earlier code).
    - confident: cross-entropy of f with the pseudo-labels, over C and all views (from their earlier code, where it is
      weighed by confidence).
    - variance: $\frac12 (\mathrm{compat} - \mathrm{compat}_C)^2$ with compat_C that of f on C: the unbiased variance of
      the two risks.

    No term over pairs tells normal from abnormal. Which side of A is abnormal is decided by where f leans when these
    terms set in, and by `confident`: begin when the MIL loss has settled, and keep it on.

    Args:
        logits: f, floating, (B, V, K, 2) or (B, K, 2).
        cluster_logits: g, same shape.
        features: Floating, (B, V, K, D) or (B, K, D); no gradient goes there.
        ambiguous: Boolean (B, K), the set A.
        pseudo_labels: Integers (B, K), 0 or 1; C is what is not ambiguous, except where the label is negative: such a
            snippet is in neither set. None only if the weights of all terms on C are 0.
        weight_cluster: Weight of the term, like the next four.
        weight_compat: As above.
        weight_compat_confident: As above.
        weight_variance: As above.
        weight_confident: As above.
        weight_by_confidence: Multiply the cross-entropy of each snippet by its larger probability, through which the
            gradient passes too.
        similarity_threshold: As in `snippet_similarity`, like the next two.
        mode: As above.
        topk: As above.
        eps: As in `pairwise_bce`.

    Returns:
        Each term is 0, with a gradient of 0, where its sets are too small: fewer than two snippets for pairs, none for
        `confident`. So it is for a batch of normal bags only, in which A is empty.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or `pseudo_labels` are needed.

    Example:
        >>> import torch
        >>> logits, features = torch.zeros(1, 4, 2), torch.eye(4)[None]
        >>> ambiguous = torch.tensor([[True, True, False, False]])
        >>> umil_invariance_loss(logits, logits, features, ambiguous, torch.tensor([[0, 0, 1, 0]])).total
        tensor(2.7726)
    """
    detector, clusters, z = _views(logits, cluster_logits, features)
    ambiguous, confident, labels = _sets(ambiguous, pseudo_labels, detector)
    if pseudo_labels is None and (weight_compat_confident or weight_variance or weight_confident):
        raise ValueError(
            "`pseudo_labels` is missing: without it `weight_compat_confident`, `weight_variance` and "
            "`weight_confident` must all be 0"
        )
    check_positive(eps=eps)
    # Each snippet is in one set at most, so that one matrix holds the pairs of both, and one pass serves both.
    by_features = snippet_similarity(z[:, 0].flatten(0, 1), mode=mode, threshold=similarity_threshold, topk=topk)
    similarity = torch.where(pair_mask(confident), label_similarity(labels), by_features * pair_mask(ambiguous))
    compat, compat_c = _pair_means(detector, similarity, ambiguous, confident, eps)
    cluster, compat_confident = _pair_means(clusters, similarity, ambiguous, confident, eps)
    enough = (ambiguous.sum() > 1) & (confident.sum() > 1)
    variance = (compat - compat_c).square() / 2 * enough
    of_labels = _confident_cross_entropy(detector, labels, confident, weight_by_confidence)
    total = (
        weight_cluster * cluster
        + weight_compat * compat
        + weight_compat_confident * compat_confident
        + weight_variance * variance
        + weight_confident * of_labels
    )
    return InvarianceLoss(total, cluster, compat, compat_confident, variance, of_labels)


def _views(logits: Tensor, cluster_logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    detector = as_views("logits", logits, classes=2)
    clusters = as_views("cluster_logits", cluster_logits)
    z = as_views("features", features)
    check_same_bags(logits=detector, cluster_logits=clusters, features=z)
    return detector, clusters, z


def _sets(ambiguous: Tensor, pseudo_labels: Tensor | None, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A and C, boolean (B · K,), and the labels of C."""
    bags, _, snippets, _ = views.shape
    if ambiguous.shape != (bags, snippets) or ambiguous.dtype != torch.bool:
        found = f"{tuple(ambiguous.shape)} of {ambiguous.dtype}"
        raise ValueError(f"`ambiguous` must be boolean and of shape {(bags, snippets)}, got {found}")
    ambiguous = ambiguous.flatten()
    if pseudo_labels is None:
        return ambiguous, torch.zeros_like(ambiguous), torch.zeros_like(ambiguous, dtype=torch.long)
    check_integer("pseudo_labels", pseudo_labels)
    if pseudo_labels.shape != (bags, snippets):
        raise ValueError(f"`pseudo_labels` must have shape {(bags, snippets)}, got {tuple(pseudo_labels.shape)}")
    labels = pseudo_labels.flatten().long()
    confident = ~ambiguous & (labels >= 0)
    return ambiguous, confident, labels * confident


def _pair_means(
    views: Tensor, similarity: Tensor, ambiguous: Tensor, confident: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean cost of a pair within A and within C; 0 for a set of fewer than two."""
    probabilities = views.softmax(-1)
    weak, strong = (probabilities[:, view].flatten(0, 1) for view in (0, -1))
    # A row of A has costs in the columns of A alone, and one of C in those of C.
    of_rows = pair_loss_sums(weak, strong, similarity, eps)
    first, second = (_mean_over_pairs(of_rows, members) for members in (ambiguous, confident))
    return first, second


def _mean_over_pairs(of_rows: Tensor, members: Tensor) -> Tensor:
    count = members.sum()
    size = torch.where(count > 1, count.to(of_rows.dtype), torch.inf)
    return (of_rows * members).sum() / size / size


def _confident_cross_entropy(views: Tensor, labels: Tensor, confident: Tensor, weighted: bool) -> Tensor:
    bags, count, snippets, _ = views.shape
    per_view = (bags, count, snippets)
    target = labels.view(bags, 1, snippets).expand(per_view)
    try:  # on a CPU the look-up itself finds what is no class
        loss = F.cross_entropy(views.movedim(-1, 1), target, reduction="none")
    except IndexError:
        raise ValueError(f"`pseudo_labels` must be 0, 1 or negative, got {int(labels.max())}") from None
    if weighted:
        loss = loss * views.softmax(-1).max(-1).values
    keep = confident.view(bags, 1, snippets).expand(per_view)
    return (loss * keep).sum() / keep.sum().clamp_min(1)


def _consistency(views: Tensor, threshold: float) -> Tensor:
    if views.shape[1] == 1:
        return views.sum() * 0
    confidence, label = views[:, 0].detach().softmax(-1).max(-1)
    loss = F.cross_entropy(views[:, -1].movedim(-1, 1), label, reduction="none")
    return (loss * (confidence >= threshold)).mean()
