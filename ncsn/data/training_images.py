"""The endless order of training images: shuffled as a whole, or window by window where they are large.

Both orders are functions of (seed, place) alone, so any number of workers sees the same global batches and a resumed
run continues with the right image. Which of the two it is depends on the size of the dataset and never on a node.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from filelock import FileLock

from ncsn import storage
from ncsn.core.images import eight_bit
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.format import Manifest, Part, Rows, load_manifest, read_part
from ncsn.errors import UserError
from ncsn.storage import cache_folder

if TYPE_CHECKING:
    from ncsn.data.streamed import StreamedSplit

# A split with more images, or more bytes of them, is read in windows of this size, which shuffle less; see `streamed`.
WINDOW_IMAGES, WINDOW_BYTES = 1 << 20, 4 << 30
_THREADS = 4  # that fetch parts
_permutation = functools.lru_cache(maxsize=2)(keyed_permutation)

_IMAGES, _LABELS = "images.npy", "labels.npy"


TrainingImages: TypeAlias = "CachedSplit | StreamedSplit"


def open_training_images(dataset_uri: str, split: str = "train") -> TrainingImages:
    """A split, from this node's copy of it, or in windows if it is large."""
    manifest = load_manifest(dataset_uri)
    window_images = min(WINDOW_IMAGES, WINDOW_BYTES // manifest.pixels.num_bytes)
    if manifest.count(split) <= window_images:
        return open_cache(dataset_uri, split)
    from ncsn.data.streamed import StreamedSplit  # here, since few splits are so large

    return StreamedSplit(dataset_uri, split, window_images=window_images)


@dataclass(frozen=True)
class CachedSplit:
    """A split as memory-mapped arrays, which the processes of a node share."""

    images: np.ndarray  # [N, H, W, C], as stored or `eight_bit`
    labels: np.ndarray  # int64 [N], -1 for none
    fetching = False

    def __len__(self) -> int:
        return len(self.labels)

    def ordered(self, seed: int, *, first: int, count: int) -> Rows:
        """The images at places `first .. first + count` of the order of `seed`, with their labels."""
        return self.rows(self.order(seed, first=first, count=count))

    def order(self, seed: int, *, first: int, count: int) -> np.ndarray:
        """The rows at places `first .. first + count` of the order of `seed`, int64 [count]."""
        size, last = len(self), first + count
        rows = [np.empty(0, np.int64)]
        for start in range(first // size * size, last, size):  # of the epochs
            order = _permutation(seed, epoch=start // size, size=size)
            rows.append(order[max(first - start, 0) : last - start])
        return np.concatenate(rows)

    def rows(self, indices: np.ndarray) -> Rows:
        return Rows(self.images[indices], self.labels[indices])


def open_cache(dataset_uri: str, split: str, *, as_bytes: bool = False) -> CachedSplit:
    """The node's copy of a split, as stored or `eight_bit`. The first process that asks makes it, others wait."""
    manifest = load_manifest(dataset_uri)
    count = manifest.count(split)
    as_bytes = as_bytes and manifest.pixels.dtype != "uint8"
    folder = cache_folder() / manifest.digest / (f"{split}-bytes" if as_bytes else split)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                with storage.scratch_folder(str(folder.parent)) as temporary:
                    _copy(temporary, dataset_uri, split, manifest, as_bytes=as_bytes)
                    temporary.rename(folder)
    try:
        images, labels = (storage.mapped(folder / name) for name in (_IMAGES, _LABELS))
        intact = images.shape == (count, *manifest.pixels.shape) and labels.shape == (count,)
    except (OSError, ValueError, EOFError):
        intact = False
    if not intact:
        raise UserError(str(folder), f"the local copy of dataset {manifest.name} is damaged", hint="delete that folder")
    return CachedSplit(images, labels)


def _copy(folder: Path, dataset_uri: str, split: str, manifest: Manifest, *, as_bytes: bool) -> None:
    count, parts = manifest.count(split), manifest.parts[split]
    pixel = np.dtype(np.uint8 if as_bytes else manifest.pixels.dtype)
    # Not through a memory map: there a full disk would kill the process.
    headers, row_bytes = list[int](), list[int]()
    for name, kind, shape in ((_IMAGES, pixel, manifest.pixels.shape), (_LABELS, np.dtype("<i8"), ())):
        header = {"descr": kind.str, "fortran_order": False, "shape": (count, *shape)}
        with (folder / name).open("wb") as made:
            np.lib.format.write_array_header_1_0(made, header)
            headers.append(made.tell())
        row_bytes.append(kind.itemsize * math.prod(shape))

    def copy(part: Part, first: int) -> None:
        with (folder / _IMAGES).open("r+b") as images, (folder / _LABELS).open("r+b") as labels:
            for file, header, size in zip((images, labels), headers, row_bytes, strict=True):
                file.seek(header + first * size)
            for block in read_part(dataset_uri, part, manifest.pixels):
                images.write((eight_bit(block.images, manifest.pixels.limits) if as_bytes else block.images).tobytes())
                labels.write(block.labels.astype("<i8").tobytes())

    firsts = itertools.accumulate((part.rows for part in parts), initial=0)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, parts, firsts))
    for name in (_IMAGES, _LABELS):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
