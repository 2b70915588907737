"""This process: its collector of garbage, memory and threads, and its variables, KFP run, Ray job and the time."""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ncsn.errors import UserError

IMAGE_VARIABLE = "NCSN_IMAGE"  # variable with the image for pods that are to be started
WORKER_MEMORY = "NCSN_WORKER_MEMORY"  # variable with compute.kuberay.memory_per_worker, where it cannot be estimated
CONTAINER_IMAGE = "NCSN_CONTAINER_IMAGE"  # variable with the image of this pod, in the pods of a RayJob
RAY_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # with the dashboard of a Ray cluster, the first wins
CODE = "NCSN_CODE"  # variable with the URI of the archive that this process's code comes from, see `ncsn.runs.code`
DASHBOARD = "NCSN_DASHBOARD"  # variable that asks for the dashboard of a Ray cluster that is started on this machine
KFP_RUN_ID = "NCSN_KFP_RUN_ID"  # variable with the id of the pipeline run, in all pods of a cluster
RUN_ID_LABEL = "pipeline/runid"  # KFP's, of a run's Workflow and of its pods
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # Kubernetes mounts it
KFP_WORKFLOW = "NCSN_KFP_WORKFLOW"  # variable with its Argo Workflow, only in the pods of its tasks
BackendName = Literal["local", "ray-jobs", "kuberay"]  # here for --help, which does not load the config
PYTHON = "ncsn.python"  # key of the launcher's Python version in the metadata of a Ray job

if not Path(__file__).with_name("code.json").is_file():  # from no archive, whatever the variables of a pod say
    os.environ.pop(CODE, None)

_ALLOCATIONS = 50_000  # new objects until the youngest are searched for cycles; Python's default is 700
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_GIB = 2**30


def _leave() -> None:
    gc.freeze()
    if "triton" in sys.modules:  # its bindings print each object that outlives the interpreter, hundreds of lines
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def reduce_gc() -> None:
    """Collect garbage less often, and not at exit; for a process that is about to import torch or MLflow."""
    # Their imports make half a million objects, none of which is garbage. With Python's defaults the collector
    # searches them for 0.2 s during the imports and for two seconds at exit.
    gc.set_threshold(_ALLOCATIONS, 10, 10)
    atexit.register(_leave)


def settle() -> None:
    """Let operations' threads spin for a shorter time and glibc keep freed memory; for a process that is ncsn's own."""
    # The threads of an operation wait for each other by spinning, for milliseconds. Beside other programs they kept
    # from working whom they waited for: a small network took 100 times as long. Read when torch is loaded.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"
    # On a CPU, training, sampling and evaluation free and allocate the same feature maps again and again. To map and
    # clear them each time took 7 % of the time of training, a third of sampling and half of a classifier's features.
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _GIB)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)


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
        hint = "use one image or environment for both; `ncsn doctor` shows the launcher's"
        raise UserError("Python", f"the cluster has {here}, but the launcher {there}", hint=hint)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
