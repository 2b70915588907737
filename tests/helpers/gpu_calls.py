"""Calls on a Ray cluster with GPUs that return their process and GPUs, in a module that the workers can import.

Ray assigns GPUs by number, also on a machine without any.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ncsn.distributed  # noqa: F401 - sets Ray's environment

import ray  # isort: skip

Place = tuple[int, tuple[int, ...]]  # process and the numbers of its GPUs


def start(gpus: int) -> None:
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init(address="local", num_cpus=gpus, num_gpus=gpus, include_dashboard=False, logging_level="WARNING")


def place(seconds: float) -> Place:
    time.sleep(seconds)
    return os.getpid(), tuple(ray.get_gpu_ids())


def meet(folder: Path) -> Place:
    """The place of this call, which waits until two processes have made calls."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return place(0.0)


def die_once(file: Path) -> str:
    """Kill this process; in a second call, return the name."""
    if file.name == "fatal" or not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return file.name


def refuse(number: int) -> int:
    if number == 2:
        raise ValueError("not 2")
    return number


def results(function, each, *, gpu=True, at_once=None):
    """What the calls return, one of which is tried again at most once."""
    from ncsn.distributed import ray_calls  # here, since it takes each worker a second

    ray_calls.RETRIES = 1
    return [found for _, found in ray_calls.call_all(function, each, cpus=1, gpu=gpu, in_flight=at_once)]


def gpus_left(seconds: float) -> float:
    """GPUs that are free again within `seconds`."""
    deadline = time.monotonic() + seconds
    while (free := ray.available_resources().get("GPU", 0.0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return float(free)


def in_two(number: int, *, names: list[str], last: Path) -> Iterator[str]:
    """The name of a number; then that of the process, once the caller has the first value."""
    yield names[number]
    while not (last / str(number)).exists():
        time.sleep(0.05)
    yield str(os.getpid())


def told(folder: Path, *, gpu: bool) -> list[tuple[int, str]]:
    """What two calls yield, the second values of which wait for the first."""
    from ncsn.distributed import ray_calls

    found = list[tuple[int, str]]()
    calls = ray_calls.call_all(partial(in_two, names=["a", "b"], last=folder), [0, 1], cpus=1, gpu=gpu)
    for number, value in calls:
        found.append((number, value))
        (folder / str(number)).touch()
    return found
