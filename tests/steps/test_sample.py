"""The sample step without a cluster: a single shard is made in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pyarrow.parquet as pq
import pytest
from do import do
from PIL import Image

from ncsn import storage
from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.schema import Pixels
from ncsn.data.dataset import write_dataset
from ncsn.data.format import from_table, load_manifest, read_split
from ncsn.data.samples import SampleSet
from ncsn.data.sources import open_source
from ncsn.model.checkpoint import load_checkpoint
from ncsn.report.images import grid_png
from ncsn.report.words import read_metrics
from ncsn.tracking.client import connect
from ncsn.tracking.registry import write_model

TINY = """
name: tiny
data: {{source: sklearn_digits, image_size: 8, channels: 1, test_fraction: 0.3}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{num_images: 128, checkpoint_every_images: 128, report_every_images: 128}}
sampling: {{num_images: 10, batch_size: 10, sampler: {{kind: annealed_langevin, steps_per_level: 1}}}}
evaluation: {{classifier_epochs: 1, num_splits: 2}}
storage: {{root: {root}}}
"""
SaveUntrained = Callable[[Config, str, Path], None]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return from_yaml(TINY.format(root=tmp_path / "store"))


@pytest.fixture
def dataset(config: Config, tmp_path: Path) -> str:
    return write_dataset(open_source(config.data), str(tmp_path / "data"), name="digits", data=config.data).uri


@pytest.fixture
def checkpoint(config: Config, dataset: str, save_untrained: SaveUntrained, tmp_path: Path) -> str:
    save_untrained(config, dataset, tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_images_pictures_and_their_score_are_stored_and_found_again(
    config: Config, dataset: str, checkpoint: str
) -> None:
    result = do("sample", config, "mine", checkpoint=checkpoint, score=dataset)
    assert (result.num_images, result.nfe, result.checkpoint) == (10, 4 + 1, checkpoint)
    images = SampleSet(result.uri, 10).read(0, 10)
    assert images.shape == (10, 8, 8, 1)
    levels = np.load(Path(result.uri) / "levels.npy")
    assert levels.shape == (5, 8, 8, 8, 1)
    assert np.array_equal(levels[-1], images[:8])
    assert json.loads((Path(result.uri) / "manifest.json").read_text())["nfe"] == 5
    connection = connect(config)
    runs = connection.client.search_runs([connection.experiment_id])
    (run,) = [run for run in runs if run.data.tags.get("ncsn.step") == "sample"]
    assert run.data.metrics["sample/nfe"] == 5
    assert run.data.metrics["sample/running_classifier_fid"] > 0
    assert {"samples.uri": result.uri, "checkpoint.uri": checkpoint}.items() <= run.data.tags.items()
    assert do("sample", config, "mine", checkpoint=checkpoint) == result, "its seconds too"


SCANS = """
name: scans
data: {{source: image_folder, root: {images}, image_size: [8, 12], channels: 1, dtype: uint16, value_range: [0, 4095]}}
noise: {{num_levels: 4}}
network: {{kind: unet, widths: [8], blocks_per_resolution: 1, embedding_features: 8}}
train: {{batch_size: 8, num_images: 64, checkpoint_every_images: 64, report_every_images: 32}}
sampling: {{num_images: 6, batch_size: 6, grays: exact, sampler: {{kind: annealed_langevin, steps_per_level: 1}}}}
evaluation: {{classifier_epochs: 1, num_splits: 2}}
storage: {{root: {root}}}
"""


@pytest.mark.slow
def test_scans_of_sixteen_bits_from_their_files_to_the_registered_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "scans").mkdir()
    scans = np.random.default_rng(0).integers(2000, 4096, (30, 8, 12), np.uint16)
    for number, scan in enumerate(scans):
        Image.fromarray(scan).save(tmp_path / "scans" / f"{number}.tif")
    config = from_yaml(SCANS.format(images=tmp_path / "scans", root=tmp_path / "store"))
    dataset = do("ingest", config, "mine").uri
    manifest, stored = load_manifest(dataset), read_split(dataset, "train").images
    assert (manifest.pixels, manifest.conversions) == (Pixels((8, 12, 1), "uint16", (0, 4095)), {})
    assert {image.tobytes() for image in stored} < {scan.tobytes() for scan in scans}
    again = config.data.model_copy(update={"source": "parquet", "root": dataset})
    rows = next(iter(open_source(again).splits["train"].stream()))
    assert rows.image.dtype == np.uint16 and np.array_equal(rows.image, stored[0])
    checkpoint = load_checkpoint(do("train", config, "mine", dataset=dataset).checkpoint)
    assert float(checkpoint.moments.mean.mean()) == pytest.approx(stored.mean() / 4095, abs=1e-3)
    result = do("sample", config, "mine", checkpoint=do("train", config, "mine", dataset=dataset).checkpoint)
    samples = from_table(pq.read_table(Path(result.uri) / "shard-000000000-000000006.parquet")).images
    assert (samples.dtype, samples.shape) == (np.uint16, (6, 8, 12, 1)) and 255 < samples.max() <= 4095
    assert Image.open(result.grid).mode == Image.open(result.strip).mode == "L"
    measured = do("evaluate", config, "mine", samples=result.uri, dataset=dataset)
    assert 0 < measured.metrics["eval/clusters_nn_distance_n6"] < 255 * 96**0.5
    write_model(tmp_path / "model", checkpoint, files={})
    made = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(None, params={"n_images": 6})
    assert made.dtype == np.uint16
    np.testing.assert_allclose(made.astype(int), samples.astype(int), atol=1)


def test_only_what_is_missing_is_made_again(config: Config, checkpoint: str) -> None:
    result = do("sample", config, "mine", checkpoint=checkpoint)
    (shard,) = Path(result.uri).glob("shard-*.parquet")
    before = SampleSet(result.uri, 10).read(0, 10)
    Path(result.grid).unlink()
    written = shard.stat().st_mtime_ns
    assert result.images_per_second == pytest.approx(10 / result.seconds, rel=0.1)
    again = do("sample", config, "mine", checkpoint=checkpoint)
    assert again.images_per_second is None, "it made none"
    assert Path(result.grid).exists()
    assert shard.stat().st_mtime_ns == written
    Path(result.grid).unlink()
    shard.unlink()
    do("sample", config, "mine", checkpoint=checkpoint)
    after = SampleSet(result.uri, 10).read(0, 10)
    assert np.array_equal(before, after)
    fewer = from_yaml(to_yaml(config), overrides=["sampling.num_images=4"])
    kept = do("sample", fewer, "mine", checkpoint=checkpoint)
    assert (kept.uri, kept.num_images) == (result.uri, 10), "the set and what is said of it stay whole"


CLASSES = ("data.num_classes=10", "train.label_dropout=0.1", "sampling.sampler={kind: karras_heun, num_steps: 3}")


def test_images_of_classes_keep_them_and_the_grid_has_a_row_for_each(
    config: Config, dataset: str, save_untrained: SaveUntrained, tmp_path: Path
) -> None:
    many = [*CLASSES, "sampling.num_images=23", "sampling.batch_size=23"]
    known = from_yaml(to_yaml(config), overrides=many)
    save_untrained(known, dataset, tmp_path / "known")
    result = do("sample", known, "mine", checkpoint=str(tmp_path / "known"))
    assert SampleSet(result.uri, 23).labels().tolist() == [number % 10 for number in range(23)]
    assert SampleSet(result.uri, 5).labels().tolist() == list(range(5))
    manifest = json.loads((Path(result.uri) / "manifest.json").read_text())
    assert manifest["classes"] == list(load_manifest(dataset).class_names) and manifest["rows"] == list(range(10))
    with Image.open(result.grid) as grid:
        images = SampleSet(result.uri, 23).read(0, 23)
        rows = np.stack([images[:10], images[10:20]], axis=1).reshape(-1, 8, 8, 1)
        np.testing.assert_array_equal(np.asarray(grid), np.asarray(Image.open(io.BytesIO(grid_png(rows, columns=2)))))
    one = from_yaml(to_yaml(known), overrides=["sampling.label=7", "sampling.num_images=3"])
    other = do("sample", one, "mine", checkpoint=str(tmp_path / "known"))
    assert other.uri != result.uri and SampleSet(other.uri, 3).labels().tolist() == [7, 7, 7]


def test_samples_by_autoguidance_are_those_of_the_guides_weights(
    config: Config, dataset: str, checkpoint: str, save_untrained: SaveUntrained, tmp_path: Path
) -> None:
    guides = []
    for name, width in (("one", 8), ("same", 8), ("other", 16)):
        save_untrained(from_yaml(to_yaml(config), overrides=[f"network.widths=[{width}]"]), dataset, tmp_path / name)
        guides.append(f"sampling.guidance={{kind: autoguidance, checkpoint: {tmp_path / name}, weight: 2}}")
    found = [
        do("sample", from_yaml(to_yaml(config), overrides=[each]), "mine", checkpoint=checkpoint) for each in guides
    ]
    assert found[0].uri == found[1].uri != found[2].uri
    assert found[0].nfe == 10
    plain = do("sample", config, "mine", checkpoint=checkpoint)
    assert plain.uri not in {each.uri for each in found}


def test_test_images_can_be_the_reference(config: Config, dataset: str, checkpoint: str) -> None:
    samples = do("sample", config, "mine", checkpoint=checkpoint).uri
    train = do("evaluate", config, "mine", samples=samples, dataset=dataset)
    against = from_yaml(to_yaml(config), overrides=["evaluation.reference_split=test"])
    test = do("evaluate", against, "mine", samples=samples, dataset=dataset)
    assert test.metrics["eval/classifier_vs_test_fid_n10"] != train.metrics["eval/classifier_fid_n10"]
    assert test.metrics["eval/classifier_vs_test_memorized_n10"] == train.metrics["eval/classifier_memorized_n10"]
    assert "eval/real_classifier_vs_test_fid_n10" in test.real_metrics and test.fingerprint != train.fingerprint
    # The real images are training images then, but not those whose copies are counted.
    assert test.real_metrics["eval/real_classifier_vs_test_memorized_n10"] < 1
    assert test.real_metrics["eval/real_classifier_vs_test_nn_distance_n10"] > 0
    assert train.memorization | {"num_real_images": 10} == test.memorization
    assert {reading.split for reading in read_metrics(test.metrics).values()} == {"test"}
    written = storage.read_json(test.uri)
    assert written["reference_split"] == "test" and "features_rows" not in written["nearest_training_images"][0]
