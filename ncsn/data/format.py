"""The format of a dataset: its rows, which of them are equal, their digest, its manifest, and its Parquet parts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config.schema import Pixels
from ncsn.errors import InvalidValue, NotFound, UserError, shown_value

IMAGE = "image"
LABEL = "label"
NAME = "name"  # of the file below the source's root; empty if it has none
SPLITS = ("train", "test")
NO_LABEL = -1
CLASS_NAMES = "classes.json"  # beside folders of images: the name of the class of each

DIGEST_VERSION = 2
DIGEST_LENGTH = 16

MANIFEST = "manifest.json"  # of a dataset or of samples, written last
FORMAT_VERSION = 5
# Limits of a part: small enough to share the work, and large enough for few files.
PART_IMAGES, PART_BYTES = 16_384, 192 << 20
DAMAGED = "delete the dataset and ingest again"
_SHAPE, _DTYPE, _LIMITS = b"shape", b"dtype", b"limits"
# Images are decoded once: a JPEG decode per epoch costs more than training a small network, and raw bytes have one
# digest everywhere. As bytes they take a third of the time that Arrow needs for its tensors.
PARQUET_OPTIONS = {"compression": "zstd", "use_dictionary": False, "write_statistics": [LABEL]}

Hashes = NDArray[np.uint64]
NO_HASHES: Hashes = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Rows:
    images: np.ndarray  # uint8, uint16 or float32 [N, H, W, C]
    labels: np.ndarray  # int64 [N], index into the class names, or -1 for none

    def __len__(self) -> int:
        return len(self.labels)


def image_hashes(images: NDArray[Any]) -> Hashes:
    """A hash of the stored bytes of each of N images [N, H, W, C], by which equal images are known.

    Any two of ten million are the same by a chance of 3e-6.
    """
    return np.frombuffer(b"".join(hashlib.blake2b(each.tobytes(), digest_size=8).digest() for each in images), "<u8")


def equal_in_words(repeated: Mapping[str, int], counts: Mapping[str, int], *, left_out: int = 0) -> str:
    """How many of `counts` images of each kind equal an earlier one; and how many test images are left out for it."""
    found = [
        f"{few:,} of {counts[kind]:,} {kind} images repeat{'s' * (few == 1)} another, so {counts[kind] - few:,} differ"
        for kind, few in repeated.items()
        if few
    ]
    out = f"{left_out:,} left out of the test split as equal to a training image or its mirror image"
    return "; ".join([*found, *[out] * bool(left_out)])


def are_among(hashes: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """[N] whether each of N hashes is one of the others, which ascend."""
    return np.asarray(np.searchsorted(others, hashes) < np.searchsorted(others, hashes, side="right"))


def schema(pixels: Pixels) -> pa.Schema:
    facts = {_SHAPE: json.dumps(pixels.shape), _DTYPE: pixels.dtype, _LIMITS: json.dumps(pixels.limits)}
    images = pa.field(IMAGE, pa.binary(pixels.num_bytes), nullable=False, metadata=facts)
    return pa.schema([images, pa.field(LABEL, pa.int64(), nullable=False)])


def class_slug(label: int, names: Sequence[str]) -> str:
    """The class as part of a path or key, whatever its name holds: `03-T-shirt-top`. All differ, and sort by label."""
    number = f"{label:0{len(str(len(names) - 1))}}"
    return f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', names[label]).strip('-')[:40]}".rstrip("-")


def part_images(pixels: Pixels) -> int:
    return min(PART_IMAGES, max(1, PART_BYTES // pixels.num_bytes))


def pixels_of(field: pa.Field) -> Pixels | None:
    """How the images of a column of a dataset are stored; None for another column."""
    try:
        facts = field.metadata or {}
        shape, limits = (tuple(json.loads(facts[name])) for name in (_SHAPE, _LIMITS))
        pixels = Pixels(shape, facts[_DTYPE].decode(), limits)
        return pixels if len(shape) == 3 and min(shape) > 0 and field.type == pa.binary(pixels.num_bytes) else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def image_pixels_of(columns: pa.Schema) -> Pixels:
    """How the images of a file of ours are stored; `InvalidValue` if it is none."""
    pixels = pixels_of(columns.field(IMAGE)) if IMAGE in columns.names else None
    if pixels is None:
        raise InvalidValue(f"has no images among its columns {', '.join(f'{one.name}: {one.type}' for one in columns)}")
    return pixels


def to_table(rows: Rows, limits: tuple[float, float] = (0, 255)) -> pa.Table:
    columns = schema(Pixels(rows.images.shape[1:], str(rows.images.dtype), limits))
    buffers = [None, pa.py_buffer(np.ascontiguousarray(rows.images))]
    pixels = pa.FixedSizeBinaryArray.from_buffers(columns.field(IMAGE).type, len(rows), buffers)
    return pa.Table.from_arrays([pixels, pa.array(rows.labels)], schema=columns)


def from_table(table: pa.Table) -> Rows:
    """Inverse of `to_table`. The result may share the table's memory."""
    pixels = image_pixels_of(table.schema)
    shape, size = pixels.shape, math.prod(pixels.shape)
    pieces = [
        np.frombuffer(chunk.buffers()[1], pixels.dtype, len(chunk) * size, chunk.offset * pixels.num_bytes)
        for chunk in table.column(IMAGE).chunks
    ]
    images = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, pixels.dtype)])
    return Rows(images.reshape(-1, *shape), table.column(LABEL).to_numpy())


