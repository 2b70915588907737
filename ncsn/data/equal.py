"""Equal images: those whose stored bytes are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
NO_HASHES: Hashes = np.empty(0, np.uint64)
_WORDS = {"train": "training images", "test": "test images"}


def image_hashes(images: NDArray[Any]) -> Hashes:
    """A hash of the bytes of each of N images [N, H, W, C]; any two of ten million are the same by a chance of 3e-6."""
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64, copy=False)


def repeats(hashes: Hashes) -> int:
    """How many images equal an earlier one."""
    return len(hashes) - len(np.unique(hashes))


def equal_in_words(repeated: Mapping[str, int], counts: Mapping[str, int], *, left_out: int = 0) -> str:
    """How many of `counts` images of each kind equal an earlier one; and how many test images are left out for it."""
    found = [
        f"{count:,} of {counts[kind]:,} {_WORDS.get(kind, kind)} repeat{'s' * (count == 1)} another, which leaves "
        f"{counts[kind] - count:,} different"
        for kind, count in repeated.items()
        if count
    ]
    if left_out:
        found.append(f"{left_out:,} left out of the test split as equal to a training image or its mirror image")
    return "; ".join(found)


def are_among(hashes: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """[N] whether each of N hashes is one of the others, which ascend."""
    found: NDArray[np.bool_] = np.searchsorted(others, hashes) < np.searchsorted(others, hashes, side="right")
    return found
