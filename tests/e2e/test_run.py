"""`ncsn run` for real: Ray, MLflow and the store, on real digits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from do import ALWAYS
from PIL import Image
from webhook import Receiver, receiver

from ncsn import ScoreModel, storage
from ncsn.cli import app
from ncsn.config import from_yaml
from ncsn.data.samples import SampleSet
from ncsn.runs.steps import STEP_TABLE
from ncsn.tracking.client import client_at

RUN = "mine"


@pytest.fixture(scope="module")
def told() -> Iterator[Receiver]:
    with receiver() as sent:
        yield sent


@pytest.fixture(scope="module")
def finished(workplace, told) -> subprocess.CompletedProcess[str]:
    done = workplace.run("run", "--run", RUN, "--json")
    assert done.returncode == 0, done.stderr + (workplace.folder(RUN) / "log.txt").read_text()
    return done


def test_every_step_has_its_result_at_its_place_in_the_store(workplace, finished) -> None:
    printed, folder = json.loads(finished.stdout), workplace.folder(RUN)
    assert (printed["run"], list(printed["steps"])) == (RUN, ALWAYS)
    assert {step: workplace.result(RUN, step) for step in ALWAYS} == printed["steps"]
    assert sorted(path.name for path in folder.glob("checkpoints/images-*")) == ["images-000000320", "images-000000640"]
    dataset = Path(workplace.result(RUN, "ingest")["uri"])
    assert dataset.parent.parent == workplace.root / "datasets"
    assert {"train", "test", "manifest.json", "classifier"} <= {path.name for path in dataset.iterdir()}
    samples = Path(workplace.result(RUN, "sample")["uri"])
    assert samples.parent.parent == folder / "samples" and len(list(samples.glob("shard-*.parquet"))) == 2
    assert {"manifest.json", "grid.png", "strip.png"} <= {path.name for path in samples.iterdir()}
    assert not list(workplace.root.rglob("*.tmp-*"))
    trained, sampled, measured = (workplace.result(RUN, step) for step in ("train", "sample", "evaluate"))
    assert trained["images_seen"] == 640 and 0 < trained["loss"] < 1, "a zero network reads 1"
    assert sampled["nfe"] == 4 * 2 + 1
    assert measured["metrics"]["eval/classifier_fid_n16"] > measured["real_metrics"]["eval/real_classifier_fid_n16"]
    page = Path(workplace.result(RUN, "report")["uri"]).read_text()
    assert all(f"<strong>{step}</strong>" in page for step in ALWAYS[:-1]) and '<section id="training"' in page
    workplace.wait_for_silence()


def test_a_run_tells_its_events(workplace, finished, told) -> None:
    assert [event["event"] for event in told.taken[:4]] == ["started", "registered", "promoted", "finished"]
    started, registered, promoted, ended = told.taken[:4]
    assert (started["run"], started["root"], ended["status"]) == (RUN, str(workplace.root), "FINISHED")
    assert f"models:/{registered['model']}/{registered['version']}" == workplace.result(RUN, "register")["uri"]
    assert (promoted["model"], promoted["version"]) == (registered["model"], registered["version"])


def test_the_terminal_shows_steps_and_not_the_chatter(workplace, finished) -> None:
    lines = finished.stderr.splitlines()
    assert f"log    {workplace.folder(RUN)}/log.txt" in lines
    for step in ALWAYS:
        assert f"{step:<9} starting" in lines
    assert all(line.startswith((*ALWAYS, "run ", "log ")) for line in lines), finished.stderr
    log = (workplace.folder(RUN) / "log.txt").read_text()
    assert "(train pid=" in log and "\x1b" not in log and "SIGTERM" not in log


def test_mlflow_has_a_run_with_what_came_out_and_below_it_one_for_each_step(workplace, finished) -> None:
    client = client_at(f"sqlite:///{workplace.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id])
    (whole,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not whole}
    assert (whole.info.run_name, set(children)) == (RUN, set(ALWAYS))
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == whole.info.run_id
        assert (child.info.status, child.data.params["noise.num_levels"]) == ("FINISHED", "4")
        assert "cost.seconds" in child.data.tags and "mlflow.docker.image.uri" not in child.data.tags
    losses = client.get_metric_history(children["train"].info.run_id, "train/loss")
    assert [point.step for point in losses] == [160, 320, 480, 640]
    assert "ray.dashboard_url" not in children["train"].data.tags, "the page ended with the cluster"
    results = {step: workplace.result(RUN, step) for step in ALWAYS}
    for run, context in ((whole, None), (children["train"], "training"), (children["evaluate"], "evaluation")):
        (read,) = run.inputs.dataset_inputs
        assert read.dataset.digest == results["ingest"]["digest"][:36]
        assert context in (None, *(tag.value for tag in read.tags))
    rate = pytest.approx(results["train"]["images_per_second"], abs=0.1)
    trained = {"train/loss": results["train"]["loss"], "train/images_seen": 640, "train/images_per_second": rate}
    assert whole.data.metrics == trained | results["evaluate"]["metrics"] | results["evaluate"]["real_metrics"]
    points = [point for name in whole.data.metrics for point in client.get_metric_history(whole.info.run_id, name)]
    assert {point.step for point in points} == {0, 640}, "images seen, and none is a time"
    assert whole.data.tags["model.uri"] == results["register"]["uri"]
    for said in (results["register"]["uri"], results["evaluate"]["verdict"]):
        assert said in whole.data.tags["mlflow.note.content"]
    assert {"grid.png", "report.html"} <= {file.path for file in client.list_artifacts(whole.info.run_id)}


def test_show_prints_a_version_and_the_steps_of_its_run(workplace, finished) -> None:
    command = ["show", "models:/ncsn-tiny@champion", "--json", "--config", str(workplace.config)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    version, run = json.loads(done.stdout)["items"]
    registered = workplace.result(RUN, "register")
    assert (version["name"], version["facts"]["gate"]) == (registered["uri"], registered["reason"])
    assert (version["facts"]["run"], run["name"]) == (RUN, RUN)
    for step in ALWAYS:
        assert run["facts"][step].startswith(str(STEP_TABLE[step].result.of(workplace.result(RUN, step))))


def test_images_come_from_the_registry_alone(workplace, finished, tmp_path, monkeypatch) -> None:
    one_shard = ("--set", "sampling.batch_size=16")  # which needs no cluster
    pictures = tmp_path / "pictures"
    options = ("--png", str(pictures), "--json", *one_shard, "--set", f"storage.root={workplace.root}")
    command = [sys.executable, "-m", "ncsn", "sample", "models:/ncsn-tiny@champion", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    manifest = json.loads(Path(made["uri"], "manifest.json").read_text())
    assert manifest["model"] == workplace.result(RUN, "register")["uri"]
    images, sampled = (SampleSet(uri, 16).read(0, 16) for uri in (made["uri"], workplace.result(RUN, "sample")["uri"]))
    assert np.abs(images.astype(int) - sampled.astype(int)).max() <= 1
    assert Path(made["grid"]).read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(np.array(Image.open(pictures / "000015.png")), images[15, ..., 0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace.root}/mlflow.db")
    loaded = ScoreModel.load("models:/ncsn-tiny@champion", device="cpu").sample(16)
    assert np.abs(images.astype(int) - loaded).max() <= 1
    made = mlflow.pyfunc.load_model("models:/ncsn-tiny@champion").predict(None, params={"n_images": 2})
    np.testing.assert_array_equal(made, sampled[:2])


def test_a_second_call_finds_every_step_done_also_where_the_store_was_moved_to(workplace, finished) -> None:
    moved = workplace.root.rename(workplace.root.with_name("moved"))
    again = workplace.run("run", "--run", RUN, "--json", "--set", f"storage.root={moved}")
    moved.rename(workplace.root)
    assert again.returncode == 0, again.stderr
    assert again.stdout == finished.stdout.replace(f"{workplace.root}/", f"{moved}/")
    assert again.stderr.count("already done") == len(ALWAYS)


def test_a_step_runs_by_hand_on_what_the_pipeline_left(workplace, finished, told) -> None:
    done = workplace.run("evaluate", "--run", RUN, "--set", "evaluation.num_splits=4", "--json")
    assert done.returncode == 0, done.stderr
    ours, pipelines = json.loads(done.stdout), json.loads(finished.stdout)["steps"]["evaluate"]
    assert ours["metrics"]["eval/classifier_fid_n16"] == pipelines["metrics"]["eval/classifier_fid_n16"]
    assert ours["fingerprint"] == pipelines["fingerprint"]
    events = [event["event"] for event in told.taken if event.get("step") == "evaluate"]
    assert events == ["started", "finished"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_config_with_a_search_trains_what_it_finds(workplace) -> None:
    search = "{space: {noise.sigma_1: {kind: log, low: 0.5, high: 2}}, num_trials: 2, num_samples: 20}"
    done = workplace.run("run", "--run", "searched", "--json", "--set", f"search={search}")
    assert done.returncode == 0, done.stderr
    steps, best = json.loads(done.stdout)["steps"], workplace.folder("searched-best")
    assert list(steps) == ["ingest", "search", *ALWAYS[1:]]
    assert steps["train"]["checkpoint"].startswith(f"{best}/")
    found = from_yaml((best / "config.yaml").read_text())
    assert found.search is None and found.levels.sigma_1 == steps["search"]["values"].get("noise.sigma_1", 1.0)
    again = workplace.run("run", "--run", "searched", "--json", "--set", f"search={search}")
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_a_store_in_s3_is_as_good_as_a_folder(workplace, s3_root: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("NCSN_CACHE_DIR", str(tmp_path / "cache"))
    place = ("--run", "inbucket", "--json", "--set", f"storage.root={s3_root}")
    done = workplace.run("run", *place)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert list(steps) == ALWAYS
    assert steps["train"]["checkpoint"] == f"{s3_root}/runs/inbucket/checkpoints/images-000000640"
    assert storage.exists(storage.join(steps["train"]["checkpoint"], "checkpoint.json"))
    assert storage.read_bytes(steps["sample"]["grid"]).startswith(b"\x89PNG")
    assert steps["register"]["aliases"] == ["challenger", "champion"]
    more = workplace.run("sample", *place, "--set", "sampling.num_images=20")
    assert more.returncode == 0, more.stderr
    shards = [name for name in storage.list_names(steps["sample"]["uri"]) if name.endswith(".parquet")]
    ends = [(0, 8), (8, 16), (16, 20)]
    assert shards == [f"shard-{first:09d}-{last:09d}.parquet" for first, last in ends]
    workplace.wait_for_silence()
