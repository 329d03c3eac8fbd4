"""Trainable parts that a method brings along, without a trace in the module's checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_methods.attach._lightning import Callback, LightningModule, MisconfigurationException, Trainer

#: Name under which the container stands on a LightningModule while it is being fitted.
CONTAINER = "_lightning_methods"


class Helpers(nn.ModuleDict):
    """Holds the trainable helpers of all attached methods.

    As a submodule it is moved, wrapped by the strategy and optimised with the module, but it writes nothing
    into a state dict and takes nothing from one: the values travel in the callback's state. So a checkpoint
    loads strictly into the plain module, and a plain checkpoint into this one. Overridden methods do it,
    not hooks, so that it survives deepcopy and pickle.
    """

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Adds nothing to `destination`."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The caller hands these keys on to the children, each of which then loads its current values.
        for name, helper in self.items():
            state_dict.update(helper.state_dict(prefix=f"{prefix}{name}."))


def register(trainer: Trainer, module: LightningModule, name: str, helpers: Mapping[str, nn.Module]) -> None:
    """Puts a method's helpers on the module, and on the copies that weight averaging has already made.

    The average walks both modules' parameters in parallel, so a copy without the helpers would be averaged
    with the wrong tensors.
    """
    _add(module, name, nn.ModuleDict(dict(helpers)))
    for average in averages(trainer, module):
        _add(average.module, name, copy.deepcopy(nn.ModuleDict(dict(helpers))).to(average.n_averaged.device))


def averages(trainer: Trainer, module: nn.Module) -> Iterator[AveragedModel]:
    """The copies of `module` that weight averaging has already made."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        for value in vars(callback).values():
            if isinstance(value, AveragedModel) and type(value.module) is type(module):
                yield value


def _add(module: nn.Module, name: str, helpers: nn.ModuleDict) -> None:
    if CONTAINER not in module._modules:
        module.add_module(CONTAINER, Helpers())
    container = module._modules[CONTAINER]
    assert isinstance(container, Helpers)
    if name not in container:
        container[name] = helpers


def unregister(module: nn.Module, name: str) -> None:
    """Takes a method's helpers off, and the container with the last of them."""
    container = module._modules.get(CONTAINER)
    if isinstance(container, Helpers) and name in container:
        del container[name]
        if not len(container):
            del module._modules[CONTAINER]


def join_optimizer(trainer: Trainer, module: nn.Module) -> None:
    """Has helpers optimised where `configure_optimizers` listed only some of the module's parameters.

    They join the optimizer's last group rather than form a new one: learning-rate schedulers hold one entry
    per group that existed when they were made, and a group without an entry would never be scheduled.

    Raises:
        MisconfigurationException: If there are several optimizers to choose from.
    """
    container = module._modules.get(CONTAINER)
    if not isinstance(container, Helpers):
        return
    known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in container.parameters() if p.requires_grad and id(p) not in known]
    if not missing:
        return
    # What Lightning puts in the place of a missing optimizer has no groups.
    optimizers = [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"The trainable helpers of {', '.join(container.keys())} are in none of the {len(optimizers)} "
            f"optimizers, and it is not clear which should train them: pass self.parameters() to one of them."
        )
    optimizers[0].param_groups[-1]["params"].extend(missing)
