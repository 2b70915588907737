"""Function calls on the connected Ray cluster: as Ray tasks on CPUs, and by one actor per GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import ray
import torch
from ray.util.actor_pool import ActorPool

from ncsn.config.compute import ComputeConfig
from ncsn.data.dataset import PartWriter, Written
from ncsn.data.format import Hashes
from ncsn.distributed.cluster import on_this_machine
from ncsn.evaluation.features import Runner, here
from ncsn.model.build import torch_threads
from ncsn.storage.heartbeat import LeaseExpired

T = TypeVar("T")
R = TypeVar("R")

# Up to here the threads of one process keep all cores busy, and starting Ray takes as long as ten thousand images.
FEW_CORES = 4
RETRIES = 3  # times that a call is made again after its process or node was lost

# Wherever there is room, and not in the placement group of a trial's driver, which has no CPU.
ANYWHERE: dict[str, Any] = {"scheduling_strategy": "DEFAULT"}


def runner_of(compute: ComputeConfig) -> Runner:
    """Calls on the connected cluster, with `cpus_per_worker` CPUs and torch threads each; else in this process."""

    def each(function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
        return call_all(
            function,
            items,
            cpus=compute.cpus_per_worker,
            gpu=gpu and compute.use_gpu,
            in_flight=compute.max_workers,  # more would need more memory than is planned for
        )

    return each if ray.is_initialized() else here


def few_cores() -> bool:
    """Whether this process writes the parts of a dataset alone at least as fast as Ray tasks."""
    return on_this_machine() and (os.cpu_count() or 1) <= FEW_CORES


def write_parts(parts: Iterable[PartWriter], known: Hashes) -> Iterator[Written]:
    """Write parts without `known` images on the connected cluster; yields in their order what is known of them."""
    held: Any = ray.put(known)  # once for all tasks of a node

    def write_part(item: tuple[PartWriter, Any]) -> Written:
        part, held = item
        return part.write(ray.get(held), cores=1)

    # One running and one waiting per core, so that the queue of a million images stays small.
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    for _, written in call_all(write_part, ((part, held) for part in parts), cpus=1, in_flight=most, ordered=True):
        yield written


def call_all(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    cpus: int,
    gpu: bool = False,
    in_flight: int | None = None,
    ordered: bool = False,
) -> Iterator[tuple[T, R]]:
    """Each item with its result, as they finish; what still runs when the caller stops is canceled.

    Without a cluster the calls are made here, one after the other. A call takes `cpus` CPUs and torch threads. The
    items are taken one by one as calls begin, at most `in_flight` at a time (None: as many as the cluster has room
    for). `ordered` results, on CPUs only, come in the order of the items. Errors are those of `result_of`, and
    `ray.exceptions.RayError` if the processes of one call are lost again and again.
    """
    if not ray.is_initialized():
        with torch_threads(cpus):
            yield from ((item, function(item)) for item in items)
        return
    left = iter(items)
    if gpu:
        assert not ordered, "actors give results as they finish"
        yield from _on_gpus(function, left, cpus=cpus, in_flight=in_flight)
        return

    def call(item: T) -> R:
        torch.set_num_threads(cpus)
        return function(item)

    task: Any = ray.remote(num_cpus=cpus, max_retries=RETRIES, **ANYWHERE)(call).options(name=function.__name__)
    running: dict[Any, T] = {}
    try:
        while True:
            for item in islice(left, None if in_flight is None else in_flight - len(running)):
                running[task.remote(item)] = item
            if not running:
                return
            first: Any = next(iter(running)) if ordered else ray.wait(list(running), num_returns=1)[0][0]
            result: Any = result_of(partial(ray.get, first))
            yield running.pop(first), result
    finally:
        for reference in running:
            ray.cancel(reference)


def _on_gpus(
    function: Callable[[T], R], items: Iterator[T], *, cpus: int, in_flight: int | None
) -> Iterator[tuple[T, R]]:
    # A process that has computed on a GPU keeps its CUDA context there as long as it lives, and Ray may lend a task's
    # process another GPU next. An actor has one GPU for its whole life, and its network stays loaded.
    class GpuActor:
        def call(self, item: T) -> tuple[T, R]:
            torch.set_num_threads(cpus)
            return item, function(item)

    gpus = max(1, int(ray.cluster_resources().get("GPU", 0)))
    first = list(islice(items, gpus if in_flight is None else min(gpus, in_flight)))
    # Ray starts a lost actor again elsewhere, and makes its call again, there or when a GPU is free.
    kind: Any = ray.remote(num_cpus=cpus, num_gpus=1, max_restarts=-1, max_task_retries=RETRIES, **ANYWHERE)(GpuActor)
    actors = [kind.remote() for _ in first]
    pool, left = ActorPool(actors), chain(first, items)
    try:
        while True:
            for item in left:
                pool.submit(lambda actor, item: actor.call.remote(item), item)
                if not pool.has_free():
                    break
            while (idle := pool.pop_idle()) is not None:  # nothing is left for it; one that was lost may need its GPU
                ray.kill(idle)
            if not pool.has_next():
                return
            yield result_of(pool.get_next_unordered)
    finally:
        for actor in actors:
            ray.kill(actor)


def result_of(call: Callable[[], R]) -> R:
    """What `call` gets from Ray.

    Of an error of the function, ValueError, OSError and LeaseExpired are raised as they are, caused by the
    `ray.exceptions.RayTaskError` with their traceback; others as that.
    """
    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError, LeaseExpired)):
            raise error.cause from error
        raise
