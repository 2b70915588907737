"""Step 2: denoising score matching on Ray Train."""

from __future__ import annotations

from dataclasses import dataclass, field

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import Manifest, load_manifest
from ncsn.distributed import trainer
from ncsn.distributed.cluster import ray_cluster, ray_tags
from ncsn.errors import UserError
from ncsn.model.classes import require_label, require_same_classes
from ncsn.steps.start import start_of
from ncsn.steps.step import Step
from ncsn.storage.heartbeat import Lease
from ncsn.training.batches import classes_of
from ncsn.training.loop import TrainingJob


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


def run(config: Config, *, run: str, dataset: str, lease: str | None = None) -> TrainResult:
    """Train, or resume the run from its newest checkpoint, or return the result if it is complete.

    `lease` is the URI of the launcher's heartbeat; when it stops, training saves a checkpoint and ends.
    """
    step = Step("train", config, run, TrainResult)
    manifest = load_manifest(dataset)
    config = step.settle_noise(config, manifest)
    _require_trainable(config, manifest, dataset)
    inputs = {"dataset": dataset, "num_images": config.train.num_images}
    if result := step.found(inputs, needs=lambda result: [result.checkpoint]):
        return result
    start = start_of(config, step.folder, manifest)
    if result := step.dispatched(config, {"dataset": dataset}):
        return result
    with step.work(config) as work, ray_cluster(config):
        tracked = work.tracked
        tracked.set_tags({**ray_tags(), **start.tags})
        tracked.log_dataset(manifest.name, digest=manifest.digest, uri=dataset)
        job = TrainingJob(
            config=config,
            dataset=dataset,
            sink=tracked.live_metrics(),
            progress=work.progress,
            history=step.folder.history,
            preview=step.folder.preview,
            averages=step.folder.averages,
            lease=Lease(lease) if lease else None,
            start=start.uri,
        )
        outcome = trainer.train(job, run_uri=step.folder.uri)
        checkpoint = storage.join(step.folder.checkpoints, outcome.checkpoint)
        tracked.set_tags({"checkpoint.uri": checkpoint, "checkpoint.images_seen": str(outcome.images_seen)})
        result = TrainResult(
            checkpoint=checkpoint,
            images_seen=outcome.images_seen,
            loss=outcome.loss,
            images_per_second=round(outcome.images_per_second, 1),
            seconds=round(outcome.seconds, 1),
            dataset=dataset,
            notes=[*start.notes, *outcome.notes],
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


def require_classes(config: Config, manifest: Manifest, dataset: str) -> None:
    """Refuse images with other classes than the network's, and a class to sample that is none of them."""
    require_same_classes(config.data.num_classes, manifest.class_names, where=f"the dataset {dataset}")
    if (classes := classes_of(config, manifest)) is not None:
        require_label(config.sampling.label, classes)
