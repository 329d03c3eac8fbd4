"""The augmentation modules: what they draw, that a draw replays, and that evaluation is left alone."""

import copy
import pickle

import pytest
import torch
from no_sync import NoSync
from torch import nn

from lightning_methods.functional import Mixed, stillmix
from lightning_methods.modules import (
    ActorCutMix,
    BackgroundErase,
    Fame,
    FrameBank,
    StillMixAugment,
    VideoAugmentation,
    VideoMix,
    VideoMixup,
)

LAYOUTS = {"btchw": (4, 5, 3, 6, 7), "bcthw": (4, 3, 5, 6, 7), "bncthw": (4, 2, 3, 5, 6, 7)}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def clips(layout="bcthw", batch=4, dtype=torch.float32):
    shape = (batch, *LAYOUTS[layout][1:])
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bank(frames=6, **arguments):
    pixels = torch.rand(frames, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    return FrameBank(pixels, **arguments)


def seed(number=0):
    return torch.Generator().manual_seed(number)


AUGMENTATIONS = {
    "bank": lambda layout: StillMixAugment(bank(), layout=layout),
    "batch": lambda layout: StillMixAugment(source="batch", layout=layout, per_sample_lam=True),
    "labels": lambda layout: StillMixAugment(source="batch", layout=layout, label_weight=0.5, num_classes=4),
    "mixup": lambda layout: VideoMixup(p=0.5, num_classes=4, layout=layout),
    "videomix": lambda layout: VideoMix(p=0.5, num_classes=4, layout=layout),
    "erase": lambda layout: BackgroundErase(p=0.5, layout=layout),
    "fame": lambda layout: Fame(p=0.5, mean=[0.1, 0.2, 0.3], std=0.5, layout=layout),
}
each_augmentation = pytest.mark.parametrize("name", AUGMENTATIONS)


@each_layout
@each_augmentation
def test_a_draw_replays_and_evaluation_is_left_alone(name, layout):
    augment, videos, targets = AUGMENTATIONS[name](layout), clips(layout), torch.arange(4)
    before = videos.clone()
    draw = augment.draw(videos, seed(3))
    first, second = (augment(videos, targets, draw) for _ in range(2))
    assert isinstance(first, Mixed)
    assert torch.equal(first.videos, second.videos)
    assert torch.equal(first.targets, second.targets)
    assert first.videos.shape == videos.shape
    assert torch.equal(videos, before), "the batch was changed in place"
    assert not torch.equal(first.videos, videos), "nothing was mixed: choose another seed"
    assert torch.equal(first.videos[~draw.apply], videos[~draw.apply])
    assert augment.mixes_labels == (first.targets is not targets)
    other = augment(videos, targets, augment.draw(videos, seed(4)))
    assert not torch.equal(first.videos, other.videos)
    augment.eval()
    assert augment(videos) is videos
    same = augment(videos, targets, draw)
    assert same.videos is videos
    assert same.targets is targets


@each_augmentation
def test_a_batch_of_either_parity_in_half_precision_that_is_not_contiguous(name):
    augment = AUGMENTATIONS[name]("bcthw")
    for batch in (3, 4):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            videos = clips(batch=batch, dtype=dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
            mixed = augment(videos, torch.arange(batch))
            assert mixed.videos.dtype == dtype
            assert mixed.videos.isfinite().all()


@each_layout
@each_augmentation
def test_nothing_waits_for_the_device(name, layout):
    augment, videos, targets = AUGMENTATIONS[name](layout), clips(layout), torch.arange(4)
    with NoSync():
        augment(videos, targets)


@each_augmentation
def test_probability_0_changes_nothing_and_1_everything(name):
    videos, targets = clips(), torch.arange(4)
    for p, moved in ((0.0, False), (1.0, True)):
        augment = AUGMENTATIONS[name]("bcthw")
        augment.p = p
        draw = augment.draw(videos, seed())
        assert draw.apply.tolist() == [moved] * 4
        mixed = augment(videos, targets, draw)
        if not moved:
            assert torch.equal(mixed.videos, videos)
            if augment.mixes_labels:
                assert torch.equal(mixed.targets, torch.eye(4))


@each_augmentation
def test_state_copies_and_representation(name):
    augment = AUGMENTATIONS[name]("btchw")
    assert not augment.state_dict(), "a checkpoint of a module that holds it must stay plain"
    videos = clips("btchw")
    draw = augment.draw(videos, seed())
    for other in (copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))):
        again = other(videos, torch.arange(4), draw)
        assert torch.equal(again.videos, augment(videos, torch.arange(4), draw).videos)
    assert "layout='btchw'" in repr(augment)


