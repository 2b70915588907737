"""From a source to a dataset in the store: its rows as Parquet parts, what is learned of them, and its manifest.

Which images a part holds is decided before any of them is read, so any process can write it, and write it again. The
parts are read in their order while later ones are written: digest, statistics and sample are those of one pass.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import (
    DIGEST_LENGTH,
    DIGEST_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    PARQUET_OPTIONS,
    Manifest,
    Part,
    Rows,
    SkippedImage,
    SplitDigest,
    from_table,
    load_manifest,
    open_images,
    part_images,
    schema,
    to_table,
)
from ncsn.data.noise_levels import MOST_IMAGES, ImageSample, suggestions
from ncsn.data.pixels import PIXELS_VERSION
from ncsn.data.sources.base import BadImages, Source, Split
from ncsn.errors import UserError
from ncsn.progress import Progress

# All other settings of `data`, also those to come, decide which images a dataset has.
_WITHOUT_EFFECT = {"root", "download", "dequantize", "horizontal_flip", "augmentation", "num_classes"}
LEAST_IMAGES = 2
_BLOCK_BYTES = 2 << 20  # of pixels that are in memory at a time
# A part notes which images were left out of it, and what others lost.
_SKIPPED, _CONVERSIONS = b"ncsn.skipped", b"ncsn.conversions"


def shaping_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that decide the content of a dataset, as plain values."""
    return {name: value for name, value in data.model_dump(mode="json").items() if name not in _WITHOUT_EFFECT}


@dataclass(frozen=True)
class Dataset:
    uri: str  # its folder, `<folder>/<digest>`
    manifest: Manifest
    created: bool  # False if it was there already and nothing was written


@dataclass(frozen=True)
class PartWriter:
    images: Split
    uri: str
    near: str  # folder on the same disk for scratch files
    data: DataConfig

    def write(self, *, cores: int | None = None) -> Iterator[Rows]:
        """Write the part, and publish it after its last block; gives each block while it is being written."""
        pixels = self.data.pixels
        block_rows = max(1, _BLOCK_BYTES // pixels.num_bytes)
        bad = BadImages(skip=self.data.on_bad_image == "skip")
        examples = bad.filter(self.images.stream(cores=cores))
        with storage.scratch_folder(self.near) as scratch:
            file = scratch / "part.parquet"
            with pq.ParquetWriter(file, schema(pixels), **PARQUET_OPTIONS) as writer:
                while rows := list(itertools.islice(examples, block_rows)):
                    images = np.stack([example.image for example in rows])
                    block = Rows(images, np.array([example.label for example in rows], np.int64))
                    writer.write_table(to_table(block, pixels.limits), row_group_size=len(block))
                    yield block
                skipped = json.dumps([asdict(image) for image in bad.skipped])
                writer.add_key_value_metadata({_SKIPPED: skipped, _CONVERSIONS: json.dumps(bad.conversions)})
            storage.publish_file(file, self.uri)


class _Statistics:
    """Of pixels, by channel."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum, self._squares = np.zeros((2, channels))
        self.minimum, self.maximum = math.inf, -math.inf

    def update(self, images: np.ndarray) -> None:
        """Add images [N, H, W, C]."""
        values = images.reshape(-1, images.shape[3])
        self._count += len(values)
        self._sum += values.sum(axis=0, dtype=np.float64)
        self._squares += np.einsum("nc,nc->c", values, values, dtype=np.float64)
        self.minimum, self.maximum = min(self.minimum, images.min().item()), max(self.maximum, images.max().item())

    def scaled(self, limits: tuple[float, float]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, with these limits as 0 and 1."""
        low, high = limits
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0.0))
        return ((mean - low) / (high - low)).tolist(), (std / (high - low)).tolist()


WriteParts = Callable[[Iterable[PartWriter]], Iterator[object]]


