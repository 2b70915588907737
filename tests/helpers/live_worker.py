"""A training worker that sends curves, without training, and what MLflow has of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from image_folders import Formats

from ncsn import storage
from ncsn.clock import now_ms
from ncsn.runs.history import load_history
from ncsn.runs.layout import RunFolder
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import StepRun

DEAD = "http://127.0.0.1:9"  # Discard's port, on which nothing listens here
LEVEL, RATE = "train/loss_sigma_0.5", "train/learning_rate"


PNG = Formats.image(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


class Worker:
    """Logs and keeps points as the training loop does."""

    def __init__(self, sink: LiveMetrics, folder: RunFolder, *, since: int) -> None:
        self.sink, self.folder = sink, folder
        self.history = load_history(folder.history, until=since - 1)

    def train(self, steps: range) -> None:
        for step in steps:
            point = {LEVEL: -float(step), RATE: float(step)}
            when = now_ms()
            self.sink.log({"system/cpu": 1.0} | point, step, when)
            self.history.add(point, step, system={"system/cpu": 1.0}, when=when)

    def save(self) -> None:
        self.history.publish()
        storage.write_bytes(self.folder.preview(self.history.images_seen[-1]), PNG)
        self.sink.log({}, self.history.images_seen[-1], self.history.times[-1], png=PNG)


def killed(program: str, *arguments: object) -> None:
    """Run Python code that kills its own process; its first argument is the folder of this module."""
    command = [sys.executable, "-c", program, str(Path(__file__).parent), *map(str, arguments)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def history(tracked: StepRun, name: str = RATE) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracked.client.get_metric_history(tracked.run_id, name)]


def pictures(tracked: StepRun) -> set[int]:
    """The steps that have a picture and its small copy."""
    names = [Path(file.path).name for file in tracked.client.list_artifacts(tracked.run_id, "images")]
    steps = Counter(int(name.removeprefix("train~preview+step+").partition("+")[0]) for name in names)
    return {step for step, files in steps.items() if files >= 2}


def assert_once(tracked: StepRun, count: int, *, previews: set[int]) -> None:
    """Each of the points 0, 1, ... of each curve is there once, and so are the pictures."""
    assert sorted(history(tracked, RATE)) == [(step, float(step)) for step in range(count)]
    assert sorted(history(tracked, LEVEL)) == [(step, -float(step)) for step in range(count)]
    assert Counter(step for step, _ in history(tracked, "system/cpu")) == dict.fromkeys(range(count), 1)
    assert pictures(tracked) == previews
