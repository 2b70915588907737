"""From the rows of a source to a dataset in the store: what is learned of them, its manifest, and its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import (
    MANIFEST,
    Manifest,
    Part,
    Rows,
    SplitDigest,
    dataset_digest,
    load_manifest,
    schema_words,
)
from ncsn.data.noise_levels import suggestions
from ncsn.data.sources.base import BadImages, Source, Split, image_shape
from ncsn.data.statistics import ImageSample, PixelStatistics, sample_size
from ncsn.errors import UserError

Progress = Callable[[int, int], None]

# All other settings of `data`, also those to come, decide which images a dataset has. A setting that a config may lack
# (`ADDED`) counts only if it is given, so that datasets written before it are found.
_WITHOUT_EFFECT = {
    "root", "download", "rows_per_part", "loader", "window_images", "dequantize", "horizontal_flip",
    "augmentation", "num_classes",
}  # fmt: skip
LEAST_IMAGES = 2


def shaping_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that decide the content of a dataset, as plain values."""
    return {name: value for name, value in data.model_dump(mode="json").items() if name not in _WITHOUT_EFFECT}


@dataclass(frozen=True)
class Dataset:
    """A dataset in the store."""

    uri: str  # its folder, `<folder>/<digest>`
    manifest: Manifest
    created: bool  # False if it was there already and nothing was written


@dataclass
class SplitSummary:
    """What is learned of a split, row by row in its order."""

    statistics: PixelStatistics
    class_counts: np.ndarray
    sample: ImageSample | None  # of the training images, to compare them
    digest: SplitDigest = field(default_factory=SplitDigest)
    parts: list[Part] = field(default_factory=list)

    def update(self, rows: Rows) -> None:
        """Append rows."""
        self.digest.update(rows)
        self.statistics.update(rows.images)
        if self.sample is not None:
            self.sample.update(rows.images)
        self.class_counts += np.bincount(rows.labels[rows.labels >= 0], minlength=len(self.class_counts))


def publish_dataset(
    source: Source,
    folder: str,
    *,
    name: str,
    data: DataConfig,
    bad: BadImages,
    write: Callable[[str, Split, list[Part]], Iterator[Rows]],
    publish: Callable[[Manifest, str], bool],
    on_progress: Progress | None,
) -> Dataset:
    """Write a source's rows and publish them at `<folder>/<digest>`, unless the store holds them already.

    Args:
        source: The images.
        folder: URI of the folder that holds all versions of this dataset.
        name: Name of the dataset.
        data: The settings that the source was opened with.
        bad: The images that `write` leaves out or converts.
        write: Gives the rows of a split block by block while it writes them, and adds its parts to the list.
        publish: Publishes parts and manifest at a URI; False if a complete dataset was there first.
        on_progress: Called with (images read, images offered).
    """
    splits = _summarize(source, data, write, bad=bad, on_progress=on_progress)
    manifest = _describe(source, splits, name=name, data=data, bad=bad)
    uri = storage.join(folder, manifest.digest)
    there = load_manifest(uri) if storage.exists(storage.join(uri, MANIFEST)) else None
    if there is not None and there.suggested_noise is not None:
        return Dataset(uri, there, created=False)
    sample = splits["train"].sample
    assert sample is not None
    suggested = {kind: asdict(suggestion) for kind, suggestion in suggestions(sample).items()}
    if there is not None:
        there = replace(there, suggested_noise=suggested)
        storage.write_text(storage.join(uri, MANIFEST), there.to_json())
        return Dataset(uri, there, created=False)
    manifest = replace(manifest, suggested_noise=suggested)
    created = publish(manifest, uri)
    return Dataset(uri, manifest if created else load_manifest(uri), created)


def _summarize(
    source: Source,
    data: DataConfig,
    write: Callable[[str, Split, list[Part]], Iterator[Rows]],
    *,
    bad: BadImages,
    on_progress: Progress | None,
) -> dict[str, SplitSummary]:
    done, total = 0, sum(map(len, source.splits.values()))
    report: Progress = on_progress or (lambda _done, _total: None)
    report(0, total)
    summaries = {}
    for name, split in source.splits.items():
        sample = ImageSample(sample_size(math.prod(image_shape(data)))) if name == "train" else None
        summary = SplitSummary(PixelStatistics(data.channels), np.zeros(len(source.class_names), np.int64), sample)
        for block in write(name, split, summary.parts):
            summary.update(block)
            done += len(block)
            report(done, total)
        if summary.digest.count < LEAST_IMAGES:
            skipped = f" ({len(bad.skipped)} could not be used)" if bad.skipped else ""
            raise UserError(
                "data.source",
                f"gives {summary.digest.count} image(s) for the {name} split{skipped}; at least {LEAST_IMAGES} are "
                "needed",
                hint="add images, or change data.test_fraction",
                value=data.source,
            )
        summaries[name] = summary
    report(total, total)
    return summaries


def _describe(
    source: Source, splits: Mapping[str, SplitSummary], *, name: str, data: DataConfig, bad: BadImages
) -> Manifest:
    shape = image_shape(data)
    content = {split: summary.digest.hexdigest() for split, summary in splits.items()}
    return Manifest(
        name=name,
        digest=dataset_digest(shape=shape, class_names=source.class_names, splits=content),
        image_size=data.image_size,
        channels=data.channels,
        counts={split: summary.digest.count for split, summary in splits.items()},
        class_names=list(source.class_names),
        class_counts={split: summary.class_counts.tolist() for split, summary in splits.items()},
        **splits["train"].statistics.facts(),
        skipped=list(bad.skipped),
        parts={split: summary.parts for split, summary in splits.items()},
        content=content,
        schema=schema_words(*shape),
        source=source.description,
        license=source.license,
        settings=shaping_settings(data),
        conversions=dict(sorted(bad.conversions.items())),
    )
