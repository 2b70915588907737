"""Datasets that are published as Parquet files of encoded images, as on the Hugging Face Hub; and datasets of a store.

The names of the files or of their folders tell the splits. Which columns hold images and labels is found by their
types, their usual names, and the Hub's metadata in the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL, group_lengths, load_manifest, pieces_of, pixels_of
from ncsn.data.pixels import BadImageError, Fit, Picture, decode, require_size
from ncsn.data.sources.base import Source, hold_out, list_files, name_ranks, require_utf8, required_root, texts
from ncsn.data.sources.image_files import DecodedSplit, Encoded
from ncsn.data.sources.image_folder import class_names_of
from ncsn.errors import UserError

SUFFIX = ".parquet"
_THREADS = 16
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_NO_LABELS = "none"  # data.label_column of images without labels
_IMAGE_NAMES = ("image", "img", "picture", "photo", "png", "jpg", "jpeg", "webp")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "cls")
_OTHER_MEDIA = ("Audio", "Video", "Pdf", "Nifti")  # the Hub's features that are `{bytes, path}` too
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_WORDS = (pa.string(), pa.large_string(), pa.string_view())
_MOST_ROWS = 16  # for each byte of a file: of nothing but nulls there may be any number
_BUFFER = 8 << 20  # bytes of one read
_NO_SUCH = "AWS Error"  # what Arrow says when a bucket fails, and not the file

ImageKind = Literal["bytes", "struct", "pixels"]


@dataclass(frozen=True)
class ParquetFile:
    uri: str
    rows: int

    def name(self, row: int) -> str:
        return f"{self.uri}:row {row}"


class Columns(NamedTuple):
    image: str
    kind: ImageKind  # encoded, in a struct with them, or the pixels of a dataset of ours
    label: str | None  # None for images without labels
    numbers: bool  # whether the labels are whole numbers, not words
    class_names: tuple[str, ...] | None  # of label 0, 1, ...; None if the file does not say


class _Found(NamedTuple):
    """A file with what its opening showed."""

    file: ParquetFile
    columns: Columns
    words: list[str | None]  # the different labels, numbers in decimals; None for none
    which: NDArray[np.int64]  # of them each row has


def open_parquet(data: DataConfig) -> Source:
    """The images in the Parquet files of data.root, a folder or `s3://bucket/prefix`, or in one file, in their order.

    Without a test split the validation images are it, and without these data.test_fraction of each class is held out.
    """
    root = storage.absolute(required_root(data))
    alone = storage.is_file(root)
    paths = [path for path in texts(list_files(data)) if path.lower().endswith(SUFFIX)]
    if not paths:
        raise UserError("data.root", f"holds no file that ends in {SUFFIX}", value=root)
    uris = [root if alone else storage.join(root, path) for path in paths]
    with ThreadPoolExecutor(min(_THREADS, len(uris))) as pool:
        found = dict(zip(paths, pool.map(partial(_survey, data=data), uris), strict=True))
    first, *others = found.values()
    for one in others:
        if one.columns != first.columns:
            reason = f"has other columns of images and labels, or other class names, than {first.file.uri}"
            raise UserError(one.file.uri, reason, hint="set data.root to the files of one dataset")
    class_names, terms = first.columns.class_names, "as the owner of the images says"
    if first.columns.kind == "pixels":
        with suppress(FileNotFoundError, NotADirectoryError):  # files of a store of ours do not name the classes
            manifest = load_manifest(root)
            class_names, terms = tuple(manifest.class_names), manifest.license
    if class_names is None:
        held = {one.words[place] for one in found.values() for place in np.unique(one.which)}
        class_names = class_names_of({word for word in held if word is not None}, numbers=True)
    return Source(
        description="Parquet files of images",
        license=terms,
        class_names=class_names,
        splits=_splits(found, class_names, data),
    )


def _survey(uri: str, *, data: DataConfig) -> _Found:
    with opened(uri) as parquet:
        file = ParquetFile(uri, parquet.metadata.num_rows)
        columns = choose_columns(parquet.schema_arrow, data, uri=uri)
    if columns.label is None:
        return _Found(file, columns, [None], np.zeros(file.rows, np.int64))
    # A word stays in its dictionary, whose few bytes may be that of every row.
    with opened(uri, ahead=True, read_dictionary=[] if columns.numbers else [columns.label]) as parquet:
        column = parquet.read(columns=[columns.label]).column(0)
        if columns.numbers:
            column = column.dictionary_encode()
        column = column.unify_dictionaries().combine_chunks()
        words: list[str | None] = column.dictionary.cast(pa.string()).to_pylist()
        none = str(NO_LABEL) if columns.numbers else ""  # -1 as the Hub writes it
        words = [None if word == none else word for word in [*words, None]]
        return _Found(file, columns, words, column.indices.fill_null(len(words) - 1).to_numpy().astype(np.int64))


def choose_columns(schema: pa.Schema, data: DataConfig, *, uri: str) -> Columns:
    """The columns of the config, else those that their types, usual names and the Hub's metadata point to."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        features = {}
    types = {name: feature.get("_type") for name, feature in features.items()}
    held = f"{uri}, which has {', '.join(f'{one.name} ({one.type})' for one in schema)[:300] or 'no columns'}"
    kinds = {field.name: kind for field in schema if (kind := _image_kind(field))}
    marked = [name for name in kinds if types.get(name) == "Image"]
    others = [name for name in kinds if types.get(name) not in _OTHER_MEDIA]
    image = _choose("data.image_column", data.image_column, list(kinds), marked or others, _IMAGE_NAMES, held)
    if image is None:
        hint = "expected encoded images as binary or as {bytes, path}"
        raise UserError(uri, f"has no column of images: {held}", hint=hint)
    if data.label_column == _NO_LABELS:
        return Columns(image, kinds[image], None, numbers=False, class_names=None)
    values = {one.name: one.type.value_type if pa.types.is_dictionary(one.type) else one.type for one in schema}
    possible = [name for name, kind in values.items() if kind in _WORDS or pa.types.is_integer(kind)]
    marked = [name for name in possible if types.get(name) == "ClassLabel"]
    others = [name for name in possible if name.lower() in _LABEL_NAMES]
    label = _choose("data.label_column", data.label_column, possible, marked or others, _LABEL_NAMES, held)
    names = features.get(label, {}).get("names") if label else None
    class_names = tuple(map(str, names)) if isinstance(names, list) and names else None
    for name in class_names or ():
        require_utf8(name, key=uri)
    return Columns(
        image,
        kinds[image],
        label,
        numbers=label is not None and pa.types.is_integer(schema.field(label).type),
        class_names=class_names,
    )


