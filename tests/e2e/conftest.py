"""Whole runs of the real command, and a way to see which processes they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from experiments import tiny

from ncsn.config import to_yaml
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import read_finished

SIZES = ("network.widths=[8, 8]", "train.batch_size=32", "train.num_images=640", "sampling.num_images=16")
SIZES += ("train.checkpoint_every_images=320", "train.report_every_images=160", "sampling.batch_size=8")
MARK = "NCSN_TEST_MARK"
PATIENCE_SECONDS = 600


@dataclass
class Workplace:
    """A store with an experiment, and the commands run on it."""

    root: Path
    config: Path
    # In the environment of every process that the commands start.
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *args: str, program: Sequence[str] = ("-m", "ncsn"), **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *program, *args, "--config", str(self.config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ray Train passes on at most one report in this interval; its default of two seconds is for long runs.
            env=os.environ | {MARK: self.mark, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"},
            **options,
        )

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        stdout, stderr = (process := self.start(*args)).communicate(timeout=PATIENCE_SECONDS)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def processes(self) -> dict[int, str]:
        """Living processes that descend from the commands, in whatever session or group they are."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it ended meanwhile
                continue
        return found

    def wait_until(self, condition: Callable[[], object], *, what: str, seconds: float = PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in time: {what}; alive: {self.processes()}"
            time.sleep(0.1)

    def wait_for_silence(self) -> None:
        self.wait_until(lambda: not self.processes(), what="every process of the run has ended")

    def folder(self, run: str) -> Path:
        return self.root / "runs" / run

    def result(self, run: str, step: str) -> dict[str, Any]:
        finished = read_finished(RunFolder(str(self.root), run), step)
        assert finished is not None
        return dict(finished.values)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("e2e")
    place = Workplace(folder / "store", folder / "tiny.yaml")
    settings = ("data.max_images=256", "train.ema={kind: decay, per_step: 0.9}", "sampling.sampler.steps_per_level=2")
    place.config.write_text(to_yaml(tiny(place.root, *settings, *SIZES, "compute.num_workers=2")))
    yield place
    for pid in place.processes():
        os.kill(pid, 9)
