"""Keep the domain classifier beside the data set that it was trained on, and find it again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from safetensors.torch import load, save

from ncsn import storage
from ncsn.errors import UserError
from ncsn.evaluation.classifier import (
    ClassifierExtractor,
    ClassifierNetwork,
    ClassifierRecipe,
    Labels,
    accuracy,
    identity,
    train_classifier,
)
from ncsn.evaluation.extractors import Identity, Images

WEIGHTS = "weights.safetensors"
DESCRIPTION = "classifier.json"


class LabelledImages(Protocol):
    """One split of a data set."""

    @property
    def images(self) -> Images:
        """[N, H, W, C] uint8; a memory map is fine."""

    @property
    def labels(self) -> Labels:
        """[N] class of each image, -1 for none."""


@dataclass(frozen=True)
class StoredClassifier:
    """A classifier in the store.

    Attributes:
        uri: its folder.
        extractor: ready to use.
        test_accuracy: share of the test split's labelled images that it gets right, in [0, 1].
    """

    uri: str
    extractor: ClassifierExtractor
    test_accuracy: float


@dataclass(frozen=True)
class DescribedClassifier:
    """What is known of a stored classifier without its weights.

    Attributes:
        identity: which extractor it is.
        test_accuracy: as in `StoredClassifier`; None if no test image is labelled.
    """

    identity: Identity
    test_accuracy: float | None


def classifier_uri(dataset_uri: str, recipe: ClassifierRecipe) -> str:
    """Folder of the classifier of a recipe for a data set."""
    return storage.join(dataset_uri, "classifier", recipe.key)


def describe_classifier(uri: str) -> DescribedClassifier | None:
    """What is known of the classifier in the folder `uri`; None if there is none."""
    try:
        description = json.loads(storage.read_text(storage.join(uri, DESCRIPTION)))
    except FileNotFoundError:
        return None
    return DescribedClassifier(
        identity=identity(description["weights_sha256"], image_size=description["recipe"]["image_size"]),
        test_accuracy=description["test_accuracy"],
    )


def obtain_classifier(
    dataset_uri: str,
    recipe: ClassifierRecipe,
    *,
    train: LabelledImages,
    test: LabelledImages,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> StoredClassifier:
    """The classifier of `recipe` for a data set: the stored one, or one trained now and stored.

    Raises:
        UserError: if the data set has no labels, or what is stored is damaged.
    """
    uri = classifier_uri(dataset_uri, recipe)
    if not storage.exists(storage.join(uri, DESCRIPTION)):
        started = time.monotonic()
        network = train_classifier(
            recipe, images=train.images, labels=train.labels, device=device, on_progress=on_progress
        )
        test_accuracy = accuracy(network, images=test.images, labels=test.labels)
        _publish(uri, network, recipe, test_accuracy=test_accuracy, seconds=time.monotonic() - started)
    # Of two writers the first one's stays, so that both must read back what stands.
    return load_classifier(uri, device=device)


def load_classifier(uri: str, *, device: str = "cpu") -> StoredClassifier:
    """Read a stored classifier.

    Raises:
        NotFound: if there is none at `uri`.
        UserError: if its weights are not those that were stored.
    """
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
    network = ClassifierNetwork(image_size=recipe.image_size, channels=recipe.channels, num_classes=recipe.num_classes)
    network.load_state_dict(load(weights))
    extractor = ClassifierExtractor(network.to(device), weights_sha256=digest)
    test_accuracy = description["test_accuracy"]
    return StoredClassifier(
        uri=uri, extractor=extractor, test_accuracy=float("nan") if test_accuracy is None else test_accuracy
    )


def _publish(
    uri: str, network: ClassifierNetwork, recipe: ClassifierRecipe, *, test_accuracy: float, seconds: float
) -> None:
    weights = save({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    description = {
        "recipe": asdict(recipe),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "test_accuracy": None if test_accuracy != test_accuracy else test_accuracy,
        "training_seconds": round(seconds, 2),
    }
    with storage.staged_folder(uri, marker=DESCRIPTION) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
