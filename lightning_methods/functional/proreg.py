r"""ProReg: fine-tune with labels where the pretrained model's prompts fail, and with its prompts where they do not.

Every sample has two supervisions: its label, and the soft prediction of the frozen pretrained model from text prompts
("a photo of a dog."). A weight for each sample, from how well the two models predict the label, trades them off:

$L = \mathrm{mean}_i\,(1 - w_i)\,\mathrm{ce}_i + \alpha\,\mathrm{mean}_i\,w_i\,\mathrm{kl}_i$

Losses and weights are computed in float32 at least and without waiting for the device: on CUDA a target out of range
is a device-side assertion, on a CPU a ValueError.

Source: Zhu et al., "Debiased Fine-Tuning for Vision-language Models by Prompt Regularization", AAAI 2023, arXiv
2301.12429. Only the abstract, the introduction and Figure 2 could be read: the formulas are those of the authors' code,
and soft labels and ensembles of prompts are our extensions. Of the code's three weights one is active and two are
commented out; which one made the paper's tables is not known.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_methods.functional._index import pick
from lightning_methods.functional._logits import (
    Reduction,
    check_choice,
    check_logits,
    check_positive,
    check_range,
    check_target,
    tempered,
    upcast,
)

Weighting: TypeAlias = Literal["probability", "loss", "constant"]


class ProRegTerms(NamedTuple):
    """One number for each sample: loss = (1 − weight) · cross_entropy + alpha · weight · prompt.

    All four are zero at ignored samples. `weight` has no gradient.
    """

    loss: Tensor
    cross_entropy: Tensor
    prompt: Tensor
    weight: Tensor


def proreg_loss(
    logits: Tensor,
    prompt_logits: Tensor,
    target: Tensor,
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
) -> Tensor:
    """The ProReg loss: `proreg_terms(...).loss`, reduced.

    "mean" runs over the samples that are not ignored and is zero, with a graph, if all are; "none" has zeros at the
    ignored ones.

    Example:
        >>> import torch
        >>> logits, prompts = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> proreg_loss(logits, prompts, torch.tensor([0]), weighting="constant", constant_weight=0.0)
        tensor(0.1269)
    """
    check_choice("reduction", reduction, Reduction)
    if temperature == 1 and not entropy_offset:
        _check_inputs(logits, prompt_logits, target)
        check_options(alpha, weighting, gamma, prompt_power, constant_weight, temperature, eps)
        options = (weighting, gamma, prompt_power, constant_weight, eps)
        loss = _fused_loss(logits, prompt_logits, target, ignore_index, alpha, options)
    else:
        loss = proreg_terms(
            logits,
            prompt_logits,
            target,
            alpha=alpha,
            weighting=weighting,
            gamma=gamma,
            prompt_power=prompt_power,
            constant_weight=constant_weight,
            temperature=temperature,
            eps=eps,
            entropy_offset=entropy_offset,
            ignore_index=ignore_index,
        ).loss
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else mean_over_kept(loss, target, ignore_index)


def _fused_loss(
    logits: Tensor,
    prompt_logits: Tensor,
    target: Tensor,
    ignore_index: int,
    alpha: float,
    options: tuple[Weighting, float, float, float, float],
) -> Tensor:
    """The losses (N,) at temperature 1 as one product with soft labels: −Σ_k q_k log p_k.

    q = (1 − w) · onehot(y) + alpha · w · softmax(z^p), zero at ignored samples. Only q and log p are kept for the
    backward pass.
    """
    student, teacher = upcast(logits, prompt_logits.detach())
    kept = _kept(target, ignore_index)
    log_probs = student.log_softmax(1)
    with torch.no_grad():
        q = teacher.log_softmax(1)
        weight = _weight(_cross_entropy(log_probs, target, kept), _cross_entropy(q, target, kept), *options)[:, None]
        q.exp_().mul_(alpha * weight)
        if kept is None:
            q.add_((1 - weight) * target)
        else:
            q.scatter_add_(1, torch.where(kept, target, 0).long()[:, None], 1 - weight).mul_(kept[:, None])
    return -(q * log_probs).sum(1)


def mean_over_kept(values: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The mean of values (N,), zero at ignored samples, over the others; zero if there are none."""
    kept = _kept(target, ignore_index)
    return values.sum() / (max(len(values), 1) if kept is None else kept.sum().clamp_min(1))


