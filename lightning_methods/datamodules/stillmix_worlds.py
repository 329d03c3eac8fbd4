"""A small world for video classifiers, in which still evidence gives labels away and only motion makes them."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule
from lightning_methods.datamodules._tensors import TensorLoader
from lightning_methods.datamodules._video_files import write_video
from lightning_methods.datamodules.stillmix import StaticBiasDataModule, VideoSource
from lightning_methods.functional._seeds import seeded
from lightning_methods.functional.stillmix_stripes import sample_stripes, sinusoidal_stripes

CLASSES = 4
FRAMES = 8
SIZE = 24

_SPRITE = 7
_SPEED = 2  # pixels a frame
_STEPS = ((0, _SPEED), (0, -_SPEED), (_SPEED, 0), (-_SPEED, 0))  # down, across; by class
_TEXTURES = 2  # of each class
_BACKGROUND_BIAS = 0.95
_FOREGROUND_BIAS = 0.9
_NOISE = 0.05
_MEAN, _STD = 0.45 * 255, 0.3 * 255


class MovingShapesDataModule(InMemoryDataModule):
    """Four directions of motion, whose background and moving shape nearly always tell the direction, too.

    Clips are 8 frames of 24 × 24. The class is the direction in which a shape of 7 × 7 moves, 2 pixels a frame, around
    the borders and from anywhere, so that no frame shows it. The background is one of two smooth textures that belong
    to a class: its own with probability 0.95, any otherwise. Shape and colour are those of the class with probability
    0.9, any otherwise.

    The clips are written to video files, without loss, and lists, and read back by `StaticBiasDataModule`, once; then
    they stay in memory. Test sets, in the order of their loaders: "iid"; "conflicting", stripes and a second, still
    shape of any class; "texture" and "stripes", SCUBA sets with textures that nobody has seen and sinusoidal stripes.
    Their batches are those of `StaticBiasDataModule`: (video, label, index), for SCUBA sets with the frame of the
    SCUFO twin; videos (B, 3, 8, 24, 24), float32.

    Args:
        root: Folder for the videos, about 10 MB; it is filled if it is empty. None: a temporary one.
        train_size: Training clips.
        test_size: Clips of the validation set and of each test set.
        neutral: Share of training clips whose background is a fresh texture and whose shape is a grey one that belongs
            to no class.
        batch_size: Clips per batch and process.
        seed: Of the training order.
        world_seed: Of the textures and of all clips. Settings chosen on some worlds can be reported on others.

    Raises:
        ValueError: A size is below 1, `neutral` is outside [0, 1], or `root` holds another world.
        ModuleNotFoundError: PyAV is not installed.
    """

    num_classes = CLASSES
    test_names = ("iid", "conflicting", "texture", "stripes")
    scuba_names = ("texture", "stripes")

    def __init__(
        self,
        root: str | Path | None = None,
        train_size: int = 1200,
        test_size: int = 300,
        neutral: float = 0.0,
        batch_size: int = 32,
        seed: int = 0,
        world_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        for name, size in (("train_size", train_size), ("test_size", test_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= neutral <= 1:
            raise ValueError(f"neutral must be in [0, 1], got {neutral}")
        self.root = root
        self.train_size = train_size
        self.test_size = test_size
        self.neutral = neutral
        self.world_seed = world_seed

    @property
    def is_neutral(self) -> Tensor:
        """Which training clips have neutral still evidence, boolean (train_size,)."""
        return torch.rand(self.train_size, generator=seeded("neutral", self.world_seed)) < self.neutral

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Writes the videos, if need be, and reads (video, label, index) of each set."""
        if self.root is not None:
            return self._read(Path(self.root).expanduser())
        with TemporaryDirectory() as folder:
            return self._read(Path(folder))

    def test_dataloader(self) -> list[TensorLoader]:  # type: ignore[override]  # several test sets
        """A loader for each of `test_names`, in order."""
        return [self._loader(name) for name in self.test_names]

    def _read(self, root: Path) -> dict[str, tuple[Tensor, ...]]:
        self._write(root)
        sources = {name: VideoSource(root / f"{name}.txt", root, "video") for name in self._sets()}
        data = StaticBiasDataModule(
            test={name: source for name, source in sources.items() if name not in self.scuba_names},
            scuba={name: sources[name] for name in self.scuba_names},
            batch_size=256,
            num_workers=0,
            layout="bcthw",
            clips=1,
            clip_length=FRAMES,
            size=SIZE,
            short_side=SIZE,
            mean=(_MEAN,) * 3,
            std=(_STD,) * 3,
            num_classes=CLASSES,
            seed=self.world_seed,
        )
        data.setup("test")
        return {
            name: tuple(torch.cat(parts) for parts in zip(*loader, strict=True))
            for name, loader in zip(data.test_names, data.test_dataloader(), strict=True)
        }

    def _write(self, root: Path) -> None:
        """Fills the folder, unless it holds this world."""
        made = root / "world.json"
        settings = {name: getattr(self, name) for name in ("train_size", "test_size", "neutral", "world_seed")}
        if made.exists():
            if (found := json.loads(made.read_text())) != settings:
                raise ValueError(f"{root} holds another world, {found}: choose another root than for {settings}")
            return
        for name, (frames, labels) in self._sets_in_memory():
            for number, clip in enumerate(frames):
                write_video(root / name / f"{number:05}.mkv", clip)
            lines = (f"{name}/{number:05}.mkv {label}\n" for number, label in enumerate(labels.tolist()))
            (root / f"{name}.txt").write_text("".join(lines))
        made.write_text(json.dumps(settings))

    def _sets(self) -> dict[str, int]:
        """How many clips each set has."""
        return {"train": self.train_size, **dict.fromkeys(("val", *self.test_names), self.test_size)}

    def _sets_in_memory(self) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        world = _World(self.world_seed)
        for name, count in self._sets().items():
            neutral = self.is_neutral if name == "train" else torch.zeros(count, dtype=torch.bool)
            yield name, world.clips(name, neutral)


