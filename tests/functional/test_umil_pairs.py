"""The pairwise loss against its expansion over pairs, and the similarity that it goes by."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import (
    label_similarity,
    pairwise_bce,
    pairwise_cluster_loss,
    snippet_similarity,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expanded(prob1, prob2, similarity, eps=1e-7):
    """As published: N² copies of both, and torch's cross-entropy over what is not left out."""
    rows, columns = zip(*product(range(len(prob1)), range(len(prob2))), strict=True)
    agree = (prob1[list(rows)] * prob2[list(columns)]).sum(1)
    flat = similarity.flatten()
    loss = -torch.where(flat > 0, agree + eps, 1 - agree + eps).log()
    return loss[flat != 0].mean()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), classes=st.integers(2, 4), seed=st.integers(0, 100))
def test_equals_the_expansion(n, m, classes, seed):
    logits1, logits2 = normal(n, classes, seed=seed), normal(m, classes, seed=seed + 1)
    similarity = torch.randint(-1, 2, (n, m), generator=torch.Generator().manual_seed(seed))
    similarity[0, 0] = 1
    leaves = [logits1.requires_grad_(), logits2.requires_grad_()]
    found = pairwise_bce(logits1.softmax(1), logits2.softmax(1), similarity)
    plain = expanded(logits1.softmax(1), logits2.softmax(1), similarity)
    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reductions():
    prob = normal(4, 2).softmax(1)
    similarity = torch.tensor([[1, -1, 0, 1]] * 4)
    costs = pairwise_bce(prob, prob, similarity, reduction="none")
    assert costs.shape == (4, 4)
    assert not costs[:, 2].any()
    assert (costs[:, [0, 1, 3]] > 0).all()
    torch.testing.assert_close(pairwise_bce(prob, prob, similarity, reduction="sum"), costs.sum())
    torch.testing.assert_close(pairwise_bce(prob, prob, similarity), costs.sum() / 12)


def test_certain_predictions_cost_at_most_minus_log_eps():
    for dtype in (torch.float32, torch.float64):
        sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
        wrong = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        loss = pairwise_bce(sure, sure, wrong)
        torch.testing.assert_close(loss, torch.tensor(16.118, dtype=dtype), rtol=1e-4, atol=0)
        (gradient,) = torch.autograd.grad(loss, sure)
        assert gradient.isfinite().all()
        assert gradient.any()  # at P = 1 the way back is open


def test_rounding_above_1_gives_no_nan():
    prob = torch.full((1, 7), 0.37796450)  # its square sums to just above 1
    assert (prob * prob).sum() > 1
    assert pairwise_bce(prob, prob, torch.tensor([[-1.0]]), eps=1e-8).isfinite()


def test_nothing_to_compare_is_zero_with_zero_gradient():
    logits = normal(3, 2).requires_grad_()
    for loss in (
        pairwise_bce(logits.softmax(1), logits.softmax(1), torch.zeros(3, 3)),
        pairwise_cluster_loss(normal(3, 4), logits, logits, torch.zeros(3, dtype=torch.bool)).loss,
        pairwise_bce(logits[:0].softmax(1), logits.softmax(1), torch.zeros(0, 3)),
    ):
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()


@settings(max_examples=50, deadline=None)
@given(kept=st.lists(st.booleans(), min_size=5, max_size=5), seed=st.integers(0, 100))
def test_a_mask_drops_rows(kept, seed):
    mask = torch.tensor(kept)
    features, weak, strong = normal(5, 3, seed=seed), normal(5, 2, seed=seed + 1), normal(5, 2, seed=seed + 2)
    masked = pairwise_cluster_loss(features, weak, strong, mask, threshold=0.2)
    if not mask.any():
        assert masked.loss == 0
        return
    dropped = pairwise_cluster_loss(features[mask], weak[mask], strong[mask], threshold=0.2)
    torch.testing.assert_close(masked.loss, dropped.loss)
    assert torch.equal(masked.similarity[mask][:, mask], dropped.similarity)
    assert not masked.similarity[~mask].any()
    assert not masked.similarity[:, ~mask].any()


