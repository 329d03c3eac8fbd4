"""The division against the functions on the whole history."""

import pytest
import torch
from no_sync import NoSync
from ranks import on_ranks

from lightning_methods.functional import confidence_split
from lightning_methods.modules import SnippetDivision

SIZES = torch.tensor([2, 3, 2, 1])
LABELS = torch.tensor([1, 0, 4, 0])
N = 8


def table(epochs=4):
    return torch.rand(epochs, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def bags(row, videos):
    """Scores of some videos, padded to as many cells by repeating the last one."""
    scores = row.split(SIZES.tolist())
    most = max(len(scores[v]) for v in videos)
    cell = torch.stack([torch.arange(most).clamp_max(len(scores[v]) - 1) for v in videos])
    score = torch.stack([scores[v][cells] for v, cells in zip(videos, cell, strict=True)])
    return torch.tensor(videos), cell, score, LABELS[videos]


def divided(rows, videos=((0, 1), (2, 3)), ratio=0.5):
    division = SnippetDivision(SIZES, ratio=ratio)
    figures = None
    for row in rows:
        for some in videos:
            division.update(*bags(row, list(some)))
        figures = division.end_epoch()
    return division, figures


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7])
def test_is_that_of_the_whole_history(ratio):
    division, figures = divided(table(), ratio=ratio)
    split = confidence_split(table(), LABELS.repeat_interleave(SIZES), ratio=ratio)
    assert torch.equal(division.ambiguous, ~split.confident)
    assert torch.equal(division.pseudo_labels, split.pseudo_labels)
    abnormal = LABELS.repeat_interleave(SIZES) > 0
    assert figures.ambiguous_fraction == (~split.confident)[abnormal].float().mean()
    assert figures.pseudo_abnormal_fraction == split.pseudo_labels[abnormal].float().mean()
    torch.testing.assert_close(torch.stack(figures[2:]), split.thresholds)


def test_looks_up_what_snippets_are():
    division, _ = divided(table())
    video, cell = torch.tensor([2, 0]), torch.tensor([[1, 0, 1], [0, 0, 1]])
    with NoSync():
        ambiguous, labels = division.look_up(video, cell)
    assert torch.equal(ambiguous, division.ambiguous[torch.tensor([[6, 5, 6], [0, 0, 1]])])
    assert torch.equal(labels, division.pseudo_labels[torch.tensor([[6, 5, 6], [0, 0, 1]])])


def test_there_is_none_before_the_second_epoch():
    division, figures = divided(table(1))
    assert figures is None
    assert not division.ready
    assert division.pseudo_labels.eq(-1).all()
    restored = SnippetDivision(SIZES)
    restored.load_state_dict(division.state_dict())
    assert not restored.ready
    division, figures = divided(table(2))
    assert figures is not None
    restored.load_state_dict(division.state_dict())
    assert division.ready
    assert restored.ready


def test_cells_that_were_not_seen_twice():
    """Video 0 comes once, video 3, a normal one, once too, and video 2 every time."""
    division = SnippetDivision(SIZES, ratio=0.5)
    for epoch, row in enumerate(table(3)):
        division.update(*bags(row, [2]))
        if epoch == 1:
            division.update(*bags(row, [0, 3]))
        division.end_epoch()
    labels = [part.tolist() for part in division.pseudo_labels.split(SIZES.tolist())]
    assert labels[0] == [-1, -1]
    assert labels[1] == [-1, -1, -1]
    assert -1 not in labels[2]
    assert labels[3] == [0]
    of_two = confidence_split(table(3)[:, 5:7], torch.ones(2), ratio=0.5)
    assert torch.equal(division.ambiguous[5:7], ~of_two.confident)
    assert not division.ambiguous[[0, 1, 2, 3, 4, 7]].any()


def test_a_video_of_both_kinds_is_refused():
    division = SnippetDivision(SIZES)
    division.update(*bags(table()[0], [0, 1]))
    division.end_epoch()
    division.update(torch.tensor([1]), torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="video 1 has come with a normal and with an abnormal label"):
        division.end_epoch()


def test_an_update_waits_for_nothing():
    division = SnippetDivision(SIZES)
    given = bags(table()[0], [0, 1])
    with NoSync():
        division.update(*given)


def _on_rank(rank, rows):
    division = SnippetDivision(SIZES, ratio=0.5)
    for row in rows:
        division.update(*bags(row, [0, 1] if rank == 0 else [2, 3, 0]))
        middle = division.shared_state()
        division.end_epoch()
    restored = SnippetDivision(SIZES, ratio=0.5)
    restored.load_shared_state(middle)
    own = restored.history.open_count.clone()
    restored.end_epoch()
    same = all(torch.allclose(value, division.state_dict()[name]) for name, value in restored.state_dict().items())
    return division.state_dict(), middle, own, same


def test_ranks_share_a_division_and_its_state_in_mid_epoch():
    one, _ = divided(table())
    for rank, (state, middle, own, same) in enumerate(on_ranks(_on_rank, table())):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(state[name], value, msg=name)
        # Of video 0 both ranks had a score; one rank goes on with the scores of both.
        assert middle["history.open_count"].view(-1)[5] > 0
        assert bool(own.any()) == (rank == 0)
        assert same


def test_refuses_a_ratio_of_1():
    with pytest.raises(ValueError, match=r"`ratio` must lie in \[0, 1\)"):
        SnippetDivision(SIZES, ratio=1.0)
    assert repr(SnippetDivision(SIZES)).startswith("SnippetDivision(\n  ratio=0.3")
