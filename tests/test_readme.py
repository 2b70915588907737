"""The README and docs match the code: commands parse, links and anchors exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from ncsn.cli import app
from ncsn.config import from_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text()
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[list[str]]:
    """Words of each command in the shell blocks of a page, comments and continuation lines resolved."""
    scripts = [text for language, text in _BLOCK.findall(page.read_text()) if language in ("bash", "sh", "shell")]
    lines = [line for script in scripts for line in script.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def _table_commands(page: Path) -> list[list[str]]:
    """Words of each command in the first cell of a table row of a page."""
    return [shlex.split(text) for text in re.findall(r"^\| `(ncsn [^`]+)` \|", page.read_text(), flags=re.MULTILINE)]


def _anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _run_by(program: str) -> list[pytest.param]:
    return [
        pytest.param(words[1:], id=f"{page.name}: {shlex.join(words)}"[:100])
        for page in PAGES
        for words in _commands(page) + _table_commands(page)
        if words[0].removeprefix(".venv/bin/") == program
    ]


def test_the_first_commands_are_demo_and_test() -> None:
    assert _commands(ROOT / "README.md")[:2] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("words", _run_by("make"))
def test_make_target_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("words", _run_by("ncsn"))
def test_ncsn_command_takes_these_options(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = words
    monkeypatch.chdir(tmp_path)
    for file in (word for word in arguments if word.endswith(".pth")):
        (tmp_path / file).touch()  # a reader brings it
    context = app.commands[name].make_context(name, list(arguments), parent=click.Context(app))
    uri = context.params.get("config_uri")
    if uri is not None and uri.startswith("configs/"):
        from_yaml((ROOT / uri).read_text(), overrides=context.params["overrides"])


def test_every_command_is_on_a_page() -> None:
    commands = [words for page in PAGES for words in _commands(page) + _table_commands(page)]
    shown = {words[1] for words in commands if words[0].removeprefix(".venv/bin/") == "ncsn"}
    assert set(app.commands) - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_exist(page: Path) -> None:
    prose = _BLOCK.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    files = {link: page.parent / link.partition("#")[0] if link[0] != "#" else page for link in links}
    assert [link for link, file in files.items() if not file.exists()] == []
    anchors = {link: link.partition("#")[2] for link in links if "#" in link}
    assert [link for link, anchor in anchors.items() if anchor not in _anchors(files[link])] == []


def test_every_page_is_linked_from_the_readme() -> None:
    assert [page.name for page in PAGES if page.name not in README and page.name != "README.md"] == []


def test_the_tree_is_the_tree() -> None:
    tree = next(text for language, text in _BLOCK.findall(README) if language == "text" and "ncsn/core/" in text)
    paths = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert [path for path in paths if not (ROOT / path).exists()] == []
