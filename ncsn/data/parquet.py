"""The Parquet parts of a dataset: writing one block by block, and reading rows back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


class PartWriter:
    """Writes blocks of rows to a local Parquet file, each while the caller makes the next. A context manager."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.rows = 0
        self._writer = pq.ParquetWriter(path, schema(*shape), **PARQUET_OPTIONS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parquet")
        self._pending: Future[None] | None = None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def write(self, rows: Rows) -> None:
        self._settle()
        self._pending = self._thread.submit(self._writer.write_table, to_table(rows), row_group_size=len(rows))
        self.rows += len(rows)

    def note(self, bad: BadImages) -> None:
        """Record in the file which images of its range of the source it does not hold, and which it converted."""
        notes = {_SKIPPED: [asdict(image) for image in bad.skipped], _CONVERSIONS: bad.conversions}
        if kept := {key: json.dumps(value) for key, value in notes.items() if value}:
            self._settle()
            self._writer.add_key_value_metadata(kept)

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def block_rows(shape: Sequence[int]) -> int:
    """Rows of a block, a few megabytes."""
    return max(1, _BLOCK_BYTES // math.prod(shape))


def read_part(uri: str, part: Part, *, shape: tuple[int, int, int]) -> Iterator[Rows]:
    """The rows of a part of the dataset at `uri`, row group by row group."""
    with _open_part(uri, part, shape=shape) as file:
        for group in range(file.num_row_groups):
            yield from_table(file.read_row_group(group))


@contextmanager
def _open_part(uri: str, part: Part, *, shape: tuple[int, int, int]) -> Iterator[pq.ParquetFile]:
    part_uri, again = storage.join(uri, part.path), f"delete {uri} and ingest again"
    try:
        with _open(part_uri) as file:
            try:
                found = image_shape_of(file.schema_arrow)
            except InvalidValue as error:
                raise UserError(part_uri, str(error), hint=again) from error
            if (file.metadata.num_rows, found) != (part.rows, shape):
                raise UserError(
                    part_uri,
                    f"holds {file.metadata.num_rows} images of {found}, but the manifest says {part.rows} of {shape}",
                    hint=again,
                )
            yield file
    except FileNotFoundError:
        raise NotFound(part_uri, "no file here", hint=again) from None
    except pa.ArrowInvalid as error:
        raise UserError(part_uri, f"is not a whole Parquet file: {str(error)[:200]}", hint=again) from error


def inspect_part(part_uri: str) -> tuple[int, BadImages]:
    """Rows of a part, and the images that were left out of it or converted."""
    with _open(part_uri) as file:
        notes = file.metadata.metadata or {}
        return file.metadata.num_rows, BadImages(
            skip=True,
            skipped=[SkippedImage(**image) for image in json.loads(notes.get(_SKIPPED, b"[]"))],
            conversions=Counter(json.loads(notes.get(_CONVERSIONS, b"{}"))),
        )


def _open(part_uri: str) -> pq.ParquetFile:
    filesystem, path = storage.filesystem(part_uri)
    return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True)


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
