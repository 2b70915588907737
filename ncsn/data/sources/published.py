"""Datasets that are published as Parquet files of encoded images, as on the Hugging Face Hub; and datasets of a store.

The names of the files or of their folders tell the splits. Which columns hold images and labels is found by their
types, their usual names, and the Hub's metadata in the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL, SkippedImage, group_lengths, load_manifest, pieces_of, pixel_shape
from ncsn.data.pixels import BadImageError, Fit, Picture, decode
from ncsn.data.sources.base import Example, Source, hold_out
from ncsn.data.sources.image_files import Encoded, fit_in_order
from ncsn.data.sources.image_folder import class_names_of
from ncsn.data.sources.listing import Listed, first_file, list_files, required_root
from ncsn.errors import UserError

SUFFIX = ".parquet"
_THREADS = 16
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_NO_LABELS = "none"  # data.label_column of images without labels
_IMAGE_NAMES = ("image", "img", "picture", "photo", "png", "jpg", "jpeg", "webp")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "cls")
_OTHER_MEDIA = ("Audio", "Video", "Pdf", "Nifti")  # the Hub's features that are `{bytes, path}` too
_BATCH_ROWS = 32  # values in memory at a time, of a page that may hold more
_BUFFER = 8 << 20  # bytes of one read
_NO_SUCH = "AWS Error"  # what Arrow says when a bucket fails, and not the file

ImageKind = Literal["bytes", "struct", "pixels"]
Features = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ParquetFile:
    """A file as it was when the source was opened."""

    uri: str
    listed: Listed
    rows: int = 0  # until it is opened

    def name(self, row: int) -> str:
        return f"{self.uri}:row {row}"


class Columns(NamedTuple):
    image: str
    kind: ImageKind  # encoded, in a struct with them, or the pixels of a dataset of ours
    label: str | None  # None for images without labels
    numbers: bool  # whether the labels are whole numbers, not words
    class_names: tuple[str, ...] | None  # of label 0, 1, ...; None if the file does not say


class _Found(NamedTuple):
    """A file with what was learned at its opening."""

    file: ParquetFile
    columns: Columns
    words: list[str]  # its labels as they are there, all different; numbers in decimals
    places: NDArray[np.int64]  # row -> place in `words`, -1 for none


def open_parquet(data: DataConfig) -> Source:
    """The images in the Parquet files of data.root, a folder or `s3://bucket/prefix`, or in one file, in their order.

    Without a test split the validation images are it, and without these data.test_fraction of each class is held out.
    """
    root = storage.absolute(required_root(data))
    files = _find(root)
    with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
        found = list(pool.map(partial(_survey, data=data), files.values()))
    first = found[0]
    for one in found:
        if one.columns != first.columns:
            mine, its = first.columns, one.columns
            what = "column of labels" if mine[:2] == its[:2] else "column of images"
            what = what if mine[:4] != its[:4] else "list of class names"
            raise UserError(
                one.file.uri,
                f"has another {what} than {first.file.uri}",
                hint="set data.root to the files of one dataset",
            )
    class_names, terms = first.columns.class_names, "as the owner of the images says"
    if first.columns.kind == "pixels":
        try:  # files of a store of ours do not name the classes
            manifest = load_manifest(root)
            class_names, terms = tuple(manifest.class_names), manifest.license
        except FileNotFoundError:
            pass
    if class_names is None and first.columns.label is not None:
        words = {word for one in found for word in one.words}
        class_names = class_names_of(words - {_nothing(first.columns)}, numbers=True)
    return Source(
        description=f"Parquet files of images, resized to {data.image_size}x{data.image_size}",
        license=terms,
        class_names=class_names or (),
        splits=_splits(dict(zip(files, found, strict=True)), class_names or (), data),
    )


def locate_files(data: DataConfig) -> str:
    root = storage.absolute(required_root(data))
    path = first_file(root, (SUFFIX,))
    if path is None:
        _find(root)  # says what is wrong
    return root if storage.is_file(root) else f"{root}, such as {path}"


def _find(root: str) -> dict[str, ParquetFile]:
    """Path below the root -> file, in the order of the paths."""
    listed = list_files(root)
    if root.lower().endswith(SUFFIX) and storage.is_file(root):
        return {one.path: ParquetFile(root, one) for one in listed}
    files = {one.path: ParquetFile(storage.join(root, one.path), one) for one in listed}
    parquet = {path: file for path, file in files.items() if path.lower().endswith(SUFFIX)}
    if not parquet:
        held = f"holds {len(files)} other files (such as {next(iter(files))!r}) but" if files else "is empty:"
        raise UserError("data.root", f"{held} no file that ends in {SUFFIX}", value=root)
    return parquet


def _survey(file: ParquetFile, *, data: DataConfig) -> _Found:
    with opened(file, ahead=True) as parquet:
        file = replace(file, rows=parquet.metadata.num_rows)
        columns = choose_columns(parquet.schema_arrow, data, uri=file.uri)
        if columns.label is None:
            return _Found(file, columns, [], np.full(file.rows, NO_LABEL, np.int64))
        encoded = parquet.read(columns=[columns.label]).column(0).cast(pa.string()).combine_chunks().dictionary_encode()
        encoded.dictionary.validate(full=True)  # that it is UTF-8
        places = encoded.indices.fill_null(NO_LABEL).to_numpy(zero_copy_only=False)
        return _Found(file, columns, encoded.dictionary.to_pylist(), places.astype(np.int64))


def choose_columns(schema: pa.Schema, data: DataConfig, *, uri: str) -> Columns:
    """The columns of the config, else those that their types, usual names and the Hub's metadata point to."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        features = {}
    kinds = {field.name: kind for field in schema if (kind := _image_kind(field))}
    marked = [name for name in kinds if features.get(name, {}).get("_type") == "Image"]
    others = [name for name in kinds if features.get(name, {}).get("_type") not in _OTHER_MEDIA]
    image = _choose(data.image_column, list(kinds), marked or others, _IMAGE_NAMES, schema, "data.image_column", uri)
    if image is None:
        raise UserError(
            uri,
            f"has no column of images: {_shown(schema)}",
            hint="expected encoded images as binary or as {bytes, path}",
        )
    if data.label_column == _NO_LABELS:
        return Columns(image, kinds[image], None, numbers=False, class_names=None)
    possible = [field.name for field in schema if _is_label(field.type)]
    marked = [name for name in possible if features.get(name, {}).get("_type") == "ClassLabel"]
    others = [name for name in possible if name.lower() in _LABEL_NAMES]
    label = _choose(data.label_column, possible, marked or others, _LABEL_NAMES, schema, "data.label_column", uri)
    names = features.get(label, {}).get("names") if label else None
    return Columns(
        image,
        kinds[image],
        label,
        numbers=label is not None and pa.types.is_integer(schema.field(label).type),
        class_names=tuple(map(str, names)) if isinstance(names, list) and names else None,
    )


