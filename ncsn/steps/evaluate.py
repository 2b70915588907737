"""Metrics of the samples against the training images, next to those of real test images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config import Config
from ncsn.data.format import MANIFEST, Manifest, class_slug, load_manifest
from ncsn.data.samples import SampleSet
from ncsn.data.training_images import open_cache
from ncsn.distributed.cluster import cluster_for, on_this_machine, ray_tags
from ncsn.distributed.ray_calls import runner_of
from ncsn.errors import NotFound, UserError
from ncsn.evaluation import evaluation_of, extractor_name
from ncsn.evaluation.audit import audit
from ncsn.evaluation.features import Runner, SplitSet, here
from ncsn.evaluation.frechet import RunningScore
from ncsn.evaluation.measure import Measured, measure_sets
from ncsn.evaluation.reference import images_to_prepare, open_evaluator
from ncsn.model.classes import require_same_classes
from ncsn.progress import Progress
from ncsn.report.images import neighbors_png
from ncsn.report.plots import confusion_matrix, to_png
from ncsn.report.words import few_samples, verdict_of
from ncsn.runs.metrics import metric_name
from ncsn.runs.results import EvaluateResult
from ncsn.runs.run import Run
from ncsn.steps.prepared import Context, Prepared
from ncsn.steps.sample import grid_of
from ncsn.tracking.gate import Measurement
from ncsn.tracking.mlflow_runs import NOTE

# Extractor -> its metrics in papers, and the number of samples that they are over.
PUBLISHED_METRICS = {"inception": "Inception scores and Fréchet distances", "dinov2": "FD-DINOv2 values"}
PUBLISHED_IMAGES = 50_000
MOST_CLASSES = 100  # with metrics of their own in MLflow
FEW_IMAGES = 1024  # up to here a second GPU saves less time than starting Ray takes


def prepare(run: Run, *, samples: str, dataset: str) -> Evaluate:
    """The first `config.sampling.num_images` images of a folder of samples, and how they are measured."""
    config, samples, dataset = run.config, storage.absolute(samples), storage.absolute(dataset)
    manifest = load_manifest(dataset)
    if not storage.exists(samples):
        raise NotFound(samples, "no samples", hint="run `ncsn sample` first")
    evaluation = evaluation_of(config, manifest)
    key = {
        "samples": samples,
        "dataset": dataset,
        "num_images": config.sampling.num_images,
        "evaluation": evaluation.model_dump(mode="json"),
    }
    return Evaluate(config, key, manifest, evaluation.extractor, samples, dataset)


@dataclass(frozen=True)
class Evaluate(Prepared[EvaluateResult]):
    """`evaluate` on the machines that are worth it, with its figures in MLflow."""

    manifest: Manifest
    wanted: str  # extractor
    samples: str  # URI of their folder
    dataset: str  # URI

    def work(self, context: Context) -> EvaluateResult:
        progress, tracked, lease = context.progress, context.tracked, context.lease
        on_cluster = lease is not None or not on_this_machine()  # whose head, where this process may be, has no cores
        # Here, only several GPUs make it worth starting Ray: a single process has all cores.
        images = max(self.manifest.count("train"), self.config.sampling.num_images)
        on_gpus = self.config.compute.use_gpu and self.config.compute.max_workers > 1 and images > FEW_IMAGES
        with cluster_for(self.config, start=on_gpus, join=on_cluster, last_lines=context.last_lines):
            tracked.set_tags(ray_tags())
            if self.wanted == "dinov2" and not self.config.compute.use_gpu:
                progress.note("DINOv2 takes about two seconds per image and core without a GPU")
            tracked.log_dataset(self.manifest.name, digest=self.manifest.digest, uri=self.dataset, context="evaluation")
            runner = runner_of(self.config.compute) if on_cluster or on_gpus else here
            folder = context.folder.evaluation
            result = evaluate(
                self.config, samples=self.samples, dataset=self.dataset, folder=folder, progress=progress, runner=runner
            )
        progress.note(str(RunningScore(**result.running[-1])))
        for each in (tracked, tracked.parent):
            each.log_metrics({**result.metrics, **result.real_metrics})
        tracked.parent.set_tags({NOTE: result.verdict, "eval.verdict": result.grade})
        extractor, by_class = extractor_name(self.config, self.manifest), {}
        for number, line in enumerate(result.classes["table"][:MOST_CLASSES] if result.classes else []):
            for metric in ("agreement", "kid"):  # `eval/classifier_class_agreement_n51/3-dress`
                full = metric_name(f"class_{metric}", extractor=extractor, num_images=line["num_images"])
                by_class[f"{full}/{class_slug(number, self.manifest.class_names)}"] = line[metric]
        tracked.log_metrics({name: value for name, value in by_class.items() if value is not None})
        for uri in filter(None, (result.uri, result.real_images, result.neighbors, result.confusion)):
            tracked.log_file(uri)
        for score in (RunningScore(**point) for point in result.running):
            tracked.log_metrics(score.named("eval", extractor=extractor), step=score.num_images)
        facts = {"eval.fingerprint": result.fingerprint, "samples.uri": self.samples, "evaluation.uri": result.uri}
        tracked.set_tags(facts)
        return result


def evaluate(
    config: Config, *, samples: str, dataset: str, folder: str, progress: Progress, runner: Runner = here
) -> EvaluateResult:
    """Compute the metrics and write them below `folder`."""
    count = config.sampling.num_images
    manifest = load_manifest(dataset)
    _require_same_kind(config, samples, manifest)
    evaluation = evaluation_of(config, manifest)
    other_split = "test" if evaluation.reference_split == "train" else "train"
    num_real = manifest.count(other_split)
    if other_split == "train":  # all of which would take longer than the rest
        num_real = min(count, num_real)
    sets = (SampleSet(samples, count), SplitSet(dataset, other_split, num_real, drawn=True))
    progress.start(images_to_prepare(config, manifest) + count + num_real, "images")
    evaluator = open_evaluator(config, dataset, runner=runner, progress=progress)
    generated, real = measure_sets(config, dataset, evaluator, sets, runner=runner, progress=progress)
    audited = audit(config, dataset, sets[0], runner=runner, progress=progress)
    for measured, figures in zip((generated, real), audited.figures(), strict=True):
        measured.metrics.update(figures)
    name, fingerprint, extractor = evaluator.name, evaluator.reference.fingerprint, evaluator.extractor
    root = storage.absolute(config.storage.root)
    compared = storage.relative_uris({"samples": samples, "reference": fingerprint}, root)
    place = storage.join(folder, f"{name}-n{count}-{storage.digest(compared, 12)}")
    classes = _classes(generated, real, manifest, by_probe=extractor != "classifier")
    gate = Measurement(
        name=metric_name("fid", extractor=name, num_images=count),
        value=generated.metrics["fid"].value,
        log_std=generated.running[-1].log_std,
        num_images=count,
        fingerprint=fingerprint,
    )
    metrics, real_metrics = evaluator.facts | generated.named(name), real.named(name, real=True)
    grade, verdict = verdict_of(metrics, real_metrics, copies=audited.copies)
    result = EvaluateResult(
        uri=f"{place}.json",
        verdict=verdict,
        grade=grade,
        metrics=metrics,
        real_metrics=real_metrics,
        fingerprint=fingerprint,
        num_images=count,
        num_real_images=num_real,
        gate=asdict(gate),
        audit=audited.plain(),
        running=[asdict(score) for score in generated.running],
        notes=list(_notes(config, num_real, extractor=extractor, real_split=other_split)),
        classes=classes,
        real_images=f"{place}-real.png",
        neighbors=f"{place}-neighbors.png",
        confusion=None if classes is None else f"{place}-classes.png",
    )
    storage.write_bytes(result.real_images, grid_of(config, sets[1], classes=sets[0].labels())[0])
    if classes is not None:
        storage.write_bytes(f"{place}-classes.png", to_png(confusion_matrix(classes)))
    training, pairs = open_cache(dataset, "train", as_bytes=True).images, audited.worst
    shown = np.concatenate([sets[0].read(pair["image"], pair["image"] + 1) for pair in pairs])
    storage.write_bytes(result.neighbors, neighbors_png(shown, training[[pair["row"] for pair in pairs]]))
    places = {"samples": samples, "dataset": dataset, "reference_split": evaluation.reference_split}
    storage.write_json(result.uri, storage.relative_uris(asdict(result) | places, root), indent=1)
    return result


def _require_same_kind(config: Config, samples: str, manifest: Manifest) -> None:
    """Refuse to judge images by a dataset of another shape, or by other classes than those that were asked for."""
    hint = "evaluate them against the dataset that their model was trained on"
    pixels = SampleSet(samples, config.sampling.num_images).pixels()
    if pixels != manifest.pixels:
        raise UserError(samples, f"the samples are {pixels}, but the dataset has {manifest.pixels}", hint=hint)
    if config.data.num_classes is None:
        return
    require_same_classes(config.data.num_classes, manifest.class_names, where=f"the dataset {manifest.name}")
    known = (storage.find_json(storage.join(samples, MANIFEST)) or {}).get("classes")
    if known is not None and known != list(manifest.class_names):
        old, new = next(pair for pair in zip(known, manifest.class_names, strict=True) if pair[0] != pair[1])
        change = f"{old!r} instead of {new!r}"
        reason = f"the samples {samples} have other classes than the dataset {manifest.name}, such as {change}"
        raise UserError("data.num_classes", reason, hint=hint, value=config.data.num_classes)


def _classes(generated: Measured, real: Measured, manifest: Manifest, *, by_probe: bool) -> dict[str, Any] | None:
    """The scores by class as plain values; None without classes."""
    if generated.classes is None:
        return None
    names, of_real = manifest.class_names, real.classes
    return {
        "agreement": generated.classes.agreement,
        "real_agreement": None if of_real is None else of_real.agreement,
        "table": generated.classes.table(names),
        "real_table": [dict.fromkeys(("agreement", "kid"))] * len(names) if of_real is None else of_real.table(names),
        "confusion": generated.classes.confusion.tolist(),
        "by_probe": by_probe,
    }


def _notes(config: Config, num_real: int, *, extractor: str, real_split: str) -> Iterator[str]:
    num_images, guidance = config.sampling.num_images, config.sampling.guidance
    if num_real < num_images:
        yield (
            f"the {real_split} split has only {num_real:,} images, so what depends on the number of images compares "
            f"the first {num_real:,} samples with them; the gate compares models by all {num_images:,}"
        )
    if extractor in PUBLISHED_METRICS and num_images != PUBLISHED_IMAGES:
        yield (
            f"published {PUBLISHED_METRICS[extractor]} are over {PUBLISHED_IMAGES:,} samples; these are over "
            f"{num_images:,} and not comparable with them: set sampling.num_images = {PUBLISHED_IMAGES}"
        )
    if extractor == "clusters":
        yield "there is no classifier score, because the extractor learned clusters instead of labels"
    elif extractor == "dinov2":
        yield "there is no score, because DINOv2 has no classes"
    elif extractor == "classifier" and guidance is not None and guidance.kind == "classifier_free":
        yield (
            "guidance follows the labels that the classifier was trained with, so it may find guided samples better "
            "than real images: judge guidance by evaluation.extractor = clusters too"
        )
    if few := few_samples(metric_name("fid", extractor=extractor, num_images=num_images)):
        yield few
