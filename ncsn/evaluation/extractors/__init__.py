"""Extractors: functions from images to features and class probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Images = npt.NDArray[np.uint8]


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep a GPU from TF32, so that equal fingerprints mean equal features there and on a CPU."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


@dataclass(frozen=True)
class Extracted:
    """Features and class probabilities of N images."""

    features: npt.NDArray[np.float32]  # [N, D]
    log_probabilities: npt.NDArray[np.float64]  # [N, K], log p(class | image)


class Extractor(Protocol):
    """A fixed function from uint8 images to features and class probabilities, independent of batch composition."""

    def extract(self, images: Images) -> Extracted:
        """Features and log probabilities of [N, H, W, C] uint8 images."""


def joined(parts: Sequence[Extracted]) -> Extracted:
    """The parts as one, in order."""
    return Extracted(
        features=np.concatenate([part.features for part in parts]),
        log_probabilities=np.concatenate([part.log_probabilities for part in parts]),
    )


def batches(rows: npt.NDArray[Any], *, batch_size: int) -> Iterator[npt.NDArray[Any]]:
    """Consecutive slices of at most `batch_size` rows; a memory map is read one slice at a time."""
    for first in range(0, len(rows), batch_size):
        yield rows[first : first + batch_size]
