"""A worker of a training, and what is said of those that are lost."""

from __future__ import annotations

import inspect
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
import torch
import torch.distributed
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ncsn.config import Config
from ncsn.data.format import load_manifest
from ncsn.data.training_images import WINDOW_BYTES
from ncsn.errors import InvalidValue, NotFound
from ncsn.model import build
from ncsn.model.checkpoint import DamagedError
from ncsn.model.checkpoint_store import NEWEST, CheckpointStore
from ncsn.runs.folder import TrainingFolder, said_newest
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.storage.retry import RETRY
from ncsn.training.context import WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop

LOOK_SECONDS = 10.0  # at a node that is full
SLOWEST_READ = 5e6  # bytes of images per second that a node reads from a slow store

# All buffers are constants. Torch 2.13 renamed the argument that says so.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}

_TRANSIENT = (NotFound, DamagedError)  # another node may have it; a copy may be torn on its way to this one

_logger = logging.getLogger(__name__)

End = TrainOutcome | InvalidValue | LeaseExpired  # of a training: its result, a mistake, or an order to end


def attempt(job: TrainingJob, run_uri: str, context: Callable[[], WorkerContext]) -> End:
    """Train in this process, which is a worker's."""
    # What a worker raises is retried, so a mistake that would only repeat, and an order to end, is returned.
    try:
        worker = context()
        build.tune_cuda(worker.device)
        worker.hung = TrainingFolder(run_uri).hung
        return train_loop(job, worker, checkpoint_store(job.config, run_uri))
    except _TRANSIENT:
        raise
    except (InvalidValue, LeaseExpired) as end:
        return end


def patience(job: TrainingJob) -> float:
    """Seconds that a worker waits for one that fills its node's cache first."""
    manifest = load_manifest(job.dataset)
    filling = sum(min(count * manifest.pixels.num_bytes, WINDOW_BYTES) for count in manifest.counts.values())
    return filling / SLOWEST_READ


def checkpoint_store(config: Config, run_uri: str) -> CheckpointStore:
    """The checkpoints of a run, of which as many stay as the config says."""
    uri, keep = TrainingFolder(run_uri).checkpoints, config.train.keep_checkpoints
    return CheckpointStore(uri, keep=NEWEST, thin_every=1) if keep == "all" else CheckpointStore(uri, keep=keep)


class GroupContext(WorkerContext):
    """A worker of torch's process group: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, device: str | torch.device, *, rank: int, world_size: int) -> None:
        super().__init__(device)
        self.rank, self.world_size = rank, world_size

    @contextmanager
    def mistakes_shared(self) -> Iterator[None]:
        """Context manager: of several workers' errors that of the lowest rank is raised."""
        own: InvalidValue | None = None
        try:
            yield
        except InvalidValue as mistake:
            own = mistake
        mistakes = [own] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(mistakes, own)
        for each in mistakes:
            if each is not None:
                raise each

    def wrap(self, network: nn.Module, *, dtype: torch.dtype | None) -> nn.Module:
        """The network under DistributedDataParallel, if there is more than one worker.

        Between nodes the gradients of a network that computes in bfloat16 travel in it, in half the bytes.
        """
        if self.world_size == 1:
            return network
        # For 1x1 convolutions two kinds of strides name one layout in memory, so no copy is made.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True, **_NO_BUFFER_SYNC)
        if self.spans_nodes and dtype is torch.bfloat16:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def share_weights(self, network: nn.Module) -> None:
        """Broadcast the parameters; equal seeds do not give equal bits on unlike CPUs."""
        if self.world_size > 1:
            for parameter in network.parameters():
                torch.distributed.broadcast(parameter.detach(), src=0)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """All-reduce a copy, because CUDA graphs own the gradients' memory."""
        if self.world_size == 1 or not gradients:
            return
        # In the order of the memory, which autograd makes that of the parameters, so the same on all workers.
        values = [each.as_strided((each.numel(),), (1,)) for each in gradients]
        flat = torch.cat(values)
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        torch._foreach_copy_(values, torch.split(flat, [len(each) for each in values]))

    def sum_over_workers(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


class LostWorkers:
    """Logs what failed and where training resumes, as long as the workers are started again."""

    def __init__(self, run_uri: str, *, max_failures: int) -> None:
        self._run_uri, self.left = run_uri, max_failures

    def count(self, worker_exceptions: Mapping[int, Exception]) -> None:
        """Count a failure of these ranks."""
        if not any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            self.left -= 1  # Ray Train does not count preemptions
        if self.left >= 0:
            _logger.warning(
                "%s%s, training resumes from %s",
                RETRY,
                describe(worker_exceptions),
                said_newest(TrainingFolder(self._run_uri).checkpoints),
            )


def describe(errors: Mapping[int, Exception]) -> str:
    """Why the workers of these ranks failed. A lost one makes the others fail too, so it goes first."""
    for cause in map(_cause, errors.values()):
        if isinstance(cause, OutOfMemoryError):
            return f"worker killed for memory{_memory_of(cause)}"
    if any(isinstance(_cause(error), (RayActorError, WorkerCrashedError)) for error in errors.values()):
        return "worker lost"
    rank, error = min((rank, _cause(error)) for rank, error in errors.items())
    first = next(iter(str(error).strip().splitlines()), "")
    return f"worker {rank} failed with {type(error).__name__}: {first}"


def _memory_of(error: OutOfMemoryError) -> str:
    """What Ray's memory monitor saw on the node, and what its shared memory, with Ray's objects, holds now."""
    seen = re.search(r"ID: (\w+)\) was (\S+ used / \S+ limit)", str(error))
    if seen is None or not ray.is_initialized():
        return ""
    task: Any = ray.remote(num_cpus=0)(lambda: shutil.disk_usage("/dev/shm").used)  # noqa: S108
    there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(seen[1], soft=False))
    with suppress(RayError):  # the node is gone, or has no room for a process
        return f", {seen[2]}, {ray.get(there.remote(), timeout=LOOK_SECONDS) / 2**30:.2f}GB of it in /dev/shm"
    return f", {seen[2]}"


def _cause(error: Exception) -> Exception:
    # A worker that does not answer is reported inside a failed health check, and a task's error inside Ray's.
    cause: Exception = error.cause if isinstance(error, RayTaskError) else getattr(error, "health_check_failure", error)
    return cause
