"""Fine-tuning with labels where the zero-shot prompts are wrong, and with the prompts where they are right."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_methods.attach import AddressLike, Method, Step, Teacher, address
from lightning_methods.attach._lightning import LightningModule, Trainer, overrides
from lightning_methods.attach.address import Address, AnyAddress, Computed, describe, read_items
from lightning_methods.attach.capture import resolve
from lightning_methods.functional import ProRegTerms, proreg_terms
from lightning_methods.functional._logits import check_choice, check_positive, sum_to_one
from lightning_methods.functional.proreg import Weighting, check_options, mean_over_kept
from lightning_methods.modules import PromptTeacher
from lightning_methods.modules.proreg import frozen_copy

Mode = Literal["replace", "add"]


class ProReg(Method):
    r"""Fine-tunes a classifier without losing what the pretrained model knows from its text prompts.

    Each sample has its label and a soft zero-shot prediction, and a weight w, from how well the model and the prompts
    predict the label, says how much the prompts count: the loss is `mean (1 − w)·ce + alpha · mean w·kl`. The maths is
    in `lightning_methods.functional.proreg_terms`. Logs `proreg/label` (mean (1 − w)·ce; with `loss="add"` the mean of
    −w·ce), `proreg/prompt` (mean w·kl), `proreg/loss`, and the batch's means `proreg/cross_entropy`, `proreg/weight`
    and `proreg/prompt_accuracy`.

    The prompt prediction comes from `prompt`, or from a `snapshot`: a frozen copy of a part of the module, made before
    the first step and before a checkpoint is restored into the module. A snapshot is kept in the callback's state and
    restored with it, since a copy made on resuming would be one of the tuned weights; a further fit with the same
    callback keeps it, too. Make a new callback for another model.

    Args:
        logits: Address of the logits of the model that is tuned, (N, K).
        target: Address of the class indices, (N,) or (N, 1), or of soft labels, floating, (N, K).
        prompt: Address of precomputed prompt logits (N, K), `"batch.prompt_logits"`; or a classifier that gives them, a
            module or a function, called with `inputs`. A module is frozen, in eval mode, on the trainer's device and
            not in checkpoints, which hold a fingerprint of it; a function looks after its own.
        save_teacher: Whether the classifier in `prompt`, a module, is kept in the callback's state and restored with it
            as a snapshot is.
        inputs: Address of what the classifier is called with: `"batch.0"` if None, and for a snapshot what the
            submodule itself received in this step, after any augmentation. A snapshot takes a mapping as keyword
            arguments.
        loss: `"replace"` puts the loss in the place of the module's own, whose other parts are then lost. `"add"`
            leaves them: it turns a plain mean cross-entropy into the same loss by what it adds.
        snapshot: Address of the submodule to copy, `"module.visual"`, that gives image features (N, D), or an item
            of what it returns, `"module.visual:image_embeds"`. Without `text_features` it gives prompt logits itself:
            `"module"` is the starting model, whose head has begun as the prompts' text features.
        text_features: With `snapshot`: the classes' text features (K, D), in the order of the labels, or (K, P, D) of
            P prompts each; or the address of a parameter or buffer that starts as them, `"module.head.weight"`.
        logit_scale: With `text_features`: what cosines are multiplied by.
        alpha: Weight of the prompt term; the authors use 1 to 2.
        weighting: `"probability"`, `"loss"` or `"constant"`; see `functional.proreg_weight`.
        gamma: Exponent, with `"loss"`.
        prompt_power: Exponent, with `"probability"`: 1, or 10 for the weight that is active in the authors' code.
        constant_weight: With `"constant"`, plain distillation.
        temperature: Of the prompt term; there is a factor T².
        eps: In the denominator of the weight.
        entropy_offset: Subtract the prompts' entropy from the prompt term, which changes its value only.
        ignore_index: Class index of samples to leave out.
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If an argument is out of its range; at the first step if shapes disagree, if probabilities stand
            where logits should, or (on a CPU) if a class index leaves [0, K).

    Source:
        Zhu et al., "Debiased Fine-Tuning for Vision-language Models by Prompt Regularization", AAAI 2023 (arXiv
        2301.12429), after the authors' code; of its three weights, our default is one that is commented out there.

    Example:
        >>> ProReg(target="batch.label", prompt="batch.prompt_logits", alpha=2.0)
        ProReg(target='batch.label', prompt='batch.prompt_logits', alpha=2.0)
    """

    def __init__(
        self,
        logits: AddressLike = "module",
        target: AddressLike = "batch.1",
        prompt: nn.Module | AddressLike | None = None,
        *,
        inputs: AddressLike | None = None,
        save_teacher: bool = False,
        loss: Mode = "replace",
        snapshot: str | None = None,
        text_features: Tensor | str | None = None,
        logit_scale: float = 100.0,
        alpha: float = 1.0,
        weighting: Weighting = "probability",
        gamma: float = 1.0,
        prompt_power: float = 1.0,
        constant_weight: float = 0.5,
        temperature: float = 1.0,
        eps: float = 1e-5,
        entropy_offset: bool = False,
        ignore_index: int = -100,
        log: bool | Literal["epoch"] = True,
        name: str = "proreg",
    ) -> None:
        check_choice("loss", loss, Mode)
        check_options(alpha, weighting, gamma, prompt_power, constant_weight, temperature, eps)
        check_positive(logit_scale=logit_scale)
        if (prompt is None) == (snapshot is None):
            raise ValueError("Expected either `prompt` or `snapshot`, to say where the prompt logits come from.")
        if text_features is not None and snapshot is None:
            raise ValueError("Expected `text_features` only with `snapshot`; a classifier in `prompt` has its own.")
        if save_teacher and not isinstance(prompt, nn.Module):
            raise ValueError("Expected `save_teacher` only with a module in `prompt`; a snapshot is saved in any case.")
        super().__init__(name=name, weights={"label": 1.0, "prompt": alpha}, log=log)
        self.logits = address(logits)
        self.target = address(target)
        self.loss: Mode = loss
        self.replaces_loss = loss == "replace"
        self.save_teacher = save_teacher
        self.snapshot = snapshot
        self.text_features = text_features
        self.logit_scale = logit_scale
        self.alpha = alpha
        self.weighting: Weighting = weighting
        self.gamma = gamma
        self.prompt_power = prompt_power
        self.constant_weight = constant_weight
        self.temperature = temperature
        self.eps = eps
        self.entropy_offset = entropy_offset
        self.ignore_index = ignore_index
        self.inputs = None if inputs is None else address(inputs)
        self._snapshot = None if snapshot is None else _Snapshot.parsed(snapshot, text_features, logit_scale)
        if self._snapshot is not None and self.inputs is None:
            self.inputs = self._snapshot.inputs
        self.prompt = self._prompt(prompt)
        self._restored: dict[str, Any] | None = None
        self._fingerprint: list[int] | None = None
        self._suspects: dict[str, Tensor] | None = None
        self._watched = False
        self._counts: Tensor | None = None
        self._classes = 0

    def _prompt(self, prompt: nn.Module | AddressLike | None) -> AnyAddress | Teacher | None:
        """Where the prompt logits are read, or who gives them; None as long as there is no snapshot."""
        if isinstance(prompt, nn.Module) or (callable(prompt) and not isinstance(prompt, (Address, Computed))):
            network = prompt if isinstance(prompt, nn.Module) else _Function(prompt)
            self.teacher = Teacher(network, inputs=self.inputs or "batch.0")
            return self.teacher
        return None if prompt is None else address(prompt)

    # What it adds

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The label's and the prompts' share in the loss of this step."""
        self._copy_late(step.module, step.trainer)  # where a step is run before `on_fit_start`, as by a finder of rates
        where = self.prompt if isinstance(self.prompt, (Address, Computed)) else Address("teacher")
        logits, prompts = step[self.logits], step[where]
        self._check_logits(logits, prompts, where)
        target = self._labels(step[self.target], logits)
        terms = proreg_terms(
            logits,
            prompts,
            target,
            weighting=self.weighting,
            gamma=self.gamma,
            prompt_power=self.prompt_power,
            constant_weight=self.constant_weight,
            temperature=self.temperature,
            eps=self.eps,
            entropy_offset=self.entropy_offset,
            ignore_index=self.ignore_index,
        )
        label_share = 1 - terms.weight if self.replaces_loss else -terms.weight
        self._watch(step, logits, prompts, target, terms)
        return {
            "label": self._mean(label_share * terms.cross_entropy, target),
            "prompt": self._mean(terms.weight * terms.prompt, target),
        }

    def _mean(self, values: Tensor, target: Tensor) -> Tensor:
        return mean_over_kept(values, target, self.ignore_index)

    @torch.no_grad()
    def _watch(self, step: Step, logits: Tensor, prompts: Tensor, target: Tensor, terms: ProRegTerms) -> None:
        """Counts and notes what tells a good teacher from a bad one, all of it without waiting for the device."""
        soft = target.ndim == 2
        right = prompts.argmax(1) == (target.argmax(1) if soft else target)
        seen = torch.ones_like(right) if soft else target != self.ignore_index
        counts = torch.stack([(right & seen).sum(), seen.sum()])
        self._counts = counts if self._counts is None else self._counts + counts
        self._classes = prompts.shape[1]
        if step.logs:
            step.note(
                {
                    "cross_entropy": self._mean(terms.cross_entropy, target),
                    "weight": self._mean(terms.weight, target),
                    "prompt_accuracy": counts[0] / counts[1].clamp_min(1),
                }
            )
        if not self._watched and len(logits):
            self._watched = True
            own = step.output["loss"] if isinstance(step.output, Mapping) else step.output
            cross_entropy = self._mean(terms.cross_entropy, target)
            both = torch.stack([own.detach().to(cross_entropy), cross_entropy])
            self._suspects = {"logits": sum_to_one(logits), "prompt": sum_to_one(prompts), "losses": both}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called between a step and its gradients: looks at the first step's values, the one time that it waits."""
        suspects, self._suspects = self._suspects, None
        if suspects is None:
            return
        for argument in ("logits", "prompt"):
            if suspects[argument]:
                raise ValueError(
                    f"Expected logits as `{argument}` of {self!r}, but every row is positive and sums to 1: these are "
                    f"probabilities. Take the values before the softmax, or their logarithms."
                )
        own, cross_entropy = suspects["losses"].tolist()
        if self.replaces_loss and not abs(own - cross_entropy) <= 0.02 * abs(cross_entropy) + 1e-3:
            rank_zero_warn(
                f"{self!r} replaces the module's loss, {own:.4g} in the first step, which is not the mean "
                f"cross-entropy of its logits, {cross_entropy:.4g}: what else is in it is dropped. loss='add' keeps it."
            )

    def end_epoch(self) -> None:
        """Warns if the prompts did worse than chance over the epoch: their classes may be in another order."""
        counts, self._counts = self._counts, None
        if counts is None:
            return
        right, seen = counts.tolist()
        if right * self._classes < seen:
            rank_zero_warn(
                f"{self!r}: the prompts were right on {right} of {seen} samples in this epoch, which is worse than "
                f"chance with {self._classes} classes. Are their classes in the order of the labels?"
            )

    # The snapshot

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before a checkpoint is restored and the optimizers are made: copies, and attaches."""
        if stage == "fit":
            self._watched, self._suspects, self._counts = False, None, None
            # A module that makes or loads its parts in `setup` has not done so yet.
            late = overrides(pl_module, "setup") or overrides(pl_module, "configure_model")
            if self._snapshot is not None and self.teacher is None and not late:
                self._copy(self._snapshot, pl_module)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when everything is in place: copies what could not be copied in `setup`."""
        self._copy_late(pl_module, trainer)
        super().on_fit_start(trainer, pl_module)

    def _copy_late(self, module: nn.Module, trainer: Trainer) -> None:
        if self._snapshot is None or self.teacher is not None:
            return
        if trainer.ckpt_path and self._restored is None:
            rank_zero_warn(
                f"{self!r} copies {self.snapshot!r} after {trainer.ckpt_path} was restored, which holds no snapshot: "
                f"if the module was tuned there, the prompts are not those of the pretrained model."
            )
        self._copy(self._snapshot, module).attach(module, trainer.strategy.root_device, [])

    def _copy(self, snapshot: _Snapshot, module: nn.Module) -> Teacher:
        network = snapshot.of(module)
        if self._restored is not None:
            _load(network, self._restored)
        self.teacher = Teacher(network, inputs=self.inputs or snapshot.inputs)
        return self.teacher

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """The settings; and the snapshot, or a fingerprint of a classifier that is not saved."""
        state = super().state_dict() | {"settings": repr(self), "snapshot": None, "fingerprint": None}
        if self.teacher is None:
            return state
        if self._saves_teacher:
            return state | {"snapshot": self.teacher.network.state_dict()}
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.teacher.network)
        return state | {"fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the snapshot; says if the settings have changed, or the classifier that is not saved."""
        super().load_state_dict(state_dict)
        if state_dict["settings"] != repr(self):
            rank_zero_warn(f"Resuming with {self!r}, but the checkpoint was written with {state_dict['settings']}.")
        if self._saves_teacher:
            self._restored = state_dict["snapshot"]
            if self.teacher is not None and self._restored is not None:
                _load(self.teacher.network, self._restored)
        elif self.teacher is not None and (saved := state_dict["fingerprint"]) is not None:
            self._fingerprint = _fingerprint(self.teacher.network)
            if self._fingerprint != saved:
                rank_zero_warn(
                    f"{self!r} goes on with another prompt classifier than the checkpoint's run had: of "
                    f"{self._fingerprint[0]} values where that one had {saved[0]}, or of other ones."
                )

    @property
    def _saves_teacher(self) -> bool:
        return self.snapshot is not None or self.save_teacher

    # What fits

    def _check_logits(self, logits: Any, prompts: Any, where: AnyAddress) -> None:
        for argument, at, value in (("logits", self.logits, logits), ("prompt", where, prompts)):
            if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
                raise ValueError(
                    f"Expected `{argument}` at {at!r} to be floating logits (N, K), but got {describe(value)}."
                )
        if logits.shape != prompts.shape:
            raise ValueError(
                f"Expected prompt logits of the same samples and classes as the logits, but `logits` at "
                f"{self.logits!r} are {list(logits.shape)} and `prompt` at {where!r} are {list(prompts.shape)}."
            )

    def _labels(self, target: Any, logits: Tensor) -> Tensor:
        """Class indices (N,), or soft labels (N, K); columns (N, 1) and indices stored as floats are common."""
        if isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] == 1:
            target = target.squeeze(1)
        if isinstance(target, Tensor):
            if target.shape == logits.shape[:1]:
                return target.long()
            if target.shape == logits.shape and target.is_floating_point():
                return target
        raise ValueError(
            f"Expected `target` at {self.target!r} to be class indices of shape {list(logits.shape[:1])} or soft "
            f"labels of shape {list(logits.shape)}, one for each row of `logits` at {self.logits!r}, but got "
            f"{describe(target)}. If the module sees several views, name the logits of one."
        )


