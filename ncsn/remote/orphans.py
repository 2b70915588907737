"""Abandoned work: RayJobs without a launcher, and pipeline runs that ended without closing their run.

A task notes its run in a ConfigMap. Neither Argo's Workflow, which may be deleted at any time, nor a RayJob, which not
every run has, tells the janitor later which run of which store to close.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from ncsn.process import KfpRun
from ncsn.remote.backend import Conflict
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.launcher import RUN_ID_LABEL, is_ending, was_stopped, workflow_of
from ncsn.remote.manifest import KFP_RUN_LABEL, MANAGED_BY, RENEWED_ANNOTATION, RUN_LABEL, STEP_LABEL, selector
from ncsn.remote.pods import Trouble, trouble_of
from ncsn.remote.rayjob_state import state_of

_NODE_ANNOTATION = "workflows.argoproj.io/node-name"
_NODE_SUFFIX = re.compile(r"\(\d+\)$")


@dataclass(frozen=True)
class Orphan:
    """A RayJob without a launcher."""

    name: str
    run: str
    step: str
    state: str
    silent_seconds: float  # since its launcher last renewed it
    settings: tuple[str, ...]  # `a.b=value`, of its command; the first one is `storage.root`
    kfp_run: str  # KFP's identifier of the run that started it; empty without one
    pipeline_ended: bool  # it still runs, and its pipeline run has ended or is being ended
    finished: bool

    def describe(self) -> str:
        """One line: what it is, and why it is abandoned."""
        seconds, minutes = self.silent_seconds, round(self.silent_seconds / 60)
        silence = f"{seconds:.0f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60} min"
        why = "its pipeline run has ended" if self.pipeline_ended else f"no sign of its launcher for {silence}"
        return f"{self.name}: run {self.run}, step {self.step}, {self.state}, {why}"


def find_orphans(
    api: KubernetesApi, *, older_than: float, run: str | None = None, running: bool = False
) -> list[Orphan]:
    """RayJobs whose launcher has been silent for `older_than` seconds, or whose pipeline run has ended.

    With 0 seconds also those with a living launcher; with `run` only those of this run, and with `running` only those
    that still run.
    """
    now = datetime.now(UTC)
    rayjobs = api.list_rayjobs(selector(run=run))
    found = [_orphan(api, each, now) for each in rayjobs if not (running and state_of(each).finished)]
    return [orphan for orphan in found if orphan.pipeline_ended or orphan.silent_seconds >= older_than]


def _orphan(api: KubernetesApi, rayjob: Resource, now: datetime) -> Orphan:
    metadata, state, workflow = rayjob["metadata"], state_of(rayjob), workflow_of(rayjob)
    last = metadata.get("annotations", {}).get(RENEWED_ANNOTATION) or metadata["creationTimestamp"]
    labels = metadata.get("labels", {})
    words = shlex.split(rayjob.get("spec", {}).get("entrypoint", ""))
    return Orphan(
        name=metadata["name"],
        run=labels.get(RUN_LABEL, ""),
        step=labels.get(STEP_LABEL, ""),
        state=state.describe(),
        silent_seconds=max(0.0, (now - datetime.fromisoformat(last)).total_seconds()),
        settings=tuple(value for option, value in pairwise(words) if option == "--set"),
        kfp_run=labels.get(KFP_RUN_LABEL, ""),
        # One that has failed stays for inspection.
        pipeline_ended=workflow is not None and not state.finished and is_ending(api.workflow(workflow)),
        finished=state.finished,
    )


@dataclass(frozen=True)
class NotedRun(KfpRun):
    """A pipeline run that a task noted: the run in the store, and the experiment as canonical JSON."""

    run: str
    config: str


def note_run(api: KubernetesApi, noted: NotedRun) -> None:
    """Note the run until `forget_run`. The note of its first task stays."""
    labels = {MANAGED_BY: "ncsn", KFP_RUN_LABEL: noted.id, "app.kubernetes.io/part-of": "ncsn"}
    data = {"workflow": noted.workflow, "run": noted.run, "config": noted.config}
    with suppress(Conflict):
        api.create_config_map({"metadata": {"name": _note(noted), "labels": labels}, "data": data})


def noted_runs(api: KubernetesApi) -> list[NotedRun]:
    """The runs that are not closed yet."""
    listed = api.config_maps(f"{MANAGED_BY}=ncsn,{KFP_RUN_LABEL}")
    return [NotedRun(id=each["metadata"]["labels"][KFP_RUN_LABEL], **each["data"]) for each in listed]


def forget_run(api: KubernetesApi, noted: KfpRun) -> None:
    """Remove the note: the run is closed."""
    api.delete_config_map(_note(noted))


def state_of_run(workflow: Resource | None) -> str:
    """How an ended Workflow ended: CANCELED, SUCCEEDED or FAILED."""
    if workflow is None or was_stopped(workflow):
        return "CANCELED"
    return "SUCCEEDED" if workflow.get("status", {}).get("phase") == "Succeeded" else "FAILED"


def has_workflow(api: KubernetesApi, run_id: str) -> bool:
    """Whether the cluster has the run's Workflow. KFP still says RUNNING after it was deleted."""
    return bool(api.workflows(f"{RUN_ID_LABEL}={run_id}"))


def troubles_of_run(api: KubernetesApi, run_id: str, *, pending: bool = False) -> Mapping[str, Trouble]:
    """Task of KFP's run -> what keeps its last pod from running, or ended it; `pending`: only what has not started."""
    found = {}
    for task, pod in {_task_of(pod): pod for pod in api.pods(f"{RUN_ID_LABEL}={run_id}")}.items():
        if task and (not pending or pod["status"].get("phase") == "Pending"):
            found[task] = trouble_of(pod, api.events(pod["metadata"]["name"]))
    return {task: trouble for task, trouble in found.items() if trouble is not None}


def _task_of(pod: Resource) -> str:
    """The pipeline's name of the task that the pod executes; empty for a driver of KFP."""
    annotations: dict[str, Any] = pod["metadata"].get("annotations") or {}
    *path, last = [_NODE_SUFFIX.sub("", part) for part in annotations.get(_NODE_ANNOTATION, "").split(".")]
    return path[-1] if path and last == "executor" else ""


def _note(run: KfpRun) -> str:
    return f"ncsn-run-{run.id}"
