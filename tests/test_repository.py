"""Makefile, pins, image and docs agree with the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ncsn.cli import app
from ncsn.config import from_yaml

ROOT = Path(__file__).parents[1]
_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = _PYPROJECT["project"], _PYPROJECT["tool"]
# Which of these there are depends on the build of torch, which pins them itself.
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton\b")


def _constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def _installed_for_project() -> dict[str, str]:
    """Name -> version of what the project and its dev extra need here, directly or through others."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("ncsn", "dev")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", extra)):
                needed = canonicalize_name(requirement.name)
                if not OF_TORCH.match(needed):
                    found[needed] = metadata.version(needed)
                    waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
    return found


def test_constraints_pin_everything() -> None:
    constraints = _constraints()
    loose = {name for name, requirement in constraints.items() if not str(requirement.specifier).startswith("==")}
    assert loose == set()
    assert _installed_for_project().keys() - constraints.keys() == set()


def test_constraints_lie_in_the_ranges_of_the_project() -> None:
    constraints = _constraints()
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        pin = constraints[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def _tracked_text() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix not in {".png", ".safetensors", ".npz", ".parquet"}:
            yield name, path.read_text()


def test_nothing_is_local_to_one_machine() -> None:
    forbidden = re.compile(
        r"(?<![\w.])/(work|root|home/(?!somebody)\w+|Users/\w+)/|pypi\.org|pythonhosted\.org|download\.pytorch\.org"
    )
    found = [f"{name}: {match[0]}" for name, text in _tracked_text() for match in forbidden.finditer(text)]
    assert found == []


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?![|)])")
    found = [f"{name}: {match[0]}" for name, text in _tracked_text() for match in marks.finditer(text)]
    assert found == []


def test_image_is_pinned_and_not_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    images = re.findall(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, flags=re.MULTILINE)
    assert images
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]+", image) for image in images)
    by_digest = re.findall(r"^BASE_IMAGE \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [re.sub(r"@sha256:[0-9a-f]{64}$", "", image) for image in by_digest] == images != by_digest
    users = re.findall(r"^USER (\S+)$", dockerfile, flags=re.MULTILINE)
    assert len(users) == 2, "of slim and full"
    assert all(re.fullmatch(r"[1-9]\d*", user) for user in users), "Kubernetes checks runAsNonRoot against a number"


def test_make_builds_the_image_that_the_components_name() -> None:
    assert f"\nIMAGE ?= ncsn-python:{PROJECT['version']}\n" in (ROOT / "Makefile").read_text()
    assert f'"ncsn-python:{PROJECT["version"]}"' in (ROOT / "components" / "__init__.py").read_text()
    assert f"\nARG VERSION={PROJECT['version']}\n" in (ROOT / "Dockerfile").read_text()


def test_make_keeps_the_environment_under_each_name_of_its_python(tmp_path: Path) -> None:
    base = Path(sys._base_executable)
    (other_name := tmp_path / "python3").symlink_to(base)
    keys = set()
    for python in (sys.executable, base, base.resolve(), other_name):
        command = ["make", "--file=-", "print", f"PYTHON={python}"]
        makefile = "include Makefile\nprint: ; @echo $(KEY)\n"
        done = subprocess.run(command, cwd=ROOT, input=makefile, capture_output=True, text=True, check=True)
        keys.add(done.stdout)
    assert len(keys) == 1


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
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


@pytest.mark.parametrize("words", _run_by("make"))
def test_make_target_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("words", _run_by("ncsn"))
def test_ncsn_command_takes_these_options(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = words[: words.index(">")] if ">" in words else words
    monkeypatch.chdir(tmp_path)
    for file in (word for word in arguments if re.fullmatch(r"[\w.-]+\.pth", word)):
        (tmp_path / file).touch()  # a reader brings it
    parent = click.Context(app)
    context = app.get_command(parent, name).make_context(name, list(arguments), parent=parent)
    uri = context.params.get("config_uri")
    if uri is not None and uri.startswith("configs/"):
        from_yaml((ROOT / uri).read_text(), overrides=context.params["overrides"])


def test_every_command_is_on_a_page() -> None:
    commands = [words for page in PAGES for words in _commands(page) + _table_commands(page)]
    shown = {words[1] for words in commands if words[0].removeprefix(".venv/bin/") == "ncsn"}
    assert set(app.list_commands(click.Context(app))) - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_exist(page: Path) -> None:
    prose = _BLOCK.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    files = {link: page.parent / link.partition("#")[0] if link[0] != "#" else page for link in links}
    assert [link for link, file in files.items() if not file.exists()] == []
    anchors = {link: link.partition("#")[2] for link in links if "#" in link}
    assert [link for link, anchor in anchors.items() if anchor not in _anchors(files[link])] == []


def test_every_page_is_linked_from_the_readme() -> None:
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES if page.name not in ("README.md", "history.md")]
    assert [page for page in [*pages, "benchmarks/README.md"] if f"({page})" not in README] == []


def test_the_tree_is_the_tree() -> None:
    tree = next(text for language, text in _BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()) if language == "text")
    paths = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_picture_of_the_layers_is_the_contract() -> None:
    (contract,) = (each for each in TOOLS["importlinter"]["contracts"] if each["type"] == "layers")
    blocks = _BLOCK.findall((ROOT / "docs" / "architecture.md").read_text())
    picture = next(text for language, text in blocks if language == "text")
    drawn = [line.strip().split("  ")[0] for line in picture.splitlines() if not line.startswith("  ")]
    layers = [layer.replace("ncsn.", "") for layer in contract["layers"]]
    assert [set(line.split(" | ")) for line in drawn] == [set(layer.split(" | ")) for layer in layers]
