"""Function calls on the connected Ray cluster: as Ray tasks on CPUs, and by one actor per GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import ray
import torch

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

    def each(function: Callable[[T], R | Iterator[R]], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
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
    # One running and one waiting per core, so that the queue of a million images stays small.
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    for _, written in call_all(partial(_write_part, known=known), parts, cpus=1, in_flight=most, ordered=True):
        yield written


def _write_part(part: PartWriter, *, known: Hashes) -> Written:
    return part.write(known, cores=1)


def call_all(
    function: Callable[[T], R | Iterator[R]],
    items: Iterable[T],
    *,
    cpus: int,
    gpu: bool = False,
    in_flight: int | None = None,
    ordered: bool = False,
) -> Iterator[tuple[T, R]]:
    """Each item with its result, as they finish; what still runs when the caller stops is canceled.

    Of a function that yields, each value as it comes. What a `functools.partial` binds by name is sent to each node
    once, whatever the number of calls.

    Without a cluster the calls are made here, one after the other. A call takes `cpus` CPUs and torch threads. The
    items are taken one by one as calls begin, at most `in_flight` at a time (None: as many as the cluster has room
    for). `ordered` results, on CPUs only, come in the order of the items. Errors are those of `result_of`, and
    `ray.exceptions.RayError` if the processes of one call are lost again and again.
    """
    if not ray.is_initialized():
        with torch_threads(cpus):
            yield from here(function, items, gpu=gpu)
        return
    make, bound = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    assert not getattr(function, "args", ()), "a partial binds by name"

    def call(item: T, **held: Any) -> Iterator[R]:
        torch.set_num_threads(cpus)
        yield from (value for _, value in here(partial(make, **held), [item], gpu=gpu))

    # A process that has computed on a GPU keeps its CUDA context there as long as it lives, and Ray may lend a task's
    # process another GPU next. An actor has one GPU for its whole life, and its network stays loaded.
    class GpuActor:
        def call(self, item: T, **held: Any) -> Iterator[R]:
            yield from call(item, **held)

    remote: Any = ray.remote
    left, running = iter(items), dict[Any, tuple[T, Any]]()  # what gives results: its item and actor
    actors, idle = list[Any](), list[Any]()
    if gpu:
        assert not ordered, "actors give results as they finish"
        gpus = max(1, int(ray.cluster_resources().get("GPU", 0)))
        in_flight = gpus if in_flight is None else min(gpus, in_flight)
        # Ray starts a lost actor again elsewhere, and makes its call again, there or when a GPU is free.
        limits = {"num_gpus": 1, "max_restarts": -1, "max_task_retries": RETRIES}
        kind = remote(num_cpus=cpus, **limits, **ANYWHERE)(GpuActor)
    else:
        kind = remote(num_cpus=cpus, max_retries=RETRIES, **ANYWHERE)(call).options(name=make.__name__)
    references = {name: ray.put(value) for name, value in bound.items()}
    try:
        while True:
            for item in islice(left, None if in_flight is None else in_flight - len(running)):
                if gpu and not idle:
                    actors.append(kind.remote())
                    idle.append(actors[-1])
                actor = idle.pop() if gpu else None
                task = actor.call if actor else kind
                running[task.remote(item, **references)] = item, actor
            while idle:  # nothing is left for it; one that was lost may need its GPU
                ray.kill(idle.pop())
            if not running:
                return
            first: Any = next(iter(running)) if ordered else ray.wait(list(running), num_returns=1)[0][0]
            if (reference := next(first, None)) is None:  # that was all
                _, actor = running.pop(first)
                idle += [actor] if actor else []
            else:
                result: Any = result_of(partial(ray.get, reference))
                yield running[first][0], result
    finally:
        for actor in actors:
            ray.kill(actor)
        for each in [] if gpu else running:
            ray.cancel(each)


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
