"""Panels and animations hold the images that they are given."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from ncsn.report.images import (
    GIF_BYTES,
    MOST_PIXEL_BYTES,
    Stages,
    animation,
    denoising_gif,
    images_in_gif,
    rows_by_class,
)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def stages_of(count: int, limit: int) -> Stages:
    stages = Stages(limit)
    for number in range(count):
        stages.add(number, np.full((1, 2, 2, 1), number % 256, np.uint8))
        assert len(stages.numbers) <= limit
    return stages


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 2, 4]), (6, [0, 2, 4, 5]), (10, [0, 4, 8, 9])]
)
def test_stages_are_spread_evenly_and_end_with_the_last(count: int, kept: list[int]) -> None:
    stages = stages_of(count, 5)
    assert stages.numbers == kept
    assert stages.frames[:, 0, 0, 0, 0].tolist() == kept


def test_of_many_stages_few_stay_in_memory() -> None:
    numbers = stages_of(2312, 40).numbers
    assert numbers[0] == 0 and numbers[-1] == 2311 and 20 <= len(numbers) <= 40
    assert len(set(np.diff(numbers[:-1]))) == 1


def test_the_last_stage_may_be_replaced() -> None:
    stages = stages_of(3, 5)
    stages.add(2, np.full((1, 2, 2, 1), 99, np.uint8))
    assert stages.numbers == [0, 1, 2] and stages.frames[-1].max() == 99


def test_gif_shows_each_stage_in_order_and_rests_on_the_last() -> None:
    frames = np.stack([np.full((4, 8, 8, 1), value, np.uint8) for value in (0, 255, 123)])
    with Image.open(io.BytesIO(denoising_gif(frames))) as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        shades, durations = [], []
        for number in range(3):
            gif.seek(number)
            durations.append(gif.info["duration"])
            shades.append(gif.convert("L").getpixel((gif.width // 4, gif.height // 4)))
    assert shades[:2] == [0, 255] and shades[2] == pytest.approx(123, abs=5)
    assert durations[-1] > 10 * durations[0]


@pytest.mark.parametrize(
    ("size", "channels", "count"), [(28, 1, 25), (32, 3, 25), (64, 3, 4), (256, 3, 1)], ids=lambda it: f"{it}"
)
def test_a_gif_of_pure_noise_stays_below_a_megabyte(size: int, channels: int, count: int) -> None:
    assert images_in_gif(size) == count
    data = denoising_gif(images(40, count, size, size, channels))
    assert len(data) <= GIF_BYTES
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.n_frames >= 5 and gif.size[0] >= size


def test_the_animation_has_every_stage_of_small_images_and_few_of_large_ones() -> None:
    small = np.arange(5, dtype=np.uint8).repeat(3 * 8 * 8).reshape(5, 3, 8, 8, 1)
    played = animation(small, sigmas=[1.0, 0.3, 0.1, 0.03])
    assert played.labels == ["start", "sigma 1", "sigma 0.3", "sigma 0.1", "finished"]
    picture = np.asarray(Image.open(io.BytesIO(played.frames.content)))
    width, height = played.size
    assert picture.shape == (5 * height, width) == (5 * 10, 3 * 9 + 1)
    assert [picture[stage * height + 4, 4] for stage in range(5)] == [0, 1, 2, 3, 4]
    large = animation(np.zeros((100, 8, 128, 128, 3), np.uint8), sigmas=[1.0])
    assert math.prod(large.size) * 3 * len(large.labels) < 1.1 * MOST_PIXEL_BYTES
    assert len(large.labels) >= 8 and large.labels[1].startswith("stage ")


def test_a_grid_has_a_row_for_each_of_the_first_classes() -> None:
    rows = rows_by_class(np.arange(100) % 10)
    assert rows.shape == (10, 8) and (rows % 10 == np.arange(10)[:, None]).all() and rows[0].tolist()[:2] == [0, 10]
    assert rows_by_class(np.array([2, 0, 2, 0, 2])).tolist() == [[1, 3], [0, 2]]
    assert rows_by_class(np.arange(3000) % 1000).shape == (16, 3)
    assert rows_by_class(np.full(100, 3)).tolist() == np.arange(64).reshape(8, 8).tolist()
    assert rows_by_class(np.full(5, 3)).tolist() == [[0, 1, 2, 3, 4]]
