"""The manifest of a dataset: what its Parquet parts hold. Its presence says that the dataset is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ncsn import storage
from ncsn.core.noise_schedule import NoiseSuggestion, PairDistances
from ncsn.data import row
from ncsn.errors import NotFound, UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Part:
    """One Parquet file.

    Attributes:
        path: Relative to the dataset's folder.
        rows: Images in it.
    """

    path: str
    rows: int


@dataclass(frozen=True)
class SkippedImage:
    """An image of the source that was left out.

    Attributes:
        name: Its path, or its archive and path.
        reason: Why it did not decode.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A dataset.

    Attributes:
        name: Name of the dataset.
        digest: Digest of the content, whatever the rows per part.
        image_size: Height and width in pixels.
        channels: 1 = gray, 3 = RGB.
        counts: Images of each split.
        class_names: Name of label 0, 1, ...; empty if there are no labels.
        class_counts: Images of each class, split by split.
        mean: Mean of each channel over the train split, of pixels scaled to [0, 1].
        std: Standard deviation likewise.
        minimum: Smallest pixel value of the train split, 0..255.
        maximum: Largest pixel value of the train split, 0..255.
        skipped: Images that did not decode and were left out.
        parts: Parquet files of each split.
        content: Digest of each split's rows.
        schema: Parquet columns and their types.
        source: What the images are, in words.
        license: What is known of the terms of use.
        settings: The data settings that shaped the content.
        suggested_noise: Noise levels for the images as they are (`plain`) and with mirrored ones (`mirrored`), from a
            sample of large data sets; empty if all images are alike, None in data sets of earlier versions.
    """

    name: str
    digest: str
    image_size: int
    channels: int
    counts: Mapping[str, int]
    class_names: Sequence[str]
    class_counts: Mapping[str, Sequence[int]]
    mean: Sequence[float]
    std: Sequence[float]
    minimum: int
    maximum: int
    skipped: Sequence[SkippedImage]
    parts: Mapping[str, Sequence[Part]]
    content: Mapping[str, str]
    schema: Mapping[str, str]
    source: str
    license: str
    settings: Mapping[str, Any]
    suggested_noise: Mapping[str, NoiseSuggestion] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return self.image_size, self.image_size, self.channels

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    def count(self, split: str) -> int:
        """Images of a split.

        Raises:
            ValueError: for a split that there is not.
        """
        if split not in self.counts:
            raise ValueError(f"dataset {self.name} has no split {split!r}; it has {', '.join(self.counts)}")
        return self.counts[split]


def load_manifest(uri: str) -> Manifest:
    """The manifest of the dataset at `uri`.

    Raises:
        NotFound: if there is no complete dataset.
        UserError: if it was written by another version of the format.
    """
    try:
        fields = storage.read_json(storage.join(uri, MANIFEST))
    except FileNotFoundError:
        raise NotFound(uri, "no dataset here", hint="run `ncsn ingest` first") from None
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(
            uri, f"the dataset has format version {version}, not {FORMAT_VERSION}", hint="run `ncsn ingest` again"
        )
    fields["skipped"] = [SkippedImage(**image) for image in fields["skipped"]]
    fields["parts"] = {split: [Part(**part) for part in parts] for split, parts in fields["parts"].items()}
    suggested = fields.get("suggested_noise")
    if suggested is not None:
        fields["suggested_noise"] = {name: _suggestion(values) for name, values in suggested.items()}
    return Manifest(**fields)


def _suggestion(values: dict[str, Any]) -> NoiseSuggestion:
    return NoiseSuggestion(**{**values, "distances": PairDistances(**values["distances"])})


def schema_words(height: int, width: int, channels: int) -> dict[str, str]:
    """Column -> type, for a person who reads the manifest."""
    return {
        row.IMAGE: f"fixed_shape_tensor<uint8>[{height}, {width}, {channels}]",
        row.LABEL: "int64, index into class_names, -1 for none",
    }
