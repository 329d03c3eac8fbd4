import colorsys
import functools
import math

import kornia
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync
from torch import Tensor

from lightning_methods.functional import (
    actor_cutmix,
    background_erase,
    fame,
    fame_foreground_mask,
    mixup_videos,
    videomix,
    videomix_box,
)

close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
SIZES = {"b": 4, "n": 2, "c": 3, "t": 3, "h": 4, "w": 5}
LAYOUTS = ("btchw", "bcthw", "bncthw")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_apply = pytest.mark.parametrize(
    "apply", [None, torch.tensor([True, False, False, True, True])], ids=["all", "some"]
)
PERM = torch.tensor([2, 1, 3, 0, 4])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(layout: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> Tensor:
    size = {**SIZES, **sizes}
    return torch.rand([size[dim] for dim in layout], generator=seeded(seed), dtype=torch.float64).to(dtype)


def labels(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, generator=seeded(seed)).softmax(1)


def still_masks(layout: str, batch: int, *, seed: int = 0, **sizes: int) -> Tensor:
    """(B, H, W), or (B, N, H, W) with clips."""
    size = {**SIZES, "b": batch, **sizes}
    shape = [size[dim] for dim in layout if dim not in "ct"]
    return torch.rand(shape, generator=seeded(seed)) < 0.4


def moving_masks(layout: str, batch: int, *, seed: int = 0) -> Tensor:
    size = {**SIZES, "b": batch}
    return torch.rand([size[dim] for dim in layout if dim != "c"], generator=seeded(seed)) < 0.4


def frames_of(video: Tensor, layout: str):
    """Views (C, H, W) of all frames of one sample, each with its clip and time."""
    if layout == "bncthw":
        return [((n, t), video[n, :, t]) for n in range(video.shape[0]) for t in range(video.shape[2])]
    if layout == "bcthw":
        return [((None, t), video[:, t]) for t in range(video.shape[1])]
    return [((None, t), video[t]) for t in range(video.shape[0])]


def mask_at(masks: Tensor, sample: int, place: tuple[int | None, int], layout: str) -> Tensor:
    n, t = place
    mask = masks[sample] if n is None else masks[sample, n]
    return mask if mask.ndim == 2 else mask[t]


class TestMixup:
    @each_layout
    @each_apply
    @pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])])
    def test_sample_by_sample(self, layout, apply, lam):
        videos, targets = clips(layout, b=5), labels(5)
        found = mixup_videos(videos, targets, PERM, lam, apply)
        for i, j in enumerate(PERM.tolist()):
            w = float(lam[i]) if isinstance(lam, Tensor) and lam.ndim else float(lam)
            w = w if apply is None or apply[i] else 1.0
            close(found.videos[i], w * videos[i] + (1 - w) * videos[j])
            close(found.targets[i], w * targets[i] + (1 - w) * targets[j])

    def test_class_indices_become_one_hot(self):
        videos, targets = clips("bcthw", b=5), torch.tensor([0, 2, 1, 2, 0])
        found = mixup_videos(videos, targets, PERM, 0.3, num_classes=3)
        close(found.targets, mixup_videos(videos, torch.eye(3)[targets], PERM, 0.3).targets)
        close(found.targets.sum(1), torch.ones(5))
        half = mixup_videos(videos.half(), targets, PERM, 0.3, num_classes=3)
        assert (half.videos.dtype, half.targets.dtype) == (torch.float16, torch.float32)

    def test_gradcheck(self):
        videos, targets = clips("bcthw", dtype=torch.float64, b=5, t=2, h=2, w=1), labels(5).double()
        apply = torch.tensor([True, False, True, True, False])
        inputs = (videos.requires_grad_(), targets.requires_grad_())
        assert torch.autograd.gradcheck(lambda v, y: tuple(mixup_videos(v, y, PERM, 0.3, apply)), inputs)


