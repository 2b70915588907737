"""The domain classifier: a small convolutional network trained on the ingested images themselves.

Its softmax gives the classifier score and its last hidden layer the features of the classifier's Fréchet distance.
Neither compares with values from the 2015 Inception graph. Images without labels take clusters for classes: then only
the features count. Trained classifiers are in the store, next to their dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn

from ncsn import storage
from ncsn.data.format import Rows
from ncsn.data.training_images import CachedSplit
from ncsn.errors import InvalidValue, UserError
from ncsn.evaluation.extractors.base import (
    Extracted,
    Identity,
    Images,
    batches,
    fingerprint_of,
    full_float32,
    require_images,
)
from ncsn.evaluation.extractors.clusters import cluster_labels
from ncsn.progress import Progress

Labels = npt.NDArray[np.int64]
LabeledImages = CachedSplit | Rows

WEIGHTS = "weights.safetensors"
DESCRIPTION = "classifier.json"

RECIPE_VERSION = 1
NUM_FEATURES = 128
LARGEST_SIDE = 32
SMALL_SET = 10_000
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
DROPOUT = 0.25
_BATCH_VALUES = 1 << 24  # pixel values whose statistics are taken at once


@dataclass(frozen=True)
class ClassifierRecipe:
    """What decides the classifier, given its training images."""

    image_size: int  # pixels, at least 4
    channels: int  # 1 or 3
    num_classes: int  # at least 2
    epochs: int
    seed: int  # of weights, order, dropout and clusters
    clustered: bool = False  # whether the classes are clusters instead of labels

    @property
    def key(self) -> str:
        """Folder name of this recipe's classifier, 16 hex digits."""
        return fingerprint_of(version=RECIPE_VERSION, **asdict(self))[:16]

    @property
    def name(self) -> str:
        """The extractor's name."""
        return "clusters" if self.clustered else "classifier"


