import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_methods.datamodules._video_sampling import Sampling, even_starts, frame_indices, random_starts

SIZES = {
    "frames": st.integers(1, 400),
    "clips": st.integers(1, 16),
    "length": st.integers(1, 40),
    "step": st.integers(1, 4),
}


@given(**SIZES, seed=st.integers(0, 9))
def test_random_starts_follow_the_plain_rule(frames, clips, length, step, seed):
    found = random_starts(frames, Sampling(clips, length, step), torch.Generator().manual_seed(seed)).tolist()
    places = frames - length * step + 1
    part = places // clips
    assert len(found) == clips
    if part > 0:
        assert all(i * part <= start < (i + 1) * part for i, start in enumerate(found))
    elif frames > max(clips, length * step):
        assert found == sorted(found)
        assert all(0 <= start < places for start in found)
    elif part == 0:
        assert found == [round(i * places / clips) for i in range(clips)]
    else:
        assert found == [0] * clips


@given(**SIZES)
def test_even_starts_follow_the_plain_rule(frames, clips, length, step):
    found = even_starts(frames, Sampling(clips, length, step)).tolist()
    places = frames - length * step + 1
    if frames > length * step - 1:
        assert found == [int(i * places / clips + places / (2 * clips)) for i in range(clips)]
    else:
        assert found == [0] * clips


@given(**SIZES)
def test_frames_loop_around_the_end(frames, clips, length, step):
    sampling = Sampling(clips, length, step)
    starts = even_starts(frames, sampling)
    found = frame_indices(starts, frames, sampling)
    assert found.tolist() == [[(s + j * step) % frames for j in range(length)] for s in starts.tolist()]
    assert 0 <= found.min() <= found.max() < frames


@pytest.mark.parametrize(("frames", "clips", "length"), [(80, 8, 1), (10, 8, 1), (50, 2, 32)])
def test_random_starts_reach_every_place(frames, clips, length):
    draws = torch.stack([random_starts(frames, Sampling(clips, length)) for _ in range(500)])
    places = frames - length + 1
    part = places // clips
    for i in range(clips):
        assert set(draws[:, i].tolist()) == set(range(i * part, (i + 1) * part))


def test_few_places_are_drawn_from_all_of_them():
    draws = torch.cat([random_starts(9, Sampling(8, 2)) for _ in range(200)])  # D = 8, a = 1: one each
    assert set(draws.tolist()) == set(range(8))
    draws = torch.stack([random_starts(9, Sampling(8, 3)) for _ in range(200)])  # D = 7 < 8: sorted draws
    assert set(draws.flatten().tolist()) == set(range(7))
    assert len({tuple(row) for row in draws.tolist()}) > 50


def test_halves_are_rounded_to_even():
    assert random_starts(3, Sampling(clips=6)).tolist() == [0, 0, 1, 2, 2, 2]  # 0, 0.5, 1, 1.5, 2, 2.5


def test_a_published_setting():
    """32 frames, every second, of a video of 100: D = 37, and one clip starts at 18."""
    sampling = Sampling(clips=1, length=32, step=2)
    assert sampling.span == 64
    assert frame_indices(even_starts(100, sampling), 100, sampling)[0].tolist() == list(range(18, 82, 2))
    assert frame_indices(even_starts(40, sampling), 40, sampling)[0].tolist() == [*range(0, 40, 2), *range(0, 24, 2)]


def test_numbers_below_one_are_refused():
    for name in ("clips", "length", "step"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            Sampling(**{name: 0})
