"""What the checks share: the case, its loader, and one way to fit."""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_methods.attach import Method

#: Optimizer steps in an epoch of the suite; two different epochs are enough for all that changes between them.
STEPS, EPOCHS = 3, 2


class NotApplicable(Exception):  # noqa: N818  # no error: the check says why it cannot be run here
    """A check that cannot be run for this method, module or machine."""


@dataclass
class Report:
    """What a run of the suite found."""

    passed: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"FAILED {name}: {why}" for name, why in self.failed.items()]
        lines += [f"not run {name}: {why}" for name, why in self.not_run.items()]
        return "\n".join([*lines, f"{len(self.passed)} checks passed: {', '.join(self.passed)}"])


class Batches:
    """A dataloader over given batches; tells Lightning its position, so that a run resumes in mid-epoch.

    With `share_out`, each process of a distributed run gets its slice of every batch.
    """

    def __init__(self, batches: Sequence[Any], *, share_out: bool = False) -> None:
        self.batches = batches
        self.share_out = share_out
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # A trainer knows the length and does not exhaust the iterator: the position starts over here.
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            batch = self.batches[self.position]
            self.position += 1
            yield self._slice(batch) if self.share_out else batch

    def _slice(self, batch: Any) -> Any:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return tree_map(lambda leaf: leaf.chunk(ranks)[rank] if isinstance(leaf, Tensor) else leaf, batch)

    def state_dict(self) -> dict[str, int]:
        """How many batches of the pass have been handed out."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from a position."""
        self.position = state_dict["position"]


@dataclass
class Run:
    """A finished fit."""

    module: Any
    trainer: Any
    methods: list[Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The module's values after training."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}


class Case:
    """A method, a module and a batch; `fit` trains fresh copies of the first two."""

    def __init__(self, method: Method, module: Any, batch: Any, accelerator: str = "cpu") -> None:
        self._method, self._module, self.batch = method, module, batch
        self.accelerator = accelerator

    def method(self) -> Any:
        """A fresh copy of the method."""
        return copy.deepcopy(self._method)

    def module(self) -> Any:
        """A fresh copy of the module."""
        return copy.deepcopy(self._module)

    @cached_property
    def lightning(self) -> Any:
        """The Lightning package that the module belongs to."""
        names = [base.__module__ for base in type(self._module).__mro__]
        return importlib.import_module(
            "lightning.pytorch" if any(name.startswith("lightning.pytorch") for name in names) else "pytorch_lightning"
        )

    @cached_property
    def batches(self) -> list[Any]:
        """Different batches: the given one with its samples turned round."""
        size = next(leaf.shape[0] for leaf in tree_leaves(self.batch) if isinstance(leaf, Tensor) and leaf.ndim)
        if size < 4 or size % 2:
            raise ValueError(f"Expected a batch of an even size of at least 4, but its first tensor has {size} rows.")

        def turned(shift: int) -> Any:
            order = (torch.arange(size) + shift) % size
            kept = order[torch.arange(size) != shift % size].repeat(2)[:size]  # not only a permutation: other samples
            return tree_map(lambda leaf: leaf[kept] if isinstance(leaf, Tensor) and leaf.ndim else leaf, self.batch)

        return [turned(shift) for shift in range(STEPS)]

    def fit(
        self,
        methods: Sequence[Any] = (),
        module: Any = None,
        *,
        callbacks: Sequence[Any] = (),
        before: Sequence[Any] = (),
        loader: Any = None,
        ckpt_path: str | Path | None = None,
        **trainer_arguments: Any,
    ) -> Run:
        """Fits a module (a fresh copy by default) with methods between two lists of other callbacks."""
        module = self.module() if module is None else module
        arguments = {
            "accelerator": self.accelerator,
            "devices": 1,
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **trainer_arguments,
        }
        self.lightning.seed_everything(1, verbose=False)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            trainer = self.lightning.Trainer(
                callbacks=[*before, *methods, *callbacks], default_root_dir=folder, **arguments
            )
            trainer.fit(module, loader or Batches(self.batches), ckpt_path=ckpt_path)
        return Run(module, trainer, list(methods))

    @cached_property
    def plain(self) -> Run:
        """A fit without the method."""
        return self.fit()

    @cached_property
    def attached(self) -> Run:
        """A fit with the method."""
        return self.fit([self.method()])


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights agree bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 1e-5) -> bool:
    """Whether two sets of weights agree up to the order of float additions."""
    return first.keys() == second.keys() and all(
        torch.allclose(first[name].double(), second[name].double(), rtol=1e-4, atol=atol) for name in first
    )
