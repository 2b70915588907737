"""What is learned of the rows while they are written: statistics, a sample, noise levels, the manifest."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ncsn import storage
from ncsn.config import Config, from_yaml
from ncsn.config.noise import AutoNoiseConfig
from ncsn.config.schema import DataConfig
from ncsn.core.keyed_random import Stream, keyed_permutation, keyed_uniform
from ncsn.core.noise_schedule import NoiseSuggestion, PairDistances, largest_distance, pair_distances, suggest_noise
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
from ncsn.data.sources.base import BadImages, Source, Split, image_shape
from ncsn.errors import UserError

Progress = Callable[[int, int], None]

# All other settings of `data`, also those to come, decide which images a dataset has. A setting that a config may lack
# (`ADDED`) counts only if it is given, so that datasets written before it are found.
_WITHOUT_EFFECT = {
    "root", "download", "rows_per_part", "loader", "window_images", "dequantize", "logit_transform", "horizontal_flip",
    "augmentation", "num_classes",
}  # fmt: skip
LEAST_IMAGES = 2

MOST_IMAGES = 60_000
_MOST_VALUES = MOST_IMAGES * 32 * 32 * 3  # bytes of the images that are kept for the largest distance
_MOST_WORK = 2e11  # multiplications for it: some seconds on two CPU cores; real images need a tenth of it
_FEW, _FEW_WORK = 2_000, 6e9  # images compared in pairs for the percentile, and multiplications that this may take
_GRAY_STEPS = 256


def shaping_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that decide the content of a dataset, as plain values."""
    return {name: value for name, value in data.model_dump(mode="json").items() if name not in _WITHOUT_EFFECT}


class PixelStatistics:
    """Counts of each of the 256 pixel values, channel by channel."""

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, _GRAY_STEPS), np.int64)

    def update(self, images: np.ndarray) -> None:
        """Count the pixels of uint8 images [N, H, W, C]."""
        for channel, counts in enumerate(self.counts):
            plane = np.ascontiguousarray(images[..., channel]).reshape(1, -1)
            # Pillow counts bytes as they are; np.bincount makes an int64 of each first, which takes six times as long.
            counts += np.array(Image.fromarray(plane).histogram(), np.int64)

    def facts(self) -> dict[str, Any]:
        """Fields of a manifest; `std` is the standard deviation of the population."""
        values = np.arange(_GRAY_STEPS, dtype=np.float64) / (_GRAY_STEPS - 1)
        pixels, found = self.counts.sum(axis=1), np.flatnonzero(self.counts.sum(axis=0))
        mean = self.counts @ values / pixels
        std = np.sqrt(np.maximum(self.counts @ values**2 / pixels - mean**2, 0.0))
        return {"mean": mean.tolist(), "std": std.tolist(), "minimum": int(found[0]), "maximum": int(found[-1])}


class ImageSample:
    """A random sample of at most `size` images of a stream, a function of their order alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._places: list[tuple[float, int, int]] = []  # minus an image's random number, its index, its row below
        self._rows = np.empty(0, np.uint8)

    def update(self, images: np.ndarray) -> None:
        """Offer uint8 images [N, H, W, C]."""
        if not self.count:
            self._rows = np.empty((self.size, *images.shape[1:]), np.uint8)  # takes memory where it is written
        # Each image has a random number; those with the smallest stay.
        keys = keyed_uniform(0, stream=Stream.SUBSET, first=self.count, count=len(images), size=1)[:, 0].numpy()
        full = len(self._places) == self.size
        # Once the sample is full, few images still have a chance.
        for index in np.flatnonzero(keys < -self._places[0][0]) if full else range(len(keys)):
            key, number, row = -float(keys[index]), self.count + int(index), len(self._places)
            if row < self.size:
                heapq.heappush(self._places, (key, number, row))
            elif key > self._places[0][0]:
                row = self._places[0][2]
                heapq.heapreplace(self._places, (key, number, row))
            else:
                continue
            self._rows[row] = images[index]
        self.count += len(images)

    @property
    def complete(self) -> bool:
        """Whether the sample is all images."""
        return self.count == len(self._places)

    @property
    def images(self) -> np.ndarray:
        """The sample, uint8 [N, H, W, C], not in the stream's order."""
        return self._rows[: len(self._places)]

    def some(self, count: int) -> np.ndarray:
        """At most `count` of the images, a random choice in the stream's order."""
        rows = np.array([row for _, _, row in sorted(self._places, key=lambda place: place[1])], np.int64)
        chosen: np.ndarray = self._rows[rows[np.sort(keyed_permutation(0, epoch=0, size=len(rows))[:count])]]
        return chosen


def sample_size(values_per_image: int) -> int:
    """How many images ingest keeps to compare them: 60,000, fewer where they are large."""
    return max(2, min(MOST_IMAGES, _MOST_VALUES // values_per_image))


def suggestions(sample: ImageSample) -> dict[str, NoiseSuggestion]:
    """Noise levels for the images as they are (`plain`) and with mirrored ones (`mirrored`); none if all are alike."""
    images = torch.from_numpy(sample.images)
    few = torch.from_numpy(sample.some(max(2, min(_FEW, math.isqrt(int(_FEW_WORK / images[0].numel()))))))
    found = {}
    for name, flips in (("plain", False), ("mirrored", True)):
        maximum, exact = largest_distance(images, flips=flips, most_work=_MOST_WORK)
        if maximum <= AutoNoiseConfig(kind="auto").sigma_L:
            return {}
        distances = replace(
            pair_distances(few, flips=flips), maximum=maximum, num_images=len(images), exact=sample.complete and exact
        )
        found[name] = suggest_noise(distances, dimension=images[0].numel())
    return found


def resolve_noise(config: Config, manifest: Manifest) -> Config:
    """The config with the levels that `noise: auto` stands for; any other config as it is."""
    noise = config.noise
    if not isinstance(noise, AutoNoiseConfig):
        return config
    distances, dimension = _distances(config, manifest), math.prod(manifest.shape)
    suggestion = suggest_noise(distances, dimension=dimension, sigma_L=noise.sigma_L, overlap=noise.overlap)
    training = noise.training.model_dump(mode="json")
    tree = config.model_dump(mode="json") | {"noise": {**noise_section(suggestion), "training": training}}
    return from_yaml(json.dumps(tree), origin="the config with the levels of noise: auto")


def noise_section(suggestion: NoiseSuggestion) -> Mapping[str, Any]:
    """The config's section `noise` for a suggestion."""
    return {"sigma_1": suggestion.sigma_1, "sigma_L": suggestion.sigma_L, "num_levels": suggestion.num_levels}


def _distances(config: Config, manifest: Manifest) -> PairDistances:
    found = manifest.suggested_noise
    if found is None:
        raise UserError(
            "noise",
            f"needs the distances between the images, and the dataset {manifest.name}/{manifest.digest} was "
            "ingested before they were kept",
            hint="`ncsn ingest` under another --run NAME adds them",
            value="auto",
        )
    if not found:
        raise UserError(
            "noise",
            f"finds no levels: the images of {manifest.name}/{manifest.digest} are all alike",
            hint="give noise.sigma_1, noise.sigma_L and noise.num_levels",
            value="auto",
        )
    return PairDistances(**found["mirrored" if config.data.horizontal_flip else "plain"]["distances"])


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
