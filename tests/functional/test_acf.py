import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import (
    cluster_attention,
    cluster_from_logits,
    neighbor_cluster_matrix,
    span_cluster_matrix,
    span_logits,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(batch=2, length=5, width=4, seed=0):
    inputs = randn(batch, length, width, seed=seed), randn(1, 2 * width, seed=seed + 50), randn(1, seed=seed + 90)
    return [tensor.requires_grad_() for tensor in inputs]


def plain_logits(x, weight, bias):
    """z[b][i][j] for i <= j, with the mean written out."""
    width = x.shape[2]
    own, mean = weight[0, :width], weight[0, width:]
    rows = []
    for sample in x:
        for i in range(len(sample)):
            for j in range(len(sample)):
                z = own @ sample[j] + mean @ sample[i : j + 1].mean(0) + bias[0] if j >= i else x.new_zeros(())
                rows.append(z)
    return torch.stack(rows).view(len(x), x.shape[1], x.shape[1])


def plain_growth(logits, before=None):
    """M of one line of N elements, by the recurrence."""
    sigma = logits.sigmoid()
    return sigma if before is None else before + (1 - before) * sigma


def plain_matrix(m):
    """C of one M (N, N)."""
    length = len(m)
    rows = []
    for i in range(length):
        for j in range(length):
            start, end = min(i, j), max(i, j)
            product = m.new_ones(())
            if i != j:
                for k in range(start, end + 1):
                    product = product * m[start, k]
            rows.append(product)
    return torch.stack(rows).view(length, length)


def gradients_agree(found, expected, leaves):
    cotangent = randn(*found.shape, seed=77)
    for one, other in zip(
        torch.autograd.grad((found * cotangent).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * cotangent).sum(), leaves, retain_graph=True),
        strict=True,
    ):
        close(one, other)