class _World:
    """Textures of each class, and clips made with them; the same for everyone who gives the same seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.textures = _fresh_textures(CLASSES * _TEXTURES, seeded("textures", seed))

    def clips(self, name: str, neutral: Tensor) -> tuple[Tensor, Tensor]:
        """Frames uint8 (n, T, 3, H, W) and labels (n,) of a set, for which n is the length of `neutral`."""
        generator = seeded("clips", self.seed, name)
        count = len(neutral)
        labels = _integers(CLASSES, count, generator)
        frames = self._backgrounds(name, labels, neutral, generator)[:, None].expand(-1, FRAMES, -1, -1, -1)
        if name == "conflicting":
            frames = _with_sprites(frames, _integers(CLASSES, count, generator), torch.zeros(count, 2), generator)
        kinds = _mostly(labels, _FOREGROUND_BIAS, generator).masked_fill(neutral, _NEUTRAL)
        frames = _with_sprites(frames, kinds, torch.tensor(_STEPS)[labels], generator)
        frames = frames + _NOISE * torch.randn(frames.shape, generator=generator)
        return (255 * frames.clamp(0, 1)).round().to(torch.uint8), labels

    def _backgrounds(self, name: str, labels: Tensor, neutral: Tensor, generator: torch.Generator) -> Tensor:
        """(n, 3, H, W) in [0, 1]."""
        if name in ("stripes", "conflicting"):
            return torch.stack([_stripes(generator) for _ in labels])
        textures = _fresh_textures(len(labels), generator)
        if name != "texture":
            owners = _mostly(labels, _BACKGROUND_BIAS, generator)
            known = self.textures[_TEXTURES * owners + _integers(_TEXTURES, len(labels), generator)]
            textures = torch.where(neutral[:, None, None, None], textures, known)
        textures = _rolled(textures, _integers(SIZE, (len(labels), 2), generator))
        brightness = 0.8 + 0.4 * torch.rand(len(labels), 1, 1, 1, generator=generator)
        return (brightness * textures).clamp(0, 1)


def _integers(limit: int, shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(limit, (shape,) if isinstance(shape, int) else shape, generator=generator)


def _mostly(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The labels with this probability, any class otherwise."""
    other = _integers(CLASSES, len(labels), generator)
    return torch.where(torch.rand(len(labels), generator=generator) < share, labels, other)


def _fresh_textures(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, H, W) in [0, 1]: few random colours, smoothly joined."""
    colours = torch.rand(count, 3, 6, 6, generator=generator)
    return F.interpolate(colours, (SIZE, SIZE), mode="bilinear", align_corners=False)


def _stripes(generator: torch.Generator) -> Tensor:
    """Stripes as on large frames, made as much smaller as these frames are."""
    draw = sample_stripes(generator=generator)
    scale = SIZE / 256
    lengths = {name: getattr(draw, name) * scale for name in ("linewidth", "spacing", "amplitude")}
    smaller = draw._replace(frequency=draw.frequency / scale, **lengths)
    return sinusoidal_stripes(**smaller._asdict(), size=SIZE).float() / 255


def _rolled(images: Tensor, shifts: Tensor) -> Tensor:
    """Images (n, ..., H, W) moved down and across by shifts (n, 2), around the borders."""
    down, across = ((torch.arange(SIZE) - shift[:, None]) % SIZE for shift in shifts.unbind(1))
    lead = images.ndim - 3
    rows = down.reshape(len(images), *[1] * lead, SIZE, 1).expand_as(images)
    columns = across.reshape(len(images), *[1] * lead, 1, SIZE).expand_as(images)
    return images.gather(-2, rows).gather(-1, columns)


def _with_sprites(frames: Tensor, kinds: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:
    """Frames (n, T, 3, H, W) with a shape of each kind (n,), from anywhere, moving by steps (n, 2)."""
    start = _integers(SIZE, (len(kinds), 1, 2), generator)
    places = (start + torch.arange(FRAMES)[:, None] * steps[:, None]).long()
    masks = F.pad(_SHAPES[kinds], (0, SIZE - _SPRITE, 0, SIZE - _SPRITE))[:, None].expand(-1, FRAMES, -1, -1)
    masks = _rolled(masks.flatten(0, 1), places.flatten(0, 1)).reshape(masks.shape)
    return torch.where(masks[:, :, None] > 0, _COLOURS[kinds][:, None, :, None, None], frames)


def _shapes() -> Tensor:
    """A square, a cross, a diamond and a ring, and a disc that belongs to no class: (5, 7, 7) of 0 and 1."""
    down, across = torch.meshgrid(*[torch.arange(_SPRITE) - _SPRITE // 2] * 2, indexing="ij")
    square = torch.ones_like(down)
    cross = (down.abs() <= 1) | (across.abs() <= 1)
    diamond = down.abs() + across.abs() <= 3
    ring = torch.maximum(down.abs(), across.abs()) >= 2
    disc = down**2 + across**2 <= 10
    return torch.stack([shape.float() for shape in (square, cross, diamond, ring, disc)])


_SHAPES = _shapes()
_COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.15, 0.2, 0.95], [0.9, 0.85, 0.1], [0.5, 0.5, 0.5]])
_NEUTRAL = CLASSES
