"""Where a step computes, and on how much of which machine. Changes speed, not results."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ncsn.config.choices import Section
from ncsn.errors import UserError

MOST_WORKERS = 4096
LEAST_MEMORY = "4Gi"
"""Memory of a worker where neither the user nor an estimate asks for more."""

_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(Mi|Gi|Ti|M|G|T)")
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def bytes_of(quantity: str) -> float:
    """Bytes of an amount of memory such as 512Mi."""
    number = quantity.rstrip("MGTi")
    return float(number) * _UNITS[quantity.removeprefix(number)]


class Toleration(Section):
    """A node taint that the worker pods put up with."""

    key: str = Field(min_length=1, description="Key of the taint, for example nvidia.com/gpu.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Whether the value is compared too.")
    value: str | None = Field(None, description="Value of the taint, for operator: Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; null = every effect."
    )


class KubeRayConfig(Section):
    """How a step becomes a RayJob, for compute.backend: kuberay."""

    namespace: str | None = Field(
        None, description="Namespace of the RayJobs; null = that of this pod, or of the current kubeconfig context."
    )
    image: str | None = Field(
        None, description="Image of every pod; null = that of this pod, else NCSN_IMAGE, which then must be set."
    )
    queue: str | None = Field(None, min_length=1, description="Kueue's LocalQueue that admits the RayJob; null = none.")
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes for the worker pods.")
    tolerations: tuple[Toleration, ...] = Field((), description="Node taints that the worker pods put up with.")
    workers_per_pod: int = Field(
        1,
        ge=1,
        le=64,
        description="Workers that share a pod, which has so many times the CPUs, the memory, /dev/shm and the GPUs of "
        "one. Set it to the GPUs of a node: workers of different pods cannot use NVLink. compute.num_workers must be a "
        "multiple, and so must both ends of its range.",
    )
    memory_per_worker: str | None = Field(
        None,
        description="Memory for each worker, /dev/shm included, such as 512Mi or 8Gi; null = an estimate from the "
        f"network, the batch and the extractor, at least {LEAST_MEMORY}.",
    )
    shm_per_worker: str = Field("1Gi", description="Part of /dev/shm for each worker: Ray's object store.")
    head_cpus: int | None = Field(
        None, ge=1, le=1024, description="CPU cores of the head pod, where the driver runs; null = the template's 2."
    )
    head_memory: str | None = Field(None, description="Memory of the head pod; null = the template's 6Gi.")
    max_start_minutes: float = Field(
        30.0, gt=0, le=10080, description="Minutes in which the cluster must start, once admitted by its queue."
    )
    max_hours: float = Field(
        24.0, gt=0, le=8760, description="Hours after which the step is stopped, whatever it does."
    )
    keep_failed_minutes: float = Field(
        10.0, ge=1, le=10080, description="Minutes for which the head of a failed RayJob stays, to be looked at."
    )

    @field_validator("memory_per_worker", "shm_per_worker", "head_memory")
    @classmethod
    def _is_quantity(cls, value: str | None) -> str | None:
        if value is not None and not _QUANTITY.fullmatch(value):
            raise UserError("", "not an amount of memory", hint="write for example 512Mi or 8Gi", value=value)
        return value


class RayJobsConfig(Section):
    """Which cluster a step is submitted to, for compute.backend: ray-jobs."""

    address: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="URL of the cluster's dashboard, such as http://head:8265; null = RAY_API_SERVER_ADDRESS or "
        "RAY_ADDRESS. The token comes from the environment.",
    )


class ComputeConfig(Section):
    """How much of which machine. Changes speed, not results."""

    backend: Literal["local", "ray-jobs", "kuberay"] = Field(
        "local",
        description="Where tune, train, sample and evaluate run: local = in this process, on a Ray cluster that it "
        "starts or joins through RAY_ADDRESS; ray-jobs = as a job on a Ray cluster that is there already; kuberay = as "
        "a RayJob on Kubernetes. Elsewhere storage.root must be in S3, or for ray-jobs a folder that the cluster "
        "shares.",
    )
    num_workers: int | tuple[int, int] = Field(
        1,
        description="Ray Train workers, 1 to 4096, and Ray tasks at a time when sampling. [min, max] = elastic: "
        "training starts with as many as there is room for, goes on with fewer when a node is lost, and grows again; "
        "the result is the same but for rounding. Trials of a search take min.",
    )
    cpus_per_worker: int = Field(1, ge=1, le=1024, description="CPU cores (and torch threads) per worker.")
    use_gpu: bool = Field(False, description="One GPU per worker.")
    microbatch: int | None = Field(
        None,
        ge=1,
        description="Images that a worker puts through the network at once; the gradients of its share of "
        "train.batch_size add up. null = the whole share. Less memory, the same result but for rounding.",
    )
    channels_last: bool = Field(
        False, description="Keep images and weights in channels-last order, which convolutions on GPUs like."
    )
    compile: bool = Field(
        False,
        description="Compile the network when training starts (torch.compile): minutes once, faster steps. Needs a C++ "
        "compiler on the workers. Checkpoints are the same.",
    )
    max_failures: int = Field(
        3, ge=0, description="Times that a lost worker or node restarts the group from its last checkpoint."
    )
    ray_jobs: RayJobsConfig = RayJobsConfig()
    kuberay: KubeRayConfig = KubeRayConfig()

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_number_or_range(cls, value: Any) -> Any:
        counts = list(value) if isinstance(value, list | tuple) else [value, value]
        if (
            not all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
            or len(counts) != 2
            or not 1 <= counts[0] <= counts[1] <= MOST_WORKERS
        ):
            raise UserError("", f"neither a number from 1 to {MOST_WORKERS} nor [min, max] of two such", value=value)
        return value

    @model_validator(mode="after")
    def _fills_pods(self) -> ComputeConfig:
        size = self.kuberay.workers_per_pod
        for count in (self.min_workers, self.max_workers) if self.backend == "kuberay" else ():
            if count % size:
                raise UserError(
                    "num_workers",
                    f"{count} workers with kuberay.workers_per_pod = {size} would be {count / size:g} pods",
                    hint=f"use a multiple of {size}, or set kuberay.workers_per_pod to a divisor of {count}",
                    value=self.num_workers if isinstance(self.num_workers, int) else list(self.num_workers),
                )
        return self

    @property
    def elastic(self) -> bool:
        """Whether the number of training's workers may change."""
        return not isinstance(self.num_workers, int)

    @property
    def min_workers(self) -> int:
        """Workers that training cannot do without."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that work where there is room for them."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def min_pods(self) -> int:
        """Worker pods of a RayJob that training cannot do without."""
        return self.min_workers // self.kuberay.workers_per_pod

    @property
    def max_pods(self) -> int:
        """Worker pods of a RayJob."""
        return self.max_workers // self.kuberay.workers_per_pod
