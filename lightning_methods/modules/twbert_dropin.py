"""Trajectory-word attention in the place of an ordinary self-attention over [text; CLS; patches]."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.functional._logits import check_range
from lightning_methods.functional._shapes import check_shape
from lightning_methods.modules._attention import nested_again, padded
from lightning_methods.modules.twbert import TrajectoryWordAttention


class _Fused(nn.Module):
    """Splits the fused sequence, attends, and joins it again."""

    def __init__(self, attention: TrajectoryWordAttention, num_frames: int, patches_per_frame: int) -> None:
        super().__init__()
        check_range("num_frames", num_frames, 1, float("inf"))
        check_range("patches_per_frame", patches_per_frame, 1, float("inf"))
        self.attention = attention
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.num_frames = num_frames
        self.patches_per_frame = patches_per_frame

    def _attend(self, fused: Tensor, padding: Tensor | None) -> Tensor:
        """(B, L + 1 + T·S, D), and bool or floating padding (B, L + 1 + T·S), of which the text's part counts."""
        check_shape("query", fused, "B, L + 1 + T·S, D", (None, None, self.embed_dim))
        tokens = fused.shape[1]
        words = tokens - 1 - self.num_frames * self.patches_per_frame
        if words < 1:
            sizes = f"T = {self.num_frames} frames of S = {self.patches_per_frame} patches"
            raise ValueError(f"`query` must hold text, [CLS] and {sizes}, L + 1 + T·S tokens, got N = {tokens}")
        mask = None
        if padding is not None:
            check_shape("key_padding_mask", padding, "B, N", fused.shape[:2])
            text = padding[:, :words]
            mask = ~text if text.dtype == torch.bool else text == 0
        text_out, video_out = self.attention(
            fused[:, :words], fused[:, words:], num_frames=self.num_frames, text_mask=mask
        )
        return torch.cat([text_out, video_out], 1)

    def extra_repr(self) -> str:
        """How the sequence is made up."""
        return f"num_frames={self.num_frames}, patches_per_frame={self.patches_per_frame}"


