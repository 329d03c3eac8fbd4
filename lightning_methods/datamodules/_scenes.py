"""Rendered scenes of a few coloured shapes, and the captions that describe them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]


class Scene(NamedTuple):
    """One to four equal shapes in a row; every field is a word or phrase of its caption."""

    number: str
    size: str
    fill: str
    colour: str
    shape: str
    place: str
    ground: str


#: What the fields of a scene can be, the frequent ones first.
VALUES: Mapping[str, tuple[str, ...]] = {
    "number": ("two", "three", "one", "four"),
    "size": ("large", "small"),
    "fill": ("solid", "hollow"),
    "colour": ("red", "green", "blue", "yellow"),
    "shape": ("square", "circle", "triangle", "cross"),
    "place": ("at the top", "on the left", "at the bottom", "on the right"),
    "ground": ("black", "white", "grey"),
}
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
_COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (60, 90, 230), "yellow": (225, 190, 40)}
_GROUNDS = {"black": 20, "grey": 120, "white": 235}
#: Ways to say the same, in five orders of the words.
_SAYINGS = (
    "{number} {size} {fill} {colour} {shape} {place} {ground}",
    "{place} {number} {colour} {shape} {size} {fill} {ground}",
    "{ground} {number} {fill} {size} {colour} {shape} {place}",
    "{colour} {fill} {shape} {number} {size} {place} {ground}",
    "{number} {size} {colour} {shape} {fill} {ground} {place}",
)
_TAIL = 0.5  # each value is so much rarer than the one before it
_SCALE = 4  # shapes are drawn so much larger and then reduced, which smooths their edges


def draw_scene(random: np.random.Generator, *, tail: bool) -> Scene:
    """A scene at random.

    Args:
        random: Source of the draw.
        tail: Whether the later values of each field are rarer, as things in photographs are; else all are equally
            frequent.
    """
    fields = {}
    for name, values in VALUES.items():
        weights = np.array([_TAIL**place if tail else 1.0 for place in range(len(values))])
        fields[name] = values[random.choice(len(values), p=weights / weights.sum())]
    return Scene(**fields)


def changed(scene: Scene, field: str, random: np.random.Generator) -> Scene:
    """The scene with another value in one field."""
    others = [value for value in VALUES[field] if value != getattr(scene, field)]
    change: dict[str, Any] = {field: others[random.integers(len(others))]}
    return scene._replace(**change)


def describe(scene: Scene, saying: int = 0, omitted: Collection[str] = ()) -> str:
    """A caption of the scene.

    Args:
        scene: What to describe.
        saying: In which order, 0 to 4.
        omitted: Fields that it does not mention.

    Example:
        >>> scene = Scene("two", "small", "solid", "red", "circle", "on the left", "grey")
        >>> describe(scene)
        'two small solid red circles on the left against grey'
        >>> describe(scene, 1, omitted=["size", "ground"])
        'on the left two red circles solid'
    """
    plural = {"cross": "crosses"}.get(scene.shape, f"{scene.shape}s")
    shape = scene.shape if scene.number == "one" else plural
    words = scene._asdict() | {"shape": shape, "ground": f"against {scene.ground}"} | dict.fromkeys(omitted, "")
    return " ".join(_SAYINGS[saying].format(**words).split())


def render(groups: Sequence[Scene], seed: int, size: int) -> Pixels:
    """An image of one scene, or of several that share a ground.

    Args:
        groups: The scenes.
        seed: Where exactly the shapes lie, and the noise. Two renderings with one seed differ in what the scenes differ
            in, and in nothing else.
        size: Side of the image in pixels.

    Returns:
        RGB, (size, size, 3).
    """
    random = np.random.default_rng(seed)
    light = random.uniform(-15, 15)
    image = Image.new("RGB", (_SCALE * size, _SCALE * size), (round(_GROUNDS[groups[0].ground] + light),) * 3)
    for scene in groups:
        across = random.uniform(0.2, 0.3)
        along = random.permutation(4) * 0.24 + 0.14 + random.uniform(-0.03, 0.03, size=4)
        tint = random.uniform(-15, 15, size=3)
        for place in along[: _NUMBERS[scene.number]]:
            _draw_shape(ImageDraw.Draw(image), scene, across, place, tint)
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    noisy: Pixels = (small + random.normal(0, 6, small.shape)).clip(0, 255).round().astype(np.uint8)
    return noisy


def _draw_shape(
    draw: ImageDraw.ImageDraw, scene: Scene, across: float, along: float, tint: npt.NDArray[np.float64]
) -> None:
    x, y = {
        "at the top": (along, across),
        "at the bottom": (along, 1 - across),
        "on the left": (across, along),
        "on the right": (1 - across, along),
    }[scene.place]
    side = draw.im.size[0]
    radius = side * (0.11 if scene.size == "large" else 0.07)
    x, y = x * side, y * side
    colour = tuple(np.add(_COLOURS[scene.colour], tint).clip(0, 255).round().astype(int).tolist())
    style: dict[str, Any] = {"fill": colour} if scene.fill == "solid" else {"outline": colour, "width": side // 32}
    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        draw.ellipse(box, **style)
    elif scene.shape == "square":
        draw.rectangle(box, **style)
    else:
        draw.polygon(_corners(scene.shape, x, y, radius), **style)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
    arm = radius / 2.5
    cross = [(-1, 0), (0, 0), (0, -1), (1, -1), (1, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2), (0, 1), (-1, 1)]
    stops = {-1: -radius, 0: -arm, 1: arm, 2: radius}
    return [(x + stops[column], y + stops[row]) for column, row in cross]
