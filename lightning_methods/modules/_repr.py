"""What modules show of their settings."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def changed_arguments(module: nn.Module, values: Mapping[str, Any]) -> str:
    """The constructor's arguments that differ from the defaults, of those that are among `values`."""
    parameters = inspect.signature(type(module)).parameters.values()
    changed = [p.name for p in parameters if p.name in values and values[p.name] != p.default]
    return ", ".join(f"{name}={values[name]!r}" for name in changed)
