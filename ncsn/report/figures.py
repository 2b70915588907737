"""Pictures of images and of curves."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.core.images import image_grid

GRID_PIXELS = 960
"""Wanted side of a picture; small images are enlarged by whole factors."""


def grid_png(images: NDArray[np.uint8], *, columns: int | None = None) -> bytes:
    """Images in rows, enlarged without smoothing so that each pixel can be seen.

    Args:
        images: `[N, H, W, C]` uint8, C = 1 or 3.
        columns: Images per row; None makes the picture about square.

    Returns:
        A PNG file.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    return png_bytes(np.asarray(image_grid(images, columns=columns, padding=1)))


def strip_png(frames: NDArray[np.uint8]) -> bytes:
    """One row per image, one column per stage of annealing, most noise left.

    Args:
        frames: `[stages, N, H, W, C]` uint8.

    Returns:
        A PNG file.
    """
    stages, count = frames.shape[:2]
    return grid_png(frames.swapaxes(0, 1).reshape(stages * count, *frames.shape[2:]), columns=stages)


def png_bytes(picture: NDArray[np.uint8], *, enlarge: bool = True) -> bytes:
    """`[H, W, C]` uint8 as a PNG file, small pictures enlarged by a whole factor if wanted."""
    factor = max(1, GRID_PIXELS // max(picture.shape[:2])) if enlarge else 1
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
