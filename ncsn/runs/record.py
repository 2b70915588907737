"""What a run records of its steps: the last attempt and the last result of each, how the run ended, and its cost.

A step may run in another process or on another machine than the command that waits for it, so all of this travels
through the store. One process writes the attempt at a time: the driver of the step while it works, else the launcher
whose job the backend has accepted. The result is written by who did the work alone, and no attempt that ends later
loses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from ncsn import storage
from ncsn.clock import utc_now
from ncsn.config import Config
from ncsn.environment import KFP_RUN_ID
from ncsn.errors import Problem, UserError, problems_of
from ncsn.events import tell
from ncsn.runs.layout import RunFolder
from ncsn.runs.results import Result, SearchResult, TrainResult
from ncsn.runs.steps import FIRST, SEARCH, STEP_TABLE, steps_of
from ncsn.storage.heartbeat import LeaseExpired, is_abandoned

State = Literal["", "RUNNING", "FINISHED", "FAILED", "KILLED"]  # as in MLflow; empty before the first attempt
STOPPED: dict[type[BaseException], str] = {SystemExit: "terminated", KeyboardInterrupt: "interrupted"}
R = TypeVar("R", bound=Result)


class ForeignRun(UserError):
    """The run belongs to another config, has read other images, or a job does the step with other inputs."""


@dataclass(frozen=True)
class StepError:
    """Why a step failed."""

    kind: str
    message: str
    problems: tuple[Problem, ...] = ()  # of a user's mistake
    kfp_run: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Attempt:
    """The last attempt of a step."""

    state: State = ""
    error: StepError | None = None
    request: str = ""  # of the launcher whose driver worked, see `RemoteStep.request`; "" if none
    reads: Mapping[str, str] = field(default_factory=dict)  # URIs of its inputs
    mlflow: Mapping[str, str] = field(default_factory=dict)  # run_id and parent_run_id of the step's MLflow run
    seconds: float = 0.0  # of all attempts, without those that were killed


@dataclass(frozen=True)
class Finished:
    """The result of the last attempt that finished."""

    step: str
    key: Mapping[str, Any]  # what decided it
    values: Mapping[str, Any]
    finished_at: str
    seconds: float  # of all attempts until then

    @property
    def result(self) -> Any:
        """As the step's type; `UserError` if another version of this program wrote it."""
        try:
            return STEP_TABLE[self.step].result.of(self.values)
        except ValidationError as error:
            reason = "its result is of another version of this program"
            raise UserError(self.step, reason, hint="do the step again") from error

    def __str__(self) -> str:
        """A line for people."""
        try:
            return str(self.result)
        except UserError:
            return "a result of another version of this program"


def read_attempt(folder: RunFolder, step: str) -> Attempt:
    record = storage.absolute_uris(storage.find_json(folder.step(step, "attempt.json")) or {}, folder.root)
    if error := record.get("error"):
        record["error"] = StepError(**error | {"problems": tuple(map(Problem.from_json, error["problems"]))})
    return Attempt(**record)


def update_attempt(folder: RunFolder, step: str, **changes: Any) -> None:
    attempt = replace(read_attempt(folder, step), **changes)
    error = attempt.error and vars(attempt.error) | {"problems": [each.to_json() for each in attempt.error.problems]}
    values = storage.relative_uris(vars(attempt) | {"error": error}, folder.root)
    storage.write_json(folder.step(step, "attempt.json"), values, indent=1)


def read_finished(folder: RunFolder, step: str) -> Finished | None:
    record = storage.find_json(folder.step(step, "result.json"))
    return None if record is None else Finished(step=step, **storage.absolute_uris(record, folder.root))


def read_result(folder: RunFolder, kind: type[R]) -> R | None:
    """The result of the step of this type; None if none has finished."""
    finished = read_finished(folder, kind.step)
    return None if finished is None else finished.result


def write_result(folder: RunFolder, result: Result, *, key: Mapping[str, Any], **attempt: Any) -> None:
    """Record the result of a step, then that its `attempt` has finished."""
    seconds = read_attempt(folder, result.step).seconds
    write_finished(folder, Finished(result.step, key, result.plain(), utc_now(), seconds))
    update_attempt(folder, result.step, state="FINISHED", error=None, **attempt)


def write_finished(folder: RunFolder, finished: Finished) -> None:
    values = {name: value for name, value in vars(finished).items() if name != "step"}
    place = folder.step(finished.step, "result.json")
    storage.write_json(place, storage.relative_uris(values, folder.root), indent=1)


def version_of(folder: RunFolder) -> str:
    """The registered version, models:/NAME/VERSION, that was opened as this run; empty for a run that is trained."""
    trained = read_finished(folder, TrainResult.step)
    return "" if trained is None else str(trained.key.get("model", ""))


def folders_of(folder: RunFolder, config: Config) -> dict[str, RunFolder]:
    """Step -> the folder of its run. The best trial of a search is trained as another run, which the search names."""
    if config.search is None or not read_attempt(folder, SEARCH).state:
        return dict.fromkeys((step for step in steps_of(config) if step != SEARCH), folder)
    found = read_result(folder, SearchResult)
    trained = folder if found is None else replace(folder, run=found.run)
    return {step: folder if step in (FIRST, SEARCH) else trained for step in steps_of(config)}


