"""Teaches the documentation that `Example:` in a docstring is what its parser calls `Examples:`."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Without it a doctest would be rendered as prose."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object, after its docstring is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