class TrajectoryWordSelfAttention(_Fused):
    """`TrajectoryWordAttention` with the signature of `torch.nn.MultiheadAttention`.

    The input is one sequence of L words, the video's [CLS] and T·S patches, frame by frame; L follows from its length.

    Args:
        embed_dim: D.
        num_heads: H, a divisor of D.
        num_frames: T.
        patches_per_frame: S.
        dropout: On the attention weights, in training.
        batch_first: (B, N, D) if True, else (N, B, D).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> attention = TrajectoryWordSelfAttention(8, 2, num_frames=3, patches_per_frame=4)
        >>> x = torch.randn(2, 5 + 1 + 12, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 18, 8])
    """

    # If this were true, torch's encoder layer would in evaluation leave this module out and call a kernel of its own.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_frames: int,
        patches_per_frame: int,
        dropout: float = 0.1,
        batch_first: bool = True,
    ) -> None:
        super().__init__(TrajectoryWordAttention(embed_dim, num_heads, dropout), num_frames, patches_per_frame)
        self.batch_first = batch_first

    @classmethod
    def from_multihead(
        cls,
        mha: nn.MultiheadAttention,
        *,
        num_frames: int,
        patches_per_frame: int,
        norm: nn.LayerNorm | None = None,
        dropout: float | None = None,
    ) -> "TrajectoryWordSelfAttention":
        """In the place of `mha`, with its weights; as `TrajectoryWordAttention.from_multihead`.

        Raises:
            TypeError: If it is another module.
            ValueError: If it cannot be replaced.
        """
        attention = TrajectoryWordAttention.from_multihead(mha, norm, dropout=dropout)
        new = cls(
            mha.embed_dim,
            mha.num_heads,
            num_frames=num_frames,
            patches_per_frame=patches_per_frame,
            batch_first=mha.batch_first,
        )
        new.attention = attention
        return new.train(mha.training)

    # torch's encoder asks the parameters of an attention by these names whether they need gradients.
    @property
    def in_proj_weight(self) -> Tensor:
        """All maps packed, as in the attention."""
        return self.attention.proj_weight

    @property
    def in_proj_bias(self) -> Tensor:
        """All biases packed."""
        return self.attention.proj_bias

    @property
    def out_proj(self) -> SimpleNamespace:
        """The same parameters again: the output map is one of those packed."""
        return SimpleNamespace(weight=self.attention.proj_weight, bias=self.attention.proj_bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: ARG002  # there is no one matrix of weights
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend within the fused sequence.

        Args:
            query: (B, L + 1 + T·S, D), or (N, B, D) without `batch_first`.
            key: The same tensor.
            value: The same tensor.
            key_padding_mask: True, or -inf, at padding of the text, (B, N); the columns of the video are not read.
            need_weights: Of no effect: the second result is None.
            attn_mask: Must be None.
            average_attn_weights: Of no effect.
            is_causal: Must be False.

        Raises:
            ValueError: If the three differ, a mask is given, or the sequence has no place for text.
        """
        if query is not key or key is not value:
            raise ValueError("`query`, `key` and `value` must be the same tensor: the fused sequence of text and video")
        if attn_mask is not None or is_causal:
            raise ValueError("`attn_mask` and `is_causal` have no place here: the attention has its own pattern")
        if query.is_nested:
            dense, padding = padded(query)
            return nested_again(self._attend(dense, padding), padding), None
        if self.batch_first:
            return self._attend(query, key_padding_mask), None
        return self._attend(query.transpose(0, 1), key_padding_mask).transpose(0, 1), None


class TimmTrajectoryWordAttention(_Fused):
    """`TrajectoryWordAttention` with the signature of timm's Attention.

    Args:
        embed_dim: D.
        num_heads: H, a divisor of D.
        num_frames: T.
        patches_per_frame: S.
        dropout: On the attention weights, in training.
        proj_drop: On the result, in training.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> attention = TimmTrajectoryWordAttention(8, 2, num_frames=3, patches_per_frame=4)
        >>> attention(torch.randn(2, 5 + 1 + 12, 8)).shape
        torch.Size([2, 18, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_frames: int,
        patches_per_frame: int,
        dropout: float = 0.1,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(TrajectoryWordAttention(embed_dim, num_heads, dropout), num_frames, patches_per_frame)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_timm(
        cls,
        attention: nn.Module,
        *,
        num_frames: int,
        patches_per_frame: int,
        norm: nn.LayerNorm | None = None,
        dropout: float | None = None,
    ) -> "TimmTrajectoryWordAttention":
        """In the place of timm's `attention`, with its weights; as `TrajectoryWordAttention.from_timm`.

        Raises:
            TypeError: If it is another module.
            ValueError: If it cannot be replaced.
        """
        inner = TrajectoryWordAttention.from_timm(attention, norm, dropout=dropout)
        timm: Any = attention
        new = cls(
            inner.embed_dim,
            inner.num_heads,
            num_frames=num_frames,
            patches_per_frame=patches_per_frame,
            proj_drop=timm.proj_drop.p,
        )
        new.attention = inner
        return new.train(attention.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within the fused sequence.

        Args:
            x: (B, L + 1 + T·S, D).
            attn_mask: None, or True at real tokens, (B, N); the columns of the video are not read.
            is_causal: Must be False.

        Raises:
            ValueError: If the mask is no padding mask, or the sequence has no place for text.
        """
        if is_causal or (attn_mask is not None and (attn_mask.ndim != 2 or attn_mask.dtype != torch.bool)):
            raise ValueError("`attn_mask` must be a bool mask of real tokens (B, N), and `is_causal` False")
        result: Tensor = self.proj_drop(self._attend(x, None if attn_mask is None else ~attn_mask))
        return result