class ClassifierNetwork(nn.Module):
    """conv32 - conv64 - maxpool - fc128 - fc K on pixels normalized by the training images' mean and deviation.

    Images larger than 32 pixels are first averaged down by a whole factor.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, recipe: ClassifierRecipe) -> None:
        super().__init__()
        image_size, channels = recipe.image_size, recipe.channels
        self.image_size, self.channels = image_size, channels
        self.reduction = _reduction(image_size)
        side = image_size // self.reduction
        kernel, stride = (5, 2) if side >= 16 else (3, 1)  # stride 2 makes the network four times cheaper
        pooled = ((side - 1) // stride + 1) // 2
        self.register_buffer("pixel_mean", torch.zeros(channels))
        self.register_buffer("pixel_std", torch.ones(channels))
        self.conv_1 = nn.Conv2d(channels, 32, kernel, stride=stride, padding=kernel // 2)
        self.norm_1 = nn.BatchNorm2d(32)
        self.conv_2 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm_2 = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64 * pooled * pooled, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, recipe.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """[B, 128] of [B, C, H, W] pixels in [0, 255]."""
        x = (images - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        if self.reduction > 1:
            x = F.avg_pool2d(x, self.reduction)
        x = F.relu(self.norm_1(self.conv_1(x)))
        x = F.max_pool2d(F.relu(self.norm_2(self.conv_2(x))), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def logits(self, features: Tensor) -> Tensor:
        """[B, K] of [B, 128] features."""
        logits: Tensor = self.head(F.dropout(features, DROPOUT, self.training))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """[B, K] logits of [B, C, H, W] pixels in [0, 255]."""
        return self.logits(self.features(images))


def identity(recipe: ClassifierRecipe, *, weights_sha256: str) -> Identity:
    """The extractor of the recipe with these weights."""
    return Identity(
        name=recipe.name,
        fingerprint=fingerprint_of(
            kind=recipe.name,
            version=RECIPE_VERSION,
            weights=weights_sha256,
            reduction=_reduction(recipe.image_size),
        ),
        num_features=NUM_FEATURES,
        knows_classes=not recipe.clustered,
    )


class ClassifierExtractor:
    """The classifier as an `Extractor`."""

    def __init__(self, network: ClassifierNetwork) -> None:
        self.network = network.eval()

    def extract(self, images: Images) -> Extracted:
        """Features [N, 128] and log probabilities [N, K] of uint8 [N, H, W, C] images."""
        size = self.network.image_size
        require_images(images, height=size, width=size, channels=self.network.channels)
        with torch.inference_mode(), full_float32():
            features = self.network.features(_to_network(images, self.network.pixel_mean.device))
            log_probabilities = F.log_softmax(self.network.logits(features).double(), dim=1)
        return Extracted(features=features.float().cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())


def train_classifier(
    recipe: ClassifierRecipe,
    *,
    images: Images,
    labels: Labels,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ClassifierNetwork:
    """Train by cross-entropy with AdamW and a one-cycle learning rate; deterministic for a seed and a thread count.

    Args:
        images: [N, H, W, C] uint8; a memory map is fine.
        labels: [N] class of each image; images of label -1 (no label) are left out.
        progress: Advances by the images of each step.
    """
    require_images(images, height=recipe.image_size, width=recipe.image_size, channels=recipe.channels)
    labeled = _labeled(labels, num_classes=recipe.num_classes)
    # Small sets need small batches to take enough steps in a few passes.
    batch_size = 32 if len(labeled) < SMALL_SET else 128
    steps = recipe.epochs * -(-len(labeled) // batch_size)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    # Dropout and initialization use the global generators.
    with torch.random.fork_rng(devices), _threads(small=len(labeled) < SMALL_SET):
        torch.manual_seed(recipe.seed)
        network = ClassifierNetwork(recipe)
        _set_pixel_statistics(network, images)
        network.to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        # Of exactly 5, a fifth would be a rise of one step, and torch divides by its length less one.
        rise = 0.2 if steps != 4 else 0.3
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=rise)
        for _ in range(recipe.epochs):
            order = labeled[torch.randperm(len(labeled)).numpy()]
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                target = torch.from_numpy(labels[chosen]).to(device)
                loss = F.cross_entropy(network(_to_network(images[chosen], device)), target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress.advance(len(chosen))
    return network.eval()


def accuracy(network: ClassifierNetwork, *, images: Images, labels: Labels, batch_size: int = 500) -> float:
    """Share of the labeled images that get their label, in [0, 1]; NaN if none has a label."""
    right = total = 0
    network.eval()
    with torch.inference_mode():
        for first, batch in enumerate(batches(images, batch_size=batch_size)):
            target = labels[first * batch_size : first * batch_size + len(batch)]
            predicted = network(_to_network(batch, network.pixel_mean.device)).argmax(dim=1).cpu().numpy()
            right += int((predicted == target)[target >= 0].sum())
            total += int((target >= 0).sum())
    return right / total if total else float("nan")


def _labeled(labels: Labels, *, num_classes: int) -> Labels:
    """Indices of the images that have a label."""
    indices = np.flatnonzero(np.asarray(labels) >= 0)
    found = num_classes if len(indices) else 0
    if found < 2:
        reason = f"a classifier needs labeled images of at least 2 classes, but the dataset has {found}"
        raise UserError("data.source", reason, hint="use a source with classes, such as one subfolder per class")
    if (largest := int(labels[indices].max())) >= num_classes:
        raise InvalidValue(f"label {largest} is out of range for {num_classes} classes")
    return indices


def _reduction(image_size: int) -> int:
    """Pixels of a side that are averaged into one."""
    return -(-image_size // LARGEST_SIDE)


def _to_network(images: Images, device: torch.device | str) -> Tensor:
    pixels = torch.from_numpy(np.array(images)).to(device)  # a copy: torch takes no read-only memory map
    return pixels.permute(0, 3, 1, 2).contiguous().float()


def _set_pixel_statistics(network: ClassifierNetwork, images: Images) -> None:
    count, total, squares = 0, np.zeros(network.channels), np.zeros(network.channels)
    for batch in batches(images, batch_size=max(1, min(4096, _BATCH_VALUES // images[0].size))):
        pixels = batch.reshape(-1, network.channels).astype(np.float64)
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
    network.pixel_mean.copy_(torch.from_numpy(mean))
    network.pixel_std.copy_(torch.from_numpy(std))


@contextmanager
def _threads(*, small: bool) -> Iterator[None]:
    """One thread for work too small to share: faster on a busy machine, and equal on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    weights = save_tensors({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
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
    network.load_state_dict(load_tensors(weights))
    return ClassifierExtractor(network.to(device))
