"""The ingest step: done once, and nothing half-written when it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refused import refused

from ncsn.config import Config, from_yaml
from ncsn.data.format import load_manifest, read_split
from ncsn.errors import NotFound, UserError
from ncsn.report.words import result_line
from ncsn.steps import ingest

EXPERIMENT = """
name: digits
data: {source: sklearn_digits, image_size: 8, channels: 1}
network: {kind: unet, widths: [8]}
train: {num_images: 128, checkpoint_every_images: 128, report_every_images: 128}
sampling: {sampler: {kind: annealed_langevin}}
"""


@pytest.fixture(scope="module", autouse=True)
def _tracked(tmp_path_factory):
    """One MLflow database for all tests: making it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.fixture
def config(tmp_path):
    """An experiment on digits with its store below the test's folder."""

    def make(**data) -> Config:
        return from_yaml(
            EXPERIMENT, overrides=[f"storage.root={tmp_path}/store", *(f"data.{k}={v}" for k, v in data.items())]
        )

    return make


def datasets(tmp_path: Path) -> list[str]:
    return sorted(path.relative_to(tmp_path / "store" / "datasets").as_posix() for path in tmp_path.rglob("*.parquet"))


def test_digits_become_a_dataset(config, tmp_path):
    result = ingest.run(config(test_fraction=0.3), run="one")
    assert result.counts == {"train": 1258, "test": 539}
    assert result.created
    assert result.uri == f"{tmp_path}/store/datasets/sklearn_digits/{result.digest}"
    assert load_manifest(result.uri).digest == result.digest
    assert read_split(result.uri, "train").images.shape == (1258, 8, 8, 1)
    progress = json.loads((tmp_path / "store" / "runs" / "one" / "steps" / "ingest" / "progress.json").read_text())
    assert progress["done"] == progress["total"] == 1797 and progress["unit"] == "images"
    assert ingest.run(config(test_fraction=0.2), run="other").digest != result.digest


def test_nothing_is_written_twice_and_what_is_gone_is_made_again(config, monkeypatch):
    first = ingest.run(config(), run="one")
    before = {path: path.stat().st_mtime_ns for path in Path(first.uri).rglob("*")}
    assert ingest.run(config(), run="two") == replace(first, created=False)
    assert {path: path.stat().st_mtime_ns for path in Path(first.uri).rglob("*")} == before
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "open_source", None)  # the source is not even opened
        assert ingest.run(config(), run="one") == first
    shutil.rmtree(first.uri)
    assert ingest.run(config(), run="one") == first
    assert load_manifest(first.uri).digest == first.digest


def test_new_files_in_the_folder_are_noticed(config, tmp_path):
    folder = tmp_path / "images"
    for place, label in enumerate(("a", "b")):
        (folder / label).mkdir(parents=True)
        for k in range(20):
            Image.fromarray(np.full((8, 8), 10 * k + place, np.uint8)).save(folder / label / f"{k}.png")
    experiment = config(source="image_folder", root=str(folder), test_fraction=0.2)
    first = ingest.run(experiment, run="grows")
    assert ingest.run(experiment, run="grows") == first
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "a" / "new.png")
    second = ingest.run(experiment, run="grows")
    assert sum(second.counts.values()) == sum(first.counts.values()) + 1
    assert second.digest != first.digest


def test_a_failure_leaves_no_dataset_and_the_run_to_another_folder(config, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("x")
    for root, error in (("nowhere", NotFound), ("images", UserError)):
        with refused("data.root", error=error):
            ingest.run(config(source="image_folder", root=str(tmp_path / root)), run="one")
    assert datasets(tmp_path) == []


def test_bad_images_are_skipped_and_named_in_the_manifest(config, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(np.full((10, 10), number, np.uint8)).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes(b"broken")
    settings = {"source": "image_folder", "root": str(folder), "test_fraction": 0.25}
    with refused(str(folder / "5.png")):
        ingest.run(config(**settings), run="strict")
    assert datasets(tmp_path) == []
    result = ingest.run(config(**settings, on_bad_image="skip"), run="lenient")
    assert sum(result.counts.values()) == 19
    assert [Path(image.name).name for image in load_manifest(result.uri).skipped] == ["5.png"]
    assert len(result.notes) == 1 and "5.png" in result.notes[0]


def test_equal_images_are_told(config, tmp_path):
    folder = tmp_path / "images"
    for split, numbers in (("train", [0, 1, 2, 2, 3, 3, 3]), ("test", [2, 7, 3, 8, 8])):
        (folder / split).mkdir(parents=True)
        for place, number in enumerate(numbers):
            Image.fromarray(np.full((9, 9), number, np.uint8)).save(folder / split / f"{place}.png")
    result = ingest.run(config(source="image_folder", root=str(folder)), run="some")
    assert (result.counts, result.repeated, result.left_out) == ({"train": 7, "test": 3}, 4, 2)
    (note,) = result.notes
    assert note.startswith("3 of 7 train images repeat") and "; 1 of 3 test images" in note and "; 2 left" in note
    assert result_line("ingest", asdict(result)).startswith("7 train + 3 test images, 4 repeated, 2 left out")


def test_a_folder_of_few_contents_leaves_no_test_images(config, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(100):
        Image.fromarray(np.full((9, 9), number % 11, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    with refused("data.source") as error:
        ingest.run(config(source="image_folder", root=str(tmp_path / "images")), run="few")
    assert "79 of 90 train images" in str(error.value) and "10 left out" in str(error.value)
    assert datasets(tmp_path) == []
