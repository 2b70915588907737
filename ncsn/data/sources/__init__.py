"""Where images come from. A new one is a function that opens it, and a line here, in `DataConfig` and in its rules."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ncsn.config.schema import DataConfig
from ncsn.data.sources.base import Source


class KnownSource(NamedTuple):
    opener: str  # `module.function` in this package; the module of one source does not load those of others
    reads_files: bool = True  # below data.root; the others come with a library


SOURCES: Mapping[str, KnownSource] = {
    "sklearn_digits": KnownSource("published_sets.open_digits", reads_files=False),
    "sklearn_photos": KnownSource("published_sets.open_photos", reads_files=False),
    "fashion_mnist": KnownSource("published_sets.open_torchvision"),
    "mnist": KnownSource("published_sets.open_torchvision"),
    "cifar10": KnownSource("published_sets.open_torchvision"),
    "celeba": KnownSource("celeba.open_celeba"),
    "image_folder": KnownSource("image_folder.open_image_folder"),
    "parquet": KnownSource("parquet_files.open_parquet"),
}


def open_source(data: DataConfig) -> Source:
    """The images that the config names, of which none is read yet."""
    module, _, function = SOURCES[data.source].opener.partition(".")
    source: Source = getattr(importlib.import_module(f"{__name__}.{module}"), function)(data)
    if data.max_images is None:
        return source
    return replace(source, splits={name: split.section(0, data.max_images) for name, split in source.splits.items()})
