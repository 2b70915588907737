"""Every RayJob that can be rendered passes the CRDs' schemas and the project's own rules."""

from __future__ import annotations

import json
import re
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
from kuberay_rules import house_errors, load_schemas, schema_errors
from refused import refused

from ncsn.config.compute import ComputeConfig
from ncsn.errors import NotFound
from ncsn.remote.backend import RemoteStep
from ncsn.remote.manifest import TASK_CONFIG, load_template, render

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "infra" / "base" / "kuberay" / "rayjob.yaml"
SCHEMAS = load_schemas("RayJob")
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "ncsn-train-x7", "uid": "0c9d"}


def step(run: str = "digits-0a1b2c3d", **changes: Any) -> RemoteStep:
    values = {"root": "s3://bucket/ncsn", "run": run, "step": "train", "command": ("ncsn", "train", "--run", run)}
    return RemoteStep(**values | changes)


def rendered(
    *, env: dict[str, str] | None = None, owner: dict[str, Any] | None = None, **compute: Any
) -> dict[str, Any]:
    settings, image = ComputeConfig.model_validate(compute), "registry.example/ncsn-python:0.1.0"
    labels = {"ncsn.dev/kfp-run-id": "5f3a", "ncsn.dev/attempt": "77aa"}
    return render(step(), settings, namespace="kubeflow", image=image, env=env or {}, labels=labels, owner=owner)


def all_errors(manifest: dict[str, Any]) -> list[str]:
    """What the house and, where the schemas of the CRDs are known, the API server refuse."""
    refused = [error for schema in SCHEMAS.values() for error in schema_errors(manifest, schema)]
    return [*refused, *house_errors(manifest)]


