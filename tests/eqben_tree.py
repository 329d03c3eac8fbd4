"""A tiny EqBen, written by hand in the published layout."""

import json
import random

import numpy as np
import torch
from PIL import Image

from lightning_methods.datamodules import EqBenDataModule

QUADS = [
    ("eqbenag/vid/person/1.png", "eqbenag/vid/person/2.png", "sits", "stands"),
    ("eqbenyoucook2/a/b/1.npy", "eqbenyoucook2/a/b/2.npy", "chop", "stir"),
    ("eqbenkubric_cnt/1.png", "eqbenkubric_cnt/2.png", "one box", "two boxes"),
    ("eqbenag/vid/dog/1.png", "eqbenag/vid/dog/2.png", "barks", "sleeps"),
]
COLOURS = {quad[place]: (10 * number, 100 + place, 200) for number, quad in enumerate(QUADS) for place in (0, 1)}
KEYS = ("image0", "image1", "caption0", "caption1")


def objects(quads, keys=KEYS):
    return [dict(zip(keys, quad, strict=True)) for quad in quads]


def flat_list(labelled=True):
    """Canonical pairs, the shuffled order, and the shuffled list, as the authors' evaluation has them."""
    canonical = [
        {
            "image": quad[image],
            "caption": quad[2 + caption],
            "private_info": {
                "dataset": quad[0].split("/")[0],
                "name": f"c{caption}i{image}",
                "sample_cnt": 100 + number,
            },
        }
        for number, quad in enumerate(QUADS)
        for caption in (0, 1)
        for image in (0, 1)
    ]
    order = random.Random(3).sample(range(16), 16)
    shuffled = [dict(canonical[place]) for place in order]
    infos = [entry["private_info"] for entry in canonical]
    if not labelled:
        for entry in shuffled:
            del entry["private_info"]
    return shuffled, infos, order


def write_images(folder):
    """The images of `QUADS` in `folder / "image"`; returns `folder`."""
    for name, colour in COLOURS.items():
        save(folder / "image" / name, colour)
    return folder


def module(folder, content, name="ann.json", **options):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    options = {"transform": pixels, "batch_size": 3, "num_workers": 0} | options
    return EqBenDataModule(folder / "image", path, **options)


def samples(data):
    """Every sample of the test loader, batches taken apart again."""
    data.setup("test")
    rows = []
    for batch in data.test_dataloader():
        size = len(batch["subset"])
        rows += [{key: values[place] for key, values in batch.items()} for place in range(size)]
    return rows


def pixels(image):
    """The transform of these tests: the top left pixel."""
    assert image.mode == "RGB"
    return torch.tensor(image.getpixel((0, 0)))


def save(path, colour, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.full((4, 6, 3), colour[::-1], dtype=np.uint8))  # the files hold blue first
    else:
        Image.new("RGB", (6, 4), colour).convert(mode).save(path, quality=100)
