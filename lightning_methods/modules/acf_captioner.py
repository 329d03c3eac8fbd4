"""ACF's captioning model: an encoder of image features, a decoder of words, and ways to write captions with them."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_methods.functional._logits import check_range
from lightning_methods.functional._shapes import at_least_float32, check_shape
from lightning_methods.functional.acf_grid import GridLayout
from lightning_methods.modules._attention import check_heads
from lightning_methods.modules.acf import AnnotatedLayerNorm, ClusterState
from lightning_methods.modules.acf_attention import AdaClusterAttention


class Captions(NamedTuple):
    """Token ids (R, T) without the begin token, `end_id` behind the end; log-probabilities of the tokens (R, T)."""

    tokens: Tensor
    logprobs: Tensor


class ACFLayer(nn.Module):
    """Pre-norm block: self-attention, attention to a memory where there is one, and a feed-forward network.

    A layer with clusters makes them from the residual stream, through their own norm.

    Args:
        embed_dim: D.
        num_heads: H.
        ffn_dim: Hidden width of the feed-forward network.
        dropout: On attention weights and residual branches, in training.
        clusters: Options of `AdaClusterAttention`; None: ordinary attention.
        layer: Place among the layers with clusters.
        cross: Whether the layer attends to a memory.

    Raises:
        ValueError: If `num_heads` does not divide `embed_dim`, or the options do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        *,
        clusters: dict[str, Any] | None = None,
        layer: int = 0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.self_attn: nn.MultiheadAttention | AdaClusterAttention
        if clusters is None:
            self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, dropout, batch_first=True)
        else:
            self.self_attn = AdaClusterAttention(embed_dim, num_heads, dropout=dropout, **clusters)
            self.self_attn.clusters.layer = layer
        self.cross_attn = nn.MultiheadAttention(embed_dim, num_heads, dropout, batch_first=True) if cross else None
        self.norms = nn.ModuleList(AnnotatedLayerNorm(embed_dim) for _ in range(3 if cross else 2))
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, ffn_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn_dim, embed_dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        state: ClusterState,
        memory: Tensor | None = None,
        padding: Tensor | None = None,
        causal: Tensor | None = None,
    ) -> Tensor:
        """Elements (B, N, D), the stack's state, a memory (B, M, D), padding (B, N) and a causal mask (N, N)."""
        normed = self.norms[0](x)
        options: dict[str, Any] = {"key_padding_mask": padding, "attn_mask": causal, "need_weights": False}
        if isinstance(self.self_attn, AdaClusterAttention):
            options |= {"state": state, "cluster_input": x}
        x = x + self.dropout(self.self_attn(normed, normed, normed, **options)[0])
        if self.cross_attn is not None:
            x = x + self.dropout(self.cross_attn(self.norms[1](x), memory, memory, need_weights=False)[0])
        x = x + self.dropout(self.ffn(self.norms[-1](x)))
        return x


class ACFEncoder(nn.Module):
    """Plain layers, then layers with clusters on the grid, then a norm; no positional encoding.

    Args:
        grid_size: (Gh, Gw).
        embed_dim: D.
        num_heads: H.
        ffn_dim: Hidden width of the feed-forward networks.
        num_plain: Layers without clusters.
        num_grouped: Layers with clusters.
        dropout: As in `ACFLayer`.
        pool: As in `GridCluster`.
        layout: As in `GridCluster`.

    Example:
        >>> import torch
        >>> ACFEncoder((4, 4), embed_dim=8, num_heads=2)(torch.randn(2, 16, 8)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        grid_size: tuple[int, int] = (12, 12),
        embed_dim: int = 512,
        num_heads: int = 8,
        ffn_dim: int = 512,
        num_plain: int = 3,
        num_grouped: int = 3,
        dropout: float = 0.1,
        *,
        pool: int = 2,
        layout: GridLayout = "separable",
    ) -> None:
        super().__init__()
        clusters = {"kind": "grid", "grid_size": grid_size, "pool": pool, "layout": layout}
        self.layers = nn.ModuleList(ACFLayer(embed_dim, num_heads, ffn_dim, dropout) for _ in range(num_plain))
        self.layers.extend(
            ACFLayer(embed_dim, num_heads, ffn_dim, dropout, clusters=clusters, layer=layer)
            for layer in range(num_grouped)
        )
        self.norm = AnnotatedLayerNorm(embed_dim)
        _xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Gh·Gw, D) to the same shape."""
        state = ClusterState()
        for layer in self.layers:
            x = layer(x, state)
        normed: Tensor = self.norm(x)
        return normed


