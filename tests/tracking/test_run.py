"""Runs found by their tags, and what is written to them."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from refused import refused

from ncsn.config import flatten, from_yaml
from ncsn.runs.folder import RunFolder
from ncsn.runs.records import read_step
from ncsn.tracking.client import TrackingError, client_at, connect, tracking_uri
from ncsn.tracking.lineage import provenance
from ncsn.tracking.mlflow_runs import StepRun, step_run


def test_parameters_are_the_flattened_config_and_the_yaml_is_an_artifact(config, tmp_path):
    with step_run(config, run="params", step="train") as tracked:
        pass
    for run_id in (tracked.run_id, tracked.parent_run_id):
        params = tracked.client.get_run(run_id).data.params
        assert params == {path: str(value) for path, value in flatten(config).items()}
    text = Path(tracked.client.download_artifacts(tracked.run_id, "config.yaml", str(tmp_path))).read_text()
    assert from_yaml(text) == config


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_retried_step_goes_on_in_its_run_below_the_parent_and_says_how_it_ended(config, error, status):
    with pytest.raises(error), step_run(config, run=f"retry-{status}", step="train") as first:
        raise error
    ids = (first.run_id, first.parent_run_id)
    assert [first.client.get_run(run_id).info.status for run_id in ids] == [status, status]
    assert read_step(first.folder, "train").mlflow == {"run_id": ids[0], "parent_run_id": ids[1]}
    with step_run(config, run=f"retry-{status}", step="train") as second:
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
    with step_run(config, run=f"retry-{status}", step="sample") as sample:
        pass
    assert (second.run_id, second.parent_run_id, sample.parent_run_id) == (*ids, ids[1])
    child, parent = (second.client.get_run(run_id) for run_id in ids)
    assert (child.info.status, child.info.run_name, child.data.tags["mlflow.parentRunId"]) == (
        "FINISHED",
        "train",
        ids[1],
    )
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", f"retry-{status}")
    assert {"python.version", "torch.version", "mlflow.user", "mlflow.source.git.commit"} <= child.data.tags.keys()


def test_other_settings_are_another_run_another_place_is_not(make_config):
    runs = []
    for override in ("seed=0", "sampling.sampler.steps_per_level=9", "compute.num_workers=2"):
        with step_run(make_config(override), run="settings", step="sample") as tracked:
            runs.append(tracked)
    usual, longer, spread = runs
    assert longer.run_id != usual.run_id
    assert spread.run_id == usual.run_id
    assert {tracked.parent_run_id for tracked in runs} == {usual.parent_run_id}
    assert longer.client.get_run(longer.run_id).data.params["sampling.sampler.steps_per_level"] == "9"


def test_what_a_step_does_not_use_is_no_other_run(make_config):
    """Resumed with another sampler, training goes on in its run, and the run says so."""
    with step_run(make_config(), run="resumed", step="train") as first:
        pass
    with step_run(make_config("sampling.seed=5", "compute.num_workers=2"), run="resumed", step="train") as second:
        pass
    assert second.run_id == first.run_id
    for run_id in (first.run_id, first.parent_run_id):
        run = first.client.get_run(run_id)
        assert (run.data.params["sampling.seed"], run.data.params["compute.num_workers"]) == ("0", "1")
        assert run.data.tags["ncsn.changed"] == "sampling.seed: 0 -> 5; compute.num_workers: 1 -> 2"


def test_of_many_runs_that_read_one_new_data_set_at_once_none_is_refused(make_config, server):
    connection = connect(make_config(f"tracking.uri={server.url}", "tracking.experiment=crowded"))
    workers = 6
    together = threading.Barrier(workers)

    def read(worker: int) -> list[str]:
        run_id = connection.client.create_run(connection.experiment_id).info.run_id
        parts = {"run_id": run_id, "parent_run_id": run_id, "folder": RunFolder("/store", "any")}
        tracked = StepRun(connection.client, connection.uri, connection.experiment_id, **parts)
        for round_ in range(5):
            together.wait(timeout=60)
            tracked.log_dataset("digits", digest=f"{round_}", uri="/data/digits")
        inputs = connection.client.get_run(run_id).inputs.dataset_inputs
        return sorted(logged.dataset.digest for logged in inputs)

    with ThreadPoolExecutor(workers) as pool:
        assert list(pool.map(read, range(workers))) == [["0", "1", "2", "3", "4"]] * workers


def test_reserved_time_is_a_metric_of_the_step_and_of_the_whole(make_config):
    config = make_config("compute.num_workers=2", "compute.cpus_per_worker=3")
    with step_run(config, run="costs", step="train") as tracked:
        time.sleep(0.2)
    metrics = tracked.client.get_run(tracked.run_id).data.metrics
    assert 0.2 <= metrics["cost/seconds"] < 60
    assert metrics["cost/cpu_hours"] == pytest.approx(6 * metrics["cost/seconds"] / 3600)
    assert metrics["cost/gpu_hours"] == 0
    whole = tracked.client.get_run(tracked.parent_run_id).data.metrics
    assert whole == {"cost/train_seconds": metrics["cost/seconds"]}


def test_image_and_pipeline_are_tags_where_the_environment_names_them(config, monkeypatch):
    for name, value in {
        "IMAGE": "ncsn@sha256:1",
        "COMMIT": "c0ffee",
        "KFP_RUN_ID": "r1",
        "KFP_UI": "https://kfp/",
    }.items():
        monkeypatch.setenv(f"NCSN_{name}", value)
    with step_run(config, run="environment", step="train") as tracked:
        pass
    wanted = {
        "mlflow.docker.image.uri": "ncsn@sha256:1",
        "mlflow.source.git.commit": "c0ffee",
        "kfp.pipeline_run_id": "r1",
        "kfp.pipeline_run_url": "https://kfp/#/runs/details/r1",
    }
    for run_id in (tracked.run_id, tracked.parent_run_id):
        assert wanted.items() <= tracked.client.get_run(run_id).data.tags.items()


@pytest.mark.parametrize(
    ("variables", "image"),
    [
        ({"NCSN_IMAGE": "compiled:1"}, None),  # a task that KFP executes on this machine
        ({"NCSN_IMAGE": "compiled:1", "NCSN_KFP_RUN_ID": "r1"}, "compiled:1"),
        ({"NCSN_IMAGE": "compiled:1", "NCSN_CONTAINER_IMAGE": "pod:2"}, "pod:2"),
    ],
)
def test_an_image_is_named_only_where_a_container_runs(monkeypatch, variables, image):
    for name in ("NCSN_IMAGE", "NCSN_KFP_RUN_ID", "NCSN_CONTAINER_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert provenance("ncsn train").get("mlflow.docker.image.uri") == image


def test_server_that_goes_away_in_a_step_is_one_line(make_config, monkeypatch):
    """And the work that was done is not lost: the same command goes on."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make_config()
    with refused(tracking_uri(config), error=TrackingError), step_run(config, run="away", step="sample") as tracked:
        client_at("http://127.0.0.1:9").set_tag(tracked.run_id, "a", "b")


