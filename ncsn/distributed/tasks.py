"""Function calls on the connected Ray cluster: as tasks on CPUs, and in one process per GPU.

Ray lends a GPU to a call, and the process of a call may serve another one next, on another GPU. But a process that has
computed on a GPU keeps its CUDA context there, some hundred megabytes, as long as it lives. So a process here has one
GPU for its whole life: it makes call after call, with its network loaded once, or ends after a single one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import ray
import torch

from ncsn.config.compute import ComputeConfig
from ncsn.evaluation.pieces import Here, Runner
from ncsn.storage.heartbeat import LeaseExpired

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""Times that a call is made again after its process or node was lost."""

_DEFAULT: Literal["DEFAULT"] = "DEFAULT"
"""Where there is room, and not in the placement group of a trial's driver, which has no CPU."""


def runner_of(compute: ComputeConfig) -> Runner:
    """The connected cluster; this process if it is connected to none."""
    return OnCluster(compute) if ray.is_initialized() else Here()


class OnCluster(Runner):
    """The connected cluster, `cpus_per_worker` CPUs and torch threads for each call; see `Runner`."""

    apart = True

    def __init__(self, compute: ComputeConfig) -> None:
        self._cpus, self._use_gpu = compute.cpus_per_worker, compute.use_gpu
        self._at_once = compute.max_workers  # more would need more memory than is planned for

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
        """Each item with `function` of it, as they are done."""
        gpu = gpu and self._use_gpu
        return calls(function, deque(items), cpus=self._cpus, use_gpu=gpu, at_once=self._at_once)

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:
        """`function` of the arguments."""
        return call(function, *arguments, cpus=self._cpus, use_gpu=gpu and self._use_gpu)


def call(function: Callable[..., R], *arguments: Any, cpus: int, use_gpu: bool, retries: int = RETRIES) -> R:
    """What one call of a function returns.

    Args:
        function: Found by its name on every node.
        arguments: Pickled.
        cpus: CPUs and torch threads.
        use_gpu: Whether it has a GPU too. Its process ends with it then.
        retries: Times that the call is made again after its process or node was lost.

    Raises:
        ValueError, LeaseExpired: as the function raises it; any other error as `ray.exceptions.RayTaskError`.
    """
    task = _task(function, cpus=cpus, use_gpu=use_gpu, retries=retries)
    result: R = _result(task.remote(arguments))
    return result


def calls(
    function: Callable[[T], R], queue: deque[T], *, cpus: int, use_gpu: bool, at_once: int | None = None
) -> Iterator[tuple[T, R]]:
    """Each item of a queue with `function` of it, as they are done; what nobody waits for any more is given up.

    Args:
        function: Found by its name on every node.
        queue: Taken from the left as calls begin; the caller may take others out meanwhile.
        cpus: CPUs and torch threads of each call.
        use_gpu: Whether each has a GPU too.
        at_once: Calls at a time at most; None = as many as the cluster has room for.

    Raises:
        ValueError, LeaseExpired: as the function raises it; any other error as `ray.exceptions.RayTaskError`.
        ray.exceptions.RayError: if processes are lost again and again.
    """
    return (_by_processes if use_gpu else _by_tasks)(function, queue, cpus=cpus, at_once=at_once)


def _by_tasks(function: Callable[[T], R], queue: deque[T], *, cpus: int, at_once: int | None) -> Iterator[tuple[T, R]]:
    task = _task(function, cpus=cpus, use_gpu=False, retries=RETRIES)
    running: dict[Any, T] = {}
    try:
        while queue or running:
            while queue and (at_once is None or len(running) < at_once):
                item = queue.popleft()
                running[task.remote((item,))] = item
            (reference,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(reference), _result(reference)
    finally:
        for reference in running:
            ray.cancel(reference)


def _by_processes(
    function: Callable[[T], R], queue: deque[T], *, cpus: int, at_once: int | None
) -> Iterator[tuple[T, R]]:
    """As tasks would be, but each GPU's calls in one process. Only a process that is there is given an item."""
    kind: Any = ray.remote(num_cpus=cpus, num_gpus=1, scheduling_strategy=_DEFAULT)(_GpuProcess)
    waiting: dict[Any, tuple[Any, list[T]]] = {}
    lost: Counter[int] = Counter()  # times that an item's process was lost, by the item's id
    given: list[T] = []  # keeps the ids unique
    failed_starts = 0
    try:
        while queue or any(items for _, items in waiting.values()):
            busy = sum(len(items) for _, items in waiting.values())
            for _ in range(min(_gpus(at_once), len(queue) + busy) - len(waiting)):
                process = kind.remote()
                waiting[process.ready.remote()] = (process, [])
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            process, items = waiting.pop(reference)
            try:
                result = _result(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
                ray.kill(process)
                queue.extendleft(items)
                # A lost node takes several processes at once, each with an item of its own.
                lost.update(id(item) for item in items)
                failed_starts += not items
                if failed_starts > max(RETRIES, 2 * _gpus(at_once)) or any(lost[id(item)] > RETRIES for item in items):
                    raise
                continue
            except BaseException:
                ray.kill(process)
                raise
            if not items:
                failed_starts = 0
            if queue:
                item = queue.popleft()
                given.append(item)
                waiting[process.call.remote(function, item, cpus)] = (process, [item])
            else:
                ray.kill(process)
            for item in items:
                yield item, result
    finally:
        for process, _ in waiting.values():
            ray.kill(process)


class _GpuProcess:
    """Has one GPU for its life."""

    def ready(self) -> None:
        """Nothing: it is there."""

    def call(self, function: Callable[[T], R], item: T, threads: int) -> R:
        torch.set_num_threads(threads)
        return function(item)


def _gpus(at_once: int | None) -> int:
    """Processes that the cluster as it is now has a GPU for, at least one, and at most so many."""
    have = max(1, int(ray.cluster_resources().get("GPU", 0)))
    return have if at_once is None else min(have, at_once)


def _task(function: Callable[..., Any], *, cpus: int, use_gpu: bool, retries: int) -> Any:
    def body(arguments: tuple[Any, ...]) -> Any:
        torch.set_num_threads(cpus)
        return function(*arguments)

    # Not by `.options`, which cannot set max_calls and leaves a process with a CUDA context to the next call.
    task: Any = ray.remote(
        num_cpus=cpus,
        num_gpus=1 if use_gpu else 0,
        max_calls=1 if use_gpu else 0,
        max_retries=retries,
        scheduling_strategy=_DEFAULT,
    )(body)
    return task.options(name=function.__name__)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, (ValueError, LeaseExpired)) else error from None
