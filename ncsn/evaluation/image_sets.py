"""Sets of images that are measured, readable from any index by any process that reaches the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.training_images import open_cache
from ncsn.evaluation.extractors import Images, batches
from ncsn.evaluation.samples import batch_starts, read_samples


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
