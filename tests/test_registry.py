"""The registry and the folders say the same."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from lightning_methods import callbacks, functional, mixins, registry
from lightning_methods.attach import Method

ROOT = Path(__file__).parents[1]

#: Where every method has a file.
ROOMS = {
    "functional": "lightning_methods/functional/{}.py",
    "callback": "lightning_methods/callbacks/{}.py",
    "demo": "lightning_methods/demos/{}.py",
    "card": "docs/methods/{}.md",
    "recipe": "callbacks/{}.yaml",
    "example": "examples/{}.py",
    "benchmark": "benchmarks/{}.py",
}
#: Rooms in which each file belongs to one method; the others hold what methods share, too.
OF_METHODS_ALONE = ("callback", "card", "recipe", "example")

CARD = [
    "Use it",
    "When, and when not",
    "Settings",
    "What it does, measured",
    "What it costs",
    "The maths",
    "Pitfalls",
    "Known, reconstructed, unknown",
    "Citation",
]

NAMES = [info.name for info in registry.METHODS]
each_row = pytest.mark.parametrize("info", registry.METHODS, ids=NAMES)


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


@each_row
@pytest.mark.parametrize("room", ROOMS)
def test_every_row_has_its_file_in_every_room(info, room):
    assert (ROOT / ROOMS[room].format(info.name)).is_file()


@pytest.mark.parametrize("room", OF_METHODS_ALONE)
def test_every_file_has_its_row(room):
    files = {path.stem for path in ROOT.glob(ROOMS[room].format("*"))}
    assert {name for name in files if not name.startswith("_") and name != "index"} == set(NAMES)


@each_row
@pytest.mark.parametrize("room", ["functional", "modules", "callbacks", "metrics", "datamodules", "demos"])
def test_code_has_its_tests(info, room):
    if (ROOT / "lightning_methods" / room / f"{info.name}.py").exists():
        assert (ROOT / "tests" / room / f"test_{info.name}.py").is_file()


def test_every_exported_callback_belongs_to_one_row():
    assert sorted(name for info in registry.METHODS for name in info.callbacks) == sorted(callbacks.__all__)


def test_every_exported_function_belongs_to_one_row():
    functions = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]
    assert sorted(name for info in registry.METHODS for name in info.functional) == sorted(functions)


@each_row
def test_row_says_what_the_callbacks_are(info):
    for name in info.callbacks:
        callback = getattr(callbacks, name)
        assert callback.__module__ == f"lightning_methods.callbacks.{info.name}"
        if info.kind == "plain":
            continue
        assert issubclass(callback, Method)
    surgery = any(getattr(callbacks, name).changes_inference for name in info.callbacks if info.kind != "plain")
    assert surgery == info.changes_inference == (info.kind == "surgery")


@each_row
def test_every_callback_has_its_mixin(info):
    for name in info.callbacks:
        mixin = getattr(mixins, f"{name}Mixin")
        assert issubclass(mixin, mixins.MethodMixin)
        assert mixin.method is getattr(callbacks, name)
        assert mixin.settings.startswith(info.name)
        # "two lines per method": a mixin has nothing of its own
        assert {key for key in vars(mixin) if not key.startswith("__")} == {"method", "settings"}


@each_row
def test_demo_can_be_run(info):
    for name in info.demos:
        parameters = inspect.signature(import_module(f"lightning_methods.demos.{name}").main).parameters
        assert next(iter(parameters)) == "argv"
        assert (ROOT / "tests" / "demos" / f"test_{name}.py").is_file()


@each_row
def test_tools_can_be_run(info):
    for name in info.commands:
        tool = import_module(f"lightning_methods.commands.{name.replace('-', '_')}")
        assert next(iter(inspect.signature(tool.main).parameters)) == "argv"
        assert (ROOT / "tests" / "commands" / f"test_{name.replace('-', '_')}.py").is_file()


@each_row
def test_card_has_every_section_in_order(info):
    assert info.card == f"docs/methods/{info.name}.md"
    text = (ROOT / info.card).read_text()
    assert text.startswith(f"# {info.name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == CARD
    for number in re.findall(r"arXiv (\d{4}\.\d{5})", info.paper):
        assert number in text
    assert not re.search(r"^@*[A-Z]+@*$", text, re.MULTILINE), "a place that is still to be filled in"


@each_row
def test_rows_are_filled_in(info):
    for text in (info.title, info.paper, info.task, *info.known_limits):
        assert text.strip() == text != ""
    assert all(limit.endswith(".") for limit in info.known_limits)
    assert registry.method(info.name) is info


def test_a_wrong_name_gives_the_right_ones():
    with pytest.raises(ValueError, match=r"There is no method 'kli'; there are .*\bikl\b"):
        registry.method("kli")
