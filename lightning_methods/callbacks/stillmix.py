"""Mixing the clips of training batches: StillMix, and the augmentations that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, distributed

from lightning_methods.attach import AddressLike, Method, Step, address
from lightning_methods.attach._lightning import LightningModule, Trainer
from lightning_methods.attach.address import describe
from lightning_methods.functional._seeds import seeded
from lightning_methods.functional._video import Layout
from lightning_methods.modules import FrameBank, FrameBankSpec, StillMixAugment, VideoAugmentation
from lightning_methods.modules.stillmix import Source


class _MixesVideos(Method):
    """Rewrites clips, and labels where they mix; every rank draws for itself.

    A draw follows from the seed, the rank and how many there were before. So its number is all that a checkpoint has
    to hold, on any number of ranks.
    """

    exact_over_ranks = False

    def __init__(
        self,
        *,
        video: AddressLike,
        target: AddressLike,
        seed: int | None,
        log: bool | Literal["epoch"],
        name: str,
    ) -> None:
        super().__init__(name=name, log=log)
        self.video = address(video)
        self.target = address(target)
        self.seed = seed
        self._seed = 0
        self._draws = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: attaches, and starts the draws anew."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._seed = torch.initial_seed() if self.seed is None else self.seed
            self._draws = 0

    def state_dict(self) -> dict[str, Any]:
        """What the draws to come follow from."""
        return {**super().state_dict(), "seed": self._seed, "draws": self._draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._seed, self._draws = state_dict["seed"], state_dict["draws"]

    def _videos(self, step: Step) -> Tensor:
        videos = step[self.video]
        if not isinstance(videos, Tensor):
            raise ValueError(f"Expected `video` at {self.video!r} to be a batch of clips, but got {describe(videos)}.")
        return videos

    def _mix(self, step: Step, augment: VideoAugmentation, **more: Tensor) -> Mapping[str, Tensor]:
        """Mixes the batch; returns what there is to log."""
        videos = self._videos(step)
        targets = step[self.target] if augment.mixes_labels else None
        # On the host: numbers drawn on the device would differ from one kind of device to the next.
        generator = seeded(self.name, self._seed, step.trainer.global_rank, self._draws)
        self._draws += 1
        try:
            draw = augment.draw(videos, generator)
            mixed = augment.mix(videos, targets, draw, **more)
        except ValueError as error:
            where = f"`video` at {self.video!r}" + (f", `target` at {self.target!r}" if augment.mixes_labels else "")
            raise ValueError(f"{type(self).__name__}, {where}: {error}.") from error
        step[self.video] = mixed.videos
        if augment.mixes_labels:
            step[self.target] = mixed.targets
        if not step.logs:
            return {}
        logged = {"mixed_fraction": draw.apply.float().mean()}
        return logged | ({"lam": draw.lam.mean()} if hasattr(draw, "lam") else {})


class StillMix(_MixesVideos):
    r"""Blends training clips with still frames that give their label away, and keeps the clips' labels.

    Before each training step, $\tilde x_i = \lambda x_i + (1 - \lambda) \mathrm{repeat}_T(z_i)$ for the samples drawn
    with probability `p`, on the batch as it reaches the module (already cropped and normalised). The maths is in
    `functional.stillmix`; the module and its loss stay as they are. Logs `stillmix/lam`, `stillmix/mixed_fraction`,
    and after the bank was filled `stillmix/bank_size` and `stillmix/min_score`.

    Args:
        bank: The frames: a `FrameBank`, or a `FrameBankSpec`, from which each rank makes its own before training. None
            with `source="batch"`.
        video: Address of the clips, floating and normalised; written.
        target: Address of the labels; read and written only if `label_weight` is less than 1.
        layout: Dimensions of the clips: `"btchw"`, `"bcthw"`, or `"bncthw"` with N clips of a sample.
        source: `"bank"`; or `"batch"`: a random frame of another sample's clip, which needs no reference network.
        alpha: Of λ ~ Beta(alpha, beta), the weight of the clip, one for a batch. The default pair is almost a fixed
            half. Published for Kinetics: (20, 60) for Swin, (2, 2) for SlowFast.
        beta: Likewise.
        p: Probability with which a sample is blended; 0 is off. Published: 0.125 to 0.75.
        per_sample_lam: A λ for each sample (not in the authors' code).
        label_weight: Less than 1 mixes labels too, as an ablation of the authors does with 0.5: this share of the
            clip's label, the rest of the frame's. The step then gets soft targets (B, K).
        num_classes: K, for mixed labels.
        refresh_every_n_epochs: Choose another bank after so many epochs; None: once, as in all published settings.
        start_epoch: Epoch, counted from 0, in which blending starts.
        inplace: Write into the batch, which saves the memory of a second one and half of the time. Where nothing else
            needs the clips as they were: no other method, and no dataset that hands out its own tensors.
        resize: If the bank's frames are not of the clips' size, resize them at the first batch, once.
        seed: Of the draws; None: that of PyTorch's global generator (`seed_everything`). The choice of frames has
            its own, in the recipe.
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If an argument is out of its range, at the first step if clips and bank do not fit.

    Source:
        Li, Liu, Zhang, Li, "Mitigating and Evaluating Static Bias of Action Representations in the Background and
        the Foreground", ICCV 2023 (arXiv 2211.12883). The settings were read in the authors' code.

    Example:
        >>> import torch
        >>> StillMix(FrameBank(torch.zeros(8, 3, 4, 4)), layout="btchw", p=0.25)
        StillMix(bank=FrameBank(8 frames of 3x4x4, float32), layout='btchw', p=0.25)
    """

    def __init__(
        self,
        bank: FrameBank | FrameBankSpec | None = None,
        *,
        video: AddressLike = "batch.0",
        target: AddressLike = "batch.1",
        layout: Layout = "bcthw",
        source: Source = "bank",
        alpha: float = 200.0,
        beta: float = 200.0,
        p: float = 0.5,
        per_sample_lam: bool = False,
        label_weight: float = 1.0,
        num_classes: int | None = None,
        refresh_every_n_epochs: int | None = None,
        start_epoch: int = 0,
        inplace: bool = False,
        resize: bool = False,
        seed: int | None = None,
        log: bool | Literal["epoch"] = True,
        name: str = "stillmix",
    ) -> None:
        super().__init__(video=video, target=target, seed=seed, log=log, name=name)
        self._augment = StillMixAugment(
            bank if isinstance(bank, FrameBank) else None,
            layout=layout,
            source=source,
            alpha=alpha,
            beta=beta,
            p=p,
            per_sample_lam=per_sample_lam,
            label_weight=label_weight,
            num_classes=num_classes,
            inplace=inplace,
        )
        if (bank is None) == (source == "bank"):
            raise ValueError(f"Expected `bank` with source='bank' and only then, but got {bank!r} with {source!r}.")
        if refresh_every_n_epochs is not None and (refresh_every_n_epochs < 1 or not isinstance(bank, FrameBankSpec)):
            raise ValueError(
                f"Expected `refresh_every_n_epochs` to be at least 1, and `bank` a FrameBankSpec to choose from, but "
                f"got {refresh_every_n_epochs} with {bank!r}."
            )
        if start_epoch < 0:
            raise ValueError(f"Expected `start_epoch` to be at least 0, but got {start_epoch}.")
        self.bank = bank
        self.layout = layout
        self.source = source
        self.alpha, self.beta = alpha, beta
        self.p = p
        self.per_sample_lam = per_sample_lam
        self.label_weight = label_weight
        self.num_classes = num_classes
        self.refresh_every_n_epochs = refresh_every_n_epochs
        self.start_epoch = start_epoch
        self.inplace = inplace
        self.resize = resize
        self._keys: tuple[str, ...] = ()
        self._keys_of_ranks: list[list[str]] = []
        self._restored: list[list[str]] = []
        self._drawn_at = 0
        self._resized = False
        self._news: dict[str, float] = {}

    def rewrite(self, step: Step) -> None:
        """Blends the batch."""
        if step.epoch < self.start_epoch:
            self.did_something = True  # waiting is what it was told to do
            return
        if self._augment.bank is None:  # the learning-rate finder trains before our hooks
            self._fill(step.trainer)
        if self.resize and not self._resized:
            self._resize(self._videos(step))
        logged = self._mix(step, self._augment)
        if step.logs:
            step.note({**logged, **self._news})
            self._news = {}

    @property
    def active(self) -> bool:
        """False with probability 0: then the engine leaves the step alone."""
        return self.p > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: attaches, and chooses the frames, so that bad scores fail here."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self._resized:  # the frames in their own size are gone, and the clips may be of another one now
                self._augment.bank = None
            self._restored, self._drawn_at, self._resized, self._news = [], 0, False, {}
            if self._spec is not None:
                self._choose(self._spec, trainer, 0)
            elif isinstance(self.bank, FrameBank):
                self._augment.bank = self.bank
                self._news = {"bank_size": float(len(self.bank))}
            self._augment.to(trainer.strategy.root_device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once a checkpoint's state is there: reads the frames, of the checkpoint or as chosen now."""
        super().on_fit_start(trainer, pl_module)
        self._fill(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before training: a run that was resumed between two epochs may be due for other frames."""
        super().on_train_start(trainer, pl_module)
        self._fill(trainer)  # again: the learning-rate finder restores a state after `on_fit_start`
        self._refresh_if_due(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before each training epoch: chooses other frames if due."""
        super().on_train_epoch_start(trainer, pl_module)
        self._refresh_if_due(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the end: leaves the module, and the device's memory."""
        super().teardown(trainer, pl_module, stage)
        self._augment.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Which frames each rank has and since when, never their pixels; and the draws."""
        return {**super().state_dict(), "keys": self._keys_of_ranks, "drawn_at": self._drawn_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; the frames are read before training starts."""
        super().load_state_dict(state_dict)
        self._restored, self._drawn_at = state_dict["keys"], state_dict["drawn_at"]

    @property
    def _spec(self) -> FrameBankSpec | None:
        """The recipe, if there is one to be used."""
        return self.bank if isinstance(self.bank, FrameBankSpec) and self.active else None

    def _refresh_if_due(self, trainer: Trainer) -> None:
        every = self.refresh_every_n_epochs
        if self._spec is not None and every and trainer.current_epoch >= self._drawn_at + every:
            self._choose(self._spec, trainer, trainer.current_epoch)
            self._fill(trainer)

    def _choose(self, spec: FrameBankSpec, trainer: Trainer, epoch: int) -> None:
        choice = spec.choose(trainer.global_rank, epoch)
        self._keys, self._drawn_at = choice.keys, epoch
        self._news = {"bank_size": float(len(choice.keys)), "min_score": choice.min_score}

    def _fill(self, trainer: Trainer) -> None:
        """Reads the frames of a recipe, unless they are those that are there."""
        if self._spec is None:
            return
        if self._restored:
            self._restore(self._spec, trainer)
        if self._augment.bank is None or self._augment.bank.keys != self._keys:
            self._augment.bank = self._spec.read(self._keys).to(trainer.strategy.root_device)
            self._resized = False
        self._keys_of_ranks = _of_all_ranks(list(self._keys))

    def _restore(self, spec: FrameBankSpec, trainer: Trainer) -> None:
        """The frames that the checkpoint names for this rank; new ones if it cannot be."""
        ranks, self._restored = self._restored, []
        keys = tuple(ranks[trainer.global_rank]) if trainer.global_rank < len(ranks) else ()
        missing = spec.missing(keys)
        if keys and not missing:
            self._keys, self._news = keys, {}
            return
        if missing:
            rank_zero_warn(
                f"{len(missing)} of the {len(keys)} frames in the checkpoint's bank are not among the scores, "
                f"{missing[0]!r} for one: going on with frames that are chosen anew."
            )
        self._choose(spec, trainer, self._drawn_at)

    def _resize(self, videos: Tensor) -> None:
        bank = self._augment.bank
        if bank is not None and bank.frames.shape[-2:] != videos.shape[-2:]:
            height, width = videos.shape[-2:]
            self._augment.bank = bank.resized((height, width))
        self._resized = True


class VideoAugment(_MixesVideos):
    """Applies a video augmentation to training batches: the methods that StillMix is compared with, or your own.

    Attaches like `StillMix`. Where labels mix, the step gets soft targets (B, K), which `F.cross_entropy` takes as they
    are. Logs `video_augment/mixed_fraction`, and `video_augment/lam` where there is one.

    Args:
        module: `modules.VideoMixup`, `VideoMix`, `BackgroundErase`, `Fame`, `ActorCutMix`, or a subclass of
            `modules.VideoAugmentation`.
        video: Address of the clips, floating and normalised; written.
        target: Address of the labels; read and written only if the module mixes labels.
        masks: Address of the masks that `ActorCutMix` needs.
        seed: Of the draws; None: that of PyTorch's global generator (`seed_everything`).
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If `masks` are missing or too much, at the first step if clips and labels do not fit.

    Example:
        >>> from lightning_methods.modules import VideoMixup
        >>> VideoAugment(VideoMixup(p=0.5, num_classes=4))
        VideoAugment(module=VideoMixup(p=0.5, num_classes=4))
    """

    def __init__(
        self,
        module: VideoAugmentation,
        *,
        video: AddressLike = "batch.0",
        target: AddressLike = "batch.1",
        masks: AddressLike | None = None,
        seed: int | None = None,
        log: bool | Literal["epoch"] = True,
        name: str = "video_augment",
    ) -> None:
        super().__init__(video=video, target=target, seed=seed, log=log, name=name)
        if not isinstance(module, VideoAugmentation):
            raise ValueError(f"Expected `module` to be a VideoAugmentation, but got {describe(module)}.")
        if module.needs_masks != (masks is not None):
            needs = "needs" if module.needs_masks else "takes no"
            raise ValueError(f"{module!r} {needs} `masks`, but got {masks!r}.")
        self.module = module
        self.masks = None if masks is None else address(masks)

    def rewrite(self, step: Step) -> None:
        """Mixes the batch."""
        masks = {} if self.masks is None else {"masks": step[self.masks]}
        if logged := self._mix(step, self.module, **masks):
            step.note(logged)

    @property
    def active(self) -> bool:
        """False with probability 0: then the engine leaves the step alone."""
        return self.module.p > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: attaches, and brings the module's buffers to the device."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.module.to(trainer.strategy.root_device)


def _of_all_ranks(keys: list[str]) -> list[list[str]]:
    """Lightning saves the state of rank 0 only, which therefore holds everyone's."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [keys]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, keys)
    return gathered
