"""Datasets as Parquet parts with a manifest: writing one from a source, and reading it back."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data import format
from ncsn.data.format import MANIFEST, Images, Manifest, Part, SkippedImage, load_manifest
from ncsn.data.source import Example, Source
from ncsn.data.statistics import Dataset, SplitSummary, publish_dataset
from ncsn.errors import UserError

_BLOCK_BYTES = 2 << 20
_SKIPPED = b"ncsn.skipped"
# Arrow keeps uint8 in 32-bit Parquet integers; splitting their bytes lets the compressor drop the three that are zero.
_WRITER = {
    # Decoded once: a JPEG decode per epoch costs more than training a small network, and raw bytes have one digest
    # everywhere.
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": {f"{format.IMAGE}.list.element": "BYTE_STREAM_SPLIT"},
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
        self._writer = pq.ParquetWriter(path, format.schema(*shape), **_WRITER)
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
        self._pending = self._thread.submit(self._writer.write_table, format.to_table(rows), row_group_size=len(rows))
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
        if file.metadata.num_rows != part.rows or not file.schema_arrow.equals(format.schema(*shape)):
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
                yield format.from_table(file.read_row_group(group).slice(low, high - low))
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


Progress = Callable[[int, int], None]


def write_dataset(
    source: Source, folder: str, *, name: str, data: DataConfig, on_progress: Progress | None = None
) -> Dataset:
    """Write a source as Parquet parts, or find that its content is in the store already.

    The rows go to a scratch folder on the same disk while their digest is computed, so the source is read once; the
    dataset appears at `<folder>/<digest>` whole or not at all.

    Args:
        source: The images.
        folder: URI of the folder that holds all versions of this dataset.
        name: Name of the dataset.
        data: The settings that the source was opened with.
        on_progress: Called with (images read, images offered).

    Raises:
        UserError: if the source turns out to be damaged, or gives a split fewer than 2 images.
        OSError: if the disk is full.
    """
    with storage.scratch_folder(folder) as scratch:
        splits = _write_splits(source, scratch, data=data, on_progress=on_progress)

        def publish(manifest: Manifest, uri: str) -> bool:
            (scratch / MANIFEST).write_text(manifest.to_json())
            return storage.publish_folder(scratch, uri, marker=MANIFEST)

        return publish_dataset(source, splits, folder, name=name, data=data, publish=publish)


def read_split(uri: str, split: str, *, limit: int | None = None) -> Images:
    """All rows of a split, or the first `limit`.

    Raises:
        NotFound: if there is no complete dataset at `uri`.
        UserError: if the dataset is damaged, or has no such split.
    """
    manifest = load_manifest(uri)
    count = manifest.count(split) if limit is None else min(limit, manifest.count(split))
    images, labels = np.empty((count, *manifest.shape), np.uint8), np.empty(count, np.int64)
    first = 0
    for block in read_blocks(uri, split, manifest=manifest):
        taken = min(len(block), count - first)
        images[first : first + taken], labels[first : first + taken] = block.images[:taken], block.labels[:taken]
        first += taken
        if first == count:
            break
    return Images(images, labels)


def read_blocks(uri: str, split: str, *, manifest: Manifest | None = None) -> Iterator[Images]:
    """The rows of a split in their order, a few megabytes at a time.

    Raises:
        NotFound: if there is no complete dataset at `uri`.
        UserError: if a part does not hold what the manifest says, or there is no such split.
    """
    manifest = manifest or load_manifest(uri)
    manifest.count(split)
    for part in manifest.parts[split]:
        yield from read_part(uri, part, shape=manifest.shape)


def read_rows(uri: str, split: str, *, first: int, count: int, manifest: Manifest) -> Images:
    """Rows `first .. first + count` of a split, reading only the row groups that hold them.

    Raises:
        UserError: if a part does not hold what the manifest says.
    """
    images, labels = np.empty((count, *manifest.shape), np.uint8), np.empty(count, np.int64)
    place = 0
    for part in manifest.parts[split]:
        low, high = max(first - place, 0), min(first + count - place, part.rows)
        if low < high:
            start = place + low - first
            for block in read_part(uri, part, shape=manifest.shape, rows=range(low, high)):
                stop = start + len(block)
                images[start:stop], labels[start:stop] = block.images, block.labels
                start = stop
        place += part.rows
    return Images(images, labels)


class Counter:
    """Counts the images of all splits towards what they offer.

    Args:
        source: What offers them.
        on_progress: Called with (images read, images offered).
    """

    def __init__(self, source: Source, on_progress: Progress | None) -> None:
        self.done, self.total = 0, sum(split.count for split in source.splits.values())
        self._on_progress = on_progress
        self.add(0)

    def add(self, count: int) -> None:
        """So many more were read."""
        self.done += count
        if self._on_progress is not None:
            self._on_progress(min(self.done, self.total), self.total)

    def finish(self) -> None:
        """All were read; some of them may not have decoded."""
        self.add(self.total - self.done)


def _write_splits(
    source: Source, scratch: Path, *, data: DataConfig, on_progress: Progress | None
) -> dict[str, SplitSummary]:
    counter = Counter(source, on_progress)
    splits = {}
    for name, split in source.splits.items():
        summary = SplitSummary.of(source, data)
        _write_parts(split.stream(), scratch, name, summary=summary, data=data, report=counter.add)
        summary.require_enough(name, source, data)
        splits[name] = summary
    counter.finish()
    return splits


def _write_parts(
    examples: Iterator[Example],
    scratch: Path,
    split: str,
    *,
    summary: SplitSummary,
    data: DataConfig,
    report: Callable[[int], None],
) -> None:
    shape = (data.image_size, data.image_size, data.channels)
    most = block_rows(shape)
    (scratch / split).mkdir()
    while block := take(examples, min(most, data.rows_per_part)):
        path = part_name(split, len(summary.parts))
        with PartWriter(scratch / path, shape) as writer:
            while block is not None:
                writer.write(block)
                summary.update(block)
                report(len(block))
                block = take(examples, min(most, data.rows_per_part - writer.rows))
        summary.parts.append(Part(path, writer.rows))
