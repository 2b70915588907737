"""Trained classifiers in the store, next to their dataset."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import load, save

from ncsn import storage
from ncsn.data.format import Rows
from ncsn.data.training_images import CachedSplit
from ncsn.errors import UserError
from ncsn.evaluation.extractors.base import Identity
from ncsn.evaluation.extractors.classifier import (
    ClassifierExtractor,
    ClassifierNetwork,
    ClassifierRecipe,
    accuracy,
    identity,
    train_classifier,
)
from ncsn.evaluation.extractors.clusters import cluster_labels
from ncsn.progress import Progress

LabeledImages = CachedSplit | Rows

WEIGHTS = "weights.safetensors"
DESCRIPTION = "classifier.json"


@dataclass(frozen=True)
class StoredClassifier:
    """A classifier in the store, without its weights."""

    identity: Identity
    test_accuracy: float | None  # share of the labeled test images, in [0, 1]; None if there is none, or for clusters


def classifier_uri(dataset_uri: str, recipe: ClassifierRecipe) -> str:
    """Folder of the classifier of a recipe for a dataset."""
    return storage.join(dataset_uri, "classifier", recipe.key)


def describe_classifier(uri: str) -> StoredClassifier | None:
    """The classifier in the folder `uri`; None if there is none."""
    description = storage.find_json(storage.join(uri, DESCRIPTION))
    if description is None:
        return None
    recipe = ClassifierRecipe(**description["recipe"])
    return StoredClassifier(
        identity=identity(recipe, weights_sha256=description["weights_sha256"]),
        test_accuracy=description["test_accuracy"],
    )


def ensure_classifier(
    dataset_uri: str,
    recipe: ClassifierRecipe,
    *,
    train: LabeledImages,
    test: LabeledImages,
    device: str = "cpu",
    progress: Progress | None = None,
) -> str:
    """Train and store the classifier of `recipe` for a dataset unless it is stored already; its folder's URI."""
    uri = classifier_uri(dataset_uri, recipe)
    if storage.exists(storage.join(uri, DESCRIPTION)):
        return uri
    started = time.monotonic()
    labels = train.labels
    if recipe.clustered:
        labels = cluster_labels(train.images, count=recipe.num_classes, seed=recipe.seed)
    network = train_classifier(recipe, images=train.images, labels=labels, device=device, progress=progress)
    test_accuracy = math.nan if recipe.clustered else accuracy(network, images=test.images, labels=test.labels)
    weights = save({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    description = {
        "recipe": asdict(recipe),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "test_accuracy": None if math.isnan(test_accuracy) else test_accuracy,
        "training_seconds": round(time.monotonic() - started, 2),
    }
    # The first of two writers wins.
    with storage.staged_folder(uri, marker=DESCRIPTION) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return uri


def load_classifier(uri: str, *, device: str = "cpu") -> ClassifierExtractor:
    """The extractor of a stored classifier."""
    description: dict[str, Any] = storage.read_json(storage.join(uri, DESCRIPTION))
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    digest = hashlib.sha256(weights).hexdigest()
    if digest != description["weights_sha256"]:
        raise UserError(
            f"{uri}/{WEIGHTS}",
            f"is damaged: its SHA-256 is {digest[:12]}, expected {description['weights_sha256'][:12]}",
            hint="delete the folder to train the classifier again",
        )
    recipe = ClassifierRecipe(**description["recipe"])
    network = ClassifierNetwork(recipe)
    network.load_state_dict(load(weights))
    return ClassifierExtractor(network.to(device))
