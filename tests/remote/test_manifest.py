"""The RayJob of a step: what is filled in the template, and that the API server accepts it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from edited_clone import ROOT, clone
from manifests import api_server_errors
from refused import refused

from ncsn.config.compute import ComputeConfig
from ncsn.errors import NotFound
from ncsn.remote.backend import RemoteStep
from ncsn.remote.manifest import TASK_CONFIG, load_template, render

TEMPLATE = ROOT / "infra" / "base" / "kuberay" / "rayjob.yaml"
FILLED = Path(__file__).with_name("filled.yaml")
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}
GPU = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
PODS = {"workers_per_pod": 4, "memory_per_worker": "1.5Gi", "node_selector": {"zone": "a"}, "tolerations": [GPU]}
LIMITS = {"max_hours": 0.0001, "max_start_minutes": 5, "queue": "research", "priority_class": "low"}
COMPUTE: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers with GPUs": {"num_workers": [4, 8], "cpus_per_worker": 2, "use_gpu": True, "kuberay": PODS},
    "queue and limits": {"num_workers": 3, "kuberay": LIMITS},
    "small head": {"kuberay": {"head_cpus": 1, "head_memory": "2Gi"}},
}
TASK: dict[str, Any] = {
    "node_selector": {"pool": "big"},
    "tolerations": [GPU],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    "env": [
        {"name": "FROM_THE_TASK", "value": "1"},
        {"name": "A_KEY", "valueFrom": {"secretKeyRef": {"name": "ncsn-credentials", "key": "A_KEY"}}},
        {"name": "MLFLOW_RUN_ID", "value": "of the task"},
        {"name": "RAY_AUTH_TOKEN", "value": "of another cluster"},
    ],
    "volumes": [{"name": "images", "persistentVolumeClaim": {"claimName": "images"}}],
    "volume_mounts": [{"name": "images", "mountPath": "/mnt/images"}],
}


def rendered(code: str | None = None, **compute: Any) -> dict[str, Any]:
    step = RemoteStep("s3://bucket/ncsn", "mine", "train", ("ncsn", "train", "--run", "mine"), code)
    where = {"namespace": "kubeflow", "image": "registry.example/ncsn:1", "env": {"MLFLOW_RUN_ID": "abc"}}
    labels = {"ncsn.dev/kfp-run-id": "5f3a", "ncsn.dev/attempt": "77aa"}
    return render(step, ComputeConfig.model_validate(compute), **where, labels=labels, owner=OWNER)


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """What is below a node, by path; lists too, if all that is in them has a name."""
    if isinstance(node, list) and all("name" in each or "groupName" in each for each in node):
        node = {each.get("name", each.get("groupName")): each for each in node}
    if not isinstance(node, dict) or not node:
        return {path.removeprefix("spec.rayClusterSpec.").replace(".template.", "."): node}
    return {leaf: v for key, below in node.items() for leaf, v in flat(below, f"{path}.{key}".lstrip(".")).items()}


def test_what_is_filled_is_as_reviewed_all_else_as_in_the_template_and_the_api_server_accepts_it(monkeypatch) -> None:
    """RENEW_SNAPSHOTS=1 writes `filled.yaml` anew: what differs from the template, and what from the plain RayJob."""
    manifests = {name: rendered(**compute) for name, compute in COMPUTE.items()}
    monkeypatch.setenv(TASK_CONFIG, json.dumps(TASK))
    manifests["parts of a KFP task"] = rendered(kuberay=PODS | {"workers_per_pod": 1})
    before, lines = flat(load_template()), []
    del before["rayVersion"]
    for name, manifest in manifests.items():
        assert api_server_errors(manifest) == []
        now = flat(manifest)
        assert now.pop("rayVersion") == metadata.version("ray")
        paths = [path for path in {**before, **now} if path not in now or now[path] != before.get(path)]
        lines.append(yaml.safe_dump({name: {path: now.get(path) for path in paths}}, width=1000))
        before = now if name == "plain" else before
    if os.environ.get("RENEW_SNAPSHOTS"):
        FILLED.write_text("".join(lines))
    assert "".join(lines) == FILLED.read_text()


def test_the_driver_checks_edited_code_and_ray_fetches_none() -> None:
    spec, plain = rendered(code="s3://b/code/0.zip")["spec"], rendered()["spec"]
    checked = ["python", "-P", "-m", "ncsn.runs.code", "s3://b/code/0.zip"]
    assert shlex.split(spec.pop("entrypoint")) == [*checked, *shlex.split(plain.pop("entrypoint"))]
    assert spec == plain and "runtimeEnvYAML" not in spec


def test_a_template_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "rayjob.yaml"
    monkeypatch.setenv("NCSN_RAYJOB_TEMPLATE", str(other))
    with refused("NCSN_RAYJOB_TEMPLATE", error=NotFound):
        load_template()
    for text in ("kind: Pod", "kind: [RayJob", "kind: 2020-13-45"):
        other.write_text(text)
        with refused("NCSN_RAYJOB_TEMPLATE"):
            load_template()
    other.write_text(TEMPLATE.read_text().replace("backoffLimit: 1", "backoffLimit: 3"))
    assert rendered()["spec"]["backoffLimit"] == 3


def test_a_wheel_carries_the_template(tmp_path: Path) -> None:
    source = clone(tmp_path / "source").folder
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", *options, source]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("ncsn/remote/rayjob.yaml") == TEMPLATE.read_bytes()
