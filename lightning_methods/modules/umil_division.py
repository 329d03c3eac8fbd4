"""Which snippets of the training videos are confident and which ambiguous, kept up to date from epoch to epoch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_methods.functional import confidence_split_from_moments
from lightning_methods.modules._local import LocalBuffers
from lightning_methods.modules.umil import SnippetHistory


class DivisionFigures(NamedTuple):
    """What a division looks like; scalars.

    Attributes:
        ambiguous_fraction: Share of the cells of abnormal videos that are ambiguous.
        pseudo_abnormal_fraction: Share of the cells of abnormal videos with pseudo-label 1.
        threshold_normal: Of the variance, for cells predicted normal.
        threshold_abnormal: The same for cells predicted abnormal.
    """

    ambiguous_fraction: Tensor
    pseudo_abnormal_fraction: Tensor
    threshold_normal: Tensor
    threshold_abnormal: Tensor


class SnippetDivision(LocalBuffers):
    """A `SnippetHistory`, and the division that `functional.confidence_split_from_moments` makes of it.

    In an epoch, `update` takes the scores of snippets; after it, `end_epoch` divides anew. `look_up` says what snippets
    are now. A cell of an abnormal video that was seen in fewer than two epochs is in neither set; all cells of a normal
    video are confident and normal once it was seen at all.

    Attributes:
        history: The running moments of each cell.
        ambiguous: Boolean (N,).
        pseudo_labels: int64 (N,), -1 for cells that are in neither set.
        ready: Whether there is a division: some cell was seen in two epochs.
        kinds_seen: (2, V), 1 where a video came with a normal (row 0) or an abnormal label (row 1).

    Args:
        num_cells_per_video: Integers (V,), at least 1.
        ratio: As in `functional.confidence_split`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> division = SnippetDivision(torch.tensor([2, 2]), ratio=0.5)
        >>> videos, cells, labels = torch.tensor([0, 1]), torch.tensor([[0, 1], [0, 1]]), torch.tensor([0, 1])
        >>> for score in (0.1, 0.4):
        ...     division.update(videos, cells, torch.tensor([[score, score], [0.2, score]]), labels)
        ...     figures = division.end_epoch()
        >>> ambiguous, pseudo_labels = division.look_up(videos, cells)
        >>> ambiguous
        tensor([[False, False],
                [False,  True]])
    """

    local = ("kinds_seen",)
    ambiguous: Tensor
    pseudo_labels: Tensor
    kinds_seen: Tensor

    def __init__(self, num_cells_per_video: Tensor, *, ratio: float = 0.3) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"`ratio` must lie in [0, 1), got {ratio}")
        self.ratio = ratio
        self.ready = False
        self.history = SnippetHistory(num_cells_per_video)
        cells, device = len(self.history.count), self.history.count.device
        self.register_buffer("ambiguous", torch.zeros(cells, dtype=torch.bool, device=device))
        self.register_buffer("pseudo_labels", torch.full((cells,), -1, device=device))
        self.register_buffer("kinds_seen", torch.zeros(2, len(num_cells_per_video), dtype=torch.uint8, device=device))
        self.make_local()

    @torch.no_grad()
    def update(self, video: Tensor, cell: Tensor, score: Tensor, label: Tensor) -> None:
        """Take the scores of some snippets in the epoch under way.

        Args:
            video: Integers (B,) in [0, V).
            cell: Integers (B, K), each less than its video's number of cells, which is not checked.
            score: Abnormal probabilities, floating, (B, K).
            label: (B,), above 0 for abnormal.

        Raises:
            ValueError: If shapes or dtypes do not fit, or (on a CPU) if a video is out of its range.
        """
        self.history.update(self.history.flat_index(video, cell), score)
        place = (label > 0).long() * self.kinds_seen.shape[1] + video
        self.kinds_seen.view(-1).index_fill_(0, place, 1)

    @torch.no_grad()
    def end_epoch(self) -> DivisionFigures | None:
        """End the epoch on all ranks, each of which must call it, and divide anew.

        Returns:
            Figures; None while no cell was seen in two epochs, when there is no division.

        Raises:
            ValueError: If a video has come as a normal and as an abnormal one.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.kinds_seen, dist.ReduceOp.MAX)
        self.history.reduce()
        normal, abnormal = self.kinds_seen.bool()
        if bool((normal & abnormal).any()):
            first = int((normal & abnormal).nonzero()[0])
            raise ValueError(f"video {first} has come with a normal and with an abnormal label")
        self.ready = bool((self.history.count >= 2).any())
        return self._divide(self._of_cells(normal), self._of_cells(abnormal)) if self.ready else None

    def look_up(self, video: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Ambiguous, boolean (B, K), and pseudo-labels, (B, K), of snippets, as `umil_invariance_loss` takes them.

        Args:
            video: Integers (B,) in [0, V).
            cell: Integers (B, K).

        Raises:
            ValueError: If dtypes do not fit, or (on a CPU) if a video is out of its range.
        """
        index = self.history.flat_index(video, cell).flatten()
        found = (values.index_select(0, index).view(cell.shape) for values in (self.ambiguous, self.pseudo_labels))
        ambiguous, pseudo_labels = found
        return ambiguous, pseudo_labels

    def shared_state(self) -> dict[str, Tensor]:
        """A copy of the state dict in which the epoch under way is that of all ranks. Every rank must call it."""
        state = {name: value.clone() for name, value in self.state_dict().items()}
        if dist.is_available() and dist.is_initialized():
            for name in SnippetHistory.local:
                dist.all_reduce(state[f"history.{name}"])
            dist.all_reduce(state["kinds_seen"], dist.ReduceOp.MAX)
        return state

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `shared_state` gave; the epoch under way goes to one of the ranks."""
        self.load_state_dict(state)
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            self.history.open_count.zero_()
            self.history.open_sum.zero_()

    def extra_repr(self) -> str:
        """The ratio."""
        return f"ratio={self.ratio}"

    def _divide(self, normal: Tensor, abnormal: Tensor) -> DivisionFigures:
        mean, variance = self.history.moments()
        known = abnormal & (self.history.count >= 2)
        split = confidence_split_from_moments(
            mean[known], variance[known], torch.ones_like(mean[known]), ratio=self.ratio
        )
        self.ambiguous.zero_()
        self.ambiguous[known] = ~split.confident
        self.pseudo_labels.fill_(-1)
        self.pseudo_labels[normal] = 0
        self.pseudo_labels[known] = split.pseudo_labels
        count = max(len(split.confident), 1)
        return DivisionFigures((~split.confident).sum() / count, split.pseudo_labels.sum() / count, *split.thresholds)

    def _of_cells(self, of_videos: Tensor) -> Tensor:
        return of_videos.repeat_interleave(self.history.num_cells)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = bool((self.pseudo_labels >= 0).any())  # a division leaves no video without
