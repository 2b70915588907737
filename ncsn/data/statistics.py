"""Pixel statistics from exact integer counts, so that they do not depend on how the rows come in blocks."""

from __future__ import annotations

import numpy as np

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
            counts += np.bincount(images[..., channel].reshape(-1), minlength=GRAY_STEPS)

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
