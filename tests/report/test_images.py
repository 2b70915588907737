"""Pictures hold the images that they are given."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ncsn.report.images import CARD_PIXELS, grid_png, neighbors_png, rows_by_class, smaller_png


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_each_sample_is_beside_its_nearest_training_images() -> None:
    samples, training = np.full((3, 8, 8, 1), 10, np.uint8), np.arange(9, dtype=np.uint8).repeat(64).reshape(9, 8, 8, 1)
    table = [{"image": row, "pixels_rows": [row, 8], "features_rows": [row + 4, 8]} for row in range(3)]
    picture = pixels(neighbors_png(table, samples=samples, training_images=training))
    cell = picture.shape[1] * 9 // 55
    found = [[picture[int((row + 0.5) * cell), int((column + 0.5) * cell)] for column in range(6)] for row in range(2)]
    assert found == [[10, 0, 4, 10, 1, 5], [10, 2, 6, 0, 0, 0]]
    wide = np.zeros((9, 512, 512, 3), np.uint8)
    large = neighbors_png(table, samples=wide, training_images=wide)
    assert pixels(large).shape[0] < 600, "two samples, in one row"


def test_a_card_has_a_small_picture() -> None:
    grid = grid_png(np.zeros((64, 8, 4, 1), np.uint8))
    assert (
        max(Image.open(io.BytesIO(grid)).size)
        > 2 * CARD_PIXELS
        == 2 * max(Image.open(io.BytesIO(smaller_png(grid))).size)
    )


def test_a_grid_has_its_images_in_rows() -> None:
    picture = pixels(grid_png(np.arange(6, dtype=np.uint8).repeat(64).reshape(6, 8, 8, 1), columns=3))
    cell = picture.shape[0] * 9 // 19
    found = [[picture[int((row + 0.5) * cell), int((stage + 0.5) * cell)] for stage in range(3)] for row in range(2)]
    assert found == [[0, 1, 2], [3, 4, 5]]


def test_a_grid_has_a_row_for_each_of_the_first_classes() -> None:
    rows = rows_by_class(np.arange(100) % 10)
    assert rows.shape == (10, 8) and (rows % 10 == np.arange(10)[:, None]).all() and rows[0].tolist()[:2] == [0, 10]
    assert rows_by_class(np.array([2, 0, 2, 0, 2])).tolist() == [[1, 3], [0, 2]]
    assert rows_by_class(np.arange(3000) % 1000).shape == (16, 3)
    rare = np.array([0, 1, 2, 2, *[0, 1] * 20, *[3] * 6])  # 2 would leave the others two columns
    assert rows_by_class(rare).shape == (3, 6) and (rare[rows_by_class(rare)] == [[0], [1], [3]]).all()
    assert rows_by_class(np.full(100, 3)).tolist() == np.arange(64).reshape(8, 8).tolist()
    assert rows_by_class(np.full(5, 3)).tolist() == [[0, 1, 2, 3, 4]]
