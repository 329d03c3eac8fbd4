import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import perturbed_topk, select_frames

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hots(scores: Tensor, noise: Tensor, k: int, sigma: float) -> Tensor:
    """P of the definition, (B, n, k, T)."""
    rows = []
    for p, draws in zip(scores, noise, strict=True):
        for draw in draws:
            best = sorted(sorted(range(len(p)), key=lambda t: -(p[t] + sigma * draw[t]).item())[:k])
            rows.append(F.one_hot(torch.tensor(best), len(p)))
    return torch.stack(rows).unflatten(0, noise.shape[:2]).double()


class TestTopK:
    @settings(max_examples=25, deadline=None)
    @given(batch=st.integers(1, 3), length=st.integers(1, 5), draws=st.integers(1, 6), data=st.data())
    def test_is_the_definition(self, batch, length, draws, data):
        k = data.draw(st.integers(1, length))
        scores = randn(batch, length, seed=length).softmax(-1).requires_grad_()
        noise = randn(batch, draws, length, seed=draws)
        one_hot, sigma = one_hots(scores, noise, k, 0.4), 0.4
        cotangent = randn(batch, k, length, seed=9)
        expected = {
            "diagonal": torch.einsum("brt,bnrt,bnt->bt", cotangent, one_hot, noise) / (draws * sigma),
            "full": torch.einsum("bnt,bnrs,brs->bt", noise, one_hot, cotangent) / (draws * sigma),
        }
        for gradient, value in expected.items():
            found = perturbed_topk(scores, k=k, sigma=sigma, noise=noise, gradient=gradient)
            close(found, one_hot.mean(1))
            close(torch.autograd.grad((found * cotangent).sum(), scores)[0], value)

    def test_full_gradient_is_that_of_the_expectation(self):
        """Finite differences of the mean over many draws, the same on both sides."""
        scores = torch.tensor([[0.3, 0.1, 0.2, 0.25]], dtype=torch.float64, requires_grad=True)
        weight = randn(2, 4, seed=2)
        noise = randn(1, 400_000, 4, seed=3)

        def expectation(p):
            return (perturbed_topk(p, k=2, sigma=0.2, noise=noise, gradient="full") * weight).sum()

        (found,) = torch.autograd.grad(expectation(scores), scores)
        step = 0.02 * torch.eye(4, dtype=torch.float64)
        with torch.no_grad():
            slope = [(expectation(scores + e) - expectation(scores - e)) / 0.04 for e in step]
        torch.testing.assert_close(found[0], torch.stack(slope), atol=0.05, rtol=0)
        assert found.abs().max() > 0.5

    def test_drawn_noise(self):
        scores = torch.tensor([[0.1, 0.3, 0.2]])
        generator = torch.Generator().manual_seed(1)
        weights = perturbed_topk(scores, k=2, num_samples=2000, sigma=0.5, generator=generator)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2))
        noise = torch.randn(1, 2000, 3, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(weights, perturbed_topk(scores, k=2, sigma=0.5, noise=noise))
        assert not torch.equal(weights, perturbed_topk(scores, k=2, num_samples=2000, sigma=0.5, generator=generator))
        # two standard deviations of 500 draws of the default: scores 0.2 apart never change places at sigma 0.05 / 10
        sure = perturbed_topk(scores, k=1, sigma=0.005)
        torch.testing.assert_close(sure, torch.tensor([[[0.0, 1.0, 0.0]]]))

    def test_all_frames(self):
        torch.testing.assert_close(perturbed_topk(torch.rand(2, 4), k=4), torch.eye(4).expand(2, 4, 4))

    def test_half_precision(self):
        assert perturbed_topk(torch.rand(2, 4).half(), k=2).dtype == torch.float32

    @pytest.mark.parametrize("gradient", ["diagonal", "full"])
    def test_never_waits_for_the_device(self, gradient):
        scores = torch.rand(2, 4, requires_grad=True)
        with NoSync():
            perturbed_topk(scores, k=2, gradient=gradient).sum().backward()


def problem(batch=2, length=5, tokens=3, width=4):
    tensors = [
        randn(batch, length, tokens, width),
        randn(batch, width, seed=1),
        1 + 0.1 * randn(width, seed=2),
        0.1 * randn(width, seed=3),
        randn(width, width, seed=4),
        randn(width, 2 * width, seed=5),
        randn(1, width, seed=6),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def plain_scores(frames, text, norm_weight, norm_bias, in_weight, mid_weight, out_weight):
    rows = []
    for clip, u in zip(frames, text, strict=True):
        logits = []
        for frame in clip:
            c = frame[0]
            normed = (c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() * norm_weight + norm_bias
            f = F.gelu(in_weight @ normed)
            logits.append((out_weight @ F.gelu(mid_weight @ torch.cat([f, u])))[0])
        rows.append(torch.stack(logits).softmax(0))
    return torch.stack(rows)


class TestSelect:
    def test_best_frames_in_their_order(self):
        tensors = problem()
        found = select_frames(*tensors, k=3)
        scores = plain_scores(*tensors)
        close(found.scores, scores)
        for b in range(2):
            best = sorted(scores[b].topk(3).indices.tolist())
            close(found.frames[b], tensors[0][b][best])
            close(found.indicators[b], F.one_hot(torch.tensor(best), 5).double())
        assert torch.autograd.grad(found.frames.sum(), tensors[6], allow_unused=True, retain_graph=True) == (None,)
        assert (torch.autograd.grad(found.frames.sum(), tensors[0])[0].sum() - 2 * 3 * 3 * 4).abs() < 1e-9

    @pytest.mark.parametrize("gradient", ["diagonal", "full"])
    def test_training(self, gradient):
        tensors = problem()
        noise = randn(2, 7, 5, seed=8)
        found = select_frames(*tensors, k=2, sigma=0.1, training=True, noise=noise, gradient=gradient)
        scores = plain_scores(*tensors)
        weights = perturbed_topk(scores, k=2, sigma=0.1, noise=noise, gradient=gradient)
        frames = torch.stack([sum(weights[:, :, t, None, None] * tensors[0][:, t, None] for t in range(5))]).squeeze(0)
        close(found.scores, scores)
        close(found.indicators, weights)
        close(found.frames, frames)
        cotangent = randn(*frames.shape, seed=9)
        gradients = [torch.autograd.grad((x * cotangent).sum(), tensors) for x in (found.frames, frames)]
        for one, other in zip(*gradients, strict=True):
            close(one, other)
        assert gradients[0][1].abs().sum() > 0

    def test_keeps_the_dtype_of_frames(self):
        tensors = [tensor.detach().bfloat16() for tensor in problem()]
        for training in (True, False):
            found = select_frames(*tensors, k=2, training=training)
            assert found.frames.dtype == torch.bfloat16
            assert found.scores.dtype == found.indicators.dtype == torch.float32

    def test_never_waits_for_the_device(self):
        with NoSync():
            for training in (True, False):
                select_frames(*problem(), k=2, training=training).frames.sum().backward()


S = torch.rand(2, 4)
X = [tensor.detach() for tensor in problem()]


def select(**changed):
    names = ["frames", "text", "norm_weight", "norm_bias", "in_weight", "mid_weight", "out_weight"]
    return lambda: select_frames(**{"k": 2, **dict(zip(names, X, strict=True)), **changed})


BAD_CALLS = {
    "k 0": (lambda: perturbed_topk(S, k=0), r"`k`.*\[1, 4\].*0"),
    "k too large": (lambda: perturbed_topk(S, k=5), r"`k`.*\[1, 4\].*5"),
    "scores": (lambda: perturbed_topk(S[0], k=1), r"scores.*\(B, T\).*\(4,\)"),
    "noise": (lambda: perturbed_topk(S, k=1, noise=torch.rand(2, 3, 5)), r"noise.*\(2, any, 4\).*\(2, 3, 5\)"),
    "samples": (lambda: perturbed_topk(S, k=1, num_samples=0), "num_samples.*0"),
    "sigma": (lambda: perturbed_topk(S, k=1, sigma=0.0), "sigma.*0.0"),
    "gradient": (lambda: perturbed_topk(S, k=1, gradient="half"), "gradient.*diagonal.*half"),
    "select k": (select(k=6), r"`k`.*\[1, 5\].*6"),
    "frames": (select(frames=X[0][0]), "frames.*B, T, N, D"),
    "no token": (select(frames=X[0][:, :, :0]), "frames.*CLS"),
    "text": (select(text=X[1][:1]), "text"),
    "norm": (select(norm_weight=X[2][:1]), "norm_weight"),
    "norm bias": (select(norm_bias=X[2][:1]), "norm_bias"),
    "in": (select(in_weight=X[5]), "in_weight"),
    "mid": (select(mid_weight=X[4]), r"mid_weight.*\(4, 8\).*\(4, 4\)"),
    "out": (select(out_weight=X[4]), "out_weight"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
