"""What a process knows and decides about itself: memory, garbage, the job it belongs to.

Ray hands the metadata of a submitted job to its driver in an environment variable.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import platform
import sys
from contextlib import suppress
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


_ALLOCATIONS = 50_000
"""New objects after which Python looks for cycles among the youngest; its own choice is 700."""


def collect_seldom() -> None:
    """Call before the heavy imports: torch and MLflow make half a million objects, and none of them is garbage.

    With Python's settings it looks through them again and again while they are made, for 0.2 s, and at the end three
    times, for a second.
    """
    gc.set_threshold(_ALLOCATIONS, 10, 10)
    atexit.register(_skip_the_last_collections)


def _skip_the_last_collections() -> None:
    # Triton's bindings print every object that outlives the interpreter, hundreds of lines, so they are collected.
    if "triton" not in sys.modules:
        gc.freeze()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_GIB = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation instead of giving it back to the system.

    Training, sampling and evaluation on a CPU free and take the same feature maps again and again; each time the system
    had to map and clear them anew, which took 7 % of the time of a training, a third of that of sampling and half of
    that of a classifier's features. A process without glibc is left as it is.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
