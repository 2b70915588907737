"""Saves the state of a namespace in a folder, to find the cause of a failure."""

from __future__ import annotations

import contextlib
from pathlib import Path

from real_cluster import KubectlFailed, Resource, get, kubectl

_OBJECTS = {
    "pods": ("pods",),
    "jobs": ("jobs,cronjobs,deployments,statefulsets",),
    "rayjobs": ("rayjobs.ray.io",),
    "rayclusters": ("rayclusters.ray.io",),
    "workflows": ("workflows.argoproj.io",),
    "quotas": ("resourcequotas",),
}


def save_evidence(folder: Path, namespace: str, *, since: str = "") -> None:
    """Write events, objects as YAML and the logs of all containers, previous ones too, to `folder/NAMESPACE`.

    Pods that ended are left out if they are older than `since`, a time as Kubernetes writes it.
    """
    folder = folder / namespace
    folder.mkdir(parents=True, exist_ok=True)
    _keep(folder / "events.txt", "get", "events", "--sort-by=.lastTimestamp", "--namespace", namespace)
    _keep(folder / "pods.txt", "get", "pods", "--output=wide", "--namespace", namespace)
    for name, kinds in _OBJECTS.items():
        _keep(folder / f"{name}.yaml", "get", *kinds, "--output=yaml", "--namespace", namespace)
    with contextlib.suppress(KubectlFailed):
        for pod in get("pods", "--namespace", namespace)["items"]:
            if pod["metadata"]["creationTimestamp"] >= since or pod["status"]["phase"] == "Running":
                _save_logs(folder / "logs", namespace, pod)


def _save_logs(folder: Path, namespace: str, pod: Resource) -> None:
    folder.mkdir(exist_ok=True)
    name, spec = pod["metadata"]["name"], pod["spec"]
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        of = ("logs", name, "--container", container["name"], "--namespace", namespace, "--timestamps")
        _keep(folder / f"{name}.{container['name']}.txt", *of)
        with contextlib.suppress(KubectlFailed):
            earlier = kubectl(*of, "--previous")
            (folder / f"{name}.{container['name']}.previous.txt").write_text(earlier)


def _keep(file: Path, *arguments: str) -> None:
    try:
        file.write_text(kubectl(*arguments))
    except KubectlFailed as error:
        file.write_text(f"{error}\n")
