import copy
import math

import numpy as np
import pytest
import torch
from no_sync import NoSync
from ranks import on_ranks

from lightning_methods.metrics import GroupAccuracies, GroupAccuracy, ShiftAccuracy

GROUPS = 4


def batches():
    """Logits, targets and groups; group 2 never occurs, some samples are to be ignored."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in (5, 1, 9, 4):
        target = torch.randint(3, (size,), generator=generator)
        logits = torch.randn(size, 3, generator=generator) + torch.nn.functional.one_hot(target, 3)
        group = torch.tensor([0, 1, 3])[torch.randint(3, (size,), generator=generator)]
        target = torch.where(torch.rand(size, generator=generator) < 0.2, -100, target)
        made.append((logits, target, group))
    return made


def plain(part=slice(None)):
    """Accuracies of the groups, one sample at a time, and that of all."""
    hits = {group: [] for group in range(GROUPS)}
    for logits, target, group in batches()[part]:
        for row, label, number in zip(logits.numpy(), target.tolist(), group.tolist(), strict=True):
            if label != -100:
                hits[number].append(row.argmax() == label)
    groups = [np.mean(of) if of else math.nan for of in hits.values()]
    return groups, np.mean([hit for of in hits.values() for hit in of])


def fed(part=slice(None)):
    metric = GroupAccuracy(GROUPS)
    for batch in batches()[part]:
        metric.update(*batch)
    return metric


def check(scores, part=slice(None)):
    groups, overall = plain(part)
    np.testing.assert_allclose(scores.per_group, groups, rtol=1e-6)
    np.testing.assert_allclose(scores.overall, overall, rtol=1e-6)
    np.testing.assert_allclose(scores.mean, np.nanmean(groups), rtol=1e-6)
    np.testing.assert_allclose(scores.worst, np.nanmin(groups), rtol=1e-6)


def test_is_the_plain_loop():
    check(fed().compute())
    assert math.isnan(fed().compute().per_group[2])
    assert len(set(plain()[0])) == GROUPS  # else the test would not tell the groups apart


def test_class_indices_do_for_logits():
    metric = GroupAccuracy(GROUPS)
    for logits, target, group in batches():
        metric.update(logits.argmax(1).int(), target.int(), group.int())
    check(metric.compute())


def test_merges_copies_and_resets():
    merged = fed(slice(2))
    merged.merge_state(fed(slice(2, None)))
    check(merged.compute())
    copied = copy.deepcopy(merged)
    merged.reset()
    merged.update(*batches()[2])
    check(merged.compute(), slice(2, 3))
    check(copied.compute())
    assert not copied.state_dict()


def on_rank(rank):
    scores = fed(slice(3 * rank, 3 + rank)).compute()  # three batches, and one
    shift = ShiftAccuracy()
    shift.update(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]), rank)
    return tuple(scores), tuple(shift.compute())


def test_two_ranks_together():
    for scores, shift in on_ranks(on_rank):
        check(GroupAccuracies(*scores))
        torch.testing.assert_close(torch.stack(shift), torch.full((3,), 2 / 3))


def test_nothing_seen():
    scores = GroupAccuracy(2).compute()
    assert all(value.isnan().all() for value in scores)
    ignored = GroupAccuracy(2)
    ignored.update(torch.zeros(3, 2), torch.full((3,), -100), 1)
    assert all(value.isnan().all() for value in ignored.compute())


def test_one_group_for_all():
    one, other = GroupAccuracy(3), GroupAccuracy(3)
    for logits, target, _ in batches():
        one.update(logits, target, 2)
        other.update(logits, target, torch.full_like(target, 2))
    torch.testing.assert_close(one.compute(), other.compute(), equal_nan=True)
    assert one.total.tolist() == [0, 0, sum((target >= 0).sum() for _, target, _ in batches())]


@pytest.mark.parametrize(
    ("inside", "outside", "mean"), [((3, 4), (1, 4), 0.375), ((4, 4), (0, 4), 0.0), ((0, 1), (0, 1), 0.0)]
)
def test_harmonic_mean(inside, outside, mean):
    metric = ShiftAccuracy()
    for group, (right, count) in enumerate((inside, outside)):
        preds = (torch.arange(count) < right).long()
        metric.update(preds, torch.ones(count, dtype=torch.long), torch.full((count,), group))
    scores = metric.compute()
    assert scores.in_distribution == inside[0] / inside[1]
    assert scores.out_of_distribution == outside[0] / outside[1]
    assert scores.harmonic_mean == mean


def test_a_group_without_samples_has_no_harmonic_mean():
    metric = ShiftAccuracy()
    metric.update(torch.tensor([1]), torch.tensor([1]), 0)
    assert [value.isnan().item() for value in metric.compute()] == [False, True, True]


def test_the_host_never_waits():
    metric, batch = GroupAccuracy(GROUPS), batches()[0]
    with NoSync():
        metric.update(*batch)


Z, Y, G = torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([0, 1])
BAD_CALLS = {
    "no groups": (lambda: GroupAccuracy(0), "`num_groups`.*0"),
    "group": (lambda: GroupAccuracy(2).update(Z, Y, G + 1), r"`group` .*\[0, 2\), got values from 1 to 2"),
    "one group": (lambda: GroupAccuracy(2).update(Z, Y, -1), r"`group` .*\[0, 2\), got values from -1 to -1"),
    "group shape": (lambda: GroupAccuracy(2).update(Z, Y, G[:1]), r"`group` .*\(2,\) of `target`, got \(1,\)"),
    "group dtype": (lambda: GroupAccuracy(2).update(Z, Y, G.float()), "`group` must hold integers"),
    "target": (lambda: GroupAccuracy(2).update(Z, Y.float(), G), "`target` must hold integers"),
    "soft target": (lambda: GroupAccuracy(2).update(Z, Z.long(), G), r"`target` \(N,\), got .*\(2, 3\)"),
    "other samples": (lambda: GroupAccuracy(2).update(Z[:1], Y, G), r"`preds` must be .*\(1,\).*\(2,\)"),
    "scores": (lambda: GroupAccuracy(2).update(Z[:, 0], Y, G), r"`preds` must be .*float32"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
