"""One Parquet part of a dataset: writing it from blocks of rows, and reading it back block by block."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.data import row
from ncsn.data.manifest import Part, SkippedImage
from ncsn.data.row import Images
from ncsn.data.source import Example
from ncsn.errors import UserError

_BLOCK_BYTES = 2 << 20
_SKIPPED = b"ncsn.skipped"
# Arrow keeps uint8 in 32-bit Parquet integers; splitting their bytes lets the compressor drop the three that are zero.
_WRITER = {
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": {f"{row.IMAGE}.list.element": "BYTE_STREAM_SPLIT"},
}


def part_name(split: str, number: int) -> str:
    """Path of a part below the dataset's folder."""
    return f"{split}/part-{number:05d}.parquet"


class PartWriter:
    """Writes blocks of rows to a local Parquet file, each while the caller makes the next. A context manager.

    Args:
        path: The file.
        shape: (H, W, C) of an image.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.rows = 0
        self._writer = pq.ParquetWriter(path, row.schema(*shape), **_WRITER)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parquet")
        self._pending: Future[None] | None = None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._settle()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def write(self, rows: Images) -> None:
        """Append a block."""
        self._settle()
        self._pending = self._thread.submit(self._writer.write_table, row.to_table(rows), row_group_size=len(rows))
        self.rows += len(rows)

    def note_skipped(self, skipped: Sequence[SkippedImage]) -> None:
        """Leave in the file which images of its range of the source are not in it."""
        if skipped:
            self._settle()
            self._writer.add_key_value_metadata({_SKIPPED: json.dumps([asdict(image) for image in skipped])})

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def block_rows(shape: Sequence[int]) -> int:
    """Rows of a block, a few megabytes."""
    return max(1, _BLOCK_BYTES // math.prod(shape))


def take(examples: Iterator[Example], count: int) -> Images | None:
    """The next `count` rows, or as many as are left; None for none."""
    rows = list(itertools.islice(examples, count))
    if not rows:
        return None
    return Images(
        np.stack([example.image for example in rows]), np.array([example.label for example in rows], np.int64)
    )


def read_part(uri: str, part: Part, *, shape: tuple[int, int, int], rows: range | None = None) -> Iterator[Images]:
    """The rows of a part of the dataset at `uri`, or a range of them, block by block.

    Raises:
        UserError: if it does not hold what the manifest says.
    """
    part_uri = storage.join(uri, part.path)
    with _open(part_uri) as file:
        if file.metadata.num_rows != part.rows or not file.schema_arrow.equals(row.schema(*shape)):
            raise UserError(
                part_uri,
                f"holds {file.metadata.num_rows} rows of {file.schema_arrow.names}, but the manifest says "
                f"{part.rows} images of {shape}",
                hint=f"delete {uri} and ingest again",
            )
        wanted = range(part.rows) if rows is None else rows
        place = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            low, high = max(wanted.start - place, 0), min(wanted.stop - place, count)
            if low < high:
                yield row.from_table(file.read_row_group(group).slice(low, high - low))
            place += count


def inspect_part(part_uri: str) -> tuple[int, list[SkippedImage]]:
    """Rows of a part, and the images that were left out of it.

    Raises:
        FileNotFoundError: if there is none.
    """
    with _open(part_uri) as file:
        skipped = (file.metadata.metadata or {}).get(_SKIPPED, b"[]")
        return file.metadata.num_rows, [SkippedImage(**image) for image in json.loads(skipped)]


def _open(part_uri: str) -> pq.ParquetFile:
    filesystem, path = storage.filesystem(part_uri)
    return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True)
