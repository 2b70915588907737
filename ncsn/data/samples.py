"""Generated images as Parquet shards in a folder, `shard-<first>-<last>.parquet` for images [first, last).

They can be the source of a dataset, for a network that is trained on its own images.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn import storage
from ncsn.data.format import IMAGE, LABEL, NO_LABEL, PARQUET_OPTIONS, Rows, from_table, image_shape_of, to_table
from ncsn.errors import InvalidValue, NotFound, UserError

_BLOCK_IMAGES = 1024
_NAME = re.compile(r"shard-(\d{9})-(\d{9})\.parquet")


def shard_name(first: int, last: int) -> str:
    return f"shard-{first:09d}-{last:09d}.parquet"


def write_shard(uri: str, images: NDArray[np.uint8], *, labels: NDArray[np.int64] | None = None) -> None:
    """Publish images [N, H, W, C] as one shard, with their classes [N] if they have some."""
    buffer = io.BytesIO()
    known = np.full(len(images), NO_LABEL, np.int64) if labels is None else labels
    pq.write_table(to_table(Rows(images, known)), buffer, **PARQUET_OPTIONS)
    storage.write_bytes(uri, buffer.getvalue())


def missing_ranges(names: Sequence[str], *, num_images: int) -> list[tuple[int, int]]:
    """Index ranges [first, last) below `num_images` that no shard among `names` holds."""
    gaps, position = [], 0
    for first, last, _ in [*_ranges(names), (num_images, num_images, "")]:
        if min(first, num_images) > position:
            gaps.append((position, min(first, num_images)))
        position = max(position, last)
    return gaps


def samples_shape(uri: str, *, num_images: int) -> tuple[int, ...]:
    """(H, W, C) of the images in the folder `uri`, which must hold images `0 .. num_images`."""
    first, last, name = _shards(uri, num_images=num_images)[0]
    with _open_shard(storage.join(uri, name), count=last - first) as shard:
        return image_shape_of(shard.schema_arrow)


def read_samples(uri: str, *, num_images: int, batch_size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Images `start .. num_images` of the folder `uri` as [n, H, W, C] uint8 batches, one shard in memory at a time.

    Shards may overlap. No batch holds images of two shards.
    """
    for table in _tables(uri, [IMAGE, LABEL], num_images=num_images, start=start):
        images = from_table(table).images
        for offset in range(0, len(images), batch_size):
            yield images[offset : offset + batch_size]


def read_labels(uri: str, *, num_images: int) -> NDArray[np.int64]:
    """Class of each of images `0 .. num_images` of the folder `uri`, int64 [num_images], -1 for none."""
    return np.concatenate([table.column(LABEL).to_numpy() for table in _tables(uri, [LABEL], num_images=num_images)])


def _tables(uri: str, columns: list[str], *, num_images: int, start: int = 0) -> Iterator[pa.Table]:
    """Rows `start .. num_images`, shard by shard."""
    position = start
    for first, last, name in _shards(uri, num_images=num_images, start=start):
        with _open_shard(storage.join(uri, name), count=last - first) as shard:
            table = shard.read(columns)
        yield table.slice(position - first, min(num_images, last) - position)
        position = last


def batch_starts(uri: str, *, num_images: int, batch_size: int) -> list[int]:
    """Index of the first image of each batch that `read_samples` yields."""
    borders = [0, *(min(last, num_images) for _, last, _ in _shards(uri, num_images=num_images))]
    return [start for first, last in itertools.pairwise(borders) for start in range(first, last, batch_size)]


def _ranges(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first, last, name) of each shard, sorted."""
    found = filter(None, map(_NAME.fullmatch, names))
    return sorted((int(match[1]), int(match[2]), match[0]) for match in found)


def _shards(uri: str, *, num_images: int, start: int = 0) -> list[tuple[int, int, str]]:
    """The shards that hold images `start .. num_images`, each with images that those before it lack."""
    if not storage.exists(uri):
        raise NotFound(uri, "no samples folder here", hint="run the sample step first")
    useful, position = [], start
    for first, last, name in _ranges(storage.list_names(uri)):
        if first <= position < min(last, num_images):
            useful.append((first, last, name))
            position = last
    if not useful:
        raise UserError(uri, f"does not hold image {start}", hint="run the sample step first")
    if position < num_images:
        raise UserError(
            uri,
            f"holds images {start} to {position - 1} without a gap, but {num_images} are to be evaluated",
            hint="run the sample step again to generate the missing ones, or lower sampling.num_images",
        )
    return useful


@contextmanager
def _open_shard(uri: str, *, count: int) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.filesystem(uri)
    try:
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as shard:
            image_shape_of(shard.schema_arrow)
            if shard.metadata.num_rows != count:
                raise InvalidValue(f"it holds {shard.metadata.num_rows} images, and its name says {count}")
            yield shard
    except (pa.ArrowInvalid, InvalidValue) as error:
        raise UserError(uri, f"is not a whole shard of samples: {error}", hint="delete it and sample again") from None
