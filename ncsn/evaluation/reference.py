"""What an extractor sees in the reference split of a data set: computed once and kept beside the data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save_file

from ncsn import storage
from ncsn.evaluation.extractors import Extracted, Extractor, Images, batches, fingerprint_of
from ncsn.evaluation.frechet_distance import FrechetStatistics

FEATURES = "features.npy"
STATISTICS = "statistics.safetensors"
DESCRIPTION = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The reference images through an extractor.

    Attributes:
        features: [N, D] float32, memory-mapped where the store is local.
        statistics: moments of all N feature vectors.
        class_histogram: [K] shares of the images by most probable class.
        fingerprint: hash of the extractor, the data set and the split: what a figure against it depends on.
    """

    features: npt.NDArray[np.float32]
    statistics: FrechetStatistics
    class_histogram: npt.NDArray[np.float64]
    fingerprint: str


def obtain_reference(
    dataset_uri: str,
    extractor: Extractor,
    *,
    images: Images,
    dataset_digest: str,
    split: str = "train",
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """The stored reference of an extractor and a split, or one computed now and stored.

    Args:
        dataset_uri: folder of the data set; the reference lies below it.
        extractor: what looks at the images.
        images: [N, H, W, C] uint8, all images of the split in stored order; a memory map is fine.
        dataset_digest: digest in the data set's manifest.
        split: name of the split.
        batch_size: images per extractor evaluation.
        on_progress: called with (images done, images in all).
    """
    fingerprint = fingerprint_of(extractor=extractor.fingerprint, dataset=dataset_digest, split=split)
    uri = storage.join(dataset_uri, "reference", fingerprint[:16])
    if not storage.exists(storage.join(uri, DESCRIPTION)):
        with storage.staged_folder(uri, marker=DESCRIPTION) as folder:
            _compute(folder, extractor, images, batch_size=batch_size, on_progress=on_progress)
            description = {
                "extractor": extractor.name,
                "dataset": dataset_digest,
                "split": split,
                "images": len(images),
            }
            (folder / DESCRIPTION).write_text(json.dumps({"fingerprint": fingerprint, **description}, indent=1))
    return _load(uri, fingerprint)


def extract_all(
    extractor: Extractor, stream: Iterable[Images], *, on_images: Callable[[int], None] | None = None
) -> Extracted:
    """Everything that an extractor sees in a stream of image batches.

    Args:
        extractor: what looks at the images.
        stream: [n, H, W, C] uint8 batches.
        on_images: called with n after each batch.

    Raises:
        ValueError: if the stream is empty, or images do not fit the extractor.
    """
    features: list[npt.NDArray[np.float32]] = []
    log_probabilities: list[npt.NDArray[np.float64]] = []
    for batch in stream:
        extracted = extractor.extract(batch)
        features.append(extracted.features)
        log_probabilities.append(extracted.log_probabilities)
        if on_images is not None:
            on_images(len(batch))
    if not features:
        raise ValueError("there are no images to evaluate")
    return Extracted(features=np.concatenate(features), log_probabilities=np.concatenate(log_probabilities))


def class_histogram(log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[K] shares of the images by most probable class, from [N, K] log probabilities."""
    counts = np.bincount(log_probabilities.argmax(axis=1), minlength=log_probabilities.shape[1])
    return counts / len(log_probabilities)


def _compute(
    folder: Path,
    extractor: Extractor,
    images: Images,
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    features = np.lib.format.open_memmap(
        folder / FEATURES, mode="w+", dtype=np.float32, shape=(len(images), extractor.num_features)
    )
    histogram: npt.NDArray[np.float64] | float = 0.0
    statistics: FrechetStatistics | None = None
    done = 0
    for batch in batches(images, batch_size=batch_size):
        extracted = extractor.extract(batch)
        features[done : done + len(batch)] = extracted.features
        part = FrechetStatistics.of(extracted.features)
        statistics = part if statistics is None else statistics.merge(part)
        histogram = histogram + class_histogram(extracted.log_probabilities) * len(batch)
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(images))
    if statistics is None:
        raise ValueError("the reference split has no images")
    features.flush()
    tensors = {"mean": statistics.mean, "scatter": statistics.scatter, "class_histogram": np.asarray(histogram) / done}
    save_file(tensors, folder / STATISTICS)


def _load(uri: str, fingerprint: str) -> Reference:
    features_uri = storage.join(uri, FEATURES)
    if storage.is_local(uri):
        features = np.load(features_uri, mmap_mode="r", allow_pickle=False)
    else:
        features = np.load(io.BytesIO(storage.read_bytes(features_uri)), allow_pickle=False)
    tensors = load(storage.read_bytes(storage.join(uri, STATISTICS)))
    return Reference(
        features=features,
        statistics=FrechetStatistics(count=len(features), mean=tensors["mean"], scatter=tensors["scatter"]),
        class_histogram=tensors["class_histogram"],
        fingerprint=fingerprint,
    )
