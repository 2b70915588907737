"""What the command line makes its user wait for."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
NCSN = [sys.executable, "-m", "ncsn"]


def rows(*, rounds: int = 3) -> list[Row]:
    """`ncsn --help`; the digits' whole pipeline; 64 digits from its checkpoint."""
    with tempfile.TemporaryDirectory() as store:
        options = ["--config", str(CONFIG), "--set", f"storage.root={store}", "--run", "bench"]
        whole = _seconds([*NCSN, "run", *options])
        work = {step: _arithmetic(store, step) for step in ("train", "sample", "evaluate")}
        sample = ["--set", "sampling.num_images=64"]
        sampling = [
            _seconds([*NCSN, "sample", *options, *sample, "--set", f"sampling.seed={1 + n}"]) for n in range(rounds)
        ]
    return [
        Row(
            "pipeline",
            "`ncsn run` on the digits outside training, sampling and evaluation arithmetic",
            whole - sum(work.values()),
            unit="s",
            target=30,
            higher_is_better=False,
            detail=f"{whole:.0f} s in all, " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in work.items()),
        ),
        Row(
            "command line",
            "`ncsn --help`",
            statistics.median(_seconds([*NCSN, "--help"]) for _ in range(rounds)),
            unit="s",
            target=1,
            higher_is_better=False,
        ),
        Row(
            "command line",
            "`ncsn sample` of 64 digits, process start to PNG",
            statistics.median(sampling),
            unit="s",
            target=8,
            higher_is_better=False,
        ),
    ]


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def _arithmetic(store: str, step: str) -> float:
    """Seconds that a step computed, of the whole step where it does not tell."""
    (path,) = Path(store).glob(f"runs/bench/steps/{step}/result.json")
    found = json.loads(path.read_text())
    return float(found["result"].get("seconds", found["seconds"]))


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
