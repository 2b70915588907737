"""Encoded images in folders, buckets and archives: found, read and decoded in order.

Nothing is unpacked. The members of an archive, local or in a bucket, are listed once; each image is then one read of
its bytes, in any order and by any process.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from threading import Lock, Semaphore
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self, TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ncsn import storage
from ncsn.data.format import CLASS_NAMES, SkippedImage
from ncsn.data.pixels import BadImageError, Example, Fit, Picture, decode, require_size
from ncsn.data.sources.base import MOST_NAME_BYTES, require_utf8
from ncsn.errors import UserError

R = TypeVar("R")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".npy")
ARCHIVE_SUFFIXES = (".tar", ".zip")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
HEIC_SUFFIXES = (".heic", ".heif")  # of phones; Pillow does not read them
# Of Hugging Face, EDM, Kaggle and an export of ours.
LABEL_TABLES = ("metadata.jsonl", "metadata.csv", "dataset.json", "labels.csv", CLASS_NAMES)

_LABEL_KEYS = ("cls", "label")
_LABEL_BYTES = 64 << 10  # of a file with the label of one image
_INDEX_BUFFER = 256 << 10
_ZIP_HEADER = struct.Struct("<4s5H3L2H")
_LONGEST_ZIP_HEADER = _ZIP_HEADER.size + 2 * 0xFFFF
_ENCRYPTED = 0x1
_RAW_DEFLATE = -zlib.MAX_WBITS

_LARGEST_POOL = 16
_LISTED = 1024  # images whose names are objects of Python at a time
_TOGETHER = 16  # images that a thread takes at once: handing over each by itself costs a tenth of a small JPEG
_HELD_TOGETHER = 8 << 20  # bytes, beyond which fewer images are
_WAITING_PER_THREAD = 2
_MOST_HELD = 256 << 20  # bytes of all images that wait
# Bytes of an image or its file, of which two at a time: a machine may have many threads and little memory.
_LARGE, _LARGE_AT_ONCE = 96 << 20, 2


class Member(NamedTuple):
    path: str
    offset: int  # of its first byte, in a zip archive of its header
    span: int  # bytes from there on that hold it
    # How it is packed, as of `zipfile.ZipInfo`; the method is None in a tar archive.
    method: int | None = None
    flags: int = 0
    crc: int = 0
    packed: int = 0
    size: int = 0


MEMBER = pa.schema([("path", pa.large_string()), *((name, pa.int64()) for name in Member._fields[1:])])


def kind_of(path: str) -> str:
    """The suffix of a file, in lower case."""
    return PurePosixPath(path).suffix.lower() or "without a suffix"


def index_archive(uri: str) -> tuple[pa.Table, list[Member], Counter[str]]:
    """The images of a `.tar` or `.zip` in its order, its label tables, and its other files by kind.

    Hidden files do not count. An image is a row of `MEMBER`, and its `word` the label in `x.cls`, or under `cls` or
    `label` in `x.json`, next to `x.png`; empty for JSON that has neither, null without such a file.
    """
    with _opened(uri) as stream:
        found = _zip_members(stream, uri) if uri.lower().endswith(".zip") else _tar_members(stream, uri)
        images: list[Member] = []
        words: dict[str, str] = {}
        tables: list[Member] = []
        others = Counter[str]()
        for member in found:
            name = PurePosixPath(member.path)
            stem, _, suffix = name.name.partition(".")
            if not stem:
                continue
            if name.suffix.lower() in IMAGE_SUFFIXES:
                require_utf8(member.path, key=uri)
                images.append(member)
                continue
            try:
                if name.name in LABEL_TABLES:
                    tables.append(member)
                elif suffix == "cls":
                    words[_key(member.path)] = _label(read_member(stream, member, _LABEL_BYTES).decode().strip())
                elif suffix == "json":
                    fields = json.loads(read_member(stream, member, _LABEL_BYTES).decode())
                    values = [fields[key] for key in _LABEL_KEYS if key in fields] if isinstance(fields, dict) else []
                    words[_key(member.path)] = _label(str(values[0])) if values else ""
                else:
                    others[kind_of(member.path)] += 1
            except (ValueError, RecursionError) as error:
                raise UserError(f"{uri}:{member.path}", f"is not a label: {error}") from error
    found = pa.Table.from_pylist([member._asdict() for member in images], MEMBER)
    labels = pa.array([words.get(_key(member.path)) for member in images], pa.large_string())
    return found.append_column("word", labels), tables, others


def _label(word: str) -> str:
    if len(word.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"it has more than {MOST_NAME_BYTES} bytes")
    return word


def read_member(stream: Any, member: Member, largest: float) -> bytes:
    """The bytes of a member; `BadImageError` if they are more than `largest`, damaged, or packed in an unusual way."""
    require_size(max(member.span, member.size), largest)
    data: bytes = stream.read_at(member.span, member.offset)
    if len(data) < member.span:
        raise BadImageError("the archive ends within it")
    if member.method is None:
        return data
    if member.flags & _ENCRYPTED:
        raise BadImageError("is encrypted")
    if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadImageError("is packed by another method than Deflate; unpack it, and zip it again")
    if len(data) < _ZIP_HEADER.size or not data.startswith(b"PK\x03\x04"):
        raise BadImageError("has no zip header where the archive's directory says")
    *_, name_length, extra_length = _ZIP_HEADER.unpack_from(data)
    first = _ZIP_HEADER.size + name_length + extra_length
    content = data[first : first + member.packed]
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(_RAW_DEFLATE).decompress(content, member.size + 1)
        except zlib.error as error:
            raise BadImageError(str(error)) from error
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise BadImageError("has not the size and the checksum that the archive's directory says")
    return content


def _key(path: str) -> str:
    """What the names of an image and of its label share: the path up to the first dot of the file's name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _tar_members(stream: Any, uri: str) -> Iterator[Member]:
    try:
        # Headers are between the images: buffered, a header and the small images after it are one read of a bucket.
        buffered = io.BufferedReader(stream, _INDEX_BUFFER)
        with tarfile.open(fileobj=cast("BinaryIO", buffered), mode="r:") as tar:
            for info in tar:
                if info.size < 0:
                    raise tarfile.ReadError("a member of less than no bytes")  # would be found again and again
                if info.isreg() and not info.issparse():
                    place = stream.tell()
                    yield Member(info.name.removeprefix("./"), info.offset_data, info.size)  # of `tar -c .`
                    stream.seek(place)  # a local file of Arrow loses it where the member is read meanwhile
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        hint = "fetch it again, and decompress it if it is compressed"
        raise UserError(uri, f"is not a whole tar archive ({error})", hint=hint) from error


