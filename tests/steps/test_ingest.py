"""The ingest step: done once, and nothing half-written when it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from do import do, do_as_task
from experiments import tiny
from PIL import Image
from refused import refused

from ncsn.cli import app
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.data.duplicates import DUPLICATES, from_csv
from ncsn.data.format import load_manifest, read_split
from ncsn.environment import CODE, KFP_RUN_ID, KfpRun
from ncsn.errors import NotFound, UserError
from ncsn.kubeflow import finish
from ncsn.runs.layout import RunFolder, run_folder
from ncsn.runs.record import ForeignRun, Outcome, read_attempt, write_outcome
from ncsn.steps import ingest


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """An experiment on digits with its store below the test's folder."""
    return lambda **data: tiny(tmp_path / "store", "name=digits", *(f"data.{k}={v}" for k, v in data.items()))


def test_digits_become_a_dataset_once_and_again_if_it_is_gone(config, tmp_path, monkeypatch):
    monkeypatch.setenv(CODE, code := f"{tmp_path}/store/code/{64 * 'a'}.zip")
    first = do("ingest", config(test_fraction=0.3), "one")
    assert read_attempt(RunFolder(f"{tmp_path}/store", "one"), "ingest").reads == {"code": code}
    assert first.counts == {"train": 1258, "test": 539} and first.created
    assert first.uri == f"{tmp_path}/store/datasets/sklearn_digits/{first.digest}"
    assert load_manifest(first.uri).digest == first.digest
    assert read_split(first.uri, "train").images.shape == (1258, 8, 8, 1)
    progress = json.loads((tmp_path / "store" / "runs" / "one" / "steps" / "ingest" / "progress.json").read_text())
    assert progress["done"] == progress["total"] == 539, "test images, compared with the training images"
    assert do("ingest", config(test_fraction=0.2), "other").digest != first.digest
    before = {path: path.stat().st_mtime_ns for path in Path(first.uri).rglob("*")}
    assert do("ingest", config(test_fraction=0.3), "two") == replace(first, created=False)
    assert {path: path.stat().st_mtime_ns for path in Path(first.uri).rglob("*")} == before
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "open_source", None)  # the source is not even opened
        assert do("ingest", config(test_fraction=0.3), "one") == first
    shutil.rmtree(first.uri)
    assert do("ingest", config(test_fraction=0.3), "one") == first
    assert load_manifest(first.uri).digest == first.digest


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(40):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 6 * number, np.uint8)).save(path)
    return tmp_path / "images"


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_refuses_other_images_before_it_is_touched(config, photos: Path, tmp_path: Path, capfd) -> None:
    experiment = config(source="image_folder", root=str(photos), test_fraction=0.2)
    (experiment_file := tmp_path / "grows.yaml").write_text(to_yaml(experiment))
    first = do("ingest", experiment, "grows")
    folder = run_folder(experiment, "grows")
    write_outcome(folder, Outcome("FINISHED"))
    before = files_of(Path(folder.uri))
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(photos / "a" / "new.png")
    for number in (0, 2):
        (photos / "a" / f"{number}.png").unlink()
    for command in ("run", "ingest"):
        code = app.main([command, "--config", str(experiment_file), "--run", "grows"], standalone_mode=False)
        said = capfd.readouterr().err
        assert code == 2
        assert re.search(r"'grows'.* 1 are new, 2 are gone.* --run digits-[0-9a-f]{8}$", said, re.MULTILINE)
    for own in ("log.txt", ".lock"):  # of the command
        (Path(folder.uri) / own).unlink()
    assert files_of(Path(folder.uri)) == before
    (offered,) = set(re.findall(r"--run (digits-[0-9a-f]{8})$", said, re.MULTILINE))
    own = do("ingest", experiment, offered)
    assert own.digest.startswith(offered.removeprefix("digits-")) and own.digest != first.digest
    (photos / "a" / "4.png").rename(photos / "a" / "renamed.png")
    with refused("--run", error=ForeignRun):
        do("ingest", experiment, offered)
    with refused("--run", error=ForeignRun):  # of the config, and no image is read
        do("ingest", config(source="image_folder", root=str(photos), test_fraction=0.3), "grows")


def test_a_folder_that_has_moved_or_is_away_is_that_of_the_run(config, photos: Path, tmp_path: Path, monkeypatch):
    def experiment(root: Path) -> Config:
        return config(source="image_folder", root=str(root), test_fraction=0.2)

    first = do("ingest", experiment(photos), "one")
    os.utime(photos / "a" / "0.png")  # it may have changed
    assert do("ingest", experiment(photos), "one") == first
    copied = shutil.copytree(photos, tmp_path / "copied")
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "open_source", None)  # nothing is read
        shutil.move(copied, moved := tmp_path / "moved")
        assert do("ingest", experiment(moved), "one") == first
        owner = from_yaml(Path(run_folder(experiment(moved), "one").config).read_text())
        assert owner.data.root == str(moved)
        shutil.rmtree(moved)
        shutil.move(photos, photos.with_name("away"))
        for known in (moved, photos, Path(owner.data.root)):
            assert do("ingest", experiment(known), "one") == first
    before = files_of(tmp_path / "store" / "runs")
    with refused("data.root", error=NotFound):
        do("ingest", experiment(tmp_path / "nowhere"), "one")
    after = files_of(tmp_path / "store" / "runs")
    assert {path.name for path in after if after[path] != before.get(path)} == {"attempt.json"}


