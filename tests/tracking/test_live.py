"""Metrics reach MLflow once, live or from the run folder, whatever happens to server and processes meanwhile."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
from experiments import digits
from live_worker import DEAD, RATE, Worker, assert_once, history, killed, pictures
from workers import train_locally

from ncsn.clock import now_ms
from ncsn.config import to_yaml
from ncsn.progress import Progress
from ncsn.runs.history import load_history
from ncsn.tracking import live, mlflow_runs
from ncsn.tracking.client import connect
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import PARENT, close_run, search_runs, step_run
from ncsn.training import monitor
from ncsn.training.loop import TrainingJob

DRIVER_DIES = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from live_worker import DEAD, Worker
from ncsn.config import from_yaml
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import step_run
with step_run(from_yaml(open(sys.argv[2]).read()), run="driver", step="train") as tracked:
    worker = Worker(LiveMetrics(DEAD, tracked.run_id), tracked.folder, since=0)
    worker.train(range(3))
    worker.save()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_server_that_hangs_loses_nothing_and_doubles_nothing(make_config, server, monkeypatch, eventually):
    """A stopped server takes requests into its queue and executes them when it goes on: they come twice or more."""
    monkeypatch.setattr(live, "SEND_EVERY", 0.1)
    with step_run(make_config(f"tracking.uri={server.url}"), run="hang", step="train") as tracked:
        worker = Worker(LiveMetrics(tracked.uri, tracked.run_id), tracked.folder, since=0)
        worker.train(range(1))
        eventually(lambda: len(history(tracked)) == 1, "the first point is there")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        with server.hanging():
            worker.train(range(1, 4))
            worker.save()
            started = time.monotonic()
            worker.sink.close(seconds=4)
            assert time.monotonic() - started < 60
        monkeypatch.undo()
    worker.sink._thread.join(60)  # its last request
    assert_once(tracked, 4, previews={3})


def test_a_killed_driver_loses_nothing(config, tmp_path):
    """The finish step sends what the run folder has and ends the run, and so does the next attempt."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    killed(DRIVER_DIES, tmp_path / "config.yaml")
    closed = close_run(config, run="driver", status="FAILED", tags={})
    client, whole = connect(config).client, closed["MLflow run id"]
    (run,) = search_runs(client, client.get_run(whole).info.experiment_id, {PARENT: whole})
    step = run.info.run_id
    assert [client.get_run(run_id).info.status for run_id in (step, whole)] == ["FAILED"] * 2
    assert [point.step for point in client.get_metric_history(step, RATE)] == [0, 1, 2]
    with step_run(config, run="driver", step="train") as tracked:
        assert (tracked.run_id, tracked.parent_run_id) == (step, whole)
        assert_once(tracked, 3, previews={2})


@pytest.mark.slow
def test_the_end_of_a_step_waits_for_the_server(make_config, server):
    with ExitStack() as outage:
        starting = threading.Timer(5, outage.close)
        with step_run(make_config(f"tracking.uri={server.url}"), run="waits", step="train") as tracked:
            worker = Worker(LiveMetrics(DEAD, tracked.run_id), tracked.folder, since=0)
            worker.train(range(2))
            worker.save()
            outage.enter_context(server.away())
            starting.start()
        starting.join()
    runs = [tracked.client.get_run(run_id) for run_id in (tracked.run_id, tracked.parent_run_id)]
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert "cost.seconds" in runs[0].data.tags
    assert_once(tracked, 2, previews={1})


def test_a_step_does_not_fail_without_the_server_at_its_end(make_config, server, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_runs, "OUTAGE_SECONDS", 0)
    config = make_config(f"tracking.uri={server.url}")
    with ExitStack() as outage, step_run(config, run="without", step="train") as tracked:
        outage.enter_context(server.away())
        sink, started = LiveMetrics(tracked.uri, tracked.run_id), time.monotonic()
        sink.log({RATE: 1.0}, images_seen=1, when=now_ms())
        sink.close(seconds=1)
        assert time.monotonic() - started < 30, "it gives up"
    assert server.url in caplog.text


def test_training_does_not_notice_that_the_server_is_killed(make_config, server, monkeypatch, tmp_path):
    """The same curves and weights as a training that sends nothing, and every point of it once on the server."""
    monkeypatch.setattr(live, "SEND_EVERY", 0.1)
    monkeypatch.setattr(monitor, "SHARE", 100.0)
    overrides = ["train.num_images=200", "train.checkpoint_every_images=100"]
    config = make_config(f"tracking.uri={server.url}", *overrides)
    dataset = digits(config, tmp_path / "data")
    outage = ExitStack()
    starting = threading.Thread(target=outage.close)

    class Disturbs(Progress):
        def changed(self) -> None:
            if self.done == 40:
                outage.enter_context(server.away())
            if self.done == 160:
                starting.start()

    with outage, step_run(config, run="disturbed", step="train") as tracked:
        folder = tracked.folder
        parts = {"sink": LiveMetrics(tracked.uri, tracked.run_id), "history": folder.history, "preview": folder.preview}
        train_locally(TrainingJob(config, dataset, progress=Disturbs(), **parts), tmp_path / "disturbed")
        starting.join()
    train_locally(TrainingJob(config, dataset, history=str(tmp_path / "history")), tmp_path / "plain")
    plain = load_history(str(tmp_path / "history"))
    assert history(tracked) == list(zip(plain.images_seen, plain.curve(RATE), strict=True))
    assert len(history(tracked, "system/worker_memory_megabytes")) == 50
    assert pictures(tracked) == {100, 200}
    last = "images-000000200/ema.safetensors"
    assert (tmp_path / "disturbed" / last).read_bytes() == (tmp_path / "plain" / last).read_bytes()


def test_a_training_that_fails_keeps_its_last_points(config, tmp_path):
    """It may fail there again, so no later attempt would send them."""
    dataset = digits(config, tmp_path / "data")

    class Fails(Progress):
        def changed(self) -> None:
            if self.done:
                raise RuntimeError("lost")

    job = TrainingJob(config, dataset, history=str(tmp_path / "history.json"), progress=Fails())
    with pytest.raises(RuntimeError):
        train_locally(job, tmp_path / "checkpoints")
    assert load_history(str(tmp_path / "history.json")).images_seen == [4]
