r"""Decoupled, improved and generalised Kullback-Leibler losses (DKL, IKL, GKL).

Between two softmax outputs the KL divergence has the gradients of two simpler terms: a mean squared error on
all pairwise logit differences, weighted by the teacher's probabilities (wMSE), and a soft-label cross-entropy
(SCE). Taking them apart lets the wMSE gradient reach both networks and takes its weights from the mean
prediction of a sample's class instead of from that one sample.

The authors' paper and code swap the letters α and β, so neither is used here: `wmse_weight` multiplies the
wMSE including its factor ¼ (α in the paper, `beta` in the code), `ce_weight` multiplies the SCE (β in the
paper, `alpha` in the code).

Every function takes logits of shape (N, C) or (N, C, d1, ...), computes in float32 at least, and never waits
for the device. "teacher" stands for the clean logits and "student" for the adversarial ones in adversarial
training.

Sources: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024, arXiv 2305.13948 (DKL, IKL);
Cui et al., "Generalized Kullback-Leibler Divergence Loss", arXiv 2503.08038 (GKL: only the abstract of this
paper could be read, the formulas are those of the authors' code). The O(C) form of the wMSE is our own
derivation.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._logits import (
    Reduction,
    check_choice,
    check_logits,
    check_positive,
    check_range,
    check_square,
    check_target,
    reduce,
    rows_of_target,
    softmax,
    tempered,
    upcast,
)

Normalization: TypeAlias = Literal["batch", "weight"]


class IKLTerms(NamedTuple):
    """The weighted loss and its two unweighted parts; all three carry gradients."""

    loss: Tensor
    wmse: Tensor
    soft_ce: Tensor


def pairwise_wmse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    *,
    normalization: Normalization = "batch",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Weighted squared error between all pairwise logit differences of teacher and student.

    For one sample with weights w ≥ 0 (the paper has the factor ¼ outside, as α/4):

    $V = \frac14 \sum_{j,k} w_j w_k [(m_j - m_k) - (n_j - n_k)]^2 = \frac12 S \sum_j w_j (d_j - \bar d)^2$

    with d = n − m, S = Σ_j w_j and the weighted mean d̄ = Σ_j w_j d_j / S. The right-hand side is what is
    computed: C terms instead of C². Adding a constant to a row of either logits changes nothing.

    Args:
        student_logits: n, floating, (N, C) or (N, C, d1, ...).
        teacher_logits: m, same shape. Both logits receive gradients, equal and opposite.
        weight: w, non-negative, broadcastable to the logits. Always detached.
        normalization: "batch" gives V_i; "weight" gives V_i · N / Σ_i S_i², so that the mean is
            Σ_i V_i / Σ_i S_i² (zero if all weights are zero). N counts samples times positions.
        reduction: "none" gives shape (N[, d1, ...]), "mean" and "sum" a scalar.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> pairwise_wmse(student, teacher, torch.tensor([0.5, 0.5]))
        tensor(1.1250)
    """
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    _check_weight(weight, student_logits)
    check_choice("reduction", reduction, Reduction)
    check_choice("normalization", normalization, Normalization)
    student, teacher = upcast(student_logits, teacher_logits)
    weight = weight.detach().to(student.dtype).expand_as(student)
    return reduce(_wmse(student, teacher, weight, normalization), reduction)