def test_blocks_of_rows_change_nothing(monkeypatch):
    features, weak, strong = normal(7, 3), normal(7, 2, seed=1).requires_grad_(), normal(7, 2, seed=2).requires_grad_()
    mask = torch.tensor([True, True, False, True, True, True, True])
    whole = pairwise_cluster_loss(features, weak, strong, mask).loss
    expected = torch.autograd.grad(whole, [weak, strong])
    monkeypatch.setattr("lightning_methods.functional.umil_pairs._BLOCK", 3)
    blocks = pairwise_cluster_loss(features, weak, strong, mask).loss
    torch.testing.assert_close(blocks, whole)
    for found, gradient in zip(torch.autograd.grad(blocks, [weak, strong]), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_no_gradient_into_features_and_gradcheck():
    features, weak, strong = normal(5, 3).requires_grad_(), normal(5, 2, seed=1), normal(5, 2, seed=2)
    weak.requires_grad_()
    strong.requires_grad_()
    loss = pairwise_cluster_loss(features, weak, strong).loss
    assert torch.autograd.grad(loss, features, allow_unused=True) == (None,)
    assert torch.autograd.gradcheck(
        lambda weak, strong: pairwise_cluster_loss(features, weak, strong).loss, (weak, strong)
    )


# --- similarity -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 100), threshold=st.floats(-0.9, 0.9))
def test_cosine_pair_by_pair(n, seed, threshold):
    features = normal(n, 4, seed=seed)
    similarity = snippet_similarity(features, threshold=threshold)
    for i, j in product(range(n), repeat=2):
        cosine = features[i] @ features[j] / (features[i].norm() * features[j].norm())
        assert similarity[i, j] == (1 if cosine > threshold or i == j else -1)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 100), topk=st.integers(1, 4))
def test_rank_pair_by_pair(n, seed, topk):
    features = normal(n, 4, seed=seed)
    similarity = snippet_similarity(features, mode="rank", topk=topk)
    largest = [set(row.argsort(descending=True)[:topk].tolist()) for row in features]
    for i, j in product(range(n), repeat=2):
        assert similarity[i, j] == (1 if largest[i] == largest[j] else -1)


def test_the_threshold_is_strict_and_the_diagonal_is_alike():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.equal(snippet_similarity(features, threshold=0.0), 2 * torch.eye(3) - 1)
    assert torch.equal(snippet_similarity(features, threshold=1.0), 2 * torch.eye(3) - 1)
    assert snippet_similarity(features, threshold=-1.0).eq(1).all()


def test_similarity_has_no_gradient_and_autocast_does_not_round_it():
    features = normal(40, 8).float().requires_grad_()
    similarity = snippet_similarity(features, threshold=0.3)
    assert not similarity.requires_grad
    assert similarity.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), NoSync():
        again = snippet_similarity(features, threshold=0.3)
    assert torch.equal(again, similarity)


def test_labels_of_any_dtype():
    for labels in (torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, False, True])):
        assert label_similarity(labels).tolist() == [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    features, weak = normal(6, 4).to(dtype), (20 * normal(6, 2)).to(dtype)
    loss = pairwise_cluster_loss(features, weak, weak)
    wide = pairwise_cluster_loss(features.float(), weak.float(), weak.float())
    assert loss.loss.dtype == loss.similarity.dtype == torch.float32
    assert torch.equal(loss.loss, wide.loss)
    assert torch.equal(loss.similarity, wide.similarity)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: snippet_similarity(torch.zeros(3)), "`features` must be a matrix"),
        (lambda: snippet_similarity(torch.zeros(3, 0)), "`features` must be a matrix with at least one column"),
        (lambda: snippet_similarity(torch.zeros(3, 2).long()), "`features` must be floating"),
        (lambda: snippet_similarity(torch.zeros(3, 2), mode="dot"), "`mode`"),
        (lambda: snippet_similarity(torch.zeros(3, 2), threshold=2.0), "`threshold`"),
        (lambda: snippet_similarity(torch.zeros(3, 2), mode="rank", topk=0), "`topk`"),
        (lambda: label_similarity(torch.zeros(3, 1)), "`labels` must have shape"),
        (lambda: pairwise_bce(torch.ones(3), torch.ones(3, 1), torch.ones(3, 3)), "`prob1`"),
        (lambda: pairwise_bce(torch.ones(3, 1), torch.ones(3, 2), torch.ones(3, 3)), "as many classes, got 1 and 2"),
        (lambda: pairwise_bce(torch.ones(3, 1), torch.ones(2, 1), torch.ones(2, 3)), r"shape \(3, 2\)"),
        (lambda: pairwise_bce(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), eps=0), "`eps`"),
        (lambda: pairwise_bce(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), reduction="max"), "`reduction`"),
        (lambda: pairwise_cluster_loss(torch.ones(3, 2), torch.ones(2, 2), torch.ones(3, 2)), "`logits_weak`"),
        (lambda: pairwise_cluster_loss(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)), "`logits_strong`"),
        (
            lambda: pairwise_cluster_loss(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)),
            r"`mask` must be boolean and of shape \(3,\)",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
