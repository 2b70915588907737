"""Step 4: the samples measured against the training images, beside the same figures for real test images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.cache import CachedSplit, open_cache
from ncsn.data.manifest import MANIFEST, Manifest, load_manifest
from ncsn.evaluation.classifier import ClassifierRecipe
from ncsn.evaluation.classifier_store import obtain_classifier
from ncsn.evaluation.extractors import Extractor, Images, batches, fingerprint_of
from ncsn.evaluation.figures import figures_of, metric_name
from ncsn.evaluation.measurement import Measurement
from ncsn.evaluation.reference import extract_all, obtain_reference
from ncsn.evaluation.samples import read_samples
from ncsn.steps.progress import ProgressFile
from ncsn.steps.result import claim_run, once
from ncsn.tracking.run import step_run

REFERENCE_SPLIT = "train"


@dataclass(frozen=True)
class EvaluateResult:
    """Figures of one set of samples.

    Attributes:
        uri: JSON file with everything below.
        metrics: `eval/<figure>_n<num_images>` of the samples.
        real_metrics: `eval/real_<figure>_n<num_real_images>` of real test images: what a perfect model would reach.
        fingerprint: hash of extractor, weights and reference images; figures of different ones do not compare.
        num_images: generated images measured.
        num_real_images: real test images measured.
        gate: the `Measurement` that decides about promotion, as plain values.
        notes: what a reader of the figures should know.
    """

    uri: str
    metrics: dict[str, float]
    real_metrics: dict[str, float]
    fingerprint: str
    num_images: int
    num_real_images: int
    gate: dict[str, Any]
    notes: list[str]


@dataclass
class _Meter:
    """Images processed over the parts of the step, towards one total."""

    publish: Callable[[int, int], None]
    total: int
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        self.publish(self.done, self.total)

    def part(self, size: int) -> Callable[[int, int], None]:
        """A `(done, total)` callback for a part of the step that weighs `size` images."""
        start = self.done

        def callback(done: int, total: int) -> None:
            self.done = start + size * done // total
            self.publish(self.done, self.total)

        return callback


def run(config: Config, *, run: str, samples: str, dataset: str) -> EvaluateResult:
    """Measure the first `config.sampling.num_images` images of a samples folder.

    Args:
        config: The experiment; its evaluation section decides how.
        run: Name of the run that keeps the figures.
        samples: URI of the samples folder.
        dataset: URI of the ingested data set.

    Raises:
        FileNotFoundError: if there is no samples folder.
        ValueError: for missing or wrongly shaped samples, fewer samples than splits, or a data set without labels.
    """
    folder = claim_run(config, run)
    samples, dataset = storage.absolute(samples), storage.absolute(dataset)
    _check_inputs(config, samples, dataset)

    def work(progress: ProgressFile) -> EvaluateResult:
        with step_run(config, run=run, step="evaluate") as tracked:
            result = evaluate(config, samples=samples, dataset=dataset, folder=folder.evaluation, progress=progress)
            tracked.log_metrics({**result.metrics, **result.real_metrics})
            tracked.set_tags({"eval.fingerprint": result.fingerprint})
            tracked.log_file(result.uri)
            return result

    return once(
        folder,
        "evaluate",
        inputs={
            "samples": samples,
            "dataset": dataset,
            "num_images": config.sampling.num_images,
            "evaluation": config.evaluation.model_dump(mode="json"),
            "seed": config.seed,
        },
        result_type=EvaluateResult,
        outputs=lambda result: [result.uri],
        unit="images",
        work=work,
    )


def evaluate(
    config: Config, *, samples: str, dataset: str, folder: str, progress: Callable[[int, int], None]
) -> EvaluateResult:
    """Compute the figures and write them below `folder`; what `run` does without its bookkeeping."""
    settings, count = config.evaluation, config.sampling.num_images
    manifest = load_manifest(dataset)
    train, test = open_cache(dataset, "train"), open_cache(dataset, "test")
    num_real = min(count, len(test.images))
    training = settings.classifier_epochs * len(train.images)
    meter = _Meter(progress, training + len(train.images) + count + num_real)
    extractor, facts = _classifier(config, dataset, manifest, train, test, meter.part(training))
    meter.done = training
    reference = obtain_reference(
        dataset,
        extractor,
        images=train.images,
        dataset_digest=manifest.digest,
        split=REFERENCE_SPLIT,
        batch_size=settings.batch_size,
        on_progress=meter.part(len(train.images)),
    )
    meter.done = training + len(train.images)
    stream = _of_shape(read_samples(samples, num_images=count, batch_size=settings.batch_size), manifest, samples)
    generated = extract_all(extractor, stream, on_images=meter.add)
    chosen = test.images[keyed_permutation(config.seed, epoch=0, size=len(test.images))[:num_real]]
    real = extract_all(extractor, batches(chosen, batch_size=settings.batch_size), on_images=meter.add)
    figures = figures_of(generated, reference, num_splits=settings.num_splits)
    real_figures = figures_of(real, reference, num_splits=settings.num_splits)
    figures["score_ratio"] = figures["score"] / real_figures["score"]
    result = EvaluateResult(
        uri=storage.join(folder, f"{extractor.name}-n{count}-{fingerprint_of(samples=samples)[:12]}.json"),
        metrics=facts | _named(figures, extractor, count),
        real_metrics=_named(real_figures, extractor, num_real, real=True),
        fingerprint=reference.fingerprint,
        num_images=count,
        num_real_images=num_real,
        gate=asdict(_gate(figures["fid"], extractor, count, reference.fingerprint)),
        notes=_notes(count, num_real),
    )
    provenance = {"samples": samples, "dataset": dataset, "reference_split": REFERENCE_SPLIT}
    storage.write_text(result.uri, json.dumps(asdict(result) | provenance, indent=1))
    return result


def _check_inputs(config: Config, samples: str, dataset: str) -> None:
    if not storage.exists(storage.join(dataset, MANIFEST)):
        raise ValueError(f"no data set at {dataset}; run `ncsn ingest` first")
    if not storage.exists(samples):
        raise FileNotFoundError(f"no samples folder at {samples}; run `ncsn sample` first")
    if config.sampling.num_images < config.evaluation.num_splits:
        raise ValueError(
            f"sampling.num_images = {config.sampling.num_images} images do not fill evaluation.num_splits = "
            f"{config.evaluation.num_splits} splits; generate more images or lower evaluation.num_splits"
        )


def _classifier(
    config: Config,
    dataset: str,
    manifest: Manifest,
    train: CachedSplit,
    test: CachedSplit,
    on_progress: Callable[[int, int], None],
) -> tuple[Extractor, dict[str, float]]:
    recipe = ClassifierRecipe(
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_classes=len(manifest.class_names),
        epochs=config.evaluation.classifier_epochs,
        seed=config.seed,
    )
    stored = obtain_classifier(
        dataset,
        recipe,
        train=train,
        test=test,
        device="cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu",
        on_progress=on_progress,
    )
    return stored.extractor, {"eval/classifier_test_accuracy": stored.test_accuracy}


def _of_shape(stream: Iterator[Images], manifest: Manifest, samples: str) -> Iterator[Images]:
    for batch in stream:
        if batch.shape[1:] != manifest.shape:
            raise ValueError(
                f"the samples at {samples} are {_pixels(batch.shape[1:])}, the data set has {_pixels(manifest.shape)}; "
                "evaluate them against the data set that their model was trained on"
            )
        yield batch


def _pixels(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _named(figures: dict[str, float], extractor: Extractor, num_images: int, *, real: bool = False) -> dict[str, float]:
    return {
        metric_name(figure, extractor=extractor.name, num_images=num_images, real=real): value
        for figure, value in figures.items()
    }


def _gate(distance: float, extractor: Extractor, num_images: int, fingerprint: str) -> Measurement:
    return Measurement(
        name=metric_name("fid", extractor=extractor.name, num_images=num_images),
        value=distance,
        num_images=num_images,
        fingerprint=fingerprint,
        lower_is_better=True,
    )


def _notes(num_images: int, num_real: int) -> list[str]:
    if num_real == num_images:
        return []
    return [
        f"the test split has only {num_real} images, so the real figures are over {num_real} and the samples' over "
        f"{num_images}: the smaller set has the larger Frechet distance and the smaller score by its size alone"
    ]
