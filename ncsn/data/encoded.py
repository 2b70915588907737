"""Decoding many PNG or JPEG images on all cores, in order and within bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ncsn.data.pixels import BadImageError, Fit, decode
from ncsn.data.source import BadImages, Example

_LARGEST_POOL = 16
_WAITING_PER_THREAD = 4


class Encoded(NamedTuple):
    """One image file: its name for messages, its bytes, its label."""

    name: str
    data: bytes
    label: int


def decode_in_order(files: Iterable[Encoded], *, fit: Fit, bad: BadImages) -> Iterator[Example]:
    """Decode and fit images on a pool of threads (Pillow releases the interpreter lock while it decodes).

    Raises:
        ValueError: naming the image, for one that does not decode (unless bad images are skipped) or does not fit.
    """
    threads = min(_LARGEST_POOL, os.cpu_count() or 1)
    waiting: deque[tuple[Encoded, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for file in files:
                waiting.append((file, pool.submit(_decode, file, fit)))
                if len(waiting) >= threads * _WAITING_PER_THREAD:
                    yield from _finish(*waiting.popleft(), bad)
            while waiting:
                yield from _finish(*waiting.popleft(), bad)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _decode(file: Encoded, fit: Fit) -> np.ndarray:
    return fit.image(decode(file.data), name=file.name)


def _finish(file: Encoded, future: Future[np.ndarray], bad: BadImages) -> Iterator[Example]:
    try:
        yield Example(future.result(), file.label)
    except BadImageError as error:
        bad.handle(file.name, str(error))
