"""A Ray driver in another process: Ray may end the process of its driver (`_exit`), and pytest must survive that."""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

from ncsn.config import Config
from ncsn.distributed.cluster import ray_cluster
from ncsn.progress import Progress

import ray  # isort: skip  # after ncsn.distributed, which sets its environment

P = ParamSpec("P")
R = TypeVar("R")


class RayDriver:
    """Calls functions in the driver; what they take, return and raise must pickle."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._pool.submit(function, *args, **kwargs).result()


@contextmanager
def ray_driver(config: Config, *, dashboard: bool = False) -> Iterator[tuple[RayDriver, dict[str, str]]]:
    """A driver in this process's environment, and the variables with which others join its cluster meanwhile."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        driver = RayDriver(pool)
        yield driver, driver(_join, config, dashboard=dashboard)


@contextmanager
def without_dashboard() -> Iterator[None]:
    """A cluster that this process starts in the block has no dashboard, which is ten processes more."""
    init = ray.init
    with patch.object(ray, "init", lambda **settings: init(**settings | {"include_dashboard": False})):
        yield


def _join(config: Config, *, dashboard: bool) -> dict[str, str]:
    stack = ExitStack()
    atexit.register(stack.close)
    with nullcontext() if dashboard else without_dashboard():
        stack.enter_context(ray_cluster(config))
    return {name: os.environ[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN") if name in os.environ}


def with_progress(function: Callable[..., R], *args: Any, **kwargs: Any) -> tuple[R, list[tuple[int, int]]]:
    """The result of a function, and what its `progress` counted to of what."""
    told: list[tuple[int, int]] = []

    class Told(Progress):
        def changed(self) -> None:
            told.append((self.done, self.total))

    return function(*args, progress=Told(), **kwargs), told


def with_environment(environment: dict[str, str], function: Callable[[], R]) -> R:
    with patch.dict(os.environ, environment):
        return function()