class ACFDecoder(nn.Module):
    """Words with clusters along the caption, and attention to the image; log-probabilities of the next word.

    Args:
        vocab_size: V.
        embed_dim: D.
        num_heads: H.
        ffn_dim: Hidden width of the feed-forward networks.
        num_layers: Number of layers.
        dropout: As in `ACFLayer`, and on the embedded words.

    Example:
        >>> import torch
        >>> decoder = ACFDecoder(11, embed_dim=8, num_heads=2)
        >>> decoder(torch.zeros(2, 5, dtype=torch.long), torch.randn(2, 16, 8)).shape
        torch.Size([2, 5, 11])
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 512,
        num_heads: int = 8,
        ffn_dim: int = 512,
        num_layers: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.layers = nn.ModuleList(
            ACFLayer(embed_dim, num_heads, ffn_dim, dropout, clusters={"kind": "span"}, layer=layer, cross=True)
            for layer in range(num_layers)
        )
        self.norm = AnnotatedLayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size)
        self.dropout = nn.Dropout(dropout)
        _xavier(self)

    def forward(
        self, tokens: Tensor, memory: Tensor, *, token_mask: Tensor | None = None, causal: bool = True
    ) -> Tensor:
        """Log-probabilities at each position, (R, L, V), float32 at least.

        Args:
            tokens: Ids, (R, L).
            memory: Encoded images, (R, M, D).
            token_mask: Non-zero at tokens that may be seen, (R, L); None: all.
            causal: Position l sees the tokens up to l and predicts the next one. False, for the rows of
                `prefix_mask_rows`: it sees all that the mask leaves, and predicts its own.
        """
        check_shape("tokens", tokens, "R, L", (None, None))
        length, width = tokens.shape[1], self.embedding.embedding_dim
        check_shape("memory", memory, "R, M, D", (len(tokens), None, width))
        embedded = self.embedding(tokens) * math.sqrt(width)
        x = self.dropout(embedded + _positions(length, width, embedded))
        closed = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1) if causal else None
        padding = None if token_mask is None else token_mask == 0
        state = ClusterState()
        for layer in self.layers:
            x = layer(x, state, memory, padding, closed)
        logits = self.head(self.norm(x))
        return F.log_softmax(logits.to(at_least_float32(logits)), -1)


class ACFCaptioner(nn.Module):
    """ACF's captioning model on grid features.

    Args:
        vocab_size: V.
        begin_id: Id of the token that every caption begins with.
        end_id: Id of the token that ends one.
        mask_id: None writes captions causally. An id of [MASK] writes them as the authors do: the decoder sees the
            prefix in both directions and [MASK] in the place of the next word (train with `prefix_mask_rows`).
        feature_dim: Width of the image features.
        grid_size: (Gh, Gw) of the features.
        embed_dim: D.
        num_heads: H.
        ffn_dim: Hidden width of the feed-forward networks.
        num_plain: Encoder layers without clusters.
        num_grouped: Encoder layers with clusters.
        num_decoder_layers: Decoder layers.
        dropout: In the layers.
        feature_dropout: On the projected features.
        max_length: Longest caption written, with its end.
        layout: As in `GridCluster`.

    Example:
        >>> import torch
        >>> model = ACFCaptioner(11, begin_id=0, end_id=10, feature_dim=6, grid_size=(2, 2), embed_dim=8, num_heads=2)
        >>> model.greedy(torch.randn(3, 4, 6)).tokens.shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        begin_id: int = 0,
        end_id: int,
        mask_id: int | None = None,
        feature_dim: int = 1536,
        grid_size: tuple[int, int] = (12, 12),
        embed_dim: int = 512,
        num_heads: int = 8,
        ffn_dim: int = 512,
        num_plain: int = 3,
        num_grouped: int = 3,
        num_decoder_layers: int = 6,
        dropout: float = 0.1,
        feature_dropout: float = 0.5,
        max_length: int = 16,
        layout: GridLayout = "separable",
    ) -> None:
        super().__init__()
        for name, token in (("begin_id", begin_id), ("end_id", end_id), ("mask_id", mask_id)):
            if token is not None:
                check_range(name, token, 0, vocab_size - 1)
        check_range("max_length", max_length, 1, math.inf)
        self.begin_id = begin_id
        self.end_id = end_id
        self.mask_id = mask_id
        self.max_length = max_length
        self.project = nn.Sequential(nn.Linear(feature_dim, embed_dim), nn.ReLU(), nn.Dropout(feature_dropout))
        self.encoder = ACFEncoder(
            grid_size, embed_dim, num_heads, ffn_dim, num_plain, num_grouped, dropout, layout=layout
        )
        self.decoder = ACFDecoder(vocab_size, embed_dim, num_heads, ffn_dim, num_decoder_layers, dropout)
        nn.init.xavier_uniform_(self.project[0].weight)  # type: ignore[arg-type]

    def encode(self, features: Tensor) -> Tensor:
        """Image features (B, Gh·Gw, feature_dim) to a memory (B, Gh·Gw, D)."""
        memory: Tensor = self.encoder(self.project(features))
        return memory

    def forward(
        self, features: Tensor, tokens: Tensor, *, token_mask: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities for given captions, (R, L, V): see `ACFDecoder.forward`.

        Args:
            features: (B, Gh·Gw, feature_dim).
            tokens: Captions with their begin token, (R, L).
            token_mask: Non-zero at tokens that may be seen, (R, L).
            index: The image of each caption, (R,); None: caption i belongs to image i.
        """
        memory = self.encode(features)
        memory = memory if index is None else memory.index_select(0, index)
        logprobs: Tensor = self.decoder(tokens, memory, token_mask=token_mask, causal=self.mask_id is None)
        return logprobs

    @torch.no_grad()
    def greedy(self, features: Tensor) -> Captions:
        """The most probable word at each step, for features (B, Gh·Gw, feature_dim)."""
        return self._write(self.encode(features), lambda logprobs: logprobs.argmax(-1))

    def sample(self, features: Tensor, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Captions:
        """Captions drawn word by word; the log-probabilities carry gradients, for `self_critical_loss`.

        Args:
            features: (B, Gh·Gw, feature_dim).
            num_samples: n captions for each image, which are neighbours in the B·n rows.
            generator: Of the random numbers, on the features' device.
        """
        check_range("num_samples", num_samples, 1, math.inf)

        def draw(logprobs: Tensor) -> Tensor:
            # torch.multinomial draws in the same way, after it has waited for the device to check its input.
            noise = torch.empty_like(logprobs).exponential_(generator=generator)
            return (logprobs - noise.log()).argmax(-1)

        return self._write(self.encode(features).repeat_interleave(num_samples, 0), draw)

    @torch.no_grad()
    def beam_search(self, features: Tensor, beam_size: int = 5) -> Captions:
        """The most probable of the captions that are found by keeping the best `beam_size` prefixes at each step.

        Args:
            features: (B, Gh·Gw, feature_dim).
            beam_size: Prefixes kept for an image.
        """
        check_range("beam_size", beam_size, 1, math.inf)
        memory = self.encode(features)
        batch, beams = len(memory), beam_size
        memory = memory.repeat_interleave(beams, 0)
        tokens = torch.full((batch * beams, 1), self.begin_id, device=memory.device)
        logprobs = torch.zeros(batch * beams, 0, device=memory.device, dtype=at_least_float32(memory))
        # All beams start from the same prefix: only the first one counts.
        scores = torch.full((batch, beams), -math.inf, device=memory.device, dtype=logprobs.dtype)
        scores[:, 0] = 0
        for _ in range(self.max_length):
            step = self._next(tokens, memory)
            size = step.shape[-1]
            total = (scores.view(-1, 1) + step).view(batch, beams * size)
            scores, best = total.topk(beams, 1)
            parent = (torch.arange(batch, device=best.device)[:, None] * beams + best // size).flatten()
            word = (best % size).flatten()
            chosen = step[parent].gather(1, word[:, None])
            tokens = torch.cat([tokens[parent], word[:, None]], 1)
            logprobs = torch.cat([logprobs[parent], chosen], 1)
        first = torch.arange(batch, device=memory.device) * beams  # topk sorts
        return Captions(tokens[first, 1:], logprobs[first])

    def _write(self, memory: Tensor, choose: Any) -> Captions:
        tokens = torch.full((len(memory), 1), self.begin_id, device=memory.device)
        chosen = []
        for _ in range(self.max_length):
            logprobs = self._next(tokens, memory)
            word = choose(logprobs.detach())[:, None]
            chosen.append(logprobs.gather(1, word))
            tokens = torch.cat([tokens, word], 1)
        return Captions(tokens[:, 1:], torch.cat(chosen, 1))

    def _next(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Log-probabilities of the next word (R, V); behind the end only `end_id` follows, for certain."""
        if self.mask_id is None:
            logprobs = self.decoder(tokens, memory)[:, -1]
        else:
            masked = F.pad(tokens, (0, 1), value=self.mask_id)
            logprobs = self.decoder(masked, memory, causal=False)[:, -1]
        ended = (tokens[:, 1:] == self.end_id).any(1, keepdim=True)
        is_end = torch.arange(logprobs.shape[1], device=tokens.device) == self.end_id
        certain = torch.where(is_end, 0.0, -math.inf).to(logprobs.dtype)
        return torch.where(ended, certain, logprobs)


def _xavier(module: nn.Module) -> None:
    """For all matrices, as the authors start; one-dimensional parameters keep their default."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            # The maps to queries, keys and values are matrices of their own.
            for matrix in parameter.chunk(3) if name.endswith("in_proj_weight") else [parameter]:
                nn.init.xavier_uniform_(matrix)


def _positions(length: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids (N, D), sine and cosine in turn."""
    place = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    waves = torch.stack([(place * rate).sin(), (place * rate).cos()], -1).flatten(1)
    return waves[:, :width].to(like.dtype)
