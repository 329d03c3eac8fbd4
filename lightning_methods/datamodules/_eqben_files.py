"""EqBen's annotations in every form in which they were published, as quadruples or as single pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_methods.datamodules._annotations import Entry, entries, read_json

#: The folders of EqBen's images, in the order of the official tables.
EQBEN_SUBSETS = (
    "eqbenag",
    "eqbenyoucook2",
    "eqbengebc",
    "eqbenkubric_loc",
    "eqbenkubric_attr",
    "eqbenkubric_cnt",
    "eqbensd",
)
EQBEN_LAYOUT = (
    "Expected layout: <root>/<subset>/... with the subsets' images and <annotation>, a JSON file, both from "
    "https://github.com/Wangt-CN/EqBen"
)

_IMAGE0, _IMAGE1 = ("image0", "image_0"), ("image1", "image_1")
_CAPTION0, _CAPTION1 = ("caption0", "caption_0"), ("caption1", "caption_1")
#: "c1i0" is caption 1 with image 0. Numbered 2 · image + caption: s00, s01, s10, s11.
_CORNERS = {"c0i0": 0, "c1i0": 1, "c0i1": 2, "c1i1": 3}


class Quad(NamedTuple):
    """Two images and the two captions that belong to them."""

    image0: str
    image1: str
    caption0: str
    caption1: str
    subset: str
    sample: int


class Pair(NamedTuple):
    """An image and a caption that may or may not belong to it; `sample` and `corner` are -1 if they are not known."""

    image: str
    caption: str
    subset: str
    sample: int
    corner: int


def read_eqben(paths: Sequence[Path], labels: Path | None) -> list[Quad] | list[Pair]:
    """What annotation files hold: quadruples or single pairs, in their order.

    A file is a list of entries, or lists within dicts and dicts within these to any depth, as the per-subset files
    are. A quadruple's sample number is its place among all of them.

    Args:
        paths: One file or more, all of one form.
        labels: Folder that holds `private_info.json` and `private_random_idx.json`, for single pairs without labels.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not JSON, an entry lacks something or belongs to no subset, files are of two forms, or
            the labels do not belong to the pairs.
    """
    quads: list[Quad] = []
    pairs: list[Pair] = []
    for path in paths:
        for leaf in _leaves(Entry(path, "", {}), read_json(path, EQBEN_LAYOUT)):
            if "image" in leaf.content:
                pairs.append(_pair(leaf))
            else:
                quads.append(_quad(leaf, len(quads)))
            if quads and pairs:
                raise leaf.error("quadruples and single pairs are mixed; the entries before are of the other form")
    if not quads and not pairs:
        raise ValueError(f"{', '.join(map(str, paths))}: there are no entries. {EQBEN_LAYOUT}")
    if labels is not None:
        if quads:
            raise ValueError(f"labels are for single pairs, but {paths[0]} holds quadruples")
        pairs = _with_labels(pairs, paths[0], labels)
    unlabelled = sum(pair.corner < 0 for pair in pairs)
    if 0 < unlabelled < len(pairs):
        raise ValueError(f"{paths[0]}: {unlabelled} of {len(pairs)} entries have no 'private_info', the others do")
    return quads or pairs


def pairs_of(quads: Sequence[Quad]) -> list[Pair]:
    """The four pairs of each quadruple, in the order s00, s01, s10, s11 (image first)."""
    return [
        Pair(image, caption, quad.subset, quad.sample, 2 * place + number)
        for quad in quads
        for place, image in enumerate((quad.image0, quad.image1))
        for number, caption in enumerate((quad.caption0, quad.caption1))
    ]


def quads_of(pairs: Sequence[Pair], path: Path) -> tuple[list[Quad], list[tuple[int, ...]]]:
    """The quadruples that labelled pairs belong to, in the order in which they first appear.

    Returns:
        The quadruples, and of each the places of its four pairs, s00, s01, s10, s11, in `pairs`.

    Raises:
        ValueError: The pairs have no labels, pairs of some quadruples are missing or there twice, or pairs of one
            quadruple disagree in their images or captions.
    """
    if any(pair.corner < 0 for pair in pairs):
        raise ValueError(
            f"{path} does not say which entries belong together (no 'private_info'): format must be 'flat', or labels "
            f"must name the folder of private_info.json and private_random_idx.json"
        )
    places: dict[tuple[str, int], list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault((pair.subset, pair.sample), []).append(place)
    ordered = [tuple(sorted(four, key=lambda place: pairs[place].corner)) for four in places.values()]
    incomplete = [four for four in ordered if [pairs[place].corner for place in four] != [0, 1, 2, 3]]
    if incomplete:
        first = pairs[incomplete[0][0]]
        raise ValueError(
            f"{path}: {len(incomplete)} of {len(ordered)} quadruples do not have each of their four pairs once; "
            f"first: {first.subset} {first.sample}"
        )
    quads = []
    for four in ordered:
        s00, s01, s10, s11 = (pairs[place] for place in four)
        if (s00.image, s10.image, s00.caption, s01.caption) != (s01.image, s11.image, s10.caption, s11.caption):
            raise ValueError(f"{path}: the pairs of {s00.subset} {s00.sample} disagree in their images or captions")
        quads.append(Quad(s00.image, s11.image, s00.caption, s11.caption, s00.subset, s00.sample))
    return quads, ordered


def check_subsets(subsets: Sequence[str] | None) -> tuple[str, ...]:
    """Names of subsets in the official order; None means all.

    Raises:
        ValueError: There is an unknown name, or no name.
    """
    if subsets is None:
        return EQBEN_SUBSETS
    unknown = [name for name in subsets if name not in EQBEN_SUBSETS]
    if unknown or not subsets:
        found = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"subsets must be among {', '.join(EQBEN_SUBSETS)}; got {found}")
    return tuple(name for name in EQBEN_SUBSETS if name in subsets)


def _leaves(place: Entry, content: Any) -> Iterator[Entry]:
    if isinstance(content, dict):
        if any(key in content for key in ("image", *_IMAGE0)):
            yield Entry(place.path, place.where, content)
            return
        items: Iterator[tuple[Any, Any]] = iter(content.items())
    elif isinstance(content, list):
        items = enumerate(content)
    else:
        keys = ", ".join(map(repr, ("image", *_IMAGE0)))
        raise place.error(f"expected an object with one of {keys}, or a list or object of such, found {content!r:.60}")
    for key, value in items:
        yield from _leaves(Entry(place.path, f"{place.where}/{key}" if place.where else str(key), {}), value)


def _quad(leaf: Entry, number: int) -> Quad:
    image0, image1 = leaf.text(*_IMAGE0), leaf.text(*_IMAGE1)
    return Quad(image0, image1, leaf.text(*_CAPTION0), leaf.text(*_CAPTION1), _subset(leaf, image0), number)


def _pair(leaf: Entry) -> Pair:
    image = leaf.text("image")
    subset = _subset(leaf, image)
    sample, corner = _label(leaf.inner("private_info"), subset) if "private_info" in leaf.content else (-1, -1)
    return Pair(image, leaf.text("caption"), subset, sample, corner)


def _subset(leaf: Entry, image: str) -> str:
    subset = image.partition("/")[0]
    if subset not in EQBEN_SUBSETS:
        raise leaf.error(f"image {image!r} must begin with a subset, one of {', '.join(EQBEN_SUBSETS)}")
    return subset


def _label(info: Entry, subset: str) -> tuple[int, int]:
    dataset, name = info.text("dataset"), info.text("name")
    if name not in _CORNERS:
        raise info.error(f"'name' must be one of {', '.join(_CORNERS)}, found {name!r}")
    if dataset != subset:
        raise info.error(f"'dataset' is {dataset!r}, but the image is one of {subset!r}")
    return info.number("sample_cnt"), _CORNERS[name]


def _with_labels(pairs: Sequence[Pair], path: Path, labels: Path) -> list[Pair]:
    info_path, index_path = labels / "private_info.json", labels / "private_random_idx.json"
    infos = list(entries(read_json(info_path, EQBEN_LAYOUT), info_path))
    index = read_json(index_path, EQBEN_LAYOUT)
    if not len(infos) == len(pairs) or not isinstance(index, list) or Counter(index) != Counter(range(len(pairs))):
        raise ValueError(
            f"{info_path} must hold a label for each of the {len(pairs)} entries of {path}, and {index_path} their "
            f"order, each of 0 … {len(pairs) - 1} once; found {len(infos)} labels"
        )
    # The authors sort predictions by argsort(index) before they compare them with the labels.
    return [
        Pair(pair.image, pair.caption, pair.subset, *_label(infos[place], pair.subset))
        for pair, place in zip(pairs, index, strict=True)
    ]
