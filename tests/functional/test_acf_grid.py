import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from no_sync import NoSync

from lightning_methods.functional import cluster_attention, grid_cluster_matrix, span_cluster_matrix, span_logits

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(grid=(4, 6), width=4, batch=2, seed=0):
    inputs = randn(batch, grid[0] * grid[1], width, seed=seed), randn(1, 2 * width, seed=50), randn(1, seed=90)
    return [tensor.requires_grad_() for tensor in inputs]


def separable(x, weight, bias, grid, pool, row_gap=None, col_gap=None):
    """The definition: pool, cluster each line, and one product for each pair of cells."""
    height, width = grid
    squares = F.avg_pool2d(x.unflatten(1, grid).movedim(-1, 1), pool).movedim(1, -1)
    rows = [
        span_cluster_matrix(squares[:, r], weight, bias, None if row_gap is None else row_gap[:, r]).matrix
        for r in range(height // pool)
    ]
    columns = [
        span_cluster_matrix(squares[:, :, c], weight, bias, None if col_gap is None else col_gap[:, c]).matrix
        for c in range(width // pool)
    ]
    result = []
    for a in range(height * width):
        for b in range(height * width):
            x0, i, y, j = (place // pool for place in (*divmod(a, width), *divmod(b, width)))
            result.append(rows[x0][:, i, j] * columns[i][:, x0, y])
    return torch.stack(result, 1).view(-1, height * width, height * width)


def official(x, weight, bias, side, row_gap=None, col_gap=None):
    """The four departures, one index at a time."""
    half, width = side // 2, x.shape[2]
    batches = []
    for b, sample in enumerate(x):
        image = sample.reshape(width, side, side)
        pooled = F.avg_pool2d(image[None], 2)[0].reshape(half * half, width).reshape(half, half, width)
        products = []
        for lines, gap in ((pooled, row_gap), (pooled.transpose(0, 1), col_gap)):
            m = span_logits(lines, weight, bias).sigmoid()
            if gap is not None:
                before = 1 - gap[b].exp()
                m = before + (1 - before) * m
            t = torch.zeros(half, half, half, dtype=x.dtype)
            y = torch.zeros_like(t)
            lines_starts_ends = list(itertools.product(range(half), repeat=3))
            for r, i, j in lines_starts_ends:
                if i <= j:
                    t[r, i, j] = m[r, : i + 1, j].prod()
            for r, i, j in lines_starts_ends:
                y[r, i, j] = 1 if i == j else t[r, i, j] + t[i, r, j]
            products.append(y)
        row, column = products
        c = torch.zeros(side * side, side * side, dtype=x.dtype)
        for a, j, u, v in itertools.product(range(side), repeat=4):
            pair = row[u // 2, a % half, j // 2] * column[a % half, u // 2, v // 2]
            c[a * side + j, u * side + v] = pair
        batches.append(c)
    return torch.stack(batches)


def agree(found, expected, leaves):
    close(found, expected)
    cotangent = randn(*found.shape, seed=77)
    for one, other in zip(
        torch.autograd.grad((found * cotangent).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * cotangent).sum(), leaves, retain_graph=True),
        strict=True,
    ):
        close(one, other)


@pytest.mark.parametrize(("grid", "pool"), [((4, 6), 2), ((3, 2), 1), ((6, 3), 3), ((2, 2), 2)])
def test_separable(grid, pool):
    inputs, other = problem(grid), problem(grid, seed=3)
    first = grid_cluster_matrix(*inputs, grid_size=grid, pool=pool)
    agree(first.matrix, separable(*inputs, grid, pool), inputs)
    assert first.row_log_gap.shape == (2, grid[0] // pool, grid[1] // pool, grid[1] // pool)
    assert first.col_log_gap.shape == (2, grid[1] // pool, grid[0] // pool, grid[0] // pool)
    second = grid_cluster_matrix(*other, *first[1:], grid_size=grid, pool=pool)
    agree(second.matrix, separable(*other, grid, pool, *first[1:]), [inputs[0], *other])
    assert (second.matrix >= first.matrix - 1e-12).all()
    assert ((first.matrix > 0) & (first.matrix <= 1)).all()
    assert (first.matrix.diagonal(0, 1, 2) == 1).all()


@pytest.mark.parametrize("side", [2, 4, 6])
def test_official(side):
    grid = (side, side)
    inputs, other = problem(grid), problem(grid, seed=3)
    first = grid_cluster_matrix(*inputs, grid_size=grid, layout="official")
    close(first.matrix, official(*inputs, side))
    second = grid_cluster_matrix(*other, *first[1:], grid_size=grid, layout="official")
    close(second.matrix, official(*other, side, *first[1:]))
    if side > 2:  # a single square has C = 1 everywhere
        agree(first.matrix, official(*inputs, side), inputs)
        agree(second.matrix, official(*other, side, *first[1:]), [inputs[0], *other])


def test_official_exceeds_one_and_attention_takes_it():
    x, weight, bias = (tensor.detach() for tensor in problem((4, 4)))
    cluster = grid_cluster_matrix(x, weight, bias + 9, grid_size=(4, 4), layout="official").matrix
    assert cluster.max() > 1.5
    assert cluster.min() == 0
    query = randn(2, 1, 16, 3).requires_grad_()
    for normalize in (False, True):
        cluster_attention(query, query, query, cluster, normalize=normalize).sum().backward()
        assert query.grad.isfinite().all()


def test_gradcheck():
    call = functools.partial(grid_cluster_matrix, grid_size=(4, 2))
    assert torch.autograd.gradcheck(lambda *args: tuple(call(*args)), problem((4, 2), 2, 1))


def test_transposed_grid():
    """Rows and columns play the same part: transposing the grid swaps the two factors' order only."""
    x, weight, bias = problem((4, 6))
    turned = x.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)
    one = grid_cluster_matrix(x, weight, bias, grid_size=(4, 6))
    other = grid_cluster_matrix(turned, weight, bias, grid_size=(6, 4))
    close(one.row_log_gap, other.col_log_gap)
    close(one.col_log_gap, other.row_log_gap)


def test_half_precision_and_autocast():
    x, weight, bias = (tensor.detach().bfloat16() for tensor in problem((4, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layout in ("separable", "official"):
            found = grid_cluster_matrix(x, weight, bias, grid_size=(4, 4), layout=layout)
            exact = grid_cluster_matrix(x.double(), weight.double(), bias.double(), grid_size=(4, 4), layout=layout)
            assert found.matrix.dtype == torch.float32
            if layout == "separable":  # the official layout pools the input itself, in its own precision
                torch.testing.assert_close(found.matrix.double(), exact.matrix, atol=1e-5, rtol=1e-4)


def test_never_waits_for_the_device():
    with NoSync():
        for layout in ("separable", "official"):
            grid_cluster_matrix(*problem((4, 4)), grid_size=(4, 4), layout=layout).matrix.sum().backward()


X, W = torch.zeros(2, 12, 4), torch.zeros(1, 8)
call = functools.partial(grid_cluster_matrix, grid_size=(2, 6))
BAD_CALLS = {
    "cells": (lambda: call(X, W, grid_size=(2, 5)), r"`x`.*10.*\(2, 12, 4\)"),
    "odd grid": (lambda: call(X, W, grid_size=(3, 4)), "pool.*3 x 4.*2"),
    "no pool": (lambda: call(X, W, pool=0), "pool.*0"),
    "no grid": (lambda: call(X, W, grid_size=(0, 4)), "grid_size.*0 x 4"),
    "layout": (lambda: call(X, W, layout="other"), "layout.*separable.*other"),
    "official not square": (lambda: call(X, W, layout="official"), "official.*square.*2 x 6"),
    "official pool": (
        lambda: call(torch.zeros(2, 16, 4), W, grid_size=(4, 4), pool=1, layout="official"),
        "official.*pool 1",
    ),
    "weight": (lambda: call(X, W[:, 1:]), "weight"),
    "row gap": (lambda: call(X, W, row_log_gap=torch.zeros(2, 1, 1, 3)), r"row_log_gap.*\(2, 1, 3, 3\)"),
    "col gap": (lambda: call(X, W, col_log_gap=torch.zeros(2, 1, 1, 1)), r"col_log_gap.*\(2, 3, 1, 1\)"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
