r"""Cluster matrices of grids: the patches of an image, clustered along rows and columns.

Source: as `span_cluster_matrix`. The separable layout is our reading of what the authors' code is meant to do, and a
guess; the official one is what that code does.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._logits import check_choice
from lightning_methods.functional._shapes import check_floating, check_shape, no_autocast
from lightning_methods.functional.acf import (
    SpanScores,
    cluster_from_logits,
    grow,
    logits_of_scores,
    span_logits,
    span_scores,
)

GridLayout: TypeAlias = Literal["separable", "official"]


class GridClusterResult(NamedTuple):
    """C (B, N, N), and log(1 - M) of rows (B, Sh, Sw, Sw) and columns (B, Sw, Sh, Sh) for the next layer."""

    matrix: Tensor
    row_log_gap: Tensor
    col_log_gap: Tensor


def grid_cluster_matrix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    row_log_gap: Tensor | None = None,
    col_log_gap: Tensor | None = None,
    *,
    grid_size: tuple[int, int],
    pool: int = 2,
    layout: GridLayout = "separable",
) -> GridClusterResult:
    r"""Cluster matrix between all cells of a grid, from clusters along its rows and columns.

    The cells are averaged in squares of `pool` by `pool`, each row and each column of squares has a cluster matrix as
    `span_cluster_matrix` makes it, R[row] and K[column], with the same weights. Then, in the layout

    - "separable": $C_{(x,i),(y,j)} = R[x]_{ij} K[i]_{xy}$, the horizontal step in the start's row and the vertical
      step in the start's column; every cell has the C of its square.
    - "official": as the authors' code computes it, for their checkpoints. It pools over memory instead of over
      neighbours, multiplies along starts instead of ends, adds R[row]_ij and R[i]_row,j where it means to mirror, and
      tiles where it means to repeat. It depends on the place in the grid, C may exceed 1 and can be 0, and the grid
      must be square with `pool` 2.

    Args:
        x: Normalised cells, row by row, (B, Gh·Gw, D).
        weight: (1, 2D).
        bias: (1,), or None.
        row_log_gap: Of the layer before, (B, Sh, Sw, Sw) with S = G / pool; None for the first.
        col_log_gap: (B, Sw, Sh, Sh); None for the first.
        grid_size: (Gh, Gw).
        pool: Side of the squares; it divides the grid's.
        layout: As above.

    Raises:
        ValueError: If shapes do not fit, or the layout does not take the grid.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 4 * 6, 8)
        >>> result = grid_cluster_matrix(x, torch.zeros(1, 16), grid_size=(4, 6))
        >>> result.matrix.shape, result.row_log_gap.shape, result.col_log_gap.shape
        (torch.Size([2, 24, 24]), torch.Size([2, 2, 3, 3]), torch.Size([2, 3, 2, 2]))
    """
    _check_grid(x, grid_size, pool, layout)
    if layout == "official":
        return _official(x, weight, bias, row_log_gap, col_log_gap, grid_size[0])
    height, width = grid_size
    # Averaging and the scores are linear: the scores are averaged, which are two numbers a cell.
    cells = torch.stack(span_scores(x, weight, bias), 1).view(-1, 2, height, width)
    squares = F.avg_pool2d(cells, pool)
    rows = logits_of_scores(SpanScores(*squares.unbind(1)))
    columns = logits_of_scores(SpanScores(*squares.mT.unbind(1)))
    row, row_log_gap = cluster_from_logits(rows, _checked("row_log_gap", row_log_gap, rows))
    column, col_log_gap = cluster_from_logits(columns, _checked("col_log_gap", col_log_gap, columns))
    for dim in (1, 2, 3):
        row, column = row.repeat_interleave(pool, dim), column.repeat_interleave(pool, dim)
    # (B, x, i, y, j)
    matrix = row.unsqueeze(3) * column.transpose(1, 2).unsqueeze(4)
    return GridClusterResult(matrix.reshape(-1, height * width, height * width), row_log_gap, col_log_gap)


def _official(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_gap: Tensor | None, col_gap: Tensor | None, side: int
) -> GridClusterResult:
    batch, _, width = x.shape
    half = side // 2
    pooled = F.avg_pool2d(x.reshape(batch, width, side, side), 2).reshape(batch, half, half, width)
    result = []
    for name, lines, gap in (("row_log_gap", pooled, row_gap), ("col_log_gap", pooled.transpose(1, 2), col_gap)):
        logits = span_logits(lines.flatten(0, 1), weight, bias).view(batch, half, half, half)
        log_probs, gap = grow(logits, _checked(name, gap, logits))
        with no_autocast(x):
            product = log_probs.cumsum(-2).exp().triu()
            unit = torch.eye(half, dtype=torch.bool, device=x.device)
            result.append(((product + product.transpose(1, 2)).masked_fill(unit, 1), gap))
    (row, row_gap), (column, col_gap) = result
    index = torch.arange(side, device=x.device)
    tiled, repeated = index % half, index // 2
    # (B, a, j', x', y'): row[x' // 2, a mod S, j' // 2] · column[a mod S, x' // 2, y' // 2]
    row = row[:, repeated][:, :, tiled][:, :, :, repeated].permute(0, 2, 3, 1)
    column = column[:, tiled][:, :, repeated][:, :, :, repeated]
    matrix = row.unsqueeze(4) * column.unsqueeze(2)
    return GridClusterResult(matrix.reshape(batch, side**2, side**2), row_gap, col_gap)


def _checked(name: str, log_gap: Tensor | None, logits: Tensor) -> Tensor | None:
    if log_gap is not None:
        check_shape(name, log_gap, "B, lines, S, S", logits.shape)
    return log_gap


def _check_grid(x: Tensor, grid_size: tuple[int, int], pool: int, layout: GridLayout) -> None:
    check_floating(x=x)
    check_choice("layout", layout, GridLayout)
    height, width = grid_size
    if height < 1 or width < 1:
        raise ValueError(f"`grid_size` must be at least 1 x 1, got {height} x {width}")
    check_shape("x", x, "B, Gh·Gw, D", (None, height * width, None))
    if pool < 1 or height % pool or width % pool:
        raise ValueError(f"`pool` must divide the sides of the grid {height} x {width}, got {pool}")
    if layout == "official" and (height != width or pool != 2):
        raise ValueError(f"`layout` 'official' needs a square grid and pool 2, got {height} x {width} and pool {pool}")
