"""Sizes and retries of the pods of a compiled pipeline.

They are not set on the tasks: `kfp.local`, which runs the same pipelines on one machine, knows no sizes and would retry
a mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ncsn.config import Config
from ncsn.config.compute import ComputeConfig, bytes_of
from ncsn.remote.manifest import GPU

# For pods that are evicted or lost. KFP leaves it to Argo's configuration what else is retried; a mistake, which the
# task finds recorded, costs seconds.
RETRIES = {
    "maxRetryCount": 2,
    "backoffDuration": "10s",
    "backoffFactor": 2.0,
    # Argo counts from the start of the first try, and the next may take no longer: above compute.kuberay.max_hours.
    "backoffMaxDuration": "34560000s",
}


@dataclass(frozen=True)
class Size:
    """What one pod asks for and may use."""

    request: tuple[str, str]  # CPUs, memory
    limit: tuple[str, str]
    gpus: int = 0

    def as_resources(self) -> dict[str, Any]:
        """The form of a KFP container's spec."""
        resources: dict[str, Any] = {
            "resourceCpuRequest": self.request[0],
            "resourceMemoryRequest": self.request[1],
            "resourceCpuLimit": self.limit[0],
            "resourceMemoryLimit": self.limit[1],
        }
        if self.gpus:
            resources["accelerator"] = {"resourceType": GPU, "resourceCount": str(self.gpus)}
        return resources


# Of tasks that always work in their own pods.
SIZES = {
    "ingest": Size(("500m", "1Gi"), ("4", "8Gi")),
    "register": Size(("200m", "1Gi"), ("2", "4Gi")),
    "report": Size(("200m", "1Gi"), ("2", "4Gi")),
    "finish": Size(("100m", "512Mi"), ("1", "2Gi")),
}
# Of a task that waits for the cluster that does its step, or has nothing to search.
LAUNCHER = Size(("100m", "512Mi"), ("1", "2Gi"))
# Of a task that may work in its own pod, by a config that is not known yet.
UNKNOWN = Size(("1", "2Gi"), ("8", "16Gi"))
REFERENCE_IMAGES = 50_000  # of a dataset that is not ingested yet: as many as the larger published ones have


def fit(spec: dict[str, Any], platforms: Sequence[dict[str, Any]], config: Config | None) -> None:
    """Set size and retries of every task of a compiled pipeline, in place.

    `platforms` are its documents for Kubernetes, if any; `config` is the experiment, None if it is not known yet.
    """
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                task["retryPolicy"] = dict(RETRIES)
    for component in spec["components"].values():
        if "executorLabel" not in component:
            continue
        label = component["executorLabel"]
        container = spec["deploymentSpec"]["executors"][label]["container"]
        step = label.removeprefix("exec-")
        container["resources"] = (SIZES.get(step) or _size(step, config)).as_resources()
        if step not in SIZES and config is not None and config.compute.backend == "local":
            # The task's own pod computes: it goes where the config wants the workers, and passes nothing on.
            component.pop("taskConfigPassthroughs", None)
            for platform in platforms:
                _place(platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][label], config.compute)


def _size(step: str, config: Config | None) -> Size:
    if config is None:
        return UNKNOWN
    compute, idle = config.compute, step == "tune" and config.search is None
    if idle or compute.backend != "local":
        return LAUNCHER
    from ncsn.model.memory import worker_memory

    # One CPU and 2 GiB more, for the driver, Ray and MLflow's client.
    workers, given = compute.max_workers, compute.kuberay.memory_per_worker
    memory = bytes_of(given) if given else worker_memory(config, step, reference_images=REFERENCE_IMAGES)
    amount = (str(workers * compute.cpus_per_worker + 1), f"{round(workers * memory / 2**20) + 2048}Mi")
    return Size(amount, amount, gpus=workers if compute.use_gpu else 0)


def _place(executor: dict[str, Any], compute: ComputeConfig) -> None:
    settings = compute.kuberay
    if settings.node_selector:
        executor["nodeSelector"] = {"labels": dict(settings.node_selector)}
    if settings.tolerations:
        executor["tolerations"] = list(settings.tolerations)
