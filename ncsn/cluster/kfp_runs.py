"""Pipeline runs as the cluster knows them: which are at work, and what became of their pods.

A task notes its run in a ConfigMap, because neither Argo's Workflow, which may be deleted at any time, nor a RayJob,
which not every run has, tells the janitor later which run of which store is to be closed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncsn.cluster.api import KubernetesApi, Resource
from ncsn.cluster.backend import Conflict
from ncsn.cluster.pod_trouble import Trouble, trouble_of
from ncsn.cluster.rayjob_manifest import KFP_RUN_LABEL, MANAGED_BY
from ncsn.process import KfpRun

RUN_ID_LABEL = "pipeline/runid"
"""Of a run's Workflow and of its pods."""
NODE_ANNOTATION = "workflows.argoproj.io/node-name"
_NODE_SUFFIX = re.compile(r"\(\d+\)$")
_ENDED = {"Succeeded", "Failed", "Error"}


@dataclass(frozen=True)
class NotedRun(KfpRun):
    """A pipeline run that a task has noted.

    Attributes:
        run: Name of the run in the store.
        config: The experiment as canonical JSON.
    """

    run: str
    config: str


def note_run(api: KubernetesApi, noted: NotedRun) -> None:
    """Note the run until `forget_run`. The note of its first task stays."""
    labels = {MANAGED_BY: "ncsn", KFP_RUN_LABEL: noted.id, "app.kubernetes.io/part-of": "ncsn"}
    data = {"workflow": noted.workflow, "run": noted.run, "config": noted.config}
    try:
        api.create_config_map({"metadata": {"name": _note(noted), "labels": labels}, "data": data})
    except Conflict:
        return


def noted_runs(api: KubernetesApi) -> list[NotedRun]:
    """The runs that nobody has closed yet."""
    listed = api.config_maps(f"{MANAGED_BY}=ncsn,{KFP_RUN_LABEL}")
    return [NotedRun(id=each["metadata"]["labels"][KFP_RUN_LABEL], **each["data"]) for each in listed]


def forget_run(api: KubernetesApi, noted: KfpRun) -> None:
    """Remove the note: the run is closed."""
    api.delete_config_map(_note(noted))


def is_over(workflow: Resource | None) -> bool:
    """Whether none of the Workflow's pods is at work any more."""
    return workflow is None or workflow.get("status", {}).get("phase") in _ENDED


def was_stopped(workflow: Resource | None) -> bool:
    """Whether somebody has ended the Workflow: by KFP's Terminate, by Argo's own, or by deleting it."""
    if workflow is None or "deletionTimestamp" in workflow["metadata"]:
        return True
    spec = workflow.get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def state_of_run(workflow: Resource | None) -> str:
    """The end that an ended Workflow stands for: CANCELED, SUCCEEDED or FAILED."""
    if was_stopped(workflow):
        return "CANCELED"
    assert workflow is not None
    return "SUCCEEDED" if workflow.get("status", {}).get("phase") == "Succeeded" else "FAILED"


def has_workflow(api: KubernetesApi, run_id: str) -> bool:
    """Whether the cluster has the run's Workflow. KFP goes on to say RUNNING once somebody has deleted it."""
    return bool(api.workflows(f"{RUN_ID_LABEL}={run_id}"))


def troubles_of_run(api: KubernetesApi, run_id: str, *, pending: bool = False) -> Mapping[str, Trouble]:
    """Task of the pipeline -> what keeps its pod from running, or has ended it. Only the last pod of each counts.

    Args:
        api: The cluster, and the namespace of the run.
        run_id: KFP's identifier.
        pending: Only of pods that have not started.
    """
    pods = {_task_of(pod): pod for pod in api.pods(f"{RUN_ID_LABEL}={run_id}")}
    looked_at = {
        task: pod for task, pod in pods.items() if task and (not pending or pod["status"].get("phase") == "Pending")
    }
    found = {task: trouble_of(pod, api.events(pod["metadata"]["name"])) for task, pod in looked_at.items()}
    return {task: trouble for task, trouble in found.items() if trouble is not None}


def _task_of(pod: Resource) -> str:
    """The pipeline's name of the task that the pod executes; empty for a driver of KFP's own."""
    annotations: dict[str, Any] = pod["metadata"].get("annotations") or {}
    *path, last = [_NODE_SUFFIX.sub("", part) for part in annotations.get(NODE_ANNOTATION, "").split(".")]
    return path[-1] if path and last == "executor" else ""


def _note(run: KfpRun) -> str:
    return f"ncsn-run-{run.id}"
