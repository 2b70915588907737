"""Pictures of images: grids, strips, nearest neighbors."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.data.samples import grid_png

Images = NDArray[np.uint8]


def evenly_spread(count: int, *, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to `count` - 1, ascending, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


CARD_PIXELS = 400  # at most, of a picture on MLflow's page, which shows it in full size


def smaller_png(png: bytes) -> bytes:
    """The picture for a model card."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.thumbnail((CARD_PIXELS, CARD_PIXELS), Image.Resampling.BOX)
        picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


GRID_CLASSES, GRID_OF_CLASS = 16, 8


def rows_by_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers [rows, columns] of images for a grid with a row per class, from the labels [N] of images.

    The first images of the first 16 classes that occur, as many of each as there are of the rarest of these, at most 8.
    A class of fewer than 4 and of less than half the median is left out. Of one class alone there are up to 8 rows.
    """
    classes, counts = np.unique(labels, return_counts=True)
    enough = (counts >= GRID_OF_CLASS // 2) | (2 * counts >= np.median(counts))
    classes, counts = classes[enough][:GRID_CLASSES], counts[enough][:GRID_CLASSES]
    columns = min(GRID_OF_CLASS, int(counts.min()))
    if len(classes) == 1:
        rows = min(GRID_OF_CLASS, len(labels) // columns)
        return np.arange(rows * columns).reshape(rows, columns)
    return np.stack([np.flatnonzero(labels == label)[:columns] for label in classes])


NEIGHBORS_BYTES = 2_000_000  # of the picture before compression


def neighbors_png(samples: Images, training_images: Images) -> bytes:
    """A PNG file of samples [N, H, W, C], each beside the training image in the same row of `training_images`.

    It has four pairs in a line, and fewer lines where images are large.
    """
    most = min(len(samples), max(4, NEIGHBORS_BYTES // (2 * samples[0].size)))
    pairs = np.stack([samples[:most], training_images[:most]], axis=1).reshape(-1, *samples.shape[1:])
    return grid_png(pairs, columns=2 * min(4, most))
