"""Ingestion part by part: the dataset of one pass, from a bucket too; and after a stop only what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from experiments import tiny
from image_folders import Formats

from ncsn import storage
from ncsn.config import to_yaml
from ncsn.config.schema import DataConfig
from ncsn.data.dataset import write_dataset
from ncsn.data.format import Manifest, load_manifest, read_split
from ncsn.data.sources import open_source
from ncsn.progress import Progress

ON_RAY = """
import runpy
import ncsn.data.format as format
import ncsn.distributed.ray_calls as ray_calls
ray_calls.FEW_CORES, format.PART_IMAGES = 0, 50
runpy.run_module("ncsn", run_name="__main__", alter_sys=True)
"""
DATA = "data={source: image_folder, image_size: 8, channels: 1, test_fraction: 0.2, on_bad_image: skip}"


def shard(number: int) -> bytes:
    """60 images as WebDataset: image 7 is broken, image 70 has 16 bits, and images repeat from 110 on."""
    members = {}
    for place in range(60 * number, 60 * number + 60):
        pixels = np.random.default_rng(place % 110).integers(0, 256, (12, 12), np.uint8)
        image = Formats.image(pixels.astype(np.uint16) * 257 if place == 70 else pixels)
        members |= {f"{place:05d}.png": b"broken" if place == 7 else image, f"{place:05d}.cls": str(place % 3).encode()}
    return Formats.tar(members)


def assert_made_in_one_pass(found: Manifest, data: DataConfig, folder: Path, *, rows: int) -> str:
    """The URI of the dataset of one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncsn.data.format.PART_IMAGES", rows)
        expected = write_dataset(open_source(data), str(folder), name="image_folder", data=data)
    assert replace(found, parts={}) == replace(expected.manifest, parts={})
    assert found.left_out > 0 and found.repeated != {"train": 0, "test": 0} and found.conversions == {"16-bit": 1}
    assert [Path(image.name).name for image in found.skipped] == ["0.tar:00007.png"]
    assert sum(part.rows for part in found.parts["train"]) == found.counts["train"]
    return expected.uri


@pytest.mark.slow
def test_shards_in_a_bucket_become_the_dataset_of_one_pass(s3_root, tmp_path, monkeypatch):
    for number in range(3):
        storage.write_bytes(f"{s3_root}/shards/{number}.tar", shard(number))
    config = tiny(f"{s3_root}/store", DATA, f"data.root={s3_root}/shards")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    command = [sys.executable, "-c", ON_RAY, "ingest", "--config", f"{tmp_path}/config.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    manifest = load_manifest(result["uri"])
    expected = assert_made_in_one_pass(manifest, config.data, tmp_path / "one-pass", rows=50)
    assert (result["digest"], result["created"]) == (manifest.digest, True)
    assert len(manifest.parts["train"]) == 3  # of 144 images offered, 50 to a part
    assert np.array_equal(read_split(result["uri"], "test").images, read_split(expected, "test").images)
    files = storage.list_entries(f"{s3_root}/store/datasets/image_folder", files=True)
    assert files and not [each.path for each in files if each.path.startswith(".parts-")]


def test_one_process_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("ncsn.data.format.PART_IMAGES", 20)
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.tar").write_bytes(shard(number))
    data, store = tiny(tmp_path, DATA, f"data.root={tmp_path}/images").data, tmp_path / "store"

    def ingest(progress):
        source = open_source(data)
        return write_dataset(source, str(store), name="image_folder", data=data, fingerprint="x", progress=progress)

    def parts() -> dict[str, int]:
        """Part below the store -> when it was written."""
        written = [path for path in store.glob("*/*/part-*.parquet") if ".tmp-" not in str(path)]
        return {"/".join(path.parts[-2:]): path.stat().st_mtime_ns for path in written}

    class Stop(Progress):
        def changed(self) -> None:
            if self.done > 45:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(Stop())
    before = parts()
    assert len(before) == 2
    dataset = ingest(None)
    assert dataset.created and before.items() <= parts().items(), "not written again"
    assert_made_in_one_pass(dataset.manifest, data, tmp_path / "one-pass", rows=20)
    again = ingest(None)
    assert (again.uri, again.created) == (dataset.uri, False)
