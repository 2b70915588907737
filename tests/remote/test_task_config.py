"""What is set on a KFP task reaches the pods of its RayJob, and the result is still a RayJob."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kuberay_rules import house_errors, load_schemas, operator_errors, schema_errors

from ncsn.config.compute import ComputeConfig
from ncsn.remote.manifest import TASK_CONFIG, JobRequest, load_template, render, task_config, with_task_config

TASK: dict[str, Any] = {
    "node_selector": {"pool": "big"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    "env": [
        {"name": "FROM_THE_TASK", "value": "1"},
        {"name": "A_KEY", "valueFrom": {"secretKeyRef": {"name": "ncsn-credentials", "key": "A_KEY"}}},
        {"name": "MLFLOW_RUN_ID", "value": "of the task"},
        {
            "name": "RAY_AUTH_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "ncsn-credentials", "key": "RAY_AUTH_TOKEN"}},
        },
    ],
    "volumes": [{"name": "images", "persistentVolumeClaim": {"claimName": "images"}}],
    "volume_mounts": [{"name": "images", "mountPath": "/mnt/images"}],
}


@pytest.fixture
def manifest() -> dict[str, Any]:
    request = JobRequest("mine", "train", "s3://b/steps/train", ("ncsn", "train"), "image", {"MLFLOW_RUN_ID": "abc"})
    compute = ComputeConfig.model_validate({"kuberay": {"node_selector": {"zone": "a"}}})
    return render(load_template(), request, compute=compute, namespace="kubeflow")


def pods(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]


def test_placement_goes_to_the_workers(manifest: dict[str, Any]) -> None:
    head, worker = pods(with_task_config(manifest, TASK))
    assert worker["nodeSelector"] == {"zone": "a", "pool": "big"}
    assert worker["tolerations"] == TASK["tolerations"]
    assert worker["affinity"] == TASK["affinity"]
    untouched, _ = pods(manifest)
    for key in ("nodeSelector", "tolerations", "affinity"):
        assert head.get(key) == untouched.get(key)
    assert head["containers"][0]["resources"] == untouched["containers"][0]["resources"]


def test_environment_and_volumes_go_everywhere_and_replace_nothing(manifest: dict[str, Any]) -> None:
    for pod in pods(with_task_config(manifest, TASK)):
        (container,) = pod["containers"]
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["FROM_THE_TASK"]["value"] == "1"
        assert env["A_KEY"] == TASK["env"][1], "a secret stays a reference"
        assert env["MLFLOW_RUN_ID"]["value"] == "abc"
        assert "RAY_AUTH_TOKEN" not in env, "KubeRay gives the new cluster a token of its own"
        assert TASK["volume_mounts"][0] in container["volumeMounts"]
        assert TASK["volumes"][0] in pod["volumes"]


def test_the_result_keeps_all_rules(manifest: dict[str, Any]) -> None:
    changed = with_task_config(manifest, TASK)
    assert operator_errors(changed) == house_errors(changed) == []
    for schema in load_schemas("RayJob").values():
        assert schema_errors(changed, schema) == schema_errors(manifest, schema)


def test_nothing_set_changes_nothing(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TASK_CONFIG, raising=False)
    assert with_task_config(manifest, task_config()) == manifest


def test_it_reaches_the_rayjob_that_is_created(emulation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASK_CONFIG, json.dumps({"env": [{"name": "FROM_THE_TASK", "value": "seen"}]}))
    emulation.execute("import os; print(os.environ['FROM_THE_TASK'])")
    assert emulation.log == "seen\n"
