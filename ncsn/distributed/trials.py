"""One trial of a search from rung to rung, and its records.

A killed search resumes from these records alone.

    <search>/trials/<key>/trial.json          number, values
                          checkpoints/        to resume from
                          rung-000008750.json what the trial reached at that many training images
                          failed.json         why it cannot go on
                          stopped.json        it was not among the best at its last rung

The driver of a trial trains by Ray Train (or, for one worker, by a Ray task) and samples by Ray tasks, one after the
other, so a trial never holds more than the resources of its workers. It is stopped while it reports, when neither
runs, so nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from ncsn import distributed, storage
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig, SearchConfig
from ncsn.config.search import rungs, searched_space, setting, swept, variant
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.sampling import sample_features
from ncsn.distributed.trainer import train_by_tasks
from ncsn.errors import InvalidValue, NotFound, UserError
from ncsn.evaluation.reference import open_evaluator
from ncsn.model.checkpoint import CheckpointError
from ncsn.runs.layout import TrainingFolder
from ncsn.training.loop import TrainingJob

FAILED = 1e12  # objective of a trial that cannot go on: a number, so that the search learns to keep away

# JSON and not Ray Tune's pickled state, which is up to ten seconds old when a search is killed.
_TRIAL, _FAILED, _STOPPED = "trial.json", "failed.json", "stopped.json"
_RUNG = re.compile(r"rung-(\d+)\.json")

Status = Literal["finished", "stopped", "failed", "unfinished"]
Report = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Scored:
    """One sampler on one checkpoint."""

    sampler: dict[str, Any]
    objective: float | None  # less is better; None if a sample is not finite


@dataclass(frozen=True)
class Rung:
    """What a trial reached at a number of training images."""

    images_seen: int
    objective: float  # the least of the sweep
    sampler: dict[str, Any]  # reached it
    sweep: list[Scored]
    loss: float | None  # normalized training loss of the last point of its curve
    seconds: float  # training and sampling since the rung before, in this attempt
    checkpoint: str  # name of its folder


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial. What is written once stays."""

    uri: str

    @classmethod
    def of(cls, trials: str, values: Mapping[str, Any]) -> TrialFolder:
        """The folder below `trials` that belongs to these values."""
        return cls(storage.join(trials, trial_key(values)))

    def start(self, number: int, values: Mapping[str, Any]) -> None:
        """Record which trial this is."""
        self._write(_TRIAL, {"number": number, "values": dict(values)})

    def reach(self, rung: Rung) -> None:
        self._write(f"rung-{rung.images_seen:09d}.json", dataclasses.asdict(rung))

    def fail(self, reason: str) -> None:
        """Record that a repetition would only fail again."""
        self._write(_FAILED, {"reason": reason})

    def stop(self) -> None:
        """Record that the trial was not among the best."""
        self._write(_STOPPED, {})

    @property
    def failure(self) -> str | None:
        """Why the trial cannot go on, if it cannot."""
        record = storage.find_json(storage.join(self.uri, _FAILED))
        return None if record is None else str(record["reason"])

    def rung(self, images_seen: int) -> Rung | None:
        """The record of a rung, if the trial has reached it."""
        record = storage.find_json(storage.join(self.uri, f"rung-{images_seen:09d}.json"))
        return None if record is None else Rung(**{**record, "sweep": [Scored(**scored) for scored in record["sweep"]]})

    def record(self, *, last_rung: int) -> TrialRecord | None:
        """The trial as it is now; None if none was started in the folder."""
        names = storage.list_names(self.uri)
        if _TRIAL not in names:
            return None
        started = storage.read_json(storage.join(self.uri, _TRIAL))
        reached = [self.rung(int(match[1])) for match in map(_RUNG.fullmatch, names) if match]
        return TrialRecord(
            uri=self.uri,
            number=started["number"],
            values=started["values"],
            rungs=tuple(rung for rung in reached if rung is not None),
            failure=self.failure if _FAILED in names else None,
            stopped=_STOPPED in names,
            last_rung=last_rung,
        )

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        storage.publish_once(storage.join(self.uri, name), json.dumps(record, indent=1).encode())


