import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_methods.metrics import ClassMargin, ShotAccuracy, TeacherAgreement

CLASSES = 6
COUNTS = [500, 100, 101, 20, 19, 3]  # both bounds belong to the medium group


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits of two networks and targets, with positions; class 2 never occurs."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for size in (5, 3, 7, 1):
        first, second = (torch.randn(size, CLASSES, 4, generator=generator) for _ in range(2))
        target = torch.tensor([0, 1, 3, 4, 5])[torch.randint(5, (size, 4), generator=generator)]
        data.append((first + 2 * torch.nn.functional.one_hot(target, CLASSES).movedim(-1, 1), second, target))
    return data


def samples() -> list[tuple[np.ndarray, np.ndarray, int]]:
    return [
        (first[i, :, j].double().numpy(), second[i, :, j].double().numpy(), int(target[i, j]))
        for first, second, target in batches()
        for i in range(len(first))
        for j in range(4)
    ]


def plain_agreement() -> list[float]:
    hits = [first.argmax() == second.argmax() for first, second, _ in samples()]
    return [sum(hits) / len(hits)]


def plain_margin() -> list[float]:
    margins = []
    for y in range(CLASSES):
        probs = [np.exp(first) / np.exp(first).sum() for first, _, target in samples() if target == y]
        if not probs:
            margins.append(math.nan)
            continue
        mean = sum(probs) / len(probs)
        margins.append(mean[y] - max(mean[k] for k in range(CLASSES) if k != y))
    return margins


def plain_shots(many: int, few: int) -> list[float]:
    groups: list[list[float]] = [[], [], []]
    for y, count in enumerate(COUNTS):
        hits = [first.argmax() == y for first, _, target in samples() if target == y]
        if hits:
            group = 0 if count > many else 2 if count < few else 1
            groups[group].append(sum(hits) / len(hits))
    return [sum(group) / len(group) if group else 0.0 for group in groups]


# name -> metric, which parts of a batch it takes, and the plain result
METRICS: dict[str, tuple[Callable[[], Metric], tuple[int, ...], Callable[[], list[float]]]] = {
    "agreement": (TeacherAgreement, (0, 1), plain_agreement),
    "margin": (lambda: ClassMargin(CLASSES), (0, 2), plain_margin),
    "shots": (lambda: ShotAccuracy(COUNTS), (0, 2), lambda: plain_shots(100, 20)),
    "other shots": (
        lambda: ShotAccuracy(torch.tensor(COUNTS), many=400, few=400),
        (0, 2),
        lambda: plain_shots(400, 400),
    ),
    "an empty group": (lambda: ShotAccuracy(COUNTS, 1000, 4), (0, 2), lambda: plain_shots(1000, 4)),
}
each_metric = pytest.mark.parametrize("name", METRICS)


def fed(name: str, part: slice = slice(None)) -> Metric:
    make, arguments, _ = METRICS[name]
    metric = make()
    for batch in batches()[part]:
        metric.update(*(batch[i] for i in arguments))
    return metric


def result(metric: Metric) -> Tensor:
    value = metric.compute()
    return torch.stack(value) if isinstance(value, tuple) else value.reshape(-1)


def check(name: str, found: Tensor) -> None:
    np.testing.assert_allclose(found.numpy(), METRICS[name][2](), rtol=1e-5)


@each_metric
def test_is_the_plain_loop(name):
    check(name, result(fed(name)))


@each_metric
def test_merges(name):
    merged = fed(name, slice(1))
    merged.merge_state(fed(name, slice(1, None)))
    check(name, result(merged))


@each_metric
def test_copies_resets_and_does_not_enter_checkpoints(name):
    metric = fed(name)
    copied = copy.deepcopy(metric)
    metric.reset()
    metric.update(*(batches()[0][i] for i in METRICS[name][1]))
    check(name, result(copied))
    torch.testing.assert_close(result(metric), result(fed(name, slice(1))), equal_nan=True)
    assert not metric.state_dict()


def test_shot_scores_have_names():
    assert fed("shots").compute()._fields == ("many", "medium", "few")


def test_margin_in_half_precision():
    metric = ClassMargin(2)
    for _ in range(5):
        metric.update(torch.tensor([[1.0, 0.0]]).bfloat16().expand(1000, 2), torch.zeros(1000, dtype=torch.long))
    torch.testing.assert_close(metric.compute()[0], torch.tensor(0.5).tanh())


X, Y = torch.zeros(2, 3), torch.tensor([0, 2])
BAD_CALLS = {
    "shapes": (lambda: TeacherAgreement().update(X, X[:1]), r"student_logits.*\(2, 3\).*teacher_logits.*\(1, 3\)"),
    "one class": (lambda: ClassMargin(1), "num_classes.*1"),
    "other classes": (lambda: ClassMargin(4).update(X, Y), r"class_sums.*\(3, 3\).*\(4, 4\)"),
    "margin target": (lambda: ClassMargin(3).update(X, Y + 1), r"target.*from 1 to 3"),
    "counts": (lambda: ShotAccuracy([[1, 2]]), r"train_counts.*\(C,\).*\(1, 2\)"),
    "bounds": (lambda: ShotAccuracy([1, 2], many=1, few=2), "many.*few.*1 and 2"),
    "shot classes": (lambda: ShotAccuracy([1, 2]).update(X, Y), r"logits.*2 classes.*\(2, 3\)"),
    "shot target": (lambda: ShotAccuracy([1, 2, 3]).update(X, Y - 1), r"target.*from -1 to 1"),
    "shot target shape": (lambda: ShotAccuracy([1, 2, 3]).update(X, Y[:1]), r"target.*\(2,\).*\(1,\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
