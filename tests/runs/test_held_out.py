from __future__ import annotations

import pytest

from ncsn.runs.curves import GAP, LOSS, held_out_curves, loss_names
from ncsn.runs.history import TrainingHistory


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
