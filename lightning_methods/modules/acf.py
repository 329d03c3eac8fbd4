"""ACF's cluster layers, and what they hand on to each other."""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_methods.functional import (
    ClusterResult,
    GridClusterResult,
    SpanScores,
    grid_cluster_matrix,
    span_cluster_matrix,
    span_scores,
)
from lightning_methods.functional._logits import check_choice, check_range
from lightning_methods.functional._shapes import at_least_float32, check_shape, no_autocast
from lightning_methods.functional.acf_grid import GridLayout

ClusterNorm: TypeAlias = Literal["annotated", "layer"]
ClusterKind: TypeAlias = Literal["span", "grid"]


class AnnotatedLayerNorm(nn.Module):
    r"""The layer norm of ACF's authors: $w (x - \mathrm{mean}) / (\mathrm{std} + \varepsilon) + b$.

    Unlike in `torch.nn.LayerNorm` the standard deviation is the unbiased one, and ε is added to it instead of to the
    variance. Computed in float32 at least.

    Args:
        embed_dim: D.
        eps: ε.

    Example:
        >>> import torch
        >>> AnnotatedLayerNorm(2)(torch.tensor([[0.0, 2.0]]))
        tensor([[-0.7071,  0.7071]], grad_fn=<AddBackward0>)
    """

    def __init__(self, embed_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embed_dim))
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same shape and dtype."""
        dtype = at_least_float32(x)
        with no_autocast(x):
            centred = x.to(dtype) - x.to(dtype).mean(-1, keepdim=True)
            variance = centred.square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)
            # A constant row has the deviation 0, at which the square root has no gradient.
            constant = variance == 0
            std = variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)
            return (self.weight.to(dtype) * (centred / (std + self.eps)) + self.bias.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{len(self.weight)}, eps={self.eps}"


class _Cluster(nn.Module):
    """The norm and the linear map from an element and a span's mean to a logit."""

    def __init__(self, embed_dim: int, norm: ClusterNorm, init_bias: float | None) -> None:
        super().__init__()
        check_choice("norm", norm, ClusterNorm)
        self.norm = AnnotatedLayerNorm(embed_dim) if norm == "annotated" else nn.LayerNorm(embed_dim)
        self.linear = nn.Linear(2 * embed_dim, 1)
        self.init_bias = init_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights as the authors have them or, with `init_bias`, that bias alone."""
        self.linear.reset_parameters()
        if self.init_bias is None:
            nn.init.xavier_uniform_(self.linear.weight)
        else:
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, self.init_bias)


class SpanCluster(_Cluster):
    """`span_cluster_matrix` of normalised elements, with its weights.

    Args:
        embed_dim: D.
        norm: "annotated" as the authors have it, or "layer" for `torch.nn.LayerNorm`.
        init_bias: None starts as the authors do. A number starts from zero weights and this bias: at 6 every M is
            0.9975, so that attention is nearly what it was without clusters.

    Raises:
        ValueError: If `norm` is neither.

    Example:
        >>> import torch
        >>> SpanCluster(4, init_bias=6.0)(torch.randn(1, 9, 4)).matrix[0, 0, 8]
        tensor(0.9780, grad_fn=<SelectBackward0>)
    """

    def __init__(self, embed_dim: int, norm: ClusterNorm = "annotated", init_bias: float | None = None) -> None:
        super().__init__(embed_dim, norm, init_bias)

    def forward(self, x: Tensor, log_gap: Tensor | None = None) -> ClusterResult:
        """Elements (B, N, D), not normalised, and what the layer before has handed on, (B, N, N)."""
        return span_cluster_matrix(self.norm(x), self.linear.weight, self.linear.bias, log_gap)

    def scores(self, x: Tensor) -> SpanScores:
        """What `span_cluster_attention` makes the matrix from, of elements (B, N, D)."""
        return span_scores(self.norm(x), self.linear.weight, self.linear.bias)


class GridCluster(_Cluster):
    """`grid_cluster_matrix` of normalised cells, with its weights.

    Args:
        embed_dim: D.
        grid_size: (Gh, Gw).
        pool: Side of the squares that are clustered.
        layout: As in `grid_cluster_matrix`.
        norm: As in `SpanCluster`.
        init_bias: As in `SpanCluster`.

    Raises:
        ValueError: If `norm` or `layout` is none of those, or `pool` does not divide the sides.

    Example:
        >>> import torch
        >>> GridCluster(4, (2, 6))(torch.randn(3, 12, 4)).matrix.shape
        torch.Size([3, 12, 12])
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: tuple[int, int],
        pool: int = 2,
        layout: GridLayout = "separable",
        norm: ClusterNorm = "annotated",
        init_bias: float | None = None,
    ) -> None:
        super().__init__(embed_dim, norm, init_bias)
        self.grid_size = (grid_size[0], grid_size[1])
        self.pool = pool
        self.layout: GridLayout = layout
        # The function's own checks, before there is data.
        cells = torch.empty(0, grid_size[0] * grid_size[1], embed_dim)
        grid_cluster_matrix(
            cells, torch.zeros(1, 2 * embed_dim), grid_size=self.grid_size, pool=pool, layout=self.layout
        )

    def forward(
        self, x: Tensor, row_log_gap: Tensor | None = None, col_log_gap: Tensor | None = None
    ) -> GridClusterResult:
        """Cells (B, Gh·Gw, D), not normalised, and what the layer before has handed on."""
        return grid_cluster_matrix(
            self.norm(x),
            self.linear.weight,
            self.linear.bias,
            row_log_gap,
            col_log_gap,
            grid_size=self.grid_size,
            pool=self.pool,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        """What the grid is."""
        return f"grid_size={self.grid_size}, pool={self.pool}, layout={self.layout!r}"


class ClusterState:
    """What the layers of one stack hand on: clusters grow from a layer to the next.

    Layers know their place in the stack. What a layer left stays until the first layer runs again, so that layers that
    are computed once more in the backward pass (gradient checkpointing) find what they found the first time. Copies and
    pickles are empty.

    Example:
        >>> state = ClusterState()
        >>> state.store(0, "grown")
        >>> state.before(0), state.before(1)
        (None, 'grown')
    """

    def __init__(self) -> None:
        self._carried: dict[int, Any] = {}
        self._matrices: dict[int, Tensor] = {}

    def before(self, layer: int) -> Any:
        """What the layer before has left; None if there is none."""
        return self._carried.get(layer - 1)

    def matrix(self, layer: int) -> Tensor | None:
        """What a layer's attention was multiplied by, without gradients, if it has made that as a whole."""
        return self._matrices.get(layer)

    def store(self, layer: int, carried: Any, matrix: Tensor | None = None) -> None:
        """Leave something for the next layer; the first one clears what an earlier forward pass left."""
        if layer == 0:
            self.clear()
        self._carried[layer] = carried
        if matrix is not None:
            self._matrices[layer] = matrix.detach()

    def clear(self) -> None:
        """Let go of everything, and of the graph behind it."""
        self._carried.clear()
        self._matrices.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_carried": {}, "_matrices": {}}


class ClusterSource:
    """The last input of another module, which it is a forward pre-hook of (with keywords): what a layer clusters.

    It stays until the next call, for layers that are computed once more in the backward pass. Copies and pickles are
    empty.

    Args:
        method: Name of who has put it there.

    Example:
        >>> import torch
        >>> source, block = ClusterSource("acf"), torch.nn.Linear(4, 4)
        >>> hook = block.register_forward_pre_hook(source, with_kwargs=True)
        >>> _ = block(torch.ones(1, 4))
        >>> source.value
        tensor([[1., 1., 1., 1.]])
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self._value: Tensor | None = None

    def __call__(self, _part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before the other module."""
        self._value = next(iter((*args, *kwargs.values())))

    @property
    def value(self) -> Tensor:
        """What the module got.

        Raises:
            RuntimeError: If it was not called.
        """
        if self._value is None:
            raise RuntimeError(
                f"{self.method!r} clusters the input of another module, which was not called before the attention"
            )
        return self._value

    def clear(self) -> None:
        """Let go of it, and of the graph behind it."""
        self._value = None

    def __getstate__(self) -> dict[str, Any]:
        return {"method": self.method, "_value": None}


class ClusterLayer(nn.Module):
    """The clusters of one attention layer: of a sequence or grid behind prefix tokens, grown from the layer before.

    Args:
        embed_dim: D.
        kind: "span" for sequences, "grid" for images.
        grid_size: (Gh, Gw), for grids.
        prefix_tokens: Leading tokens ([CLS], registers) outside all clusters: C is 1 in their rows and columns.
        pool: As in `GridCluster`.
        layout: As in `GridCluster`.
        norm: As in `SpanCluster`.
        init_bias: As in `SpanCluster`.

    Attributes:
        state: Shared by the layers of a stack; None: this layer grows from nothing.
        layer: Place in the stack, from 0.
        source: What is clustered in place of the attention's own input; None: that.

    Raises:
        ValueError: If the arguments do not fit each other.

    Example:
        >>> import torch
        >>> ClusterLayer(4, "grid", grid_size=(2, 2), prefix_tokens=1)(torch.randn(3, 5, 4)).shape
        torch.Size([3, 5, 5])
    """

    def __init__(
        self,
        embed_dim: int,
        kind: ClusterKind = "span",
        *,
        grid_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        pool: int = 2,
        layout: GridLayout = "separable",
        norm: ClusterNorm = "annotated",
        init_bias: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, ClusterKind)
        check_range("prefix_tokens", prefix_tokens, 0, float("inf"))
        if (kind == "grid") != (grid_size is not None):
            raise ValueError(f"`grid_size` goes with kind 'grid', got {grid_size} and {kind!r}")
        self.cluster: SpanCluster | GridCluster = (
            SpanCluster(embed_dim, norm, init_bias)
            if grid_size is None
            else GridCluster(embed_dim, grid_size, pool, layout, norm, init_bias)
        )
        self.prefix_tokens = prefix_tokens
        self.state: ClusterState | None = None
        self.layer = 0
        self.source: ClusterSource | None = None

    def forward(self, x: Tensor, state: ClusterState | None = None) -> Tensor:
        """The cluster matrix of a layer's input.

        Args:
            x: (B, prefix + N, D).
            state: Instead of the attribute.

        Returns:
            (B, prefix + N, prefix + N).

        Raises:
            ValueError: If the sequence is not the prefix and the grid.
        """
        self._check_length(x)
        state = self.state if state is None else state
        before = () if state is None else state.before(self.layer) or ()
        matrix, *carried = self.cluster(x[:, self.prefix_tokens :], *before)
        if state is not None:
            state.store(self.layer, tuple(carried), matrix)
        prefix: Tensor = F.pad(matrix, (self.prefix_tokens, 0, self.prefix_tokens, 0), value=1.0)
        return prefix

    def input(self, given: Tensor | None) -> Tensor | None:
        """What is clustered: what the attention was given, or what the source has; None for the attention's input."""
        return self.source.value if given is None and self.source is not None else given

    def scores(self, x: Tensor, state: ClusterState | None = None) -> list[SpanScores]:
        """For `span_cluster_attention`: the scores of this layer and of those that its clusters have grown from."""
        if not isinstance(self.cluster, SpanCluster) or self.prefix_tokens:
            raise ValueError("`block_size` needs kind 'span' without prefix tokens")
        state = self.state if state is None else state
        scores = [*(() if state is None else state.before(self.layer) or ()), self.cluster.scores(x)]
        if state is not None:
            state.store(self.layer, tuple(scores))
        return scores

    def extra_repr(self) -> str:
        """What is not in the cluster below."""
        return f"prefix_tokens={self.prefix_tokens}, layer={self.layer}"

    def _check_length(self, x: Tensor) -> None:
        check_shape("x", x, "B, N, D", (None,) * 3)
        if isinstance(self.cluster, GridCluster):
            height, width = self.cluster.grid_size
            if x.shape[1] != self.prefix_tokens + height * width:
                expected = f"{self.prefix_tokens} prefix tokens and a grid of {height} x {width}"
                raise ValueError(f"the sequence must be {expected}, got {x.shape[1]} tokens")
        elif x.shape[1] <= self.prefix_tokens:
            raise ValueError(
                f"the sequence must be longer than its {self.prefix_tokens} prefix tokens, got {x.shape[1]}"
            )
