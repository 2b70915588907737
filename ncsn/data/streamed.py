"""A split that is too large for a copy on each node: its endless order in windows, fetched before they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ncsn import storage
from ncsn.core.keyed_random import keyed_permutation
from ncsn.data.format import Rows, load_manifest, read_part, read_split
from ncsn.errors import UserError
from ncsn.storage import CACHE_DIR_VARIABLE, cache_folder

_THREADS = 4  # that fetch parts


@dataclass(frozen=True)
class Window:
    """A stretch of the endless order."""

    first: int  # its first place
    rows: np.ndarray  # int64, the rows of the split at its places
    parts: tuple[int, ...]  # the parts of the split that hold these rows

    @property
    def last(self) -> int:
        return self.first + len(self.rows)


def window_at(seed: int, place: int, *, lengths: np.ndarray, parts: int) -> Window:
    """The window of the endless order of a split, of `parts` parts, that holds `place`; `lengths` are those of all.

    Each epoch takes the parts in a random order, `parts` to a window, and the rows of a window in a random order. So
    every epoch has every image once, and its order is a function of (seed, epoch) and the dataset: not of the number of
    workers, of batch sizes, or of timing. Images of one part stay within one window of each other; a window that holds
    all parts is a full shuffle.
    """
    size = int(lengths.sum())
    epoch, offset = divmod(place, size)
    if len(lengths) <= parts:
        return Window(epoch * size, keyed_permutation(seed, epoch=epoch, size=size), tuple(range(len(lengths))))
    order = keyed_permutation(seed, epoch=epoch, size=len(lengths))
    starts = np.cumsum(lengths[order]) - lengths[order]  # of the parts in this order
    number = (int(np.searchsorted(starts, offset, side="right")) - 1) // parts
    chosen, firsts = order[number * parts : (number + 1) * parts], np.cumsum(lengths) - lengths
    rows = np.concatenate([np.arange(firsts[part], firsts[part] + lengths[part]) for part in chosen])
    # Another address than that of any epoch's order of parts.
    shuffle = keyed_permutation(seed, epoch=epoch + ((number + 1) << 32), size=len(rows))
    return Window(epoch * size + int(starts[number * parts]), rows[shuffle], tuple(chosen.tolist()))


def rows_at(window_of: Callable[[int], Window], *, first: int, count: int) -> np.ndarray:
    """The rows at places `first .. first + count` of an order, whose windows a function of a place gives, int64."""
    rows = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        window = window_of(first + filled)
        some = window.rows[first + filled - window.first :][: count - filled]
        rows[filled : filled + len(some)] = some
        filled += len(some)
    return rows


class StreamedSplit:
    """A split of which this node holds the window that is read and the next, fetched meanwhile; all if there is room.

    The workers of a node share the parts, each an array of images and labels in a memory-mapped file.
    """

    def __init__(self, dataset_uri: str, split: str, *, window_images: int) -> None:
        self._uri, self._split, self._manifest = dataset_uri, split, load_manifest(dataset_uri)
        self._parts = self._manifest.parts[split]
        self._lengths = np.array([part.rows for part in self._parts])
        self._ends = np.cumsum(self._lengths)
        self._per_window = max(1, window_images // int(self._lengths.max()))
        self._folder = cache_folder() / self._manifest.digest / f"{split}-parts"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._ahead: Future[Window] | None = None
        self._seed, self._window = -1, Window(0, np.empty(0, np.int64), ())
        self._opened: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # images and labels
        # Parts that earlier processes left count as room.
        left = list(self._folder.glob("*.npy"))
        room = shutil.disk_usage(self._folder).free + sum(file.stat().st_size for file in left)
        image_bytes = self._manifest.pixels.num_bytes + np.dtype(np.int64).itemsize
        two_windows = 2 * self._per_window * int(self._lengths.max()) * image_bytes
        if room < min(two_windows, len(self) * image_bytes):
            sizes = f"room for {room / 2**30:.1f} GiB of images, but training needs {two_windows / 2**30:.1f}"
            hint = f"free some, or set {CACHE_DIR_VARIABLE} to a folder on a larger disk"
            raise UserError(str(self._folder), f"the disk has {sizes}", hint=hint)
        self._keep_all = room >= len(self) * image_bytes
        self._mine = set() if self._keep_all else {int(file.stem) for file in left}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def fetching(self) -> bool:
        """Whether the next window is still on its way from the store, so that `ordered` may have to wait for it."""
        return self._ahead is not None and not self._ahead.done()

    def rows(self, indices: np.ndarray) -> Rows:
        """The images that are stored at `indices` [N], with their labels; reads each row group that holds one."""
        return read_split(self._uri, self._split, indices)

    def order(self, seed: int, *, first: int, count: int) -> np.ndarray:
        """The rows at places `first .. first + count` of the order of `seed`, int64 [count]."""
        return rows_at(partial(self._find, seed), first=first, count=count)

    def ordered(self, seed: int, *, first: int, count: int) -> Rows:
        """The images at places `first .. first + count` of the order of `seed`; fast where `first` grows."""
        if self._ahead is not None and self._ahead.done():
            self._ahead.result()  # its error, long before its images are needed
        self._opened = {part: self._opened[part] for part in self._window.parts}
        rows = rows_at(partial(self._enter, seed), first=first, count=count)
        parts = np.searchsorted(self._ends, rows, side="right")
        within = rows - (self._ends - self._lengths)[parts]
        found = Rows(
            np.empty((count, *self._manifest.pixels.shape), self._manifest.pixels.dtype), np.empty(count, np.int64)
        )
        for place, (part, row) in enumerate(zip(parts.tolist(), within.tolist(), strict=True)):
            images, labels = self._opened[part]
            found.images[place], found.labels[place] = images[row], labels[row]
        return found

    def _enter(self, seed: int, place: int) -> Window:
        """The window of `place`, its parts opened, and the next one being prepared."""
        if seed != self._seed or not self._window.first <= place < self._window.last:
            window = None if self._ahead is None else self._ahead.result()
            if window is None or seed != self._seed or not window.first <= place < window.last:
                window = self._prepare(seed, place)
            # An open file stays readable after another worker deletes it.
            self._opened |= {part: self._open(part) for part in window.parts}
            self._seed, self._window = seed, window
            self._ahead = self._thread.submit(self._prepare, seed, window.last)
        return self._window

    def _prepare(self, seed: int, place: int) -> Window:
        """The window of `place`, its parts fetched, and those deleted that neither it nor the present one needs."""
        window = self._find(seed, place)
        needed = {*window.parts, *self._window.parts}
        for part in set() if self._keep_all else self._mine - needed:
            self._file(part).unlink(missing_ok=True)
        self._mine = needed
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(partial(self._make, wait=False), window.parts))
        return window

    def _find(self, seed: int, place: int) -> Window:
        return window_at(seed, place, lengths=self._lengths, parts=self._per_window)

    def _open(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        while True:
            try:
                rows = storage.mapped(self._file(part))
                return rows["image"], rows["label"]
            except FileNotFoundError:
                self._make(part, wait=True)
            except (ValueError, EOFError):
                hint = "delete that file"
                raise UserError(str(self._file(part)), "this local copy of images is damaged", hint=hint) from None

    def _file(self, part: int) -> Path:
        return self._folder / f"{part:05d}.npy"

    def _make(self, part: int, *, wait: bool) -> None:
        """Fetch a part unless another worker of the node has, or fetches it while this one does not `wait`."""
        file, pixels = self._file(part), self._manifest.pixels
        with suppress(Timeout), FileLock(file.with_suffix(".lock"), timeout=-1 if wait else 0):
            if file.exists():
                return
            kind = np.dtype([("image", pixels.dtype, pixels.shape), ("label", np.int64)])
            shape = (self._parts[part].rows,)
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            with storage.local_file(file) as temporary, temporary.open("wb") as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for block in read_part(self._uri, self._parts[part], pixels):
                    rows = np.empty(len(block), kind)
                    rows["image"], rows["label"] = block.images, block.labels
                    stream.write(rows.tobytes())
