"""Step 4: the samples measured against the training images, beside the same figures for real test images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.cache import CachedSplit, open_cache
from ncsn.data.manifest import MANIFEST, Manifest, load_manifest
from ncsn.evaluation.classifier import ClassifierRecipe
from ncsn.evaluation.classifier_store import obtain_classifier
from ncsn.evaluation.extractors import Extractor, Images, batches, fingerprint_of
from ncsn.evaluation.figures import (
    NEIGHBOUR_IMAGES,
    SHOWN_NEIGHBOURS,
    Figure,
    figures_of,
    metric_name,
    neighbour_figures,
    neighbour_table,
    pixel_neighbours,
)
from ncsn.evaluation.inception import InceptionExtractor
from ncsn.evaluation.measurement import Measurement
from ncsn.evaluation.neighbours import nearest_neighbours
from ncsn.evaluation.reference import Reference, extract_all, obtain_reference
from ncsn.evaluation.samples import read_samples
from ncsn.steps.progress import ProgressFile
from ncsn.steps.result import claim_run, once
from ncsn.tracking.run import step_run

REFERENCE_SPLIT = "train"
SEED = 0
"""Of the classifier and of what is drawn: the same for all experiments on a data set, so that they compare."""


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
        """Count images of the part at hand."""
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
    num_real = min(count, len(test))
    training = settings.classifier_epochs * len(train) if settings.extractor == "classifier" else 0
    meter = _Meter(progress, training + len(train) + count + num_real)
    extractor, facts = _extractor(config, dataset, manifest, train, test, meter.part(training))
    meter.done = training
    reference = obtain_reference(
        dataset,
        extractor,
        images=train.images,
        dataset_digest=manifest.digest,
        split=REFERENCE_SPLIT,
        batch_size=settings.batch_size,
        on_progress=meter.part(len(train)),
    )
    meter.done = training + len(train)
    stream = read_samples(samples, num_images=count, batch_size=settings.batch_size)
    chosen = test.images[keyed_permutation(SEED, epoch=0, size=len(test))[:num_real]]
    compare = partial(_compare, extractor, reference, train.images, settings.num_splits, meter)
    generated = compare(_of_shape(stream, manifest, samples))
    real = compare(batches(chosen, batch_size=settings.batch_size))
    generated.figures["score_ratio"] = Figure(generated.value("score") / real.value("score"), count)
    result = EvaluateResult(
        uri=storage.join(folder, f"{extractor.name}-n{count}-{fingerprint_of(samples=samples)[:12]}.json"),
        metrics=facts | generated.named(extractor),
        real_metrics=real.named(extractor, real=True),
        fingerprint=reference.fingerprint,
        num_images=count,
        num_real_images=num_real,
        gate=asdict(_gate(generated.figures["fid"], extractor, reference.fingerprint)),
        notes=_notes(count, num_real),
    )
    evidence = {
        "samples": samples,
        "dataset": dataset,
        "reference_split": REFERENCE_SPLIT,
        "nearest_training_images": generated.nearest,
    }
    storage.write_text(result.uri, json.dumps(asdict(result) | evidence, indent=1))
    return result


@dataclass(frozen=True)
class _Compared:
    """The figures of one set of images, and the nearest training images of its first ones."""

    figures: dict[str, Figure]
    nearest: list[dict[str, Any]]

    def value(self, figure: str) -> float:
        return self.figures[figure].value

    def named(self, extractor: Extractor, *, real: bool = False) -> dict[str, float]:
        return {
            metric_name(name, extractor=extractor.name, num_images=figure.num_images, real=real): figure.value
            for name, figure in self.figures.items()
        }


def _compare(
    extractor: Extractor,
    reference: Reference,
    training_images: Images,
    num_splits: int,
    meter: _Meter,
    stream: Iterator[Images],
) -> _Compared:
    first_images: list[Images] = []
    missing = NEIGHBOUR_IMAGES

    def observed() -> Iterator[Images]:
        nonlocal missing
        for batch in stream:
            if missing > 0:
                first_images.append(batch[:missing])
                missing -= len(first_images[-1])
            yield batch
            meter.add(len(batch))

    extracted = extract_all(extractor, observed())
    pixels = pixel_neighbours(np.concatenate(first_images), training_images)
    features = nearest_neighbours(extracted.features[:SHOWN_NEIGHBOURS], reference.features, k=2)
    figures = figures_of(extracted, reference, num_splits=num_splits, seed=SEED)
    return _Compared(
        figures=figures | neighbour_figures(pixels),
        nearest=neighbour_table(pixels=pixels, features=features),
    )


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


def _extractor(
    config: Config,
    dataset: str,
    manifest: Manifest,
    train: CachedSplit,
    test: CachedSplit,
    on_progress: Callable[[int, int], None],
) -> tuple[Extractor, dict[str, float]]:
    """The configured extractor, and what is known of its quality as metrics."""
    settings = config.evaluation
    device = "cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu"
    if len(test) < settings.num_splits:
        raise ValueError(
            f"the test split has {len(test)} images, fewer than evaluation.num_splits = {settings.num_splits}; "
            "lower evaluation.num_splits or raise data.test_fraction"
        )
    if settings.extractor == "inception":
        assert settings.weights is not None, "the schema asks for weights"
        return InceptionExtractor(settings.weights, sha256=settings.weights_sha256, device=device), {}
    recipe = ClassifierRecipe(
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_classes=len(manifest.class_names),
        epochs=settings.classifier_epochs,
        seed=SEED,
    )
    stored = obtain_classifier(dataset, recipe, train=train, test=test, device=device, on_progress=on_progress)
    known = not math.isnan(stored.test_accuracy)
    return stored.extractor, {"eval/classifier_test_accuracy": stored.test_accuracy} if known else {}


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


def _gate(distance: Figure, extractor: Extractor, fingerprint: str) -> Measurement:
    return Measurement(
        name=metric_name("fid", extractor=extractor.name, num_images=distance.num_images),
        value=distance.value,
        num_images=distance.num_images,
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
