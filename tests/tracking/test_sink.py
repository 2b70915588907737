"""Metrics that arrive once and in order, or wait on the disk; the loop never notices."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from ncsn.data.parquet import write_dataset
from ncsn.data.sources import open_source
from ncsn.tracking import sink as sinks
from ncsn.tracking.mlflow_runs import step_run
from ncsn.tracking.sink import MetricsSink
from ncsn.training import metrics as previews
from ncsn.training.context import LocalContext
from ncsn.training.loop import TrainingJob, train_loop

DEAD = "http://127.0.0.1:9"
"""Discard's port, on which nothing listens here."""
PICTURE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)

DIES_WHILE_THE_SERVER_IS_AWAY = """
import os, pickle, signal, sys
sink = pickle.load(open(sys.argv[1], "rb"))
for step in range(5, 9):
    sink.log({"train/loss_level_1": -step, "train/loss": float(step)}, images_seen=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def dead_sink(folder: Path) -> MetricsSink:
    return MetricsSink(DEAD, "0" * 32, folder=str(folder))


def history(tracked, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracked.client.get_metric_history(tracked.run_id, name)]


def test_copy_in_another_process_sends_everything_in_order(config):
    with step_run(config, run="sink", step="train") as tracked:
        sink = pickle.loads(pickle.dumps(tracked.metrics_sink()))
        for step in range(600):
            sink.log({"train/loss_level_03": float("nan"), "train/loss": 1 / (step + 1)}, images_seen=128 * step)
        report = sink.close()
        assert tracked.unsent() == ""
    assert report == sinks.SinkReport(sent=1200, unsent=0)
    assert history(tracked, "train/loss") == [(128 * i, 1 / (i + 1)) for i in range(600)]
    assert len(history(tracked, "train/loss_level_03")) == 600


def test_killed_server_and_killed_worker_lose_nothing_and_double_nothing(make_config, server, monkeypatch, tmp_path):
    """The server is killed, then the worker; the next worker repeats what came after its checkpoint."""
    monkeypatch.setattr(sinks, "SEND_EVERY", 0.1)
    config = make_config(f"tracking.uri={server.url}")
    with step_run(config, run="outage", step="train") as tracked:
        first = tracked.metrics_sink()
        for step in range(5):
            first.log({"train/loss_level_1": -step, "train/loss": float(step)}, images_seen=step)
        _until(lambda: first._sent == 10)  # the sink has the server's answer
        assert len(history(tracked, "train/loss")) == 5
        with server.away():
            first.log({"train/loss_level_1": -5, "train/loss": 5.0}, images_seen=5)
            _until(lambda: first.failing)
            assert first.close(seconds=0.1).unsent == 2
            sink = tmp_path / "sink"
            sink.write_bytes(pickle.dumps(tracked.metrics_sink()))
            killed = subprocess.run([sys.executable, "-c", DIES_WHILE_THE_SERVER_IS_AWAY, sink], check=False)
            assert killed.returncode == -signal.SIGKILL
            second = tracked.metrics_sink()
            for step in range(3, 12):
                second.log({"train/loss_level_1": -step, "train/loss": float(step)}, images_seen=step)
            second.log_picture(PICTURE, "train/preview", 10)
            assert second.close(seconds=0.1).unsent == 15
            assert str(tracked.journals) in tracked.unsent()
            third = tracked.metrics_sink()
            third.log({"train/loss_level_1": -12, "train/loss": 12.0}, images_seen=12)
        assert third.close(seconds=60) == sinks.SinkReport(sent=17, unsent=0)
        assert tracked.unsent() == ""
    assert history(tracked, "train/loss") == [(step, float(step)) for step in range(13)]
    assert history(tracked, "train/loss_level_1") == [(step, -float(step)) for step in range(13)]
    assert len(tracked.client.list_artifacts(tracked.run_id, "images")) == 2


def test_server_that_hangs_loses_nothing_and_doubles_nothing(make_config, server, monkeypatch):
    """A stopped server takes requests into its queue, and works them off when it goes on: they come twice."""
    monkeypatch.setattr(sinks, "SEND_EVERY", 0.1)
    monkeypatch.setattr(sinks, "REQUEST_SECONDS", 1)
    with step_run(make_config(f"tracking.uri={server.url}"), run="hang", step="train") as tracked:
        sink = tracked.metrics_sink()
        sink.log({"train/loss": 0.0}, images_seen=0)
        _until(lambda: history(tracked, "train/loss"))
        with server.hanging():
            for step in range(1, 4):
                sink.log({"train/loss": float(step)}, images_seen=step)
            sink.log_picture(PICTURE, "train/preview", 3)
            _until(lambda: sink._failures > 1)
        assert sink.close(seconds=60).unsent == 0
    assert history(tracked, "train/loss") == [(step, float(step)) for step in range(4)]
    assert len(tracked.client.list_artifacts(tracked.run_id, "images")) == 2


def test_training_does_not_notice_that_the_server_is_killed(make_config, server, monkeypatch, tmp_path):
    """The same losses and weights as a training that records nothing, and every point of it once on the server."""
    monkeypatch.setattr(sinks, "SEND_EVERY", 0.1)
    monkeypatch.setattr(previews, "SHARE", 100.0)
    overrides = ["train.num_images=200", "train.checkpoint_every_images=100", "noise.num_levels=5"]
    config = make_config(f"tracking.uri={server.url}", *overrides)
    dataset = write_dataset(open_source(config.data), str(tmp_path / "data"), name="digits", data=config.data).uri
    outage = ExitStack()
    starting = threading.Thread(target=outage.close)

    def disturb(images_seen: int, _total: int) -> None:
        if images_seen == 40:
            outage.enter_context(server.away())
        if images_seen == 160:
            starting.start()

    with outage, step_run(config, run="disturbed", step="train") as tracked:
        job = TrainingJob(config=config, dataset=dataset, sink=tracked.metrics_sink(), progress=disturb)
        train_loop(job, LocalContext(tmp_path / "disturbed"))
        starting.join()
    with step_run(config, run="disturbed", step="sample"):
        assert tracked.unsent() == ""
    plain = Points()
    train_loop(TrainingJob(config=config, dataset=dataset, sink=plain), LocalContext(tmp_path / "plain"))
    assert len(plain.losses) == 50
    assert history(tracked, "train/loss") == plain.losses
    assert len(history(tracked, "system/worker_memory_megabytes")) == 50
    assert len(tracked.client.list_artifacts(tracked.run_id, "images")) == 4
    last = "images-000000200/ema.safetensors"
    assert (tmp_path / "disturbed" / last).read_bytes() == (tmp_path / "plain" / last).read_bytes()


class Points:
    """A sink that remembers the losses."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def log(self, metrics: dict[str, float], images_seen: int) -> None:
        self.losses.append((images_seen, metrics["train/loss"]))

    def log_picture(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


def test_next_step_of_the_run_sends_what_waits(make_config, server, root):
    config = make_config(f"tracking.uri={server.url}")
    with ExitStack() as outage:
        with step_run(config, run="later", step="train") as tracked:
            sink = MetricsSink(DEAD, tracked.run_id, folder=tracked.journals)
            sink.log({"train/loss": 1.0}, images_seen=1)
            assert sink.close(seconds=0.1).unsent == 1
            outage.enter_context(server.away())
        assert len(list((root / "runs" / "later" / "tracking").glob("*.jsonl"))) == 2, "the parent's end waits too"
    assert tracked.client.get_run(tracked.run_id).info.status == "RUNNING"
    with step_run(config, run="later", step="sample"):
        assert tracked.client.get_run(tracked.run_id).info.status == "FINISHED"
    assert history(tracked, "train/loss") == [(1, 1.0)]
    assert tracked.unsent() == ""


def test_what_another_node_recorded_is_not_recorded_again(config, s3_root, monkeypatch, tmp_path):
    """With the store in S3 each node has a journal of its own, and what one could not send goes to the store."""
    with step_run(config, run="nodes", step="train") as tracked:
        monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "one"))
        one = MetricsSink(tracked.uri, tracked.run_id, folder=f"{s3_root}/tracking")
        for step in range(3):
            one.log({"train/loss": float(step)}, images_seen=step)
        assert one.close() == sinks.SinkReport(sent=3, unsent=0)
        lost = MetricsSink(DEAD, tracked.run_id, folder=f"{s3_root}/tracking")
        lost.log({"train/loss": 3.0}, images_seen=3)
        assert lost.close(seconds=0.1).unsent == 1
        monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "two"))
        two = MetricsSink(tracked.uri, tracked.run_id, folder=f"{s3_root}/tracking")
        for step in range(2, 6):
            two.log({"train/loss": float(step)}, images_seen=step)
        assert two.close().unsent == 0
    assert history(tracked, "train/loss") == [(step, float(step)) for step in range(6)]


