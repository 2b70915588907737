"""`ls`, `show` and `cleanup` of a store: what a person reads, and what stops them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from do import recorded, result_of
from rich.console import Console

from ncsn.runs.layout import RunFolder
from ncsn.tracking.client import client_at

OLD = time.time() - 30 * 86400


@pytest.fixture
def ncsn(run_in_process, store: Path) -> Callable[..., Result]:
    """A command on a store with a run of a month ago and a dataset that nothing refers to."""
    client_at(f"sqlite:///{store}/mlflow.db")
    folder, unused = RunFolder(str(store), "mine"), store / "datasets" / "digits" / "0123456789abcdef"
    recorded(folder, "train", state="FAILED", reads={"dataset": f"{store}/datasets/digits/another"})
    Path(folder.config).write_text("name: mine")
    unused.mkdir(parents=True)
    (unused / "manifest.json").write_bytes(b"1" * 2500)
    for path in (unused / "manifest.json", *(store / "runs").rglob("*")):
        os.utime(path, (OLD, OLD))
    return lambda *arguments, **variables: run_in_process(*arguments, "--set", f"storage.root={store}", **variables)


def test_ls_has_a_line_for_each_run_and_its_number(ncsn, store: Path, monkeypatch) -> None:
    done = ncsn("ls")
    (line,) = [line for line in done.output.splitlines() if " mine " in line]
    assert "FAILED train" in line
    assert done.output.splitlines()[-1] == f"runs in {store}: 1"
    (item,) = json.loads(ncsn("ls", "--json").output)["runs"]
    assert (item["name"], item["state"], item["kind"]) == ("mine", "FAILED train", "run")
    assert item["changed"][:4] == time.strftime("%Y", time.gmtime(OLD))
    assert json.loads(ncsn("ls", "models", "--json").output) == {"models": [], "count": 0}
    shown = json.loads(ncsn("show", "mine", "--json").output)
    assert [each["name"] for each in shown["items"]] == ["mine"]
    found = result_of("select", sentence="f" * 150)
    recorded(RunFolder(str(store), "mine"), "select", state="FINISHED", result=found)
    for command in (["ls"], ["show", "mine"]):
        assert "f" * 150 in ncsn(*command).output, "nothing that is piped is cut or wrapped"
    recorded(RunFolder(str(store), "classes-ff9ba0c1d2e3-again"), "select", state="FINISHED", result=found)
    monkeypatch.setattr("ncsn.cli.console.console_on", lambda stream: Console(file=stream, width=80))
    lines = ncsn("ls").output.splitlines()
    assert [len(line) <= 80 for line in lines[:-1]] == [True] * 3, "on a terminal, a head and a line for each"
    assert any("classes-ff9ba0c1d2e3-again  FINISHED select  fff" in line for line in lines)


def test_cleanup_says_what_it_would_delete_and_deletes_it_if_told(ncsn, store: Path) -> None:
    unused = store / "datasets" / "digits" / "0123456789abcdef"
    looked = ncsn("cleanup", "--dry-run")
    assert looked.output == ncsn("cleanup").output
    assert looked.exit_code == 0 and unused.exists() and "2.5 kB" in looked.output
    (item,) = json.loads(ncsn("cleanup", "--json").output)["items"]
    assert item == {"kind": "datasets", "uri": str(unused), "size": 2500}
    done = ncsn("cleanup", "--yes", "--json")
    assert json.loads(done.output) == {"deleted": True, "bytes": 2500, "items": [item]}
    assert not unused.exists() and (store / "runs" / "mine").exists()
    assert "0 bytes" in ncsn("cleanup", "--yes").output


def test_nothing_is_deleted_while_mlflow_is_away(ncsn, require_mistake, store: Path) -> None:
    before = sorted(store.rglob("*"))
    away = "http://127.0.0.1:9"
    require_mistake(ncsn("cleanup", "--yes", MLFLOW_TRACKING_URI=away), away)
    (store / "mlflow.db").unlink()
    require_mistake(ncsn("cleanup", "--yes"), "tracking.uri")
    assert {*before} - {*store.rglob("*")} <= {store / "mlflow.db", store / "mlflow.db-wal", store / "mlflow.db-shm"}


def test_jobs_and_files_are_cleaned_apart(ncsn, require_mistake) -> None:
    for arguments in (["--run", "mine"], ["--yes", "--dry-run"], ["--jobs", "--yes"]):
        require_mistake(ncsn("cleanup", *arguments), arguments[0])
