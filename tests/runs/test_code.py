"""The code of a clone as an archive: what is in it, what is refused, and processes that run it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from edited_clone import ROOT, SAYS, Clone, clone
from refused import refused

from ncsn.environment import CODE
from ncsn.runs import code
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import read_attempt
from pipelines.compile import compile_one


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A clone that this process takes for its own."""
    monkeypatch.delenv("NCSN_COMMIT", raising=False)
    monkeypatch.setenv(CODE, "")
    monkeypatch.chdir(tmp_path)
    found = clone(tmp_path / "clone")
    monkeypatch.setattr(code, "_PACKAGE", found.folder / "ncsn")
    return found


def published(root: Path) -> str:
    code.publish_code(str(root))
    return os.environ[CODE]


def test_an_archive_has_the_packages_and_what_their_links_name(ours: Clone, tmp_path: Path) -> None:
    first = published(tmp_path)
    assert code.origin()["dirty"] == "false"
    os.utime(ours.folder / "ncsn" / "errors.py", (0, 0))
    assert published(tmp_path) == first
    (ours.folder / "ncsn" / "__pycache__").mkdir()
    (ours.folder / "ncsn" / "__pycache__" / "cached.pyc").touch()
    (ours.folder / "ncsn" / ".hidden.py").touch()
    (ours.folder / "ncsn" / "new.py").write_text("NEW = 1\n")
    edited = published(tmp_path)
    assert edited != first
    with zipfile.ZipFile(edited) as archive:
        names = set(archive.namelist())
        about = json.loads(archive.read("ncsn/code.json"))
        template = archive.read("ncsn/remote/rayjob.yaml")
    assert names >= {"ncsn/new.py", "ncsn/configs/digits.yaml", "components/tasks.py", "pipelines/submit.py"}
    assert not [name for name in names if "__pycache__" in name or "hidden" in name or name.startswith("infra")]
    assert template == (ours.folder / "infra/base/kuberay/rayjob.yaml").read_bytes()
    assert (about["origin"]["dirty"], len(about["origin"]["commit"])) == ("true", 40)
    assert any(each.startswith("torch>=") for each in about["requires"])


def test_what_is_no_clone_or_not_that_of_this_folder_or_has_no_files_is_refused(ours, tmp_path, monkeypatch) -> None:
    for place, make in (
        (ours.folder / "ncsn" / "gone.py", lambda at: at.symlink_to("nowhere")),
        (ours.folder / "ncsn" / "pipe", os.mkfifo),
    ):
        make(place)
        with refused("--code"):
            published(tmp_path)
        place.unlink()
    (tmp_path / "ncsn").mkdir()
    (tmp_path / "ncsn" / "__init__.py").touch()
    with refused("--code"):
        published(tmp_path)
    monkeypatch.chdir(ours.folder)
    (ours.folder / "pyproject.toml").unlink()
    with refused("--code"):
        published(tmp_path)


def test_an_archive_that_is_missing_damaged_or_none_is_refused(ours: Clone, tmp_path: Path) -> None:
    uri = published(tmp_path)
    assert (code.unpacked(uri) / "ncsn" / "code.json").is_file()
    ours.edit("ncsn/errors.py")
    uri = published(tmp_path)
    Path(uri).write_bytes(Path(uri).read_bytes()[:-1])
    for name in ("code", hashlib.sha256(b"").hexdigest()):
        (tmp_path / "code" / f"{name}.zip").touch()
    for name in (Path(uri).stem, "0" * 64, "code", hashlib.sha256(b"").hexdigest()):
        with refused("--code"):
            code.unpacked(f"{tmp_path}/code/{name}.zip")


