"""Work on Ray: clusters, tasks, training, searches."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ncsn.process import settle

if TYPE_CHECKING:
    from ncsn.training.loop import TrainingJob, TrainOutcome

settle()  # No program that uses the library comes here, and all that computes for a step does, before it loads torch.
# Ray Train takes at most one report per interval and sees the end of training at the next; its default is 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # the workers' lines go to files too

if "ray" not in sys.modules:
    # Settings that Ray reads when it is imported; the user's come first.
    # Its autoscaler, which runs where it has no node to add too, repeats every five seconds that a worker is missing.
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    if "RAY_ADDRESS" not in os.environ:  # for a cluster that this process may start
        # There is no other switch for loopback only and for clients that show a token.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    elif {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default does not send a token that is there


def train(job: TrainingJob, *, run_uri: str) -> TrainOutcome:
    """Train on the connected Ray cluster; the same `run_uri` resumes from its newest whole checkpoint.

    `RuntimeError` if workers failed more often than `compute.max_failures`, or could not be started.
    """
    from ncsn.distributed.cluster import is_own, needs_ray_train, on_this_machine, require_resources
    from ncsn.distributed.trainer import train_by_tasks

    require_resources(job.config)
    compute = job.config.compute
    # A cluster of its own is not preempted.
    if not needs_ray_train(compute) and (is_own() or (compute.num_workers == 1 and on_this_machine())):
        return train_by_tasks(job, run_uri=run_uri)
    from ncsn.distributed.ray_train import train_by_ray  # takes a second, which tasks need not wait for

    return train_by_ray(job, run_uri=run_uri)
