"""Sets of images, and their features piece by piece in the store.

The pieces can be made in any order by any number of processes, and those of an interrupted evaluation are used again.
No batch is cut in two, so the features do not depend on the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.samples import batch_starts, read_labels, read_samples
from ncsn.data.training_images import open_cache
from ncsn.errors import InvalidValue
from ncsn.evaluation.extractors.base import Extracted, Extractor, Images, batches, extract_all, fingerprint_of

Labels = NDArray[np.int64]

PIECE_IMAGES = 1024  # or a batch if that is more: 16 MB of Inception features and probabilities


@dataclass(frozen=True)
class SampleSet:
    """The first `count` images of a samples folder. No batch holds images of two shards."""

    uri: str
    count: int

    def starts(self, batch_size: int) -> list[int]:
        """Index of the first image of each batch, ascending from 0."""
        return batch_starts(self.uri, num_images=self.count, batch_size=batch_size)

    def read(self, first: int, last: int, *, batch_size: int) -> Iterator[Images]:
        """Images `first .. last` as [n, H, W, C] uint8 batches; `first` starts a batch and `last` ends one."""
        return read_samples(self.uri, start=first, num_images=last, batch_size=batch_size)

    def labels(self) -> Labels:
        """The class of each image, int64 [count], -1 for none."""
        return read_labels(self.uri, num_images=self.count)

    def head(self, count: int) -> Images:
        """The first `count` images, or all if there are fewer."""
        return np.concatenate(list(self.read(0, min(count, self.count), batch_size=count)))


@dataclass(frozen=True)
class SplitSet:
    """The first `count` images of a split of a dataset, in stored order or in the order of the seed `drawn`."""

    dataset: str
    split: str
    count: int
    drawn: int | None = None

    def starts(self, batch_size: int) -> list[int]:
        """See `SampleSet`."""
        return list(range(0, self.count, batch_size))

    def read(self, first: int, last: int, *, batch_size: int) -> Iterator[Images]:
        """See `SampleSet`."""
        images = open_cache(self.dataset, self.split).images
        if self.drawn is None:
            return batches(images[first:last], batch_size=batch_size)
        rows = keyed_permutation(self.drawn, epoch=0, size=len(images))[first:last]
        return batches(images[rows], batch_size=batch_size)

    def labels(self) -> Labels:
        """See `SampleSet`."""
        labels: Labels = open_cache(self.dataset, self.split).labels
        order = slice(None) if self.drawn is None else keyed_permutation(self.drawn, epoch=0, size=len(labels))
        return labels[order][: self.count]

    def head(self, count: int) -> Images:
        """See `SampleSet`."""
        return next(self.read(0, min(count, self.count), batch_size=count))


ImageSet = SampleSet | SplitSet


@dataclass(frozen=True)
class FeaturePiece:
    """Images `first .. last` of a set, and the file of their features. Picklable."""

    config: Config  # its evaluation section names the extractor
    dataset: str  # URI of the dataset whose folder holds the extractor
    images: ImageSet
    folder: str  # URI of the folder of all pieces
    first: int
    last: int

    @property
    def uri(self) -> str:
        """The file."""
        return storage.join(self.folder, f"{self.first:09d}-{self.last:09d}.safetensors")

    def __len__(self) -> int:
        return self.last - self.first


def feature_pieces(
    config: Config, dataset: str, images: ImageSet, *, near: str, fingerprint: str
) -> list[FeaturePiece]:
    """All pieces of a set, in order, in a private folder below `near`; `fingerprint` is that of the extractor."""
    batch_size = config.evaluation.batch_size
    key = fingerprint_of(extractor=fingerprint, batch_size=batch_size, kind=type(images).__name__, **asdict(images))
    folder = storage.join(near, f".features-{key[:16]}")
    starts = images.starts(batch_size)
    cuts = [starts[0]]
    for start, end in zip(starts, [*starts[1:], images.count], strict=True):
        if end - cuts[-1] > PIECE_IMAGES and start > cuts[-1]:
            cuts.append(start)
    return [
        FeaturePiece(config, dataset, images, folder, first, last)
        for first, last in zip(cuts, [*cuts[1:], images.count], strict=True)
    ]


def missing_pieces(pieces: list[FeaturePiece]) -> list[FeaturePiece]:
    """The pieces that are not in the store yet."""
    there = {folder: set(storage.list_names(folder)) for folder in {piece.folder for piece in pieces}}
    return [piece for piece in pieces if piece.uri.rpartition("/")[2] not in there[piece.folder]]


def extract_piece(
    piece: FeaturePiece, extractor: Callable[[], Extractor], *, on_images: Callable[[int], None] | None = None
) -> Extracted:
    """The features of a piece, from the store or extracted and stored now; `on_images(n)` follows each batch."""
    # Read without a check first: another process that has finished the set removes its pieces.
    with suppress(FileNotFoundError):
        extracted = Extracted(**load(storage.read_bytes(piece.uri)))
        if on_images is not None:
            on_images(len(piece))
        return extracted
    stream = piece.images.read(piece.first, piece.last, batch_size=piece.config.evaluation.batch_size)
    extracted = extract_all(extractor(), stream, on_images=on_images)
    arrays = {name: np.ascontiguousarray(values) for name, values in vars(extracted).items()}
    storage.write_bytes(piece.uri, save(arrays))
    return extracted


class Spool:
    """Features and probabilities of up to `count` images in memory-mapped files below `folder`."""

    def __init__(self, folder: Path, *, count: int) -> None:
        self.done = 0
        self._folder, self._count = folder, count
        self._files: dict[str, np.memmap] = {}

    def add(self, extracted: Extracted) -> None:
        """Append the next images."""
        last = self.done + len(extracted.features)
        for name in ("features", "log_probabilities"):
            values = getattr(extracted, name)
            if name not in self._files:
                self._files[name] = np.lib.format.open_memmap(
                    self._folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=(self._count, values.shape[1])
                )
            self._files[name][self.done : last] = values
        self.done = last

    @property
    def extracted(self) -> Extracted:
        """All that was appended; at least one image."""
        if not self.done:
            raise InvalidValue("there are no images to evaluate")
        return Extracted(
            features=self._files["features"][: self.done],
            log_probabilities=self._files["log_probabilities"][: self.done],
        )
