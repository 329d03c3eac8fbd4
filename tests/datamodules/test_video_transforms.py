import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia.geometry import resize

from lightning_methods.datamodules._video_clips import ClipTransform
from lightning_methods.datamodules._video_sampling import Sampling
from lightning_methods.datamodules._video_transforms import (
    Crop,
    cut,
    draw_crop,
    even_crops,
    normalised,
    resize_short_side,
    resized,
)


def frames(count=2, height=24, width=32):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def test_the_short_side_is_resized_in_proportion():
    assert resize_short_side(frames(height=240, width=320), 256).shape[-2:] == (256, 341)
    assert resize_short_side(frames(height=320, width=240), 256).shape[-2:] == (341, 256)
    small = frames()
    assert torch.equal(resize_short_side(small, 24), small.float())
    expected = resize(small.float(), (12, 16), "bilinear", align_corners=False, antialias=False)
    torch.testing.assert_close(resize_short_side(small, 12), expected)


def test_multiscale_crops_are_those_of_temporal_segment_networks():
    height, width = 256, 340
    sides = [256, 224, 192, 168]
    allowed = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) < 2}
    drawn = [draw_crop("multiscale", height, width) for _ in range(3000)]
    assert {(crop.height, crop.width) for crop in drawn} == allowed
    for crop in drawn:
        down, across = (height - crop.height) // 4, (width - crop.width) // 4
        corners = [
            (0, 0),
            (0, 4),
            (4, 0),
            (4, 4),
            (2, 2),
            (2, 0),
            (2, 4),
            (4, 2),
            (0, 2),
            (1, 1),
            (1, 3),
            (3, 1),
            (3, 3),
        ]
        assert (crop.top, crop.left) in {(y * down, x * across) for y, x in corners}
    of_one_size = {(crop.top, crop.left) for crop in drawn if (crop.height, crop.width) == (168, 168)}
    assert len(of_one_size) == 13


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_random_area_crops_fit(height, width, seed):
    crop = draw_crop("resized", height, width, torch.Generator().manual_seed(seed))
    assert 0 <= crop.top <= height - crop.height
    assert 0 <= crop.left <= width - crop.width
    assert min(crop.height, crop.width) > 0


def test_random_area_crops_have_the_areas_and_shapes_they_should():
    drawn = [draw_crop("resized", 400, 400) for _ in range(1500)]
    area = torch.tensor([crop.height * crop.width / 160_000 for crop in drawn])
    ratio = torch.tensor([math.log(crop.width / crop.height) for crop in drawn])
    assert 0.078 < area.min() < 0.1
    assert 0.93 < area.max() <= 1
    assert abs(area[area < 0.75].mean() - 0.415) < 0.025  # larger ones fit less often
    assert -0.3 < ratio.min() < -0.27
    assert 0.27 < ratio.max() < 0.3
    assert abs(ratio.mean()) < 0.02  # evenly in its logarithm
    assert {crop.top for crop in drawn} >= {0, 1, 2, 3, 4, 5}


def test_a_shape_that_never_fits_gives_the_middle_square():
    assert draw_crop("resized", 10, 200) == Crop(0, 95, 10, 10)


@pytest.mark.parametrize(
    ("height", "width", "corners"),
    [(8, 14, [(0, 0), (0, 6), (0, 3)]), (14, 8, [(0, 0), (6, 0), (3, 0)]), (9, 14, [(0, 0), (0, 6), (0, 3)])],
)
def test_even_crops_are_the_middle_and_both_ends(height, width, corners):
    assert [(crop.top, crop.left) for crop in even_crops(height, width, 8, 3)] == corners
    assert even_crops(height, width, 8, 1) == [Crop(*corners[-1], 8, 8)]
    assert even_crops(8, 8, 8, 3) == [Crop(0, 0, 8, 8)] * 3
    with pytest.raises(ValueError, match="a crop of 10 does not fit into frames of"):
        even_crops(9, 14, 10, 1)


def test_normalisation_is_by_colour():
    found = normalised(torch.full((1, 3, 2, 2), 200.0), (10.0, 20.0, 30.0), (1.0, 2.0, 4.0))
    assert found[0, :, 0, 0].tolist() == [190.0, 90.0, 42.5]


def made(layout, *, clips=2, length=3, **options):
    settings = {"size": 6, "short_side": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3, **options}
    return ClipTransform(Sampling(clips, length), layout, **settings)


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize("layout", ["btchw", "bcthw", "bncthw"])
def test_layouts_of_evaluation_views(layout, crops):
    """Clip after clip, and the crops of a clip one after the other."""
    transform = made(layout, crops=crops)
    source = frames(6, 8, 12)
    found = transform(source)
    assert found.shape == transform.shape
    expected = torch.stack([cut(source, crop).float() for crop in even_crops(8, 12, 6, crops)])  # (crops, N·L, ...)
    if layout == "btchw":
        expected = expected if crops > 1 else expected[0]
    else:
        views = [expected[crop, 3 * clip : 3 * clip + 3].transpose(0, 1) for clip in range(2) for crop in range(crops)]
        expected = torch.stack(views)
    assert torch.equal(found, expected)


def test_a_single_view_has_no_dimension_of_its_own_unless_the_layout_has_it():
    assert made("bcthw", clips=1).shape == (3, 3, 6, 6)
    assert made("bncthw", clips=1).shape == (1, 3, 3, 6, 6)
    assert made("btchw", clips=8, length=1).shape == (8, 3, 6, 6)
    assert made("bcthw", clips=4, crops=3).shape == (12, 3, 3, 6, 6)


def test_training_cuts_all_frames_alike_and_mirrors_half_of_the_clips():
    transform = made("btchw", random_crop="resized")
    ramp = torch.arange(12).expand(1, 3, 8, 12).mul(20).byte().expand(6, 3, 8, 12)
    rising = 0
    for _ in range(200):
        found = transform(ramp)
        assert torch.equal(found, found[:1].expand_as(found))
        rising += bool(found[0, 0, 0, -1] > found[0, 0, 0, 0])
    assert 70 < rising < 130


def test_training_crops_come_in_the_size_of_the_network():
    source = frames(6, 8, 12)
    torch.manual_seed(3)
    found = made("btchw", random_crop="multiscale")(source)
    torch.manual_seed(3)
    expected = resized(cut(source.float(), draw_crop("multiscale", 8, 12)), 6, 6)
    assert torch.equal(found, expected) or torch.equal(found, expected.flip(-1))
