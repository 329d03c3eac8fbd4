"""Sequence-level training: what is rewarded, what gets gradients, and that rewards rise."""

import functools

import pytest
import torch
from torch import nn

from lightning_methods.functional import DocumentFrequency, cider_d, document_frequency
from lightning_methods.modules import ACFCaptioner, Captions, SelfCriticalLoss

END = 5
REFERENCES = [[[1, 2, 3, END], [1, 2, END]], [[4, 4, 2, END]], [[3, 1, END], [3, 1, 1, END], [3, END]]]
TABLE = document_frequency(REFERENCES)

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


class Table(nn.Module):
    """Writes words that do not depend on each other: its logits are its parameters, (images, T, V)."""

    def __init__(self, length=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(0.1 * torch.randn(3, length, 6, generator=generator, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)
        self.modes = []

    def sample(self, images, num_samples):
        logprobs = self.logits[images].log_softmax(-1).repeat_interleave(num_samples, 0)
        tokens = torch.multinomial(logprobs.detach().exp().flatten(0, 1), 1).view(logprobs.shape[:2])
        self.drawn = Captions(tokens, logprobs.gather(2, tokens[..., None])[..., 0])
        return self.drawn

    def greedy(self, images):
        self.modes.append([self.training, self.dropout.training, torch.is_grad_enabled()])
        return self.logits[images].log_softmax(-1).max(-1)[::-1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def until_end(row):
    return row[: row.index(END) + 1] if END in row else row


def rewards(tokens, references):
    captions = [until_end(row) for row in tokens.tolist()]
    return cider_d(captions, references, document_frequency=TABLE).per_item


def by_hand(drawn, advantages):
    total = count = 0
    for row, advantage in enumerate(advantages.tolist()):
        for place in range(len(until_end(drawn.tokens[row].tolist()))):
            total, count = total - advantage * drawn.logprobs[row, place], count + 1
    return total / count


def test_each_sample_is_judged_against_the_others_of_its_image():
    model = Table()
    found = SelfCriticalLoss(TABLE, END, num_samples=4).terms(model, torch.arange(3), REFERENCES)
    reward = rewards(model.drawn.tokens, [texts for texts in REFERENCES for _ in range(4)])
    close(found.reward, reward)
    assert reward.count_nonzero() > 4
    assert found.greedy_reward is None
    advantages = [reward[row] - (sum(reward[row // 4 * 4 :][:4]) - reward[row]) / 3 for row in range(12)]
    close(found.loss, by_hand(model.drawn, torch.stack(advantages)))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_each_sample_is_judged_against_the_greedy_caption(num_samples):
    model = Table()
    loss = SelfCriticalLoss(TABLE, END, num_samples=num_samples, baseline="greedy")
    found = loss.terms(model, torch.arange(3), REFERENCES)
    greedy = rewards(model.greedy(torch.arange(3))[0], REFERENCES)
    close(found.greedy_reward, greedy)
    close(found.loss, by_hand(model.drawn, found.reward - greedy.repeat_interleave(num_samples)))


@pytest.mark.parametrize("baseline", ["samples", "greedy"])
def test_only_the_samples_log_probabilities_get_gradients(baseline):
    model = Table()
    found = SelfCriticalLoss(TABLE, END, num_samples=2, baseline=baseline).terms(model, torch.arange(3), REFERENCES)
    assert not found.reward.requires_grad
    assert found.greedy_reward is None or not found.greedy_reward.requires_grad
    (inside,) = torch.autograd.grad(found.loss, model.drawn.logprobs, retain_graph=True)
    (whole,) = torch.autograd.grad(found.loss, model.logits, retain_graph=True)
    (through,) = torch.autograd.grad(model.drawn.logprobs, model.logits, inside)
    close(whole, through)
    assert whole.abs().sum() > 0


def test_the_greedy_caption_is_decoded_as_in_evaluation_and_modes_are_given_back():
    model = Table().train()
    model.dropout.eval()
    SelfCriticalLoss(TABLE, END, baseline="greedy")(model, torch.arange(3), REFERENCES)
    assert model.modes == [[False, False, False]]
    assert model.training
    assert not model.dropout.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("baseline", ["samples", "greedy"])
def test_samples_like_the_baseline_teach_nothing(baseline):
    model = Table()
    model.logits.data[..., 1] += 100  # certain
    loss = SelfCriticalLoss(TABLE, END, baseline=baseline)(model, torch.arange(3), REFERENCES)
    assert loss == 0
    loss.backward()
    assert not model.logits.grad.any()


def test_what_stands_behind_the_end_is_not_read():
    padded = torch.tensor([[[1, 2, END, 0], [1, 2, 3, END]], [[4, END, 4, 4], [2, END, END, END]]])
    listed = [[[1, 2, END], [1, 2, 3, END]], [[4, END], [2, END]]]
    found = []
    for references in (padded, listed, [list(texts) for texts in padded]):
        torch.manual_seed(1)
        found.append(SelfCriticalLoss(TABLE, END).terms(Table(), torch.arange(2), references))
    close(found[0], found[1])
    close(found[0], found[2])


@pytest.mark.parametrize("baseline", ["samples", "greedy"])
def test_rewards_rise(baseline):
    model, loss = Table(), SelfCriticalLoss(TABLE, END, num_samples=5, baseline=baseline)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    seen = []
    for _ in range(80):
        terms = loss.terms(model, torch.arange(3), REFERENCES)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        seen.append(terms.reward.mean().item())
    assert sum(seen[-10:]) / 10 > 3 * sum(seen[:10]) / 10


def test_it_trains_the_captioner():
    model = ACFCaptioner(6, end_id=END, feature_dim=6, grid_size=(2, 2), embed_dim=8, num_heads=2, max_length=4)
    references = torch.tensor([[[1, 2, END]], [[3, END, END]]])
    for baseline in ("samples", "greedy"):
        SelfCriticalLoss(TABLE, END, baseline=baseline)(model, torch.randn(2, 4, 6), references).backward()
        assert model.decoder.head.weight.grad.abs().sum() > 0
        model.zero_grad()


def test_the_table_is_in_no_checkpoint():
    assert not SelfCriticalLoss(TABLE, END).state_dict()


class Wrong(Table):
    def sample(self, images, num_samples):
        return super().sample(images, num_samples - 1)


BAD_CALLS = {
    "one sample": (lambda: SelfCriticalLoss(TABLE, END, num_samples=1), r"num_samples.*\[2, inf\].*1"),
    "no sample": (lambda: SelfCriticalLoss(TABLE, END, num_samples=0, baseline="greedy"), "num_samples.*0"),
    "baseline": (lambda: SelfCriticalLoss(TABLE, END, baseline="mean"), "baseline.*mean"),
    "sigma": (lambda: SelfCriticalLoss(TABLE, END, sigma=0), "sigma.*0"),
    "words": (lambda: SelfCriticalLoss(document_frequency([["a"]]), END), r"document_frequency.*ids.*\('a',\)"),
    "no corpus": (
        lambda: SelfCriticalLoss(DocumentFrequency({}, 0), END)(Table(), torch.arange(3), REFERENCES),
        "document_frequency.*0",
    ),
    "samples": (
        lambda: SelfCriticalLoss(TABLE, END)(Wrong(), torch.arange(3), REFERENCES),
        r"samples.*\(15, any\).*\(12, 4\)",
    ),
    "images": (lambda: SelfCriticalLoss(TABLE, END)(Table(), torch.arange(2), REFERENCES), r"samples.*15.*10"),
    "no reference": (lambda: SelfCriticalLoss(TABLE, END)(Table(), torch.arange(1), [[]]), "references"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
