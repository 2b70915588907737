"""Read generated images back from their Parquet shards, in order of image index."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.evaluation.extractors import Images

SHARD_NAME = re.compile(r"shard-(\d{9})-(\d{9})\.parquet")


def read_samples(uri: str, *, num_images: int, batch_size: int) -> Iterator[Images]:
    """Images `0 .. num_images` of a samples folder as [n, H, W, C] uint8 batches, one shard in memory at a time.

    Args:
        uri: folder of files `shard-<first>-<last>.parquet` that hold images [first, last); they may overlap.
        num_images: how many images to read.
        batch_size: largest n.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if an image of the range is in no shard, or a shard does not hold what its name says.
    """
    position = 0
    for first, last, name in _shards(uri):
        if position >= num_images:
            return
        if last <= position:
            continue
        if first > position:
            break
        images = _read_shard(storage.join(uri, name), count=last - first)
        wanted = images[position - first : num_images - first]
        for start in range(0, len(wanted), batch_size):
            yield wanted[start : start + batch_size]
        position += len(wanted)
    if position < num_images:
        raise ValueError(
            f"{uri} holds images 0 to {position - 1} without a gap, but {num_images} are to be evaluated; "
            "run the sample step again to make what is missing, or lower sampling.num_images"
            if position
            else f"{uri} does not hold image 0; run the sample step first"
        )


def _shards(uri: str) -> list[tuple[int, int, str]]:
    if not storage.exists(uri):
        raise FileNotFoundError(f"no samples folder at {uri}; run the sample step first")
    found = (SHARD_NAME.fullmatch(name) for name in storage.list_names(uri))
    return sorted((int(match[1]), int(match[2]), match[0]) for match in found if match)


def _read_shard(uri: str, *, count: int) -> Images:
    filesystem, path = storage.filesystem(uri)
    try:
        table = pq.read_table(path, filesystem=filesystem, columns=["image"])
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not a readable shard of samples: {error}; delete it and sample again") from None
    column = table.column("image").combine_chunks()
    if not isinstance(column, pa.FixedShapeTensorArray) or column.type.value_type != pa.uint8():
        raise ValueError(f"{uri}: column 'image' is {column.type}, expected a fixed-shape tensor of uint8")
    images: Images = np.asarray(column.to_numpy_ndarray())
    if len(images) != count:
        raise ValueError(f"{uri} holds {len(images)} images, its name says {count}; delete it and sample again")
    return images
