"""Pictures of images: grids, strips, panels, animations, nearest neighbors."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncsn.core.images import image_grid
from ncsn.report.page import Animation, Neighbor, Picture

Images = NDArray[np.uint8]

# Noise does not compress, so a GIF of large images gets fewer images and fewer frames.
GIF_BYTES = 1_000_000
GIF_PIXELS = 36_000  # of a frame
GIF_COLORS = 32
GIF_BITS = 7  # at most, of a pixel of noise in 32 colors after compression
FEWEST_FRAMES = 5
FRAME_MS, LAST_FRAME_MS = 90, 2500


def evenly_spread(count: int, *, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to `count` - 1, ascending, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


class Stages:
    """Keeps the images of at most `limit` stages, 3 or more, evenly spread, and always those of the last."""

    # When it is full, it drops every second stage and keeps half as many from then on. So their number may be unknown.
    def __init__(self, limit: int) -> None:
        self._limit, self._every = limit, 1
        self._kept: dict[int, Images] = {}
        self._last: dict[int, Images] = {}

    def add(self, stage: int, images: Images) -> None:
        """Take `[N, H, W, C]` uint8 of a stage, counted from 0."""
        self._last = {stage: images}
        if stage % self._every == 0:
            self._kept[stage] = images
        if len(self._kept) == self._limit:
            self._every *= 2
            self._kept = {number: kept for number, kept in self._kept.items() if number % self._every == 0}

    @property
    def numbers(self) -> list[int]:
        """The kept stages, ascending."""
        return sorted(self._kept | self._last)

    @property
    def frames(self) -> Images:
        """`[stages, N, H, W, C]` uint8 of the kept stages, at least one."""
        kept = self._kept | self._last
        return np.stack([kept[number] for number in self.numbers])


def images_in_gif(image_size: int) -> int:
    """How many images fit in a frame of a GIF: a square number up to 25."""
    side = min(5, math.isqrt(GIF_PIXELS) // (image_size + 1))
    return max(1, side) ** 2


def denoising_gif(frames: Images) -> bytes:
    """A GIF of `[stages, N, H, W, C]` uint8, most noise first; leaves out stages to stay below 1 MB up to 256 x 256."""
    columns = math.isqrt(frames.shape[1])
    size = image_grid(frames[-1], columns=columns).shape
    factor = max(1, math.isqrt(GIF_PIXELS) // max(size[:2]))
    room = max(FEWEST_FRAMES, GIF_BYTES * 8 // (GIF_BITS * size[0] * size[1] * factor**2))
    chosen = frames[evenly_spread(len(frames), most=room)]
    grids = [image_grid(stage, columns=columns).repeat(factor, axis=0).repeat(factor, axis=1) for stage in chosen]
    pictures = _in_few_colors(grids)
    while len(data := _gif(pictures)) > GIF_BYTES and len(pictures) > FEWEST_FRAMES:
        pictures = [*pictures[:-1:2], pictures[-1]]
    return data


def _in_few_colors(grids: list[Images]) -> list[Image.Image]:
    """Pictures of few colors, which a GIF stores in few bits: grays, or the colors of the last grid."""
    if grids[0].shape[-1] == 1:
        step = 255 / (GIF_COLORS - 1)
        return [Image.fromarray((np.round(grid[..., 0] / step) * step).astype(np.uint8)) for grid in grids]
    palette = Image.fromarray(grids[-1]).quantize(GIF_COLORS)
    return [Image.fromarray(grid).quantize(palette=palette, dither=Image.Dither.NONE) for grid in grids]


def _gif(pictures: list[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


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


MOST_PIXEL_BYTES = 1_000_000  # of all frames together, because noise does not compress
MOST_FRAMES = 48
FEWEST_FRAMES = 8


def animation(frames: Images, *, sigmas: Sequence[float]) -> Animation:
    """An animation of at most 48 frames; it shows fewer images where they are large.

    `frames` are `[stages, N, H, W, C]` uint8: the start, the images after each level, and last the finished ones.
    `sigmas` are those of the levels; if their number does not fit, the labels number the stages.
    """
    frames = frames[:, : max(1, MOST_PIXEL_BYTES // (FEWEST_FRAMES * frames[0, 0].size))]
    stages, count = frames.shape[:2]
    chosen = evenly_spread(stages, most=max(2, min(MOST_FRAMES, MOST_PIXEL_BYTES // frames[0].size)))
    rows = [image_grid(frames[stage], columns=count) for stage in chosen]
    height, width = rows[0].shape[:2]
    picture = Picture(
        png_bytes(np.concatenate(rows), enlarge=False),
        alt=f"{count} images at {len(chosen)} stages, from noise at the top to the finished images at the bottom",
    )
    return Animation(picture, size=(width, height), labels=[_label(stage, stages, sigmas) for stage in chosen])


def _label(stage: int, stages: int, sigmas: Sequence[float]) -> str:
    if stage == 0:
        return "start"
    if stage == stages - 1:
        return "finished"
    return f"sigma {sigmas[stage - 1]:.3g}" if len(sigmas) == stages - 1 else f"stage {stage} of {stages - 1}"


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
