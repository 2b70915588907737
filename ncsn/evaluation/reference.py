"""What an extractor sees in the reference split of a data set: computed once and kept beside the data."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save_file

from ncsn import storage
from ncsn.evaluation.extractors import Extracted
from ncsn.evaluation.frechet_distance import FrechetStatistics

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
