"""Generated images as Parquet shards in a folder, `shard-<first>-<last>.parquet` for images [first, last).

They can be the source of a dataset, for a network that is trained on its own images.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ncsn import storage
from ncsn.config.schema import Pixels
from ncsn.core.images import BYTE, Limits, eight_bit, image_grid, picture_channels
from ncsn.data.format import (
    IMAGE,
    LABEL,
    NO_LABEL,
    PARQUET_OPTIONS,
    Rows,
    from_table,
    image_pixels_of,
    open_images,
    to_table,
)
from ncsn.errors import NotFound, UserError

_NAME = re.compile(r"shard-(\d{9})-(\d{9})\.parquet")


def shard_name(first: int, last: int) -> str:
    return f"shard-{first:09d}-{last:09d}.parquet"


def write_shard(
    uri: str, images: NDArray[Any], *, labels: NDArray[np.int64] | None = None, limits: Limits = BYTE
) -> None:
    """Publish stored images [N, H, W, C] as one shard, with their classes [N] if they have some."""
    buffer = io.BytesIO()
    known = np.full(len(images), NO_LABEL, np.int64) if labels is None else labels
    pq.write_table(to_table(Rows(images, known), limits), buffer, **PARQUET_OPTIONS)
    storage.write_bytes(uri, buffer.getvalue())


def missing_ranges(names: Sequence[str], *, num_images: int) -> list[tuple[int, int]]:
    """Index ranges [first, last) below `num_images` that no shard among `names` holds."""
    gaps, position = [], 0
    for first, last in [*_ranges(names), (num_images, num_images)]:
        if min(first, num_images) > position:
            gaps.append((position, min(first, num_images)))
        position = max(position, last)
    return gaps


@dataclass(frozen=True)
class SampleSet:
    """The first `count` images of a samples folder, whose shards may overlap. No batch holds images of two shards."""

    uri: str
    count: int

    def pixels(self) -> Pixels:
        """How the images are stored; all of them must be there."""
        with self._open(*shards(self.uri, 0, self.count)[0]) as file:
            return image_pixels_of(file.schema_arrow)

    def starts(self, batch_size: int) -> list[int]:
        """Index of the first image of each batch, ascending from 0."""
        borders = [0, *(min(last, self.count) for _, last in shards(self.uri, 0, self.count))]
        return [start for first, last in itertools.pairwise(borders) for start in range(first, last, batch_size)]

    def table(self, first: int, last: int) -> pa.Table:
        """Images `first .. last` as the network made them, and their classes."""
        return pa.concat_tables(self._tables([IMAGE, LABEL], first, last))

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Images `first .. last`, [n, H, W, C] `eight_bit`."""
        table = self.table(first, last)
        return eight_bit(from_table(table).images, image_pixels_of(table.schema).limits)

    def labels(self) -> NDArray[np.int64]:
        """The class of each image, int64 [count], -1 for none."""
        return np.concatenate([table.column(LABEL).to_numpy() for table in self._tables([LABEL], 0, self.count)])

    def _tables(self, columns: list[str], first: int, last: int) -> Iterator[pa.Table]:
        """Rows `first .. last`, shard by shard."""
        position = first
        for start, end in shards(self.uri, first, last):
            with self._open(start, end) as file:
                table = file.read(columns)
            yield table.slice(position - start, min(last, end) - position)
            position = end

    def _open(self, first: int, last: int) -> AbstractContextManager[pq.ParquetFile]:
        place = storage.join(self.uri, shard_name(first, last))
        return open_images(place, rows=last - first, hint="delete it and sample again")


def write_pngs(uri: str, folder: Path, *, num_images: int) -> None:
    """Write images `0 .. num_images` of the folder `uri` as `000000.png`, ... into a new or empty folder, whole."""
    folder, samples = folder.absolute(), SampleSet(uri, num_images)
    starts = samples.starts(num_images)  # of the shards
    with storage.scratch_folder(str(folder.parent)) as temporary:
        for first, last in itertools.pairwise([*starts, num_images]):
            for number, image in enumerate(picture_channels(samples.read(first, last)), first):
                (temporary / f"{number:06d}.png").write_bytes(to_png(image))
        temporary.rename(folder)


GRID_PIXELS = 960  # about the side of a picture; small images are enlarged by a whole factor


def grid_png(images: NDArray[np.uint8], *, columns: int | None = None, pixels: int = GRID_PIXELS) -> bytes:
    """A PNG file of `[N, H, W, C]` images in rows, enlarged without smoothing; about square without `columns`."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    picture = np.asarray(image_grid(images, columns=columns, padding=1))
    factor = max(1, pixels // max(picture.shape[:2]))
    return to_png(picture.repeat(factor, axis=0).repeat(factor, axis=1))


def to_png(picture: NDArray[np.uint8]) -> bytes:
    """A PNG file of an image [H, W, C], gray or RGB."""
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _ranges(names: Sequence[str]) -> list[tuple[int, int]]:
    """The image ranges [first, last) of the shards among the names, sorted."""
    return sorted((int(match[1]), int(match[2])) for match in map(_NAME.fullmatch, names) if match)


def shards(uri: str, first: int, last: int) -> list[tuple[int, int]]:
    """The ranges of the shards that hold images `first .. last`, each with images that those before it lack."""
    if not storage.exists(uri):
        raise NotFound(uri, "no samples folder here", hint="run the sample step first")
    useful, position = [], first
    for start, end in _ranges(storage.list_names(uri)):
        if start <= position < min(end, last):
            useful.append((start, end))
            position = end
    if position < last:
        hint = "run the sample step again to generate the missing ones, or lower sampling.num_images"
        raise UserError(uri, f"lacks image {position} of the {last} that are asked for", hint=hint)
    return useful
