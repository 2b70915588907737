"""The server of `infra/base/mlflow` for real: MLflow with the arguments of the manifest, on loopback.

`tests/cluster_live` sees it and SeaweedFS ready, artifacts that go through both, and what SeaweedFS refuses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from mlflow_server import MLFLOW, Server

BASE = Path(__file__).parents[2] / "infra" / "base"
HTTP = urllib3.PoolManager(retries=False)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


(POD,) = load(BASE / "mlflow" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
PROBE = POD["readinessProbe"]["httpGet"]["path"]


@contextmanager
def mlflow(folder: Path, patch: pytest.MonkeyPatch, *more: str, **environment: str) -> Iterator[str]:
    """The server with the arguments and variables of its manifest, on SQLite; its address."""
    plain = {each["name"]: each["value"] for each in POD["env"] if "value" in each}
    database = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db", "HOME": str(folder)}
    for name, value in (plain | database | environment).items():
        patch.setenv(name, value)
    (folder / "torch.py").write_text("raise ImportError('the slim image has none')")
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    assert POD["command"] == ["mlflow", "server"]
    command = [*MLFLOW, "server", *POD["args"], "--workers=1", *more]  # of an option that comes twice, the last counts
    with Server(command, folder=folder, health="/health") as server:
        yield server.url


def test_it_knows_the_hosts_and_the_pages_that_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    address = load(BASE / "kuberay" / "environment.yaml")["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    with mlflow(tmp_path, monkeypatch) as url:

        def status(host: str, path: str) -> int:
            return HTTP.request("GET", f"{url}{path}", headers={"Host": host}, timeout=30).status

        assert status("10.244.0.7:5000", PROBE) == 200, "a probe names the pod's IP"
        for host in (address, "localhost:5000", "127.0.0.1:5000"):
            assert status(host, search) == 200, host
        assert status("evil.example", search) == 403

        def changed(origin: str) -> int:
            create = f"{url}/ajax-api/2.0/mlflow/experiments/create"
            return HTTP.request("POST", create, json={"name": origin}, headers={"Origin": origin}).status

        for origin in (f"http://{address}", "http://localhost:5000", "http://127.0.0.1:5000"):
            assert changed(origin) == 200, origin
        assert changed("http://evil.example") == 403


def test_with_a_login_it_lets_in_who_has_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and the settings of the overlay `login`."""
    overlay = BASE.parent / "overlays" / "login"
    (patch,) = load(overlay / "kustomization.yaml")["patches"]
    added = [each["value"] for each in yaml.safe_load(patch["patch"]) if each["path"].endswith(("/args/-", "/env/-"))]
    (name,) = (each for each in added if isinstance(each, str))
    variables = {each["name"]: each for each in added if isinstance(each, dict)}
    settings = load(overlay / "basic-auth.yaml")["data"]["basic-auth.ini"]
    (database,) = (line for line in settings.splitlines() if line.startswith("database_uri"))
    (tmp_path / "basic-auth.ini").write_text(settings.replace(database, f"database_uri = sqlite:///{tmp_path}/auth.db"))
    account = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
    given = {"MLFLOW_AUTH_CONFIG_PATH": f"{tmp_path}/basic-auth.ini", "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    given |= {
        each: account[variable["valueFrom"]["secretKeyRef"]["key"]]
        for each, variable in variables.items()
        if each.startswith("MLFLOW_AUTH_ADMIN")
    }
    assert variables.keys() == given.keys()

    with mlflow(tmp_path, monkeypatch, name, **given) as url:

        def created(experiment: str, password: str) -> int:
            headers = urllib3.make_headers(basic_auth=f"somebody:{password}") if password else {}
            create = f"{url}/api/2.0/mlflow/experiments/create"
            return HTTP.request("POST", create, json={"name": experiment}, headers=headers, timeout=30).status

        assert created("a", "") == created("b", "wrong-password") == 401
        assert created("c", account["MLFLOW_TRACKING_PASSWORD"]) == 200
        assert HTTP.request("GET", f"{url}{PROBE}", timeout=30).status == 200
