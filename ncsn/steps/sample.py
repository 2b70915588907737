"""Images from the EMA weights by the configured sampler, as Ray tasks if there is more than one to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ncsn import storage
from ncsn.config import Config
from ncsn.config.choices import AutoguidanceConfig
from ncsn.core.images import eight_bit
from ncsn.data.format import MANIFEST, load_manifest
from ncsn.data.samples import SampleSet, grid_png
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.distributed.sampling import LEVELS, Features, make_shards, plan_shards
from ncsn.evaluation import classes_in_turn, extractor_name
from ncsn.evaluation.features import ImageSet
from ncsn.evaluation.frechet import RunningDistance, RunningScore
from ncsn.evaluation.reference import open_evaluator
from ncsn.model.checkpoint import TrainedNetwork, load_checkpoint, require_same_training
from ncsn.model.classes import require_label
from ncsn.model.generate import evaluations_per_image, guide_of, sampling_facts, with_precision
from ncsn.model.objective import noise_notes
from ncsn.progress import Progress
from ncsn.report.images import rows_by_class
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import version_of
from ncsn.runs.results import SampleResult
from ncsn.runs.run import Run
from ncsn.steps.prepared import Context, Prepared
from ncsn.tracking.mlflow_runs import StepRun

GRID_IMAGES = 64
MOST_LABELS = 10_000  # of the images from which those of the grid are chosen by class


def prepare(run: Run, *, checkpoint: str, score: str | None = None) -> Sample:
    """Images are by their weights and sampler in one folder: what is there stays, and only missing ones are made.

    With the URI of a dataset as `score`, the Fréchet distance so far to its training images is published meanwhile.
    """
    config, trained = open_checkpoint(run, checkpoint)
    facts, uri = samples_of(config, trained, run.folder)
    there = (storage.find_json(storage.join(uri, MANIFEST)) or {}).get("num_images", 0)
    count = max(there, config.sampling.num_images)
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"num_images": count})})
    return Sample(
        config=config,
        key={"uri": uri, "num_images": count},
        trained=trained,
        facts=facts,
        uri=uri,
        checkpoint=checkpoint,
        score=score,
    )


def samples_of(config: Config, trained: TrainedNetwork, folder: RunFolder) -> tuple[dict[str, Any], str]:
    """What decides an image beside its number, and the folder of the run for all images of it."""
    sampling = with_precision(config.sampling, trained, config.compute.device)
    facts = sampling_facts(sampling, guide_of(trained, config.sampling))
    return facts, storage.join(folder.samples, trained.digest, storage.digest(facts, 12))


@dataclass(frozen=True)
class Sample(Prepared[SampleResult]):
    """A set of images, of which the missing ones are generated; finished shards stay when the work is stopped."""

    trained: TrainedNetwork
    facts: Mapping[str, Any]  # what decides an image beside its number
    uri: str  # folder of the samples
    checkpoint: str
    score: str | None  # URI of a dataset, to whose training images the distance so far is shown

    def work(self, context: Context) -> SampleResult:
        progress, tracked = context.progress, context.tracked
        shards = plan_shards(self.config, checkpoint=self.checkpoint, folder=self.uri, dataset=self.score)
        with cluster_for(self.config, start=len(shards) > 1, last_lines=context.last_lines):
            tracked.set_tags(ray_tags())
            scores = None
            # Where each class has a number, the first images are of one class, and tell nothing.
            if self.score and not isinstance(self.config.sampling.label, dict):
                scores = _Scores(self.config, self.score, progress)
            started = time.perf_counter()
            made = make_shards(self.config, shards, progress=progress, on_features=scores.add if scores else None)
            seconds = time.perf_counter() - started
        result = SampleResult(
            uri=self.uri,
            grid=storage.join(self.uri, "grid.png"),
            strip=storage.join(self.uri, "strip.png"),
            num_images=self.config.sampling.num_images,
            nfe=evaluations_per_image(self.config),
            seconds=round(seconds, 3),
            checkpoint=self.checkpoint,
            images_per_second=round(made / seconds, 3) if made else None,
            notes=noise_notes(self.config, images=self.trained.images_seen),
        )
        images = SampleSet(self.uri, result.num_images)
        grid, rows = grid_of(self.config, images)
        storage.write_bytes(result.grid, grid)
        stages = eight_bit(storage.read_array(storage.join(self.uri, LEVELS)), self.trained.config.data.pixels.limits)
        rows_of_images = stages.swapaxes(0, 1).reshape(-1, *stages.shape[2:])  # with a column for each stage
        storage.write_bytes(result.strip, grid_png(rows_of_images, columns=len(stages)))
        manifest = {
            "checkpoint": self.checkpoint,
            **({"model": model} if (model := version_of(context.folder)) else {}),
            "checkpoint_digest": self.trained.digest,
            "num_images": result.num_images,
            "nfe": result.nfe,
            **self.facts,
            **({} if self.trained.classes is None else {"classes": self.trained.classes.names}),
            "rows": rows,  # class of each row of the grid
        }
        manifest = storage.relative_uris(manifest, context.folder.root)
        storage.write_json(storage.join(self.uri, MANIFEST), manifest, indent=1)
        origin = {"checkpoint.uri": self.checkpoint, "checkpoint.digest": self.trained.digest}
        tracked.set_tags({**origin, "dataset.digest": self.trained.dataset_digest, "samples.uri": self.uri})
        rate = {} if result.images_per_second is None else {"sample/images_per_second": result.images_per_second}
        tracked.log_metrics({"sample/nfe": result.nfe, **rate})
        for picture in (result.grid, result.strip):
            tracked.log_file(picture)
        tracked.parent.log_file(result.grid)
        if scores is not None:
            scores.log(tracked)
        return result


def open_checkpoint(run: Run, checkpoint: str) -> tuple[Config, TrainedNetwork]:
    """The config of the run for a checkpoint, with its levels and a copy of the network that guides it; and itself."""
    trained = load_checkpoint(checkpoint)
    config = require_same_training(trained.config, run.config, origin=checkpoint)
    require_label(config.sampling.label, trained.classes)
    if isinstance(config.sampling.guidance, AutoguidanceConfig):
        from ncsn.steps.address import keep_guide  # here, so that a run without a guide does not load it

        config = keep_guide(config, run.folder, trained)
    return config, trained


class _Scores:
    """Shows the running score while images are made, and keeps its points for MLflow."""

    def __init__(self, config: Config, dataset: str, progress: Progress) -> None:
        reference = open_evaluator(config, dataset, runner=runner_of(config.compute)).reference
        self._extractor = extractor_name(config, load_manifest(dataset))
        self._fingerprint = reference.fingerprint
        self._running = RunningDistance(
            reference.statistics, count=config.sampling.num_images, classes_in_turn=classes_in_turn(config)
        )
        self._progress = progress
        self._points: list[RunningScore] = []

    def add(self, first: int, features: Features) -> None:
        for score in self._running.add(first, features):
            self._points.append(score)
            self._progress.note(str(score))

    def log(self, tracked: StepRun) -> None:
        for point in self._points:
            tracked.log_metrics(point.named("sample", extractor=self._extractor), step=point.num_images)
        tracked.set_tags({"eval.fingerprint": self._fingerprint})


def grid_of(
    config: Config, images: ImageSet, *, classes: npt.NDArray[np.int64] | None = None
) -> tuple[bytes, list[int]]:
    """A PNG with a row for each of the first 16 classes that occur, and these classes; without, of the first images.

    With `classes`, of these alone; if none of them occurs, it is as without classes.
    """
    if config.data.num_classes is not None:
        labels = images.labels()[:MOST_LABELS]
        known = np.flatnonzero(np.isin(labels, labels if classes is None else classes))
        if len(known):
            rows = known[rows_by_class(labels[known])]
            png = grid_png(images.read(0, 1 + int(rows.max()))[rows.flatten()], columns=rows.shape[1])
            return png, labels[rows[:, 0]].tolist()
    return grid_png(images.read(0, min(GRID_IMAGES, images.count))), []