def _zip_members(stream: Any, uri: str) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            end = archive.start_dir
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        raise UserError(uri, f"is not a whole zip archive ({error})", hint="fetch it again") from error
    ends = [info.header_offset for info in infos[1:]] + [end]
    for info, last in zip(infos, ends, strict=True):
        if not info.is_dir():
            span = min(last - info.header_offset, _LONGEST_ZIP_HEADER + info.compress_size)
            packing = info.compress_type, info.flag_bits, info.CRC, info.compress_size, info.file_size
            yield Member(info.filename, info.header_offset, span, *packing)


class Encoded(NamedTuple):
    name: str
    label: int
    load: Callable[[Callable[[int], None]], Picture]  # called in another thread, with `admit` as of `decode`
    held: int = 0  # bytes that are in memory until then


class DecodedSplit(ABC):
    """A split of images that are decoded when they are read."""

    labels: NDArray[np.int64]
    fit: Fit
    in_tasks: ClassVar[bool] = True

    @property
    def remote(self) -> bool:
        """Whether a bucket is asked, for several images at a time on any number of cores."""
        return False

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def section(self, first: int, last: int) -> Self:
        """Images `first .. last`."""

    @abstractmethod
    def encoded(self, least_side: int | None) -> Iterator[Encoded]:
        """The images in order; `least_side` as of `decode`."""

    def stream(self, *, cores: int | None = None) -> Iterator[Example | SkippedImage]:
        fit = self.fit

        def example(image: Encoded, picture: Picture) -> Example:
            return fit.picture(picture, label=image.label)._replace(name=image.name)

        return self.each(example, least_side=fit.least_side, cores=cores)

    def each(
        self, function: Callable[[Encoded, Picture], R], *, least_side: int | None, cores: int | None
    ) -> Generator[R | SkippedImage, None, None]:
        """`function` of each image, or why it cannot be used, on a pool of threads (Pillow releases Python's lock)."""
        gate = Semaphore(_LARGE_AT_ONCE)

        def call(image: Encoded) -> R | SkippedImage:
            inside = False

            def admit(size: int) -> None:
                nonlocal inside
                inside = inside or (size > _LARGE and gate.acquire())

            try:
                return function(image, image.load(admit))
            except BadImageError as error:
                return SkippedImage(image.name, str(error))
            finally:
                if inside:
                    gate.release()

        threads = _LARGEST_POOL if self.remote else min(_LARGEST_POOL, cores or os.cpu_count() or 1)
        waiting: deque[tuple[Future[list[R | SkippedImage]], int]] = deque()
        images, held = _together(self.encoded(least_side)), 0
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            try:
                for some, size in images:
                    while len(waiting) >= threads * _WAITING_PER_THREAD or (waiting and held + size > _MOST_HELD):
                        done, freed = waiting.popleft()
                        yield from done.result()
                        held -= freed
                    waiting.append((pool.submit(lambda some: list(map(call, some)), some), size))
                    held += size
                while waiting:
                    yield from waiting.popleft()[0].result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _together(images: Iterator[Encoded]) -> Iterator[tuple[list[Encoded], int]]:
    """A few images at a time, and how many bytes they hold."""
    some, held = list[Encoded](), 0
    for image in images:
        some.append(image)
        held += image.held
        if len(some) == _TOGETHER or held > _HELD_TOGETHER:
            yield some, held
            some, held = [], 0
    if some:
        yield some, held


