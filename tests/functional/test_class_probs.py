import functools

import pytest
import torch
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import accumulate_class_probs, normalize_class_probs

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def class_means(classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(classes, classes, dtype=dtype).softmax(1)


def test_accumulate_is_a_loop_over_samples():
    sums, scores = class_means(5), torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 4], [4, 4], [1, 0]])
    expected = sums.clone()
    for i in range(3):
        for j in range(2):
            expected[target[i, j]] += (scores[i, :, j] / 3).softmax(0).detach()
    before = sums.clone()
    found = accumulate_class_probs(sums, scores, target, temperature=3.0)
    close(found, expected)
    close(sums, before)
    assert not found.requires_grad


def test_accumulate_nothing():
    sums = class_means(3)
    close(accumulate_class_probs(sums, torch.empty(0, 3), torch.empty(0, dtype=torch.long)), sums)


def test_accumulate_half_precision_logits_in_float32():
    scores = torch.randn(4, 3).bfloat16()
    found = accumulate_class_probs(torch.zeros(3, 3), scores, torch.tensor([0, 0, 1, 2]))
    expected = accumulate_class_probs(torch.zeros(3, 3), scores.float(), torch.tensor([0, 0, 1, 2]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_normalize(momentum):
    sums = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    previous = class_means(3)
    means = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [0.5, 0.25, 0.25]], dtype=torch.float64)
    found = normalize_class_probs(sums, previous, momentum=momentum)
    for row in (0, 2):
        close(found[row], momentum * means[row] + (1 - momentum) * previous[row])
    assert not normalize_class_probs(sums.requires_grad_(), previous).requires_grad


def test_absent_classes_keep_their_means_to_the_last_bit():
    previous = class_means(50, dtype=torch.float32)
    for momentum in (0.1, 0.3, 0.7, 1.0):
        assert torch.equal(normalize_class_probs(torch.zeros(50, 50), previous, momentum=momentum), previous)


def test_true_means():
    scores = 2 * torch.randn(20, 4, dtype=torch.float64)
    target = torch.arange(20) % 3
    sums = accumulate_class_probs(torch.zeros(4, 4).double(), scores[:11], target[:11])
    sums = accumulate_class_probs(sums, scores[11:], target[11:])
    found = normalize_class_probs(sums, torch.full((4, 4), 0.25).double())
    for y in range(3):
        close(found[y], scores[target == y].softmax(1).mean(0))
    close(found[3], torch.full((4,), 0.25).double())


def test_the_host_never_waits():
    with NoSync():
        sums = accumulate_class_probs(torch.zeros(3, 3), torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
        normalize_class_probs(sums, sums)


def test_compiles_whole():
    @functools.partial(torch.compile, fullgraph=True, backend="eager")
    def step(sums, scores, target):
        return normalize_class_probs(accumulate_class_probs(sums, scores, target), sums)

    scores, target = torch.randn(4, 5), torch.arange(4)
    start = class_means(5)
    sums = accumulate_class_probs(start, scores, target)
    close(step(start, scores, target), normalize_class_probs(sums, start))


N, P, Y = torch.zeros(2, 3), torch.full((3, 3), 1 / 3), torch.tensor([0, 2])

BAD_CALLS = {
    "not square": (lambda: accumulate_class_probs(P[:2], N, Y), r"class_sums.*\(3, 3\)"),
    "target": (lambda: accumulate_class_probs(P, N, Y + 5), r"target.*from 5 to 7"),
    "negative target": (lambda: accumulate_class_probs(P, N, Y - 1), r"target.*from -1 to 1"),
    "logits": (lambda: accumulate_class_probs(P, N.long(), Y), "`logits`.*int64"),
    "temperature": (lambda: accumulate_class_probs(P, N, Y, temperature=-1.0), "temperature"),
    "means: shape": (lambda: normalize_class_probs(P[0], P[0]), r"class_sums.*\(3,\)"),
    "means: previous": (lambda: normalize_class_probs(P, P[:2, :2]), r"previous.*\(3, 3\).*\(2, 2\)"),
    "means: momentum": (lambda: normalize_class_probs(P, P, momentum=1.1), "momentum.*1.1"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
