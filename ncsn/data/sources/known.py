"""The table of sources.

A new source is a function that opens it, one that says where its files are, and a line here and in `DataConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ncsn.config.schema import DataConfig
from ncsn.data.format import part_images
from ncsn.data.sources.base import Source, image_shape
from ncsn.data.sources.image_folder import locate_celeba, locate_images, open_celeba, open_image_folder
from ncsn.data.sources.listing import DOWNLOADED
from ncsn.data.sources.published import locate_files, open_parquet
from ncsn.data.sources.sklearn_sets import locate_package, open_digits, open_photos
from ncsn.data.sources.torchvision_sets import locate_torchvision, open_torchvision
from ncsn.errors import NotFound


class _Known(NamedTuple):
    open: Callable[[DataConfig], Source]
    locate: Callable[[DataConfig], str]  # as `locate_source` does


_SOURCES = {
    "sklearn_digits": _Known(open_digits, locate_package),
    "sklearn_photos": _Known(open_photos, locate_package),
    "fashion_mnist": _Known(open_torchvision, locate_torchvision),
    "mnist": _Known(open_torchvision, locate_torchvision),
    "cifar10": _Known(open_torchvision, locate_torchvision),
    "celeba": _Known(open_celeba, locate_celeba),
    "image_folder": _Known(open_image_folder, locate_images),
    "parquet": _Known(open_parquet, locate_files),
}


def open_source(data: DataConfig) -> Source:
    source = _SOURCES[data.source].open(data)
    if data.max_images is None:
        return source
    return replace(source, splits={name: split.section(0, data.max_images) for name, split in source.splits.items()})


def locate_source(data: DataConfig) -> str:
    """Where the images of the configured source are; reads no image and downloads none.

    Raises:
        UserError: They are not there, as `open_source` would say.
    """
    try:
        place = _SOURCES[data.source].locate(data.model_copy(update={"download": False}))
    except NotFound as missing:
        if not data.download or data.source not in DOWNLOADED or data.root is None or missing.keys != ["data.root"]:
            raise
        place = f"not in {data.root} yet, where ingest downloads it to"
    return f"{data.source}: {place}"


def fills_several_parts(source: Source, data: DataConfig) -> bool:
    """Whether it is worth writing the parts of the dataset in several processes."""
    splits = source.splits.values()
    return all(split.in_tasks for split in splits) and any(
        len(split) > part_images(image_shape(data)) for split in splits
    )
