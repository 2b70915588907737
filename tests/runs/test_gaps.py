from __future__ import annotations

import numpy as np
import pytest

from ncsn.runs.gaps import FEWEST_IMAGES, Alarm, Gaps


@pytest.mark.parametrize(
    ("gap", "error", "alarm"),
    [
        ([0.1, 0.5, 0.5, 0.1], 0.1, Alarm((1, 2), harmful=True)),
        ([0.5, 0.1, 0.5, 0.1], 0.1, None),  # not neighbors
        ([0.04, 0.04, 0.5, 0.04], 0.005, Alarm((0, 1, 2, 3), harmful=False)),  # only one is large
        ([0.04, 0.5, 0.5, 0.5], 0.005, Alarm((1, 2, 3), harmful=True)),
        ([0.5], 0.1, Alarm((0,), harmful=True)),
        ([-0.5, -0.5], 0.1, None),
        ([0.5, 0.5], np.nan, None),
    ],
)
def test_the_alarm_needs_neighbors(gap: list[float], error: float, alarm: Alarm | None) -> None:
    size = len(gap)
    assert Gaps(np.ones(size), np.array(gap), np.full(size, error)).alarm() == alarm


def test_few_images_have_no_standard_error() -> None:
    rows = np.random.default_rng(0).random((3, FEWEST_IMAGES))
    assert np.isfinite(Gaps.of(rows, rows).error).all()
    assert np.isnan(Gaps.of(rows[:, 1:], rows).error).all()
