"""What turns images into features and class probabilities, with a fingerprint of how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
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