@each_layout
@pytest.mark.parametrize("per_sample_lam", [False, True])
def test_stillmix_by_hand(layout, per_sample_lam):
    frames = bank()
    augment = StillMixAugment(frames, layout=layout, alpha=2.0, beta=5.0, p=0.6, per_sample_lam=per_sample_lam)
    videos = clips(layout)
    draw = augment.draw(videos, seed(1))
    assert draw.lam.shape == ((4,) if per_sample_lam else ())
    expected = videos.clone()
    for i in range(4):
        lam = draw.lam[i] if per_sample_lam else draw.lam
        for n in range(2 if layout == "bncthw" else 1):
            index = draw.indices[i, n] if layout == "bncthw" else draw.indices[i]
            for t in range(5):
                place = {"btchw": (i, t), "bcthw": (i, slice(None), t), "bncthw": (i, n, slice(None), t)}[layout]
                if draw.apply[i]:
                    expected[place] = lam * videos[place] + (1 - lam) * frames.frames[index]
    assert 0 < draw.apply.sum() < 4
    torch.testing.assert_close(augment(videos, draw=draw), expected)


@each_layout
def test_frames_of_the_batch_are_those_of_other_samples(layout):
    time = LAYOUTS[layout].index(5)
    augment = StillMixAugment(source="batch", layout=layout, p=1.0)
    # The value of a pixel says sample, clip and time.
    shape = LAYOUTS[layout]
    names = torch.arange(4.0).reshape(4, *[1] * (len(shape) - 1)).expand(shape) * 100
    names = names + torch.arange(5.0).reshape([-1 if dim == time else 1 for dim in range(len(shape))])
    if layout == "bncthw":
        names = names + 10 * torch.arange(2.0).reshape(1, 2, 1, 1, 1, 1)
    seen, differ = set(), layout != "bncthw"
    for number in range(40):
        draw = augment.draw(names, seed(number))
        lam = draw.lam
        still = (augment(names, draw=draw) - lam * names) / (1 - lam)
        still = still.movedim(time, 1)
        assert torch.allclose(still, still[:, :1].expand_as(still), atol=1e-3), "not one frame for all times"
        frame = still[:, 0].flatten(-3)[..., 0].round()  # (B,) or (B, N)
        partner, rest = frame // 100, frame % 100
        own = torch.arange(4.0).reshape(-1, *[1] * (frame.ndim - 1))
        assert (partner != own).all()
        if layout == "bncthw":
            assert torch.equal(rest // 10, torch.arange(2.0).expand(4, 2)), "the clip at the same place"
            differ |= not torch.equal(frame[:, 0], frame[:, 1] - 10)
        seen |= {(int(a), int(b)) for a, b in zip(partner.flatten(), (rest % 10).flatten(), strict=True)}
    assert len(seen) == 20, "every frame of every sample serves in time"
    assert differ, "each clip has a frame of its own"


def test_one_clip_of_a_sample_in_the_layout_with_clips():
    videos = clips("bncthw")[:, :1]
    for augment in (
        StillMixAugment(bank(), layout="bncthw", p=1.0),
        StillMixAugment(source="batch", layout="bncthw", p=1.0),
    ):
        draw = augment.draw(videos, seed())
        plain = copy.copy(augment)
        plain.layout = "bcthw"
        assert torch.equal(augment(videos, draw=draw)[:, 0], plain(videos[:, 0], draw=draw))


def test_gradients_reach_the_clips_weighted_and_the_bank_never():
    frames = bank()
    frames.frames.requires_grad_()
    videos = clips().requires_grad_()
    augment = StillMixAugment(frames, per_sample_lam=True, alpha=2.0, beta=2.0)
    draw = augment.draw(videos, seed(1))
    grad, none = torch.autograd.grad(augment(videos, draw=draw).sum(), [videos, frames.frames], allow_unused=True)
    weight = torch.where(draw.apply, draw.lam, 1.0)
    torch.testing.assert_close(grad, weight.reshape(-1, 1, 1, 1, 1).expand_as(grad))
    assert none is None


@pytest.mark.parametrize("layout", ["bcthw", "bncthw"])
def test_mixed_labels_by_hand(layout):
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    augment = StillMixAugment(bank(targets=labels), layout=layout, p=0.5, label_weight=0.75, num_classes=4)
    videos, targets = clips(layout), torch.tensor([3, 2, 1, 0])
    draw = augment.draw(videos, seed(1))
    mixed = augment(videos, targets, draw)
    for i in range(4):
        expected = torch.eye(4)[targets[i]]
        if draw.apply[i]:
            expected = 0.75 * expected + 0.25 * torch.eye(4)[labels[draw.indices[i]]].reshape(-1, 4).mean(0)
        torch.testing.assert_close(mixed.targets[i], expected)
    assert torch.equal(augment(videos, torch.eye(4)[targets], draw).targets, mixed.targets)
    torch.testing.assert_close(
        mixed.videos, stillmix(videos, augment.bank.frames[draw.indices], draw.lam, draw.apply, layout=layout)
    )


def test_mixed_labels_of_the_batch_are_those_of_the_frame():
    augment = StillMixAugment(source="batch", p=1.0, label_weight=0.0, num_classes=4)
    videos = torch.arange(4.0).reshape(-1, 1, 1, 1, 1).expand(4, 3, 5, 6, 7)
    draw = augment.draw(videos, seed(1))
    mixed = augment(videos, torch.arange(4), draw)
    partner = ((mixed.videos[:, 0, 0, 0, 0] - draw.lam * torch.arange(4)) / (1 - draw.lam)).round().long()
    assert torch.equal(mixed.targets, torch.eye(4)[partner])


def test_draws_are_uniform():
    augment = StillMixAugment(bank(), p=0.25, alpha=20.0, beta=60.0)
    videos = torch.zeros(2000, 3, 1, 6, 7)
    draw = augment.draw(videos, seed())
    assert draw.apply.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (torch.bincount(draw.indices) / 2000).tolist() == pytest.approx([1 / 6] * 6, abs=0.03)
    lams = torch.stack([augment.draw(videos[:1], seed(number)).lam for number in range(400)])
    assert lams.mean().item() == pytest.approx(0.25, abs=0.01), "the weight of the clip"
    erase = torch.stack([BackgroundErase().draw(videos[:1], seed(number)).lam for number in range(400)])
    assert 0 <= erase.min() < 0.01 < 0.29 < erase.max() <= 0.3


class Brighten(VideoAugmentation):
    """One of the user's own."""

    def draw(self, videos, generator=None):
        return Mixed(torch.rand(len(videos), generator=generator), None)

    def mix(self, videos, targets, draw):
        return Mixed(videos + draw.videos.reshape(-1, 1, 1, 1, 1), targets)


def test_an_augmentation_of_ones_own():
    augment, videos = Brighten(p=1.0, layout="bcthw"), clips()
    draw = augment.draw(videos, seed())
    assert torch.equal(augment(videos, draw=draw), videos + draw[0].reshape(-1, 1, 1, 1, 1))
    assert augment.eval()(videos) is videos


def test_inside_of_a_network_it_leaves_the_checkpoint_plain():
    network = nn.Sequential(StillMixAugment(bank(), p=1.0), nn.Flatten(), nn.Linear(630, 2))
    assert set(network.state_dict()) == {"2.weight", "2.bias"}
    videos = clips()
    assert not torch.equal(network(videos), network.eval()(videos))


def test_actor_cutmix_takes_masks():
    augment, videos = ActorCutMix(p=1.0, num_classes=4), clips()
    masks = torch.zeros(4, 6, 7, dtype=torch.bool)
    masks[:, :3] = True
    mixed = augment(videos, torch.arange(4), masks=masks)
    assert torch.equal(mixed.videos[..., :3, :], videos[..., :3, :])
    assert torch.equal(mixed.videos[..., 3:, :], videos.flip(0)[..., 3:, :])
    assert augment.eval()(videos, torch.arange(4), masks=masks).videos is videos
    with pytest.raises(ValueError, match="`masks` is missing"):
        augment.train()(videos, torch.arange(4))


def test_fame_undoes_the_normalisation_before_it_looks_for_the_foreground():
    videos = torch.full((2, 3, 2, 8, 8), 0.2)
    videos[:, 0, 0, :, :4] = 1.0
    videos[1] += 0.1
    plain, normalised = Fame(p=1.0), Fame(p=1.0, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    mean, std = (torch.tensor(values).reshape(3, 1, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    draw = plain.draw(videos, seed())._replace(perm=torch.tensor([1, 0]))
    torch.testing.assert_close(normalised((videos - mean) / std, draw=draw) * std + mean, plain(videos, draw=draw))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StillMixAugment(bank(), p=1.5), "`p`"),
        (lambda: StillMixAugment(bank(), layout="bthwc"), "`layout`"),
        (lambda: StillMixAugment(bank(), source="disk"), "`source`"),
        (lambda: StillMixAugment(bank(), source="batch"), "`bank` belongs to source='bank'"),
        (lambda: StillMixAugment(bank(), alpha=0.0), "`alpha`"),
        (lambda: StillMixAugment(bank(), beta=-1.0), "`beta`"),
        (lambda: StillMixAugment(bank(), label_weight=1.5), "`label_weight`"),
        (lambda: StillMixAugment(bank(), label_weight=0.5), "`num_classes` is missing"),
        (lambda: VideoMixup(alpha=0.0), "`alpha`"),
        (lambda: VideoMix(alpha=0.0), "`alpha`"),
        (lambda: VideoMix(p=-0.1), "`p`"),
        (lambda: BackgroundErase(weight=2.0), "`weight`"),
        (lambda: Fame(beta=-0.5), "`beta`"),
    ],
)
def test_errors_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("augment", "videos", "targets", "message"),
    [
        (lambda: StillMixAugment(), clips(), None, "`bank` is missing"),
        (lambda: StillMixAugment(bank(), label_weight=0.5, num_classes=4), clips(), None, "`bank` has no targets"),
        (
            lambda: StillMixAugment(bank(targets=torch.arange(6)), label_weight=0.5, num_classes=4, p=1.0),
            clips(batch=64),
            torch.arange(64) % 4,
            r"of `bank`, `targets` must hold class indices in \[0, 4\)",
        ),
        (lambda: StillMixAugment(bank()), clips().byte(), None, "`videos` must be floating"),
        (lambda: StillMixAugment(bank()), clips()[0], None, "`videos` must have shape"),
        (lambda: StillMixAugment(bank()), clips("btchw"), None, "the clips 5 x 6 x 7 .*layout is 'bcthw'"),
        (lambda: StillMixAugment(source="batch"), clips()[:1], None, "source='batch' .*a single one"),
        (lambda: StillMixAugment(source="batch", label_weight=0.5), clips(), None, "`targets` is missing"),
        (lambda: StillMixAugment(source="batch", label_weight=0.5), clips(), torch.arange(4), "`num_classes`"),
        (lambda: VideoMixup(num_classes=4), clips(), None, "`targets` is missing"),
        (lambda: VideoMix(), clips(), torch.arange(4), "`num_classes` is missing"),
        (lambda: VideoMixup(num_classes=3), clips(), torch.arange(4), r"class indices in \[0, 3\)"),
        (lambda: VideoMixup(layout="bncthw", num_classes=4), clips(), torch.arange(4), "`videos` must have shape"),
        (lambda: Fame(layout="bncthw"), clips(), None, "`videos` must have shape"),
    ],
)
def test_errors_where_it_is_used(augment, videos, targets, message):
    with pytest.raises(ValueError, match=message):
        augment()(videos, targets)
