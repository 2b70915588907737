"""What nobody waits for anymore: RayJobs without a launcher, and pipeline runs that have ended.

A task notes its run in a ConfigMap, because neither Argo's Workflow, which may be deleted at any time, nor a RayJob,
which not every run has, tells the janitor later which run of which store is to be closed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ncsn.process import KfpRun
from ncsn.remote.backend import Conflict
from ncsn.remote.kuberay import state_of
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.manifest import KFP_RUN_LABEL, MANAGED_BY, RENEWED_ANNOTATION, RUN_LABEL, STEP_LABEL, is_ending
from ncsn.remote.pods import Trouble, trouble_of


@dataclass(frozen=True)
class Orphan:
    """A RayJob without a launcher.

    Attributes:
        name: Its name.
        run: Name of the run.
        step: Name of the step.
        state: What it is doing.
        silent_seconds: Since its launcher gave the last sign of life.
        config: URI of the experiment in the store.
        kfp_run: KFP's identifier of the run that has started it; empty if a person has.
        pipeline_ended: Whether it is at work for a pipeline run that has ended or is being ended.
        finished: Whether it has ended by itself.
    """

    name: str
    run: str
    step: str
    state: str
    silent_seconds: float
    config: str
    kfp_run: str
    pipeline_ended: bool
    finished: bool

    def describe(self) -> str:
        """One line that says what it is, and why nobody waits for it."""
        why = "its pipeline run has ended" if self.pipeline_ended else f"no sign of its launcher for {self._silence()}"
        return f"{self.name}: run {self.run}, step {self.step}, {self.state}, {why}"

    def _silence(self) -> str:
        minutes = round(self.silent_seconds / 60)
        return f"{self.silent_seconds:.0f} s" if self.silent_seconds < 120 else f"{minutes // 60} h {minutes % 60} min"


def find_orphans(
    api: KubernetesApi,
    *,
    older_than: float,
    run: str | None = None,
    kfp_run: str | None = None,
    at_work: bool = False,
) -> list[Orphan]:
    """RayJobs of ncsn whose launcher has been silent for `older_than` seconds or whose pipeline run has ended.

    Args:
        api: The cluster, and the namespace to look in.
        older_than: Seconds; 0 takes those with a living launcher too.
        run: Only those of this run.
        kfp_run: Only those that this run of KFP has started.
        at_work: Only those that have not ended.
    """
    wanted = {MANAGED_BY: "ncsn", RUN_LABEL: run, KFP_RUN_LABEL: kfp_run}
    labels = ",".join(f"{label}={value}" for label, value in wanted.items() if value)
    now = datetime.now(UTC)
    rayjobs = [each for each in api.list_rayjobs(labels) if not (at_work and state_of(each).finished)]
    found = [_orphan(rayjob, now, pipeline_ended=_pipeline_ended(api, rayjob)) for rayjob in rayjobs]
    return [orphan for orphan in found if orphan.pipeline_ended or orphan.silent_seconds >= older_than]


def reap(
    api: KubernetesApi,
    *,
    older_than: float,
    run: str | None = None,
    kfp_run: str | None = None,
    at_work: bool = False,
) -> list[Orphan]:
    """Delete what `find_orphans` finds; the deleted."""
    orphans = find_orphans(api, older_than=older_than, run=run, kfp_run=kfp_run, at_work=at_work)
    for orphan in orphans:
        api.delete_rayjob(orphan.name)
    return orphans


def _pipeline_ended(api: KubernetesApi, rayjob: Resource) -> bool:
    """Whether it is at work for a pipeline run that is not. One that has failed stays, to be looked at."""
    owners = [owner for owner in rayjob["metadata"].get("ownerReferences", []) if owner["kind"] == "Workflow"]
    return bool(owners) and not state_of(rayjob).finished and is_ending(api.workflow(owners[0]["name"]))


def _config_uri(rayjob: Resource) -> str:
    words = shlex.split(rayjob.get("spec", {}).get("entrypoint", ""))
    return words[words.index("--config") + 1] if "--config" in words[:-1] else ""


def _orphan(rayjob: Resource, now: datetime, *, pipeline_ended: bool) -> Orphan:
    metadata = rayjob["metadata"]
    last = metadata.get("annotations", {}).get(RENEWED_ANNOTATION) or metadata["creationTimestamp"]
    labels = metadata.get("labels", {})
    return Orphan(
        name=metadata["name"],
        run=labels.get(RUN_LABEL, ""),
        step=labels.get(STEP_LABEL, ""),
        state=state_of(rayjob).describe(),
        silent_seconds=max(0.0, (now - datetime.fromisoformat(last)).total_seconds()),
        config=_config_uri(rayjob),
        kfp_run=labels.get(KFP_RUN_LABEL, ""),
        pipeline_ended=pipeline_ended,
        finished=state_of(rayjob).finished,
    )


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
