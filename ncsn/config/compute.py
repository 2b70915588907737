"""Where a step runs, and on how many workers. Changes speed, not results."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from ncsn.config.choices import Section, matching
from ncsn.environment import BackendName
from ncsn.errors import UserError

MOST_WORKERS = 4096
LEAST_MEMORY = "4Gi"  # of a worker, unless the user or an estimate asks for more

Choice = Literal["auto", True, False]  # auto: with a GPU

_is_quantity = partial(
    matching,
    pattern=r"[1-9][0-9]*(\.[0-9]+)?(Mi|Gi|Ti|M|G|T)",
    reason="not an amount of memory",
    hint="use an amount such as 512Mi or 8Gi",
)
Quantity = Annotated[str, AfterValidator(_is_quantity)]
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def bytes_of(quantity: str) -> float:
    """Bytes of an amount of memory, for example 512Mi."""
    number = quantity.rstrip("MGTi")
    return float(number) * _UNITS[quantity.removeprefix(number)]


class KubeRayConfig(Section):
    """The RayJob of a step, for compute.backend: kuberay."""

    namespace: str | None = None
    """Namespace of the RayJobs; null = this pod's, or that of the current kubeconfig context."""
    image: str | None = None
    """Image of all pods; null = that of NCSN_IMAGE, which a task of a pipeline has, or this pod's."""
    queue: str | None = Field(None, min_length=1)
    """Kueue LocalQueue that admits the RayJobs; null = none."""
    priority_class: str | None = Field(None, min_length=1)
    """PriorityClass of all pods, by which Kueue and the scheduler decide who waits and who is preempted; null = the
    cluster's default."""
    node_selector: dict[str, str] = Field({})
    """Labels of the nodes that worker pods run on."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Tolerations of the worker pods, as Kubernetes has them: key, operator, value, effect."""
    workers_per_pod: int = Field(1, ge=1, le=64)
    """Workers per pod; each adds its CPUs, memory, /dev/shm and GPU to the pod. Use the number of GPUs in a node, since
    workers in different pods cannot use NVLink. compute.num_workers, or both ends of its range, must be a multiple."""
    memory_per_worker: Quantity | None = None
    """Memory of each worker, including its /dev/shm, for example 512Mi or 8Gi; null = an estimate from network, batch
    and extractor, at least 4Gi."""
    head_cpus: int | None = Field(None, ge=1, le=1024)
    """CPU cores of the head pod, which runs the driver; null = 2, as in the template."""
    head_memory: Quantity | None = None
    """Memory of the head pod; null = 6Gi, as in the template."""
    max_start_minutes: float = Field(30.0, gt=0, le=10080)
    """Minutes that the cluster may take to start, counted from its admission by the queue."""
    max_hours: float = Field(24.0, gt=0, le=8760)
    """Hours after which the step is stopped, finished or not."""


class RayJobsConfig(Section):
    """The Ray cluster that a step is submitted to, for compute.backend: ray-jobs."""

    address: str | None = Field(None, pattern=r"^https?://[^\s@]+$")
    """URL of the cluster's dashboard, for example http://head:8265; null = RAY_API_SERVER_ADDRESS or RAY_ADDRESS. The
    token comes from the environment."""


class ComputeConfig(Section):
    """Where steps run, and on how many workers. Changes speed, not results."""

    backend: BackendName = "local"
    """Where search, train, select, sample and evaluate run: local = in this process, on a Ray cluster that it starts
    or, with RAY_ADDRESS, joins; ray-jobs = as a job on an existing Ray cluster; kuberay = as a RayJob on Kubernetes.
    The last two need storage.root in S3; for ray-jobs a folder that the cluster shares works too."""
    num_workers: int | tuple[int, int] = 1
    """Number of Ray Train workers, 1 to 4096, and of concurrent Ray tasks for sampling. [min, max] = elastic: training
    starts with as many workers as the cluster has room for, continues with fewer when it loses a node, and grows again;
    the result is the same except for rounding. Trials of a search use min."""
    cpus_per_worker: int = Field(1, ge=1, le=1024)
    """CPU cores (and torch threads) per worker."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    microbatch: int | None = Field(None, ge=1)
    """Images per pass of a worker through the network; it accumulates gradients over its share of train.batch_size.
    null = the whole share. Fewer need less memory; the result is the same except for rounding."""
    channels_last: Choice = "auto"
    """Keep images and weights in channels-last order. auto = with use_gpu: convolutions of GPUs are faster in it, those
    of CPUs slower."""
    compile: Choice = "auto"
    """Compile the network when training starts (torch.compile). auto = with use_gpu, where a C compiler is. This takes
    minutes, then steps are faster. Checkpoints do not depend on it."""
    max_failures: int = Field(3, ge=0)
    """How many times training restarts from its last checkpoint after losing a worker or a node."""
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
            reason = f"neither a number from 1 to {MOST_WORKERS} nor a range [min, max] of such numbers"
            raise UserError("", reason, value=value)
        return value

    @property
    def min_workers(self) -> int:
        """Workers that training needs."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers that training uses if there is room for them."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def compiled(self) -> bool:
        """Whether networks are compiled, where workers have a compiler."""
        return self.use_gpu if self.compile == "auto" else self.compile

    @property
    def device(self) -> str:
        """Where torch computes, as it names it."""
        return "cuda" if self.use_gpu else "cpu"