def _choose(
    given: str | None,
    possible: Sequence[str],
    found: Sequence[str],
    usual: Sequence[str],
    schema: pa.Schema,
    key: str,
    uri: str,
) -> str | None:
    """The column that the config gives, else the only one found, else the only one of these with a usual name."""
    if given is not None:
        if given not in possible:
            raise UserError(key, f"is not such a column of {uri}, which has {_shown(schema)}", value=given)
        return given
    named = [name for name in found if name.lower() in usual]
    if len(found) > 1 and len(named) != 1:
        raise UserError(key, f"is not set, and {uri} has several such columns", hint=f"set it to {' or '.join(found)}")
    return (found if len(found) == 1 else named or [None])[0]


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)[:300] or "no columns"


def _is_label(kind: pa.DataType) -> bool:
    types, value = pa.types, kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (types.is_integer, types.is_string, types.is_large_string, types.is_string_view)
    return any(check(value) for check in checks)


def _image_kind(field: pa.Field) -> ImageKind | None:
    kind = field.type
    if _is_bytes(kind):
        return "bytes"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type):
        return "struct"
    shape = pixel_shape(field)
    return "pixels" if shape is not None and len(shape) == 3 and shape[2] in (1, 3) else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _nothing(columns: Columns) -> str:
    """The word for no label; -1 as the Hub writes it."""
    return str(NO_LABEL) if columns.numbers else ""


def _labels_of(one: _Found, class_names: Sequence[str]) -> NDArray[np.int64]:
    """The label of each row of a file; -1 for none."""
    if one.columns.label is None:
        return one.places
    classes = map(str, range(len(class_names))) if one.columns.numbers else class_names
    labels = {name: number for number, name in enumerate(classes)} | {_nothing(one.columns): NO_LABEL}
    for place, word in enumerate(one.words):
        if word not in labels:
            name = one.file.name(int(np.flatnonzero(one.places == place)[0]))
            raise UserError(name, f"has the label {word!r}, which is none of the {len(class_names)} classes")
    table = np.array([*(labels[word] for word in one.words), NO_LABEL], np.int64)
    return table[one.places]  # place -1 is the last


