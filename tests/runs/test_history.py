from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncsn.runs.history import GAP, LOSS, RATE, TrainingHistory, held_out_curves, load_history, loss_names


def test_points_come_back_up_to_a_place(tmp_path: Path) -> None:
    uri = str(tmp_path / "history.json")
    assert load_history(uri).images_seen == []
    history = TrainingHistory(uri)
    for seen in (100, 200, 300):
        history.add({"train/loss": 1 / seen}, seen)
    history.publish()
    assert load_history(uri) == history
    assert load_history(uri, until=200) == TrainingHistory(uri, [100, 200], history.points[:2])


def test_the_speed_is_that_of_all_images_whatever_interrupted_them() -> None:
    history = TrainingHistory("nowhere")
    for seen, point in ((100, {RATE: 10.0}), (200, {RATE: 50.0}), (500, {RATE: 100.0})):
        history.add(point, seen)
    assert history.images_per_second == pytest.approx(500 / (100 / 10 + 100 / 50 + 300 / 100))


def test_level_losses_are_by_level_and_nan_where_unknown() -> None:
    history, names = TrainingHistory("nowhere"), [f"train/loss_sigma_{number}" for number in range(11)]
    history.add({names[0]: 0.5, names[10]: 0.25}, 100)
    assert (history.curve(names[0]), history.curve(names[10])) == ([0.5], [0.25])
    assert all(np.isnan(history.curve(name)).tolist() == [True] for name in names[1:10])


@pytest.mark.parametrize(
    ("losses", "lowest_at"), [([0.5, 0.4, 0.45], 200), ([0.5, 0.4, 0.403], None), ([0.5, 0.4, 0.3], None)]
)
def test_the_held_out_loss_says_from_where_training_memorizes(losses: list[float], lowest_at: int | None) -> None:
    history = TrainingHistory("nowhere")
    assert held_out_curves(history) is None
    history.add({"train/loss": 0.2}, 50)
    for number, loss in enumerate(losses, 1):
        history.add({LOSS: loss, GAP: loss / 2}, 100 * number)
    curves = held_out_curves(history)
    assert curves is not None and curves.lowest_at == lowest_at
    assert curves.images_seen.tolist() == [100, 200, 300]
    assert (curves.loss.tolist(), curves.gap.tolist()) == (losses, [loss / 2 for loss in losses])


@pytest.mark.parametrize("sigmas", [[0.5, 0.49999, 0.49998], [50.0, 0.151, 1e-5]])
def test_each_sigma_has_a_curve(sigmas: list[float]) -> None:
    assert len(set(loss_names(sigmas))) == 3
