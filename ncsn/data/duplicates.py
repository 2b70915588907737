"""Images that equal others or nearly do, by name: `duplicates.csv` beside a config and in a dataset."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.data.format import DAMAGED, LABEL, NAME, Hashes, Manifest, open_images, pieces_of

DUPLICATES = "duplicates.csv"
_FORMULA = re.compile(r"\A(?=['=+@-])")  # a spreadsheet would compute what begins so, unless after an apostrophe
# The path of an image below `data.root`, or its split and row if its source has no names; and its class, or "".
Named = tuple[str, str]


class Duplicate(NamedTuple):
    """A line of the file, whose columns these are."""

    path: str
    other_path: str
    kind: str  # equal, mirrored (it equals the mirror image) or near
    class_name: str
    other_class_name: str


def pairs_of(kind: str, ones: Iterable[Named], others: Iterable[Named]) -> Iterator[Duplicate]:
    """Lines for images and, of each, the other one."""
    for (path, name), (other_path, other_name) in zip(ones, others, strict=True):
        yield Duplicate(path, other_path, kind, name, other_name)


def below(root: str, name: str) -> str:
    """The name of an image of a source without the root of the source."""
    return name.removeprefix(root).lstrip("/:")


def equal_pairs(hashes: Hashes) -> NDArray[np.int64]:
    """Pairs [P, 2]: the first of images with the same hash, and each later one."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(len(hashes)))
    return np.stack([first[group][later], later], axis=1)


def named(uri: str, manifest: Manifest, split: str, rows: Sequence[int] | NDArray[np.int64]) -> list[Named]:
    """The images at these rows of a split, in any order, of the dataset whose parts are at `uri`."""
    unique, places = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    parts, classes, found = manifest.parts[split], ("", *manifest.class_names), list[Named]()
    for number, held, within in pieces_of(unique, [part.rows for part in parts]):
        with open_images(storage.join(uri, parts[number].path), hint=DAMAGED) as file:
            columns = file.read(columns=[NAME, LABEL]).take(within).to_pydict().values()
        for row, name, label in zip(unique[held], *columns, strict=True):
            found.append((name or f"{split} image {row}", classes[label + 1]))
    return [found[place] for place in places]


def to_csv(duplicates: Iterable[Duplicate]) -> str:
    """The file: one line of each, sorted."""
    text = io.StringIO()
    lines = ([_FORMULA.sub("'", value) for value in each] for each in sorted(duplicates))
    csv.writer(text, lineterminator="\n").writerows([Duplicate._fields, *lines])
    return text.getvalue()


def from_csv(text: str) -> list[Duplicate]:
    """Inverse of `to_csv`."""
    lines = list(csv.reader(io.StringIO(text, newline="")))[1:]
    return [Duplicate._make(value.removeprefix("'") for value in line) for line in lines]


def in_two_classes(duplicates: Iterable[Duplicate]) -> str:
    """How many images equal one of another class, in words; empty if none does."""
    found = [each for each in sorted(duplicates) if each.kind != "near" and each.class_name != each.other_class_name]
    such = "".join(f", such as {each.path} and {each.other_path}" for each in found[:1])
    return f"{len(found):,} images equal one of another class{such}" if found else ""
