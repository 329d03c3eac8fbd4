"""Backgrounds of sinusoidal stripes, which no training video has: one of the three kinds of the SCUBA test sets."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional._logits import check_positive, check_range


class StripesDraw(NamedTuple):
    """The parameters of `sinusoidal_stripes`, in plain numbers."""

    color: tuple[float, float, float]
    linewidth: float
    spacing: float
    frequency: float
    phase: float
    amplitude: float
    angle: float


def sinusoidal_stripes(
    *,
    color: tuple[float, float, float],
    linewidth: float,
    spacing: float,
    frequency: float,
    phase: float,
    amplitude: float,
    angle: float,
    size: int = 256,
) -> Tensor:
    r"""A square image of parallel wavy stripes on a ground of the complementary colour.

    On a canvas of 1.5 times the size, the middle of one stripe in column x is
    $y = A \sin(\omega x + \varphi) + S / 2$; copies lie every `spacing` rows above and below. The canvas is rotated
    and its centre cut out.

    Args:
        color: Of the ground, RGB in [0, 1]; the stripes have 1 − color.
        linewidth: Half the height of a stripe, in pixels. The middle stripe is cut off at the rows 0 and S − 1, as
            in the authors' code, although the canvas goes further, and so are its copies.
        spacing: Rows between the middles of two stripes.
        frequency: ω, radians in a pixel.
        phase: φ, radians.
        amplitude: A, pixels.
        angle: Degrees, counter-clockwise.
        size: S, pixels.

    Returns:
        uint8 (3, S, S).

    Raises:
        ValueError: If a parameter is out of its range.

    Source: Li et al., ICCV 2023, from the authors' code.

    Example:
        >>> straight = {"frequency": 0.0, "phase": 0.0, "amplitude": 0.0, "angle": 0.0}
        >>> image = sinusoidal_stripes(color=(1.0, 0.0, 0.5), linewidth=2, spacing=5, size=10, **straight)
        >>> image[:, 0:3, 0]
        tensor([[255,   0,   0],
                [  0, 255, 255],
                [127, 127, 127]], dtype=torch.uint8)
    """
    for channel in color:
        check_range("color", channel, 0, 1)
    if len(color) != 3:
        raise ValueError(f"`color` must have 3 values, got {len(color)}")
    check_positive(linewidth=linewidth, spacing=spacing, size=size)
    canvas = int(1.5 * size)
    x = torch.arange(canvas, dtype=torch.float64)
    middle = amplitude * torch.sin(frequency * x + phase) + size / 2
    stripes = _rotated_centre(_stripes(middle, linewidth, spacing, size, canvas), angle, size)
    ground = torch.tensor(color, dtype=torch.float64)[:, None, None]
    return (255 * torch.where(stripes, 1 - ground, ground)).to(torch.uint8)


def random_stripes(*, size: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """`sinusoidal_stripes` with parameters from `sample_stripes`: uint8 (3, S, S).

    Example:
        >>> import torch
        >>> random_stripes(size=8, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 8, 8])
    """
    return sinusoidal_stripes(**sample_stripes(generator=generator)._asdict(), size=size)


def sample_stripes(*, generator: torch.Generator | None = None) -> StripesDraw:
    """Draw parameters for `sinusoidal_stripes` with the distributions of the authors' code, which has size 256.

    Args:
        generator: Of the CPU; None: the global one.

    Example:
        >>> import torch
        >>> draw = sample_stripes(generator=torch.Generator().manual_seed(0))
        >>> 5 <= draw.linewidth < 20 and 3 <= draw.spacing / draw.linewidth < 5
        True
    """
    red, green, blue, *u = torch.rand(9, dtype=torch.float64, generator=generator).tolist()
    linewidth = 5 + 15 * u[0]
    frequency = 2 * math.pi / (4 + 1000 * u[2])
    return StripesDraw(
        color=(red, green, blue),
        linewidth=linewidth,
        spacing=(3 + 2 * u[1]) * linewidth,
        frequency=frequency,
        phase=(200 * u[3] - 100) * frequency,
        amplitude=10 + 100 * u[4],
        angle=360 * u[5],
    )


def _stripes(middle: Tensor, linewidth: float, spacing: float, size: int, canvas: int) -> Tensor:
    """Boolean (canvas, canvas): rows that some copy of the stripe around `middle` (canvas,) covers."""
    low = (middle - linewidth).clamp(min=0).trunc()
    high = (middle + linewidth).clamp(max=size - 1).trunc()
    copies = math.ceil(canvas / spacing)
    shift = spacing * torch.arange(-copies, copies + 1, dtype=middle.dtype)[:, None]
    first, last = ((end + shift).trunc().clamp(0, canvas).long() for end in (low, high))
    # Each copy enters at its first row and leaves at its last: the running sum counts the copies that cover a row.
    edges = torch.zeros(canvas + 1, canvas, dtype=torch.long)
    edges.scatter_add_(0, first, torch.ones_like(first)).scatter_add_(0, last, -torch.ones_like(last))
    return edges.cumsum(0)[:canvas] > 0


def _rotated_centre(mask: Tensor, angle: float, size: int) -> Tensor:
    import numpy as np
    from PIL import Image

    image = Image.fromarray(mask.to(torch.uint8).numpy()).rotate(angle, expand=True)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).bool()
