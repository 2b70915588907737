"""What MLflow lacks of a run is sent later, once: curves, pictures, and the ends of its steps."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from live_worker import DEAD, Worker, assert_once, killed
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from ncsn.cli.execute import mark_complete, run_pipeline
from ncsn.cli.target import Target
from ncsn.config import to_yaml
from ncsn.runs.folder import RunFolder, claim_run
from ncsn.tracking import mlflow_runs
from ncsn.tracking.live import LiveMetrics
from ncsn.tracking.mlflow_runs import step_run
from ncsn.tracking.reconcile import lacks_ends, reconcile, send_missing
from ncsn.tracking.recorded import close_run

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


def test_a_killed_driver_loses_nothing(config, tmp_path):
    """The finish step sends what the run folder has, and ends the run."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    killed(DRIVER_DIES, tmp_path / "config.yaml")
    closed = close_run(config, run="driver", status="FAILED", tags={})
    assert closed is not None
    with step_run(config, run="driver", step="train") as tracked:
        assert tracked.parent_run_id == closed[0].run_id
        assert_once(tracked, 3, previews={2})


def test_two_that_reconcile_at_once_double_nothing(make_config, server):
    with step_run(make_config(f"tracking.uri={server.url}"), run="twice", step="train") as tracked:
        worker = Worker(LiveMetrics(DEAD, tracked.run_id), tracked.folder, since=0)
        worker.train(range(300))
        worker.save()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: reconcile(tracked.client, tracked.folder), range(4))) == [""] * 4
    assert_once(tracked, 300, previews={299})


def test_the_next_step_sends_the_end_of_the_one_before(make_config, server):
    config = make_config(f"tracking.uri={server.url}")
    with ExitStack() as outage:
        with step_run(config, run="later", step="train") as tracked:
            worker = Worker(LiveMetrics(DEAD, tracked.run_id), tracked.folder, since=0)
            worker.train(range(2))
            worker.save()
            outage.enter_context(server.away())
        ended = time.time()
    assert tracked.client.get_run(tracked.run_id).info.status == "RUNNING"
    with step_run(config, run="later", step="sample"):
        run = tracked.client.get_run(tracked.run_id)
        assert run.info.status == "FINISHED"
        assert run.info.end_time <= 1000 * ended
        assert {"cost/seconds", "cost/money"} <= run.data.metrics.keys()
        assert tracked.client.get_run(tracked.parent_run_id).info.status == "RUNNING"
    parent = tracked.client.get_run(tracked.parent_run_id)
    assert {"cost/train_seconds", "cost/sample_seconds"} <= parent.data.metrics.keys()
    assert parent.info.status == "FINISHED"
    assert_once(tracked, 2, previews={1})


def test_a_complete_run_sends_the_end_of_its_last_step(config, monkeypatch):
    def unreachable(*_args: object, **_more: object) -> None:
        raise MlflowException("gone", TEMPORARILY_UNAVAILABLE)

    with step_run(config, run="last", step="report") as tracked:
        send = mlflow_runs.send_missing
        monkeypatch.setattr(mlflow_runs, "send_missing", unreachable)
    monkeypatch.setattr(mlflow_runs, "send_missing", send)
    runs = (tracked.run_id, tracked.parent_run_id)
    assert [tracked.client.get_run(each).info.status for each in runs] == ["RUNNING"] * 2
    folder = claim_run(config, "last")
    mark_complete(folder, config)
    assert lacks_ends(folder)
    run_pipeline(Target(config, "last"), as_json=True)
    assert [tracked.client.get_run(each).info.status for each in runs] == ["FINISHED"] * 2
    monkeypatch.setattr(mlflow_runs, "open_client", unreachable)  # MLflow is not asked again
    run_pipeline(Target(config, "last"), as_json=True)


class Refuses:
    """A client whose requests fail."""

    def __init__(self, code: int) -> None:
        self.code, self.asked = code, 0

    def log_batch(self, *_: object, **__: object) -> None:
        self.asked += 1
        raise MlflowException("no", self.code)

    set_terminated = log_batch


END = {"run_id": "child", "parent_run_id": "parent", "status": "FINISHED", "ended": 1000}


END |= {"cost": {"cost/seconds": 1.0}, "run_cost": {"cost/sample_seconds": 1.0}}


def test_an_unreachable_server_is_asked_once_at_the_end(tmp_path):
    client = Refuses(TEMPORARILY_UNAVAILABLE)
    with pytest.raises(MlflowException):
        send_missing(client, RunFolder(str(tmp_path), "any"), "sample", END, parent=True)
    assert client.asked == 1


def test_a_run_that_refuses_does_not_keep_the_others_from_ending(tmp_path):
    client = Refuses(INVALID_PARAMETER_VALUE)
    send_missing(client, RunFolder(str(tmp_path), "any"), "sample", END, parent=True)
    assert client.asked == 4
