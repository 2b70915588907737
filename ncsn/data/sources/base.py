"""What a source of images is, its files, and the choice of test images. Loads neither torch nor Pillow."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from ncsn import storage
from ncsn.config.schema import DataConfig
from ncsn.data.format import SkippedImage
from ncsn.errors import NotFound, UserError
from ncsn.storage.retry import unavailable

if TYPE_CHECKING:
    from ncsn.data.pixels import Example

NO_FILES = f"{0:016x}"  # the fingerprint of a source that is away or empty, or comes with a library
_LISTED = 4096  # files that are objects of Python at a time
MOST_NAME_BYTES = 255  # of a class, as of a file
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, half characters, and ends of lines


class Split(Protocol):
    """The images of a split in their order. Picklable, so that any process can read a section of them."""

    in_tasks: ClassVar[bool]  # whether reading them takes long enough to share the work between processes

    def __len__(self) -> int:
        """Images that it offers; some of them may be bad."""

    def section(self, first: int, last: int) -> Split:
        """Images `first .. last`."""

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        """Each image, or why it cannot be used; read on `cores` cores, None = all of this machine."""


@dataclass(frozen=True)
class Source:
    description: str
    license: str
    class_names: tuple[str, ...]  # of label 0, 1, ...; empty if there are no labels
    splits: Mapping[str, Split]  # `train` and `test`
    ignored: Mapping[str, int] = field(default_factory=dict)  # what else was found, such as `.mp4` -> number of files

    def __post_init__(self) -> None:
        """Refuse names of classes that a path, a line or a key could not hold."""
        for name, times in Counter(self.class_names).items():
            if name in ("", ".", ".."):
                reason = "is no name of a class"
            elif any(unicodedata.category(letter) in _NO_TEXT for letter in name):
                reason = "is the name of a class, and has a control character or is no UTF-8"
            elif len(name.encode()) > MOST_NAME_BYTES:
                reason = f"is the name of a class, and has more than {MOST_NAME_BYTES} bytes"
            elif times > 1:
                reason = "is the name of several classes"
            else:
                continue
            raise UserError("data.root", reason, hint="rename this class of the images", value=name)


@dataclass
class BadImages:
    """Images that cannot be used: stop at the first, or leave them out. Counts those that are converted too."""

    skip: bool
    skipped: list[SkippedImage] = field(default_factory=list)
    conversions: Counter[str] = field(default_factory=Counter)

    def filter(self, rows: Iterable[Example | SkippedImage]) -> Iterator[Example]:
        for row in rows:
            if not isinstance(row, SkippedImage):
                if row.conversions:
                    self.conversions.update(row.conversions)
                yield row
            elif self.skip:
                self.skipped.append(row)
            else:
                hint = "repair or remove it, or set data.on_bad_image to skip"
                raise UserError(row.name, f"cannot be used: {row.reason}", hint=hint)


def hold_out(ranks: NDArray[np.uint64], labels: NDArray[np.int64], fraction: float) -> dict[str, NDArray[np.int64]]:
    """Indices of the images of the train and the test split, ascending.

    The choice depends on `name_ranks` and labels only, so every experiment on the same images tests on the same ones.
    Each class gives its share; floor(N * fraction) images in all, but at least 1 of 2 or more.
    """
    share, order = Fraction(str(fraction)), np.lexsort((ranks, labels))
    count = int(len(order) * share)
    # Where the share of the images so far reaches the next whole number.
    places = (-(-number * share.denominator // share.numerator) - 1 for number in range(1, count + 1))
    test = np.zeros(len(order), bool)
    test[order[np.fromiter(places, np.int64) if count or len(order) < 2 else -1]] = True
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}


def name_ranks(names: Iterable[str]) -> NDArray[np.uint64]:
    """A fixed pseudo-random rank of each name."""
    digests = (hashlib.sha256(name.encode()).digest() for name in names)
    return np.fromiter((int.from_bytes(digest[:8]) for digest in digests), np.uint64)


def texts(column: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    """The values of a column of a listing, few of them in memory at a time."""
    for batch in pa.table({"text": column}).to_batches(_LISTED):
        yield from batch.column(0).to_pylist()


def required_root(data: DataConfig) -> str:
    """data.root of a source that reads files."""
    if data.root is None:
        downloaded = data.source in ("fashion_mnist", "mnist", "cifar10")
        download = "; data.download=true downloads them into it" if downloaded else ""
        hint = f"set it to the folder with the files of {data.source}{download}"
        raise UserError("data.root", f"is not set, and data.source {data.source} reads files", hint=hint)
    return data.root


def root_of(data: DataConfig) -> Path:
    root = Path(required_root(data)).expanduser()
    if not root.exists():
        raise _missing(data.root)
    return root


def require_utf8(name: str, *, key: str) -> None:
    """Refuse the name of a file that is not text: it can neither be hashed nor shown."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(key, f"holds {name!r}, a name that is not UTF-8", hint="rename it") from None


