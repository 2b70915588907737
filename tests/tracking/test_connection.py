"""Which server; what is said when it does not answer; two processes at one new database."""

from __future__ import annotations

import subprocess
import sys
import traceback

import pytest
from answering import answering
from mlflow.tracking import MlflowClient
from refused import refused

from ncsn.config import to_json
from ncsn.tracking import client
from ncsn.tracking.client import TrackingError, connect, tracking_uri

BOTH_START = """
import sys
from ncsn.config import from_yaml
from ncsn.tracking.mlflow_runs import step_run

with step_run(from_yaml(sys.argv[1]), run="both", step=sys.argv[2]) as tracked:
    for step in range(40):
        tracked.log_metrics({"a/b": float(step)}, step)
        tracked.set_tags({"last": str(step)})
"""


def test_config_wins_over_environment_wins_over_the_file_in_the_store(make_config, root, monkeypatch):
    assert tracking_uri(make_config()) == f"sqlite:///{root}/mlflow.db"
    monkeypatch.chdir(root)
    assert tracking_uri(make_config("tracking.uri=sqlite:///here.db")) == f"sqlite:///{root}/here.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert tracking_uri(make_config()) == "http://from-environment:5000"
    assert tracking_uri(make_config("tracking.uri=http://from-config:5000")) == "http://from-config:5000"


@pytest.mark.parametrize(
    ("key", "variable", "override"),
    [
        ("tracking.uri", "", "storage.root=s3://bucket/prefix"),
        ("tracking.uri", "", "tracking.uri=./mlruns"),
        ("tracking.uri", "", "tracking.uri=http://["),
        ("MLFLOW_TRACKING_URI", "nonsense", "seed=0"),
        ("MLFLOW_TRACKING_URI", "postgresql://me:s3cret@host:port/mlflow", "seed=0"),
    ],
)
def test_an_unusable_place_is_refused_without_its_password(make_config, monkeypatch, key, variable, override):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    with refused(key, error=TrackingError) as caught:
        tracking_uri(make_config(override))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("status", "healthy"), [(401, False), (500, False), (500, True)])
def test_a_server_that_refuses_is_named_without_its_password(make_config, monkeypatch, status, healthy):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with answering(lambda asked, _: (200 if healthy and asked.path == "/health" else status, b"")) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("://", "://me:s3cret@"))
        with refused(url, error=TrackingError) as caught:
            connect(make_config())
    text = "".join(traceback.format_exception(caught.value))
    assert str(status) in text and "s3cret" not in text and "me:" not in text


@pytest.mark.slow
def test_two_processes_that_start_at_once_share_one_database(make_config, tmp_path):
    config = make_config(f"storage.root={tmp_path / 'fresh'}")
    steps = ("sample", "evaluate")
    command = [sys.executable, "-c", BOTH_START, to_json(config)]
    started = [subprocess.Popen([*command, step], stderr=subprocess.PIPE, text=True) for step in steps]
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    connection = connect(config)
    runs = connection.client.search_runs([connection.experiment_id], "tags.`ncsn.step` != 'none'")
    assert {run.data.tags["ncsn.step"] for run in runs} == set(steps)
    for run in runs:
        history = connection.client.get_metric_history(run.info.run_id, "a/b")
        assert [metric.step for metric in history] == list(range(40))


def test_links_lead_where_people_open_mlflow(monkeypatch):
    where = "/#/experiments/1/runs/abc?workflowType=machine_learning"
    monkeypatch.delenv(client.UI, raising=False)
    assert client.page("http://user:secret@mlflow:5000", "1", "abc") == f"http://mlflow:5000{where}"
    assert client.page("sqlite:////tmp/mlflow.db", "1", "abc") == ""
    monkeypatch.setenv(client.UI, "https://mlflow.example/")
    for uri in ("http://mlflow:5000", "postgresql://mlflow@postgres/mlflow"):
        assert client.page(uri, "1", "abc") == f"https://mlflow.example{where}"


def test_an_experiment_with_files_in_a_folder_of_this_machine_is_refused(server, make_config, tmp_path, monkeypatch):
    """Whoever may make experiments would choose where MLflow's client writes."""
    MlflowClient(server.url).create_experiment("theirs", artifact_location=str(tmp_path / "outside"))
    config = make_config(f"tracking.uri={server.url}", "tracking.experiment=theirs")
    assert connect(config).experiment_id  # of a server of this machine, whose folders these are
    monkeypatch.setattr(client, "_HERE", ())
    with refused("tracking.experiment", error=TrackingError):
        connect(config)
    assert connect(make_config(f"tracking.uri={server.url}", "tracking.experiment=ours")).experiment_id
