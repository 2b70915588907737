"""Training on Ray, from random weights or the network that `train.init_from` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.config.training import NoiseConfig
from ncsn.data.format import Manifest, load_manifest
from ncsn.distributed import trainer
from ncsn.distributed.cluster import ray_cluster, ray_tags
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import FILES, INDEX, folder_name, images_seen_at, load_checkpoint
from ncsn.model.checkpoint_store import CheckpointStore
from ncsn.model.classes import require_label, require_same_classes
from ncsn.model.trained import adapted, start_notes
from ncsn.runs.folder import RunFolder, opened_from, read_step, update_step
from ncsn.runs.history import RATE, load_history
from ncsn.steps.address import SOURCE, Place, keep, load, resolve
from ncsn.steps.step import Step
from ncsn.storage.heartbeat import Lease
from ncsn.tracking.lineage import INIT_FROM
from ncsn.tracking.live import LiveMetrics
from ncsn.training.batches import classes_of
from ncsn.training.loop import TrainingJob


@dataclass(frozen=True)
class TrainResult:
    """The result of training."""

    checkpoint: str  # URI of the last one
    images_seen: int  # by all workers
    loss: float | None  # normalized, at the end (a zero network reads 1); None if there was nothing left to train
    images_per_second: float  # in all attempts, without startup
    seconds: float  # of this call
    dataset: str  # URI
    notes: list[str] = field(default_factory=list)  # for people


def run(config: Config, *, run: str, dataset: str, lease: str | None = None, finish: bool = False) -> TrainResult:
    """Train, or resume the run from its newest checkpoint, or return the result if it is complete.

    `lease` is the URI of the launcher's heartbeat; when it stops, training saves a checkpoint and ends. So it does once
    the file `stop` of the step exists. With `finish` the newest checkpoint is the result; without, training goes on.
    """
    step = Step("train", config, run, TrainResult)
    if model := opened_from(step.folder):
        hint = f"start another run from it: train.init_from={model}"
        raise UserError("--run", f"is {model}, whose training is done", hint=hint, value=run)
    manifest = load_manifest(dataset)
    config = step.fix_noise_levels(config, manifest)
    require_classes(config, manifest, dataset)
    step.set_length(config)
    result = step.find_result(
        {"dataset": dataset}, needs=lambda result: [storage.join(result.checkpoint, name) for name in (INDEX, *FILES)]
    )
    if result is not None and (finish or result.images_seen >= config.train.num_images):
        return result
    if finish:
        return step.store_result(_as_it_is(step, config, dataset))
    if result is not None:  # a longer training may delete that checkpoint
        update_step(step.folder, "train", state="", inputs={}, result={})
    start = start_of(config, step.folder, manifest)
    if result := step.run_elsewhere(config, {"dataset": dataset}):
        return result
    with step.work(config) as (progress, tracked), ray_cluster(config, last_lines=step.last_lines):
        tracked.set_tags({**ray_tags(), **start.tags})
        tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset)
        stop = step.folder.step("train", "stop")
        storage.delete(stop)  # of an earlier attempt
        job = TrainingJob(
            config=config,
            dataset=dataset,
            sink=LiveMetrics(tracked.uri, tracked.run_id),
            progress=progress,
            history=step.folder.history,
            preview=step.folder.preview,
            averages=step.folder.averages,
            lease=Lease(lease) if lease else None,
            stop=stop,
            start=start.uri,
        )
        outcome = trainer.train(job, run_uri=step.folder.uri)
        checkpoint = storage.join(step.folder.checkpoints, outcome.checkpoint)
        tags = {"checkpoint.uri": checkpoint, "checkpoint.images_seen": str(outcome.images_seen)}
        tracked.set_tags({**tags, "train.computed_on": outcome.computed})
        rate = load_history(step.folder.history).images_per_second or outcome.images_per_second
        figures = {RATE: rate} if outcome.loss is None else {RATE: rate, "train/loss": outcome.loss}
        tracked.parent.log_metrics({"train/images_seen": outcome.images_seen, **figures}, step=outcome.images_seen)
        result = TrainResult(
            checkpoint=checkpoint,
            images_seen=outcome.images_seen,
            loss=outcome.loss,
            images_per_second=round(rate, 1),
            seconds=round(outcome.seconds, 1),
            dataset=dataset,
            notes=[*start.notes, *outcome.notes],
        )
    return step.store_result(result)


def _as_it_is(step: Step[TrainResult], config: Config, dataset: str) -> TrainResult:
    """The newest checkpoint as the result."""
    folder = step.folder
    if (newest := CheckpointStore(folder.checkpoints).newest()) is None:
        hint = "run the command without it"
        raise UserError("--finish", f"run {folder.run!r} has no checkpoint yet", hint=hint)
    seen, seconds = images_seen_at(newest), read_step(folder, "train").seconds
    uri = storage.join(folder.checkpoints, folder_name(seen))
    storage.publish_folder(storage.join(folder.checkpoints, newest), uri, marker=INDEX)
    with step.work(config) as (_, tracked):
        tracked.set_tags({"checkpoint.uri": uri, "checkpoint.images_seen": str(seen)})
    notes = [f"training ended at {seen:,} of {config.train.num_images:,} images; `ncsn run` without --finish goes on"]
    rate = load_history(folder.history, until=seen).images_per_second or seen / max(seconds, 1e-9)
    return TrainResult(uri, seen, None, round(rate, 1), round(seconds, 1), dataset, notes)


def require_classes(config: Config, manifest: Manifest, dataset: str) -> None:
    """Refuse classes that each worker, or the evaluation after hours of training, would refuse."""
    labeled = manifest.class_counts["train"]  # images of each class
    if config.evaluation.extractor == "classifier" and (len(labeled) < 2 or not any(labeled)):
        raise UserError(
            "evaluation.extractor",
            f"needs labels of at least 2 classes, and the training images of {dataset} have {sum(map(bool, labeled))}",
            hint="sort the images into one subfolder per class, or set it to auto",
            value="classifier",
        )
    require_same_classes(config.data.num_classes, manifest.class_names, where=f"the dataset {dataset}")
    if (classes := classes_of(config, manifest)) is not None:
        require_label(config.sampling.label, classes)


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    uri: str | None = None  # of the files of a trained network; None for random weights
    tags: Mapping[str, str] = field(default_factory=dict)  # for the MLflow run
    notes: tuple[str, ...] = ()  # what is not as in the source, for people


def start_of(config: Config, folder: RunFolder, manifest: Manifest) -> Start:
    """What `train.init_from` names, kept in the run's folder, so that training can start there anywhere."""
    if config.train.init_from is None:
        return Start()
    uri = folder.start
    if not storage.exists(storage.join(uri, INDEX)):
        keep(_named(config), uri)
    source = load_checkpoint(uri)
    with torch.device("meta"):
        network = build.network(config)
    _, changes = adapted(source, network, config=config, classes=classes_of(config, manifest))
    record = storage.absolute_uris(storage.read_json(storage.join(uri, SOURCE)), folder.root)
    tags = {INIT_FROM: f"{record['source']}/{record['digest']}"}
    return Start(uri, tags, tuple(start_notes(source, config, changes)))


def require_start(config: Config, folder: RunFolder) -> None:
    """Refuse what `train.init_from` names if it does not fit, before the name of a new run is claimed."""
    if config.train.init_from is None or storage.exists(folder.config):
        return
    if config.noise.kind == "auto":
        config = config.model_copy(update={"noise": NoiseConfig()})  # no weights depend on the levels
    with torch.device("meta"):
        network = build.network(config)
    adapted(load(_named(config)), network, config=config, classes=None)


def _named(config: Config) -> Place:
    root, registry = config.storage.root, config.tracking.uri
    return resolve(str(config.train.init_from), key="train.init_from", root=root, registry=registry)
