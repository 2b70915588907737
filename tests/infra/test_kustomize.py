"""The kustomizations as `kubectl apply --kustomize` renders them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import names_of, within

ROOT = Path(__file__).parents[2]
KUSTOMIZATIONS = sorted(path.parent for path in (ROOT / "infra").glob("*/*/kustomization.yaml"))
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterQueue", "ResourceFlavor"}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@functools.cache
def rendered(folder: Path) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
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
    assert {kind for kind, namespace, _ in names if namespace is None} <= CLUSTER_WIDE
    assert not any(kind in {"Secret", "RayJob"} for kind, _, _ in names), "examples and the template are not applied"
    maps = {name for kind, _, name in names if kind == "ConfigMap"}
    assert names_of(resources, "configMap") - maps <= {"ncsn-environment"}, "a patch may name one of its own"


@pytest.mark.parametrize("overlay", ["standalone", "kueue", "gpu", "monitoring", "serving"])
def test_an_overlay_is_standalone_with_the_pushed_image(overlay: str) -> None:
    folder = ROOT / "infra" / "overlays"
    everything = rendered(folder / overlay)
    assert [each for each in everything if each in rendered(folder / "standalone")] == rendered(folder / "standalone")
    ours = {image for image in images(everything) if "ncsn-python" in image}
    full, slim = "registry.example.com/ncsn-python:0.1.0", "registry.example.com/ncsn-python:0.1.0-slim"
    assert ours == ({full, slim} if overlay == "serving" else {slim})


def test_a_release_names_every_image_by_its_digest() -> None:
    folder = ROOT / "infra" / "overlays"
    names = {image.rpartition(":")[0] for image in images(rendered(folder / "standalone"))}
    pinned = images(rendered(folder / "release"))
    assert {image.rpartition("@")[0] for image in pinned} == names
    assert all(re.fullmatch(r"[^@:]+@sha256:[0-9a-f]{64}", image) for image in pinned)


def test_with_an_identity_there_is_no_key_no_store_and_no_address_of_one() -> None:
    resources = rendered(ROOT / "infra" / "overlays" / "identity")
    assert not re.search(r"seaweedfs|AWS_ENDPOINT_URL|S3_ENDPOINT_URL|ACCESS_KEY", yaml.safe_dump_all(resources))
    accounts = {each["metadata"]["name"]: each for each in resources if each["kind"] == "ServiceAccount"}
    assert accounts.keys() == {"mlflow", "ncsn-janitor", "ncsn-ray"}
    assert all("eks.amazonaws.com/role-arn" in each["metadata"]["annotations"] for each in accounts.values())
    (server,) = (each for each in resources if each["kind"] == "Deployment")
    (plain,) = (each for each in rendered(ROOT / "infra" / "base" / "mlflow") if each["kind"] == "Deployment")
    pod, was = (each["spec"]["template"]["spec"] for each in (server, plain))
    assert pod["serviceAccountName"] == "mlflow" and pod["containers"][0]["envFrom"][0]["secretRef"]["optional"]
    pairs = zip(pod["containers"][0]["args"], was["containers"][0]["args"], strict=True)
    assert [new.partition("=")[0] for new, old in pairs if new != old] == ["--artifacts-destination"]


def test_login_is_standalone_with_a_login() -> None:
    """`test_servers.py` logs in."""
    standalone, login = (rendered(ROOT / "infra" / "overlays" / name) for name in ("standalone", "login"))
    assert [each["kind"] for each in standalone if each not in login] == ["Deployment"]
    config, guarded = (each for each in login if each not in standalone)
    assert (config["kind"], guarded["kind"]) == ("ConfigMap", "Deployment")
    assert "--app-name=basic-auth" in guarded["spec"]["template"]["spec"]["containers"][0]["args"]


def test_the_dashboard_has_the_name_and_label_that_grafana_looks_for() -> None:
    maps = [each for each in rendered(ROOT / "infra/base/monitoring") if each["kind"] == "ConfigMap"]
    ((name, labels),) = ((each["metadata"]["name"], each["metadata"]["labels"]) for each in maps)
    assert name == "ncsn-dashboard" and labels["grafana_dashboard"] == "1"
