"""What turns images into features and class probabilities, with a fingerprint of how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Images = npt.NDArray[np.uint8]


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep a GPU's convolutions from TF32, so that a fingerprint stands for the same features there as on a CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Extracted:
    """What an extractor sees in N images.

    Attributes:
        features: [N, D] float32, for distances between sets of images.
        log_probabilities: [N, K] float64 log p(class | image), for the score.
    """

    features: npt.NDArray[np.float32]
    log_probabilities: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Identity:
    """Which extractor it is, for whoever does not compute with it; see `Extractor`."""

    name: str
    fingerprint: str
    num_features: int


class Extractor(Protocol):
    """A fixed function from uint8 images to features and class probabilities, independent of batch composition."""

    @property
    def name(self) -> str:
        """Prefix of metric names: `classifier` or `inception`."""

    @property
    def fingerprint(self) -> str:
        """Hash of kind, weights, resize and preprocessing: equal fingerprints give comparable features."""

    @property
    def num_features(self) -> int:
        """D."""

    def extract(self, images: Images) -> Extracted:
        """Features and log probabilities of [N, H, W, C] uint8 images.

        Raises:
            ValueError: for images of another type or shape than the extractor takes.
        """


def extract_all(
    extractor: Extractor, stream: Iterable[Images], *, on_images: Callable[[int], None] | None = None
) -> Extracted:
    """Everything that an extractor sees in a stream of image batches.

    Args:
        extractor: what looks at the images.
        stream: [n, H, W, C] uint8 batches.
        on_images: called with n after each batch.

    Raises:
        ValueError: if the stream is empty, or images do not fit the extractor.
    """
    features: list[npt.NDArray[np.float32]] = []
    log_probabilities: list[npt.NDArray[np.float64]] = []
    for batch in stream:
        extracted = extractor.extract(batch)
        features.append(extracted.features)
        log_probabilities.append(extracted.log_probabilities)
        if on_images is not None:
            on_images(len(batch))
    if not features:
        raise ValueError("there are no images to evaluate")
    return Extracted(features=np.concatenate(features), log_probabilities=np.concatenate(log_probabilities))


def fingerprint_of(**parts: str | int | float | None) -> str:
    """SHA-256 (hex) of named parts, independent of their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def batches(images: Images, *, batch_size: int) -> Iterator[Images]:
    """Consecutive slices of at most `batch_size` images; a memory map is read one slice at a time."""
    for first in range(0, len(images), batch_size):
        yield images[first : first + batch_size]


def require_images(images: Images, *, height: int | None, width: int | None, channels: int) -> None:
    """Check that `images` are uint8 [N, H, W, C] of the expected size (None = any).

    Raises:
        ValueError: saying what was expected and what came.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0..255, got {images.dtype}; quantise them with core.images.to_uint8")
    expected = [height or "H", width or "W", channels]
    fits = images.ndim == 4 and all(
        want in (None, got) for want, got in zip((height, width, channels), images.shape[1:], strict=True)
    )
    if not fits:
        raise ValueError(f"images must be {['N', *expected]}, got {list(images.shape)}".replace("'", ""))
