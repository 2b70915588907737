"""Training on the connected Ray cluster: a Ray task for each worker on this machine, else Ray Train.

Ray Train starts half a dozen processes around its workers, 15 CPU seconds or more each time, which is much for a short
training. One machine's CPUs need none of them: loop, weights and resume are the same to the last bit.
"""

from __future__ import annotations

import os
import socket
import tempfile
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import torch.distributed
from ray.exceptions import RayError

from ncsn.distributed.cluster import is_own, on_this_machine, require_resources
from ncsn.distributed.ray_calls import ANYWHERE
from ncsn.distributed.workers import End, LostWorkers, attempt, describe, patience
from ncsn.training.context import LONG_SECONDS, WorkerContext
from ncsn.training.loop import TrainingJob, TrainOutcome

LAST_WORDS_SECONDS = 5.0  # for the other workers to end, once one has failed


def train(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """Train on the connected Ray cluster; the same `run_uri` resumes from its newest whole checkpoint.

    `RuntimeError` if workers failed more often than `compute.max_failures`, or could not be started.
    """
    require_resources(job.config)
    compute = job.config.compute
    fixed = compute.min_workers == compute.max_workers and not compute.use_gpu
    if (compute.num_workers == 1 and on_this_machine()) or (fixed and is_own()):  # which is not preempted
        return train_by_tasks(job, run_uri=run_uri)
    from ncsn.distributed.ray_train import train_by_ray  # takes a second, which tasks need not wait for

    return train_by_ray(job, run_uri=run_uri)


def train_by_tasks(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """The same in Ray tasks on this machine, which are not told of preemptions."""
    compute = job.config.compute
    task: Any = ray.remote(
        num_cpus=compute.cpus_per_worker,
        num_gpus=int(compute.use_gpu),
        max_calls=int(compute.use_gpu),  # its process would keep a CUDA context on the GPU
        max_retries=0,  # here, with a word
        **ANYWHERE,
    )(_attempt_of).options(name="train")
    lost = LostWorkers(run_uri, compute.max_failures)
    longest = LONG_SECONDS + (patience(job) if compute.max_workers > 1 else 0.0)
    while True:
        with tempfile.TemporaryDirectory(prefix="ncsn-") as folder:
            ranks = range(compute.max_workers)
            end, errors = _end_of(
                [task.remote(job, run_uri, rank, len(ranks), f"{folder}/ranks", longest) for rank in ranks]
            )
        if isinstance(end, TrainOutcome):
            return end
        if end is not None:
            raise end
        lost.count(errors)
        if lost.left < 0:
            failure = f"{describe(errors)}; compute.max_failures = {compute.max_failures}"
            raise RuntimeError(failure) from errors[min(errors)]


def _attempt_of(job: TrainingJob, run_uri: str, rank: int, world_size: int, meeting: str, longest: float) -> End:
    context = partial(WorkerContext, job.config.compute.device, rank=rank, world_size=world_size)
    if world_size == 1:
        return attempt(job, run_uri, context)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_indextoname(1))  # loopback
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=longest),
    )
    try:
        return attempt(job, run_uri, context)
    finally:
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
