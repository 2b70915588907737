"""Datasets as Parquet parts with a manifest: writing one from a source, and reading it back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data import row
from ncsn.data.manifest import MANIFEST, Manifest, Part, load_manifest, schema_words
from ncsn.data.row import Images, SplitDigest
from ncsn.data.source import Example, Source
from ncsn.data.statistics import ImageSample, PixelStatistics
from ncsn.data.suggestion import sample_size, suggestions

Progress = Callable[[int, int], None]

_BLOCK_BYTES = 2 << 20
_LEAST_IMAGES = 2
_SHAPING = ("source", "image_size", "channels", "convert_channels", "test_fraction", "max_images", "on_bad_image")
# Arrow keeps uint8 in 32-bit Parquet integers; splitting their bytes lets the compressor drop the three that are zero.
_WRITER = {
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": {f"{row.IMAGE}.list.element": "BYTE_STREAM_SPLIT"},
}


@dataclass(frozen=True)
class Dataset:
    """A dataset in the store.

    Attributes:
        uri: Its folder, `<folder>/<digest>`.
        manifest: What it holds.
        created: False if it was there already and nothing was written.
    """

    uri: str
    manifest: Manifest
    created: bool


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
        ValueError: if the source turns out to be damaged, or gives a split fewer than 2 images.
        OSError: if the disk is full.
    """
    with storage.scratch_folder(folder) as scratch:
        splits = _write_splits(source, scratch, data=data, on_progress=on_progress)
        manifest = _describe(source, splits, name=name, data=data)
        uri = storage.join(folder, manifest.digest)
        there = load_manifest(uri) if storage.exists(storage.join(uri, MANIFEST)) else None
        if there is not None and there.suggested_noise is not None:
            return Dataset(uri, there, created=False)
        suggested = suggestions(splits["train"].sample)
        if there is not None:
            there = replace(there, suggested_noise=suggested)
            storage.write_text(storage.join(uri, MANIFEST), there.to_json())
            return Dataset(uri, there, created=False)
        manifest = replace(manifest, suggested_noise=suggested)
        (scratch / MANIFEST).write_text(manifest.to_json())
        created = storage.publish_folder(scratch, uri, marker=MANIFEST)
    return Dataset(uri, manifest if created else load_manifest(uri), created)


def read_split(uri: str, split: str, *, limit: int | None = None) -> Images:
    """All rows of a split, or the first `limit`.

    Raises:
        FileNotFoundError: if there is no complete dataset at `uri`.
        ValueError: if the dataset is damaged, or has no such split.
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
        FileNotFoundError: if there is no complete dataset at `uri`.
        ValueError: if a part does not hold what the manifest says, or there is no such split.
    """
    manifest = manifest or load_manifest(uri)
    manifest.count(split)
    expected = row.schema(*manifest.shape)
    for part in manifest.parts[split]:
        part_uri = storage.join(uri, part.path)
        filesystem, path = storage.filesystem(part_uri)
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
            if file.metadata.num_rows != part.rows or not file.schema_arrow.equals(expected):
                raise ValueError(
                    f"{part_uri} holds {file.metadata.num_rows} rows of {file.schema_arrow.names}, but the manifest "
                    f"says {part.rows} images of {manifest.shape}; it is damaged: delete {uri} and ingest again"
                )
            for group in range(file.num_row_groups):
                yield row.from_table(file.read_row_group(group))


@dataclass
class _SplitSummary:
    """What is learnt of a split while it is written."""

    statistics: PixelStatistics
    class_counts: np.ndarray
    sample: ImageSample
    digest: SplitDigest = field(default_factory=SplitDigest)
    parts: list[Part] = field(default_factory=list)

    def update(self, rows: Images) -> None:
        self.digest.update(rows)
        self.statistics.update(rows.images)
        self.sample.update(rows.images)
        self.class_counts += np.bincount(rows.labels[rows.labels >= 0], minlength=len(self.class_counts))


def _write_splits(
    source: Source, scratch: Path, *, data: DataConfig, on_progress: Progress | None
) -> dict[str, _SplitSummary]:
    total = sum(split.count for split in source.splits.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(min(done, total), total)

    report(0)
    splits = {}
    for name, split in source.splits.items():
        sample = ImageSample(sample_size(data.image_size**2 * data.channels))
        summary = _SplitSummary(PixelStatistics(data.channels), np.zeros(len(source.class_names), np.int64), sample)
        _write_parts(split.stream(), scratch, name, summary=summary, data=data, report=report)
        if summary.digest.count < _LEAST_IMAGES:
            skipped = f" ({len(source.skipped)} did not decode)" if source.skipped else ""
            raise ValueError(
                f"data.source {data.source} gives {summary.digest.count} image(s) for the {name} split{skipped}; "
                f"at least {_LEAST_IMAGES} are needed: add images, or change data.test_fraction"
            )
        splits[name] = summary
    if on_progress is not None:
        on_progress(total, total)
    return splits


def _write_parts(
    examples: Iterator[Example],
    scratch: Path,
    split: str,
    *,
    summary: _SplitSummary,
    data: DataConfig,
    report: Callable[[int], None],
) -> None:
    shape = (data.image_size, data.image_size, data.channels)
    schema = row.schema(*shape)
    block_rows = max(1, _BLOCK_BYTES // int(np.prod(shape)))
    (scratch / split).mkdir()
    while block := _take(examples, min(block_rows, data.rows_per_part)):
        path = f"{split}/part-{len(summary.parts):05d}.parquet"
        rows = 0
        with pq.ParquetWriter(scratch / path, schema, **_WRITER) as writer:
            while block is not None:
                writer.write_table(row.to_table(block), row_group_size=len(block))
                summary.update(block)
                rows += len(block)
                report(len(block))
                block = _take(examples, min(block_rows, data.rows_per_part - rows))
        summary.parts.append(Part(path, rows))


def _take(examples: Iterator[Example], count: int) -> Images | None:
    """The next `count` rows, or as many as are left; None for none."""
    rows = list(itertools.islice(examples, count))
    if not rows:
        return None
    return Images(
        np.stack([example.image for example in rows]), np.array([example.label for example in rows], np.int64)
    )


def _describe(source: Source, splits: dict[str, _SplitSummary], *, name: str, data: DataConfig) -> Manifest:
    shape = (data.image_size, data.image_size, data.channels)
    content = {split: summary.digest.hexdigest() for split, summary in splits.items()}
    train = splits["train"].statistics
    settings = data.model_dump(mode="json")
    return Manifest(
        name=name,
        digest=row.dataset_digest(shape=shape, class_names=source.class_names, splits=content),
        image_size=data.image_size,
        channels=data.channels,
        counts={split: summary.digest.count for split, summary in splits.items()},
        class_names=list(source.class_names),
        class_counts={split: summary.class_counts.tolist() for split, summary in splits.items()},
        mean=train.mean,
        std=train.std,
        minimum=train.minimum,
        maximum=train.maximum,
        skipped=list(source.skipped),
        parts={split: summary.parts for split, summary in splits.items()},
        content=content,
        schema=schema_words(*shape),
        source=source.description,
        license=source.license,
        settings={key: settings[key] for key in _SHAPING},
    )
