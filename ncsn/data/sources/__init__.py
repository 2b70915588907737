"""Where images come from. A new one is a function that opens it, and a line here, in `DataConfig` and in its rules."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace

from ncsn.config.schema import DataConfig
from ncsn.data.sources.base import Source

# `module.function` in this package; the module of one source does not load those of others.
SOURCES: Mapping[str, str] = {
    "sklearn_digits": "published_sets.open_digits",
    "sklearn_photos": "published_sets.open_photos",
    "fashion_mnist": "published_sets.open_torchvision",
    "mnist": "published_sets.open_torchvision",
    "cifar10": "published_sets.open_torchvision",
    "celeba": "celeba.open_celeba",
    "image_folder": "image_folder.open_image_folder",
    "parquet": "parquet_files.open_parquet",
}
OF_LIBRARIES = ("sklearn_digits", "sklearn_photos")  # the others read files below data.root


def open_source(data: DataConfig) -> Source:
    """The images that the config names, of which none is read yet."""
    module, _, function = SOURCES[data.source].partition(".")
    source: Source = getattr(importlib.import_module(f"{__name__}.{module}"), function)(data)
    if data.max_images is None:
        return source
    return replace(source, splits={name: split.section(0, data.max_images) for name, split in source.splits.items()})