@dataclass(frozen=True)
class EncodedImages(DecodedSplit):
    """A split of encoded images below a folder, bucket or archive."""

    root: str  # URI
    # Of more images: `file`, its path below the root or empty for the root itself, and in archives also `MEMBER`.
    images: pa.Table
    rows: NDArray[np.int64]  # of them, in the order of the split
    labels: NDArray[np.int64]
    fit: Fit

    @property
    def remote(self) -> bool:
        return not storage.is_local(self.root)

    def section(self, first: int, last: int) -> Self:
        rows = self.rows[first:last]  # another process gets no more than these
        return replace(self, images=self.images.take(rows), rows=np.arange(len(rows)), labels=self.labels[first:last])

    def encoded(self, least_side: int | None) -> Iterator[Encoded]:
        reader, largest = ImageReader(self.fit.largest), self.fit.largest

        def load(file: str, member: Member | None, admit: Callable[[int], None]) -> Picture:
            data = reader.read(file, member, admit)
            return decode(data, least_side=least_side, largest=largest, admit=admit)

        for first in range(0, len(self.rows), _LISTED):
            some = slice(first, first + _LISTED)
            images = self.images.take(self.rows[some])
            fields = (column.to_pylist() for column in images.columns)
            for label, file, *member in zip(self.labels[some].tolist(), *fields, strict=True):
                uri = storage.join(self.root, file) if file else self.root
                name = f"{uri}:{member[0]}" if member else uri
                yield Encoded(name, label, partial(load, uri, Member(*member) if member else None))


class ImageReader:
    """Reads images for several threads and opens each local archive once, until nobody reads any more."""

    def __init__(self, largest: float) -> None:
        self._largest = largest  # bytes of an image
        self._lock = Lock()
        self._archives: dict[str, Any] = {}

    def read(self, uri: str, member: Member | None, admit: Callable[[int], None] = lambda _: None) -> bytes:
        def check(size: int) -> None:
            require_size(size, self._largest)
            admit(size)

        if member is None:
            try:
                return storage.read_bytes(uri, check=check)
            except PermissionError as error:
                reason = f"cannot be read: {error.strerror}"
                raise UserError(uri, reason, hint="make it readable, or remove it") from None
        admit(max(member.span, member.size))
        if storage.is_local(uri):
            with self._lock:
                if uri not in self._archives:
                    self._archives[uri] = _opened(uri)
            return read_member(self._archives[uri], member, self._largest)
        # An open S3 file has one position, so threads cannot share it.
        with _opened(uri) as stream:
            return read_member(stream, member, self._largest)


def _opened(uri: str) -> Any:
    filesystem, path = storage.filesystem(uri)
    return filesystem.open_input_file(path)
