"""The folder of a test set in the making, in which everything appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor

FRAME = "frame{:06d}.jpg"

Record: TypeAlias = Mapping[str, Any]

_QUALITY = 95


class SetFolder:
    """A folder with `manifest.json`, which begins with the settings alone, and a journal until the set is whole.

    Args:
        path: The folder.
        settings: All that decides what is made, as JSON types.

    Attributes:
        made: By source, the records of the videos that have been made from it, by name.

    Raises:
        ValueError: The folder holds a set made with other settings.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        self.path = path
        self._settings = settings
        self._manifest, self._journal = path / "manifest.json", path / ".journal.jsonl"
        self.made: dict[str, dict[str, Record]] = {}
        if self._manifest.exists():
            self._load()
        else:
            _write_text(self._manifest, json.dumps({"settings": settings}, indent=2))

    def _load(self) -> None:
        there = json.loads(self._manifest.read_text())
        if changed := [name for name in self._settings if there["settings"].get(name) != self._settings[name]]:
            name = changed[0]
            found = f"`{name}` was {there['settings'].get(name)!r} and is {self._settings[name]!r}"
            raise ValueError(f"{self.path} holds a set made with other arguments: {found}. Choose another folder")
        for name, record in there.get("videos", {}).items():
            self.made.setdefault(record["source"], {})[name] = record
        if self._journal.exists():
            *lines, cut = self._journal.read_text().split("\n")
            if cut:  # where a call was stopped
                _write_text(self._journal, "".join(f"{line}\n" for line in lines))
            self.made.update(json.loads(line) for line in lines)

    def add(self, source: str, records: Mapping[str, Record]) -> None:
        """Notes that all videos of a source have been written."""
        self.made[source] = dict(records)
        with self._journal.open("a") as file:
            file.write(json.dumps([source, records]) + "\n")

    def write_video(self, name: str, frames: Tensor) -> None:
        """A folder of frames, from uint8 (T, 3, H, W)."""
        folder = self.path / name
        if folder.exists():
            return
        temporary = folder.with_name(f".{os.getpid()}-{folder.name}")
        temporary.mkdir(parents=True)
        try:
            for number, frame in enumerate(frames, 1):
                _save(frame, temporary / FRAME.format(number))
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write_frame(self, name: str, frame: Tensor) -> None:
        """A single image, from uint8 (3, H, W)."""
        path = self.path / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        _save(frame, temporary)
        temporary.replace(path)

    def finish(self, made: Mapping[str, Record], skipped: Mapping[str, str]) -> Path:
        """Writes the manifest and the list; returns the path of the list.

        Raises:
            ValueError: Nothing was made.
        """
        if not made:
            first = next((f"; first: {name}: {reason}" for name, reason in skipped.items()), "")
            raise ValueError(f"{self.path}: no video could be made{first}")
        content = {"settings": self._settings, "videos": made, "skipped": skipped}
        _write_text(self._manifest, json.dumps(content, indent=2))
        lines = (f"{name} {record['num_frames']} {record['label']}\n" for name, record in made.items())
        path = _write_text(self.path / "list.txt", "".join(lines))
        self._journal.unlink(missing_ok=True)
        return path


def digest(*texts: str) -> str:
    """16 hexadecimal digits that tell texts apart."""
    return blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def _save(frame: Tensor, path: Path) -> None:
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(path, quality=_QUALITY)


def _write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    temporary.write_text(text)
    return temporary.replace(path)
