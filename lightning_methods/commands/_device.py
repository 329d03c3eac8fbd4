"""The device of a model, as an argument."""

from __future__ import annotations

from argparse import ArgumentTypeError

import torch


def as_device(name: str) -> torch.device:
    """A device that this machine has.

    Raises:
        ArgumentTypeError: There is no such device, or PyTorch was built without it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ArgumentTypeError(f"{name!r} is no device of this machine: {reason}") from None
