"""Result folders of the command line: settings that must agree, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ABSENT = object()


class FolderError(ValueError):
    """The output folder belongs to other runs."""


def claim_folder(path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Makes a folder that of results with these settings, by a file `settings.json` in it.

    Args:
        path: The folder; made if it is not there.
        settings: Everything that decides the results, as JSON types.
        resume: Whether results that are found there are to be kept and used.

    Raises:
        FolderError: The folder holds results with other settings, or any results without `resume`.
    """
    file = path / "settings.json"
    if file.exists():
        if not resume:
            raise FolderError(f"{path} already holds results: continue them with --resume, or choose another --out")
        if changes := differences(json.loads(file.read_text()), json.loads(json.dumps(settings))):
            raise FolderError(
                f"{path} cannot be resumed, its results were made with other settings: "
                f"{'; '.join(changes)}. Choose another --out"
            )
    write_json(file, settings)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Where two trees of settings differ, one phrase for each place.

    Example:
        >>> differences({"student": {"lr": 0.1, "width": 8}}, {"student": {"lr": 0.2, "width": 8}})
        ['student.lr is 0.1 there and 0.2 here']
    """
    old, new = _flat(there), _flat(here)
    return [
        f"{key} is {_shown(old.get(key, _ABSENT))} there and {_shown(new.get(key, _ABSENT))} here"
        for key in {**old, **new}
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is either there whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(content, indent=2) + "\n")

    replace_file(path, write)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Has a new file written beside `path`, then puts it there in one step; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix: savefig and PyAV go by it
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
