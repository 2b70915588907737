"""The server of `infra/overlays/login` for real: MLflow with the arguments of the manifests, on loopback and SQLite.

`tests/cluster_live` sees it and SeaweedFS ready, artifacts that go through both, and what SeaweedFS refuses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from mlflow_server import MLFLOW, Server

INFRA = Path(__file__).parents[2] / "infra"
HTTP = urllib3.PoolManager(retries=False)
ACCOUNT = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
KNOWN = urllib3.make_headers(basic_auth="somebody:a-long-password")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((INFRA / name).read_text())
    return document


(POD,) = load("base/mlflow/deployment.yaml")["spec"]["template"]["spec"]["containers"]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    (patch,) = load("overlays/login/kustomization.yaml")["patches"]
    added = [each["value"] for each in yaml.safe_load(patch["patch"]) if each["path"].endswith(("/args/-", "/env/-"))]
    arguments = [each for each in added if isinstance(each, str)]
    settings = load("overlays/login/basic-auth.yaml")["data"]["basic-auth.ini"]
    (database,) = (line for line in settings.splitlines() if line.startswith("database_uri"))
    (folder / "basic-auth.ini").write_text(settings.replace(database, f"database_uri = sqlite:///{folder}/auth.db"))
    (folder / "torch.py").write_text("raise ImportError('the slim image has none')")
    here = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db", "HOME": str(folder)}
    here |= {"MLFLOW_AUTH_CONFIG_PATH": f"{folder}/basic-auth.ini", "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    assert POD["command"] == ["mlflow", "server"]
    with pytest.MonkeyPatch.context() as environment:
        for variable in (*POD["env"], *(each for each in added if isinstance(each, dict))):
            key = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("key", "")
            environment.setenv(
                variable["name"], here.get(variable["name"], variable.get("value", ACCOUNT.get(key, "")))
            )
        environment.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        command = [*MLFLOW, "server", *POD["args"], "--workers=1", *arguments]  # an option that comes twice counts last
        with Server(command, folder=folder, health="/health") as server:
            yield server.url


def test_it_knows_the_hosts_and_the_pages_that_ask(mlflow: str) -> None:
    def status(host: str, path: str = "/api/2.0/mlflow/experiments/search?max_results=1") -> int:
        return HTTP.request("GET", f"{mlflow}{path}", headers={"Host": host, **KNOWN}, timeout=30).status

    def changed(origin: str) -> int:
        create = f"{mlflow}/ajax-api/2.0/mlflow/experiments/create"
        return HTTP.request("POST", create, json={"name": origin}, headers={"Origin": origin, **KNOWN}).status

    address = load("base/kuberay/environment.yaml")["data"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    for host in (address, "localhost:5000", "127.0.0.1:5000"):
        assert (status(host), changed(f"http://{host}")) == (200, 200), host
    assert (status("evil.example"), changed("http://evil.example")) == (403, 403)
    assert status("10.244.0.7:5000", POD["readinessProbe"]["httpGet"]["path"]) == 200, "a probe names the pod's IP"


def test_it_lets_in_who_has_the_account(mlflow: str) -> None:
    def created(experiment: str, headers: dict[str, str]) -> int:
        create = f"{mlflow}/api/2.0/mlflow/experiments/create"
        return HTTP.request("POST", create, json={"name": experiment}, headers=headers, timeout=30).status

    assert created("a", {}) == created("b", urllib3.make_headers(basic_auth="somebody:wrong-password")) == 401
    assert created("c", KNOWN) == 200
    assert HTTP.request("GET", f"{mlflow}{POD['readinessProbe']['httpGet']['path']}", timeout=30).status == 200
