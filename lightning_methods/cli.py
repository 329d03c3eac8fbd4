"""The console command `lightning-methods`.

`list` and `show` read the registry and import nothing heavy; the other commands import what they need.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from lightning_methods.registry import METHODS, MethodInfo, method

USAGE = """\
usage: lightning-methods COMMAND ...

  list                     the methods, one a line
  show NAME                what there is to say about a method
  demo NAME [options]      a controlled experiment with a method; `demo NAME --help` lists the options
  demo all [options]       every experiment
  check --config FILE ...  builds module, data and callbacks as `fit` would, runs one training batch and prints
                           what every address of every attached method names, and every loss term
  fit | validate | test | predict --config FILE ...
                           Lightning's own command line (LightningCLI) for any module, datamodule and callbacks
                           given by class path; `fit --help` lists the options
"""
_TOOL = "  {:<23}  a tool; `{} --help` lists the options\n"

#: Which extra, besides `demos`, brings a package that some demo needs.
_EXTRAS = {"av": ["video"], "transformers": ["text"]}
_KINDS = {
    "step": "acts inside training steps",
    "surgery": "swaps or adds parts of the model",
    "plain": "ordinary Lightning hooks",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The command and its arguments; None takes those of the process.

    Returns:
        The exit status: 0 if all went well, 1 if the command failed, 2 if it could not be understood.

    Example:
        >>> main(["list"])  # doctest: +ELLIPSIS
        ikl ... classification, knowledge distillation
        ...0
    """
    command, arguments = "", list(sys.argv[1:] if argv is None else argv)
    if arguments:
        command = arguments.pop(0)
    if command in ("fit", "validate", "test", "predict", "check"):
        return _lightning(command, arguments, as_given=argv)
    commands: dict[str, Callable[[list[str]], int]] = {"list": _list, "show": _show, "demo": _demo}
    commands |= {name: partial(_tool, name) for name in _tools()}
    if command in commands:
        try:
            return commands[command](arguments)
        except _UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    asked = command in ("-h", "--help")
    if command and not asked:
        print(f"error: there is no command {command!r}.", file=sys.stderr)
    tools = "".join(_TOOL.format(name, name) for name in _tools())
    print(USAGE + tools, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


class _UsageError(Exception):
    """Arguments that a command cannot understand."""


def _list(arguments: list[str]) -> int:
    if arguments:
        raise _UsageError(f"`list` takes no arguments, but got {' '.join(arguments)}.")
    name, kind = (max(len(getattr(info, field)) for info in METHODS) for field in ("name", "kind"))
    for info in METHODS:
        print(f"{info.name:{name}}  {info.kind:{kind}}  {info.task}")
    return 0


def _show(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise _UsageError(f"`show` takes the name of one method: {_names()}.")
    info = _method(arguments[0])
    print(f"{info.name}: {info.title}\n")
    for label, text in _facts(info):
        print(textwrap.fill(text, 110, initial_indent=f"{label:<11}", subsequent_indent=" " * 11))
    return 0


def _facts(info: MethodInfo) -> Iterator[tuple[str, str]]:
    yield "task", info.task
    yield "paper", info.paper
    yield "kind", f"{info.kind} ({_KINDS[info.kind]})"
    needs = (
        "needs the method" if info.changes_inference else "is the plain one; its checkpoints load without this package"
    )
    yield "inference", f"the trained module {needs}"
    yield "callbacks", ", ".join(f"lightning_methods.callbacks.{name}" for name in info.callbacks)
    yield "functions", "lightning_methods.functional: " + ", ".join(info.functional)
    yield "recipe", f"callbacks/{info.name}.yaml"
    yield "card", info.card
    yield "settings", f"lightning-methods fit --trainer.callbacks.help lightning_methods.callbacks.{info.callbacks[0]}"
    for name in info.demos:
        yield "demo", f"lightning-methods demo {name}"
    for name in info.commands:
        yield "tool", f"lightning-methods {name} --help"
    for number, limit in enumerate(info.known_limits):
        yield "" if number else "limits", f"- {limit}"


def _demo(arguments: list[str]) -> int:
    demos = [name for info in METHODS for name in info.demos]
    if not arguments or arguments[0].startswith("-"):
        raise _UsageError(f"`demo` takes the name of a demo, or `all`: {', '.join(demos)}.")
    name, *options = arguments
    if name not in ("all", *demos):
        raise _UsageError(f"There is no demo {name!r}; there are {', '.join(demos)}.")
    return max(_run_demo(chosen, options) for chosen in (demos if name == "all" else [name]))


def _run_demo(name: str, options: list[str]) -> int:
    try:
        demo = import_module(f"lightning_methods.demos.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("lightning_methods"):
            raise
        extras = ",".join(["demos", *_EXTRAS.get(str(error.name), [])])
        print(
            f'error: the demo needs {error.name}, which is not installed: pip install "lightning-methods[{extras}]"',
            file=sys.stderr,
        )
        return 1
    status: int = demo.main(options)
    return status


def _tools() -> list[str]:
    """What there is a file for in `lightning_methods.commands`."""
    files = (Path(__file__).parent / "commands").glob("[!_]*.py")
    return sorted(path.stem.replace("_", "-") for path in files)


def _tool(name: str, arguments: list[str]) -> int:
    status: int = import_module(f"lightning_methods.commands.{name.replace('-', '_')}").main(arguments)
    return status


def _lightning(command: str, arguments: list[str], as_given: Sequence[str] | None) -> int:
    # A console script has its own folder on the path, where a user's `python train.py` has the current one.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    _import_model_file(arguments)
    if command == "check":
        from lightning_methods._check import check

        return check(as_given)
    from lightning_methods._lightning_cli import LightningCLI

    LightningCLI(args=None if as_given is None else list(as_given))
    return 0


def _import_model_file(arguments: Sequence[str]) -> None:
    """Imports the file of the module that the arguments, or the YAML files among them, name.

    There are two Lightning packages, each with a LightningCLI that refuses the other's modules. Which one is
    meant shows once the module's file is imported, so this comes first. What cannot be read or imported is
    left to LightningCLI, which says what is wrong.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--model", "--model.class_path")
    with contextlib.suppress(Exception):
        given, _ = parser.parse_known_args(arguments)
        name = given.model or next(filter(None, map(_model_in, reversed(given.config))))
        import_module(name.rpartition(".")[0])


def _model_in(path: str) -> str | None:
    import yaml

    content = yaml.safe_load(Path(path).read_text())
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("class_path") if isinstance(model, dict) else model


def _method(name: str) -> MethodInfo:
    try:
        return method(name)
    except ValueError as error:
        raise _UsageError(str(error)) from None


def _names() -> str:
    return ", ".join(info.name for info in METHODS)


if __name__ == "__main__":
    sys.exit(main())
