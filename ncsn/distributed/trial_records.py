"""What a search leaves in the store: one folder per trial, small JSON files, each written once.

A search that was killed goes on from these: they are all that decides what is left to do.

    <search>/trials/<key>/trial.json          number, values
                          checkpoints/        Ray Train's, to resume from
                          rung-000008750.json what the trial reached at that many training images
                          failed.json         why it cannot go on
                          stopped.json        that it was not among the best at its last rung
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ncsn import storage

_TRIAL, _FAILED, _STOPPED = "trial.json", "failed.json", "stopped.json"
_RUNG = re.compile(r"rung-(\d+)\.json")

Status = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class Judged:
    """One sampler on one checkpoint.

    Attributes:
        sampler: The sampler's settings.
        objective: The figure of merit of its samples, less is better; None if they left the finite numbers.
    """

    sampler: dict[str, Any]
    objective: float | None


@dataclass(frozen=True)
class Rung:
    """What a trial reached.

    Attributes:
        images_seen: The rung, in training images.
        objective: The least of the sweep's.
        sampler: The sampler that reached it.
        sweep: All that was tried on this checkpoint.
        loss: Mean normalised training loss since the last report.
        seconds: Training and sampling since the rung before, as far as this attempt did it.
        checkpoint: Name of the checkpoint folder.
    """

    images_seen: int
    objective: float
    sampler: dict[str, Any]
    sweep: list[Judged]
    loss: float | None
    seconds: float
    checkpoint: str


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial."""

    uri: str

    @classmethod
    def of(cls, trials: str, values: Mapping[str, Any]) -> TrialFolder:
        """The folder below `trials` that belongs to these values."""
        return cls(storage.join(trials, trial_key(values)))

    def start(self, number: int, values: Mapping[str, Any]) -> None:
        """Say which trial this is; what stands already stays."""
        self._write(_TRIAL, {"number": number, "values": dict(values)})

    def reach(self, rung: Rung) -> None:
        """Keep what was reached."""
        self._write(f"rung-{rung.images_seen:09d}.json", dataclasses.asdict(rung))

    def fail(self, reason: str) -> None:
        """Say that a repetition would only fail again."""
        self._write(_FAILED, {"reason": reason})

    def stop(self) -> None:
        """Say that the trial was not among the best."""
        self._write(_STOPPED, {})

    @property
    def failure(self) -> str | None:
        """Why the trial cannot go on, if it cannot."""
        return str(self.read(_FAILED)["reason"]) if self._has(_FAILED) else None

    def rung(self, images_seen: int) -> Rung | None:
        """What was reached there, if the trial has been there."""
        name = f"rung-{images_seen:09d}.json"
        return _rung(self.read(name)) if self._has(name) else None

    def read(self, name: str) -> dict[str, Any]:
        """One of the files."""
        record: dict[str, Any] = storage.read_json(storage.join(self.uri, name))
        return record

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        storage.publish_once(storage.join(self.uri, name), json.dumps(record, indent=1).encode())

    def _has(self, name: str) -> bool:
        return storage.exists(storage.join(self.uri, name))


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it stands in the store.

    Attributes:
        uri: Its folder.
        number: Its place in the order in which trials were started, from 0.
        values: Dotted path -> value.
        rungs: What it reached, ascending.
        failure: Why it cannot go on, or None.
        stopped: Whether it was not among the best at its last rung.
        last_rung: The training images of a trial that goes to the end.
    """

    uri: str
    number: int
    values: dict[str, Any]
    rungs: tuple[Rung, ...]
    failure: str | None
    stopped: bool
    last_rung: int

    @cached_property
    def status(self) -> Status:
        """What became of it."""
        if self.failure is not None:
            return "failed"
        if self.rungs and self.rungs[-1].images_seen >= self.last_rung:
            return "finished"
        return "stopped" if self.stopped else "unfinished"


def trial_key(values: Mapping[str, Any]) -> str:
    """Name of the folder of these values, independent of their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_trials(trials: str, *, last_rung: int) -> list[TrialRecord]:
    """All trials below the folder `trials`, in the order in which they were started."""
    folders = (TrialFolder(storage.join(trials, key)) for key in storage.list_names(trials))
    found = (read_trial(folder, last_rung=last_rung) for folder in folders)
    return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)


def read_trial(folder: TrialFolder, *, last_rung: int) -> TrialRecord | None:
    """One trial, or None if none was started in the folder."""
    names = storage.list_names(folder.uri)
    if _TRIAL not in names:
        return None
    started = folder.read(_TRIAL)
    reached = [folder.rung(int(match[1])) for match in map(_RUNG.fullmatch, names) if match]
    return TrialRecord(
        uri=folder.uri,
        number=started["number"],
        values=started["values"],
        rungs=tuple(rung for rung in reached if rung is not None),
        failure=folder.failure if _FAILED in names else None,
        stopped=_STOPPED in names,
        last_rung=last_rung,
    )


def _rung(record: dict[str, Any]) -> Rung:
    return Rung(**{**record, "sweep": [Judged(**judged) for judged in record["sweep"]]})