def list_files(data: DataConfig) -> pa.Array:
    """Paths below data.root of all files but hidden ones, sorted; the name of the root itself if it is a file."""
    paths, blocks = (path for path, _, _ in _files(data)), list[pa.Array]()
    # As objects of Python, they would take several times as much memory.
    while some := list(itertools.islice(paths, _LISTED)):
        blocks.append(pa.array(some, pa.large_string()))
    whole = pa.chunked_array(blocks, pa.large_string()).combine_chunks()
    blocks.clear()
    return whole.sort()


def source_fingerprint(data: DataConfig) -> str:
    """Digest of the names, sizes and dates of the source's files: it changes when the images may have changed."""
    total = 0  # of the digests of all files, so that they come in any order and none is kept
    with suppress(FileNotFoundError):  # opening the source says so
        for file in () if data.root is None else _files(data):
            total += int.from_bytes(hashlib.sha256("\0".join(map(str, file)).encode()).digest())
    return f"{total % 2**64:016x}"


def _files(data: DataConfig) -> Iterator[tuple[str, int, int]]:
    """Each file: its path below the root, its bytes, and when it changed in nanoseconds."""
    root = storage.absolute(required_root(data))
    path = Path(root)
    if not storage.is_local(root):
        yield from _objects(root)
    elif not path.exists():
        raise _missing(root)
    elif path.is_file():
        yield path.name, path.stat().st_size, path.stat().st_mtime_ns
    else:
        inside = None if data.follow_links else path.resolve()
        above = frozenset({(path.stat().st_dev, path.stat().st_ino)})
        yield from _files_below(root, "", above=above, inside=inside)


def _files_below(
    folder: str, prefix: str, *, above: frozenset[tuple[int, int]], inside: Path | None
) -> Iterator[tuple[str, int, int]]:
    """The files of `folder` and of its folders, `prefix` before each name.

    A link to a folder that it is in, one of `above`, is not followed, and one that leads out of `inside` is refused.
    """
    folders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "lost+found":  # the latter is root's on each ext4 volume
                    continue
                try:
                    status = entry.stat()
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):  # deleted meanwhile, or a link to nothing or itself
                        continue
                    raise
                if inside and entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                    hint = "set data.root to the folder that holds the files, or data.follow_links to true"
                    raise UserError(entry.path, "is a link that leads out of data.root", hint=hint)
                identity = status.st_dev, status.st_ino
                if stat.S_ISREG(status.st_mode):
                    require_utf8(prefix + entry.name, key="data.root")
                    yield prefix + entry.name, status.st_size, status.st_mtime_ns
                elif stat.S_ISDIR(status.st_mode) and identity not in above:
                    folders.append((entry, above | {identity}))
    except OSError as error:
        reason, hint = f"cannot be read: {error.strerror}", "make it readable, or remove it"
        raise UserError("data.root", reason, hint=hint, value=folder) from error
    for entry, above_it in folders:
        yield from _files_below(entry.path, f"{prefix}{entry.name}/", above=above_it, inside=inside)


def _objects(root: str) -> Iterator[tuple[str, int, int]]:
    try:
        filesystem, path = storage.filesystem(root)
        (info,) = filesystem.get_file_info([path])
        alone = info.type == fs.FileType.File
        infos = [info] if alone else filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except FileNotFoundError:
        raise _missing(root) from None
    except OSError as error:
        if unavailable(error):
            raise
        hint = "set AWS_ENDPOINT_URL, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to keys that may read it"
        raise UserError("data.root", f"cannot be read: {' '.join(str(error).split())}", hint=hint, value=root) from None
    for info in infos:
        name = info.base_name if alone else info.path.removeprefix(f"{path}/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if info.type == fs.FileType.File and not hidden:
            yield name, info.size, info.mtime_ns or 0


def _missing(root: object) -> NotFound:
    return NotFound("data.root", "does not exist", hint="set it to where the images are", value=str(root))
