import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import (
    fine_grained_contrastive_loss,
    hard_negative_matching_loss,
    mask_tokens,
    sample_hard_negatives,
    video_text_contrastive_loss,
    video_text_matching_loss,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coarse(batch=3, queue=4, width=5, seed=0):
    features = [randn(batch, width, seed=4 * seed + i).requires_grad_() for i in range(4)]
    queues = [F.normalize(randn(queue, width, seed=100 + i), dim=1) for i in range(2)]
    return [*features, *queues, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]


def plain_coarse(v, t, v_m, t_m, v_queue, t_queue, tau, *, alpha=0.4, normalize=True):
    """The definition, row by row."""
    if normalize:
        v, t, v_m, t_m = (torch.stack([row / row.norm() for row in rows]) for rows in (v, t, v_m, t_m))
    v_m, t_m = v_m.detach(), t_m.detach()
    total = 0
    for student, momentum, columns in ((v, v_m, [*t_m, *t_queue]), (t, t_m, [*v_m, *v_queue])):
        for i, (row, target_row) in enumerate(zip(student, momentum, strict=True)):
            logits = torch.stack([row @ column for column in columns]) / tau
            target = alpha * torch.stack([target_row @ column for column in columns]).div(tau.detach()).softmax(0)
            target[i] += 1 - alpha
            total = total - (target * logits.log_softmax(0)).sum() / len(student)
    return total / 2


class TestCoarse:
    @pytest.mark.parametrize("queue", [0, 4])
    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_is_the_definition(self, alpha, queue, normalize):
        inputs = coarse(queue=queue)
        found = video_text_contrastive_loss(*inputs, alpha=alpha, normalize=normalize)
        expected = plain_coarse(*inputs, alpha=alpha, normalize=normalize)
        close(found, expected)
        leaves = [inputs[0], inputs[1], inputs[6]]
        for one, other in zip(
            torch.autograd.grad(found, leaves, retain_graph=True), torch.autograd.grad(expected, leaves), strict=True
        ):
            close(one, other)
        assert torch.autograd.grad(found, inputs[2:4], allow_unused=True) == (None, None)

    def test_gradcheck(self):
        inputs = coarse()
        fixed = [tensor.detach() for tensor in inputs[2:6]]
        # targets are constants: only without them is the derivative by the temperature that of the value
        assert torch.autograd.gradcheck(
            lambda v, t, tau: video_text_contrastive_loss(v, t, *fixed, tau, alpha=0.0), [*inputs[:2], inputs[6]]
        )
        assert torch.autograd.gradcheck(lambda v, t: video_text_contrastive_loss(v, t, *fixed, 0.3), inputs[:2])

    def test_is_symmetric_and_knows_no_order(self):
        v, t, v_m, t_m, v_q, t_q, tau = coarse()
        loss = video_text_contrastive_loss(v, t, v_m, t_m, v_q, t_q, tau)
        close(video_text_contrastive_loss(t, v, t_m, v_m, t_q, v_q, tau), loss)
        order = torch.tensor([2, 0, 1])
        close(video_text_contrastive_loss(v[order], t[order], v_m[order], t_m[order], v_q, t_q.flip(0), tau), loss)

    def test_low_precision_and_autocast(self):
        inputs = coarse()
        expected = video_text_contrastive_loss(*inputs)
        low = [tensor.detach().bfloat16() for tensor in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = video_text_contrastive_loss(*low)
        assert found.dtype == torch.float32
        assert (found - expected).abs() < 0.05

    def test_never_waits_for_the_device(self):
        with NoSync():
            video_text_contrastive_loss(*coarse()).backward()


def fine(batch=2, columns=3, frames=2, patches=3, length=4, width=5):
    video, text = randn(batch, frames * patches, width), randn(batch, length, width, seed=1)
    video_all, text_all = randn(columns, frames * patches, width, seed=2), randn(columns, length, width, seed=3)
    mask, all_mask = torch.ones(batch, length), torch.ones(columns, length, dtype=torch.bool)
    mask[0, 2:], all_mask[1, 1:] = 0, False
    return [video.requires_grad_(), text.requires_grad_(), mask, video_all.requires_grad_(), text_all, all_mask]


def plain_fine(video, text, mask, video_all, text_all, all_mask, *, num_frames, temperature=0.07, normalize=True):
    if normalize:
        video, text, video_all, text_all = (F.normalize(x, dim=-1) for x in (video, text, video_all, text_all))
    video_all = video_all.detach()

    def similarity(patches, words, real):
        frames = patches.reshape(num_frames, -1, patches.shape[-1])
        best = [
            max(word @ patch for patch in frame) / temperature
            for frame in frames
            for word, counts in zip(words, real, strict=True)
            if counts
        ]
        return sum(best) / max(1, sum(1 for counts in real if counts)) / num_frames

    total = 0
    for b in range(len(video)):
        of_video = [similarity(video[b], text_all[k], all_mask[k]) for k in range(len(video_all))]
        of_text = [similarity(video_all[k], text[b], mask[b]) for k in range(len(video_all))]
        for logits in (of_video, of_text):
            total = total - torch.stack([torch.as_tensor(x).double() for x in logits]).log_softmax(0)[b]
    return total / len(video) / 2


class TestFine:
    @pytest.mark.parametrize("chunk_size", [None, 1, 2, 9])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_is_the_definition(self, chunk_size, normalize):
        inputs = fine()
        options = {"num_frames": 2, "temperature": 0.2, "normalize": normalize}
        found = fine_grained_contrastive_loss(*inputs, **options, chunk_size=chunk_size)
        expected = plain_fine(*inputs, **options)
        close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, inputs[:2], retain_graph=True),
            torch.autograd.grad(expected, inputs[:2]),
            strict=True,
        ):
            close(one, other)
        assert torch.autograd.grad(found, inputs[3], allow_unused=True) == (None,)

    def test_gradcheck(self):
        inputs = fine()
        fixed = [x.detach() for x in inputs[2:]]
        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda v, t, tau: fine_grained_contrastive_loss(v, t, *fixed, num_frames=2, temperature=tau),
            [*inputs[:2], tau],
        )

    def test_ties_have_one_winner(self):
        video = torch.ones(1, 3, 2, requires_grad=True)
        words, mask = torch.ones(2, 1, 2) * torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.ones(2, 1)
        loss = fine_grained_contrastive_loss(
            video, words[:1], mask[:1], torch.ones(2, 3, 2), words, mask, num_frames=1, normalize=False, temperature=1.0
        )
        loss.backward()
        assert (video.grad != 0).any(-1).sum() == 1

    def test_text_without_words(self):
        inputs = fine()
        inputs[2] = torch.zeros(2, 4)
        loss = fine_grained_contrastive_loss(*inputs, num_frames=2)
        loss.backward()
        assert loss.isfinite()
        assert inputs[1].grad.eq(0).all()

    def test_products_are_not_kept(self):
        """What the graph holds must not grow with the number of patches of a frame."""

        def kept(patches):
            inputs = fine(4, 16, 2, patches, 4, 2)
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
                fine_grained_contrastive_loss(*inputs, num_frames=2)
            return max(sizes)

        assert kept(40) < 4 * 16 * 2 * 40 * 4 / 2


