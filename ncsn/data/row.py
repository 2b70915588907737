"""One row of a dataset: its Parquet schema, its blocks in memory, and the digest of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

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
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGEST_LENGTH]