def proreg_terms(
    logits: Tensor,
    prompt_logits: Tensor,
    target: Tensor,
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
) -> ProRegTerms:
    r"""The loss of each sample with its parts.

    For a sample with label y, fine-tuned logits z and prompt logits z^p, which take no gradient:

    - cross_entropy: $-\log \mathrm{softmax}(z)_y$;
    - prompt: $-T^2 \sum_k \mathrm{softmax}(z^p / T)_k \log \mathrm{softmax}(z / T)_k$, which has the gradients of
      T² KL(prompts ‖ model). Its value lacks the prompts' entropy, unless `entropy_offset`;
    - weight: `proreg_weight`.

    Args:
        logits: z, floating, (N, K), K ≥ 2.
        prompt_logits: z^p, same shape.
        target: Class indices (N,), or soft labels, floating, (N, K): the cross-entropy is then −Σ_k y_k log p_k.
        alpha: Scale ≥ 0 of the prompt term; the authors use 1 to 2.
        weighting: As in `proreg_weight`, like the next three and `eps`.
        gamma: As above.
        prompt_power: As above.
        constant_weight: As above.
        temperature: T > 0, of the prompt term only.
        eps: As above.
        entropy_offset: Subtract T² times the entropy of softmax(z^p / T): the true KL divergence, zero at its minimum.
        ignore_index: Target of samples to leave out.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or (on a CPU) if `target` leaves [0, K).

    Example:
        >>> import torch
        >>> logits, prompts = torch.zeros(1, 2), torch.tensor([[30.0, 0.0]])
        >>> terms = proreg_terms(logits, prompts, torch.tensor([0]), alpha=2.0, eps=0.0)
        >>> [round(term.item(), 4) for term in terms]
        [1.1552, 0.6931, 0.6931, 0.6667]
    """
    _check_inputs(logits, prompt_logits, target)
    check_options(alpha, weighting, gamma, prompt_power, constant_weight, temperature, eps)

    student, teacher = upcast(logits, prompt_logits.detach())
    log_probs, prompt_log_probs = student.log_softmax(1), teacher.log_softmax(1)
    kept = _kept(target, ignore_index)
    ce = _cross_entropy(log_probs, target, kept)
    pe = _cross_entropy(prompt_log_probs, target, kept)
    weight = _weight(ce, pe, weighting, gamma, prompt_power, constant_weight, eps)

    if temperature != 1:
        log_probs = tempered(student, temperature).log_softmax(1)
        prompt_log_probs = tempered(teacher, temperature).log_softmax(1)
    error = log_probs - prompt_log_probs if entropy_offset else log_probs
    prompt = -(temperature**2) * (prompt_log_probs.exp() * error).sum(1)
    if kept is not None:
        prompt, weight = torch.where(kept, prompt, 0), torch.where(kept, weight, 0)
    return ProRegTerms((1 - weight) * ce + alpha * weight * prompt, ce, prompt, weight)


