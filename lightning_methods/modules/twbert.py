"""TW-BERT's attention, layer and encoder, and its frame selector."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.functional import (
    FrameSelection,
    TrajectoryWordResult,
    select_frames,
    trajectory_word_attention,
)
from lightning_methods.functional._logits import check_choice, check_positive, check_range
from lightning_methods.functional._shapes import check_shape
from lightning_methods.functional.twbert_frames import PerturbedGradient
from lightning_methods.modules._attention import check_heads, check_multihead, check_timm, copy_into

#: Of the packed maps, in order.
MAPS = ("q1", "k1", "v1", "q2", "k2", "v2", "out", "traj")


class TrajectoryWordAttention(nn.Module):
    """`trajectory_word_attention` with its weights: `proj_weight` (8D, D), `proj_bias` (8D,) and `norm`.

    Args:
        embed_dim: D.
        num_heads: H, a divisor of D.
        dropout: Dropout probability on the attention weights, in training.
        eps: Of the trajectory's LayerNorm.

    Raises:
        ValueError: If `num_heads` does not divide `embed_dim`.

    Example:
        >>> import torch
        >>> attention = TrajectoryWordAttention(8, num_heads=2)
        >>> attention(torch.randn(2, 5, 8), torch.randn(2, 13, 8), num_frames=3).text.shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.1, eps: float = 1e-12) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_range("dropout", dropout, 0, 1)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.proj_weight = nn.Parameter(torch.empty(8 * embed_dim, embed_dim))
        self.proj_bias = nn.Parameter(torch.empty(8 * embed_dim))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform for each of the eight maps by itself; biases zero."""
        for weight in self.proj_weight.chunk(8):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.proj_bias)
        self.norm.reset_parameters()

    @classmethod
    def from_attention(
        cls,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        out: nn.Linear,
        norm: nn.LayerNorm | None = None,
        *,
        num_heads: int,
        dropout: float = 0.1,
    ) -> "TrajectoryWordAttention":
        """With the weights of an ordinary attention, as TW-BERT starts from BERT: both stages get q, k and v.

        Args:
            q: (D, D); a missing bias becomes zero.
            k: (D, D).
            v: (D, D).
            out: (D, D); the trajectory's map starts from it, too.
            norm: LayerNorm of the trajectory, copied with its eps; None: a new one.
            num_heads: H.
            dropout: As in the constructor.

        Raises:
            ValueError: If a map is not (D, D), or `num_heads` does not divide D.
        """
        maps = {"q": q, "k": k, "v": v, "out": out}
        for name, linear in maps.items():
            check_shape(f"{name}.weight", linear.weight, "D, D", (q.in_features, q.in_features))
        attention = cls(q.in_features, num_heads, dropout)
        attention.to(q.weight.device, q.weight.dtype)
        order = (q, k, v, q, k, v, out, out)
        for weight, bias, linear in zip(
            attention.proj_weight.chunk(8), attention.proj_bias.chunk(8), order, strict=True
        ):
            copy_into(weight, linear.weight)
            copy_into(bias, linear.bias)
        for parameter in (attention.proj_weight, attention.proj_bias):
            parameter.requires_grad_(q.weight.requires_grad)
        attention._adopt_norm(norm, q.weight.requires_grad)
        return attention

    @classmethod
    def from_multihead(
        cls, mha: nn.MultiheadAttention, norm: nn.LayerNorm | None = None, *, dropout: float | None = None
    ) -> "TrajectoryWordAttention":
        """`from_attention` of a torch.nn.MultiheadAttention.

        Args:
            mha: A self-attention.
            norm: As in `from_attention`.
            dropout: None: that of `mha`.

        Raises:
            TypeError: If it is another module.
            ValueError: If it has other widths for keys or values, or keys of its own.
        """
        check_multihead(mha)
        q, k, v = _linears(mha.in_proj_weight, mha.in_proj_bias)
        dropout = mha.dropout if dropout is None else dropout
        return cls.from_attention(q, k, v, mha.out_proj, norm, num_heads=mha.num_heads, dropout=dropout)

    @classmethod
    def from_timm(
        cls, attention: nn.Module, norm: nn.LayerNorm | None = None, *, dropout: float | None = None
    ) -> "TrajectoryWordAttention":
        """`from_attention` of timm's Attention.

        Args:
            attention: Without norms of queries and keys, and without a gate, which have no place here.
            norm: As in `from_attention`.
            dropout: None: that of `attention`.

        Raises:
            TypeError: If it is another module.
            ValueError: If it has what has no place here, or heads of another width.
        """
        timm = check_timm(attention)
        extra = [name for name in ("q_norm", "k_norm", "norm") if not _is_identity(getattr(timm, name, None))]
        extra += ["gate"] * (getattr(timm, "gate", None) is not None)
        if extra:
            raise ValueError(f"`attention` must be without {', '.join(extra)}: trajectory attention has none")
        if timm.qkv.out_features != 3 * timm.qkv.in_features:
            raise ValueError(f"`attention.qkv` must map D to 3D, got {timm.qkv.in_features} to {timm.qkv.out_features}")
        q, k, v = _linears(timm.qkv.weight, timm.qkv.bias)
        dropout = timm.attn_drop.p if dropout is None else dropout
        return cls.from_attention(q, k, v, timm.proj, norm, num_heads=timm.num_heads, dropout=dropout)

    def forward(
        self, text: Tensor, video: Tensor, *, num_frames: int, text_mask: Tensor | None = None
    ) -> TrajectoryWordResult:
        """As `trajectory_word_attention`.

        Args:
            text: (B, L, D).
            video: (B, 1 + T·S, D).
            num_frames: T.
            text_mask: Non-zero at real words, (B, L).

        Raises:
            ValueError: If shapes do not fit.
        """
        return trajectory_word_attention(
            text,
            video,
            self.proj_weight,
            self.proj_bias,
            self.norm.weight,
            self.norm.bias,
            num_heads=self.num_heads,
            num_frames=num_frames,
            text_mask=text_mask,
            dropout_p=self.dropout if self.training else 0.0,
            eps=self.norm.eps,
        )

    def extra_repr(self) -> str:
        """The constructor's arguments, but for eps, which the norm shows."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"

    def _adopt_norm(self, norm: nn.LayerNorm | None, trainable: bool) -> None:
        if norm is not None:
            check_shape("norm.weight", norm.weight, "D", (self.embed_dim,))
            copy_into(self.norm.weight, norm.weight)
            copy_into(self.norm.bias, norm.bias)
            self.norm.eps = norm.eps
            trainable = norm.weight.requires_grad
        self.norm.requires_grad_(trainable)


