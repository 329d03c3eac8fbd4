"""`FrameBank` and its recipe: what is kept, what is read, and which frames are chosen."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lightning_methods.modules import FrameBank, FrameBankSpec, FrameScores, save_frame_scores

PIXELS = torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_bytes_stay_bytes_and_are_normalised_when_read():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    bank = FrameBank(PIXELS, mean=mean, std=std)
    assert bank.frames.dtype == torch.uint8
    indices = torch.tensor([[5, 0], [2, 2]])
    expected = np.zeros((2, 2, 3, 4, 5))
    for place in np.ndindex(expected.shape):
        a, b, c, y, x = place
        expected[place] = (PIXELS[indices[a, b], c, y, x].item() / 255 - mean[c]) / std[c]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)):
        found = bank.sample(indices, dtype=dtype)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_defaults_only_divide_by_255():
    torch.testing.assert_close(FrameBank(PIXELS).sample(torch.arange(6)), PIXELS / 255)


def test_one_number_serves_all_channels():
    one, three = FrameBank(PIXELS, mean=0.5, std=0.25), FrameBank(PIXELS, mean=[0.5] * 3, std=[0.25] * 3)
    assert torch.equal(one.sample(torch.arange(6)), three.sample(torch.arange(6)))


def test_floating_frames_are_read_as_they_are():
    frames = torch.randn(6, 3, 4, 5)
    bank = FrameBank(frames, keys="abcdef")
    assert torch.equal(bank.sample(torch.tensor([1, 1, 4])), frames[[1, 1, 4]])
    assert bank.sample(torch.tensor([1]), dtype=torch.float16).dtype == torch.float16
    assert bank.keys == ("a", "b", "c", "d", "e", "f")
    assert len(bank) == 6


def test_only_the_frames_that_are_used_are_touched():
    bank = FrameBank(torch.zeros(4096, 3, 32, 32, dtype=torch.uint8), mean=0.5, std=0.5)
    with torch.profiler.profile(profile_memory=True) as profile:
        bank.sample(torch.tensor([1, 2]))
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 10 * 2 * 3 * 32 * 32 * 4, "more than a few copies of the two frames"


def test_moves_and_copies_but_is_in_no_checkpoint():
    bank = FrameBank(PIXELS, targets=torch.arange(6), mean=0.5, std=0.25)
    assert not bank.state_dict()
    assert not list(bank.parameters())
    meta = copy.deepcopy(bank).to("meta")
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}
    indices = torch.arange(6)
    for other in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank), copy.deepcopy(bank).bfloat16()):
        assert other.frames.dtype == torch.uint8
        tolerance = 0.02 if other._scale.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(other.sample(indices), bank.sample(indices), rtol=tolerance, atol=tolerance)


def test_resized_like_a_bilinear_filter_without_antialiasing():
    bank = FrameBank(PIXELS, keys="abcdef", targets=torch.arange(6), mean=0.5, std=0.25)
    small = bank.resized((3, 8))
    expected = np.zeros((3, 8))
    for y in range(3):
        for x in range(8):
            v, u = (y + 0.5) * 4 / 3 - 0.5, (x + 0.5) * 5 / 8 - 0.5
            rows, columns = ([int(np.floor(w)), int(np.floor(w)) + 1] for w in (v, u))
            for row in rows:
                for column in columns:
                    weight = (1 - abs(v - row)) * (1 - abs(u - column))
                    expected[y, x] += weight * PIXELS[2, 1, min(max(row, 0), 3), min(max(column, 0), 4)].item()
    assert np.abs(small.frames[2, 1].numpy() - expected).max() <= 0.501
    assert small.frames.dtype == torch.uint8
    assert small.keys == bank.keys
    assert torch.equal(small.targets, bank.targets)
    assert (small.mean, small.std) == (0.5, 0.25)
    assert torch.equal(bank.resized((4, 5)).frames, PIXELS)
    assert bank.resized(7).frames.shape[-2:] == (7, 7)
    floating = FrameBank(PIXELS.float()).resized((3, 8)).frames
    torch.testing.assert_close(floating, F.interpolate(PIXELS.float(), (3, 8), mode="bilinear"))


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (PIXELS[0], {}, r"`frames` must have shape \(M, C, H, W\)"),
        (PIXELS[:0], {}, "M at least 1"),
        (PIXELS.long(), {}, "`frames` must be uint8, or floating"),
        (torch.full((1, 3, 2, 2), float("nan")), {}, "`frames` must be finite"),
        (torch.tensor([0.0, float("inf")]).reshape(2, 1, 1, 1), {}, "`frames` must be finite"),
        (PIXELS.float(), {"mean": 0.5}, "`mean` and `std` belong to uint8"),
        (PIXELS, {"mean": [0.5, 0.5]}, "`mean` must be one number or 3"),
        (PIXELS, {"std": [58.4, 57.1, 57.4]}, "`std` must be that of values in .* divide by 255"),
        (PIXELS, {"std": 0.0}, "`std` must be positive"),
        (PIXELS, {"mean": float("nan")}, "`mean` must be"),
        (PIXELS, {"keys": ["a"]}, "`keys` must name each of the 6 frames, got 1"),
        (PIXELS, {"targets": torch.zeros(6)}, "`targets` must hold integers"),
        (PIXELS, {"targets": torch.zeros(5, dtype=torch.long)}, r"`targets` must have shape \(6,\)"),
    ],
)
def test_errors(frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        FrameBank(frames, **arguments)


# --- choosing and reading -------------------------------------------------------------------------

KEYS = [f"video{number // 3}/img_{number % 3:05}.jpg" for number in range(12)]
SHUFFLED = [KEYS[place] for place in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()]
PROBS = {key: (0.5 + place / 100, 0.9 - place / 100) for place, key in enumerate(KEYS)}


def scores(keys=KEYS):
    probs = torch.tensor([PROBS[key] for key in keys], dtype=torch.float64)
    return FrameScores(keys, probs[:, 1], probs[:, 0])


def read(key):
    return torch.full((3, 4, 4), KEYS.index(key), dtype=torch.uint8)


def recipe(**arguments):
    return FrameBankSpec(**{"scores": scores(), "reader": read, "size": 4, "bank_size": 6, **arguments})


def test_the_bank_holds_the_chosen_frames_in_the_order_of_its_keys():
    bank = recipe(mean=0.5, std=0.25).build()
    assert sorted(bank.keys) == sorted(KEYS[6:]), "the upper half by top_prob"
    assert bank.keys != tuple(KEYS[6:]), "shuffled"
    assert [KEYS[int(frame[0, 0, 0])] for frame in bank.frames] == list(bank.keys)
    assert (bank.mean, bank.std, bank.targets) == (0.5, 0.25, None)


def test_the_order_of_the_scores_does_not_matter():
    assert recipe().build().keys == recipe(scores=scores(SHUFFLED)).build().keys


def test_ties_go_by_key():
    even = torch.full((12,), 0.5, dtype=torch.float64)
    for keys in (KEYS, SHUFFLED):
        bank = recipe(scores=FrameScores(keys, even, even), low=0.75, bank_size=3).build()
        assert set(bank.keys) == set(KEYS[9:])


def test_strategies_and_scores():
    assert set(recipe(low=0.0, high=0.5).build().keys) == set(KEYS[:6])
    assert set(recipe(score="target_prob").build().keys) == set(KEYS[:6]), "p_gt falls where p_top grows"
    assert set(recipe(strategy="top", bank_size=2).build().keys) == set(KEYS[-2:])
    assert set(recipe(strategy="threshold", low=0.515, high=0.535, bank_size=2).build().keys) == set(KEYS[2:4])


@pytest.mark.filterwarnings("ignore:Only")
def test_places_and_seeds_draw_for_themselves():
    spec = recipe(low=0.0, bank_size=6)
    choices = [spec.choose(rank, epoch).keys for rank in range(2) for epoch in range(2)]
    choices.append(recipe(low=0.0, bank_size=6, seed=1).choose(0, 0).keys)
    assert len(set(choices)) == 5
    assert spec.choose(0, 0) == recipe(low=0.0, bank_size=6).choose(0, 0)
    assert spec.choose(0, 0).min_score == min(PROBS[key][0] for key in choices[0])
    drawn = [recipe(strategy="bernoulli", bank_size=12).choose(0, epoch).keys for epoch in range(8)]
    assert len({frozenset(keys) for keys in drawn}) > 1


@pytest.mark.filterwarnings("ignore:Only")
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_any_bank_is_a_subset_without_repeats(count, bank_size, seed):
    keys = [f"{number}/{number}" for number in range(count)]
    probs = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spec = FrameBankSpec(FrameScores(keys, probs, probs), lambda _: PIXELS[0], 4, bank_size, low=0.3, seed=seed)
    chosen = spec.choose().keys
    assert len(set(chosen)) == len(chosen) == min(bank_size, count - int(0.3 * count))
    by_score = sorted(range(count), key=lambda index: probs[index])
    assert set(chosen) <= {keys[index] for index in by_score[int(0.3 * count) :]}


def test_fewer_frames_than_asked_for_is_a_warning_and_a_smaller_bank():
    with pytest.warns(UserWarning, match="Only 6 frames are selected, fewer than bank_size=1024"):
        assert len(recipe(bank_size=1024).build()) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe().build()


def test_frames_are_read_once_each_video_after_video():
    asked = []

    def reader(key):
        asked.append(key)
        return read(key)

    recipe(reader=reader, low=0.0, bank_size=12).build()
    assert asked == KEYS


def test_labels_come_with_the_frames():
    bank = recipe(reader=lambda key: (read(key), KEYS.index(key) + 100)).build()
    assert bank.targets.tolist() == [KEYS.index(key) + 100 for key in bank.keys]


def test_frames_of_different_sizes_become_those_of_the_clips():
    def reader(key):
        return torch.full((3, 5 + KEYS.index(key), 9), KEYS.index(key), dtype=torch.uint8)

    bank = recipe(reader=reader, size=(6, 8)).build()
    assert bank.frames.shape == (6, 3, 6, 8)
    assert [KEYS[int(frame[0, 0, 0])] for frame in bank.frames] == list(bank.keys)


def test_scores_of_other_data_are_refused():
    reader = dict.fromkeys(KEYS[1:], torch.zeros(3, 4, 4)).__getitem__
    with pytest.raises(ValueError, match=f"`reader` has no frame '{KEYS[0]}', which `scores` name"):
        recipe(reader=reader, low=0.0, bank_size=len(KEYS)).build()


def test_from_scores_is_the_recipe(tmp_path):
    save_frame_scores(tmp_path / "scores.npz", scores())
    arguments = {"size": 4, "bank_size": 3, "low": 0.25, "seed": 5, "score": "target_prob", "mean": 0.5, "std": 2.0}
    bank = FrameBank.from_scores(tmp_path / "scores.npz", read, **arguments)
    expected = recipe(**arguments).build()
    assert bank.keys == expected.keys
    assert torch.equal(bank.frames, expected.frames)
    assert (bank.mean, bank.std) == (0.5, 2.0)


def test_recipes_can_be_copied_and_read_like_the_call():
    spec = FrameBankSpec("scores.npz", read, 4, low=0.25)
    assert repr(spec) == "FrameBankSpec(scores='scores.npz', reader=read, size=4, low=0.25)"
    assert repr(recipe()) == "FrameBankSpec(scores=FrameScores(of 12 frames), reader=read, size=4, bank_size=6)"
    used = recipe()
    used.build()
    assert copy.deepcopy(used).build().keys == pickle.loads(pickle.dumps(used)).build().keys == used.build().keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank_size": 0}, "`bank_size`"),
        ({"strategy": "best"}, "`strategy`"),
        ({"score": "p_top"}, "`score`"),
        ({"low": 0.9, "high": 0.1}, "`low` must be smaller"),
        ({"strategy": "threshold", "low": 0.9}, "no frame of the 12"),
        ({"reader": lambda key: torch.zeros(3)}, r"`reader` must give a tensor \(C, H, W\), got shape \(3,\) for"),
        ({"reader": lambda key: "pixels"}, "`reader` must give .* got str for 'video2/"),
    ],
)
def test_recipe_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipe(**arguments).build()


class Half(nn.Module):
    """Sure of bright frames."""

    def forward(self, frames):
        brightness = frames.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(brightness), 10 * brightness], 1)


def test_from_dataset_scores_selects_and_reads(tmp_path):
    frames = torch.arange(10)[:, None, None, None].expand(10, 3, 4, 4)
    items = [((25 * frame).to(torch.uint8), label % 2) for label, frame in enumerate(frames)]
    bank = FrameBank.from_dataset(Half(), items, bank_size=3, low=0.7, mean=0.1, std=0.5, batch_size=4)
    assert sorted(int(frame[0, 0, 0]) for frame in bank.frames) == [175, 200, 225]
    assert bank.targets.tolist() == [int(frame[0, 0, 0]) // 25 % 2 for frame in bank.frames]
    assert bank.frames.dtype == torch.uint8
    assert (bank.mean, bank.std) == (0.1, 0.5)
    floating = torch.utils.data.TensorDataset(frames / 10, torch.arange(10) % 2)
    bank = FrameBank.from_dataset(Half(), floating, bank_size=3, low=0.7, size=2)
    assert sorted(round(10 * float(frame[0, 0, 0])) for frame in bank.frames) == [7, 8, 9]
    assert bank.frames.shape == (3, 3, 2, 2)


def test_from_dataset_needs_items_by_index():
    with pytest.raises(ValueError, match="`dataset` must have a length"):
        FrameBank.from_dataset(Half(), iter([]))


def test_images_from_a_folder(tmp_path):
    """The authors' keys for folders of frames, with a reader of one line."""
    folder = tmp_path / "video0"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (6, 5), (number * 50, 0, 0)).save(folder / f"img_{number:05}.png")
    keys = [f"video0/img_{number:05}.png" for number in range(3)]
    probs = torch.tensor([0.1, 0.9, 0.8])
    bank = FrameBank.from_scores(
        FrameScores(keys, probs, probs),
        lambda key: torch.from_numpy(np.array(Image.open(tmp_path / key))).permute(2, 0, 1),
        size=4,
        bank_size=2,
        low=0.3,
    )
    assert sorted(bank.frames[:, 0, 0, 0].tolist()) == [50, 100]
