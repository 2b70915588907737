"""Step 2: denoising score matching on Ray Train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.config.noise import NoiseConfig
from ncsn.data.format import Manifest, load_manifest
from ncsn.distributed import trainer
from ncsn.distributed.cluster import ray_cluster, ray_tags
from ncsn.distributed.faults import parse_faults
from ncsn.distributed.validation import sample_distance
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.checkpoint import TrainedNetwork, load_for_sampling
from ncsn.model.classes import require_label, require_same_classes
from ncsn.model.start import adapted, start_notes
from ncsn.model.trained import TRAINED_CONFIG, load_for_generation, save_trained
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.steps.step import Step
from ncsn.storage.heartbeat import Lease
from ncsn.tracking.client import open_client
from ncsn.tracking.lineage import INIT_FROM
from ncsn.tracking.registry import fetch_weights
from ncsn.tracking.versions import SCHEME, registry_errors, resolve_version
from ncsn.training.batches import classes_of
from ncsn.training.held_out import effort_of
from ncsn.training.loop import TrainingJob

_SOURCE = "source.json"  # in the folder of the network that training starts from: where it is from


@dataclass(frozen=True)
class TrainResult:
    """The result of training."""

    checkpoint: str  # URI of the last one
    images_seen: int  # by all workers
    loss: float | None  # normalized, at the end (a zero network reads 1); None if there was nothing left to train
    images_per_second: float  # in this call, without startup
    seconds: float  # of this call
    dataset: str  # URI
    notes: list[str] = field(default_factory=list)  # for people
    stopped: str = ""  # why it ended before `train.num_images`, if `train.stop` ended it


def run(config: Config, *, run: str, dataset: str, lease: str | None = None, inject: Sequence[str] = ()) -> TrainResult:
    """Train, or resume the run from its newest checkpoint, or return the result if it is complete.

    `lease` is the URI of the launcher's heartbeat; when it stops, training saves a checkpoint and ends.
    """
    faults = parse_faults(inject, step="train", run_uri=run_folder(config, run).uri)
    step = Step.claim("train", config, run, TrainResult, unit="images")
    manifest = load_manifest(dataset)
    config = step.settle_noise(config, manifest)
    _require_trainable(config, manifest, dataset)
    inputs = {"dataset": dataset, "num_images": config.train.num_images}
    if result := step.found(inputs, needs=lambda result: [result.checkpoint]):
        return result
    start = start_of(config, step.folder, manifest)
    if result := step.dispatched(config, {"dataset": dataset}, inject=inject):
        return result
    with (
        step.work(config) as work,
        faults.outages_shared(),
        ray_cluster(config, metadata=work.job_metadata()),
    ):
        tracked = work.tracked
        tracked.set_tags({**ray_tags(), **start.tags})
        tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset, profile=manifest.counts)
        job = TrainingJob(
            config=config,
            dataset=dataset,
            sink=tracked.live_metrics(),
            progress=work.progress,
            history=step.folder.history,
            preview=step.folder.preview,
            averages=step.folder.averages,
            lease=Lease(lease) if lease else None,
            hooks=faults,
            start=start.uri,
            distance=sample_distance(config, dataset),
        )
        outcome = trainer.train(job, run_uri=step.folder.uri)
        checkpoint = storage.join(step.folder.checkpoints, outcome.checkpoint)
        tracked.set_tags({"checkpoint.uri": checkpoint, "checkpoint.images_seen": str(outcome.images_seen)})
        if outcome.stopped:
            tracked.set_tags({"train.stopped": outcome.stopped})
        result = TrainResult(
            checkpoint=checkpoint,
            images_seen=outcome.images_seen,
            loss=outcome.loss,
            images_per_second=round(outcome.images_per_second, 1),
            seconds=round(outcome.seconds, 1),
            dataset=dataset,
            notes=[note for note in (*start.notes, *outcome.notes, outcome.stopped, tracked.send_rest()) if note],
            stopped=outcome.stopped,
        )
    return step.done(result)


def _require_trainable(config: Config, manifest: Manifest, dataset: str) -> None:
    """Raise early what each worker, or the evaluation after hours of training, would raise."""
    labeled = manifest.class_counts["train"]  # images of each class
    if config.evaluation.extractor == "classifier" and (len(labeled) < 2 or not any(labeled)):
        raise UserError(
            "evaluation.extractor",
            f"needs labels of at least 2 classes, and the training images of {dataset} have {sum(map(bool, labeled))}",
            hint="sort the images into one subfolder per class, or set it to auto",
            value="classifier",
        )
    require_classes(config, manifest, dataset)
    _require_held_out(config, manifest, dataset)
    build.autocast_dtype(config, config.compute.device)


def _require_held_out(config: Config, manifest: Manifest, dataset: str) -> None:
    """Refuse a judgment by a held-out loss that is never measured."""
    counts = manifest.counts
    held_out, training = counts.get("test", 0), counts["train"]
    if effort_of(config, held_out=held_out, training=training) is not None:
        return
    for key, judge in config.train.judges.items():
        if judge == "validation":
            raise UserError(
                f"train.{key}",
                f"needs the loss of test images, and {dataset} has none"
                if held_out == 0
                else "needs a held-out loss, which in so short a training would take more than 2 % of the time",
                hint="raise data.test_fraction" if held_out == 0 else "set train.validation.images, such as 200",
                value=judge,
            )


def require_classes(config: Config, manifest: Manifest, dataset: str) -> None:
    """Refuse images with other classes than the network's, and a class to sample that is none of them."""
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
    uri = folder.start
    if config.train.init_from is None:
        return Start()
    source = _source(config, config.train.init_from, uri)
    with torch.device("meta"):
        network = build.network(config)
    changes = adapted(source, network, config=config, classes=classes_of(config, manifest)).changes
    record = storage.read_json(storage.join(uri, _SOURCE))
    tags = {INIT_FROM: f"{record['source']}/{record['digest']}"}
    return Start(uri, tags, tuple(start_notes(source, config, changes)))


