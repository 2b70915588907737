"""`ncsn neon`: weights extrapolated away from what training on the network's own samples does to them (2510.03597).

The run's samples become a dataset. A second run starts from the run's weights and trains on that dataset for a short
time. The weights then move away from its result, by the multiple w whose samples have the least Fréchet distance, and
become the checkpoint of the run `<run>-neon`, which is sampled and evaluated. Three seeds keep apart the samples that
are trained on, those that choose w, and those that are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ncsn import storage
from ncsn.config import Config
from ncsn.config.schema import SamplingConfig
from ncsn.config.search import variant
from ncsn.core.extrapolation import extrapolated, lowest_point
from ncsn.data.format import NO_LABEL, load_manifest
from ncsn.data.parquet import write_dataset
from ncsn.data.samples import generated_source
from ncsn.distributed.cluster import ray_cluster
from ncsn.distributed.likelihood import require_fitting
from ncsn.distributed.sampling import Candidate, make_shards, plan_shards, score_samples
from ncsn.errors import UserError
from ncsn.model.averages import sampled_checkpoint
from ncsn.model.checkpoint import SamplingCheckpoint, folder_name, load_for_sampling, require_same_training
from ncsn.model.classes import labels_of_images
from ncsn.model.index import INDEX, write_derived
from ncsn.model.start import self_training
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.runs.records import read_result, write_result
from ncsn.steps import evaluate, sample, train
from ncsn.steps.step import Step
from ncsn.tracking.lineage import INIT_FROM
from ncsn.tracking.registry import settle_guide

MULTIPLES = (0.5, 1.0, 1.5, 2.0, 3.0)
SAMPLES, SCORED = 6000, 10_000
MOST_IMAGES, SHARE = 3_500_000, 0.06  # of the self-training: at most, and of the images that the base has seen
COMPARED = ("fid", "precision", "recall")  # metrics of the base and of the result


@dataclass(frozen=True)
class NeonResult:
    """What the extrapolation reached."""

    run: str  # that has the weights: the base's own if none of the multiples is better
    checkpoint: str  # URI
    multiple: float  # w; 0 for the base
    distances: dict[str, float]  # w -> Fréchet distance of the samples that chose it
    metrics: dict[str, float]  # of other samples with these weights
    base_metrics: dict[str, float]  # of the base's, where its evaluation is of as many images
    self_trained: str  # URI of the checkpoint after training on samples
    samples: str  # URI of the dataset of samples
    num_images: int  # that it was trained on
    notes: list[str]


@dataclass(frozen=True)
class _Plan:
    """The settings and inputs of one extrapolation."""

    config: Config
    base: SamplingCheckpoint
    checkpoint: str  # URI of the base
    dataset: str  # URI of real images
    folder: RunFolder
    samples: int
    images: int
    multiples: tuple[float, ...]
    scored: int
    lease: str | None

    def sampling(self, seed: int, num_images: int) -> SamplingConfig:
        """The config's sampler with one of the seeds: 0 is that of the samples that are measured."""
        settings = self.config.sampling
        return settings.model_copy(update={"seed": (settings.seed + seed) % 2**63, "num_images": num_images})

    @property
    def uri(self) -> str:
        """Folder of this extrapolation."""
        recipe = {"base": self.base.digest, "samples": self.samples, "images": self.images}
        recipe["sampling"] = self.sampling(1, self.samples).model_dump(mode="json", exclude={"batch_size"})
        return storage.join(self.folder.neon, storage.digest(recipe, 12))

    @property
    def self_run(self) -> str:
        """Name of the run that trains on samples: other samples, or another length, are another run."""
        return f"{self.folder.run}-self-{storage.digest([self.uri, self.checkpoint], 8)}"


def run(
    config: Config,
    *,
    run: str,
    checkpoint: str,
    dataset: str,
    samples: int | None = None,  # to train on; None for 6,000, or as many as there are training images
    images: int | None = None,  # length of that training; None for 6 % of the base's, at most 3.5 million
    multiples: Sequence[float] = MULTIPLES,  # values of w to try, in (0, 10]
    scored: int = SCORED,  # samples that choose w
    lease: str | None = None,
) -> NeonResult:
    """Extrapolate the weights of a trained run, whose sampler makes all samples."""
    step = Step.claim("neon", config, run, NeonResult, unit="images")
    checkpoint = sampled_checkpoint(checkpoint, config)
    base = load_for_sampling(checkpoint)
    config = settle_guide(require_same_training(base.config, config, origin=checkpoint), near=step.folder.uri)
    manifest = load_manifest(dataset)
    require_fitting(base, manifest, dataset)
    real, share = manifest.count("train"), min(MOST_IMAGES, round(SHARE * base.images_seen))
    plan = _Plan(
        config=variant(config, {"sampling.relative_width": None}),
        base=base,
        checkpoint=checkpoint,
        dataset=dataset,
        folder=step.folder,
        samples=min(SAMPLES, real) if samples is None else samples,
        images=max(config.train.batch_size, share) if images is None else images,
        multiples=tuple(sorted(set(multiples))),
        scored=scored,
        lease=lease,
    )
    _check(plan)
    inputs = {"neon": plan.uri, "dataset": dataset, "multiples": plan.multiples, "scored": scored}
    if result := step.found(inputs, needs=lambda result: [result.checkpoint]):
        return result
    options = {"checkpoint": checkpoint, "dataset": dataset, "samples": str(plan.samples), "images": str(plan.images)}
    options |= {"multiples": ",".join(map(str, plan.multiples)), "scored": str(scored)}
    if result := step.dispatched(config, options):
        return result
    with ray_cluster(config):
        return step.done(_extrapolate(plan, step))


