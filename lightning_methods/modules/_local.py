"""Buffers that belong to one rank, for modules that count something on each rank before it is reduced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="LocalBuffers")


class LocalBuffers(nn.Module):
    """A module some of whose buffers are not listed among the buffers, and none of which loses precision.

    DistributedDataParallel overwrites the listed buffers of every rank by those of rank 0 in each forward. The ones
    named in `local` move, save and load as buffers do, but stay each rank's own. Casts of the module to a dtype of
    fewer digits move its buffers and leave their dtype.
    """

    local: ClassVar[tuple[str, ...]] = ()

    def make_local(self) -> None:
        """Called once the buffers are registered: takes the local ones off the list."""
        self._take_off()

    @contextmanager
    def _listed(self) -> Iterator[None]:
        for name in self.local:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            self._take_off()

    def _take_off(self) -> None:
        for name in self.local:
            self.__dict__[name] = self._buffers.pop(name)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            enough = torch.promote_types(moved.dtype, tensor.dtype) == moved.dtype
            return moved if enough else tensor.to(moved.device)

        with self._listed():
            super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._listed():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._listed():
            super()._load_from_state_dict(*args, **kwargs)
