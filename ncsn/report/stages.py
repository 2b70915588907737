"""Images on their way from noise, kept in bounded memory, and the GIF of them."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.core.images import image_grid

Images = NDArray[np.uint8]

GIF_BYTES = 1_000_000
"""Most of a GIF; noise does not compress, so large images get fewer frames."""
GIF_PIXELS = 36_000
"""Most pixels of a frame; large images are fewer."""
GIF_COLOURS = 32
GIF_BITS = 7
"""Of a pixel of noise in so many colours, once compressed, at most."""
FEWEST_FRAMES = 5
FRAME_MS, LAST_FRAME_MS = 90, 2500


def evenly_spread(count: int, *, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to `count` - 1, ascending, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


class Stages:
    """Takes the images of each stage and keeps at most `limit` of the stages, evenly spread, and always the last.

    Whenever it is full, it lets every second stage go and takes half as many from there on, so it need not know how
    many will come.

    Args:
        limit: Stages kept at most, at least 3.
    """

    def __init__(self, limit: int) -> None:
        if limit < 3:
            raise ValueError(f"limit must be at least 3 stages, got {limit}")
        self._limit = limit
        self._every = 1
        self._kept: dict[int, Images] = {}
        self._last: tuple[int, Images] | None = None

    def add(self, stage: int, images: Images) -> None:
        """Take `[N, H, W, C]` uint8 of a stage; stages count from 0."""
        self._last = stage, images
        if stage % self._every == 0:
            self._kept[stage] = images
        if len(self._kept) == self._limit:
            self._every *= 2
            self._kept = {number: kept for number, kept in self._kept.items() if number % self._every == 0}

    @property
    def numbers(self) -> list[int]:
        """The stages that are kept, ascending."""
        return sorted({*self._kept, *([self._last[0]] if self._last else [])})

    @property
    def frames(self) -> Images:
        """`[stages, N, H, W, C]` uint8 of the stages that are kept.

        Raises:
            ValueError: if there was none.
        """
        if self._last is None:
            raise ValueError("there are no stages")
        kept = self._kept | dict([self._last])
        return np.stack([kept[number] for number in self.numbers])


def images_in_gif(image_size: int) -> int:
    """How many square images a frame has room for: 25, or the square number that fits."""
    side = min(5, math.isqrt(GIF_PIXELS) // (image_size + 1))
    return max(1, side) ** 2


def denoising_gif(frames: Images) -> bytes:
    """A GIF that shows a grid of images form, and starts anew after a pause.

    Args:
        frames: `[stages, N, H, W, C]` uint8, most noise first.

    Returns:
        A GIF file of less than 1 MB for images up to 256 x 256; stages are left out if it takes that.
    """
    columns = math.isqrt(frames.shape[1])
    size = image_grid(frames[-1], columns=columns).shape
    factor = max(1, math.isqrt(GIF_PIXELS) // max(size[:2]))
    room = max(FEWEST_FRAMES, GIF_BYTES * 8 // (GIF_BITS * size[0] * size[1] * factor**2))
    chosen = frames[evenly_spread(len(frames), most=room)]
    grids = [image_grid(stage, columns=columns).repeat(factor, axis=0).repeat(factor, axis=1) for stage in chosen]
    pictures = _in_few_colours(grids)
    while len(data := _gif(pictures)) > GIF_BYTES and len(pictures) > FEWEST_FRAMES:
        pictures = [*pictures[:-1:2], pictures[-1]]
    return data


def _in_few_colours(grids: list[Images]) -> list[Image.Image]:
    """Pictures of few colours, which a GIF stores in few bits: greys, or those of the last grid."""
    if grids[0].shape[-1] == 1:
        step = 255 / (GIF_COLOURS - 1)
        return [Image.fromarray((np.round(grid[..., 0] / step) * step).astype(np.uint8)) for grid in grids]
    palette = Image.fromarray(grids[-1]).quantize(GIF_COLOURS)
    return [Image.fromarray(grid).quantize(palette=palette, dither=Image.Dither.NONE) for grid in grids]


def _gif(pictures: list[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()
