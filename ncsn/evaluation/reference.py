"""What a config measures images with: its extractor, and the reference images through it.

Whoever asks need not compute: the classifier's training, the features and the reference's moments are left to a
`Runner`, and what they give is in the store.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save_file

from ncsn import storage
from ncsn.config import Config, from_json, to_json
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.training_images import open_cache
from ncsn.errors import UserError
from ncsn.evaluation import classifier, extractors
from ncsn.evaluation.classifier import ClassifierRecipe
from ncsn.evaluation.extractors import Extracted, Extractor, Identity, fingerprint_of
from ncsn.evaluation.frechet import FrechetStatistics
from ncsn.evaluation.pieces import FeaturePiece, Here, Runner, SplitSet, feature_pieces, look, missing_pieces
from ncsn.process import keep_freed_memory

FOLDER = "reference"
"""Below that of the data set."""
FEATURES = "features.npy"
STATISTICS = "statistics.safetensors"
DESCRIPTION = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The reference images through an extractor.

    Attributes:
        uri: Folder of the reference.
        statistics: moments of all N feature vectors.
        class_histogram: [K] shares of the images by most probable class.
        fingerprint: hash of the extractor, the data set and the split: what a figure against it depends on.
    """

    uri: str
    statistics: FrechetStatistics
    class_histogram: npt.NDArray[np.float64]
    fingerprint: str

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """[N, D], memory-mapped where the store is local; read when first asked for."""
        uri = storage.join(self.uri, FEATURES)
        if storage.is_local(uri):
            mapped: npt.NDArray[np.float32] = np.load(uri, mmap_mode="r", allow_pickle=False)
            return mapped
        return np.asarray(np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False))


def load_reference(dataset_uri: str, fingerprint: str) -> Reference | None:
    """The stored reference with this fingerprint, or None if there is none."""
    uri = _uri(dataset_uri, fingerprint)
    try:
        description = json.loads(storage.read_text(storage.join(uri, DESCRIPTION)))
    except FileNotFoundError:
        return None
    tensors = load(storage.read_bytes(storage.join(uri, STATISTICS)))
    return Reference(
        uri=uri,
        statistics=FrechetStatistics(count=description["images"], mean=tensors["mean"], scatter=tensors["scatter"]),
        class_histogram=tensors["class_histogram"],
        fingerprint=fingerprint,
    )


