"""A node-local copy of a split as plain arrays in memory-mapped files, shared by all workers of a node."""

from __future__ import annotations

import functools
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.manifest import Manifest, load_manifest
from ncsn.data.parquet import read_blocks
from ncsn.data.row import SplitDigest
from ncsn.errors import UserError

CACHE_DIR_VARIABLE = "NCSN_CACHE_DIR"
DEFAULT_CACHE_DIR = "~/.cache/ncsn"

_IMAGES, _LABELS = "images.npy", "labels.npy"


@dataclass(frozen=True)
class CachedSplit:
    """A split as read-only arrays whose pages are shared between processes and dropped under memory pressure.

    Attributes:
        images: uint8 [N, H, W, C], 0..255.
        labels: int64 [N], -1 for none.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def ordered(self, seed: int, *, first: int, count: int) -> np.ndarray:
        """uint8 [count, H, W, C]: the images at the rows that `image_indices` gives."""
        rows: np.ndarray = self.images[image_indices(seed, first=first, count=count, size=len(self))]
        return rows

    def head(self, count: int) -> np.ndarray:
        """The first `count` images as they are stored, or all if there are fewer."""
        return self.images[:count]


def mapped(path: Path) -> np.ndarray:
    """The array of an .npy file, whose pages are read from the disk when they are looked at.

    A plain array: as a `np.memmap` it would make the gathering of a batch slower.
    """
    array: np.memmap = np.load(path, mmap_mode="r")
    return array.view(np.ndarray)


def cache_folder() -> Path:
    """This node's folder for what can be made again: `NCSN_CACHE_DIR`, else `~/.cache/ncsn`."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or DEFAULT_CACHE_DIR).expanduser()


def open_cache(dataset_uri: str, split: str, *, cache_dir: str | os.PathLike[str] | None = None) -> CachedSplit:
    """Open the node's copy of a split; the first to ask makes it, others wait.

    Args:
        dataset_uri: A dataset in the store.
        split: `train` or `test`.
        cache_dir: Folder on this machine's disk; None = `NCSN_CACHE_DIR`, else `~/.cache/ncsn`.

    Raises:
        NotFound: if there is no complete dataset at `dataset_uri`.
        UserError: if the dataset or the copy is damaged, or there is no such split.
        OSError: if the local disk is full; nothing is left behind.
    """
    manifest = load_manifest(dataset_uri)
    manifest.count(split)
    base = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    folder = base / manifest.digest / split
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _fill(folder, dataset_uri, split, manifest)
    return _open(folder, split, manifest)


def image_indices(seed: int, *, first: int, count: int, size: int) -> np.ndarray:
    """Rows at positions `first`, ..., `first + count - 1` of the endless training order.

    The order is one random permutation of all rows after another, each a function of (seed, epoch). So which images
    a step sees depends on the images seen before it and not on how they came in batches.

    Args:
        seed: Seed of the experiment.
        first: Images seen so far, >= 0.
        count: Number of positions.
        size: Rows in the split, >= 1.

    Returns:
        int64 [count], each in [0, size).
    """
    if first < 0 or count < 0 or size < 1:
        raise ValueError(
            f"need first >= 0, count >= 0 and size >= 1, got first = {first}, count = {count}, size = {size}"
        )
    indices = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        epoch, place = divmod(first + filled, size)
        taken = min(count - filled, size - place)
        indices[filled : filled + taken] = _permutation(seed, epoch, size)[place : place + taken]
        filled += taken
    return indices


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = keyed_permutation(seed, epoch=epoch, size=size)
    order.flags.writeable = False
    return order


def _open(folder: Path, split: str, manifest: Manifest) -> CachedSplit:
    count = manifest.count(split)
    try:
        images, labels = (mapped(folder / name) for name in (_IMAGES, _LABELS))
        intact = images.shape == (count, *manifest.shape) and labels.shape == (count,)
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise UserError(str(folder), f"the local copy of dataset {manifest.name} is damaged", hint="delete that folder")
    return CachedSplit(images, labels)


def _fill(folder: Path, dataset_uri: str, split: str, manifest: Manifest) -> None:
    """Write the arrays under a temporary name. Through a memory map, a full disk would kill the process instead."""
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        _write_arrays(temporary, dataset_uri, split, manifest)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_arrays(folder: Path, dataset_uri: str, split: str, manifest: Manifest) -> None:
    count, digest = manifest.count(split), SplitDigest()
    with (folder / _IMAGES).open("wb") as images, (folder / _LABELS).open("wb") as labels:
        for file, shape, kind in ((images, (count, *manifest.shape), "|u1"), (labels, (count,), "<i8")):
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for block in read_blocks(dataset_uri, split, manifest=manifest):
            digest.update(block)
            images.write(block.images.tobytes())
            labels.write(block.labels.astype("<i8").tobytes())
        for file in (images, labels):
            file.flush()
            os.fsync(file.fileno())
    if digest.hexdigest() != manifest.content[split]:
        raise UserError(
            dataset_uri,
            f"its {split} split does not have the content that its manifest says",
            hint="delete it and ingest again, it is damaged",
        )
