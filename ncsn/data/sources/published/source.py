"""Datasets that are published as Parquet files of encoded images, as on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import NO_LABEL, Manifest, load_manifest
from ncsn.data.pixels import Fit
from ncsn.data.sources.base import Source, hold_out
from ncsn.data.sources.listing import first_file, list_files, required_root
from ncsn.data.sources.published.columns import Columns, FoundLabels, choose_columns, classes_of, labels_of, read_labels
from ncsn.data.sources.published.files import ParquetFile, ParquetImages, opened
from ncsn.errors import UserError

SUFFIX = ".parquet"
_THREADS = 16
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words}


class _Found(NamedTuple):
    """A file with what was learned at its opening."""

    file: ParquetFile
    columns: Columns
    labels: FoundLabels


def open_parquet(data: DataConfig) -> Source:
    """The images in the Parquet files of data.root, a folder or `s3://bucket/prefix`, or in one file, in their order.

    The names of the files or of their folders tell the splits. Without a test split the validation images are it, and
    without these data.test_fraction of each class is held out.
    """
    root = storage.absolute(required_root(data))
    files = _find(root)
    with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
        found = list(pool.map(partial(_survey, data=data), files.values()))
    columns = found[0].columns
    _require_alike(found)
    manifest = _own_manifest(root) if columns.image.kind == "pixels" else None
    if manifest is not None:
        columns = columns._replace(class_names=tuple(manifest.class_names))
    class_names = classes_of(columns, [one.labels for one in found])
    return Source(
        description=f"Parquet files of images, resized to {data.image_size}x{data.image_size}",
        license="as the owner of the images says" if manifest is None else manifest.license,
        class_names=class_names,
        splits=_splits(dict(zip(files, found, strict=True)), columns, class_names, data),
    )


def locate_files(data: DataConfig) -> str:
    """The folder and a file in it, or the file."""
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
            return _Found(file, columns, FoundLabels([], np.full(file.rows, NO_LABEL, np.int64)))
        return _Found(file, columns, read_labels(parquet, columns.label))


def _require_alike(found: Sequence[_Found]) -> None:
    first = found[0]
    for one in found:
        if one.columns != first.columns:
            words = ("column of images", "column of labels", "list of class names")
            pairs = zip(words, first.columns, one.columns, strict=True)
            what = next(word for word, mine, its in pairs if mine != its)
            raise UserError(
                one.file.uri,
                f"has another {what} than {first.file.uri}",
                hint="set data.root to the files of one dataset",
            )


def _own_manifest(root: str) -> Manifest | None:
    """The manifest, if `root` is a dataset of a store of ours: its files do not name the classes."""
    try:
        return load_manifest(root)
    except FileNotFoundError:
        return None


def _splits(
    found: Mapping[str, _Found], columns: Columns, class_names: Sequence[str], data: DataConfig
) -> dict[str, ParquetImages]:
    def images(chosen: Iterable[_Found]) -> ParquetImages:
        files = [one.file for one in chosen]
        labels = np.concatenate([labels_of(one.labels, columns, class_names, file=one.file) for one in chosen])
        return ParquetImages(files, columns.image, np.arange(len(labels)), labels, Fit.of(data))

    named: dict[str | None, list[_Found]] = {}
    for path, one in found.items():
        named.setdefault(place_of(path)[1], []).append(one)
    if len(named) == 1:
        every = images(found.values())
        # Named by their places, so that the choice does not depend on how the rows are cut into files.
        names = [f"row {row}" for row in range(len(every))]
        chosen = hold_out(names, every.labels.tolist(), data.test_fraction)
        return {
            split: replace(every, rows=every.rows[rows], labels=every.labels[rows]) for split, rows in chosen.items()
        }
    _require_train(named)
    _require_one_set(found)
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


def _require_one_set(found: Mapping[str, _Found]) -> None:
    """Refuse several configurations or folds, which share images: one's test images would train another."""
    places: dict[str, dict[str | None, ParquetFile]] = {}
    for path, one in found.items():
        place, split = place_of(path)
        places.setdefault(place, {})[split] = one.file
    whole = [place for place, splits in places.items() if len(splits) > 1]
    if len(whole) > 1:
        raise UserError(
            next(iter(places[whole[1]].values())).uri,
            f"is of another dataset than those in {whole[0] or 'the folder itself'!r}: both have splits",
            hint="set data.root to the folder of one of them",
        )


def _require_train(named: Mapping[str | None, Sequence[_Found]]) -> None:
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
