"""Tables that label images: Hugging Face's metadata.jsonl and metadata.csv, EDM's dataset.json, and labels.csv."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ncsn.errors import UserError

LABEL_TABLES = ("metadata.jsonl", "metadata.csv", "dataset.json", "labels.csv")

_FILE_COLUMNS = ("file_name", "file")
_LABEL_COLUMN = "label"
_NO_LABEL = ("", "-1")


@dataclass(frozen=True)
class LabelTable:
    origin: str  # its URI, for an archive's member with `:` and its path
    archive: str  # the archive that holds it, by its path below the root; empty for none
    folder: str  # what the names in it are relative to: its folder in the archive or below the root
    words: Mapping[str, str]  # name as in the table -> label in words, empty for none


def read_table(content: bytes, *, origin: str, path: str, archive: str = "") -> LabelTable | None:
    """A label table; None if it says nothing about labels, as a table of captions does."""
    folder, _, name = path.rpartition("/")
    try:
        rows = _ROWS[name](content.decode("utf-8-sig"))
    except (ValueError, csv.Error) as error:
        raise UserError(origin, f"is not a table of labels: {error}", hint="repair or remove it") from error
    if rows is None:
        return None
    words: dict[str, str] = {}
    for file, label in rows:
        if file in words:
            raise UserError(origin, f"names {file!r} twice", hint="remove one of the two lines")
        words[file] = _word(label, file=file, origin=origin)
    return LabelTable(origin, archive, folder, words)


def words_of(tables: Iterable[LabelTable], images: Sequence[tuple[str, str, str]]) -> list[str | None]:
    """The label of each image in words; None for none.

    `images` has the path of each below the root, as if archives were unpacked, its archive, and its path in there.
    """
    places: dict[tuple[str, str], int] = {}
    for number, (path, archive, inside) in enumerate(images):
        places["", posixpath.normpath(path)] = number
        if archive:
            places[archive, posixpath.normpath(inside)] = number
    found: list[str | None] = [None] * len(images)
    named: dict[int, str] = {}
    for table in tables:
        for file, word in table.words.items():
            place = places.get((table.archive, posixpath.normpath(posixpath.join(table.folder, file))))
            if place is None:
                raise UserError(table.origin, f"names {file!r}, but there is no such image", hint="remove that line")
            if place in named:
                raise UserError(table.origin, f"names {file!r}, as does {named[place]}", hint="remove one of the two")
            named[place] = table.origin
            found[place] = word or None
    return found


def _word(label: Any, *, file: str, origin: str) -> str:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is not None and not isinstance(label, str | int):
        raise UserError(origin, f"labels {file!r} with something else than a word or a whole number", value=label)
    word = "" if label is None else str(label).strip()
    return "" if word in _NO_LABEL else word


_Rows = Iterable[tuple[str, Any]] | None


def _json_lines(text: str) -> _Rows:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return _of_columns([row for row in rows if isinstance(row, dict)])


def _csv(text: str) -> _Rows:
    return _of_columns(list(csv.DictReader(io.StringIO(text, newline=""), strict=True)))


def _of_columns(rows: Sequence[Mapping[str, Any]]) -> _Rows:
    column = next((name for name in _FILE_COLUMNS if any(name in row for row in rows)), None)
    if column is None or not any(_LABEL_COLUMN in row for row in rows):
        return None
    return [(row[column], row.get(_LABEL_COLUMN)) for row in rows if isinstance(row.get(column), str)]


def _edm(text: str) -> _Rows:
    content = json.loads(text)
    pairs = content.get("labels") if isinstance(content, dict) else None
    # StyleGAN's tools also write vectors there, which are no classes.
    whole = isinstance(pairs, list) and all(
        isinstance(pair, list) and list(map(type, pair)) in ([str, int], [str, type(None)]) for pair in pairs
    )
    return pairs if whole else None


_ROWS = {"metadata.jsonl": _json_lines, "metadata.csv": _csv, "dataset.json": _edm, "labels.csv": _csv}
