"""The sample step without a cluster: a single shard is made in this process."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pyarrow.parquet as pq
import pytest
from do import do
from experiments import digits, tiny
from PIL import Image

from ncsn.config import Config, from_yaml, to_yaml
from ncsn.config.schema import Pixels
from ncsn.data.format import from_table, load_manifest, read_split
from ncsn.data.samples import SampleSet
from ncsn.data.sources import open_source
from ncsn.model.checkpoint import load_checkpoint
from ncsn.tracking.client import connect
from ncsn.tracking.registry import write_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny(tmp_path / "store")


@pytest.fixture
def dataset(config: Config, tmp_path: Path) -> str:
    return digits(config, tmp_path / "data")


@pytest.fixture
def checkpoint(config: Config, dataset: str, save_untrained, tmp_path: Path) -> str:
    save_untrained(config, dataset, tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_images_pictures_and_their_score_are_stored_and_only_what_is_missing_is_made_again(
    config, dataset, checkpoint
) -> None:
    result = do("sample", config, "mine", checkpoint=checkpoint, score=dataset)
    assert (result.num_images, result.nfe, result.checkpoint) == (10, 4 + 1, checkpoint)
    assert result.images_per_second == pytest.approx(10 / result.seconds, rel=0.1)
    images, levels = SampleSet(result.uri, 10).read(0, 10), np.load(Path(result.uri) / "levels.npy")
    assert (images.shape, levels.shape) == ((10, 8, 8, 1), (5, 8, 8, 8, 1))
    np.testing.assert_array_equal(levels[-1], images[:8])
    assert json.loads((Path(result.uri) / "manifest.json").read_text())["nfe"] == 5
    connection = connect(config)
    runs = connection.client.search_runs([connection.experiment_id])
    (run,) = [run for run in runs if run.data.tags.get("ncsn.step") == "sample"]
    assert run.data.metrics["sample/nfe"] == 5 and run.data.metrics["sample/running_classifier_fid"] > 0
    assert {"samples.uri": result.uri, "checkpoint.uri": checkpoint}.items() <= run.data.tags.items()
    assert do("sample", config, "mine", checkpoint=checkpoint) == result, "its seconds too"

    (shard,) = Path(result.uri).glob("shard-*.parquet")
    written = shard.stat().st_mtime_ns
    Path(result.grid).unlink()
    again = do("sample", config, "mine", checkpoint=checkpoint)
    assert again.images_per_second is None, "it made none"
    assert Path(result.grid).exists() and shard.stat().st_mtime_ns == written
    Path(result.grid).unlink()
    shard.unlink()
    do("sample", config, "mine", checkpoint=checkpoint)
    np.testing.assert_array_equal(SampleSet(result.uri, 10).read(0, 10), images)
    fewer = from_yaml(to_yaml(config), overrides=["sampling.num_images=4"])
    kept = do("sample", fewer, "mine", checkpoint=checkpoint)
    assert (kept.uri, kept.num_images) == (result.uri, 10), "the set and what is said of it stay whole"


@pytest.mark.slow
def test_scans_of_sixteen_bits_from_their_files_to_the_registered_model(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    scans = np.random.default_rng(0).integers(2000, 4096, (30, 8, 12), np.uint16)
    for number, scan in enumerate(scans):
        Image.fromarray(scan).save(tmp_path / "scans" / f"{number}.tif")
    data = "data={source: image_folder, image_size: [8, 12], channels: 1, dtype: uint16, value_range: [0, 4095]}"
    train = "train={batch_size: 8, num_images: 64, checkpoint_every_images: 64, report_every_images: 32}"
    settings = (data, f"data.root={tmp_path}/scans", train, "sampling.num_images=6", "sampling.grays=exact")
    config = tiny(tmp_path / "store", *settings)
    dataset = do("ingest", config, "mine").uri
    manifest, stored = load_manifest(dataset), read_split(dataset, "train").images
    assert (manifest.pixels, manifest.conversions) == (Pixels((8, 12, 1), "uint16", (0, 4095)), {})
    assert {image.tobytes() for image in stored} < {scan.tobytes() for scan in scans}
    again = config.data.model_copy(update={"source": "parquet", "root": dataset})
    rows = next(iter(open_source(again).splits["train"].stream()))
    assert rows.image.dtype == np.uint16 and np.array_equal(rows.image, stored[0])
    trained = do("train", config, "mine", dataset=dataset).checkpoint
    checkpoint = load_checkpoint(trained)
    assert float(checkpoint.moments.mean.mean()) == pytest.approx(stored.mean() / 4095, abs=1e-3)
    result = do("sample", config, "mine", checkpoint=trained)
    samples = from_table(pq.read_table(Path(result.uri) / "shard-000000000-000000006.parquet")).images
    assert (samples.dtype, samples.shape) == (np.uint16, (6, 8, 12, 1)) and 255 < samples.max() <= 4095
    assert Image.open(result.grid).mode == Image.open(result.strip).mode == "L"
    measured = do("evaluate", config, "mine", samples=result.uri, dataset=dataset)
    assert len(measured.audit["worst"]) == 6 and not measured.audit["copies"]["copies"]
    write_model(tmp_path / "model", checkpoint, files={})
    made = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(None, params={"n_images": 6})
    assert made.dtype == np.uint16
    np.testing.assert_allclose(made.astype(int), samples.astype(int), atol=1)


def test_images_of_classes_keep_them_and_the_grid_has_a_row_for_each(config, dataset, save_untrained, tmp_path) -> None:
    settings = ["data.num_classes=10", "train.label_dropout=0.1", "sampling.sampler={kind: karras_heun, num_steps: 3}"]
    known = from_yaml(to_yaml(config), overrides=[*settings, "sampling.num_images=23", "sampling.batch_size=23"])
    save_untrained(known, dataset, tmp_path / "known")
    result = do("sample", known, "mine", checkpoint=str(tmp_path / "known"))
    assert SampleSet(result.uri, 23).labels().tolist() == [number % 10 for number in range(23)]
    assert SampleSet(result.uri, 5).labels().tolist() == list(range(5))
    manifest = json.loads((Path(result.uri) / "manifest.json").read_text())
    assert manifest["classes"] == list(load_manifest(dataset).class_names) and manifest["rows"] == list(range(10))
    grid = Image.open(result.grid)
    assert grid.height > 4 * grid.width, "ten rows of two"
    one = from_yaml(to_yaml(known), overrides=["sampling.label=7", "sampling.num_images=3"])
    other = do("sample", one, "mine", checkpoint=str(tmp_path / "known"))
    assert other.uri != result.uri and SampleSet(other.uri, 3).labels().tolist() == [7, 7, 7]


def test_samples_by_autoguidance_are_those_of_the_guides_weights(
    config, dataset, checkpoint, save_untrained, tmp_path
) -> None:
    found = [do("sample", config, "mine", checkpoint=checkpoint)]
    for name, width in (("one", 8), ("same", 8), ("other", 16)):
        save_untrained(from_yaml(to_yaml(config), overrides=[f"network.widths=[{width}]"]), dataset, tmp_path / name)
        auto = f"sampling.guidance={{kind: autoguidance, checkpoint: {tmp_path / name}, weight: 2}}"
        guided = from_yaml(to_yaml(config), overrides=[auto])
        found.append(do("sample", guided, "mine", checkpoint=checkpoint))
    plain, one, same, other = (each.uri for each in found)
    assert one == same and len({plain, one, other}) == 3
    assert found[1].nfe == 10
