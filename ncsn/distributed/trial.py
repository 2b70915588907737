"""One trial of a search: train to a rung, judge the samples of the EMA weights, report, go on.

The driver of a trial trains by Ray Train (or, for one worker, by a Ray task) and samples by Ray tasks, one after the
other, so a trial never holds more than the resources of its workers. It is stopped while it reports, when neither is
at work, so nothing is left behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.config import Config
from ncsn.config.choices import SamplerConfig
from ncsn.config.schema import SamplingConfig
from ncsn.config.search import rungs, searched_space, setting, swept, variant
from ncsn.distributed.trial_records import Judged, Rung, TrialFolder
from ncsn.errors import NotFound, UserError

if TYPE_CHECKING:
    from ncsn.training.loop import TrainOutcome

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
        """Training images at which a trial is judged."""
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
        return with_evaluations(config.sampling.sampler, nfe, num_levels=config.levels.num_levels)


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
    from ncsn.distributed.judged_samples import SamplesToJudge, frechet_distances

    search = plan.config.search
    assert search is not None
    started = time.monotonic()
    samplings = plan.samplings(values)
    checkpoints, outcome = _train(plan, values, folder, images)
    samples = SamplesToJudge(
        config=plan.config,
        dataset=plan.dataset,
        checkpoint=storage.join(checkpoints, outcome.checkpoint),
        num_images=search.num_samples,
    )
    found = frechet_distances(samples, samplings)
    sweep = [
        Judged(sampler=sampling.sampler.model_dump(mode="json"), objective=distance)
        for sampling, distance in zip(samplings, found, strict=True)
    ]
    best = min(sweep, key=lambda judged: math.inf if judged.objective is None else judged.objective)
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
    from ncsn.distributed import lone_worker, trainer
    from ncsn.model.checkpoint_store import CHECKPOINTS
    from ncsn.training.loop import TrainingJob

    job = TrainingJob(config=plan.trial_config(values), dataset=plan.dataset, stop_at=images)
    checkpoints = storage.join(folder.uri, CHECKPOINTS)
    if job.config.compute.num_workers == 1:
        return checkpoints, lone_worker.train_alone(job, checkpoints=checkpoints)
    return checkpoints, trainer.train(job, run_uri=folder.uri)