def soft_target_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of the student against the teacher's detached soft labels.

    $\mathrm{SCE} = -\sum_j \mathrm{softmax}(m / T)_j \, \log \mathrm{softmax}(n / T)_j$, without a factor T²
    (from the authors' code).

    Args:
        student_logits: n, floating, (N, C) or (N, C, d1, ...). The only side with a gradient.
        teacher_logits: m, same shape.
        temperature: T > 0 of both sides.
        student_temperature: T of the student's side where it differs (the authors' semi-supervised code
            softens the targets only). None: `temperature`.
        reduction: "none" gives shape (N[, d1, ...]), "mean" and "sum" a scalar.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> soft_target_cross_entropy(torch.zeros(3, 2), torch.randn(3, 2))
        tensor(0.6931)
    """
    if student_temperature is None:
        student_temperature = temperature
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_positive(temperature=temperature, student_temperature=student_temperature)
    check_choice("reduction", reduction, Reduction)
    student, teacher = upcast(student_logits, teacher_logits)
    return reduce(_soft_ce(student, softmax(teacher, temperature), student_temperature), reduction)


def dkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    wmse_weight: float = 1.0,
    ce_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The decoupled KL divergence: with both weights 1 its gradients are those of KL(teacher ‖ student).

    The wMSE acts on the teacher alone and the SCE on the student alone; a teacher without gradient therefore
    leaves plain distillation. Values differ from KL's, which lacks the wMSE and has the teacher's entropy.

    Args:
        student_logits: Floating, (N, C) or (N, C, d1, ...).
        teacher_logits: Same shape.
        wmse_weight: Weight of the wMSE.
        ce_weight: Weight of the soft-label cross-entropy.
        reduction: "none" gives shape (N[, d1, ...]), "mean" and "sum" a scalar.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> dkl_loss(torch.zeros(1, 2), teacher).backward()
        >>> teacher.grad
        tensor([[-0.1966,  0.1966]])
    """
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_choice("reduction", reduction, Reduction)
    student, teacher = upcast(student_logits, teacher_logits)
    soft_target = softmax(teacher, 1.0)
    wmse = reduce(_wmse(student.detach(), teacher, soft_target, "batch"), reduction)
    soft_ce = reduce(_soft_ce(student, soft_target, 1.0), reduction)
    return wmse_weight * wmse + ce_weight * soft_ce


def ikl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_probs: Tensor | None = None,
    target: Tensor | None = None,
    *,
    wmse_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The improved KL divergence: `ikl_terms(...).loss` with gamma 1 and normalization "batch".

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> ikl_loss(torch.zeros(1, 2), logits, class_probs=torch.full((2, 2), 0.5), target=torch.tensor([0]))
        tensor(1.1931)
    """
    return ikl_terms(
        student_logits,
        teacher_logits,
        class_probs,
        target,
        wmse_weight=wmse_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        weight_temperature=weight_temperature,
        reduction=reduction,
    ).loss


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_probs: Tensor | None = None,
    target: Tensor | None = None,
    *,
    wmse_weight: float = 1.0,
    ce_weight: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The generalised KL divergence: `ikl_terms(...).loss` with normalization "weight".

    Example:
        >>> import torch
        >>> confident = torch.tensor([[30.0, 0.0]])
        >>> [round(gkl_loss(torch.zeros(1, 2), confident, ce_weight=0.0, gamma=g).item(), 2) for g in (1, 0)]
        [0.0, 112.5]
    """
    return ikl_terms(
        student_logits,
        teacher_logits,
        class_probs,
        target,
        wmse_weight=wmse_weight,
        ce_weight=ce_weight,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
        normalization="weight",
        reduction=reduction,
    ).loss


