"""The division into confident and ambiguous cells, as its rules say, cell by cell."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_methods.functional import confidence_split, confidence_split_from_moments


def plain_split(history, bag_labels, ratio):
    """The rules, in Python numbers."""
    epochs = len(history)
    columns = list(zip(*history.tolist(), strict=True))
    means = [sum(column) / epochs for column in columns]
    variances = [sum((x - mean) ** 2 for x in column) / epochs for column, mean in zip(columns, means, strict=True)]
    labels = [int(bag > 0 and mean > 0.5) for mean, bag in zip(means, bag_labels.tolist(), strict=True)]
    thresholds = []
    for side in (0, 1):
        group = sorted(
            v for v, label, bag in zip(variances, labels, bag_labels.tolist(), strict=True) if bag > 0 and label == side
        )
        thresholds.append(group[math.floor(len(group) * ratio)] if group else 0.0)
    confident = [
        bag == 0 or v < thresholds[label] for v, label, bag in zip(variances, labels, bag_labels.tolist(), strict=True)
    ]
    return confident, labels, variances, thresholds


@settings(max_examples=100, deadline=None)
@given(
    epochs=st.integers(2, 6),
    cells=st.integers(1, 20),
    ratio=st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.99]),
    seed=st.integers(0, 1000),
)
def test_equals_the_rules(epochs, cells, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    history = torch.rand(epochs, cells, generator=generator, dtype=torch.float64)
    bag_labels = torch.randint(0, 3, (cells,), generator=generator)
    split = confidence_split(history, bag_labels, ratio=ratio)
    confident, labels, variances, thresholds = plain_split(history, bag_labels, ratio)
    assert split.confident.tolist() == confident
    assert split.pseudo_labels.tolist() == labels
    assert split.variance.tolist() == pytest.approx(variances, abs=1e-15)
    assert split.thresholds.tolist() == pytest.approx(thresholds, abs=1e-15)
    moments = confidence_split_from_moments(history.mean(0), history.var(0, correction=0), bag_labels, ratio=ratio)
    assert moments.pseudo_labels.tolist() == labels
    torch.testing.assert_close(moments.thresholds, split.thresholds)


def test_the_number_of_confident_cells_without_ties():
    variance = torch.arange(10) / 10.0
    split = confidence_split_from_moments(torch.full((10,), 0.9), variance, torch.ones(10), ratio=0.3)
    assert split.confident.tolist() == [True] * 3 + [False] * 7
    assert split.pseudo_labels.dtype == torch.int64


def test_steady_scores_are_no_evidence():
    # 0.1 has no exact mean over three epochs, but a score that does not change has no variance.
    history = torch.full((3, 4), 0.1)
    split = confidence_split(history, torch.ones(4))
    assert split.variance.tolist() == [0.0] * 4
    assert not split.confident.any()


def test_a_tie_at_one_half_is_normal():
    split = confidence_split(torch.tensor([[0.25], [0.75]]), torch.ones(1))
    assert split.pseudo_labels.tolist() == [0]


def test_cells_of_normal_videos_are_normal_and_set_no_threshold():
    history = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.7, 0.8]])
    split = confidence_split(history, torch.tensor([0, 1, 1]), ratio=0.5)
    assert split.confident.tolist() == [True, False, True]
    assert split.pseudo_labels.tolist() == [0, 1, 1]
    assert split.thresholds[1] == split.variance[1]


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_a_prediction_that_no_cell_has(labels):
    split = confidence_split(torch.tensor([[0.1, 0.2], [0.3, 0.1]]), torch.tensor(labels), ratio=0.5)
    assert split.thresholds[1] == 0  # of cells predicted abnormal there are none
    assert split.confident.tolist() == ([True, True] if labels == [0, 0] else [False, True])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    split = confidence_split(torch.rand(3, 5).to(dtype), torch.ones(5))
    wide = torch.promote_types(dtype, torch.float32)
    assert split.variance.dtype == split.thresholds.dtype == wide
    assert split.confident.dtype == torch.bool


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence_split(torch.rand(1, 3), torch.ones(3)), "`history` must have at least 2 rows"),
        (lambda: confidence_split(torch.rand(3), torch.ones(3)), "`history` must be floating and of shape"),
        (lambda: confidence_split(torch.ones(2, 3).long(), torch.ones(3)), "`history` must be floating"),
        (lambda: confidence_split(torch.rand(2, 3), torch.ones(2)), r"`bag_labels` must have shape \(3,\)"),
        (lambda: confidence_split(torch.rand(2, 3), torch.ones(3), ratio=1.0), r"`ratio` must lie in \[0, 1\)"),
        (lambda: confidence_split(torch.rand(2, 3), torch.ones(3), ratio=-0.1), "`ratio`"),
        (lambda: confidence_split_from_moments(torch.rand(2, 2), torch.rand(2), torch.ones(2)), "`mean`"),
        (lambda: confidence_split_from_moments(torch.rand(2), torch.rand(3), torch.ones(2)), "`variance`"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
