"""Precision, recall, density and coverage on sets where they can be told by hand."""

import numpy as np
import pytest
from refused import refused

from ncsn.evaluation.scores import precision_recall


def test_a_set_against_itself_is_perfect() -> None:
    points = np.random.default_rng(0).standard_normal((200, 5))
    result = precision_recall(points, points, block_size=64)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)
    # Each real ball of radius d_5 holds its centre and the 4 nearer neighbours strictly inside.
    assert result.density == pytest.approx(1)


def test_sets_far_apart_share_nothing() -> None:
    rng = np.random.default_rng(1)
    result = precision_recall(rng.standard_normal((50, 3)) + 100, rng.standard_normal((50, 3)))
    assert (result.precision, result.recall, result.density, result.coverage) == (0, 0, 0, 0)


def test_one_mode_of_two_keeps_precision_and_halves_recall() -> None:
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((200, 2)), rng.standard_normal((200, 2)) + 50
    result = precision_recall(rng.standard_normal((400, 2)), np.concatenate([left, right]))
    assert result.precision > 0.9
    assert 0.4 < result.recall <= 0.5
    assert 0.4 < result.coverage <= 0.5


def test_points_on_a_line_by_hand() -> None:
    real = np.arange(4.0)[:, None]  # radii to the first neighbour: all 1
    generated = np.array([[0.5], [1.0], [10.0], [10.5]])  # radii .5, .5, .5, .5
    result = precision_recall(generated, real, neighbourhood=1, density_neighbourhood=1)
    assert result.precision == 2 / 4  # 0.5 and 1.0
    assert result.recall == 2 / 4  # 0 and 1 (at 0.5 from 0.5), not 2 and 3
    assert result.density == (2 + 1) / 4  # 0.5 lies strictly inside two balls, 1.0 in its own
    assert result.coverage == 2 / 4


def test_blocks_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((101, 4)), rng.standard_normal((90, 4)) + 0.5
    assert precision_recall(a, b, block_size=7) == precision_recall(a, b, block_size=1000)


def test_bad_input_is_refused() -> None:
    with refused("images") as caught:
        precision_recall(np.zeros((5, 2)), np.zeros((9, 2)))
    assert caught.value.problems[0].value == 5
    with pytest.raises(ValueError, match=r"got \[9, 2\] and \[9, 3\]"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
