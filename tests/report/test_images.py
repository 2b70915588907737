"""Pictures hold the images that they are given."""

from __future__ import annotations

import numpy as np

from ncsn.report.images import (
    rows_by_class,
)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_grid_has_a_row_for_each_of_the_first_classes() -> None:
    rows = rows_by_class(np.arange(100) % 10)
    assert rows.shape == (10, 8) and (rows % 10 == np.arange(10)[:, None]).all() and rows[0].tolist()[:2] == [0, 10]
    assert rows_by_class(np.array([2, 0, 2, 0, 2])).tolist() == [[1, 3], [0, 2]]
    assert rows_by_class(np.arange(3000) % 1000).shape == (16, 3)
    assert rows_by_class(np.full(100, 3)).tolist() == np.arange(64).reshape(8, 8).tolist()
    assert rows_by_class(np.full(5, 3)).tolist() == [[0, 1, 2, 3, 4]]
