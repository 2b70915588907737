"""Who starts the job: a pod of a Kubeflow pipeline, or a person."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ncsn.cluster.rayjob_manifest import KFP_RUN_LABEL

if TYPE_CHECKING:
    from ncsn.cluster.api import KubernetesApi

_POD_VARIABLE = "KFP_POD_NAME"
_KFP_RUN_POD_LABEL = "pipeline/runid"
# What joins the steps to an MLflow run that KFP opened. Addresses and names; a token is in the Secret of the Ray pods.
_FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_AUTH",
    "NCSN_KFP_RUN_ID",
)
_LOOPBACK = re.compile(r"https?://(localhost|127(\.\d+){3}|\[::1\])(:|/|$)")


@dataclass(frozen=True)
class Launcher:
    """What a RayJob takes over from the pod that starts it.

    Attributes:
        image: Image of the pod, or None.
        workflow: Name of the pod's Argo Workflow, or None.
        owner: Owner reference to it, so that the RayJob goes when the Workflow does; None from another namespace.
        labels: Labels for the RayJob.
    """

    image: str | None = None
    workflow: str | None = None
    owner: dict[str, Any] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def is_told_to_end(self, home: KubernetesApi) -> bool:
        """Whether SIGTERM means the work and not only this process.

        KFP's Terminate and the eviction of a pod send the same signal. Only the Workflow tells them apart, and an
        evicted pod is started again, where it attaches to the work. Without a Workflow somebody stopped this process.

        Args:
            home: The namespace of this pod, without patience.
        """
        if self.workflow is None:
            return True
        try:
            return is_ending(home.workflow(self.workflow))
        except (ConnectionError, PermissionError, ValueError):
            return False


def find_launcher(api: KubernetesApi) -> Launcher:
    """What is known of this pod; nothing where KFP did not start this process.

    Args:
        api: The namespace of the RayJobs.
    """
    name, at_home = os.environ.get(_POD_VARIABLE), api.namespace == api.own_namespace
    pod = (api if at_home else type(api)(api.own_namespace)).pod(name) if name else None
    if pod is None:
        return Launcher()
    owners = [owner for owner in pod["metadata"].get("ownerReferences", []) if owner["kind"] == "Workflow"]
    images = [container["image"] for container in pod["spec"]["containers"] if container["name"] == "main"]
    run = pod["metadata"].get("labels", {}).get(_KFP_RUN_POD_LABEL)
    return Launcher(
        image=images[0] if images else None,
        workflow=owners[0]["name"] if owners else None,
        owner=_owner(owners[0]) if owners and at_home else None,
        labels={KFP_RUN_LABEL: run} if run else {},
    )


def is_ending(workflow: dict[str, Any] | None) -> bool:
    """Whether an Argo Workflow has ended, or somebody is ending it; one that is gone has ended.

    KFP's Terminate sets `spec.activeDeadlineSeconds` to 0, Argo's own stop and terminate set `spec.shutdown`.
    """
    if workflow is None:
        return True
    spec, phase = workflow.get("spec", {}), workflow.get("status", {}).get("phase", "")
    over = phase in {"Succeeded", "Failed", "Error"} or "deletionTimestamp" in workflow["metadata"]
    return over or spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def forwarded_environment() -> dict[str, str]:
    """Variables of this process that the job needs. An address with a password in it is not among them."""
    values = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    return {name: value for name, value in values.items() if "@" not in value}


def environment_for_pods() -> dict[str, str]:
    """The same without addresses of this machine: a port-forward leads nowhere from a pod, which has a ConfigMap."""
    return {name: value for name, value in forwarded_environment().items() if not _LOOPBACK.match(value)}


def _owner(reference: dict[str, Any]) -> dict[str, Any]:
    named = {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
    # Blocking needs a right on the Workflow's finalizers that the launcher does not have.
    return named | {"controller": False, "blockOwnerDeletion": False}
