"""Parquet files of encoded images: what they hold, and their values row by row.

Apart from `ncsn.data.parquet`, the format of our own datasets, whose files can be read here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ncsn import storage
from ncsn.data.format import SkippedImage, group_lengths, pieces_of, pixel_shape
from ncsn.data.pixels import BadImageError, Fit, Picture, decode
from ncsn.data.sources.base import Example
from ncsn.data.sources.image_files import Encoded, fit_in_order
from ncsn.data.sources.listing import Listed
from ncsn.errors import UserError

_BATCH_ROWS = 32  # values in memory at a time, of a page that may hold more
_BUFFER = 8 << 20  # bytes of one read
_NO_SUCH = "AWS Error"  # what Arrow says when a bucket fails, and not the file

ImageKind = Literal["bytes", "struct", "pixels"]


@dataclass(frozen=True)
class ParquetFile:
    """A file as it was when the source was opened."""

    uri: str
    listed: Listed
    rows: int = 0  # until it is opened

    def name(self, row: int) -> str:
        """A row, counted from 0, for messages."""
        return f"{self.uri}:row {row}"


class ImageColumn(NamedTuple):
    """The column of the images."""

    name: str
    kind: ImageKind

    @property
    def leaf(self) -> str:
        """What is read of it: of `{bytes, path}` the bytes."""
        return f"{self.name}.bytes" if self.kind == "struct" else self.name


def image_kind(field: pa.Field) -> ImageKind | None:
    """How a column may hold images: encoded, in a struct with them, or as uint8 [H, W, C]."""
    kind = field.type
    if _is_bytes(kind):
        return "bytes"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type):
        return "struct"
    shape = pixel_shape(field)
    return "pixels" if shape is not None and len(shape) == 3 and shape[2] in (1, 3) else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


@contextmanager
def opened(file: ParquetFile, *, ahead: bool = False) -> Iterator[pq.ParquetFile]:
    """The open file; until the block ends it must stay the one that was listed.

    With `ahead`, all that a call reads is asked for at once, and kept; else it is read and forgotten piece by piece.
    """
    filesystem, path = storage.filesystem(file.uri)
    _require_unchanged(file)
    try:
        with pq.ParquetFile(
            path,
            filesystem=filesystem,
            pre_buffer=ahead,
            buffer_size=0 if ahead else _BUFFER,
            page_checksum_verification=True,
        ) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        _require_unchanged(file)
        if isinstance(error, OSError) and (error.errno is not None or _NO_SUCH in str(error)):
            raise  # the disk or the bucket failed
        raise UserError(
            file.uri,
            f"is not a whole Parquet file: {str(error)[:200]}",
            hint="fetch it again; in a clone of a repository with `git lfs pull`",
        ) from error
    _require_unchanged(file)


def _require_unchanged(file: ParquetFile) -> None:
    filesystem, path = storage.filesystem(file.uri)
    info = filesystem.get_file_info(path)
    if not info.is_file or (info.size, info.mtime_ns or 0) != (file.listed.size, file.listed.changed):
        raise UserError(file.uri, "changed while it was read", hint="ingest again when nothing writes there")


@dataclass(frozen=True)
class ParquetImages:
    """A split whose images are rows of Parquet files. It keeps their order, so that a section is few row groups."""

    files: Sequence[ParquetFile]
    column: ImageColumn
    rows: NDArray[np.int64]  # ascending, counted through all files
    labels: NDArray[np.int64]  # of these rows
    fit: Fit
    in_tasks: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.rows)

    def section(self, first: int, last: int) -> ParquetImages:
        """Images `first .. last`."""
        return replace(self, rows=self.rows[first:last], labels=self.labels[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        """Each image; see `Split`."""
        return fit_in_order(self._encoded(), self.fit, cores=cores)

    def _encoded(self) -> Iterator[Encoded]:
        labels = iter(self.labels.tolist())
        for number, _, rows in pieces_of(self.rows, (file.rows for file in self.files)):
            file = self.files[number]
            with opened(file) as parquet:
                for group, of_group, within in pieces_of(rows, group_lengths(parquet)):  # others are not read
                    values = _group_values(parquet, group, self.column, within)
                    for row, value in zip(rows[of_group].tolist(), values, strict=True):
                        yield Encoded(file.name(row), next(labels), partial(_load, value, self.fit))


def _group_values(parquet: pq.ParquetFile, group: int, column: ImageColumn, rows: NDArray[np.int64]) -> Iterator[Any]:
    before = 0
    # Without Arrow's threads, since the images are decoded on all cores meanwhile.
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column.leaf], use_threads=False):
        first, last = np.searchsorted(rows, [before, before + len(batch)])
        shape = pixel_shape(batch.schema.field(0)) if column.kind == "pixels" else None
        for row in (rows[first:last] - before).tolist():
            value = _value(batch.column(0)[row], column.kind)
            yield value if value is None or shape is None else np.frombuffer(value, np.uint8).reshape(shape)
        before += len(batch)
        if last == len(rows):
            return


def _value(scalar: pa.Scalar, kind: ImageKind) -> Any:
    if not scalar.is_valid:
        return None
    if kind == "pixels":
        return scalar.as_buffer()
    return (scalar["bytes"] if kind == "struct" else scalar).as_py()


def _load(value: bytes | NDArray[np.uint8] | None, fit: Fit) -> Picture:
    if value is None:
        raise BadImageError("there is no image in this row")
    if isinstance(value, bytes):
        return decode(value, least_side=fit.least_side)
    return Picture(Image.fromarray(value[..., 0] if value.shape[2] == 1 else value))
