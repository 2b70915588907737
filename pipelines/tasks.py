"""What every task of every pipeline has: a title, a rule for KFP's cache, the cluster's addresses and secrets."""

from __future__ import annotations

from kfp import dsl, kubernetes

from components import IMAGE
from ncsn.process import IMAGE_VARIABLE, KFP_RUN_ID, KFP_WORKFLOW

ENVIRONMENT = "ncsn-environment"  # ConfigMap with addresses, in the namespace of the runs
ADDRESSES = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "NCSN_KFP_UI",
    "NCSN_MLFLOW_UI",
    "NCSN_RAYJOB_TEMPLATE",
)
CREDENTIALS = "ncsn-credentials"  # Secret, in the namespace of the runs
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)


def configure_task(task: dsl.PipelineTask, *, title: str, cached: bool) -> dsl.PipelineTask:
    """Configure a task for a cluster; the same task.

    `cached` lets KFP take its outputs from an earlier run with the same arguments, artifacts and image.
    """
    task.set_display_name(title)
    task.set_caching_options(cached)
    task.set_env_variable(IMAGE_VARIABLE, IMAGE)
    kubernetes.use_config_map_as_env(task, ENVIRONMENT, {name: name for name in ADDRESSES}, optional=True)
    kubernetes.use_secret_as_env(task, CREDENTIALS, {name: name for name in SECRETS}, optional=True)
    # Not arguments, which would give every run another cache key.
    for variable, label in ((KFP_RUN_ID, "pipeline/runid"), (KFP_WORKFLOW, "workflows.argoproj.io/workflow")):
        kubernetes.use_field_path_as_env(task, env_name=variable, field_path=f"metadata.labels['{label}']")
    return task
