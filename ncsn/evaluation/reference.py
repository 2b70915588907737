"""The evaluator of a config: its extractor, and the reference images through it, both in the store.

The process that asks need not compute: training the classifier, the features and the reference's moments are left to a
`Runner`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save_file

from ncsn import storage
from ncsn.config import Config, from_json, to_json
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.training_images import open_cache
from ncsn.evaluation.choice import evaluation_of, named_in_metrics, pretrained_identity, require_test_images
from ncsn.evaluation.extractors import classifier_store, dinov2, inception
from ncsn.evaluation.extractors.base import Extracted, Extractor, Identity, fingerprint_of
from ncsn.evaluation.extractors.classifier import ClassifierRecipe
from ncsn.evaluation.extractors.clusters import num_clusters
from ncsn.evaluation.frechet import FrechetStatistics, frechet_distance
from ncsn.evaluation.pieces import FeaturePiece, SplitSet, extract_piece, feature_pieces, missing_pieces
from ncsn.evaluation.runner import Here, Runner
from ncsn.process import keep_freed_memory

FOLDER = "reference"  # below that of the dataset
FEATURES = "features.npy"
STATISTICS = "statistics.safetensors"
DESCRIPTION = "reference.json"
SEED = 0  # of the classifier and of what is drawn: one for all experiments on a dataset, so that they compare

Progress = Callable[[int, int], None]

_HERE = Here()


def _silent(_done: int, _total: int) -> None: ...


@dataclass(frozen=True)
class Reference:
    """The reference images through an extractor."""

    uri: str
    statistics: FrechetStatistics  # of all N feature vectors
    class_histogram: npt.NDArray[np.float64]  # [K], shares of the images by most probable class
    fingerprint: str  # of the extractor, the dataset and the split: what a metric against it depends on

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
    uri = _reference_uri(dataset_uri, fingerprint)
    description = storage.find_json(storage.join(uri, DESCRIPTION))
    if description is None:
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
    extracted: Iterable[Extracted],
    *,
    shape: tuple[int, int],
    batch_size: int,
    origin: dict[str, str],
) -> None:
    """Store a reference, complete or not at all.

    Args:
        extracted: Features of the images of the split in stored order, in pieces of whole batches.
        shape: (N, D).
        batch_size: Images whose moments are taken at once.
        origin: The extractor and the images, for the description.
    """
    with storage.staged_folder(_reference_uri(dataset_uri, fingerprint), marker=DESCRIPTION) as folder:
        features = np.lib.format.open_memmap(folder / FEATURES, mode="w+", dtype=np.float32, shape=shape)
        histogram: npt.NDArray[np.float64] | float = 0.0
        statistics: FrechetStatistics | None = None
        done = 0
        for piece in extracted:
            for first in range(0, len(piece.features), batch_size):
                batch = piece.features[first : first + batch_size]
                features[done : done + len(batch)] = batch
                part = FrechetStatistics.of(batch)
                statistics = part if statistics is None else statistics.merge(part)
                shares = class_histogram(piece.log_probabilities[first : first + len(batch)])
                histogram = histogram + shares * len(batch)
                done += len(batch)
        assert statistics is not None, "the split has images"
        features.flush()
        moments = {"mean": statistics.mean, "scatter": statistics.scatter}
        save_file({**moments, "class_histogram": np.asarray(histogram) / done}, folder / STATISTICS)
        description = {"fingerprint": fingerprint, **origin, "images": shape[0]}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def class_histogram(log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[K] shares of the images by most probable class, from [N, K] log probabilities."""
    counts = np.bincount(log_probabilities.argmax(axis=1), minlength=log_probabilities.shape[1])
    return counts / len(log_probabilities)


def _reference_uri(dataset_uri: str, fingerprint: str) -> str:
    return storage.join(dataset_uri, FOLDER, fingerprint[:16])


@dataclass(frozen=True)
class Evaluator:
    """The extractor of an experiment, and the reference images through it."""

    name: str  # of the extractor as metrics have it, with the split of the reference unless that is train
    extractor: Identity
    reference: Reference
    facts: dict[str, float]  # the quality of the extractor, as metrics

    def distance(self, features: npt.NDArray[np.floating]) -> float:
        """Fréchet distance of features [N, D] to the reference."""
        return frechet_distance(FrechetStatistics.of(features), self.reference.statistics)


def open_evaluator(
    config: Config, dataset: str, *, runner: Runner = _HERE, on_progress: Progress = _silent
) -> Evaluator:
    """The evaluator of `config.evaluation` for an ingested dataset; `runner` makes what the store lacks.

    `on_progress` is called with (images done, `images_to_prepare`), and pickled for the runner.
    """
    manifest = load_manifest(dataset)
    require_test_images(config, manifest)
    found = _identify(config, dataset, manifest)
    if found is None:
        runner.one(_train_classifier, config, dataset, on_progress, gpu=True)
        found = _identify(config, dataset, manifest)
        assert found is not None, "its description is in the store"
    identity, facts = found
    split = config.evaluation.reference_split
    fingerprint = fingerprint_of(extractor=identity.fingerprint, dataset=manifest.digest, split=split)
    reference = load_reference(dataset, fingerprint)
    if reference is None:
        _make_reference(config, dataset, identity, fingerprint, runner=runner, on_progress=on_progress)
        reference = load_reference(dataset, fingerprint)
        assert reference is not None, "it was made now, or by another process"
    return Evaluator(named_in_metrics(identity.name, config), identity, reference, facts)


