"""What `ncsn doctor` sees of a cluster, asked through the real client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ncsn.cli.app import app
from ncsn.cli.options import BACKENDS
from ncsn.config import from_yaml
from ncsn.remote import open_backend

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


def examine(folder: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    findings = examine_all(folder, *overrides)
    return {finding["check"]: (finding["state"], finding["detail"]) for finding in findings}


def examine_all(folder: Path, *overrides: str) -> list[dict[str, str]]:
    settings = ("compute.backend=kuberay", f"storage.root={folder}/store", *overrides)
    options = [part for setting in settings for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["doctor", "--config", str(DIGITS), "--json", *options])
    findings: list[dict[str, str]] = json.loads(done.stdout)
    assert done.exit_code == any(finding["state"] == "failed" for finding in findings)
    return findings


def test_a_cluster_that_is_well(emulation: Any, tmp_path: Path) -> None:
    seen = examine(tmp_path)
    assert seen["kubernetes"][0] == seen["rights"][0] == seen["kuberay"][0] == "ok"
    assert "kubeflow" in seen["rights"][1]


@pytest.mark.parametrize("name", BACKENDS)
def test_the_catalog_lists_the_checks_of_each_backend(emulation: Any, name: str) -> None:
    backend = open_backend(from_yaml(DIGITS.read_text(), overrides=[f"compute.backend={name}"]).compute)
    assert tuple(check.name for check in (backend.checks() if backend else ())) == BACKENDS[name]


def test_missing_verbs_are_named(emulation: Any, tmp_path: Path) -> None:
    emulation.cluster.rules = [rule | {"verbs": ["get", "list", "watch"]} for rule in emulation.cluster.rules]
    state, detail = examine(tmp_path)["rights"]
    assert state == "failed"
    missing = "create rayjobs.ray.io, delete rayjobs.ray.io, create configmaps, delete configmaps"
    assert f" {missing} " in detail


@pytest.mark.parametrize(
    ("namespace", "folder"), [("kubeflow", "infra/base/rbac"), ("of-a-user", "infra/overlays/multi-user")]
)
def test_the_rights_come_from_a_folder_for_that_namespace(
    emulation: Any, tmp_path: Path, namespace: str, folder: str
) -> None:
    emulation.cluster.rules = []
    findings = examine_all(tmp_path, f"compute.kuberay.namespace={namespace}")
    (fix,) = (finding["fix"] for finding in findings if finding["check"] == "rights")
    assert fix == f"kubectl apply --kustomize {folder}"
    assert (DIGITS.parents[1] / folder / "kustomization.yaml").is_file()


@pytest.mark.parametrize(
    ("switch", "value", "word"), [("installed", False, "ray.io/v1"), ("fields", ("entrypoint",), "1.6")]
)
def test_a_cluster_without_kuberay_or_with_an_old_one(
    emulation: Any, tmp_path: Path, switch: str, value: Any, word: str
) -> None:
    setattr(emulation.cluster, switch, value)
    state, detail = examine(tmp_path)["kuberay"]
    assert state == "failed" and word in detail


def test_a_template_that_is_not_there_is_no_matter_of_the_operator(
    emulation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine(tmp_path)["kuberay"][0] == "ok", "without the variable it is the package's own"
    monkeypatch.setenv("NCSN_RAYJOB_TEMPLATE", str(tmp_path / "nowhere.yaml"))
    (finding,) = (finding for finding in examine_all(tmp_path) if finding["check"] == "kuberay")
    assert (finding["state"], finding["fix"]) == ("failed", "unset NCSN_RAYJOB_TEMPLATE")


def test_the_image_must_be_named(emulation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(tmp_path)["pod image"] == ("ok", "registry.example/ncsn-python:0.1.0")
    monkeypatch.delenv("NCSN_IMAGE", raising=False)
    assert examine(tmp_path)["pod image"][0] == "failed"
