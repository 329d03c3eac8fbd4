import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_methods.functional import (
    average_views,
    boxes_to_masks,
    conflicting_foreground,
    contrasted_accuracy,
    foreground_valid,
    merge_foreground_masks,
    replace_background,
    still_video,
)

LAYOUTS = {"btchw": (2, 5, 3, 4, 6), "bcthw": (2, 3, 5, 4, 6), "bncthw": (2, 4, 3, 5, 4, 6)}


def drawn(*shape, seed=0, high=256):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- SCUFO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", [2, torch.tensor(2), torch.tensor([3, 1])])
def test_still_video_repeats_one_frame_of_each_clip(layout, index):
    videos = torch.rand(LAYOUTS[layout])
    before = videos.clone()
    chosen = torch.as_tensor(index).expand(2).tolist()
    found = still_video(videos, index, layout=layout)
    time = layout.index("t")
    for sample, index in enumerate(chosen):
        frame = videos[sample].select(time - 1, index)
        for t in range(5):
            assert torch.equal(found[sample].select(time - 1, t), frame)
    assert found.shape == videos.shape
    assert torch.equal(videos, before)


def test_clips_may_have_frames_of_their_own():
    videos = torch.rand(2, 4, 3, 5, 2, 2)
    index = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    found = still_video(videos, index, layout="bncthw")
    for b in range(2):
        for n in range(4):
            assert torch.equal(found[b, n, :, 0], videos[b, n, :, index[b, n]])
            assert torch.equal(found[b, n, :, 4], videos[b, n, :, index[b, n]])


def test_still_video_refuses_what_does_not_fit():
    videos = torch.rand(2, 3, 5, 4, 4)
    with pytest.raises(ValueError, match="`videos` must be floating"):
        still_video(drawn(2, 3, 5, 4, 4), 0)
    for index in (5, -1, torch.tensor(5), torch.tensor([0, 5])):
        with pytest.raises(ValueError, match=r"`frame_index` must lie in \[0, 5\)"):
            still_video(videos, index)
    with pytest.raises(ValueError, match="`layout` must be one of"):
        still_video(videos, 0, layout="cthw")


# --- backgrounds ----------------------------------------------------------------------------------


def plain_mix(frames, masks, background):
    out = torch.empty_like(frames)
    for t, c, y, x in np.ndindex(*frames.shape):
        m = float(masks[t, y, x])
        out[t, c, y, x] = int(m * int(frames[t, c, y, x]) + (1 - m) * int(background[c, y, x]))
    return out


@pytest.mark.parametrize("kind", ["bool", "float", "double"])
def test_replace_background_truncates(kind):
    frames, background = drawn(2, 3, 5, 7), drawn(3, 5, 7, seed=1)
    masks = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    masks = masks > 0.5 if kind == "bool" else getattr(masks, kind)()
    found = replace_background(frames, masks, background)
    assert found.dtype == torch.uint8
    assert torch.equal(found, plain_mix(frames, masks, background))


def test_equal_foreground_and_background_stay_what_they_are():
    """In single precision some of these would fall below the whole number and be cut down."""
    grey = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    for weight in (0.1, 0.3, 0.7, 0.9):
        masks = torch.full((1, 1, 256), weight, dtype=torch.float64)
        assert (replace_background(grey, masks, grey[0]).int() - grey.int()).abs().max() <= 1
        assert torch.equal(replace_background(grey, masks, grey[0]), plain_mix(grey, masks, grey[0]))


@pytest.mark.parametrize("size", [(9, 5), (3, 20)])
def test_backgrounds_are_resized_bicubically_without_keeping_proportions(size):
    frames, background = drawn(2, 3, 6, 8), drawn(3, *size, seed=1)
    image = Image.fromarray(background.permute(1, 2, 0).numpy()).resize((8, 6), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    nothing, everything = torch.zeros(2, 6, 8), torch.ones(2, 6, 8)
    assert torch.equal(replace_background(frames, nothing, background), expected.expand(2, 3, 6, 8))
    assert torch.equal(replace_background(frames, everything, background), frames)


def test_conflicting_foreground_puts_the_moving_one_on_top():
    frames, still, background = drawn(2, 3, 5, 7), drawn(3, 5, 7, seed=1), drawn(3, 5, 7, seed=2)
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64)
    still_mask = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    found = conflicting_foreground(frames, masks, still, still_mask, background)
    for t, c, y, x in np.ndindex(*frames.shape):
        m, n = float(masks[t, y, x]), float(still_mask[y, x])
        under = n * int(still[c, y, x]) + (1 - n) * int(background[c, y, x])  # not truncated in between
        assert int(found[t, c, y, x]) == int(m * int(frames[t, c, y, x]) + (1 - m) * under)