def test_a_driver_runs_what_its_archive_is_named_after_and_nothing_else(ours: Clone, tmp_path: Path) -> None:
    uri, seen = published(tmp_path), "import ncsn, os; print(ncsn.__file__, os.environ['NCSN_CODE'])"
    command = [sys.executable, "-P", "-c", seen, f"{tmp_path}/runs/mine/steps/train/lease/5f3a"]

    def driver() -> tuple[int, str]:
        given = [sys.executable, "-P", "-m", "ncsn.runs.code", uri, *command]
        env = os.environ | {CODE: uri, "TMPDIR": str(tmp_path)}  # the variable proves nothing
        done = subprocess.run(given, env=env, capture_output=True, text=True, check=False)
        return done.returncode, re.sub(r"ncsn-code-\d+-\w+", "unpacked", done.stdout)

    assert uri == f"{tmp_path}/code/{hashlib.sha256(Path(uri).read_bytes()).hexdigest()}.zip"
    assert driver() == (0, f"{tmp_path}/unpacked/ncsn/__init__.py {uri}\n")
    (old,) = tmp_path.glob("ncsn-code-*")
    (old / "ncsn" / "__init__.py").write_text("1 / 0")
    assert driver() == (0, f"{tmp_path}/unpacked/ncsn/__init__.py {uri}\n"), "what was compared is what runs"
    ours.edit("ncsn/errors.py")
    os.replace(published(tmp_path), uri)
    assert driver() == (2, "")
    record = read_attempt(RunFolder(str(tmp_path), "mine"), "train")
    assert (record.state, record.request) == ("FAILED", "5f3a") and record.error is not None
    assert [problem.key for problem in record.error.problems] == ["--code"]


@pytest.mark.parametrize("archive", [True, False])
def test_a_process_knows_what_code_it_runs_whatever_its_variables_say(ours: Clone, tmp_path: Path, archive) -> None:
    uri, seen = published(tmp_path), "import ncsn.environment, os; print('NCSN_CODE' in os.environ, ncsn.__file__)"
    become = "from ncsn.runs.code import run_code; import sys; run_code(sys.argv[1]);" if archive else ""
    env = os.environ | {CODE: f"{uri}.old", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", become + seen, uri]
    known, package = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert (known, package.startswith(f"{tmp_path}/ncsn-code-")) == (str(archive), archive)
    assert not [*tmp_path.glob("ncsn-code-*")], "it takes its folder with it"


def test_packages_that_the_code_needs_and_the_image_lacks_are_named(tmp_path, monkeypatch) -> None:
    code.require_packages()  # of code that comes from no archive
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)
    about = {
        "origin": {},
        "requires": ["torch>=2.6,<3", "ray[default,train]>=2.60", "scipy>=1", "optuna>=4; extra == 'search'"],
    }
    (tmp_path / "code.json").write_text(json.dumps(about))
    for have, lacking in (
        ({"torch": "2.9.0+cu130", "ray": "2.60.0"}, ["scipy"]),
        ({"torch": "2.9.0+cu130", "ray": "2.59.1"}, ["ray", "scipy"]),
        ({"torch": "2.9.0", "ray": "2.60.0", "scipy": "1.17", "optuna": "3.6"}, ["optuna"]),
        ({"ray": "2.59.1"}, ["ray"]),  # the slim image, which has neither torch nor scipy
    ):
        monkeypatch.setattr(code, "_version", have.get)
        with refused(*lacking):
            code.require_packages()


@pytest.mark.slow
def test_a_task_and_a_command_run_the_archive_in_place_of_what_is_installed(ours: Clone, tmp_path: Path) -> None:
    ours.edit("ncsn/config/__init__.py")
    uri = published(tmp_path)
    compile_one("train_pipeline", tmp_path, code=uri)
    spec, _ = yaml.safe_load_all((tmp_path / "train_pipeline.yaml").read_text())
    container = spec["deploymentSpec"]["executors"]["exec-search"]["container"]
    outputs = {name: {"artifacts": [{"uri": str(tmp_path / name)}]} for name in ("search", "plots", "metrics")}
    config = (ROOT / "configs" / "digits.yaml").read_text()
    given = {
        "inputs": {"parameterValues": {"config": config, "run": "mine", "task_config": {}}},
        "outputs": {"artifacts": outputs, "outputFile": str(tmp_path / "output.json")},
    }
    args = [json.dumps(given) if each == "{{$}}" else each for each in container["args"]]
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {name: text for name, text in os.environ.items() if name != CODE} | {"PATH": binaries}
    done = subprocess.run([*container["command"], *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(SAYS) == 1
    assert json.loads((tmp_path / "output.json").read_text())["parameterValues"]["best_run"] == "mine"

    command = [sys.executable, "-m", "ncsn", "run", "--config", "digits", "--set", "no.such=1", "--code", uri]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count(SAYS)) == (2, 1), done.stderr
    Path(uri).unlink()
    env["NCSN_CACHE_DIR"] = str(tmp_path / "another")
    done = subprocess.run([*container["command"], *args], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
