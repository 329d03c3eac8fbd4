"""How the weight of a method's terms grows during training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Ramp:
    """A linear rise from 0 to 1, counted in epochs or optimizer steps from 1.

    The factor is `min(1, max(0, (now + 1 - start) / length))` with `now` counted from 0.

    Args:
        length: Epochs (or steps) until the factor is 1; 0 or 1 is full weight from the first on. Between 0 and 1:
            a share of the training's epochs, resolved when it begins.
        start: First epoch (or step) of the rise, counted from 0; before it the factor is 0.
        unit: What is counted.

    Raises:
        ValueError: If `length` or `start` is negative.

    Example:
        >>> ramp = Ramp(4)
        >>> [ramp.at(epoch) for epoch in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    length: float
    start: int = 0
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        for name in ("length", "start"):
            if getattr(self, name) < 0:
                raise ValueError(f"Expected `{name}` of a ramp to be at least 0, but got {getattr(self, name)}.")

    def resolved(self, max_epochs: int | None) -> Ramp:
        """The ramp in epochs, where its length is a share of the training.

        Raises:
            ValueError: If the training has no known number of epochs.
        """
        if not 0 < self.length < 1:
            return self
        if max_epochs is None or max_epochs < 0:
            raise ValueError(
                f"A warm-up over {self.length} of the training needs its number of epochs, but the Trainer has "
                f"max_epochs={max_epochs}; set it, or give the warm-up in epochs."
            )
        return replace(self, length=self.length * max_epochs)

    def at(self, now: int) -> float:
        """The factor at epoch (or step) `now`, counted from 0."""
        return min(1.0, max(0.0, (now + 1 - self.start) / max(self.length, 1.0)))
