"""Annotations of Winoground and of VALSE."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lightning_methods.datamodules._annotations import Entry, entries, read_json, read_json_lines

WINOGROUND_LAYOUT = (
    "Expected layout: <root>/ex_<id>_img_{0,1}.png (`images/`) and `examples.jsonl`, both from "
    "https://huggingface.co/datasets/facebook/winoground (after accepting its terms)"
)
VALSE_LAYOUT = (
    "Expected: a JSON file of https://github.com/Heidelberg-NLP/VALSE (one for each piece), and as <root> the folder "
    "of the images that this piece uses"
)
_UNTAGGED = "untagged"
_MIN_VOTES = 2  # of three people who were asked whether the caption fits and the foil does not


class Example(NamedTuple):
    """An example of Winoground; `tag` is Object, Relation or Both."""

    image0: str
    image1: str
    caption0: str
    caption1: str
    tag: str
    number: int


class Foil(NamedTuple):
    """An image, its caption, and a caption made slightly wrong; `phenomenon` is what it tests."""

    image: str
    caption: str
    foil: str
    phenomenon: str


def read_winoground(path: Path) -> list[Example]:
    """Winoground's examples, in the order of the file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A line is no JSON object or lacks something, or there is none.
    """
    examples = [_example(entry) for entry in read_json_lines(path, WINOGROUND_LAYOUT)]
    if not examples:
        raise ValueError(f"{path}: there are no examples. {WINOGROUND_LAYOUT}")
    return examples


def _example(entry: Entry) -> Example:
    tag = entry.text("collapsed_tag") if "collapsed_tag" in entry.content else _UNTAGGED
    image0, image1 = (f"{entry.text(key)}.png" for key in ("image_0", "image_1"))
    return Example(image0, image1, entry.text("caption_0"), entry.text("caption_1"), tag, entry.number("id"))


def read_valse(path: Path) -> list[Foil]:
    """VALSE's items, from its own files or from a list {image_0, caption_0, caption_1}, in the order of the file.

    Of its own files, items whose caption fewer than two annotators chose are left out; items that nobody was asked
    about stay.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not JSON, an item lacks something, or there is none.
    """
    content = read_json(path, VALSE_LAYOUT)
    if isinstance(content, dict):
        foils = [foil for key, value in content.items() if (foil := _original(Entry(path, key, {}), value))]
    else:
        foils = [
            Foil(entry.text("image_0"), entry.text("caption_0"), entry.text("caption_1"), _UNTAGGED)
            for entry in entries(content, path)
        ]
    if not foils:
        raise ValueError(f"{path}: there are no items. {VALSE_LAYOUT}")
    return foils


def _original(place: Entry, content: object) -> Foil | None:
    if not isinstance(content, dict):
        raise place.error("expected an object")
    item = Entry(place.path, place.where, content)
    if item.content.get("mturk") is not None and item.inner("mturk").number("caption") < _MIN_VOTES:
        return None
    return Foil(item.text("image_file"), item.text("caption"), item.text("foil"), item.text("linguistic_phenomena"))