@dataclass(frozen=True)
class _Snapshot:
    """What is copied, and how prompt logits are made of it."""

    where: Address
    text_features: Tensor | Address | None
    logit_scale: float

    @classmethod
    def parsed(cls, snapshot: str, text_features: Tensor | str | None, logit_scale: float) -> _Snapshot:
        where = address(snapshot)
        if not isinstance(where, Address) or where.root != "module" or where.received:
            raise ValueError(f"Expected `snapshot` to name a submodule, such as 'module.visual', but got {snapshot!r}.")
        features = address(text_features) if isinstance(text_features, str) else text_features
        if isinstance(features, Computed) or (isinstance(features, Address) and features.root != "module"):
            raise ValueError(
                f"Expected `text_features` to be a Tensor, or to name a parameter or buffer, such as "
                f"'module.head.weight', but got {text_features!r}."
            )
        return cls(where, features, logit_scale)

    @property
    def inputs(self) -> Address:
        """What the submodule itself receives."""
        return replace(self.where, items=(), received=True)

    def of(self, module: nn.Module) -> nn.Module:
        """The frozen network that gives prompt logits."""
        source, features = resolve(module, self.where), self.text_features
        if isinstance(source, Tensor):
            raise ValueError(f"Expected `snapshot` to name a submodule, but '{self.where}' is {describe(source)}.")
        encoder = _Encoder(source, self.where)
        if features is None:
            return frozen_copy(encoder)
        named = resolve(module, features) if isinstance(features, Address) else features
        if isinstance(named, nn.Module):
            raise ValueError(f"Expected `text_features` to name a parameter or buffer, but '{features}' is a module.")
        return PromptTeacher(encoder, named, logit_scale=self.logit_scale)


class _Encoder(nn.Module):
    """A submodule as the module calls it, and the item of its result that an address names."""

    def __init__(self, source: nn.Module, where: Address) -> None:
        super().__init__()
        self.source = source
        self.where = where

    def forward(self, inputs: Any) -> Any:
        output = self.source(**inputs) if isinstance(inputs, Mapping) else self.source(inputs)
        return read_items(output, self.where, str(self.where))


class _Function(nn.Module):
    """A function in the form that a teacher has."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Any) -> Any:
        return self.function(inputs)


def _load(network: nn.Module, saved: dict[str, Any]) -> None:
    try:
        network.load_state_dict(saved)
    except RuntimeError as error:
        raise ValueError(
            f"The checkpoint's snapshot does not fit what `snapshot` or `prompt` is now: {error}"
        ) from error


def _fingerprint(network: nn.Module) -> list[int]:
    """Number of values, and a checksum of their names and bytes."""
    count, checksum = 0, 0
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            count += value.numel()
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            checksum = zlib.crc32(content, zlib.crc32(name.encode(), checksum))
    return [count, checksum]
