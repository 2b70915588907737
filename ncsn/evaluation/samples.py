"""Read generated images back from their Parquet shards, in order of image index."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.errors import NotFound, UserError
from ncsn.evaluation.extractors import Images

SHARD_NAME = re.compile(r"shard-(\d{9})-(\d{9})\.parquet")


def samples_shape(uri: str, *, num_images: int) -> tuple[int, ...]:
    """(H, W, C) of the images of a samples folder, from the first shard's schema.

    Raises:
        NotFound: if there is no such folder.
        UserError: if one of the images `0 .. num_images` is in no shard, or the first shard cannot be read.
    """
    _, _, name = _shards(uri, num_images=num_images)[0]
    with _shard_errors(storage.join(uri, name)):
        filesystem, path = storage.filesystem(storage.join(uri, name))
        shape: tuple[int, ...] = tuple(
            _tensor_type(pq.read_schema(path, filesystem=filesystem).field("image").type).shape
        )
    return shape


def read_samples(uri: str, *, num_images: int, batch_size: int, start: int = 0) -> Iterator[Images]:
    """Images `start .. num_images` of a samples folder as [n, H, W, C] uint8 batches, one shard in memory at a time.

    Args:
        uri: folder of files `shard-<first>-<last>.parquet` that hold images [first, last); they may overlap.
        num_images: the image after the last to read, more than `start`.
        batch_size: largest n.
        start: the first image to read.

    Raises:
        NotFound: if there is no such folder.
        UserError: if an image of the range is in no shard, or a shard does not hold what its name says.
    """
    position = start
    for first, last, name in _shards(uri, num_images=num_images, start=start):
        images = _read_shard(storage.join(uri, name), count=last - first)
        wanted = images[position - first : num_images - first]
        for offset in range(0, len(wanted), batch_size):
            yield wanted[offset : offset + batch_size]
        position += len(wanted)


def batch_starts(uri: str, *, num_images: int, batch_size: int) -> list[int]:
    """Index of the first image of each batch that `read_samples` gives.

    Raises:
        NotFound: if there is no such folder.
        UserError: if one of the images `0 .. num_images` is in no shard.
    """
    borders = [0, *(min(last, num_images) for _, last, _ in _shards(uri, num_images=num_images))]
    return [start for first, last in itertools.pairwise(borders) for start in range(first, last, batch_size)]


def _shards(uri: str, *, num_images: int, start: int = 0) -> list[tuple[int, int, str]]:
    """(first, last, name) of the shards that hold images `start .. num_images`, each adding some to those before it."""
    if not storage.exists(uri):
        raise NotFound(uri, "no samples folder here", hint="run the sample step first")
    found = filter(None, (SHARD_NAME.fullmatch(name) for name in storage.list_names(uri)))
    useful, position = [], start
    for first, last, name in sorted((int(match[1]), int(match[2]), match[0]) for match in found):
        if first <= position < min(last, num_images):
            useful.append((first, last, name))
            position = last
    if not useful:
        raise UserError(uri, f"does not hold image {start}", hint="run the sample step first")
    if position < num_images:
        raise UserError(
            uri,
            f"holds images {start} to {position - 1} without a gap, but {num_images} are to be evaluated",
            hint="run the sample step again to make what is missing, or lower sampling.num_images",
        )
    return useful


def _read_shard(uri: str, *, count: int) -> Images:
    filesystem, path = storage.filesystem(uri)
    with _shard_errors(uri):
        column = pq.read_table(path, filesystem=filesystem, columns=["image"]).column("image").combine_chunks()
        _tensor_type(column.type)
    images: Images = np.asarray(column.to_numpy_ndarray())
    if len(images) != count:
        raise UserError(uri, f"holds {len(images)} images, its name says {count}", hint="delete it and sample again")
    return images


def _tensor_type(column_type: Any) -> Any:
    if not isinstance(column_type, pa.FixedShapeTensorType) or column_type.value_type != pa.uint8():
        raise pa.ArrowInvalid(f"column 'image' is {column_type}, expected a fixed-shape tensor of uint8")
    return column_type


@contextmanager
def _shard_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(
            uri, f"is not a readable shard of samples: {error}", hint="delete it and sample again"
        ) from None