def publish_reference(
    dataset_uri: str,
    fingerprint: str,
    seen: Iterable[Extracted],
    *,
    shape: tuple[int, int],
    batch_size: int,
    origin: dict[str, str],
) -> None:
    """Store a reference, complete or not at all.

    Args:
        dataset_uri: folder of the data set; the reference lies below it.
        fingerprint: hash of what it depends on.
        seen: what the extractor sees in the images of the split in stored order, in pieces of whole batches.
        shape: (N, D).
        batch_size: images whose moments are taken at once.
        origin: what the extractor and the images are, for the description.

    Raises:
        ValueError: if there are no images, or features are not finite.
    """
    with storage.staged_folder(_uri(dataset_uri, fingerprint), marker=DESCRIPTION) as folder:
        _write(folder, seen, shape=shape, batch_size=batch_size)
        description = {"fingerprint": fingerprint, **origin, "images": shape[0]}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def class_histogram(log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[K] shares of the images by most probable class, from [N, K] log probabilities."""
    counts = np.bincount(log_probabilities.argmax(axis=1), minlength=log_probabilities.shape[1])
    return counts / len(log_probabilities)


def _uri(dataset_uri: str, fingerprint: str) -> str:
    return storage.join(dataset_uri, FOLDER, fingerprint[:16])


def _write(folder: Path, seen: Iterable[Extracted], *, shape: tuple[int, int], batch_size: int) -> None:
    features = np.lib.format.open_memmap(folder / FEATURES, mode="w+", dtype=np.float32, shape=shape)
    histogram: npt.NDArray[np.float64] | float = 0.0
    statistics: FrechetStatistics | None = None
    done = 0
    for piece in seen:
        for first in range(0, len(piece.features), batch_size):
            batch = piece.features[first : first + batch_size]
            features[done : done + len(batch)] = batch
            part = FrechetStatistics.of(batch)
            statistics = part if statistics is None else statistics.merge(part)
            histogram = histogram + class_histogram(piece.log_probabilities[first : first + len(batch)]) * len(batch)
            done += len(batch)
    if statistics is None:
        raise ValueError("the reference split has no images")
    features.flush()
    tensors = {"mean": statistics.mean, "scatter": statistics.scatter, "class_histogram": np.asarray(histogram) / done}
    save_file(tensors, folder / STATISTICS)


REFERENCE_SPLIT = "train"
SEED = 0
"""Of the classifier and of what is drawn: the same for all experiments on a data set, so that they compare."""

_HERE = Here()


@dataclass(frozen=True)
class Evaluator:
    """The extractor of an experiment and the training images through it, both in the store.

    Attributes:
        extractor: Which extractor it is.
        reference: What it sees in the training images.
        facts: What is known of the extractor's quality, as metrics.
    """

    extractor: Identity
    reference: Reference
    facts: dict[str, float]


def open_evaluator(
    config: Config,
    dataset: str,
    *,
    runner: Runner = _HERE,
    on_training: Callable[[int, int], None] | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Evaluator:
    """Find the extractor and the reference in the store, or have them made now.

    Args:
        config: The experiment; its evaluation section decides.
        dataset: URI of the ingested data set.
        runner: Makes what is missing.
        on_training: Called with (images done, images in all) while a classifier is trained; pickled for the runner.
        on_reference: The same while the training images are looked at; called here.

    Raises:
        UserError: if the data set has too few test images or no labels, or weights are not those that were asked for.
    """
    manifest = load_manifest(dataset)
    _require_test_images(config, manifest)
    found = _identify(config, dataset, manifest)
    if found is None:
        runner.one(_train_classifier, config, dataset, on_training, gpu=True)
        found = _identify(config, dataset, manifest)
        assert found is not None, "its description is in the store"
    identity, facts = found
    fingerprint = fingerprint_of(extractor=identity.fingerprint, dataset=manifest.digest, split=REFERENCE_SPLIT)
    reference = load_reference(dataset, fingerprint)
    if reference is None:
        _make_reference(config, dataset, identity, fingerprint, runner=runner, on_progress=on_reference)
        reference = load_reference(dataset, fingerprint)
        assert reference is not None, "it was made now, or by another process"
    return Evaluator(extractor=identity, reference=reference, facts=facts)


def extractor_of(config: Config, dataset: str) -> Extractor:
    """The configured extractor, ready to compute in this process, which keeps it for the next call.

    Raises:
        NotFound: if it is a classifier that is not trained yet.
        UserError: if the weights are not those that were asked for.
    """
    return _extractor(to_json(config), dataset)


def look_at(piece: FeaturePiece) -> None:
    """Put what is seen in a piece into the store."""
    look(piece, partial(extractor_of, piece.config, piece.dataset))


@lru_cache(maxsize=1)
def _extractor(config_json: str, dataset: str) -> Extractor:
    keep_freed_memory()
    config = from_json(config_json)
    settings, device = config.evaluation, _device(config)
    if settings.extractor == "inception":
        assert settings.weights is not None, "the schema asks for weights"
        return extractors.InceptionExtractor(settings.weights, sha256=settings.weights_sha256, device=device)
    uri = classifier.classifier_uri(dataset, _recipe(config, load_manifest(dataset)))
    return classifier.load_classifier(uri, device=device).extractor


def _device(config: Config) -> str:
    return "cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu"


def _recipe(config: Config, manifest: Manifest) -> ClassifierRecipe:
    return ClassifierRecipe(
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_classes=len(manifest.class_names),
        epochs=config.evaluation.classifier_epochs,
        seed=SEED,
    )


def _require_test_images(config: Config, manifest: Manifest) -> None:
    count, splits = manifest.count("test"), config.evaluation.num_splits
    if count < splits:
        raise UserError(
            "evaluation.num_splits",
            f"the test split has {count} images only",
            hint="lower it or raise data.test_fraction",
            value=splits,
        )


def _identify(config: Config, dataset: str, manifest: Manifest) -> tuple[Identity, dict[str, float]] | None:
    """Which extractor it is and what is known of its quality, as metrics; None for a classifier to be trained."""
    if config.evaluation.extractor == "inception":
        return extractors.identity(config.evaluation.weights_sha256), {}
    recipe = _recipe(config, manifest)
    described = classifier.describe_classifier(classifier.classifier_uri(dataset, recipe))
    if described is None:
        return None
    accuracy = described.test_accuracy
    return described.identity, {} if accuracy is None else {"eval/classifier_test_accuracy": accuracy}


def _train_classifier(config: Config, dataset: str, on_progress: Callable[[int, int], None] | None) -> None:
    keep_freed_memory()
    classifier.obtain_classifier(
        dataset,
        _recipe(config, load_manifest(dataset)),
        train=open_cache(dataset, "train"),
        test=open_cache(dataset, "test"),
        device=_device(config),
        on_progress=on_progress,
    )


def _make_reference(
    config: Config,
    dataset: str,
    extractor: Identity,
    fingerprint: str,
    *,
    runner: Runner,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    images = SplitSet(dataset, REFERENCE_SPLIT, load_manifest(dataset).count(REFERENCE_SPLIT))
    near = storage.join(dataset, FOLDER)
    pieces = feature_pieces(config, dataset, images, near=near, fingerprint=extractor.fingerprint)
    missing = missing_pieces(pieces)
    done = images.count - sum(map(len, missing))
    for piece, _ in runner.each(look_at, missing, gpu=True):
        done += len(piece)
        if on_progress is not None:
            on_progress(done, images.count)
    if load_reference(dataset, fingerprint) is None:  # else another run on this data set was faster
        runner.one(_merge, pieces, extractor, fingerprint, gpu=False)
    storage.delete_folder(pieces[0].folder)


def _merge(pieces: list[FeaturePiece], extractor: Identity, fingerprint: str) -> None:
    first = pieces[0]
    manifest = load_manifest(first.dataset)
    publish_reference(
        first.dataset,
        fingerprint,
        (look(piece, partial(extractor_of, piece.config, piece.dataset)) for piece in pieces),
        shape=(first.images.count, extractor.num_features),
        batch_size=first.config.evaluation.batch_size,
        origin={"extractor": extractor.name, "dataset": manifest.digest, "split": REFERENCE_SPLIT},
    )
