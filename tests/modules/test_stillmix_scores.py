"""Scores of frames: made by a network, kept in a file, read from files that others wrote."""

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_methods.modules import FrameScores, load_frame_scores, save_frame_scores, score_frames

KEYS = ("a/img_00001.jpg", "ä/frame000002.jpg", "class/video.avi//20")
SCORES = FrameScores(KEYS, torch.tensor([0.1, 0.5, 0.123456789012345]).double(), torch.tensor([0.7, 0.5, 1]).double())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 4))


def frames(count=7):
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 4


def batches(size=3, named=True):
    x, y = frames()
    keys = [f"v{number}" for number in range(7)]
    for start in range(0, 7, size):
        part = slice(start, start + size)
        yield (x[part], y[part], keys[part]) if named else (x[part], y[part])


def test_scores_by_hand():
    model = network().double()
    x, y = frames()
    scores = score_frames(model, ((x.double(), y, k) for x, y, k in batches()), temperature=2.0)
    probs = torch.softmax(model.eval()(x.double()) / 2, 1)
    torch.testing.assert_close(scores.target_prob, probs[range(7), y])
    torch.testing.assert_close(scores.top_prob, probs.amax(1))
    assert scores.keys == tuple(f"v{number}" for number in range(7))
    assert scores.top_prob.dtype == torch.float64


def test_batches_do_not_matter_and_nothing_is_left_behind():
    model = network()
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (score_frames(model, batches(size)) for size in (2, 7))
    torch.testing.assert_close(one.top_prob, other.top_prob)
    assert [part.training for part in model] == [True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not one.top_prob.requires_grad
    with pytest.raises(RuntimeError, match="mat1"):
        score_frames(model, [(torch.zeros(2, 5), torch.zeros(2).long())])
    assert model.training


def test_frames_without_keys_are_numbered_so_that_they_sort():
    scores = score_frames(network(), batches(named=False))
    assert list(scores.keys) == sorted(scores.keys)
    assert [int(key) for key in scores.keys] == list(range(7))


def test_autocast_changes_digits_only():
    exact, rough = score_frames(network(), batches()), score_frames(network(), batches(), autocast=torch.bfloat16)
    assert not torch.equal(exact.top_prob, rough.top_prob)
    torch.testing.assert_close(exact.top_prob, rough.top_prob, rtol=0.05, atol=0.05)


def test_the_file_gives_back_what_was_kept(tmp_path):
    path = tmp_path / "scores.npz"
    save_frame_scores(path, SCORES)
    found = load_frame_scores(path)
    assert found.keys == KEYS
    assert torch.equal(found.target_prob, SCORES.target_prob)
    assert torch.equal(found.top_prob, SCORES.top_prob)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npz"]
    save_frame_scores(path, FrameScores((), torch.zeros(0), torch.zeros(0)))
    assert load_frame_scores(path).keys == ()


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "scores.npz"
    save_frame_scores(path, SCORES)

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError, match="disk full"):
        save_frame_scores(path, SCORES._replace(keys=("x", "y", "z")))
    assert load_frame_scores(path).keys == KEYS
    assert [file.name for file in tmp_path.iterdir()] == ["scores.npz"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_authors_pickle(tmp_path, protocol):
    path = tmp_path / "scores.pkl"
    content = {key: [float(a), float(b)] for key, a, b in zip(*SCORES, strict=True)}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = load_frame_scores(path)
    assert found.keys == KEYS
    assert torch.equal(found.target_prob, SCORES.target_prob)
    assert torch.equal(found.top_prob, SCORES.top_prob)
    path.write_bytes(pickle.dumps({}))
    assert load_frame_scores(path).keys == ()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/it-ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: pickle.dumps({"a": Bomb()}), r"posix\.mkdir, but only plain values"),
        (lambda: pickle.dumps({"a": [np.float64(0.5), 0.5]}), "numpy.*only plain values"),
        (lambda: pickle.dumps([0.5, 0.5]), "expected a dict"),
        (lambda: pickle.dumps({1: [0.5, 0.5]}), "expected a dict"),
        (lambda: pickle.dumps({"a": [0.5]}), "not enough values"),
        (lambda: pickle.dumps({"a": [0.5, 1.5]}), "`top_prob` must hold probabilities"),
        (lambda: pickle.dumps({"a": [float("nan"), 0.5]}), "`target_prob` must hold probabilities"),
        (lambda: pickle.dumps({"a": [0.5, 0.5]})[:-4], "no file of frame scores"),
        (lambda: b"", "no file of frame scores"),
        (lambda: b"key p_gt p_top\n", "no file of frame scores"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message, monkeypatch):
    path = tmp_path / "scores.pkl"
    path.write_bytes(content())
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("code in the file was run"))
    with pytest.raises(ValueError, match=message) as error:
        load_frame_scores(path)
    assert str(path) in str(error.value)


def test_archives_that_are_refused(tmp_path):
    path = tmp_path / "scores.npz"
    np.savez(path, top_prob=np.ones(2))
    with pytest.raises(ValueError, match="target_prob"):
        load_frame_scores(path)
    np.savez(path, keys=np.array([Bomb()]), target_prob=np.ones(1), top_prob=np.ones(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_frame_scores(path)
    with pytest.raises(FileNotFoundError):
        load_frame_scores(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (FrameScores(("a", "b", "a"), *SCORES[1:]), "`keys` must differ, got 'a' more than once"),
        (FrameScores(("a", "b"), *SCORES[1:]), r"`target_prob` must be floating and of shape \(2,\)"),
        (FrameScores(("a", "b\nc", "d"), *SCORES[1:]), "line breaks"),
        (FrameScores(("a", "b", "c"), SCORES[1], torch.ones(3).long()), "`top_prob` must be floating"),
        (FrameScores(("a", "b", "c"), SCORES[1], -SCORES[2]), "`top_prob` must hold probabilities"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        save_frame_scores(tmp_path / "scores.npz", scores)
    assert not list(tmp_path.iterdir())


def test_no_frames_to_score():
    with pytest.raises(ValueError, match="`loader` gave no frames"):
        score_frames(network(), [])
