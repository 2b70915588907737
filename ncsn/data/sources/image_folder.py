"""The user's own images in folders, buckets and archives, with their labels."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import CLASS_NAMES, NO_LABEL, SPLITS
from ncsn.data.pixels import BadImageError, Fit, require_size
from ncsn.data.sources.base import Source, hold_out, list_files, name_ranks, require_utf8, required_root, texts
from ncsn.data.sources.image_files import (
    ARCHIVE_SUFFIXES,
    COMPRESSED_SUFFIXES,
    HEIC_SUFFIXES,
    IMAGE_SUFFIXES,
    LABEL_TABLES,
    EncodedImages,
    ImageReader,
    Member,
    index_archive,
    kind_of,
)
from ncsn.errors import UserError

_INDEX_THREADS = 16
_PARSED = 4  # times the bytes of a table that its values take at least
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")

_Sheet = tuple[str, str, Member | None]  # the archive, empty for none, and the path and the place of a file in it


def open_image_folder(data: DataConfig) -> Source:
    """The images below data.root, a folder or `s3://bucket/prefix` of images or archives, or one archive.

    Folders `train` and `test`, if there are just these two, are the splits. A folder, its zip and its tar give the same
    rows, in a shuffled but fixed order, so that the first N images of a split are a fair sample.
    """
    root = storage.absolute(required_root(data))
    found, labeled, ignored, renamed = _find(root, data)
    ranks = name_ranks(texts(found["place"]))
    order = np.argsort(ranks, kind="stable")
    tops = folders = pc.struct_field(pc.extract_regex(found["place"], "^(?P<top>[^/]*)/"), 0)
    own_splits = {*tops.unique().to_pylist()} == set(SPLITS)
    if own_splits:
        folders = pc.struct_field(pc.extract_regex(found["place"], "^[^/]*/(?P<next>[^/]*)/"), 0)
    known = folders.unique()
    classes = pa.array([renamed.get(folder, folder) for folder in known.to_pylist()], known.type)
    folders = pc.take(classes, pc.index_in(folders, value_set=known))
    # A stray table of a few images does not hide folders that are classes.
    if 2 * labeled < len(found) and len(folders.unique().drop_null()) > 1:
        ignored[f"stray label{'s' * (labeled > 1)}"] += labeled
        labeled = 0
    words = pc.if_else(pc.equal(found["word"], ""), None, found["word"]) if labeled else folders
    held = {*words.unique().drop_null().to_pylist()}
    if data.leave_out:
        order = order[pc.invert(pc.is_in(words, pa.array(data.leave_out, words.type))).to_numpy()[order]]
    if not (held.issuperset(data.leave_out) and len(order)):
        reason = "is no class of these images" if len(order) else "leaves no image"
        hint = f"their classes: {', '.join(sorted(held)) or 'none'}"
        raise UserError("data.leave_out", reason, hint=hint, value=list(data.leave_out))
    # A number that is left out would otherwise stay as a class without images.
    class_names = class_names_of(held.difference(data.leave_out), numbers=labeled > 0 and not data.leave_out)
    labels = labels_of(words, class_names)
    if own_splits:
        chosen = {split: order[pc.equal(tops, split).to_numpy()[order]] for split in SPLITS}
    else:
        held_out = hold_out(ranks[order], labels[order], data.test_fraction)
        chosen = {split: order[places] for split, places in held_out.items()}
    images = found.drop_columns(["place", "word"])
    return Source(
        description=f"The images of the folder {root.rpartition('/')[2]}",
        license="as the owner of the images says",
        class_names=class_names,
        splits={split: EncodedImages(root, images, rows, labels[rows], Fit.of(data)) for split, rows in chosen.items()},
        ignored=+ignored,
    )


def in_words(ignored: Mapping[str, int]) -> str:
    """`Source.ignored` for people."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(ignored).most_common())


def how_to_convert(kinds: Iterable[str]) -> str:
    """What to do with files of these kinds that images can be made of; empty for others."""
    heic = any(kind in HEIC_SUFFIXES for kind in kinds)
    return "convert HEIC to JPEG, for example with ImageMagick: mogrify -format jpg FILES" if heic else ""


