"""What this process finds around it: its variables, its KFP run, its Ray job and the time."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ncsn.errors import UserError

IMAGE_VARIABLE = "NCSN_IMAGE"  # variable with the image for pods that are to be started
WORKER_MEMORY = "NCSN_WORKER_MEMORY"  # variable with compute.kuberay.memory_per_worker, where it cannot be estimated
CONTAINER_IMAGE = "NCSN_CONTAINER_IMAGE"  # variable with the image of this pod, in the pods of a RayJob
CODE = "NCSN_CODE"  # variable with the URI of the archive that this process's code comes from, see `ncsn.runs.code`
KFP_RUN_ID = "NCSN_KFP_RUN_ID"  # variable with the id of the pipeline run, in all pods of a cluster
RUN_ID_LABEL = "pipeline/runid"  # KFP's, of a run's Workflow and of its pods
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # Kubernetes mounts it
KFP_WORKFLOW = "NCSN_KFP_WORKFLOW"  # variable with its Argo Workflow, only in the pods of its tasks
BackendName = Literal["local", "ray-jobs", "kuberay"]  # here for --help, which does not load the config
PYTHON = "ncsn.python"  # key of the launcher's Python version in the metadata of a Ray job


@dataclass(frozen=True)
class KfpRun:
    """A pipeline run on a cluster: KFP's id and the Argo Workflow that executes it."""

    id: str
    workflow: str


def this_kfp_run() -> KfpRun | None:
    """The pipeline run that this process is a task of, or None outside a cluster."""
    run_id, workflow = os.environ.get(KFP_RUN_ID), os.environ.get(KFP_WORKFLOW)
    return KfpRun(run_id, workflow) if run_id and workflow else None


def job_config() -> dict[str, Any]:
    """Ray's JSON about the Ray job that this process drives; empty for other processes."""
    found: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return found


def python_version() -> str:
    """Python's version as it must be the same for a launcher and its cluster."""
    return ".".join(platform.python_version_tuple()[:2])


def require_same_python() -> None:
    """Raise `UserError` if the launcher of this Ray job has another Python."""
    # Ray does not check it, and fails later where something cannot be unpickled.
    here = python_version()
    there = job_config().get("metadata", {}).get(PYTHON, here)
    if there != here:
        raise UserError(
            "Python",
            f"the cluster has {here}, but the launcher {there}",
            hint="use one image or environment for both; `ncsn doctor` shows the launcher's",
        )


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
