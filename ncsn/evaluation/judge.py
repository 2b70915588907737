"""What a config measures images with: its extractor, and the training images through it.

Whoever asks need not compute: the classifier's training, the features and the reference's moments are left to a
`Runner`, and what they give is in the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from ncsn import storage
from ncsn.config import Config, from_json, to_json
from ncsn.data.format import Manifest, load_manifest
from ncsn.data.training_images import open_cache
from ncsn.errors import UserError
from ncsn.evaluation import classifier_store, inception
from ncsn.evaluation.classifier import ClassifierRecipe
from ncsn.evaluation.extractors import Extractor, Identity, fingerprint_of
from ncsn.evaluation.feature_pieces import FeaturePiece, feature_pieces, look, missing_pieces
from ncsn.evaluation.image_sets import SplitSet
from ncsn.evaluation.reference import FOLDER, Reference, load_reference, publish_reference
from ncsn.evaluation.runner import Here, Runner
from ncsn.process import keep_freed_memory

REFERENCE_SPLIT = "train"
SEED = 0
"""Of the classifier and of what is drawn: the same for all experiments on a data set, so that they compare."""

_HERE = Here()


@dataclass(frozen=True)
class Judge:
    """The extractor of an experiment and the training images through it, both in the store.

    Attributes:
        extractor: Which extractor it is.
        reference: What it sees in the training images.
        facts: What is known of the extractor's quality, as metrics.
    """

    extractor: Identity
    reference: Reference
    facts: dict[str, float]


def obtain_judge(
    config: Config,
    dataset: str,
    *,
    runner: Runner = _HERE,
    on_training: Callable[[int, int], None] | None = None,
    on_reference: Callable[[int, int], None] | None = None,
) -> Judge:
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
    return Judge(extractor=identity, reference=reference, facts=facts)


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
        return inception.InceptionExtractor(settings.weights, sha256=settings.weights_sha256, device=device)
    uri = classifier_store.classifier_uri(dataset, _recipe(config, load_manifest(dataset)))
    return classifier_store.load_classifier(uri, device=device).extractor


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
        return inception.identity(config.evaluation.weights_sha256), {}
    recipe = _recipe(config, manifest)
    described = classifier_store.describe_classifier(classifier_store.classifier_uri(dataset, recipe))
    if described is None:
        return None
    accuracy = described.test_accuracy
    return described.identity, {} if accuracy is None else {"eval/classifier_test_accuracy": accuracy}


def _train_classifier(config: Config, dataset: str, on_progress: Callable[[int, int], None] | None) -> None:
    keep_freed_memory()
    classifier_store.obtain_classifier(
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
