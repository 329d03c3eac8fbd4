"""Bags in the shapes that modules give them, brought into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_methods.attach import Step
from lightning_methods.attach.address import AnyAddress, describe

#: Arguments that name the features and the outputs of each view.
VIEWS = (("features", "logits"), ("strong_features", "strong_logits"))


class Bags(NamedTuple):
    """The B bags of a step, with V views of K snippets.

    Attributes:
        features: (B, V, K, D).
        logits: (B, V, K, 2).
        labels: (B,), above 0 for abnormal.
        ids: (B,), int64.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    ids: Tensor

    @property
    def scores(self) -> Tensor:
        """Abnormal probabilities of the weak view, (B, K), without gradient."""
        return self.logits[:, 0].detach().softmax(-1)[..., 1]


def named(argument: str, where: AnyAddress | None) -> str:
    """An argument and its address, for an error."""
    return f"`{argument}` at {where!r}"


def read_bags(step: Step, where: Mapping[str, AnyAddress], *, width: int, probabilities: bool) -> Bags:
    """Reads and checks one step's bags.

    Args:
        step: The step, or a probe.
        where: Address of each argument; without those of the second view there is one.
        width: D.
        probabilities: Whether outputs are probabilities.

    Raises:
        ValueError: If shapes or dtypes disagree; the error names arguments and addresses.
    """
    labels, ids = (_one_a_bag(named(name, where[name]), step[where[name]]) for name in ("bag_labels", "bag_ids"))
    if len(ids) != len(labels) or ids.is_floating_point():
        raise ValueError(
            f"Expected {named('bag_ids', where['bag_ids'])} to be an integer for each of the {len(labels)} bags of "
            f"{named('bag_labels', where['bag_labels'])}, but got {describe(ids)}."
        )
    features: list[Tensor] = []
    logits: list[Tensor] = []
    for of_features, of_logits in VIEWS:
        if of_features in where:
            what = named(of_features, where[of_features])
            z = _features(what, step[where[of_features]], len(labels), width)
            if features and z.shape != features[0].shape:
                expected = f"{named('features', where['features'])}, {list(features[0].shape)}"
                raise ValueError(f"Expected {what} to be of the shape of {expected}, but got {list(z.shape)}.")
            features.append(z)
            outputs = f"{named(of_logits, where[of_logits])}, for {what},"
            logits.append(as_logits(outputs, step[where[of_logits]], z, probabilities))
    return Bags(torch.stack(features, 1), torch.stack(logits, 1), labels, ids.long())


def as_logits(what: str, value: Any, features: Tensor, probabilities: bool) -> Tensor:
    """Two logits of every snippet, (B, K, 2), in float32 at least.

    Args:
        what: Names the value in errors.
        value: Logits or probabilities of both classes, or of class 1 alone, bag by bag or flat.
        features: (B, K, D), of the same snippets.
        probabilities: Whether they are probabilities.
    """
    bags, snippets, _ = features.shape
    size = bags * snippets
    if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:1] in ((bags,), (size,)):
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        if wide.numel() == 2 * size and wide.shape[-1] == 2:
            both = wide.reshape(bags, snippets, 2)
            return _log(both) if probabilities else both
        if wide.numel() == size:
            single = wide.reshape(bags, snippets)
            if probabilities:
                return torch.stack([_log(1 - single), _log(single)], -1)
            return torch.stack([torch.zeros_like(single), single], -1)
    kind = "probabilities" if probabilities else "logits"
    raise ValueError(
        f"Expected {what} to be floating {kind} of B = {bags} bags with K = {snippets} snippets, in shape (B, K, 2), "
        f"(B * K, 2), (B, K) or (B, K, 1), but got {describe(value)}."
    )


def _features(what: str, value: Any, bags: int, width: int) -> Tensor:
    if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (width,):
        if value.ndim == 3 and len(value) == bags:
            return value
        if value.ndim == 2 and len(value) and len(value) % bags == 0:
            return value.view(bags, -1, width)
    raise ValueError(
        f"Expected {what} to be floating features (B, K, D) or (B * K, D) of B = {bags} bags, with D = {width} as "
        f"`in_features` says, but got {describe(value)}."
    )


def _one_a_bag(what: str, value: Any) -> Tensor:
    """(B,) of (B,) or (B, 1)."""
    if isinstance(value, Tensor) and value.ndim and len(value) == value.numel() > 0:
        return value.flatten()
    raise ValueError(f"Expected {what} to be one number a bag, (B,), but got {describe(value)}.")


def _log(probabilities: Tensor) -> Tensor:
    # At a probability of 0 the logarithm is infinite, and its gradient times 0 not a number.
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
