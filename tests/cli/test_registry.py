"""`promote`, `rollback` and `trace` on a registry, and what they say when it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mlflow.tracking import MlflowClient

from ncsn.cli.app import app
from ncsn.tracking.client import client_at
from ncsn.tracking.gate import Evidence, Measurement, Memorisation
from ncsn.tracking.promotion import pass_gate


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three champions of `digits` one after the other, and a challenger that was refused."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    client = client_at(uri)
    client.create_registered_model("digits")
    for value in (9.0, 8.0, 7.0, 7.1):
        version = str(client.create_model_version("digits", "file:///nowhere").version)
        measured = Measurement("eval/classifier_fid_n512", value, 0.1, 512, "f" * 64, lower_is_better=True)
        pass_gate(client, name="digits", version=version, evidence=Evidence(measured, Memorisation(0, 9, 0, 9)))
    return uri


@pytest.fixture
def client(registry: str) -> MlflowClient:
    return client_at(registry)


def ncsn(registry: str, *args: str) -> Result:
    return CliRunner(env={"MLFLOW_TRACKING_URI": registry}).invoke(app, args)


def test_rollback_and_promote_say_what_they_did_and_dry_runs_what_they_would(registry, client) -> None:
    planned = ncsn(registry, "rollback", "digits", "--dry-run")
    assert planned.output.startswith("digits version 2 ") and planned.output.count("\n") == 1
    assert str(client.get_model_version_by_alias("digits", "champion").version) == "3"
    done = ncsn(registry, "rollback", "digits", "--json")
    change = json.loads(done.output)
    assert change.pop("reason")
    assert change == {"model": "digits", "version": "2", "replaced": "3", "changed": True, "dry_run": False}
    assert str(client.get_model_version_by_alias("digits", "champion").version) == "2"
    refused = ncsn(registry, "promote", "digits", "--version", "1")
    assert refused.exit_code == 2
    assert refused.output.startswith("error: models:/digits/1: ")
    assert "eval/classifier_fid_n512 = 9 ± 0.1" in refused.output
    back = ncsn(registry, "promote", "digits", "--version", "3")
    assert back.output.startswith("digits version 3 ")
    assert "eval/classifier_fid_n512 = 7 ± 0.1" in back.output
    again = ncsn(registry, "promote", "digits", "--version", "3", "--json")
    assert json.loads(again.output)["changed"] is False


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (["promote", "nothing"], "models:/nothing"),
        (["promote", "my model"], "models:/my model"),
        (["promote", "digits", "--version", "17"], "models:/digits/17"),
        (["rollback", "nothing"], "models:/nothing"),
        (["trace", "models:/digits@latest"], "models:/digits@latest"),
        (["trace", "whatever"], "whatever"),
        (["export", "--model", "models:/digits@v3", "--out", "OUT"], "models:/digits@v3"),
        (["export", "--model", "digits/1", "--out", "OUT"], "models:/digits/1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(registry, tmp_path: Path, args: list[str], key: str) -> None:
    done = ncsn(registry, *(str(tmp_path / "out") if arg == "OUT" else arg for arg in args))
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {key}: ")
    assert not (tmp_path / "out").exists()


def test_sampling_from_a_version_without_weights_leaves_nothing(registry: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ncsn", "sample", "--model", "digits/2", "--out", str(tmp_path / "images")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": registry},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: models:/digits/2: " in done.stderr
    assert "file:///nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_that_exclude_each_other_are_refused(registry) -> None:
    for args in (
        ["sample", "--out", "folder"],
        ["sample", "--model", "digits/1", "--checkpoint", "folder"],
        ["export", "--model", "digits/1", "--checkpoint", "folder", "--out", "file"],
    ):
        done = ncsn(registry, *args)
        assert done.exit_code == 2
        assert "Usage:" in done.output


def test_without_any_registry_the_message_says_what_to_give(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["rollback", "digits", "--set", f"storage.root={tmp_path}"])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: storage.root = '{tmp_path}': ")


class _Refuses(BaseHTTPRequestHandler):
    """A tracking server whose registry this user may not touch. It leaves out everything else that MLflow answers."""

    def _answer(self, status: int, body: dict[str, str]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if "registered-models" in self.path or "model-versions" in self.path:
            self._answer(403, {"error_code": "PERMISSION_DENIED", "message": "Permission denied\nsecond line"})
        else:
            self._answer(200, {})

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("args", [["promote", "digits"], ["rollback", "digits"], ["trace", "digits/3"]])
def test_a_registry_that_refuses_is_named(refusing: str, args: list[str]) -> None:
    done = ncsn(refusing, *args)
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert line.startswith(f"error: {refusing}: ")
    assert "PERMISSION_DENIED" in line
