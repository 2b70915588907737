"""Step 3: images from the EMA weights by the configured sampler, as Ray tasks if there is more than one to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config
from ncsn.data.shards import read_samples
from ncsn.distributed.cluster import cluster_for, ray_tags
from ncsn.distributed.faults import FaultInjector, parse_faults
from ncsn.distributed.sampling import Features, OnFeatures, Shard, sample_missing, shards, watch_levels
from ncsn.distributed.tasks import runner_of
from ncsn.evaluation.frechet import RunningDistance, RunningScore
from ncsn.evaluation.reference import open_evaluator
from ncsn.model import checkpoint as checkpoints
from ncsn.model.generate import evaluations_per_image
from ncsn.report.images import Stages, denoising_gif, grid_png, images_in_gif, strip_png
from ncsn.runs.folder import run_folder
from ncsn.runs.records import ProgressFile, while_leased
from ncsn.steps.step import Step, Work
from ncsn.tracking.mlflow_runs import StepRun

GRID_IMAGES = 64
STRIP_IMAGES = 8
LEVELS = "levels.npy"
"""The images of the strip as an array `[stages, N, H, W, C]` uint8, beside it."""
MOST_STAGES = 40
"""Of the strip and of the GIF, however many levels there are."""


@dataclass(frozen=True)
class SampleResult:
    """One set of samples.

    Attributes:
        uri: Folder of the Parquet shards and their manifest.
        grid: URI of a PNG with the first images.
        strip: URI of a PNG that shows some images at every noise level, or at an even choice of them.
        gif: URI of a GIF in which images form.
        num_images: Images in the folder.
        nfe: Score-network evaluations per image.
        seconds: Duration of this call's sampling.
        checkpoint: URI of the checkpoint.
    """

    uri: str
    grid: str
    strip: str
    gif: str
    num_images: int
    nfe: int
    seconds: float
    checkpoint: str


def run(
    config: Config,
    *,
    run: str,
    checkpoint: str,
    score: str | None = None,
    lease: str | None = None,
    inject: Sequence[str] = (),
) -> SampleResult:
    """Generate `config.sampling.num_images` images; only those that are missing are made.

    Args:
        config: The experiment; its sampling section decides how.
        run: Name of the run that keeps the samples.
        checkpoint: URI of the checkpoint to sample from.
        score: URI of a data set. The Frechet distance so far to its training images is published while images are made.
        lease: URI of the launcher's heartbeat. When it stops, sampling ends; the shards that are done stay.
        inject: Faults to inject; see `ncsn.distributed.faults`.

    Raises:
        LeaseExpired: if the launcher is gone.
        RemoteFailure: if it failed on the cluster of `compute.backend`.
        UserError: if the run or the checkpoint belongs to another config, the checkpoint is damaged, the sampler
            diverges, or `inject` names no fault.
    """
    faults = parse_faults(inject, step="sample", run_uri=run_folder(config, run).uri)
    step = Step.claim("sample", config, run, SampleResult, unit="images")
    loaded = checkpoints.load_for_sampling(checkpoint)
    config = checkpoints.require_same_training(loaded.config, config, origin=checkpoint)
    sampling = config.sampling
    sampler_digest = storage.digest(_sampler_key(config), 12)
    uri = step.folder.samples(loaded.digest, sampler_digest)
    inputs = {"uri": uri, "num_images": sampling.num_images}
    if result := step.found(inputs, needs=lambda result: [result.uri, result.grid, result.strip, result.gif]):
        return result
    options = {"checkpoint": checkpoint} | ({"score": score} if score else {})
    if result := step.dispatched(config, options, inject=inject):
        return result
    shard = _first_shard(config, checkpoint=checkpoint, folder=uri)
    tasks = len(shards(shard, num_images=sampling.num_images, missing=score is None))
    with (
        step.work(config) as work,
        faults.outages_shared(),
        cluster_for(config, tasks=tasks, metadata=work.job_metadata()),
    ):
        work.tracked.set_tags(ray_tags())
        result = _sample(work, config, shard, loaded, score=score, lease=lease, faults=faults)
    return step.done(result)


def _sample(
    work: Work,
    config: Config,
    shard: Shard,
    loaded: checkpoints.SamplingCheckpoint,
    *,
    score: str | None,
    lease: str | None,
    faults: FaultInjector,
) -> SampleResult:
    started = time.perf_counter()
    scores = _Scores(config, score, work.progress) if score else None
    made = sample_missing(
        shard,
        num_images=config.sampling.num_images,
        progress=_watched(work.progress, lease, faults),
        on_features=scores.on_features if scores else None,
    )
    seconds = time.perf_counter() - started
    result = SampleResult(
        uri=shard.folder,
        grid=storage.join(shard.folder, "grid.png"),
        strip=storage.join(shard.folder, "strip.png"),
        gif=storage.join(shard.folder, "denoising.gif"),
        num_images=config.sampling.num_images,
        nfe=evaluations_per_image(config),
        seconds=round(seconds, 3),
        checkpoint=shard.checkpoint,
    )
    _publish_pictures(result, shard)
    _publish_manifest(result, _sampler_key(config), loaded.digest)
    _log(work.tracked, result, loaded, images_per_second=made / seconds)
    if scores is not None:
        scores.log(work.tracked)
    return result


def _sampler_key(config: Config) -> dict[str, Any]:
    """What decides the images, given the weights."""
    return config.sampling.model_dump(include={"sampler", "seed", "precision"})


def _log(
    tracked: StepRun, result: SampleResult, loaded: checkpoints.SamplingCheckpoint, *, images_per_second: float
) -> None:
    origin = {"checkpoint.uri": result.checkpoint, "checkpoint.digest": loaded.digest}
    tracked.set_tags({**origin, "dataset.digest": loaded.dataset_digest, "samples.uri": result.uri})
    tracked.log_metrics({"sample/nfe": result.nfe, "sample/images_per_second": images_per_second})
    for picture in (result.grid, result.strip, result.gif):
        tracked.log_file(picture)


@dataclass
class _Scores:
    """Shows the running score while images are made, and keeps its points.

    Attributes:
        config: The experiment.
        dataset: URI of the data set.
        progress: Shows the latest beside the number of images.
    """

    config: Config
    dataset: str
    progress: ProgressFile
    _points: list[RunningScore] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        reference = open_evaluator(self.config, self.dataset, runner=runner_of(self.config.compute)).reference
        self._fingerprint = reference.fingerprint
        self._running = RunningDistance(reference.statistics, count=self.config.sampling.num_images)

    @property
    def on_features(self) -> OnFeatures:
        """Hands over the features of finished images."""
        return OnFeatures(self.config, self.dataset, self._take)

    def log(self, tracked: StepRun) -> None:
        """Take the curve to MLflow."""
        for point in self._points:
            named = point.named("sample", extractor=self.config.evaluation.extractor)
            tracked.log_metrics(named, step=point.num_images)
        tracked.set_tags({"eval.fingerprint": self._fingerprint})

    def _take(self, first: int, features: Features) -> None:
        for score in self._running.add(first, features):
            self._points.append(score)
            self.progress.say(str(score))


def _watched(progress: ProgressFile, lease: str | None, faults: FaultInjector) -> Callable[[int, int], None]:
    """Publishes progress, ends the work if the launcher is gone, and injects faults."""
    watched = while_leased(progress, lease, kept="{done} of {total} images are sampled and stay")
    before = 0

    def update(done: int, total: int) -> None:
        nonlocal before
        faults.trigger(range(before, done))
        before = done
        watched(done, total)

    return update


def _first_shard(config: Config, *, checkpoint: str, folder: str) -> Shard:
    return Shard(
        checkpoint=checkpoint,
        sampling=config.sampling,
        folder=folder,
        first=0,
        count=config.sampling.batch_size,
        threads=config.compute.cpus_per_worker,
        use_gpu=config.compute.use_gpu,
    )


def _publish_pictures(result: SampleResult, shard: Shard) -> None:
    count = min(GRID_IMAGES, result.num_images)
    first_images = np.concatenate(list(read_samples(result.uri, num_images=count, batch_size=count)))
    storage.write_bytes(result.grid, grid_png(first_images))
    if not (storage.exists(result.strip) and storage.exists(result.gif)):
        in_gif = images_in_gif(first_images.shape[1])
        few = replace(shard, count=min(max(STRIP_IMAGES, in_gif), result.num_images))
        frames = watch_levels(few, Stages(MOST_STAGES)).frames
        in_strip = frames[:, :STRIP_IMAGES]
        storage.write_array(storage.join(result.uri, LEVELS), in_strip)
        storage.write_bytes(result.strip, strip_png(in_strip))
        storage.write_bytes(result.gif, denoising_gif(frames[:, :in_gif]))


def _publish_manifest(result: SampleResult, sampler_key: dict[str, object], checkpoint_digest: str) -> None:
    manifest = {
        "checkpoint": result.checkpoint,
        "checkpoint_digest": checkpoint_digest,
        "num_images": result.num_images,
        "nfe": result.nfe,
        **sampler_key,
    }
    storage.write_text(storage.join(result.uri, "manifest.json"), json.dumps(manifest, indent=1))