class TestSpans:
    @settings(max_examples=20, deadline=None)
    @given(batch=st.integers(1, 2), length=st.integers(1, 6), width=st.integers(1, 3), seed=st.integers(0, 20))
    def test_logits(self, batch, length, width, seed):
        inputs = problem(batch, length, width, seed)
        close(span_logits(*inputs), plain_logits(*inputs))
        close(span_logits(*inputs[:2]), plain_logits(*inputs[:2], torch.zeros(1)).triu())

    def test_two_layers(self):
        inputs, other = problem(), problem(seed=5)
        first = span_cluster_matrix(*inputs)
        second = span_cluster_matrix(*other, first.log_gap)
        m = [[], []]
        for z, y in zip(plain_logits(*inputs), plain_logits(*other), strict=True):
            m[0].append(plain_growth(z))
            m[1].append(plain_growth(y, m[0][-1]))
        for found, layer in ((first, m[0]), (second, m[1])):
            expected = torch.stack([plain_matrix(matrix) for matrix in layer])
            close(found.matrix, expected)
            close(found.log_gap, torch.stack([(1 - matrix).log().triu() for matrix in layer]))
            gradients_agree(found.matrix, expected, inputs)
        gradients_agree(second.matrix, torch.stack([plain_matrix(x) for x in m[1]]), other)

    def test_gradcheck(self):
        assert torch.autograd.gradcheck(span_logits, problem(1, 3, 2))
        logits, gap = randn(2, 3, 3).requires_grad_(), (-randn(2, 3, 3, seed=1).abs()).triu().requires_grad_()
        assert torch.autograd.gradcheck(lambda *args: tuple(cluster_from_logits(*args)), (logits,))
        assert torch.autograd.gradcheck(lambda z: tuple(cluster_from_logits(z, gap.detach())), (logits,))
        upper = torch.ones(3, 3).triu().bool()

        def by_gap(values):
            return tuple(
                cluster_from_logits(logits.detach(), gap.detach().masked_scatter(upper.expand(2, 3, 3), values))
            )

        assert torch.autograd.gradcheck(by_gap, (gap.detach()[upper.expand(2, 3, 3)].requires_grad_(),))

    @settings(max_examples=25, deadline=None)
    @given(layers=st.integers(1, 4), length=st.integers(1, 7), seed=st.integers(0, 50), scale=st.sampled_from([1, 30]))
    def test_clusters_grow(self, layers, length, seed, scale):
        before, gap = None, None
        for layer in range(layers):
            matrix, gap = cluster_from_logits(scale * randn(2, length, length, seed=seed + layer).float(), gap)
            assert ((matrix >= 0) & (matrix <= 1)).all()
            assert torch.equal(matrix, matrix.mT)
            assert (matrix.diagonal(0, 1, 2) == 1).all()
            assert torch.equal(gap, gap.triu())
            if before is not None:
                assert (matrix >= before * (1 - 1e-5)).all()
            before = matrix

    @settings(max_examples=25, deadline=None)
    @given(length=st.integers(2, 8), seed=st.integers(0, 99), data=st.data())
    def test_depends_on_the_span_alone(self, length, seed, data):
        """C_ij must not see elements after j, hence a causal layer stays causal, nor those before i."""
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start + 1, length))
        x, weight, bias = (tensor.detach() for tensor in problem(1, length, 3, seed))
        changed = x.clone()
        changed[:, :start] += 3
        changed[:, stop:] -= 5
        inside = (slice(None), slice(start, stop), slice(start, stop))
        one, other = span_cluster_matrix(x, weight, bias), span_cluster_matrix(changed, weight, bias)
        close(one.matrix[inside], other.matrix[inside])
        close(one.log_gap[inside], other.log_gap[inside])

    def test_below_the_diagonal_nothing_is_read(self):
        logits = randn(2, 4, 4).requires_grad_()
        poisoned = torch.where(torch.ones(4, 4).tril(-1).bool(), float("nan"), logits)
        found = cluster_from_logits(poisoned)
        close(found.matrix, cluster_from_logits(logits).matrix)
        (gradient,) = torch.autograd.grad(found.matrix.sum(), logits)
        assert torch.equal(gradient, gradient.triu())
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("logit", [-1e30, -200.0, -100.0, 100.0, 1e4])
    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_saturated(self, logit, layers):
        z = torch.full((1, 40, 40), logit, requires_grad=True)
        gap = None
        for _ in range(layers):
            matrix, gap = cluster_from_logits(z, gap)
        expected = torch.eye(40) if logit < 0 else torch.ones(40, 40)
        torch.testing.assert_close(matrix[0], expected)
        (gradient,) = torch.autograd.grad(matrix.sum() + gap.clamp_min(-10).sum(), z)
        assert gradient.isfinite().all()

    def test_one_element(self):
        inputs = problem(2, 1, 3)
        found = span_cluster_matrix(*inputs)
        close(found.matrix, torch.ones(2, 1, 1, dtype=torch.float64))
        assert all((g == 0).all() for g in torch.autograd.grad(found.matrix.sum(), inputs))

    def test_no_sample_and_more_dimensions(self):
        assert span_cluster_matrix(torch.zeros(0, 4, 2), torch.zeros(1, 4)).matrix.shape == (0, 4, 4)
        logits = randn(2, 3, 4, 4)
        close(cluster_from_logits(logits).matrix[1, 2], cluster_from_logits(logits[1, 2]).matrix)

    def test_long_sequences_keep_their_digits(self):
        x = (50 + randn(1, 2000, 4)).requires_grad_()
        weight, bias = randn(1, 8, seed=1), randn(1, seed=2)
        exact = span_logits(x, weight, bias)
        found = span_logits(x.float(), weight.float(), bias.float())
        assert (found - exact).abs().max() < 1e-3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_and_autocast(self, dtype):
        x, weight, bias = (tensor.detach().to(dtype) for tensor in problem())
        expected = span_cluster_matrix(x.double(), weight.double(), bias.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = span_cluster_matrix(x, weight, bias)
        assert found.matrix.dtype == found.log_gap.dtype == torch.float32
        torch.testing.assert_close(found.matrix.double(), expected.matrix, atol=1e-5, rtol=1e-4)

    def test_never_waits_for_the_device(self):
        inputs = problem()
        with NoSync():
            first = span_cluster_matrix(*inputs)
            span_cluster_matrix(*inputs, first.log_gap).matrix.sum().backward()


def attention_problem(heads=2):
    tensors = [randn(2, heads, 5, 3, seed=i).requires_grad_() for i in range(3)]
    return [*tensors, randn(2, 5, 5, seed=8).sigmoid().requires_grad_()]


def plain_attention(query, key, value, cluster, additive=None, scale=None, normalize=False):
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            c = cluster[b] if cluster.ndim == 3 else cluster[b, h]
            for i in range(query.shape[2]):
                logits = key[b, h] @ query[b, h, i] * (scale or 1 / math.sqrt(query.shape[3]))
                if additive is not None:
                    logits = logits + additive.expand(*query.shape[:3], key.shape[2])[b, h, i]
                weights = logits.softmax(0) * c[i]
                rows.append((weights / weights.sum() if normalize else weights) @ value[b, h])
    return torch.stack(rows).view(*query.shape[:3], -1)


class TestAttention:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_is_the_definition(self, normalize, per_head):
        query, key, value, cluster = attention_problem()
        if per_head:
            cluster = randn(2, 2, 5, 5, seed=8).sigmoid().requires_grad_()
        found = cluster_attention(query, key, value, cluster, normalize=normalize, scale=0.7)
        expected = plain_attention(query, key, value, cluster, normalize=normalize, scale=0.7)
        close(found, expected)
        gradients_agree(found, expected, [query, key, value, cluster])
        close(cluster_attention(query, key, value, cluster), plain_attention(query, key, value, cluster))

    def test_masks(self):
        inputs = attention_problem()
        allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        additive = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
        expected = plain_attention(*inputs, additive=additive)
        for mask in (allowed, additive, allowed[:1, :1]):
            close(cluster_attention(*inputs, attn_mask=mask), expected)
        bias = randn(1, 2, 5, 5, seed=4)
        close(cluster_attention(*inputs, attn_mask=bias), plain_attention(*inputs, additive=bias))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_rows_without_a_key_attend_to_all(self, dtype):
        query, key, value, cluster = (tensor.detach().to(dtype).requires_grad_() for tensor in attention_problem())
        closed = torch.zeros(5, dtype=torch.bool)
        for mask in (closed, torch.full((5,), float("-inf"))):
            found = cluster_attention(query, key, value, cluster, attn_mask=mask)
            expected = (cluster.unsqueeze(1) / 5) @ value
            torch.testing.assert_close(found, expected, atol=1e-2 if dtype != torch.float64 else 1e-9, rtol=1e-2)
            gradients = torch.autograd.grad(found.sum(), [query, key, value, cluster])
            assert all(gradient.isfinite().all() for gradient in gradients)

    def test_rows_whose_clusters_are_empty(self):
        query, key, value, cluster = attention_problem()
        empty = cluster.detach() * torch.tensor([1, 1, 0, 1, 1]).view(5, 1)
        found = cluster_attention(query, key, value, empty, normalize=True)
        assert found[:, :, 2].eq(0).all()
        found.sum().backward()
        assert query.grad.isfinite().all()

    def test_dropout_acts_on_the_products(self):
        query, key, value, cluster = (tensor.detach() for tensor in attention_problem())
        torch.manual_seed(0)
        draws = torch.stack([cluster_attention(query, key, value, cluster, dropout_p=0.5) for _ in range(3000)])
        torch.testing.assert_close(
            draws.mean(0), cluster_attention(query, key, value, cluster), atol=0.08, rtol=0, check_dtype=False
        )
        assert cluster_attention(query, key, value, cluster, dropout_p=1.0).eq(0).all()

    def test_gradcheck(self):
        assert torch.autograd.gradcheck(cluster_attention, attention_problem(1))

    def test_half_precision_keeps_the_dtype(self):
        inputs = [tensor.detach().bfloat16() for tensor in attention_problem()]
        assert cluster_attention(*inputs[:3], inputs[3].float()).dtype == torch.bfloat16


def tree_transformer(query, key, prior, mask, scale):
    """The ancestor's formulas with full matrices, products of triangular ones, and -1e9."""
    length = query.shape[1]
    index = torch.arange(length)
    allowed = ((index - index[:, None]).abs() == 1).expand(len(query), length, length)
    if mask is not None:
        allowed = allowed & mask
    scores = (query @ key.mT / scale).masked_fill(~allowed, -1e9).softmax(-1)
    a = prior + (1 - prior) * (scores * scores.mT + 1e-9).sqrt()
    tri = torch.ones(length, length, dtype=query.dtype).triu()
    steps = (a + 1e-9).log() * torch.ones_like(tri).diagonal(1).diag_embed(1) if length > 1 else torch.zeros_like(a)
    unit = torch.eye(length, dtype=torch.bool)
    upper = (tri @ (steps @ tri)).exp().masked_fill((tri == 0) | unit, 0)
    return upper + upper.mT + a.masked_fill(~unit, 1e-9), a


class TestNeighbors:
    @pytest.mark.parametrize("length", [1, 2, 6])
    @pytest.mark.parametrize("masked", [False, True])
    def test_is_the_ancestor(self, length, masked):
        query, key = (3 * randn(2, length, 4, seed=i).requires_grad_() for i in range(2))
        mask = torch.ones(2, 1, length, dtype=torch.bool)
        mask[1, :, length // 2 :] = False
        prior = torch.tensor(0.0, dtype=torch.float64)
        for _ in range(2):
            found = neighbor_cluster_matrix(
                query, key, None if prior.ndim == 0 else prior, mask=mask if masked else None, scale=2.0
            )
            matrix, prior = tree_transformer(query, key, prior, mask if masked else None, 2.0)
            close(found.matrix, matrix)
            close(found.probability, prior)
            gradients_agree(found.matrix, matrix, [query, key])

    def test_default_scale(self):
        query, key = randn(1, 4, 3), randn(1, 4, 3, seed=1)
        close(neighbor_cluster_matrix(query, key).matrix, neighbor_cluster_matrix(query / 256, key, scale=1.0).matrix)

    def test_gradcheck(self):
        inputs = [randn(1, 4, 2, seed=i).requires_grad_() for i in range(2)]
        assert torch.autograd.gradcheck(lambda *args: tuple(neighbor_cluster_matrix(*args, scale=1.0)), inputs)

    def test_long_and_never_waits(self):
        query, key = (100 * torch.randn(1, 400, 2, requires_grad=True) for _ in range(2))
        with NoSync():
            found = neighbor_cluster_matrix(query, key, scale=1.0).matrix
            gradients = torch.autograd.grad(found.sum(), [query, key])
        assert found.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


X, W, Q = torch.zeros(2, 3, 4), torch.zeros(1, 8), torch.zeros(2, 1, 3, 4)
C = torch.zeros(2, 3, 3)
BAD_CALLS = {
    "x": (lambda: span_logits(X[0], W), r"`x`.*\(B, N, D\).*\(3, 4\)"),
    "weight": (lambda: span_logits(X, W[:, :4]), r"weight.*\(1, 8\).*\(1, 4\)"),
    "weight rows": (lambda: span_cluster_matrix(X, W[0]), r"weight.*\(8,\)"),
    "bias": (lambda: span_logits(X, W, torch.zeros(2)), r"bias.*\(2,\)"),
    "integers": (lambda: span_logits(X.long(), W), "`x`.*int64"),
    "logits": (lambda: cluster_from_logits(X), r"logits.*\(\.\.\., N, N\).*\(2, 3, 4\)"),
    "log_gap": (lambda: cluster_from_logits(C, C[:1]), r"log_gap.*\(2, 3, 3\).*\(1, 3, 3\)"),
    "query": (lambda: cluster_attention(X, Q, Q, C), "query"),
    "key": (lambda: cluster_attention(Q, Q[:, :, :2], Q, C), "key"),
    "value": (lambda: cluster_attention(Q, Q, Q[:1], C), "value"),
    "cluster": (lambda: cluster_attention(Q, Q, Q, C[:, :2]), r"cluster.*\(2, 3, 3\).*\(B, H, N, N\).*\(2, 2, 3\)"),
    "neighbor query": (lambda: neighbor_cluster_matrix(Q, X), "query"),
    "neighbor key": (lambda: neighbor_cluster_matrix(X, X[:1]), "key"),
    "prior": (lambda: neighbor_cluster_matrix(X, X, X), r"prior.*\(2, 3, 3\).*\(2, 3, 4\)"),
    "scale": (lambda: neighbor_cluster_matrix(X, X, scale=0.0), "scale.*0.0"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
