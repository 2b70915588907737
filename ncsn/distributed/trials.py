"""One trial of a search from rung to rung, and its records.

A search that was killed goes on from these: they are all that decides what is left to do.

    <search>/trials/<key>/trial.json          number, values
                          checkpoints/        Ray Train's, to resume from
                          rung-000008750.json what the trial reached at that many training images
                          failed.json         why it cannot go on
                          stopped.json        that it was not among the best at its last rung

The driver of a trial trains by Ray Train (or, for one worker, by a Ray task) and samples by Ray tasks, one after the
other, so a trial never holds more than the resources of its workers. It is stopped while it reports, when neither is
at work, so nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ncsn import storage
from ncsn.config import Config
from ncsn.config.choices import SamplerConfig
from ncsn.config.schema import SamplingConfig
from ncsn.config.search import rungs, searched_space, setting, swept, variant
from ncsn.errors import NotFound, UserError

if TYPE_CHECKING:
    from ncsn.training.loop import TrainOutcome


# JSON and not Ray Tune's pickled state, which is up to ten seconds old when a search is killed.
_TRIAL, _FAILED, _STOPPED = "trial.json", "failed.json", "stopped.json"
_RUNG = re.compile(r"rung-(\d+)\.json")

Status = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class Scored:
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
    sweep: list[Scored]
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
    return storage.digest(values, 16)


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
    return Rung(**{**record, "sweep": [Scored(**scored) for scored in record["sweep"]]})


FAILED = 1e12
"""Objective of a trial that cannot go on: a number, so that the search learns to keep away."""

Report = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class SearchPlan:
    """What all trials of a search have in common; picklable.

    Attributes:
        config: The experiment, with its search section.
        dataset: URI of the ingested data set.
        trials: URI of the folder of all trials.
    """

    config: Config
    dataset: str
    trials: str

    @cached_property
    def rungs(self) -> list[int]:
        """Training images at which a trial is scored."""
        return rungs(self.config)

    @property
    def baseline(self) -> dict[str, Any]:
        """The values that the config has already."""
        return {path: setting(self.config, path) for path in searched_space(self.config)}

    def trial_config(self, values: Mapping[str, Any]) -> Config:
        """The experiment of one trial, which keeps its latest checkpoint only, for samples judge it.

        Raises:
            UserError: if the values do not go together.
        """
        changed = variant(self.config, values)
        return changed.model_copy(
            update={"train": changed.train.model_copy(update={"keep_checkpoints": 1, "keep_best": False})}
        )

    def samplings(self, values: Mapping[str, Any]) -> list[SamplingConfig]:
        """The samplers that judge a checkpoint of the trial, all of one NFE.

        Raises:
            UserError: if no chain of the sampler has that NFE.
        """
        search, base = self.config.search, self.config
        assert search is not None
        own = dict(values) == self.baseline
        return [
            config.sampling.model_copy(update={"sampler": self._of_equal_length(config), "seed": search.seed})
            for config in swept(base, variant(base, values), with_own=own)
        ]

    def own_sampler(self) -> SamplerConfig:
        """The config's sampler as the search judges it."""
        return self._of_equal_length(self.config)

    def _of_equal_length(self, config: Config) -> SamplerConfig:
        from ncsn.model.generate import evaluations_per_image, with_evaluations

        search = self.config.search
        assert search is not None
        nfe = search.nfe or evaluations_per_image(self.config)
        return with_evaluations(config.sampling.sampler, nfe, num_levels=config.levels.num_levels, key="search.nfe")


def run_trial(plan: SearchPlan, values: Mapping[str, Any], *, report: Report) -> None:
    """Take a trial from rung to rung as far as `report` returns; what it has reached already is only reported.

    Args:
        plan: The search.
        values: Dotted path -> value.
        report: Takes `images_seen`, `objective` and what else there is to know of a rung. Does not return if the trial
            is stopped.
    """
    folder = TrialFolder.of(plan.trials, values)
    for images in plan.rungs:
        rung = folder.rung(images)
        if rung is None:
            if folder.failure is None:
                try:
                    rung = _reach(plan, values, folder, images)
                except NotFound:  # says nothing of the trial's settings
                    raise
                except ValueError as error:
                    folder.fail(str(error))
            if rung is None:
                report({"images_seen": images, "objective": FAILED})
                return
            folder.reach(rung)
        report({"images_seen": images, "objective": rung.objective})


def _reach(plan: SearchPlan, values: Mapping[str, Any], folder: TrialFolder, images: int) -> Rung:
    # Imported here, so that a trial that has nothing left to do need not wait for torch.
    from ncsn.distributed.sampling import SamplesToScore, score_samples

    search = plan.config.search
    assert search is not None
    started = time.monotonic()
    samplings = plan.samplings(values)
    checkpoints, outcome = _train(plan, values, folder, images)
    samples = SamplesToScore(
        config=plan.config,
        dataset=plan.dataset,
        checkpoint=storage.join(checkpoints, outcome.checkpoint),
        num_images=search.num_samples,
    )
    found = score_samples(samples, samplings)
    sweep = [
        Scored(sampler=sampling.sampler.model_dump(mode="json"), objective=distance)
        for sampling, distance in zip(samplings, found, strict=True)
    ]
    best = min(sweep, key=lambda scored: math.inf if scored.objective is None else scored.objective)
    if best.objective is None:
        raise UserError(
            "sampling.sampler", f"all {len(sweep)} samplers give images that are not finite at {images} training images"
        )
    return Rung(
        images_seen=images,
        objective=best.objective,
        sampler=best.sampler,
        sweep=sweep,
        loss=outcome.loss,
        seconds=round(time.monotonic() - started, 1),
        checkpoint=outcome.checkpoint,
    )


def _train(plan: SearchPlan, values: Mapping[str, Any], folder: TrialFolder, images: int) -> tuple[str, TrainOutcome]:
    from ncsn.distributed import trainer
    from ncsn.model.checkpoint_store import CHECKPOINTS
    from ncsn.training.loop import TrainingJob

    job = TrainingJob(config=plan.trial_config(values), dataset=plan.dataset, stop_at=images)
    checkpoints = storage.join(folder.uri, CHECKPOINTS)
    if job.config.compute.num_workers == 1:
        return checkpoints, trainer.train_single_worker(job, checkpoints=checkpoints)
    return checkpoints, trainer.train(job, run_uri=folder.uri)
