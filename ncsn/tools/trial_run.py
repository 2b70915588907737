"""`ncsn plan`: a trial run of the pipeline's steps on a few images, in a temporary store, on the cluster of the run.

So the rates include startup, workers that share cores, checkpoints and tracking, not only the network.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncsn import storage
from ncsn.config import Config, to_json
from ncsn.config.search import variant
from ncsn.core.samplers.ode import ProbabilityFlow
from ncsn.core.training import EVALUATIONS_PER_STEP
from ncsn.data.format import load_manifest
from ncsn.data.noise_levels import resolve_noise
from ncsn.data.parquet import write_dataset
from ncsn.data.sources.known import open_source
from ncsn.data.training_images import open_cache
from ncsn.distributed.cluster import cluster_memory, ray_cluster
from ncsn.evaluation.extractors.classifier import SMALL_SET
from ncsn.evaluation.extractors.clusters import cluster_labels
from ncsn.evaluation.features import extractor_of, recipe_of
from ncsn.model import build
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.model.generate import evaluations_per_image
from ncsn.process import utc_now
from ncsn.runs.costs import Prices
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.runs.history import load_history
from ncsn.runs.records import read_result
from ncsn.steps import evaluate, ingest, register, sample, train
from ncsn.steps import report as page
from ncsn.storage.cache import CACHE_DIR_VARIABLE
from ncsn.tools.planning import (
    NEIGHBOR_SEARCHES,
    Counts,
    Rates,
    estimate,
    search_seconds_per_image,
    seconds_per_image,
    training_seconds_per_image,
)
from ncsn.tracking.client import connect
from ncsn.training.context import LocalContext
from ncsn.training.loop import Training, TrainingJob

RUN = "trial"
IMAGES, FEW_IMAGES = 2048, 256  # of each split; the few where an image takes long, and to measure what one takes
LEAST_IMAGES = 32  # where an image takes a second
SECONDS = 6.0  # wanted length of a measurement
REPORTS = 6
MOST_STEPS, LEAST_STEPS = 600, 2 * REPORTS

# What the process of a step does before its work.
_START = """
import sys, time
from ncsn.config import from_json
from ncsn.distributed.cluster import ray_cluster
from ncsn.steps import evaluate, ingest, register, report, sample, train
config, started = from_json(sys.argv[1]), time.perf_counter()
from ncsn.tracking.client import connect
connect(config)
recorded = time.perf_counter()
with ray_cluster(config):
    print(recorded - started, time.perf_counter() - recorded)
