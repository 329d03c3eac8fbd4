"""Attaches methods to training scripts that do not mention this package.

Lightning calls `callbacks_from_environment` whenever a Trainer is built (entry-point groups
`pytorch_lightning.callbacks_factory` and `lightning.pytorch.callbacks_factory`). Unless the environment
variable `LIGHTNING_METHODS` names a recipe, it returns an empty list and imports nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Callback

VARIABLE = "LIGHTNING_METHODS"


def callbacks_from_environment() -> list[Callback]:
    """The callbacks of the recipe that the environment variable `LIGHTNING_METHODS` names.

    A recipe is the YAML that LightningCLI takes too: `trainer.callbacks` is a list of `class_path` and
    `init_args`; every other key is left to LightningCLI.

    Raises:
        ValueError: If the file is missing, is no such YAML, or a callback cannot be built: names the
            variable, the file and the line.
    """
    path = os.environ.get(VARIABLE)
    return _read(Path(path)) if path else []


def _read(path: Path) -> list[Callback]:
    import yaml

    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise _error(path, None, f"the file cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise _error(path, line, f"the file is not YAML: {getattr(error, 'problem', error)}") from None
    items = content
    for key in ("trainer", "callbacks"):
        items = items.get(key) if isinstance(items, dict) else None
    if not isinstance(items, list):
        raise _error(path, None, "expected a list of callbacks at the key `trainer.callbacks`")
    listed = _child(_child(root, "trainer"), "callbacks")
    # A list that a merge key brought in is not found under its keys: errors then name no line.
    lines = [node.start_mark.line + 1 for node in listed.value] if listed else [None] * len(items)
    return [_build(path, line, item) for line, item in zip(lines, items, strict=True)]


def _child(node: Any, key: str) -> Any:
    return None if node is None else next((value for name, value in node.value if name.value == key), None)


def _build(path: Path, line: int | None, item: Any) -> Callback:
    import torch
    from jsonargparse import ArgumentParser, Namespace

    from lightning_methods.attach._lightning import CallbackType

    if isinstance(item, dict) and "class_path" not in item:
        raise _error(path, line, "the callback cannot be built: it has no `class_path`")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=CallbackType, required=True)
    try:
        # The script goes on with the random numbers that it would have had without the variable.
        with torch.random.fork_rng(devices=[]):
            built: Namespace = parser.instantiate_classes(parser.parse_object({"callback": item}))
    except Exception as error:  # the constructor's own errors too: all of them belong to this line
        raise _error(path, line, f"the callback cannot be built: {error}") from error
    return built.callback  # type: ignore[no-any-return]


def _error(path: Path, line: int | None, problem: str) -> ValueError:
    where = path if line is None else f"{path}, line {line}"
    return ValueError(f"Environment variable {VARIABLE} names {where}: {problem}.")
