"""Deletes RayJobs for which nobody waits any more: their launcher is silent, or their pipeline run has ended."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime

from ncsn.cluster.api import KubernetesApi, Resource
from ncsn.cluster.job_state import state_of
from ncsn.cluster.launcher import is_ending
from ncsn.cluster.rayjob_manifest import KFP_RUN_LABEL, MANAGED_BY, RENEWED_ANNOTATION, RUN_LABEL, STEP_LABEL


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