def test_a_still_foreground_of_another_size_is_fitted():
    frames, still = drawn(1, 3, 4, 4), drawn(3, 8, 8, seed=1)
    still_mask = torch.zeros(8, 8, dtype=torch.bool)
    still_mask[:, 4:] = True
    background = torch.zeros(3, 4, 4).byte()
    found = conflicting_foreground(
        frames, torch.zeros(1, 4, 4), still_frame=still, still_mask=still_mask, background=background
    )
    fitted = np.array(Image.fromarray(still.permute(1, 2, 0).numpy()).resize((4, 4), Image.Resampling.BICUBIC))
    assert torch.equal(found[0, :, :, 2:], torch.from_numpy(fitted).permute(2, 0, 1)[:, :, 2:])
    assert not found[0, :, :, :2].any()


def test_backgrounds_refuse_what_does_not_fit():
    frames, masks, image = drawn(2, 3, 4, 4), torch.zeros(2, 4, 4), drawn(3, 4, 4)
    for arguments, message in [
        ((frames.float(), masks, image), r"`frames` must be uint8 of shape \(T, 3, H, W\), got .* of torch.float32"),
        ((frames[0], masks, image), "`frames` must be uint8"),
        ((frames, masks[0], image), r"`masks` must have shape \(2, 4, 4\), got \(4, 4\)"),
        ((frames, masks + 255, image), r"`masks` must lie in \[0, 1\], got values from 255 to 255"),
        ((frames, masks - 1, image), r"`masks` must lie in \[0, 1\]"),
        ((frames, masks, image.float()), "`background` must be uint8"),
        ((frames, masks, image[0]), r"`background` must be uint8 of shape \(3, h, w\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace_background(*arguments)
    with pytest.raises(ValueError, match="`still_frame` must be uint8"):
        conflicting_foreground(frames, masks, image[0], masks[0], image)
    with pytest.raises(ValueError, match=r"`still_mask` must have shape \(4, 4\)"):
        conflicting_foreground(frames, masks, image, masks, image)


# --- masks ----------------------------------------------------------------------------------------


@given(length=st.integers(1, 7), window=st.integers(0, 9), seed=st.integers(0, 99), with_saliency=st.booleans())
@settings(max_examples=60, deadline=None)
def test_masks_are_joined_over_neighbouring_frames(length, window, seed, with_saliency):
    human, saliency = (drawn(length, 2, 3, seed=seed + k, high=5) == 0 for k in (0, 100))
    found = merge_foreground_masks(human, saliency if with_saliency else None, window=window)
    for t in range(length):
        near = range(max(0, t - window), min(length, t + window + 1))
        expected = torch.stack([human[s] | saliency[s] if with_saliency else human[s] for s in near]).any(0)
        assert torch.equal(found[t], expected)


def test_merging_takes_one_neighbour_on_each_side_and_changes_nothing_in_place():
    human = torch.zeros(6, 1, 1, dtype=torch.bool)
    human[2] = True
    before = human.clone()
    assert merge_foreground_masks(human).flatten().tolist() == [False, True, True, True, False, False]
    merge_foreground_masks(human, window=0).logical_not_()
    assert torch.equal(human, before)


def test_boxes_are_cut_down_to_whole_pixels_and_to_the_frame():
    boxes = torch.tensor([[0, 1.9, 0.9, 3.99, 2.0], [2, -5.0, -5.0, 2.5, 100.0]])
    found = boxes_to_masks(boxes, num_frames=3, height=4, width=5)
    expected = torch.zeros(3, 4, 5, dtype=torch.bool)
    expected[0, 0:2, 1:3] = True
    expected[2, :, 0:2] = True
    assert torch.equal(found, expected)


def test_the_first_box_of_a_frame_counts_or_all():
    boxes = torch.tensor([[1, 0, 0, 1, 1], [1, 2, 0, 3, 1]])
    assert boxes_to_masks(boxes, num_frames=2, height=1, width=3)[1, 0].tolist() == [True, False, False]
    found = boxes_to_masks(boxes, num_frames=2, height=1, width=3, every_box=True)
    assert found[1, 0].tolist() == [True, False, True]
    assert not found[0].any()
    assert not boxes_to_masks(torch.zeros(0, 5), num_frames=2, height=1, width=3).any()


def test_a_foreground_is_valid_at_the_very_bounds():
    masks = torch.zeros(10, 10, 10, dtype=torch.bool)
    masks[:9, 0] = True  # ten of a hundred pixels, in nine of ten frames
    found = foreground_valid(masks)
    assert found.frames.tolist() == [True] * 9 + [False]
    assert bool(found.video)
    masks[0, 0, 0] = False
    found = foreground_valid(masks)
    assert not found.frames[0]
    assert not found.video
    assert foreground_valid(masks, min_frames=0.8).video
    assert foreground_valid(masks, min_area=0.09).video


def test_masks_refuse_what_does_not_fit():
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    for call, message in [
        (lambda: merge_foreground_masks(masks.float()), "`human` must be boolean and of shape"),
        (lambda: merge_foreground_masks(masks[0]), r"`human` must be boolean and of shape \(T, H, W\)"),
        (lambda: merge_foreground_masks(masks, masks[:1]), r"`saliency` must be boolean and of shape \(2, 3, 3\)"),
        (lambda: merge_foreground_masks(masks, window=-1), "`window` must lie in"),
        (lambda: boxes_to_masks(torch.zeros(2, 4), num_frames=1, height=1, width=1), r"`boxes` must have shape \(n, 5"),
        (
            lambda: boxes_to_masks(torch.tensor([[3, 0, 0, 1, 1]]), num_frames=3, height=1, width=1),
            r"`boxes` must have frames in \[0, 3\), got 3",
        ),
        (lambda: boxes_to_masks(torch.zeros(0, 5), num_frames=1, height=0, width=1), "`height` must be positive"),
        (lambda: foreground_valid(masks, min_area=2), "`min_area` must lie in"),
        (lambda: foreground_valid(masks[0]), r"`masks` must have shape \(T, H, W\)"),
        (lambda: foreground_valid(2.0 * torch.ones(1, 1, 1)), r"`masks` must lie in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- scores ---------------------------------------------------------------------------------------


@given(data=st.data(), size=st.integers(1, 12), classes=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_contrasted_accuracy_counts_pairs(data, size, classes):
    label = st.integers(0, classes - 1)
    scuba, scufo, targets = (data.draw(st.lists(label, min_size=size, max_size=size)) for _ in range(3))
    found = contrasted_accuracy(torch.tensor(scuba), torch.tensor(scufo), torch.tensor(targets))
    pairs = list(zip(scuba, scufo, targets, strict=True))
    assert float(found.scuba) == pytest.approx(sum(a == y for a, _, y in pairs) / size)
    assert float(found.scufo) == pytest.approx(sum(b == y for _, b, y in pairs) / size)
    assert float(found.contrasted) == pytest.approx(sum(a == y and b != y for a, b, y in pairs) / size)
    assert found.scuba - found.scufo - 1e-6 <= found.contrasted <= min(found.scuba, 1 - found.scufo) + 1e-6


def test_scores_are_as_good_as_classes_and_the_first_of_equal_ones_wins():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    found = contrasted_accuracy(scores, torch.tensor([1, 1, 1]), torch.tensor([0, 1, 0]))
    assert [round(float(value), 4) for value in found] == [1.0, 0.3333, 0.6667]


def test_views_are_averaged_as_probabilities():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = sum(logits[:, v].exp() / logits[:, v].exp().sum(1, keepdim=True) for v in range(4)) / 4
    torch.testing.assert_close(average_views(logits), expected)
    assert average_views(logits.half()).dtype == torch.float32


def test_scores_refuse_what_does_not_fit():
    classes, scores = torch.zeros(2, dtype=torch.long), torch.zeros(2, 3)
    for call, message in [
        (lambda: contrasted_accuracy(classes.float(), classes, classes), "`scuba_preds` must hold integers"),
        (
            lambda: contrasted_accuracy(classes, scores[:1], classes),
            r"`scufo_preds` must have shape \(2,\) or \(2, K\)",
        ),
        (lambda: contrasted_accuracy(classes, scores[None], classes), "`scufo_preds` must have shape"),
        (lambda: contrasted_accuracy(classes, classes, classes.float()), "`targets` must hold integers"),
        (lambda: contrasted_accuracy(classes, classes, classes[None]), r"`targets` must have shape \(B,\)"),
        (lambda: average_views(scores), r"`logits` must be floating and of shape \(B, V, K\)"),
        (lambda: average_views(torch.zeros(1, 2, 3).long()), "`logits` must be floating"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
