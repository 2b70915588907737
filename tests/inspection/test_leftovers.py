"""What nothing refers to in a store, on a disk and in S3, with a real MLflow; and what stays."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from do import recorded
from refused import refused

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.inspection import leftovers
from ncsn.inspection.leftovers import CLASSES, delete_leftovers, find_leftovers
from ncsn.runs.layout import RunFolder
from ncsn.tracking.client import connect, tracking_uri

DAYS = 2 * 86400.0
DIGITS = (Path(__file__).parents[2] / "configs" / "digits.yaml").read_text()
FINGERPRINTS = [16 * letter for letter in "ef"]  # the first is of a registered version


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """On a disk, or where its parameter says."""
    in_s3 = getattr(request, "param", "disk") == "s3"
    root = f"{request.getfixturevalue('s3_root')}/store" if in_s3 else f"{tmp_path}/runs/store"
    tracking = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    return from_yaml(DIGITS, overrides=[f"storage.root={root}", tracking, "train.keep_checkpoints=2"])


@pytest.fixture
def store(config: Config) -> Config:
    """A store with a leftover of each class and what looks like one."""
    client = connect(config).client
    put(config, "runs/registered/steps/evaluate/x.png", "runs/registered/selected/images-001/x")
    for name in ("images-001", "images-002", "images-003", "images-004", "resume-003", "before-decay-002"):
        put(config, f"runs/registered/checkpoints/{name}/checkpoint.json")
    storage.write_text(f"{config.storage.root}/runs/registered/checkpoints/images-004/config.yaml", to_yaml(config))
    run(config, "registered", "ingest", result={"uri": dataset(config, "aaaa1111")})
    run(config, "registered", "train", state="FINISHED", result={"checkpoint": "x"})
    for name in FINGERPRINTS:
        put(config, f"datasets/digits/aaaa1111/reference/{name}/features.npy")
    # A version of it, from an MLflow run that was deleted, as it was before the store was moved.
    of = client.create_run("0", tags={"ncsn.root": config.storage.root}).info.run_id
    client.log_dict(of, {}, "card.json")
    tags = {"ncsn.run": "registered", "dataset.digest": "aaaa1111", "eval.fingerprint": FINGERPRINTS[0] + 48 * "0"}
    tags["ncsn.checkpoint_uri"] = "s3://before/store/runs/registered/checkpoints/images-001"
    client.create_registered_model("digits")
    client.create_model_version("digits", "file:///nowhere", of, tags=tags)
    dataset(config, "eeee5555")  # of a version whose run is gone
    client.create_model_version("digits", "file:///nowhere", of, tags={"dataset.digest": "eeee5555"})
    client.delete_run(of)

    run(config, "stopped", "ingest", result={"uri": dataset(config, "bbbb2222")})
    for name in ("registered", "stopped", "reused", "opened"):
        client.create_run("0", tags={"ncsn.root": config.storage.root, "ncsn.step": "sample", "ncsn.run": name})
    run(config, "opened", "train", key={"model": "models:/ncsn-digits/1"}, result={})
    for name in ("registered", "opened", "stopped", "reused", "elsewhere"):
        put(config, f"runs/{name}/samples/s1/f1/shard")
    put(config, "runs/stopped/steps/train/.result.json.tmp-1a2b3c4d", "runs/stopped/checkpoints/images-009/ema")
    put(config, "runs/stopped/checkpoints/before-decay-009/ema")
    reused = from_yaml(to_yaml(config), overrides=[f"data.root={config.storage.root}/runs/reused/samples/s1/f1"])
    run(reused, "reuses", "ingest")
    put(config, f"code/{'a' * 64}.zip", "code/bbbb.zip")
    run(config, "elsewhere", "sample", reads={"code": f"{config.storage.root}/code/bbbb.zip"})

    run(config, "searched", "search", state="FINISHED", result={"values": {"noise.sigma_1": 2.0}})
    for key, sigma in (("won", 2.0), ("lost", 1.0)):
        trial = f"runs/searched/search/trials/0123/{key}"
        put(config, f"{trial}/checkpoints/images-001/checkpoint.json")
        record = {"number": 0, "values": {"noise.sigma_1": sigma}}
        storage.write_json(f"{config.storage.root}/{trial}/trial.json", record)

    dataset(config, "cccc3333")
    put(config, "datasets/digits/dddd4444/train/part", "datasets/digits/.parts-0123456789abcdef/train/part")
    put(config, ".tmp-12345678/dataset.json")
    deleted = client.create_run("0", tags={"ncsn.root": config.storage.root}).info.run_id
    client.log_dict(deleted, {}, "deleted.json")
    client.delete_run(deleted)
    return config


FOUND = {
    ("temporary", ".tmp-12345678"),
    ("temporary", "runs/stopped/steps/train/.result.json.tmp-1a2b3c4d"),
    ("temporary", "runs/stopped/checkpoints/images-009"),
    ("temporary", "runs/stopped/checkpoints/before-decay-009"),
    ("temporary", "runs/registered/selected/images-001"),
    ("temporary", "datasets/digits/dddd4444"),
    ("temporary", "datasets/digits/.parts-0123456789abcdef"),
    ("checkpoints", "runs/registered/checkpoints/images-002"),
    ("checkpoints", "runs/registered/checkpoints/resume-003"),
    ("samples", "runs/stopped/samples"),
    ("trials", "runs/searched/search/trials/0123/lost/checkpoints"),
    ("features", f"datasets/digits/aaaa1111/reference/{FINGERPRINTS[1]}"),
    ("datasets", "datasets/digits/cccc3333"),
    ("code", f"code/{'a' * 64}.zip"),
}


def put(config: Config, *paths: str) -> None:
    for path in paths:
        storage.write_bytes(storage.join(config.storage.root, path), b"12345678")


def dataset(config: Config, digest: str) -> str:
    put(config, f"datasets/digits/{digest}/manifest.json", f"datasets/digits/{digest}/train/part")
    return f"{config.storage.root}/datasets/digits/{digest}"


def run(config: Config, name: str, step: str, **record: object) -> None:
    folder = RunFolder(config.storage.root, name)
    storage.write_text(folder.config, to_yaml(config))
    storage.write_bytes(folder.begun, b"")
    recorded(folder, step, **record)


def found(config: Config) -> set[tuple[str, str]]:
    result, _ = find_leftovers(config.storage.root, tracking_uri(config))
    kinds = [each.kind for each in result]
    assert kinds == sorted(kinds, key=[*CLASSES].index) and all(each.size for each in result)
    root = f"{config.storage.root}/"
    return {(each.kind, each.uri.removeprefix(root)) for each in result if each.kind != "artifacts"}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> float:
    """Two days from now, which it is."""
    shifted = SimpleNamespace(time=lambda: time.time() + DAYS, monotonic=time.monotonic)
    monkeypatch.setattr(leftovers, "time", shifted)
    return time.time() + DAYS


@pytest.mark.parametrize("config", ["disk", "s3"], indirect=True)
def test_what_nothing_refers_to_goes_and_the_rest_stays(store: Config, request: pytest.FixtureRequest) -> None:
    root, registry = store.storage.root, tracking_uri(store)
    assert found(store) == set(), "all is young"
    request.getfixturevalue("later")
    result, began = find_leftovers(root, registry)
    assert found(store) == FOUND
    artifacts = [each for each in result if each.kind == "artifacts"]
    assert len(artifacts) == 1 and artifacts[0].size == 2
    before = {entry.path for entry in storage.list_entries(root, files=True)}
    assert list(delete_leftovers(root, registry, result, began)) == result
    after = {entry.path for entry in storage.list_entries(root, files=True)}
    gone = {path for path in before if any(path == name or path.startswith(f"{name}/") for _, name in FOUND)}
    assert after == before - gone and gone
    assert find_leftovers(root, registry)[0] == []


def test_a_run_at_work_keeps_what_it_has_and_reads(store: Config, later: float) -> None:
    root = Path(store.storage.root)
    reads = {"dataset": f"{root}/datasets/digits/aaaa1111", "other": f"{root}/runs/stopped/samples/s1"}
    run(store, "works", "sample", reads=reads)
    put(store, "runs/works/steps/sample/progress.json", "runs/works/samples/s1/f1/shard")
    os.utime(root / "runs" / "works" / "steps" / "sample" / "progress.json", (later, later))
    os.utime(root / ".tmp-12345678" / "dataset.json", (later - 86000, later - 86000))
    run(store, "works", "ingest", result={"uri": f"{root}/datasets/digits/aaaa1111"})
    kept = {("temporary", ".tmp-12345678"), ("samples", "runs/stopped/samples")}
    assert FOUND - found(store) == kept | {each for each in FOUND if each[0] == "features"}
    begun = RunFolder(store.storage.root, "searched").begun
    os.utime(begun, (later, later))  # and has changed nothing yet: it may find any dataset
    assert FOUND - found(store) == kept | {each for each in FOUND if each[0] in ("features", "trials", "datasets")}
    images = from_yaml(to_yaml(store), overrides=[f"data.root={root}/runs/registered"])
    run(images, "reuses", "ingest")
    assert FOUND - found(store) >= {each for each in FOUND if "registered/" in each[1]}, "the images of another"


def test_a_step_that_begins_meanwhile_keeps_what_is_not_deleted_yet(store: Config, later: float) -> None:
    dataset(store, "ffff6666")
    root, registry = store.storage.root, tracking_uri(store)
    result, began = find_leftovers(root, registry)
    deleting = delete_leftovers(root, registry, result, began)
    assert next(each for each in deleting if each.kind == "datasets")
    storage.write_bytes(RunFolder(root, "new").begun, b"")
    assert "datasets" not in {each.kind for each in deleting}
    assert not list(delete_leftovers(root, registry, result, began))
    assert sum(storage.exists(each.uri) for each in result if each.kind == "datasets") == 1


def test_what_a_link_leads_to_stays(store: Config, later: float, tmp_path: Path) -> None:
    root = Path(store.storage.root)
    (root / "datasets").rename(tmp_path / "shared")  # with another store
    (root / "datasets").symlink_to(tmp_path / "shared")
    (tmp_path / "link").symlink_to(root)  # the store itself may be behind one
    linked = from_yaml(to_yaml(store), overrides=[f"storage.root={tmp_path}/link"])
    kept = {each for each in FOUND if not each[1].startswith("datasets/")}
    assert found(store) == kept
    assert found(linked) == {each for each in kept if each[0] != "samples"}, "MLflow knows its runs by the other name"


def test_what_cannot_be_read_stops_it(store: Config, later: float, tmp_path: Path) -> None:
    """A server, a record and runs that are away."""
    root, away, runs = store.storage.root, "http://127.0.0.1:9", Path(store.storage.root, "runs")
    with pytest.raises(ValueError, match=away):
        find_leftovers(root, away)
    (runs / "stopped/steps/ingest/result.json").write_text("{")
    with pytest.raises(storage.UnreadableError):
        find_leftovers(root, tracking_uri(store))
    runs.rename(tmp_path / "elsewhere")
    runs.symlink_to(tmp_path / "not mounted")
    with refused(str(runs)):
        find_leftovers(root, tracking_uri(store))
    runs.unlink()
    runs.mkdir()
    with refused(str(runs)):
        find_leftovers(root, tracking_uri(store))
