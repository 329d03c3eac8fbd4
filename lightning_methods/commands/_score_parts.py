"""Scores of a long evaluation, kept in parts so that it can be stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_methods._files import replace_file
from lightning_methods.commands._progress import progress

Scores = npt.NDArray[np.float32]

_BATCHES = 32  # in a part


def collect_scores(
    loader: DataLoader[Any], score: Callable[[Mapping[str, Any]], Tensor], columns: int, folder: Path
) -> Scores:
    """Scores of all samples, in their order.

    A part is a file that is there whole or not at all, and begins where a batch begins. What has been scored is not
    scored again, and the rest is in the same batches as in a run that was never stopped.

    Args:
        loader: Batches in order.
        score: From a batch to its scores, (B, columns).
        columns: Scores of a sample.
        folder: Where the parts lie.

    Returns:
        float32, (samples, columns).
    """
    samples: Dataset[Any] = loader.dataset
    total: int = len(samples)  # type: ignore[arg-type]  # a dataset with random access has a length
    size = _BATCHES * (loader.batch_size or 1)
    paths = {start: folder / f"{start:09d}.npy" for start in range(0, total, size)}
    first = next((start for start, path in paths.items() if not path.exists()), total)
    rest = DataLoader(
        Subset(samples, range(first, total)),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
    with progress("scoring", first, total) as show:
        start, waiting = first, list[Scores]()
        for batch in rest:
            waiting.append(score(batch).numpy())
            done = sum(map(len, waiting))
            show(start + done)
            if done == size or start + done == total:
                save_scores(paths[start], np.concatenate(waiting))
                start, waiting = start + done, []
    return np.concatenate([np.load(path) for path in paths.values()]).reshape(total, columns)


def save_scores(path: Path, scores: Scores) -> None:
    """Writes an array that is there whole or not at all."""
    replace_file(path, lambda temporary: np.save(temporary, scores))
