"""The parts of a large dataset as Ray tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import ray

from ncsn.data.dataset import PartTask
from ncsn.distributed.cluster import on_this_machine
from ncsn.distributed.tasks import run_tasks

# One running and one waiting per core, so that the queue of a million images stays small.
TASKS_PER_CPU = 2
# Up to here the threads of one process keep all cores busy, and starting Ray takes as long as ten thousand images.
FEW_CORES = 4


def few_cores() -> bool:
    """Whether this process does the work alone at least as fast as Ray tasks."""
    return on_this_machine() and (os.cpu_count() or 1) <= FEW_CORES


def write_parts(tasks: Iterable[PartTask]) -> Iterator[object]:
    """Write parts on the connected cluster; yields in their order, each time that one is in the store."""
    most = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    return run_tasks(_write_part, tasks, cpus=1, in_flight=most, ordered=True)


def _write_part(task: PartTask) -> None:
    for _ in task.write(cores=1):
        pass
