"""How long the command line takes."""

from __future__ import annotations

import json
import statistics
import subprocess

from benchmarks.digits_run import NCSN, RUN, digits_run, seconds_of
from benchmarks.measure import Row
from ncsn.runs.folder import run_folder
from ncsn.runs.history import load_history


def rows(*, rounds: int = 3) -> list[Row]:
    """`ncsn --help`, the pipeline of the digits, 64 digits from its checkpoint, and the estimated memory."""
    run = digits_run()
    work = {step: _arithmetic(step) for step in ("train", "sample", "evaluate")}
    few = ["--set", "sampling.num_images=64"]
    sampling = [
        seconds_of([*NCSN, "sample", *run.options, *few, "--set", f"sampling.seed={1 + n}"]) for n in range(rounds)
    ]
    return [
        Row(
            "pipeline",
            "`ncsn run` on the digits outside training, sampling and evaluation arithmetic",
            run.seconds - sum(work.values()),
            unit="s",
            target=30,
            higher_is_better=False,
            detail=f"{run.seconds:.0f} s in all, "
            + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in work.items())
            + " with its tracking",
        ),
        Row(
            "command line",
            "`ncsn --help`",
            statistics.median(seconds_of([*NCSN, "--help"]) for _ in range(rounds)),
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
        _memory(),
    ]


def _memory() -> Row:
    """Peak memory of a training worker over the estimate of `ncsn plan`."""
    run = digits_run()
    plan = subprocess.run([*NCSN, "plan", *run.options, "--json"], check=True, capture_output=True, text=True)
    planned = 1000 * json.loads(plan.stdout)["worker_gb"]
    taken = load_history(run_folder(run.config, RUN).history).curve("system/worker_memory_megabytes").max()
    return Row(
        "growth",
        "memory of a training worker on the digits over the estimate of `ncsn plan`",
        taken / planned,
        detail=f"{taken:,.0f} and {planned:,.0f} MB",
    )


def _arithmetic(step: str) -> float:
    """Seconds of a step's computation, or of the whole step if it does not report them."""
    found = digits_run().step(step)
    return float(found.result.get("seconds", found.seconds))


if __name__ == "__main__":
    for row in rows():
        print(row, flush=True)
