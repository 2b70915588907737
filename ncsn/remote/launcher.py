"""What a RayJob takes over from the pod that starts it, and the Argo Workflow of that pod."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ncsn.errors import UserError
from ncsn.remote.kubernetes import KubernetesApi, Resource
from ncsn.remote.manifest import KFP_RUN_LABEL

RUN_ID_LABEL = "pipeline/runid"  # KFP's, of a run's Workflow and of its pods

_ENDED = {"Succeeded", "Failed", "Error"}


@dataclass(frozen=True)
class Launcher:
    """Empty outside of KFP."""

    image: str | None = None
    workflow: str | None = None  # name of the pod's Argo Workflow
    owner: Resource | None = None  # reference to it, which deletes the RayJob with it; not across namespaces
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_told_to_end(self, home: KubernetesApi) -> bool:
        """Whether SIGTERM means the work, and not only this process.

        KFP's Terminate and the eviction of a pod send the same signal. Only the Workflow tells them apart, and an
        evicted pod is started again and attaches to the work. Without a Workflow a person stopped this process.
        """
        if self.workflow is None:
            return True
        try:
            return is_ending(home.get("workflows", self.workflow))
        except (ConnectionError, PermissionError, UserError):
            return False


def find_launcher(api: KubernetesApi) -> Launcher:
    """What is known of the pod of this process. `api` is for the namespace of the RayJobs."""
    name, at_home = os.environ.get("KFP_POD_NAME"), api.namespace == api.own_namespace
    pod = (api if at_home else KubernetesApi(api.own_namespace)).get("pods", name) if name else None
    if pod is None:
        return Launcher()
    owner, run = _owner(pod), pod["metadata"].get("labels", {}).get(RUN_ID_LABEL)
    # Blocking needs a right on the Workflow's finalizers that the launcher does not have.
    reference = owner | {"controller": False, "blockOwnerDeletion": False} if owner and at_home else None
    images = (container["image"] for container in pod["spec"]["containers"] if container["name"] == "main")
    labels = {KFP_RUN_LABEL: run} if run else {}
    return Launcher(image=next(images, None), workflow=owner.get("name"), owner=reference, labels=labels)


def workflow_of(owned: Resource) -> str | None:
    """Name of the Argo Workflow that owns it."""
    return _owner(owned).get("name")


def was_stopped(workflow: Resource | None) -> bool:
    """Whether a person ended the Workflow, or deleted it.

    KFP's Terminate sets `spec.activeDeadlineSeconds` to 0, Argo's own stop and terminate set `spec.shutdown`.
    """
    if workflow is None or "deletionTimestamp" in workflow["metadata"]:
        return True
    spec = workflow.get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def is_over(workflow: Resource | None) -> bool:
    """Whether no pod of the Workflow still runs."""
    return workflow is None or workflow.get("status", {}).get("phase") in _ENDED


def is_ending(workflow: Resource | None) -> bool:
    """Whether the Workflow has ended or is being ended; one that is gone has ended."""
    return is_over(workflow) or was_stopped(workflow)


def _owner(owned: Resource) -> Resource:
    """The reference to the Workflow that owns it; empty without."""
    owners = owned["metadata"].get("ownerReferences", [])
    return next((owner for owner in owners if owner["kind"] == "Workflow"), {})
