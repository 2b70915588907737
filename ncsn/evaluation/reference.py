"""The evaluator of a config: its extractor, and the reference images through it, both in the store.

The process that asks need not compute: training the classifier, the features and the reference's moments are left to a
`Runner`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save_file

from ncsn import storage
from ncsn.config import Config
from ncsn.core.images import fit_moments, moment_matched, to_stored, to_unit
from ncsn.core.keyed_random import COMMON_SEED, Stream, keyed_normal
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.training_images import open_cache
from ncsn.errors import UserError
from ncsn.evaluation import DEVIATIONS, LEAST_TEST_IMAGES, WITH_SCORE, evaluation_of, extractor_name
from ncsn.evaluation.extractors import Extracted, batches, joined
from ncsn.evaluation.extractors.classifier import classifier_uri, describe_classifier, ensure_classifier
from ncsn.evaluation.features import Runner, SplitSet, device_of, extract_set, extractor_of, here, recipe_of
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance, merged
from ncsn.evaluation.scores import kernel_distance
from ncsn.progress import Progress
from ncsn.runs.metrics import EXTRACTOR_ACCURACY

GAUSSIAN_IMAGES, MOMENT_IMAGES = 1024, 2000
FOLDER = "reference"  # below that of the dataset
FEATURES = "features.npy"
STATISTICS = "statistics.safetensors"
DESCRIPTION = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The reference images through an extractor."""

    uri: str
    statistics: FrechetStatistics  # of all N feature vectors
    class_histogram: npt.NDArray[np.float64]  # [K], shares of the images by most probable class
    fingerprint: str  # of the extractor, the dataset and the split: what a metric against it depends on
    gaussian: float  # kernel distance of images drawn from the Gaussian of the training pixels

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """[N, D], memory-mapped where the store is local; read when first asked for."""
        uri = storage.join(self.uri, FEATURES)
        return storage.mapped(Path(uri)) if storage.is_local(uri) else storage.read_array(uri)


def load_reference(uri: str) -> Reference | None:
    """The reference in the folder `uri`, or None if there is none."""
    description = storage.find_json(storage.join(uri, DESCRIPTION))
    if description is None:
        return None
    tensors = load(storage.read_bytes(storage.join(uri, STATISTICS)))
    statistics = FrechetStatistics(description["images"], tensors["mean"], tensors["scatter"])
    histogram, fingerprint = tensors["class_histogram"], description["fingerprint"]
    return Reference(uri, statistics, histogram, fingerprint, description["gaussian"])


def publish_reference(uri: str, extracted: Extracted, *, batch_size: int, origin: dict[str, object]) -> None:
    """Store a reference, complete or not at all; the first of two writers wins.

    `extracted` is of the images of the split in stored order; the moments of `batch_size` of them are taken at once.
    `origin` names the extractor and the images, and has the `fingerprint` and the distance `gaussian`.
    """
    with storage.staged_folder(uri, marker=DESCRIPTION) as folder:
        np.save(folder / FEATURES, extracted.features)
        statistics = merged(map(FrechetStatistics.of, batches(extracted.features, batch_size=batch_size)))
        tensors = {"mean": statistics.mean, "scatter": statistics.scatter}
        save_file({**tensors, "class_histogram": class_histogram(extracted.log_probabilities)}, folder / STATISTICS)
        (folder / DESCRIPTION).write_text(json.dumps({**origin, "images": statistics.count}, indent=1))


