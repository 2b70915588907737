"""Images that equal others or nearly do, by name: `duplicates.csv` beside a config and in a dataset."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ncsn import storage
from ncsn.data.format import DAMAGED, LABEL, NAME, Hashes, Manifest, open_images, pieces_of

DUPLICATES = "duplicates.csv"


# The path of an image below `data.root`, or its split and row if its source has no names; and its class, or "".
Named = tuple[str, str]


class Duplicate(NamedTuple):
    """A line of the file, whose columns these are."""

    path: str
    other_path: str
    kind: str  # equal, mirrored (it equals the mirror image) or near
    class_name: str
    other_class_name: str

    @classmethod
    def of(cls, kind: str, one: Named, other: Named) -> Duplicate:
        return cls(one[0], other[0], kind, one[1], other[1])


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
    wanted, parts, found = np.asarray(rows, np.int64), manifest.parts[split], dict[int, Named]()
    for number, _, within in pieces_of(unique := np.unique(wanted), [part.rows for part in parts]):
        with open_images(storage.join(uri, parts[number].path), hint=DAMAGED) as file:
            table = file.read(columns=[NAME, LABEL]).take(within)
        for name, label in zip(table[NAME].to_pylist(), table[LABEL].to_pylist(), strict=True):
            row = int(unique[len(found)])
            found[row] = name or f"{split} image {row}", manifest.class_names[label] if label >= 0 else ""
    return [found[row] for row in wanted.tolist()]


def to_csv(duplicates: Iterable[Duplicate]) -> str:
    """The file: one line of each, sorted."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Duplicate._fields, *sorted(duplicates)])
    return text.getvalue()


def from_csv(text: str) -> list[Duplicate]:
    """Inverse of `to_csv`."""
    return list(map(Duplicate._make, csv.reader(io.StringIO(text, newline=""))))[1:]


def in_two_classes(duplicates: Iterable[Duplicate]) -> str:
    """How many images equal one of another class, in words; empty if none does."""
    found = [each for each in sorted(duplicates) if each.kind != "near" and each.class_name != each.other_class_name]
    such = "".join(f", such as {each.path} and {each.other_path}" for each in found[:1])
    return f"{len(found):,} images equal one of another class{such}" if found else ""
