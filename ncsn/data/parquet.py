"""The Parquet parts of a dataset: writing one block by block, and reading rows back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.data.format import (
    PARQUET_OPTIONS,
    Manifest,
    Part,
    Rows,
    SkippedImage,
    from_table,
    group_lengths,
    image_shape_of,
    load_manifest,
    pieces_of,
    schema,
    to_table,
)
from ncsn.data.sources.base import BadImages
from ncsn.errors import InvalidValue, NotFound, UserError

_BLOCK_BYTES = 2 << 20
_SKIPPED = b"ncsn.skipped"
_CONVERSIONS = b"ncsn.conversions"


@contextmanager
def part_writer(path: Path, shape: tuple[int, int, int], bad: BadImages) -> Iterator[Callable[[Rows], None]]:
    """Gives what writes a block of rows to a local file, which records in the end what of its range is `bad`."""
    with pq.ParquetWriter(path, schema(*shape), **PARQUET_OPTIONS) as writer:
        yield lambda rows: writer.write_table(to_table(rows), row_group_size=len(rows))
        skipped = json.dumps([asdict(image) for image in bad.skipped])
        writer.add_key_value_metadata({_SKIPPED: skipped, _CONVERSIONS: json.dumps(bad.conversions)})


def inspect_part(part_uri: str) -> tuple[int, BadImages]:
    """Rows of a part, and the images that were left out of it or converted."""
    with _open(part_uri) as file:
        rows, notes = file.metadata.num_rows, file.metadata.metadata
    skipped = [SkippedImage(**image) for image in json.loads(notes[_SKIPPED])]
    return rows, BadImages(skip=True, skipped=skipped, conversions=Counter(json.loads(notes[_CONVERSIONS])))


def _open(part_uri: str) -> pq.ParquetFile:
    filesystem, path = storage.filesystem(part_uri)
    return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True)


@contextmanager
def _open_part(uri: str, part: Part, *, shape: tuple[int, int, int]) -> Iterator[pq.ParquetFile]:
    part_uri, again = storage.join(uri, part.path), f"delete {uri} and ingest again"
    try:
        with _open(part_uri) as file:
            found = file.metadata.num_rows, image_shape_of(file.schema_arrow)
            if found != (part.rows, shape):
                raise InvalidValue(f"it holds {found[0]} images of {found[1]}, not {part.rows} of {shape}")
            yield file
    except FileNotFoundError:
        raise NotFound(part_uri, "no file here", hint=again) from None
    except (pa.ArrowInvalid, InvalidValue) as error:
        raise UserError(part_uri, f"is not the Parquet file that was ingested: {error}", hint=again) from error


def block_rows(shape: Sequence[int]) -> int:
    """Rows of a block, a few megabytes."""
    return max(1, _BLOCK_BYTES // math.prod(shape))


def read_part(uri: str, part: Part, *, shape: tuple[int, int, int]) -> Iterator[Rows]:
    """The rows of a part of the dataset at `uri`, row group by row group."""
    with _open_part(uri, part, shape=shape) as file:
        for group in range(file.num_row_groups):
            yield from_table(file.read_row_group(group))


def read_blocks(uri: str, split: str) -> Iterator[Rows]:
    """The rows of a split in their order, a few megabytes at a time."""
    manifest = load_manifest(uri)
    for part in manifest.parts[split]:
        yield from read_part(uri, part, shape=manifest.shape)


def read_split(uri: str, split: str, *, rows: range | None = None) -> Rows:
    manifest = load_manifest(uri)
    every = range(manifest.count(split))
    return read_rows(uri, split, np.array(every if rows is None else every[rows.start : rows.stop]), manifest=manifest)


def read_rows(uri: str, split: str, rows: np.ndarray, *, manifest: Manifest) -> Rows:
    """The images at `rows` [N] of a split, in any order, with their labels."""
    images, labels = np.empty((len(rows), *manifest.shape), np.uint8), np.empty(len(rows), np.int64)
    order, parts = np.argsort(rows), manifest.parts[split]
    for number, of_part, in_part in pieces_of(rows[order], (part.rows for part in parts)):
        with _open_part(uri, parts[number], shape=manifest.shape) as file:
            for group, of_group, within in pieces_of(in_part, group_lengths(file)):
                held, places = from_table(file.read_row_group(group)), order[of_part][of_group]
                images[places], labels[places] = held.images[within], held.labels[within]
    return Rows(images, labels)