class TestVideoMix:
    @settings(max_examples=60, deadline=None)
    @given(lam=st.floats(0, 1), height=st.integers(1, 30), width=st.integers(1, 30), data=st.data())
    def test_box_in_plain_numbers(self, lam, height, width, data):
        cx, cy = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        r = math.sqrt(1 - lam)
        cw, ch = int(width * r), int(height * r)
        x1, x2 = max(cx - cw // 2, 0), min(cx + cw // 2, width)
        y1, y2 = max(cy - ch // 2, 0), min(cy + ch // 2, height)
        found = videomix_box(lam=lam, cx=cx, cy=cy, height=height, width=width)
        assert found.box.tolist() == [x1, y1, x2, y2]
        assert found.lam.item() == pytest.approx(1 - (x2 - x1) * (y2 - y1) / (height * width))
        with NoSync():
            tensors = videomix_box(
                lam=torch.tensor(lam, dtype=torch.float64), cx=torch.tensor(cx), cy=torch.tensor(cy),
                height=height, width=width,
            )  # fmt: skip
        assert tensors.box.equal(found.box)

    @each_layout
    @each_apply
    def test_sample_by_sample(self, layout, apply):
        videos, targets = clips(layout, b=5), labels(5)
        before = videos.clone()
        found = videomix(videos, targets, PERM, torch.tensor([1, 0, 4, 3]), apply)
        for i, j in enumerate(PERM.tolist()):
            expected, share = videos[i].clone(), 1.0
            if apply is None or apply[i]:
                expected[..., 0:3, 1:4] = videos[j][..., 0:3, 1:4]
                share = 1 - 9 / 20
            assert found.videos[i].equal(expected)
            close(found.targets[i], share * targets[i] + (1 - share) * targets[j])
        assert videos.equal(before)

    def test_the_target_has_the_share_of_the_box(self):
        found = videomix_box(lam=0.4, cx=0, cy=3, height=4, width=5)
        mixed = videomix(clips("bcthw", b=2), torch.eye(2), torch.tensor([1, 0]), found.box)
        close(mixed.targets[0, 0], found.lam.float())

    def test_gradcheck(self):
        videos, targets = clips("bcthw", dtype=torch.float64, b=5, t=2, h=2, w=2), labels(5).double()
        apply, box = torch.tensor([True, False, True, True, False]), torch.tensor([1, 0, 2, 1])
        inputs = (videos.requires_grad_(), targets.requires_grad_())
        assert torch.autograd.gradcheck(lambda v, y: tuple(videomix(v, y, PERM, box, apply)), inputs)


class TestBackgroundErase:
    @each_layout
    @each_apply
    @pytest.mark.parametrize("own", [False, True], ids=["one index", "own index"])
    def test_frame_by_frame(self, layout, apply, own):
        videos = clips(layout, b=5)
        index = torch.randint(3, (5, 2) if layout == "bncthw" else (5,), generator=seeded()) if own else 1
        found = background_erase(videos, index, 0.2, apply, layout=layout)
        for i, video in enumerate(videos):
            w = 0.2 if apply is None or apply[i] else 0.0
            originals = dict(frames_of(video, layout))
            for (n, t), frame in frames_of(found[i], layout):
                chosen = index if not own else int(index[i] if n is None else index[i, n])
                close(frame, (1 - w) * originals[n, t] + w * originals[n, chosen])

    def test_one_index_for_the_clips_of_a_sample(self):
        videos, index = clips("bncthw"), torch.tensor([2, 0, 1, 1])
        both = background_erase(videos, index[:, None].expand(4, 2), 0.2, layout="bncthw")
        assert background_erase(videos, index, 0.2, layout="bncthw").equal(both)

    def test_untouched_samples_are_bit_identical_in_half_precision(self):
        videos = clips("bcthw", dtype=torch.bfloat16)
        found = background_erase(videos, 1, torch.tensor(0.2), torch.tensor([False, True, False, False]))
        assert found.dtype == torch.bfloat16
        assert found[[0, 2, 3]].equal(videos[[0, 2, 3]])
        assert not found[1].equal(videos[1])

    @pytest.mark.parametrize("index", [1, torch.tensor([0, 1])])
    def test_gradcheck(self, index):
        videos = clips("bcthw", dtype=torch.float64, b=2, t=2, h=2, w=2).requires_grad_()
        lam = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v, w: background_erase(v, index, w), (videos, lam))


class TestFame:
    @each_layout
    @each_apply
    @pytest.mark.parametrize("masks", [still_masks, moving_masks])
    def test_frame_by_frame(self, layout, apply, masks):
        videos, masks = clips(layout, b=5), masks(layout, 5)
        found = fame(videos, masks, PERM, apply, layout=layout)
        for i, j in enumerate(PERM.tolist()):
            own, partner = dict(frames_of(videos[i], layout)), dict(frames_of(videos[j], layout))
            for place, frame in frames_of(found[i], layout):
                m = mask_at(masks, i, place, layout).float()
                mixed = m * own[place] + (1 - m) * partner[place]
                assert frame.equal(mixed if apply is None or apply[i] else own[place])

    def test_gradcheck(self):
        videos = clips("bcthw", dtype=torch.float64, b=5, t=2, h=2, w=2).requires_grad_()
        masks = still_masks("bcthw", 5, h=2, w=2)
        assert torch.autograd.gradcheck(lambda v: fame(v, masks, PERM, torch.tensor([True] * 4 + [False])), videos)


def plain_fame_mask(video: Tensor, beta: float, kernel_size: int) -> Tensor:
    """One clip (3, T, H, W), pixel by pixel, colours by the standard library and the blur by kornia."""
    _, frames, height, width = video.shape

    def scaled_blur(image):
        sigma = kernel_size / 3
        blurred = kornia.filters.gaussian_blur2d(image[None, None], (kernel_size, kernel_size), (sigma, sigma))[0, 0]
        return (blurred - blurred.min()) / (blurred.max() - blurred.min() + 1e-8)

    motion = sum((video[:, t] - video[:, t + 1]).abs().sum(0) for t in range(frames - 1)) / (frames - 1)
    by_motion = sorted(range(height * width), key=scaled_blur(motion).flatten().tolist().__getitem__)
    pixels = video.mean(1).flatten(1).T.tolist()
    codes = []
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        angle = 2 * math.pi * (2 * math.pi * hue)
        hx, hy = (saturation * math.cos(angle) + 1) / 2, (saturation * math.sin(angle) + 1) / 2
        codes.append(round(9 * hx + 1) + 10 * (round(9 * hy + 1) - 1) + 100 * (round(9 * value + 1) - 1))
    counts = {code: [0, 1] for code in range(1000)}
    foreground = by_motion[-int(0.5 * height * width) :]
    background = by_motion[: int(0.1 * height * width)]
    for kind, seeds in enumerate([foreground, background]):
        for pixel in seeds:
            counts[codes[pixel]][kind] += 1
    score = []
    for code in codes:
        f, q = counts[code][0] / (len(foreground) + 1e-8), counts[code][1] / (len(background) + 1000 + 1e-8)
        score.append(f / (f + q))
    score = scaled_blur(torch.tensor(score, dtype=torch.float64).reshape(height, width)).flatten().tolist()
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[sorted(range(len(score)), key=score.__getitem__)[-int(beta * height * width) :]] = True
    return mask.reshape(height, width)


class TestFameMask:
    @each_layout
    @pytest.mark.parametrize(("beta", "kernel_size"), [(0.5, None), (0.3, 7)])
    def test_pixel_by_pixel(self, layout, beta, kernel_size):
        videos = clips(layout, dtype=torch.float64, b=2, t=3, h=24, w=31)
        found = fame_foreground_mask(videos, beta=beta, kernel_size=kernel_size, layout=layout)
        assert found.dtype == torch.bool
        singles = (
            videos.transpose(1, 2) if layout == "btchw" else videos.flatten(0, 1) if layout == "bncthw" else videos
        )
        expected = torch.stack([plain_fame_mask(video, beta, kernel_size or 3) for video in singles])
        assert found.shape == ((2, 2, 24, 31) if layout == "bncthw" else (2, 24, 31))
        # Exact in float64 but for the half-to-even border of a bin, which moves a pixel or two at most.
        assert (found.flatten() != expected.flatten()).float().mean() < 0.005

    def test_finds_a_moving_square_of_its_own_colour(self):
        videos = torch.full((2, 3, 4, 32, 32), 0.3)
        truth = torch.zeros(32, 32, dtype=torch.bool)
        for t in range(4):
            videos[:, 0, t, 10:18, 6 + 4 * t : 14 + 4 * t] = 0.9
            truth[10:18, 6 + 4 * t : 14 + 4 * t] = True
        mask = fame_foreground_mask(videos, beta=truth.float().mean().item())
        assert (mask & truth).sum() > 0.8 * 2 * truth.sum()

    @settings(max_examples=10, deadline=None)
    @given(beta=st.floats(0, 1), height=st.integers(1, 25), width=st.integers(1, 25), seed=st.integers(0, 9))
    def test_the_share_is_exact(self, beta, height, width, seed):
        mask = fame_foreground_mask(clips("bcthw", b=2, t=2, h=height, w=width, seed=seed), beta=beta)
        assert mask.flatten(1).sum(1).tolist() == [int(beta * height * width)] * 2

    def test_a_still_clip_gives_a_mask_and_no_gradient(self):
        videos = clips("bcthw", t=1, h=12, w=12).expand(-1, -1, 3, -1, -1).clone().requires_grad_()
        mask = fame_foreground_mask(videos)
        assert mask.flatten(1).sum(1).tolist() == [72] * 4
        assert not mask.requires_grad

    def test_samples_do_not_see_each_other_and_half_precision_is_upcast(self):
        videos = clips("bcthw", h=20, w=20).half()
        mask = fame_foreground_mask(videos)
        assert fame_foreground_mask(videos[1:2])[0].equal(mask[1])
        assert mask.equal(fame_foreground_mask(videos.float()))


class TestActorCutMix:
    @each_layout
    @each_apply
    @pytest.mark.parametrize("make", [still_masks, moving_masks])
    def test_frame_by_frame(self, layout, apply, make):
        """The mask of sample 3 is empty, sample 2 is the middle one."""
        videos, targets, masks = clips(layout, b=5), labels(5), make(layout, 5)
        masks[3] = False
        self.check(videos, targets, masks, apply, layout, fixed=[2, 3])

    @each_layout
    def test_even_batch_with_a_full_mask(self, layout):
        videos, targets, masks = clips(layout, b=4), labels(4), still_masks(layout, 4)
        masks[3] = True
        self.check(videos, targets, masks, None, layout, fixed=[3])

    def check(self, videos, targets, masks, apply, layout, fixed):
        before = masks.clone()
        found = actor_cutmix(videos, targets, masks, apply, layout=layout)
        assert masks.equal(before)
        effective = masks.clone()
        effective[fixed] = True
        for i in range(len(videos)):
            j = len(videos) - 1 - i
            mixed = apply is None or bool(apply[i])
            own, partner = dict(frames_of(videos[i], layout)), dict(frames_of(videos[j], layout))
            for place, frame in frames_of(found.videos[i], layout):
                m, other = (mask_at(effective, k, place, layout).float() for k in (i, j))
                expected = m * own[place] + (1 - m) * (1 - other) * partner[place]
                assert frame.equal(expected if mixed else own[place])
            rho = effective[i].float().mean()
            w = 1 - (1 - rho) ** 4 if mixed else 1.0
            close(found.targets[i], w * targets[i] + (1 - w) * targets[j])
        for i in fixed:
            assert found.videos[i].equal(videos[i])
            assert found.targets[i].equal(targets[i])

    def test_an_invalid_partner_gives_black_yet_keeps_its_share_of_the_label(self):
        videos, masks = clips("bcthw", b=2) + 1, still_masks("bcthw", 2)
        masks[1] = False
        found = actor_cutmix(videos, torch.tensor([0, 1]), masks, num_classes=2)
        background = ~masks[0].expand_as(found.videos[0])
        assert (found.videos[0][background] == 0).all()
        assert found.targets[0, 1] > 0

    def test_gradcheck(self):
        videos, targets = clips("bcthw", dtype=torch.float64, b=5, t=2, h=2, w=2), labels(5).double()
        masks, apply = still_masks("bcthw", 5, h=2, w=2), torch.tensor([True, True, True, False, True])
        inputs = (videos.requires_grad_(), targets.requires_grad_())
        assert torch.autograd.gradcheck(lambda v, y: tuple(actor_cutmix(v, y, masks, apply)), inputs)


@each_layout
def test_masks_may_have_a_channel(layout):
    videos, targets, masks = clips(layout, b=5), labels(5), moving_masks(layout, 5)
    with_channel = masks.unsqueeze(layout.index("c"))
    assert fame(videos, with_channel, PERM, layout=layout).equal(fame(videos, masks, PERM, layout=layout))
    found, expected = (actor_cutmix(videos, targets, given, layout=layout) for given in (with_channel, masks))
    assert found.videos.equal(expected.videos)
    assert found.targets.equal(expected.targets)


CALLS = {
    "mixup": lambda v, y, a, layout: mixup_videos(v, y, PERM, torch.tensor(0.3), a),
    "videomix": lambda v, y, a, layout: videomix(v, y, PERM, torch.tensor([1, 0, 4, 3]), a),
    "erase": lambda v, y, a, layout: background_erase(v, torch.tensor([2, 0, 1, 1, 2]), 0.2, a, layout=layout),
    "fame": lambda v, y, a, layout: fame(v, still_masks(layout, 5), PERM, a, layout=layout),
    "actor": lambda v, y, a, layout: actor_cutmix(v, y, still_masks(layout, 5), a, layout=layout),
    "fame mask": lambda v, y, a, layout: fame_foreground_mask(v, layout=layout),
}


@each_layout
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_never_waits_for_the_device_nor_writes_in_place(call, layout):
    videos, targets, apply = clips(layout, b=5), labels(5), torch.tensor([True, False, False, True, True])
    before, hard = (videos.clone(), targets.clone()), torch.tensor([0, 1, 2, 0, 1])
    with NoSync():
        call(videos, targets, apply, layout)
        mixup_videos(videos, hard, PERM, 0.3, num_classes=3)
    assert videos.equal(before[0])
    assert targets.equal(before[1])


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_layouts_are_the_same_operation(call):
    videos, targets, apply = clips("bcthw", b=5), labels(5), torch.tensor([True, False, False, True, True])

    def first(result):
        return result if isinstance(result, Tensor) else result[0]

    expected = first(call(videos, targets, apply, "bcthw"))
    swapped = first(call(videos.transpose(1, 2), targets, apply, "btchw"))
    assert (swapped.transpose(1, 2) if swapped.ndim == 5 else swapped).equal(expected)
