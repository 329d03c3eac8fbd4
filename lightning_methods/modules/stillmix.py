"""StillMix as a module, and what it shares with the augmentations that it is compared with."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_methods.functional import Mixed, StillMixDraw, sample_stillmix, stillmix
from lightning_methods.functional._logits import check_choice, check_positive, check_range
from lightning_methods.functional._video import Layout, blend, check_videos, soft_targets
from lightning_methods.modules._repr import changed_arguments
from lightning_methods.modules.stillmix_bank import FrameBank

Source = Literal["bank", "batch"]


class VideoAugmentation(nn.Module):
    """Mixes the clips of a batch with other clips or frames, in train mode only.

    What is random is drawn apart from its use, so that a draw can be kept and replayed: `forward` is
    `mix(videos, targets, draw(videos))`. A subclass writes these two.

    Args:
        p: Probability with which a sample is mixed, in [0, 1].
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If an argument is out of its range.
    """

    #: Whether targets change.
    mixes_labels: bool = False
    #: Whether `mix` takes masks of the foreground.
    needs_masks: ClassVar[bool] = False

    def __init__(self, *, p: float, layout: Layout) -> None:
        super().__init__()
        check_range("p", p, 0, 1)
        check_choice("layout", layout, Layout)
        self.p = p
        self.layout = layout

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> Any:
        """The random numbers for a batch: a NamedTuple of tensors on its device, one of them `apply` (B,).

        Args:
            videos: The batch; only its shape and device are read.
            generator: The draw is made on its device; None: on the videos' device, from the global generator.
        """
        raise NotImplementedError

    def mix(self, videos: Tensor, targets: Tensor | None, draw: Any) -> Mixed:
        """New clips, and targets (B, K) where labels mix.

        Args:
            videos: Floating and normalised, of the module's layout.
            targets: Class indices (B,), or soft targets (B, K); None where they are not needed.
            draw: From `draw`.

        Raises:
            ValueError: If shapes, dtypes or options do not fit.
        """
        raise NotImplementedError

    def forward(self, videos: Tensor, targets: Tensor | None = None, draw: Any = None) -> Tensor | Mixed:
        """Clips, or `Mixed(videos, targets)` if targets are given; both as they are in eval mode.

        Args:
            videos: Floating and normalised, of the module's layout.
            targets: Class indices (B,), or soft targets (B, K).
            draw: An earlier draw to replay; None: a new one.
        """
        mixed = Mixed(videos, targets)  # type: ignore[arg-type]  # None comes out only where None came in
        if self.training:
            mixed = self.mix(videos, targets, self.draw(videos) if draw is None else draw)
        return mixed.videos if targets is None else mixed

    def extra_repr(self) -> str:
        """The constructor's arguments that differ from the defaults."""
        return changed_arguments(self, vars(self))


