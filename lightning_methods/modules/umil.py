"""The cluster head of UMIL, and what it remembers of each snippet's scores."""

import math
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice, check_positive, check_range
from lightning_methods.modules._local import LocalBuffers

HeadKind: TypeAlias = Literal["linear", "cosine"]


class ClusterHead(nn.Module):
    r"""The second head of UMIL: logits of clusters for features.

    "linear" is a linear map. "cosine" is the head of the authors' code: $s \cdot \hat u^T \hat t_c$ with u = Linear(z),
    both of unit length, and fixed prototypes t_c (there: text embeddings of "normal" and "abnormal").

    Args:
        in_features: D.
        num_clusters: C; UMIL needs 2.
        kind: "linear" or "cosine".
        scale: s > 0, for "cosine".
        prototypes: (C, D), for "cosine"; random orthonormal ones if None, which needs C ≤ D.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> ClusterHead(8)(torch.zeros(4, 16, 8)).shape
        torch.Size([4, 16, 2])
    """

    prototypes: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_clusters: int = 2,
        kind: HeadKind = "linear",
        scale: float = 100.0,
        prototypes: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_range("in_features", in_features, 1, math.inf)
        check_range("num_clusters", num_clusters, 1, math.inf)
        check_choice("kind", kind, HeadKind)
        check_positive(scale=scale)
        self.kind = kind
        self.scale = scale
        if kind == "linear" and prototypes is not None:
            raise ValueError("`prototypes` are for kind='cosine', but `kind` is 'linear'")
        if kind == "cosine" and prototypes is None:
            check_range("num_clusters", num_clusters, 1, in_features)
            prototypes = nn.init.orthogonal_(torch.empty(num_clusters, in_features))
        if prototypes is not None and prototypes.shape != (num_clusters, in_features):
            expected = (num_clusters, in_features)
            raise ValueError(f"`prototypes` must have shape {expected}, got {tuple(prototypes.shape)}")
        self.linear = nn.Linear(in_features, in_features if kind == "cosine" else num_clusters)
        self.register_buffer("prototypes", None if prototypes is None else F.normalize(prototypes, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., C) of features (..., D)."""
        mapped: Tensor = self.linear(features)
        if self.prototypes is None:
            return mapped
        return self.scale * F.linear(F.normalize(mapped, dim=-1), self.prototypes)

    def extra_repr(self) -> str:
        """The kind, and the scale where it counts."""
        return f"kind={self.kind!r}" + (f", scale={self.scale}" if self.kind == "cosine" else "")


class SnippetHistory(LocalBuffers):
    r"""Mean and variance of each snippet's score over the epochs, in memory that does not grow with them.

    Snippets are cells: cell k of video v has the flat index $\sum_{u<v} n_u + k$, where n_u is the number of cells of
    video u. In an epoch, `update` takes scores as they come; after it, `reduce` makes one observation of them for each
    cell that had any: their mean, over all ranks. So a video that a sampler repeats, to fill up a batch or a rank,
    still counts once an epoch. Moments are running ones (Welford) in float64, and equal those of the whole history.

    Attributes:
        num_cells: n_v, int64 (V,).
        count: Epochs in which a cell was seen, float64 (N,).
        mean: Of its score, float64 (N,).
        m2: Sum of its squared deviations from the mean, float64 (N,).
        open_count: Scores of a cell in the epoch under way, on this rank, float64 (N,).
        open_sum: Their sum. These two move, save and load as buffers do but are not listed among them.

    Args:
        num_cells_per_video: Integers (V,), at least 1.

    Raises:
        ValueError: If `num_cells_per_video` is something else.

    Example:
        >>> import torch
        >>> history = SnippetHistory(torch.tensor([2, 3]))
        >>> cells = history.flat_index(torch.tensor([1]), torch.tensor([[0, 2]]))
        >>> for score in (0.25, 0.75):
        ...     history.update(cells, torch.tensor([[score, 0.5]]))
        ...     history.reduce()
        >>> mean, variance = history.moments()
        >>> mean.tolist(), variance.tolist()
        ([0.0, 0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0625, 0.0, 0.0])
    """

    local = ("open_count", "open_sum")
    num_cells: Tensor
    offsets: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor
    open_count: Tensor
    open_sum: Tensor

    def __init__(self, num_cells_per_video: Tensor) -> None:
        super().__init__()
        check_integer("num_cells_per_video", num_cells_per_video)
        sizes = num_cells_per_video.tolist()
        if num_cells_per_video.ndim != 1 or not sizes or min(sizes) < 1:
            found = f"shape {tuple(num_cells_per_video.shape)}" if num_cells_per_video.ndim != 1 else sizes[:10]
            raise ValueError(f"`num_cells_per_video` must be (V,), each at least 1, got {found}")
        num_cells = num_cells_per_video.long()
        self.register_buffer("num_cells", num_cells)
        self.register_buffer("offsets", num_cells.cumsum(0) - num_cells, persistent=False)
        for name in ("count", "mean", "m2", *self.local):
            zeros = torch.zeros(sum(sizes), dtype=torch.float64, device=num_cells.device)
            self.register_buffer(name, zeros)
        self.make_local()

    def flat_index(self, video: Tensor, cell: Tensor) -> Tensor:
        """Flat indices of the cells of some videos.

        Args:
            video: Integers (B,) in [0, V).
            cell: Integers (B, K), each less than its video's number of cells, which is not checked.

        Raises:
            ValueError: If dtypes do not fit, or (on a CPU) if a video is out of its range.
        """
        check_integer("video", video)
        check_integer("cell", cell)
        return self.of_videos(self.offsets, video)[:, None] + cell

    def of_videos(self, values: Tensor, video: Tensor) -> Tensor:
        """`values` (V,) of some videos, with an error that says which is none."""
        try:
            return values.index_select(0, video.long())
        except (IndexError, RuntimeError):
            low, high = int(video.min()), int(video.max())
            expected = f"[0, {len(values)}), the number of videos"
            raise ValueError(f"`video` must lie in {expected}, got values from {low} to {high}") from None

    @torch.no_grad()
    def update(self, flat_index: Tensor, score: Tensor) -> None:
        """Take scores of the epoch under way.

        Args:
            flat_index: Integers of any shape, from `flat_index`; a cell may be there several times.
            score: Floating, same shape.

        Raises:
            ValueError: If shapes or dtypes do not fit.
        """
        check_integer("flat_index", flat_index)
        if score.shape != flat_index.shape or not score.is_floating_point():
            found = f"{tuple(score.shape)} of {score.dtype}"
            raise ValueError(f"`score` must be floating and of shape {tuple(flat_index.shape)}, got {found}")
        index, values = flat_index.flatten().long(), score.flatten().to(self.open_sum.dtype)
        self.open_count.index_add_(0, index, torch.ones_like(values))
        self.open_sum.index_add_(0, index, values)

    @torch.no_grad()
    def reduce(self) -> None:
        """End the epoch: the scores of all ranks become one observation for each cell. Every rank must call it."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.open_count)
            dist.all_reduce(self.open_sum)
        seen = (self.open_count > 0).to(self.count.dtype)
        score = self.open_sum / self.open_count.clamp_min(1)
        self.count += seen
        deviation = (score - self.mean) * seen
        self.mean += deviation / self.count.clamp_min(1)
        self.m2 += deviation * (score - self.mean)
        self.open_count.zero_()
        self.open_sum.zero_()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population variance over the epochs that have ended, (N,) each; 0 for cells never seen."""
        return self.mean.clone(), self.m2 / self.count.clamp_min(1)

    def extra_repr(self) -> str:
        """How many videos and cells."""
        return f"{len(self.num_cells)} videos, {len(self.count)} cells"
