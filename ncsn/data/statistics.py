"""Pixel statistics from exact integer counts, and a sample, neither of which depends on how the rows come in blocks."""

from __future__ import annotations

import heapq

import numpy as np
from PIL import Image

from ncsn.core.keyed_random import Stream, keyed_uniform

GRAY_STEPS = 256


class PixelStatistics:
    """Counts of each of the 256 pixel values, channel by channel.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, GRAY_STEPS), np.int64)

    def update(self, images: np.ndarray) -> None:
        """Count the pixels of uint8 images [N, H, W, C]."""
        for channel, counts in enumerate(self.counts):
            plane = np.ascontiguousarray(images[..., channel]).reshape(1, -1)
            # Pillow counts bytes as they are; np.bincount makes an int64 of each first, which takes six times as long.
            counts += np.array(Image.fromarray(plane).histogram(), np.int64)

    @property
    def mean(self) -> list[float]:
        """Mean of each channel, of pixels scaled to [0, 1]."""
        return [float(value) for value in self._moment(1)]

    @property
    def std(self) -> list[float]:
        """Standard deviation (of the population) of each channel, of pixels scaled to [0, 1]."""
        variance = self._moment(2) - self._moment(1) ** 2
        return [float(value) for value in np.sqrt(np.maximum(variance, 0.0))]

    @property
    def minimum(self) -> int:
        """Smallest pixel value, 0..255."""
        return int(np.flatnonzero(self.counts.sum(axis=0))[0])

    @property
    def maximum(self) -> int:
        """Largest pixel value, 0..255."""
        return int(np.flatnonzero(self.counts.sum(axis=0))[-1])

    def _moment(self, power: int) -> np.ndarray:
        values = (np.arange(GRAY_STEPS, dtype=np.float64) / (GRAY_STEPS - 1)) ** power
        moments: np.ndarray = self.counts @ values / self.counts.sum(axis=1)
        return moments


class ImageSample:
    """A random sample of a stream of images, a function of their order alone.

    Each image has a random number; those with the smallest stay.

    Args:
        size: Images to keep at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._kept: list[tuple[float, int, np.ndarray]] = []

    def update(self, images: np.ndarray) -> None:
        """Offer uint8 images [N, H, W, C]."""
        keys = keyed_uniform(0, stream=Stream.SUBSET, first=self.count, count=len(images), size=1)[:, 0].numpy()
        full = len(self._kept) == self.size
        # Once the sample is full, few of those that come still have a chance.
        for index in np.flatnonzero(keys < -self._kept[0][0]) if full else range(len(keys)):
            kept = (-float(keys[index]), self.count + int(index), images[index].copy())
            if len(self._kept) < self.size:
                heapq.heappush(self._kept, kept)
            elif kept[0] > self._kept[0][0]:
                heapq.heapreplace(self._kept, kept)
        self.count += len(images)

    @property
    def complete(self) -> bool:
        """Whether the sample is all images."""
        return self.count == len(self._kept)

    @property
    def images(self) -> np.ndarray:
        """The sample in the stream's order, uint8 [N, H, W, C]."""
        return np.stack([image for _, _, image in sorted(self._kept, key=lambda kept: kept[1])])
