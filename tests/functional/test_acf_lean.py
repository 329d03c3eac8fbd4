import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import (
    SpanScores,
    cluster_attention,
    neighbor_cluster_attention,
    neighbor_cluster_matrix,
    neighbor_links,
    span_cluster_attention,
    span_cluster_matrix,
    span_scores,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(length, batch=2, seed=0):
    return [randn(batch, 2, length, 3, seed=seed + i).requires_grad_() for i in range(3)]


def key_mask(length, batch=2):
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    mask[0, 0] = False
    return mask


def full_mask(mask, is_causal, length):
    """What the lean forms do with masks, as a matrix."""
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & (mask[:, None, None] | torch.eye(length, dtype=torch.bool))
    return allowed


def agree(found, expected, leaves):
    close(found, expected)
    cotangent = randn(*found.shape, seed=77)
    for one, other in zip(
        torch.autograd.grad((found * cotangent).sum(), leaves),
        torch.autograd.grad((expected * cotangent).sum(), leaves),
        strict=True,
    ):
        close(one, other)


class TestSpans:
    @settings(max_examples=20, deadline=None)
    @given(
        length=st.integers(1, 9),
        layers=st.integers(1, 3),
        block_size=st.integers(1, 10),
        masked=st.booleans(),
        is_causal=st.booleans(),
        normalize=st.booleans(),
    )
    def test_is_the_plain_form(self, length, layers, block_size, masked, is_causal, normalize):
        inputs = attention(length)
        xs = [randn(2, length, 4, seed=10 + layer).requires_grad_() for layer in range(layers)]
        weight, bias = randn(1, 8, seed=20).requires_grad_(), randn(1, seed=21).requires_grad_()
        mask, gap = key_mask(length) if masked else None, None
        for x in xs:
            matrix, gap = span_cluster_matrix(x, weight, bias, gap)
        expected = cluster_attention(
            *inputs, matrix, attn_mask=full_mask(mask, is_causal, length), normalize=normalize, scale=0.6
        )
        found = span_cluster_attention(
            *inputs,
            [span_scores(x, weight, bias) for x in xs],
            key_mask=mask,
            is_causal=is_causal,
            normalize=normalize,
            scale=0.6,
            block_size=block_size,
        )
        agree(found, expected, [*inputs, *xs, weight, bias])

    def test_without_gradients(self):
        inputs, scores = attention(5), [span_scores(randn(2, 5, 4), randn(1, 8))]
        expected = span_cluster_attention(*inputs, scores, block_size=2).detach()
        with torch.no_grad():
            close(span_cluster_attention(*inputs, scores, block_size=2), expected)

    def test_nothing_of_n_by_n_is_kept(self):
        """What the graph holds: O(N) an input, and for each block the sums of the starts before it."""
        length, block_size = 256, 32
        inputs, scores = attention(length, 1), [span_scores(randn(1, length, 4), randn(1, 8).requires_grad_())]
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            span_cluster_attention(*inputs, scores, block_size=block_size)
        assert max(sizes) < length * block_size
        assert sum(sizes) < length * length

    def test_dropout_is_the_same_when_computed_again(self):
        inputs = attention(6)
        scores = [span_scores(randn(2, 6, 4), randn(1, 8))]
        torch.manual_seed(0)
        found = span_cluster_attention(*inputs, scores, dropout_p=0.5, block_size=2)
        # linear in the values: the gradient must be made with the weights of the forward pass
        (gradient,) = torch.autograd.grad((found * found.detach()).sum(), inputs[2])
        close((gradient * inputs[2]).sum(), (found * found.detach()).sum())
        assert not torch.equal(found, span_cluster_attention(*inputs, scores, block_size=2))

    def test_never_waits_for_the_device(self):
        with NoSync():
            scores = [span_scores(randn(2, 5, 4), randn(1, 8).requires_grad_())]
            span_cluster_attention(*attention(5), scores, key_mask=key_mask(5), block_size=2).sum().backward()


class TestNeighbors:
    @pytest.mark.parametrize("length", [1, 2, 7])
    @pytest.mark.parametrize("masked", ["no", "padding", "square"])
    def test_links_are_those_of_the_matrix(self, length, masked):
        mask = {
            "no": None,
            "padding": key_mask(length)[:, None],
            "square": torch.rand(2, length, length, generator=torch.Generator().manual_seed(1)) > 0.4,
        }[masked]
        prior = links = None
        for layer in range(3):
            query, key = (3 * randn(2, length, 4, seed=2 * layer + i) for i in range(2))
            prior = neighbor_cluster_matrix(query, key, prior, mask=mask, scale=2.0).probability
            links = neighbor_links(query, key, links, mask=mask, scale=2.0)
            close(links.own, prior.diagonal(0, 1, 2))
            close(links.ahead, prior.diagonal(1, 1, 2))

    @settings(max_examples=20, deadline=None)
    @given(
        length=st.integers(1, 9),
        block_size=st.integers(1, 10),
        masked=st.booleans(),
        is_causal=st.booleans(),
        normalize=st.booleans(),
    )
    def test_is_the_plain_form(self, length, block_size, masked, is_causal, normalize):
        inputs = attention(length)
        query, key = (3 * randn(2, length, 4, seed=10 + i).requires_grad_() for i in range(2))
        mask = key_mask(length) if masked else None
        options = {"mask": None if mask is None else mask[:, None], "scale": 2.0}
        expected = cluster_attention(
            *inputs,
            neighbor_cluster_matrix(query, key, **options).matrix,
            attn_mask=full_mask(mask, is_causal, length),
            normalize=normalize,
            scale=0.6,
        )
        found = neighbor_cluster_attention(
            *inputs,
            neighbor_links(query, key, **options),
            key_mask=mask,
            is_causal=is_causal,
            normalize=normalize,
            scale=0.6,
            block_size=block_size,
        )
        agree(found, expected, [*inputs, query, key] if length > 1 else inputs)

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize(("masked", "is_causal", "normalize"), [(True, True, False), (False, False, True)])
    def test_flex_attention_forward(self, masked, is_causal, normalize):
        """The two log-sum-exps; flex attention has no backward pass on a CPU."""
        inputs = [torch.randn(2, 2, 32, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        links = neighbor_links(*(torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)))
        options = {"key_mask": key_mask(32) if masked else None, "is_causal": is_causal, "normalize": normalize}
        with torch.no_grad():
            found = neighbor_cluster_attention(*inputs, links, kernel="flex", **options)
            torch.testing.assert_close(found, neighbor_cluster_attention(*inputs, links, **options))

    def test_nothing_of_n_by_n_is_kept(self):
        length, block_size = 256, 32
        inputs, links = attention(length, 1), neighbor_links(*randn(2, 1, length, 4).requires_grad_())
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            neighbor_cluster_attention(*inputs, links, block_size=block_size)
        assert max(sizes) < length * block_size


Q, S = torch.zeros(2, 1, 3, 4), SpanScores(torch.zeros(2, 3), torch.zeros(2, 3))
L = neighbor_links(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
spans, neighbors = span_cluster_attention, neighbor_cluster_attention
BAD_CALLS = {
    "query": (lambda: spans(Q[0], Q, Q, [S]), "query"),
    "key": (lambda: spans(Q, Q[:1], Q, [S]), "key"),
    "value": (lambda: spans(Q, Q, Q[:, :, :1], [S]), "value"),
    "no scores": (lambda: spans(Q, Q, Q, []), "scores.*none"),
    "scores": (lambda: spans(Q, Q, Q, [S, SpanScores(S.own, S.mean[:1])]), r"scores.mean.*\(1, 3\)"),
    "key_mask": (lambda: spans(Q, Q, Q, [S], key_mask=torch.ones(2, 4)), r"key_mask.*\(2, 4\)"),
    "block_size": (lambda: spans(Q, Q, Q, [S], block_size=0), "block_size.*0"),
    "links": (lambda: neighbors(Q, Q, Q, L._replace(ahead=L.own)), r"links.ahead.*\(2, 2\).*\(2, 3\)"),
    "own links": (lambda: neighbors(Q, Q, Q, L._replace(own=L.ahead)), "links.own"),
    "kernel": (lambda: neighbors(Q, Q, Q, L, kernel="flash"), "kernel.*blocks.*flash"),
    "flex dropout": (lambda: neighbors(Q, Q, Q, L, kernel="flex", dropout_p=0.1), "flex.*dropout.*0.1"),
    "link queries": (lambda: neighbor_links(Q, Q), "query"),
    "link keys": (lambda: neighbor_links(Q[:, 0], Q[:1, 0]), "key"),
    "link scale": (lambda: neighbor_links(Q[:, 0], Q[:, 0], scale=0.0), "scale"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
