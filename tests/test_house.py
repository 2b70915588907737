"""The house in order: targets and settings explain themselves, pins are complete, nothing is local to a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel

from ncsn.config import Config, from_yaml
from ncsn.config.problems import section_models

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Which of these there are depends on the build of torch, which pins them itself.
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton\b")


def test_every_make_target_explains_itself() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    explained = set(re.findall(r"^([a-z-]+):.*## \w", makefile, flags=re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE))
    assert targets == explained == phony
    assert {"demo", "test", "test-all", "lint", "ui", "image", "clean", "help"} <= targets


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_is_named_after_its_file(path: Path) -> None:
    assert from_yaml(path.read_text(), origin=path.name).name.replace("-", "_") == path.stem


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for name in model.model_fields:
        for section in section_models(model, name):
            yield from _sections(section)


@pytest.mark.parametrize("model", list(_sections(Config)), ids=lambda model: model.__name__)
def test_every_setting_has_its_meaning(model: type[BaseModel]) -> None:
    assert model.__doc__
    values = {name: field for name, field in model.model_fields.items() if not section_models(model, name)}
    assert [name for name, field in values.items() if not field.description] == []


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
    assert re.fullmatch(r"[1-9]\d*", users[-1]), "Kubernetes checks runAsNonRoot against a number"


def test_make_builds_the_image_that_the_components_name() -> None:
    assert f"\nIMAGE ?= ncsn-python:{PROJECT['version']}\n" in (ROOT / "Makefile").read_text()
    assert f'"ncsn-python:{PROJECT["version"]}"' in (ROOT / "components" / "__init__.py").read_text()
    assert f"\nARG VERSION={PROJECT['version']}\n" in (ROOT / "Dockerfile").read_text()


def test_changelog_has_an_unreleased_entry() -> None:
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60
STILL_LONGER = {
    "ncsn/cli/commands.py",
    "ncsn/cli/execute.py",
    "ncsn/cli/views.py",
    "ncsn/data/training_images.py",
    "ncsn/distributed/trainer.py",
    "ncsn/evaluation/classifier.py",
    "ncsn/evaluation/frechet.py",
    "ncsn/model/checkpoint.py",
    "ncsn/remote/kubernetes.py",
    "ncsn/remote/manifest.py",
    "ncsn/report/images.py",
    "ncsn/report/plots.py",
    "ncsn/runs/records.py",
    "ncsn/steps/report.py",
    "ncsn/steps/tune.py",
    "ncsn/tools/trial_run.py",
    "ncsn/tracking/client.py",
    "ncsn/tracking/mlflow_runs.py",
    "ncsn/tracking/promotion.py",
}
"""Files to shorten; none may join them, and one that is short enough leaves the list."""


def _modules() -> Iterator[Path]:
    for package in ("ncsn", "components", "pipelines"):
        yield from sorted((ROOT / package).rglob("*.py"))


def test_files_are_short() -> None:
    longer = {str(path.relative_to(ROOT)) for path in _modules() if path.read_text().count("\n") > MOST_LINES}
    assert longer == STILL_LONGER


@pytest.mark.parametrize("path", list(_modules()), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize(
    "package", sorted(path.parent for path in (ROOT / "ncsn").glob("*/__init__.py")), ids=lambda path: path.name
)
def test_packages_are_of_a_size_to_look_through(package: Path) -> None:
    assert 4 <= len(list(package.glob("*.py"))) <= 14
