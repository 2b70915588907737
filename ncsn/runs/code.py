"""Edited code without a new image: the packages of a checkout, as an archive in the store that other processes run.

The archive is a zip with the same bytes for the same files, and its SHA-256 is its name, so a URI says exactly which
code it is. The file `ncsn/code.json` in it says where the code comes from and which packages it needs. A process that
runs it has its URI in `NCSN_CODE`, and hands it on to the processes that it starts elsewhere.

Anyone who may write to the store may put another archive in its place. So each process that reads one unpacks the very
bytes that it has compared with the name, into a folder of its own, which nobody has written to before and which goes
with the process; a cluster's workers get that folder from their driver, through Ray.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from packaging.requirements import Requirement

from ncsn import storage
from ncsn.environment import CODE, KFP_RUN_ID
from ncsn.errors import Problem, UserError
from ncsn.runs.layout import RunFolder, Store
from ncsn.runs.record import StepError, update_attempt

PYTHON = "ncsn.python"  # key of the launcher's Python version in the metadata of a Ray job
PACKAGES = ("ncsn", "components", "pipelines")

_PACKAGE = Path(__file__).parents[1]
_ABOUT = "code.json"  # in the package
_SOURCES = (*PACKAGES, "configs", "infra", "pyproject.toml")  # what the packages and their links come from
_OWN = "ncsn-code-"  # and the number of the process, how the name of a folder with unpacked code begins
_NAME = re.compile(r"([0-9a-f]{64})\.zip")


def publish_code(root: str) -> None:
    """Publish the packages of this checkout in the store at `root`; jobs of this process run them from now on."""
    checkout, other = _PACKAGE.parent, Path.cwd() / "ncsn"
    if not (checkout / "pyproject.toml").is_file():
        hint = "use the ncsn of a clone, which `make venv` installs"
        raise UserError("--code", f"the ncsn that runs is in {checkout}, which is no clone", hint=hint, value="here")
    if (other / "__init__.py").is_file() and other.resolve() != _PACKAGE.resolve():
        hint = "activate the .venv of this folder, or go to that one"
        raise UserError("--code", f"the ncsn that runs is that of {checkout}", hint=hint, value="here")
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requires = project["dependencies"] + [
        f"{each}; extra == '{extra}'" for extra in ("kubeflow", "search") for each in extras[extra]
    ]
    files = {f"ncsn/{_ABOUT}": json.dumps({"origin": origin(), "requires": requires}).encode()}
    for package in PACKAGES:
        for folder, below, names in os.walk(checkout / package, followlinks=True):
            below[:] = [name for name in below if name != "__pycache__" and not name.startswith(".")]
            paths = (Path(folder, name) for name in names if not name.startswith(".") and not name.endswith(".pyc"))
            for path in paths:
                if not path.is_file():
                    reason = f"{path} is no file, or a link that leads nowhere"
                    raise UserError("--code", reason, hint="remove it", value="here")
                files[path.relative_to(checkout).as_posix()] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            member = zipfile.ZipInfo(name)  # of 1980, whenever the file was changed
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, content)
    data = buffer.getvalue()
    uri = storage.join(Store(storage.absolute(root)).code, f"{hashlib.sha256(data).hexdigest()}.zip")
    storage.make_store(storage.absolute(root))
    storage.write_bytes(uri, data)
    os.environ[CODE] = uri


def run_code(uri: str) -> None:
    """Start this process's command again with the code of the archive, in its place; return if it has that code."""
    if os.environ.get(CODE) != storage.absolute(uri):
        # Not from the working directory, which may be another checkout.
        _become([sys.executable, "-P", *sys.orig_argv[1:]], uri)
    if _PACKAGE.parent.name.startswith(f"{_OWN}{os.getpid()}-"):  # it made this folder before it became this command
        atexit.register(shutil.rmtree, _PACKAGE.parent, ignore_errors=True)


def _become(command: list[str], uri: str) -> NoReturn:
    uri = storage.absolute(uri)
    path = os.pathsep.join(filter(None, (str(unpacked(uri)), os.environ.get("PYTHONPATH"))))
    os.execvpe(command[0], command, {**os.environ, "PYTHONPATH": path, CODE: uri})  # noqa: S606


