"""The kustomizations as `kubectl apply --kustomize` renders them, and the MLflow of one of them for real."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from installed_infra import Infra
from manifests import names_of, within
from mlflow_server import MLFLOW, Server

INFRA = Path(__file__).parents[2] / "infra"
OVERLAYS = INFRA / "overlays"
KUSTOMIZATIONS = sorted(path.parent for path in INFRA.glob("*/*/kustomization.yaml"))

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@functools.cache
def rendered(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.safe_load_all(done.stdout))


def images(resources: list[dict[str, Any]]) -> set[str]:
    """Every image that is named anywhere in them."""
    return {image for _, image in within(resources, "image") if isinstance(image, str)}


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_kubectl_renders_it(folder: Path) -> None:
    resources = rendered(folder)
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in resources]
    assert names and len(set(names)) == len(names)
    cluster_wide = {"Namespace", "ClusterRole", "ClusterQueue", "ResourceFlavor"}
    assert {kind for kind, namespace, _ in names if namespace is None} <= cluster_wide
    assert not any(kind in {"Secret", "RayJob"} for kind, _, _ in names), "examples and the template are not applied"
    maps = {name for kind, _, name in names if kind == "ConfigMap"}
    assert names_of(resources, "configMap") - maps <= {"ncsn-environment"}, "a patch may name one of its own"


@pytest.mark.parametrize("overlay", ["standalone", "kueue", "gpu", "monitoring", "serving"])
def test_an_overlay_is_standalone_with_the_pushed_image(overlay: str) -> None:
    everything, standalone = rendered(OVERLAYS / overlay), rendered(OVERLAYS / "standalone")
    assert [each for each in everything if each in standalone] == standalone
    slim = "registry.example.com/ncsn-python:0.1.0-slim"
    ours = {image for image in images(everything) if "ncsn-python" in image}
    assert ours == ({slim.removesuffix("-slim"), slim} if overlay == "serving" else {slim})


def test_a_release_names_every_image_by_its_digest() -> None:
    pinned = images(rendered(OVERLAYS / "release"))
    names = {image.rpartition(":")[0] for image in images(rendered(OVERLAYS / "standalone"))}
    assert {image.rpartition("@")[0] for image in pinned} == names
    assert all(re.fullmatch(r"[^@:]+@sha256:[0-9a-f]{64}", image) for image in pinned)


def test_with_an_identity_there_is_no_key_no_store_and_no_address_of_one() -> None:
    resources = rendered(OVERLAYS / "identity")
    assert not re.search(r"seaweedfs|AWS_ENDPOINT_URL|S3_ENDPOINT_URL|ACCESS_KEY", yaml.safe_dump_all(resources))
    accounts = {each["metadata"]["name"]: each for each in resources if each["kind"] == "ServiceAccount"}
    assert accounts.keys() == {"mlflow", "ncsn-janitor", "ncsn-ray"}
    assert all("eks.amazonaws.com/role-arn" in each["metadata"]["annotations"] for each in accounts.values())
    pod, was = (
        next(each for each in found if each["kind"] == "Deployment")["spec"]["template"]["spec"]
        for found in (resources, rendered(INFRA / "base" / "mlflow"))
    )
    assert pod["serviceAccountName"] == "mlflow" and pod["containers"][0]["envFrom"][0]["secretRef"]["optional"]
    pairs = zip(pod["containers"][0]["args"], was["containers"][0]["args"], strict=True)
    assert [new.partition("=")[0] for new, old in pairs if new != old] == ["--artifacts-destination"]


def test_the_dashboard_has_the_label_that_grafana_looks_for() -> None:
    (metadata,) = (each["metadata"] for each in rendered(INFRA / "base/monitoring") if each["kind"] == "ConfigMap")
    assert metadata["name"] == "ncsn-dashboard" and metadata["labels"]["grafana_dashboard"] == "1"


def test_the_copy_for_a_cluster_has_other_namespaces_everywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NCSN_IMAGE", "registry.example:5000/team/ncsn-python:1a2b")
    infra = Infra(tmp_path / "infra", system="a-system", pipelines="b-pipelines")
    resources = rendered(infra.folder / "overlays" / "standalone")
    places = {each["metadata"].get("namespace", each["metadata"]["name"]) for each in resources}
    assert places == {"a-system", "b-pipelines"}
    assert not re.search(r"\b(ncsn-system|kubeflow)\b", yaml.safe_dump_all(resources))
    ours = {image for image in images(resources) if "ncsn-python" in image}
    assert ours == {"registry.example:5000/team/ncsn-python:1a2b"}


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The server of the overlay `login` on loopback and SQLite: its address, and the path that probes ask for."""
    folder = tmp_path_factory.mktemp("mlflow")
    login = {(each["kind"], each["metadata"]["name"]): each for each in rendered(OVERLAYS / "login")}
    (container,) = login["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    settings = login["ConfigMap", "mlflow-login"]["data"]["basic-auth.ini"]
    database = f"database_uri = sqlite:///{folder}/auth.db"
    (folder / "basic-auth.ini").write_text(re.sub("database_uri.*", database, settings))
    (folder / "torch.py").write_text("raise ImportError('the slim image has none')")
    here = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db", "HOME": str(folder)}
    here |= {"MLFLOW_AUTH_CONFIG_PATH": f"{folder}/basic-auth.ini"}
    keys = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
    keys |= {"session-key": "k", "password": ""}
    assert container["command"] == ["mlflow", "server"]
    with pytest.MonkeyPatch.context() as environment:
        for each in container["env"]:
            value = each["value"] if "value" in each else keys[each["valueFrom"]["secretKeyRef"]["key"]]
            environment.setenv(each["name"], here.get(each["name"], value))
        environment.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        command = [
            *MLFLOW,
            "server",
            *container["args"],
            "--workers=1",
        ]  # of an option that comes twice, the last counts
        with Server(command, folder=folder, health="/health") as server:
            yield server.url, container["readinessProbe"]["httpGet"]["path"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_mlflow_answers_who_has_the_account_to_hosts_and_pages_that_it_knows(mlflow: tuple[str, str]) -> None:
    (url, probe), http = mlflow, urllib3.PoolManager(retries=False)

    def asked(password: str = "a-long-password", **headers: str) -> int:
        known = urllib3.make_headers(basic_auth=f"somebody:{password}") if password else {}
        search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
        return http.request("GET", search, headers=headers | known, timeout=30).status

    def changed(origin: str) -> int:
        headers = {"Origin": origin, **urllib3.make_headers(basic_auth="somebody:a-long-password")}
        create = f"{url}/ajax-api/2.0/mlflow/experiments/create"
        return http.request("POST", create, json={"name": origin}, headers=headers, timeout=30).status

    assert (asked(), asked(password=""), asked(password="wrong-password")) == (200, 401, 401)
    for host in ("mlflow.ncsn-system:5000", "localhost:5000", "127.0.0.1:5000"):
        assert (asked(Host=host), changed(f"http://{host}")) == (200, 200), host
    assert (asked(Host="evil.example"), changed("http://evil.example")) == (403, 403)
    by_ip = {"Host": "10.244.0.7:5000"}
    assert http.request("GET", f"{url}{probe}", headers=by_ip, timeout=30).status == 200, "a probe names the pod's IP"
