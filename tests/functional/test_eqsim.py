import functools
import itertools

import pytest
import torch
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import (
    cross_modal_consistency_loss,
    eqsim_all_pairs_loss,
    eqsim_close_far_loss,
    eqsim_itm_loss,
    eqsim_quad_loss,
    in_modal_consistency_loss,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def mean(numbers: list[Tensor]) -> Tensor:
    return sum(numbers) / len(numbers)


def hinge_at_zero(x: Tensor) -> Tensor:
    return x if x > 0 else 0 * x


def plain_criterion(
    quads: list[tuple[Tensor, ...]],
    *,
    text_side=True,
    image_side=True,
    group_side=False,
    margin=0.0,
    weight=1.0,
    hinge="mean",
    positive_reg=False,
    relative=False,
    eps=0.0,
) -> Tensor:
    """The definition, one quadruple (s00, s01, s10, s11) of scalars after the other."""
    text, image, group_0, group_1 = [], [], [], []
    for s00, s01, s10, s11 in quads:
        a, b, c, d = s00 - s01, s11 - s10, s00 - s10, s11 - s01
        size_0, size_1 = (abs(s00) + eps, abs(s11) + eps) if relative else (1, 1)
        text.append((a / size_0 - b / size_1, a, b))
        image.append((c / size_0 - d / size_1, c, d))
        group_0.append((c / size_0 - a / size_0, c, a))
        group_1.append((b / size_1 - d / size_1, b, d))
    total = torch.zeros((), dtype=torch.float64)
    for on, rows in ((text_side, text), (image_side, image), (group_side, group_0), (group_side, group_1)):
        if on:
            squares = [difference**2 for difference, _, _ in rows]
            if hinge == "mean":
                loss = hinge_at_zero(mean(squares) - margin)
            else:
                loss = mean([hinge_at_zero(square - margin) for square in squares])
            total = total + (loss if relative else weight * loss)
            if positive_reg:
                total = total + mean([hinge_at_zero(-x) + hinge_at_zero(-y) for _, x, y in rows])
    return total


def plain_quad(scores: Tensor, i: int, j: int) -> tuple[Tensor, ...]:
    return scores[i, i], scores[i, j], scores[j, i], scores[j, j]


def matrix(rows: int, columns: int | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns or rows, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def same(found: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Values and gradients, and the test is not about zeros."""
    assert expected > 0
    close(found, expected)
    for leaf in leaves:
        close(gradient(found, leaf), gradient(expected, leaf))


OPTIONS = {
    "default": {},
    "text": {"image_side": False},
    "image": {"text_side": False},
    "group": {"text_side": False, "image_side": False, "group_side": True},
    "all sides": {"group_side": True, "weight": 0.7},
    "positive": {"positive_reg": True, "group_side": True},
    "relative": {"relative": True, "weight": 3.0, "group_side": True},
    "relative eps": {"relative": True, "eps": 0.5, "image_side": False},
    "pair": {"hinge": "pair", "group_side": True, "weight": 0.7},
    "pair positive": {"hinge": "pair", "positive_reg": True, "image_side": False},
    "pair relative": {"hinge": "pair", "relative": True, "positive_reg": True, "group_side": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
each_activation = pytest.mark.parametrize("activation", ["softmax", None])


class TestAgainstTheDefinition:
    @each_option
    def test_quads(self, options):
        scores = matrix(4, 7)
        found = eqsim_quad_loss(*scores, margin=0.05, **options)
        same(found, plain_criterion(list(scores.T), margin=0.05, **options), scores)

    @each_option
    def test_quads_one_by_one(self, options):
        scores = matrix(4, 7)
        options = {**options, "hinge": "pair", "margin": 0.5}
        found = eqsim_quad_loss(*scores, **options, reduction="none")
        close(found, torch.stack([plain_criterion([quad], **options) for quad in scores.T]))
        close(eqsim_quad_loss(*scores, **options, reduction="sum"), found.sum())
        close(eqsim_quad_loss(*scores, **options), found.mean())

    @each_activation
    @pytest.mark.parametrize("columns", [5, 8])
    @each_option
    def test_all_pairs(self, options, columns, activation):
        logits = matrix(5, columns)
        margin = 0.001 if activation else 0.5
        scores = logits.softmax(1) if activation else logits
        quads = [plain_quad(scores, i, j) for i in range(5) for j in range(i + 1, 5)]
        found = eqsim_all_pairs_loss(logits, activation=activation, **{"weight": 0.5, **options}, margin=margin)
        same(found, plain_criterion(quads, **{"weight": 0.5, **options}, margin=margin), logits)

    @each_option
    def test_all_pairs_but_the_excluded(self, options):
        logits, ids = matrix(6), torch.tensor([0, 1, 0, 2, 1, 0])
        kept = [(i, j) for i, j in itertools.combinations(range(6), 2) if ids[i] != ids[j]]
        equal = ids[:, None] == ids
        exclude = torch.where(ids[:, None] == 0, equal.triu(), equal.tril())  # one of (i, j) and (j, i) is enough
        found = eqsim_all_pairs_loss(logits, activation=None, margin=0.2, exclude=exclude, **{"weight": 0.5, **options})
        quads = [plain_quad(logits, i, j) for i, j in kept]
        same(found, plain_criterion(quads, **{"weight": 0.5, **options}, margin=0.2), logits)

    @each_activation
    @pytest.mark.parametrize("anchors", [3, 6])
    @each_option
    def test_close_far(self, options, anchors, activation):
        logits = matrix(6)
        margin = 0.0005 if activation else 0.5
        options = {"weight": 0.5, **options}
        index = torch.tensor([[1, 2, 1], [5, 0, 3], [0, 0, 0], [4, 1, 2], [3, 2, 1], [0, 1, 2]])[:anchors]
        found = eqsim_close_far_loss(
            logits, index, activation=activation, margin=margin, far_margin=1e-5, far_scale=2.0, **options
        )
        scores = logits.softmax(1) if activation else logits
        quads = [plain_quad(scores, i, int(j)) for i in range(anchors) for j in index[i]]
        same(found.close, plain_criterion(quads, **options, margin=margin), logits)

        pairs = {(i, int(j)) for i in range(anchors) for j in index[i]}
        squares = [
            0 * scores[i, j] if {(i, j), (j, i)} & pairs else (scores[i, j] - scores[j, i]) ** 2
            for i in range(6)
            for j in range(6)
        ]
        same(found.far, options["weight"] / 2.0 * hinge_at_zero(mean(squares) - 1e-5), logits)
        close(found.total, found.close + found.far)

    def test_far_but_the_excluded(self):
        logits = matrix(4)
        exclude = torch.zeros(4, 4, dtype=torch.bool)
        exclude[0, 2] = True
        before = exclude.clone()
        found = eqsim_close_far_loss(logits, torch.tensor([[1]]), activation=None, weight=1.0, exclude=exclude).far
        far = [(0, 3), (1, 2), (1, 3), (2, 3)]
        same(found, sum(2 * (logits[i, j] - logits[j, i]) ** 2 for i, j in far) / 16, logits)
        assert torch.equal(exclude, before)

    @pytest.mark.parametrize("activation", [None, "linear", "sigmoid", "softmax"])
    @each_option
    def test_itm(self, options, activation):
        s01, s10, s11 = (matrix(5, 3, seed=seed) for seed in (1, 2, 3))
        s00, s11 = 3 + matrix(1, 5)[0], 3 + s11  # "linear" makes the least score 0: a matched one must not be that
        found = eqsim_itm_loss(s00, s01, s10, s11, activation=activation, margin=1e-4, **options)
        scores = [s00[:, None].expand(5, 3), s01, s10, s11]
        if activation == "linear":
            everything = torch.cat([score.flatten() for score in scores])
            low, high = everything.min(), everything.max()
            scores = [(score - low) / (high - low) for score in scores]
        elif activation == "sigmoid":
            scores = [1 / (1 + (-score).exp()) for score in scores]
        elif activation == "softmax":
            total = sum(score.exp() for score in scores)
            scores = [score.exp() / total for score in scores]
        columns = [[tuple(s[n, m] for s in scores) for n in range(5)] for m in range(3)]
        if activation == "softmax":
            expected = mean([plain_criterion(column, margin=1e-4, **options) for column in columns])
        else:
            expected = plain_criterion([quad for column in columns for quad in column], margin=1e-4, **options)
        same(found, expected, s00, s01, s10, s11)

    def test_consistency(self):
        first, second, scale = matrix(4), matrix(4, seed=1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        squares = [(first[i, j] - first[j, i]) ** 2 for i in range(4) for j in range(4)]
        found = cross_modal_consistency_loss(first, logit_scale=scale, weight=0.7)
        same(found, 0.7 * mean(squares) / scale**2 * 4, first, scale)
        squares = [(first[i, j] - second[i, j]) ** 2 for i in range(4) for j in range(4)]
        found = in_modal_consistency_loss(first, second, logit_scale=scale, weight=0.7)
        same(found, 0.7 * mean(squares) / scale**2 * 4, first, second, scale)


LOSSES = {
    "quad": lambda x, **kw: eqsim_quad_loss(*x[:4], **kw),
    "all pairs": eqsim_all_pairs_loss,
    "close": lambda x, **kw: eqsim_close_far_loss(x, torch.tensor([[1, 2], [0, 3]], device=x.device), **kw).close,
    "far": lambda x, **kw: eqsim_close_far_loss(x, torch.tensor([[1, 2], [0, 3]], device=x.device), **kw).far,
    "itm": lambda x, **kw: eqsim_itm_loss(x[0], *x.unbind()[1:4], activation="linear", **kw),
    "itm softmax": lambda x, **kw: eqsim_itm_loss(x[0], *x.unbind()[1:4], activation="softmax", **kw),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


class TestFacts:
    def test_both_sides_together(self):
        s00, s01, s10, s11 = scores = matrix(4, 9)
        p, e = s00 - s11, s01 - s10
        same(eqsim_quad_loss(*scores), 2 * (p**2 + e**2).mean(), scores)

    def test_the_group_side_is_the_asymmetry_of_the_mismatched(self):
        scores = matrix(6)
        found = eqsim_all_pairs_loss(
            scores, activation=None, text_side=False, image_side=False, group_side=True, margin=0.0, weight=1.0
        )
        far = eqsim_close_far_loss(scores, torch.arange(6)[:, None], activation=None, weight=1.0).far
        same(found, far * 36 / 15, scores)

    def test_image_index_comes_first(self):
        s00, s01, s10, s11 = matrix(4, 9)
        text, image = {"image_side": False}, {"text_side": False}
        close(eqsim_quad_loss(s00, s10, s01, s11, **text), eqsim_quad_loss(s00, s01, s10, s11, **image))
        assert eqsim_quad_loss(s00, s10, s01, s11, **text) != eqsim_quad_loss(s00, s01, s10, s11, **text)
        logits, index = matrix(5), torch.tensor([[1], [4], [0]])
        for loss in (eqsim_all_pairs_loss, lambda x, **kw: eqsim_close_far_loss(x, index, **kw).close):
            plain = {"activation": None, "margin": 0.0}
            close(loss(logits.T, **plain, **text), loss(logits, **plain, **image))
        # The texts of a row compete, not the images of a column.
        assert eqsim_all_pairs_loss(logits.T, margin=0.0) != eqsim_all_pairs_loss(logits, margin=0.0)

    @pytest.mark.parametrize("hinge", ["mean", "pair"])
    def test_exactly_at_the_margin(self, hinge):
        scores = torch.tensor([[1.0], [0.5], [1.0], [1.0]], requires_grad=True)  # a - b = 0.5
        assert eqsim_quad_loss(*scores, image_side=False, margin=0.25, hinge=hinge).item() == 0
        assert eqsim_quad_loss(*scores, image_side=False, margin=0.2499, hinge=hinge).item() > 0
        below = eqsim_quad_loss(*scores, image_side=False, margin=0.2501, hinge=hinge)
        assert gradient(below, scores).count_nonzero() == 0

    def test_the_hinge_waits_for_the_mean(self):
        scores = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # squares 4 and 0
        assert eqsim_quad_loss(*scores, image_side=False, margin=1.0).item() == 1.0
        assert eqsim_quad_loss(*scores, image_side=False, margin=1.0, hinge="pair").item() == 1.5

    def test_an_anchor_as_its_own_partner_adds_a_zero(self):
        scores = matrix(4)
        once = eqsim_close_far_loss(scores, torch.tensor([[2]]), activation=None, margin=0.0)
        diluted = eqsim_close_far_loss(scores, torch.tensor([[2, 0]]), activation=None, margin=0.0)
        close(diluted.close, once.close / 2)
        close(diluted.far, once.far)

    @pytest.mark.parametrize("options", [{}, {"hinge": "pair"}, {"positive_reg": True, "relative": True}])
    def test_without_pairs_there_is_a_zero_with_a_graph(self, options):
        for rows, columns in ((1, 1), (1, 3), (0, 0), (0, 2)):
            logits = matrix(rows, columns) if columns else torch.zeros(0, 0, requires_grad=True)
            losses = [eqsim_all_pairs_loss(logits, **options)]
            if rows == columns:
                losses += eqsim_close_far_loss(logits, torch.zeros(rows, 0, dtype=torch.long), **options)
            for loss in losses:
                assert loss.item() == 0
                assert gradient(loss, logits).count_nonzero() == 0
        everything = torch.ones(3, 3, dtype=torch.bool)
        assert eqsim_all_pairs_loss(matrix(3), exclude=everything, **options).item() == 0
        empty = [torch.zeros(shape, requires_grad=True) for shape in [(3,), (3, 0), (3, 0), (3, 0)]]
        for activation in (None, "linear", "sigmoid", "softmax"):
            assert gradient(eqsim_itm_loss(*empty, activation=activation, **options), empty[0]).count_nonzero() == 0

    def test_equal_match_scores(self):
        scores = torch.full((4, 3), 0.3, requires_grad=True)
        loss = eqsim_itm_loss(*scores, activation="linear")
        assert loss.item() == 0
        assert gradient(loss, scores).count_nonzero() == 0

    def test_one_negative_needs_no_second_dimension(self):
        scores = matrix(4, 5)
        flat = eqsim_itm_loss(*scores, activation="softmax")
        close(flat, eqsim_itm_loss(scores[0], *(s[:, None] for s in scores[1:]), activation="softmax"))

    def test_matched_scores_broadcast(self):
        s00, rest = matrix(5, 1), [matrix(5, 3, seed=seed) for seed in (1, 2, 3)]
        same(eqsim_quad_loss(s00, *rest), eqsim_quad_loss(s00.expand(5, 3), *rest), s00)


class TestPrecision:
    @each_loss
    def test_gradcheck(self, loss):
        for options in (
            {},
            {"group_side": True, "positive_reg": True},
            {"relative": True, "hinge": "pair", "eps": 0.1},
        ):
            call = functools.partial(loss, margin=0.0, **options)
            assert torch.autograd.gradcheck(call, (matrix(4),))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @each_loss
    def test_half_precision_is_computed_in_float32(self, loss, dtype):
        half = matrix(5, dtype=dtype)
        full = half.detach().float().requires_grad_()
        found, expected = loss(half, margin=0.0), loss(full, margin=0.0)
        assert found.dtype == torch.float32
        assert found.item() == expected.item() > 0
        torch.testing.assert_close(gradient(found, half), gradient(expected, full).to(dtype))

    @each_loss
    def test_autocast_changes_nothing(self, loss):
        scores = matrix(5, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(scores, margin=0.0)
        assert found.dtype == torch.float32
        assert found.item() == loss(scores, margin=0.0).item()

    def test_closed_form_of_large_scores(self):
        scores = (1000 + matrix(40)).detach()
        found = eqsim_all_pairs_loss(scores.float(), activation=None, margin=0.0)
        torch.testing.assert_close(
            found.double(), eqsim_all_pairs_loss(scores, activation=None, margin=0.0), rtol=1e-4, atol=0
        )


class TestRunsAnywhere:
    @each_loss
    def test_the_host_never_waits(self, loss):
        scores = matrix(5)
        exclude = torch.zeros(5, 5, dtype=torch.bool)
        with NoSync():
            for options in ({}, {"positive_reg": True, "relative": True, "group_side": True}, {"hinge": "pair"}):
                loss(scores, **options).backward()
            eqsim_all_pairs_loss(scores, exclude=exclude).backward()

    @each_loss
    def test_compiles_whole(self, loss):
        scores = matrix(5)
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")(scores, margin=0.0)
        same(compiled, loss(scores, margin=0.0), scores)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @each_loss
    def test_same_on_cuda(self, loss):
        scores = matrix(5)
        there = scores.detach().cuda().requires_grad_()
        found = loss(there, margin=0.0)
        same(found.cpu(), loss(scores, margin=0.0))
        close(gradient(found, there).cpu(), gradient(loss(scores, margin=0.0), scores))