VARIANTS = {
    "plain": rendered(),
    "four GPU workers": rendered(num_workers=4, cpus_per_worker=8, use_gpu=True),
    "queue": rendered(kuberay={"queue": "research", "priority_class": "low"}),
    "GPU nodes": rendered(
        use_gpu=True,
        kuberay={"node_selector": {"pool": "l4"}, "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    ),
    "owned, with variables": rendered(owner=OWNER, env={"MLFLOW_RUN_ID": "abc"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_api_server_and_house_accept_it(name: str) -> None:
    assert all_errors(VARIANTS[name]) == []


def test_the_driver_checks_edited_code_and_ray_fetches_none() -> None:
    edited = step(code="s3://b/code/0.zip")
    manifest = render(edited, ComputeConfig(), namespace="kubeflow", image="ncsn:1", env={}, labels={})
    checked = ("python", "-P", "-m", "ncsn.runs.code", "s3://b/code/0.zip")
    assert tuple(shlex.split(manifest["spec"]["entrypoint"])) == (*checked, *edited.leased_command)
    assert "runtimeEnvYAML" not in manifest["spec"]
    assert all_errors(manifest) == []


@pytest.mark.parametrize(
    "run", ["a", "digits-0a1b2c3d", "x" * 63, "2024.with_every-sign", "9" * 20, "tail-" + "-" * 30 + "x"]
)
def test_names_are_valid_and_the_same_for_every_attempt(run: str) -> None:
    for kind in ("train", "sample", "evaluate"):
        name = step(run, step=kind).job_name
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47
        assert name == step(run, step=kind, command=("another",)).job_name
        assert f"-{kind}-" in name


def test_only_named_fields_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template decides the rest: a change that a reviewer makes there arrives in the cluster."""
    template = load_template()
    template["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["priorityClassName"] = "reviewed"
    template["spec"]["backoffLimit"] = 3
    (tmp_path / "rayjob.yaml").write_text(yaml.safe_dump(template))
    monkeypatch.setenv("NCSN_RAYJOB_TEMPLATE", str(tmp_path / "rayjob.yaml"))
    spec = rendered()["spec"]
    assert spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["priorityClassName"] == "reviewed"
    assert spec["backoffLimit"] == 3


def test_the_fields_say_what_was_asked() -> None:
    manifest = rendered(num_workers=3, cpus_per_worker=4, use_gpu=True, kuberay={"max_hours": 2})
    spec, (workers,) = manifest["spec"], manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert spec["entrypoint"].startswith("ncsn train --run digits-0a1b2c3d --lease s3://bucket/")
    assert spec["activeDeadlineSeconds"] == 7200
    assert rendered(kuberay={"max_hours": 0.0001})["spec"]["activeDeadlineSeconds"] == 1, "KubeRay refuses 0"
    assert spec["rayClusterSpec"]["rayVersion"] == metadata.version("ray")
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "4Gi", "nvidia.com/gpu": "1"}
    assert workers["template"]["spec"]["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert manifest["metadata"]["labels"]["ncsn.dev/run"] == "digits-0a1b2c3d"


def test_the_head_is_as_large_as_asked_else_as_the_template_says() -> None:
    for settings, size in (
        ({}, {"cpu": "2", "memory": "6Gi"}),
        ({"head_memory": "16Gi"}, {"cpu": "2", "memory": "16Gi"}),
        ({"head_cpus": 1, "head_memory": "2Gi"}, {"cpu": "1", "memory": "2Gi"}),
    ):
        head = rendered(kuberay=settings)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert head["containers"][0]["resources"] == {"requests": size, "limits": size}


def test_all_pods_have_the_priority_class() -> None:
    for given in (None, "low"):
        spec = rendered(kuberay={"priority_class": given})["spec"]
        cluster = spec["rayClusterSpec"]
        pods = [spec["submitterPodTemplate"], *(group["template"] for group in cluster["workerGroupSpecs"])]
        pods.append(cluster["headGroupSpec"]["template"])
        assert {pod["spec"].get("priorityClassName") for pod in pods} == {given}


def test_workers_go_at_once_however_it_ended() -> None:
    """After activeDeadlineSeconds jobStatus stays RUNNING, so a rule for it alone keeps the GPUs (KubeRay 1.7.0)."""
    rules = rendered()["spec"]["deletionStrategy"]["deletionRules"]
    at_once = [rule["condition"] for rule in rules if rule["policy"] == "DeleteWorkers"]
    assert {"jobStatus": "SUCCEEDED", "ttlSeconds": 0} in at_once, "a driver without a launcher ends with exit code 0"
    assert {"jobStatus": "FAILED", "ttlSeconds": 0} in at_once
    assert {"jobDeploymentStatus": "Failed", "ttlSeconds": 0} in at_once


@pytest.mark.parametrize("queue", [None, "research"])
def test_a_pod_holds_several_workers(queue: str | None) -> None:
    """Kueue and a ResourceQuota count what the pods ask for, so that both see the same GPUs as with one worker each."""
    pods = {"workers_per_pod": 4, "memory_per_worker": "1.5Gi", "queue": queue}
    manifest = rendered(num_workers=[4, 8], cpus_per_worker=2, use_gpu=True, kuberay=pods)
    (workers,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 1, 2]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "6Gi", "nvidia.com/gpu": "4"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert workers["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] == "4Gi"
    assert workers["rayStartParams"] == {"object-store-memory": str(int(0.9 * 4 * 2**30))}


def test_a_queue_replaces_the_deletion_rules() -> None:
    spec = VARIANTS["queue"]["spec"]
    assert "deletionStrategy" not in spec
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 600)


TASK: dict[str, Any] = {
    "node_selector": {"pool": "big"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
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


def test_what_is_set_on_a_kfp_task_reaches_the_pods_and_keeps_all_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"env": {"MLFLOW_RUN_ID": "abc"}, "kuberay": {"node_selector": {"zone": "a"}}}
    before = rendered(**settings)
    monkeypatch.setenv(TASK_CONFIG, json.dumps(TASK))
    manifest = rendered(**settings)
    head, worker = ray_pods(manifest)
    assert worker["nodeSelector"] == {"zone": "a", "pool": "big"}
    assert (worker["tolerations"], worker["affinity"]) == (TASK["tolerations"], TASK["affinity"])
    assert not head.keys() & {"nodeSelector", "tolerations", "affinity"}
    assert head["containers"][0]["resources"] == ray_pods(before)[0]["containers"][0]["resources"]
    for pod in (head, worker):
        (container,) = pod["containers"]
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["FROM_THE_TASK"]["value"] == "1"
        assert env["A_KEY"] == TASK["env"][1], "a secret stays a reference"
        assert env["MLFLOW_RUN_ID"]["value"] == "abc"
        assert "RAY_AUTH_TOKEN" not in env, "KubeRay makes a token for the new cluster"
        assert TASK["volume_mounts"][0] in container["volumeMounts"]
        assert TASK["volumes"][0] in pod["volumes"]
    assert all_errors(manifest) == []


def ray_pods(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head's and the workers'."""
    cluster = manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]


def test_a_template_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "rayjob.yaml"
    monkeypatch.setenv("NCSN_RAYJOB_TEMPLATE", str(other))
    with refused("NCSN_RAYJOB_TEMPLATE", error=NotFound):
        load_template()
    for text in ("kind: Pod", "kind: [RayJob", "kind: 2020-13-45"):
        other.write_text(text)
        with refused("NCSN_RAYJOB_TEMPLATE"):
            load_template()


def test_a_wheel_carries_the_template(tmp_path: Path) -> None:
    """Built from the files of the source tree, as pip does for `pip install .`."""
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        if name.startswith(("ncsn/", "components/", "pipelines/", "infra/", "pyproject", "README", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name, follow_symlinks=False)
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", *options, source]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("ncsn/remote/rayjob.yaml") == TEMPLATE.read_bytes()
