"""Where images come from: one interface over every source, with a train and a test split that stream.

A source is opened (its files found and their headers checked) before anything is written, and gives its images one by
one, so that memory does not grow with the dataset.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ncsn.config.schema import DataConfig
from ncsn.data.cifar10 import open_cifar10
from ncsn.data.image_folder import open_celeba, open_image_folder
from ncsn.data.small_sets import open_digits, open_fashion_mnist, open_mnist
from ncsn.data.source import BadImages, Source, Split

_OPENERS: dict[str, Callable[[DataConfig], Source]] = {
    "sklearn_digits": open_digits,
    "fashion_mnist": open_fashion_mnist,
    "mnist": open_mnist,
    "cifar10": open_cifar10,
    "celeba": open_celeba,
    "image_folder": open_image_folder,
}


def open_source(data: DataConfig) -> Source:
    """Find and check the files of the configured source.

    Raises:
        NotFound: if data.root or a file that belongs below it is missing.
        UserError: if data.root is not set, or a file is not what it should be.
    """
    source = _OPENERS[data.source](data)
    if data.max_images is None:
        return source
    bad = BadImages(skip=data.on_bad_image == "skip", skipped=source.skipped)
    limited = {name: _first(split, data.max_images, bad) for name, split in source.splits.items()}
    return replace(source, splits=limited)


def fills_several_parts(source: Source, data: DataConfig) -> bool:
    """Whether the source can be read in sections, and one of its splits fills more than one part file."""
    splits = source.splits.values()
    return all(split.images is not None for split in splits) and any(
        split.count > data.rows_per_part for split in splits
    )


def _first(split: Split, count: int, bad: BadImages) -> Split:
    count = min(split.count, count)
    if split.images is None:
        return Split(count, lambda: itertools.islice(split.stream(), count))
    images = split.images.section(0, count)
    return Split(count, partial(images.stream, bad), images)
