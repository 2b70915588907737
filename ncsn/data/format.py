"""The format of a dataset: its rows, their digest, and the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ncsn import storage
from ncsn.core.noise_schedule import NoiseSuggestion, PairDistances
from ncsn.errors import NotFound, UserError

IMAGE = "image"
LABEL = "label"
SPLITS = ("train", "test")
NO_LABEL = -1

DIGEST_VERSION = 1
DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Images:
    """Images and their labels, row by row.

    Attributes:
        images: uint8 [N, H, W, C], 0..255.
        labels: int64 [N], index into the class names, or -1 for none.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def schema(height: int, width: int, channels: int) -> pa.Schema:
    """Columns `image`: fixed-shape tensor of uint8 [height, width, channels], and `label`: int64."""
    tensor = pa.fixed_shape_tensor(pa.uint8(), (height, width, channels))
    return pa.schema([pa.field(IMAGE, tensor, nullable=False), pa.field(LABEL, pa.int64(), nullable=False)])


def to_table(rows: Images) -> pa.Table:
    """Rows as an Arrow table with the dataset's schema."""
    columns = schema(*rows.images.shape[1:])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(rows.images.reshape(-1)), int(np.prod(rows.images.shape[1:])))
    tensors = pa.ExtensionArray.from_storage(columns.field(IMAGE).type, storage)
    return pa.Table.from_arrays([tensors, pa.array(rows.labels)], schema=columns)


def from_table(table: pa.Table) -> Images:
    """Inverse of `to_table`. The result may share the table's memory."""
    shape = tuple(table.schema.field(IMAGE).type.shape)
    pieces = [chunk.storage.flatten().to_numpy().reshape(-1, *shape) for chunk in table.column(IMAGE).chunks]
    images = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty((0, *shape), np.uint8)])
    return Images(images, table.column(LABEL).to_numpy())


@dataclass
class SplitDigest:
    """Running SHA-256 of a split's content in its order; how the rows are cut into blocks does not matter."""

    count: int = 0
    _images: Any = field(default_factory=hashlib.sha256, repr=False)
    _labels: Any = field(default_factory=hashlib.sha256, repr=False)

    def update(self, rows: Images) -> None:
        """Append rows."""
        self.count += len(rows)
        self._images.update(np.ascontiguousarray(rows.images, np.uint8))
        self._labels.update(np.ascontiguousarray(rows.labels, "<i8"))

    def hexdigest(self) -> str:
        """Digest of the rows so far."""
        return hashlib.sha256(self._images.digest() + self._labels.digest()).hexdigest()


def dataset_digest(*, shape: Sequence[int], class_names: Sequence[str], splits: Mapping[str, str]) -> str:
    """Digest of a whole dataset: what its rows are and mean, not how they are stored.

    Args:
        shape: [H, W, C] of an image.
        class_names: Names of the labels 0, 1, ...
        splits: Split -> `SplitDigest.hexdigest()`.

    Returns:
        The first 16 hex digits of a SHA-256.
    """
    content = {
        "version": DIGEST_VERSION,
        "shape": list(shape),
        "class_names": list(class_names),
        "splits": dict(splits),
    }
    return storage.digest(content, DIGEST_LENGTH)


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
        IMAGE: f"fixed_shape_tensor<uint8>[{height}, {width}, {channels}]",
        LABEL: "int64, index into class_names, -1 for none",
    }
