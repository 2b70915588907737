"""What is learned of the pixels while they are written: statistics, and a sample to compare images."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from PIL import Image

from ncsn.core.keyed_random import Stream, keyed_permutation, keyed_uniform

MOST_IMAGES = 60_000
_MOST_VALUES = MOST_IMAGES * 32 * 32 * 3  # bytes of the images that are kept for the largest distance
_GRAY_STEPS = 256


class PixelStatistics:
    """Counts of each of the 256 pixel values, channel by channel."""

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, _GRAY_STEPS), np.int64)

    def update(self, images: np.ndarray) -> None:
        """Count the pixels of uint8 images [N, H, W, C]."""
        for channel, counts in enumerate(self.counts):
            plane = np.ascontiguousarray(images[..., channel]).reshape(1, -1)
            # Pillow counts bytes as they are; np.bincount makes an int64 of each first, which takes six times as long.
            counts += np.array(Image.fromarray(plane).histogram(), np.int64)

    def facts(self) -> dict[str, Any]:
        """Fields of a manifest; `std` is the standard deviation of the population."""
        values = np.arange(_GRAY_STEPS, dtype=np.float64) / (_GRAY_STEPS - 1)
        pixels, found = self.counts.sum(axis=1), np.flatnonzero(self.counts.sum(axis=0))
        mean = self.counts @ values / pixels
        std = np.sqrt(np.maximum(self.counts @ values**2 / pixels - mean**2, 0.0))
        return {"mean": mean.tolist(), "std": std.tolist(), "minimum": int(found[0]), "maximum": int(found[-1])}


class ImageSample:
    """A random sample of at most `size` images of a stream, a function of their order alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._places: list[tuple[float, int, int]] = []  # minus an image's random number, its index, its row below
        self._rows = np.empty(0, np.uint8)

    def update(self, images: np.ndarray) -> None:
        """Offer uint8 images [N, H, W, C]."""
        if not self.count:
            self._rows = np.empty((self.size, *images.shape[1:]), np.uint8)  # takes memory where it is written
        # Each image has a random number; those with the smallest stay.
        keys = keyed_uniform(0, stream=Stream.SUBSET, first=self.count, count=len(images), size=1)[:, 0].numpy()
        full = len(self._places) == self.size
        # Once the sample is full, few images still have a chance.
        for index in np.flatnonzero(keys < -self._places[0][0]) if full else range(len(keys)):
            key, number, row = -float(keys[index]), self.count + int(index), len(self._places)
            if row < self.size:
                heapq.heappush(self._places, (key, number, row))
            elif key > self._places[0][0]:
                row = self._places[0][2]
                heapq.heapreplace(self._places, (key, number, row))
            else:
                continue
            self._rows[row] = images[index]
        self.count += len(images)

    @property
    def complete(self) -> bool:
        """Whether the sample is all images."""
        return self.count == len(self._places)

    @property
    def images(self) -> np.ndarray:
        """The sample, uint8 [N, H, W, C], not in the stream's order."""
        return self._rows[: len(self._places)]

    def some(self, count: int) -> np.ndarray:
        """At most `count` of the images, a random choice in the stream's order."""
        rows = np.array([row for _, _, row in sorted(self._places, key=lambda place: place[1])], np.int64)
        chosen: np.ndarray = self._rows[rows[np.sort(keyed_permutation(0, epoch=0, size=len(rows))[:count])]]
        return chosen


def sample_size(values_per_image: int) -> int:
    """How many images ingest keeps to compare them: 60,000, fewer where they are large."""
    return max(2, min(MOST_IMAGES, _MOST_VALUES // values_per_image))
