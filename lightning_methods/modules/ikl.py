"""The IKL and GKL losses together with the class means that they learn during training."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_methods.functional import IKLTerms, ikl_terms, normalize_class_probs
from lightning_methods.functional._logits import check_choice, check_logits, check_positive, check_range
from lightning_methods.functional.class_probs import accumulate_class_probs_
from lightning_methods.functional.ikl import Normalization
from lightning_methods.modules._local import LocalBuffers
from lightning_methods.modules._repr import changed_arguments


class IKLLoss(LocalBuffers):
    """The IKL or GKL loss whose class-wise weights follow the data.

    The class means start uniform. During an epoch the predictions of the teacher (in adversarial training: on
    the clean images) are added up per class; `end_epoch` turns the sums into the means that the next epoch
    uses. Call it after each training epoch, on every rank. The maths is in `functional.ikl_terms`.

    With `class_wise=False` there are no means and no target is needed. This is advised for very many classes:
    at C = 21,000 the means take 1.8 GB and their sums as much again.

    Both stay in float32 when the module is cast to half precision, since a bfloat16 sum of probabilities stops
    growing at 256.

    Attributes:
        class_probs: The means in use, a buffer (C, C); (0, 0) until the number of classes is known.
        class_sums: The sums of this epoch, on this rank, same shape. They move, save and load as a buffer does
            but are not listed among the buffers: DistributedDataParallel overwrites the buffers of every rank
            by those of rank 0 in each forward.

    Args:
        num_classes: C; None takes it from the first logits or from a loaded state. Give it in distributed
            training if a rank may see no batch in an epoch, because `end_epoch` is a collective.
        class_wise: Weights from the class means instead of each sample's own prediction.
        normalization: "batch" for IKL, "weight" for GKL.
        gamma: Exponent ≥ 0 of the weights; 1 for IKL.
        wmse_weight: Weight of the pairwise squared error.
        ce_weight: Weight of the soft-label cross-entropy.
        temperature: Temperature > 0 of the cross-entropy.
        weight_temperature: Temperature > 0 of the predictions that make the weights.
        class_momentum: Share in [0, 1] of an epoch's means in the new class means; the authors always use 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> loss = IKLLoss(2)
        >>> loss(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(1.1931)
        >>> loss.end_epoch()
        >>> loss.class_probs
        tensor([[0.5000, 0.5000],
                [0.1192, 0.8808]])
    """

    local = ("class_sums",)
    class_probs: Tensor
    class_sums: Tensor

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        class_wise: bool = True,
        normalization: Normalization = "batch",
        gamma: float = 1.0,
        wmse_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        class_momentum: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            check_range("num_classes", num_classes, 1, math.inf)
        check_choice("normalization", normalization, Normalization)
        check_positive(temperature=temperature, weight_temperature=weight_temperature)
        check_range("gamma", gamma, 0, math.inf)
        check_range("class_momentum", class_momentum, 0, 1)
        self.class_wise = class_wise
        self.normalization: Normalization = normalization
        self.gamma = gamma
        self.wmse_weight = wmse_weight
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.weight_temperature = weight_temperature
        self.class_momentum = class_momentum
        # float32 also where the default dtype is half precision, as under Lightning's "bf16-true".
        for name in ("class_probs", "class_sums"):
            self.register_buffer(name, torch.empty(0, 0, dtype=torch.float32), persistent=class_wise)
        self.make_local()
        if class_wise and num_classes is not None:
            self._start(num_classes, self.class_probs.device)

    @property
    def num_classes(self) -> int | None:
        """C, or None while it is unknown or not needed."""
        return len(self.class_probs) or None

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The mean loss of a batch: `terms(...).loss`."""
        return self.terms(student_logits, teacher_logits, target).loss

    def terms(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> IKLTerms:
        """The mean loss of a batch and its two raw terms.

        In training mode the teacher logits also count towards the next class means.

        Args:
            student_logits: (N, C) or (N, C, d1, ...).
            teacher_logits: Same shape.
            target: Class indices (N[, d1, ...]); needed, and read, only if class-wise.

        Raises:
            ValueError: If shapes or dtypes do not fit, if `target` is missing, or (on a CPU) if it leaves [0, C).
        """
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        if not self.class_wise:
            target = None
        elif target is None:
            raise ValueError("`target` is missing: class-wise weights need it, class_wise=False does not")
        else:
            self._start_if_new(teacher_logits)
        terms = ikl_terms(
            student_logits,
            teacher_logits,
            None if target is None else self.class_probs,
            target,
            wmse_weight=self.wmse_weight,
            ce_weight=self.ce_weight,
            gamma=self.gamma,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
            normalization=self.normalization,
        )
        if self.training and target is not None:
            self.update(teacher_logits, target)
        return terms

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch towards the next class means; `forward` does so in training mode.

        Args:
            logits: Of the teacher or the clean images, (N, C) or (N, C, d1, ...).
            target: Class indices (N[, d1, ...]).

        Raises:
            ValueError: If shapes or dtypes do not fit, or (on a CPU) if `target` leaves [0, C).
        """
        check_logits(logits=logits)
        self._start_if_new(logits)
        accumulate_class_probs_(self.class_sums, logits, target, self.weight_temperature)

    def end_epoch(self) -> None:
        """Make the sums of all ranks the new class means and start the next sums at zero.

        A class that no rank has seen keeps its means. Does nothing without class means.
        """
        if self.num_classes is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.class_sums)
        momentum = self.class_momentum
        self.class_probs.copy_(normalize_class_probs(self.class_sums, self.class_probs, momentum=momentum))
        self.class_sums.zero_()

    def reset_class_probs(self) -> None:
        """Forget what was learned: uniform means, zero sums."""
        if self.num_classes is not None:
            self._start(self.num_classes, self.class_probs.device)

    def extra_repr(self) -> str:
        """The constructor's arguments that differ from the defaults."""
        return changed_arguments(self, {**vars(self), "num_classes": self.num_classes})

    def _start_if_new(self, logits: Tensor) -> None:
        if self.num_classes is None:
            self._start(logits.shape[1], logits.device)

    @torch.inference_mode(False)  # the first logits may be those of a validation step
    def _start(self, num_classes: int, device: torch.device) -> None:
        self.class_probs = self.class_probs.new_full((num_classes, num_classes), 1 / num_classes, device=device)
        self.class_sums = torch.zeros_like(self.class_probs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "class_probs")
        if self.class_wise and self.num_classes is None and saved is not None and len(saved):
            self._start(len(saved), self.class_probs.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