def _choose(
    key: str, given: str | None, possible: Sequence[str], found: Sequence[str], usual: Sequence[str], held: str
) -> str | None:
    """The column that the config gives, else the only one found, else the only one of these with a usual name."""
    if given is not None:
        if given not in possible:
            raise UserError(key, f"is not such a column of {held}", value=given)
        return given
    chosen = found if len(found) == 1 else [name for name in found if name.lower() in usual]
    if len(found) > 1 and len(chosen) != 1:
        raise UserError(key, f"is not set, and several may be meant in {held}", hint=f"set it to {' or '.join(found)}")
    return chosen[0] if chosen else None


def _image_kind(field: pa.Field) -> ImageKind | None:
    kind = field.type
    if kind in _BYTES:
        return "bytes"
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.field("bytes").type in _BYTES:
        return "struct"
    return "pixels" if pixels_of(field) is not None else None


def _splits(found: Mapping[str, _Found], class_names: Sequence[str], data: DataConfig) -> dict[str, ParquetImages]:
    def images(chosen: Iterable[_Found]) -> ParquetImages:
        files, parts = [], []
        for file, columns, words, which in chosen:
            classes = list(map(str, range(len(class_names))) if columns.numbers else class_names)
            places = {None: NO_LABEL} | {word: place for place, word in enumerate(classes)}
            known = np.array([word in places for word in words])
            if not known[which].all():
                wrong = int(known[which].argmin())
                reason = f"has the label {words[which[wrong]]!r}, which is none of the {len(class_names)} classes"
                raise UserError(file.name(wrong), reason)
            files.append(file)
            parts.append(np.array([places.get(word, NO_LABEL) for word in words])[which])
        labels = np.concatenate(parts)
        return ParquetImages(files, columns.image, columns.kind, np.arange(len(labels)), labels, Fit.of(data))

    named: dict[str | None, list[_Found]] = {}
    places: dict[str, dict[str | None, str]] = {}
    for path, one in found.items():
        place, split = split_of(path)
        named.setdefault(split, []).append(one)
        places.setdefault(place, {})[split] = one.file.uri
    if len(named) == 1:
        every = images(found.values())
        # Named by their places, so that the choice does not depend on how the rows are cut into files.
        ranks = name_ranks(f"row {row}" for row in range(len(every)))
        chosen = hold_out(ranks, every.labels, data.test_fraction)
        parts = {split: (every.rows[rows], every.labels[rows]) for split, rows in chosen.items()}
        return {split: replace(every, rows=rows, labels=labels) for split, (rows, labels) in parts.items()}
    if None in named:
        hint = "put train or test into its name or that of its folder, or remove it"
        raise UserError(named[None][0].file.uri, "names no split, unlike others", hint=hint)
    if "train" not in named:
        hint = "add them, or point data.root at one of the splits"
        raise UserError(named["test"][0].file.uri, "is of the test split; no file is of the train split", hint=hint)
    # Several configurations or folds share images: one's test images would train another.
    whole = [place for place, splits in places.items() if len(splits) > 1]
    if len(whole) > 1:
        reason = f"is of another dataset than those in {whole[0] or 'the folder itself'!r}: both have splits"
        hint = "set data.root to the folder of one of them"
        raise UserError(next(iter(places[whole[1]].values())), reason, hint=hint)
    return {"train": images(named["train"]), "test": images(named.get("test") or named["validation"])}


