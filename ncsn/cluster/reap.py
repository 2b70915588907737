"""Deletes RayJobs for which nobody waits any more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from ncsn.cluster.api import KubernetesApi, Resource
from ncsn.cluster.job_state import state_of
from ncsn.cluster.rayjob_manifest import MANAGED_BY, RENEWED_ANNOTATION, RUN_LABEL, STEP_LABEL


@dataclass(frozen=True)
class Orphan:
    """A RayJob without a launcher.

    Attributes:
        name: Its name.
        run: Name of the run.
        step: Name of the step.
        state: What it is doing.
        silent_seconds: Since its launcher gave the last sign of life.
    """

    name: str
    run: str
    step: str
    state: str
    silent_seconds: float


def find_orphans(
    api: KubernetesApi, *, older_than: float, run: str | None = None, at_work: bool = False
) -> list[Orphan]:
    """RayJobs of ncsn whose launcher has been silent for `older_than` seconds, in the namespace of `api`.

    Args:
        api: The cluster.
        older_than: Seconds; 0 takes those with a living launcher too.
        run: Only those of this run.
        at_work: Only those that have not ended.
    """
    labels = f"{MANAGED_BY}=ncsn" + (f",{RUN_LABEL}={run}" if run else "")
    now = datetime.now(UTC)
    rayjobs = [each for each in api.list_rayjobs(labels) if not (at_work and state_of(each).finished)]
    found = [_orphan(rayjob, now) for rayjob in rayjobs]
    return [orphan for orphan in found if orphan.silent_seconds >= older_than]


def reap(api: KubernetesApi, *, older_than: float, run: str | None = None, at_work: bool = False) -> list[Orphan]:
    """Delete what `find_orphans` finds; the deleted."""
    orphans = find_orphans(api, older_than=older_than, run=run, at_work=at_work)
    for orphan in orphans:
        api.delete_rayjob(orphan.name)
    return orphans


def _orphan(rayjob: Resource, now: datetime) -> Orphan:
    metadata = rayjob["metadata"]
    last = metadata.get("annotations", {}).get(RENEWED_ANNOTATION) or metadata["creationTimestamp"]
    labels = metadata.get("labels", {})
    return Orphan(
        name=metadata["name"],
        run=labels.get(RUN_LABEL, ""),
        step=labels.get(STEP_LABEL, ""),
        state=state_of(rayjob).describe(),
        silent_seconds=max(0.0, (now - datetime.fromisoformat(last)).total_seconds()),
    )
