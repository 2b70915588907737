"""The environment of this process: its variables by name, and the KFP run that they tell of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

if not Path(__file__).with_name("code.json").is_file():  # from no archive, whatever the variables of a pod say
    os.environ.pop(CODE, None)


@dataclass(frozen=True)
class KfpRun:
    """A pipeline run on a cluster: KFP's id and the Argo Workflow that executes it."""

    id: str
    workflow: str


def this_kfp_run() -> KfpRun | None:
    """The pipeline run that this process is a task of, or None outside a cluster."""
    run_id, workflow = os.environ.get(KFP_RUN_ID), os.environ.get(KFP_WORKFLOW)
    return KfpRun(run_id, workflow) if run_id and workflow else None
