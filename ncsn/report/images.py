"""Pictures of images: grids, strips, nearest neighbors."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.core.images import image_grid
from ncsn.report.page import Neighbor, Picture

Images = NDArray[np.uint8]


def evenly_spread(count: int, *, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to `count` - 1, ascending, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


GRID_PIXELS = 960  # about the side of a picture; small images are enlarged by a whole factor


def grid_png(images: Images, *, columns: int | None = None) -> bytes:
    """A PNG file of `[N, H, W, C]` images in rows, enlarged without smoothing; about square without `columns`."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    return png_bytes(np.asarray(image_grid(images, columns=columns, padding=1)))


GRID_CLASSES, GRID_OF_CLASS = 16, 8


def rows_by_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers [rows, columns] of images for a grid with a row per class, from the labels [N] of images.

    The first images of the first 16 classes that occur, as many of each as there are of the rarest of these, at most 8.
    Of one class alone there are up to 8 rows.
    """
    classes, counts = (found[:GRID_CLASSES] for found in np.unique(labels, return_counts=True))
    columns = min(GRID_OF_CLASS, int(counts.min()))
    if len(classes) == 1:
        rows = min(GRID_OF_CLASS, len(labels) // columns)
        return np.arange(rows * columns).reshape(rows, columns)
    return np.stack([np.flatnonzero(labels == label)[:columns] for label in classes])


def strip_png(frames: Images) -> bytes:
    """A PNG file of `[stages, N, H, W, C]`: one row per image, one column per stage."""
    stages, count = frames.shape[:2]
    return grid_png(frames.swapaxes(0, 1).reshape(stages * count, *frames.shape[2:]), columns=stages)


def png_bytes(picture: Images, *, enlarge: bool = True) -> bytes:
    """`[H, W, C]` uint8 as a PNG file."""
    factor = max(1, GRID_PIXELS // max(picture.shape[:2])) if enlarge else 1
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def neighbors(table: Sequence[Mapping[str, Any]], *, samples: Images, training_images: Images) -> list[Neighbor]:
    """One entry per line of an evaluation's table of nearest training images.

    `samples` are `[N, H, W, C]` from image 0 on, `training_images` `[M, H, W, C]` all rows of the train split.
    """
    found = []
    for line in (line for line in table if line["image"] < len(samples)):
        images = _with_nearest(line, samples, training_images)
        grid = png_bytes(image_grid(images, columns=len(images)), enlarge=False)
        alt = f"sample {line['image']} and the training images that are nearest in {' and in '.join(_spaces(line))}"
        distance = " · ".join(f"{distance:,.0f}" for distance in line["pixels_distances"])
        found.append(Neighbor(Picture(grid, alt=alt, width=420), distance, memorized=bool(line["memorised"])))
    return found


def neighbors_png(table: Sequence[Mapping[str, Any]], *, samples: Images, training_images: Images) -> bytes:
    """The same as one PNG file with two samples per row."""
    lines = [_with_nearest(line, samples, training_images) for line in table]
    return grid_png(np.concatenate(lines), columns=2 * len(lines[0]))


def _with_nearest(line: Mapping[str, Any], samples: Images, training_images: Images) -> Images:
    """The sample and its nearest training images by pixels and, if known, by features, [2 or 3, H, W, C]."""
    nearest = [training_images[line[f"{space}_rows"][0]] for space in _spaces(line)]
    return np.stack([samples[line["image"]], *nearest])


def _spaces(line: Mapping[str, Any]) -> list[str]:
    return [space for space in ("pixels", "features") if f"{space}_rows" in line]
