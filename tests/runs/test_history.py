from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncsn.runs.history import RATE, TrainingHistory, load_history, loss_names


def test_points_come_back_up_to_a_place(tmp_path: Path) -> None:
    uri = str(tmp_path / "history.json")
    assert load_history(uri).images_seen == []
    history = TrainingHistory(uri)
    for seen, rate in ((100, 10.0), (200, 50.0), (500, 100.0)):
        history.add({"train/loss": 1 / seen, RATE: rate}, seen, system={}, when=seen)
    history.publish()
    assert load_history(uri) == history
    assert load_history(uri, until=200) == TrainingHistory(uri, [100, 200], history.points[:2])
    assert history.images_per_second == pytest.approx(500 / (100 / 10 + 100 / 50 + 300 / 100)), "of all images"
    assert history.curve("train/loss").tolist() == [1 / 100, 1 / 200, 1 / 500]
    assert np.isnan(history.curve("train/loss_sigma_1")).all()


def test_each_sigma_has_a_curve() -> None:
    for sigmas in ([0.5, 0.49999, 0.49998], [50.0, 0.151, 1e-5]):
        assert len(set(loss_names(sigmas))) == 3