class TestMatching:
    def test_is_cross_entropy(self):
        logits = randn(6, 2).requires_grad_()
        loss = video_text_matching_loss(logits, 2)
        probs = logits.softmax(1)
        close(loss, -(probs[:2, 1].log().sum() + probs[2:, 0].log().sum()) / 6)
        assert torch.autograd.gradcheck(lambda x: video_text_matching_loss(x, 2), logits)
        assert video_text_matching_loss(logits.half(), 2).dtype == torch.float32


class TestNegatives:
    @settings(max_examples=30, deadline=None)
    @given(size=st.integers(2, 6), seed=st.integers(0, 999), scale=st.sampled_from([0.0, 1.0, 1e4]))
    def test_never_the_row_itself(self, size, seed, scale):
        similarity = scale * randn(size, size, seed=seed).float() + 1e5 * torch.eye(size)
        found = sample_hard_negatives(similarity, generator=torch.Generator().manual_seed(seed))
        assert found.shape == (size,)
        assert (found != torch.arange(size)).all()
        assert ((found >= 0) & (found < size)).all()

    def test_follows_the_softmax(self):
        similarity = torch.tensor([[5.0, 1.0, 0.0], [0.0, 5.0, 0.0], [2.0, 2.0, 5.0]])
        generator = torch.Generator().manual_seed(0)
        draws = torch.stack([sample_hard_negatives(similarity, generator=generator) for _ in range(4000)])
        expected = 1 / (1 + torch.tensor([1.0, 0.0, 0.0]).exp().reciprocal())
        found = torch.stack([(draws[:, 0] == 1), (draws[:, 1] == 0), (draws[:, 2] == 0)], 1).float().mean(0)
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)

    def test_draws_as_multinomial_does(self):
        similarity = randn(8, 8).float()
        found = sample_hard_negatives(similarity, generator=torch.Generator().manual_seed(5))
        probs = similarity.masked_fill(torch.eye(8, dtype=torch.bool), float("-inf")).softmax(1)
        assert torch.equal(found, torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(5)).squeeze(1))

    def test_never_waits_for_the_device(self):
        with NoSync():
            sample_hard_negatives(randn(4, 4))


