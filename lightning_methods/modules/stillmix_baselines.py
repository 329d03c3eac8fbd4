"""The augmentations that StillMix is compared with, as modules; the maths is in `functional`."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional import (
    Mixed,
    actor_cutmix,
    background_erase,
    fame,
    fame_foreground_mask,
    mixup_videos,
    videomix,
    videomix_box,
)
from lightning_methods.functional._logits import check_positive, check_range
from lightning_methods.functional._video import Layout, check_videos, moved, sample_beta
from lightning_methods.modules.stillmix import VideoAugmentation
from lightning_methods.modules.stillmix_bank import Numbers


class MixupDraw(NamedTuple):
    """Partners (B,), λ () and who is mixed (B,)."""

    perm: Tensor
    lam: Tensor
    apply: Tensor


class VideoMixDraw(NamedTuple):
    """Partners (B,), the box (4,) and who is mixed (B,)."""

    perm: Tensor
    box: Tensor
    apply: Tensor


class EraseDraw(NamedTuple):
    """The still frame of each clip, (B,) or (B, N), its weight () and who is mixed (B,)."""

    frame_index: Tensor
    lam: Tensor
    apply: Tensor


class FameDraw(NamedTuple):
    """Partners (B,) and who is mixed (B,)."""

    perm: Tensor
    apply: Tensor


class CutMixDraw(NamedTuple):
    """Who is mixed (B,)."""

    apply: Tensor


class _Source:
    """Draws on the generator's device, or on that of the videos, and brings the result to the videos."""

    def __init__(self, videos: Tensor, generator: torch.Generator | None) -> None:
        self.target = videos.device
        self.batch = len(videos)
        self.generator = generator
        self.device = videos.device if generator is None else generator.device

    def apply(self, p: float) -> Tensor:
        return moved(torch.rand(self.batch, generator=self.generator, device=self.device) < p, self.target)

    def perm(self) -> Tensor:
        return moved(torch.randperm(self.batch, generator=self.generator, device=self.device), self.target)

    def below(self, limit: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator, device=self.device)

    def beta(self, alpha: float, beta: float) -> Tensor:
        return sample_beta(alpha, beta, generator=self.generator, device=self.device)


class VideoMixup(VideoAugmentation):
    """Mixup of clips and labels: `functional.mixup_videos`.

    Args:
        p: Probability with which a sample is mixed. Published comparison: 0.25 to 1, by data set.
        alpha: Of λ ~ Beta(alpha, alpha), one for a batch.
        num_classes: K, needed where targets are class indices.
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If an argument is out of its range.
    """

    mixes_labels = True

    def __init__(
        self, *, p: float = 1.0, alpha: float = 0.2, num_classes: int | None = None, layout: Layout = "bcthw"
    ) -> None:
        super().__init__(p=p, layout=layout)
        check_positive(alpha=alpha)
        self.alpha = alpha
        self.num_classes = num_classes

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> MixupDraw:
        """λ, partners and who is mixed."""
        source = _Source(videos, generator)
        lam = moved(source.beta(self.alpha, self.alpha), source.target)
        return MixupDraw(source.perm(), lam, source.apply(self.p))

    def mix(self, videos: Tensor, targets: Tensor | None, draw: MixupDraw) -> Mixed:
        """Clips and targets mixed alike."""
        check_videos(videos, self.layout)
        return mixup_videos(videos, _given(targets), draw.perm, draw.lam, draw.apply, num_classes=self.num_classes)


class VideoMix(VideoAugmentation):
    """VideoMix, a box of another clip in all frames: `functional.videomix`.

    Args:
        p: Probability with which a sample is mixed. Published comparison: 0.25 to 1, by data set.
        alpha: Of λ ~ Beta(alpha, alpha), one box for a batch.
        num_classes: K, needed where targets are class indices.
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If an argument is out of its range.
    """

    mixes_labels = True

    def __init__(
        self, *, p: float = 1.0, alpha: float = 1.0, num_classes: int | None = None, layout: Layout = "bcthw"
    ) -> None:
        super().__init__(p=p, layout=layout)
        check_positive(alpha=alpha)
        self.alpha = alpha
        self.num_classes = num_classes

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> VideoMixDraw:
        """The box, partners and who is mixed."""
        source = _Source(videos, generator)
        height, width = videos.shape[-2:]
        lam, cx, cy = source.beta(self.alpha, self.alpha), source.below(width, ()), source.below(height, ())
        box = videomix_box(lam=lam, cx=cx, cy=cy, height=height, width=width).box
        return VideoMixDraw(source.perm(), moved(box, source.target), source.apply(self.p))

    def mix(self, videos: Tensor, targets: Tensor | None, draw: VideoMixDraw) -> Mixed:
        """The box pasted, targets by the areas."""
        check_videos(videos, self.layout)
        return videomix(videos, _given(targets), draw.perm, draw.box, draw.apply, num_classes=self.num_classes)


