"""Runs found by their tags, and what is written to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from do import recorded
from mlflow.tracking import MlflowClient
from refused import refused

from ncsn.config import flatten, from_yaml
from ncsn.runs.record import read_attempt
from ncsn.tracking.client import TrackingError, connect, tracking_uri
from ncsn.tracking.mlflow_runs import provenance, step_run


def test_settings_datasets_files_and_metrics_arrive(config, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with step_run(config, run="artifacts", step="sample") as tracked:
        for _ in range(2):
            tracked.log_dataset("digits", digest="d" * 64, uri="/data/digits")
        tracked.log_file(str(tmp_path / "notes.txt"))
        tracked.log_metrics({"sample/nfe": 5, "sample/broken": float("nan")}, step=3)
    client = tracked.client
    run, parent = runs = [client.get_run(run_id) for run_id in (tracked.run_id, tracked.parent_run_id)]
    for each in runs:
        assert each.data.params == {path: str(value) for path, value in flatten(config).items()}
        assert each.data.tags["dataset.digest"] == "d" * 64
    notes, settings = (
        Path(client.download_artifacts(tracked.run_id, name, str(tmp_path / "got"))).read_text()
        for name in ("notes.txt", "config.yaml")
    )
    assert notes == "hello" and from_yaml(settings) == config
    assert run.data.metrics["sample/nfe"] == 5 and np.isnan(run.data.metrics["sample/broken"])
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("digits", "d" * 36)
    assert json.loads(logged.dataset.source) == {"uri": "/data/digits"}
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}
    assert parent.inputs.dataset_inputs == run.inputs.dataset_inputs


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_retried_step_goes_on_in_its_run_below_the_parent_and_says_how_it_ended(config, error, status):
    with pytest.raises(error), step_run(config, run=f"retry-{status}", step="train") as first:
        raise error
    ids = (first.run_id, first.parent_run_id)
    assert [first.client.get_run(run_id).info.status for run_id in ids] == [status, status]
    assert read_attempt(first.folder, "train").mlflow == {"run_id": ids[0], "parent_run_id": ids[1]}
    with step_run(config, run=f"retry-{status}", step="train") as second:
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
    with step_run(config, run=f"retry-{status}", step="sample") as sample:
        pass
    assert (second.run_id, second.parent_run_id, sample.parent_run_id) == (*ids, ids[1])
    child, parent = (second.client.get_run(run_id) for run_id in ids)
    assert [run.info.status for run in (child, parent)] == ["FINISHED"] * 2
    assert [run.info.run_name for run in (child, parent)] == ["train", f"retry-{status}"]
    assert child.data.tags["mlflow.parentRunId"] == ids[1]
    assert {"python.version", "torch.version", "mlflow.user", "mlflow.source.git.commit"} <= child.data.tags.keys()


def test_settings_that_a_step_uses_and_the_store_are_another_run_and_others_are_not(make_config, root, tmp_path):
    elsewhere, runs = make_config(f"storage.root={tmp_path}", f"tracking.uri=sqlite:///{root}/mlflow.db"), []
    unused = ("compute.num_workers=2", "sampling.seed=5", "export.fill=true", "select.seed=5")
    for override in ("seed=0", "noise.num_levels=9", *unused):
        with step_run(make_config(override), run="settings", step="train") as tracked:
            runs.append(tracked)
    usual, more, *same = runs
    assert more.run_id != usual.run_id
    assert [tracked.run_id for tracked in same] == [usual.run_id] * 4
    assert {tracked.parent_run_id for tracked in runs} == {usual.parent_run_id}
    params = [usual.client.get_run(run_id).data.params for run_id in (more.run_id, usual.run_id)]
    assert [each["noise.num_levels"] for each in params] == ["9", "2"]
    assert params[1]["sampling.seed"] == "0", "of the first attempt"
    with step_run(elsewhere, run="settings", step="train") as tracked:
        assert tracked.parent_run_id != usual.parent_run_id


def test_costs_of_the_step_and_of_the_run_are_tags(make_config):
    config = make_config("compute.num_workers=2", "compute.cpus_per_worker=3")
    for step, seconds in (("ingest", 100.0), ("train", 36.0)):
        with step_run(config, run="costs", step=step) as tracked:
            recorded(tracked.folder, step, seconds=seconds)
    own, whole = (tracked.client.get_run(run_id).data for run_id in (tracked.run_id, tracked.parent_run_id))
    first, second = (read_attempt(tracked.folder, step).seconds for step in ("ingest", "train"))
    assert first >= 100 and second >= 36, "with those of the block"
    found = [float(run.tags[f"cost.{name}"]) for run in (own, whole) for name in ("seconds", "cpu_hours", "gpu_hours")]
    hours = 6 * second / 3600
    expected = [second, hours, 0, first + second, hours + 3 * first / 3600, 0]
    assert found == pytest.approx(expected, rel=1e-5)
    assert own.metrics == whole.metrics == {}


def test_commit_image_and_pipeline_are_tags_where_the_environment_names_them(monkeypatch):
    image = "mlflow.docker.image.uri"
    for name in ("NCSN_KFP_RUN_ID", "NCSN_CONTAINER_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCSN_IMAGE", "compiled:1")
    monkeypatch.setenv("NCSN_COMMIT", "c0ffee")
    tags = provenance("ncsn train")
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert image not in tags, "KFP may execute a task on this machine"
    monkeypatch.setenv("NCSN_KFP_RUN_ID", "r1")
    monkeypatch.setenv("NCSN_KFP_UI", "https://kfp/")
    tags = provenance("ncsn train")
    assert (tags[image], tags["kfp.pipeline_run_url"]) == ("compiled:1", "https://kfp/#/runs/details/r1")
    monkeypatch.setenv("NCSN_CONTAINER_IMAGE", "pod:2")
    assert provenance("ncsn train")[image] == "pod:2"


def test_server_that_goes_away_in_a_step_is_one_line(make_config, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make_config()
    with refused(tracking_uri(config), error=TrackingError), step_run(config, run="away", step="sample") as tracked:
        MlflowClient("http://127.0.0.1:9").set_tag(tracked.run_id, "a", "b")


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
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with refused("MLFLOW_RUN_ID", error=TrackingError), step_run(config, run="x", step="train"):
        pass
