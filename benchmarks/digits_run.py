"""One run of the digits' pipeline, shared by the parts that need it."""

from __future__ import annotations

import atexit
import functools
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ncsn.config import Config, from_yaml
from ncsn.runs.folder import RunFolder, StepRecord, read_step

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
NCSN = [sys.executable, "-m", "ncsn"]
RUN = "bench"


@dataclass(frozen=True)
class DigitsRun:
    """A finished `ncsn run` on the digits."""

    store: str  # deleted when this process ends
    seconds: float

    @property
    def options(self) -> list[str]:
        """The command-line options that select the run."""
        return ["--config", str(CONFIG), "--set", f"storage.root={self.store}", "--run", RUN]

    @property
    def config(self) -> Config:
        """Its config."""
        return from_yaml(CONFIG.read_text(), overrides=[f"storage.root={self.store}"])

    def step(self, name: str) -> StepRecord:
        return read_step(RunFolder(self.store, RUN), name)


@functools.cache
def digits_run() -> DigitsRun:
    """The run, which the first call makes."""
    folder = tempfile.TemporaryDirectory(prefix="ncsn-bench-")
    atexit.register(folder.cleanup)
    seconds = seconds_of([*NCSN, "run", *DigitsRun(folder.name, 0.0).options])
    return DigitsRun(folder.name, seconds)


def seconds_of(command: list[str]) -> float:
    """Seconds from the start to the end of a process."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began
