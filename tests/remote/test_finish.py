"""The exit handler on a cluster: running jobs are stopped, what failed stays for inspection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncsn.config import Config, from_yaml
from ncsn.steps import finish

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}/store", "compute.backend=kuberay"])


def rayjob(cluster: Any, name: str, *, run: str, state: str) -> None:
    labels = {"app.kubernetes.io/managed-by": "ncsn", "ncsn.dev/run": run, "ncsn.dev/step": "train"}
    cluster.create("rayjobs", {"metadata": {"name": name, "labels": labels}, "status": {"jobDeploymentStatus": state}})


def test_what_still_runs_is_canceled(emulation: Any, config: Config) -> None:
    cluster = emulation.cluster
    rayjob(cluster, "working", run="mine", state="Running")
    rayjob(cluster, "failed", run="mine", state="Failed")
    rayjob(cluster, "another", run="theirs", state="Running")
    result = finish.run(config, run="mine", state="FAILED", message="x")
    assert result.canceled == ["working"]
    assert "- working " in result.page
    assert sorted(job["metadata"]["name"] for job in cluster.list("rayjobs")) == ["another", "failed"]
    for name in ("another", "failed"):
        cluster.delete("rayjobs", name)


def test_the_outcome_is_written_though_the_cluster_refuses(emulation: Any, config: Config) -> None:
    emulation.cluster.rules = []
    with pytest.raises(PermissionError, match="'list' on rayjobs"):
        finish.run(config, run="mine", state="FAILED", message="out of memory")
    stored = json.loads(Path(config.storage.root, "runs", "mine", "status.json").read_text())
    assert (stored["status"], stored["reason"]) == ("FAILED", "out of memory")