class TrajectoryWordLayer(nn.Module):
    """Pre-norm block: trajectory-word attention, then a feed-forward network, on words and video tokens.

    Args:
        embed_dim: D.
        num_heads: H, a divisor of D.
        ffn_dim: Hidden width; None: 4D.
        dropout: On attention weights and residual branches, in training.

    Raises:
        ValueError: If `num_heads` does not divide `embed_dim`.

    Example:
        >>> import torch
        >>> layer = TrajectoryWordLayer(8, num_heads=2)
        >>> layer(torch.randn(2, 5, 8), torch.randn(2, 13, 8), num_frames=3).video.shape
        torch.Size([2, 13, 8])
    """

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-12)
        self.attention = TrajectoryWordAttention(embed_dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-12)
        hidden = ffn_dim or 4 * embed_dim
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, text: Tensor, video: Tensor, *, num_frames: int, text_mask: Tensor | None = None
    ) -> TrajectoryWordResult:
        """Arguments and errors of `TrajectoryWordAttention.forward`."""
        attended = self.attention(self.norm1(text), self.norm1(video), num_frames=num_frames, text_mask=text_mask)
        results = []
        for tokens, update in zip((text, video), attended, strict=True):
            tokens = tokens + self.dropout(update)
            results.append(tokens + self.dropout(self.ffn(self.norm2(tokens))))
        return TrajectoryWordResult(*results)


