"""ProReg in a loop of one's own: the loss with its settings, classifiers made of words, and the frozen teacher."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.functional import prompt_logits, prompt_text_features, proreg_loss
from lightning_methods.functional._logits import Reduction, check_choice, check_positive
from lightning_methods.functional.proreg import Weighting, check_options
from lightning_methods.functional.proreg_prompts import check_features, cosine_logits
from lightning_methods.modules._repr import changed_arguments


class ProRegLoss(nn.Module):
    """The ProReg loss with its settings; the maths and the settings are those of `functional.proreg_loss`.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> import torch
        >>> criterion = ProRegLoss(alpha=2.0)
        >>> criterion(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(1.1353)
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        weighting: Weighting = "probability",
        gamma: float = 1.0,
        prompt_power: float = 1.0,
        constant_weight: float = 0.5,
        temperature: float = 1.0,
        eps: float = 1e-5,
        entropy_offset: bool = False,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "alpha": alpha,
            "weighting": weighting,
            "gamma": gamma,
            "prompt_power": prompt_power,
            "constant_weight": constant_weight,
            "temperature": temperature,
            "eps": eps,
            "entropy_offset": entropy_offset,
            "ignore_index": ignore_index,
            "reduction": reduction,
        }
        check_options(alpha, weighting, gamma, prompt_power, constant_weight, temperature, eps)
        check_choice("reduction", reduction, Reduction)

    def forward(self, logits: Tensor, prompt_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch: logits and prompt logits (N, K), target (N,) or soft (N, K)."""
        return proreg_loss(logits, prompt_logits, target, **self.settings)

    def extra_repr(self) -> str:
        """The settings that differ from the defaults."""
        return changed_arguments(self, self.settings)


class PromptClassifier(nn.Module):
    """A linear classifier on directions whose rows began as the text features of the classes' prompts.

    Frozen, it is the zero-shot classifier of a pretrained vision-language model. Trainable, it is the head that is
    fine-tuned: it begins as that classifier, and the text encoder is not needed any more.

    Attributes:
        weight: (K, D), of any norm. A Parameter if trainable, else a buffer.
        log_scale: The scale's logarithm, 0-d; likewise. A state dict of one kind loads into the other.

    Args:
        text_features: (K, D), or (K, P, D) for P prompts a class, which are then averaged as in
            `functional.prompt_text_features`.
        logit_scale: What cosines are multiplied by, > 0: exp(logit_scale) of CLIP, 100 in its published models.
        trainable: Whether both learn. The scale is not clamped, as in the authors' code.

    Raises:
        ValueError: If the shape of `text_features` does not fit or `logit_scale` is not positive.

    Example:
        >>> import torch
        >>> head = PromptClassifier(torch.eye(2), logit_scale=10.0, trainable=True)
        >>> head(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]], grad_fn=<MulBackward0>)
    """

    weight: Tensor
    log_scale: Tensor
    directions: Tensor

    def __init__(self, text_features: Tensor, *, logit_scale: float = 100.0, trainable: bool = False) -> None:
        super().__init__()
        check_positive(logit_scale=logit_scale)
        # Lone rows keep their norms, as in the authors' code; those of several prompts are averaged as directions.
        weight = prompt_text_features(text_features, normalize=text_features.ndim == 3).detach().clone()
        log_scale = weight.new_tensor(math.log(logit_scale))
        self.trainable = trainable
        if trainable:
            self.weight, self.log_scale = nn.Parameter(weight), nn.Parameter(log_scale)
            return
        self.register_buffer("weight", weight)
        self.register_buffer("log_scale", log_scale)
        # Normalised once instead of in every step, which would take a tenth of the classifier's time.
        self.register_buffer("directions", prompt_text_features(weight), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, K), float32 at least, of features (N, D) of any norm.

        Raises:
            ValueError: If shapes or dtypes do not fit.
        """
        if self.trainable:
            return prompt_logits(features, self.weight, logit_scale=self.log_scale.exp())
        check_features(features, self.weight)
        return cosine_logits(features, self.directions, self.log_scale.exp())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.trainable:
            self.directions.copy_(prompt_text_features(self.weight))

    def extra_repr(self) -> str:
        """Sizes, and whether it learns."""
        classes, size = self.weight.shape
        return f"classes={classes}, features={size}, trainable={self.trainable}"


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode that takes no gradients and has nothing to do with the original."""
    frozen = copy.deepcopy(module).requires_grad_(False).eval()
    for original, copied in zip(module.modules(), frozen.modules(), strict=True):
        # A function that stands on the instance, as torch.compile puts one there, is not copied: it runs the original.
        if "forward" in vars(original) and vars(copied).get("forward") is vars(original)["forward"]:
            del copied.forward
    return frozen


class PromptTeacher(nn.Module):
    """A frozen copy of an encoder with the frozen classifier of the prompts: the one whose word is weighed.

    Without gradients, and in eval mode whatever `train` says. Make it before the encoder is trained. As a part of your
    module it is saved with it, and has to be: a copy made when a run is resumed would be one of the tuned encoder.

    Args:
        encoder: Gives features (N, D); deep-copied.
        text_features: As in `PromptClassifier`.
        logit_scale: As there.

    Raises:
        ValueError: As there.

    Example:
        >>> import torch
        >>> teacher = PromptTeacher(torch.nn.Linear(3, 2), torch.eye(2), logit_scale=10.0)
        >>> teacher.train().training, teacher(torch.ones(4, 3)).shape
        (False, torch.Size([4, 2]))
    """

    def __init__(self, encoder: nn.Module, text_features: Tensor, *, logit_scale: float = 100.0) -> None:
        super().__init__()
        self.encoder = frozen_copy(encoder)
        self.classifier = PromptClassifier(text_features, logit_scale=logit_scale)
        self.train(False)

    def train(self, mode: bool = True) -> "PromptTeacher":  # noqa: ARG002 - torch's signature
        """Does nothing: it stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: Any) -> Tensor:
        """Prompt logits (N, K) of what the encoder takes."""
        logits: Tensor = self.classifier(self.encoder(inputs))
        return logits


