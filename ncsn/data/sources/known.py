"""The table of sources. A new one is a function that opens it, and a line here and in `DataConfig`."""

from __future__ import annotations

from dataclasses import replace

from ncsn.config.schema import DataConfig
from ncsn.data.format import part_images
from ncsn.data.sources.base import Source, image_shape
from ncsn.data.sources.image_folder import open_celeba, open_image_folder
from ncsn.data.sources.published import open_parquet
from ncsn.data.sources.sklearn_sets import open_digits, open_photos
from ncsn.data.sources.torchvision_sets import open_torchvision

_SOURCES = {
    "sklearn_digits": open_digits,
    "sklearn_photos": open_photos,
    "fashion_mnist": open_torchvision,
    "mnist": open_torchvision,
    "cifar10": open_torchvision,
    "celeba": open_celeba,
    "image_folder": open_image_folder,
    "parquet": open_parquet,
}


def open_source(data: DataConfig) -> Source:
    source = _SOURCES[data.source](data)
    if data.max_images is None:
        return source
    return replace(source, splits={name: split.section(0, data.max_images) for name, split in source.splits.items()})


def fills_several_parts(source: Source, data: DataConfig) -> bool:
    """Whether it is worth writing the parts of the dataset in several processes."""
    splits = source.splits.values()
    return all(split.in_tasks for split in splits) and any(
        len(split) > part_images(image_shape(data)) for split in splits
    )
