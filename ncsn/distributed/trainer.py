"""The workers of a training: as Ray tasks on this machine, what each does, and what is said of those that are lost.

Ray Train starts half a dozen processes around its workers, 15 CPU seconds or more each time, which is much for a short
training. One machine's CPUs need none of them: loop, weights and resume are the same to the last bit.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import torch.distributed
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ncsn.data.format import load_manifest
from ncsn.data.training_images import WINDOW_BYTES
from ncsn.distributed.ray_calls import ANYWHERE
from ncsn.errors import InvalidValue, NotFound
from ncsn.model import build
from ncsn.model.checkpoint import CheckpointStore, DamagedError
from ncsn.runs.layout import TrainingFolder, said_newest
from ncsn.storage.heartbeat import LeaseExpired
from ncsn.storage.retry import RETRY
from ncsn.training.context import LONG_SECONDS, WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome, train_loop

LAST_WORDS_SECONDS = 5.0  # for the other workers to end, once one has failed
LOOK_SECONDS = 10.0  # at a node that is full
SLOWEST_READ = 5e6  # bytes of images per second that a node reads from a slow store

_TRANSIENT = (NotFound, DamagedError)  # another node may have it; a copy may be torn on its way to this one

_logger = logging.getLogger(__name__)

End = TrainOutcome | InvalidValue | LeaseExpired  # of a training: its result, a mistake, or an order to end


def train_by_tasks(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """`ncsn.distributed.train` in Ray tasks on this machine, which are not told of preemptions."""
    compute = job.config.compute
    task: Any = ray.remote(
        num_cpus=compute.cpus_per_worker,
        num_gpus=int(compute.use_gpu),
        max_calls=int(compute.use_gpu),  # its process would keep a CUDA context on the GPU
        max_retries=0,  # here, with a word
        **ANYWHERE,
    )(attempt).options(name="train")
    lost = LostWorkers(run_uri, compute.max_failures)
    ranks = [{"rank": rank, "world_size": compute.max_workers} for rank in range(compute.max_workers)]
    timeout = timedelta(seconds=LONG_SECONDS + patience(job)) if len(ranks) > 1 else None
    while True:
        with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
            meeting = {"init_method": f"file://{folder}/ranks", "timeout": timeout}
            tasks = []
            for rank in ranks:
                context = partial(WorkerContext, compute.device, **rank)
                tasks.append(task.remote(job, run_uri, context, rank | meeting if timeout else None))
            end, errors = _end_of(tasks)
        if isinstance(end, TrainOutcome):
            return end
        if end is not None:
            raise end
        lost.count(errors)
        if lost.left < 0:
            failure = f"{describe(errors)}; compute.max_failures = {compute.max_failures}"
            raise RuntimeError(failure) from errors[min(errors)]


def attempt(
    job: TrainingJob, run_uri: str, context: Callable[[], WorkerContext], group: Mapping[str, Any] | None = None
) -> End:
    """Train in this process, which is a worker's; `group` says how it meets the others, if it has not met them yet."""
    if group is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_indextoname(1))  # loopback
        torch.distributed.init_process_group("gloo", **group)
    # What a worker raises is retried, so a mistake that would only repeat, and an order to end, is returned.
    try:
        worker = context()
        build.tune_cuda(worker.device)
        folder, keep = TrainingFolder(run_uri), job.config.train.keep_checkpoints
        worker.hung = folder.hung
        return train_loop(job, worker, CheckpointStore(folder.checkpoints, keep=keep))
    except _TRANSIENT:
        raise
    except (InvalidValue, LeaseExpired) as end:
        return end
    finally:
        if group is not None:
            torch.distributed.destroy_process_group()  # the process may get another task


def _end_of(tasks: list[Any]) -> tuple[End | None, dict[int, Exception]]:
    """What the first task returns or a mistake of any, None if some fail, and their errors. None runs any more."""
    ends, errors, running = dict[int, End](), dict[int, Exception](), tasks
    mistake: End | None = None
    while running:
        # One that fails, or ends by a mistake, makes the others fail too, or wait for it forever.
        ended, running = ray.wait(running, timeout=LAST_WORDS_SECONDS if errors or mistake else None)
        for each in ended:
            rank = tasks.index(each)
            try:
                ends[rank] = ray.get(each)
            except RayError as error:
                errors[rank] = error
            else:
                mistake = ends[rank] if mistake is None and isinstance(ends[rank], Exception) else mistake
        if not ended:
            for each in running:
                ray.cancel(each, force=True)
            ray.wait(running, num_returns=len(running))
            break
    return mistake or (None if errors else ends[0]), errors


def patience(job: TrainingJob) -> float:
    """Seconds that a worker waits for one that fills its node's cache first."""
    manifest = load_manifest(job.dataset)
    filling = sum(min(count * manifest.pixels.num_bytes, WINDOW_BYTES) for count in manifest.counts.values())
    return filling / SLOWEST_READ


@dataclass(eq=False)
class LostWorkers:
    """Logs what failed and where training resumes, as long as the workers are started again."""

    run_uri: str
    left: int  # failures that may follow

    def count(self, worker_exceptions: Mapping[int, Exception]) -> None:
        """Count a failure of these ranks."""
        if not any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            self.left -= 1  # Ray Train does not count preemptions
        if self.left >= 0:
            _logger.warning(
                "%s%s, training resumes from %s",
                RETRY,
                describe(worker_exceptions),
                said_newest(TrainingFolder(self.run_uri).checkpoints),
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
