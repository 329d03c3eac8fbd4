"""Results on disk: one file for each finished run, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ABSENT = object()


@dataclass(frozen=True)
class Record:
    """What one run measured.

    Args:
        world: Which of the experiment's worlds.
        arm: Which arm.
        seed: Seed of the run.
        metrics: Measured values by name.
        seconds: Wall time of the run.
    """

    world: str
    arm: str
    seed: int
    metrics: Mapping[str, float]
    seconds: float


class FolderError(ValueError):
    """The output folder belongs to other runs."""


class ResultFolder:
    """The output folder of one experiment: its settings, its finished runs and what these share.

    Args:
        path: The folder; made by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Claims the folder for runs with these settings.

        Args:
            settings: Everything that decides the figures, as JSON types.
            resume: Whether finished runs found here are to be kept and used.

        Raises:
            FolderError: The folder holds runs with other settings, or any runs without `resume`.
        """
        file = self.path / "settings.json"
        if file.exists():
            if not resume:
                raise FolderError(
                    f"{self.path} already holds results: continue them with --resume, or choose another --out"
                )
            if changes := differences(json.loads(file.read_text()), json.loads(json.dumps(settings))):
                raise FolderError(
                    f"{self.path} cannot be resumed, its results were made with other settings: "
                    f"{'; '.join(changes)}. Choose another --out"
                )
        write_json(file, settings)

    def read(self, world: str, arm: str, seed: int) -> Record | None:
        """The record of a finished run; None if it has not finished."""
        file = self._file(world, arm, seed)
        return Record(**json.loads(file.read_text())) if file.exists() else None

    def write(self, record: Record) -> None:
        """Stores the record of a run that has finished."""
        write_json(self._file(record.world, record.arm, record.seed), asdict(record))

    def shared(self, world: str) -> Path:
        """Where a world keeps what its runs share."""
        return self.path / "shared" / world

    def _file(self, world: str, arm: str, seed: int) -> Path:
        return self.path / "records" / world / arm / f"seed-{seed}.json"


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


def kept_state(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict at `path`; what `make` returns is stored there first if the file is missing."""
    if not path.exists():
        state = make()
        replace_file(path, lambda temporary: torch.save(dict(state), temporary))
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Has a new file written beside `path`, then puts it there in one step; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix: savefig goes by it
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
