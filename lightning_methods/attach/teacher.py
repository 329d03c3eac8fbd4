"""A frozen network that a method asks, and that never becomes part of the module it teaches."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_methods.attach.address import Address, AddressLike, address, describe
from lightning_methods.attach.capture import Recorder

if TYPE_CHECKING:
    from lightning_methods.attach.step import Step


class Teacher:
    """Runs a frozen network on (a rewritten copy of) the batch, without gradients, in eval mode.

    It is no submodule of the student: it is in none of its parameters, buckets, optimizers or checkpoints.
    It runs under the trainer's autocast, on the strategy's device, once a step even if several addresses
    (or several methods) read it.

    Args:
        source: The network: an `nn.Module` (a LightningModule too), a function without arguments that
            returns one, or `"timm:NAME"`. With a checkpoint, a timm network takes its number of classes and
            of input channels from the checkpoint; without one, timm's pretrained weights are loaded.
        inputs: Address of what the network is called with, or one for each argument. `"module@input"` is what the
            student itself received, augmentation inside the step included.
        rewrite: For the teacher only: address in the batch -> address of the value to put there.
        checkpoint: File with weights: a Lightning checkpoint (`state_dict`), `{"model": ...}`, or a bare
            state dict. Loaded strictly.
        key: Prefix that selects the network among the checkpoint's keys, e.g. `"net."`.
        transform: Applied to the inputs first, e.g. another normalisation.

    Raises:
        ValueError: If the source is none of these, or the checkpoint cannot be read or does not fit.
    """

    def __init__(
        self,
        source: nn.Module | str | Callable[[], nn.Module],
        *,
        inputs: list[AddressLike] | AddressLike = "batch.0",
        rewrite: Mapping[str, AddressLike] | None = None,
        checkpoint: str | Path | None = None,
        key: str | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if not (source.startswith("timm:") if isinstance(source, str) else callable(source)):
            got = repr(source) if isinstance(source, str) else describe(source)
            raise ValueError(f"Expected `teacher` to be a module, a function or 'timm:NAME', but got {got}.")
        self.source = source
        self.inputs = [address(one) for one in inputs] if isinstance(inputs, list) else address(inputs)
        self.rewrite = {address(to): address(value) for to, value in (rewrite or {}).items()}
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.key = key
        self.transform = transform
        self._network: nn.Module | None = source if isinstance(source, nn.Module) else None
        self._loaded = self.checkpoint is None
        self._recorder: Recorder | None = None
        self._before: list[tuple[nn.Module, bool]] = []
        self._home: torch.device | None = None

    def __repr__(self) -> str:
        if isinstance(self.source, nn.Module):
            return f"{type(self.source).__name__}(...)"
        return repr(self.source) if isinstance(self.source, str) else getattr(self.source, "__name__", "...")

    @property
    def network(self) -> nn.Module:
        """The network itself; built, and its checkpoint loaded, when it is first asked for."""
        if self._network is None:
            # Initial weights must not shift the random numbers of the student's training.
            with torch.random.fork_rng(devices=[]):
                self._network = self._build()
        if not self._loaded:
            _load(self._network, self._weights(), self.checkpoint)
            self._loaded = True
        return self._network

    def _build(self) -> nn.Module:
        if isinstance(self.source, str):
            return _timm(self.source.removeprefix("timm:"), None if self._loaded else self._weights())
        network = self.source()
        if not isinstance(network, nn.Module):
            raise ValueError(f"Expected the `teacher` function to return a module, but got {describe(network)}.")
        return network

    def _weights(self) -> dict[str, Tensor]:
        assert self.checkpoint is not None
        return read_weights(self.checkpoint, self.key)

    def attach(self, student: nn.Module, device: torch.device, addresses: list[Address]) -> None:
        """Checks the network against the student, moves it and hooks what `addresses` read."""
        network = self.network
        self._refuse_student(student, network)
        if self._recorder is None:  # else another method has this teacher too
            self._before = [(module, module.training) for module in network.modules()]
            self._home = next((parameter.device for parameter in network.parameters()), None)
            network.to(device)
            self._recorder = Recorder(network, [Address("teacher")], patch_root=False)
        for where in addresses:
            self._recorder.add(where)

    def detach(self) -> None:
        """Leaves the network as it was found: no hook, its own train/eval modes and device."""
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        for module, training in self._before:
            module.training = training
        self._before = []
        if self._home is not None:
            self.network.to(self._home)

    @staticmethod
    def _refuse_student(student: nn.Module, network: nn.Module) -> None:
        if network is student or any(network is module for module in student.modules()):
            raise ValueError(
                "The `teacher` is the student itself or one of its submodules; give it a network of its own."
            )
        own = {id(parameter) for parameter in student.parameters()}
        storages = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()} - {0}
        for name, parameter in network.named_parameters():
            if id(parameter) in own or parameter.untyped_storage().data_ptr() in storages:
                raise ValueError(
                    f"The `teacher` shares its parameter {name!r} with the student, so it would change "
                    f"while it teaches; give it a copy (copy.deepcopy)."
                )

    def run(self, step: Step) -> None:
        """Runs the network on this step's inputs; `read` then gives its values until `clear`."""
        recorder = self._recorder
        assert recorder is not None
        batch = self._rewritten(step)
        several = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        inputs = tuple(step.read_from(where, batch) for where in several)
        if self.transform is not None:
            inputs = tuple(map(self.transform, inputs))
        # Lightning's train() does not reach a network outside the module, but a user's code may.
        if any(module.training for module, _ in self._before):
            self.network.eval()
        with torch.no_grad(), step.forward_context(), recorder:
            output = self.network(*map(self._cast, inputs))
        recorder.record((), inputs, {}, output)

    def read(self, where: Address) -> Any:
        """The value at a `teacher...` address in this step."""
        assert self._recorder is not None
        return self._recorder.read(where)

    def clear(self) -> None:
        """Drops the values of the step."""
        if self._recorder is not None:
            self._recorder.clear()

    def _rewritten(self, step: Step) -> Any:
        batch = step.batch
        for to, value in self.rewrite.items():
            batch = step.written(batch, to, step[value])
        return batch

    def _cast(self, inputs: Any) -> Any:
        """Follows the teacher's own precision where the student trains in true half or double precision."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            return inputs
        own = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), inputs.dtype)
        return inputs.to(own)


def read_weights(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, with `key` and `module.` prefixes taken off.

    Raises:
        ValueError: If the file is missing, unreadable or holds no weights under `key`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"`teacher_checkpoint`: there is no file {path}.") from None
    except Exception as error:
        raise ValueError(f"`teacher_checkpoint`: {path} cannot be read as a checkpoint: {error}") from error
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"`teacher_checkpoint`: {path} holds {describe(content)}; expected a state dict, "
            f"bare or under 'state_dict' or 'model'."
        )
    if key is not None:
        chosen = {name.removeprefix(key): value for name, value in content.items() if name.startswith(key)}
        if not chosen:
            raise ValueError(
                f"`teacher_key`: no key of {path} begins with {key!r}; the first is {next(iter(content), None)!r}."
            )
        content = chosen
    return {name.removeprefix("module."): value for name, value in content.items()}


def _load(network: nn.Module, weights: dict[str, Tensor], path: Path | None) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"`teacher_checkpoint`: {path} does not fit {type(network).__name__}: {error}") from error


def _timm(name: str, weights: dict[str, Tensor] | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5))
        raise ValueError(f"`teacher`: timm has no model {name!r}.{f' It has {near}.' if near else ''}")
    if weights is None:
        return timm.create_model(name, pretrained=True)
    sizes: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name)
    classifier, first = getattr(config, "classifier", None), getattr(config, "first_conv", None)
    if isinstance(classifier, str) and f"{classifier}.weight" in weights:
        sizes["num_classes"] = weights[f"{classifier}.weight"].shape[0]
    if isinstance(first, str) and f"{first}.weight" in weights:
        sizes["in_chans"] = weights[f"{first}.weight"].shape[1]
    return timm.create_model(name, pretrained=False, **sizes)
