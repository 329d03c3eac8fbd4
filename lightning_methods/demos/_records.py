"""Results on disk: one file for each finished run, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_methods._files import claim_folder, replace_file, write_json


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
        claim_folder(self.path, settings, resume=resume)

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


def kept_state(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict at `path`; what `make` returns is stored there first if the file is missing."""
    if not path.exists():
        state = make()
        replace_file(path, lambda temporary: torch.save(dict(state), temporary))
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded
