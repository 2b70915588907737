"""What a KFP task has set on it for the pods that it starts, put on the pods of its RayJob.

KFP hands a component its node selector, tolerations, affinity, environment and volumes as plain pieces of a pod. They
reach this package in an environment variable, as they reach the component: beside the config, not in it, because they
say where the work happens and nothing about its result.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

Manifest = dict[str, Any]

TASK_CONFIG = "NCSN_TASK_CONFIG"
"""Variable with the pieces as JSON; the keys are the fields of `kfp.dsl.TaskConfig`."""

_RAY_AUTH = "RAY_AUTH_"


def task_config() -> dict[str, Any]:
    """What the task has set on it; empty outside of KFP."""
    found: dict[str, Any] = json.loads(os.environ.get(TASK_CONFIG) or "{}")
    return found


def with_task_config(manifest: Manifest, task: Mapping[str, Any]) -> Manifest:
    """The RayJob with the pieces on its pods.

    The environment and the volumes go to head and workers, where a name that the pod has already keeps its meaning. The
    rest goes to the workers: what the task sets comes before what the config says, key by key; tolerations add up.

    Ray's token stays behind: a new cluster has one of its own, which KubeRay (1.6.2, 1.7.0) leaves out of a pod that
    names the variable already, and a head without a token does not start.

    Args:
        manifest: A rendered RayJob; it stays as it is.
        task: See `task_config`.
    """
    changed = copy.deepcopy(manifest)
    env = [each for each in task.get("env") or [] if not each["name"].startswith(_RAY_AUTH)]
    cluster = changed["spec"]["rayClusterSpec"]
    workers = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], *workers):
        _add_new(pod, "volumes", task.get("volumes"), key="name")
        for container in pod["containers"]:
            _add_new(container, "env", env, key="name")
            _add_new(container, "volumeMounts", task.get("volume_mounts"), key="mountPath")
    for pod in workers:
        _place(pod, task)
    return changed


def _place(pod: Manifest, task: Mapping[str, Any]) -> None:
    if selector := task.get("node_selector"):
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | selector
    if tolerations := task.get("tolerations"):
        pod["tolerations"] = [*pod.get("tolerations", []), *tolerations]
    if affinity := task.get("affinity"):
        pod["affinity"] = pod.get("affinity", {}) | affinity


def _add_new(node: Manifest, field: str, items: list[Manifest] | None, *, key: str) -> None:
    present = node.get(field, [])
    known = {item[key] for item in present}
    if new := [item for item in items or [] if item[key] not in known]:
        node[field] = [*present, *new]
