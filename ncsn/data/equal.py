"""Equal images: those whose stored bytes are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
NO_HASHES: Hashes = np.empty(0, np.uint64)


def image_hashes(images: NDArray[Any]) -> Hashes:
    """A hash of the bytes of each of N images [N, H, W, C]; any two of ten million are the same by a chance of 3e-6."""
    return np.frombuffer(b"".join(hashlib.blake2b(each.tobytes(), digest_size=8).digest() for each in images), "<u8")


def repeats(hashes: Hashes) -> int:
    """How many images equal an earlier one."""
    return len(hashes) - len(np.unique(hashes))


def equal_in_words(repeated: Mapping[str, int], counts: Mapping[str, int], *, left_out: int = 0) -> str:
    """How many of `counts` images of each kind equal an earlier one; and how many test images are left out for it."""
    found = [
        f"{few:,} of {counts[kind]:,} {kind} images repeat{'s' * (few == 1)} another, so {counts[kind] - few:,} differ"
        for kind, few in repeated.items()
        if few
    ]
    out = f"{left_out:,} left out of the test split as equal to a training image or its mirror image"
    return "; ".join([*found, *[out] * bool(left_out)])


def are_among(hashes: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """[N] whether each of N hashes is one of the others, which ascend."""
    return np.asarray(np.searchsorted(others, hashes) < np.searchsorted(others, hashes, side="right"))
