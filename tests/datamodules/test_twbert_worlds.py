import sys

import pytest
import torch

from lightning_methods.datamodules import ObjectStatesDataModule, ObjectVideosDataModule


def seen(split):
    """Of each patch the object and the state that it shows, -1 where it is empty: (S, 8, 16) each."""
    patches = split[0].view(-1, 8, 16, 10)
    empty = patches[..., :6].amax(3) < 0.5
    return [part.argmax(3).masked_fill(empty, -1) for part in (patches[..., :6], patches[..., 6:])]


@pytest.mark.parametrize("burst", [0, 4, 10])
def test_every_object_is_in_every_frame_once_and_the_burst_adds_to_one(burst):
    video, text, target = split = ObjectStatesDataModule(train_size=1, burst=burst, noise=0.0).splits["test"]
    objects, states = seen(split)
    asked = text[:, 1]
    counts = torch.stack([(objects == number).sum(2) for number in range(6)], dim=1)  # (S, 6, 8)
    rows = torch.arange(len(video))
    others = torch.ones_like(counts, dtype=torch.bool)
    others[rows, asked] = False
    assert (counts[others] == 1).all()
    assert (counts[rows, asked].sort(1).values == torch.tensor([1] * 7 + [1 + burst])).all()

    mine = objects == asked[:, None, None]
    frame_state = torch.stack([(mine & (states == number)).any(2) for number in range(4)], dim=2)  # (S, 8, 4)
    assert (frame_state.sum(2) == 1).all()
    assert (frame_state.sum(1).sort(1).values == torch.tensor([0, 0, 2, 6])).all()
    assert torch.equal(frame_state.sum(1).argmax(1), target)
    if burst:
        crowded = counts[rows, asked].argmax(1)
        assert not frame_state[rows, crowded, target].any()


def test_a_count_of_patches_is_misled_by_a_large_burst():
    _, text, target = split = ObjectStatesDataModule(train_size=1, burst=10, noise=0.0).splits["test"]
    objects, states = seen(split)
    mine = objects == text[:, 1, None, None]
    votes = torch.stack([(mine & (states == number)).sum((1, 2)) for number in range(4)], dim=1)
    assert (votes.argmax(1) != target).all()


def test_training_bursts_have_all_sizes():
    _, text, _ = split = ObjectStatesDataModule(train_size=3000, noise=0.0).splits["train"]
    objects, _ = seen(split)
    largest = (objects == text[:, 1, None, None]).sum(2).amax(1) - 1
    assert torch.bincount(largest).tolist() == pytest.approx([3000 / 11] * 11, rel=0.25)


def test_questions():
    _, text, _ = ObjectStatesDataModule(train_size=100).splits["train"]
    assert (text[:, [0, 2, 3]] == torch.tensor([6, 7, 8])).all()
    assert set(text[:, 1].tolist()) == set(range(6))


def test_places_say_nothing():
    objects, _ = seen(ObjectStatesDataModule(train_size=1, burst=0, noise=0.0).splits["test"])
    assert (objects >= 0).float().mean((0, 1)).tolist() == pytest.approx([6 / 16] * 16, abs=0.03)


def test_noise_lies_on_all_patches():
    splits = [ObjectStatesDataModule(train_size=100, noise=noise).splits["train"][0] for noise in (0.0, 0.15)]
    noise = splits[1] - splits[0]
    assert noise.std((0, 1)).tolist() == pytest.approx([0.15] * 10, rel=0.05)


def test_seeds_draw_the_training_split_alone():
    first, again, other = (ObjectStatesDataModule(train_size=50, seed=seed).splits for seed in (0, 0, 1))
    for split in first:
        assert all(map(torch.equal, first[split], again[split]))
    assert not torch.equal(first["train"][0], other["train"][0])
    assert torch.equal(first["test"][0], other["test"][0])


@pytest.mark.parametrize("burst", [-1, 11])
def test_the_burst_is_checked(burst):
    with pytest.raises(ValueError, match=rf"burst must be in 0 … 10, got {burst}"):
        ObjectStatesDataModule(burst=burst)


def test_train_size_is_checked():
    with pytest.raises(ValueError, match="train_size must be at least 1, got 0"):
        ObjectStatesDataModule(train_size=0)


class TestVideos:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(ObjectStatesDataModule, "eval_size", 12)
        monkeypatch.setattr(ObjectVideosDataModule, "eval_size", 12)

    def test_files_show_the_same_world(self):
        (video, text, target), (codes, *same) = (
            kind(train_size=1, noise=0.0).splits["test"] for kind in (ObjectVideosDataModule, ObjectStatesDataModule)
        )
        assert video.shape == (12, 8, 3, 16, 16)
        assert torch.equal(text, same[0])
        assert torch.equal(target, same[1])

        # Read every tile back: its colour from the channels, and which quarter is the brightest.
        std, mean = (torch.tensor(x).view(3, 1, 1) for x in ((0.269, 0.261, 0.276), (0.481, 0.458, 0.408)))
        tiles = (video * std + mean).view(12, 8, 3, 4, 2, 2, 4, 2, 2).mean((5, 8))  # rows, upper or lower, columns, ...
        tiles = tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(12, 128, 3, 4)
        colour, quarter = tiles.mean(3), tiles.mean(2).argmax(2)
        empty = codes.amax(2) < 0.5
        objects, states = codes[..., :6].argmax(2)[~empty], codes[..., 6:].argmax(2)[~empty]
        assert colour[empty].amax() < colour[~empty].amax(1).min()
        assert (quarter[~empty] == states).float().mean() > 0.99
        bright = (colour[~empty] > 0.5 * colour[~empty].amax(1, keepdim=True)).int()
        expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])[objects]
        assert (bright == expected).all(1).float().mean() > 0.99

    def test_seeds_draw_the_training_split_alone_and_leave_the_generator(self):
        torch.manual_seed(3)
        first = ObjectVideosDataModule(train_size=5).splits
        drawn = torch.rand(2)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(2), drawn)
        again, other = (ObjectVideosDataModule(train_size=5, seed=seed).splits for seed in (0, 1))
        for split in first:
            assert all(map(torch.equal, first[split], again[split]))
        assert not torch.equal(first["train"][0], other["train"][0])

    def test_without_pyav_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ModuleNotFoundError, match=r"lightning-methods\[video\]"):
            ObjectVideosDataModule(train_size=1).setup("fit")