def prompt_param_groups(
    module: nn.Module, head: nn.Module, *, lr: float = 1e-5, head_lr: float = 1e-3, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for an optimizer, as the authors fine-tune: a higher rate for the head, no decay for biases and norms.

    Their AdamW has betas (0.9, 0.98), and a schedule with a tenth of linear warm-up, then linear decay to 0. Parameters
    of at most one dimension are not decayed; the authors go by names, and so decay CLIP's norms and the scale.

    Args:
        module: What is fine-tuned. Parameters that need no gradient are left out.
        head: The part of it with the higher rate, such as a trainable `PromptClassifier`.
        lr: Learning rate of the rest.
        head_lr: Of the head.
        weight_decay: Of matrices and other parameters of several dimensions.

    Returns:
        Up to four groups with "params", "lr" and "weight_decay"; none is empty.

    Raises:
        ValueError: If `head` is no part of `module`, or has nothing to train.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), PromptClassifier(torch.eye(2), trainable=True))
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in prompt_param_groups(net, net[1])]
        [(1, 1e-05, 0.01), (1, 1e-05, 0.0), (1, 0.001, 0.01), (1, 0.001, 0.0)]
    """
    own = {id(parameter) for parameter in head.parameters() if parameter.requires_grad}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not own or not own <= {id(parameter) for parameter in trained}:
        raise ValueError(f"`head` must be a trainable part of `module`, got {type(head).__name__}")
    groups = []
    for rate, of_head in ((lr, False), (head_lr, True)):
        for decay, flat in ((weight_decay, False), (0.0, True)):
            chosen = [p for p in trained if (id(p) in own) == of_head and (p.ndim <= 1) == flat]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups
