"""Encoded images, wherever they lie: reading and decoding them in order and within bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ncsn import storage
from ncsn.data.archives import Member, read_member
from ncsn.data.pixels import BadImageError, Fit, decode
from ncsn.data.source import BadImages, Example

_LARGEST_POOL = 16
_WAITING_PER_THREAD = 4


class ImageFile(NamedTuple):
    """One image: a file, or a member of an archive.

    Attributes:
        file: Path of the file or archive below the root; empty for the root itself.
        label: Its label, -1 for none.
        member: Where it lies in the archive; None for a file.
    """

    file: str
    label: int
    member: Member | None = None


@dataclass(frozen=True)
class EncodedImages:
    """Images in their order; picklable, so that any process can read a section of them.

    Attributes:
        root: URI of the folder, bucket or archive.
        images: The images.
        fit: How they are brought to one shape.
    """

    root: str
    images: Sequence[ImageFile]
    fit: Fit

    def __len__(self) -> int:
        return len(self.images)

    def section(self, first: int, last: int) -> EncodedImages:
        """The images `first .. last`."""
        return replace(self, images=self.images[first:last])

    def stream(self, bad: BadImages, *, cores: int | None = None) -> Iterator[Example]:
        """Read and decode them on a pool of threads (Pillow releases the interpreter lock while it decodes).

        Args:
            bad: What to do with images that do not decode.
            cores: Cores to use; None = all. A bucket is asked for 16 images at a time on any number of them.

        Raises:
            UserError: naming the image, for one that does not decode (unless bad images are skipped) or does not fit.
        """
        threads = min(_LARGEST_POOL, cores or os.cpu_count() or 1) if storage.is_local(self.root) else _LARGEST_POOL
        with _Reader(self.root) as reader:

            def work(image: ImageFile) -> np.ndarray:
                return self.fit.image(decode(reader.read(image)), name=self._name(image))

            for image, future in _in_order(self.images, work, threads=threads):
                try:
                    yield Example(future.result(), image.label)
                except BadImageError as error:
                    bad.handle(self._name(image), str(error))

    def _name(self, image: ImageFile) -> str:
        """For a person."""
        file = storage.join(self.root, image.file) if image.file else self.root
        return file if image.member is None else f"{file}:{image.member.path}"


class _Reader:
    """Reads images for several threads; each local archive is opened once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._lock = Lock()
        self._archives: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, image: ImageFile) -> bytes:
        uri = storage.join(self._root, image.file) if image.file else self._root
        if image.member is None:
            return storage.read_bytes(uri)
        if storage.is_local(uri):
            return read_member(self._archive(uri), image.member)
        # A file of the patient S3 has one position: threads cannot share it.
        filesystem, path = storage.filesystem(uri)
        with filesystem.open_input_file(path) as stream:
            return read_member(stream, image.member)

    def _archive(self, uri: str) -> Any:
        with self._lock:
            if uri not in self._archives:
                filesystem, path = storage.filesystem(uri)
                self._archives[uri] = self._open.enter_context(filesystem.open_input_file(path))
            return self._archives[uri]


def _in_order(
    images: Iterable[ImageFile], work: Callable[[ImageFile], np.ndarray], *, threads: int
) -> Iterator[tuple[ImageFile, Future[np.ndarray]]]:
    waiting: deque[tuple[ImageFile, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for image in images:
                waiting.append((image, pool.submit(work, image)))
                if len(waiting) >= threads * _WAITING_PER_THREAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