def _find(root: str, data: DataConfig) -> tuple[pa.Table, int, Counter[str], Mapping[str, str]]:
    """All images, how many of them tables name or files label, what is ignored, and the classes of folders by name.

    An image is a row as of `EncodedImages`, with its label as a `word` and its `place`: where it would be with every
    archive unpacked in its folder, which decides split, class and order. Archives count only if all images are in some.
    """
    files, alone = list_files(data), storage.is_file(root)
    suffixes = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    is_image = pc.and_(pc.match_substring_regex(files, rf"(?i)\.({suffixes})$"), pa.scalar(not alone))
    images, others = files.filter(is_image), list(texts(files.filter(pc.invert(is_image))))
    archives = [path for path in others if path.lower().endswith(ARCHIVE_SUFFIXES)]
    found = pa.table({"place": images, "file": images, "word": pa.nulls(len(images), pa.large_string())})
    ignored = Counter(map(kind_of, others))
    sheets: list[_Sheet] = [
        ("", path, None) for path in others if path.rpartition("/")[2] in LABEL_TABLES and not alone
    ]
    if archives and not len(images):
        found, inside, more = _in_archives(root, [""] if alone else archives)
        sheets += inside
        ignored += more
        ignored.subtract(map(kind_of, archives))
    tables = _read_tables(root, sheets, data.largest_bytes)
    ignored.subtract(kind_of(table.path) for table in tables)
    if not len(found):
        compressed = any(path.lower().endswith(COMPRESSED_SUFFIXES) for path in others)
        what = f", only {in_words(+ignored)}" if +ignored else ""
        reason = f"holds no image that ends in {', '.join(IMAGE_SUFFIXES)}{what}"
        hint = how_to_convert(+ignored) or f"set it to a folder of images, or a {' or '.join(ARCHIVE_SUFFIXES)}"
        hint = "decompress the archive to a .tar (its images are compressed already)" if compressed else hint
        raise UserError("data.root", reason, hint=hint, value=root)
    renamed = dict[str, str]()
    for table in tables:
        for folder, name in table.words.items() if table.of_folders else ():
            if renamed.setdefault(folder, name) != name:
                raise UserError(table.origin, f"says {name!r} of {folder!r}, and another table {renamed[folder]!r}")
    tables = [table for table in tables if not table.of_folders]
    if not tables:
        return found, pc.sum(pc.not_equal(found["word"], "")).as_py() or 0, ignored, renamed
    words = _words_of(tables, found)
    column = pa.array(map(words.get, range(len(found))), pa.large_string())
    return found.set_column(found.column_names.index("word"), "word", [column]), len(words), ignored, renamed


def _in_archives(root: str, archives: Sequence[str]) -> tuple[pa.Table, list[_Sheet], Counter[str]]:
    """The images of archives below `root`, their tables and other files; the archive "" is `root` itself."""
    uris = [storage.join(root, archive) if archive else root for archive in archives]
    with ThreadPoolExecutor(min(_INDEX_THREADS, len(uris))) as pool:
        indices = list(pool.map(index_archive, uris))
    found, sheets, ignored = [], list[_Sheet](), Counter[str]()
    for archive, (images, inside, others) in zip(archives, indices, strict=True):
        ignored += others
        ignored.update(kind_of(member.path) for member in inside)
        found.append(images.add_column(0, "file", pa.repeat(archive, len(images)).dictionary_encode()))
        sheets += ((archive, member.path, member) for member in inside)
    every = pa.concat_tables(found).unify_dictionaries().combine_chunks()
    # Shards that all number their images from 0 hold different images under one name.
    counted = pc.value_counts(every["path"])
    again = pc.is_in(every["path"], counted.field(0).filter(pc.greater(counted.field(1), 1)))
    files, (at, nothing) = every["file"].cast(pa.large_string()), pa.array(["@", ""], pa.large_string())
    inside = pc.if_else(again, pc.binary_join_element_wise(every["path"], files, at), every["path"])
    places = pc.binary_join_element_wise(pc.replace_substring_regex(files, "[^/]*$", ""), inside, nothing)
    return every.add_column(0, "place", places), sheets, ignored


@dataclass(frozen=True)
class _Table:
    """A table of labels."""

    origin: str  # its URI, for an archive's member with `:` and its path
    path: str  # in the archive, or below the root
    archive: str  # the archive that holds it, by its path below the root; empty for none
    folder: str  # what the names in it are relative to: its folder in the archive or below the root
    words: Mapping[str, str]  # name as in the table -> label in words, empty for none
    of_folders: bool = False  # whether these are names of folders, whose images have the label


def _read_tables(root: str, sheets: Iterable[_Sheet], largest: int) -> list[_Table]:
    """The tables that label images; parsed, all that there are take at most `largest` bytes."""
    reader, total, tables = ImageReader(largest), 0, list[_Table]()
    for archive, path, member in sheets:
        uri = storage.join(root, archive or path) if archive or member is None else root
        origin = f"{uri}:{path}" if member else uri
        try:
            content = reader.read(uri, member)
            total += len(content)
            require_size(_PARSED * total, largest)
        except BadImageError as error:
            raise UserError(origin, str(error), hint="repair or remove it") from None
        if table := _read_table(content, origin=origin, path=path, archive=archive):
            tables.append(table)
    return tables


