"""Recording what submodules received and returned while a step runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_methods.attach.address import Address, AddressError, describe, nearest, read_items

Path = tuple[str, ...]


class Call(NamedTuple):
    """One call of a submodule."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def received(self) -> Any:
        """The one positional argument; several arguments come as a tuple, or a dict if some have names."""
        if not self.kwargs:
            return self.args[0] if len(self.args) == 1 else self.args
        return {**dict(enumerate(self.args)), **self.kwargs}


def _forget(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """What a recording hook becomes in a copied or unpickled module: nothing."""


def itself(value: Any) -> Any:
    """What a pickle calls to put `value` in the place of the object that was pickled."""
    return value


class _Hook:
    """A forward hook that a deep copy or a pickle of the module leaves behind."""

    def __init__(self, recorder: Recorder, path: Path) -> None:
        self.recorder = recorder
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.recorder.live:
            self.recorder.record(self.path, args, kwargs, output)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _forget

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return itself, (_forget,)


class _RootForward:
    """Stands in for the root's `forward` during a step.

    About half of all LightningModules call `self.forward(x)`, which runs no hook; `self(x)` looks `forward`
    up on the instance. Standing there sees both, each call once, and not the call with which a strategy
    such as DDP encloses the whole step.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.original: Callable[..., Any] = recorder.root.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        if self.recorder.live:
            self.recorder.record((), args, kwargs, output)
        return output

    def __deepcopy__(self, memo: Any) -> Callable[..., Any]:
        # A module that copies itself inside its step gets the copy's own plain forward.
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.recorder.saved_forward:
            return itself, (self.original,)
        return getattr, (self.recorder.root, "forward")


class Recorder:
    """Records the calls that a set of addresses needs, between `__enter__` and `__exit__` only.

    Args:
        root: The LightningModule, or a teacher.
        addresses: Addresses into `root`; each path is checked here.
        patch_root: Whether calls of the root itself are recorded by standing in for its `forward`; whoever
            calls the root directly can `record` them instead.

    Raises:
        AddressError: If a path names no submodule, Parameter or buffer.
    """

    def __init__(self, root: nn.Module, addresses: Iterable[Address], *, patch_root: bool = True) -> None:
        self.root = root
        self.live = False
        self.patch_root = patch_root
        self.calls: dict[Path, list[Call]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._warned: set[Address] = set()
        self._root_forward: _RootForward | None = None
        self.saved_forward: list[Any] = []  # the one on the instance, if there was one
        for where in addresses:
            self.add(where)

    def add(self, where: Address) -> None:
        """Hooks the submodule that `where` names, once."""
        target = resolve(self.root, where)
        if isinstance(target, Tensor) or where.path in self.calls:
            return
        self.calls[where.path] = []
        if where.path:
            hook = _Hook(self, where.path)
            self._handles.append(target.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Takes every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.calls.clear()

    def record(self, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notes one call."""
        self.calls[path].append(Call(args, kwargs, output))

    def __enter__(self) -> None:
        self.live = True
        if self.patch_root and () in self.calls:
            state = self.root.__dict__
            self.saved_forward = [state["forward"]] if "forward" in state else []
            # One object for all steps: a compiled step guards on its identity.
            if self._root_forward is None:
                self._root_forward = _RootForward(self)
            else:
                self._root_forward.original = self.root.forward
            state["forward"] = self._root_forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live = False
        if self.patch_root and () in self.calls:
            del self.root.__dict__["forward"]
            if self.saved_forward:
                self.root.__dict__["forward"] = self.saved_forward.pop()

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Starts with nothing recorded, and brings back afterwards what had been."""
        before = self.calls
        self.calls = {path: [] for path in before}
        try:
            yield
        finally:
            self.calls = before

    def clear(self) -> None:
        """Drops the recorded values, so that no graph outlives its step."""
        for calls in self.calls.values():
            calls.clear()

    def read(self, where: Address) -> Any:
        """The value at `where` in this step.

        Raises:
            AddressError: If it was not recorded, or has no such item.
        """
        calls = self.calls.get(where.path)
        if calls is None:
            value: Any = resolve(self.root, where)
            if not isinstance(value, Tensor):
                raise AddressError(
                    f"Address '{where}' is not recorded: no argument of the method names it. A function that "
                    f"reads submodules must name them: computed(function, '{where}')."
                )
            return value
        if not calls:
            raise NotCalledError(where)
        if where.call is None and len(calls) > 1 and where not in self._warned:
            self._warned.add(where)
            first, last = (replace(where, call=call) for call in (0, len(calls) - 1))
            rank_zero_warn(
                f"'{replace(where, items=())}' was called {len(calls)} times in one step; the last call is used. "
                f"Write '{first}' to '{last}' to choose."
            )
        index = -1 if where.call is None else where.call
        if not -len(calls) <= index < len(calls):
            raise AddressError(f"Address '{where}': there were {len(calls)} calls in this step, numbered from 0.")
        call = calls[index]
        value = call.received if where.received else call.output
        return read_items(value, where, str(replace(where, items=()))) if where.items else value


class NotCalledError(AddressError):
    """A submodule that exists but was not called in the step."""

    def __init__(self, where: Address, hint: str = "") -> None:
        self.where = where
        name = ".".join((where.root, *where.path))
        why = (
            "the step called neither self(...) nor self.forward(...)"
            if where.root == "module" and not where.path
            else "it was not called in this step"
        )
        super().__init__(f"Address '{where}': '{name}' gave no value, because {why}.{hint}")


def resolve(root: nn.Module, where: Address) -> nn.Module | Tensor:
    """The submodule, Parameter or buffer that the path of `where` names."""
    value: nn.Module | Tensor = root
    for depth, name in enumerate(where.path):
        inner = getattr(value, name, None) if isinstance(value, nn.Module) else None
        if not isinstance(inner, (nn.Module, Tensor)):
            here = ".".join((where.root, *where.path[:depth]))
            known = _children(value)
            everywhere = [".".join((where.root, path)) for path, _ in root.named_modules() if path]
            near = nearest(name, known) or nearest(str(where), everywhere)
            has = f"has {', '.join(map(repr, known[:20]))}" if known else "has no submodules or parameters"
            raise AddressError(
                f"Address '{where}': '{here}' ({type(value).__name__}) has no submodule, parameter or buffer "
                f"{name!r}; it {has}.{near}"
            )
        value = inner
    if isinstance(value, Tensor) and (where.items or where.received or where.call is not None):
        raise AddressError(f"Address '{where}' names a {type(value).__name__}, which takes no '@input', '#' or ':'.")
    return value


def _children(value: Any) -> list[str]:
    if not isinstance(value, nn.Module):
        return []
    tensors = [name for name, _ in (*value.named_parameters(recurse=False), *value.named_buffers(recurse=False))]
    return [name for name, _ in value.named_children()] + tensors


def called_submodules(root: nn.Module, run: Callable[[], Any]) -> str:
    """Runs the step once more with every submodule recorded, to say in an error what could be named.

    Only on the way to an error: random state and buffers are put back, gradients are off.
    """
    outputs: dict[str, Any] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.update({path: output})

    handles = [module.register_forward_hook(note(path)) for path, module in root.named_modules() if path]
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    try:
        # What fired before the run failed (it may need the gradients that are off) is worth as much.
        with torch.random.fork_rng(), torch.no_grad(), contextlib.suppress(Exception):
            run()
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    if not outputs:
        return " No submodule was called either: name a value of the batch or of the output."
    # Heads return matrices and come last: those are the likeliest to be meant.
    fired = list(reversed(outputs.items()))
    fired.sort(key=lambda item: not (isinstance(item[1], Tensor) and item[1].ndim == 2))
    shown = "; ".join(f"'module.{path}' returned {describe(output)}" for path, output in fired[:8])
    return f" Called were (likeliest first): {shown}."