class TestHardNegatives:
    @pytest.mark.parametrize("masked", [True, False])
    def test_is_the_matching_loss_of_pairs_and_sampled_negatives(self, masked):
        text, video = randn(4, 3, 5).requires_grad_(), randn(4, 6, 2, seed=1).requires_grad_()
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]) if masked else None
        text_logits, video_logits = 3 * randn(4, 4, seed=2), 3 * randn(4, 4, seed=3)
        weight = randn(7, 2, seed=4)

        def matcher(words, patches, kept=None):
            words = words.mean(1) if kept is None else (words * kept[..., None]).sum(1)
            return torch.cat([words, patches.mean(1)], 1) @ weight

        found = hard_negative_matching_loss(
            matcher,
            text,
            video,
            text_logits,
            video_logits,
            text_mask=mask,
            generator=torch.Generator().manual_seed(6),
        )
        generator = torch.Generator().manual_seed(6)
        wrong_video = sample_hard_negatives(text_logits, generator=generator)
        wrong_text = sample_hard_negatives(video_logits, generator=generator)
        assert not torch.equal(wrong_video, wrong_text)
        pairs = [(i, i, 1) for i in range(4)]
        pairs += [(i, int(wrong_video[i]), 0) for i in range(4)] + [(int(wrong_text[i]), i, 0) for i in range(4)]
        losses = []
        for i, j, label in pairs:
            kept = [] if mask is None else [mask[i : i + 1]]
            losses.append(-matcher(text[i : i + 1], video[j : j + 1], *kept).log_softmax(1)[0, label])
        expected = torch.stack(losses).mean()
        close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, (text, video)), torch.autograd.grad(expected, (text, video)), strict=True
        ):
            close(one, other)

    def test_never_waits_for_the_device(self):
        with NoSync():
            hard_negative_matching_loss(lambda t, v: t[:, 0] + v[:, 0], P[..., :2], P[..., :2], E[:, :2], E[:, :2])


class TestMaskTokens:
    @staticmethod
    def draw(probability=0.15, rows=400):
        ids = torch.randint(5, 1000, (rows, 50), generator=torch.Generator().manual_seed(0))
        ids[:, 0], ids[:, 40:] = 1, 0
        special = torch.zeros_like(ids)
        special[:, 0] = 1
        masked = mask_tokens(
            ids,
            mask_id=3,
            vocab_size=1000,
            special_mask=special,
            probability=probability,
            generator=torch.Generator().manual_seed(1),
        )
        return ids, special, masked

    def test_shares(self):
        ids, special, (masked, labels) = self.draw()
        chosen = labels != -100
        open_ = (special == 0) & (ids != 0)
        assert not (chosen & ~open_).any()
        assert torch.equal(masked[~chosen], ids[~chosen])
        assert torch.equal(labels[chosen], ids[chosen])
        assert chosen.sum() / open_.sum() == pytest.approx(0.15, abs=0.01)
        became_mask, stayed = masked[chosen] == 3, masked[chosen] == ids[chosen]
        assert became_mask.float().mean() == pytest.approx(0.8, abs=0.03)
        assert stayed.float().mean() == pytest.approx(0.1, abs=0.02)
        other = masked[chosen][~became_mask & ~stayed]
        assert 0 <= other.min() < 100
        assert 900 < other.max() < 1000

    def test_all_or_nothing(self):
        ids, special, (_, labels) = self.draw(1.0, 3)
        assert ((labels != -100) == ((special == 0) & (ids != 0))).all()
        ids, _, (masked, labels) = self.draw(0.0, 3)
        assert torch.equal(masked, ids)
        assert labels.eq(-100).all()


