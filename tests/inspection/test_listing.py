"""The newest runs, datasets and versions, on a disk and in S3."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from do import recorded, result_of
from gated import evidence

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.inspection import listing
from ncsn.inspection.listing import describe_run, find_items, list_datasets, list_models, list_runs
from ncsn.runs.layout import RunFolder
from ncsn.runs.record import Outcome, StepError, write_outcome
from ncsn.steps.ingest import write_images
from ncsn.tracking.client import client_at, tracking_uri
from ncsn.tracking.promotion import pass_gate

DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()


@pytest.fixture(params=["disk", "s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    root = str(tmp_path / "store") if request.param == "disk" else request.getfixturevalue("s3_root") + "/store"
    return from_yaml(DIGITS, overrides=[f"storage.root={root}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])


def begin(config: Config, name: str) -> RunFolder:
    folder = RunFolder(config.storage.root, name)
    storage.write_text(folder.config, to_yaml(config))
    storage.write_bytes(folder.begun, b"")
    return folder


def test_only_runs_that_began_last_are_looked_into(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MOST", 2)
    folders = [begin(config, f"run-{number}") for number in range(3)]
    time.sleep(1.1)  # dates in S3 are in seconds
    storage.write_bytes(folders[0].begun, b"")
    begin(config, "zero")
    items, count = list_runs(config.storage.root)
    assert (count, {(item.name, item.state) for item in items}) == (4, {("run-0", "NEW"), ("zero", "NEW")})
    assert list_runs(storage.join(config.storage.root, "nothing")) == ([], 0)


def test_a_run_has_state_size_date_and_figures(config: Config) -> None:
    root, folder = config.storage.root, begin(config, "mine")
    assert describe_run(root, "mine").state == "NEW"
    recorded(folder, "train", state="RUNNING")
    progress = {"done": 1000, "total": 4000, "unit": "images", "text": ""}
    storage.write_json(folder.step("train", "progress.json"), progress)
    item = describe_run(root, "mine")
    assert (item.state, item.figures) == ("RUNNING train", "1,000 / 4,000 images")
    assert item.size == sum(entry.size for entry in storage.list_entries(folder.uri, files=True)) > 1000
    assert abs(item.changed - time.time()) < 60
    fid = {"fid": 12.5, "fid_low": 9.0, "fid_high": 17.0}
    of_samples = {f"eval/classifier_{name}_n210": value for name, value in fid.items()}
    of_real = {f"eval/real_classifier_{name}_n210": value for name, value in fid.items()}
    result = result_of("evaluate", grade="far", metrics=of_samples, real_metrics=of_real)
    recorded(folder, "evaluate", state="FINISHED", result=result)
    item = describe_run(root, "mine")
    assert item.figures == "far from real; Fréchet 12 (9.0 to 17)"
    recorded(folder, "register", state="FAILED", error=StepError("OSError", "no answer"))
    write_outcome(folder, Outcome("FAILED", "no answer", "register"))
    item = describe_run(root, "mine")
    assert (item.state, item.facts["error"]) == ("FAILED register", "no answer")
    recorded(begin(config, "failed"), "train", state="FAILED", error=StepError("OSError", "no\nanswer"))
    assert describe_run(root, "failed").figures == "no answer"


def test_a_run_without_a_process_is_lost_and_what_cannot_be_read_hides_nothing_else(tmp_path: Path) -> None:
    root, config = str(tmp_path), from_yaml(DIGITS, overrides=[f"storage.root={tmp_path}"])
    recorded(begin(config, "gone"), "train", state="RUNNING")
    hour_ago = time.time() - listing._QUIET_SECONDS - 60
    for path in (tmp_path / "runs").rglob("*"):
        os.utime(path, (hour_ago, hour_ago))
    storage.write_text(begin(config, "damaged").step("train", "attempt.json"), "{")
    begin(config, "mine")
    storage.write_text(f"{root}/runs/notes.txt", "not a run")
    states = {item.name: item.state for item in list_runs(root)[0]}
    assert states == {"gone": "LOST train", "damaged": "UNREADABLE", "mine": "NEW"}
    for digest, text in (("0" * 16, '{"format_version": 1}'), ("1" * 16, "{")):
        storage.write_text(f"{root}/datasets/digits/{digest}/manifest.json", text)
    assert [item.state for item in list_datasets(root)[0]] == ["UNREADABLE"] * 2


def test_datasets_have_counts_and_are_found_by_their_digest(config: Config) -> None:
    root = config.storage.root
    made = write_images(from_yaml(to_yaml(config), overrides=["data.max_images=20"]), root)
    storage.write_bytes(f"{root}/datasets/sklearn_digits/0000000000000000/train/part-0.parquet", b"1234")
    items, count = list_datasets(root)
    assert count == 2 and {item.state for item in items} == {"COMPLETE", "INCOMPLETE"}
    (found,) = find_items(root, tracking_uri(config), made.manifest.digest[:10])
    assert found.figures.startswith("20 train + 20 test images of 8 x 8 x 1")
    assert found.facts["uri"] == made.uri and found.facts["license"]
    assert find_items(root, tracking_uri(config), made.uri) == [found]


def test_versions_have_their_aliases_figures_and_what_they_wait_for(tmp_path: Path) -> None:
    registry = f"sqlite:///{tmp_path}/mlflow.db"
    client = client_at(registry)
    client.create_registered_model("digits")
    client.create_registered_model("others")
    client.create_model_version("others", "file:///nowhere")
    for value, ask in ((9.0, False), (8.0, True)):
        tags = {"ncsn.model": "0123", "ncsn.bytes": "1500"}
        version = str(client.create_model_version("digits", "file:///nowhere", tags=tags).version)
        pass_gate(client, name="digits", version=version, evidence=evidence(value), ask=ask)
    second, first = list_models(registry)
    assert (first.name, first.state, first.size) == ("models:/digits/1", "champion", 1500)
    assert (second.name, second.state) == ("models:/digits/2", "challenger, waits")
    assert second.figures == "eval/classifier_fid_n512 = 8.0 (7.5 to 8.5)"
    assert find_items(str(tmp_path), registry, "digits") == [second, first]
    assert [asdict(item) for item in find_items(str(tmp_path), registry, "digits@champion")] == [asdict(first)]


def test_a_version_is_shown_with_its_run_if_that_is_in_this_store(config: Config, tmp_path: Path) -> None:
    registry, root = f"sqlite:///{tmp_path}/mlflow.db", config.storage.root
    folder, client = begin(config, "mine"), client_at(registry)
    recorded(folder, "register", state="FINISHED", seconds=2.0, result=result_of("register", uri="models:/digits/1"))
    client.create_registered_model("digits")
    for run, store in (("mine", root), ("mine", "/elsewhere"), ("../mine", root), ("gone", root)):
        tags = {"ncsn.model": "0123", "ncsn.run": run, "ncsn.root": store}
        client.create_model_version("digits", "file:///nowhere", tags=tags)
    version, run = find_items(root, registry, "models:/digits/1")
    assert (version.facts["run"], version.facts["store"], run.name) == ("mine", root, "mine")
    assert run.facts["register"].endswith("; 2.0 s")
    for number in (2, 3, 4):
        assert [item.name for item in find_items(root, registry, f"models:/digits/{number}")] == [
            f"models:/digits/{number}"
        ]
    assert find_items(root, registry, "mine") == [run]
