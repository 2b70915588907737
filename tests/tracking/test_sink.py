"""Metrics that arrive, wait out an outage, or are accounted for; the loop never notices."""

from __future__ import annotations

import pickle
import time

import pytest
import torch

from ncsn.tracking import sink as sinks
from ncsn.tracking.run import step_run
from ncsn.tracking.sink import MetricsSink

DEAD = "http://127.0.0.1:9"
"""Discard's port, on which nothing listens here."""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """A sink shortens MLflow's retries in its process, which is a worker's elsewhere and pytest's here."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def test_copy_in_another_process_sends_everything_in_order(config):
    with step_run(config, run="sink", step="train") as tracked:
        sink = pickle.loads(pickle.dumps(tracked.metrics_sink()))
        for step in range(600):
            sink.log({"train/loss": 1 / (step + 1), "train/loss_level_03": float("nan")}, images_seen=128 * step)
        report = sink.close()
    assert (report.sent, report.unsent, report.reason) == (1200, 0, "")
    history = tracked.client.get_metric_history(tracked.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(128 * i, 1 / (i + 1)) for i in range(600)]
    assert len(tracked.client.get_metric_history(tracked.run_id, "train/loss_level_03")) == 600


def test_outage_of_the_server_loses_nothing(make_config, server, monkeypatch):
    monkeypatch.setattr(sinks, "SEND_EVERY", 0.1)
    with step_run(make_config(f"tracking.uri={server.url}"), run="outage", step="train") as tracked:
        sink = tracked.metrics_sink()
        sink.log({"train/loss": 1.0}, images_seen=1)
        _until(lambda: tracked.client.get_metric_history(tracked.run_id, "train/loss"))
        server.kill()
        sink.log({"train/loss": 2.0}, images_seen=2)
        _until(lambda: sink.failing)
        sink.log({"train/loss": 3.0}, images_seen=3)
        server.start()
        sink.log({"train/loss": 4.0}, images_seen=4)
        assert sink.close(seconds=60) == sinks.SinkReport(sent=4, unsent=0)
    history = tracked.client.get_metric_history(tracked.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_close_gives_up_and_says_what_is_missing(caplog):
    sink = MetricsSink(DEAD, "0" * 32)
    sink.log({"train/loss": 1.0, "train/grad_norm": 1.0}, images_seen=1)
    report = sink.close(seconds=1)
    assert (report.sent, report.unsent) == (0, 2)
    assert "127.0.0.1" in report.reason
    assert "2 of 2 metrics did not reach http://127.0.0.1:9" in caplog.text


def test_deleted_run_is_not_waited_for(config):
    with step_run(config, run="deleted", step="train") as tracked:
        tracked.client.delete_run(tracked.run_id)
        sink = tracked.metrics_sink()
        sink.log({"train/loss": 1.0}, images_seen=1)
        report = sink.close()
        tracked.client.restore_run(tracked.run_id)
    assert (report.sent, report.unsent) == (0, 1)
    assert "active" in report.reason


def test_what_is_no_metric_is_counted_and_costs_no_other(config):
    with step_run(config, run="bad", step="train") as tracked:
        sink = tracked.metrics_sink()
        sink.log(
            {"train/loss": 1.0, "train/name?": 1.0, "train/text": "high", "train/two": torch.ones(2)}, images_seen=1
        )  # type: ignore[dict-item]
        report = sink.close()
    assert (report.sent, report.unsent) == (1, 3)
    assert report.reason == "train/two = tensor([1., 1.]) is not a number"
    assert tracked.client.get_run(tracked.run_id).data.metrics == {"train/loss": 1.0}


def test_oldest_give_way_when_memory_is_full(monkeypatch):
    monkeypatch.setattr(sinks, "CAPACITY", 3)
    sink = MetricsSink(DEAD, "0" * 32)
    for step in range(5):
        sink.log({"train/loss": float(step)}, images_seen=step)
    assert [entry[1] for entry in sink._oldest()] == [2.0, 3.0, 4.0]
    assert sink.close(seconds=0).unsent == 5


def test_nothing_logged_nothing_started():
    assert MetricsSink(DEAD, "0" * 32).close() == sinks.SinkReport(sent=0, unsent=0)


def _until(condition) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)
