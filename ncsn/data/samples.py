"""Generated images as Parquet shards in a folder, `shard-<first>-<last>.parquet` for images [first, last).

They can be the source of a dataset, for a network that is trained on its own images.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ncsn import storage
from ncsn.config.schema import Pixels
from ncsn.core.images import BYTE, Limits, eight_bit, picture_channels
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


def samples_pixels(uri: str, *, num_images: int) -> Pixels:
    """How the images are stored in the folder `uri`, which must hold images `0 .. num_images`."""
    with _open_shard(uri, *_shards(uri, 0, num_images)[0]) as file:
        return image_pixels_of(file.schema_arrow)


def read_samples(uri: str, first: int, last: int, *, as_bytes: bool = False) -> NDArray[Any]:
    """Images `first .. last` of the folder `uri`, [n, H, W, C] as stored or `eight_bit`. Shards may overlap."""
    tables = list(_tables(uri, [IMAGE, LABEL], first, last))
    images = np.concatenate([from_table(table).images for table in tables])
    return eight_bit(images, image_pixels_of(tables[0].schema).limits) if as_bytes else images


def write_pngs(uri: str, folder: Path, *, num_images: int) -> None:
    """Write images `0 .. num_images` of the folder `uri` as `000000.png`, ... into a new or empty folder, whole."""
    folder = folder.absolute()
    starts = batch_starts(uri, num_images=num_images, batch_size=num_images)  # of the shards
    with storage.scratch_folder(str(folder.parent)) as temporary:
        for first, last in itertools.pairwise([*starts, num_images]):
            shown = picture_channels(read_samples(uri, first, last, as_bytes=True))
            for number, image in enumerate(shown, first):
                picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                picture.save(temporary / f"{number:06d}.png")
        temporary.rename(folder)


def read_labels(uri: str, *, num_images: int) -> NDArray[np.int64]:
    """Class of each of images `0 .. num_images` of the folder `uri`, int64 [num_images], -1 for none."""
    return np.concatenate([table.column(LABEL).to_numpy() for table in _tables(uri, [LABEL], 0, num_images)])


def _tables(uri: str, columns: list[str], first: int, last: int) -> Iterator[pa.Table]:
    """Rows `first .. last`, shard by shard."""
    position = first
    for start, end in _shards(uri, first, last):
        with _open_shard(uri, start, end) as file:
            table = file.read(columns)
        yield table.slice(position - start, min(last, end) - position)
        position = end


def batch_starts(uri: str, *, num_images: int, batch_size: int) -> list[int]:
    """Index of the first image of each batch of the first images. No batch holds images of two shards."""
    borders = [0, *(min(last, num_images) for _, last in _shards(uri, 0, num_images))]
    return [start for first, last in itertools.pairwise(borders) for start in range(first, last, batch_size)]


def _ranges(names: Sequence[str]) -> list[tuple[int, int]]:
    """The image ranges [first, last) of the shards among the names, sorted."""
    return sorted((int(match[1]), int(match[2])) for match in map(_NAME.fullmatch, names) if match)


def _shards(uri: str, first: int, last: int) -> list[tuple[int, int]]:
    """The ranges of the shards that hold images `first .. last`, each with images that those before it lack."""
    if not storage.exists(uri):
        raise NotFound(uri, "no samples folder here", hint="run the sample step first")
    useful, position = [], first
    for start, end in _ranges(storage.list_names(uri)):
        if start <= position < min(end, last):
            useful.append((start, end))
            position = end
    if not useful:
        raise UserError(uri, f"does not hold image {first}", hint="run the sample step first")
    if position < last:
        raise UserError(
            uri,
            f"holds images {first} to {position - 1} without a gap, but {last} are to be evaluated",
            hint="run the sample step again to generate the missing ones, or lower sampling.num_images",
        )
    return useful


def _open_shard(uri: str, first: int, last: int) -> AbstractContextManager[pq.ParquetFile]:
    place = storage.join(uri, shard_name(first, last))
    return open_images(place, rows=last - first, hint="delete it and sample again")
