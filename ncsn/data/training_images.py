"""The endless order of training images: a cache of all of them, or windows.

The order is, as the cache's, a function of (seed, place) alone, so any number of workers sees the same global batches
and a resumed run goes on at the right image. What is weaker is the shuffle: see `window_at`.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.format import Manifest, SplitDigest, load_manifest
from ncsn.data.parquet import read_blocks, read_rows, read_split
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
    with storage.scratch_folder(str(folder.parent)) as temporary:
        _write_arrays(temporary, dataset_uri, split, manifest)
        temporary.rename(folder)


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


CHUNKS_PER_WINDOW = 16
"""Places of the split that the images of one window come from."""


class TrainingImages(Protocol):
    """A split in the endless order of training."""

    def __len__(self) -> int:
        """Images of the split."""

    def ordered(self, seed: int, *, first: int, count: int) -> np.ndarray:
        """uint8 [count, H, W, C]: the images at places `first .. first + count` of the order that `seed` gives."""

    def head(self, count: int) -> np.ndarray:
        """The first `count` images as they are stored, or all if there are fewer."""


@dataclass(frozen=True)
class Window:
    """A stretch of the order.

    Attributes:
        first: Its first place in the endless order.
        rows: The rows of the split at its places, int64.
        chunks: The chunks of the split that hold these rows.
    """

    first: int
    rows: np.ndarray
    chunks: tuple[int, ...]

    @property
    def last(self) -> int:
        """The place behind it."""
        return self.first + len(self.rows)


def window_at(seed: int, place: int, *, size: int, window_images: int) -> Window:
    """The window of the endless order that holds `place`.

    The split is cut into chunks of window_images / 16 rows. Each epoch takes the chunks in a random order, 16 to a
    window, and the rows of a window in a random order. Every epoch so has every image once, and its order is a function
    of (seed, epoch, size, window_images): not of the number of workers, of batch sizes, of part files, or of timing.
    Images of one chunk stay within one window of each other; a window that holds the whole split is a full shuffle.

    Args:
        seed: Seed of the experiment.
        place: Images seen before it, >= 0.
        size: Rows of the split.
        window_images: Images of a full window.
    """
    epoch, offset = divmod(place, size)
    chunk_rows = rows_per_chunk(window_images)
    order = keyed_permutation(seed, epoch=epoch, size=-(-size // chunk_rows))
    lengths = np.minimum((order + 1) * chunk_rows, size) - order * chunk_rows
    starts = np.cumsum(lengths) - lengths
    number = (int(np.searchsorted(starts, offset, side="right")) - 1) // CHUNKS_PER_WINDOW
    chunks = order[number * CHUNKS_PER_WINDOW : (number + 1) * CHUNKS_PER_WINDOW].tolist()
    rows = np.concatenate([np.arange(chunk * chunk_rows, min((chunk + 1) * chunk_rows, size)) for chunk in chunks])
    # Another address than that of any epoch's order of chunks.
    shuffle = keyed_permutation(seed, epoch=epoch + ((number + 1) << 32), size=len(rows))
    return Window(epoch * size + int(starts[number * CHUNKS_PER_WINDOW]), rows[shuffle], tuple(chunks))


def rows_per_chunk(window_images: int) -> int:
    """Rows of a chunk but the last of the split."""
    return max(1, window_images // CHUNKS_PER_WINDOW)


def open_training_images(dataset_uri: str, data: DataConfig, *, split: str = "train") -> TrainingImages:
    """The split as `data.loader` says: the node's whole copy, or a stream of windows.

    Raises:
        NotFound: if there is no complete dataset at `dataset_uri`.
        UserError: if the dataset is damaged, or there is no such split.
        OSError: if the local disk is full.
    """
    if data.loader == "cache":
        return open_cache(dataset_uri, split)
    return StreamedSplit(dataset_uri, split, window_images=data.window_images)


class StreamedSplit:
    """A split of which this node holds two windows: the one that is read and the next, which is fetched meanwhile.

    The workers of a node share the chunks, which are plain arrays in memory-mapped files below `NCSN_CACHE_DIR`.

    Args:
        dataset_uri: A dataset in the store.
        split: `train` or `test`.
        window_images: Images of a window.
        cache_dir: Folder on this machine's disk; None = `NCSN_CACHE_DIR`, else `~/.cache/ncsn`.
    """

    def __init__(
        self, dataset_uri: str, split: str, *, window_images: int, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self._uri, self._split, self._window_images = dataset_uri, split, window_images
        self._manifest = load_manifest(dataset_uri)
        self._size = self._manifest.count(split)
        base = Path(cache_dir).expanduser() if cache_dir else cache_folder()
        self._folder = base / self._manifest.digest / f"{split}-chunks-{rows_per_chunk(window_images)}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._ahead: Future[None] | None = None
        self._seed, self._window = -1, Window(0, np.empty(0, np.int64), ())
        self._chunks: dict[int, np.ndarray] = {}
        self._mine: set[int] = set()

    def __len__(self) -> int:
        return self._size

    def head(self, count: int) -> np.ndarray:
        """See `TrainingImages`."""
        return read_split(self._uri, self._split, limit=count).images

    def ordered(self, seed: int, *, first: int, count: int) -> np.ndarray:
        """See `TrainingImages`; quick where `first` grows from call to call.

        Raises:
            OSError: if the local disk is full or the store cannot be read.
        """
        images = np.empty((count, *self._manifest.shape), np.uint8)
        chunk_rows, filled = rows_per_chunk(self._window_images), 0
        while filled < count:
            place = first + filled
            if seed != self._seed or not self._window.first <= place < self._window.last:
                self._enter(seed, place)
            offset = place - self._window.first
            for row in self._window.rows[offset : offset + count - filled].tolist():
                chunk, within = divmod(row, chunk_rows)
                images[filled] = self._chunks[chunk][within]
                filled += 1
        return images

    def _enter(self, seed: int, place: int) -> None:
        """Go to the window of `place`, let go of those behind and fetch the next."""
        if self._ahead is not None:
            self._ahead.result()
        window = self._find(seed, place)
        # Opened before anything is deleted: what is open stays readable, whoever deletes the file.
        self._chunks = {chunk: self._open(chunk) for chunk in window.chunks}
        self._seed, self._window = seed, window
        following = self._find(seed, window.last).chunks
        for chunk in self._mine - {*window.chunks, *following}:
            self._file(chunk).unlink(missing_ok=True)
        self._mine = {*window.chunks, *following}
        self._ahead = self._thread.submit(self._fetch, following)

    def _find(self, seed: int, place: int) -> Window:
        return window_at(seed, place, size=self._size, window_images=self._window_images)

    def _fetch(self, chunks: tuple[int, ...]) -> None:
        for chunk in chunks:
            with suppress(Timeout):  # another worker of this node is at it
                self._make(chunk, timeout=0)

    def _open(self, chunk: int) -> np.ndarray:
        while True:
            try:
                array = mapped(self._file(chunk))
            except FileNotFoundError:
                self._make(chunk, timeout=-1)
            else:
                return array

    def _file(self, chunk: int) -> Path:
        return self._folder / f"{chunk:07d}.npy"

    def _make(self, chunk: int, *, timeout: float) -> None:
        """Fetch a chunk unless it is there; of the workers of a node one does."""
        file = self._file(chunk)
        with FileLock(file.with_suffix(".lock"), timeout=timeout):
            if file.exists():
                return
            rows = rows_per_chunk(self._window_images)
            count = min(rows, self._size - chunk * rows)
            images = read_rows(self._uri, self._split, first=chunk * rows, count=count, manifest=self._manifest).images
            with storage.local_file(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, images)