def write_dataset(
    source: Source,
    folder: str,
    *,
    name: str,
    data: DataConfig,
    fingerprint: str | None = None,
    write_parts: WriteParts | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Write a source's images as Parquet parts and publish them at `<folder>/<digest>`, unless they are there already.

    The dataset appears whole or not at all.

    Args:
        source: The images.
        folder: URI of the folder that holds all versions of this dataset.
        name: Name of the dataset.
        data: The settings that the source was opened with.
        fingerprint: Of the source's files. With it, an ingestion that was stopped goes on where it was, and files that
            gave a dataset before are not read again. Every writer then reaches `folder`.
        write_parts: Writes parts elsewhere, and yields in their order each time that one is in the store; None = here.
        progress: Is told of images.
    """
    if fingerprint is None:
        with storage.scratch_folder(folder) as scratch:
            return _write(source, folder, str(scratch), name, data, write_parts, progress or Progress())
    key = storage.digest([fingerprint, shaping_settings(data) | {"root": data.root}, PIXELS_VERSION], 16)
    receipt, staging = storage.join(folder, f".ingested-{key}.json"), storage.join(folder, f".parts-{key}")
    if (known := _known(folder, receipt)) is not None:
        return known
    try:
        dataset = _write(source, folder, staging, name, data, write_parts, progress or Progress())
    except FileNotFoundError:
        # Another process that ingests the same images was faster and moved the parts to their place.
        if (known := _known(folder, receipt)) is None:
            raise
        return known
    storage.write_json(receipt, {"digest": dataset.manifest.digest})
    storage.delete(staging)
    return dataset


def _known(folder: str, receipt: str) -> Dataset | None:
    """The dataset that these files gave before, if it is still there."""
    try:
        uri = storage.join(folder, storage.read_json(receipt)["digest"])
        return Dataset(uri, load_manifest(uri), created=False)
    except FileNotFoundError:
        return None


def _write(
    source: Source,
    folder: str,
    staging: str,
    name: str,
    data: DataConfig,
    write_parts: WriteParts | None,
    progress: Progress,
) -> Dataset:
    pixels, total = data.pixels, sum(map(len, source.splits.values()))
    most, near = part_images(pixels), folder if storage.is_local(folder) else staging
    progress.start(total, "images")
    bad, sample = BadImages(skip=True), ImageSample(MOST_IMAGES)
    statistics = _Statistics(data.channels)
    counts, class_counts, content, parts = dict[str, int](), dict[str, list[int]](), dict[str, str](), {}
    for split, images in source.splits.items():
        digest, labeled = SplitDigest(), np.zeros(len(source.class_names), np.int64)
        parts[split] = list[Part]()
        writers = {
            (path := f"{split}/part-{number:05d}.parquet"): PartWriter(
                images.section(first, first + most), storage.join(staging, path), near, data
            )
            for number, first in enumerate(range(0, len(images), most))
        }
        for rows in _rows_of(writers, staging, split, parts[split], bad, write_parts):
            digest.update(rows)
            labeled += np.bincount(rows.labels[rows.labels >= 0], minlength=len(labeled))
            if split == "train":
                sample.update(rows.images)
                statistics.update(rows.images)
            progress.advance(len(rows))
        if digest.count < LEAST_IMAGES:
            skipped = f" ({len(bad.skipped)} could not be used)" if bad.skipped else ""
            raise UserError(
                "data.source",
                f"gives {digest.count} image(s) for the {split} split{skipped}; at least {LEAST_IMAGES} are needed",
                hint="add images, or change data.test_fraction",
                value=data.source,
            )
        counts[split], class_counts[split], content[split] = digest.count, labeled.tolist(), digest.hexdigest()
    progress.advance(total - sum(counts.values()))
    identity = {"version": DIGEST_VERSION, "shape": pixels.shape, "class_names": source.class_names, "splits": content}
    if pixels.dtype != "uint8":
        identity |= {"dtype": pixels.dtype, "limits": pixels.limits}
    uri = storage.join(folder, dataset := storage.digest(identity, DIGEST_LENGTH))
    if storage.exists(storage.join(uri, MANIFEST)):
        return Dataset(uri, load_manifest(uri), created=False)
    mean, std = statistics.scaled(pixels.limits)
    manifest = Manifest(
        name=name,
        digest=dataset,
        pixels=pixels,
        counts=counts,
        class_names=list(source.class_names),
        class_counts=class_counts,
        mean=mean,
        std=std,
        minimum=statistics.minimum,
        maximum=statistics.maximum,
        skipped=list(bad.skipped),
        parts=parts,
        content=content,
        source=source.description,
        license=source.license,
        settings=shaping_settings(data),
        suggested_noise=suggestions(sample, pixels.limits),
        conversions=dict(sorted(bad.conversions.items())),
    )
    fields = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    storage.write_json(storage.join(staging, MANIFEST), fields, indent=1)
    created = storage.publish_folder(staging, uri, marker=MANIFEST)
    return Dataset(uri, manifest if created else load_manifest(uri), created)


def _rows_of(
    writers: dict[str, PartWriter],
    staging: str,
    split: str,
    parts: list[Part],
    bad: BadImages,
    write_parts: WriteParts | None,
) -> Iterator[Rows]:
    """The rows of a split: of the parts that this process writes, and of others as soon as they are in the store."""
    there = {f"{split}/{name}" for name in storage.list_names(storage.join(staging, split))}
    missing = {path: writer for path, writer in writers.items() if path not in there}
    written: Iterator[object] = write_parts(missing.values()) if write_parts else iter(())
    for path, writer in writers.items():
        here = path in missing and write_parts is None
        if here:
            yield from writer.write()
        elif path in missing:
            next(written)
        with open_images(writer.uri, hint="delete it and ingest again") as file:
            rows, notes = file.metadata.num_rows, file.metadata.metadata
            for group in range(0 if here else file.num_row_groups):
                yield from_table(file.read_row_group(group))
        bad.skipped.extend(SkippedImage(**image) for image in json.loads(notes[_SKIPPED]))
        bad.conversions.update(json.loads(notes[_CONVERSIONS]))
        if rows:
            parts.append(Part(path, rows))
        else:
            storage.delete(writer.uri)
