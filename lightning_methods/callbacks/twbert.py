"""TW-BERT: words that follow trajectories, and the contrast that aligns videos and texts before they are fused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_methods.attach import AddressError, AddressLike, Method, MomentumTeacher, Parts, Step, address
from lightning_methods.attach._lightning import LightningModule, Trainer
from lightning_methods.attach.address import Address, AnyAddress, describe
from lightning_methods.attach.momentum import follow
from lightning_methods.callbacks._attention import replaced_attention
from lightning_methods.callbacks._twbert_parts import Queue, Trained
from lightning_methods.functional import (
    fine_grained_contrastive_loss,
    hard_negative_matching_loss,
    video_text_contrastive_loss,
)
from lightning_methods.functional._gather import gather_batch
from lightning_methods.functional._logits import upcast
from lightning_methods.functional._seeds import seeded
from lightning_methods.modules import TimmTrajectoryWordAttention, TrajectoryWordSelfAttention

#: The authors keep the temperature in here.
_TEMPERATURES = (0.001, 0.5)


class TrajectoryWordAlignment(Method):
    """Replaces attention over [words; video CLS; patches] by one in which words follow trajectories.

    In place of one softmax over all patches of all frames, a word attends within each frame by itself, and then to the
    resulting trajectory and the other words; patches attend within their frame. The maths is in
    `functional.trajectory_word_attention`. Every new module starts from the projections of the one it replaces, used
    for both stages.

    The trained model needs the new modules: attach the callback again, or call `apply`, before loading a checkpoint;
    `export` gives a model that needs neither. `undo` gives back the old modules as they were: weights are copied,
    because the two stages learn different ones.

    Args:
        modules: Addresses of self-attention modules over the fused sequence, torch's `MultiheadAttention` or timm's
            `Attention`, such as `"module.fusion.layers.*.self_attn"`.
        num_frames: T, frames of a video.
        patches_per_frame: S. A sequence has L words, one [CLS] of the video, and T·S patches, frame by frame.
        norm: Address of the LayerNorm whose weights the norm of the trajectories starts from; None: ones and zeros.
        dropout: On the attention weights; None: as the replaced module.
        name: Key in checkpoints.

    Raises:
        AddressError: If an address matches nothing.
        TypeError: If it matches something else.
        ValueError: If an argument is out of its range, and in the first step if the sequence cannot be that of L words,
            T and S.

    Source:
        Yang et al., "Learning Trajectory-Word Alignments for Video-Language Tasks", ICCV 2023 (arXiv 2301.01953).

    Example:
        >>> TrajectoryWordAlignment("module.fusion.*.attention", num_frames=8, patches_per_frame=49)
        TrajectoryWordAlignment(modules='module.fusion.*.attention', num_frames=8, patches_per_frame=49)
    """

    changes_inference = True

    def __init__(
        self,
        modules: list[str] | str,
        *,
        num_frames: int,
        patches_per_frame: int,
        norm: str | None = None,
        dropout: float | None = None,
        name: str = "trajectory",
    ) -> None:
        super().__init__(name=name)
        _check_range("num_frames", num_frames, 1)
        _check_range("patches_per_frame", patches_per_frame, 1)
        _check_range("dropout", dropout or 0.0, 0, 1)
        self.modules = Parts(modules)
        self.num_frames, self.patches_per_frame = num_frames, patches_per_frame
        self.norm = None if norm is None else Parts(norm)
        self.dropout = dropout

    def replacements(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """A trajectory-word attention for each module at the addresses."""
        options: dict[str, Any] = {
            "num_frames": self.num_frames,
            "patches_per_frame": self.patches_per_frame,
            "norm": self._layer_norm(module),
            "dropout": self.dropout,
        }
        multihead = partial(TrajectoryWordSelfAttention.from_multihead, **options)
        timm = partial(TimmTrajectoryWordAttention.from_timm, **options)
        found = self.modules.find(module)
        return {path: replaced_attention(path, part, multihead, timm) for path, part in found.items()}

    def _layer_norm(self, module: nn.Module) -> nn.LayerNorm | None:
        if self.norm is None:
            return None
        ((path, part), *others) = self.norm.find(module).items()
        if others or not isinstance(part, nn.LayerNorm):
            raise TypeError(
                f"Expected `norm` to be the address of one LayerNorm, but {self.norm!r} is 'module.{path}', a "
                f"{type(part).__name__}{f', and {len(others)} more' if others else ''}."
            )
        return part


class AlignBeforeFuse(Method):
    """Adds TW-BERT's contrast of videos and texts to the video-text model that it is attached to, and their matching.

    After the module's own step it compares the features of the batch with those of a momentum teacher, a copy of the
    module that follows it as a moving average, for the batch and for a queue of earlier batches. Three terms: `vtc`
    between whole videos and texts, with targets softened by the teacher; `fine` between patches and words; and `vtm`,
    which teaches a matcher of the module to tell pairs from texts and videos that are like each other. The maths is in
    `functional.video_text_contrastive_loss`, `functional.fine_grained_contrastive_loss` and
    `functional.hard_negative_matching_loss`. The log has all, and `temperature` and `alpha`.

    Args:
        video: Address of the video features, (B, E), in the module.
        text: Address of the text features, (B, E), in the module.
        video_tokens: Address of the patch features, frame by frame, (B, T·S, E), for `fine`; of what the matcher takes,
            (B, N, D), for `vtm`.
        text_tokens: Address of the word features, (B, L, E), one L for all batches of `fine`; or (B, L, D).
        text_mask: Address of what is not 0 at words that count, (B, L); None: all count.
        matcher: Address of a submodule such as `modules.VideoTextMatcher`, for `vtm`. It is called with tokens of
            texts, of videos and, if there is one, the mask, and returns logits of no and yes, (R, 2).
        num_frames: T; for `fine` only.
        inputs: Address of what the teacher's `forward` is called with, or a list of one for each argument.
        widths: Widths of the video and the text features, if they differ or are to be projected to `embed_dim`: the
            callback then trains two linear maps, in none of the module's checkpoints. None: features are compared as
            they are.
        embed_dim: E after the projection; read with `widths` only.
        vtc_weight: Weight of `vtc`.
        vtm_weight: Weight of `vtm`, if there is a matcher. A batch of one pair has no negative and is left out.
        fine_weight: Weight of `fine`. It belongs to the paper's first version; the weight there is not known.
        temperature: τ at the start; it is learned, within [0.001, 0.5].
        momentum: Share of the old average that an update of the teacher keeps.
        ema_every: "batch" updates the teacher in every training step, as the authors do; "optimizer_step" once for each
            step of the optimizer, which makes a difference where gradients are accumulated.
        alpha: Share of the teacher's prediction in the targets of `vtc`, reached linearly in the first epoch.
        queue_size: Earlier pairs of all ranks that `vtc` compares with, at first random directions; 0: the batch alone.
        fine_queue_size: Earlier pairs that `fine` compares with. How its queue begins is not known; here it is empty.
        task_weight: Weight of the module's own loss.
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If an argument is out of its range, or `fine` or `vtm` lacks an address; at the first step if shapes
            disagree, or a queue is smaller than the batch of all ranks.
        AddressError: If an address of features is not one in the module: the teacher has them at the same place; or
            if `matcher` is not that of one submodule.

    Source:
        Yang et al., "Learning Trajectory-Word Alignments for Video-Language Tasks", ICCV 2023 (arXiv 2301.01953), whose
        code follows ALPRO and ALBEF. On several ranks features of the own batch are compared with the queue, which
        all fill, and negatives of `vtm` come from the own batch, as in that code.

    Example:
        >>> AlignBeforeFuse("module.video_proj", "module.text_proj", inputs=["batch.video", "batch.text"])
        AlignBeforeFuse(video='module.video_proj', text='module.text_proj', inputs=['batch.video', 'batch.text'])
    """

    #: Each rank compares its own batch with the queue.
    exact_over_ranks = False
    teacher: MomentumTeacher

    def __init__(
        self,
        video: AddressLike,
        text: AddressLike,
        *,
        video_tokens: AddressLike | None = None,
        text_tokens: AddressLike | None = None,
        text_mask: AddressLike | None = None,
        matcher: str | None = None,
        num_frames: int | None = None,
        inputs: list[AddressLike] | AddressLike = "module@input",  # the list first: jsonargparse takes what fits first
        widths: list[int] | None = None,
        embed_dim: int = 256,
        vtc_weight: float = 1.0,
        vtm_weight: float = 1.0,
        fine_weight: float = 0.0,
        temperature: float = 0.07,
        momentum: float = 0.995,
        ema_every: Literal["batch", "optimizer_step"] = "batch",
        alpha: float = 0.4,
        queue_size: int = 8192,
        fine_queue_size: int = 128,
        task_weight: float = 1.0,
        log: bool | Literal["epoch"] = True,
        name: str = "twbert",
    ) -> None:
        weights = {"vtc": vtc_weight, "vtm": vtm_weight if matcher is not None else 0.0, "fine": fine_weight}
        super().__init__(name=name, weights=weights, task_weight=task_weight, log=log)
        if widths is not None and len(widths) != 2:
            raise ValueError(f"Expected `widths` to be those of the video and the text features, but got {widths!r}.")
        _check_range("temperature", temperature, *_TEMPERATURES)
        _check_range("alpha", alpha, 0, 1)
        if ema_every not in ("batch", "optimizer_step"):
            raise ValueError(f"Expected `ema_every` to be 'batch' or 'optimizer_step', but got {ema_every!r}.")
        _check_range("queue_size", queue_size, 0)
        _check_range("fine_queue_size", fine_queue_size, 0)
        if fine_weight and (video_tokens is None or text_tokens is None or num_frames is None):
            raise ValueError(
                f"`fine_weight` {fine_weight} needs `video_tokens`, `text_tokens` and `num_frames`, but got "
                f"{video_tokens!r}, {text_tokens!r} and {num_frames}."
            )
        if matcher is not None and (video_tokens is None or text_tokens is None):
            raise ValueError(
                f"`matcher` {matcher!r} needs `video_tokens` and `text_tokens`, but got {video_tokens!r} and "
                f"{text_tokens!r}."
            )
        self.teacher = MomentumTeacher(inputs=inputs, momentum=momentum)
        self.video, self.text = _in_module("video", video), _in_module("text", text)
        self.video_tokens = None if video_tokens is None else _in_module("video_tokens", video_tokens)
        self.text_tokens = None if text_tokens is None else _in_module("text_tokens", text_tokens)
        self.text_mask = None if text_mask is None else address(text_mask)
        self.matcher = None if matcher is None else Parts(matcher)
        self.num_frames = num_frames
        self.widths, self.embed_dim = widths, embed_dim
        self.vtc_weight, self.vtm_weight, self.fine_weight = vtc_weight, vtm_weight, fine_weight
        self.temperature, self.alpha, self.momentum = temperature, alpha, momentum
        self.ema_every = ema_every
        self.queue_size, self.fine_queue_size = queue_size, fine_queue_size
        # The teacher's values stand at the same places; kept as attributes, the engine records them.
        self._of_teacher = [replace(where, root="teacher") for where in self._features()]
        self._trained = Trained(temperature, widths, embed_dim)
        self._slow = copy.deepcopy(self._trained).requires_grad_(False)
        self._pairs, self._tokens = Queue(queue_size), Queue(fine_queue_size)
        self._steps = self._seed = 0
        self._updated_at = -1  # the number of optimizer steps at the teacher's last update
        self._matcher_path = ""
        self._warned = False

    def helpers(self) -> Mapping[str, nn.Module]:
        """The temperature and, with `widths`, the projections."""
        return {"trained": self._trained}

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The contrasts of this step's features; then the batch joins the queues."""
        if self.ema_every == "batch" or step.trainer.global_step != self._updated_at:
            self._updated_at = step.trainer.global_step
            self.teacher.update(step.module)
            follow(self._slow, self._trained, self.momentum)
        tau = self._trained.temperature
        with torch.no_grad():
            tau.clamp_(*_TEMPERATURES)
        alpha = self.alpha * self._share_of_first_epoch(step.trainer)
        self._steps += 1
        if step.logs:
            step.note({"temperature": tau, "alpha": alpha})
        terms = {}
        if self.weights["vtc"] or self.weights["vtm"]:
            terms = self._of_pairs(step, tau, alpha)
        if self.fine_weight:
            terms["fine"] = self._fine(step, tau)
        return terms

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: looks for the matcher, attaches, moves what is slow to the device."""
        if stage == "fit" and self.matcher is not None:
            self._matcher_path, *others = self.matcher.find(pl_module)
            if others:
                found = 1 + len(others)
                raise AddressError(f"Expected `matcher` to be one submodule, but {self.matcher!r} names {found}.")
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._seed = torch.initial_seed()  # draws of our own: the module's random numbers stay as they were
            self._slow.to(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The teacher, the slow projections, the queues, the numbers of steps and the seed of the draws."""
        return {
            **super().state_dict(),
            "teacher": self.teacher.state_dict(),
            "slow": self._slow.state_dict(),
            "pairs": self._pairs.state_dict(),
            "tokens": self._tokens.state_dict(),
            "steps": self._steps,
            "seed": self._seed,
            "updated_at": self._updated_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self.teacher.load_state_dict(state_dict["teacher"])
        self._slow.load_state_dict(state_dict["slow"])
        self._pairs.load_state_dict(state_dict["pairs"])
        self._tokens.load_state_dict(state_dict["tokens"])
        self._steps, self._seed = state_dict["steps"], state_dict["seed"]
        self._updated_at = state_dict["updated_at"]

    def _of_pairs(self, step: Step, tau: Tensor, alpha: float) -> dict[str, Tensor]:
        video, text = self._trained(*self._read(step, (self.video, self.text), 2, "(B, E)"))
        with torch.no_grad():
            slow = self._slow(*self._read(step, self._of_teacher[:2], 2, "(B, E)"))
            slow_video, slow_text = (F.normalize(features, dim=1) for features in slow)
        terms = {}
        if self.weights["vtc"]:
            if not self._pairs.count:
                self._pairs.push(*self._random_rows(slow_video))
            videos, texts = self._pairs.rows(slow_video, slow_text)
            terms["vtc"] = video_text_contrastive_loss(
                video, text, slow_video, slow_text, videos, texts, tau, alpha=alpha
            )
            self._pairs.push(*gather_batch(slow_video, slow_text, gather_grad=False))
        if self.weights["vtm"] and len(video) > 1:
            with torch.no_grad():
                video_logits, text_logits = (
                    F.normalize(features, dim=1) @ columns.T / tau
                    for features, columns in ((video, slow_text), (text, slow_video))
                )
            terms["vtm"] = self._vtm(step, text_logits, video_logits)
        elif self.weights["vtm"] and not self._warned:
            self._warned = True
            rank_zero_warn(f"{self!r}: a batch of one pair has no negative for `vtm`, which is left out there.")
        return terms

    def _vtm(self, step: Step, text_logits: Tensor, video_logits: Tensor) -> Tensor:
        video, text = self._tensors(step, (self.video_tokens, self.text_tokens), 3, "(B, N, D)")
        return hard_negative_matching_loss(
            partial(self._match, step),
            text,
            video,
            text_logits,
            video_logits,
            text_mask=None if self.text_mask is None else self._mask(step, text),
            generator=self._generator(text.device, self._seed, step.trainer.global_rank, self._steps),
        )

    def _match(self, step: Step, *inputs: Tensor) -> Tensor:
        with step.forward_context():
            result: Tensor = step.module.get_submodule(self._matcher_path)(*inputs)
        return result

    def _random_rows(self, like: Tensor) -> list[Tensor]:
        """What the queue begins with: unit rows (queue_size, E) of videos and of texts, the same on all ranks."""
        rows = like.new_empty(2, self.queue_size, like.shape[1])
        return list(F.normalize(rows.normal_(generator=self._generator(like.device, "queue")), dim=2))

    def _generator(self, device: torch.device, *place: int | str) -> torch.Generator:
        return torch.Generator(device).manual_seed(seeded(self.name, *place).initial_seed())

    def _fine(self, step: Step, tau: Tensor) -> Tensor:
        video, text = self._trained(*self._read(step, (self.video_tokens, self.text_tokens), 3, "(B, N, E)"))
        mask = text.new_ones(text.shape[:2]) if self.text_mask is None else self._mask(step, text)
        with torch.no_grad():
            slow_video, slow_text = self._slow(*self._read(step, self._of_teacher[2:], 3, "(B, N, E)"))
        queue = self._tokens.rows(slow_video, slow_text, mask)
        columns = [torch.cat(pair) for pair in zip((slow_video, slow_text, mask), queue, strict=True)]
        loss = fine_grained_contrastive_loss(
            video, text, mask, *columns, num_frames=self.num_frames or 1, temperature=tau
        )
        self._tokens.push(*gather_batch(slow_video, slow_text, mask, gather_grad=False))
        return loss

    def _features(self) -> list[Address]:
        return [where for where in (self.video, self.text, self.video_tokens, self.text_tokens) if where is not None]

    def _tensors(self, step: Step, where: Any, ndim: int, shape: str) -> tuple[Tensor, Tensor]:
        video, text = (step[one] for one in where)
        for one, value in zip(where, (video, text), strict=True):
            if not isinstance(value, Tensor) or value.ndim != ndim or not value.is_floating_point():
                raise ValueError(f"Expected the features at {one!r} to be {shape}, but got {describe(value)}.")
        if len(video) != len(text):
            raise ValueError(
                f"Expected one text for each video, but {where[0]!r} is {list(video.shape)} and {where[1]!r} is "
                f"{list(text.shape)}."
            )
        return video, text

    def _read(self, step: Step, where: Any, ndim: int, shape: str) -> tuple[Tensor, Tensor]:
        video, text = self._tensors(step, where, ndim, shape)
        if self.widths is None and video.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"Features of videos at {where[0]!r} are {video.shape[-1]} wide and of texts at {where[1]!r} "
                f"{text.shape[-1]}: give `widths=[{video.shape[-1]}, {text.shape[-1]}]`, and both are projected."
            )
        found = upcast(video, text)
        return found[0], found[1]

    def _mask(self, step: Step, text: Tensor) -> Tensor:
        mask = step[self.text_mask]  # type: ignore[index]  # asked for only where there is one
        if not isinstance(mask, Tensor) or mask.shape != text.shape[:2]:
            raise ValueError(
                f"Expected `text_mask` at {self.text_mask!r} to be {list(text.shape[:2])}, but got {describe(mask)}."
            )
        return (mask != 0).to(text.dtype)

    def _share_of_first_epoch(self, trainer: Trainer) -> float:
        """1 as well where the length of an epoch is not known."""
        return min(1.0, self._steps / max(trainer.num_training_batches, 1)) if self._finite(trainer) else 1.0

    @staticmethod
    def _finite(trainer: Trainer) -> bool:
        return trainer.num_training_batches != float("inf")


def _in_module(argument: str, where: AddressLike) -> Address:
    parsed: AnyAddress = address(where)
    if not isinstance(parsed, Address) or parsed.root != "module":
        raise AddressError(
            f"Expected `{argument}` to be the address of a value in the module, such as 'module.video_proj', because "
            f"the momentum copy is asked for the same; got {where!r}."
        )
    return parsed


def _check_range(name: str, value: float, least: float, most: float = float("inf")) -> None:
    if not least <= value <= most:
        raise ValueError(f"Expected `{name}` to be in [{least}, {most}], but got {value}.")
