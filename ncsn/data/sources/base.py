"""What a source of images is, and the choice of test images. Loads no torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar, Protocol

import numpy as np

from ncsn.config.schema import DataConfig
from ncsn.data.format import SkippedImage
from ncsn.data.pixels import Example as Example, Fit
from ncsn.errors import UserError


class Split(Protocol):
    """The images of a split in their order. Picklable, so that any process can read a section of them."""

    in_tasks: ClassVar[bool]  # whether reading them takes long enough to share the work between processes

    def __len__(self) -> int:
        """Images that it offers; some of them may be bad."""

    def section(self, first: int, last: int) -> Split:
        """Images `first .. last`."""

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        """Each image, or why it cannot be used; read on `cores` cores, None = all of this machine."""


@dataclass(frozen=True)
class Arrays:
    images: np.ndarray  # uint8 [N, H, W, C], of any size
    labels: np.ndarray  # [N]
    fit: Fit
    in_tasks: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def section(self, first: int, last: int) -> Arrays:
        return replace(self, images=self.images[first:last], labels=self.labels[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example]:  # noqa: ARG002
        return map(self.fit.array, self.images, self.labels.tolist())


@dataclass(frozen=True)
class Source:
    description: str
    license: str
    class_names: tuple[str, ...]  # of label 0, 1, ...; empty if there are no labels
    splits: Mapping[str, Split]  # `train` and `test`


@dataclass
class BadImages:
    """Images that cannot be used: stop at the first, or leave them out. Counts those that are converted too."""

    skip: bool
    skipped: list[SkippedImage] = field(default_factory=list)
    conversions: Counter[str] = field(default_factory=Counter)

    def filter(self, rows: Iterable[Example | SkippedImage]) -> Iterator[Example]:
        for row in rows:
            if isinstance(row, Example):
                if row.conversions:
                    self.conversions.update(row.conversions)
                yield row
            elif self.skip:
                self.skipped.append(row)
            else:
                raise UserError(
                    row.name,
                    f"cannot be used: {row.reason}",
                    hint="repair or remove it, or set data.on_bad_image to skip",
                )


def image_shape(data: DataConfig) -> tuple[int, int, int]:
    return data.image_size, data.image_size, data.channels


def hold_out(keys: Sequence[str], labels: Sequence[int], fraction: float) -> dict[str, list[int]]:
    """Indices of the images of the train and the test split, ascending.

    The choice depends on names (`keys`, all different) and labels only, never on a seed or the order, so every
    experiment on the same images tests on the same ones. Each class gives its share; floor(N * fraction) images in all,
    but at least 1 of 2 or more.
    """
    share = Fraction(str(fraction))
    order = sorted(range(len(keys)), key=lambda index: (labels[index], name_hash(keys[index])))
    test = {index for place, index in enumerate(order) if int((place + 1) * share) > int(place * share)}
    if len(keys) >= 2 and not test:
        test = {order[-1]}
    return {"train": [index for index in range(len(keys)) if index not in test], "test": sorted(test)}


def name_hash(key: str) -> bytes:
    """A fixed pseudo-random rank of a name."""
    return hashlib.sha256(key.encode()).digest()
