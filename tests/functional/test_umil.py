"""The detector's and the invariance loss against the plainest formulations, written out snippet by snippet."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import umil_detector_loss, umil_invariance_loss

B, V, K, D = 2, 2, 4, 5


def draw(seed=0, *, bags=B, views=V, snippets=K, dtype=torch.float64, spread=2.0):
    """logits, cluster logits and features; some cosines are above 0.7 and some below."""
    generator = torch.Generator().manual_seed(seed)

    def normal(width):
        return torch.randn(bags, views, snippets, width, generator=generator, dtype=torch.float64).to(dtype)

    return spread * normal(2), spread * normal(2), normal(D).abs()


def sets(seed=0, *, bags=B, snippets=K):
    generator = torch.Generator().manual_seed(seed + 100)
    ambiguous = torch.rand(bags, snippets, generator=generator) < 0.5
    return ambiguous, torch.randint(-1, 2, (bags, snippets), generator=generator)


# --- plain formulations ----------------------------------------------------------------------------


def plain_pairs(weak, strong, alike, eps=1e-7):
    """Mean over all ordered pairs, one at a time."""
    total = 0.0
    for i, j in product(range(len(weak)), repeat=2):
        agree = (F.softmax(weak[i], 0) * F.softmax(strong[j], 0)).sum()
        total = total - torch.log((agree if alike(i, j) else 1 - agree) + eps)
    return total / len(weak) ** 2


def by_cosine(features, threshold):
    return lambda i, j: i == j or F.cosine_similarity(features[i], features[j], dim=0) > threshold


def by_label(labels):
    return lambda i, j: labels[i] == labels[j]


def plain_invariance(logits, clusters, features, ambiguous, labels, weighted=False, threshold=0.7):
    where = list(product(range(logits.shape[0]), range(logits.shape[2])))
    a = [(b, k) for b, k in where if ambiguous[b, k]]
    c = [(b, k) for b, k in where if not ambiguous[b, k] and labels[b, k] >= 0]
    zero = logits.new_zeros(())

    def pairs(head, chosen, alike):
        if len(chosen) < 2:
            return zero
        weak = torch.stack([head[b, 0, k] for b, k in chosen])
        strong = torch.stack([head[b, -1, k] for b, k in chosen])
        return plain_pairs(weak, strong, alike)

    alike_a = by_cosine([features[b, 0, k] for b, k in a], threshold)
    alike_c = by_label([labels[b, k] for b, k in c])
    compat, compat_c = pairs(logits, a, alike_a), pairs(logits, c, alike_c)
    confident = [
        F.cross_entropy(logits[b, v, k][None], labels[b, k][None])
        * (logits[b, v, k].softmax(0).max() if weighted else 1)
        for b, k in c
        for v in range(logits.shape[1])
    ]
    return {
        "cluster": pairs(clusters, a, alike_a),
        "compat": compat,
        "compat_confident": pairs(clusters, c, alike_c),
        "variance": (compat - compat_c) ** 2 / 2 if len(a) > 1 and len(c) > 1 else zero,
        "confident": torch.stack(confident).mean() if confident else zero,
    }


def plain_consistency(views, threshold):
    total = views.new_zeros(())
    bags, count, snippets, _ = views.shape
    if count == 1:
        return total
    for b, k in product(range(bags), range(snippets)):
        weak = views[b, 0, k].detach().softmax(0)
        if weak.max() >= threshold:
            total = total + F.cross_entropy(views[b, -1, k][None], weak.argmax()[None])
    return total / (bags * snippets)


def plain_detector(logits, clusters, features, bag_labels, threshold=0.8, cluster_threshold=0.8):
    mil, margin, smooth, sparse = [], [], [], []
    bags, views, snippets, _ = logits.shape
    for b, v in product(range(bags), range(views)):
        p = logits[b, v].softmax(-1)
        top = p[:, 1].argmax()
        target = (bag_labels[b] > 0).long()
        mil.append(p[top].max() * F.cross_entropy(logits[b, v, top][None], target[None]))
        spread = p[:, 1].max(0).values - p[:, 1].min(0).values
        margin.append(p[top].max() * F.binary_cross_entropy(spread, target.to(spread.dtype)))
        smooth.append(sum((p[k + 1, 1] - p[k, 1]) ** 2 for k in range(snippets - 1)))
        sparse.append(p[:, 1].sum())
    flat = features[:, 0].reshape(-1, features.shape[-1])
    weak, strong = (clusters[:, view].reshape(-1, 2) for view in (0, -1))
    return {
        "mil": sum(mil) / len(mil),
        "margin": sum(margin) / len(margin),
        "consistency": plain_consistency(logits, threshold),
        "cluster_consistency": plain_consistency(clusters, cluster_threshold),
        "cluster": plain_pairs(weak, strong, by_cosine(flat, 0.7)),
        "smooth": sum(smooth) / len(smooth),
        "sparse": sum(sparse) / len(sparse),
    }


# --- values and gradients ---------------------------------------------------------------------------


def assert_like(found, expected, weights, leaves):
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.as_tensor(value, dtype=found.total.dtype), msg=name)
    total = sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(found.total, total)
    for name in expected:
        assert_same_gradients(getattr(found, name), expected[name], leaves)
    assert_same_gradients(found.total, total, leaves)


def assert_same_gradients(found, expected, leaves):
    def gradients(value):
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        grads = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]

    assert found.requires_grad
    for ours, plain in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(ours, plain)


INVARIANCE = {"cluster": 2.0, "compat": 3.0, "compat_confident": 0.5, "variance": 0.7, "confident": 1.5}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_invariance_snippet_by_snippet(views, weighted):
    logits, clusters, features = draw(views=views)
    ambiguous, labels = sets()
    leaves = [logits.requires_grad_(), clusters.requires_grad_()]
    weights = {f"weight_{name}": value for name, value in INVARIANCE.items()}
    found = umil_invariance_loss(
        logits, clusters, features, ambiguous, labels, weight_by_confidence=weighted, **weights
    )
    assert_like(found, plain_invariance(logits, clusters, features, ambiguous, labels, weighted), INVARIANCE, leaves)


DETECTOR = {
    "mil": 1.0,
    "margin": 1.0,
    "consistency": 0.5,
    "cluster_consistency": 0.3,
    "cluster": 0.2,
    "smooth": 0.4,
    "sparse": 0.6,
}


@pytest.mark.parametrize("views", [1, 2, 3])
def test_detector_snippet_by_snippet(views):
    logits, clusters, features = draw(views=views)
    bag_labels = torch.tensor([0, 3])
    leaves = [logits.requires_grad_(), clusters.requires_grad_()]
    weights = {f"weight_{name}": value for name, value in DETECTOR.items() if name not in ("mil", "margin")}
    found = umil_detector_loss(logits, clusters, features, bag_labels, threshold=0.7, cluster_threshold=0.9, **weights)
    expected = plain_detector(logits, clusters, features, bag_labels, 0.7, 0.9)
    assert_like(found, expected, DETECTOR, leaves)
    torch.testing.assert_close(found.consistency_sum, found.consistency + found.cluster_consistency)
    if views > 1:
        assert found.consistency > 0
        assert found.cluster_consistency > 0


def test_detector_without_margin():
    logits, clusters, features = draw()
    bag_labels = torch.tensor([0, 1])
    with_margin = umil_detector_loss(logits, clusters, features, bag_labels)
    without = umil_detector_loss(logits, clusters, features, bag_labels, margin=False)
    assert without.margin == 0
    torch.testing.assert_close(without.total, with_margin.total - with_margin.margin)


def test_one_view_may_come_without_its_dimension():
    logits, clusters, features = draw(views=1)
    ambiguous, labels = sets()
    for function, rest in ((umil_invariance_loss, (ambiguous, labels)), (umil_detector_loss, (torch.tensor([0, 1]),))):
        with_view = function(logits, clusters, features, *rest)
        without = function(logits[:, 0], clusters[:, 0], features[:, 0], *rest)
        assert torch.equal(with_view.total, without.total)


@pytest.mark.parametrize("term", ["cluster", "compat", "compat_confident", "variance", "confident", "total"])
def test_gradcheck_of_invariance(term):
    logits, clusters, features = draw(spread=1.0)
    ambiguous, labels = sets()

    def function(logits, clusters):
        loss = umil_invariance_loss(
            logits, clusters, features, ambiguous, labels, weight_variance=1.0, weight_by_confidence=True
        )
        return getattr(loss, term)

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(), clusters.requires_grad_()))


def test_gradcheck_of_the_detector_loss():
    logits, clusters, features = draw(spread=1.0)
    frozen = logits[:, 0].clone()  # consistency has no gradient in its weak view, which gradcheck would miss

    def function(strong, clusters):
        views = torch.stack([frozen, strong], 1)
        return umil_detector_loss(
            views, clusters, features, torch.tensor([0, 1]), weight_cluster=1.0, weight_cluster_consistency=0.0
        ).total

    assert torch.autograd.gradcheck(function, (logits[:, 1].clone().requires_grad_(), clusters.requires_grad_()))


def test_no_gradient_into_the_weak_view_of_a_consistency_nor_into_features():
    logits, clusters, features = (value.requires_grad_() for value in draw())
    loss = umil_detector_loss(logits, clusters, features, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(loss.consistency, logits, retain_graph=True)
    assert not gradient[:, 0].any()
    assert gradient[:, 1].any()
    ambiguous, labels = sets()
    invariance = umil_invariance_loss(logits, clusters, features, ambiguous, labels)
    for total in (loss.total, invariance.total):
        assert torch.autograd.grad(total, features, allow_unused=True) == (None,)


# --- sets that are too small ------------------------------------------------------------------------

EMPTY = {
    "no ambiguous": (torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 0]])),
    "one ambiguous": (torch.tensor([[True, False, False]]), torch.tensor([[0, 1, 0]])),
    "no confident": (torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 1, 0]])),
    "one confident": (torch.tensor([[True, True, False]]), torch.tensor([[0, 1, 0]])),
    "neither": (torch.zeros(1, 3, dtype=torch.bool), torch.full((1, 3), -1)),
}
ZERO = {
    "no ambiguous": {"cluster", "compat", "variance"},
    "one ambiguous": {"cluster", "compat", "variance"},
    "no confident": {"compat_confident", "variance", "confident"},
    "one confident": {"compat_confident", "variance"},
    "neither": {"cluster", "compat", "compat_confident", "variance", "confident"},
}


@pytest.mark.parametrize("name", EMPTY)
def test_small_sets_give_zeros_that_are_still_connected(name):
    ambiguous, labels = EMPTY[name]
    logits, clusters, features = draw(bags=1, snippets=3)
    logits.requires_grad_()
    clusters.requires_grad_()
    loss = umil_invariance_loss(logits, clusters, features, ambiguous, labels, weight_variance=1.0)
    terms = loss._asdict()
    terms.pop("total")
    assert {term for term, value in terms.items() if value == 0} == ZERO[name]
    for term, value in terms.items():
        grads = torch.autograd.grad(value, [logits, clusters], allow_unused=True, retain_graph=True)
        assert any(grad is not None for grad in grads)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)
        assert any(grad.any() for grad in grads if grad is not None) == (term not in ZERO[name])


def test_without_pseudo_labels():
    logits, clusters, features = draw()
    ambiguous, labels = sets()
    off = {"weight_compat_confident": 0.0, "weight_confident": 0.0}
    loss = umil_invariance_loss(logits, clusters, features, ambiguous, **off)
    same = umil_invariance_loss(logits, clusters, features, ambiguous, labels, **off)
    assert torch.equal(loss.total, same.total)
    assert loss.compat_confident == loss.confident == loss.variance == 0
    for weight in ("weight_compat_confident", "weight_confident", "weight_variance"):
        with pytest.raises(ValueError, match="`pseudo_labels` is missing"):
            umil_invariance_loss(logits, clusters, features, ambiguous, **{**off, weight: 0.1})


@pytest.mark.parametrize("labels", [[0, 0], [1, 2]])
def test_batches_of_one_kind_of_bag_only(labels):
    logits, clusters, features = draw()
    found = umil_detector_loss(logits, clusters, features, torch.tensor(labels))
    expected = plain_detector(logits, clusters, features, torch.tensor(labels))
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value)


def test_one_snippet_a_bag():
    logits, clusters, features = draw(snippets=1)
    logits.requires_grad_()
    loss = umil_detector_loss(logits, clusters, features, torch.tensor([0, 1]))
    assert loss.smooth == 0
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert gradient.isfinite().all()


# --- invariants -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_swapping_classes_of_a_head_changes_no_pair_term(seed):
    logits, clusters, features = draw(seed)
    ambiguous, labels = sets(seed)
    first = umil_invariance_loss(logits, clusters, features, ambiguous, labels, weight_confident=0.0)
    second = umil_invariance_loss(logits.flip(-1), clusters.flip(-1), features, ambiguous, labels, weight_confident=0.0)
    torch.testing.assert_close(first.total, second.total)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_bags_and_snippets_does_not_matter(seed):
    logits, clusters, features = draw(seed)
    ambiguous, labels = sets(seed)
    bags, snippets = torch.randperm(B), torch.randperm(K)

    def turned(value, dim):
        return value.index_select(0, bags).index_select(dim, snippets)

    first = umil_invariance_loss(logits, clusters, features, ambiguous, labels)
    second = umil_invariance_loss(
        *(turned(value, 2) for value in (logits, clusters, features)),
        *(turned(value, 1) for value in (ambiguous, labels)),
    )
    torch.testing.assert_close(first.total, second.total)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_a_constant_added_to_both_logits_changes_nothing(seed, shift):
    logits, clusters, features = draw(seed)
    ambiguous, labels = sets(seed)
    for function, rest in ((umil_invariance_loss, (ambiguous, labels)), (umil_detector_loss, (torch.tensor([0, 1]),))):
        first = function(logits, clusters, features, *rest)
        second = function(logits + shift, clusters - shift, features, *rest)
        torch.testing.assert_close(first.total, second.total)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_what_is_in_neither_set_does_not_matter(seed):
    logits, clusters, features = draw(seed)
    ambiguous, labels = sets(seed)
    outside = (~ambiguous & (labels < 0))[:, None, :, None]
    first = umil_invariance_loss(logits, clusters, features, ambiguous, labels, weight_variance=1.0)
    changed = [torch.where(outside, -value, value) for value in (logits, clusters, features)]
    second = umil_invariance_loss(*changed, ambiguous, labels, weight_variance=1.0)
    torch.testing.assert_close(first.total, second.total)


def test_the_variance_is_that_of_the_two_risks():
    logits, clusters, features = draw()
    ambiguous, labels = sets()
    loss = umil_invariance_loss(logits, clusters, features, ambiguous, labels)
    confident = ~ambiguous & (labels >= 0)
    # The risk of f on C: swap the sets, with features that are alike exactly if labels are.
    one_hot = F.one_hot(labels.clamp_min(0), 2).double()[:, None].expand(-1, V, -1, -1)
    other = umil_invariance_loss(
        logits, clusters, one_hot, confident, weight_compat_confident=0.0, weight_confident=0.0
    )
    torch.testing.assert_close(loss.variance, torch.stack([loss.compat, other.compat]).var())


# --- precision, devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, clusters, features = (value.to(dtype) for value in draw())
    ambiguous, labels = sets()
    sure = logits * 20  # 1 - P is below the resolution of half precision, and epsilon is 0 in float16
    for function, rest in ((umil_invariance_loss, (ambiguous, labels)), (umil_detector_loss, (torch.tensor([0, 1]),))):
        loss = function(sure, clusters, features, *rest)
        wide = function(sure.float(), clusters.float(), features.float(), *rest)
        assert all(map(torch.equal, loss, wide))
        assert {value.dtype for value in loss} == {torch.float32}
        assert loss.total.isfinite()


def test_autocast_changes_nothing():
    values = draw(dtype=torch.float32)
    ambiguous, labels = sets()
    for function, rest in ((umil_invariance_loss, (ambiguous, labels)), (umil_detector_loss, (torch.tensor([0, 1]),))):
        plain = function(*values, *rest)
        with torch.autocast("cpu", torch.bfloat16):
            cast = function(*values, *rest)
        torch.testing.assert_close(cast.total, plain.total)


def test_nothing_waits_for_the_device():
    logits, clusters, features = (value.requires_grad_() for value in draw())
    ambiguous, labels = sets()
    bag_labels = torch.tensor([0, 1])
    with NoSync():
        loss = umil_invariance_loss(logits, clusters, features, ambiguous, labels).total
        loss = loss + umil_detector_loss(logits, clusters, features, bag_labels).total
        loss.backward()


def test_compiles_to_the_same():
    logits, clusters, features = (value.float() for value in draw())
    ambiguous, labels = sets()
    torch.compiler.reset()
    compiled = torch.compile(umil_invariance_loss, backend="aot_eager", fullgraph=True)
    for flags in (ambiguous, ~ambiguous, torch.zeros_like(ambiguous)):
        expected = umil_invariance_loss(logits, clusters, features, flags, labels)
        torch.testing.assert_close(compiled(logits, clusters, features, flags, labels).total, expected.total)
    torch.compiler.reset()


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(B, V, K, 3)}, r"`logits` must have shape \(B, V, K, 2\) or \(B, K, 2\), got"),
        ({"logits": torch.zeros(B, V, K, 2).long()}, "`logits` must be floating"),
        (
            {"logits": torch.zeros(B, V, K + 1, 2)},
            r"must agree, got `logits` \(2, 2, 5\), `cluster_logits` \(2, 2, 4\)",
        ),
        ({"cluster_logits": torch.zeros(B, 2)}, "`cluster_logits` must have shape"),
        ({"cluster_logits": torch.zeros(B, 1, K, 2)}, "must agree"),
        ({"features": torch.zeros(B, K, D)}, r"must agree.*`features` \(2, 1, 4\)"),
        ({"features": torch.zeros(B, V, K, 0)}, "`features` must have shape"),
        ({"ambiguous": torch.zeros(B, K)}, "`ambiguous` must be boolean"),
        ({"ambiguous": torch.zeros(B, K + 1).bool()}, r"`ambiguous` must be boolean and of shape \(2, 4\)"),
        ({"pseudo_labels": torch.zeros(B, K)}, "`pseudo_labels` must hold integers"),
        ({"pseudo_labels": torch.zeros(K, B).long()}, r"`pseudo_labels` must have shape \(2, 4\)"),
        ({"pseudo_labels": torch.full((B, K), 2)}, "`pseudo_labels` must be 0, 1 or negative, got 2"),
        ({"mode": "euclid"}, "`mode` must be one of"),
        ({"mode": "rank", "topk": 6}, r"`topk` must lie in \[1, 5\]"),
        ({"similarity_threshold": 1.5}, "`threshold` must lie in"),
        ({"eps": 0.0}, "`eps` must be positive"),
    ],
)
def test_invariance_refuses(changed, message):
    logits, clusters, features = draw()
    ambiguous = torch.zeros(B, K, dtype=torch.bool)
    arguments = {
        "logits": logits,
        "cluster_logits": clusters,
        "features": features,
        "ambiguous": ambiguous,
        "pseudo_labels": torch.zeros(B, K, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        umil_invariance_loss(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(B, V, K)}, "`logits` must have shape"),
        ({"features": torch.zeros(B, V, K + 1, D)}, "must agree"),
        ({"bag_labels": torch.zeros(B, 1)}, r"`bag_labels` must have shape \(2,\)"),
        ({"threshold": 1.1}, "`threshold`"),
        ({"cluster_threshold": -0.1}, "`cluster_threshold`"),
        ({"similarity_threshold": math.nan}, "`threshold`"),
    ],
)
def test_detector_refuses(changed, message):
    logits, clusters, features = draw()
    arguments = {
        "logits": logits,
        "cluster_logits": clusters,
        "features": features,
        "bag_labels": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        umil_detector_loss(**{**arguments, **changed})
