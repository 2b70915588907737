"""What a process is told by whoever started it: a pipeline of its run, a launcher of the job.

Ray hands the metadata of a submitted job to its driver in an environment variable.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass

from ncsn.errors import UserError

KFP_RUN_ID = "NCSN_KFP_RUN_ID"
"""Variable with the id of the pipeline run, in the pods of a cluster."""
KFP_WORKFLOW = "NCSN_KFP_WORKFLOW"
"""Variable with the name of the Argo Workflow that executes it, in the pods of its tasks alone."""
PYTHON = "ncsn.python"
"""Key of the launcher's Python version in the metadata of a job."""


@dataclass(frozen=True)
class KfpRun:
    """One run of a pipeline on a cluster.

    Attributes:
        id: KFP's identifier.
        workflow: The Argo Workflow that executes it.
    """

    id: str
    workflow: str


def this_kfp_run() -> KfpRun | None:
    """The pipeline run that this process is a task of; None outside of a cluster."""
    run_id, workflow = os.environ.get(KFP_RUN_ID), os.environ.get(KFP_WORKFLOW)
    return KfpRun(run_id, workflow) if run_id and workflow else None


def job_metadata() -> dict[str, str]:
    """The metadata of the Ray job whose driver this process is; empty if it was not submitted by the Jobs API."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return {key: str(value) for key, value in metadata.items()}


def python_version() -> str:
    """The part of Python's version that must not differ between a launcher and its cluster."""
    return ".".join(platform.python_version_tuple()[:2])


def require_launchers_python() -> None:
    """Refuse to work for a launcher with another Python; Ray says nothing of it until something cannot be unpickled.

    Raises:
        UserError: naming both versions.
    """
    here = python_version()
    there = job_metadata().get(PYTHON, here)
    if there != here:
        raise UserError(
            "Python",
            f"the cluster has {here} and the launcher {there}",
            hint="use one image or environment for both; `ncsn doctor` shows that of the launcher",
        )
