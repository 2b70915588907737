"""Pixel statistics against numpy's on all pixels at once."""

import numpy as np
import pytest

from ncsn.data.statistics import PixelStatistics


def test_statistics_in_blocks_equal_those_of_all_pixels(rng):
    images = rng.integers(3, 250, (50, 8, 8, 3), np.uint8)
    statistics = PixelStatistics(3)
    for first in range(0, 50, 7):
        statistics.update(images[first : first + 7])
    unit = images / 255
    assert statistics.mean == pytest.approx(unit.mean(axis=(0, 1, 2)), abs=1e-12)
    assert statistics.std == pytest.approx(unit.std(axis=(0, 1, 2)), abs=1e-12)
    assert (statistics.minimum, statistics.maximum) == (images.min(), images.max())


def test_a_constant_has_no_deviation():
    statistics = PixelStatistics(1)
    statistics.update(np.full((4, 8, 8, 1), 51, np.uint8))
    assert statistics.mean == pytest.approx([0.2])
    assert statistics.std == pytest.approx([0.0], abs=1e-8)
