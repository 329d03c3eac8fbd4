"""What the annotations of image-text benchmarks share: JSON whose errors name the entry, and images to be found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The full EqBen holds .png, its light version .jpg, and one annotation serves both.
_TWINS = {".png": ".jpg", ".jpg": ".png"}


@dataclass(frozen=True)
class Entry:
    """An object of an annotation file that knows where it stands.

    Args:
        path: The file.
        where: Keys and list indices that lead to it, e.g. "video/3".
        content: The object.
    """

    path: Path
    where: str
    content: Mapping[str, Any]

    def text(self, *keys: str) -> str:
        """The text under the first of the keys that is there; of a list of texts, the first.

        Raises:
            ValueError: There is none of the keys, or no text.
        """
        value = self._value(keys)
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str):
            raise self.error(f"{self._key(keys)!r} must be text, found {_shown(value)}")
        return value

    def number(self, key: str) -> int:
        """The integer under a key.

        Raises:
            ValueError: The key is missing or holds something else.
        """
        value = self._value((key,))
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"{key!r} must be an integer, found {_shown(value)}")
        return value

    def inner(self, key: str) -> Entry:
        """The object under a key.

        Raises:
            ValueError: The key is missing or holds something else.
        """
        value = self._value((key,))
        if not isinstance(value, dict):
            raise self.error(f"{key!r} must be an object, found {_shown(value)}")
        return Entry(self.path, f"{self.where}/{key}", value)

    def items(self, key: str) -> Iterator[Entry]:
        """The objects of the list under a key.

        Raises:
            ValueError: The key is missing, or holds something else than a list of objects.
        """
        return entries(self._value((key,)), self.path, f"{self.where}/{key}" if self.where else key)

    def error(self, problem: str) -> ValueError:
        """An error that begins with the file and the entry."""
        return ValueError(f"{self.path}, entry {self.where}: {problem}" if self.where else f"{self.path}: {problem}")

    def _key(self, keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if key in self.content), None)

    def _value(self, keys: tuple[str, ...]) -> Any:
        key = self._key(keys)
        if key is None:
            raise self.error(f"there is no {' or '.join(map(repr, keys))}; its keys: {sorted(self.content)}")
        return self.content[key]


def entries(content: Any, path: Path, where: str = "") -> Iterator[Entry]:
    """The objects of a list.

    Raises:
        ValueError: `content` is no list of objects.
    """
    if not isinstance(content, list):
        raise Entry(path, where, {}).error(f"expected a list, found {_shown(content)}")
    for number, item in enumerate(content):
        place = f"{where}/{number}" if where else str(number)
        if not isinstance(item, dict):
            raise Entry(path, place, {}).error(f"expected an object, found {_shown(item)}")
        yield Entry(path, place, item)


def read_json(path: Path, layout: str) -> Any:
    """Content of a JSON file.

    Args:
        path: The file.
        layout: What the file should be and where to get it; ends the message about a missing file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(_read(path, layout))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_json_lines(path: Path, layout: str) -> Iterator[Entry]:
    """The objects of a file with one in each line; entries are numbered by their lines, from 1.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A line is no JSON object.
    """
    for number, line in enumerate(_read(path, layout).splitlines(), start=1):
        if not line.strip():
            continue
        entry = Entry(path, f"in line {number}", {})
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise entry.error(f"it is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise entry.error(f"expected an object, found {_shown(content)}")
        yield Entry(path, entry.where, content)


def locate_images(names: Iterable[str], root: Path, annotation: Path, layout: str) -> dict[str, str]:
    """Path of each image, all known to exist; where a .png is missing a .jpg of that name will do, and vice versa.

    Args:
        names: Paths relative to `root`, repeated or not.
        root: Folder of the images.
        annotation: Where the names come from, for the message.
        layout: What the folder should hold; ends the message.

    Raises:
        FileNotFoundError: Images are missing. The message counts them and names the first.
    """
    found: dict[str, str] = {}
    missing: list[str] = []
    folders: dict[str, set[str]] = {}  # one listing per folder: network disks answer single look-ups slowly
    for name in dict.fromkeys(names):
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            folders[folder] = _file_names(root / folder)
        there = next((candidate for candidate in _candidates(file) if candidate in folders[folder]), None)
        if there is None:
            missing.append(name)
        else:
            found[name] = str(root / folder / there)
    if missing:
        total = len(missing) + len(found)
        raise FileNotFoundError(
            f"{len(missing)} of {total} images of {annotation} are not under {root}; first: {missing[0]}. {layout}"
        )
    return found


def _candidates(file: str) -> Iterator[str]:
    yield file
    stem, suffix = os.path.splitext(file)  # noqa: PTH122 - a million of these: a Path each takes 5 s more
    if suffix in _TWINS:
        yield stem + _TWINS[suffix]


def _file_names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


def _read(path: Path, layout: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"annotation {path} is missing. {layout}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
