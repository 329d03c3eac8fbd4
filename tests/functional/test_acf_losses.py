import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import caption_mask, masked_token_nll, prefix_mask_rows, self_critical_loss

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestTokens:
    def problem(self):
        logprobs = randn(3, 4, 5).log_softmax(-1).detach().requires_grad_()
        targets = torch.tensor([[0, 1, 2, 3], [4, 4, -1, 9], [1, -100, -100, -100]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
        return logprobs, targets, mask

    def test_is_the_definition(self):
        logprobs, targets, mask = self.problem()
        total = 0
        for r in range(3):
            for c in range(4):
                if mask[r, c]:
                    total = total - logprobs[r, c, targets[r, c]]
        close(masked_token_nll(logprobs, targets, mask), total / 7)
        close(masked_token_nll(logprobs, targets, mask.bool(), reduction="sum"), total)
        each = masked_token_nll(logprobs, targets, mask, reduction="none")
        assert each.shape == (3, 4)
        close(each.sum(), total)
        assert each[mask == 0].eq(0).all()
        close(masked_token_nll(logprobs, targets, 0.5 * mask), total / 7)
        assert torch.autograd.gradcheck(lambda x: masked_token_nll(x, targets, mask), logprobs)

    def test_nothing_counts(self):
        logprobs, targets, mask = self.problem()
        loss = masked_token_nll(logprobs, targets, 0 * mask)
        loss.backward()
        assert loss == 0
        assert logprobs.grad.eq(0).all()

    def test_impossible_tokens_behind_the_mask(self):
        logprobs = torch.tensor([[[0.0, float("-inf")], [0.0, float("-inf")]]], requires_grad=True)
        loss = masked_token_nll(logprobs, torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
        loss.backward()
        assert loss == 0
        assert logprobs.grad.isfinite().all()

    def test_precision_and_no_waiting(self):
        logprobs, targets, mask = self.problem()
        assert masked_token_nll(logprobs.bfloat16(), targets, mask).dtype == torch.float32
        with NoSync():
            masked_token_nll(logprobs, targets, mask).backward()


class TestSelfCritical:
    def test_is_the_definition(self):
        logprobs, rewards = randn(6, 4).requires_grad_(), randn(6, seed=1).requires_grad_()
        mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
        total = 0
        for s in range(6):
            others = [rewards[r].item() for r in range(6) if r // 3 == s // 3 and r != s]
            for t in range(4):
                if mask[s, t]:
                    total = total - (rewards[s].item() - sum(others) / 2) * logprobs[s, t]
        expected = total / mask.sum().item()
        found = self_critical_loss(logprobs, rewards, mask, num_samples=3)
        close(found, expected)
        gradients = torch.autograd.grad(found, [logprobs, rewards], allow_unused=True)
        close(gradients[0], torch.autograd.grad(expected, logprobs)[0])
        assert gradients[1] is None
        assert torch.autograd.gradcheck(
            lambda x: self_critical_loss(x, rewards.detach(), mask.bool(), num_samples=3), logprobs
        )

    def test_equal_rewards_teach_nothing(self):
        logprobs = randn(4, 3).requires_grad_()
        self_critical_loss(logprobs, torch.full((4,), 0.7), torch.ones(4, 3), num_samples=2).backward()
        assert logprobs.grad.abs().max() < 1e-6

    def test_padding_may_be_impossible(self):
        logprobs = torch.tensor([[-1.0, float("-inf")], [-1.0, -1.0]], requires_grad=True)
        mask = torch.tensor([[1, 0], [1, 1]])
        loss = self_critical_loss(logprobs, torch.tensor([1.0, 0.0]), mask, num_samples=2)
        loss.backward()
        assert loss.isfinite()
        assert logprobs.grad.isfinite().all()
        nothing = self_critical_loss(logprobs, torch.tensor([1.0, 0.0]), 0 * mask, num_samples=2)
        assert nothing == 0


class TestMasks:
    @settings(max_examples=50, deadline=None)
    @given(rows=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
    def test_caption_mask(self, rows):
        found = caption_mask(torch.tensor(rows), end_id=3)
        for row, mask in zip(rows, found.tolist(), strict=True):
            length = row.index(3) + 1 if 3 in row else 5
            assert mask == [True] * length + [False] * (5 - length)

    def test_prefix_rows(self):
        tokens = torch.tensor([[0, 5, 6, 9, 9], [0, 9, 0, 0, 0], [0, 5, 6, 7, 4]])
        rows = prefix_mask_rows(tokens, mask_id=8, end_id=9)
        lengths = [2, 0, 4]  # words; the last caption fills its row, so that its end is never asked for
        expected = [(b, r) for b, n in enumerate(lengths) for r in range(min(n + 1, 4))]
        assert rows.index.tolist() == [b for b, _ in expected]
        for k, (b, r) in enumerate(expected):
            caption = tokens[b].tolist()
            assert rows.inputs[k].tolist()[: r + 2] == [*caption[: r + 1], 8]
            assert rows.input_mask[k].tolist() == [c <= r + 1 for c in range(5)]
            assert rows.target_mask[k].tolist() == [c == r + 1 for c in range(5)]
            assert rows.targets[k, r + 1] == caption[r + 1]
            assert rows.inputs[k].tolist()[r + 2 :] == [9] * (3 - r)

    def test_one_target_a_row(self):
        rows = prefix_mask_rows(torch.randint(10, (6, 7)), mask_id=8, end_id=9)
        assert rows.target_mask.sum(1).eq(1).all()


P, Y, M = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
scst = functools.partial(self_critical_loss, num_samples=2)
BAD_CALLS = {
    "logprobs": (lambda: masked_token_nll(P[0], Y, M), "logprobs"),
    "targets": (lambda: masked_token_nll(P, Y[:1], M), "targets"),
    "floating targets": (lambda: masked_token_nll(P, M, M), "targets.*float32"),
    "mask": (lambda: masked_token_nll(P, Y, M[:, 1:]), r"mask.*\(2, 2\)"),
    "reduction": (lambda: masked_token_nll(P, Y, M, reduction="max"), "reduction.*max"),
    "target outside": (lambda: masked_token_nll(P, Y + 4, M), r"targets.*\[0, 4\).*from 4 to 4"),
    "rl logprobs": (lambda: scst(P, M[:, 0], M), "logprobs"),
    "rewards": (lambda: scst(M, M, M), "rewards"),
    "rl mask": (lambda: scst(M, M[:, 0], M[:1]), "mask"),
    "one sample": (lambda: scst(M, M[:, 0], M, num_samples=1), "num_samples.*1"),
    "odd samples": (lambda: scst(M, M[:, 0], M, num_samples=3), "num_samples.*2 rows.*3"),
    "floating tokens": (lambda: caption_mask(M, 0), "tokens.*float32"),
    "flat tokens": (lambda: prefix_mask_rows(Y[0], mask_id=1, end_id=2), "tokens"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
