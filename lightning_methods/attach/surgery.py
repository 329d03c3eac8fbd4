"""Putting parts of a method's own in the place of a module's submodules, and taking them out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from lightning_methods.attach._lightning import MisconfigurationException
from lightning_methods.attach.address import Address, AddressError, address, describe, nearest

#: Attribute under which a part keeps the one whose place it took. No submodule: it is in no state dict or optimizer.
_ORIGINAL = "_lightning_methods_original"

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class _Original:
    part: nn.Module
    method: str


class _Note(nn.Module):
    """A child of an operated module whose name says, where a checkpoint is loaded without the method, what is missing.

    torch's own error for state dicts that do not fit then ends in that sentence; and as a child it is copied,
    pickled and loaded like any other.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("_", torch.zeros(0))


class Parts:
    """Addresses of submodules to operate on; `*` stands for one name, or for a part of one.

    Args:
        addresses: One or several, such as `"module.encoder.layers.*.self_attn"`.

    Raises:
        AddressError: If one is not the bare path of a submodule.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(Parts("module.*").find(net))
        ['0', '1', '2']
    """

    def __init__(self, addresses: str | Sequence[str]) -> None:
        self.given = addresses
        self.patterns = [_pattern(text) for text in ([addresses] if isinstance(addresses, str) else addresses)]
        if not self.patterns:
            raise AddressError("Expected the address of at least one submodule, but got none.")

    def find(self, module: nn.Module) -> dict[str, nn.Module]:
        """The submodules by path, in the order of the addresses and then of the model.

        Raises:
            AddressError: If an address matches nothing; the message has the nearest path.
        """
        paths = {path: part for path, part in module.named_modules(remove_duplicate=False) if path}
        found: dict[str, nn.Module] = {}
        for pattern in self.patterns:
            matched = [path for path in paths if _matches(path.split("."), pattern.path)]
            if not matched:
                raise AddressError(
                    f"Address '{pattern}' matches no submodule of {type(module).__name__}, which has "
                    f"{len(paths)}.{nearest(str(pattern), [f'module.{path}' for path in paths])} (What the module "
                    f"makes only in its `setup` or `configure_model` is not there yet.)"
                )
            found.update({path: paths[path] for path in matched})
        return found

    def __repr__(self) -> str:
        return repr(self.given)


def _pattern(text: str) -> Address:
    parsed = address(text)
    if not isinstance(parsed, Address) or parsed != Address("module", parsed.path) or not parsed.path:
        raise AddressError(f"Expected the path of a submodule, such as 'module.encoder.attn', but got {text!r}.")
    return parsed


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(names) == len(pattern) and all(map(fnmatchcase, names, pattern))


def replaced_by(part: nn.Module) -> str | None:
    """Name of the method whose part this is; None if it is the module's own."""
    original = vars(part).get(_ORIGINAL)
    return original.method if isinstance(original, _Original) else None


def is_operated(module: nn.Module, method: str) -> bool:
    """Whether the method of this name has put its parts into `module`."""
    return any(replaced_by(part) == method for part in module.modules())


def operate(module: nn.Module, replacements: Mapping[str, nn.Module], method: str, callback: str) -> None:
    """Puts each new part in the place of the one at its path, on the same device and in the same mode.

    Args:
        module: The whole model.
        replacements: New parts by path. A part that stands at several paths is replaced at all of them.
        method: Name of the method.
        callback: Class of the method, for who loads a checkpoint without it.

    Raises:
        MisconfigurationException: If another method has already replaced one of the parts.
    """
    new_of: dict[nn.Module, nn.Module] = {}
    for path, new in replacements.items():
        old = module.get_submodule(path)
        if (other := replaced_by(old)) is not None:
            raise MisconfigurationException(
                f"'module.{path}' is {describe(old)} that the method {other!r} has put there, so {method!r} cannot "
                f"replace it: one method can operate on a part."
            )
        new_of.setdefault(old, new)
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if part in new_of:
            new = new_of[part]
            if (like := next(part.parameters(), None)) is not None:
                new.to(like.device)
            new.train(part.training)
            new.__dict__[_ORIGINAL] = _Original(part, method)
            _put(module, path, new)
    module.add_module(
        f"saved with the callback {callback} of lightning_methods, which changed parts of the model: attach it, or "
        f"call its apply(module), before loading",
        _Note(method),
    )


def undo(module: nn.Module, method: str) -> None:
    """Puts the original parts back; what they share with the new ones (weights, as a rule) stays as trained."""
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if replaced_by(part) == method:
            original = vars(part)[_ORIGINAL].part
            _put(module, path, original.train(part.training))
    _remove_notes(module, method)


def without_traces(module: AnyModule) -> AnyModule:
    """A copy that keeps the new parts and nothing else: no originals, and a state dict of tensors of its own."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        part.__dict__.pop(_ORIGINAL, None)
    _remove_notes(copied)
    return copied


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = part


def _remove_notes(module: nn.Module, method: str | None = None) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, _Note) and method in (None, child.method):
            delattr(module, name)
