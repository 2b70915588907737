"""What is learnt of the rows while they are written, and the manifest that says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data import row
from ncsn.data.manifest import MANIFEST, Manifest, Part, load_manifest, schema_words
from ncsn.data.row import Images, SplitDigest
from ncsn.data.source import Source
from ncsn.data.statistics import ImageSample, PixelStatistics
from ncsn.data.suggestion import sample_size, suggestions
from ncsn.errors import UserError

LEAST_IMAGES = 2
SHAPING = ("source", "image_size", "channels", "convert_channels", "test_fraction", "max_images", "on_bad_image")
"""The data settings that decide the content of a dataset."""


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


@dataclass
class SplitSummary:
    """What is learnt of a split, row by row in its order."""

    statistics: PixelStatistics
    class_counts: np.ndarray
    sample: ImageSample
    digest: SplitDigest = field(default_factory=SplitDigest)
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, data: DataConfig) -> SplitSummary:
        """Of no rows yet."""
        sample = ImageSample(sample_size(data.image_size**2 * data.channels))
        return cls(PixelStatistics(data.channels), np.zeros(len(source.class_names), np.int64), sample)

    def update(self, rows: Images) -> None:
        """Append rows."""
        self.digest.update(rows)
        self.statistics.update(rows.images)
        self.sample.update(rows.images)
        self.class_counts += np.bincount(rows.labels[rows.labels >= 0], minlength=len(self.class_counts))

    def require_enough(self, split: str, source: Source, data: DataConfig) -> None:
        """Refuse a split that nothing can be learnt from.

        Raises:
            UserError: if it has fewer than 2 images.
        """
        if self.digest.count < LEAST_IMAGES:
            skipped = f" ({len(source.skipped)} did not decode)" if source.skipped else ""
            raise UserError(
                "data.source",
                f"gives {self.digest.count} image(s) for the {split} split{skipped}; at least {LEAST_IMAGES} are "
                "needed",
                hint="add images, or change data.test_fraction",
                value=data.source,
            )


def publish_dataset(
    source: Source,
    splits: Mapping[str, SplitSummary],
    folder: str,
    *,
    name: str,
    data: DataConfig,
    publish: Callable[[Manifest, str], bool],
) -> Dataset:
    """Give the written rows their place, unless the store holds them already.

    Args:
        source: Where they come from.
        splits: What was learnt of them.
        folder: URI of the folder that holds all versions of this dataset.
        name: Name of the dataset.
        data: The settings that the source was opened with.
        publish: Publishes parts and manifest at a URI; False if a complete dataset was there before it.
    """
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
    created = publish(manifest, uri)
    return Dataset(uri, manifest if created else load_manifest(uri), created)


def _describe(source: Source, splits: Mapping[str, SplitSummary], *, name: str, data: DataConfig) -> Manifest:
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
        settings={key: settings[key] for key in SHAPING},
    )
