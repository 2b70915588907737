"""The records of a run's steps in the store: results, errors, progress, seconds, training history, outcome.

A step may run in another process or on another machine than the command that waits for it, so all of this travels
through the store.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import Problem, UserError, problems_of
from ncsn.process import KFP_RUN_ID, utc_now
from ncsn.runs.folder import STEPS, RunFolder, claim_run
from ncsn.storage.heartbeat import Lease
from ncsn.storage.retry import limited

PREVIEW = "train/preview"  # name of the series of previews
_LAST_SECONDS = 5.0  # longest wait for the last progress to be written


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


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


@dataclass(frozen=True)
class StepProgress:
    """How much of its work a step has done, and its note."""

    done: int
    total: int
    unit: str
    note: str = ""


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


def default_checkpoint(folder: RunFolder, config: Config, *, last: str) -> str:
    """The checkpoint that `ncsn select` chose since training reached the `last` one of the run, else that one."""
    trained, chosen = read_result(folder, "train"), read_result(folder, "select")
    if trained is None or chosen is None or config.sampling.relative_width is not None:  # which asks for an average
        return last
    uri = str(chosen.result["checkpoint"])
    current = trained.result["checkpoint"] == last and trained.finished_at <= chosen.finished_at
    return uri if current and storage.exists(uri) else last


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


def read_progress(folder: RunFolder, step: str) -> StepProgress | None:
    """The last progress of `step`; None if there is none, or the store does not answer at once."""
    try:
        with limited(0):
            record = storage.find_json(folder.step(step, "progress.json"))
    except OSError:
        return None
    return None if record is None else StepProgress(**record)


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


@dataclass
class TrainingHistory:
    """The curves of a training run: figures are made from this file, without a tracking server."""

    # It is published with each checkpoint and cut to the checkpoint that training resumes from, so that no stretch is
    # in it twice.
    uri: str
    images_seen: list[int] = field(default_factory=list)  # of each point, ascending
    points: list[dict[str, float]] = field(default_factory=list)  # metric name -> value
    system: list[dict[str, float]] = field(default_factory=list, compare=False)  # load of the machine at each point
    times: list[int] = field(default_factory=list, compare=False)  # of each point, in milliseconds since 1970

    def add(
        self, point: dict[str, float], images_seen: int, *, system: dict[str, float] | None = None, when: int = 0
    ) -> None:
        """Append a point."""
        self.images_seen.append(images_seen)
        self.points.append(point)
        self.system.append(system or {})
        self.times.append(when or now_ms())

    def publish(self) -> None:
        """Write all points."""
        stored = {"images_seen": self.images_seen, "points": self.points, "system": self.system, "times": self.times}
        storage.write_json(self.uri, stored)

    def curve(self, name: str) -> NDArray[np.float64]:
        """Values [P] of one curve, NaN where a point lacks it."""
        pairs = zip(self.points, self.system, strict=True)
        return np.array([point.get(name, system.get(name, np.nan)) for point, system in pairs])

    def losses(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Values [P, S] of several curves, such as those of the levels; NaN where no image had that level."""
        return np.stack([self.curve(name) for name in names], axis=1)


def load_history(uri: str, *, until: int | None = None) -> TrainingHistory:
    """The stored points up to and including `until` images seen; none if there is no file."""
    if (stored := storage.find_json(uri)) is None:
        return TrainingHistory(uri)
    count = sum(1 for seen in stored["images_seen"] if until is None or seen <= until)
    return TrainingHistory(
        uri,
        stored["images_seen"][:count],
        stored["points"][:count],
        # Earlier versions did not keep these.
        stored.get("system", [{}] * count)[:count],
        stored.get("times", [now_ms()] * count)[:count],
    )


@dataclass
class ProgressFile:
    """Publishes how much of the work is done at `uri`, at most once per `interval` seconds. Picklable."""

    # A thread writes, so that the work waits for the store only at the end, and then not for long. An error of the
    # store stops nothing.

    uri: str
    unit: str
    interval: float = 1.0
    _note: str = field(default="", repr=False)
    _told: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _record: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _news: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _writer: threading.Thread | None = field(default=None, init=False, repr=False)

    def __reduce__(self) -> tuple[type[ProgressFile], tuple[str, str, float, str]]:
        return ProgressFile, (self.uri, self.unit, self.interval, self._note)

    def say(self, note: str) -> None:
        """Add a note to the numbers from now on."""
        self._note = note
        if self._told is not None:
            self(*self._told)

    def __call__(self, done: int, total: int) -> None:
        """Publish that `done` of `total` units are done."""
        self._told = (done, total)
        record = {"done": done, "total": total, "unit": self.unit} | ({"note": self._note} if self._note else {})
        with self._news:
            self._record = record
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="progress", daemon=True)
                self._writer.start()
            self._news.notify_all()
            if done >= total:
                self._news.wait_for(lambda: self._record is None, _LAST_SECONDS)

    def _write(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._record is not None)
                record = self._record
            pause = self.interval
            try:
                with limited(0):
                    storage.write_json(self.uri, record)
            except OSError:
                pause *= 30
            with self._news:
                if self._record is record:
                    self._record = None
                    self._news.notify_all()
                    if _is_last(record):
                        self._writer = None
                        return
                self._news.wait_for(lambda: _is_last(self._record), pause)


def _is_last(record: dict[str, Any] | None) -> bool:
    return record is not None and record["done"] >= record["total"]


def while_leased(progress: Callable[[int, int], None], lease: str | None, *, kept: str) -> Callable[[int, int], None]:
    """`progress`, which raises `LeaseExpired` when the launcher is gone, with `kept` about `{done}` of `{total}`."""
    if lease is None:
        return progress
    watched = Lease(lease)

    def update(done: int, total: int) -> None:
        progress(done, total)
        if done < total:
            watched.require(kept.format(done=done, total=total))

    return update