def _check(plan: _Plan) -> None:
    run_folder(plan.config, plan.self_run)  # the name may be too long
    if not plan.multiples or not all(0 < w <= 10 for w in plan.multiples):
        raise UserError("--multiples", "each must be above 0 and at most 10", value=list(plan.multiples))
    least = {"--samples": (plan.samples, 2), "--scored": (plan.scored, 2)}
    least["--images"] = (plan.images, plan.config.train.batch_size)
    for option, (value, minimum) in least.items():
        if value < minimum:
            raise UserError(option, f"must be at least {minimum}", value=value)


def _extrapolate(plan: _Plan, step: Step[NeonResult]) -> NeonResult:
    with step.timed(lease=plan.lease) as progress:
        own = _own_samples(plan, progress)
    settings = self_training(plan.config, plan.checkpoint, images=plan.images)
    tuned = train.run(settings, run=plan.self_run, dataset=own, lease=plan.lease)
    self_trained = load_for_sampling(tuned.checkpoint)
    with step.timed(lease=plan.lease) as progress:
        distances = _choose(plan, self_trained, progress)
    best = min(distances, key=distances.__getitem__)
    facts: dict[str, Any] = {
        "multiple": best,
        "base": {"uri": plan.checkpoint, "digest": plan.base.digest},
        "self_trained": {"uri": tuned.checkpoint, "digest": self_trained.digest},
        "samples": load_manifest(own).digest,
        "distances": {f"{w:g}": round(value, 6) for w, value in sorted(distances.items())},
        "scored": plan.scored,
        "base_metrics": _base_metrics(plan),
    }
    run, uri = _publish(plan, self_trained, best, facts)
    measured = _measured(plan, run, uri)
    with step.work(plan.config) as work:
        work.tracked.log_json(facts, "neon.json")
        work.tracked.log_metrics({"neon/multiple": best, **measured})
        work.tracked.set_tags({"checkpoint.uri": uri, "neon.samples": own})
    return NeonResult(
        run=run,
        checkpoint=uri,
        multiple=best,
        distances=facts["distances"],
        metrics=measured,
        base_metrics=facts["base_metrics"],
        self_trained=tuned.checkpoint,
        samples=own,
        num_images=plan.images,
        notes=_notes(plan, best, measured, facts["base_metrics"]),
    )


def _own_samples(plan: _Plan, progress: Callable[[int, int], None]) -> str:
    """URI of a dataset of the base's samples."""
    sampling, folder = plan.sampling(1, plan.samples), storage.join(plan.uri, "samples")
    config = plan.config.model_copy(update={"sampling": sampling})
    make_shards(config, plan_shards(config, checkpoint=plan.checkpoint, folder=folder), progress=progress)
    manifest = load_manifest(plan.dataset)
    source = generated_source(
        folder,
        _labels(plan, sampling),
        class_names=manifest.class_names if config.data.num_classes is not None else (),
        model=f"the checkpoint {plan.base.digest} of run {plan.folder.run}",
        terms=manifest.license,
    )
    return write_dataset(source, storage.join(plan.uri, "dataset"), name="own-samples", data=config.data).uri


def _labels(plan: _Plan, sampling: SamplingConfig) -> NDArray[np.int64]:
    num_classes, count = plan.config.data.num_classes, sampling.num_images
    if num_classes is None:
        return np.full(count, NO_LABEL, np.int64)
    labels = labels_of_images(
        sampling.label, num_classes=num_classes, classes=plan.base.classes, seed=sampling.seed, first=0, count=count
    )
    return labels.numpy()


