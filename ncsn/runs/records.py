"""What the steps of a run leave in its folder: results, errors, progress, seconds, curves, the end.

MLflow has the same numbers for looking at; this file is what figures are made from, without a tracking server. It is
published with each checkpoint and cut to the checkpoint that training resumes from, so no stretch is in it twice.

The step may run in another process or on another machine than the person who waits for it, so progress travels
through the store: whoever shows a bar polls the file.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config import Config
from ncsn.errors import Problem, UserError, problems_of
from ncsn.process import KFP_RUN_ID
from ncsn.runs.folder import STEPS, RunFolder, claim_run
from ncsn.storage.heartbeat import Lease
from ncsn.storage.retry import limited

LEVEL_LOSS = "train/loss_level_"
"""Before the level's number in a curve's name."""
PREVIEW = "train/preview"
"""Name of the series of previews."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass
class TrainingHistory:
    """Points of all curves."""

    uri: str
    images_seen: list[int] = field(default_factory=list)  # where each point is, ascending
    points: list[dict[str, float]] = field(default_factory=list)  # metric name -> value
    system: list[dict[str, float]] = field(default_factory=list, compare=False)  # load of the machine at each point
    times: list[int] = field(default_factory=list, compare=False)  # of each point, in milliseconds since 1970

    def add(
        self, point: dict[str, float], images_seen: int, *, system: dict[str, float] | None = None, when: int = 0
    ) -> None:
        """Take the curves' next point."""
        self.images_seen.append(images_seen)
        self.points.append(point)
        self.system.append(system or {})
        self.times.append(when or now_ms())

    def publish(self) -> None:
        """Write all points."""
        stored = {"images_seen": self.images_seen, "points": self.points, "system": self.system, "times": self.times}
        storage.write_text(self.uri, json.dumps(stored))

    def curve(self, name: str) -> NDArray[np.float64]:
        """Values [P] of one curve, NaN where a point lacks it."""
        return np.array([point.get(name, np.nan) for point in self.points])

    def level_losses(self, num_levels: int) -> NDArray[np.float64]:
        """Normalised loss [P, L] of each level; NaN where no image of the stretch had it."""
        width = len(str(num_levels - 1))
        return np.stack([self.curve(level_loss(level, width)) for level in range(num_levels)], axis=1)


def level_loss(level: int, width: int) -> str:
    """Name of a level's curve, its number padded to `width` digits so that names sort."""
    return f"{LEVEL_LOSS}{level:0{width}d}"


def load_history(uri: str, *, until: int | None = None) -> TrainingHistory:
    """The stored points up to and including `until` images seen; none if there is no file."""
    try:
        stored = storage.read_json(uri)
    except FileNotFoundError:
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


LAST_SECONDS = 5.0
"""Longest wait for the last record to be written."""


