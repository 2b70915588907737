"""Samples beside the training images that are nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncsn.core.images import image_grid
from ncsn.report.figures import grid_png, png_bytes
from ncsn.report.page import Neighbour, Picture


def neighbours(
    table: Sequence[Mapping[str, Any]], *, samples: NDArray[np.uint8], training_images: NDArray[np.uint8]
) -> list[Neighbour]:
    """One entry per line of an evaluation's table of nearest training images.

    Args:
        table: Lines with `image`, `memorised`, `pixels_rows`, `features_rows` and `pixels_distances`.
        samples: `[N, H, W, C]` uint8 from image 0 on.
        training_images: `[M, H, W, C]` uint8, all rows of the train split; a memory map is fine.
    """
    return [
        Neighbour(
            picture=_picture(line, samples, training_images),
            distance=" · ".join(f"{distance:,.0f}" for distance in line["pixels_distances"]),
            memorised=bool(line["memorised"]),
        )
        for line in table
        if line["image"] < len(samples)
    ]


def neighbours_png(
    table: Sequence[Mapping[str, Any]], *, samples: NDArray[np.uint8], training_images: NDArray[np.uint8]
) -> bytes:
    """The same as one PNG file: two samples per row, each before its nearest by pixels and by features."""
    lines = [_images(line, samples, training_images) for line in table]
    return grid_png(np.concatenate(lines), columns=6)


def _picture(line: Mapping[str, Any], samples: NDArray[np.uint8], training_images: NDArray[np.uint8]) -> Picture:
    grid = image_grid(_images(line, samples, training_images), columns=3)
    return Picture(
        png_bytes(grid, enlarge=False),
        alt=f"sample {line['image']}, then the training image nearest by pixels, then the one nearest by features",
        width=420,
    )


def _images(
    line: Mapping[str, Any], samples: NDArray[np.uint8], training_images: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The sample and its nearest training images [3, H, W, C]."""
    nearest = [training_images[line[f"{space}_rows"][0]] for space in ("pixels", "features")]
    return np.stack([samples[line["image"]], *nearest])
