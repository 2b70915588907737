"""The table of sources. A new source is a function that returns a `Source`, and a line here and in `DataConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ncsn.config.schema import DataConfig
from ncsn.data.cifar10 import open_cifar10
from ncsn.data.image_folder import open_celeba, open_image_folder
from ncsn.data.published.source import open_parquet
from ncsn.data.small_sets import open_digits, open_idx, open_photos
from ncsn.data.source import Source

_OPENERS: dict[str, Callable[[DataConfig], Source]] = {
    "sklearn_digits": open_digits,
    "sklearn_photos": open_photos,
    "fashion_mnist": open_idx,
    "mnist": open_idx,
    "cifar10": open_cifar10,
    "celeba": open_celeba,
    "image_folder": open_image_folder,
    "parquet": open_parquet,
}


def open_source(data: DataConfig) -> Source:
    """Find and check the files of the configured source."""
    source = _OPENERS[data.source](data)
    if data.max_images is None:
        return source
    return replace(source, splits={name: split.section(0, data.max_images) for name, split in source.splits.items()})


def fills_several_parts(source: Source, data: DataConfig) -> bool:
    """Whether it is worth writing the parts of the dataset in several processes."""
    splits = source.splits.values()
    return all(split.in_tasks for split in splits) and any(len(split) > data.rows_per_part for split in splits)
