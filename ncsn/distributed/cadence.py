"""A clock that all workers read alike."""

from __future__ import annotations

import time

import torch

from ncsn.distributed.worker_context import WorkerContext


class Cadence:
    """Is due about every few seconds, on all workers at the same step.

    What all workers must do together cannot wait for each one's own clock, and a fixed number of steps is too often for
    a small network and too seldom for a large one. So the workers agree, each time, on the steps to the next.

    Args:
        context: The workers.
        seconds: Time between two times that it is due.
    """

    def __init__(self, context: WorkerContext, *, seconds: float) -> None:
        self._context, self._seconds = context, seconds
        self._steps = self._left = 1
        self._since = time.perf_counter()

    def due(self) -> bool:
        """Count a step; whether it is time. A collective call when it is."""
        self._left -= 1
        if self._left:
            return False
        now = time.perf_counter()
        mean = torch.tensor([(now - self._since) / self._steps], device=self._context.device)
        step_seconds = float(self._context.sum_over_workers(mean)) / self._context.world_size
        # At most twice as far as before: the first steps of a training are not like the others.
        self._steps = self._left = max(1, min(2 * self._steps, round(self._seconds / max(step_seconds, 1e-9))))
        self._since = now
        return True
