"""Saves the state of a namespace in a folder, to find the cause of a failure."""

from __future__ import annotations

from pathlib import Path

from real_cluster import KubectlFailed, kubectl

OURS = "rayjobs.ray.io,rayclusters.ray.io,workflows.argoproj.io"


def save_evidence(folder: Path, namespace: str) -> None:
    """Write the objects and events of the namespace, and the logs of all containers, to `folder/NAMESPACE`."""
    folder = folder / namespace
    folder.mkdir(parents=True, exist_ok=True)
    where = ("--namespaces", namespace, "--output-directory", str(folder), "--output", "yaml")
    for name, command in (
        ("dump.txt", ("cluster-info", "dump", *where)),
        ("pods.txt", ("get", "pods", "--output=wide", "--namespace", namespace)),
        *((f"{kind}.yaml", ("get", kind, "--output=yaml", "--namespace", namespace)) for kind in OURS.split(",")),
    ):
        try:
            (folder / name).write_text(kubectl(*command, seconds=120))
        except KubectlFailed as error:  # a kind that the cluster lacks, or no answer
            (folder / name).write_text(f"{error}\n")
