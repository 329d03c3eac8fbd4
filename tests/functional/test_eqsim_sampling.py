import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from lightning_methods.functional import eqsim_close_far_loss, eqsim_sample_close


def logits(size: int = 6, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(size, size, generator=torch.Generator().manual_seed(0))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_partners_are_others_and_differ(data):
    size = data.draw(st.integers(2, 7))
    number, anchors = data.draw(st.integers(1, size - 1)), data.draw(st.integers(0, size))
    scale = data.draw(st.sampled_from([0.0, 1.0, 1e4]))  # at 1e4 all softmax weights but one underflow
    found = eqsim_sample_close(logits(size, scale), num_samples=number, num_anchors=anchors)
    assert found.shape == (anchors, 2 * number)
    assert found.dtype == torch.long
    for i, row in enumerate(found.tolist()):
        for half in (row[:number], row[number:]):
            assert i not in half
            assert len(set(half)) == number
            assert set(half) <= set(range(size))


@pytest.mark.parametrize("half", [0, 1])
def test_distribution(half):
    """Without replacement, by the softmax of the column of a text (first half) or the row of an image (second)."""
    size, draws = 4, 4000
    weights = torch.tensor([0.0, 0.5, 0.3, 0.2])  # of anchor 0
    scores = torch.zeros(size, size)
    wanted = weights.log() + 7.0
    wanted[0] = 50.0  # the matched score plays no part
    if half == 0:
        scores[:, 0] = wanted
    else:
        scores[0] = wanted
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(size)
    for _ in range(draws):
        row = eqsim_sample_close(scores, num_samples=2, num_anchors=1, generator=generator)[0]
        counts[row[2 * half : 2 * half + 2]] += 1
    w = weights.tolist()
    expected = [0.0] + [
        w[j] + sum(w[i] * w[j] / (1 - w[i]) for i in (1, 2, 3) if i != j) for j in (1, 2, 3)
    ]  # drawn first, or second after i
    torch.testing.assert_close(counts / draws, torch.tensor(expected), rtol=0, atol=4 * math.sqrt(0.25 / draws))


def test_excluded_pairs_are_never_drawn():
    ids = torch.tensor([0, 0, 1, 0, 2, 1])
    exclude = ids[:, None] == ids
    for _ in range(20):
        found = eqsim_sample_close(logits(scale=3.0), num_samples=3, exclude=exclude)
        for i, row in enumerate(found.tolist()):
            assert all(j == i or ids[j] != ids[i] for j in row)
            others = int((ids != ids[i]).sum())
            for half in (row[:3], row[3:]):
                assert half.count(i) == 3 - min(3, others)  # the anchor stands in where there are too few
    everything = torch.ones(6, 6, dtype=torch.bool)
    alone = eqsim_sample_close(logits(), num_samples=2, exclude=everything)
    assert torch.equal(alone, torch.arange(6)[:, None].expand(6, 4))
    assert eqsim_close_far_loss(logits(), alone, margin=0.0).close.item() == 0


def test_exclusion_is_by_anchor():
    exclude = torch.zeros(2, 2, dtype=torch.bool)
    exclude[0, 1] = True
    assert eqsim_sample_close(torch.zeros(2, 2), num_samples=1, exclude=exclude).tolist() == [[0, 0], [0, 0]]


def test_generator():
    first, second, other = (
        eqsim_sample_close(logits(20), generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    eqsim_sample_close(logits(20), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_half_precision_and_no_wait():
    scores = logits().half().requires_grad_()
    with NoSync():
        found = eqsim_sample_close(scores, exclude=torch.zeros(6, 6, dtype=torch.bool))
    assert not found.requires_grad
    assert found.shape == (6, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_without_waiting():
    scores = logits().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = eqsim_sample_close(scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (found != torch.arange(6, device="cuda")[:, None]).all()