@dataclass
class ProgressFile:
    """Publishes `{"done", "total", "unit"}` and perhaps a `note` at `uri`, at most once per `interval` seconds.

    A thread writes, so that the work never waits for the store, but for the last record, and then not for long. A store
    that cannot be written stops nothing. Picklable, so that a Ray worker can carry it.
    """

    uri: str
    unit: str
    interval: float = 1.0
    _note: str = field(default="", repr=False)
    _told: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _record: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _news: threading.Condition = field(default_factory=threading.Condition, init=False, repr=False)
    _writer: threading.Thread | None = field(default=None, init=False, repr=False)

    def __reduce__(self) -> tuple[type[ProgressFile], tuple[str, str, float, str]]:
        """The thread stays here."""
        return ProgressFile, (self.uri, self.unit, self.interval, self._note)

    def say(self, note: str) -> None:
        """Show this beside the numbers from now on."""
        self._note = note
        if self._told is not None:
            self(*self._told)

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` units are done."""
        self._told = (done, total)
        record = {"done": done, "total": total, "unit": self.unit} | ({"note": self._note} if self._note else {})
        with self._news:
            self._record = record
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="progress", daemon=True)
                self._writer.start()
            self._news.notify_all()
            if done >= total:
                self._news.wait_for(lambda: self._record is None, LAST_SECONDS)

    def _write(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._record is not None)
                record = self._record
            pause = self.interval
            try:
                with limited(0):
                    storage.write_text(self.uri, json.dumps(record))
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
    """`progress`, and the end of the work when its launcher is gone.

    Args:
        progress: Called with (done, total).
        lease: URI of the launcher's heartbeat, or None.
        kept: What is saved then, with `{done}` and `{total}`, for the message.

    Returns:
        A function of (done, total) that raises `LeaseExpired` when the lease has.
    """
    if lease is None:
        return progress
    watched = Lease(lease)

    def update(done: int, total: int) -> None:
        progress(done, total)
        if done < total:
            watched.require(kept.format(done=done, total=total))

    return update


def spent_seconds(folder: RunFolder, step: str) -> float | None:
    """What all calls of the step took together, but for those that were killed; None if it was never at work."""
    try:
        return float(storage.read_json(folder.step(step, "spent.json"))["seconds"])
    except FileNotFoundError:
        return None


def add_seconds(folder: RunFolder, step: str, seconds: float) -> None:
    """Add to the account of the step; a full disk must not hide the first error."""
    with suppress(OSError):
        whole = (spent_seconds(folder, step) or 0.0) + seconds
        storage.write_text(folder.step(step, "spent.json"), json.dumps({"seconds": round(whole, 3)}))


def stored_record(folder: RunFolder, step: str) -> dict[str, Any] | None:
    """The record of an earlier call of the step: its inputs, its result and when it was made; None if there is none."""
    try:
        record: dict[str, Any] = storage.read_json(folder.step(step, "result.json"))
    except FileNotFoundError:
        return None
    return record


@contextmanager
def recorded(config: Config, run: str, step: str) -> Iterator[RunFolder]:
    """Leave whatever ends the block early as the step's `error.json`, for those who wait elsewhere.

    Commands and pipeline tasks put all of a step into one such block, so that a failure before its work is told too.
    What an earlier attempt left is removed first.

    Args:
        config: The experiment.
        run: Name of the run.
        step: Name of the step.

    Raises:
        ForeignRun: if the run belongs to another config, whose records stay as they are.
    """
    folder = claim_run(config, run)
    storage.delete_file(folder.step(step, "error.json"))
    try:
        yield folder
    except BaseException as error:
        _record_error(folder, step, error)
        raise


def stored_error(folder: RunFolder, step: str) -> dict[str, Any] | None:
    """What ended the step's last attempt, or None: `type`, `user` (a mistake?), `message`, `problems` and `kfp_run`."""
    try:
        record: dict[str, Any] = storage.read_json(folder.step(step, "error.json"))
    except FileNotFoundError:
        return None
    return record


def stored_mistake(folder: RunFolder, step: str) -> UserError | None:
    """The user's mistake that ended the step's last attempt, or None."""
    record = stored_error(folder, step)
    return UserError.of(map(Problem.from_json, record["problems"])) if record is not None and record["user"] else None


def _record_error(folder: RunFolder, step: str, error: BaseException) -> None:
    """A full disk must not hide the first error."""
    problems = problems_of(error)
    record = {
        "type": type(error).__name__,
        "user": bool(problems),
        "message": str(error),
        "problems": [problem.to_json() for problem in problems],
        "kfp_run": os.environ.get(KFP_RUN_ID, ""),
    }
    try:
        storage.write_text(folder.step(step, "error.json"), json.dumps(record))
    except OSError as failure:
        error.add_note(f"(the error could not be recorded in the store: {failure})")


STATUS_FILE = "status.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: FINISHED, FAILED or KILLED, as MLflow calls it.
        reason: Why, if it did not finish.
        failed_step: The step that stopped it, if one did.
    """

    status: str
    reason: str = ""
    failed_step: str | None = None

    def __str__(self) -> str:
        return f"{self.failed_step}: {self.reason}" if self.failed_step else self.reason


def write_outcome(folder: RunFolder, outcome: Outcome) -> None:
    """Say how the run ended."""
    record = asdict(outcome) | {"finished_at": datetime.now(UTC).isoformat(timespec="seconds")}
    storage.write_text(storage.join(folder.uri, STATUS_FILE), json.dumps(record, indent=1))


def clear_outcome(folder: RunFolder) -> None:
    """Say that the run is at work."""
    storage.delete_file(storage.join(folder.uri, STATUS_FILE))


def read_outcome(folder: RunFolder) -> Outcome | None:
    """How the run ended; None if it is at work or was never begun."""
    try:
        record = storage.read_json(storage.join(folder.uri, STATUS_FILE))
    except FileNotFoundError:
        return None
    return Outcome(record["status"], record["reason"], record["failed_step"])


@dataclass(frozen=True)
class StepRecord:
    """One step's stored result."""

    step: str
    result: Mapping[str, Any]
    seconds: float
    finished_at: str


@dataclass(frozen=True)
class StepError:
    """Why a step failed; the problems of a mistake."""

    kind: str
    message: str
    mistake: bool
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class StepProgress:
    """How far a step is, and what it has to say meanwhile."""

    done: int
    total: int
    unit: str
    note: str = ""


def read_record(folder: RunFolder, step: str) -> StepRecord | None:
    """The stored result of `step`, or None if it has not finished in this run."""
    record = existing_json(folder.step(step, "result.json"))
    if record is None:
        return None
    return StepRecord(step, record["result"], record["seconds"], record["finished_at"])


def stored_records(folder: RunFolder) -> dict[str, StepRecord]:
    """The records of all steps that have finished in this run, in the pipeline's order."""
    records = {step: read_record(folder, step) for step in STEPS}
    return {step: record for step, record in records.items() if record is not None}


def read_progress(folder: RunFolder, step: str) -> StepProgress | None:
    """The last progress that `step` published; None if there is none, or the store does not answer at once."""
    try:
        with limited(0):
            record = existing_json(folder.step(step, "progress.json"))
    except OSError:
        return None
    return None if record is None else StepProgress(**record)


def read_error(folder: RunFolder, step: str) -> StepError | None:
    """The error that `step` recorded, or None."""
    record = existing_json(folder.step(step, "error.json"))
    if record is None:
        return None
    problems = tuple(map(Problem.from_json, record["problems"]))
    return StepError(record["type"], record["message"], mistake=record["user"], problems=problems)


def forget_attempts(folder: RunFolder) -> None:
    """Remove progress and errors of earlier attempts, so that what appears is of this one."""
    for step in STEPS:
        for file in ("progress.json", "error.json"):
            storage.delete_file(folder.step(step, file))


def existing_json(uri: str) -> dict[str, Any] | None:
    """The JSON at `uri`; None if there is none."""
    try:
        record: dict[str, Any] = storage.read_json(uri)
    except FileNotFoundError:
        return None
    return record
