"""What ingest learns of the pixels: their statistics and a sample of the images."""

from __future__ import annotations

import numpy as np
import pytest

from ncsn.data.statistics import ImageSample, PixelStatistics, sample_size


def test_a_sample_does_not_depend_on_the_blocks() -> None:
    images = np.arange(300, dtype=np.uint16).astype("u1").repeat(4).reshape(300, 2, 2, 1)
    whole, pieces = ImageSample(40), ImageSample(40)
    whole.update(images)
    for first in range(0, 300, 7):
        pieces.update(images[first : first + 7])
    assert np.array_equal(whole.images, pieces.images) and not whole.complete
    places = whole.images[:, 0, 0, 0].astype(int)
    assert len(whole.images) == 40 and places.max() > 100


def test_the_memory_of_a_suggestion_is_bounded() -> None:
    assert sample_size(64) == sample_size(784) == sample_size(3072) == 60_000
    assert sample_size(256 * 256 * 3) == 937


def test_statistics_in_blocks_equal_those_of_all_pixels(rng):
    images = rng.integers(3, 250, (50, 8, 8, 3), np.uint8)
    statistics = PixelStatistics(3)
    for first in range(0, 50, 7):
        statistics.update(images[first : first + 7])
    unit = images / 255
    facts = statistics.facts()
    assert facts["mean"] == pytest.approx(unit.mean(axis=(0, 1, 2)), abs=1e-12)
    assert facts["std"] == pytest.approx(unit.std(axis=(0, 1, 2)), abs=1e-12)
    assert (facts["minimum"], facts["maximum"]) == (images.min(), images.max())


def test_a_constant_has_no_deviation():
    statistics = PixelStatistics(1)
    statistics.update(np.full((4, 8, 8, 1), 51, np.uint8))
    assert statistics.facts()["mean"] == pytest.approx([0.2])
    assert statistics.facts()["std"] == pytest.approx([0.0], abs=1e-8)