def finished_steps(folders: Mapping[str, RunFolder]) -> dict[str, Finished]:
    """The results of the steps that have finished in these folders."""
    found = {step: read_finished(folder, step) for step, folder in folders.items()}
    return {step: finished for step, finished in found.items() if finished is not None}


def has_other_job(folder: RunFolder, step: str, attempt: Attempt, request: str | None) -> bool:
    """Whether a job for another request works on the step; one whose launcher is gone does not."""
    other = attempt.state == "RUNNING" and attempt.request not in ("", request)
    return other and not is_abandoned(folder.step(step, f"lease/{attempt.request}"))


def record_failure(folder: RunFolder, step: str, error: BaseException, *, before: Attempt, request: str | None) -> None:
    """Record what ended an attempt of the step, whose record was `before`, unless more is known already.

    `request` is that of the attempt, None if it has begun nothing. A job that goes on for another one keeps its record.
    """
    try:
        now = read_attempt(folder, step)
        state = state_after(error)
        if has_other_job(folder, step, now, request):
            return
        message = STOPPED.get(type(error)) or str(error)
        # What the driver elsewhere wrote says more than what its launcher saw, unless it was only told to end, for a
        # reason that the launcher knows, or the launcher repeats it and says more.
        stronger = (
            now.error in (None, before.error)
            or (now.state, state) == ("KILLED", "FAILED")
            or (now.error.message != message and now.error.message in message)
        )
        idle = type(error) in STOPPED and now.state == "FINISHED"  # no work has begun since
        ended_well = now.state == "FINISHED" and now != before  # by another process
        if stronger and not ended_well and not idle:
            kfp_run = os.environ.get(KFP_RUN_ID, "")
            record = StepError(type(error).__name__, message, problems_of(error), kfp_run)
            update_attempt(folder, step, state=state, error=record, request=request or "")
    except OSError as failure:  # a full disk must not hide the first error
        error.add_note(f"(the error could not be recorded in the store: {failure})")


def state_after(error: BaseException) -> State:
    return "FAILED" if isinstance(error, Exception) and not isinstance(error, LeaseExpired) else "KILLED"


@dataclass(frozen=True)
class Outcome:
    """How the last pipeline of a run ended."""

    status: str  # FINISHED, FAILED or KILLED, as in MLflow
    reason: str = ""
    failed_step: str | None = None

    def __str__(self) -> str:
        return f"{self.failed_step}: {self.reason}" if self.failed_step else self.reason


def write_outcome(folder: RunFolder, outcome: Outcome, *, closed: bool = False) -> None:
    """Publish how the run ended; `closed` if no task follows, which is told once."""
    before = storage.find_json(folder.status) or {}
    storage.write_json(folder.status, asdict(outcome) | {"finished_at": utc_now(), "closed": closed}, indent=1)
    if closed and not (before.get("closed") and before["status"] == outcome.status):
        facts = {"step": outcome.failed_step or "", "status": outcome.status, "reason": outcome.reason}
        tell("finished" if outcome.status == "FINISHED" else "failed", run=folder.run, root=folder.root, **facts)


def write_end(config: Config, folders: Sequence[RunFolder], step: str, error: BaseException) -> None:
    """Make the error of a step in the last of the runs the outcome of all; a finished run that is stopped keeps its."""
    with suppress(OSError):  # an unreachable store must not hide the first error
        told = read_attempt(folders[-1], step).error  # by the driver, perhaps, who knew more
        outcome = Outcome(state_after(error), told.message if told else STOPPED.get(type(error), str(error)), step)
        steps = folders_of(folders[0], config).items()
        if outcome.status == "KILLED" and all(read_attempt(of, each).state == "FINISHED" for each, of in steps):
            outcome = Outcome("FINISHED")  # no step has begun to work again
        for folder in folders:
            write_outcome(folder, outcome)


def read_outcome(folder: RunFolder) -> Outcome | None:
    """How the last pipeline of the run ended; None if it has not ended or never started. A single step leaves it."""
    record = storage.find_json(folder.status)
    return None if record is None else Outcome(record["status"], record["reason"], record["failed_step"])


class Cost(NamedTuple):
    """Some seconds on reserved cores and GPUs."""

    seconds: float
    cpu_hours: float
    gpu_hours: float


def cost_of(config: Config, step: str, seconds: float) -> Cost:
    """The cost of a step with all its workers; others take the cores of one."""
    compute, hours = config.compute, seconds / 3600
    if not STEP_TABLE[step].workers:
        return Cost(seconds, compute.cpus_per_worker * hours, 0.0)
    workers = compute.max_workers * hours
    return Cost(seconds, workers * compute.cpus_per_worker, workers if compute.use_gpu else 0.0)


def total_cost(costs: Iterable[Cost]) -> Cost:
    return Cost(*(sum(amounts) for amounts in zip(Cost(0.0, 0.0, 0.0), *costs, strict=True)))


def spent(config: Config, folder: RunFolder) -> dict[str, Cost]:
    """The cost of each step of a run so far, failed attempts included."""
    seconds = {step: read_attempt(folder, step).seconds for step in steps_of(config) if step != SEARCH}
    return {step: cost_of(config, step, value) for step, value in seconds.items() if value}