def test_half_a_line_of_a_killed_process_is_passed_over(config):
    with step_run(config, run="torn", step="train") as tracked:
        sink = MetricsSink(DEAD, tracked.run_id, folder=tracked.journals)
        sink.log({"train/loss": 1.0}, images_seen=1)
        sink.close(seconds=0.1)
        (journal,) = Path(tracked.journals).glob("*.jsonl")
        with journal.open("a") as stream:
            stream.write(json.dumps({"series": "train/loss"})[:9])
        again = tracked.metrics_sink()
        again.log({"train/loss": 2.0}, images_seen=2)
        assert again.close() == sinks.SinkReport(sent=2, unsent=0)
    assert history(tracked, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_pictures_are_a_series_that_the_page_shows(config):
    with step_run(config, run="pictures", step="train") as tracked, tracked.metrics_sink() as sink:
        for step in (5, 10, 10):
            sink.log_picture(PICTURE, "train/preview", step)
    names = sorted(Path(file.path).name for file in tracked.client.list_artifacts(tracked.run_id, "images"))
    assert [name.split("+")[:3] for name in names] == [["train~preview", "step", s] for s in ("10", "10", "5", "5")]
    assert [name.endswith("+compressed.webp") for name in names] == [True, False, True, False]
    assert tracked.client.get_run(tracked.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_close_gives_up_and_says_what_waits_where(caplog, tmp_path):
    sink = dead_sink(tmp_path)
    sink.log({"train/loss": 1.0, "train/grad_norm": 1.0}, images_seen=1)
    report = sink.close(seconds=1)
    assert (report.sent, report.unsent) == (0, 2)
    assert "127.0.0.1" in report.reason
    assert DEAD in caplog.text
    assert str(tmp_path) in caplog.text


def test_deleted_run_is_not_waited_for(config):
    with step_run(config, run="deleted", step="train") as tracked:
        tracked.client.delete_run(tracked.run_id)
        sink = tracked.metrics_sink()
        sink.log({"train/loss": 1.0}, images_seen=1)
        report = sink.close()
        tracked.client.restore_run(tracked.run_id)
    assert (report.sent, report.unsent, report.lost) == (0, 0, 1)
    assert "active" in report.reason


def test_what_is_no_metric_is_counted_and_costs_no_other(config):
    with step_run(config, run="bad", step="train") as tracked:
        sink = tracked.metrics_sink()
        sink.log(
            {"train/loss": 1.0, "train/name?": 1.0, "train/text": "high", "train/two": torch.ones(2)}, images_seen=1
        )  # type: ignore[dict-item]
        report = sink.close()
    assert (report.sent, report.lost) == (1, 3)
    assert report.reason.startswith("train/two = tensor([1., 1.])")
    metrics = tracked.client.get_run(tracked.run_id).data.metrics
    assert {name: value for name, value in metrics.items() if name.startswith("train/")} == {"train/loss": 1.0}


def test_full_disk_is_counted_and_training_goes_on(small_disk):
    sink = dead_sink(small_disk.folder)
    picture = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    sink.log_picture(picture, "train/preview", 1)
    sink.log({"train/loss": 1.0}, images_seen=1)
    report = sink.close(seconds=0.1)
    assert report.lost >= 1


def test_nothing_logged_nothing_started(tmp_path):
    assert dead_sink(tmp_path / "none").close() == sinks.SinkReport(sent=0, unsent=0)
    assert not (tmp_path / "none").exists()


def _until(condition) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)
