"""The images that are kept at some noise levels while samples are made."""

from __future__ import annotations

import numpy as np
import pytest

from ncsn.distributed.sampling import Stages


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 2, 4]), (6, [0, 2, 4, 5]), (10, [0, 4, 8, 9])]
)
def test_stages_are_spread_evenly_and_end_with_the_last(count: int, kept: list[int]) -> None:
    stages = Stages(5)
    for number in range(count):
        stages.add(number, np.full((1, 2, 2, 1), number, np.uint8))
        assert len(stages.frames) <= 5
    assert stages.frames[:, 0, 0, 0, 0].tolist() == kept
    stages.add(count - 1, np.full((1, 2, 2, 1), 99, np.uint8))
    assert stages.frames[:, 0, 0, 0, 0].tolist() == [*kept[:-1], 99], "the finished images replace the last stage"
