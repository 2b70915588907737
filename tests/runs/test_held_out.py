from __future__ import annotations

import math

import numpy as np
import pytest

from ncsn.runs.curves import held_out_curves, held_out_point
from ncsn.runs.gaps import Gaps
from ncsn.runs.history import TrainingHistory

SIGMAS = np.array([1.0, 0.1, 0.01])
GAPS = Gaps(np.array([0.1, 0.5, 0.9]), np.array([0.0, 0.2, 0.1]), np.array([0.01, 0.02, 0.03]))


def test_the_last_measurement_comes_back_with_the_curves() -> None:
    history = TrainingHistory("nowhere")
    assert held_out_curves(history) is None
    history.add(held_out_point(GAPS, sigmas=SIGMAS, weights=np.ones(3)) | {"train/loss": 0.3}, 100)
    history.add({"train/loss": 0.2}, 200)
    later = Gaps(GAPS.held_out * 2, GAPS.gap, GAPS.error)
    history.add(held_out_point(later, sigmas=SIGMAS, weights=np.array([0.0, 0.0, 2.0])), 300)
    curves = held_out_curves(history)
    assert curves is not None
    assert curves.images_seen.tolist() == [100, 300]
    np.testing.assert_allclose(curves.loss, [0.5, 1.8])
    np.testing.assert_allclose(curves.gap, [0.1, 0.1])
    np.testing.assert_array_equal(curves.sigmas, SIGMAS)
    for name in ("held_out", "gap", "error"):
        np.testing.assert_array_equal(getattr(curves.last, name), getattr(later, name))


def test_a_value_that_is_not_finite_is_left_out() -> None:
    unknown = Gaps(GAPS.held_out, GAPS.gap, np.full(3, math.nan))
    point = held_out_point(unknown, sigmas=SIGMAS, weights=np.ones(3))
    assert not [name for name in point if "error" in name] and len(point) == 2 + 2 * 3
    history = TrainingHistory("nowhere")
    history.add(point, 100)
    curves = held_out_curves(history)
    assert curves is not None and np.isnan(curves.last.error).all() and curves.last.alarm() is None


@pytest.mark.parametrize("sigmas", [[0.5, 0.49999, 0.49998], [50.0, 0.151, 1e-5]])
def test_each_sigma_has_a_curve(sigmas: list[float]) -> None:
    point = held_out_point(GAPS, sigmas=np.array(sigmas), weights=np.ones(3))
    assert len(point) == 2 + 3 * 3
