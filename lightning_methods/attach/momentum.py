"""A teacher that is the student itself, some steps behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_methods.attach._lightning import plain_copy
from lightning_methods.attach.address import Address, AddressLike
from lightning_methods.attach.teacher import Teacher


class MomentumTeacher(Teacher):
    """A copy of the module that follows it slowly: the exponential moving average of its weights.

    It is made when the method attaches, so callbacks that change the module's parts come before it. `update` moves it;
    the method that owns it calls that once a step and keeps `state_dict` in its own.

    Args:
        inputs: Address of what the module's `forward` is called with, or one for each argument.
        momentum: Share of the old average that an update keeps, in [0, 1].
        transform: Applied to every input first.

    Raises:
        ValueError: If `momentum` is outside [0, 1].

    Source:
        He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv 1911.05722).
    """

    def __init__(
        self,
        *,
        inputs: list[AddressLike] | AddressLike = "module@input",
        momentum: float = 0.995,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"Expected `momentum` to be in [0, 1], but got {momentum}.")
        super().__init__(nn.Identity, inputs=inputs, transform=transform)  # the source is known in `attach`
        self.momentum = momentum

    def __repr__(self) -> str:
        return f"MomentumTeacher({self.momentum})"

    def attach(self, student: nn.Module, device: torch.device, addresses: list[Address]) -> None:
        """Copies the student, unless there is a copy already, and hooks what `addresses` read."""
        if self._network is None:
            self._network = plain_copy(student).requires_grad_(False)
        super().attach(student, device, addresses)

    def update(self, student: nn.Module) -> None:
        """Moves the average's floating parameters and buffers towards the student's; others are copied."""
        follow(self.network, student, self.momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """The average; empty before the method was attached."""
        return {} if self._network is None else self._network.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        if state_dict:
            self.network.load_state_dict(state_dict)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """One update of a moving average: average ← momentum · average + (1 − momentum) · module."""
    there = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    pairs = [
        (mine, there[name].detach())
        for name, mine in (*average.named_parameters(), *average.named_buffers())
        if name in there
    ]
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    if floating:
        mine, new = map(list, zip(*floating, strict=True))
        torch._foreach_lerp_(mine, new, 1 - momentum)
    for own, other in pairs:
        if not own.is_floating_point():
            own.copy_(other)
