"""Training on Ray, from random weights, what `train.init_from` names or where `train.continue_from` goes on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ncsn import distributed, storage
from ncsn.answer import SAVE_SECONDS, answer
from ncsn.config import Config, to_yaml
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.noise_levels import resolve_noise
from ncsn.distributed.cluster import ray_cluster, ray_tags
from ncsn.errors import UserError
from ncsn.evaluation.utility import require_enough
from ncsn.model import build
from ncsn.model.checkpoint import FILES, CheckpointStore, load_checkpoint
from ncsn.model.classes import require_label, require_same_classes
from ncsn.progress import PublishedProgress, read_progress, say
from ncsn.runs.history import RATE, load_history
from ncsn.runs.layout import INDEX, RunFolder, folder_name, images_seen_at, resumable
from ncsn.runs.record import read_attempt, read_finished, update_attempt
from ncsn.runs.results import TrainResult
from ncsn.runs.run import Run, require_owner, state_to_continue
from ncsn.steps.prepared import Context, Prepared
from ncsn.storage.heartbeat import Lease
from ncsn.storage.retry import limited
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import CONTINUE_FROM, INIT_FROM
from ncsn.training.batches import classes_of
from ncsn.training.loop import TrainingJob

if TYPE_CHECKING:
    pass


def prepare(run: Run, *, dataset: str, finish: bool = False) -> Prepared[TrainResult]:
    """A run trains on one dataset, from random weights or from what `train.init_from` names, which is copied here.

    With `finish` the newest checkpoint is the result, of however many images; without, training goes on.
    """
    manifest, folder = load_manifest(dataset), run.folder
    config = settle_noise(run, manifest)
    require_classes(config, manifest, dataset)
    if config.utility is not None:  # not after hours of training
        require_enough(manifest)
    owner, length = run.owner, config.train.num_images
    if length > owner.train.num_images:  # the length of the run is that of its longest training
        longer = owner.train.model_copy(update={"num_images": length})
        storage.write_text(folder.config, to_yaml(owner.model_copy(update={"train": longer})))
    key = {"dataset": dataset}
    if finish:
        return AsItIs(config, key, dataset)
    stored = read_finished(folder, TrainResult.step)
    if stored is not None and stored.key == key and stored.result.images_seen < length:
        # A longer training may delete that checkpoint.
        storage.delete(folder.step(TrainResult.step, "result.json"))
        update_attempt(folder, TrainResult.step, state="")
    return Train(config, key, dataset, manifest, start_of(config, folder, manifest))


class _OfTraining(Prepared[TrainResult]):
    """A checkpoint is of use with all its files."""

    def files(self, result: TrainResult) -> list[str]:
        return [storage.join(result.checkpoint, name) for name in (INDEX, *FILES)]


@dataclass(frozen=True)
class Train(_OfTraining):
    """Trains, or resumes from the newest checkpoint.

    When the launcher's heartbeat stops, training saves a checkpoint and ends. So it does on Ctrl-C and SIGTERM, and
    once the file `stop` of the step exists.
    """

    dataset: str  # URI
    manifest: Manifest
    start: Start

    def work(self, context: Context) -> TrainResult:
        folder, tracked = context.folder, context.tracked
        stop = folder.step(TrainResult.step, "stop")
        storage.delete(stop)  # of an earlier attempt

        def ask_to_save() -> bool:
            if begun := read_progress(folder.step(TrainResult.step, "progress.json")) is not None:
                say(f"interrupted: saving, for at most {SAVE_SECONDS:.0f} s; Ctrl-C again ends at once")
                with suppress(OSError), limited(SAVE_SECONDS):
                    storage.write_text(stop, "")
            return begun

        state = None
        if (name := self.config.train.continue_from) is not None:
            source = RunFolder(folder.root, name)
            tracked.set_tags({CONTINUE_FROM: source.uri})
            if next(resumable(folder.checkpoints), None) is None:
                seen = images_seen_at(state := state_to_continue(self.config))
                replace(load_history(source.history, until=seen), uri=folder.history).publish()
        with answer.saving(ask_to_save), ray_cluster(self.config, last_lines=context.last_lines):
            tracked.set_tags({**ray_tags(), **self.start.tags})
            tracked.log_dataset(self.manifest.name, digest=self.manifest.digest, uri=self.dataset)
            job = TrainingJob(
                config=self.config,
                dataset=self.dataset,
                sink=LiveMetrics(tracked.uri, tracked.run_id),
                # Without the lease: at its end, training looks at it itself and saves first.
                progress=PublishedProgress(folder.step(TrainResult.step, "progress.json")),
                history=folder.history,
                preview=folder.preview,
                lease=Lease(context.lease) if context.lease else None,
                stop=stop,
                start=self.start.uri,
                state=state,
            )
            outcome = distributed.train(job, run_uri=folder.uri)
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
            dataset=self.dataset,
            notes=[*self.start.notes, *outcome.notes],
        )


@dataclass(frozen=True)
class AsItIs(_OfTraining):
    """Makes the newest checkpoint the result."""

    dataset: str  # URI

    def work(self, context: Context) -> TrainResult:
        folder = context.folder
        if (newest := CheckpointStore(folder.checkpoints).newest()) is None:
            hint = "run the command without it"
            raise UserError("--finish", f"run {folder.run!r} has no checkpoint yet", hint=hint)
        seen, seconds = images_seen_at(newest), read_attempt(folder, TrainResult.step).seconds
        uri = storage.join(folder.checkpoints, folder_name(seen))
        storage.publish_folder(storage.join(folder.checkpoints, newest), uri, marker=INDEX)
        context.tracked.set_tags({"checkpoint.uri": uri, "checkpoint.images_seen": str(seen)})
        length = self.config.train.num_images
        notes = [f"training ended at {seen:,} of {length:,} images; `ncsn run` without --finish goes on"]
        rate = load_history(folder.history, until=seen).images_per_second or seen / max(seconds, 1e-9)
        return TrainResult(uri, seen, None, round(rate, 1), round(seconds, 1), self.dataset, notes)


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
        have, hint = sum(map(bool, labeled)), "sort the images into one subfolder per class, or set it to auto"
        reason = f"needs labels of at least 2 classes, and the training images of {dataset} have {have}"
        raise UserError("evaluation.extractor", reason, hint=hint, value="classifier")
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
    from ncsn.model.trained import adapted, start_notes  # here, so that others do not load it
    from ncsn.steps.address import SOURCE, keep, start_place

    uri = folder.start
    if not storage.exists(storage.join(uri, INDEX)):
        keep(start_place(config), uri)
    source = load_checkpoint(uri)
    with torch.device("meta"):
        network = build.network(config)
    _, changes = adapted(source, network, config=config, classes=classes_of(config, manifest))
    record = storage.absolute_uris(storage.read_json(storage.join(uri, SOURCE)), folder.root)
    tags = {INIT_FROM: f"{record['source']}/{record['digest']}"}
    return Start(uri, tags, tuple(start_notes(source, config, changes)))