class StillMixAugment(VideoAugmentation):
    """Blends clips with motionless videos of frames that give their label away; the label stays.

    The maths is in `functional.stillmix`.

    Args:
        bank: The frames; None with `source="batch"`.
        layout: Dimensions of the clips: "btchw", "bcthw" or "bncthw".
        source: "bank"; or "batch": a random frame of another sample's clip, which needs no reference network.
        alpha: Of λ ~ Beta(alpha, beta), the weight of the clip.
        beta: Likewise.
        p: Probability with which a sample is blended.
        per_sample_lam: A λ for each sample instead of one for the batch (not in the authors' code).
        label_weight: Less than 1 mixes labels as well: this share of the clip's, the rest that of the frame's. An
            ablation of the authors, who use 0.5 in it.
        num_classes: K, for mixed labels where targets are class indices, and for those of the bank.
        inplace: Write into the clips that are given, which saves a second batch.

    Raises:
        ValueError: If an argument is out of its range; when used, if clips and bank do not fit, or if the only sample
            of a batch should be blended with another one's frame.

    Example:
        >>> import torch
        >>> augment = StillMixAugment(FrameBank(torch.zeros(8, 3, 2, 2)), p=1.0)
        >>> videos = torch.ones(2, 3, 4, 2, 2)
        >>> draw = augment.draw(videos)
        >>> bool((augment(videos, draw=draw) == draw.lam).all())
        True
        >>> augment.eval()(videos) is videos
        True
    """

    def __init__(
        self,
        bank: FrameBank | None = None,
        *,
        layout: Layout = "bcthw",
        source: Source = "bank",
        alpha: float = 200.0,
        beta: float = 200.0,
        p: float = 0.5,
        per_sample_lam: bool = False,
        label_weight: float = 1.0,
        num_classes: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(p=p, layout=layout)
        check_choice("source", source, Source)
        check_positive(alpha=alpha, beta=beta)
        check_range("label_weight", label_weight, 0, 1)
        if source == "batch" and bank is not None:
            raise ValueError("`bank` belongs to source='bank', but `source` is 'batch'")
        if label_weight < 1 and num_classes is None and source == "bank":
            raise ValueError("`num_classes` is missing: with label_weight < 1 the bank's labels become soft targets")
        self.bank = bank
        self.source = source
        self.alpha, self.beta = alpha, beta
        self.per_sample_lam = per_sample_lam
        self.label_weight = label_weight
        self.num_classes = num_classes
        self.inplace = inplace
        self.mixes_labels = label_weight < 1

    def draw(self, videos: Tensor, generator: torch.Generator | None = None) -> StillMixDraw:
        """λ, who is blended, and with which frame: of the bank, or of those of the batch after the sample's own."""
        check_videos(videos, self.layout)
        return sample_stillmix(
            len(videos),
            self._frames_to_choose_from(videos),
            alpha=self.alpha,
            beta=self.beta,
            p=self.p,
            clips=videos.shape[1] if self.layout == "bncthw" else 1,
            per_sample_lam=self.per_sample_lam,
            generator=generator,
            device=videos.device,
        )

    def mix(self, videos: Tensor, targets: Tensor | None, draw: StillMixDraw) -> Mixed:
        """Blended clips; targets as they are, or (B, K) with `label_weight` < 1."""
        frames, partners = self._from_batch(videos, draw) if self.source == "batch" else self._from_bank(videos, draw)
        mixed = stillmix(videos, frames, draw.lam, draw.apply, layout=self.layout, inplace=self.inplace)
        if self.mixes_labels:
            targets = self._mixed_targets(videos, targets, partners, draw.apply)
        return Mixed(mixed, targets)  # type: ignore[arg-type]  # None comes out only where None came in

    def _frames_to_choose_from(self, videos: Tensor) -> int:
        if self.source == "bank":
            return len(self._checked_bank())
        if len(videos) == 1:
            raise ValueError("source='batch' takes frames of another sample, but the batch has a single one")
        return (len(videos) - 1) * videos.shape[self.layout.index("t")]

    def _checked_bank(self) -> FrameBank:
        if self.bank is None:
            raise ValueError("`bank` is missing: give a FrameBank, or source='batch'")
        if self.mixes_labels and self.bank.targets is None:
            raise ValueError("`bank` has no targets, which label_weight < 1 needs")
        return self.bank

    def _from_bank(self, videos: Tensor, draw: StillMixDraw) -> tuple[Tensor, Tensor | None]:
        bank = self._checked_bank()
        own, clip = bank.frames.shape[1:], tuple(videos.shape[self.layout.index(dim)] for dim in "chw")
        if own != clip:
            raise ValueError(
                f"the bank's frames are {_by(own)} and the clips {_by(clip)} (channels, height, width; the layout is "
                f"{self.layout!r}): build the bank in the clips' size, or resize it once"
            )
        labels = bank.targets[draw.indices] if self.mixes_labels and bank.targets is not None else None
        return bank.sample(draw.indices, dtype=videos.dtype), labels

    def _from_batch(self, videos: Tensor, draw: StillMixDraw) -> tuple[Tensor, Tensor]:
        """A frame of another sample's clip for each clip, and who the other is."""
        sizes = dict(zip(self.layout, videos.shape, strict=True))

        def count(dim: str) -> Tensor:
            return torch.arange(sizes.get(dim, 1), device=videos.device)

        own = count("b") if draw.indices.ndim == 1 else count("b")[:, None]
        partner = (own + 1 + draw.indices // sizes["t"]) % sizes["b"]
        frame = draw.indices % sizes["t"]
        # The clip at the same place of the other sample, all its channels.
        place = {"b": partner[..., None], "n": count("n")[:, None], "c": count("c"), "t": frame[..., None]}
        row = torch.zeros_like(partner)[..., None]
        for dim in self.layout[:-2]:
            row = row * sizes[dim] + place[dim]
        # Rows of pixels: four times as fast as indexing by several tensors.
        rows = videos.detach().flatten(0, -3).index_select(0, row.flatten())
        return rows.reshape(*row.shape, *videos.shape[-2:]), partner

    def _mixed_targets(self, videos: Tensor, targets: Tensor | None, partners: Any, apply: Tensor) -> Tensor:
        if targets is None:
            raise ValueError("`targets` is missing: label_weight < 1 mixes labels")
        own = soft_targets(targets, self.num_classes, videos)
        if self.source == "batch":
            other = own[partners]
        else:
            try:
                other = soft_targets(partners.flatten(), self.num_classes, videos.new_empty(partners.numel()))
            except ValueError as error:
                raise ValueError(f"of `bank`, {error}") from error
        if partners.ndim == 2:  # a frame for each clip of the sample
            other = other.reshape(*partners.shape, -1).mean(1)
        return blend(own, other.to(own.dtype), self.label_weight, apply)


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))
