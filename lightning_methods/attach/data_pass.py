"""One more pass over the training data, between epochs, of which the training itself notices nothing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from lightning_methods.attach._lightning import LightningModule, MisconfigurationException, Trainer
from lightning_methods.attach.address import describe


def training_batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    """The batches of an epoch of training, on the device, as a training step gets them.

    Each rank gets the share that its sampler gives it, and no more batches than the Trainer takes in an epoch. The
    loader's order, its position, its generators and torch's own one are left as they were found.

    Raises:
        MisconfigurationException: If the Trainer has several training loaders.
    """
    loader = trainer.train_dataloader
    if loader is None or isinstance(loader, (dict, list, tuple)):
        raise MisconfigurationException(
            f"A pass over the training data needs one training dataloader, but the Trainer has {describe(loader)}."
        )
    limit = trainer.num_training_batches
    with _undisturbed(loader):
        for batch in itertools.islice(loader, None if limit == float("inf") else int(limit)):
            converted = trainer.precision_plugin.convert_input(batch)
            converted = module._on_before_batch_transfer(converted)
            yield trainer.strategy.batch_to_device(converted)


@contextlib.contextmanager
def _undisturbed(loader: Any) -> Iterator[None]:
    places = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    generators = {id(found): found for place in places if (found := getattr(place, "generator", None)) is not None}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    resumes = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    position = loader.state_dict() if resumes else None
    try:
        # A loader draws the seed of its workers even where nothing else is random.
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        if resumes:
            loader.load_state_dict(position)
