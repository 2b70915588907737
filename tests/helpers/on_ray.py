"""A Ray driver in another process, and what tests send to it and to its workers, which can import this module.

Ray may end the process of its driver (`_exit`), and pytest must survive that.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ncsn.config import Config
from ncsn.distributed import trainer
from ncsn.distributed.cluster import ray_cluster
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.ray_train import _Torch
from ncsn.distributed.sampling import make_shards, plan_shards
from ncsn.distributed.trainer import describe
from ncsn.errors import UserError
from ncsn.evaluation.frechet import RunningDistance, RunningScore
from ncsn.evaluation.reference import open_evaluator
from ncsn.progress import Progress
from ncsn.steps.evaluate import EvaluateResult, evaluate
from ncsn.training import context, loop

import ray  # isort: skip  # after ncsn.distributed, which sets its environment
from ray.exceptions import OutOfMemoryError  # isort: skip
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback  # isort: skip


class RayDriver(NamedTuple):
    """Calls functions in the driver; what they take, return and raise must pickle."""

    pool: ProcessPoolExecutor

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.pool.submit(function, *args, **kwargs).result()


@contextmanager
def ray_driver(config: Config) -> Iterator[tuple[RayDriver, dict[str, str]]]:
    """A driver in this process's environment, and the variables with which others join its cluster meanwhile."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        driver = RayDriver(pool)
        yield driver, driver(_join, config)


def _join(config: Config) -> dict[str, str]:
    stack = ExitStack()
    atexit.register(stack.close)
    stack.enter_context(ray_cluster(config))
    return {name: os.environ[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN") if name in os.environ}


def with_progress(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[tuple[int, int]]]:
    """The result of a function, and what its `progress` counted to of what."""
    told: list[tuple[int, int]] = []

    class Told(Progress):
        def changed(self) -> None:
            told.append((self.done, self.total))

    return function(*args, progress=Told(), **kwargs), told


class KillsWorker(Progress):
    """Once, when training has seen that many images, makes the file `killed` and kills its process, or lets it hang.

    It is that of rank 0. The checkpoint `cut` loses half of its weights first.
    """

    def __init__(self, at: int, killed: Path, *, cut: Path, hangs: bool) -> None:
        super().__init__()
        self.at, self.killed, self.cut, self.hangs = at, killed, cut, hangs

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In each worker, where a few seconds take the place of minutes, and steps are looked at one by one."""
        self.__dict__ |= state
        loop.CHECK_SECONDS = 0.0
        context.STEP_SECONDS, context.TICK_SECONDS, context.END_SECONDS = 3.0, 0.1, 2.0

    def changed(self) -> None:
        if self.done < self.at or self.killed.exists():
            return
        while not self.cut.exists():  # a thread writes it
            time.sleep(0.01)
        weights = self.cut / "weights.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        self.killed.touch()
        if self.hangs:
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)


def evaluate_by_tasks(config: Config, **given: Any) -> EvaluateResult:
    return evaluate(config, **given, runner=runner_of(config.compute))


def live_scores(config: Config, dataset: str, *, checkpoint: str, folder: str) -> tuple[list[RunningScore], list[int]]:
    """The running scores of the images of a config, and how many images were there when each was due."""
    evaluator = open_evaluator(config, dataset, runner=runner_of(config.compute))
    running, progress = RunningDistance(evaluator.reference.statistics, count=config.sampling.num_images), Progress()
    scores, there = list[RunningScore](), list[int]()

    def take(first: int, features: np.ndarray) -> None:
        scores.extend(due := running.add(first, features))
        there.extend(progress.done for _ in due)

    shards = plan_shards(config, checkpoint=checkpoint, folder=folder, dataset=dataset)
    make_shards(config, shards, progress=progress, on_features=take)
    return scores, there


def ends_by_a_mistake() -> tuple[object, dict[int, Exception], float]:
    """How two workers end of which one makes a mistake and the other waits for it, and the seconds that it takes."""

    def work(rank: int) -> object:
        if rank == 0:
            time.sleep(600)
        return UserError("data.root", "a mistake", hint="none", value=rank)

    trainer.LAST_WORDS_SECONDS, began = 0.5, time.perf_counter()
    task = ray.remote(num_cpus=0, max_retries=0)(work)
    return *trainer._end_of([task.remote(rank) for rank in range(2)]), time.perf_counter() - began


def killed_for_memory(held: int) -> str:
    """What is said of a worker that Ray's memory monitor kills while Ray holds some bytes of objects."""
    kept = ray.put(np.zeros(held, np.uint8))
    worker = ray.remote(num_cpus=0)(Sleeper).remote()
    try:
        ray.get(worker.sleep.remote(600))
    except OutOfMemoryError as error:
        BackendSetupCallback(_Torch()).before_execution_group_shutdown(Group([lambda: [worker.sleep.remote(0)]]))
        assert kept
        return describe({0: RuntimeError("closed by peer"), 1: error})
    raise AssertionError


class Sleeper:
    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Group(list[Callable[[], list[Any]]]):
    """Ray Train's workers, which answer by what they hold."""

    def execute_async(self, *_: object, **__: object) -> list[Any]:
        return self[0]()