class TrajectoryWordEncoder(nn.Module):
    """TW-BERT's fusion encoder: a stack of layers and a final LayerNorm.

    Args:
        embed_dim: D.
        num_layers: Number of layers.
        num_heads: H, a divisor of D.
        ffn_dim: Hidden width of the feed-forward networks; None: 4D.
        dropout: As in `TrajectoryWordLayer`.

    Raises:
        ValueError: If `num_heads` does not divide `embed_dim`.

    Example:
        >>> import torch
        >>> encoder = TrajectoryWordEncoder(8, num_layers=2, num_heads=2)
        >>> encoder(torch.randn(2, 5, 8), torch.randn(2, 13, 8), num_frames=3).text.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_layers: int = 6,
        num_heads: int = 12,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_range("num_layers", num_layers, 1, float("inf"))
        self.layers = nn.ModuleList(
            TrajectoryWordLayer(embed_dim, num_heads, ffn_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-12)

    @classmethod
    def from_bert(
        cls,
        state_dict: Mapping[str, Tensor],
        first_layer: int = 6,
        *,
        num_heads: int | None = None,
        dropout: float = 0.1,
    ) -> "TrajectoryWordEncoder":
        """With the weights of BERT's layers from `first_layer` on, one fusion layer for each.

        Queries, keys and values go to both stages, the output map to `out` and `traj`, the attention's LayerNorm to
        the trajectory and the second norm, the output's LayerNorm to the first norm and, of the last layer, to the
        final one.

        Args:
            state_dict: Of a BERT by Hugging Face's names, with or without a prefix.
            first_layer: The layers before it are those of the text encoder.
            num_heads: None: one for each 64 features, as in BERT.
            dropout: As in the constructor.

        Raises:
            ValueError: If there is no layer `first_layer` in the state dict, or a weight is missing.
        """
        pattern = re.compile(r"(?:.*\.)?encoder\.layer\.(\d+)\.(.+)")
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state_dict.items():
            if (match := pattern.fullmatch(name)) is not None:
                layers.setdefault(int(match[1]), {})[match[2]] = tensor
        chosen = [layers[index] for index in sorted(layers) if index >= first_layer]
        if first_layer not in layers:
            raise ValueError(f"`state_dict` has no encoder.layer.{first_layer}, its layers are {sorted(layers)}")
        hidden, width = chosen[0]["intermediate.dense.weight"].shape
        encoder = cls(width, len(chosen), num_heads or max(1, width // 64), hidden, dropout)
        for layer, weights in zip(encoder.layers, chosen, strict=True):
            layer.load_state_dict(_layer_of_bert(weights))
        copy_into(encoder.norm.weight, chosen[-1]["output.LayerNorm.weight"])
        copy_into(encoder.norm.bias, chosen[-1]["output.LayerNorm.bias"])
        return encoder

    def forward(
        self, text: Tensor, video: Tensor, *, num_frames: int, text_mask: Tensor | None = None
    ) -> TrajectoryWordResult:
        """Arguments and errors of `TrajectoryWordAttention.forward`."""
        for layer in self.layers:
            text, video = layer(text, video, num_frames=num_frames, text_mask=text_mask)
        return TrajectoryWordResult(self.norm(text), self.norm(video))


class HierarchicalFrameSelector(nn.Module):
    """`select_frames` with its weights: in training a differentiable choice, in evaluation the best frames.

    Args:
        embed_dim: D.
        k: Number of frames to keep.
        ratio: Instead of `k`, the share of the frames to keep, rounded down, at least one. With neither, 0.72.
        num_samples: As in `perturbed_topk`.
        sigma: As in `perturbed_topk`.
        gradient: As in `perturbed_topk`.
        eval_mode: "hard" keeps the best frames in evaluation; "perturbed" draws there, too, as the authors' code does,
            so that scores are random.

    Raises:
        ValueError: If an argument is out of its range, or both `k` and `ratio` are given.

    Example:
        >>> import torch
        >>> HierarchicalFrameSelector(4)(torch.randn(2, 8, 3, 4), torch.randn(2, 4)).frames.shape
        torch.Size([2, 5, 3, 4])
    """

    def __init__(
        self,
        embed_dim: int,
        k: int | None = None,
        ratio: float | None = None,
        *,
        num_samples: int = 500,
        sigma: float = 0.05,
        gradient: PerturbedGradient = "diagonal",
        eval_mode: str = "hard",
    ) -> None:
        super().__init__()
        if k is not None and ratio is not None:
            raise ValueError(f"`k` and `ratio` exclude each other, got {k} and {ratio}")
        if k is not None:
            check_range("k", k, 1, float("inf"))
        self.k = k
        self.ratio = 0.72 if k is None and ratio is None else ratio
        if self.ratio is not None:
            check_range("ratio", self.ratio, 0, 1)
        check_range("num_samples", num_samples, 1, float("inf"))
        check_positive(sigma=sigma)
        check_choice("gradient", gradient, PerturbedGradient)
        if eval_mode not in ("hard", "perturbed"):
            raise ValueError(f"`eval_mode` must be 'hard' or 'perturbed', got {eval_mode!r}")
        self.num_samples = num_samples
        self.sigma = sigma
        self.gradient: PerturbedGradient = gradient
        self.eval_mode = eval_mode
        self.norm = nn.LayerNorm(embed_dim)
        self.in_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.mid_proj = nn.Linear(2 * embed_dim, embed_dim, bias=False)
        self.out_proj = nn.Linear(embed_dim, 1, bias=False)

    def forward(self, frames: Tensor, text: Tensor) -> FrameSelection:
        """As `select_frames`.

        Args:
            frames: (B, T, N, D), each frame with its [CLS] first.
            text: The text's [CLS], (B, D).

        Raises:
            ValueError: If shapes do not fit or there are fewer than `k` frames.
        """
        check_shape("frames", frames, "B, T, N, D", (None,) * 4)
        k = max(1, int(frames.shape[1] * self.ratio)) if self.ratio is not None else self.k
        return select_frames(
            frames,
            text,
            self.norm.weight,
            self.norm.bias,
            self.in_proj.weight,
            self.mid_proj.weight,
            self.out_proj.weight,
            k=k,  # type: ignore[arg-type]  # one of the two is given
            num_samples=self.num_samples,
            sigma=self.sigma,
            training=self.training or self.eval_mode == "perturbed",
            gradient=self.gradient,
        )

    def extra_repr(self) -> str:
        """How many frames are kept, and how they are drawn."""
        kept = f"k={self.k}" if self.k is not None else f"ratio={self.ratio}"
        return f"{kept}, num_samples={self.num_samples}, sigma={self.sigma}, gradient={self.gradient!r}"


def _linears(weight: Tensor, bias: Tensor | None) -> list[nn.Linear]:
    """Three maps that share the memory of a packed one."""
    linears = []
    for index, part in enumerate(weight.chunk(3)):
        linear = nn.Linear(part.shape[1], part.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(part.detach(), requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().chunk(3)[index])
        linears.append(linear)
    return linears


def _is_identity(part: Any) -> bool:
    return part is None or isinstance(part, nn.Identity)


def _layer_of_bert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = ["self.query", "self.key", "self.value"] * 2 + ["output.dense"] * 2
    sources = {
        "norm1": "output.LayerNorm",
        "norm2": "attention.output.LayerNorm",
        "attention.norm": "attention.output.LayerNorm",
        "ffn.0": "intermediate.dense",
        "ffn.3": "output.dense",
    }
    state = {}
    try:
        for kind in ("weight", "bias"):
            state[f"attention.proj_{kind}"] = torch.cat([weights[f"attention.{name}.{kind}"] for name in names])
            state |= {f"{own}.{kind}": weights[f"{source}.{kind}"] for own, source in sources.items()}
    except KeyError as error:
        raise ValueError(f"`state_dict` has a layer without {error}") from None
    return state