def test_same_run_name_in_another_store_is_another_run(config, make_config, root, tmp_path):
    elsewhere = make_config(f"storage.root={tmp_path}", f"tracking.uri=sqlite:///{root}/mlflow.db")
    with step_run(config, run="name", step="train") as here, step_run(elsewhere, run="name", step="train") as there:
        pass
    assert here.parent_run_id != there.parent_run_id


def test_dataset_is_an_input_with_its_digest(config):
    with step_run(config, run="data", step="train") as tracked:
        for _ in range(2):
            tracked.log_dataset("digits", digest="d" * 64, uri="/data/digits", profile={"train": 3})
    run = tracked.client.get_run(tracked.run_id)
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("digits", "d" * 36)
    assert json.loads(logged.dataset.source) == {"uri": "/data/digits"}
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}
    parent = tracked.client.get_run(tracked.parent_run_id)
    assert run.data.tags["dataset.digest"] == parent.data.tags["dataset.digest"] == "d" * 64


def test_files_and_metrics_arrive(config, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with step_run(config, run="artifacts", step="sample") as tracked:
        tracked.log_file(str(tmp_path / "notes.txt"))
        tracked.log_metrics({"sample/nfe": 5, "sample/broken": float("nan")}, step=3)
    client, run_id = tracked.client, tracked.run_id
    assert Path(client.download_artifacts(run_id, "notes.txt", str(tmp_path))).read_text() == "hello"
    metrics = client.get_run(run_id).data.metrics
    assert metrics["sample/nfe"] == 5
    assert np.isnan(metrics["sample/broken"])


def test_run_that_kfp_opened_is_the_parent_and_stays_open(config, make_config, monkeypatch):
    opened = connect(make_config("tracking.experiment=of-kfp"))
    adopted = opened.client.create_run(opened.experiment_id, tags={"kfp.pipeline_run_id": "1234"})
    monkeypatch.setenv("MLFLOW_RUN_ID", adopted.info.run_id)
    with step_run(config, run="adopted", step="train") as tracked:
        pass
    assert tracked.parent_run_id == adopted.info.run_id
    assert tracked.experiment_id == opened.experiment_id
    parent = tracked.client.get_run(adopted.info.run_id)
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["kfp.pipeline_run_id"] == "1234"
    assert parent.data.tags["ncsn.run"] == "adopted"


def test_unknown_run_to_adopt_is_named(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with refused("MLFLOW_RUN_ID", error=TrackingError) as caught, step_run(config, run="x", step="train"):
        pass
    assert caught.value.problems[0].value == "0" * 32


def test_over_a_server(make_config, server, tmp_path):
    config = make_config(f"tracking.uri={server.url}")
    for _ in range(2):
        with step_run(config, run="over-http", step="train") as tracked:
            tracked.log_bytes(b"hello", "a.txt")
    assert Path(tracked.client.download_artifacts(tracked.run_id, "a.txt", str(tmp_path))).read_text() == "hello"
    assert len(tracked.client.search_runs([tracked.experiment_id], "tags.`ncsn.run` = 'over-http'")) == 2