def ikl_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_probs: Tensor | None = None,
    target: Tensor | None = None,
    *,
    wmse_weight: float = 1.0,
    ce_weight: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    normalization: Normalization = "batch",
    reduction: Reduction = "mean",
) -> IKLTerms:
    """The IKL or GKL loss together with its two unweighted terms.

    loss = wmse_weight · wMSE + ce_weight · SCE, where the wMSE pulls on both logits and the SCE on those of
    the student only. The weights of the wMSE are detached, and either

    - class-wise: the row `class_probs[target]`, the mean prediction of the sample's class, or
    - sample-wise (no `class_probs`): softmax(teacher / weight_temperature), the sample's own prediction;

    both to the power of `gamma` and not renormalised. A confident row is nearly one-hot, which makes all
    products of two weights, and so the wMSE, vanish; a large `weight_temperature` or a small `gamma` flattens
    it. IKL has gamma 1 and normalization "batch"; GKL (from the authors' code) any gamma and "weight". At
    gamma 1 the two agree.

    Args:
        student_logits: Floating, (N, C) or (N, C, d1, ...), not tempered.
        teacher_logits: Same shape.
        class_probs: (C, C), row y holds the mean prediction over the samples of class y.
        target: Class indices (N[, d1, ...]); given exactly if `class_probs` is.
        wmse_weight: Weight of the wMSE.
        ce_weight: Weight of the SCE.
        gamma: Exponent ≥ 0 of the weights; 0 makes them uniform.
        temperature: Temperature > 0 of the SCE; the wMSE sees the plain logits.
        weight_temperature: Temperature > 0 of sample-wise weights. Class-wise weights were tempered when
            they were accumulated.
        normalization: As in `pairwise_wmse`.
        reduction: "none" gives shape (N[, d1, ...]), "mean" and "sum" a scalar.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or (on a CPU) if `target` leaves [0, C).

    Example:
        >>> import torch
        >>> ikl_terms(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), weight_temperature=1e6, wmse_weight=4.0)
        IKLTerms(loss=tensor(2.6931), wmse=tensor(0.5000), soft_ce=tensor(0.6931))
    """
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    _check_class_probs(class_probs, target, student_logits)
    check_positive(temperature=temperature, weight_temperature=weight_temperature)
    check_choice("reduction", reduction, Reduction)
    check_choice("normalization", normalization, Normalization)
    check_range("gamma", gamma, 0, math.inf)

    student, teacher = upcast(student_logits, teacher_logits)
    soft_target = softmax(teacher, temperature)
    if class_probs is not None and target is not None:
        weight = _class_weight(class_probs, target, gamma, student.dtype)
    elif gamma == 1 and weight_temperature == temperature:
        weight = soft_target
    else:
        weight = _sample_weight(teacher, weight_temperature, gamma)
    wmse = reduce(_wmse(student, teacher, weight, normalization), reduction)
    soft_ce = reduce(_soft_ce(student, soft_target, temperature), reduction)
    return IKLTerms(wmse_weight * wmse + ce_weight * soft_ce, wmse, soft_ce)


def _wmse(student: Tensor, teacher: Tensor, weight: Tensor, normalization: Normalization) -> Tensor:
    """The wMSE of each position; `weight` has the logits' shape and no gradient."""
    total = weight.sum(1)
    gap = _centred(student, weight, total) - _centred(teacher, weight, total)
    weighted = weight * gap
    # The second term is only what rounding left of the mean, but the second derivative needs it.
    value = 0.5 * (total * (weighted * gap).sum(1) - weighted.sum(1).square())
    if normalization == "batch":
        return value
    pair_weight = total.square().sum()
    return value * torch.where(pair_weight > 0, value.numel() / pair_weight, 0.0)


def _centred(logits: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Less the weighted mean of the row, which takes no gradient: the wMSE does not depend on it.

    Centred first, logits of +400 and -100 still have a difference with seven digits in float32, not four.
    """
    mean = (weight * logits.detach()).sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return logits - mean.unsqueeze(1)


def _soft_ce(student: Tensor, soft_target: Tensor, temperature: float) -> Tensor:
    return -(soft_target * F.log_softmax(tempered(student, temperature), 1)).sum(1)


def _sample_weight(teacher: Tensor, temperature: float, gamma: float) -> Tensor:
    if gamma == 1:
        return softmax(teacher, temperature)
    # A probability may underflow where its power is not small: exp(-200)^0.1 is exp(-20).
    return (gamma * F.log_softmax(tempered(teacher.detach(), temperature), 1)).exp()


def _class_weight(class_probs: Tensor, target: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    rows = rows_of_target(class_probs.detach(), target).to(dtype)
    weight = rows if gamma == 1 else rows.pow(gamma)  # 0^0 is 1
    return weight.reshape(*target.shape, class_probs.shape[1]).movedim(-1, 1)


def _check_class_probs(class_probs: Tensor | None, target: Tensor | None, logits: Tensor) -> None:
    if class_probs is None and target is None:
        return
    if class_probs is None or target is None:
        given, missing = ("class_probs", "target") if target is None else ("target", "class_probs")
        raise ValueError(f"`{missing}` is missing: `{given}` was given, and class-wise weights need both")
    check_square("class_probs", class_probs, logits)
    check_target(target, logits)


def _check_weight(weight: Tensor, logits: Tensor) -> None:
    sizes = zip(reversed(weight.shape), reversed(logits.shape), strict=False)
    if weight.ndim > logits.ndim or any(found not in (1, size) for found, size in sizes):
        expected = f"the logits' shape {tuple(logits.shape)}"
        raise ValueError(f"`weight` must be broadcastable to {expected}, got {tuple(weight.shape)}")
