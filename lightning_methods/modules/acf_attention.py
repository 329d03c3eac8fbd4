"""Attention layers with ACF's clusters, in the place of torch's and timm's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_methods.functional import cluster_attention, span_cluster_attention
from lightning_methods.functional._logits import check_range
from lightning_methods.functional._shapes import check_shape
from lightning_methods.functional.acf import apply_weights, cluster_weights
from lightning_methods.functional.acf_grid import GridLayout
from lightning_methods.modules._attention import check_heads, check_multihead, check_timm, nested_again, padded
from lightning_methods.modules.acf import ClusterKind, ClusterLayer, ClusterNorm, ClusterState


class AdaClusterAttention(nn.Module):
    """Self-attention whose weights are multiplied by a learned cluster matrix, as `torch.nn.MultiheadAttention`.

    `in_proj_weight`, `in_proj_bias` and `out_proj` are named and shaped as there, so that weights of one load into the
    other. What makes the clusters is `clusters`.

    Args:
        embed_dim: D.
        num_heads: H, a divisor of D.
        kind: "span" for sequences, "grid" for images.
        grid_size: (Gh, Gw), for grids.
        prefix_tokens: Leading tokens outside all clusters.
        dropout: On the products of weights and clusters, in training.
        bias: Whether the projections have biases.
        normalize: Divide the rows by their sums (ours; the authors do not).
        batch_first: (B, N, D) if True, else (N, B, D), which is torch's default.
        pool: As in `GridCluster`.
        layout: As in `GridCluster`.
        norm: As in `SpanCluster`.
        init_bias: As in `SpanCluster`.
        block_size: Rows that stand in memory at a time, for long sequences: see `span_cluster_attention`. None: all.

    Raises:
        ValueError: If the arguments do not fit each other.

    Example:
        >>> import torch
        >>> attention = AdaClusterAttention(8, 2)
        >>> x = torch.randn(3, 5, 8)
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]))
    """

    # If this were true, torch's encoder layer would in evaluation leave this module out and call a kernel of its own.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kind: ClusterKind = "span",
        grid_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        dropout: float = 0.0,
        bias: bool = True,
        normalize: bool = False,
        batch_first: bool = True,
        pool: int = 2,
        layout: GridLayout = "separable",
        norm: ClusterNorm = "annotated",
        init_bias: float | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_range("dropout", dropout, 0, 1)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.normalize = normalize
        self.batch_first = batch_first
        self.block_size = _checked_blocks(block_size, kind, prefix_tokens)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.clusters = ClusterLayer(
            embed_dim,
            kind,
            grid_size=grid_size,
            prefix_tokens=prefix_tokens,
            pool=pool,
            layout=layout,
            norm=norm,
            init_bias=init_bias,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform for each of the maps by itself; biases zero."""
        for weight in (*self.in_proj_weight.chunk(3), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.clusters.cluster.reset_parameters()

    @classmethod
    def from_multihead(cls, mha: nn.MultiheadAttention, **options: Any) -> "AdaClusterAttention":
        """In the place of `mha`: the parameters are its own, not copies.

        Args:
            mha: A self-attention.
            options: Of the constructor, for the clusters.

        Raises:
            TypeError: If it is another module.
            ValueError: If it has other widths for keys or values, or keys of its own.
        """
        check_multihead(mha)
        options = {"dropout": mha.dropout, "bias": mha.in_proj_bias is not None, **options}
        new = cls(mha.embed_dim, mha.num_heads, batch_first=mha.batch_first, **options)
        new.clusters.to(mha.in_proj_weight.device)
        new.in_proj_weight, new.in_proj_bias, new.out_proj = mha.in_proj_weight, mha.in_proj_bias, mha.out_proj
        return new.train(mha.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        state: ClusterState | None = None,
        cluster_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`.

        Args:
            query: (B, N, D), or (N, B, D) without `batch_first`.
            key: The same tensor.
            value: The same tensor.
            key_padding_mask: True, or what is added to logits, at padding, (B, N). The diagonal stays open.
            need_weights: Return the products of weights and clusters, too.
            attn_mask: True where attention is not allowed, or added to the logits; (N, N) or (B·H, N, N).
            average_attn_weights: The mean of the heads' products (B, N, N) instead of all (B, H, N, N).
            is_causal: Attend to nothing behind; with `attn_mask` a hint that it says so, as in torch.
            state: Of a stack of layers, instead of `clusters.state`.
            cluster_input: What is clustered, of the query's shape, such as the residual stream; None: what
                `clusters.source` has, or else the query.

        Raises:
            TypeError: If query, key and value are not one tensor.
            ValueError: If shapes do not fit, or blocks are asked for what they cannot do.
        """
        if query is not key or key is not value:
            raise TypeError("`query`, `key` and `value` must be the same tensor: clusters are of one sequence")
        cluster_input = self.clusters.input(cluster_input)
        if query.is_nested:
            dense, padding = padded(query)
            source = dense if cluster_input is None else padded(cluster_input)[0]
            out, _ = self._batch_first(dense, padding, False, None, False, is_causal, state, source)
            return nested_again(out, padding), None
        x = query if self.batch_first else query.transpose(0, 1)
        check_shape("query", x, "B, N, D", (None, None, self.embed_dim))
        source = x
        if cluster_input is not None:
            source = cluster_input if self.batch_first else cluster_input.transpose(0, 1)
            check_shape("cluster_input", source, "B, N, D", x.shape)
        out, weights = self._batch_first(
            x, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, state, source
        )
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def extra_repr(self) -> str:
        """The constructor's arguments that are not the clusters'."""
        options = f"dropout={self.dropout}, normalize={self.normalize}, batch_first={self.batch_first}"
        return f"{self.embed_dim}, num_heads={self.num_heads}, {options}, block_size={self.block_size}"

    def _batch_first(
        self,
        x: Tensor,
        padding: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
        state: ClusterState | None,
        source: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = torch.unflatten(packed, -1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if self.block_size is not None:
            if need_weights or (attn_mask is not None and not is_causal):
                raise ValueError("`block_size` goes with need_weights=False and no `attn_mask` but a causal one")
            attended = span_cluster_attention(
                query,
                key,
                value,
                self.clusters.scores(source, state),
                key_mask=None if padding is None else padding == 0,  # of bool and of additive masks
                is_causal=is_causal,
                dropout_p=dropout_p,
                normalize=self.normalize,
                block_size=self.block_size,
            )
        else:
            cluster = self.clusters(source, state)
            mask = _merged(x, self.num_heads, padding, attn_mask, is_causal)
            weights = cluster_weights(query, key, cluster, attn_mask=mask, normalize=self.normalize)
            attended = apply_weights(weights, value, dropout_p)
            weights = None if not need_weights else weights.mean(1) if average else weights
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights


class TimmAdaClusterAttention(nn.Module):
    """timm's Attention with a learned cluster matrix; `qkv`, `q_norm`, `k_norm`, `proj` and the rest are its own.

    Args:
        attention: timm's Attention; its parts become parts of this module.
        normalize: As in `AdaClusterAttention`.
        options: Of `ClusterLayer`: `kind`, `grid_size`, `prefix_tokens` and so on.

    Raises:
        TypeError: If `attention` is another module.
        ValueError: If the options do not fit each other.

    Example:
        >>> import torch
        >>> from timm.layers import Attention
        >>> plain = Attention(8, num_heads=2)
        >>> attention = TimmAdaClusterAttention(plain, kind="grid", grid_size=(2, 2), prefix_tokens=1)
        >>> attention(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, attention: nn.Module, *, normalize: bool = False, **options: Any) -> None:
        super().__init__()
        timm = check_timm(attention)
        self.num_heads = timm.num_heads
        self.scale = timm.scale
        self.normalize = normalize
        self.qkv = timm.qkv
        self.q_norm, self.k_norm = timm.q_norm, timm.k_norm
        self.attn_drop = timm.attn_drop
        # Newer versions have these two.
        self.norm = getattr(timm, "norm", nn.Identity())
        self.gate = getattr(timm, "gate", None)
        self.proj, self.proj_drop = timm.proj, timm.proj_drop
        self.clusters = ClusterLayer(timm.qkv.in_features, **options).to(timm.qkv.weight.device)
        self.train(timm.training)

    @classmethod
    def from_timm(cls, attention: nn.Module, **options: Any) -> "TimmAdaClusterAttention":
        """The constructor, under the name that the other modules have for it."""
        return cls(attention, **options)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        state: ClusterState | None = None,
        cluster_input: Tensor | None = None,
    ) -> Tensor:
        """As timm's.

        Args:
            x: (B, N, D).
            attn_mask: True where attention is allowed, or added to the logits; broadcastable to (B, H, N, N).
            is_causal: Attend to nothing behind.
            state: Of a stack of layers, instead of `clusters.state`.
            cluster_input: What is clustered, of the shape of `x`; None: what `clusters.source` has, or else x.

        Raises:
            ValueError: If shapes do not fit.
        """
        check_shape("x", x, "B, N, D", (None, None, self.qkv.in_features))
        packed = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if is_causal:
            attn_mask = _causal(x)
        cluster_input = self.clusters.input(cluster_input)
        if cluster_input is not None:
            check_shape("cluster_input", cluster_input, "B, N, D", x.shape)
        cluster = self.clusters(x if cluster_input is None else cluster_input, state)
        attended = cluster_attention(
            query,
            key,
            value,
            cluster,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
            normalize=self.normalize,
        )
        attended = self.norm(attended.transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        result: Tensor = self.proj_drop(self.proj(attended))
        return result

    def extra_repr(self) -> str:
        """What its parts do not show."""
        return f"num_heads={self.num_heads}, normalize={self.normalize}"


def _merged(x: Tensor, heads: int, padding: Tensor | None, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Torch's masks (True: closed) as one for `cluster_attention` (True: open), or added to the logits."""
    batch, length, _ = x.shape
    masks = []
    if padding is not None:
        check_shape("key_padding_mask", padding, "B, N", (batch, length))
        diagonal = torch.eye(length, dtype=torch.bool, device=x.device)
        masks.append(padding[:, None, None].masked_fill(diagonal, 0))
    if attn_mask is not None:
        if attn_mask.shape not in ((length, length), (batch * heads, length, length)):
            expected = f"(N, N) = {(length, length)} or (B·H, N, N)"
            raise ValueError(f"`attn_mask` must have shape {expected}, got {tuple(attn_mask.shape)}")
        masks.append(attn_mask if attn_mask.ndim == 2 else torch.unflatten(attn_mask, 0, (batch, heads)))
    elif is_causal:
        masks.append(~_causal(x))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    dtype = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    added = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _causal(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def _checked_blocks(block_size: int | None, kind: ClusterKind, prefix_tokens: int) -> int | None:
    if block_size is not None:
        check_range("block_size", block_size, 1, float("inf"))
        if kind != "span" or prefix_tokens:
            raise ValueError(f"`block_size` needs kind 'span' without prefix tokens, got {kind!r} and {prefix_tokens}")
    return block_size
