"""What a step recorded is read back."""

from __future__ import annotations

from ncsn.tracking.mlflow_runs import metric_history, step_run


def test_points_of_a_step_are_read_back_in_order(config):
    with step_run(config, run="history", step="train") as tracked, tracked.metrics_sink() as sink:
        for images_seen in (8, 16, 24):
            sink.log({"train/loss": 1 / images_seen}, images_seen)
    found = metric_history(config, run="history", step="train", name="train/loss")
    assert found == [(8, 1 / 8), (16, 1 / 16), (24, 1 / 24)]
    assert metric_history(config, run="history", step="sample", name="train/loss") == []