E, M, Z = torch.zeros(2, 3), torch.ones(2, 4), torch.zeros(0, 3)
P, L = torch.zeros(2, 6, 3), torch.zeros(2, 4, 3)
vtc = video_text_contrastive_loss
fgc = functools.partial(fine_grained_contrastive_loss, num_frames=2)
IDS = torch.zeros(2, 3, dtype=torch.long)
hard = functools.partial(hard_negative_matching_loss, lambda text, video: text[:, 0] + video[:, 0])
mlm = functools.partial(mask_tokens, mask_id=3, vocab_size=9)
BAD_CALLS = {
    "vtc shape": (lambda: vtc(E, E[:1], E, E, Z, Z, 1.0), r"`text`.*\(2, 3\).*\(1, 3\)"),
    "vtc dimensions": (lambda: vtc(E[0], E, E, E, Z, Z, 1.0), "`video`"),
    "vtc momentum": (lambda: vtc(E, E, E, E[:, :1], Z, Z, 1.0), "text_momentum"),
    "vtc queue": (lambda: vtc(E, E, E, E, Z, torch.zeros(4, 2), 1.0), r"text_queue.*3.*\(4, 2\)"),
    "vtc alpha": (lambda: vtc(E, E, E, E, Z, Z, 1.0, alpha=1.5), "alpha.*1.5"),
    "vtc integers": (lambda: vtc(E.long(), E, E, E, Z, Z, 1.0), "video.*int64"),
    "fine text": (lambda: fgc(P, L[:1], M, P, L, M), "`text`"),
    "fine mask": (lambda: fgc(P, L, M[:, :3], P, L, M), r"text_mask.*\(2, 4\).*\(2, 3\)"),
    "fine all": (lambda: fgc(P, L, M, P[:, :3], L, M), "video_all"),
    "fine all text": (lambda: fgc(P, L, M, P, L[:1], M), "text_all"),
    "fine all mask": (lambda: fgc(P, L, M, P, L, M[:1]), "text_all_mask"),
    "fine frames": (lambda: fgc(P, L, M, P, L, M, num_frames=4), "num_frames.*6.*4"),
    "fine columns": (lambda: fgc(P, L, M, P[:1], L[:1], M[:1]), "video_all.*2.*1"),
    "fine chunk": (lambda: fgc(P, L, M, P, L, M, chunk_size=0), "chunk_size.*0"),
    "matching shape": (lambda: video_text_matching_loss(E, 1), r"logits.*\(2, 3\)"),
    "matching number": (lambda: video_text_matching_loss(E[:, :2], 3), "num_positive.*3"),
    "negatives shape": (lambda: sample_hard_negatives(E), r"similarity.*\(2, 2\).*\(2, 3\)"),
    "negatives alone": (lambda: sample_hard_negatives(E[:1, :1]), "similarity.*at least 2"),
    "hard text": (lambda: hard(E, P, E[:, :2], E[:, :2]), r"`text`.*\(2, 3\)"),
    "hard video": (lambda: hard(P, P[:1], E[:, :2], E[:, :2]), r"`video`.*\(1, 6, 3\)"),
    "hard text logits": (lambda: hard(P, P, E, E[:, :2]), r"`text_logits`.*\(2, 3\)"),
    "hard video logits": (lambda: hard(P, P, E[:, :2], E), r"`video_logits`.*\(2, 3\)"),
    "hard mask": (lambda: hard(P, P, E[:, :2], E[:, :2], text_mask=M), r"`text_mask`.*\(2, 4\)"),
    "hard matcher": (lambda: hard(P, P, E[:, :2], E[:, :2]), r"`matcher\(\.\.\.\)`.*\(6, 2\).*\(6, 3\)"),
    "hard alone": (lambda: hard(P[:1], P[:1], E[:1, :1], E[:1, :1]), "at least 2"),
    "floating ids": (lambda: mlm(E, special_mask=IDS), "ids.*float32"),
    "special mask": (lambda: mlm(IDS, special_mask=IDS[:1]), "special_mask"),
    "probability": (lambda: mlm(IDS, special_mask=IDS, probability=2.0), "probability.*2.0"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
