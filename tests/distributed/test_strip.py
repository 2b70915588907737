"""The images that are kept at some noise levels while samples are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ncsn.config import from_yaml
from ncsn.distributed import sampling
from ncsn.distributed.sampling import LEVELS, Shard


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (3, [0, 1, 2]), (6, [0, 2, 4, 5]), (8, [0, 2, 4, 6, 7]), (10, [0, 4, 8, 9])]
)
def test_stages_are_spread_evenly_and_end_with_the_finished_images(
    count: int, kept: list[int], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(shard: Shard, on_level: Callable[[int, np.ndarray], None]) -> np.ndarray:
        for number in range(count):
            on_level(number, np.full((1, 2, 2, 1), number, np.uint8))
        return np.full((1, 2, 2, 1), 99, np.uint8)

    monkeypatch.setattr(sampling, "STRIP_STAGES", 5)
    monkeypatch.setattr(sampling, "level_images", lambda x, *_: x)
    monkeypatch.setattr(sampling, "_generate", generate)
    config = from_yaml(tiny)
    sampling._generate_with_strip(Shard(config, config.sampling, "", str(tmp_path), 0, 1))
    assert np.load(tmp_path / LEVELS)[:, 0, 0, 0, 0].tolist() == [*kept[:-1], 99]
