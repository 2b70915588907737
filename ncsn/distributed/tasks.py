"""Function calls on the connected Ray cluster: as tasks on CPUs, and in one process per GPU.

A process that has computed on a GPU keeps its CUDA context there, a few hundred megabytes, as long as it lives, and Ray
may lend the process another GPU for its next task. So a process here has one GPU for its whole life: it makes call
after call, with its network loaded once, or ends after a single one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

import ray
import torch

from ncsn.config.compute import ComputeConfig
from ncsn.evaluation.features import Runner, here
from ncsn.storage.heartbeat import LeaseExpired

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3  # times that a call is made again after its process or node was lost

# Wherever there is room, and not in the placement group of a trial's driver, which has no CPU.
_DEFAULT: Literal["DEFAULT"] = "DEFAULT"
_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)


def runner_of(compute: ComputeConfig) -> Runner:
    """Calls on the connected cluster, with `cpus_per_worker` CPUs and torch threads each; else in this process."""

    def each(function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
        return run_tasks(
            function,
            items,
            cpus=compute.cpus_per_worker,
            gpu=gpu and compute.use_gpu,
            in_flight=compute.max_workers,  # more would need more memory than is planned for
        )

    return each if ray.is_initialized() else here


def run_task(
    function: Callable[..., R],
    *arguments: Any,
    cpus: int,
    gpu: bool,
    retries: int = RETRIES,
    retry_on: tuple[type[Exception], ...] = (),
) -> R:
    """`function(*arguments)`, in a process that ends with the call if it has a GPU; without a cluster here.

    It takes `cpus` CPUs and torch threads. The call is made again `retries` times after its process or node was lost,
    and after the errors `retry_on` of the function. Of the function's errors ValueError, OSError and LeaseExpired are
    raised as they are, caused by the `ray.exceptions.RayTaskError` with their traceback; others as that.
    """
    if not ray.is_initialized():
        ((_, here),) = _here(lambda given: function(*given), [arguments], cpus=cpus)
        return here
    result: R = _result(_task(function, cpus=cpus, gpu=gpu, retries=retries, retry_on=retry_on).remote(arguments))
    return result


def run_tasks(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    cpus: int,
    gpu: bool = False,
    in_flight: int | None = None,
    ordered: bool = False,
) -> Iterator[tuple[T, R]]:
    """Each item with its result, as they finish; what still runs when the caller stops is canceled.

    Without a cluster the calls are made here, one after the other. The items are taken one by one as calls begin, at
    most `in_flight` at a time (None: as many as the cluster has room for). `ordered` results, on CPUs only, come in the
    order of the items. Errors are those of `run_task`, and `ray.exceptions.RayError` if processes are lost again and
    again.
    """
    if not ray.is_initialized():
        return _here(function, items, cpus=cpus)
    if gpu:
        assert not ordered, "GPU processes give results as they finish"
        return _on_gpus(function, iter(items), cpus=cpus, in_flight=in_flight)
    return _on_cpus(function, iter(items), cpus=cpus, in_flight=in_flight, ordered=ordered)


def _here(function: Callable[[T], R], items: Iterable[T], *, cpus: int) -> Iterator[tuple[T, R]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(cpus)
    try:
        for item in items:
            yield item, function(item)
    finally:
        torch.set_num_threads(threads)


def _on_cpus(
    function: Callable[[T], R], items: Iterator[T], *, cpus: int, in_flight: int | None, ordered: bool
) -> Iterator[tuple[T, R]]:
    task = _task(function, cpus=cpus, gpu=False, retries=RETRIES)
    running: dict[Any, T] = {}
    try:
        while True:
            for item in islice(items, None if in_flight is None else in_flight - len(running)):
                running[task.remote((item,))] = item
            if not running:
                return
            first = next(iter(running)) if ordered else ray.wait(list(running), num_returns=1)[0][0]
            yield running.pop(first), _result(first)
    finally:
        for reference in running:
            ray.cancel(reference)


@dataclass
class _Call(Generic[T]):
    item: T
    lost: int = 0  # times that its process was lost


def _on_gpus(
    function: Callable[[T], R], items: Iterator[T], *, cpus: int, in_flight: int | None
) -> Iterator[tuple[T, R]]:
    kind: Any = ray.remote(num_cpus=cpus, num_gpus=1, scheduling_strategy=_DEFAULT)(_GpuProcess)
    queue: deque[_Call[T]] = deque()
    waiting: dict[Any, tuple[Any, _Call[T] | None]] = {}  # reference -> process and its call, None while it starts
    busy = failed_starts = 0
    try:
        while True:
            most = _gpus(in_flight)
            queue.extend(map(_Call, islice(items, max(0, most - len(queue)))))
            if not queue and not busy:
                return
            for _ in range(min(most, len(queue) + busy) - len(waiting)):
                process = kind.remote()
                waiting[process.ready.remote()] = (process, None)
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            process, call = waiting.pop(reference)
            busy -= call is not None
            try:
                result = _answer(process, reference)
            except _LOST:
                failed_starts += call is None
                if call is not None:
                    # Counted by call: a lost node takes several processes at once, each with another call.
                    call.lost += 1
                    queue.appendleft(call)
                if failed_starts > max(RETRIES, 2 * most) or (call is not None and call.lost > RETRIES):
                    raise
                continue
            failed_starts = 0
            if queue:  # only a process that has started is given a call
                following = queue.popleft()
                waiting[process.call.remote(function, following.item, cpus)] = (process, following)
                busy += 1
            else:
                ray.kill(process)
            if call is not None:
                yield call.item, result
    finally:
        for process, _ in waiting.values():
            ray.kill(process)


def _answer(process: Any, reference: Any) -> Any:
    try:
        return _result(reference)
    except BaseException:
        ray.kill(process)
        raise


class _GpuProcess:
    def ready(self) -> None:
        """Return once the process has its GPU."""

    def call(self, function: Callable[[T], R], item: T, threads: int) -> R:
        torch.set_num_threads(threads)
        return function(item)


def _gpus(in_flight: int | None) -> int:
    """GPUs that the cluster has now, at least one, and at most `in_flight`."""
    have = max(1, int(ray.cluster_resources().get("GPU", 0)))
    return have if in_flight is None else min(have, in_flight)


def _task(
    function: Callable[..., Any],
    *,
    cpus: int,
    gpu: bool,
    retries: int,
    retry_on: tuple[type[Exception], ...] = (),
) -> Any:
    def body(arguments: tuple[Any, ...]) -> Any:
        torch.set_num_threads(cpus)
        return function(*arguments)

    # Not by `.options`, which cannot set max_calls and leaves a process with a CUDA context to the next call.
    task: Any = ray.remote(
        num_cpus=cpus,
        num_gpus=int(gpu),
        max_calls=int(gpu),
        max_retries=retries,
        scheduling_strategy=_DEFAULT,
    )(body)
    return task.options(name=function.__name__, retry_exceptions=list(retry_on) or False)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError, LeaseExpired)):
            raise error.cause from error
        raise