def class_histogram(log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[K] shares of the images by most probable class, from [N, K] log probabilities."""
    counts = np.bincount(log_probabilities.argmax(axis=1), minlength=log_probabilities.shape[1])
    return counts / len(log_probabilities)


@dataclass(frozen=True)
class Evaluator:
    """The extractor of an experiment, and the reference images through it."""

    name: str  # of the extractor as metrics have it, with the split of the reference unless that is train
    extractor: str  # `classifier`, `clusters`, `inception` or `dinov2`
    reference: Reference
    facts: dict[str, float]  # the quality of the extractor, as metrics

    def distance(self, features: npt.NDArray[np.floating]) -> float:
        """Fréchet distance of features [N, D] to the reference."""
        return frechet_distance(FrechetStatistics.of(features), self.reference.statistics)


def open_evaluator(
    config: Config, dataset: str, *, runner: Runner = here, progress: Progress | None = None
) -> Evaluator:
    """The evaluator of `config.evaluation` for an ingested dataset; `runner` makes what the store lacks.

    `progress` advances by `images_to_prepare`. `UserError` for fewer test images than the evaluation needs.
    """
    progress = progress or Progress()
    manifest, before, settings = load_manifest(dataset), progress.done, config.evaluation
    count, splits = manifest.count("test"), settings.num_splits
    if (extractor := evaluation_of(config, manifest).extractor) in WITH_SCORE:
        if count < splits:
            reason, hint = f"the test split has only {count:,} images", "lower it or raise data.test_fraction"
            raise UserError("evaluation.num_splits", reason, hint=hint, value=splits)
    elif count < LEAST_TEST_IMAGES:  # no score, and so no splits
        reason = f"leaves {count} test images, and the evaluation needs {LEAST_TEST_IMAGES}"
        raise UserError("data.test_fraction", reason, hint="raise it", value=config.data.test_fraction)
    if settings.pretrained is None:
        uri = classifier_uri(dataset, recipe_of(config, manifest))
        if (found := describe_classifier(uri)) is None:
            list(runner(_train_classifier, [(config, dataset, progress)], gpu=True))
            found = describe_classifier(uri)
            assert found is not None, "its description is in the store"
        digest, accuracy = found
    else:
        from ncsn.evaluation.extractors import published

        digest, accuracy = published.fingerprint(settings.pretrained), None
    split = settings.reference_split
    compared = {"extractor": digest, "dataset": manifest.digest, "split": split}
    fingerprint = storage.digest({**compared, "gaussian": GAUSSIAN_IMAGES}, 64)
    uri = storage.join(dataset, FOLDER, fingerprint[:16])
    reference = load_reference(uri)
    if reference is None:
        images = SplitSet(dataset, split, manifest.count(split))
        extracted = extract_set(config, dataset, images, runner=runner, progress=progress)
        ((_, noise),) = runner(_gaussian_features, [(config, dataset)], gpu=True)
        distance, error = kernel_distance(noise, extracted.features)
        scale = max(distance, DEVIATIONS * error, 1e-9)  # of images that are noise themselves, its error
        origin = {"fingerprint": fingerprint, **compared, "extractor": extractor, "gaussian": scale}
        publish_reference(uri, extracted, batch_size=settings.batch_size, origin=origin)
        reference = load_reference(uri)
        assert reference is not None, "it was made now, or by another process"
    # What the store had, and what another process has trained with its own copy of the progress.
    progress.advance(before + images_to_prepare(config, manifest) - progress.done)
    facts = {} if accuracy is None else {EXTRACTOR_ACCURACY: accuracy}
    return Evaluator(extractor_name(config, manifest), extractor, reference, facts)


def images_to_prepare(config: Config, manifest: Manifest) -> int:
    """Images that are processed to train the extractor, if it is trained, and to make the reference."""
    settings = config.evaluation
    trained = 0 if settings.pretrained else settings.classifier_epochs * manifest.count("train")
    return trained + manifest.count(settings.reference_split) + GAUSSIAN_IMAGES


def _gaussian_features(work: tuple[Config, str]) -> npt.NDArray[np.floating]:
    """Features of draws from the normal distribution with the mean and covariance of the training pixels."""
    config, dataset = work
    images = np.array(open_cache(dataset, "train", as_bytes=True).images[:MOMENT_IMAGES])
    moments, count = fit_moments(to_unit(torch.from_numpy(images))), GAUSSIAN_IMAGES
    z = keyed_normal(COMMON_SEED, stream=Stream.GAUSSIAN, first=0, count=count, size=images[0].size)
    drawn = to_stored(moment_matched(moments, sigma=0.0, z=z.view(-1, *moments.mean.shape))).numpy()
    parts = batches(drawn, batch_size=config.evaluation.batch_size)
    return joined([extractor_of(config, dataset).extract(part) for part in parts]).features


def _train_classifier(work: tuple[Config, str, Progress]) -> None:
    config, dataset, progress = work
    ensure_classifier(
        dataset,
        recipe_of(config, load_manifest(dataset)),
        train=open_cache(dataset, "train", as_bytes=True),
        test=open_cache(dataset, "test", as_bytes=True),
        device=device_of(config),
        progress=progress,
    )
