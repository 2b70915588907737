"""Nearest neighbours agree with the full distance matrix, and a copy of a training image is flagged."""

import numpy as np
import pytest

from ncsn.data.format import Images
from ncsn.evaluation.scores import nearest_distances, nearest_neighbours


def test_agrees_with_the_full_matrix_in_any_blocks() -> None:
    rng = np.random.default_rng(0)
    queries, reference = rng.standard_normal((9, 6)), rng.standard_normal((100, 6))
    full = np.linalg.norm(queries[:, None] - reference, axis=2)
    for block_size in (1, 7, 1000):
        found = nearest_neighbours(queries, reference, k=4, block_size=block_size)
        np.testing.assert_array_equal(found.indices, np.argsort(full, axis=1)[:, :4])
        np.testing.assert_allclose(found.distances, np.sort(full, axis=1)[:, :4], atol=1e-12)


def test_a_copied_training_image_is_found_at_distance_zero_and_flagged(digits: tuple[Images, Images]) -> None:
    train, test = digits
    nudged = train.images[7].copy()
    nudged[0, 0, 0] += 1
    queries = np.concatenate([train.images[[3]], nudged[None], test.images[:30]])
    found = nearest_neighbours(queries, train.images, k=2, block_size=500)
    assert found.indices[:2, 0].tolist() == [3, 7]
    assert found.distances[:2, 0].tolist() == [0, 1]
    assert found.memorised[:2].all()
    assert found.memorised[2:].mean() < 0.1


def test_equal_distances_come_in_order_of_index() -> None:
    found = nearest_neighbours(np.zeros((1, 1)), np.array([[1.0], [-1.0], [0.5], [1.0]]), k=4)
    assert found.indices.tolist() == [[2, 0, 1, 3]]


def test_distances_within_a_set_leave_each_vector_itself_out() -> None:
    points = np.array([[0.0], [1.0], [3.0], [3.0]])
    assert nearest_distances(points, k=2, block_size=3).tolist() == [[1, 3], [1, 2], [0, 2], [0, 2]]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
        nearest_neighbours(np.zeros((1, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="k = 6"):
        nearest_neighbours(np.zeros((1, 3)), np.zeros((5, 3)), k=6)