class BackgroundErase(VideoAugmentation):
    """Background Erasing, a still frame of the clip itself; labels stay: `functional.background_erase`.

    Args:
        p: Probability with which a sample is mixed. Published comparison: 0.25 to 1, by data set.
        weight: Largest weight of the still frame, λ ~ weight · Beta(1, 1), one for a batch.
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, *, p: float = 1.0, weight: float = 0.3, layout: Layout = "bcthw") -> None:
        super().__init__(p=p, layout=layout)
        check_range("weight", weight, 0, 1)
        self.weight = weight

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> EraseDraw:
        """The frame of each clip, its weight, and who is mixed."""
        check_videos(videos, self.layout)
        source = _Source(videos, generator)
        clips = tuple(videos.shape[: len(self.layout) - 4])
        index = source.below(videos.shape[self.layout.index("t")], clips)
        lam = self.weight * source.beta(1.0, 1.0)
        return EraseDraw(moved(index, source.target), moved(lam, source.target), source.apply(self.p))

    def mix(self, videos: Tensor, targets: Tensor | None, draw: EraseDraw) -> Mixed:
        """Clips with their own still frame; targets as they are."""
        mixed = background_erase(videos, draw.frame_index, draw.lam, draw.apply, layout=self.layout)
        return Mixed(mixed, targets)  # type: ignore[arg-type]  # None comes out only where None came in


class Fame(VideoAugmentation):
    """FAME, the moving foreground before another clip; labels stay.

    The maths is in `functional.fame` and `functional.fame_foreground_mask`.

    Args:
        p: Probability with which a sample is mixed. Published comparison: 0.25 to 0.75, by data set.
        beta: Share of foreground.
        mean: Of the clips' normalisation, for values in [0, 1]: the mask is found in the colours. One number or C.
        std: Likewise.
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If an argument is out of its range.
    """

    mean: Numbers
    std: Numbers
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        *,
        p: float = 1.0,
        beta: float = 0.5,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        layout: Layout = "bcthw",
    ) -> None:
        super().__init__(p=p, layout=layout)
        check_range("beta", beta, 0, 1)
        self.beta = beta
        self.mean, self.std = mean, std
        shape = [-1 if dim == "c" else 1 for dim in layout]
        for name, numbers in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.as_tensor(numbers).reshape(shape).float(), persistent=False)

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> FameDraw:
        """Partners and who is mixed."""
        source = _Source(videos, generator)
        return FameDraw(source.perm(), source.apply(self.p))

    def mix(self, videos: Tensor, targets: Tensor | None, draw: FameDraw) -> Mixed:
        """Clips with the partners' background; targets as they are."""
        check_videos(videos, self.layout)
        colours = videos.detach() * self._std + self._mean
        masks = fame_foreground_mask(colours, beta=self.beta, layout=self.layout)
        mixed = fame(videos, masks, draw.perm, draw.apply, layout=self.layout)
        return Mixed(mixed, targets)  # type: ignore[arg-type]  # None comes out only where None came in


class ActorCutMix(VideoAugmentation):
    """ActorCutMix, the actors before another clip's background: `functional.actor_cutmix`.

    `forward` and `mix` take one more argument, the masks.

    Args:
        p: Probability with which a sample is mixed. Published comparison: 0.25 to 0.75, by data set.
        num_classes: K, needed where targets are class indices.
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If an argument is out of its range.
    """

    mixes_labels = True
    needs_masks = True

    def __init__(self, *, p: float = 1.0, num_classes: int | None = None, layout: Layout = "bcthw") -> None:
        super().__init__(p=p, layout=layout)
        self.num_classes = num_classes

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> CutMixDraw:
        """Who is mixed; the partner is the sample at the mirrored place."""
        return CutMixDraw(_Source(videos, generator).apply(self.p))

    def mix(self, videos: Tensor, targets: Tensor | None, draw: CutMixDraw, masks: Tensor | None = None) -> Mixed:
        """Clips with the partners' background, targets by the share of actors.

        Args:
            videos: Floating and normalised, of the module's layout.
            targets: Class indices (B,), or soft targets (B, K).
            draw: From `draw`.
            masks: True on actors: the videos' shape without channels, or without channels and frames.
        """
        if masks is None:
            raise ValueError("`masks` is missing: ActorCutMix needs to know where the actors are")
        return actor_cutmix(
            videos, _given(targets), masks, draw.apply, layout=self.layout, num_classes=self.num_classes
        )

    def forward(
        self, videos: Tensor, targets: Tensor | None = None, draw: CutMixDraw | None = None, masks: Tensor | None = None
    ) -> Tensor | Mixed:
        """As in the other augmentations, with masks as `mix` takes them."""
        if not self.training:
            return super().forward(videos, targets)
        return self.mix(videos, targets, self.draw(videos) if draw is None else draw, masks)


def _given(targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ValueError("`targets` is missing: this augmentation mixes labels")
    return targets
