"""Runs found by their tags, and what is written to them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncsn.config import flatten, from_yaml
from ncsn.tracking.connection import TrackingError, connect
from ncsn.tracking.run import step_run


def test_steps_of_a_run_are_children_of_one_parent(config):
    with step_run(config, run="family", step="ingest") as ingest:
        pass
    with step_run(config, run="family", step="train", tags={"ray.submission_id": "raysubmit_1"}) as train:
        pass
    assert ingest.parent_run_id == train.parent_run_id
    assert ingest.run_id != train.run_id
    child = train.client.get_run(train.run_id)
    assert child.data.tags["mlflow.parentRunId"] == train.parent_run_id
    assert child.data.tags["ncsn.run"] == "family"
    assert child.data.tags["ray.submission_id"] == "raysubmit_1"
    assert child.info.run_name == "train"
    parent = train.client.get_run(train.parent_run_id)
    assert parent.info.run_name == "family"
    assert "mlflow.parentRunId" not in parent.data.tags
    assert [child.info.status, parent.info.status] == ["FINISHED", "FINISHED"]


def test_parameters_are_the_flattened_config_and_the_yaml_is_an_artifact(config, tmp_path):
    with step_run(config, run="params", step="train") as tracked:
        pass
    for run_id in (tracked.run_id, tracked.parent_run_id):
        params = tracked.client.get_run(run_id).data.params
        assert params == {path: str(value) for path, value in flatten(config).items()}
    text = Path(tracked.client.download_artifacts(tracked.run_id, "config.yaml", str(tmp_path))).read_text()
    assert from_yaml(text) == config


def test_versions_and_commit_are_tags(config):
    with step_run(config, run="tags", step="train") as tracked:
        pass
    tags = tracked.client.get_run(tracked.run_id).data.tags
    assert {"python.version", "torch.version", "ray.version", "mlflow.version", "mlflow.user"} <= tags.keys()
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert tags["mlflow.source.git.commit"] == head.stdout.strip()


def test_retried_step_goes_on_in_its_run_and_says_how_it_ended(config):
    with pytest.raises(RuntimeError, match="lost a worker"), step_run(config, run="retry", step="train") as first:
        raise RuntimeError("lost a worker")
    ids = (first.run_id, first.parent_run_id)
    assert [first.client.get_run(run_id).info.status for run_id in ids] == ["FAILED", "FAILED"]
    with step_run(config, run="retry", step="train") as second:
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
        second.log_params({"seed": 1, "new": 2})
    assert (second.run_id, second.parent_run_id) == ids
    run = second.client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.params["seed"], run.data.params["new"]) == ("0", "2")


def test_interrupted_step_is_killed_not_failed(config):
    with pytest.raises(KeyboardInterrupt), step_run(config, run="interrupt", step="train") as tracked:
        raise KeyboardInterrupt
    assert tracked.client.get_run(tracked.run_id).info.status == "KILLED"


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


def test_pictures_files_and_metrics_arrive(config, tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(6, 8, 1)
    (tmp_path / "notes.txt").write_text("hello")
    with step_run(config, run="artifacts", step="sample") as tracked:
        tracked.log_image(image, "grid")
        tracked.log_image(image.repeat(3, axis=2), "samples/grid", step=128)
        tracked.log_file(str(tmp_path / "notes.txt"), "texts")
        tracked.log_json({"a": 1}, "a.json")
        tracked.log_metrics({"sample/nfe": 5, "sample/broken": float("nan")}, step=3)
    client, run_id = tracked.client, tracked.run_id
    with Image.open(client.download_artifacts(run_id, "grid.png", str(tmp_path))) as stored:
        np.testing.assert_array_equal(np.asarray(stored), image[..., 0])
    series = [file.path for file in client.list_artifacts(run_id, "images")]
    assert any(path.endswith(".png") and "samples~grid" in path and "step+128" in path for path in series)
    assert Path(client.download_artifacts(run_id, "texts/notes.txt", str(tmp_path))).read_text() == "hello"
    assert json.loads(Path(client.download_artifacts(run_id, "a.json", str(tmp_path))).read_text()) == {"a": 1}
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
    with pytest.raises(TrackingError, match=f"MLFLOW_RUN_ID = '{'0' * 32}'"), step_run(config, run="x", step="train"):
        pass


def test_over_a_server(make_config, server, tmp_path):
    config = make_config(f"tracking.uri={server.url}")
    for _ in range(2):
        with step_run(config, run="over-http", step="train") as tracked:
            tracked.log_text("hello", "a.txt")
    assert Path(tracked.client.download_artifacts(tracked.run_id, "a.txt", str(tmp_path))).read_text() == "hello"
    assert len(tracked.client.search_runs([tracked.experiment_id], "tags.`ncsn.run` = 'over-http'")) == 2
