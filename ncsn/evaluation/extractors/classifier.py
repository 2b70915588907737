"""The domain classifier: a small convolutional network trained on the ingested images themselves.

Its softmax gives the classifier score and its last hidden layer the features of the classifier's Fréchet distance.
Neither compares with values from the 2015 Inception graph. Images without labels take clusters for classes: then only
the features count. Trained classifiers are in the store, next to their dataset.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor, nn

from ncsn import storage
from ncsn.data.format import Rows
from ncsn.data.training_images import CachedSplit
from ncsn.errors import UserError
from ncsn.evaluation.extractors import Extracted, Images, batches, full_float32
from ncsn.model.build import torch_threads
from ncsn.progress import Progress

Labels = npt.NDArray[np.int64]
LabeledImages = CachedSplit | Rows

WEIGHTS = "weights.safetensors"
DESCRIPTION = "classifier.json"

RECIPE_VERSION = 1
NUM_FEATURES = 128
LARGEST_SIDE = 32  # pixels; longer ones are averaged down first
SMALL_SET = 10_000
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
DROPOUT = 0.25
_BATCH_VALUES = 1 << 24  # pixel values whose statistics are taken at once

# Of the clusters of similar images that take the place of labels where there are none.
NUM_CLUSTERS = 16
IMAGES_PER_CLUSTER = 8  # on average, at least; fewer images have fewer clusters
_COMPONENTS = 32
_FITTED_IMAGES = 10_000
_CLUSTERED_VALUES = 1 << 22  # pixel values that are converted at once


@dataclass(frozen=True)
class ClassifierRecipe:
    """What decides the classifier, given its training images."""

    shape: tuple[int, int, int]  # height and width, at least 4, and channels
    num_classes: int  # at least 2
    epochs: int
    seed: int  # of weights, order, dropout and clusters
    clustered: bool = False  # whether the classes are clusters instead of labels


class ClassifierNetwork(nn.Module):
    """An `Extractor`: conv32 - conv64 - maxpool - fc128 - fc K on pixels normalized by their mean and deviation.

    Sides of more than 32 pixels are first averaged down by a whole factor.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, recipe: ClassifierRecipe) -> None:
        super().__init__()
        *sides, channels = recipe.shape
        self.reduction = _reduction(sides)
        height, width = (side // factor for side, factor in zip(sides, self.reduction, strict=True))
        # Stride 2 makes the network four times cheaper.
        kernel, stride = (5, 2) if min(height, width) >= 16 else (3, 1)
        pooled = [((side - 1) // stride + 1) // 2 for side in (height, width)]
        self.register_buffer("pixel_mean", torch.zeros(channels))
        self.register_buffer("pixel_std", torch.ones(channels))
        self.conv_1 = nn.Conv2d(channels, 32, kernel, stride=stride, padding=kernel // 2)
        self.norm_1 = nn.BatchNorm2d(32)
        self.conv_2 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm_2 = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64 * pooled[0] * pooled[1], NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, recipe.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 128] features and [B, K] logits of [B, C, H, W] pixels in [0, 255]."""
        x = (images - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        if max(self.reduction) > 1:
            x = F.avg_pool2d(x, self.reduction)
        x = F.relu(self.norm_1(self.conv_1(x)))
        x = F.max_pool2d(F.relu(self.norm_2(self.conv_2(x))), 2)
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(F.dropout(features, DROPOUT, self.training))

    def extract(self, images: Images) -> Extracted:
        """Features [N, 128] and log probabilities [N, K] of uint8 [N, H, W, C] images."""
        with torch.inference_mode(), full_float32():
            features, logits = self(_to_network(images, self.pixel_mean.device))
            log_probabilities = F.log_softmax(logits.double(), dim=1)
        return Extracted(features=features.float().cpu().numpy(), log_probabilities=log_probabilities.cpu().numpy())


def train_classifier(
    recipe: ClassifierRecipe, *, images: Images, labels: Labels, device: str = "cpu", progress: Progress | None = None
) -> ClassifierNetwork:
    """Train by cross-entropy with AdamW and a one-cycle learning rate; deterministic for a seed and a thread count.

    Args:
        images: [N, H, W, C] uint8; a memory map is fine.
        labels: [N] class of each image; images of label -1 (no label) are left out.
        progress: Advances by the images of each step.
    """
    progress = progress or Progress()
    labeled = np.flatnonzero(np.asarray(labels) >= 0)
    if (found := recipe.num_classes if len(labeled) else 0) < 2:
        reason = f"a classifier needs labeled images of at least 2 classes, but the dataset has {found}"
        raise UserError("data.source", reason, hint="use a source with classes, such as one subfolder per class")
    # Small sets need small batches to take enough steps in a few passes, and one thread for work too small to share:
    # it is faster on a busy machine, and equal on any number of cores.
    batch_size, threads = (32, 1) if len(labeled) < SMALL_SET else (128, torch.get_num_threads())
    steps = recipe.epochs * -(-len(labeled) // batch_size)
    count, total, squares = 0, 0.0, 0.0  # of the values of each channel
    for batch in batches(images, batch_size=max(1, min(4096, _BATCH_VALUES // images[0].size))):
        pixels = batch.reshape(-1, images.shape[-1]).astype(np.float64)
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    # Dropout and initialization use the global generators.
    with torch.random.fork_rng(devices), torch_threads(threads):
        torch.manual_seed(recipe.seed)
        network = ClassifierNetwork(recipe)
        network.pixel_mean.copy_(torch.from_numpy(mean))
        network.pixel_std.copy_(torch.from_numpy(np.sqrt(np.maximum(squares / count - mean**2, 1.0))))
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
                loss = F.cross_entropy(network(_to_network(images[chosen], device))[1], target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.advance(len(chosen))
    return network.eval()


def accuracy(network: ClassifierNetwork, *, images: Images, labels: Labels) -> float | None:
    """Share of the labeled images that get their label, in [0, 1]; None if none has a label."""
    known, device = np.asarray(labels) >= 0, network.pixel_mean.device
    with torch.inference_mode():
        parts = [
            network(_to_network(batch, device))[1].argmax(dim=1).cpu() for batch in batches(images, batch_size=500)
        ]
    return float((torch.cat(parts).numpy() == labels)[known].mean()) if known.any() else None


def _reduction(sides: Sequence[int]) -> tuple[int, ...]:
    """Pixels of each side that are averaged into one."""
    return tuple(-(-side // LARGEST_SIDE) for side in sides)


def _to_network(images: Images, device: torch.device | str) -> Tensor:
    pixels = torch.from_numpy(np.array(images)).to(device)  # a copy: torch takes no read-only memory map
    return pixels.permute(0, 3, 1, 2).contiguous().float()


def num_clusters(num_images: int) -> int:
    """The number of clusters for `num_images` images, at least 2."""
    return max(2, min(NUM_CLUSTERS, num_images // IMAGES_PER_CLUSTER))


def cluster_labels(images: Images, *, count: int, seed: int) -> Labels:
    """The cluster of each image, [N], by k-means on the principal components of the pixels.

    Components and centers are those of at most 10,000 images [N, H, W, C] uint8, which the seed chooses, as it does the
    first centers. Some clusters are empty if fewer images differ.
    """
    # Here, since few runs have clusters, and every process on Ray would load a second longer.
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning

    generator = np.random.default_rng(seed)
    fitted = np.sort(generator.permutation(len(images))[:_FITTED_IMAGES])
    size = max(1, _CLUSTERED_VALUES // images[0].size)
    pixels = np.concatenate([_pixels(images[fitted[first : first + size]]) for first in range(0, len(fitted), size)])
    with warnings.catch_warnings():
        # Fewer images differ than there are clusters, or none do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        reduce = PCA(min(_COMPONENTS, *pixels.shape), random_state=seed).fit(pixels)
        centers = KMeans(min(count, len(fitted)), n_init=3, random_state=seed).fit(reduce.transform(pixels))
    found = [centers.predict(reduce.transform(_pixels(batch))) for batch in batches(images, batch_size=size)]
    return np.concatenate(found).astype(np.int64)


def _pixels(images: Images) -> npt.NDArray[np.float32]:
    """[n, D] pixels in [0, 1] of images that are averaged down by a whole factor."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    reduced: npt.NDArray[np.float32] = F.avg_pool2d(pixels, _reduction(images.shape[1:3])).flatten(1).numpy()
    return reduced


def classifier_uri(dataset_uri: str, recipe: ClassifierRecipe) -> str:
    """Folder of the classifier of a recipe for a dataset."""
    return storage.join(dataset_uri, "classifier", storage.digest({"version": RECIPE_VERSION, **asdict(recipe)}, 16))


def describe_classifier(uri: str) -> tuple[str, float | None] | None:
    """Fingerprint and test accuracy (None if unknown, or for clusters) of the classifier in `uri`, if it is there.

    The fingerprint is a hash of weights, resize and preprocessing: if it is equal, features compare.
    """
    description = storage.find_json(storage.join(uri, DESCRIPTION))
    if description is None:
        return None
    recipe = ClassifierRecipe(**description["recipe"])
    kind = "clusters" if recipe.clustered else "classifier"
    parts = {"kind": kind, "version": RECIPE_VERSION, "weights": description["weights_sha256"]}
    return storage.digest(parts | {"reduction": _reduction(recipe.shape[:2])}, 64), description["test_accuracy"]


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
    labels = train.labels
    if recipe.clustered:
        labels = cluster_labels(train.images, count=recipe.num_classes, seed=recipe.seed)
    network = train_classifier(recipe, images=train.images, labels=labels, device=device, progress=progress)
    weights = save_tensors({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    description = {
        "recipe": asdict(recipe),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "test_accuracy": None if recipe.clustered else accuracy(network, images=test.images, labels=test.labels),
    }
    # The first of two writers wins.
    with storage.staged_folder(uri, marker=DESCRIPTION) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return uri


def load_classifier(uri: str, *, device: str = "cpu") -> ClassifierNetwork:
    network = ClassifierNetwork(ClassifierRecipe(**storage.read_json(storage.join(uri, DESCRIPTION))["recipe"]))
    network.load_state_dict(load_tensors(storage.read_bytes(storage.join(uri, WEIGHTS))))
    return network.to(device).eval()