def test_the_ingest_task_of_kfp_and_its_end_leave_a_run_of_other_images(config, photos: Path, monkeypatch) -> None:
    experiment = config(source="image_folder", root=str(photos))
    do("ingest", experiment, "kfp")
    write_outcome(folder := run_folder(experiment, "kfp"), Outcome("FINISHED"))
    before = files_of(Path(folder.uri))
    shutil.move(photos / "a" / "0.png", photos.with_name("away.png"))
    monkeypatch.setenv(KFP_RUN_ID, "r-1")
    with refused("--run", error=ForeignRun):
        do_as_task("ingest", experiment, "kfp")
    ended = finish.run(experiment, run="kfp", state="FAILED", kfp=KfpRun("r-1", "w"))
    assert ended.status == "FAILED" and "1 are gone" in ended.reason
    after = files_of(Path(folder.uri))
    assert after.pop(Path(folder.step("ingest", "refused-r-1"))) and after == before
    shutil.move(photos.with_name("away.png"), photos / "a" / "0.png")
    do_as_task("ingest", experiment, "kfp")
    assert finish.run(experiment, run="kfp", state="SUCCEEDED", kfp=KfpRun("r-1", "w")).status == "FINISHED"


def test_bad_images_are_skipped_and_equal_ones_told_and_a_failure_leaves_nothing(config, photos, tmp_path):
    (photos / "b" / "5.png").write_bytes(b"broken")
    shutil.copy(photos / "a" / "0.png", photos / "a" / "copy.png")
    shutil.copy(photos / "a" / "2.png", photos / "b" / "other.png")
    for root, key, error in (
        (tmp_path / "nowhere", "data.root", NotFound),
        (photos, str(photos / "b" / "5.png"), UserError),  # which the run may read after the failure
    ):
        with refused(key, error=error):
            do("ingest", config(source="image_folder", root=str(root)), "strict")
    assert not list(tmp_path.rglob("*.parquet"))
    result = do("ingest", config(source="image_folder", root=str(photos), on_bad_image="skip"), "lenient")
    assert [Path(image.name).name for image in load_manifest(result.uri).skipped] == ["5.png"]
    assert (result.repeated + result.left_out, len(result.notes)) == (2, 4)
    assert Path(result.uri, "near_duplicates.png").exists(), "flat images differ in brightness alone"
    assert sum(result.counts.values()) == 41 - result.left_out
    lines = from_csv(Path(result.uri, DUPLICATES).read_text())
    assert lines == sorted(lines) and {each.kind for each in lines} == {"equal", "near"}
    equal = [(*sorted([each[0::3], each[1::3]]),) for each in lines if each.kind == "equal"]
    assert sorted(equal) == [
        (("a/0.png", "a"), ("a/copy.png", "a")),
        (("a/2.png", "a"), ("b/other.png", "b")),
    ]
    names = {name: f"{name.split('/')[0]}" for each in lines for name in each[:2]}
    assert all(each[3:] == (names[each.path], names[each.other_path]) for each in lines)
    assert sum("a/2.png" in note and "b/other.png" in note for note in result.notes) == 1
    before = files_of(Path(result.uri))
    do("ingest", config(source="image_folder", root=str(photos), on_bad_image="skip"), "again")
    assert files_of(Path(result.uri)) == before


def test_a_mirrored_test_image_is_left_out_and_named(config, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    images[8] = images[2, :, ::-1]
    for number, image in enumerate(images):
        path = tmp_path / "images" / ("train" if number < 4 else "test") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    source = {"source": "image_folder", "root": str(tmp_path / "images")}
    uris = [do("ingest", config(**source, horizontal_flip=flip), f"flip-{flip}").uri for flip in ("true", "false")]
    mirrored, plain = (from_csv(Path(uri, DUPLICATES).read_text()) for uri in uris)
    assert (mirrored, plain) == ([("train/2.png", "test/8.png", "mirrored", "", "")], [])


def test_whose_the_images_are_is_told_and_decides_nothing(config, photos: Path, monkeypatch) -> None:
    source = {"source": "image_folder", "root": str(photos)}
    first = do("ingest", config(**source), "one")
    assert load_manifest(first.uri).owner == ""
    terms = {"license": "CC0", "owner": "Me", "url": "https://example.org"}
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "open_source", None)  # nothing is read
        assert do("ingest", config(**source, **terms), "one") == first, "the run is the same"
    assert do("ingest", config(**source, **terms), "two").digest == first.digest
    assert load_manifest(first.uri).owner == "", "a dataset never changes; the cards read the config first"
    manifest = load_manifest(do("ingest", config(**source, **terms, max_images=20), "three").uri)
    assert (manifest.license, manifest.owner, manifest.url) == ("CC0", "Me", "https://example.org")
