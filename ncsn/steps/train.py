"""Training on Ray, from random weights or the network that `train.init_from` names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from ncsn import storage
from ncsn.answer import SAVE_SECONDS, answer
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.load import EXAMPLES
from ncsn.config.training import NoiseConfig
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.noise_levels import resolve_noise
from ncsn.distributed import trainer
from ncsn.distributed.cluster import ray_cluster, ray_tags
from ncsn.errors import UserError
from ncsn.model import build
from ncsn.model.averages import ensure_average
from ncsn.model.checkpoint import FILES, CheckpointStore, TrainedNetwork, folder_name, load_checkpoint
from ncsn.model.classes import require_label, require_same_classes
from ncsn.model.trained import TRAINED_CONFIG, adapted, load_checkpoint_or_model, save_model, start_notes
from ncsn.progress import read_progress
from ncsn.remote.backend import say
from ncsn.runs.folder import (
    INDEX,
    RUN_PATTERN,
    Run,
    RunFolder,
    find_inputs,
    folders_of,
    images_seen_at,
    read_step,
    require_owner,
    run_folder,
    update_step,
)
from ncsn.runs.history import RATE, load_history
from ncsn.steps.execute import Context, Prepared
from ncsn.steps.results import TrainResult, stored_result
from ncsn.storage.heartbeat import Lease
from ncsn.storage.retry import limited
from ncsn.tracking.client import client_at, mlflow_errors, tracking_uri
from ncsn.tracking.lineage import INIT_FROM
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.promotion import SCHEME, resolve_version
from ncsn.tracking.registry import fetch_weights
from ncsn.training.batches import classes_of
from ncsn.training.loop import TrainingJob

_SOURCE = "source.json"  # in the folder of the network that training starts from: where it is from


def prepare(run: Run, *, dataset: str, finish: bool = False) -> Prepared[TrainResult]:
    """A run trains on one dataset, from random weights or from what `train.init_from` names, which is copied here.

    With `finish` the newest checkpoint is the result, of however many images; without, training goes on.
    """
    manifest, folder = load_manifest(dataset), run.folder
    config = settle_noise(run, manifest)
    require_classes(config, manifest, dataset)
    owner, length = run.owner, config.train.num_images
    if length > owner.train.num_images:  # the length of the run is that of its longest training
        longer = owner.train.model_copy(update={"num_images": length})
        storage.write_text(folder.config, to_yaml(owner.model_copy(update={"train": longer})))
    key = {"dataset": dataset}
    if not finish and (stored := stored_result(folder, "train", key)) and stored.images_seen < length:
        update_step(folder, "train", state="", inputs={}, result={})  # a longer training may delete that checkpoint
    start = Start() if finish else start_of(config, folder, manifest)
    work = partial(as_it_is, config, dataset) if finish else partial(train, config, manifest, dataset, start)
    files = (INDEX, *FILES)
    return Prepared(config, key, work, lambda result: [storage.join(result.checkpoint, name) for name in files])


def train(config: Config, manifest: Manifest, dataset: str, start: Start, context: Context) -> TrainResult:
    """Train, or resume from the newest checkpoint.

    When the launcher's heartbeat stops, training saves a checkpoint and ends. So it does on Ctrl-C and SIGTERM, and
    once the file `stop` of the step exists.
    """
    folder, tracked = context.folder, context.tracked
    stop = folder.step("train", "stop")
    storage.delete(stop)  # of an earlier attempt

    def ask_to_save() -> bool:
        if begun := read_progress(folder.step("train", "progress.json")) is not None:
            say(f"interrupted: saving, for at most {SAVE_SECONDS:.0f} s; Ctrl-C again ends at once")
            with suppress(OSError), limited(SAVE_SECONDS):
                storage.write_text(stop, "")
        return begun

    with answer.saving(ask_to_save), ray_cluster(config, last_lines=context.last_lines):
        tracked.set_tags({**ray_tags(), **start.tags})
        tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset)
        job = TrainingJob(
            config=config,
            dataset=dataset,
            sink=LiveMetrics(tracked.uri, tracked.run_id),
            progress=context.progress,
            history=folder.history,
            preview=folder.preview,
            averages=folder.averages,
            lease=Lease(context.lease) if context.lease else None,
            stop=stop,
            start=start.uri,
        )
        outcome = trainer.train(job, run_uri=folder.uri)
    checkpoint = storage.join(folder.checkpoints, outcome.checkpoint)
    tags = {"checkpoint.uri": checkpoint, "checkpoint.images_seen": str(outcome.images_seen)}
    tracked.set_tags({**tags, "train.computed_on": outcome.computed})
    rate = load_history(folder.history).images_per_second or outcome.images_per_second
    figures = {RATE: rate} if outcome.loss is None else {RATE: rate, "train/loss": outcome.loss}
    tracked.parent.log_metrics({"train/images_seen": outcome.images_seen, **figures}, step=outcome.images_seen)
    return TrainResult(
        checkpoint=checkpoint,
        images_seen=outcome.images_seen,
        loss=outcome.loss,
        images_per_second=round(rate, 1),
        seconds=round(outcome.seconds, 1),
        dataset=dataset,
        notes=[*start.notes, *outcome.notes],
    )


def as_it_is(config: Config, dataset: str, context: Context) -> TrainResult:
    """The newest checkpoint as the result."""
    folder = context.folder
    if (newest := CheckpointStore(folder.checkpoints).newest()) is None:
        hint = "run the command without it"
        raise UserError("--finish", f"run {folder.run!r} has no checkpoint yet", hint=hint)
    seen, seconds = images_seen_at(newest), read_step(folder, "train").seconds
    uri = storage.join(folder.checkpoints, folder_name(seen))
    storage.publish_folder(storage.join(folder.checkpoints, newest), uri, marker=INDEX)
    context.tracked.set_tags({"checkpoint.uri": uri, "checkpoint.images_seen": str(seen)})
    notes = [f"training ended at {seen:,} of {config.train.num_images:,} images; `ncsn run` without --finish goes on"]
    rate = load_history(folder.history, until=seen).images_per_second or seen / max(seconds, 1e-9)
    return TrainResult(uri, seen, None, round(rate, 1), round(seconds, 1), dataset, notes)


def settle_noise(run: Run, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for, which the run keeps from now on."""
    config, place = run.config, run.folder.config
    if config.noise.kind != "auto" and storage.read_text(place) == to_yaml(config):
        return config
    settled, owner = resolve_noise(config, manifest), run.owner
    require_owner(resolve_noise(owner, manifest), settled, run.name)
    if owner.noise != settled.noise:
        storage.write_text(place, to_yaml(owner.model_copy(update={"noise": settled.noise})))
    return settled


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
    source = _source(config, config.train.init_from, uri)
    with torch.device("meta"):
        network = build.network(config)
    _, changes = adapted(source, network, config=config, classes=classes_of(config, manifest))
    record = storage.absolute_uris(storage.read_json(storage.join(uri, _SOURCE)), folder.root)
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
    """The trained network at an address, of which a copy is kept at `uri`, with where it is from."""
    if storage.exists(storage.join(uri, TRAINED_CONFIG)):
        return load_checkpoint_or_model(uri)
    named = storage.absolute(address)
    if RUN_PATTERN.fullmatch(address) and not storage.exists(storage.join(named, INDEX)):
        named = _checkpoint_of(run_folder(config, address))
    try:
        with storage.scratch_folder(uri.rpartition("/")[0]) as scratch:
            if address.startswith(SCHEME):
                registry = tracking_uri(config)
                with mlflow_errors(registry):
                    version = resolve_version(client_at(registry), address)
                    folder = fetch_weights(registry, version, scratch)
                source, digest = f"{SCHEME}{version.name}/{version.version}", version.tags["ncsn.checkpoint"]
            else:
                folder, source = scratch / "trained", named
                folder.mkdir()
                trained = load_checkpoint(source)
                save_model(trained, folder)
                digest = trained.digest
            record = {"source": source, "digest": digest}
            root = storage.absolute(config.storage.root)
            (folder / _SOURCE).write_text(json.dumps(storage.relative_uris(record, root)))
            storage.publish_folder(folder, uri, marker=TRAINED_CONFIG)
    except (UserError, FileNotFoundError) as error:
        raise UserError("train.init_from", str(error), value=address) from None
    return load_checkpoint_or_model(uri)


def _checkpoint_of(folder: RunFolder) -> str:
    """The checkpoint of a run that `ncsn sample` takes."""
    if storage.exists(folder.config):
        config = from_yaml(storage.read_text(folder.config), origin=folder.config)
        trained = folders_of(folder, config)["sample"]
        if read_step(trained, "train").result:
            return ensure_average(find_inputs(trained, "sample", {}, config=config)["checkpoint"], config)
    recipe = folder.run.replace("-", "_")
    shown = recipe if (EXAMPLES / f"{recipe}.yaml").is_file() else "FILE"
    hint = f"train it first, with `ncsn run --config {shown} --run {folder.run}`"
    raise UserError("train.init_from", f"no trained run of this name in {folder.root}", hint=hint, value=folder.run)
