"""`ncsn doctor` on a real store, a real database and a server of KFP's API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from kfp_api import KfpServer
from ports import free_port

from ncsn.cli import doctor
from ncsn.cli.app import app


def examine(config_file: Path, *args: str) -> tuple[Result, dict[str, dict[str, str]]]:
    done = CliRunner().invoke(app, ["doctor", "--config", str(config_file), "--json", *args])
    return done, {finding["check"]: finding for finding in json.loads(done.stdout)}


def test_a_machine_is_well_also_with_kfp_which_must_know_who_asks(
    config_file: Path, store: Path, kfp_server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done, findings = examine(config_file)
    assert done.exit_code == 0, done.output
    states = {name: finding["state"] for name, finding in findings.items()}
    assert states == dict.fromkeys(("store", "mlflow", "ray", "data"), "ok") | {"kfp": "not configured"}
    assert list(store.iterdir()) == [], "what it writes it removes"
    assert not any(finding["fix"] for finding in findings.values())
    done, findings = examine(config_file, "--host", kfp_server.url)
    assert (done.exit_code, findings["kfp"]["state"]) == (0, "ok")
    kfp_server.token = "right"
    done, findings = examine(config_file, "--host", kfp_server.url)
    assert done.exit_code == 1 and "401" in findings["kfp"]["detail"]
    assert findings["kfp"]["fix"] == "export NCSN_KFP_TOKEN=..."


def test_what_is_ill_comes_with_a_command(config_file: Path, store: Path, monkeypatch, capsys) -> None:
    store.write_text("a file where the folder should be")
    monkeypatch.setenv("RAY_ADDRESS", nobody := f"127.0.0.1:{free_port()}")
    done, findings = examine(config_file, "--host", f"http://{nobody}", "--set", f"tracking.uri=http://{nobody}")
    assert done.exit_code == 1
    ill = {name for name, finding in findings.items() if finding["state"] == "failed"}
    assert ill == {"store", "mlflow", "ray", "kfp"}
    assert findings["store"]["fix"] == f"mkdir -p {store}"
    assert findings["mlflow"]["detail"].startswith(f"http://{nobody}: ")
    assert "kubectl port-forward" in findings["kfp"]["fix"]
    assert not doctor.report([doctor.Finding(**finding) for finding in findings.values()], as_json=False)
    assert f"mkdir -p {store}" in capsys.readouterr().out


def test_images_that_are_not_here_and_a_store_that_forgets_who_was_first(config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    nowhere = ("--set", "data.source=mnist", "--set", f"data.root={tmp_path}/nowhere", "--set", "data.image_size=28")
    done, findings = examine(config_file, *nowhere)
    assert (done.exit_code, findings["data"]["state"]) == (1, "failed")
    assert f"data.root = '{tmp_path}/nowhere': does not exist" in findings["data"]["detail"]
    assert findings["data"]["fix"].startswith("--set data.root=FOLDER")
    done, findings = examine(config_file, *nowhere, "--set", "data.download=true")
    assert (done.exit_code, findings["data"]["state"]) == (0, "ok")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor.storage, "publish_once", lambda uri, data: bool(Path(uri).write_bytes(data)))
    _, findings = examine(config_file, *nowhere)
    assert findings["data"]["state"] == "not configured" and findings["data"]["fix"] == ""
    assert findings["store"]["state"] == "failed" and "If-None-Match" in findings["store"]["detail"]
