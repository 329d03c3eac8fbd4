"""Zero-shot classification by text prompts, as CLIP does it: the teacher of ProReg, and the start of its student.

Sources: the code of Zhu et al., arXiv 2301.12429 (one template, cosines); ensembles of templates as in Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._logits import check_range, upcast

#: A zero vector has the norm 1e-12 here, so that its direction is zero instead of NaN.
_TINY = 1e-12


def fill_prompts(classnames: Sequence[str], templates: str | Sequence[str]) -> list[list[str]]:
    """The sentences that describe each class.

    Args:
        classnames: K names, in the order of the labels.
        templates: One or P templates. "{}" stands for the name; without it the name and a full stop follow.

    Returns:
        K lists of P sentences.

    Raises:
        ValueError: If there is no name or no template, or `classnames` is a single string.

    Example:
        >>> fill_prompts(["dog", "cat"], ["a photo of a", "a sketch of a {}!"])
        [['a photo of a dog.', 'a sketch of a dog!'], ['a photo of a cat.', 'a sketch of a cat!']]
    """
    if isinstance(classnames, str) or not classnames:
        raise ValueError(f"`classnames` must be a sequence of names, got {classnames!r}")
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError("`templates` must hold at least one template, got none")
    whole = [template if "{}" in template else f"{template.strip()} {{}}." for template in templates]
    return [[template.replace("{}", name) for template in whole] for name in classnames]


def prompt_text_features(features: Tensor, *, normalize: bool = True) -> Tensor:
    """One vector for each class from the encoded sentences.

    Args:
        features: Floating, (K, D), or (K, P, D) for P sentences of a class.
        normalize: Unit norm for each vector, before and after the mean over the sentences. False leaves the vectors
            as they are, and (K, D) unchanged.

    Returns:
        (K, D), float32 at least if `normalize`.

    Raises:
        ValueError: If the shape or dtype does not fit.

    Example:
        >>> import torch
        >>> prompt_text_features(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]]))
        tensor([[0.7071, 0.7071]])
    """
    if features.ndim not in (2, 3) or not features.is_floating_point():
        found = f"{tuple(features.shape)} of {features.dtype}"
        raise ValueError(f"`features` must be floating and of shape (K, D) or (K, P, D), got {found}")
    if not normalize:
        return features if features.ndim == 2 else features.mean(1)
    (features,) = upcast(features)
    directions = F.normalize(features, dim=-1, eps=_TINY)
    return directions if features.ndim == 2 else F.normalize(directions.mean(1), dim=-1, eps=_TINY)


def prompt_logits(
    features: Tensor, text_features: Tensor, *, logit_scale: float | Tensor = 100.0, eps: float = 0.0
) -> Tensor:
    """Scaled cosines of images with the classes' texts; gradients reach all three tensors.

    Args:
        features: Of N images, floating, (N, D), of any norm.
        text_features: Of K classes, floating, (K, D), of any norm: the prompts, or a head that began as them.
        logit_scale: The multiplier itself and not its logarithm, a number or a 0-d tensor.
        eps: Least norm ≥ 0 to divide by; zero vectors give zero in any case.

    Returns:
        (N, K), in float32 at least, under autocast too: at scale 100 half-precision logits have no digits behind the
        point.

    Raises:
        ValueError: If shapes or dtypes do not fit or `eps` is negative.

    Example:
        >>> import torch
        >>> prompt_logits(torch.tensor([[3.0, 4.0]]), torch.eye(2), logit_scale=10.0)
        tensor([[6., 8.]])
    """
    check_features(features, text_features)
    if isinstance(logit_scale, Tensor) and logit_scale.ndim:
        raise ValueError(f"`logit_scale` must be a number or a 0-d tensor, got shape {tuple(logit_scale.shape)}")
    check_range("eps", eps, 0, float("inf"))
    with torch.autocast(features.device.type, enabled=False):
        features, text_features = upcast(features, text_features)
        return cosine_logits(features, F.normalize(text_features, dim=1, eps=max(eps, _TINY)), logit_scale, eps)


def check_features(features: Tensor, text_features: Tensor) -> None:
    """Two floating matrices with the same number of columns."""
    for name, matrix in (("features", features), ("text_features", text_features)):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            found = f"{tuple(matrix.shape)} of {matrix.dtype}"
            raise ValueError(f"`{name}` must be floating and of two dimensions, got {found}")
    if features.shape[1] != text_features.shape[1]:
        columns = f"{features.shape[1]} as `features` has, got {text_features.shape[1]}"
        raise ValueError(f"the number of columns of `text_features` must be {columns}")


def cosine_logits(features: Tensor, directions: Tensor, logit_scale: float | Tensor, eps: float = 0.0) -> Tensor:
    """`prompt_logits` for text features that have unit norm already; nothing is checked."""
    with torch.autocast(features.device.type, enabled=False):
        features, directions = upcast(features, directions)
        return logit_scale * (F.normalize(features, dim=1, eps=max(eps, _TINY)) @ directions.T)
