import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_methods.functional import random_stripes, sample_stripes, sinusoidal_stripes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_stripes(color, linewidth, spacing, frequency, phase, amplitude, angle, size):
    """Column by column and copy by copy on an RGB canvas, then rotated."""
    canvas_size = int(1.5 * size)
    canvas = np.empty((canvas_size, canvas_size, 3))
    canvas[:] = color

    def paint(x, low, high):
        canvas[min(max(int(low), 0), canvas_size) : min(max(int(high), 0), canvas_size), x] = 1 - np.array(color)

    for x in range(canvas_size):
        y = amplitude * math.sin(frequency * x + phase) + size / 2
        low, high = int(max(0, y - linewidth)), int(min(size - 1, y + linewidth))
        paint(x, low, high)
        for k in range(1, int(canvas_size / spacing) + 2):
            paint(x, low - k * spacing, high - k * spacing)
            paint(x, low + k * spacing, high + k * spacing)
    image = Image.fromarray((255 * canvas).astype(np.uint8)).rotate(angle, expand=True)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


@pytest.mark.parametrize(("seed", "size"), [(0, 256), (1, 256), (2, 256), (3, 64), (4, 31)])
def test_against_columns_and_copies(seed, size):
    draw = sample_stripes(generator=seeded(seed))
    found = sinusoidal_stripes(**draw._asdict(), size=size)
    assert (found.dtype, found.shape) == (torch.uint8, (3, size, size))
    assert found.equal(plain_stripes(*draw, size))


def test_stripes_that_leave_the_image():
    """Wide waves: the middle stripe is cut at both borders, where it may vanish, and its copies with it."""
    draw = sample_stripes(generator=seeded(5))._replace(amplitude=60.0, frequency=0.1, linewidth=4.0, spacing=30.0)
    assert sinusoidal_stripes(**draw._asdict(), size=64).equal(plain_stripes(*draw, 64))


def test_the_angle_turns_counter_clockwise():
    draw = sample_stripes(generator=seeded(1))._replace(angle=0.0)
    upright = sinusoidal_stripes(**draw._asdict(), size=128)
    turned = sinusoidal_stripes(**draw._replace(angle=90.0)._asdict(), size=128)
    assert turned.equal(torch.rot90(upright, 1, (1, 2)))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_two_complementary_colours_at_any_size(size):
    for seed in range(8):
        image = random_stripes(size=size, generator=seeded(seed))
        color = sample_stripes(generator=seeded(seed)).color
        allowed = {tuple(int(255 * c) for c in color), tuple(int(255 * (1 - c)) for c in color)}
        assert set(map(tuple, image.flatten(1).T.tolist())) <= allowed


def test_a_draw_can_be_replayed_and_is_in_range():
    for seed in range(50):
        draw = sample_stripes(generator=seeded(seed))
        assert draw == sample_stripes(generator=seeded(seed))
        assert all(0 <= c < 1 for c in draw.color)
        assert 5 <= draw.linewidth < 20
        assert 3 <= draw.spacing / draw.linewidth < 5
        assert 4 <= 2 * math.pi / draw.frequency < 1004
        assert -100 <= draw.phase / draw.frequency < 100
        assert 10 <= draw.amplitude < 110
        assert 0 <= draw.angle < 360
    expected = sinusoidal_stripes(**draw._asdict(), size=32)
    assert random_stripes(size=32, generator=seeded(49)).equal(expected)
