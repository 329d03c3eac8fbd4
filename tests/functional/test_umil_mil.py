"""MIL losses and priors, bag by bag."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import (
    mil_ranking_loss,
    mil_topk_loss,
    temporal_smoothness,
    temporal_sparsity,
    umil_mil_loss,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_weight_carries_gradient_unless_detached():
    logits = normal(3, 4, 2).requires_grad_()
    labels = torch.tensor([0, 1, 5])
    through = torch.autograd.grad(umil_mil_loss(logits, labels).mil, logits)[0]
    detached = torch.autograd.grad(umil_mil_loss(logits, labels, detach_weight=True).mil, logits)[0]
    p = logits.softmax(-1)
    top = p[..., 1].argmax(1)
    rows = torch.arange(3)
    weight = p[rows, top].max(-1).values
    entropy = F.cross_entropy(logits[rows, top], torch.tensor([0, 1, 1]), reduction="none")
    torch.testing.assert_close(through, torch.autograd.grad((weight * entropy).mean(), logits, retain_graph=True)[0])
    torch.testing.assert_close(detached, torch.autograd.grad((weight.detach() * entropy).mean(), logits)[0])
    assert not torch.allclose(through, detached)


def test_at_ties_the_first_instance_gets_the_gradient():
    logits = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = umil_mil_loss(logits, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss.mil, logits)
    assert gradient[0, 0].any()
    assert not gradient[0, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("label", [0, 1])
def test_probabilities_of_exactly_0_and_1(label, dtype):
    logits = torch.tensor([[[0.0, 800.0], [800.0, 0.0]]], dtype=dtype, requires_grad=True)
    loss = umil_mil_loss(logits, torch.tensor([label]))
    assert loss.margin == (0 if label else 100)  # as torch clamps the logarithm
    assert torch.autograd.grad(loss.mil + loss.margin, logits)[0].isfinite().all()
    equal = umil_mil_loss(torch.zeros(1, 3, 2, requires_grad=True), torch.tensor([label]))
    assert equal.margin == (50 if label else 0)  # a confidence of 0.5 halves it


@settings(max_examples=30, deadline=None)
@given(bags=st.integers(1, 4), instances=st.integers(1, 5), seed=st.integers(0, 100), data=st.data())
def test_topk_bag_by_bag(bags, instances, seed, data):
    k = data.draw(st.integers(1, instances))
    logits, labels = normal(bags, instances, 2, seed=seed), torch.arange(bags) % 2
    expected = 0.0
    for bag, label in zip(logits, labels, strict=True):
        score = bag.softmax(-1)[:, 1].sort(descending=True).values[:k].mean()
        expected -= torch.log(score if label else 1 - score) / bags
    torch.testing.assert_close(mil_topk_loss(logits, labels, k=k), expected)


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=5), seed=st.integers(0, 100), margin=st.floats(0, 2))
def test_ranking_pair_by_pair(labels, seed, margin):
    scores = normal(len(labels), 3, seed=seed).sigmoid().requires_grad_()
    pairs = [
        (margin - scores[a].max() + scores[n].max()).clamp_min(0)
        for a, of_a in enumerate(labels)
        for n, of_n in enumerate(labels)
        if of_a > 0 and of_n == 0
    ]
    loss = mil_ranking_loss(scores, torch.tensor(labels), margin=margin)
    torch.testing.assert_close(loss, torch.stack(pairs).mean() if pairs else torch.zeros((), dtype=torch.float64))
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_priors():
    scores = torch.tensor([[[0.0, 1.0, 0.5]], [[0.25, 0.25, 0.25]]])
    assert temporal_smoothness(scores) == 0.625
    assert temporal_sparsity(scores) == 1.125
    assert temporal_smoothness(scores[..., :1]) == 0
    assert temporal_smoothness(scores.half()).dtype == temporal_sparsity(scores.half()).dtype == torch.float32


def test_labels_of_any_real_dtype():
    logits = normal(3, 4, 2)
    losses = [
        umil_mil_loss(logits, torch.tensor(labels)).mil
        for labels in ([0, 1, 1], [0, 13, 2], [0.0, 1.0, 1.0], [False, True, True])
    ]
    assert len(set(map(float, losses))) == 1


def test_autocast_and_no_waiting():
    logits, labels = normal(3, 4, 2).float(), torch.tensor([0, 1, 1])
    plain = umil_mil_loss(logits, labels)
    with torch.autocast("cpu", torch.bfloat16), NoSync():
        cast = umil_mil_loss(logits, labels)
        mil_topk_loss(logits, labels, k=2)
        mil_ranking_loss(logits[..., 0], labels)
    torch.testing.assert_close(cast, plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: umil_mil_loss(torch.zeros(2, 3), torch.zeros(2)), "`logits` must have shape"),
        (lambda: umil_mil_loss(torch.zeros(2, 3, 1), torch.zeros(2)), "`logits` must have shape"),
        (lambda: umil_mil_loss(torch.zeros(2, 0, 2), torch.zeros(2)), "`logits` must have shape"),
        (lambda: umil_mil_loss(torch.zeros(2, 3, 2), torch.zeros(3)), r"`bag_labels` must have shape \(2,\)"),
        (lambda: mil_topk_loss(torch.zeros(2, 3, 2), torch.zeros(2), k=4), r"`k` must lie in \[1, 3\]"),
        (lambda: mil_topk_loss(torch.zeros(2, 3, 2), torch.zeros(2), k=0), "`k`"),
        (lambda: mil_ranking_loss(torch.zeros(2, 3, 2), torch.zeros(2)), "`scores`"),
        (lambda: mil_ranking_loss(torch.zeros(2, 3), torch.zeros(3)), "`bag_labels`"),
        (lambda: mil_ranking_loss(torch.zeros(2, 3), torch.zeros(2), margin=-1.0), "`margin`"),
        (lambda: temporal_smoothness(torch.zeros(())), "`scores`"),
        (lambda: temporal_sparsity(torch.zeros(2, dtype=torch.long)), "`scores`"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