def split_of(path: str) -> tuple[str, str | None]:
    """The folder that holds the split, and the split, by a word in the file's name, else in the nearest folder's."""
    parts = path.removesuffix(SUFFIX).split("/")
    for depth in reversed(range(len(parts))):
        words = re.findall("[a-z]+", parts[depth].lower())
        splits = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
        if len(splits) == 1:
            return "/".join(parts[:depth]), splits.pop()
    return "", None


@contextmanager
def opened(uri: str, *, ahead: bool = False, read_dictionary: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """The open file. With `ahead`, all that a call reads is asked for at once, and kept; else it is read in pieces."""
    filesystem, path = storage.filesystem(uri)
    buffer = 0 if ahead else _BUFFER
    try:
        with (
            filesystem.open_input_file(path) as stream,
            pq.ParquetFile(
                stream,
                pre_buffer=ahead,
                buffer_size=buffer,
                page_checksum_verification=True,
                read_dictionary=read_dictionary,
            ) as parquet,
        ):
            if parquet.metadata.num_rows > _MOST_ROWS * stream.size():
                raise pa.ArrowInvalid(f"{parquet.metadata.num_rows:,} rows in {stream.size():,} bytes")
            yield parquet
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or _NO_SUCH in str(error)):
            raise  # the disk or the bucket failed
        hint = "fetch it again; in a clone of a repository with `git lfs pull`"
        raise UserError(uri, f"is not a whole Parquet file: {str(error)[:200]}", hint=hint) from error


@dataclass(frozen=True)
class ParquetImages(DecodedSplit):
    """A split whose images are rows of Parquet files. It keeps their order, so that a section is few row groups."""

    files: Sequence[ParquetFile]
    column: str
    kind: ImageKind
    rows: NDArray[np.int64]  # ascending, counted through all files
    labels: NDArray[np.int64]  # of these rows
    fit: Fit

    def section(self, first: int, last: int) -> Self:
        return replace(self, rows=self.rows[first:last], labels=self.labels[first:last])

    def encoded(self, least_side: int | None) -> Iterator[Encoded]:
        labels = iter(self.labels.tolist())
        for number, _, rows in pieces_of(self.rows, (file.rows for file in self.files)):
            file = self.files[number]
            with opened(file.uri) as parquet:
                if parquet.metadata.num_rows != file.rows:
                    hint = "ingest again when nothing writes there"
                    raise UserError(file.uri, "changed while it was read", hint=hint)
                for group, of_group, within in pieces_of(rows, group_lengths(parquet)):  # others are not read
                    values = self._group(parquet, group, within)
                    for row, value in zip(rows[of_group].tolist(), values, strict=True):
                        load = partial(_load, value, least_side, self.fit.largest)
                        yield Encoded(file.name(row), next(labels), load, 0 if value is None else value.nbytes)

    def _group(self, parquet: pq.ParquetFile, group: int, rows: NDArray[np.int64]) -> Iterator[Any]:
        leaf = f"{self.column}.bytes" if self.kind == "struct" else self.column
        wanted, last = {*rows.tolist()}, rows[-1]
        # Row by row, since a few bytes of a dictionary may be the value of every row. Without Arrow's threads, since
        # the images are decoded on all cores meanwhile.
        for row, batch in enumerate(parquet.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False)):
            if row in wanted:
                scalar = batch.column(0)[0]
                if not scalar.is_valid:
                    yield None
                elif pixels := pixels_of(batch.schema.field(0)):
                    yield np.frombuffer(scalar.as_buffer(), pixels.dtype).reshape(pixels.shape)
                else:
                    cell = (scalar["bytes"] if self.kind == "struct" else scalar).as_buffer()
                    yield None if cell is None else memoryview(cell)
            if row == last:
                return


def _load(
    value: memoryview | NDArray[Any] | None, least_side: int | None, largest: float, admit: Callable[[int], None]
) -> Picture:
    if value is None:
        raise BadImageError("there is no image in this row")
    require_size(value.nbytes, largest)
    admit(value.nbytes)
    if isinstance(value, np.ndarray):
        return Picture.of(value)
    return decode(bytes(value), least_side=least_side, largest=largest, admit=admit)