@torch.no_grad()
def proreg_weight(
    logits: Tensor,
    prompt_logits: Tensor,
    target: Tensor,
    *,
    weighting: Weighting = "probability",
    gamma: float = 1.0,
    prompt_power: float = 1.0,
    constant_weight: float = 0.5,
    eps: float = 1e-5,
    ignore_index: int = -100,
) -> Tensor:
    r"""How much each sample listens to the prompts rather than to its label; no gradient.

    With p the model's and q the prompts' probability of the label, ce = −log p and pe = −log q, all at temperature 1:

    - "probability": $w = q^\kappa / (p + q^\kappa + \varepsilon)$. With κ = 10 it is the weight that is active in the
      authors' code, where the prompts count only if they are sure of the label; with κ = 1, our default, it is one of
      those commented out, starts near ½ and stays below it, so that the prompts never fall silent.
    - "loss": $w = \mathrm{ce}^\gamma / (\mathrm{ce}^\gamma + \mathrm{pe}^\gamma + \varepsilon)$, commented out, but the
      only one with the γ that the authors' settings tune. It vanishes as the model fits its training set.
    - "constant": w = λ, plain distillation.

    Args:
        logits: Of the fine-tuned model, floating, (N, K), K ≥ 2.
        prompt_logits: Of the frozen model, same shape.
        target: Class indices (N,), or soft labels (N, K): p and q are then exp(Σ_k y_k log p_k) and likewise.
        weighting: See above.
        gamma: γ > 0, with "loss"; the authors use 0.5 to 2.
        prompt_power: κ > 0, with "probability".
        constant_weight: λ in [0, 1], with "constant".
        eps: ε ≥ 0.
        ignore_index: Target of samples to leave out.

    Returns:
        (N,), in [0, 1], float32 at least; zero at ignored samples.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or (on a CPU) if `target` leaves [0, K).

    Example:
        >>> import torch
        >>> prompts = torch.tensor([[4.0, 0.0], [0.0, 4.0]])  # right, wrong
        >>> proreg_weight(torch.zeros(2, 2), prompts, torch.tensor([0, 0]))
        tensor([0.6626, 0.0347])
    """
    _check_inputs(logits, prompt_logits, target)
    _check_weighting(weighting, gamma, prompt_power, constant_weight, eps)
    student, teacher = upcast(logits, prompt_logits)
    kept = _kept(target, ignore_index)
    ce = _cross_entropy(student.log_softmax(1), target, kept)
    pe = _cross_entropy(teacher.log_softmax(1), target, kept)
    weight = _weight(ce, pe, weighting, gamma, prompt_power, constant_weight, eps)
    return weight if kept is None else torch.where(kept, weight, 0)


@torch.no_grad()
def _weight(
    ce: Tensor,
    pe: Tensor,
    weighting: Weighting,
    gamma: float,
    prompt_power: float,
    constant_weight: float,
    eps: float,
) -> Tensor:
    """Without a graph from the start: the derivative of ce^γ at 0 is infinite for γ < 1."""
    if weighting == "constant":
        return torch.full_like(ce, constant_weight)
    if weighting == "loss":
        prompts, model = ce.pow(gamma), pe.pow(gamma)
    else:
        prompts, model = (-prompt_power * pe).exp(), (-ce).exp()
    # The clamp acts only where all is zero, with eps = 0: the label then counts in full.
    return prompts / (model + prompts + eps).clamp_min(torch.finfo(ce.dtype).tiny)


def _kept(target: Tensor, ignore_index: int) -> Tensor | None:
    return None if target.ndim == 2 else target != ignore_index


def _cross_entropy(log_probs: Tensor, target: Tensor, kept: Tensor | None) -> Tensor:
    """(N,), against soft labels if there is no `kept`, otherwise zero where it is False."""
    if kept is None:
        return -(target.detach().to(log_probs.dtype) * log_probs).sum(1)
    index = torch.where(kept, target, 0).long()
    return -torch.where(kept, pick("target", index[:, None], log_probs)[:, 0], 0)


def _check_inputs(logits: Tensor, prompt_logits: Tensor, target: Tensor) -> None:
    check_logits(logits=logits, prompt_logits=prompt_logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"`logits` must have shape (N, K) with K >= 2, got {tuple(logits.shape)}")
    if not target.is_floating_point():
        check_target(target, logits)
    elif target.shape != logits.shape:
        found = f"{tuple(target.shape)} of {target.dtype}"
        raise ValueError(f"`target` must hold class indices (N,) or soft labels {tuple(logits.shape)}, got {found}")


def check_options(
    alpha: float,
    weighting: Weighting,
    gamma: float,
    prompt_power: float,
    constant_weight: float,
    temperature: float,
    eps: float,
) -> None:
    """The ranges of the settings of `proreg_terms`."""
    check_range("alpha", alpha, 0, math.inf)
    check_positive(temperature=temperature)
    _check_weighting(weighting, gamma, prompt_power, constant_weight, eps)


def _check_weighting(
    weighting: Weighting, gamma: float, prompt_power: float, constant_weight: float, eps: float
) -> None:
    check_choice("weighting", weighting, Weighting)
    check_positive(gamma=gamma, prompt_power=prompt_power)
    check_range("constant_weight", constant_weight, 0, 1)
    check_range("eps", eps, 0, math.inf)
