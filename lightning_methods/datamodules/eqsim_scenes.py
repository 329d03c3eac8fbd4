"""Small rendered benchmarks, written to a folder in the layouts of the real ones: nothing to download.

Scenes of a few coloured shapes, described by short captions. They serve to try things out, and to test that a program
reads the real layouts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from lightning_methods.datamodules._base import LightningDataModule
from lightning_methods.datamodules._karpathy import CaptionedDataset
from lightning_methods.datamodules._scenes import Pixels, Scene, changed, describe, draw_scene, render
from lightning_methods.datamodules._text_image import Batch, Tokenizer
from lightning_methods.datamodules.eqsim import EqBenDataModule, RetrievalDataModule

#: Which field of a scene tells the two images of a quadruple apart, by subset. The subsets in the official order.
CHANGES = {
    "eqbenag": "shape",
    "eqbenyoucook2": "fill",
    "eqbengebc": "size",
    "eqbenkubric_loc": "place",
    "eqbenkubric_attr": "colour",
    "eqbenkubric_cnt": "number",
    "eqbensd": "ground",
}
_CAPTIONS = 5  # of each image, as in Flickr30K and COCO


class SyntheticEqBen:
    """Writes rendered scenes in the layouts of EqBen, Winoground, VALSE, Flickr30K and COCO.

    The same numbers give the same files.

    Args:
        seed: Seed of everything that is drawn at random.
        image_size: Side of the images in pixels, at least 8.

    Raises:
        ValueError: `image_size` is below 8.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> SyntheticEqBen().write_eqben(root, quads_per_subset=1)
        >>> data = EqBenDataModule(f"{root}/images", f"{root}/annotation/eqbensd.json", transform=32, num_workers=0)
        >>> data.setup("test")
        >>> batch = next(iter(data.test_dataloader()))
        >>> batch["image0"].shape, batch["caption0"], batch["caption1"]  # doctest: +ELLIPSIS
        (torch.Size([1, 3, 32, 32]), ['... against ...'], ['... against ...'])
    """

    def __init__(self, seed: int = 0, image_size: int = 32) -> None:
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {image_size}")
        self.seed = seed
        self.image_size = image_size

    def write_eqben(self, root: str | Path, quads_per_subset: int = 8) -> None:
        """Writes EqBen, every annotation in which it was published included.

        `images/<subset>/` holds the images, arrays in the subset eqbenyoucook2; `annotation/` the shuffled flat list
        (`ann_json_finegrained_random.json`), the two files of its labels (`private_info.json` and
        `private_random_idx.json`), all quadruples (`private_info_global.json`), and the file of each subset.

        Args:
            root: Folder to write into.
            quads_per_subset: Quadruples in each subset; the two images of one differ in one field, the values of the
                others are equally frequent.
        """
        images, annotation = _folder(root, "images"), _folder(root, "annotation")
        quads: list[dict[str, str]] = []
        for number, (subset, field) in enumerate(CHANGES.items()):
            random = self._random("eqben", number)
            own = [self._quad(images, subset, field, place, random) for place in range(quads_per_subset)]
            _write(annotation / f"{subset}.json", _nested(subset, own))
            quads += own
        pairs = [pair for number, quad in enumerate(quads) for pair in _pairs(quad, number)]
        order = self._random("order").permutation(len(pairs)).tolist()
        _write(annotation / "private_info_global.json", quads)
        _write(annotation / "ann_json_finegrained_random.json", [pairs[place] for place in order])
        _write(annotation / "private_info.json", [pair["private_info"] for pair in pairs])
        _write(annotation / "private_random_idx.json", order)

    def write_winoground(self, root: str | Path, examples: int = 8) -> None:
        """Writes `images/*.png` and `examples.jsonl`: two groups of shapes, and two captions of the same words.

        Args:
            root: Folder to write into.
            examples: How many.
        """
        images, random = _folder(root, "images"), self._random("winoground")
        lines = []
        for number in range(examples):
            left = draw_scene(random, tail=False)._replace(place="on the left")
            right = changed(left, "colour", random)._replace(place="on the right")
            swapped = left._replace(colour=right.colour), right._replace(colour=left.colour)
            seed, captions = int(random.integers(2**31)), []
            for place, groups in enumerate(((left, right), swapped)):
                self._save(images / f"ex_{number}_img_{place}.png", groups, seed)
                captions.append(" and ".join(map(describe, groups)))
            names = {f"image_{place}": f"ex_{number}_img_{place}" for place in (0, 1)}
            text = {f"caption_{place}": caption for place, caption in enumerate(captions)}
            tags = {"tag": "Adjective-Color", "collapsed_tag": ("Object", "Relation", "Both")[number % 3]}
            lines.append(json.dumps({"id": number} | names | text | tags))
        (Path(root) / "examples.jsonl").write_text("\n".join(lines) + "\n")

    def write_valse(self, root: str | Path, items: int = 8) -> None:
        """Writes `images/*.jpg` and `counting.json`, in the form of VALSE's own files.

        Args:
            root: Folder to write into.
            items: How many; the caption of every fourth has the vote of one annotator only.
        """
        images, random = _folder(root, "images"), self._random("valse")
        content = {}
        for number in range(items):
            scene = draw_scene(random, tail=False)
            name = f"{number:08d}.jpg"
            self._save(images / name, [scene], int(random.integers(2**31)))
            votes = 1 if number % 4 == 3 else 3
            content[f"counting_{number}"] = {
                "dataset": "synthetic",
                "image_file": name,
                "caption": describe(scene),
                "foil": describe(changed(scene, "number", random)),
                "linguistic_phenomena": "counting",
                "mturk": {"foil": 0, "caption": votes, "other": 3 - votes},
            }
        _write(Path(root) / "counting.json", content)

    def write_retrieval(
        self,
        root: str | Path,
        dataset: CaptionedDataset = "flickr30k",
        *,
        train: int = 32,
        val: int = 8,
        test: int = 8,
        detail: float = 1.0,
    ) -> None:
        """Writes `dataset_<dataset>.json` and its images, each with five captions in different orders of the words.

        In every field of a scene some values are frequent and some rare. COCO's split "restval" gets as many images as
        "val".

        Args:
            root: Folder to write into.
            dataset: "flickr30k" or "coco".
            train: Images to train on.
            val: Images to validate on.
            test: Images to test on.
            detail: Share of a scene's fields that each training caption mentions, drawn anew for each; the captions of
                "val" and "test" mention all.
        """
        restval = val if dataset == "coco" else 0
        splits = ["train"] * train + ["restval"] * restval + ["val"] * val + ["test"] * test
        random, listed = self._random(dataset), []
        for number, split in enumerate(splits):
            folder = {"flickr30k": "flickr30k-images"}.get(dataset, "train2014" if split == "train" else "val2014")
            name = f"{number:010d}.jpg" if dataset == "flickr30k" else f"COCO_{folder}_{number:012d}.jpg"
            scene = draw_scene(random, tail=True)
            self._save(_folder(root, folder) / name, [scene], int(random.integers(2**31)))
            ids = [_CAPTIONS * number + saying for saying in range(_CAPTIONS)]
            share = detail if split in ("train", "restval") else 1.0
            texts = [describe(scene, saying, self._omitted(random, share)) for saying in range(_CAPTIONS)]
            sentences = [
                {"raw": text, "tokens": text.split(), "imgid": number, "sentid": sentence}
                for sentence, text in zip(ids, texts, strict=True)
            ]
            image = {"filename": name, "imgid": number, "split": split, "sentids": ids, "sentences": sentences}
            listed.append(image | ({"filepath": folder} if dataset == "coco" else {}))
        _write(Path(root) / f"dataset_{dataset}.json", {"dataset": dataset, "images": listed})

    @staticmethod
    def _omitted(random: np.random.Generator, detail: float) -> list[str]:
        return [field for field in Scene._fields if random.random() >= detail]

    def _quad(self, images: Path, subset: str, field: str, number: int, random: np.random.Generator) -> dict[str, str]:
        first = draw_scene(random, tail=False)
        scenes = first, changed(first, field, random)
        seed = int(random.integers(2**31))
        quad: dict[str, str] = {}
        suffix = "npy" if subset == "eqbenyoucook2" else "png"
        for place, scene in enumerate(scenes):
            name = f"{subset}/video_{number // 4}/{number}_{place}.{suffix}"
            path = images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._save(path, [scene], seed)
            quad |= {f"image{place}": name, f"caption{place}": describe(scene)}
        return quad

    def _save(self, path: Path, groups: Sequence[Scene], seed: int) -> None:
        pixels: Pixels = render(groups, seed, self.image_size)
        if path.suffix == ".npy":
            np.save(path, pixels[:, :, ::-1])  # blue first
        else:
            Image.fromarray(pixels).save(path, quality=95, subsampling=0)

    def _random(self, *stream: str | int) -> np.random.Generator:
        words = [word if isinstance(word, int) else int.from_bytes(word.encode(), "big") for word in stream]
        return np.random.default_rng([self.seed, *words])


class SyntheticEqBenDataModule(LightningDataModule):
    """Rendered scenes to train on as in Flickr30K, and to validate and test on as in EqBen.

    Training batches are {"image", "text", "image_id"}; an image has five captions in different orders of the words, and
    in every field of a scene some values are rarer than others. Validation and testing have three loaders: quadruples
    as in `EqBenDataModule`, of seven subsets that each change one thing, with all values equally frequent; and images
    and captions of a retrieval test, as in `RetrievalDataModule`.

    The files are written once, in the first `prepare_data`, into `root/seed-<seed>`.

    Args:
        root: Folder to write into.
        train_images: Images to train on, each with five captions.
        quads_per_subset: Quadruples in each subset, of validation and again of test.
        eval_images: Images of the retrieval test, of validation and again of test.
        detail: Share of a scene's fields that a training caption mentions, above 0 and up to 1.
        image_size: Side of the images in pixels, at least 8.
        tokenizer: As in `EqBenDataModule`.
        batch_size: Samples per batch and process.
        seed: Seed of everything that is drawn at random.

    Attributes:
        subset_names: The seven subsets, in the order of their numbers in a batch.

    Raises:
        ValueError: A number is below 1, `image_size` below 8, or `detail` outside (0, 1]. In `prepare_data`: what
            stands in the folder was written with other numbers.
    """

    def __init__(
        self,
        root: str | Path,
        train_images: int = 1000,
        quads_per_subset: int = 100,
        eval_images: int = 200,
        detail: float = 1.0,
        image_size: int = 32,
        tokenizer: Tokenizer | str | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"train_images": train_images, "quads_per_subset": quads_per_subset, "eval_images": eval_images}
        for name, value in (*counts.items(), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < detail <= 1:
            raise ValueError(f"detail must be above 0 and at most 1, got {detail}")
        self.folder = Path(root).expanduser() / f"seed-{seed}"
        self.settings: dict[str, Any] = {**counts, "detail": detail, "image_size": image_size, "seed": seed}
        self.world, self.unseen = SyntheticEqBen(seed, image_size), SyntheticEqBen(seed + 2**20, image_size)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.subset_names = tuple(CHANGES)

    def prepare_data(self) -> None:
        """Writes the files, unless they are there."""
        if self.folder.exists():
            there = json.loads((self.folder / "written.json").read_text())
            if there != self.settings:
                raise ValueError(f"{self.folder} holds {there}, but {self.settings} are asked for; choose another root")
            return
        temporary = self.folder.with_name(f".{self.folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        given, count = self.settings, self.settings["eval_images"]
        self.world.write_retrieval(
            temporary, train=given["train_images"], val=count, test=count, detail=given["detail"]
        )
        self.world.write_eqben(temporary / "val", given["quads_per_subset"])
        self.unseen.write_eqben(temporary / "test", given["quads_per_subset"])
        _write(temporary / "written.json", self.settings)
        temporary.rename(self.folder)  # in one step: a stopped call leaves no half of it

    def setup(self, stage: str) -> None:
        """Reads what was written."""
        self._retrieval.setup(stage)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of captions with their images."""
        return self._retrieval.train_dataloader()

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of quadruples, of images and of captions, each in order."""
        return [self._quads("val").val_dataloader(), *self._retrieval.val_dataloader()]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of quadruples, of images and of captions, each in order."""
        return [self._quads("test").test_dataloader(), *self._retrieval.test_dataloader()]

    @cached_property
    def _retrieval(self) -> RetrievalDataModule:
        annotation = self.folder / "dataset_flickr30k.json"
        return RetrievalDataModule(self.folder, annotation, batch_size=self.batch_size, **self._options())

    def _quads(self, split: Literal["val", "test"]) -> EqBenDataModule:
        folder = self.folder / split
        annotation = folder / "annotation" / "private_info_global.json"
        return EqBenDataModule(folder / "images", annotation, batch_size=self.batch_size, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"transform": self.world.image_size, "tokenizer": self.tokenizer, "num_workers": 0}


def _folder(root: str | Path, name: str) -> Path:
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _nested(subset: str, quads: Sequence[dict[str, str]]) -> Any:
    """The quadruples of one subset as its own file has them."""
    if subset in ("eqbensd", "eqbenkubric_loc", "eqbenkubric_attr", "eqbenkubric_cnt"):
        return list(quads)
    videos: dict[str, Any] = {}
    for quad in quads:
        videos.setdefault(quad["image0"].split("/")[1], []).append(quad)
    if subset != "eqbenag":
        return videos
    captions = ("caption0", "caption1")
    return {
        video: {"person": [quad | {key: [quad[key]] for key in captions} for quad in own]}
        for video, own in videos.items()
    }


def _pairs(quad: dict[str, str], number: int) -> list[dict[str, Any]]:
    """The four scored pairs of a quadruple, in the order of the labels."""
    subset = quad["image0"].partition("/")[0]
    return [
        {
            "image": quad[f"image{image}"],
            "caption": quad[f"caption{caption}"],
            "private_info": {"dataset": subset, "name": f"c{caption}i{image}", "sample_cnt": number},
        }
        for caption in (0, 1)
        for image in (0, 1)
    ]
