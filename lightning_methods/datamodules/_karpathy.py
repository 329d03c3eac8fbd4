"""Andrej Karpathy's JSON files of Flickr30K and COCO: images, their captions and their splits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from lightning_methods.datamodules._annotations import Entry, read_json

CaptionedDataset: TypeAlias = Literal["flickr30k", "coco"]
DATASETS = get_args(CaptionedDataset)

LAYOUTS = {
    "flickr30k": (
        "Expected layout: <root>/flickr30k-images/*.jpg and <annotation>, dataset_flickr30k.json of Karpathy's "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/"
    ),
    "coco": (
        "Expected layout: <root>/{train2014,val2014}/*.jpg and <annotation>, dataset_coco.json of Karpathy's "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/"
    ),
}
_SPLITS = ("train", "restval", "val", "test")


class CaptionedImage(NamedTuple):
    """An image and what people wrote about it, without repeats, in alphabetical order."""

    name: str
    image_id: int
    captions: tuple[str, ...]


def read_karpathy(path: Path, dataset: CaptionedDataset) -> dict[str, list[CaptionedImage]]:
    """The images of each split, in the order of the file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not JSON, is that of another dataset, or an image lacks something.
    """
    content = read_json(path, LAYOUTS[dataset])
    whole = Entry(path, "", content if isinstance(content, dict) else {})
    if content and whole.content.get("dataset", dataset) != dataset:
        raise ValueError(f"{path} is that of {whole.content['dataset']!r}, but dataset is {dataset!r}")
    splits: dict[str, list[CaptionedImage]] = {split: [] for split in _SPLITS}
    for place, image in enumerate(whole.items("images")):
        split = image.text("split")
        if split not in splits:
            raise image.error(f"'split' must be one of {', '.join(_SPLITS)}, found {split!r}")
        splits[split].append(_image(image, place, dataset))
    return splits


def _image(image: Entry, place: int, dataset: CaptionedDataset) -> CaptionedImage:
    folder = image.text("filepath") if dataset == "coco" else "flickr30k-images"
    number = image.number("imgid") if "imgid" in image.content else place
    captions = {sentence.text("raw").strip() for sentence in image.items("sentences")}
    return CaptionedImage(f"{folder}/{image.text('filename')}", number, tuple(sorted(captions)))