def _choose(plan: _Plan, self_trained: SamplingCheckpoint, progress: Callable[[int, int], None]) -> dict[float, float]:
    """Fréchet distance for each w, 0 included, and for the w where a parabola through the best three is least."""
    distances, total = dict[float, float](), (len(plan.multiples) + 2) * plan.scored
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    def score(multiples: Sequence[float]) -> None:
        sampling = plan.sampling(2, plan.scored)
        candidates = [Candidate(_merged(plan, self_trained, w), sampling) for w in multiples]
        found = score_samples(plan.config, candidates, dataset=plan.dataset, num_images=plan.scored, on_images=count)
        distances.update({w: math.inf if d is None else d for w, d in zip(multiples, found, strict=True)})

    score((0.0, *plan.multiples))
    best = round(lowest_point(distances), 3)
    if best not in distances:
        score((best,))
    finite = {w: distance for w, distance in distances.items() if math.isfinite(distance)}
    if not finite:
        raise UserError("sampling.sampler", "gives images that are not finite", value=plan.config.sampling.sampler.kind)
    return finite


def _merged(plan: _Plan, self_trained: SamplingCheckpoint, w: float) -> str:
    """URI of a checkpoint with the weights for w."""
    if w == 0:
        return plan.checkpoint
    uri = storage.join(plan.uri, "candidates", f"{w:g}")
    if not storage.exists(storage.join(uri, INDEX)):  # a killed upload may have left a part
        write_derived(
            uri,
            plan.checkpoint,
            _weights(plan, self_trained, w),
            images_seen=plan.base.images_seen + plan.images,
            facts={"neon": {"multiple": w}},
        )
    return uri


def _weights(plan: _Plan, self_trained: SamplingCheckpoint, w: float) -> dict[str, Tensor]:
    base, moved = (dict(each.network.named_parameters()) for each in (plan.base, self_trained))
    return {name: tensor.detach() for name, tensor in extrapolated(base, moved, w).items()}


def _publish(plan: _Plan, self_trained: SamplingCheckpoint, w: float, facts: Mapping[str, Any]) -> tuple[str, str]:
    """Make the weights the training of a run of their own; its name, and the checkpoint. The candidates go."""
    storage.delete_folder(storage.join(plan.uri, "candidates"))
    if w == 0:
        return plan.folder.run, plan.checkpoint
    step = Step.claim("train", plan.config, f"{plan.folder.run}-neon", train.TrainResult, unit="images")
    seen = plan.base.images_seen + plan.images
    uri = storage.join(step.folder.checkpoints, folder_name(seen))
    storage.delete_folder(step.folder.checkpoints)  # of an extrapolation with other settings
    write_derived(uri, plan.checkpoint, _weights(plan, self_trained, w), images_seen=seen, facts={"neon": facts})
    step.found({"dataset": plan.dataset, "num_images": plan.config.train.num_images}, needs=lambda _: [])
    with step.work(plan.config) as work:
        work.tracked.set_tags({"checkpoint.uri": uri, "checkpoint.images_seen": str(seen)})
        work.tracked.set_tags({INIT_FROM: f"{plan.checkpoint}/{plan.base.digest}"})
        work.tracked.set_tags({"neon.multiple": f"{w:g}", "neon.self_trained": self_trained.digest})
    step.done(train.TrainResult(uri, seen, None, 0.0, 0.0, plan.dataset))
    if ingested := read_result(plan.folder, "ingest"):
        write_result(step.folder, "ingest", inputs=ingested.inputs, result=ingested.result, seconds=ingested.seconds)
    return step.folder.run, uri


def _measured(plan: _Plan, run: str, checkpoint: str) -> dict[str, float]:
    """Metrics of samples that did not choose w."""
    if run == plan.folder.run:
        return _base_metrics(plan)
    made = sample.run(plan.config, run=run, checkpoint=checkpoint, lease=plan.lease)
    found = evaluate.run(plan.config, run=run, samples=made.uri, dataset=plan.dataset, lease=plan.lease)
    return _compared(found.metrics)


def _base_metrics(plan: _Plan) -> dict[str, float]:
    found = read_result(plan.folder, "evaluate")
    same = found is not None and found.result["num_images"] == plan.config.sampling.num_images
    return _compared(found.result["metrics"]) if found is not None and same else {}


def _compared(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if any(f"_{metric}_n" in name for metric in COMPARED)}


def _notes(plan: _Plan, w: float, metrics: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
    if w == 0:
        return ["none of the multiples is better than the base (w = 0): it may not be trained to the end"]
    notes = [f"w = {w:g} was chosen by the Fréchet distance of {plan.scored:,} samples with another seed"]
    for name, value in metrics.items():
        if name in base and "_precision_n" in name and value < base[name]:
            notes.append(f"precision fell from {base[name]:.3f} to {value:.3f}, as it does where recall rises")
    if not base:
        notes.append(f"evaluate run {plan.folder.run} to compare precision and recall with the base's")
    return notes