def job_config() -> dict[str, Any]:
    """Ray's JSON about the Ray job that this process drives; empty for other processes."""
    found: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return found


def python_version() -> str:
    """Python's version as it must be the same for a launcher and its cluster."""
    return ".".join(platform.python_version_tuple()[:2])


def require_same_python() -> None:
    """Raise `UserError` if the launcher of this Ray job has another Python."""
    # Ray does not check it, and fails later where something cannot be unpickled.
    here = python_version()
    there = job_config().get("metadata", {}).get(PYTHON, here)
    if there != here:
        hint = "use one image or environment for both; `ncsn doctor` shows the launcher's"
        raise UserError("Python", f"the cluster has {here}, but the launcher {there}", hint=hint)


def main() -> None:
    """`python -m ncsn.runs.code URI COMMAND...`: become the command of a RayJob's driver, with the archive's code."""
    uri, *command = sys.argv[1:]
    try:
        _become(command, uri)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        root, _, run, _, step, _, request = command[-1].rsplit("/", 6)  # the lease is in the step's folder
        # The launcher reads it there, and lets nobody try again.
        record = StepError(type(error).__name__, str(error), error.problems, os.environ.get(KFP_RUN_ID, ""))
        update_attempt(RunFolder(root, run), step, state="FAILED", error=record, request=request)
        sys.exit(2)


def unpacked(uri: str) -> Path:
    """A new folder of this process with the packages of the archive, whose bytes are those of its name."""
    name = _NAME.fullmatch(uri.rpartition("/")[2])
    hint = "give what `--code here` has published, or --code here in a clone"
    if name is None:
        raise UserError("--code", "not the name of an archive of code", hint=hint, value=uri)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise UserError("--code", "no such file", hint=hint, value=uri) from None
    if hashlib.sha256(data).hexdigest() != name[1] or not zipfile.is_zipfile(io.BytesIO(data)):
        reason = "damaged, or another one in its place: its bytes are not those of its name"
        raise UserError("--code", reason, hint=hint, value=uri)
    folder = Path(tempfile.mkdtemp(prefix=f"{_OWN}{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
    return folder


def ray_environment(uri: str) -> dict[str, Any]:
    """Ray's runtime environment that uploads the packages of the archive from this machine to a cluster."""
    return {"py_modules": [str(unpacked(uri) / name) for name in PACKAGES], "env_vars": {CODE: uri}}


def origin() -> dict[str, str]:
    """`commit` of the code that runs, and `dirty`, whether it was edited since: as far as they are known."""
    if (about := _PACKAGE / _ABOUT).is_file():
        found: dict[str, str] = json.loads(about.read_text())["origin"]
        return found
    if commit := os.environ.get("NCSN_COMMIT"):  # of an image
        return {"commit": commit} if commit != "unknown" else {}
    checkout, lines = _PACKAGE.parent, list[str]()
    if (checkout / ".git").exists():
        ask = ["git", "-C", str(checkout), "status", "--porcelain=v2", "--branch", "--", *_SOURCES]
        with suppress(OSError):  # there is no git
            lines = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.splitlines()  # noqa: S603
    known = dict(line.removeprefix("# ").split(maxsplit=1) for line in lines if line.startswith("# "))
    if len(known.get("branch.oid", "")) != 40:  # no commit yet
        return {}
    dirty = any(not line.startswith("#") for line in lines)
    return {"commit": known["branch.oid"], "dirty": str(dirty).lower()}


def require_packages() -> None:
    """Refuse code from an archive that needs other packages than this environment has."""
    about = _PACKAGE / _ABOUT
    if not about.is_file():
        return
    problems, hint = [], "build an image of this code, see docs/kubernetes.md"
    for needed in map(Requirement, json.loads(about.read_text())["requires"]):
        have = _version(needed.name)
        # An environment without torch is the slim image, which lacks more on purpose, as each may lack an extra.
        if (
            needed.marker or _version("torch") is None
            if have is None
            else needed.specifier.contains(have, prereleases=True)
        ):
            continue
        reason = f"{have or 'not'} installed here, but the code needs {needed}"
        problems.append(Problem(needed.name, reason, hint))
    if problems:
        raise UserError.of(problems)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
