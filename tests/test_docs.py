"""Every piece of code in the documentation runs, and its tables say what the registry says."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lightning_methods import registry
from lightning_methods.cli import USAGE
from lightning_methods.plugin import VARIABLE, callbacks_from_environment

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CHANGELOG.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]

# Blocks that are run, by page: a page whose blocks are no longer found must not pass for one that works.
PYTHON = {
    "README.md": 2,
    "docs/guide.md": 10,
    "docs/index.md": 3,
    "docs/methods/acf.md": 6,
    "docs/methods/eqsim.md": 4,
    "docs/methods/ikl.md": 4,
    "docs/methods/stillmix.md": 5,
    "docs/methods/twbert.md": 4,
    "docs/methods/proreg.md": 6,
    "docs/methods/umil.md": 5,
    "docs/write-a-method.md": 3,
}

_LANGUAGES = ("python", "yaml", "bash", "text")
# Hidden blocks, in HTML comments, set up what the shown ones take for granted.
_BLOCK = re.compile(
    rf"^( *)(?:``` ?|<!-- )(?:{{ \.)?({'|'.join(_LANGUAGES)})(?: }})?\n(.*?)^\1(?:```|-->)$", re.MULTILINE | re.DOTALL
)
_INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def blocks(page, language):
    """(line, code) of a page's blocks in a language, included files in place of their names."""
    text = (ROOT / page).read_text()
    for match in _BLOCK.finditer(text):
        indent, found, code = match.groups()
        if found == language:
            code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
            code = _INCLUDE.sub(lambda include: (ROOT / include[1]).read_text(), code)
            yield text.count("\n", 0, match.start(3)), code


def test_every_block_is_found():
    assert {page: count for page in PAGES if (count := len(list(blocks(page, "python"))))} == PYTHON
    fences = sum(len(re.findall(r"^ *```[ \w]", (ROOT / page).read_text(), re.MULTILINE)) for page in PAGES)
    hidden = sum(len(re.findall(r"^ *<!-- python$", (ROOT / page).read_text(), re.MULTILINE)) for page in PAGES)
    assert fences + hidden == sum(len(list(blocks(page, kind))) for page in PAGES for kind in _LANGUAGES)


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and the like
        for line, code in blocks(page, "python"):
            # Line numbers in a traceback are those of the page.
            exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_recipes_are_readable(page, tmp_path, monkeypatch):
    for _, text in blocks(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        trainer = yaml.safe_load(text).get("trainer", {})
        if "callbacks" in trainer:
            monkeypatch.setenv(VARIABLE, str(path))
            assert len(callbacks_from_environment()) == len(trainer["callbacks"])


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tools = [name for info in registry.METHODS for name in info.commands]
    for _, text in blocks(page, "bash"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            words = [word for word in words if not word.startswith(f"{VARIABLE}=")]
            if words[:1] == ["make"]:
                assert words[1] in targets
            if words[:1] == ["lightning-methods"]:
                assert words[1] in tools or re.search(rf"\b{words[1]}\b", USAGE)
            for path in re.findall(r"(?:callbacks|datamodules|examples)/\w+\.\w+", line):
                assert (ROOT / path).exists(), path


def table(card_prefix):
    """The methods as a table, one row each, linked to their cards."""
    lines = ["| method | callbacks | task | paper |", "|---|---|---|---|"]
    for info in registry.METHODS:
        card = card_prefix + Path(info.card).name
        names = ", ".join(f"`{name}`" for name in info.callbacks)
        lines.append(f"| [{info.name}]({card}) | {names} | {info.task} | {info.paper} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("page", "prefix"), [("README.md", "docs/methods/"), ("docs/methods/index.md", "")])
def test_table_of_methods_is_the_registrys(page, prefix):
    assert table(prefix) in (ROOT / page).read_text(), f"{page} should have this table:\n{table(prefix)}"


def test_readme_links_lead_somewhere():
    for page in ("README.md", "callbacks/README.md", "datamodules/README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
