"""The endless order of training images: shuffled as a whole, or window by window where they are large.

Both orders are functions of (seed, place) alone, so any number of workers sees the same global batches and a resumed
run continues with the right image. Which of the two it is depends on the size of the dataset and never on a node.
"""

from __future__ import annotations

import functools
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.core.images import eight_bit
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.format import Manifest, Rows, SplitDigest, load_manifest, read_blocks, read_split
from ncsn.errors import UserError
from ncsn.storage import CACHE_DIR_VARIABLE, cache_folder

# A split with more bytes of pixels is read in windows of this size, which shuffle less; see `window_at`.
WINDOW_BYTES = 4 << 30
CHUNKS_PER_WINDOW = 16

_IMAGES, _LABELS = "images.npy", "labels.npy"


def open_training_images(dataset_uri: str, split: str = "train") -> TrainingImages:
    """A split, from this node's copy of it, or in windows if it is large."""
    manifest = load_manifest(dataset_uri)
    image_bytes = manifest.pixels.num_bytes
    if manifest.count(split) * image_bytes <= WINDOW_BYTES:
        return open_cache(dataset_uri, split)
    return StreamedSplit(dataset_uri, split, window_images=WINDOW_BYTES // image_bytes)


def mapped(path: Path) -> np.ndarray:
    array: np.memmap = np.load(path, mmap_mode="r")
    return array.view(np.ndarray)  # gathering a batch from an `np.memmap` is slower


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
        return self.rows(image_indices(seed, first=first, count=count, size=len(self)))

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
        images, labels = (mapped(folder / name) for name in (_IMAGES, _LABELS))
        intact = images.shape == (count, *manifest.shape) and labels.shape == (count,)
    except (OSError, ValueError):
        intact = False
    if not intact:
        raise UserError(str(folder), f"the local copy of dataset {manifest.name} is damaged", hint="delete that folder")
    return CachedSplit(images, labels)


def _copy(folder: Path, dataset_uri: str, split: str, manifest: Manifest, *, as_bytes: bool) -> None:
    count, digest = manifest.count(split), SplitDigest()
    pixel = "|u1" if as_bytes else np.dtype(manifest.pixels.dtype).str
    # Not through a memory map: there a full disk would kill the process.
    with (folder / _IMAGES).open("wb") as images, (folder / _LABELS).open("wb") as labels:
        for file, shape, kind in ((images, (count, *manifest.shape), pixel), (labels, (count,), "<i8")):
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for block in read_blocks(dataset_uri, split):
            digest.update(block)
            stored = eight_bit(block.images, manifest.pixels.limits) if as_bytes else block.images
            images.write(stored.tobytes())
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


def image_indices(seed: int, *, first: int, count: int, size: int) -> np.ndarray:
    """Rows at places `first .. first + count` of the endless order of a split of `size` rows, int64 [count].

    The order is one random permutation of all rows after another, each a function of (seed, epoch), so which images
    a step sees does not depend on batch sizes.
    """
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


@dataclass(frozen=True)
class Window:
    """A stretch of the endless order."""

    first: int  # its first place
    rows: np.ndarray  # int64, the rows of the split at its places
    chunks: tuple[int, ...]  # the chunks of the split that hold these rows

    @property
    def last(self) -> int:
        return self.first + len(self.rows)


def window_at(seed: int, place: int, *, size: int, window_images: int) -> Window:
    """The window of the endless order of a split of `size` rows that holds `place`.

    The split is cut into chunks of window_images / 16 rows. Each epoch takes the chunks in a random order, 16 to a
    window, and the rows of a window in a random order. So every epoch has every image once, and its order is a function
    of (seed, epoch, size, window_images): not of the number of workers, of batch sizes, of part files, or of timing.
    Images of one chunk stay within one window of each other; a window that holds the whole split is a full shuffle.
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
    """Rows of every chunk but the last of the split."""
    return max(1, window_images // CHUNKS_PER_WINDOW)


class StreamedSplit:
    """A split of which this node holds the window that is read and the next, fetched meanwhile; all if there is room.

    The workers of a node share the chunks, which are plain arrays of images and labels in memory-mapped files.
    """

    def __init__(self, dataset_uri: str, split: str, *, window_images: int) -> None:
        self._uri, self._split, self._window_images = dataset_uri, split, window_images
        self._chunk_rows = rows_per_chunk(window_images)
        self._manifest = load_manifest(dataset_uri)
        self._size = self._manifest.count(split)
        folder = cache_folder() / self._manifest.digest
        self._folder = folder / f"{split}-labeled-{self._chunk_rows}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._ahead: Future[None] | None = None
        self._seed, self._window = -1, Window(0, np.empty(0, np.int64), ())
        self._chunks: dict[int, np.ndarray] = {}
        self._mine: set[int] = set()
        self._keep_all = self._has_room()

    def __len__(self) -> int:
        return self._size

    @property
    def fetching(self) -> bool:
        """Whether the next window is still on its way from the store, so that `ordered` may have to wait for it."""
        return self._ahead is not None and not self._ahead.done()

    def rows(self, indices: np.ndarray) -> Rows:
        """The images that are stored at `indices` [N], with their labels; reads each row group that holds one."""
        return read_split(self._uri, self._split, indices)

    def ordered(self, seed: int, *, first: int, count: int) -> Rows:
        """The images at places `first .. first + count` of the order of `seed`; fast where `first` grows."""
        images = np.empty((count, *self._manifest.shape), self._manifest.pixels.dtype)
        labels = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            place = first + filled
            if seed != self._seed or not self._window.first <= place < self._window.last:
                self._enter(seed, place)
            offset = place - self._window.first
            for row in self._window.rows[offset : offset + count - filled].tolist():
                chunk, within = divmod(row, self._chunk_rows)
                images[filled], labels[filled] = self._chunks[chunk][within]
                filled += 1
        return Rows(images, labels)

    def _enter(self, seed: int, place: int) -> None:
        """Move to the window of `place`, delete the chunks of earlier ones and fetch the next."""
        if self._ahead is not None:
            self._ahead.result()
        window = self._find(seed, place)
        # Opened before anything is deleted: an open file stays readable after another worker deletes it.
        self._chunks = {chunk: self._open(chunk) for chunk in window.chunks}
        self._seed, self._window = seed, window
        following = self._find(seed, window.last).chunks
        for chunk in set() if self._keep_all else self._mine - {*window.chunks, *following}:
            self._file(chunk).unlink(missing_ok=True)
        self._mine = {*window.chunks, *following}
        self._ahead = self._thread.submit(self._fetch, following)

    def _has_room(self) -> bool:
        """Whether the node's disk can hold all chunks; `UserError` if it cannot even hold two windows."""
        room = shutil.disk_usage(self._folder).free + sum(file.stat().st_size for file in self._folder.glob("*.npy"))
        image_bytes = self._manifest.pixels.num_bytes + np.dtype(np.int64).itemsize
        two_windows = 2 * self._window_images * image_bytes
        if room < min(two_windows, self._size * image_bytes):
            raise UserError(
                str(self._folder),
                f"the disk has room for {room / 2**30:.1f} GiB of images, but training needs {two_windows / 2**30:.1f}",
                hint=f"free some, or set {CACHE_DIR_VARIABLE} to a folder on a larger disk",
            )
        return room >= self._size * image_bytes

    def _find(self, seed: int, place: int) -> Window:
        return window_at(seed, place, size=self._size, window_images=self._window_images)

    def _fetch(self, chunks: tuple[int, ...]) -> None:
        for chunk in chunks:
            with suppress(Timeout):  # another worker of this node is fetching it
                self._make(chunk, timeout=0)

    def _open(self, chunk: int) -> np.ndarray:
        while True:
            try:
                return mapped(self._file(chunk))
            except FileNotFoundError:
                self._make(chunk, timeout=-1)
            except ValueError:
                hint = "delete that file"
                raise UserError(str(self._file(chunk)), "this local copy of images is damaged", hint=hint) from None

    def _file(self, chunk: int) -> Path:
        return self._folder / f"{chunk:07d}.npy"

    def _make(self, chunk: int, *, timeout: float) -> None:
        """Fetch a chunk unless another worker of the node has."""
        file = self._file(chunk)
        with FileLock(file.with_suffix(".lock"), timeout=timeout):
            if file.exists():
                return
            first, last = chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, self._size)
            read = read_split(self._uri, self._split, range(first, last))
            image = ("image", self._manifest.pixels.dtype, self._manifest.shape)
            rows = np.empty(len(read), [image, ("label", np.int64)])
            rows["image"], rows["label"] = read.images, read.labels
            with storage.local_file(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, rows)


TrainingImages = CachedSplit | StreamedSplit
