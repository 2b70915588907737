"""What an extractor is: a function from images to features and class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ncsn import storage
from ncsn.errors import InvalidValue

Images = npt.NDArray[np.uint8]


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep a GPU's convolutions from TF32, so that equal fingerprints mean equal features there and on a CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Extracted:
    """Features and class probabilities of N images."""

    features: npt.NDArray[np.float32]  # [N, D]
    log_probabilities: npt.NDArray[np.float64]  # [N, K], log p(class | image)


@dataclass(frozen=True)
class Identity:
    """Which extractor it is, without its weights; see `Extractor`."""

    name: str
    fingerprint: str
    num_features: int
    knows_classes: bool = True  # whether the classes of its probabilities mean something, so that there is a score


class Extractor(Protocol):
    """A fixed function from uint8 images to features and class probabilities, independent of batch composition."""

    @property
    def name(self) -> str:
        """Prefix of metric names: `classifier`, `clusters`, `inception`, `dinov2`, or another with other weights."""

    @property
    def fingerprint(self) -> str:
        """Hash of kind, weights, resize and preprocessing: equal fingerprints give comparable features."""

    @property
    def num_features(self) -> int:
        """D."""

    def extract(self, images: Images) -> Extracted:
        """Features and log probabilities of [N, H, W, C] uint8 images."""


def extract_all(
    extractor: Extractor, stream: Iterable[Images], *, on_images: Callable[[int], None] | None = None
) -> Extracted:
    """Features and probabilities of a stream of [n, H, W, C] uint8 batches; `on_images(n)` follows each batch."""
    features: list[npt.NDArray[np.float32]] = []
    log_probabilities: list[npt.NDArray[np.float64]] = []
    for batch in stream:
        extracted = extractor.extract(batch)
        features.append(extracted.features)
        log_probabilities.append(extracted.log_probabilities)
        if on_images is not None:
            on_images(len(batch))
    if not features:
        raise InvalidValue("there are no images to evaluate")
    return Extracted(features=np.concatenate(features), log_probabilities=np.concatenate(log_probabilities))


def fingerprint_of(**parts: str | int | float | None) -> str:
    """SHA-256 (hex) of named parts, independent of their order."""
    return storage.digest(parts, length=64)


def batches(images: Images, *, batch_size: int) -> Iterator[Images]:
    """Consecutive slices of at most `batch_size` images; a memory map is read one slice at a time."""
    for first in range(0, len(images), batch_size):
        yield images[first : first + batch_size]


def require_images(images: Images, *, height: int | None, width: int | None, channels: int) -> None:
    """Refuse images that are not uint8 [N, H, W, C] of the expected size (None = any)."""
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0..255, got {images.dtype}; quantize them with core.images.to_uint8")
    expected = [height or "H", width or "W", channels]
    fits = images.ndim == 4 and all(
        want in (None, got) for want, got in zip((height, width, channels), images.shape[1:], strict=True)
    )
    if not fits:
        raise InvalidValue(f"images must be {['N', *expected]}, got {list(images.shape)}".replace("'", ""))