def _splits(found: Mapping[str, _Found], class_names: Sequence[str], data: DataConfig) -> dict[str, ParquetImages]:
    def images(chosen: Iterable[_Found]) -> ParquetImages:
        chosen = list(chosen)
        labels = np.concatenate([_labels_of(one, class_names) for one in chosen])
        columns, files = chosen[0].columns, [one.file for one in chosen]
        return ParquetImages(files, columns.image, columns.kind, np.arange(len(labels)), labels, Fit.of(data))

    named: dict[str | None, list[_Found]] = {}
    places: dict[str, dict[str | None, ParquetFile]] = {}
    for path, one in found.items():
        place, split = place_of(path)
        named.setdefault(split, []).append(one)
        places.setdefault(place, {})[split] = one.file
    if len(named) == 1:
        every = images(found.values())
        # Named by their places, so that the choice does not depend on how the rows are cut into files.
        chosen = hold_out([f"row {row}" for row in range(len(every))], every.labels.tolist(), data.test_fraction)
        return {
            split: replace(every, rows=every.rows[rows], labels=every.labels[rows]) for split, rows in chosen.items()
        }
    if None in named:
        other = next(files[0].file.uri for split, files in named.items() if split is not None)
        raise UserError(
            named[None][0].file.uri,
            f"names no split, unlike {other}",
            hint="put train or test into its name or that of its folder, or remove it",
        )
    if "train" not in named:
        raise UserError(
            named["test"][0].file.uri,
            "is of the test split, and there are files of the validation split but none of the train split",
            hint="add them, or point data.root at one of the splits",
        )
    # Several configurations or folds share images: one's test images would train another.
    whole = [place for place, splits in places.items() if len(splits) > 1]
    if len(whole) > 1:
        raise UserError(
            next(iter(places[whole[1]].values())).uri,
            f"is of another dataset than those in {whole[0] or 'the folder itself'!r}: both have splits",
            hint="set data.root to the folder of one of them",
        )
    return {"train": images(named["train"]), "test": images(named.get("test") or named["validation"])}


def place_of(path: str) -> tuple[str, str | None]:
    """The folder that holds the split, and the split, by a word in the file's name, else in the nearest folder's."""
    parts = path.removesuffix(SUFFIX).split("/")
    for depth in reversed(range(len(parts))):
        words = re.findall("[a-z]+", parts[depth].lower())
        splits = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
        if len(splits) == 1:
            return "/".join(parts[:depth]), splits.pop()
    return "", None


@contextmanager
def opened(file: ParquetFile, *, ahead: bool = False) -> Iterator[pq.ParquetFile]:
    """The open file; until the block ends it must stay the one that was listed.

    With `ahead`, all that a call reads is asked for at once, and kept; else it is read and forgotten piece by piece.
    """
    filesystem, path = storage.filesystem(file.uri)
    _require_unchanged(file)
    buffer = 0 if ahead else _BUFFER
    try:
        with pq.ParquetFile(
            path, filesystem=filesystem, pre_buffer=ahead, buffer_size=buffer, page_checksum_verification=True
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
    column: str
    kind: ImageKind
    rows: NDArray[np.int64]  # ascending, counted through all files
    labels: NDArray[np.int64]  # of these rows
    fit: Fit
    in_tasks: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.rows)

    def section(self, first: int, last: int) -> ParquetImages:
        return replace(self, rows=self.rows[first:last], labels=self.labels[first:last])

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        return fit_in_order(self._encoded(), self.fit, cores=cores)

    def _encoded(self) -> Iterator[Encoded]:
        labels = iter(self.labels.tolist())
        for number, _, rows in pieces_of(self.rows, (file.rows for file in self.files)):
            file = self.files[number]
            with opened(file) as parquet:
                for group, of_group, within in pieces_of(rows, group_lengths(parquet)):  # others are not read
                    values = self._group(parquet, group, within)
                    for row, value in zip(rows[of_group].tolist(), values, strict=True):
                        yield Encoded(file.name(row), next(labels), partial(_load, value, self.fit))

    def _group(self, parquet: pq.ParquetFile, group: int, rows: NDArray[np.int64]) -> Iterator[Any]:
        leaf = f"{self.column}.bytes" if self.kind == "struct" else self.column
        before = 0
        # Without Arrow's threads, since the images are decoded on all cores meanwhile.
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
            first, last = np.searchsorted(rows, [before, before + len(batch)])
            for row in (rows[first:last] - before).tolist():
                scalar = batch.column(0)[row]
                if not scalar.is_valid:
                    yield None
                elif self.kind == "pixels":
                    yield np.frombuffer(scalar.as_buffer(), np.uint8).reshape(pixel_shape(batch.schema.field(0)))
                else:
                    yield (scalar["bytes"] if self.kind == "struct" else scalar).as_py()
            before += len(batch)
            if last == len(rows):
                return


def _load(value: bytes | NDArray[np.uint8] | None, fit: Fit) -> Picture:
    if value is None:
        raise BadImageError("there is no image in this row")
    if isinstance(value, bytes):
        return decode(value, least_side=fit.least_side)
    return Picture(Image.fromarray(value[..., 0] if value.shape[2] == 1 else value))
