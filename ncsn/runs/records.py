"""The records of a run's steps in the store: results, errors, seconds, outcome.

A step may run in another process or on another machine than the command that waits for it, so all of this travels
through the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import Problem, UserError, problems_of
from ncsn.process import KFP_RUN_ID, utc_now
from ncsn.runs.folder import RunFolder, claim_run
from ncsn.runs.steps import STEPS


@dataclass(frozen=True)
class StepRecord:
    """The stored result of one step."""

    inputs: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float
    finished_at: str


@dataclass(frozen=True)
class StepError:
    """Why a step failed; a user's mistake has its problems."""

    kind: str
    message: str
    mistake: bool
    problems: tuple[Problem, ...] = ()
    kfp_run: str = ""


def read_result(folder: RunFolder, step: str) -> StepRecord | None:
    """The stored result of `step`, or None if it has not finished in this run."""
    record = storage.find_json(folder.step(step, "result.json"))
    if record is None:
        return None
    return StepRecord(record.get("inputs", {}), record["result"], record["seconds"], record["finished_at"])


def write_result(
    folder: RunFolder, step: str, *, inputs: Mapping[str, Any], result: Mapping[str, Any], seconds: float
) -> None:
    """Publish the result of `step` with the inputs that it belongs to."""
    record = {
        "step": step,
        "run": folder.run,
        "inputs": inputs,
        "result": result,
        "seconds": round(seconds, 3),
        "finished_at": utc_now(),
    }
    storage.write_json(folder.step(step, "result.json"), record, indent=1)


def read_results(folder: RunFolder) -> dict[str, StepRecord]:
    """The results of all steps that have finished in this run, in the pipeline's order."""
    records = {step: read_result(folder, step) for step in STEPS}
    return {step: record for step, record in records.items() if record is not None}


def read_error(folder: RunFolder, step: str) -> StepError | None:
    """The error that ended the last attempt of `step`, or None."""
    record = storage.find_json(folder.step(step, "error.json"))
    if record is None:
        return None
    problems = tuple(map(Problem.from_json, record.get("problems", ())))
    return StepError(record["type"], record["message"], record["user"], problems, record.get("kfp_run", ""))


def read_mistake(folder: RunFolder, step: str) -> UserError | None:
    """The user's mistake that ended the last attempt of `step`, or None."""
    error = read_error(folder, step)
    return UserError.of(error.problems) if error is not None and error.mistake and error.problems else None


@contextmanager
def recorded(config: Config, run: str, step: str) -> Iterator[RunFolder]:
    """Record an error in the block as that of `step`, in place of the error of an earlier attempt."""
    # Commands and pipeline tasks put a whole step into one such block, so that a failure before its work is recorded.
    # The records of a run that belongs to another config stay as they are.
    folder = claim_run(config, run)
    storage.delete_file(folder.step(step, "error.json"))
    try:
        yield folder
    except BaseException as error:
        _write_error(folder, step, error)
        raise


def _write_error(folder: RunFolder, step: str, error: BaseException) -> None:
    problems = problems_of(error)
    record = {
        "type": type(error).__name__,
        "user": bool(problems),
        "message": str(error),
        "problems": [problem.to_json() for problem in problems],
        "kfp_run": os.environ.get(KFP_RUN_ID, ""),
    }
    try:
        storage.write_json(folder.step(step, "error.json"), record)
    except OSError as failure:  # a full disk must not hide the first error
        error.add_note(f"(the error could not be recorded in the store: {failure})")


def forget_attempts(folder: RunFolder) -> None:
    """Delete progress and errors of earlier attempts."""
    for step in STEPS:
        for file in ("progress.json", "error.json"):
            storage.delete_file(folder.step(step, file))


def spent_seconds(folder: RunFolder, step: str) -> float | None:
    """Seconds of all attempts of `step`, without those that were killed; None if it never started."""
    record = storage.find_json(folder.step(step, "spent.json"))
    return None if record is None else float(record["seconds"])


def add_seconds(folder: RunFolder, step: str, seconds: float) -> None:
    """Add the seconds of an attempt of `step`."""
    with suppress(OSError):  # a full disk must not hide the first error
        whole = (spent_seconds(folder, step) or 0.0) + seconds
        storage.write_json(folder.step(step, "spent.json"), {"seconds": round(whole, 3)})


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str  # FINISHED, FAILED or KILLED, as in MLflow
    reason: str = ""
    failed_step: str | None = None

    def __str__(self) -> str:
        return f"{self.failed_step}: {self.reason}" if self.failed_step else self.reason


def write_outcome(folder: RunFolder, outcome: Outcome) -> None:
    """Publish how the run ended."""
    record = asdict(outcome) | {"finished_at": utc_now()}
    storage.write_json(folder.status, record, indent=1)


def clear_outcome(folder: RunFolder) -> None:
    """Mark the run as not ended."""
    storage.delete_file(folder.status)


def read_outcome(folder: RunFolder) -> Outcome | None:
    """How the run ended; None if it has not ended or never started."""
    record = storage.find_json(folder.status)
    return None if record is None else Outcome(record["status"], record["reason"], record["failed_step"])
