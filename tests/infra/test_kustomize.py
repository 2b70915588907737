"""The kustomizations, and the copy that `make test-cluster` applies, as `kubectl apply --kustomize` renders them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from installed_infra import Infra
from manifests import names_of, within

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


def test_login_is_standalone_with_a_login() -> None:
    """`test_servers.py` logs in."""
    standalone, login = rendered(OVERLAYS / "standalone"), rendered(OVERLAYS / "login")
    assert [each["kind"] for each in standalone if each not in login] == ["Deployment"]
    config, guarded = (each for each in login if each not in standalone)
    assert (config["kind"], guarded["kind"]) == ("ConfigMap", "Deployment")
    assert "--app-name=basic-auth" in guarded["spec"]["template"]["spec"]["containers"][0]["args"]


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
