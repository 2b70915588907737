from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ncsn.report.images import GIF_BYTES, Stages, denoising_gif, images_in_gif


def noise(*shape: int) -> np.ndarray:
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


def test_a_stage_may_be_replaced_while_it_is_the_last() -> None:
    stages = stages_of(3, 5)
    stages.add(2, np.full((1, 2, 2, 1), 99, np.uint8))
    assert stages.numbers == [0, 1, 2] and stages.frames[-1].max() == 99


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="limit"):
        Stages(2)
    with pytest.raises(ValueError, match="stages"):
        _ = Stages(3).frames


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


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3), (256, 3)])
def test_a_gif_of_pure_noise_stays_below_a_megabyte(size: int, channels: int) -> None:
    data = denoising_gif(noise(40, images_in_gif(size), size, size, channels))
    assert len(data) <= GIF_BYTES
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.n_frames >= 5 and gif.size[0] >= size


def test_small_images_are_twenty_five() -> None:
    assert [images_in_gif(size) for size in (8, 28, 32, 64, 256)] == [25, 25, 25, 4, 1]
