"""What the steps of a run left in the store, as plain dicts: results, progress, errors, and the mark of a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ncsn import storage
from ncsn.config import Config, to_json
from ncsn.errors import Problem
from ncsn.steps.result import STEPS, RunFolder
from ncsn.storage.retry import limited

_COMPLETE = "complete.json"


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
    record = _read_json(folder.step(step, "result.json"))
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
            record = _read_json(folder.step(step, "progress.json"))
    except OSError:
        return None
    return None if record is None else StepProgress(**record)


def read_error(folder: RunFolder, step: str) -> StepError | None:
    """The error that `step` recorded, or None."""
    record = _read_json(folder.step(step, "error.json"))
    if record is None:
        return None
    problems = tuple(map(Problem.from_json, record["problems"]))
    return StepError(record["type"], record["message"], mistake=record["user"], problems=problems)


def forget_attempts(folder: RunFolder) -> None:
    """Remove progress and errors of earlier attempts, so that what appears is of this one."""
    for step in STEPS:
        for file in ("progress.json", "error.json"):
            storage.delete_file(folder.step(step, file))


def mark_complete(folder: RunFolder, config: Config) -> dict[str, StepRecord]:
    """Note that this config's whole pipeline stands in the run's folder; the records of its steps."""
    records = stored_records(folder)
    mark = {
        "of": _circumstances(config),
        "finished_at": {step: record.finished_at for step, record in records.items()},
    }
    storage.write_text(storage.join(folder.uri, _COMPLETE), json.dumps(mark, indent=1))
    return records


def complete_records(folder: RunFolder, config: Config) -> dict[str, StepRecord] | None:
    """The records of a pipeline that ran to its end with this very config, if nothing was changed or lost since."""
    mark = _read_json(storage.join(folder.uri, _COMPLETE))
    if mark is None or mark["of"] != _circumstances(config):
        return None
    records = stored_records(folder)
    if {step: record.finished_at for step, record in records.items()} != mark["finished_at"]:
        return None
    outputs = (uri for record in records.values() for uri in _uris(record.result, folder.root))
    return records if all(storage.exists(uri) for uri in outputs) else None


def _circumstances(config: Config) -> dict[str, str]:
    """What a whole run's results depend on besides each other."""
    from ncsn.data.listing import source_fingerprint
    from ncsn.tracking.connection import shown, tracking_uri

    return {
        "config": to_json(config),
        "files": source_fingerprint(config.data),
        "registry": shown(tracking_uri(config)),
    }


def _uris(result: Mapping[str, Any], root: str) -> Iterator[str]:
    return (value for value in result.values() if isinstance(value, str) and value.startswith(f"{root}/"))


def _read_json(uri: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = storage.read_json(uri)
    except FileNotFoundError:
        return None
    return record