def require_start(config: Config, folder: RunFolder) -> None:
    """Refuse what `train.init_from` names if it does not fit, before the name of a new run is claimed."""
    address = config.train.init_from
    if address is None or storage.exists(folder.config):
        return
    if config.noise.kind == "auto":
        config = config.model_copy(update={"noise": NoiseConfig()})  # no weights depend on the levels
    with torch.device("meta"):
        network = build.network(config)
    with storage.scratch_folder(folder.root) as scratch:
        adapted(_source(config, address, str(scratch / "start")), network, config=config, classes=None)


def _source(config: Config, address: str, uri: str) -> TrainedNetwork:
    """The trained network at an address, of which a copy is kept at `uri`."""
    if not storage.exists(storage.join(uri, TRAINED_CONFIG)):
        try:
            _fetch(config, address, uri)
        except (UserError, FileNotFoundError) as error:
            raise UserError("train.init_from", str(error), value=address) from None
    return load_for_generation(uri)


def _fetch(config: Config, address: str, uri: str) -> None:
    """Publish the trained network at an address below `uri`, with where it is from."""
    with storage.scratch_folder(uri.rpartition("/")[0]) as scratch:
        if address.startswith(SCHEME):
            folder, source, digest = _registered(config, address, scratch)
        else:
            folder, source = scratch / "trained", storage.absolute(address)
            folder.mkdir()
            trained = load_for_sampling(source)
            save_trained(trained, folder)
            digest = trained.digest
        (folder / _SOURCE).write_text(json.dumps({"source": source, "digest": digest}))
        storage.publish_folder(folder, uri, marker=TRAINED_CONFIG)


def _registered(config: Config, address: str, scratch: Path) -> tuple[Path, str, str]:
    """Folder, address by number and digest of the weights of a registered model."""
    client, registry = open_client(config)
    with registry_errors(registry):
        version = resolve_version(client, address)
        folder = fetch_weights(registry, version, scratch)
    return folder, f"{SCHEME}{version.name}/{version.version}", version.tags["ncsn.checkpoint"]
