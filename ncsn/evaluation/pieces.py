"""Sets of images, and what an extractor sees in them, piece by piece in the store.

The pieces can be made in any order by any number of processes, and those that an interrupted evaluation left are used
again. A batch is never cut in two, so that the features do not depend on the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from safetensors.numpy import load, save

from ncsn import storage
from ncsn.config import Config
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.shards import batch_starts, read_samples
from ncsn.data.training_images import open_cache
from ncsn.evaluation.extractors import Extracted, Extractor, Images, batches, extract_all, fingerprint_of


class ImageSet(Protocol):
    """Images `0 .. count`, always in the same batches. Picklable."""

    @property
    def count(self) -> int:
        """How many images there are."""

    def starts(self, batch_size: int) -> list[int]:
        """Index of the first image of each batch, ascending from 0."""

    def read(self, first: int, last: int, *, batch_size: int) -> Iterator[Images]:
        """Images `first .. last` as [n, H, W, C] uint8 batches; `first` starts a batch and `last` ends one."""

    def head(self, count: int) -> Images:
        """The first `count` images, or all if there are fewer."""


@dataclass(frozen=True)
class SampleSet:
    """The first images of a samples folder. No batch reaches over two shards.

    Attributes:
        uri: The folder.
        count: How many images.
    """

    uri: str
    count: int

    def starts(self, batch_size: int) -> list[int]:
        """See `ImageSet`."""
        return batch_starts(self.uri, num_images=self.count, batch_size=batch_size)

    def read(self, first: int, last: int, *, batch_size: int) -> Iterator[Images]:
        """See `ImageSet`."""
        return read_samples(self.uri, start=first, num_images=last, batch_size=batch_size)

    def head(self, count: int) -> Images:
        """See `ImageSet`."""
        return np.concatenate(list(self.read(0, min(count, self.count), batch_size=count)))


@dataclass(frozen=True)
class SplitSet:
    """Images of one split of a data set, read through the node's cache.

    Attributes:
        dataset: URI of the data set.
        split: `train` or `test`.
        count: How many images.
        drawn: Seed of their order, of which the first `count` are taken; None = as they are stored.
    """

    dataset: str
    split: str
    count: int
    drawn: int | None = None

    def starts(self, batch_size: int) -> list[int]:
        """See `ImageSet`."""
        return list(range(0, self.count, batch_size))

    def read(self, first: int, last: int, *, batch_size: int) -> Iterator[Images]:
        """See `ImageSet`."""
        images = open_cache(self.dataset, self.split).images
        if self.drawn is None:
            return batches(images[first:last], batch_size=batch_size)
        rows = keyed_permutation(self.drawn, epoch=0, size=len(images))[first:last]
        return batches(images[rows], batch_size=batch_size)

    def head(self, count: int) -> Images:
        """See `ImageSet`."""
        return next(self.read(0, min(count, self.count), batch_size=count))


PIECE_IMAGES = 1024
"""Images of a piece, or a batch if that is more: 16 MB of Inception features and probabilities."""


@dataclass(frozen=True)
class FeaturePiece:
    """Images `first .. last` of a set, and where what is seen in them is kept.

    Attributes:
        config: The experiment, whose evaluation section names the extractor.
        dataset: URI of the data set beside which the extractor is kept.
        images: The set.
        folder: URI of the folder of all pieces.
        first: Index of the first image.
        last: Index after the last.
    """

    config: Config
    dataset: str
    images: SampleSet | SplitSet
    folder: str
    first: int
    last: int

    @property
    def uri(self) -> str:
        """The file."""
        return storage.join(self.folder, f"{self.first:09d}-{self.last:09d}.safetensors")

    def __len__(self) -> int:
        return self.last - self.first


def feature_pieces(
    config: Config, dataset: str, images: SampleSet | SplitSet, *, near: str, fingerprint: str
) -> list[FeaturePiece]:
    """All pieces of a set, in order, in a folder of their own.

    Args:
        config: The experiment.
        dataset: URI of the data set.
        images: The set.
        near: URI of the folder that holds the pieces' folder.
        fingerprint: That of the extractor.
    """
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
    """Those that are not in the store yet."""
    there = set(storage.list_names(pieces[0].folder))
    return [piece for piece in pieces if piece.uri.rpartition("/")[2] not in there]


def look(
    piece: FeaturePiece, extractor: Callable[[], Extractor], *, on_images: Callable[[int], None] | None = None
) -> Extracted:
    """What is seen in a piece: as it is in the store, or seen now and stored.

    Args:
        piece: The piece.
        extractor: Gives what looks at the images, if that is needed.
        on_images: Called with n after each batch of n images.
    """
    # Asked for and not looked for first: who is done with the same set removes its pieces.
    with suppress(FileNotFoundError):
        seen = Extracted(**load(storage.read_bytes(piece.uri)))
        if on_images is not None:
            on_images(len(piece))
        return seen
    stream = piece.images.read(piece.first, piece.last, batch_size=piece.config.evaluation.batch_size)
    seen = extract_all(extractor(), stream, on_images=on_images)
    storage.write_bytes(piece.uri, save({name: np.ascontiguousarray(values) for name, values in vars(seen).items()}))
    return seen


T = TypeVar("T")
R = TypeVar("R")


class Runner(Protocol):
    """Computes functions that are found by name, of arguments that pickle.

    Attributes:
        apart: Whether in other processes than this one.
    """

    apart: bool

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:
        """Each item with `function` of it, in any order, as they are done. `gpu`: on a GPU if the config uses them."""

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:
        """`function` of the arguments."""


class Here:
    """This process, one after the other."""

    apart = False

    def each(self, function: Callable[[T], R], items: Sequence[T], *, gpu: bool) -> Iterator[tuple[T, R]]:  # noqa: ARG002
        """See `Runner`."""
        return ((item, function(item)) for item in items)

    def one(self, function: Callable[..., R], *arguments: Any, gpu: bool) -> R:  # noqa: ARG002
        """See `Runner`."""
        return function(*arguments)
