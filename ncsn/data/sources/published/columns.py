"""Which columns of Parquet files hold the images and the labels, and the classes that the labels mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL
from ncsn.data.sources.image_folder import class_names_of
from ncsn.data.sources.published.files import ImageColumn, ParquetFile, image_kind
from ncsn.errors import UserError

_NO_LABELS = "none"  # data.label_column of images without labels

_IMAGE_NAMES = ("image", "img", "picture", "photo", "png", "jpg", "jpeg", "webp")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "cls")
_OTHER_MEDIA = ("Audio", "Video", "Pdf", "Nifti")  # Hugging Face features that are `{bytes, path}` too


class LabelColumn(NamedTuple):
    """The column of the labels."""

    name: str
    numbers: bool  # whether they are whole numbers, not words

    @property
    def nothing(self) -> str:
        """The word for no label; -1 as Hugging Face writes it."""
        return str(NO_LABEL) if self.numbers else ""


class Columns(NamedTuple):
    """What is read of a file."""

    image: ImageColumn
    label: LabelColumn | None  # None for images without labels
    class_names: tuple[str, ...] | None  # of label 0, 1, ...; None if the file does not say


class FoundLabels(NamedTuple):
    """The labels of a file as they are there."""

    words: list[str]  # all different; numbers in decimals
    places: NDArray[np.int64]  # row -> place in `words`, -1 for none


def choose_columns(schema: pa.Schema, data: DataConfig, *, uri: str) -> Columns:
    """The columns of the config, else those that their types, usual names and Hugging Face's metadata point to."""
    features = _features(schema)
    image = _image_column(schema, features, data.image_column, uri=uri)
    label = _label_column(schema, features, data.label_column, uri=uri)
    kind = image_kind(schema.field(image))
    assert kind is not None
    if label is None:
        return Columns(ImageColumn(image, kind), None, None)
    names = features.get(label, {}).get("names")
    return Columns(
        ImageColumn(image, kind),
        LabelColumn(label, numbers=pa.types.is_integer(schema.field(label).type)),
        tuple(map(str, names)) if isinstance(names, list) and names else None,
    )


def read_labels(parquet: pq.ParquetFile, column: LabelColumn) -> FoundLabels:
    """All labels of an open file."""
    values = parquet.read(columns=[column.name]).column(0).cast(pa.string())
    encoded = values.combine_chunks().dictionary_encode()
    encoded.dictionary.validate(full=True)  # that it is UTF-8
    places = encoded.indices.fill_null(NO_LABEL).to_numpy(zero_copy_only=False)
    return FoundLabels(encoded.dictionary.to_pylist(), places.astype(np.int64))


def classes_of(columns: Columns, found: Sequence[FoundLabels]) -> tuple[str, ...]:
    """The class names of all files: those in their metadata, else their words in order."""
    if columns.label is None or columns.class_names is not None:
        return columns.class_names or ()
    return class_names_of({word for labels in found for word in labels.words} - {columns.label.nothing}, numbers=True)


def labels_of(
    found: FoundLabels, columns: Columns, class_names: Sequence[str], *, file: ParquetFile
) -> NDArray[np.int64]:
    """The label of each row of a file; -1 for none."""
    if columns.label is None:
        return found.places
    classes = map(str, range(len(class_names))) if columns.label.numbers else class_names
    labels = {name: number for number, name in enumerate(classes)} | {columns.label.nothing: NO_LABEL}
    for place, word in enumerate(found.words):
        if word not in labels:
            row = int(np.flatnonzero(found.places == place)[0])
            raise UserError(file.name(row), f"has the label {word!r}, which is none of the {len(class_names)} classes")
    table = np.array([*(labels[word] for word in found.words), NO_LABEL], np.int64)
    return table[found.places]  # place -1 is the last


def _features(schema: pa.Schema) -> Mapping[str, Mapping[str, Any]]:
    """What Hugging Face's metadata says of each column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _image_column(schema: pa.Schema, features: Mapping[str, Mapping[str, Any]], given: str | None, *, uri: str) -> str:
    possible = [field.name for field in schema if image_kind(field)]
    if given is not None:
        return _given(given, possible, schema, key="data.image_column", what="images", uri=uri)
    kinds = {name: features.get(name, {}).get("_type") for name in possible}
    marked = [name for name in possible if kinds[name] == "Image"]
    found = marked or [name for name in possible if kinds[name] not in _OTHER_MEDIA]
    if not found:
        raise UserError(
            uri,
            f"has no column of images: {_shown(schema)}",
            hint="expected encoded images as binary or as {bytes, path}",
        )
    return _the_one(found, _IMAGE_NAMES, key="data.image_column", uri=uri)


def _label_column(
    schema: pa.Schema, features: Mapping[str, Mapping[str, Any]], given: str | None, *, uri: str
) -> str | None:
    if given == _NO_LABELS:
        return None
    possible = [field.name for field in schema if _is_label(field.type)]
    if given is not None:
        return _given(given, possible, schema, key="data.label_column", what="whole numbers or words", uri=uri)
    marked = [name for name in possible if features.get(name, {}).get("_type") == "ClassLabel"]
    found = marked or [name for name in possible if name.lower() in _LABEL_NAMES]
    return _the_one(found, _LABEL_NAMES, key="data.label_column", uri=uri) if found else None


def _given(name: str, possible: Sequence[str], schema: pa.Schema, *, key: str, what: str, uri: str) -> str:
    if name not in possible:
        raise UserError(key, f"is not a column of {what} of {uri}, which has {_shown(schema)}", value=name)
    return name


def _the_one(found: Sequence[str], usual: Sequence[str], *, key: str, uri: str) -> str:
    chosen = [name for name in found if name.lower() in usual]
    if len(found) == 1:
        return found[0]
    if len(chosen) == 1:
        return chosen[0]
    raise UserError(key, f"is not set, and {uri} has several such columns", hint=f"set it to {' or '.join(found)}")


def _shown(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)[:300] or "no columns"


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    checks = (types.is_integer, types.is_string, types.is_large_string, types.is_string_view)
    return any(check(kind) for check in checks)
