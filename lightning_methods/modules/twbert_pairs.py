"""What TW-BERT is pretrained with beside its encoder: the queue of momentum features, and the matching head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_methods.functional._logits import check_range
from lightning_methods.functional._shapes import check_shape


class MomentumQueue(nn.Module):
    """Rings of earlier momentum features of videos and texts, the negatives of `video_text_contrastive_loss`.

    Args:
        embed_dim: E.
        size: Q; 0 for none.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> queue = MomentumQueue(2, size=3)
        >>> queue.enqueue(torch.eye(2), torch.eye(2))
        >>> queue.enqueue(torch.full((2, 2), 0.5), torch.eye(2))
        >>> queue.video
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000],
                [0.5000, 0.5000]])
    """

    video: Tensor
    text: Tensor
    pointer: Tensor

    def __init__(self, embed_dim: int, size: int) -> None:
        super().__init__()
        check_range("embed_dim", embed_dim, 1, float("inf"))
        check_range("size", size, 0, float("inf"))
        for name in ("video", "text"):
            self.register_buffer(name, F.normalize(torch.randn(size, embed_dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, video: Tensor, text: Tensor) -> None:
        """Put features in the place of the oldest ones; a queue of size 0 takes none.

        Args:
            video: Momentum features of videos, normalised, (B, E) with B ≤ Q; with several processes, of all ranks.
            text: Of their texts, (B, E).

        Raises:
            ValueError: If shapes do not fit or the batch is larger than the queue.
        """
        size, width = self.video.shape
        check_shape("video", video, "B, E", (None, width))
        check_shape("text", text, "B, E", video.shape)
        if not size:
            return
        if len(video) > size:
            raise ValueError(f"`video` must have at most as many rows as the queue, {size}, got {len(video)}")
        place = (self.pointer + torch.arange(len(video), device=self.pointer.device)) % size
        self.video.index_copy_(0, place, video.to(self.video))
        self.text.index_copy_(0, place, text.to(self.text))
        self.pointer.copy_((self.pointer + len(video)) % size)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        size, width = self.video.shape
        return f"{width}, size={size}"


class VideoTextMatcher(nn.Module):
    """Tells whether texts belong to videos: a fusion encoder, and one linear map of both [CLS] that it returns.

    It is what `hard_negative_matching_loss` and `AlignBeforeFuse` call a matcher.

    Args:
        encoder: `TrajectoryWordEncoder`, or another that is called in this way.
        embed_dim: D, its width.
        num_frames: T.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_methods.modules import TrajectoryWordEncoder
        >>> matcher = VideoTextMatcher(TrajectoryWordEncoder(8, num_layers=1, num_heads=2), 8, num_frames=3)
        >>> matcher(torch.randn(2, 5, 8), torch.randn(2, 13, 8)).shape
        torch.Size([2, 2])
    """

    def __init__(self, encoder: nn.Module, embed_dim: int, num_frames: int) -> None:
        super().__init__()
        check_range("embed_dim", embed_dim, 1, float("inf"))
        check_range("num_frames", num_frames, 1, float("inf"))
        self.encoder = encoder
        self.num_frames = num_frames
        self.head = nn.Linear(2 * embed_dim, 2)

    def forward(self, text: Tensor, video: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Logits of no and yes, (R, 2), for R pairs.

        Args:
            text: [CLS] and the words, (R, L, D).
            video: [CLS] and the patches, frame by frame, (R, 1 + T·S, D).
            text_mask: Non-zero at real words, (R, L).

        Raises:
            ValueError: If shapes do not fit.
        """
        fused = self.encoder(text, video, num_frames=self.num_frames, text_mask=text_mask)
        logits: Tensor = self.head(torch.cat([fused.text[:, 0], fused.video[:, 0]], 1))
        return logits