def _read_table(content: bytes, *, origin: str, path: str, archive: str) -> _Table | None:
    """A label table; None if it says nothing about labels, as a table of captions does."""
    folder, _, name = path.rpartition("/")
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    try:
        if name == CLASS_NAMES:
            fields = json.load(text)
            beside = folder in ("", *SPLITS) and isinstance(fields, dict)
            rows = fields.items() if beside and all(isinstance(each, str) for each in fields.values()) else None
        elif name == "dataset.json":
            fields = json.load(text)
            rows = fields.get("labels") if isinstance(fields, dict) else None
            # StyleGAN's tools also write vectors there, which are no classes.
            if not isinstance(rows, list) or not all(
                isinstance(row, list) and list(map(type, row)) in ([str, int], [str, type(None)]) for row in rows
            ):
                return None
        elif name == "metadata.jsonl":
            rows = _rows_of_columns(json.loads(line) for line in text if line.strip())
        else:
            lines = csv.reader(text, strict=True)
            header = next(lines, [])
            rows = _rows_of_columns(dict(zip(header, line, strict=False)) for line in lines)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(origin, f"is not a table of labels: {error}", hint="repair or remove it") from error
    if rows is None:
        return None
    words: dict[str, str] = {}
    if name == CLASS_NAMES:
        for folder_name, word in rows:
            require_utf8(word, key=origin)
            words[folder_name] = word
        if len({*words.values()}) < len(words):
            raise UserError(origin, "gives two folders the same class", hint="repair or remove it")
        return _Table(origin, path, archive, folder, words, of_folders=True)
    for file, label in rows:
        if file in words:
            raise UserError(origin, f"names {file!r} twice", hint="remove one of the two lines")
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if label is not None and not isinstance(label, str | int):
            raise UserError(origin, f"labels {file!r} with something else than a word or a whole number", value=label)
        word = "" if label is None else str(label).strip()
        require_utf8(word, key=origin)
        words[file] = "" if word == "-1" else word
    return _Table(origin, path, archive, folder, words)


def _rows_of_columns(rows: Iterable[Any]) -> list[tuple[str, Any]] | None:
    """File and label of each row, a mapping of columns; None without such columns."""
    found, labeled = list[tuple[str, Any]](), False
    for row in rows:
        if isinstance(row, Mapping):
            labeled |= "label" in row
            file = row.get("file_name", row.get("file"))
            if isinstance(file, str):
                found.append((file, row.get("label")))
    return found if labeled and found else None


def _words_of(tables: Iterable[_Table], found: pa.Table) -> dict[int, str | None]:
    """The label in words of each image that a table names, by its place in `found`; None for no label."""
    places: dict[tuple[str, str], int] = {}
    for number, path in enumerate(texts(found["place"])):
        places["", posixpath.normpath(path)] = number
    if "path" in found.column_names:
        for number, (file, path) in enumerate(zip(texts(found["file"]), texts(found["path"]), strict=True)):
            if file:
                places[file, posixpath.normpath(path)] = number
    words: dict[int, str | None] = {}
    named: dict[int, str] = {}
    for table in tables:
        for file, word in table.words.items():
            place = places.get((table.archive, posixpath.normpath(posixpath.join(table.folder, file))))
            if place is None:
                raise UserError(table.origin, f"names {file!r}, but there is no such image", hint="remove that line")
            if place in named:
                raise UserError(table.origin, f"names {file!r}, as does {named[place]}", hint="remove one of the two")
            named[place], words[place] = table.origin, word or None
    return words


def labels_of(words: pa.Array | pa.ChunkedArray, class_names: Sequence[str]) -> NDArray[np.int64]:
    """The place of each word among the names; -1 for one that is not there."""
    places = pc.index_in(words, value_set=pa.array(class_names, words.type)).fill_null(NO_LABEL)
    labels: NDArray[np.int64] = places.to_numpy().astype(np.int64)
    return labels


def class_names_of(words: set[str], *, numbers: bool) -> tuple[str, ...]:
    """Sorted. Labels that are numbers stay what they are, so that the classes are 0 .. the largest."""
    if numbers and all(_NUMBER.fullmatch(word) for word in words):
        largest = max(map(int, words), default=-1)
        if largest >= 10 * len(words) + 1000:
            reason = f"the labels of the images go up to {largest} with {len(words)} classes"
            raise UserError("data.root", reason, hint="number them from 0")
        return tuple(map(str, range(largest + 1)))
    return tuple(sorted(words))
