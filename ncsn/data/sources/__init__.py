"""Where images come from. A new source is a function that opens it, and a line here and in `DataConfig`."""

from __future__ import annotations

from dataclasses import replace

from ncsn.config.schema import DataConfig
from ncsn.data.sources.base import Source


def open_source(data: DataConfig) -> Source:
    """The images that the config names, of which none is read yet."""
    match data.source:  # the module of one source does not load those of others
        case "sklearn_digits":
            from ncsn.data.sources.library_sets import open_digits as opened
        case "sklearn_photos":
            from ncsn.data.sources.library_sets import open_photos as opened
        case "mnist" | "fashion_mnist" | "cifar10":
            from ncsn.data.sources.library_sets import open_torchvision as opened
        case "celeba":
            from ncsn.data.sources.image_folder import open_celeba as opened
        case "image_folder":
            from ncsn.data.sources.image_folder import open_image_folder as opened
        case "parquet":
            from ncsn.data.sources.published import open_parquet as opened
    source = opened(data)
    if data.max_images is None:
        return source
    return replace(source, splits={name: split.section(0, data.max_images) for name, split in source.splits.items()})
