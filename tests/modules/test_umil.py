"""The history against the whole table of scores, and the heads against their formulas."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from ranks import on_ranks
from torch import nn

from lightning_methods.modules import ClusterHead, SnippetHistory

SIZES = torch.tensor([2, 3, 1])
N = 6


def table(epochs, seed=0):
    return torch.rand(epochs, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(scores):
    history = SnippetHistory(SIZES)
    for row in scores:
        history.update(torch.arange(N), row)
        history.reduce()
    return history


# --- the history -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(epochs=st.integers(1, 30), seed=st.integers(0, 1000))
def test_moments_are_those_of_the_whole_history(epochs, seed):
    scores = table(epochs, seed)
    mean, variance = filled(scores).moments()
    torch.testing.assert_close(mean, scores.mean(0))
    torch.testing.assert_close(variance, scores.var(0, correction=0), atol=1e-14, rtol=1e-10)


def test_variance_of_scores_near_one_keeps_its_digits():
    scores = 1 - 1e-7 * table(100)
    _, variance = filled(scores).moments()
    torch.testing.assert_close(variance, (scores - 1).var(0, correction=0), rtol=1e-6, atol=0)
    steady = filled(torch.full((7, N), 0.1))
    assert not steady.moments()[1].any()


def test_memory_does_not_grow_with_epochs():
    def size(history):
        return sum(value.numel() for value in history.state_dict().values())

    assert size(filled(table(2))) == size(filled(table(20)))


@settings(max_examples=30, deadline=None)
@given(seen=st.lists(st.lists(st.integers(0, N - 1), max_size=10), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_a_cell_counts_once_an_epoch_with_its_mean_score(seen, seed):
    history, generator = SnippetHistory(SIZES), torch.Generator().manual_seed(seed)
    observed = {cell: [] for cell in range(N)}
    for cells in seen:
        scores = torch.rand(len(cells), generator=generator, dtype=torch.float64)
        for start in range(0, len(cells), 4):  # in several batches
            history.update(torch.tensor(cells[start : start + 4], dtype=torch.long), scores[start : start + 4])
        history.reduce()
        for cell in set(cells):
            observed[cell].append(torch.stack([s for c, s in zip(cells, scores, strict=True) if c == cell]).mean())
    mean, variance = history.moments()
    for cell, values in observed.items():
        assert history.count[cell] == len(values)
        if values:
            torch.testing.assert_close(mean[cell], torch.stack(values).mean())
            torch.testing.assert_close(variance[cell], torch.stack(values).var(correction=0), atol=1e-15, rtol=1e-9)


def test_cells_never_seen_and_scores_of_an_open_epoch():
    history = SnippetHistory(SIZES)
    history.update(torch.tensor([0]), torch.tensor([0.7]))
    assert not history.count.any()
    history.reduce()
    assert history.count.tolist() == [1, 0, 0, 0, 0, 0]
    mean, variance = history.moments()
    assert mean.tolist() == pytest.approx([0.7, 0, 0, 0, 0, 0])
    assert not variance.any()


def test_flat_indices():
    history = SnippetHistory(SIZES)
    assert history.flat_index(torch.tensor([1, 0, 2]), torch.tensor([[2], [1], [0]])).tolist() == [[4], [1], [5]]
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"`video` must lie in \[0, 3\), .* got values from .*{wrong}"):
            history.flat_index(torch.tensor([1, wrong]), torch.zeros(2, 1, dtype=torch.long))


def test_an_update_waits_for_nothing_and_has_no_gradient():
    history, score = SnippetHistory(SIZES), torch.rand(2, 2, requires_grad=True)
    video, cell = torch.tensor([0, 1]), torch.tensor([[0, 1], [1, 2]])
    with NoSync():
        history.update(history.flat_index(video, cell), score)
        history.reduce()
        history.moments()
    assert not history.mean.requires_grad


def _epochs(rank, scores):
    """Each rank sees half of the cells, and cell 0 is on both, as a sampler that fills up ranks would do it."""
    history = SnippetHistory(SIZES)
    for row in scores:
        cells = torch.tensor([0, 1, 2] if rank == 0 else [3, 4, 5, 0])
        history.update(cells, row[cells])
        history.reduce()
    return history.state_dict()


def test_ranks_share_a_history():
    scores = table(4)
    one = filled(scores).state_dict()
    for state in on_ranks(_epochs, scores):
        for name, value in one.items():
            torch.testing.assert_close(state[name], value, msg=name)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.history = SnippetHistory(SIZES)

    def forward(self, x, cells):
        score = self.net(x)[:, 0]
        self.history.update(cells, score)
        return score


def _inside_of_ddp(rank):
    torch.manual_seed(0)
    module = Scores()
    wrapped = nn.parallel.DistributedDataParallel(module)
    for cell in (rank, rank + 2):
        wrapped(torch.ones(1, 1), torch.tensor([cell])).sum().backward()
    return module.history.open_count


def test_ddp_does_not_overwrite_the_open_epoch():
    assert [count.tolist() for count in on_ranks(_inside_of_ddp)] == [[1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]


def test_state_in_the_middle_of_an_epoch():
    history = filled(table(3))
    history.update(torch.tensor([4, 4]), torch.tensor([0.5, 0.7]))
    restored = SnippetHistory(SIZES)
    restored.load_state_dict(history.state_dict())
    copies = [restored, copy.deepcopy(history), pickle.loads(pickle.dumps(history))]
    history.reduce()
    for other in copies:
        other.reduce()
        assert all(map(torch.equal, other.moments(), history.moments()))
    assert set(history.state_dict()) == {"num_cells", "count", "mean", "m2", "open_count", "open_sum"}


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float, lambda module: module.to(torch.bfloat16)])
def test_a_cast_costs_no_digits(cast):
    history = filled(table(3))
    before = history.moments()
    assert all(map(torch.equal, cast(history).moments(), before))
    assert history.open_sum.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SnippetHistory(torch.tensor([2.0])), "`num_cells_per_video` must hold integers"),
        (lambda: SnippetHistory(torch.tensor([2, 0])), "`num_cells_per_video` must be"),
        (lambda: SnippetHistory(torch.tensor([], dtype=torch.long)), "`num_cells_per_video` must be"),
        (lambda: SnippetHistory(SIZES).update(torch.tensor([0.0]), torch.tensor([0.0])), "`flat_index`"),
        (lambda: SnippetHistory(SIZES).update(torch.tensor([0, 1]), torch.tensor([0.0])), r"`score` .* \(2,\)"),
        (lambda: SnippetHistory(SIZES).flat_index(torch.tensor([0.0]), torch.tensor([[0]])), "`video`"),
        (lambda: SnippetHistory(SIZES).flat_index(torch.tensor([0]), torch.tensor([[0.0]])), "`cell`"),
    ],
)
def test_history_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the heads ---------------------------------------------------------------------------------------


def test_linear_head():
    head, z = ClusterHead(5), torch.randn(3, 4, 5)
    torch.testing.assert_close(head(z), z @ head.linear.weight.T + head.linear.bias)
    assert "prototypes" not in head.state_dict()


def test_cosine_head():
    prototypes = torch.randn(2, 5)
    head, z = ClusterHead(5, kind="cosine", scale=10.0, prototypes=prototypes), torch.randn(3, 4, 5)
    u = z @ head.linear.weight.T + head.linear.bias
    expected = torch.stack([10 * F.cosine_similarity(u, prototype, dim=-1) for prototype in prototypes], -1)
    torch.testing.assert_close(head(z), expected)
    assert "prototypes" in head.state_dict()
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]


def test_random_prototypes_are_orthonormal():
    head = ClusterHead(5, num_clusters=3, kind="cosine")
    torch.testing.assert_close(head.prototypes @ head.prototypes.T, torch.eye(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "`in_features`"),
        ({"in_features": 3, "kind": "mlp"}, "`kind`"),
        ({"in_features": 3, "scale": 0.0}, "`scale`"),
        ({"in_features": 3, "num_clusters": 0}, "`num_clusters`"),
        ({"in_features": 3, "num_clusters": 4, "kind": "cosine"}, r"`num_clusters` must lie in \[1, 3\]"),
        ({"in_features": 3, "prototypes": torch.ones(2, 3)}, "`prototypes` are for kind='cosine'"),
        ({"in_features": 3, "kind": "cosine", "prototypes": torch.ones(3, 2)}, r"`prototypes` .* \(2, 3\)"),
    ],
)
def test_heads_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClusterHead(**arguments)


def test_reads_well():
    assert repr(ClusterHead(3)).startswith("ClusterHead(\n  kind='linear'")
    assert repr(SnippetHistory(SIZES)) == "SnippetHistory(3 videos, 6 cells)"
