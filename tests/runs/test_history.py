from __future__ import annotations

from pathlib import Path

import numpy as np

from ncsn.runs.history import TrainingHistory, load_history


def test_points_come_back_up_to_a_place(tmp_path: Path) -> None:
    uri = str(tmp_path / "history.json")
    assert load_history(uri).images_seen == []
    history = TrainingHistory(uri)
    for seen in (100, 200, 300):
        history.add({"train/loss": 1 / seen}, seen)
    history.publish()
    assert load_history(uri) == history
    assert load_history(uri, until=200) == TrainingHistory(uri, [100, 200], history.points[:2])


def test_level_losses_are_by_level_and_nan_where_unknown() -> None:
    history, names = TrainingHistory("nowhere"), [f"train/loss_sigma_{number}" for number in range(11)]
    history.add({names[0]: 0.5, names[10]: 0.25}, 100)
    losses = history.losses(names)
    assert losses.shape == (1, 11)
    assert (losses[0, 0], losses[0, 10]) == (0.5, 0.25)
    assert np.isnan(losses[0, 1:10]).all()
