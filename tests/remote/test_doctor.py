"""What `ncsn doctor` sees of a cluster, asked through the real client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ncsn.cli.app import app

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


def examine(folder: Path, *overrides: str) -> dict[str, dict[str, str]]:
    """Name of a check -> its finding."""
    settings = ("compute.backend=kuberay", f"storage.root={folder}/store", *overrides)
    options = [part for setting in settings for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["doctor", "--config", str(DIGITS), "--json", *options])
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.exit_code == any(finding["state"] == "failed" for finding in findings.values())
    return findings


def test_a_cluster_that_is_well(emulation: Any, tmp_path: Path) -> None:
    """Who may not look for a Secret asks for none."""
    seen = examine(tmp_path)
    assert {seen[name]["state"] for name in ("kubernetes", "rights", "kuberay", "pod image")} == {"ok"}
    assert "kubeflow" in seen["rights"]["detail"]
    assert seen["pod image"]["detail"] == "registry.example/ncsn-python:0.1.0"
    assert seen["pod needs"]["state"] == "not configured" and emulation.cluster.requests == []


@pytest.mark.parametrize(
    ("namespace", "folder"), [("kubeflow", "infra/base/rbac"), ("of-a-user", "infra/overlays/multi-user")]
)
def test_missing_verbs_are_named_with_the_folder_that_grants_them(
    emulation: Any, tmp_path: Path, namespace: str, folder: str
) -> None:
    emulation.cluster.rules = [rule | {"verbs": ["get", "list"]} for rule in emulation.cluster.rules]
    seen = examine(tmp_path, f"compute.kuberay.namespace={namespace}")["rights"]
    assert (seen["state"], seen["fix"]) == ("failed", f"kubectl apply --kustomize {folder}")
    missing = "create rayjobs.ray.io, watch rayjobs.ray.io, delete rayjobs.ray.io, patch configmaps ncsn-runs"
    assert f" {missing} " in seen["detail"]
    assert (DIGITS.parents[1] / folder / "kustomization.yaml").is_file()


@pytest.mark.parametrize(
    ("lacking", "state", "fix"),
    [
        ("", "ok", ""),
        ("ncsn-credentials", "not configured", ""),  # which may be given in another way
        ("ncsn-ray", "failed", "kubectl apply --kustomize infra/base/kuberay"),
    ],
)
def test_what_the_pods_refer_to(emulation: Any, tmp_path: Path, lacking: str, state: str, fix: str) -> None:
    user = {"apiGroups": [""], "resources": ["serviceaccounts", "configmaps", "secrets"], "verbs": ["get"]}
    emulation.cluster.rules = [*emulation.cluster.rules, user]
    needs = {"serviceaccounts": "ncsn-ray", "configmaps": "ncsn-environment", "secrets": "ncsn-credentials"}
    for kind, name in needs.items():
        if name != lacking:
            emulation.cluster.create(kind, {"metadata": {"name": name}})
    seen = examine(tmp_path)["pod needs"]
    assert (seen["state"], seen["fix"]) == (state, fix) and lacking in seen["detail"]


def test_what_a_rayjob_lacks_is_named(emulation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation.cluster.fields = ("entrypoint",)
    old = examine(tmp_path)["kuberay"]
    emulation.cluster.fields = None
    monkeypatch.delenv("NCSN_IMAGE")
    without = examine(tmp_path)
    monkeypatch.setenv("NCSN_RAYJOB_TEMPLATE", str(tmp_path / "nowhere.yaml"))
    no_template = examine(tmp_path)["kuberay"]
    assert "1.6" in old["detail"] and "ray.io/v1" in without["kuberay"]["detail"]
    assert no_template["fix"] == "unset NCSN_RAYJOB_TEMPLATE"
    found = (old, without["kuberay"], without["pod image"], no_template)
    assert {each["state"] for each in found} == {"failed"}