def group_lengths(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def pieces_of(rows: NDArray[np.int64], lengths: Iterable[int]) -> Iterator[tuple[int, slice, NDArray[np.int64]]]:
    """Of consecutive pieces of these lengths those that hold any of `rows`, ascending.

    Yields:
        Number of the piece, which of the rows it holds, and their places in it.
    """
    before = 0
    for number, count in enumerate(lengths):
        first, last = np.searchsorted(rows, [before, before + count])
        if first < last:
            yield number, slice(first, last), rows[first:last] - before
        before += count


@dataclass(frozen=True)
class Part:
    """One Parquet file, by its path below the dataset's folder."""

    path: str
    rows: int
    digest: str  # SHA-256 of all pixels, and after them all labels as little-endian int64


@dataclass(frozen=True)
class SkippedImage:
    """An image of the source that cannot be used."""

    name: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A dataset, as `manifest.json` describes it."""

    name: str
    digest: str  # of the parts' digests, shape and class names
    pixels: Pixels
    counts: Mapping[str, int]  # images of each split
    class_names: Sequence[str]  # of label 0, 1, ...; empty if there are no labels
    class_counts: Mapping[str, Sequence[int]]  # images of each class in each split
    skipped: Sequence[SkippedImage]
    parts: Mapping[str, Sequence[Part]]
    source: str  # what the images are, in words
    license: str
    owner: str  # empty if nobody says
    url: str  # where they are from; likewise
    settings: Mapping[str, Any]  # the data settings that decide the content
    # The largest distance between images, by which `noise: auto` chooses: as they are (`plain`) and with mirrored ones
    # (`mirrored`). Empty if all images are alike.
    suggested_noise: Mapping[str, Any]
    conversions: Mapping[str, int]  # what pixels lost, and had to become (see `Picture`) -> number of images
    repeated: Mapping[str, int]  # images of each split that equal an earlier one of it
    left_out: int  # test images that equal a training image or, where training mirrors, its mirror image

    @property
    def unlabeled(self) -> int:
        """Images without a label, where others have one."""
        return sum(self.counts.values()) - sum(map(sum, self.class_counts.values())) if self.class_names else 0

    @property
    def equal_images(self) -> str:
        """How many images equal others, in words; empty if none does."""
        return equal_in_words(self.repeated, self.counts, left_out=self.left_out)

    def count(self, split: str) -> int:
        """Images of a split, which must exist."""
        if split not in self.counts:
            raise InvalidValue(f"dataset {self.name} has no split {split!r}; it has {', '.join(self.counts)}")
        return self.counts[split]


def load_manifest(uri: str) -> Manifest:
    """The manifest of the dataset at `uri`; `NotFound` if there is no complete one."""
    try:
        fields = storage.read_json(storage.join(uri, MANIFEST))
    except FileNotFoundError:
        raise NotFound(uri, "no dataset here", hint="run `ncsn ingest` first") from None
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(uri, f"the dataset has format version {version}, not {FORMAT_VERSION}", hint=DAMAGED)
    if not storage.DIGEST.fullmatch(digest := str(fields["digest"])):  # it becomes the name of a folder
        raise UserError(uri, f"its digest is {shown_value(digest)}, which is none", hint=DAMAGED)
    pixels = fields["pixels"]
    fields["pixels"] = Pixels(tuple(pixels["shape"]), pixels["dtype"], tuple(pixels["limits"]))
    fields["skipped"] = [SkippedImage(**image) for image in fields["skipped"]]
    fields["parts"] = {split: [Part(**part) for part in parts] for split, parts in fields["parts"].items()}
    return Manifest(**fields)


@contextmanager
def open_images(
    uri: str, *, rows: int | None = None, pixels: Pixels | None = None, hint: str
) -> Iterator[pq.ParquetFile]:
    """A Parquet file of ours; of `rows` images that are stored so, where it is given."""
    filesystem, path = storage.filesystem(uri)
    try:
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
            found = file.metadata.num_rows, image_pixels_of(file.schema_arrow)
            if rows not in (None, found[0]) or pixels not in (None, found[1]):
                raise InvalidValue(f"it holds {found[0]} images of {found[1]}, not {rows} of {pixels or found[1]}")
            yield file
    except FileNotFoundError:
        raise NotFound(uri, "no file here", hint=hint) from None
    except (pa.ArrowInvalid, InvalidValue) as error:
        raise UserError(uri, f"is not the Parquet file that was written: {error}", hint=hint) from error


def read_part(uri: str, part: Part, pixels: Pixels) -> Iterator[Rows]:
    """The rows of a part of the dataset at `uri`, a few megabytes at a time, and an error if they are not those."""
    digest: Any = hashlib.sha256()
    labels, place = np.empty(0, "<i8"), storage.join(uri, part.path)
    with open_images(place, rows=part.rows, pixels=pixels, hint=DAMAGED) as file:
        for group in range(file.num_row_groups):
            rows = from_table(file.read_row_group(group))
            digest.update(np.ascontiguousarray(rows.images))
            labels = np.append(labels, rows.labels)
            yield rows
    digest.update(labels)
    if digest.hexdigest() != part.digest:
        raise UserError(place, "does not have the content of the manifest", hint=DAMAGED)


def read_rows(file: pq.ParquetFile, rows: NDArray[np.int64]) -> Rows:
    """The images at `rows`, ascending; reads each row group that holds one."""
    pixels = image_pixels_of(file.schema_arrow)
    found = Rows(np.empty((len(rows), *pixels.shape), pixels.dtype), np.empty(len(rows), np.int64))
    for group, of_group, within in pieces_of(rows, group_lengths(file)):
        held = from_table(file.read_row_group(group))
        found.images[of_group], found.labels[of_group] = held.images[within], held.labels[within]
    return found


def read_split(uri: str, split: str, rows: Sequence[int] | NDArray[np.int64] | None = None) -> Rows:
    """The images at `rows` [N] of a split, in any order, with their labels; None = all."""
    manifest = load_manifest(uri)
    wanted = np.asarray(range(manifest.count(split)) if rows is None else rows, np.int64)
    pixels = manifest.pixels
    images = np.empty((len(wanted), *pixels.shape), pixels.dtype)
    labels = np.empty(len(wanted), np.int64)
    order, parts = np.argsort(wanted), manifest.parts[split]
    for number, of_part, in_part in pieces_of(wanted[order], (part.rows for part in parts)):
        place = storage.join(uri, parts[number].path)
        with open_images(place, rows=parts[number].rows, pixels=pixels, hint=DAMAGED) as file:
            held, places = read_rows(file, in_part), order[of_part]
        images[places], labels[places] = held.images, held.labels
    return Rows(images, labels)
