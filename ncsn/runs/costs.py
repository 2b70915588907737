"""What the steps of a run reserve: hours of CPU cores and of GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ncsn.config import Config
from ncsn.runs.folder import run_folder
from ncsn.runs.records import read_step
from ncsn.runs.steps import STEPS, STEPS_BY_WORKERS


@dataclass(frozen=True)
class Cost:
    """Some seconds on reserved cores and GPUs."""

    seconds: float
    cpu_hours: float
    gpu_hours: float

    def times(self, factor: float) -> Cost:
        return Cost(factor * self.seconds, factor * self.cpu_hours, factor * self.gpu_hours)


def cost_of(config: Config, step: str, seconds: float) -> Cost:
    """The cost of `seconds` of a step."""
    compute = config.compute
    workers = compute.max_workers if step in STEPS_BY_WORKERS else 1
    gpus = workers if compute.use_gpu and step in STEPS_BY_WORKERS else 0
    hours = seconds / 3600
    return Cost(seconds, workers * compute.cpus_per_worker * hours, gpus * hours)


def total(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("seconds", "cpu_hours", "gpu_hours")))


def spent(config: Config, *, run: str) -> dict[str, Cost]:
    """The cost of each step of a run so far, failed attempts included."""
    seconds = {step: read_step(run_folder(config, run), step).seconds for step in STEPS}
    return {step: cost_of(config, step, value) for step, value in seconds.items() if value}