@dataclass(frozen=True)
class TrialRecord:
    """One trial as its folder had it."""

    uri: str
    number: int  # in the order in which trials were started, from 0
    values: dict[str, Any]  # by dotted path
    rungs: tuple[Rung, ...]  # ascending
    failure: str | None
    stopped: bool
    last_rung: int  # training images of a trial that goes to the end

    @cached_property
    def status(self) -> Status:
        if self.failure is not None:
            return "failed"
        if self.rungs and self.rungs[-1].images_seen >= self.last_rung:
            return "finished"
        return "stopped" if self.stopped else "unfinished"


def trial_key(values: Mapping[str, Any]) -> str:
    """Name of the folder of these values, independent of their order."""
    return storage.digest(values, 16)


def read_trials(trials: str, *, last_rung: int) -> list[TrialRecord]:
    """All trials below the folder `trials`, in the order in which they were started."""
    folders = (TrialFolder(storage.join(trials, key)) for key in storage.list_names(trials))
    found = (folder.record(last_rung=last_rung) for folder in folders)
    return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)


@dataclass(frozen=True)
class SearchPlan:
    """What all trials of a search have in common; picklable."""

    config: Config  # with a section `search`
    dataset: str
    trials: str  # URI of the folder of all trials
    start: str | None = None  # URI of the trained network that each trial starts from; see `TrainingJob`

    @property
    def settings(self) -> SearchConfig:
        assert self.config.search is not None
        return self.config.search

    @cached_property
    def rungs(self) -> list[int]:
        """Training images at which a trial is scored."""
        return rungs(self.config)

    @property
    def baseline(self) -> dict[str, Any]:
        """The values that the config has already."""
        return {path: setting(self.config, path) for path in searched_space(self.config)}

    def samplings(self, values: Mapping[str, Any]) -> list[SamplingConfig]:
        """The samplings that score a checkpoint of the trial."""
        own = dict(values) == self.baseline
        return [
            config.sampling.model_copy(update={"seed": self.settings.seed})
            for config in swept(self.config, variant(self.config, values), with_own=own)
        ]


def run_trial(plan: SearchPlan, values: Mapping[str, Any], *, report: Report) -> None:
    """Take a trial from rung to rung as far as `report` returns; rungs on record are only reported.

    `report` takes `images_seen` and `objective` of a rung, and does not return if the trial is stopped.
    """
    folder = TrialFolder.of(plan.trials, values)
    for images in plan.rungs:
        rung = folder.rung(images)
        if rung is None and folder.failure is None:
            try:
                rung = _reach(plan, values, folder, images)
            except (NotFound, CheckpointError):  # not the fault of the trial's settings
                raise
            except InvalidValue as error:
                folder.fail(str(error))
            else:
                folder.reach(rung)
        if rung is None:
            report({"images_seen": images, "objective": FAILED})
            return
        report({"images_seen": images, "objective": rung.objective})


def _reach(plan: SearchPlan, values: Mapping[str, Any], folder: TrialFolder, images: int) -> Rung:
    started = time.monotonic()
    samplings, config = plan.samplings(values), variant(plan.config, {**values, "train.keep_checkpoints": 1})
    job = TrainingJob(config=config, dataset=plan.dataset, start=plan.start, stop_at=images)
    train = train_by_tasks if config.compute.num_workers == 1 else distributed.train
    outcome = train(job, run_uri=folder.uri)
    checkpoint = storage.join(TrainingFolder(folder.uri).checkpoints, outcome.checkpoint)
    candidates = [(checkpoint, sampling) for sampling in samplings]
    evaluator = open_evaluator(plan.config, plan.dataset, runner=runner_of(plan.config.compute))
    found = sample_features(plan.config, candidates, dataset=plan.dataset, num_images=plan.settings.num_samples)
    distances = {number: None if features is None else evaluator.distance(features) for number, features in found}
    sweep = [Scored(asdict(sampling.sampler), distances[number]) for number, sampling in enumerate(samplings)]
    best = min(sweep, key=lambda scored: math.inf if scored.objective is None else scored.objective)
    if best.objective is None:
        reason = f"all {len(sweep)} samplers give images with NaN or infinity at {images:,} training images"
        raise UserError("sampling.sampler", reason)
    return Rung(
        images_seen=images,
        objective=best.objective,
        sampler=best.sampler,
        sweep=sweep,
        loss=outcome.loss,
        seconds=round(time.monotonic() - started, 1),
        checkpoint=outcome.checkpoint,
    )