"""


def run(config: Config, *, run: str, prices: Prices, report: Callable[[str], None]) -> dict[str, Any]:
    """Estimate the whole pipeline by a trial run, and store the plan in the run's folder; its name is not claimed.

    `report` gets the name of each part of the trial run as it begins.
    """
    folder = run_folder(config, run)
    config = settle(config)
    counts = count(config)
    with tempfile.TemporaryDirectory(prefix="ncsn-plan-") as scratch:
        small = scaled_down(config, Path(scratch))
        report("start")
        started = time.perf_counter()
        with own_cache(Path(scratch) / "cache"), ray_cluster(config):
            cluster_start = time.perf_counter() - started
            connect(small)  # creates the database, which a store does once
            rates = _TrialRun(small, counts, start=_process_start(small)).rates(config, report, cluster_start)
    plan = {"run": run, "made_at": utc_now(), **estimate(config, counts, rates, prices)}
    storage.write_json(folder.plan, plan, indent=1)
    return plan


def settle(config: Config) -> Config:
    """The config with noise levels; `noise: auto` takes them from some of its images."""
    if config.noise.kind != "auto":
        return config
    with tempfile.TemporaryDirectory(prefix="ncsn-plan-") as folder:
        data = variant(config, {"data.max_images": _at_most(IMAGES, config)}).data
        return resolve_noise(config, write_dataset(open_source(data), folder, name=RUN, data=data).manifest)


def count(config: Config) -> Counts:
    """How many images and evaluations the config asks for."""
    splits = open_source(config.data).splits
    sampling = config.sampling
    return Counts(
        train_images=len(splits["train"]),
        test_images=len(splits["test"]),
        shards=math.ceil(sampling.num_images / sampling.batch_size),
        nfe=evaluations_per_image(config),
    )


def _at_most(images: int, config: Config) -> int:
    return min(images, config.data.max_images or images)


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Keep the trial run's images out of the node's cache, here and in the workers of a cluster that starts now."""
    before = os.environ.get(CACHE_DIR_VARIABLE)
    os.environ[CACHE_DIR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[CACHE_DIR_VARIABLE]
        if before is not None:
            os.environ[CACHE_DIR_VARIABLE] = before


def scaled_down(config: Config, root: Path) -> Config:
    """The experiment on a few images, with its store and tracking below `root`."""
    images = {None: IMAGES, "inception": FEW_IMAGES, "dinov2": LEAST_IMAGES}[config.evaluation.pretrained]
    return variant(
        config,
        {
            "compute.backend": "local",
            "compute.num_workers": config.compute.max_workers,
            "storage.root": str(root),
            "tracking.uri": f"sqlite:///{root}/mlflow.db",
            "data.max_images": _at_most(images, config),
            # They take no more time, and may name networks that do not exist yet. The trial has its own length.
            **dict.fromkeys(("train.init_from", "sampling.guidance", "train.stop")),
            "train.trainable": "all",
            "train.validation": {},  # `planning` knows what it takes
            "train.best_by": "training",
            "sampling.num_images": config.sampling.batch_size * config.compute.max_workers,
            **dict.fromkeys(("evaluation.classifier_epochs", "evaluation.num_splits"), 1),
        },
    )


@dataclass(frozen=True)
class Start:
    """Seconds that the process of a step takes to start, to connect to MLflow and to join the cluster."""

    process: float
    tracking: float
    joining: float


class _TrialRun:
    """The steps one after the other, each with the results of the one before."""

    def __init__(self, config: Config, counts: Counts, *, start: Start) -> None:
        self.config, self.counts, self.start = config, counts, start
        self.folder: RunFolder = run_folder(config, RUN)

    def rates(self, config: Config, report: Callable[[str], None], cluster_start: float) -> Rates:
        """Run every step."""
        report("ingest")
        ingest_image, images = self._seconds_per_image(config)
        self.config = variant(self.config, train_length(self.config, images))
        data = ingest.run(self.config, run=RUN)
        read = sum(data.counts.values()) * ingest_image
        fixed = {"ingest": max(self._seconds("ingest") - read, 0.0) + self.start.tracking}
        report("train")
        trained = train.run(self.config, run=RUN, dataset=data.uri)
        points = self._curve("train/images_per_second")
        train_image, checkpoint, around = training_seconds(points, loop=trained.seconds, step=self._seconds("train"))
        fixed["train"] = around + self.start.tracking + self.start.joining
        report("sample")
        made, sample_evaluation, around = self._sampling(trained.checkpoint, train_image)
        fixed["sample"] = around + self.start.tracking + self.start.joining
        report("evaluate")
        evaluation = evaluate.run(self.config, run=RUN, samples=made.uri, dataset=data.uri)
        classifier_image, extract_image, neighbor_image, around = self._evaluation(data.uri, evaluation)
        fixed["evaluate"] = around + self.start.tracking
        report("register")
        register.run(self.config, run=RUN, checkpoint=trained.checkpoint, evaluation=evaluation.uri)
        fixed["register"] = self._seconds("register") + self.start.tracking
        report("report")
        page.run(self.config, run=RUN, evaluation=evaluation.uri)
        fixed["report"] = self._seconds("report") + self.start.tracking
        return Rates(
            cluster_start=cluster_start,
            process_start=self.start.process,
            fixed=fixed,
            ingest_image=ingest_image,
            train_image=train_image,
            checkpoint=checkpoint,
            sample_evaluation=sample_evaluation,
            classifier_image=classifier_image,
            extract_image=extract_image,
            neighbour_image=neighbor_image,
            worker_bytes=1e6 * max(value for _, value in self._curve("system/worker_memory_megabytes")),
            machine_bytes=cluster_memory(),
            dataset_image_bytes=_bytes(data.uri, "*/part-*.parquet") / sum(data.counts.values()),
            checkpoint_bytes=_bytes(trained.checkpoint, "*"),
            sample_bytes=_bytes(made.uri, "shard-*.parquet") / made.num_images,
        )

    def _curve(self, name: str) -> list[tuple[int, float]]:
        history = load_history(self.folder.history)
        return list(zip(history.images_seen, history.curve(name).tolist(), strict=True))

    def _seconds(self, step: str) -> float:
        record = read_result(self.folder, step)
        assert record is not None, step
        return record.seconds

    def _seconds_per_image(self, config: Config) -> tuple[float, str]:
        """From the difference between few and more images, without opening the source; and the URI of the more."""
        taken, images, uri = [], [], ""
        for limit in (FEW_IMAGES, IMAGES):
            data = variant(self.config, {"data.max_images": _at_most(limit, config)}).data
            started = time.perf_counter()
            dataset = write_dataset(open_source(data), f"{self.folder.root}/{limit}", name=RUN, data=data)
            taken.append(time.perf_counter() - started)
            images.append(sum(dataset.manifest.counts.values()))
            uri = dataset.uri
        return max(taken[1] - taken[0], 0.0) / max(images[1] - images[0], 1), uri

    def _sampling(self, checkpoint: str, train_image: float) -> tuple[sample.SampleResult, float, float]:
        """Samples, seconds of one evaluation of a batch, and the other seconds of the step."""
        sampling, workers = self.config.sampling, self.config.compute.max_workers
        guess = train_image * workers * sampling.batch_size / EVALUATIONS_PER_STEP
        levels = self.config.levels.num_levels
        nfe = max(1, round(SECONDS / guess))
        shorter = build.sampler(sampling.sampler).at_most(nfe, num_levels=levels)
        sampler = shorter or ProbabilityFlow("euler", max(2, min(nfe, levels)))
        sampling = sampling.model_copy(update={"sampler": build.sampler_section(sampler)})
        self.config = self.config.model_copy(update={"sampling": sampling})
        cold = sample.run(self.config, run=RUN, checkpoint=checkpoint)
        seconds = self._seconds("sample")
        # The second call finds started workers, so its time is that of the evaluations.
        more = variant(self.config, {"sampling.num_images": 2 * self.config.sampling.num_images})
        warm = sample.run(more, run=RUN, checkpoint=checkpoint)
        evaluation = warm.seconds / cold.nfe
        strip = sample.STRIP_IMAGES / self.config.sampling.batch_size * (self.counts.nfe - cold.nfe) * evaluation
        return cold, evaluation, seconds - warm.seconds + strip

    def _evaluation(self, dataset: str, result: evaluate.EvaluateResult) -> tuple[float, float, float, float]:
        """Seconds of an image in the classifier's training, in the extractor and in searches; and the other seconds."""
        split = open_cache(dataset, "train")
        extractor, batch_size = extractor_of(self.config, dataset), self.config.evaluation.batch_size
        extract_image = seconds_per_image(extractor, split.images, batch_size=batch_size)
        trained = [
            json.loads(path.read_text())["training_seconds"] for path in Path(dataset).glob("classifier/*/*.json")
        ]
        measured = len(split) + result.num_images + result.num_real_images
        neighbor_image = search_seconds_per_image(split.images)
        searching = NEIGHBOR_SEARCHES * len(split) * neighbor_image
        fixed = max(self._seconds("evaluate") - sum(trained) - measured * extract_image - searching, 0.0)
        if not trained:
            return 0.0, extract_image, neighbor_image, fixed
        own = sum(trained) / len(split)
        as_large = (self.counts.train_images < SMALL_SET) == (len(split) < SMALL_SET)
        if not as_large:
            manifest = load_manifest(dataset)
            recipe, labels = recipe_of(self.config, manifest), split.labels
            if recipe.clustered:
                labels = cluster_labels(split.images, count=recipe.num_classes, seed=recipe.seed)
            own = training_seconds_per_image(recipe, images=split.images, labels=labels, seconds=SECONDS / 2)
        return own, extract_image, neighbor_image, fixed


def training_seconds(points: Sequence[tuple[int, float]], *, loop: float, step: float) -> tuple[float, float, float]:
    """Seconds of an image, of a checkpoint, and the other seconds of the step.

    A point is the images seen at the end of a report interval, and the images per second in it; the first interval
    warms up. `loop` and `step` are the seconds of the loop, which saves one checkpoint, and of the whole step.
    """
    ends = [0, *(images for images, _ in points)]
    lengths = [after - before for before, after in itertools.pairwise(ends)]
    seconds = [length / rate for length, (_, rate) in zip(lengths, points, strict=True)]
    image = sum(seconds[1:]) / sum(lengths[1:])
    checkpoint = max(loop - sum(seconds), 0.0)
    return image, checkpoint, step - sum(lengths) * image - checkpoint


def train_length(config: Config, dataset: str) -> dict[str, int]:
    """A training of about `SECONDS`, by the time of the second step of one process on all cores."""
    batch = config.train.batch_size
    steps = MOST_STEPS
    if not config.compute.use_gpu:
        with tempfile.TemporaryDirectory(prefix="ncsn-plan-") as folder:
            training = Training(TrainingJob(config=config, dataset=dataset), LocalContext(), CheckpointStore(folder))
            training.step()
            started = time.perf_counter()
            training.step()
            steps = round(SECONDS / (time.perf_counter() - started))
    stretch = math.ceil(min(max(steps, LEAST_STEPS), MOST_STEPS) / REPORTS) * batch
    return {
        "train.num_images": stretch * REPORTS,
        "train.checkpoint_every_images": stretch * REPORTS,
        "train.report_every_images": stretch,
    }


def _process_start(config: Config) -> Start:
    started = time.perf_counter()
    command = [sys.executable, "-c", _START, to_json(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    whole = time.perf_counter() - started
    tracking, joining = map(float, done.stdout.split()[-2:])
    return Start(process=whole - tracking - joining, tracking=tracking, joining=joining)


def _bytes(folder: str, pattern: str) -> float:
    return float(sum(path.stat().st_size for path in Path(folder).glob(pattern)))