def images_to_prepare(config: Config, manifest: Manifest) -> int:
    """Images that are processed to train the extractor, if it is trained, and to make the reference."""
    return _images_of_training(config, manifest) + manifest.count(config.evaluation.reference_split)


def extractor_of(config: Config, dataset: str) -> Extractor:
    """The configured extractor, loaded in this process and kept for the next call."""
    return _extractor(to_json(config), dataset)


def device_of(config: Config) -> str:
    """`cuda` if the config uses GPUs and this process has one, else `cpu`."""
    return "cuda" if config.compute.use_gpu and torch.cuda.is_available() else "cpu"


def recipe_of(config: Config, manifest: Manifest) -> ClassifierRecipe:
    """The classifier of the config for a dataset, by its labels or by clusters."""
    clustered = evaluation_of(config, manifest).extractor == "clusters"
    return ClassifierRecipe(
        image_size=manifest.image_size,
        channels=manifest.channels,
        num_classes=num_clusters(manifest.count("train")) if clustered else len(manifest.class_names),
        epochs=config.evaluation.classifier_epochs,
        seed=SEED,
        clustered=clustered,
    )


def store_piece(piece: FeaturePiece) -> None:
    """Put the features of a piece into the store."""
    extract_piece(piece, partial(extractor_of, piece.config, piece.dataset))


def store_pieces(pieces: list[FeaturePiece], *, runner: Runner, on_images: Callable[[int], None]) -> None:
    """Put the features of all pieces into the store; `on_images(n)` after n more images."""
    missing = missing_pieces(pieces)
    on_images(sum(map(len, pieces)) - sum(map(len, missing)))
    for piece, _ in runner.each(store_piece, missing, gpu=True):
        on_images(len(piece))


@lru_cache(maxsize=1)
def _extractor(config_json: str, dataset: str) -> Extractor:
    keep_freed_memory()
    config = from_json(config_json)
    settings = config.evaluation
    if settings.pretrained is not None:
        assert settings.weights is not None, "the schema asks for weights"
        kinds: dict[str, Callable[..., Extractor]] = {
            "inception": inception.InceptionExtractor,
            "dinov2": dinov2.Dinov2Extractor,
        }
        return kinds[settings.pretrained](settings.weights, sha256=settings.weights_sha256, device=device_of(config))
    uri = classifier_store.classifier_uri(dataset, recipe_of(config, load_manifest(dataset)))
    return classifier_store.load_classifier(uri, device=device_of(config))


def _images_of_training(config: Config, manifest: Manifest) -> int:
    settings = config.evaluation
    return 0 if settings.pretrained else settings.classifier_epochs * manifest.count("train")


def _identify(config: Config, dataset: str, manifest: Manifest) -> tuple[Identity, dict[str, float]] | None:
    """Which extractor it is, and its quality as metrics; None for a classifier that is not trained yet."""
    known = pretrained_identity(config.evaluation)
    if known is not None:
        return known, {}
    stored = classifier_store.describe_classifier(classifier_store.classifier_uri(dataset, recipe_of(config, manifest)))
    if stored is None:
        return None
    accuracy = stored.test_accuracy
    return stored.identity, {} if accuracy is None else {"eval/classifier_test_accuracy": accuracy}


def _train_classifier(config: Config, dataset: str, on_progress: Progress) -> None:
    keep_freed_memory()
    manifest = load_manifest(dataset)
    share, whole = _images_of_training(config, manifest), images_to_prepare(config, manifest)
    classifier_store.ensure_classifier(
        dataset,
        recipe_of(config, manifest),
        train=open_cache(dataset, "train"),
        test=open_cache(dataset, "test"),
        device=device_of(config),
        on_progress=lambda done, total: on_progress(share * done // total, whole),
    )


def _make_reference(
    config: Config,
    dataset: str,
    extractor: Identity,
    fingerprint: str,
    *,
    runner: Runner,
    on_progress: Progress,
) -> None:
    manifest = load_manifest(dataset)
    before, whole = _images_of_training(config, manifest), images_to_prepare(config, manifest)
    split = config.evaluation.reference_split
    images = SplitSet(dataset, split, manifest.count(split))
    near = storage.join(dataset, FOLDER)
    pieces = feature_pieces(config, dataset, images, near=near, fingerprint=extractor.fingerprint)
    missing = missing_pieces(pieces)
    done = images.count - sum(map(len, missing))
    for piece, _ in runner.each(store_piece, missing, gpu=True):
        done += len(piece)
        on_progress(before + done, whole)
    if load_reference(dataset, fingerprint) is None:  # else another run on this dataset was faster
        runner.one(_merge, pieces, extractor, fingerprint, gpu=False)
    storage.delete_folder(pieces[0].folder)


def _merge(pieces: list[FeaturePiece], extractor: Identity, fingerprint: str) -> None:
    first = pieces[0]
    manifest, split = load_manifest(first.dataset), first.config.evaluation.reference_split
    publish_reference(
        first.dataset,
        fingerprint,
        (extract_piece(piece, partial(extractor_of, piece.config, piece.dataset)) for piece in pieces),
        shape=(first.images.count, extractor.num_features),
        batch_size=first.config.evaluation.batch_size,
        origin={"extractor": extractor.name, "dataset": manifest.digest, "split": split},
    )
