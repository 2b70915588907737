"""How long the command line takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import read_finished

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
NCSN = [sys.executable, "-m", "ncsn"]
RUN = "bench"


def rows(*, rounds: int = 3) -> list[Row]:
    """`ncsn --help`, the pipeline of the digits, and 64 digits from its checkpoint."""
    with tempfile.TemporaryDirectory(prefix="ncsn-bench-") as store:
        run = ["--config", str(CONFIG), "--set", f"storage.root={store}", "--run", RUN]
        whole = seconds_of([*NCSN, "run", *run])
        work = {step: arithmetic(RunFolder(store, RUN), step) for step in ("train", "sample", "evaluate")}
        sample = [*NCSN, "sample", *run, "--set", "sampling.num_images=64"]
        sampling = [seconds_of([*sample, "--set", f"sampling.seed={1 + number}"]) for number in range(rounds)]
    helping = [seconds_of([*NCSN, "--help"]) for _ in range(rounds)]
    return [
        Row(
            "commands",
            "`ncsn run` on the digits outside training, sampling and evaluation arithmetic",
            whole - sum(work.values()),
            unit="s",
            target=30,
            higher_is_better=False,
            detail=f"{whole:.0f} s in all, "
            + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in work.items())
            + " with its tracking",
        ),
        Row("commands", "`ncsn --help`", statistics.median(helping), unit="s", target=1, higher_is_better=False),
        Row(
            "commands",
            "`ncsn sample` of 64 digits, process start to PNG",
            statistics.median(sampling),
            unit="s",
            target=8,
            higher_is_better=False,
        ),
    ]


def arithmetic(folder: RunFolder, step: str) -> float:
    """Seconds of a step's computation, or of the whole step if it does not report them."""
    found = read_finished(folder, step)
    assert found is not None
    return float(found.values.get("seconds", found.seconds))


def seconds_of(command: list[str]) -> float:
    """Seconds from the start to the end of a process."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
